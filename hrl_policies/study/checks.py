"""Checks of a study: what is wrong with it, all of it at once, before anything runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from gymnasium.error import Error as GymnasiumError
from pydantic import BaseModel, ValidationError

from hrl_policies.common.yaml_files import validation_problems
from hrl_policies.study.config import RunConfig, plan_run, run_folder
from hrl_policies.study.progress import max_candidates
from hrl_policies.study.spec import (
    ENVIRONMENT_PARAMETERS,
    SESSION_PARAMETERS,
    TRAINING_PARAMETERS,
    WORLD_PARAMETERS,
    SessionSettings,
    StudyError,
    StudyMethod,
    StudySpec,
    TrainingSettings,
    max_runs,
    planned_arguments,
    planned_runs,
    sweeps,
)
from hrl_policies.worlds import WorldPair, load_worlds
from hrl_policies.zoo import all_methods, method
from kuaifair_env import ENVIRONMENTS
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.own import OwnTables
from kuaifair_env.data.popularity import PopularitySource
from kuaifair_env.data.published import DatasetName
from kuaifair_env.data.sources import find_source
from kuaifair_env.errors import DataError
from kuaifair_env.origins import OwnOrigin, Source
from kuaifair_env.registration import register_origin, replays
from kuaifair_env.replay import REPLAY_SLATE_SIZE
from kuaifair_env.response.fitting import ResponseKind
from kuaifair_env.settings import DEFAULTS

_MAX_RUNS = 20_000
"""Runs of a study at most: to check so many takes a minute."""
_TRIAL_WORLD = "KuaiFair-Toy-v0"
_SWEPT_MODELS: tuple[type[BaseModel], ...] = (SessionSettings, TrainingSettings)
_CHOICES: dict[str, tuple[str, ...]] = {
    "source": get_args(Source),
    "response": get_args(ResponseKind),
    "popularity": get_args(PopularitySource),
}


def check_study(
    spec: StudySpec,
    problems: list[str] | None = None,
    *,
    worlds: Mapping[str, WorldPair] | None = None,
    data_dir: str | Path | None = None,
    where: str = "",
) -> list[RunConfig]:
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
    own_worlds = worlds or {}
    if max_runs(spec) > _MAX_RUNS:
        too_many = f"it plans up to {max_runs(spec):,} runs, and a study has at most {_MAX_RUNS:,}; split it"
        raise StudyError(where or f"the study {spec.name!r}", [*(problems or []), too_many])
    mistakes = [
        *(problems or []),
        *_own_data_problems(spec),
        *_name_problems(spec, own_worlds),
        *filter(None, map(_method_problem, _known_methods(spec))),
        *_sweep_problems(spec),
        *_data_problems(spec, own_worlds, data_dir or spec.data_dir),
        *_trial_problems(spec),
    ]
    # Only where single settings are right can it be said whether they go together.
    mistakes = mistakes or list(_run_problems(spec, own_worlds))
    if mistakes:
        raise StudyError(where or f"the study {spec.name!r}", list(dict.fromkeys(mistakes)))
    return planned_runs(spec)


def study_warnings(spec: StudySpec, data_dir: str | Path | None = None) -> list[str]:
    """Returns what a reader of the results must know: which worlds their synthetic twins stand in for."""
    if spec.world_settings.get("source", "auto") != "auto":
        return []
    return [
        f"{world}: the official files were not found, so the SYNTHETIC TWIN stands in; "
        f"get them with: kuaifair data fetch {official}"
        for world, official in _official_worlds(spec, {})
        if find_source(official, data_dir or spec.data_dir) is None
    ]


def _own_data_problems(spec: StudySpec) -> Iterator[str]:
    """Registers the worlds of one's own that a study describes."""
    yield from filter(None, (_registration_problem(name, tables) for name, tables in spec.own_data.items()))


def _registration_problem(name: str, tables: Mapping[str, Any]) -> str:
    try:
        register_origin(OwnOrigin.of_tables(name, OwnTables.from_dict(tables).resolved()))
    except (DataError, ValueError, GymnasiumError) as error:
        return f"the world {name}: {error}"
    return ""


def _name_problems(spec: StudySpec, own_worlds: Mapping[str, WorldPair]) -> Iterator[str]:
    from dsrm.item_term import ITEM_TERM_MODES
    from dsrm.purifier import MODES

    for entry in spec.methods:
        if entry.name not in all_methods():
            yield f"no method is called {entry.name!r}; there are {', '.join(all_methods())}"
    for world in spec.worlds:
        if world not in ENVIRONMENTS and world not in own_worlds:
            yield f"no world is called {world!r}; there are {', '.join([*ENVIRONMENTS, *own_worlds])}"
    modes = {*spec.purifiers, *(entry.purifier or "" for entry in spec.methods)}
    for mode in sorted(modes - {"", *MODES}):
        yield f"no purifier is called {mode!r}; there are none, {', '.join(MODES)}"
    if spec.item_term not in ("", *ITEM_TERM_MODES):
        yield f"no item term is called {spec.item_term!r}; there are {', '.join(ITEM_TERM_MODES)}"


def _method_problem(entry: StudyMethod) -> str:
    """Returns what is wrong with an entry of a method that is known, or nothing."""
    own = method(entry.name)
    if own.purifier and entry.purifier == "":
        return f"{entry.name} learns on purified states: its purifier cannot be none (its own is {own.purifier!r})"
    if not own.learns and (entry.set or entry.steps is not None):
        return f"{entry.name} is a control: it has neither hyperparameters nor steps to set"
    return ""


def _sweep_problems(spec: StudySpec) -> Iterator[str]:
    methods = _known_methods(spec)
    for parameter, values in spec.sweep.items():
        if methods and not any(sweeps(entry, parameter) for entry in methods):
            yield (
                f"'sweep' names {parameter!r}, which no method of this study has; it may name "
                f"{', '.join((*ENVIRONMENT_PARAMETERS, *TRAINING_PARAMETERS))} and hyperparameters of its methods"
            )
        for model, value in itertools.product(_SWEPT_MODELS, values):
            if parameter in model.model_fields:
                try:
                    model.model_validate({parameter: value})
                except ValidationError as error:
                    yield from (f"sweep.{problem}" for problem in validation_problems(error, model))
    swept = {name: values for name, values in spec.sweep.items() if name in SESSION_PARAMETERS}
    for combination in itertools.product(*swept.values()):
        yield from _session_problem(spec.session.given() | dict(zip(swept, combination, strict=True)))


def _session_problem(settings: Mapping[str, Any]) -> Iterator[str]:
    try:
        SessionConfig.of_settings(settings)
    except ValueError as error:
        yield f"'session': {error}"


def _data_problems(spec: StudySpec, own_worlds: Mapping[str, WorldPair], data_dir: str | Path | None) -> Iterator[str]:
    source = spec.world_settings.get("source", "auto")
    swept = {name: values for name, values in spec.sweep.items() if name in WORLD_PARAMETERS}
    for combination in itertools.product(*swept.values()):
        settings = spec.world_settings | dict(zip(swept, combination, strict=True))
        yield from _world_problems(settings, [world for world in spec.worlds if world not in own_worlds])
    if swept and (given := [world for world in spec.worlds if world in own_worlds]):
        yield f"'sweep' varies {', '.join(swept)}, but the worlds {', '.join(given)} are given as they are"
    named = data_dir is None or Path(data_dir).expanduser().exists()
    if not named:
        yield f"there is no file or folder {data_dir}; data_dir must hold the official files"
    if source == "twin" or not named:
        return
    for world, official in _official_worlds(spec, own_worlds):
        try:
            files = find_source(official, data_dir)
        except DataError as error:
            yield f"{world}: {error}"
            continue
        if files is None and (source == "real" or ENVIRONMENTS[world].twin is None):
            yield (
                f"{world} needs its official files, and they were not found (data_dir, KUAIFAIR_DATA, the cache); "
                f"get them with: kuaifair data fetch {official}"
            )


def _world_problems(settings: Mapping[str, Any], worlds: Sequence[str]) -> Iterator[str]:
    """Checks the settings of registered worlds."""
    for name in sorted(set(settings) - set(WORLD_PARAMETERS)):
        yield f"'world_settings' holds {name!r}; it may hold {', '.join(sorted(WORLD_PARAMETERS))}"
    for world in worlds:
        if world in ENVIRONMENTS:
            try:
                ENVIRONMENTS[world].check_settings(world, settings)
            except (DataError, ValueError) as error:
                yield f"'world_settings' do not fit {world}: {error}"
    for name, choices in _CHOICES.items():
        if settings.get(name, choices[0]) not in choices:
            yield f"'world_settings' has {name} {settings[name]!r}; it is one of {', '.join(choices)}"
    share = settings.get("popularity_share", DEFAULTS["popularity_share"])
    if not isinstance(share, float) or not 0 < share < 1:
        yield f"'world_settings' has popularity_share {share!r}; it is a number between 0 and 1"
    if "conformity" in settings and settings.get("response", "auto") != "auto":
        yield "'world_settings' has a conformity, which only the twins' true users (response: auto) have"


def _run_problems(spec: StudySpec, own_worlds: Mapping[str, WorldPair]) -> Iterator[str]:
    """Checks what only shows in whole runs: settings that do not go together, and runs that are the same."""
    folders: Counter[Path] = Counter()
    for arguments in planned_arguments(spec):
        try:
            run = plan_run(**arguments)
        except ValueError as error:
            yield str(error)
            continue
        folders[run_folder(run)] += 1
        own, shown, max_len = own_worlds.get(run.world), run.session.items_per_slate, run.session.max_len
        if replays(run.world) if own is None else own.test.user_candidates is not None:
            yield from _replay_problems(run)
            continue
        if own is None and run.world in ENVIRONMENTS and ENVIRONMENTS[run.world].twin is None:
            continue  # only its data say how many candidates there are
        candidates = max_candidates(run.world) if own is None else own.test.n_items
        if shown > candidates:
            yield f"{run.world} has at most {candidates} candidates, too few for slates of {shown}"
        elif run.session.repeats == "forbid" and shown * max_len > candidates:
            yield (
                f"'repeats: forbid' needs {max_len} slates of {shown} different items, but {run.world} has at most "
                f"{candidates} candidates"
            )
    if not folders:
        yield "there is nothing to run"
    for folder, count in folders.items():
        if count > 1:
            yield f"the run {folder} is planned {count} times; give methods that are alike a 'label' each"


def _replay_problems(run: RunConfig) -> Iterator[str]:
    """Checks a run whose users have candidates of their own, each to be shown once."""
    if run.session.repeats != "forbid":
        yield f"users of {run.world} answer what was logged, once for each item; it needs 'repeats: forbid'"
    needed = run.world_settings.get("min_candidates") or REPLAY_SLATE_SIZE
    if replays(run.world) and run.session.items_per_slate > needed:
        yield (
            f"{run.world} has users with {needed} candidates, too few for slates of {run.session.items_per_slate}; "
            f"leave them out with 'world_settings: {{min_candidates: {run.session.items_per_slate}}}'"
        )


def _trial_problems(spec: StudySpec) -> Iterator[str]:
    """Builds every method whose hyperparameters the study changes, untrained, over the toy world."""
    swept = {
        name: values
        for name, values in spec.sweep.items()
        if name not in (*ENVIRONMENT_PARAMETERS, *TRAINING_PARAMETERS)
    }
    # Sessions, worlds and methods that are wrong anyhow are checked elsewhere.
    plain = StudySpec.model_construct(
        name=spec.name,
        methods=tuple(entry for entry in _known_methods(spec) if not _method_problem(entry)),
        worlds=(_TRIAL_WORLD,),
        max_lens=(30,),
        seeds=(0,),
        sweep=swept,
    )
    changed = [arguments for arguments in planned_arguments(plain) if arguments["overrides"]]
    trials = {(trial["method_name"], repr(trial["overrides"])): trial for trial in changed}
    if trials:
        toy = load_worlds(_TRIAL_WORLD)
        for trial in trials.values():
            yield from _build_problems(trial, toy)


def _build_problems(trial: Mapping[str, Any], worlds: WorldPair) -> Iterator[str]:
    from dsrm.candidates import CandidatePurifier
    from hrl_policies.study.loading import build_policy

    try:
        config = plan_run(**trial)
        # Candidates alone are no states, which any other purifier leaves as they are or makes larger.
        ranks = config.purifier is not None and config.purifier.name == CandidatePurifier.kind
        build_policy(
            config, worlds, CandidatePurifier.closed_form(worlds.train, scorer=worlds.scorer) if ranks else None
        )
    except (ValueError, TypeError, AssertionError) as error:
        yield f"{trial['method_name']} cannot be built with {trial['variant']}: {error}"


def _known_methods(spec: StudySpec) -> list[StudyMethod]:
    return [entry for entry in spec.methods if entry.name in all_methods()]


def _official_worlds(spec: StudySpec, own_worlds: Mapping[str, WorldPair]) -> Iterator[tuple[str, DatasetName]]:
    """Returns those worlds of a study, with the names of their data sets, that official files may stand behind."""
    for world in spec.worlds:
        official = ENVIRONMENTS[world].official if world in ENVIRONMENTS and world not in own_worlds else None
        if official is not None:
            yield world, official
