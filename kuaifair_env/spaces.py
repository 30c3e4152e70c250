"""Action spaces and observation spaces: how actions become slates, and how sessions become observations.

The observed state is the pool of a history window (:func:`observed_states`). Helpers at the end take, stack and replace
observations, be they arrays or dicts of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.ranking import top_k, top_k_products
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import SessionSimulator
from kuaifair_env.world import World

ActionMode = Literal["embedding", "slate", "item"]
ObservationMode = Literal["state", "history"]
Duplicates = Literal["error", "replace"]

OBSERVED = "observed"
"""What :class:`StateSpace` calls states that no purifier has changed."""


class SlateSpace(spaces.MultiDiscrete):
    """Ordered slates of ``slate_size`` distinct items out of ``n_items``.

    A ``MultiDiscrete`` whose samples and members have no item twice, so that code which knows ``MultiDiscrete``
    works and random actions are valid.

    Args:
        n_items: Number of candidates ``N``.
        slate_size: Items per slate ``K``, at most ``N``.
        batch: Number of slates in one element, or None for a single slate.
        seed: Seed or generator of :meth:`sample`.
    """

    def __init__(
        self,
        n_items: int,
        slate_size: int,
        batch: int | None = None,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        if slate_size > n_items:
            raise ValueError(f"slate_size {slate_size} is larger than the {n_items} candidates")
        self.n_items = n_items
        self.slate_size = slate_size
        self.batch = batch
        shape = (slate_size,) if batch is None else (batch, slate_size)
        super().__init__(np.full(shape, n_items, np.int64), seed=seed)

    def sample(self, mask: Any = None, probability: Any = None) -> NDArray[np.int64]:
        """Draws distinct items uniformly; ``mask`` is an optional ``bool (n_items,)`` of allowed items."""
        if probability is not None:
            raise ValueError("SlateSpace.sample draws uniformly; it takes a mask, no probability")
        allowed = self.n_items if mask is None else np.flatnonzero(np.asarray(mask))
        if np.size(allowed) < self.slate_size and mask is not None:
            raise ValueError(f"the mask allows {np.size(allowed)} items, too few for slates of {self.slate_size}")
        slates = [self.np_random.choice(allowed, self.slate_size, replace=False) for _ in range(self.batch or 1)]
        return np.asarray(slates, np.int64).reshape(self.shape)

    def contains(self, x: Any) -> bool:
        """Says whether ``x`` holds valid ids of the right shape, none of them twice in a slate."""
        if not super().contains(x):
            return False
        ordered = np.sort(np.asarray(x), axis=-1)
        return not bool((ordered[..., 1:] == ordered[..., :-1]).any())

    def __repr__(self) -> str:
        batch = "" if self.batch is None else f", batch={self.batch}"
        return f"SlateSpace(n_items={self.n_items}, slate_size={self.slate_size}{batch})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlateSpace) and (self.n_items, self.slate_size, self.batch) == (
            other.n_items,
            other.slate_size,
            other.batch,
        )

    __hash__ = None  # type: ignore[assignment]


@batch_space.register(SlateSpace)
def _batch_slate_space(space: SlateSpace, n: int = 1) -> SlateSpace:
    return SlateSpace(space.n_items, space.slate_size, n, seed=deepcopy(space.np_random))


@iterate.register(SlateSpace)
def _iterate_slate_space(space: SlateSpace, items: NDArray[Any]) -> Iterator[NDArray[Any]]:  # type: ignore[misc]
    return iter(items)


class StateSpace(spaces.Box):
    """States and what they are: equal shapes and bounds alone do not make observed states purified ones.

    Agents keep the space that they were trained on, also in the files of Stable-Baselines3, so that whoever gives them
    other states can be told. A plain ``Box`` says nothing of its states and equals any space of its bounds.

    Args:
        low: Smallest value of a component, for all or for each.
        high: Largest value.
        shape: ``(d,)``.
        states: What the states are: ``"observed"``, or how they were purified.
    """

    def __init__(self, low: Any, high: Any, shape: Sequence[int], states: str = OBSERVED) -> None:
        super().__init__(low, high, tuple(shape), np.float32)
        self.states = states

    def __repr__(self) -> str:
        return f"StateSpace({self.low.min():.6g}, {self.high.max():.6g}, {self.shape}, {self.states!r})"

    def __eq__(self, other: object, /) -> bool:
        return super().__eq__(other) and getattr(other, "states", self.states) == self.states

    __hash__ = None  # type: ignore[assignment]


@batch_space.register(StateSpace)
def _batch_state_space(space: StateSpace, n: int = 1) -> StateSpace:
    low, high = (np.repeat(bound[None], n, axis=0) for bound in (space.low, space.high))
    return StateSpace(low, high, low.shape, space.states)


class EmbeddingActions:
    """``Box(-1, 1, (d,))``, executed as the top-K items by inner product with the item embeddings.

    Embeddings have one length, so that an item's own embedding, scaled into the box, ranks that item first.

    Args:
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate ``K``.
    """

    def __init__(self, embeddings: FloatArray, slate_size: int) -> None:
        self._embeddings = np.ascontiguousarray(embeddings.T)
        self._slate_size = slate_size
        self.space: spaces.Space[Any] = spaces.Box(-1.0, 1.0, (embeddings.shape[1],), np.float32)

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns slates of distinct items.

        Args:
            actions: ``(B, d)``.
            allowed: ``bool (B, N)``, items that may be shown, or None for all.

        Returns:
            ``int64 (B, K)``.

        Raises:
            ValueError: If an action has the wrong shape or type, or NaN.
        """
        dimension = self._embeddings.shape[0]
        if actions.dtype.kind not in "fiu":
            raise ValueError(f"an embedding action holds numbers, got {actions.dtype}")
        actions = actions.astype(np.float32, copy=False)
        if actions.ndim != 2 or actions.shape[1] != dimension:
            raise ValueError(f"an embedding action has shape ({dimension},), got {actions.shape[1:]}")
        if not np.isfinite(actions).all():
            row = int(np.argwhere(~np.isfinite(actions))[0, 0])
            raise ValueError(f"action of session {row} holds NaN or infinity")
        return top_k_products(actions, self._embeddings, self._slate_size, allowed)


class SlateActions:
    """``K`` distinct item ids in order (see :class:`SlateSpace`); ``K = 1`` in ``item`` mode is ``Discrete(N)``.

    Args:
        n_items: Number of candidates ``N``.
        slate_size: Items per slate ``K``.
        single: Whether an action is one plain id.
    """

    def __init__(self, n_items: int, slate_size: int, single: bool = False) -> None:
        self._n_items = n_items
        self._end = np.asarray(n_items, np.uint64)
        self._slate_size = slate_size
        self._single = single
        self.space: spaces.Space[Any] = spaces.Discrete(n_items) if single else SlateSpace(n_items, slate_size)

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns the actions as slates; see :meth:`EmbeddingActions.decode`.

        Raises:
            ValueError: If an action has the wrong shape or type, or unknown, repeated or forbidden items.
        """
        items = self._known_items(np.asarray(actions))
        if self._slate_size > 1:
            _refuse_repeated(items)
        if allowed is not None and not np.take_along_axis(allowed, items, axis=1).all():
            row, slot = np.argwhere(~np.take_along_axis(allowed, items, axis=1))[0]
            raise ValueError(
                f"session {row} may not be shown item {items[row, slot]}: it was shown before, and repeats='forbid', "
                "or it is none of the user's own candidates; see action_masks()"
            )
        return items

    def _known_items(self, actions: NDArray[Any]) -> NDArray[np.int64]:
        """Returns actions as ``int64 (B, K)``, a copy: outcomes keep their items, and callers may reuse an array."""
        items = actions[:, None] if self._single and actions.ndim == 1 else actions
        if items.ndim != 2 or items.shape[1] != self._slate_size:
            raise ValueError(f"a slate holds {self._slate_size} item ids, got shape {items.shape[1:]}")
        if items.dtype.kind not in "iu":
            raise ValueError(f"item ids are integers, got {items.dtype}")
        items = items.astype(np.int64)
        # Read as unsigned, a negative id is larger than any item: one comparison checks both ends.
        outside = items.view(np.uint64) >= self._end
        if np.count_nonzero(outside):
            row = int(np.argwhere(outside)[0, 0])
            raise ValueError(f"slate {items[row].tolist()} of session {row} leaves 0..{self._n_items - 1}")
        return items


def _refuse_repeated(slates: NDArray[np.int64]) -> None:
    ordered = slates.copy()
    ordered.sort(axis=1)
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if np.count_nonzero(repeated):
        row = int(np.argwhere(repeated)[0, 0])
        raise ValueError(
            f"slate {slates[row].tolist()} of session {row} holds an item twice; duplicates='replace' fills it up"
        )


class FilledSlateActions(SlateActions):
    """``MultiDiscrete`` of ``K`` times ``N``, executed with what cannot be shown replaced.

    The first place of an item in a slate stands. An item that the slate holds already, or that the session may not be
    shown again (``repeats="forbid"``), gives way to the next best: the item most alike by embedding (cosine; the
    smaller row among equals) that may be shown and is not in the slate. A slate follows from the action without chance.

    Args:
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate ``K``.
    """

    def __init__(self, embeddings: FloatArray, slate_size: int) -> None:
        super().__init__(len(embeddings), slate_size)
        self._units = unit_rows(embeddings)
        self.space = spaces.MultiDiscrete(np.full(slate_size, len(embeddings), np.int64))

    def decode(self, actions: NDArray[Any], allowed: BoolArray | None) -> NDArray[np.int64]:
        """Returns the actions as slates of distinct items; see :meth:`EmbeddingActions.decode`.

        Raises:
            ValueError: If an action has the wrong shape or type, or unknown items, or fewer than ``K`` are allowed.
        """
        slates = self._known_items(np.asarray(actions))
        earlier = np.tril(np.ones((self._slate_size, self._slate_size), np.bool_), -1)
        replaced = ((slates[:, :, None] == slates[:, None, :]) & earlier).any(axis=2)
        if allowed is not None:
            replaced |= ~np.take_along_axis(allowed, slates, axis=1)
        for row in np.flatnonzero(replaced.any(axis=1)):
            free = np.ones(self._n_items, np.bool_) if allowed is None else allowed[row].copy()
            free[slates[row, ~replaced[row]]] = False
            for slot in np.flatnonzero(replaced[row]):
                # One product for each, so that a slate does not depend on the batch it is in.
                likeness = self._units @ self._units[slates[row, slot]]
                slates[row, slot] = top_k(likeness[None], 1, free)[0, 0]
                free[slates[row, slot]] = False
        return slates


def action_decoder(
    mode: ActionMode, embeddings: FloatArray, slate_size: int, duplicates: Duplicates = "error"
) -> EmbeddingActions | SlateActions:
    """Returns the decoder of a mode.

    Args:
        mode: ``"embedding"``, ``"slate"`` or ``"item"``.
        embeddings: ``float32 (N, d)`` of the candidates.
        slate_size: Items per slate; must be 1 in ``item`` mode.
        duplicates: Whether ``slate`` mode refuses a slate with an item twice (``"error"``) or replaces it (see
            :class:`FilledSlateActions`).

    Raises:
        ValueError: If the mode is unknown, or the slate does not fit the mode or the candidates.
    """
    n_items = len(embeddings)
    if not 1 <= slate_size <= n_items:
        raise ValueError(f"slate_size must lie in 1..{n_items} (the number of candidates), got {slate_size}")
    if mode == "embedding":
        return EmbeddingActions(embeddings, slate_size)
    if mode == "slate":
        filled = duplicates == "replace"
        return FilledSlateActions(embeddings, slate_size) if filled else SlateActions(n_items, slate_size)
    if mode == "item":
        if slate_size != 1:
            raise ValueError(f"action_mode='item' shows one item a step; give slate_size=1, not {slate_size}")
        return SlateActions(n_items, 1, single=True)
    raise ValueError(f"action_mode must be one of {get_args(ActionMode)}, got {mode!r}")


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
        self.space = StateSpace(-bound, bound, (world.dimension,))

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
    return StateSpace(lows, highs, lows.shape, states.states)


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
