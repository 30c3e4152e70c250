"""Observation spaces: how sessions become observations.

The observed state is the pool of a history window (:func:`observed_states`). Helpers at the end take, stack and replace
observations, be they arrays or dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from kuaifair_env.catalogue import Catalogue, catalogue_of
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import SessionSimulator
from kuaifair_env.world import World

ObservationMode = Literal["state", "history"]

OBSERVED = "observed"
"""What :class:`StateSpace` calls states that no purifier has changed."""


class StateSpace(spaces.Box):
    """States and what they are: equal shapes and bounds alone do not make observed states purified ones.

    Agents keep the space that they were trained on, also in the files of Stable-Baselines3, so that whoever gives them
    other states can be told. A plain ``Box`` says nothing of its states and equals any space of its bounds.

    Args:
        low: Smallest value of a component, for all or for each.
        high: Largest value.
        shape: ``(d,)``.
        states: What the states are: ``"observed"``, or how they were purified.
        catalogue: The items behind them; None says nothing of them, and equals any.
    """

    def __init__(
        self, low: Any, high: Any, shape: Sequence[int], states: str = OBSERVED, catalogue: Catalogue | None = None
    ) -> None:
        super().__init__(low, high, tuple(shape), np.float32)
        self.states = states
        self.catalogue = catalogue

    def __repr__(self) -> str:
        items = "" if self.catalogue is None else f", {self.catalogue}"
        return f"StateSpace({self.low.min():.6g}, {self.high.max():.6g}, {self.shape}, {self.states!r}{items})"

    def __eq__(self, other: object, /) -> bool:
        if not super().__eq__(other) or getattr(other, "states", self.states) != self.states:
            return False
        there = catalogue_of(other)
        return self.catalogue is None or there is None or not self.catalogue.difference(there)

    __hash__ = None  # type: ignore[assignment]


@batch_space.register(StateSpace)
def _batch_state_space(space: StateSpace, n: int = 1) -> StateSpace:
    low, high = (np.repeat(bound[None], n, axis=0) for bound in (space.low, space.high))
    return StateSpace(low, high, low.shape, space.states, space.catalogue)


def observed_states(world: World, window: HistoryWindow) -> FloatArray:
    """Returns the observed states ``s~`` of history windows: the mean embedding of the clicked items.

    Where there is a state encoder, the states are the encoder's. A state depends on its own window alone, never on
    the batch.

    Args:
        world: Where embeddings and encoder come from.
        window: ``B`` windows.

    Returns:
        ``float32 (B, d)``; zero without clicks.
    """
    if world.encoder is not None:
        return world.encoder.encode(window)
    return world.click_pool.means(window)


class StateObserver:
    """The observed state ``s~_t``: the mean embedding of the clicked items in the history window.

    ``Box(-sqrt(d), sqrt(d), (d,))``, since item embeddings have norm ``sqrt(d)``; zero without clicks. Where the
    world has a state encoder, the state is the encoder's.

    Args:
        world: Where the embeddings come from.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        norms = np.sqrt(np.einsum("nd,nd->n", world.embeddings, world.embeddings))
        bound = float(max(norms.max(), 1e-6)) * 1.001 if world.encoder is None else world.encoder.bound
        self.space = StateSpace(-bound, bound, (world.dimension,), catalogue=world.catalogue)

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> FloatArray:
        """Returns the states of the given sessions, or of all, ``float32 (B, d)``."""
        if self._world.encoder is None:
            return simulator.clicked_means(rows)
        return self._world.encoder.encode(simulator.history(rows, self._world.history_length))


class HistoryObserver:
    """The observed state and the history window behind it, as a ``Dict`` space.

    Keys: ``state`` (see :class:`StateObserver`), ``history_items`` (``int64 (H,)``; item + 1, so that 0 is an empty
    place), ``history_clicks`` (``int8 (H,)``), and ``user`` (``float32 (F,)``, the user's features) where there are
    any. Nothing of the leave rule's state is in it. The plain name ``items`` would not do: torch's ``ModuleDict``, in
    which SB3's ``MultiInputPolicy`` keeps one module a key, refuses it.

    Args:
        world: Where embeddings and features come from.
    """

    def __init__(self, world: World) -> None:
        self._state = StateObserver(world)
        self._features = world.data.users.features.values
        self._length = length = world.history_length
        entries: dict[str, spaces.Space[Any]] = {
            "state": self._state.space,
            "history_items": spaces.MultiDiscrete(np.full(length, len(world.data.items) + 1)),
            "history_clicks": spaces.MultiBinary(length),
        }
        if self._features.shape[1]:
            bound = float(np.abs(self._features).max()) + 1.0
            entries["user"] = spaces.Box(-bound, bound, (self._features.shape[1],), np.float32)
        self.space: spaces.Space[Any] = spaces.Dict(entries)

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> dict[str, Any]:
        """Returns the observations of the given sessions, or of all: arrays with a leading axis of ``B``."""
        window = simulator.history(rows, self._length)
        observation = {
            "state": self._state.observe(simulator, rows),
            "history_items": window.items.astype(np.int64) + 1,
            "history_clicks": window.clicks.astype(np.int8),
        }
        if self._features.shape[1]:
            observation["user"] = self._features[simulator.users if rows is None else simulator.users[rows]]
        return observation


class ClockedObserver:
    """Another observer's observations with the session clock: steps taken / Max Len, in [0, 1].

    The clock is one more component at the end of the state, so that whatever reads states reads it. It tells the number
    of steps alone, not the temper.

    Args:
        observer: What is observed besides.
    """

    def __init__(self, observer: StateObserver | HistoryObserver) -> None:
        self._observer = observer
        state = extended_space(state_of(observer.space), np.zeros(1, np.float32), np.ones(1, np.float32))
        self.space: spaces.Space[Any] = with_state(observer.space, state)

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> Any:
        """Returns the observations of the given sessions, or of all."""
        observations = self._observer.observe(simulator, rows)
        steps = simulator.steps if rows is None else simulator.steps[rows]
        # A finished session may be stepped once more before it is replaced.
        clock = np.minimum(steps / simulator.max_len, 1.0).astype(np.float32)
        return with_state(observations, np.concatenate([state_of(observations), clock[:, None]], axis=1))


def observer(
    mode: ObservationMode, world: World, session_clock: bool = False
) -> StateObserver | HistoryObserver | ClockedObserver:
    """Returns the observer of a mode.

    Args:
        mode: ``"state"`` or ``"history"``.
        world: Where embeddings and features come from.
        session_clock: Whether states end with the session clock; see :class:`ClockedObserver`.

    Raises:
        ValueError: If the mode is unknown.
    """
    if session_clock:
        return ClockedObserver(_plain_observer(mode, world))
    return _plain_observer(mode, world)


def _plain_observer(mode: ObservationMode, world: World) -> StateObserver | HistoryObserver:
    if mode == "state":
        return StateObserver(world)
    if mode == "history":
        return HistoryObserver(world)
    raise ValueError(f"observation_mode must be one of {get_args(ObservationMode)}, got {mode!r}")


def state_of(observation: Any) -> Any:
    """Returns the state in an observation: the observation itself, or its entry ``state`` where it is a dict.

    Takes a space of observations as well, and returns that of the states.
    """
    return observation["state"] if isinstance(observation, (dict, spaces.Dict)) else observation


def with_state(observation: Any, state: Any) -> Any:
    """Returns an observation, or a space of observations, with another state; see :func:`state_of`."""
    if isinstance(observation, spaces.Dict):
        return spaces.Dict({**observation.spaces, "state": state})
    return {**observation, "state": state} if isinstance(observation, dict) else state


def extended_space(states: StateSpace, low: FloatArray, high: FloatArray) -> StateSpace:
    """Returns a space of states with more components at the end, of the given bounds."""
    lows, highs = np.concatenate([states.low, low]), np.concatenate([states.high, high])
    return StateSpace(lows, highs, lows.shape, states.states, states.catalogue)


def stack_observations(observations: Sequence[Any]) -> Any:
    """Returns single observations as a batch."""
    return _map(lambda *arrays: np.stack(arrays), *observations)


def split_observations(observations: Any) -> list[Any]:
    """Returns a batch as single observations."""
    if not isinstance(observations, dict):
        return list(observations)
    return [dict(zip(observations, rows, strict=True)) for rows in zip(*observations.values(), strict=True)]


def take_rows(observations: Any, rows: int | IntArray) -> Any:
    """Returns one observation of a batch, or several as a batch."""
    return _map(lambda array: array[rows], observations)


def replace_rows(observations: Any, rows: IntArray, fresh: Any) -> Any:
    """Returns a copy of a batch of observations with those of ``rows`` replaced."""

    def replaced(array: NDArray[Any], values: NDArray[Any]) -> NDArray[Any]:
        copy = array.copy()
        copy[rows] = values
        return copy

    return _map(replaced, observations, fresh)


def reached_observations(observations: Any, infos: Sequence[Mapping[str, Any]], done: BoolArray) -> Any:
    """Returns what a step of an SB3 ``VecEnv`` led to, with the last observations of the sessions that ended.

    Args:
        observations: What the step returned; where a session ended, the first observation of the next one.
        infos: Its infos, with ``terminal_observation`` where a session ended.
        done: ``bool (B,)``, where that is.
    """
    ended = np.flatnonzero(done)
    if not len(ended):
        return observations
    last = stack_observations([infos[row]["terminal_observation"] for row in ended.tolist()])
    return replace_rows(observations, ended, last)


def _map(function: Callable[..., Any], *observations: Any) -> Any:
    """Applies a function to arrays, or to the arrays of each name where observations are dicts."""
    if isinstance(observations[0], dict):
        return {name: function(*(entry[name] for entry in observations)) for name in observations[0]}
    return function(*observations)
