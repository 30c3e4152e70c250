"""Agent-side encoders: item tower and user state, pretrained on the training log alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.click_model import window_tensors
from dsrm.purifier import MismatchError
from kuaifair_env.artifacts import Family, Tensors, load_artifact, save_artifact
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import ArtifactError
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.worlds import World

EncoderKind = Literal["mean", "transformer"]
ENCODERS = Family("kuaifair-encoder", 1, "state encoder")

_LAYERS, _HEADS, _FEED_FORWARD = 3, 4, 64
_BOUND = 8.0


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is and how it is trained.

    Attributes:
        kind: ``"mean"`` (the state is the mean of the clicked items' embeddings) or ``"transformer"`` (that mean plus
            what three causal layers read off order and feedback).
        dimension: Size ``d`` of states and item embeddings.
        log_q: Whether sampled negatives are corrected for how often they are sampled; the correction keeps popularity
            in the inner product, its absence pushes popular items down.
        temperature: Of the softmax over cosines.
        negatives: Sampled items, in proportion to their training clicks, shared by a batch.
        steps: Most optimiser steps.
        batch_size: Windows of a step.
        learning_rate: Of Adam.
        check_every: Steps between validations.
        patience: Validations without a gain after which training stops.
        seed: Seed of weights and batches.
    """

    kind: EncoderKind = "mean"
    dimension: int = 64
    log_q: bool = True
    temperature: float = 0.1
    negatives: int = 512
    steps: int = 3_000
    batch_size: int = 512
    learning_rate: float = 1e-3
    check_every: int = 250
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(EncoderKind):
            raise ValueError(f"an encoder is one of {get_args(EncoderKind)}, got {self.kind!r}")
        if min(self.dimension, self.negatives, self.steps, self.batch_size, self.check_every) < 1:
            raise ValueError("dimension, negatives, steps, batch_size and check_every must be at least 1")
        if self.dimension % _HEADS and self.kind == "transformer":
            raise ValueError(f"a transformer's dimension is a multiple of {_HEADS}, got {self.dimension}")


class EncoderNet(nn.Module):
    """Item tower (an embedding of the id plus a linear map of the item's features) and user tower.

    Args:
        config: Kind and sizes.
        start: ``float32 (M, d)``, where the embeddings of ids start (the SVD's).
        features: ``float32 (M, F)``, item features; fixed.
        places: Places ``H`` of a window.
    """

    features: Tensor

    def __init__(self, config: EncoderConfig, start: FloatArray, features: FloatArray, places: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("features", torch.from_numpy(features))
        self.ids = nn.Embedding(start.shape[0], start.shape[1], _weight=torch.from_numpy(start.copy()))
        self.described = nn.Linear(features.shape[1], config.dimension, bias=False)
        nn.init.zeros_(self.described.weight)
        if config.kind == "transformer":
            self.position = nn.Parameter(torch.zeros(places, config.dimension))
            self.feedback = nn.Embedding(2, config.dimension)
            layer = nn.TransformerEncoderLayer(
                config.dimension, _HEADS, _FEED_FORWARD, dropout=0.0, batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
            last = nn.Linear(config.dimension, config.dimension)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.leave = nn.Sequential(nn.LayerNorm(config.dimension), last)

    def items(self) -> Tensor:
        """Returns the embeddings ``e_i`` of all items, ``(M, d)``, of norm ``sqrt(d)``."""
        vectors = self.ids.weight + self.described(self.features)
        table: Tensor = nn.functional.normalize(vectors, dim=1) * math.sqrt(self.config.dimension)
        return table

    def states(self, table: Tensor, items: Tensor, clicks: Tensor, shown: Tensor) -> Tensor:
        """Returns the observed states ``s~``, ``(B, d)``.

        Args:
            table: ``(M, d)``, from :meth:`items`.
            items: ``int64 (B, H)``, padding as item 0.
            clicks: ``float32 (B, H)``.
            shown: ``bool (B, H)``, False at padding.
        """
        vectors = table[items]
        counted = clicks / clicks.sum(1, keepdim=True).clamp_min(1.0)
        pooled = torch.einsum("bh,bhd->bd", counted, vectors)
        if self.config.kind == "mean":
            return pooled
        tokens = (vectors + self.position + self.feedback(clicks.to(torch.int64))) * shown[..., None]
        length = items.shape[1]
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        read = self.layers(tokens, mask=causal)[:, -1]
        # A window without anything in it has the zero state, as everywhere.
        states: Tensor = pooled + self.leave(read) * shown.any(1, keepdim=True)
        return states


class Encoder:
    """A trained encoder: item embeddings, and states from windows.

    Args:
        config: What it is.
        net: The trained net.
        item_ids: ``int64 (M,)``, raw ids in the order of the net's rows.
        report: Training curve and provenance, JSON-able.
    """

    def __init__(
        self, config: EncoderConfig, net: EncoderNet, item_ids: NDArray[np.int64], report: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.report = dict(report)
        self._net = net.eval().requires_grad_(False)
        self._ids = item_ids
        with torch.inference_mode():
            self._table = net.items()

    @property
    def embeddings(self) -> FloatArray:
        """``float32 (M, d)``, item embeddings ``e_i`` in the order of ``item_ids``."""
        table: FloatArray = self._table.numpy()
        return table

    def encoded(self, world: World) -> World:
        """Returns a world whose item embeddings and observed states are this encoder's.

        Raises:
            MismatchError: If the encoder was trained on other data, or another catalogue.
        """
        made = self.report["data_hash"]
        if made != world.data.data_hash:
            raise MismatchError(f"the encoder was trained on data {made}, this is {world.data.data_hash}")
        if not np.array_equal(self._ids, world.data.items.ids):
            raise MismatchError("the encoder knows other items, or the same in another order")
        if world.item_term is not None:
            raise MismatchError("give the world its encoder first, then its item term")
        return replace(
            world, embeddings=self.embeddings, encoder=None if self.config.kind == "mean" else self
        )

    @property
    def bound(self) -> float:
        """Largest absolute value of a state's component; states are clipped there."""
        return _BOUND * math.sqrt(self.config.dimension)

    @torch.inference_mode()
    def encode(self, window: HistoryWindow) -> FloatArray:
        """Returns the observed states ``s~`` of windows, ``float32 (B, d)``."""
        shown = torch.from_numpy(window.items >= 0)
        states: FloatArray = self._net.states(self._table, *window_tensors(window), shown).numpy()
        return np.clip(states, -self.bound, self.bound)

    def save(self, path: str | Path) -> None:
        """Writes the encoder to one safetensors file, atomically."""
        tensors: Tensors = {f"net.{name}": value.numpy() for name, value in self._net.state_dict().items()}
        tensors["item_ids"] = self._ids
        settings = {"config": asdict(self.config), "report": self.report}
        save_artifact(path, self.config.kind, tensors, settings, ENCODERS)

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        """Reads an encoder; nothing in the file is executed.

        Raises:
            ArtifactError: If the file is missing, damaged or foreign.
        """
        _, tensors, settings = load_artifact(path, family=ENCODERS)
        try:
            config = EncoderConfig(**settings["config"])
            weights = {
                name.removeprefix("net."): torch.from_numpy(value)
                for name, value in tensors.items()
                if name.startswith("net.")
            }
            places = len(weights["position"]) if "position" in weights else 1
            net = EncoderNet(config, tensors["net.ids.weight"], tensors["net.features"], places)
            net.load_state_dict(weights)
            return cls(config, net, tensors["item_ids"], settings["report"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} is not a whole encoder ({error})") from error
