"""What is wrong with a study, all of it at once, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from hrl_policies.study.spec import (
    SESSION_PARAMETERS,
    TRAINING_PARAMETERS,
    PlannedRun,
    StudyError,
    StudyMethod,
    StudySpec,
    planned_runs,
    sweeps,
)
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import all_methods, method
from kuaifair_env import ENVIRONMENTS
from kuaifair_env.abandonment import LEAVE_RULES
from kuaifair_env.data.sources import find_source
from kuaifair_env.registration import Source, WorldSettings
from kuaifair_env.response.fitting import ResponseKind
from kuaifair_env.simulator import InitialHistory, Repeats

_TRIAL_WORLD = "KuaiFair-Toy-v0"
_CHOICES = {
    "leave": tuple(LEAVE_RULES),
    "initial_history": get_args(InitialHistory),
    "repeats": get_args(Repeats),
}
_PATHS = ("data_dir", "split", "encoder")


def check_study(
    spec: StudySpec,
    problems: list[str] | None = None,
    *,
    worlds: Mapping[str, WorldPair] | None = None,
    data_dir: str | Path | None = None,
    where: str = "",
) -> list[PlannedRun]:
    """Checks a study and returns its runs.

    Args:
        spec: The study.
        problems: What is already known to be wrong (see ``spec.read_study``).
        worlds: Worlds by name that are passed along.
        data_dir: Folder with the official files, instead of the study's.
        where: What the message calls the study; its name if empty.

    Raises:
        StudyError: If anything is wrong; it lists everything.
    """
    given = worlds or {}
    found = [*(problems or []), *_name_problems(spec, given), *_value_problems(spec)]
    found += _data_problems(spec, given, data_dir or spec.data_dir)
    buildable = _with_known_methods(spec)
    found += _trial_problems(buildable)
    # Only where single settings are right can it be said whether they go together.
    runs = [] if found else planned_runs(spec)
    found += [] if found else _run_problems(runs, given)
    if found:
        raise StudyError(where or f"the study {spec.name!r}", list(dict.fromkeys(found)))
    return runs


def study_warnings(
    spec: StudySpec, worlds: Mapping[str, WorldPair] | None = None, data_dir: str | Path | None = None
) -> list[str]:
    """Returns what a reader of the results must know: which worlds their synthetic twins stand in for."""
    return [
        f"{world}: the official files were not found, so the SYNTHETIC TWIN stands in; "
        f"get them with: kuaifair data fetch {ENVIRONMENTS[world].official}"
        for world in spec.worlds
        if world not in (worlds or {})
        and spec.world_settings.get("source", "auto") == "auto"
        and _missing(world, data_dir or spec.data_dir)
    ]


def _name_problems(spec: StudySpec, given: Mapping[str, WorldPair]) -> Iterator[str]:
    from dsrm.item_term import ITEM_TERM_MODES
    from dsrm.pretrain import MODES

    for entry in spec.methods:
        if entry.name not in all_methods():
            yield f"no method is called {entry.name!r}; there are {', '.join(all_methods())}"
    for world in spec.worlds:
        if world not in ENVIRONMENTS and world not in given:
            yield f"no world is called {world!r}; there are {', '.join([*ENVIRONMENTS, *given])}"
    modes = {*spec.purifiers, *(entry.purifier or "" for entry in spec.methods)}
    for mode in sorted(modes - {"", *MODES}):
        yield f"no purifier is called {mode!r}; there are none, {', '.join(MODES)}"
    if spec.item_term not in ("", *ITEM_TERM_MODES):
        yield f"no item term is called {spec.item_term!r}; there are {', '.join(ITEM_TERM_MODES)}"
    for name, choices in _CHOICES.items():
        for value in (getattr(spec, name), *spec.sweep.get(name, ())):
            if value not in choices:
                yield f"'{name}' is one of {', '.join(choices)}, got {value!r}"
    known = [entry for entry in spec.methods if entry.name in all_methods()]
    for parameter in spec.sweep:
        if known and not any(_concerns(entry, parameter) for entry in known):
            yield (
                f"'sweep' names {parameter!r}, which no method of this study has; it may name "
                f"{', '.join((*SESSION_PARAMETERS, *TRAINING_PARAMETERS))} and hyperparameters of its methods"
            )


def _value_problems(spec: StudySpec) -> Iterator[str]:
    numbers: list[tuple[str, tuple[Any, ...], int]] = [
        ("max_lens", spec.max_lens, 1),
        ("seeds", spec.seeds, 0),
        ("control_seeds", spec.control_seeds, 0),
        ("users", (spec.users,), 2),
        ("episodes", (spec.episodes,), 1),
        ("slate_size", (spec.slate_size, *spec.sweep.get("slate_size", ())), 1),
        ("steps", () if spec.steps is None else (spec.steps,), 1),
        ("n_envs", tuple(spec.sweep.get("n_envs", ())), 1),
        ("total_steps", tuple(spec.sweep.get("total_steps", ())), 1),
        *((f"steps of '{e.name}'", () if e.steps is None else (e.steps,), 1) for e in spec.methods),
    ]
    for name, values, least in numbers:
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"'{name}' must hold whole numbers from {least}, got {value!r}"
    for value in spec.sweep.get("taste_noise", ()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            yield f"'taste_noise' must hold numbers from 0, got {value!r}"
    for name in ("worlds", "max_lens", "seeds", "control_seeds", "purifiers"):
        twice = [value for value, count in Counter(getattr(spec, name)).items() if count > 1]
        if twice:
            yield f"'{name}' names {', '.join(map(repr, twice))} more than once"
    for entry in spec.methods:
        if entry.name not in all_methods():
            continue
        own = all_methods()[entry.name]
        if own.purifier and entry.purifier == "":
            yield f"{entry.name} learns on purified states: its purifier cannot be none (its own is {own.purifier!r})"
        if not own.learns and (entry.set or entry.steps is not None):
            yield f"{entry.name} is a control: it has neither hyperparameters nor steps to set"


def _data_problems(
    spec: StudySpec, given: Mapping[str, WorldPair], data_dir: str | Path | None
) -> Iterator[str]:
    settings = spec.world_settings
    allowed = sorted(set(WorldSettings.__annotations__) - set(_PATHS))
    for name in sorted(set(settings) - set(allowed)):
        yield f"'world_settings' holds {name!r}; it may hold {', '.join(allowed)}"
    source = settings.get("source", "auto")
    for name, choices in (("source", get_args(Source)), ("response", get_args(ResponseKind))):
        if settings.get(name, choices[0]) not in choices:
            yield f"'world_settings' has {name} {settings[name]!r}; it is one of {', '.join(choices)}"
    if data_dir is not None and not Path(data_dir).expanduser().exists():
        yield f"there is no file or folder {data_dir}; data_dir must hold the official files"
    for world in spec.worlds:
        if world in given or world not in ENVIRONMENTS:
            continue
        if source == "real" and ENVIRONMENTS[world].official is None:
            yield f"{world} is synthetic: there are no real files behind it, which 'source: real' demands"
        elif source == "real" and _missing(world, data_dir):
            yield (
                f"{world} needs its official files, and they were not found (data_dir, KUAIFAIR_DATA, the cache); "
                f"get them with: kuaifair data fetch {ENVIRONMENTS[world].official}"
            )


def _run_problems(runs: list[PlannedRun], given: Mapping[str, WorldPair]) -> Iterator[str]:
    """Checks what only shows in whole runs: settings that do not go together, and runs that are the same."""
    if not runs:
        yield "there is nothing to run"
    folders: Counter[Path] = Counter()
    for run in runs:
        try:
            config = run.config()
        except ValueError as error:
            yield str(error)
            continue
        folders[run.folder] += 1
        candidates = _candidates(run.world, given)
        shown = config.session.items_per_slate
        if shown > candidates:
            yield f"{run.world} has at most {candidates} candidates, too few for slates of {shown}"
        elif config.session.repeats == "forbid" and shown * run.max_len > candidates:
            yield (
                f"'repeats: forbid' needs {run.max_len} slates of {shown} different items, but {run.world} has at most "
                f"{candidates} candidates"
            )
    for folder, count in folders.items():
        if count > 1:
            yield f"the run {folder} is planned {count} times; give methods that are alike a 'label' each"


def _trial_problems(spec: StudySpec) -> Iterator[str]:
    """Builds every method whose hyperparameters the study changes, untrained, over the toy world."""
    swept = {
        name: values
        for name, values in spec.sweep.items()
        if name not in (*SESSION_PARAMETERS, *TRAINING_PARAMETERS)
    }
    # Sessions and worlds are checked elsewhere: here they are plain.
    plain = StudySpec(spec.name, spec.methods, (_TRIAL_WORLD,), (30,), seeds=(0,), sweep=swept)
    changed = (run for run in planned_runs(plain) if run.entry.set or run.swept)
    trials = {(run.entry.name, repr({**run.entry.set, **run.swept})): run for run in changed}
    if not trials:
        return
    toy = load_worlds(_TRIAL_WORLD)
    for run in trials.values():
        yield from _trial(run, toy)


def _trial(run: PlannedRun, worlds: WorldPair) -> Iterator[str]:
    from hrl_policies.study.runner import build_policy

    try:
        build_policy(run.config(), worlds)
    except (ValueError, TypeError, AssertionError) as error:
        yield f"{run.entry.name} cannot be built with {run.variant}: {error}"


def _with_known_methods(spec: StudySpec) -> StudySpec:
    """Returns a study without the methods that cannot be built anyhow, so that the rest can be checked."""
    kept = tuple(
        entry
        for entry in spec.methods
        if entry.name in all_methods()
        and (method(entry.name).learns or not entry.set)
        and not (method(entry.name).purifier and entry.purifier == "")
    )
    return replace(spec, methods=kept)


def _concerns(entry: StudyMethod, parameter: str) -> bool:
    try:
        return sweeps(entry, parameter)
    except ValueError:
        return False


def _missing(world: str, data_dir: str | Path | None) -> bool:
    official = ENVIRONMENTS[world].official if world in ENVIRONMENTS else None
    if official is None or (data_dir is not None and not Path(data_dir).expanduser().exists()):
        return False
    return find_source(official, data_dir) is None


def _candidates(world: str, given: Mapping[str, WorldPair]) -> int:
    """Returns how many candidates a world has, or the most that it can have."""
    from kuaifair_env.synthetic.twin import twin_config

    return given[world].test.n_items if world in given else twin_config(ENVIRONMENTS[world].twin).n_items
