"""The registry of methods: what a method is, its settings by world, registration (of plugins too) and lookup.

Settings come from the YAML files in ``hyperparameters``, from a file of the user's own, or with the method. A file
holds the settings for all worlds, and may hold others for some of them, by environment id::

    total_steps: 500000
    hyperparameters:
      learning_rate: 0.0009
    worlds:
      KuaiFair-Toy-v0:
        total_steps: 100000
        hyperparameters:
          learning_rate: 0.003

What a section does not name is as in all worlds. A file may also say ``like: OTHER``, and then holds only what differs
from that method's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validated
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo.search import SearchSpace, inherited_search, search_space
from kuaifair_env.batch import SessionConfig
from kuaifair_env.spaces import ActionMode, ObservationMode

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from stable_baselines3.common.vec_env import VecEnv

ENTRY_POINT_GROUP = "kuaifair.methods"

MethodKind = Literal["online", "offline", "control"]

_tried: set[tuple[str, str]] = set()
"""Name and value of the entry points of this process that were loaded, or failed to."""
_Noise = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class MethodSettings:
    """How a method is trained unless told otherwise.

    Attributes:
        policy: Name of the policy class.
        n_envs: Concurrent training sessions.
        total_steps: Training steps, counted over all sessions (one slate shown is one step).
        taste_noise: Deviation of the tastes that training users have besides the training world's, in log-odds; see
            ``kuaifair_env.randomisation``.
        calibrated_taste_noise: The same where the item term was calibrated on unbiased feedback, so that scores are
            less wrong; None takes ``taste_noise``.
        hyperparameters: Arguments of the algorithm.
        search: Where to look for better ones; see :mod:`hrl_policies.zoo.search`. Empty if nobody said.
    """

    policy: str = "MlpPolicy"
    n_envs: int = 64
    total_steps: int = 0
    taste_noise: float = 0.0
    calibrated_taste_noise: float | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    search: SearchSpace = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns what a settings file holds."""
        attributes = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return attributes | {
            "hyperparameters": dict(self.hyperparameters),
            "search": {name: dimension.as_dict() for name, dimension in self.search.items()},
        }

    def noise_for(self, item_term: str) -> float:
        """Returns the deviation of tastes under an item term (its mode; empty for none)."""
        calibrated = self.calibrated_taste_noise
        return calibrated if item_term == "unbiased" and calibrated is not None else self.taste_noise


@dataclass(frozen=True)
class BuildContext:
    """What a method is built from.

    Attributes:
        worlds: Both worlds. Only controls that are marked privileged may ask the test world what users like.
        config: How sessions run, with the method's own action mode.
        seed: Training seed.
        env: The training sessions; None for controls.
        policy: Name of the policy class; empty for controls.
        hyperparameters: Arguments of the algorithm.
    """

    worlds: WorldPair
    config: SessionConfig
    seed: int
    env: VecEnv | None
    policy: str
    hyperparameters: Mapping[str, Any]


Builder = Callable[[BuildContext], Any]


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method of the zoo.

    Attributes:
        name: Its name on the command line.
        title: Its name in tables.
        family: ``"on-policy"``, ``"off-policy"``, ``"control"``, ...
        reference: The article or library it comes from.
        kind: ``"online"`` trains in the training world, ``"offline"`` on its log, ``"control"`` not at all.
        action_mode: How it acts.
        sees: What it may look at.
        build: Makes the untrained algorithm (an SB3 ``BaseAlgorithm``), or the control.
        privileged: Whether it looks at what users of the test world truly like.
        observation_mode: Whether it observes the state alone, or the window behind it too.
        purifier: Mode of the purifier that is part of the method (see ``dsrm.pretraining.MODES``); empty for none.
        settings: How it is trained unless told otherwise; None takes the shipped file of its name.
    """

    name: str
    title: str
    family: str
    reference: str
    kind: MethodKind
    action_mode: ActionMode
    sees: str
    build: Builder
    privileged: bool = False
    observation_mode: ObservationMode = "state"
    purifier: str = ""
    settings: MethodSettings | None = None

    @property
    def learns(self) -> bool:
        """Whether there is anything to train."""
        return self.kind != "control"


METHODS: dict[str, MethodSpec] = {}
"""The methods registered so far, in the order of the tables; :func:`all_methods` asks plugins too."""


def add_method(spec: MethodSpec) -> None:
    """Adds a method to the registry.

    Raises:
        ValueError: If the name is taken, or a method that learns has no settings.
    """
    if spec.name in METHODS:
        raise ValueError(f"a method called {spec.name!r} exists already: {METHODS[spec.name].title}")
    if spec.learns and spec.settings is None and not _path(spec.name).is_file():
        raise ValueError(
            f"{spec.name!r} learns and needs settings: register_method(..., settings=MethodSettings(...))"
        )
    METHODS[spec.name] = spec


def register_method(name: str, **attributes: Any) -> Callable[[Builder], Builder]:
    """Registers a build function as a method.

    A package of one's own names the module that does so as an entry point of the group ``kuaifair.methods``.

    Args:
        name: Its name on the command line.
        **attributes: The other attributes of :class:`MethodSpec`, except ``build``.

    Raises:
        TypeError: If an attribute is missing or unknown.
        ValueError: If the name is taken, or a method that learns has no settings.
    """

    def register(build: Builder) -> Builder:
        add_method(MethodSpec(name=name, build=build, **attributes))
        return build

    return register


def method(name: str) -> MethodSpec:
    """Returns a method by name; plugins are loaded if the zoo itself has none of that name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in METHODS and name not in all_methods():
        raise ValueError(f"no method is called {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def all_methods() -> Mapping[str, MethodSpec]:
    """Returns :data:`METHODS` with those of installed plugins."""
    load_plugins(METHODS)
    return METHODS


def learners() -> list[str]:
    """Returns the names of the methods that are trained."""
    return [spec.name for spec in all_methods().values() if spec.learns]


def controls() -> list[str]:
    """Returns the names of the controls."""
    return [spec.name for spec in all_methods().values() if not spec.learns]


def load_settings(name: str, world: str = "") -> MethodSettings:
    """Returns the settings of a method: those that it was registered with, or else those of the shipped file.

    Args:
        name: Its name.
        world: Environment id; a world without a section in the file has what all worlds have.

    Raises:
        ValueError: If the method has no settings, or its file is not valid.
    """
    spec = METHODS.get(name)
    if spec is not None and spec.settings is not None:
        return spec.settings
    return _settings(_merged(_shipped(name), world), f"{name}.yml")


def worlds_with_settings(name: str) -> list[str]:
    """Returns the environment ids for which a method has settings of their own.

    Raises:
        ValueError: If the method has no settings, or its file is not valid.
    """
    spec = METHODS.get(name)
    if spec is not None and spec.settings is not None:
        return []
    file = _shipped(name)
    inherited = [] if file.like is None else worlds_with_settings(file.like)
    return sorted({*inherited, *file.worlds})


def read_settings(path: str | Path, world: str = "") -> MethodSettings:
    """Returns the settings in a file of the user's own, such as the ``best.yml`` of ``kuaifair tune``.

    Args:
        path: YAML in the form of the shipped files; ``like`` may name a shipped one.
        world: See :func:`load_settings`.

    Raises:
        ValueError: If there is no such file, or it holds something else.
    """
    file = validated(_SettingsFile, read_yaml(path), str(path))
    return _settings(_merged(file, world), str(path))


class _WorldSection(BaseModel):
    """What a file may say of one world; policy class, noise of tastes and search space belong to the method."""

    model_config = ConfigDict(extra="forbid", strict=True)

    n_envs: Annotated[int, Field(ge=1)] = 64
    total_steps: Annotated[int, Field(ge=0)] = 0
    hyperparameters: dict[str, Any] = {}


class _SettingsFile(_WorldSection):
    """What a settings file holds."""

    like: str | None = None
    policy: str = ""
    taste_noise: _Noise = 0.0
    calibrated_taste_noise: _Noise | None = None
    search: dict[str, Any] = {}
    worlds: dict[str, _WorldSection] = {}


def _path(name: str) -> Traversable:
    return resources.files("hrl_policies.zoo").joinpath("hyperparameters", f"{name}.yml")


@cache  # a study asks for the same file once per run
def _shipped(name: str) -> _SettingsFile:
    if not _path(name).is_file():
        raise ValueError(f"there are no hyperparameters for method {name!r}")
    content = parse_yaml(_path(name).read_text(encoding="utf-8"), f"{name}.yml")
    return validated(_SettingsFile, content, f"{name}.yml")


def _merged(file: _SettingsFile, world: str) -> dict[str, Any]:
    """Returns the settings for a world: those of the file that it is like, then its own, then those for the world."""
    own = file.model_dump(exclude_unset=True, exclude={"like", "worlds"})
    changed = own.get("hyperparameters", {})
    if file.like is not None:
        base = _merged(_shipped(file.like), world)
        own["search"] = inherited_search(base["search"], own.get("search", {}), list(changed))
        changed = overridden(base["hyperparameters"], changed)
        own = base | own
    section = file.worlds.get(world, _WorldSection()).model_dump(exclude_unset=True)
    hyperparameters = overridden(changed, section.get("hyperparameters", {}))
    return {"search": {}} | own | section | {"hyperparameters": hyperparameters}


def _settings(content: dict[str, Any], source: str) -> MethodSettings:
    space = search_space(content.pop("search"), content["hyperparameters"], source)
    return MethodSettings(**content, search=space)


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Turns ``name=value`` texts into hyperparameters; values are YAML, dots go into nested settings.

    Raises:
        ValueError: If a text is not of that form.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"a hyperparameter is given as name=value, got {text!r}")
        overrides[name.strip()] = parse_yaml(value, f"the value {value!r} of {name.strip()!r}")
    return overrides


def overridden(settings: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with some replaced; ``policy_kwargs.log_std_init`` reaches into ``policy_kwargs``.

    Raises:
        ValueError: If a name reaches into something that is not a group of settings.
    """
    result = dict(settings)
    for name, value in overrides.items():
        first, dot, rest = name.partition(".")
        if not dot:
            result[first] = value
            continue
        inner = result.get(first, {})
        if not isinstance(inner, Mapping):
            raise ValueError(f"{name!r} cannot be set: {first!r} is {inner!r}, not a group of settings")
        result[first] = overridden(inner, {rest: value})
    return result


def load_plugins(methods: MutableMapping[str, Any]) -> None:
    """Imports the plugins that are installed, each once; one that fails is warned about and leaves nothing behind.

    Args:
        methods: Where methods are registered.
    """
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        key = (point.name, point.value)
        if key in _tried:
            continue
        # Marked first: a plugin may look up methods while it is imported.
        _tried.add(key)
        before = dict(methods)
        try:
            point.load()
        except Exception as error:
            # A plugin may fail in any way at all, and must not take the zoo with it.
            methods.clear()
            methods.update(before)
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            warnings.warn(
                f"the plugin {point.name!r}{package} ({point.value}) was left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )
