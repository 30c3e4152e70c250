"""Purified states in the place of observed ones, in observations of every form, and what may lie beneath a purifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorObservationWrapper
from stable_baselines3.common.vec_env import VecNormalize

from dsrm.purifier import StatePurifier, history_length_of, load_purifier, purified_space
from kuaifair_env.adapters import layers_of
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import IntArray
from kuaifair_env.observations import (
    OBSERVED,
    extended_space,
    observer,
    stack_observations,
    state_of,
    take_rows,
    with_state,
)
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_STATE = "state"


def as_purifier(purifier: StatePurifier | str | Path) -> StatePurifier:
    """Returns a purifier, read from its file where a path is given.

    Raises:
        ArtifactError: If the file is missing or damaged.
    """
    return load_purifier(purifier) if isinstance(purifier, (str, Path)) else purifier


def recorded(purifier: StatePurifier | str | Path) -> StatePurifier | str:
    """Returns what an environment's specification says of a purifier: itself, or the full path of its file."""
    return str(Path(purifier).absolute()) if isinstance(purifier, (str, Path)) else purifier


def check_observed(env: Any, world: World, config: SessionConfig, purifying: type) -> None:
    """Checks that an environment shows what its sessions show, for a purifier to read.

    Args:
        env: KuaiFair sessions in any form, with wrappers around them.
        world: Their world.
        config: Their settings.
        purifying: Class of the wrapper that purifies.

    Raises:
        TypeError: If a wrapper changes observations, or purifies them already; says what to do.
    """
    own = observer(config.observation_mode, world, config.session_clock).space
    # From the inside out: the first one that changes something is named.
    for layer in reversed(layers_of(env)):
        if isinstance(layer, (gym.Env, VectorEnv)) or hasattr(layer, "observation_space"):
            _check_layer(layer, own, purifying)


def _check_layer(layer: Any, own: spaces.Space[Any], purifying: type) -> None:
    space = getattr(layer, "single_observation_space", layer.observation_space)
    states = getattr(state_of(space), "states", OBSERVED) if _has_state(space) else OBSERVED
    if states != OBSERVED:
        raise TypeError(
            f"the states beneath {purifying.__name__} are {states} already, and a purifier reads observed ones; use "
            "one purifier alone"
        )
    if space == own and not _transforms(layer):
        return
    name = type(layer).__name__
    if not {"env", "venv"} & set(vars(layer)):
        raise TypeError(
            f"a wrapper around the single environments in {name} changes the observations that a purifier reads; wrap "
            "each of them in DSRMObservationWrapper first, and put the other wrapper on top"
        )
    raise TypeError(
        f"{name} beneath {purifying.__name__} changes the observations that a purifier reads; put it on top: "
        f"{name}({purifying.__name__}(env, purifier))"
    )


def _transforms(layer: Any) -> bool:
    """Says whether a wrapper changes observations whose space may stay as it is."""
    if isinstance(layer, VecNormalize):
        return layer.norm_obs
    return isinstance(layer, (gym.ObservationWrapper, VectorObservationWrapper))


def _has_state(space: spaces.Space[Any]) -> bool:
    return not isinstance(space, spaces.Dict) or _STATE in space.spaces


class SessionObservations(Protocol):
    """Puts purified states in the place of observed ones, be observations arrays or dicts.

    Attributes:
        space: Space of a purified observation.
    """

    space: spaces.Space[Any]

    def started(self, observations: Any, learns: bool) -> Any:
        """Returns the observations of all sessions, purified, after some or all were started.

        Args:
            observations: What the environment shows.
            learns: Whether the next step will be learned from, for purifiers that can.
        """
        ...

    def stepped(self, observations: Any, learns: bool) -> Any:
        """Returns the observations of all sessions, purified, after a step.

        Args:
            observations: What the environment shows; of sessions that the step ended and replaced, the next ones.
            learns: Whether to learn from the step, for purifiers that can.
        """
        ...

    def last(self, observations: Sequence[Any], rows: IntArray) -> list[Any]:
        """Returns the last observations, purified, of the sessions in some rows, which the last step ended."""
        ...


class PurifiedRows(SessionObservations):
    """Purifies observations row by row: each state with the window behind it.

    What follows the observed state (the session clock) follows the purified one as it is.

    Args:
        purifier: The purifier.
        space: Space of an observation.
        world: The world of the sessions.
        windows: Returns what the users of all sessions saw, in so many places.
        finished_windows: Returns what the users saw whose sessions, in the given rows, the last step ended.
    """

    def __init__(
        self,
        purifier: StatePurifier,
        space: spaces.Space[Any],
        world: World,
        windows: Callable[[int | None], HistoryWindow],
        finished_windows: Callable[[IntArray], HistoryWindow],
    ) -> None:
        self._purifier = purifier
        self._length = history_length_of(purifier, world)
        self._windows, self._finished_windows = windows, finished_windows
        self._dimension = world.dimension
        observed = state_of(space)
        low, high = observed.low[world.dimension :], observed.high[world.dimension :]
        self.space = with_state(space, extended_space(purified_space(purifier, world), low, high))

    def started(self, observations: Any, learns: bool) -> Any:
        """See :class:`SessionObservations`."""
        return self._purified(observations, self._windows(self._length))

    def stepped(self, observations: Any, learns: bool) -> Any:
        """See :class:`SessionObservations`."""
        return self.started(observations, learns)

    def last(self, observations: Sequence[Any], rows: IntArray) -> list[Any]:
        """See :class:`SessionObservations`."""
        purified = self._purified(stack_observations(observations), self._finished_windows(rows))
        return [take_rows(purified, row) for row in range(len(observations))]

    def _purified(self, observations: Any, window: HistoryWindow) -> Any:
        states = state_of(observations)
        observed, added = states[:, : self._dimension], states[:, self._dimension :]
        purified = self._purifier.purify(observed, window.last(self._length))
        return with_state(observations, np.concatenate([purified, added], axis=1) if added.shape[1] else purified)
