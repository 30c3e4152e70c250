"""A response that depends on the recent history: a small causal transformer on top of a factor model.

After the user response model of KuaiSim (Zhao et al., NeurIPS 2023), with one sigmoid instead of two, no dropout
while simulating, and inner products that are sums over dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, parse_as, take_tensors, with_prefix, without_prefix
from kuaifair_env.response.base import PADDING, BernoulliFeedback, History, HistoryWindow, StoredResponse, sigmoid
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.rows import HistorySource
from kuaifair_env.response.transformer import HistoryTransformer, OwnPlaces, Places, TransformerShape

_STATIC, _WEIGHTS = "static.", "weights."
_VERSION = 2  # of what the weights mean
_SESSIONS_AT_ONCE, _HISTORIES_AT_ONCE = 32, 8  # their attention scores fit a processor's cache
_ITEMS_AT_ONCE = 16  # at most, in a memory

Weights = Mapping[str, FloatArray]


@dataclass(frozen=True)
class SequentialConfig:
    """Settings of :func:`fit_sequential`.

    Attributes:
        shape: Sizes of the transformer.
        history_from: ``"log"`` when the log's order is the order in which users saw things; ``"context"`` when its
            order is unknown, so that histories hold context rows only.
        dropout: While training.
        weight_decay: Of AdamW.
        learning_rate: Of AdamW.
        batch_size: Pieces of history per step at most.
        max_epochs: Passes at most.
        patience: Passes without a better held-out log loss before the end.
        slope_prior: Standard deviation of the prior around 1 of the slope of the history's part.
    """

    shape: TransformerShape = field(default_factory=TransformerShape)
    history_from: HistorySource = "log"
    dropout: float = 0.1
    weight_decay: float = 0.01
    learning_rate: float = 1e-3
    batch_size: int = 128
    max_epochs: int = 8
    patience: int = 2
    slope_prior: float = 0.5


class TransformerMemory:
    """What ``B`` running sessions need of their past, and the state after the newest item of each.

    All sessions see equally many items at a time, so their newest places stand in the same slots of a ring. Before the
    ring stands the start token.

    Args:
        transformer: Over numpy arrays.
        item_codes: ``(N, d)``.
        batch_size: Number of sessions ``B``.

    Attributes:
        states: ``float32 (B, d)``.
        keys, values, inputs: See :class:`~kuaifair_env.response.transformer.Places`.
        next: Slot of the ring for the next place.
    """

    def __init__(self, transformer: HistoryTransformer, item_codes: FloatArray, batch_size: int) -> None:
        shape = transformer.shape
        width = shape.dimension // shape.heads
        self._transformer, self._item_codes = transformer, item_codes.view()
        self._item_codes.setflags(write=False)  # checkpoints hold what can change
        self.next = 0
        sizes, places = (shape.layers - 1, batch_size, shape.heads), shape.length + _ITEMS_AT_ONCE
        self.keys = np.zeros((*sizes, width, places), np.float32)
        self.values = np.zeros((*sizes, places, width + 1), np.float32)
        self.inputs = np.zeros((batch_size, places, shape.dimension + 1), np.float32)
        self.states = np.zeros((batch_size, shape.dimension), np.float32)
        nothing = HistoryWindow(np.zeros((batch_size, 0), np.int32), np.zeros((batch_size, 0), np.bool_))
        self.reset(np.arange(batch_size), nothing)

    def reset(self, rows: IntArray, history: HistoryWindow) -> None:
        """See :class:`~kuaifair_env.response.base.SessionMemory`."""
        for block in _blocks(len(rows), _HISTORIES_AT_ONCE):
            places = _WholeHistory(self, rows[block], self._transformer.shape.length - 1)
            self.states[rows[block]] = _newest_state(self._transformer, self._item_codes, history.take(block), places)

    def append(self, items: IntArray, clicks: BoolArray) -> None:
        """See :class:`~kuaifair_env.response.base.SessionMemory`."""
        for first in range(0, items.shape[1], _ITEMS_AT_ONCE):
            part = slice(first, first + _ITEMS_AT_ONCE)
            self._append(items[:, part], clicks[:, part].astype(np.intp))

    def _append(self, items: IntArray, clicks: IntArray) -> None:
        slots = self.inputs.shape[1] - 1
        # Around the ring, what is newer than a place counts as too far back for it to attend to.
        distances = ((self.next + np.arange(items.shape[1]))[:, None] - np.arange(slots)) % slots
        for block in _blocks(len(items), _SESSIONS_AT_ONCE):
            codes = self._item_codes[items[block]]
            places = _NextPlaces(self, block)
            self.states[block] = self._transformer.continued_state(codes, clicks[block], distances, places)
        self.next = (self.next + items.shape[1]) % slots


class _WholeHistory:
    """The places of whole histories, of which some rows of a memory keep what they need."""

    def __init__(self, memory: TransformerMemory, rows: IntArray, n_needed: int) -> None:
        self._memory, self._rows, self._n_needed = memory, rows, n_needed

    def keys_and_values(self, layer: int, keys: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        self._replace(self._memory.keys[layer].swapaxes(-1, -2), keys.swapaxes(-1, -2))
        self._replace(self._memory.values[layer], values)
        return keys, values

    def inputs(self, inputs: FloatArray) -> FloatArray:
        self._replace(self._memory.inputs, inputs)
        return inputs

    def _replace(self, kept: FloatArray, places: FloatArray) -> None:
        count = min(places.shape[-2] - 1, self._n_needed)
        if count < self._n_needed:
            kept[self._rows] = 0.0
        kept[self._rows, ..., :1, :] = places[..., :1, :]
        ring = kept[..., 1:, :]
        _write(
            ring, self._rows, (self._memory.next - count) % ring.shape[-2], places[..., places.shape[-2] - count :, :]
        )


class _NextPlaces:
    """The places of some rows of a memory, to which come the next ones of their sessions."""

    def __init__(self, memory: TransformerMemory, rows: slice) -> None:
        self._memory, self._rows = memory, rows

    def keys_and_values(self, layer: int, keys: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        all_keys, all_values = self._memory.keys[layer], self._memory.values[layer]
        _write(all_keys[..., 1:].swapaxes(-1, -2), self._rows, self._memory.next, keys.swapaxes(-1, -2))
        _write(all_values[..., 1:, :], self._rows, self._memory.next, values)
        return all_keys[self._rows], all_values[self._rows]

    def inputs(self, inputs: FloatArray) -> FloatArray:
        _write(self._memory.inputs[:, 1:], self._rows, self._memory.next, inputs)
        return self._memory.inputs[self._rows]


def _write(ring: FloatArray, rows: IntArray | slice, first: int, places: FloatArray) -> None:
    """Writes places ``(r, ..., n, c)`` into the slots from ``first`` on of rows of a ring ``(B, ..., slots, c)``."""
    before_end = min(places.shape[-2], ring.shape[-2] - first)
    ring[rows, ..., first : first + before_end, :] = places[..., :before_end, :]
    ring[rows, ..., : places.shape[-2] - before_end, :] = places[..., before_end:, :]


def _blocks(size: int, length: int) -> Iterator[slice]:
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def _newest_state(
    transformer: HistoryTransformer, item_codes: FloatArray, history: HistoryWindow, places: Places
) -> FloatArray:
    """Returns ``float32 (B, d)``, the state after the newest item of each history."""
    reach = transformer.shape.reach
    items, clicks = history.items[:, -reach:], history.clicks[:, -reach:].astype(np.intp)
    codes = item_codes[np.maximum(items, 0)]
    state: FloatArray = transformer.newest_state(codes, clicks, items != PADDING, places)
    return state


class SequentialResponse(BernoulliFeedback, StoredResponse):
    """Click probability ``sigmoid(static(u, i) + <a(history, u), e_i> / sqrt(d) + level(history, u))``.

    ``static`` is a factor model of what is known without the history. A token of the history is the item's encoding
    ``e_i`` plus an embedding of its feedback; a start token stands before them, so that an empty history is a state
    like any other. Each place attends to the start token and to the newest ``H`` places up to itself, with a learned
    bias per distance. The last state and the user's encoding give ``a`` and ``level`` through one hidden layer. The
    model is a deterministic function: no dropout, no noise.

    With ``L`` layers a state depends on the newest ``L (H - 1) + 1`` places. Of a window :meth:`expected` reads so
    many, as if nothing had stood before the window. A :meth:`session_memory` knows the window with which a session
    starts and all that the session adds to it.

    Args:
        static: The factor model.
        shape: Sizes.
        item_codes: ``(N, d)``, ``e_i``.
        user_codes: ``(U, d)``.
        weights: All other weights, see :meth:`TransformerShape.weight_shapes`.
        report: Fit report and provenance, JSON-able.

    Raises:
        DataError: If shapes do not fit or a weight is NaN or infinite.
    """

    kind = "sequential"
    uses_history = True

    def __init__(
        self,
        static: FactorisedResponse,
        shape: TransformerShape,
        item_codes: FloatArray,
        user_codes: FloatArray,
        weights: Weights,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        sizes = shape.weight_shapes() | {
            "item_codes": (static.n_items, shape.dimension),
            "user_codes": (static.n_users, shape.dimension),
        }
        given = {**weights, "item_codes": item_codes, "user_codes": user_codes}
        for name, size in sizes.items():
            if name not in given or given[name].shape != size:
                got = given[name].shape if name in given else "nothing"
                raise DataError(f"weight '{name}' must have shape {size}, got {got}")
            if not np.isfinite(given[name]).all():
                raise DataError(f"weight '{name}' holds NaN or infinity")
        self.static, self.shape = static, shape
        self.n_users, self.n_items = static.n_users, static.n_items
        self._item_codes = np.asarray(item_codes, np.float32)
        self._user_codes = np.asarray(user_codes, np.float32)
        self._weights = {name: np.asarray(weights[name], np.float32) for name in shape.weight_shapes()}
        self._transformer = HistoryTransformer(shape, self._weights, np)
        self._report = dict(report or {})

    @property
    def weights(self) -> Weights:
        """All weights that do not belong to users or items, by name."""
        return dict(self._weights)

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns click probabilities, ``float32 (B, K)``, of users after histories of any length.

        Raises:
            DataError: If ``history`` is missing or has another number of users.
            IndexError: If a row is negative or too large.
        """
        if items.min(initial=0) < 0 or users.min(initial=0) < 0:
            raise IndexError("user and item rows must not be negative; padding has no expected feedback")
        return sigmoid(self.static.logits(users, items) + self.history_logits(users, items, history))

    def history_logits(self, users: IntArray, items: IntArray, history: History | None) -> FloatArray:
        """Returns what the history adds to the static logits, ``float32 (B, K)``."""
        return self.logits_after(self._states_of(users, history), users, items)

    def logits_after(self, states: FloatArray, users: IntArray, items: IntArray) -> FloatArray:
        """Returns the same as :meth:`history_logits`, given the states after the histories, ``(B, d)``."""
        directions, levels = self._transformer.head(states, self._user_codes[users])
        logits: FloatArray = np.matmul(self._item_codes[items], directions[:, :, None])[..., 0] + levels[:, None]
        return logits

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns click probabilities on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        states = self._states_of(users, history)
        directions, levels = self._transformer.head(states, self._user_codes[users])
        static = self.static.logits_catalogue(users, n_items)
        return sigmoid(static + directions @ self._item_codes[:n_items].T + levels[:, None])

    def _states_of(self, users: IntArray, history: History | None) -> FloatArray:
        if history is None:
            raise DataError("a sequential response needs the users' history")
        states = self.states(history)
        if len(states) != len(users):
            raise DataError(f"the history has {len(states)} users, asked for {len(users)}")
        return states

    def states(self, history: History) -> FloatArray:
        """Returns ``float32 (B, d)``, the state after the newest item of each history."""
        if isinstance(history, TransformerMemory):
            return history.states
        if not isinstance(history, HistoryWindow):
            raise DataError("a sequential response reads windows and the memory that it made itself")
        states = np.empty((len(history.items), self.shape.dimension), np.float32)
        for block in _blocks(len(states), _HISTORIES_AT_ONCE):
            states[block] = _newest_state(self._transformer, self._item_codes, history.take(block), OwnPlaces())
        return states

    def states_along(self, history: HistoryWindow, n_places: int) -> FloatArray:
        """Returns ``float32 (B, n + 1, d)``, the states at the start and after each of the first ``n`` places."""
        items, clicks = history.items[:, :n_places], history.clicks[:, :n_places].astype(np.intp)
        states = np.empty((len(items), items.shape[1] + 1, self.shape.dimension), np.float32)
        for block in _blocks(len(items), _HISTORIES_AT_ONCE):
            codes = self._item_codes[np.maximum(items[block], 0)]
            states[block] = self._transformer.states(codes, clicks[block], items[block] != PADDING)
        return states

    def session_memory(self, batch_size: int) -> TransformerMemory:
        """See :func:`kuaifair_env.response.base.session_memory`."""
        return TransformerMemory(self._transformer, self._item_codes, batch_size)

    def rearranged(self, items: IntArray) -> SequentialResponse:
        """Returns the same model for the catalogue ``old_items[items]``; see ``InteractionData.arranged``."""
        return SequentialResponse(
            self.static.rearranged(items),
            self.shape,
            self._item_codes[items],
            self._user_codes,
            self._weights,
            self._report,
        )

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        own: Tensors = {"item_codes": self._item_codes, "user_codes": self._user_codes}
        weights = with_prefix(self._weights, _WEIGHTS)
        return own | weights | with_prefix(self.static.tensors(), _STATIC)

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        shape, static = asdict(self.shape), self.static.settings()
        return {"version": _VERSION, "shape": shape, "static": static, "report": self._report}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> SequentialResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        take_tensors(tensors, {"item_codes": (None, None), "user_codes": (None, None)})
        if settings["version"] != _VERSION:
            raise ValueError("its model of histories has an earlier kind of attention")
        return cls(
            FactorisedResponse.restore(without_prefix(tensors, _STATIC), settings["static"]),
            parse_as(TransformerShape, settings["shape"]),
            tensors["item_codes"],
            tensors["user_codes"],
            without_prefix(tensors, _WEIGHTS),
            parse_as(dict[str, Any], settings["report"]),
        )

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and the fit report, JSON-able."""
        return {
            "kind": self.kind,
            "users": self.n_users,
            "items": self.n_items,
            "shape": asdict(self.shape),
            **self._report,
        }
