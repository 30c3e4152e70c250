"""A small causal transformer over histories, written once over what numpy and torch share.

It is simulated in numpy (:mod:`kuaifair_env.response.sequential`) and fitted in torch
(:mod:`kuaifair_env.response.sequential_fit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any
"""A numpy array or a torch tensor."""

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


class Places(Protocol):
    """The places that tokens attend to: takes in those of the tokens, and hands out all.

    ``n`` counts the tokens, ``m`` the places.
    """

    def keys_and_values(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        """Returns keys ``(B, heads, d / heads, m)`` and values ``(B, heads, m, d / heads + 1)``, given ``n`` of them.

        Values end in 1, and are all 0 where there is nothing, such as at padding.
        """
        ...

    def inputs(self, inputs: Array) -> Array:
        """Returns the last layer's inputs, ``(B, m, d + 1)``, given ``n`` of them; they end in 1 or are 0 likewise."""
        ...


class OwnPlaces:
    """Tokens that attend to each other alone."""

    def keys_and_values(self, layer: int, keys: Array, values: Array) -> tuple[Array, Array]:
        """See :class:`Places`."""
        return keys, values

    def inputs(self, inputs: Array) -> Array:
        """See :class:`Places`."""
        return inputs


@dataclass(frozen=True)
class HistoryTransformer:
    """The forward pass over a history, for numpy arrays and torch tensors alike.

    A start token stands before the items, so that an empty history has a state too. Each place attends to the start
    token and to the newest ``H`` places up to itself, never to padding, with a learned bias per distance. What a place
    computes thus depends on itself and on what stands before it alone, and never changes: it can be kept.

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

    def states(self, item_codes: Array, clicks: Array, present: Array) -> Array:
        """Returns the state after each place: after the start token, after one item, ..., after all ``n`` items.

        Args:
            item_codes: ``float (B, n, d)``, ``e_i`` of the items, anything at padding.
            clicks: ``int (B, n)``, 0 or 1.
            present: ``bool (B, n)``, False at padding, which may stand before or behind the items.

        Returns:
            ``float (B, n + 1, d)``.
        """
        x, present = self._history_tokens(item_codes, clicks, present)
        place = self.xp.arange(x.shape[1])
        distances = place[:, None] - place[None, 1:]
        for layer in range(self.shape.layers):
            x = self._after_layer(layer, x, present, distances, OwnPlaces())
        return self._normalised(x, "final")

    def newest_state(self, item_codes: Array, clicks: Array, present: Array, places: Places) -> Array:
        """Returns the state after the newest place of whole histories, ``float (B, d)``.

        Arguments as in :meth:`states`; all places are handed to ``places``, the start token's first.
        """
        x, present = self._history_tokens(item_codes, clicks, present)
        place = self.xp.arange(x.shape[1])
        return self._newest(x, present, place[:, None] - place[None, 1:], places)

    def continued_state(self, item_codes: Array, clicks: Array, distances: Array, places: Places) -> Array:
        """Returns the state after the newest of ``n`` places that follow those kept, ``float (B, d)``.

        Args:
            item_codes: ``float (B, n, d)``.
            clicks: ``int (B, n)``.
            distances: ``int (n, m - 1)``, how many places each of those in ``places``, but for the start token, which
                is the first, stands before the new ones; one outside of ``0 .. H - 1`` is not attended to.
            places: Where they are kept.
        """
        present = self.xp.ones(clicks.shape, dtype=self.xp.float32)
        return self._newest(self._tokens(item_codes, clicks), present, distances, places)

    def head(self, states: Array, user_codes: Array) -> tuple[Array, Array]:
        """Returns what an item's code is multiplied with, ``a / sqrt(d)`` ``(B, d)``, and the level, ``(B,)``."""
        w, d = self.weights, self.shape.dimension
        # One matrix-vector product per row: its result does not depend on the other rows of a batch.
        joined = self.dropout(self.xp.concatenate([states, user_codes], 1))[:, None, :]
        hidden = self._relu(joined @ w["head_in"] + w["head_in_bias"])
        out = (hidden @ w["head_out"] + w["head_out_bias"])[:, 0]
        return out[:, :d] * d**-0.5, out[:, d]

    def _tokens(self, item_codes: Array, clicks: Array) -> Array:
        return item_codes + self.weights["feedback"][clicks]

    def _history_tokens(self, item_codes: Array, clicks: Array, present: Array) -> tuple[Array, Array]:
        """Returns tokens and ``float (B, n + 1)``, where one is present, both with the start token.

        Padding becomes a copy of the start token, whose state an empty history needs.
        """
        xp, start = self.xp, self.weights["start"]
        tokens = xp.where(present[:, :, None], self._tokens(item_codes, clicks), start)
        tokens = xp.concatenate([xp.broadcast_to(start, (len(tokens), 1, self.shape.dimension)), tokens], 1)
        ones = xp.ones((len(present), 1), dtype=xp.float32)
        return self.dropout(tokens), xp.concatenate([ones, xp.asarray(present, dtype=xp.float32)], 1)

    def _newest(self, x: Array, present: Array, distances: Array, places: Places) -> Array:
        last = self.shape.layers - 1
        for layer in range(last):
            x = self._after_layer(layer, x, present, distances, places)
        normed = self._normalised(x, f"{last}.attention")
        inputs = places.inputs(self._marked(normed, present))
        # One place asks: its query goes through the keys' weights instead of all inputs, its attention likewise.
        query = self._heads(normed[:, -1:] @ self._query_weights(last))
        key_weights = self._heads(self.weights[f"{last}.key"][None])[0].swapaxes(-1, -2)
        of_inputs = (query @ key_weights)[:, :, 0]
        scores = of_inputs @ inputs[..., :-1].swapaxes(1, 2)
        sums = self._attention(scores, self._biases(last, distances[-1:])[:, 0]) @ inputs
        mean = (sums[..., :-1] / sums[..., -1:])[:, :, None]
        attended = mean @ self._heads(self.weights[f"{last}.value"][None])[0]
        x = self._after_attention(last, x[:, -1:], attended)
        return self._normalised(x, "final")[:, 0]

    def _after_layer(self, layer: int, x: Array, present: Array, distances: Array, places: Places) -> Array:
        normed = self._normalised(x, f"{layer}.attention")
        # A contiguous copy: products are faster than with a view.
        keys = self._heads(normed @ self.weights[f"{layer}.key"]).swapaxes(-1, -2)
        keys = keys.reshape(-1).reshape(keys.shape)
        values = self._marked(self._heads(normed @ self.weights[f"{layer}.value"]), present[:, None])
        keys, values = places.keys_and_values(layer, keys, values)
        scores = self._heads(normed @ self._query_weights(layer)) @ keys
        sums = self._attention(scores, self._biases(layer, distances)) @ values
        return self._after_attention(layer, x, sums[..., :-1] / sums[..., -1:])

    def _attention(self, scores: Array, biases: Array) -> Array:
        """Returns weights that do not sum to 1 yet.

        Clipping replaces subtracting the largest score: the start token is always there, so no sum vanishes.
        """
        scores = self.xp.clip(scores, -_MAX_PRODUCT, _MAX_PRODUCT)
        scores += biases
        return self.xp.exp(scores)

    def _after_attention(self, layer: int, x: Array, attended: Array) -> Array:
        w = self.weights
        x = x + attended.swapaxes(1, 2).reshape(x.shape) @ w[f"{layer}.mix"]
        normed = self._normalised(x, f"{layer}.forward")
        hidden = self._relu(normed @ w[f"{layer}.forward_in"] + w[f"{layer}.forward_in_bias"])
        return x + self.dropout(hidden) @ w[f"{layer}.forward_out"] + w[f"{layer}.forward_out_bias"]

    def _biases(self, layer: int, distances: Array) -> Array:
        """Returns ``float (heads, n, 1 + m)``, what is added to scores with the start token and at some distances."""
        xp, length = self.xp, self.shape.length
        by_distance = xp.clip(self.weights[f"{layer}.distance"], -_MAX_BIAS, _MAX_BIAS)
        masked = xp.full((self.shape.heads, 1), _MASKED, dtype=xp.float32)
        by_distance = xp.concatenate([by_distance, masked], 1)
        start = xp.clip(self.weights[f"{layer}.start_bias"], -_MAX_BIAS, _MAX_BIAS)[:, None, None]
        start = xp.broadcast_to(start, (self.shape.heads, len(distances), 1))
        within = (distances >= 0) & (distances < length)
        return xp.concatenate([start, by_distance[:, xp.where(within, distances, length)]], 2)

    def _query_weights(self, layer: int) -> Array:
        return self.weights[f"{layer}.query"] * (self.shape.dimension // self.shape.heads) ** -0.5

    def _marked(self, x: Array, present: Array) -> Array:
        """Returns ``x`` with a last column of 1 where present, and 0 elsewhere: weighted sums hold sums of weights."""
        ones = self.xp.broadcast_to(present[..., None], (*x.shape[:-1], 1))
        return self.xp.concatenate([x * ones, ones], x.ndim - 1)

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
