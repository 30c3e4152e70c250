"""A small causal transformer over histories, written once over what numpy and torch share.

It is simulated in numpy (:mod:`kuaifair_env.response.sequential`) and fitted in torch
(:mod:`kuaifair_env.response.sequential_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Array: TypeAlias = Any
"""A numpy array or a torch tensor."""

Attendable: TypeAlias = Callable[[int, Array, Array], tuple[Array, Array]]
"""``(layer, keys and values of the tokens that are computed) -> keys and values that they may attend to``."""


def as_is(layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
    """Lets tokens attend to each other alone."""
    return keys, values


_EPSILON = 1e-5
_MASKED = -1e9
# Scores are the sum of both, and float32 exp overflows above 88.
_MAX_PRODUCT, _MAX_BIAS = 60.0, 20.0


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of the history model.

    Attributes:
        dimension: Width ``d`` of tokens and states.
        heads: Attention heads; must divide ``dimension``.
        layers: Transformer blocks.
        hidden: Width of the feed-forward layers.
        length: Places ``H`` that each place attends to: itself and those before it.
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

    @property
    def reach(self) -> int:
        """Newest places of a history that a state depends on: each layer looks ``H - 1`` places further back."""
        return self.layers * (self.length - 1) + 1

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
class HistoryTransformer:
    """The forward pass over a history, for numpy arrays and torch tensors alike.

    A start token stands before the items, so that an empty history has a state too. Each place attends to the start
    token and to the newest ``H`` places up to itself, never to padding, with a learned bias per distance. What a place
    computes thus depends on itself and what came before it alone, and is final: keys and values can be kept.

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

    def states(
        self,
        item_codes: Array,
        clicks: Array,
        present: Array,
        newest_only: bool = False,
        attendable: Attendable = as_is,
    ) -> Array:
        """Returns the state after each place: after the start token, after one item, ..., after all ``n`` items.

        Padding becomes a copy of the start token, whose state an empty history needs.

        Args:
            item_codes: ``float (B, n, d)``, ``e_i`` of the items, anything at padding.
            clicks: ``int (B, n)``, 0 or 1.
            present: ``bool (B, n)``, False at padding, which may stand before or behind the items.
            newest_only: Whether only the last place's state is computed.
            attendable: Sees keys and values of each layer, and may exchange them for others of the same tokens.

        Returns:
            ``float (B, n + 1, d)``, or ``(B, 1, d)`` with ``newest_only``.
        """
        xp = self.xp
        tokens = xp.where(present[:, :, None], self.tokens(item_codes, clicks), self.weights["start"])
        start = xp.broadcast_to(self.weights["start"], (len(tokens), 1, self.shape.dimension))
        with_start = xp.concatenate([xp.ones((len(present), 1), dtype=present.dtype), present], 1)
        place = xp.arange(present.shape[1] + 1)
        biases = [self.biases(layer, place[:, None] - place[None, 1:]) for layer in range(self.shape.layers)]
        return self.encoded(xp.concatenate([start, tokens], 1), with_start, biases, newest_only, attendable)

    def tokens(self, item_codes: Array, clicks: Array) -> Array:
        """Returns the tokens of items that were shown, ``float (B, n, d)``; arguments as in :meth:`states`."""
        return item_codes + self.weights["feedback"][clicks]

    def biases(self, layer: int, distances: Array) -> Array:
        """Returns what is added to the scores of ``n`` tokens with the start token and ``m`` others.

        Args:
            layer: Number of the layer.
            distances: ``int (n, m)``, how many places the other stands before the token; it is not attended to outside
                of ``0 .. H - 1``.

        Returns:
            ``float (heads, n, 1 + m)``.
        """
        xp, length = self.xp, self.shape.length
        by_distance = xp.clip(self.weights[f"{layer}.distance"], -_MAX_BIAS, _MAX_BIAS)
        masked = xp.full((self.shape.heads, 1), _MASKED, dtype=xp.float32)
        by_distance = xp.concatenate([by_distance, masked], 1)
        start = xp.clip(self.weights[f"{layer}.start_bias"], -_MAX_BIAS, _MAX_BIAS)[:, None, None]
        start = xp.broadcast_to(start, (self.shape.heads, len(distances), 1))
        within = (distances >= 0) & (distances < length)
        return xp.concatenate([start, by_distance[:, xp.where(within, distances, length)]], 2)

    def encoded(
        self, tokens: Array, present: Array, biases: list[Array], newest_only: bool, attendable: Attendable
    ) -> Array:
        """Returns the states of tokens, ``float (B, n, d)``, or ``(B, 1, d)`` with ``newest_only``.

        Args:
            tokens: ``float (B, n, d)``.
            present: ``bool (B, n)``, False at padding.
            biases: ``float (heads, n, m)`` of each layer, see :meth:`biases`.
            newest_only: See :meth:`states`.
            attendable: Returns keys ``(B, heads, d / heads, m)`` and values ``(B, heads, m, d / heads + 1)``.
        """
        x = self.dropout(tokens)
        # Values end in 1, and are 0 at padding: their weighted sum holds the sum of the weights, without padding.
        ones = self.xp.asarray(present, dtype=self.xp.float32)[:, None, :, None]
        ones = self.xp.broadcast_to(ones, (len(x), self.shape.heads, x.shape[1], 1))
        for layer in range(self.shape.layers):
            prefix = f"{layer}."
            normed = self._normalised(x, f"{prefix}attention")
            # A contiguous copy: products are faster than with a view.
            keys = self._heads(normed @ self.weights[f"{prefix}key"]).swapaxes(-1, -2)
            keys = keys.reshape(-1).reshape(keys.shape)
            values = self._heads(normed @ self.weights[f"{prefix}value"])
            keys, values = attendable(layer, keys, self.xp.concatenate([values * ones, ones], 3))
            if newest_only and layer == self.shape.layers - 1:
                x, normed = x[:, -1:], normed[:, -1:]
            x = x + self._attended(normed, keys, values, biases[layer][:, -x.shape[1] :], prefix)
            x = x + self._transformed(self._normalised(x, f"{prefix}forward"), prefix)
        return self._normalised(x, "final")

    def head(self, states: Array, user_codes: Array) -> tuple[Array, Array]:
        """Returns what an item's code is multiplied with, ``a / sqrt(d)`` ``(B, d)``, and the level, ``(B,)``."""
        w, d = self.weights, self.shape.dimension
        # One matrix-vector product per row: its result does not depend on the other rows of a batch.
        joined = self.dropout(self.xp.concatenate([states, user_codes], 1))[:, None, :]
        hidden = self._relu(joined @ w["head_in"] + w["head_in_bias"])
        out = (hidden @ w["head_out"] + w["head_out_bias"])[:, 0]
        return out[:, :d] * d**-0.5, out[:, d]

    def _attended(self, normed: Array, keys: Array, values: Array, biases: Array, prefix: str) -> Array:
        scale = (self.shape.dimension // self.shape.heads) ** -0.5
        scores = self._heads(normed @ (self.weights[f"{prefix}query"] * scale)) @ keys
        # Clipping replaces subtracting the largest score: the start token is always there, so no sum vanishes.
        scores = self.xp.clip(scores, -_MAX_PRODUCT, _MAX_PRODUCT)
        scores += biases
        sums = self.xp.exp(scores) @ values
        attended = sums[..., :-1] / sums[..., -1:]
        return attended.swapaxes(1, 2).reshape(normed.shape) @ self.weights[f"{prefix}mix"]

    def _transformed(self, normed: Array, prefix: str) -> Array:
        w = self.weights
        hidden = self._relu(normed @ w[f"{prefix}forward_in"] + w[f"{prefix}forward_in_bias"])
        return self.dropout(hidden) @ w[f"{prefix}forward_out"] + w[f"{prefix}forward_out_bias"]

    def _heads(self, x: Array) -> Array:
        batch, places, d = x.shape
        return x.reshape(batch, places, self.shape.heads, d // self.shape.heads).swapaxes(1, 2)

    def _normalised(self, x: Array, name: str) -> Array:
        """Layer normalisation; means are matrix products, which are faster than sums over a short last axis."""
        averaging = self.xp.full((x.shape[-1], 1), 1.0 / x.shape[-1], dtype=self.xp.float32)
        centred = x - x @ averaging
        spread = self.xp.sqrt(self.xp.square(centred) @ averaging + _EPSILON)
        return centred / spread * self.weights[f"{name}_scale"] + self.weights[f"{name}_shift"]

    def _relu(self, x: Array) -> Array:
        return self.xp.clip(x, 0.0, None)
