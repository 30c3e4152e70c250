"""Agent-side encoders: item embeddings and observed states, pretrained on the training log alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.training import show_round
from kuaifair_env.checks import need_number, need_seed, need_whole
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.embeddings import item_embeddings, separated
from kuaifair_env.errors import DataError, MismatchError
from kuaifair_env.files import Family, open_artifact, parse_as, save_artifact, take_tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.training import Trainer, load_network, network_tensors
from kuaifair_env.splits import early_stopping_split
from kuaifair_env.world import World, windows_before

EncoderKind = Literal["mean", "transformer"]
ENCODERS = Family("kuaifair-encoder", 3, "state encoder", "train it again (kuaifair encode)")

_LAYERS, _HEADS, _FEED_FORWARD = 3, 4, 64
_MAX_STATE = 8.0
_VALIDATION_STREAM, _VALIDATION_BATCHES = 17, 8


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is and how it is trained.

    Attributes:
        kind: ``"mean"`` (the state is the mean of the clicked items' embeddings) or ``"transformer"`` (that mean plus
            what three causal layers make of order and feedback).
        dimension: Size ``d`` of states and item embeddings.
        log_q: Whether sampled negatives are corrected for how often they are sampled. The correction keeps popularity
            in the inner product; without it popular items are pushed down.
        temperature: Of the softmax over cosines.
        negatives: Sampled items, in proportion to their training clicks, shared by a batch.
        steps: Most optimizer steps.
        batch_size: Windows of a step.
        learning_rate: Of Adam.
        check_every: Steps between validations.
        patience: Validations without a better loss after which training stops.
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
        need_whole(1, dimension=self.dimension, negatives=self.negatives, steps=self.steps, batch_size=self.batch_size)
        need_whole(1, check_every=self.check_every, patience=self.patience)
        need_seed(self.seed)
        need_number("(0, inf)", temperature=self.temperature, learning_rate=self.learning_rate)
        if self.dimension % _HEADS and self.kind == "transformer":
            raise ValueError(f"a transformer's dimension is a multiple of {_HEADS}, got {self.dimension}")


class EncoderNetwork(nn.Module):
    """Item tower (an embedding of the id plus a linear map of the item's features) and user tower.

    Args:
        config: Kind and sizes.
        start: ``float32 (M, d)``, initial embeddings of the ids (a world's own).
        features: ``float32 (M, F)``, item features; fixed.
        history_length: Width ``H`` of a window.
    """

    features: Tensor

    def __init__(self, config: EncoderConfig, start: FloatArray, features: FloatArray, history_length: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("features", torch.from_numpy(features))
        self.ids = nn.Embedding(start.shape[0], start.shape[1], _weight=torch.from_numpy(start.copy()))
        self.feature_map = nn.Linear(features.shape[1], config.dimension, bias=False)
        nn.init.zeros_(self.feature_map.weight)
        if config.kind == "transformer":
            self.position = nn.Parameter(torch.zeros(history_length, config.dimension))
            self.feedback = nn.Embedding(2, config.dimension)
            layer = nn.TransformerEncoderLayer(
                config.dimension, _HEADS, _FEED_FORWARD, dropout=0.0, batch_first=True, norm_first=True
            )
            self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
            output = nn.Linear(config.dimension, config.dimension)
            nn.init.zeros_(output.weight)
            nn.init.zeros_(output.bias)
            self.output = nn.Sequential(nn.LayerNorm(config.dimension), output)

    def items(self) -> Tensor:
        """Returns the embeddings ``e_i`` of all items, ``(M, d)``, of norm ``sqrt(d)``."""
        vectors = self.ids.weight + self.feature_map(self.features)
        return nn.functional.normalize(vectors, dim=1) * math.sqrt(self.config.dimension)

    def states(self, table: Tensor, items: Tensor, clicks: Tensor, shown: Tensor) -> Tensor:
        """Returns the observed states ``s~``, ``(B, d)``, of windows as :func:`window_tensors` gives them.

        ``table`` is what :meth:`items` returns.
        """
        vectors = table[items]
        shares = clicks / clicks.sum(1, keepdim=True).clamp_min(1.0)
        pooled = torch.einsum("bh,bhd->bd", shares, vectors)
        if self.config.kind == "mean":
            return pooled
        tokens = (vectors + self.position + self.feedback(clicks.to(torch.int64))) * shown[..., None]
        length = items.shape[1]
        causal = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        last = self.layers(tokens, mask=causal)[:, -1]
        # An empty window has the zero state, as everywhere.
        states: Tensor = pooled + self.output(last) * shown.any(1, keepdim=True)
        return states


class Encoder:
    """A trained encoder: item embeddings, and states from windows.

    Args:
        config: What it is.
        network: The trained network.
        item_ids: ``int64 (M,)``, the items' keys (raw ids, or hashes of text) in the order of the network's rows.
        report: Validation losses and provenance, JSON-able.
    """

    def __init__(
        self, config: EncoderConfig, network: EncoderNetwork, item_ids: NDArray[np.int64], report: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.report = dict(report)
        self._network = network.eval().requires_grad_(False)
        self._item_ids = item_ids
        with torch.inference_mode():
            self._table = torch.from_numpy(separated(network.items().numpy(), item_ids))

    @property
    def embeddings(self) -> FloatArray:
        """``float32 (M, d)``, item embeddings ``e_i`` in the order of ``item_ids``; see :func:`separated`."""
        return self._table.numpy()

    def encoded(self, world: World) -> World:
        """Returns a world whose item embeddings and observed states are this encoder's.

        Raises:
            MismatchError: If the encoder was trained on other data, or another catalogue.
        """
        data_hash = self.report["data_hash"]
        if data_hash != world.data.data_hash:
            raise MismatchError(f"the encoder was trained on data {data_hash}, this is {world.data.data_hash}")
        if not np.array_equal(self._item_ids, world.data.items.keys):
            raise MismatchError("the encoder knows other items, or the same in another order")
        if world.item_term is not None:
            raise MismatchError("give the world its encoder first, then its item term")
        return replace(world, embeddings=self.embeddings, encoder=None if self.config.kind == "mean" else self)

    @property
    def bound(self) -> float:
        """Largest absolute value of a state's component; states are clipped there."""
        return _MAX_STATE * math.sqrt(self.config.dimension)

    @torch.inference_mode()
    def encode(self, window: HistoryWindow) -> FloatArray:
        """Returns the observed states ``s~`` of windows, ``float32 (B, d)``."""
        states: FloatArray = self._network.states(self._table, *window_tensors(window)).numpy()
        return np.clip(states, -self.bound, self.bound)

    def save(self, path: str | Path) -> None:
        """Writes the encoder to one safetensors file, atomically."""
        tensors = network_tensors(self._network) | {"item_ids": self._item_ids}
        settings = {"config": asdict(self.config), "report": self.report}
        save_artifact(path, self.config.kind, tensors, settings, ENCODERS)

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        """Reads an encoder; nothing in the file is executed.

        Raises:
            ArtifactError: If the file is missing, damaged or foreign.
        """
        with open_artifact(path, family=ENCODERS) as (_, tensors, settings):
            config, report = parse_as(EncoderConfig, settings["config"]), parse_as(dict[str, Any], settings["report"])
            parse_as(str, report["data_hash"])
            history_length = len(tensors["network.position"]) if config.kind == "transformer" else 0
            start, features = tensors["network.ids.weight"], tensors["network.features"]
            take_tensors(tensors, {"item_ids": (len(start),)})
            network = EncoderNetwork(config, start, features, history_length)
            load_network(network, tensors)
            return cls(config, network, tensors["item_ids"], report)


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

    config = EncoderConfig() if config is None else config
    if world.split != "train":
        raise ValueError("encoders are pretrained in the training world; the test world stays unseen")
    users, validation_users = early_stopping_split(world.data, world.users)
    training = _NextClicks(world, users, config)
    validation = _NextClicks(world, validation_users, config)
    network = _untrained_network(world, config)
    trainer = Trainer(network, torch.optim.Adam(network.parameters(), config.learning_rate), max_grad_norm=1.0)
    rng = np.random.default_rng(config.seed)

    def batches(round_number: int) -> Iterator[_NextClickBatch]:
        steps = min(config.check_every, config.steps - round_number * config.check_every)
        return (training.draw(rng) for _ in range(steps))

    def validation_loss(network: EncoderNetwork) -> float:
        rng = np.random.default_rng([config.seed, _VALIDATION_STREAM])
        losses = [float(_next_click_loss(network, validation.draw(rng))) for _ in range(_VALIDATION_BATCHES)]
        return float(np.mean(losses))

    # The untrained network, which is the world's own embeddings, competes as well.
    trainer.validate(validation_loss)
    rounds = math.ceil(config.steps / config.check_every)
    with tqdm(total=rounds, desc=f"encoder {config.kind}", disable=not progress) as bar:
        best = trainer.fit(
            batches,
            _next_click_loss,
            validation_loss,
            rounds=rounds,
            patience=config.patience,
            callback=lambda trainer: show_round(bar, trainer),
        )
    report = {
        "data": world.data.provenance.as_dict(),
        "data_hash": world.data.data_hash,
        "test_log": "unread",
        "training_users": len(users),
        "validation_users": len(validation_users),
        **trainer.report(),
    }
    return Encoder(config, best, world.data.items.keys.copy(), report)


def _untrained_network(world: World, config: EncoderConfig) -> EncoderNetwork:
    data = world.data
    start = item_embeddings(data.train, len(data.users), data.items, config.dimension)
    features = np.concatenate([data.items.features.values, data.items.tags.astype(np.float32)], axis=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return EncoderNetwork(config, start, features, world.history_length)


class _NextClickBatch(NamedTuple):
    """``B`` windows (see :meth:`EncoderNetwork.states`), the items clicked next, and ``n`` sampled negatives.

    Of both sorts of items the log of their shares of the training clicks is given.
    """

    window: tuple[Tensor, Tensor, Tensor]
    positive: Tensor
    negative: Tensor
    positive_log_share: Tensor
    negative_log_share: Tensor


class _NextClicks:
    """Draws windows, the click that follows each, and negatives in proportion to their training clicks."""

    def __init__(self, world: World, users: NDArray[np.int64], config: EncoderConfig) -> None:
        log = world.data.train
        self._log: InteractionLog = log
        self._history_length = world.history_length
        self._config = config
        starts = log.offsets(len(world.data.users))[:-1]
        rows = np.flatnonzero(log.clicks & np.isin(log.users, users))
        clicks_before = np.concatenate([[0], np.cumsum(log.clicks)])
        self._rows = rows[clicks_before[rows] > clicks_before[starts[log.users[rows]]]]
        if len(self._rows) == 0:
            raise DataError("no user of the training log clicks twice; there is no next click to learn")
        self._lengths = np.minimum(self._rows - starts[log.users[self._rows]], self._history_length)
        clicks = log.click_counts(len(world.data.items))
        share = clicks / clicks.sum()
        self._share = share
        self._log_share = torch.from_numpy(np.log(np.maximum(share, 1e-12)).astype(np.float32))

    def draw(self, rng: np.random.Generator) -> _NextClickBatch:
        chosen = rng.integers(len(self._rows), size=self._config.batch_size)
        rows = self._rows[chosen]
        window = windows_before(self._log, rows, self._lengths[chosen], self._history_length)
        positive = torch.from_numpy(self._log.items[rows].astype(np.int64))
        negative = torch.from_numpy(rng.choice(len(self._share), self._config.negatives, p=self._share))
        return _NextClickBatch(
            window_tensors(window), positive, negative, self._log_share[positive], self._log_share[negative]
        )


def _next_click_loss(network: EncoderNetwork, batch: _NextClickBatch) -> Tensor:
    """Sampled softmax over cosines; with ``log_q`` as in Yi et al., "Sampling-bias-corrected neural modeling", 2019."""
    table, config = network.items(), network.config
    states = nn.functional.normalize(network.states(table, *batch.window), dim=1)
    units = nn.functional.normalize(table, dim=1)
    positive = (states * units[batch.positive]).sum(1) / config.temperature
    negative = states @ units[batch.negative].T / config.temperature
    if config.log_q:
        positive = positive - batch.positive_log_share
        negative = negative - batch.negative_log_share
    negative = negative.masked_fill(batch.negative[None, :] == batch.positive[:, None], -torch.inf)
    scores = torch.cat([positive[:, None], negative], dim=1)
    return -torch.log_softmax(scores, dim=1)[:, 0].mean()


def window_tensors(window: HistoryWindow) -> tuple[Tensor, Tensor, Tensor]:
    """Returns items (padding as item 0), clicks and shown places; see :meth:`EncoderNetwork.states`."""
    return (
        torch.from_numpy(np.maximum(window.items, 0).astype(np.int64)),
        torch.from_numpy(window.clicks.astype(np.float32)),
        torch.from_numpy(window.items >= 0),
    )
