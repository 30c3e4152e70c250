"""Agent-side encoders: item tower and user state, pretrained on the training log alone."""

from __future__ import annotations

import copy
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
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import Family, Tensors, load_artifact, save_artifact
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.splits import early_stopping_split
from kuaifair_env.world import World, svd_item_embeddings, windows_before

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


_VALIDATION_BATCHES = 8


def pretrain_encoder(world: World, config: EncoderConfig | None = None, progress: bool = False) -> Encoder:
    """Trains an encoder to rank the user's next click first.

    Training users only; a tenth of them is kept aside for early stopping.

    Args:
        world: The training world.
        config: What to train.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If no user clicks twice.
        ValueError: If the world is not a training world.
    """
    from tqdm import tqdm

    chosen = EncoderConfig() if config is None else config
    if world.split != "train":
        raise ValueError("encoders are pretrained in the training world; the test world stays unseen")
    data = world.data
    start = svd_item_embeddings(data.train, len(data.users), len(data.items), chosen.dimension)
    features = np.concatenate([data.items.features.values, data.items.tags.astype(np.float32)], axis=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(chosen.seed)
        net = EncoderNet(chosen, start, features, world.history_length)
    users, held = early_stopping_split(world.data, world.users)
    fit, check = _NextClicks(world, users, chosen), _NextClicks(world, held, chosen)
    rng = np.random.default_rng(chosen.seed)
    optimiser = torch.optim.Adam(net.parameters(), chosen.learning_rate)
    best, curve, best_check = copy.deepcopy(net.state_dict()), [], 0
    curve.append(_validation(net, check, chosen))
    bar = tqdm(range(1, chosen.steps + 1), desc=f"encoder {chosen.kind}", disable=not progress)
    for step in bar:
        loss = _loss(net, fit.batch(rng), chosen)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if step % chosen.check_every == 0:
            curve.append(_validation(net, check, chosen))
            bar.set_postfix(validation=f"{curve[-1]:.4f}")
            if curve[-1] <= min(curve):
                best, best_check = copy.deepcopy(net.state_dict()), len(curve) - 1
            elif len(curve) - 1 - best_check >= chosen.patience:
                break
    net.load_state_dict(best)
    report = {
        "data": data.provenance.as_dict(),
        "data_hash": data.data_hash,
        "test_log": "unread",
        "training_users": len(users),
        "validation_users": len(held),
        "curve": [round(value, 5) for value in curve],
        "best_check": best_check,
    }
    return Encoder(chosen, net, data.items.ids.copy(), report)


class _NextClicks:
    """Draws windows, the click that follows each, and negatives in proportion to their training clicks."""

    def __init__(self, world: World, users: NDArray[np.int64], config: EncoderConfig) -> None:
        log = world.data.train
        self._log: InteractionLog = log
        self._places = world.history_length
        self._config = config
        starts = log.offsets(len(world.data.users))[:-1]
        rows = np.flatnonzero(log.clicks & np.isin(log.users, users))
        before = np.concatenate([[0], np.cumsum(log.clicks)])
        self._rows = rows[before[rows] > before[starts[log.users[rows]]]]
        if len(self._rows) == 0:
            raise DataError("no user of the training log clicks twice; there is no next click to learn")
        self._lengths = np.minimum(self._rows - starts[log.users[self._rows]], self._places)
        clicks = log.click_counts(len(world.data.items))
        self._share = clicks / clicks.sum()
        self._cumulated = np.cumsum(self._share)

    def batch(self, rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Returns items, clicks, shown, the next clicks, negatives, and the log-shares of both."""
        picked = rng.integers(len(self._rows), size=self._config.batch_size)
        rows = self._rows[picked]
        window = windows_before(self._log, rows, self._lengths[picked], self._places)
        clicked = self._log.items[rows].astype(np.int64)
        drawn = np.searchsorted(self._cumulated, rng.random(self._config.negatives))
        drawn = np.minimum(drawn, len(self._share) - 1)
        log_share = np.log(np.maximum(self._share, 1e-12)).astype(np.float32)
        columns = (
            np.maximum(window.items, 0).astype(np.int64),
            window.clicks.astype(np.float32),
            window.items >= 0,
            clicked,
            drawn,
            log_share[clicked],
            log_share[drawn],
        )
        return tuple(torch.from_numpy(np.ascontiguousarray(column)) for column in columns)


def _loss(net: EncoderNet, batch: tuple[Tensor, ...], config: EncoderConfig) -> Tensor:
    """Sampled softmax over cosines; with ``log_q`` as in Yi et al., "Sampling-bias-corrected neural modeling", 2019."""
    items, clicks, shown, clicked, drawn, clicked_share, drawn_share = batch
    table = net.items()
    states = nn.functional.normalize(net.states(table, items, clicks, shown), dim=1)
    units = nn.functional.normalize(table, dim=1)
    positive = (states * units[clicked]).sum(1) / config.temperature
    negative = states @ units[drawn].T / config.temperature
    if config.log_q:
        positive = positive - clicked_share
        negative = negative - drawn_share
    negative = negative.masked_fill(drawn[None, :] == clicked[:, None], -torch.inf)
    scores = torch.cat([positive[:, None], negative], dim=1)
    return -torch.log_softmax(scores, dim=1)[:, 0].mean()


def _validation(net: EncoderNet, check: _NextClicks, config: EncoderConfig) -> float:
    rng = np.random.default_rng([config.seed, 17])
    with torch.inference_mode():
        losses = [float(_loss(net, check.batch(rng), config)) for _ in range(_VALIDATION_BATCHES)]
    return float(np.mean(losses))
