"""A response that depends on the recent history: a small causal transformer on top of a factor model.

After the user response model of KuaiSim (Zhao et al., NeurIPS 2023), with one sigmoid instead of two, no dropout
while simulating, and inner products that are sums over dimensions. The forward pass is written once, over what numpy
and torch share: it is simulated in numpy and fitted in torch (:mod:`kuaifair_env.response.sequential_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import load_artifact, save_artifact, take_setting, take_tensors
from kuaifair_env.response.base import PADDING, BernoulliFeedback, HistoryWindow, sigmoid
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.rows import HistorySource

_KIND = "sequential"
_EPSILON = 1e-5
_MASKED = -1e9
_MAX_SCORE = 80.0  # float32 exp overflows above 88
_USERS_AT_ONCE = 32  # their attention scores fit a processor's cache

Weights = Mapping[str, FloatArray]
Array: TypeAlias = Any
"""A numpy array or a torch tensor."""


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of the history model.

    Attributes:
        dimension: Width ``d`` of tokens and states.
        heads: Attention heads; must divide ``dimension``.
        layers: Transformer blocks.
        hidden: Width of the feed-forward layers.
        length: Places ``H`` in the history that the model reads; of longer windows it reads the newest.
    """

    dimension: int = 32
    heads: int = 4
    layers: int = 2
    hidden: int = 64
    length: int = 50

    def __post_init__(self) -> None:
        if min(self.dimension, self.heads, self.layers, self.hidden, self.length) < 1:
            raise ValueError(f"sizes of a history model must be at least 1, got {self}")
        if self.dimension % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the dimension {self.dimension}")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of all weights that do not belong to users or items."""
        d, h = self.dimension, self.hidden
        shapes: dict[str, tuple[int, ...]] = {
            "start": (d,),
            "feedback": (2, d),
            "final_scale": (d,),
            "final_shift": (d,),
            "head_in": (2 * d, h),
            "head_in_bias": (h,),
            "head_out": (h, d + 1),
            "head_out_bias": (d + 1,),
        }
        for layer in range(self.layers):
            shapes |= {
                f"{layer}.attention_scale": (d,),
                f"{layer}.attention_shift": (d,),
                f"{layer}.query": (d, d),
                f"{layer}.key": (d, d),
                f"{layer}.value": (d, d),
                f"{layer}.mix": (d, d),
                f"{layer}.distance": (self.heads, self.length),
                f"{layer}.start_bias": (self.heads,),
                f"{layer}.forward_scale": (d,),
                f"{layer}.forward_shift": (d,),
                f"{layer}.forward_in": (d, h),
                f"{layer}.forward_in_bias": (h,),
                f"{layer}.forward_out": (h, d),
                f"{layer}.forward_out_bias": (d,),
            }
        return shapes


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


@dataclass(frozen=True)
class HistoryTransformer:
    """The forward pass over the history, for numpy arrays and torch tensors alike.

    Attributes:
        shape: Sizes.
        weights: Name -> array, see :meth:`TransformerShape.weight_shapes`.
        xp: The array library: ``numpy`` or ``torch``.
        dropout: Applied to tokens, hidden units and the head's inputs; the identity while simulating.
    """

    shape: TransformerShape
    weights: Mapping[str, Array]
    xp: Any
    dropout: Callable[[Array], Array] = lambda x: x

    def states(self, item_codes: Array, clicks: Array, present: Array, newest_only: bool = False) -> Array:
        """Returns the state after each place: after the start token, after one item, ..., after ``H`` items.

        A start token stands before the items, so that an empty history has a state too. No place attends to later
        ones or to padding; padding itself becomes a copy of the start token, whose state an empty history needs.

        Args:
            item_codes: ``float (B, H, d)``, ``e_i`` of the items, anything at padding.
            clicks: ``int (B, H)``, 0 or 1.
            present: ``bool (B, H)``, False at padding, which may stand before or behind the items.
            newest_only: Whether only the last place's state is computed.

        Returns:
            ``float (B, H + 1, d)``, or ``(B, 1, d)`` with ``newest_only``.
        """
        xp, w = self.xp, self.weights
        tokens = xp.where(present[:, :, None], item_codes + w["feedback"][clicks], w["start"])
        start = xp.broadcast_to(w["start"], (len(tokens), 1, self.shape.dimension))
        x = self.dropout(xp.concatenate([start, tokens], 1))
        mask = self._mask(present)
        for layer in range(self.shape.layers):
            x = self._block(x, mask, layer, newest_only and layer == self.shape.layers - 1)
        return self._normalised(x[:, -1:] if newest_only else x, "final")

    def head(self, states: Array, user_codes: Array) -> tuple[Array, Array]:
        """Returns what an item's code is multiplied with, ``a / sqrt(d)`` ``(B, d)``, and the level, ``(B,)``."""
        w, d = self.weights, self.shape.dimension
        # One matrix-vector product per row: its result does not depend on the other rows of a batch.
        joined = self.dropout(self.xp.concatenate([states, user_codes], 1))[:, None, :]
        hidden = self._relu(joined @ w["head_in"] + w["head_in_bias"])
        out = (hidden @ w["head_out"] + w["head_out_bias"])[:, 0]
        return out[:, :d] * d**-0.5, out[:, d]

    def _block(self, x: Array, mask: Array, layer: int, newest_only: bool) -> Array:
        w, prefix, d = self.weights, f"{layer}.", self.shape.dimension
        normed = self._normalised(x, f"{prefix}attention")
        asking = normed[:, -1:] if newest_only else normed
        query = self._heads(asking @ (w[f"{prefix}query"] * (d // self.shape.heads) ** -0.5))
        key = self._heads(normed @ w[f"{prefix}key"]).swapaxes(-1, -2)
        # A contiguous copy: the product below is several times faster than on a view.
        key = key.reshape(-1).reshape(key.shape)
        value = self._heads(normed @ w[f"{prefix}value"])
        n_asking, places = asking.shape[1], x.shape[1]
        scores = query @ key
        scores += self._distance_bias(prefix, places)[:, -n_asking:]
        # Clipping replaces subtracting the largest score: the start token is always there, so no sum vanishes.
        scores = self.xp.clip(scores, -_MAX_SCORE, _MAX_SCORE)
        scores += mask[:, :, -n_asking:]
        attention = self.xp.exp(scores)
        attended = (attention @ value) / (attention @ self.xp.ones((places, 1), dtype=self.xp.float32))
        attended = attended.swapaxes(1, 2).reshape(asking.shape)
        x = (x[:, -1:] if newest_only else x) + attended @ w[f"{prefix}mix"]
        normed = self._normalised(x, f"{prefix}forward")
        hidden = self._relu(normed @ w[f"{prefix}forward_in"] + w[f"{prefix}forward_in_bias"])
        return x + self.dropout(hidden) @ w[f"{prefix}forward_out"] + w[f"{prefix}forward_out_bias"]

    def _heads(self, x: Array) -> Array:
        batch, places, d = x.shape
        return x.reshape(batch, places, self.shape.heads, d // self.shape.heads).swapaxes(1, 2)

    def _mask(self, present: Array) -> Array:
        """Returns ``(B, 1, places, places)``: 0 where a place attends to another, a large negative number elsewhere."""
        xp = self.xp
        place = xp.arange(present.shape[1] + 1)
        later = xp.asarray(place[None, :] > place[:, None], dtype=xp.float32)
        absent = xp.asarray(~present, dtype=xp.float32)
        absent = xp.concatenate([xp.zeros((len(present), 1), dtype=xp.float32), absent], 1)
        return (later + absent[:, None, None, :]) * _MASKED

    def _distance_bias(self, prefix: str, places: int) -> Array:
        """Returns ``(heads, places, places)``: a bias by how many places lie between two; the start token has its own.

        What later places get does not matter: they are masked.
        """
        xp, distance = self.xp, self.weights[f"{prefix}distance"]
        place = xp.arange(places)
        gap = xp.clip(place[:, None] - place[None, 1:], 0, self.shape.length - 1)
        start = xp.broadcast_to(self.weights[f"{prefix}start_bias"][:, None, None], (self.shape.heads, places, 1))
        return xp.concatenate([start, distance[:, gap]], 2)

    def _normalised(self, x: Array, name: str) -> Array:
        """Layer normalisation; means are matrix products, which are faster than sums over a short last axis."""
        averaging = self.xp.full((x.shape[-1], 1), 1.0 / x.shape[-1], dtype=self.xp.float32)
        centred = x - x @ averaging
        spread = self.xp.sqrt(self.xp.square(centred) @ averaging + _EPSILON)
        return centred / spread * self.weights[f"{name}_scale"] + self.weights[f"{name}_shift"]

    def _relu(self, x: Array) -> Array:
        return self.xp.clip(x, 0.0, None)


class SequentialResponse(BernoulliFeedback):
    """Click probability ``sigmoid(static(u, i) + <a(history, u), e_i> / sqrt(d) + level(history, u))``.

    ``static`` is a factor model of what is known without the history. A token of the history is the item's encoding
    ``e_i`` plus an embedding of its feedback; a start token stands before them, so that an empty history is a state
    like any other. Attention is causal with a learned bias per distance. The last state and the user's encoding give
    ``a`` and ``level`` through one hidden layer. The model is a deterministic function: no dropout, no noise.

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

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns click probabilities, ``float32 (B, K)``, of users after histories of any length.

        Raises:
            DataError: If ``history`` is missing or has another number of users.
            IndexError: If a row is negative or too large.
        """
        if items.min(initial=0) < 0 or users.min(initial=0) < 0:
            raise IndexError("user and item rows must not be negative; padding has no expected feedback")
        return sigmoid(self.static.logits(users, items) + self.history_logits(users, items, history))

    def history_logits(self, users: IntArray, items: IntArray, history: HistoryWindow | None) -> FloatArray:
        """Returns what the history adds to the static logits, ``float32 (B, K)``."""
        directions, levels = self._head(users, history)
        logits: FloatArray = np.matmul(self._item_codes[items], directions[:, :, None])[..., 0]
        return logits + levels[:, None]

    def expected_catalogue(self, users: IntArray, n_items: int, history: HistoryWindow | None = None) -> FloatArray:
        """Returns click probabilities on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        directions, levels = self._head(users, history)
        static = self.static.logits_catalogue(users, n_items)
        return sigmoid(static + directions @ self._item_codes[:n_items].T + levels[:, None])

    def _head(self, users: IntArray, history: HistoryWindow | None) -> tuple[FloatArray, FloatArray]:
        """Returns ``a / sqrt(d)`` ``(B, d)`` and ``level`` ``(B,)``."""
        if history is None:
            raise DataError("a sequential response needs the users' history")
        if len(history.items) != len(users):
            raise DataError(f"the history has {len(history.items)} users, asked for {len(users)}")
        directions, levels = self._transformer.head(self.states(history), self._user_codes[users])
        return directions, levels

    def states(self, history: HistoryWindow) -> FloatArray:
        """Returns ``float32 (B, d)``, the state after the newest item of each history."""
        length = self.shape.length
        items, clicks = history.items[:, -length:], history.clicks[:, -length:].astype(np.intp)
        states = np.empty((len(items), self.shape.dimension), np.float32)
        for start in range(0, len(items), _USERS_AT_ONCE):
            block = slice(start, start + _USERS_AT_ONCE)
            codes = self._item_codes[np.maximum(items[block], 0)]
            present = items[block] != PADDING
            states[block] = self._transformer.states(codes, clicks[block], present, newest_only=True)[:, 0]
        return states

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

    def save(self, path: str | Path) -> None:
        """Writes the model to one safetensors file, atomically."""
        static, static_settings = self.static.parts()
        tensors = {"item_codes": self._item_codes, "user_codes": self._user_codes}
        tensors |= {f"weights.{name}": weight for name, weight in self._weights.items()}
        tensors |= {f"static.{name}": tensor for name, tensor in static.items()}
        settings = {"shape": asdict(self.shape), "static": static_settings, "report": self._report}
        save_artifact(path, _KIND, tensors, settings)

    @classmethod
    def load(cls, path: str | Path) -> SequentialResponse:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: If the file is corrupt, foreign, of another version or another kind.
        """
        _, tensors, settings = load_artifact(path, _KIND)
        take_tensors(path, tensors, {"item_codes": (None, None), "user_codes": (None, None)})
        static = {name[7:]: tensor for name, tensor in tensors.items() if name.startswith("static.")}
        weights = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("weights.")}
        try:
            return cls(
                FactorisedResponse.from_parts(path, static, take_setting(path, settings, "static")),
                TransformerShape(**take_setting(path, settings, "shape")),
                tensors["item_codes"],
                tensors["user_codes"],
                weights,
                take_setting(path, settings, "report"),
            )
        except ArtifactError:
            raise
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: {error}") from error

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and the fit report, JSON-able."""
        return {
            "kind": _KIND,
            "users": self.n_users,
            "items": self.n_items,
            "shape": asdict(self.shape),
            **self._report,
        }
