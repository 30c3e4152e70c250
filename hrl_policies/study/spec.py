"""A study in one small file: methods x worlds x horizons x seeds, and whatever is swept."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validation_problems
from hrl_policies.study.config import STUDY_SEEDS, PurifierIdentity, RunConfig, plan_run
from hrl_policies.study.records import read_json, write_json
from hrl_policies.zoo import controls, load_settings, method
from kuaifair_env.abandonment import LEAVE_RULES, leave_rule
from kuaifair_env.actions import Duplicates
from kuaifair_env.data.own import TABLES
from kuaifair_env.errors import ArtifactError, KuaiFairError, SettingsError
from kuaifair_env.files import fits_checksum, need_writable, with_checksum
from kuaifair_env.metrics.fairness import DisparityMode
from kuaifair_env.randomisation import describe_setting, randomisation_setting
from kuaifair_env.registration import session_config
from kuaifair_env.settings import WorldSettings
from kuaifair_env.simulator import InitialHistory, Repeats, RewardForm

CONTROLS = "controls"
"""Stands for all controls in a list of methods."""
NO_PURIFIER = "none"

STUDY = "study.json"
"""File of a store that says what it is the store of."""

_NOT_OF_A_STUDY = ("data_dir", "split", "encoder")
_FORMAT = 3
_PLANS = "plans"
_FOLDER_NAME = re.compile(r"\w[\w .+=-]*")
T = TypeVar("T")


class StudyError(KuaiFairError, ValueError):
    """A study (a file, or a name) cannot be run as it is written; ``problems`` holds all that is wrong, a line each."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n- {problem}" for problem in problems)
        super().__init__(
            f"{where}: {problems[0]}" if len(problems) == 1 else f"{where} has {len(problems)} problems:{lines}"
        )


def _folder_name(name: str) -> str:
    if not _FOLDER_NAME.fullmatch(name):
        raise ValueError(
            f"must consist of letters, digits, blanks and -_.+=, as its folder has the same name, got {name!r}"
        )
    return name


def _purifier_mode(value: Any) -> Any:
    return "" if value == NO_PURIFIER else value


def _readable_leave_rule(rule: Any) -> Any:
    if isinstance(rule, str) and rule.partition(":")[0].strip() not in LEAVE_RULES:
        raise ValueError(f"must be one of {', '.join(LEAVE_RULES)}, got {rule!r}")
    leave_rule(rule)
    return rule


def _not_empty(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values:
        raise ValueError("must not be empty")
    return values


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    repeated = [repr(value) for value, count in Counter(values).items() if count > 1]
    if repeated:
        raise ValueError(f"names {', '.join(repeated)} more than once")
    return values


def _method_entries(value: Any) -> Any:
    """Spells out the short forms of methods: a name alone, and ``controls``."""
    if not isinstance(value, (list, tuple)):
        return value
    entries: list[Any] = []
    for entry in value:
        names = controls() if entry == CONTROLS else [entry]
        entries += [{"name": name} if isinstance(name, str) else name for name in names]
    return entries


def _user_ids(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"lists raw ids, got {value!r}; for a number of users give n_users")
    if len(value) == 1:
        raise ValueError("lists one id, and an interval over users needs two")
    return value


Count = Annotated[int, Field(strict=True, ge=1)]
Seed = Annotated[int, Field(strict=True, ge=0)]
Steps = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True)]
PurifierMode = Annotated[str, BeforeValidator(_purifier_mode)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StudyMethod(_Model):
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
    purifier: PurifierMode | None = None
    set: dict[str, Any] = {}
    steps: Count | None = None
    label: str = ""


class SessionSettings(_Model):
    """How the sessions of a study run, at every horizon; see :class:`~kuaifair_env.batch.SessionConfig`.

    Attributes:
        slate_size: Items per slate ``K``; None is 10, or 5 in ids with a replay.
        leave: The leave rule: a name, a text such as ``temper:ad_bound=0.2``, or a mapping.
        initial_history: ``"log"`` or ``"empty"``.
        repeats: ``"allow"`` or ``"forbid"``; None is the first, or the second in ids with a replay.
        duplicates: ``"error"`` or ``"replace"``.
        reward: ``"mean"`` or ``"sum"``.
        drift: Slates after which a taste correlates by .5 with that at the start; None lets tastes stay.
        session_clock: Whether agents see steps taken / Max Len.

    The others are parameters of the leave rule, which stay as they are in the rule where they are not given.
    """

    slate_size: Count | None = None
    leave: Annotated[Any, AfterValidator(_readable_leave_rule)] = "temper"
    initial_history: InitialHistory = "log"
    repeats: Repeats | None = None
    duplicates: Duplicates = "error"
    reward: RewardForm = "mean"
    drift: Number | None = None
    session_clock: StrictBool = False
    ad_bound: Number | None = None
    unfair_penalty: Number | None = None
    mode: DisparityMode | None = None
    target_share: Number | None = None
    window: Count | None = None
    grace_steps: Steps | None = None
    initial_temper: Number | None = None
    threshold: Steps | None = None

    def given(self) -> dict[str, Any]:
        """Returns all settings but those that were not given and have no default here."""
        return self.model_dump(exclude_none=True)


def _randomisation(value: Any) -> Any:
    return describe_setting(randomisation_setting(value))


RandomisationSetting = Annotated[Any, AfterValidator(_randomisation)]


class TrainingSettings(_Model):
    """What a sweep may say of training; see :class:`~hrl_policies.study.config.RunConfig`."""

    total_steps: Count = 1
    n_envs: Count = 1
    randomisation: RandomisationSetting = "auto"


SESSION_PARAMETERS = tuple(SessionSettings.model_fields)
TRAINING_PARAMETERS = tuple(TrainingSettings.model_fields)
WORLD_PARAMETERS = tuple(name for name in WorldSettings.__annotations__ if name not in _NOT_OF_A_STUDY)
ENVIRONMENT_PARAMETERS = (*SESSION_PARAMETERS, *WORLD_PARAMETERS)


class StudySpec(_Model):
    """A study.

    Attributes:
        name: Its name.
        methods: What is compared.
        worlds: Environment ids, or names of :class:`~hrl_policies.worlds.WorldPair` that are passed along. In files
            also ``{name: MyShop-v0, data: log.csv, ...}``, of which the name stays here.
        own_data: By name, the tables of such worlds (:class:`~kuaifair_env.data.own.OwnTables`).
        max_lens: Horizons.
        seeds: Training seeds of methods that learn.
        control_seeds: Seeds of controls, which do not learn: the first training seed where this is empty.
        users: Raw ids of the held-out users to evaluate on; where there are none, ``n_users`` says how many.
        n_users: Number of held-out users to evaluate on; None takes 1,000, or all.
        episodes_per_user: Sessions of each.
        steps: Training steps of every method that learns; None takes the zoo's.
        randomisation: How far users of the training world deviate, for every method that learns online: ``"auto"``,
            ``"none"``, or scales by name (:class:`kuaifair_env.randomisation.Randomisation`).
        session: How sessions run.
        item_term: Mode of the item term that all agents and controls are given; empty for none.
        purifiers: Every method without a purifier of its own is run with each of these modes; empty is without.
        sweep: Values by parameter: a setting of sessions, worlds or training, or a hyperparameter. Every combination
            is run, but methods that need repeats are left out where these are forbidden.
        world_settings: What else :func:`kuaifair_env.make_world` is given, such as ``source: real``.
        data_dir: Folder with the official files.
    """

    name: Annotated[str, AfterValidator(_folder_name)]
    methods: Annotated[tuple[StudyMethod, ...], BeforeValidator(_method_entries), AfterValidator(_not_empty)]
    worlds: Annotated[tuple[str, ...], AfterValidator(_not_empty), AfterValidator(_distinct)]
    own_data: dict[str, dict[str, Any]] = {}
    max_lens: Annotated[tuple[Count, ...], AfterValidator(_not_empty), AfterValidator(_distinct)] = (30, 50)
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_not_empty), AfterValidator(_distinct)] = STUDY_SEEDS
    control_seeds: Annotated[tuple[Seed, ...], AfterValidator(_distinct)] = ()
    users: Annotated[tuple[StrictInt | StrictStr, ...], BeforeValidator(_user_ids), AfterValidator(_distinct)] = ()
    n_users: Annotated[int, Field(strict=True, ge=2)] | None = None
    episodes_per_user: Count = 1
    steps: Count | None = None
    randomisation: RandomisationSetting = "auto"
    session: SessionSettings = SessionSettings()
    item_term: str = ""
    purifiers: Annotated[tuple[PurifierMode, ...], AfterValidator(_not_empty), AfterValidator(_distinct)] = ("",)
    sweep: dict[str, Annotated[tuple[Any, ...], AfterValidator(_not_empty)]] = {}
    world_settings: dict[str, Any] = {}
    data_dir: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_data_apart(cls, content: Any) -> Any:
        """Keeps the names of worlds of one's own in ``worlds``, and their tables in ``own_data``."""
        worlds = content.get("worlds") if isinstance(content, Mapping) else None
        if not isinstance(worlds, (list, tuple)):
            return content
        own = {str(world.get("name")): dict(world) for world in worlds if isinstance(world, Mapping)}
        names = [world.get("name") if isinstance(world, Mapping) else world for world in worlds]
        tables = {name: {key: world[key] for key in world if key != "name"} for name, world in own.items()}
        return {**content, "worlds": names, **({"own_data": tables} if tables else {})}

    @field_validator("n_users")
    @classmethod
    def _without_ids(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("users"):
            raise ValueError("says how many users, but 'users' lists them; give one of both")
        return value


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
        SettingsError: If there is no such study or file, or it is not YAML.
    """
    name = f"{plan}_quick" if quick else str(plan)
    if name in shipped_plans():
        text = resources.files("hrl_policies.study").joinpath(_PLANS, f"{name}.yml").read_text("utf-8")
        return parse_study(parse_yaml(text, name))
    if quick:
        small = [other.removesuffix("_quick") for other in shipped_plans() if other.endswith("_quick")]
        raise SettingsError(f"only shipped studies have a quick form: {', '.join(small)}; got {plan}")
    if not Path(plan).is_file():
        raise SettingsError(f"there is no file {plan}, and no shipped study of that name: {shipped_plans()}")
    spec, problems = parse_study(read_yaml(plan))
    # Files of one's own are named as they are seen from the study's file.
    folder = Path(plan).resolve().parent
    own = {name: tables | _files_from(folder, tables) for name, tables in spec.own_data.items()}
    return spec.model_copy(update={"own_data": own}), problems


def _files_from(folder: Path, tables: Mapping[str, Any]) -> dict[str, str]:
    """Returns the files among tables of one's own, as they are seen from a folder."""
    return {key: str(folder / name) for key in TABLES if isinstance(name := tables.get(key), str) and name}


def parse_study(content: Any) -> tuple[StudySpec, list[str]]:
    """Reads a study from plain data; see :func:`read_study` for what it returns."""
    try:
        return StudySpec.model_validate(content), []
    except ValidationError as error:
        problems = validation_problems(error, StudySpec)
        places = [problem["loc"] for problem in error.errors()]
    if not isinstance(content, Mapping):
        return StudySpec.model_construct(name="", methods=(), worlds=()), problems
    # What is right is kept, so that all mistakes can be named at once, those of meaning too.
    wrong = {place[0] for place in places}
    right = {name: value for name, value in content.items() if name not in wrong}
    wrong_methods = {place[1] for place in places if place[0] == "methods" and len(place) > 1}
    if wrong_methods:
        entries = enumerate(_method_entries(content["methods"]))
        right["methods"] = [entry for number, entry in entries if number not in wrong_methods]
    placeholders = {"name": "study", "methods": ["random"], "worlds": ["study"]}
    spec = StudySpec.model_validate(placeholders | {name: value for name, value in right.items() if value})
    return spec.model_copy(update={name: () for name in ("methods", "worlds") if not right.get(name)}), problems


def max_runs(spec: StudySpec) -> int:
    """Returns how many runs a study plans at most: every combination for every method, with all seeds."""
    seeds = max(len(spec.seeds), len(spec.control_seeds))
    places = len(spec.worlds) * len(spec.max_lens) * len(spec.methods) * len(spec.purifiers)
    return places * seeds * math.prod(len(values) for values in spec.sweep.values())


def planned_runs(spec: StudySpec) -> list[RunConfig]:
    """Returns every run of a study: worlds outermost, so that a process keeps the worlds it has made.

    Controls, which do not train, are run once, with the control seeds. A run with a purifier names its mode alone.

    Raises:
        ValueError: If a method is unknown, or settings are not valid.
    """
    return [plan_run(**arguments) for arguments in planned_arguments(spec)]


def planned_arguments(spec: StudySpec) -> Iterator[dict[str, Any]]:
    """Yields the arguments of :func:`~hrl_policies.study.config.plan_run` for every run of a study."""
    for world, max_len, entry in itertools.product(spec.worlds, spec.max_lens, spec.methods):
        learns = method(entry.name).learns
        seeds = spec.seeds if learns else spec.control_seeds or spec.seeds[:1]
        for purifier, swept, seed in itertools.product(_purifiers(spec, entry), _combinations(spec, entry), seeds):
            session = {name: swept[name] for name in SESSION_PARAMETERS if name in swept}
            worlds = {name: swept[name] for name in WORLD_PARAMETERS if name in swept}
            training = {name: swept[name] for name in TRAINING_PARAMETERS if name in swept}
            overrides = {name: swept[name] for name in swept if name not in {*session, *worlds, *training}}
            shown = _settings_text({name: swept[name] for name in swept if name not in {*session, *worlds}})
            steps = {"total_steps": entry.steps or spec.steps} if learns else {}
            yield {
                "method_name": entry.name,
                "world": world,
                "seed": seed,
                "session": session_config(world, {"max_len": max_len, **spec.session.given(), **session}),
                "overrides": entry.set | overrides,
                "world_settings": {**spec.world_settings, **worlds},
                "users": spec.users or None,
                "n_users": spec.n_users,
                "episodes_per_user": spec.episodes_per_user,
                "purifier": PurifierIdentity(purifier) if purifier else None,
                "item_term": spec.item_term,
                "variant": ", ".join(text for text in (entry.label or _settings_text(entry.set), shown) if text),
                "randomisation": spec.randomisation,
                **steps,
                **training,
            }


def sweeps(entry: StudyMethod, parameter: str) -> bool:
    """Returns whether a swept parameter concerns a method: whether there is something to set.

    Settings of sessions and worlds concern all methods, training settings those that learn, randomisation those that
    learn in sessions, and a hyperparameter those methods whose settings, the zoo's or the study's, name it.
    """
    if parameter == "randomisation":
        return method(entry.name).kind == "online"
    of_all = parameter in ENVIRONMENT_PARAMETERS
    if of_all or not method(entry.name).learns:
        return of_all
    known = parameter in (*TRAINING_PARAMETERS, *entry.set)
    return known or _has_setting(load_settings(entry.name).hyperparameters, parameter)


def _purifiers(spec: StudySpec, entry: StudyMethod) -> tuple[str, ...]:
    """Returns the modes of purifiers that a method is run with; empty stands for none."""
    if entry.purifier is not None:
        return (entry.purifier,)
    own = method(entry.name).purifier
    return (own,) if own else spec.purifiers


def _combinations(spec: StudySpec, entry: StudyMethod) -> Iterator[dict[str, Any]]:
    swept = {name: values for name, values in spec.sweep.items() if sweeps(entry, name)}
    if method(entry.name).needs_repeats and "repeats" in swept:
        swept["repeats"] = tuple(value for value in swept["repeats"] if value != "forbid")
    for combination in itertools.product(*swept.values()):
        yield dict(zip(swept, combination, strict=True))


def _has_setting(settings: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    known = isinstance(settings, Mapping) and first in settings
    return known and (not rest or _has_setting(settings[first], rest))


def _settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def write_study(store: Path, spec: StudySpec, command: str) -> str:
    """Writes what a store is the store of, once, and returns the command that made it in the first place.

    Raises:
        ArtifactError: If the store holds another study, or cannot be written.
    """
    path, study = store / STUDY, spec.model_dump(mode="json")
    if path.exists():
        before, made_by = read_study_file(store)
        # Where the official files lie is the machine's business; results depend on what is in them.
        different = sorted(name for name in study if name != "data_dir" and before.get(name) != study[name])
        if different:
            raise ArtifactError(
                f"{store} holds another study ({', '.join(different)} differ); use another store, or remove it"
            )
        return made_by
    need_writable(path)
    write_json(path, with_checksum({"format": _FORMAT, "command": command, "study": study}))
    return command


def read_study_file(store: Path) -> tuple[dict[str, Any], str]:
    """Returns the study of a store, and the command that made it.

    Raises:
        ArtifactError: If the folder is not that of a study.
    """
    path = store / STUDY
    if not path.exists():
        raise ArtifactError(f"{store} is not the folder of a study: it holds no {STUDY}")
    content = read_json(path)
    if content.get("format") != _FORMAT:
        raise ArtifactError(
            f"{path} is of format {content.get('format')}; this version reads format {_FORMAT}: run the study again"
        )
    if not fits_checksum(content) or not isinstance(content.get("study"), dict):
        raise ArtifactError(f"{path} was altered after it was written: its checksum does not fit; run the study again")
    return content["study"], str(content.get("command", ""))
