"""The registry of methods: what a method is, registration (of plugins too), lookup, and the sessions of a method."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from hrl_policies.worlds import WorldPair, cached_purifier, purified_sessions, training_sessions
from hrl_policies.zoo.settings import MethodSettings, shipped_file, shipped_settings, shipped_worlds
from kuaifair_env.actions import ActionMode
from kuaifair_env.batch import SessionConfig
from kuaifair_env.observations import ObservationMode
from kuaifair_env.registration import world_and_config
from kuaifair_env.world import World

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv
    from typing_extensions import NotRequired, Unpack

    from dsrm.purifier import StatePurifier
    from kuaifair_env.randomisation import RandomisationLike
    from kuaifair_env.settings import Settings

ENTRY_POINT_GROUP = "kuaifair.methods"

MethodKind = Literal["online", "offline", "control"]

_tried: set[tuple[str, str]] = set()
"""Name and value of the entry points of this process that were loaded, or failed to."""


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


@dataclass(frozen=True)
class MethodSpec:
    """A method of the zoo.

    Attributes:
        name: Its name on the command line.
        title: Its name in tables.
        reference: The article or library it comes from.
        build: Makes the untrained algorithm (an SB3 ``BaseAlgorithm``), or the control.
        family: ``"on-policy"``, ``"off-policy"``, ``"control"``, ...
        kind: ``"online"`` trains in the training world, ``"offline"`` on its log, ``"control"`` not at all.
        action_mode: How it acts.
        sees: What it may look at.
        privileged: Whether it looks at what users of the test world truly like.
        observation_mode: Whether it observes the state alone, or the window behind it too.
        purifier: Mode of the purifier that is part of the method (see ``dsrm.MODES``); empty for none.
        needs_repeats: Why it cannot act where ``repeats="forbid"``; empty if it can.
        settings: How it is trained unless told otherwise; None takes the shipped file of its name.
    """

    name: str
    title: str
    reference: str
    build: Builder
    _: KW_ONLY
    family: str
    kind: MethodKind
    action_mode: ActionMode
    sees: str
    privileged: bool = False
    observation_mode: ObservationMode = "state"
    purifier: str = ""
    needs_repeats: str = ""
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
    if spec.learns and spec.settings is None and not shipped_file(spec.name).is_file():
        raise ValueError(f"{spec.name!r} learns and needs settings: register_method(..., settings=MethodSettings(...))")
    METHODS[spec.name] = spec


class MethodAttributes(TypedDict):
    """What :func:`register_method` takes besides the name; described at :class:`MethodSpec`."""

    title: str
    reference: str
    family: str
    kind: MethodKind
    action_mode: ActionMode
    sees: str
    privileged: NotRequired[bool]
    observation_mode: NotRequired[ObservationMode]
    purifier: NotRequired[str]
    needs_repeats: NotRequired[str]
    settings: NotRequired[MethodSettings | None]


def register_method(name: str, **attributes: Unpack[MethodAttributes]) -> Callable[[Builder], Builder]:
    """Registers a build function as a method.

    A package of one's own names the module that does so as an entry point of the group ``kuaifair.methods``.

    Args:
        name: Its name on the command line.
        **attributes: See :class:`MethodAttributes`.

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
    load_plugins()
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
    return shipped_settings(name, world)


def worlds_with_settings(name: str) -> list[str]:
    """Returns the environment ids for which a method has settings of their own.

    Raises:
        ValueError: If the method has no settings, or its file is not valid.
    """
    spec = METHODS.get(name)
    if spec is not None and spec.settings is not None:
        return []
    return shipped_worlds(name)


def load_plugins() -> None:
    """Imports the plugins that are installed, each once; one that fails is warned about and leaves nothing behind."""
    for point in _installed_plugins(_places()):
        key = (point.name, point.value)
        if key in _tried:
            continue
        # Marked first: a plugin may look up methods while it is imported.
        _tried.add(key)
        before = dict(METHODS)
        try:
            point.load()
        except Exception as error:
            # A plugin may fail in any way at all, and must not take the zoo with it.
            METHODS.clear()
            METHODS.update(before)
            package = "" if point.dist is None else f" of the package {point.dist.name}"
            warnings.warn(
                f"the plugin {point.name!r}{package} ({point.value}) was left out: {type(error).__name__}: {error}",
                stacklevel=2,
            )


def _places() -> tuple[tuple[str, int], ...]:
    """Returns where packages may be installed, and when something last was there."""
    found = []
    for place in sys.path:
        with suppress(OSError):
            found.append((place, os.stat(place or ".").st_mtime_ns))
    return tuple(found)


@lru_cache(maxsize=1)
def _installed_plugins(places: tuple[tuple[str, int], ...]) -> tuple[metadata.EntryPoint, ...]:
    """Returns the plugins that are installed in these places; asking each package takes 30 ms and more."""
    return tuple(metadata.entry_points(group=ENTRY_POINT_GROUP))


def make_training_env(
    method_name: str,
    env_id: str,
    n_envs: int | None = None,
    seed: int = 0,
    purifier: StatePurifier | str | Path | None = None,
    randomisation: RandomisationLike = "auto",
    **settings: Unpack[Settings],
) -> VecEnv:
    """Makes the sessions that a method learns from, with all that belongs to the method.

    That is its action and observation mode and its purifier, which is pretrained on first use and then cached. The
    training world is randomised as for every method (:mod:`kuaifair_env.randomisation`).

    Args:
        method_name: Name in the zoo, such as ``"dsrm-hrl"``.
        env_id: A registered id, such as ``"KuaiFair-Toy-v0"``.
        n_envs: Concurrent sessions; None takes the method's number.
        seed: Seed of sessions and deviations.
        purifier: A purifier, or its file, instead of the method's.
        randomisation: How far training users deviate; None leaves them as they are.
        **settings: Other settings of world and sessions; see :class:`kuaifair_env.registration.Settings`.

    Raises:
        ValueError: If the method, the id or a setting is unknown.
    """
    spec = method(method_name)
    world, config = world_and_config(env_id, {**_modes(spec), **settings, "split": "train"})
    shipped = load_settings(method_name, env_id)
    return training_sessions(
        world,
        config,
        shipped.n_envs if n_envs is None else n_envs,
        seed,
        randomisation=randomisation,
        purifier=_purifier(spec, world, purifier),
    )


def make_evaluation_env(
    method_name: str,
    env_id: str,
    n_envs: int = 100,
    seed: int = 0,
    purifier: StatePurifier | str | Path | None = None,
    **settings: Unpack[Settings],
) -> VecEnv:
    """Makes sessions of the test world, observed as the method observes in training; for ``kuaifair_env.evaluate``.

    Arguments and errors are those of :func:`make_training_env`; test worlds are never randomised.
    """
    spec = method(method_name)
    given = {**_modes(spec), **settings}
    test, config = world_and_config(env_id, {**given, "split": "test"})
    if purifier is None and spec.purifier:
        # Purifiers are pretrained in the training world, whichever world they are used in.
        train, _ = world_and_config(env_id, {**given, "split": "train"})
        purifier = _purifier(spec, train, None)
    return purified_sessions(test, config, n_envs, seed, _purifier(spec, test, purifier))


def _modes(spec: MethodSpec) -> Settings:
    return {"action_mode": spec.action_mode, "observation_mode": spec.observation_mode}


def _purifier(spec: MethodSpec, world: World, purifier: StatePurifier | str | Path | None) -> StatePurifier | None:
    from dsrm.purifier import load_purifier

    if purifier is None and spec.purifier:
        purifier = cached_purifier(world, spec.purifier)
    return load_purifier(purifier) if isinstance(purifier, (str, Path)) else purifier
