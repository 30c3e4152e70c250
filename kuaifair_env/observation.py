"""What an agent sees: its history-based state, in the space of agent-side item embeddings."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sessions import SessionSimulator
from kuaifair_env.worlds import World

ObservationMode = Literal["state", "history"]
OBSERVATION_MODES: tuple[ObservationMode, ...] = ("state", "history")

Observation = FloatArray | dict[str, Any]


class Observer(Protocol):
    """Turns the sessions of a batch into observations."""

    space: spaces.Space[Any]

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> Any:
        """Returns one observation per session, stacked along the first axis (a dict of such arrays for ``Dict``).

        Args:
            simulator: The sessions.
            rows: Which of them; None takes all.
        """
        ...


class StateObserver:
    """The observed state ``s~_t``: the mean embedding of the clicked items in the history window.

    ``Box(-sqrt(d), sqrt(d), (d,))``, since item embeddings have norm ``sqrt(d)`` or 0; zero without clicks. Where the
    world has a state encoder, the state is the encoder's.

    Args:
        world: Where the embeddings come from.
    """

    def __init__(self, world: World) -> None:
        self._embeddings = world.embeddings
        self._encoder = world.encoder
        norms = np.sqrt(np.einsum("nd,nd->n", world.embeddings, world.embeddings))
        bound = float(max(norms.max(), 1e-6)) * 1.001 if world.encoder is None else world.encoder.bound
        self.space: spaces.Space[Any] = spaces.Box(-bound, bound, (world.dimension,), np.float32)

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> FloatArray:
        """See :class:`Observer`; returns ``float32 (B, d)``."""
        if self._encoder is not None:
            return self._encoder.encode(simulator.history(rows))
        return self._pooled(*simulator.window(rows))

    def of_window(self, window: HistoryWindow) -> FloatArray:
        """Returns the observed states of windows that no session holds (logged ones), ``float32 (B, d)``."""
        if self._encoder is not None:
            return self._encoder.encode(window)
        return self._pooled(window.items, window.clicks)

    def _pooled(self, items: IntArray, clicks: NDArray[Any]) -> FloatArray:
        weights = clicks.astype(np.float32)
        # Padding (-1) takes the last embedding, with weight 0. One small product per session, so that a session's
        # state does not depend on the batch it is in.
        sums: FloatArray = np.matmul(weights[:, None, :], self._embeddings.take(items, axis=0))[:, 0]
        sums /= np.maximum(np.add.reduce(weights, axis=1), 1.0)[:, None]
        return sums


class HistoryObserver:
    """The observed state together with what it was made of, as a ``Dict`` space.

    Keys: ``state`` (see :class:`StateObserver`), ``history_items`` (``int64 (H,)``; item + 1, so that 0 is an empty
    place), ``history_clicks`` (``int8 (H,)``), and ``user`` (``float32 (F,)``, the user's features) where there are
    any. Nothing of the leave rule's own state is in it. The plain names ``items`` and ``clicks`` would not do: torch's
    ``ModuleDict``, in which SB3's ``MultiInputPolicy`` keeps one module a key, refuses ``items``.

    Args:
        world: Where embeddings and features come from.
    """

    def __init__(self, world: World) -> None:
        self._state = StateObserver(world)
        self._features = world.data.users.features.values
        length = world.history_length
        parts: dict[str, spaces.Space[Any]] = {
            "state": self._state.space,
            "history_items": spaces.MultiDiscrete(np.full(length, len(world.data.items) + 1)),
            "history_clicks": spaces.MultiBinary(length),
        }
        if self._features.shape[1]:
            bound = float(np.abs(self._features).max()) + 1.0
            parts["user"] = spaces.Box(-bound, bound, (self._features.shape[1],), np.float32)
        self.space: spaces.Space[Any] = spaces.Dict(parts)

    def observe(self, simulator: SessionSimulator, rows: IntArray | None = None) -> dict[str, Any]:
        """See :class:`Observer`."""
        window = simulator.history(rows)
        observation = {
            "state": self._state.observe(simulator, rows),
            "history_items": window.items.astype(np.int64) + 1,
            "history_clicks": window.clicks.astype(np.int8),
        }
        if self._features.shape[1]:
            observation["user"] = self._features[simulator.users if rows is None else simulator.users[rows]]
        return observation


def observer(mode: ObservationMode, world: World) -> Observer:
    """Returns the observer of a mode.

    Raises:
        ValueError: If the mode is unknown.
    """
    if mode == "state":
        return StateObserver(world)
    if mode == "history":
        return HistoryObserver(world)
    raise ValueError(f"observation_mode must be one of {OBSERVATION_MODES}, got {mode!r}")
