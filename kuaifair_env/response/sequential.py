"""A user whose next click depends on the recent history: a small causal transformer, evaluated in numpy.

After the user response model of KuaiSim (Zhao et al., NeurIPS 2023), with one sigmoid instead of two, no dropout
while simulating, and inner products that are sums over dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import load_artifact, save_artifact, take_setting, take_tensors
from kuaifair_env.response.base import PADDING, BernoulliFeedback, HistoryWindow, sigmoid
from kuaifair_env.response.factorised import FactorisedResponse

_KIND = "sequential"
_EPSILON = np.float32(1e-5)
_MASKED = np.float32(-1e9)
_USERS_AT_ONCE = 32  # their attention scores fit a processor's cache
_LARGEST_SCORE = np.float32(80.0)

Weights = Mapping[str, FloatArray]


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
        wanted = shape.weight_shapes()
        wanted |= {
            "item_codes": (static.n_items, shape.dimension),
            "user_codes": (static.n_users, shape.dimension),
        }
        given = {**weights, "item_codes": item_codes, "user_codes": user_codes}
        for name, size in wanted.items():
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
        self._report = dict(report or {})

    @property
    def weights(self) -> Weights:
        """All weights that do not belong to users or items, by name."""
        return dict(self._weights)

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns click probabilities, ``float32 (B, K)``.

        Args:
            users: ``(B,)`` user rows.
            items: ``(B, K)`` item rows.
            history: What each user saw before, ``(B, any length)``.

        Raises:
            DataError: If ``history`` is missing or has another number of users.
            IndexError: If a row is negative or too large.
        """
        if items.min(initial=0) < 0 or users.min(initial=0) < 0:
            raise IndexError("user and item rows must not be negative; padding has no expected feedback")
        return sigmoid(self.static.logits(users, items) + self.history_logits(users, items, history))

    def history_logits(self, users: IntArray, items: IntArray, history: HistoryWindow | None) -> FloatArray:
        """Returns what the history adds to the static logits, ``float32 (B, K)``."""
        directions, levels = self._attention_vectors(users, history)
        logits: FloatArray = np.matmul(self._item_codes[items], directions[:, :, None])[..., 0]
        return logits + levels[:, None]

    def expected_catalogue(
        self, users: IntArray, n_items: int, history: HistoryWindow | None = None
    ) -> FloatArray:
        """Returns click probabilities on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        directions, levels = self._attention_vectors(users, history)
        static = self.static.logits_catalogue(users, n_items)
        return sigmoid(static + directions @ self._item_codes[:n_items].T + levels[:, None])

    def _attention_vectors(
        self, users: IntArray, history: HistoryWindow | None
    ) -> tuple[FloatArray, FloatArray]:
        """Returns ``a / sqrt(d)`` ``(B, d)`` and ``level`` ``(B,)``."""
        if history is None:
            raise DataError("a sequential response needs the users' history")
        if len(history.items) != len(users):
            raise DataError(f"the history has {len(history.items)} users, asked for {len(users)}")
        w, d = self._weights, self.shape.dimension
        state = self.states(history)
        joined = np.concatenate([state, self._user_codes[users]], axis=1)[:, None, :]
        hidden = np.maximum(joined @ w["head_in"] + w["head_in_bias"], np.float32(0.0))
        out = (hidden @ w["head_out"] + w["head_out_bias"])[:, 0]
        return out[:, :d] * np.float32(d**-0.5), out[:, d]

    def states(self, history: HistoryWindow) -> FloatArray:
        """Returns ``float32 (B, d)``, the state after the newest item of each history."""
        length = self.shape.length
        items, clicks = history.items[:, -length:], history.clicks[:, -length:]
        states = np.empty((len(items), self.shape.dimension), np.float32)
        for start in range(0, len(items), _USERS_AT_ONCE):
            block = slice(start, start + _USERS_AT_ONCE)
            states[block] = self._block_states(items[block], clicks[block])
        return states

    def _block_states(self, items: NDArray[np.int32], clicks: BoolArray) -> FloatArray:
        w = self._weights
        absent = items == PADDING
        tokens = self._item_codes[np.maximum(items, 0)] + w["feedback"][clicks.astype(np.intp)]
        # Nobody attends to padding; as copies of the start token they end in its state, which an empty history needs.
        tokens[absent] = w["start"]
        start = np.broadcast_to(w["start"], (len(items), 1, self.shape.dimension))
        x = np.concatenate([start, tokens], axis=1)
        present = np.concatenate([np.ones((len(items), 1), np.bool_), ~absent], axis=1)
        for layer in range(self.shape.layers):
            x = self._block(x, present, layer, last_only=layer == self.shape.layers - 1)
        return _normalised(x[:, -1], w["final_scale"], w["final_shift"])

    def _block(self, x: FloatArray, present: BoolArray, layer: int, last_only: bool) -> FloatArray:
        def of(name: str) -> FloatArray:
            return self._weights[f"{layer}.{name}"]

        normed = _normalised(x, of("attention_scale"), of("attention_shift"))
        asking = normed[:, -1:] if last_only else normed
        scale = np.float32((self.shape.dimension // self.shape.heads) ** -0.5)
        query = self._heads(asking @ (of("query") * scale))
        # Keys with places last and contiguous: the product below is several times faster than on a view.
        key = np.ascontiguousarray(self._heads(normed @ of("key")).swapaxes(-1, -2))
        value = self._heads(normed @ of("value"))
        scores: FloatArray = query @ key
        scores += distance_bias(of("distance"), of("start_bias"), x.shape[1])[:, -asking.shape[1] :]
        attention = _weights_of(scores, present)
        attended: FloatArray = attention @ value
        attended /= attention @ np.ones((attention.shape[-1], 1), np.float32)
        attended = attended.swapaxes(1, 2).reshape(*asking.shape)
        x = (x[:, -1:] if last_only else x) + attended @ of("mix")
        normed = _normalised(x, of("forward_scale"), of("forward_shift"))
        hidden = np.maximum(normed @ of("forward_in") + of("forward_in_bias"), np.float32(0.0))
        forward: FloatArray = x + hidden @ of("forward_out") + of("forward_out_bias")
        return forward

    def _heads(self, x: FloatArray) -> FloatArray:
        batch, places, d = x.shape
        split: FloatArray = x.reshape(batch, places, self.shape.heads, d // self.shape.heads).swapaxes(1, 2)
        return split

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


def distance_bias(distance: FloatArray, start_bias: FloatArray, places: int) -> FloatArray:
    """Returns ``(heads, places, places)``: what is added to the attention of each place to each other one.

    Place 0 is the start token, which has a bias of its own. What later places get does not matter: they are masked.

    Args:
        distance: ``(heads, H)``, bias by how many items lie between the two places plus one; 0 is the place itself.
        start_bias: ``(heads,)``.
        places: History places plus one.
    """
    gap = np.arange(places)[:, None] - np.arange(places)[None, :]
    bias: FloatArray = distance[:, np.clip(gap, 0, distance.shape[1] - 1)]
    bias[:, :, 0] = start_bias[:, None]
    return bias


def _weights_of(scores: FloatArray, present: BoolArray) -> FloatArray:
    """Returns attention weights that are not yet divided by their sums, in place: ``exp`` of scores, 0 where masked.

    Scores are clipped to +-80, which float32 ``exp`` can hold, instead of subtracting each row's largest: the start
    token is always there, so that no sum vanishes.

    Args:
        scores: ``(B, heads, asking places, places)``; the asking places are the last ones.
        present: ``(B, places)``.
    """
    asking, places = scores.shape[-2:]
    later = np.arange(places) > np.arange(places - asking, places)[:, None]
    np.clip(scores, -_LARGEST_SCORE, _LARGEST_SCORE, out=scores)
    scores += np.where(later, _MASKED, np.float32(0.0))
    scores += np.where(present, np.float32(0.0), _MASKED)[:, None, None, :]
    return np.exp(scores, out=scores)


def _normalised(x: FloatArray, scale: FloatArray, shift: FloatArray) -> FloatArray:
    averaging = np.full((x.shape[-1], 1), 1.0 / x.shape[-1], np.float32)
    centred: FloatArray = x - x @ averaging
    spread = np.square(centred) @ averaging
    spread += _EPSILON
    centred /= np.sqrt(spread, out=spread)
    centred *= scale
    centred += shift
    return centred
