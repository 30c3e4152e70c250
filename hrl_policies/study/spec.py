"""What a study is, as one small file says it: methods x worlds x horizons x seeds, and whatever is swept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hrl_policies.study.cells import cell_folder
from hrl_policies.study.config import STUDY_SEEDS, PurifierIdentity, RunConfig, plan_run
from hrl_policies.zoo import controls, load_settings, method
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError, KuaiFairError
from kuaifair_env.splits import EVALUATION_USERS

CONTROLS = "controls"
"""Stands for all controls in a list of methods."""
NO_PURIFIER = "none"

_PLANS = "plans"
_FOLDER_NAME = re.compile(r"\w[\w .+=-]*")
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
T = TypeVar("T")


class StudyError(KuaiFairError, ValueError):
    """A study cannot be run as it is written.

    Args:
        where: The file, or the name of the study.
        problems: All of them, one line each.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{where} has {count}:\n" + "\n".join(f"- {problem}" for problem in problems))


@dataclass(frozen=True)
class StudyMethod:
    """A method as a study runs it.

    Attributes:
        name: Name in the zoo.
        purifier: Mode of its purifier; empty for none; None takes those of the study, or the one that is part of the
            method.
        set: Hyperparameters by (dotted) name, instead of the zoo's.
        steps: Training steps, instead of the study's or the zoo's.
        label: What tables add to its title; the settings in ``set`` where this is empty.
    """

    name: str
    purifier: str | None = None
    set: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    label: str = ""


@dataclass(frozen=True)
class StudySpec:
    """A study.

    Attributes:
        name: What it is called.
        methods: What is compared.
        worlds: Environment ids, or names of :class:`~hrl_policies.worlds.WorldPair` that are passed along.
        max_lens: Horizons.
        seeds: Training seeds of methods that learn.
        control_seeds: Seeds of controls, which do not learn: the first training seed where this is empty.
        users: Held-out users to evaluate on.
        episodes: Sessions of each.
        steps: Training steps of every method that learns; None takes the zoo's.
        slate_size: Items per slate ``K``.
        leave: Name of the leave rule.
        initial_history: See :class:`~kuaifair_env.batch.SessionConfig`.
        repeats: See :class:`~kuaifair_env.batch.SessionConfig`.
        item_term: Mode of the item term that all agents and controls are given; empty for none.
        purifiers: Every method without a purifier of its own is run with each of these modes; empty is without.
        sweep: Values by parameter: a setting of sessions, of training, or a hyperparameter. Every combination is run.
        world_settings: What else :func:`kuaifair_env.make_world` is given, such as ``source: real``.
        data_dir: Folder with the official files.
    """

    name: str
    methods: tuple[StudyMethod, ...]
    worlds: tuple[str, ...]
    max_lens: tuple[int, ...] = (30, 50)
    seeds: tuple[int, ...] = STUDY_SEEDS
    control_seeds: tuple[int, ...] = ()
    users: int = EVALUATION_USERS
    episodes: int = 1
    steps: int | None = None
    slate_size: int = 10
    leave: str = "temper"
    initial_history: str = "log"
    repeats: str = "allow"
    item_term: str = ""
    purifiers: tuple[str, ...] = ("",)
    sweep: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    world_settings: Mapping[str, Any] = field(default_factory=dict)
    data_dir: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Returns what :func:`parse_study` reads, JSON-able."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        lists = {name: list(value) for name, value in parts.items() if isinstance(value, tuple)}
        methods = [{part.name: getattr(one, part.name) for part in fields(one)} for one in self.methods]
        for one in methods:
            one["purifier"] = NO_PURIFIER if one["purifier"] == "" else one["purifier"]
            one["set"] = dict(one["set"])
        return {
            **parts,
            **lists,
            "methods": methods,
            "purifiers": [mode or NO_PURIFIER for mode in self.purifiers],
            "sweep": {name: list(values) for name, values in self.sweep.items()},
            "world_settings": dict(self.world_settings),
        }


def shipped_plans() -> list[str]:
    """Returns the names of the studies that come with the library."""
    folder = resources.files("hrl_policies.study").joinpath(_PLANS)
    return sorted(path.name.removesuffix(".yml") for path in folder.iterdir() if path.name.endswith(".yml"))


def read_study(plan: str | Path, quick: bool = False) -> tuple[StudySpec, list[str]]:
    """Reads a study, shipped or written by the user.

    Args:
        plan: Name of a shipped study, or a YAML file.
        quick: Whether to take the small form of a shipped study.

    Returns:
        The study, and what is wrong with the form of the file; what could not be read has its default.

    Raises:
        ArtifactError: If there is no such study or file, or it is not YAML.
    """
    name = f"{plan}_quick" if quick else str(plan)
    if name in shipped_plans():
        text = resources.files("hrl_policies.study").joinpath(_PLANS, f"{name}.yml").read_text("utf-8")
        return parse_study(_yaml(text, name))
    if quick:
        small = [one.removesuffix("_quick") for one in shipped_plans() if one.endswith("_quick")]
        raise ArtifactError(f"only shipped studies have a quick form: {', '.join(small)}; got {plan}")
    path = Path(plan)
    if not path.is_file():
        raise ArtifactError(f"there is no file {plan}, and no shipped study of that name: {shipped_plans()}")
    return parse_study(_yaml(path.read_text(encoding="utf-8"), str(plan)))


def parse_study(content: Any) -> tuple[StudySpec, list[str]]:
    """Reads a study from plain data; see :func:`read_study` for what it returns."""
    if not isinstance(content, Mapping):
        return StudySpec("", (), ()), [f"a study is a mapping of settings, got {content!r}"]
    reader = _Reader(content, {part.name for part in fields(StudySpec)})
    spec = StudySpec(
        name=reader.take("name", _folder_name, ""),
        methods=_methods(reader),
        worlds=reader.take("worlds", _several(_text), ()),
        max_lens=reader.take("max_lens", _several(_whole), StudySpec.max_lens),
        seeds=reader.take("seeds", _several(_whole), STUDY_SEEDS),
        control_seeds=reader.take("control_seeds", _any_number_of(_whole), ()),
        users=reader.take("users", _whole, EVALUATION_USERS),
        episodes=reader.take("episodes", _whole, 1),
        steps=reader.take("steps", _whole, None),
        slate_size=reader.take("slate_size", _whole, StudySpec.slate_size),
        leave=reader.take("leave", _text, StudySpec.leave),
        initial_history=reader.take("initial_history", _text, StudySpec.initial_history),
        repeats=reader.take("repeats", _text, StudySpec.repeats),
        item_term=reader.take("item_term", _text, ""),
        purifiers=reader.take("purifiers", _several(_purifier), ("",)),
        sweep=reader.take("sweep", _sweep, {}),
        world_settings=reader.take("world_settings", _mapping, {}),
        data_dir=reader.take("data_dir", _text, None),
    )
    for needed in ("name", "methods", "worlds"):
        if needed not in content:
            reader.problems.append(f"'{needed}' is missing")
    return spec, reader.problems


class _Reader:
    """Takes settings out of a mapping and notes what is wrong with them."""

    def __init__(self, content: Mapping[str, Any], known: set[str], where: str = "") -> None:
        self.problems: list[str] = []
        self.content = content
        self._where = where
        unknown = sorted(str(name) for name in content if name not in known)
        if unknown:
            self.problems.append(f"{where}unknown settings {unknown}; there are {sorted(known)}")

    def take(self, name: str, read: Callable[[Any], T], default: Any) -> Any:
        if self.content.get(name) is None:
            return default
        try:
            return read(self.content[name])
        except ValueError as error:
            self.problems.append(f"{self._where}'{name}' {error}, got {self.content[name]!r}")
            return default


def _methods(reader: _Reader) -> tuple[StudyMethod, ...]:
    listed = reader.take("methods", _several(lambda one: one), ())
    known = {part.name for part in fields(StudyMethod)}
    methods: list[StudyMethod] = []
    for entry in listed:
        if entry == CONTROLS:
            methods += [StudyMethod(name) for name in controls()]
        elif isinstance(entry, str):
            methods.append(StudyMethod(entry))
        elif isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
            inner = _Reader(entry, known, f"method '{entry['name']}': ")
            methods.append(
                StudyMethod(
                    name=entry["name"],
                    purifier=inner.take("purifier", _purifier, None),
                    set=inner.take("set", _mapping, {}),
                    steps=inner.take("steps", _whole, None),
                    label=inner.take("label", _text, ""),
                )
            )
            reader.problems += inner.problems
        else:
            reader.problems.append(f"a method is a name, or a mapping with a 'name', got {entry!r}")
    return tuple(methods)


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArtifactError(f"{where} is not valid YAML: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return value


def _folder_name(value: Any) -> str:
    if not isinstance(value, str) or not _FOLDER_NAME.fullmatch(value):
        raise ValueError("must be a text of letters, digits, blanks and -_.+=, as its folder is called by it")
    return value


def _purifier(value: Any) -> str:
    mode = "" if value is None else _text(value)
    return "" if mode == NO_PURIFIER else mode


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError("must be a mapping of names to values")
    return {name: _number(one) for name, one in value.items()}


def _sweep(value: Any) -> dict[str, tuple[Any, ...]]:
    return {name: _several(_number)(values) for name, values in _mapping(value).items()}


def _number(value: Any) -> Any:
    """Returns ``1e-3`` as the number that it is; YAML 1.1 takes it for text."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _any_number_of(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def read_list(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise ValueError("must be a list")
        try:
            return tuple(read(one) for one in value)
        except ValueError as error:
            raise ValueError(f"must be a list, each entry of which {error}") from None

    return read_list


def _several(read: Callable[[Any], T]) -> Callable[[Any], tuple[T, ...]]:
    def read_list(value: Any) -> tuple[T, ...]:
        found = _any_number_of(read)(value)
        if not found:
            raise ValueError("must not be empty")
        return found

    return read_list


SESSION_PARAMETERS = ("slate_size", "leave", "initial_history", "repeats")
TRAINING_PARAMETERS = ("total_steps", "n_envs", "taste_noise")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study, before its purifier is there.

    Attributes:
        spec: The study.
        entry: The method.
        world: Name of the worlds.
        max_len: Horizon.
        seed: Training seed.
        purifier: Mode of the purifier; empty for none.
        swept: Values of the swept parameters that concern the method.
    """

    spec: StudySpec
    entry: StudyMethod
    world: str
    max_len: int
    seed: int
    purifier: str = ""
    swept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Name of its folder inside the store."""
        return cell_folder(self.config())

    @property
    def variant(self) -> str:
        """What tells it from other runs of its method; session settings do not, they make tables of their own."""
        own = self.entry.label or _settings_text(self.entry.set)
        swept = {name: value for name, value in self.swept.items() if name not in SESSION_PARAMETERS}
        return ", ".join(part for part in (own, _settings_text(swept)) if part)

    def config(self, identity: PurifierIdentity | None = None) -> RunConfig:
        """Returns the configuration of the run.

        Args:
            identity: Its purifier; None stands one in that has a mode but no file, for names and checks.

        Raises:
            ValueError: If a setting is not valid.
        """
        if identity is None and self.purifier:
            identity = PurifierIdentity(self.purifier, "")
        spec, swept = self.spec, dict(self.swept)
        sessions = {name: swept.pop(name, getattr(spec, name)) for name in SESSION_PARAMETERS}
        training = {name: swept.pop(name, None) for name in TRAINING_PARAMETERS}
        if method(self.entry.name).learns and training["total_steps"] is None:
            training["total_steps"] = self.entry.steps or spec.steps
        return plan_run(
            self.entry.name,
            self.world,
            seed=self.seed,
            session=SessionConfig(max_len=self.max_len, **sessions),
            overrides={**self.entry.set, **swept},
            world_settings=spec.world_settings,
            users=spec.users,
            episodes_per_user=spec.episodes,
            purifier=identity,
            item_term=spec.item_term,
            variant=self.variant,
            **training,
        )


def planned_runs(spec: StudySpec) -> list[PlannedRun]:
    """Returns every run of a study: worlds outermost, so that a process keeps the worlds it has made.

    Controls, which do not train, are run once, with the control seeds.

    Raises:
        ValueError: If a method is unknown.
    """
    return [
        PlannedRun(spec, entry, world, max_len, seed, purifier, swept)
        for world in spec.worlds
        for max_len in spec.max_lens
        for entry in spec.methods
        for purifier in purifiers_of(spec, entry)
        for swept in _combinations(spec, entry)
        for seed in seeds_of(spec, entry)
    ]


def purifiers_of(spec: StudySpec, entry: StudyMethod) -> tuple[str, ...]:
    """Returns the modes of purifiers that a method is run with; empty stands for none."""
    if entry.purifier is not None:
        return (entry.purifier,)
    own = method(entry.name).purifier
    return (own,) if own else spec.purifiers


def seeds_of(spec: StudySpec, entry: StudyMethod) -> tuple[int, ...]:
    """Returns the seeds that a method is run with."""
    return spec.seeds if method(entry.name).learns else spec.control_seeds or spec.seeds[:1]


def sweeps(entry: StudyMethod, parameter: str) -> bool:
    """Returns whether a swept parameter concerns a method: whether there is something to set.

    Session settings concern all methods, training settings those that learn, and a hyperparameter those methods whose
    settings, the zoo's or the study's, name it.
    """
    if parameter in SESSION_PARAMETERS:
        return True
    if not method(entry.name).learns:
        return False
    return (
        parameter in TRAINING_PARAMETERS
        or parameter in entry.set
        or _holds(load_settings(entry.name).hyperparameters, parameter)
    )


def _combinations(spec: StudySpec, entry: StudyMethod) -> Iterator[dict[str, Any]]:
    names = [name for name in spec.sweep if sweeps(entry, name)]
    for values in itertools.product(*(spec.sweep[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def _holds(settings: Mapping[str, Any], name: str) -> bool:
    first, dot, rest = name.partition(".")
    if not dot:
        return first in settings
    inner = settings.get(first)
    return isinstance(inner, Mapping) and _holds(inner, rest)


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())
