"""T-CE, R-CE and BOD as purifiers: the clicks of a window count by how credible a denoising click model finds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dsrm.encoder import window_tensors
from dsrm.purifier import WorldKey, WorldPurifier
from dsrm.targets import logged_users, sample_windows
from kuaifair_env.checks import need_number, need_seed, need_whole
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError, MismatchError
from kuaifair_env.files import Tensors, parse_as
from kuaifair_env.pooling import mean_embeddings
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.training import Trainer, load_network, network_tensors
from kuaifair_env.world import World

DenoisingLoss = Literal["tce", "rce", "bod"]
DENOISING_LOSSES: tuple[DenoisingLoss, ...] = get_args(DenoisingLoss)

_RCE_EXPONENT = 0.25
_BOD_INNER_STEPS = 10
_WEIGHER_WIDTH = 64
_UNIFORMITY_WEIGHT = 0.5
_UNIFORMITY_TEMPERATURE = 2.0
_NORM_PENALTY = 1e-3


@dataclass(frozen=True)
class ClickModelConfig:
    """How the click model is trained. The losses keep their reference settings.

    Attributes:
        loss: ``"tce"``, ``"rce"`` or ``"bod"``.
        dimension: Size of the factors.
        steps: Optimizer steps.
        batch_size: Positives of a step; each is joined by one drawn negative.
        learning_rate: Of Adam.
        drop_rate: T-CE's final drop rate ``eps_max``.
        seed: Seed of factors and batches.
    """

    loss: DenoisingLoss
    dimension: int = 64
    steps: int = 1_500
    batch_size: int = 1_024
    learning_rate: float = 1e-3
    drop_rate: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in DENOISING_LOSSES:
            raise ValueError(f"loss must be one of {DENOISING_LOSSES}, got {self.loss!r}")
        need_whole(1, dimension=self.dimension, steps=self.steps, batch_size=self.batch_size)
        need_seed(self.seed)
        need_number("(0, inf)", learning_rate=self.learning_rate)
        need_number("[0, 1)", drop_rate=self.drop_rate)

    def drop_rate_at(self, step: int) -> float:
        """Returns T-CE's drop rate after a number of steps; it rises linearly over the first half of them."""
        return self.drop_rate * min(step / max(self.steps // 2, 1), 1.0)


class ClickModel(nn.Module):
    """Scores items for windows: the mean of the clicked items' factors, times an item's own, plus its bias.

    Users are described by their windows alone, so that the model also applies to users that it was not trained on.
    """

    def __init__(self, items: int, dimension: int) -> None:
        super().__init__()
        self.history = nn.Embedding(items, dimension)
        self.item = nn.Embedding(items, dimension)
        self.bias = nn.Embedding(items, 1)
        nn.init.normal_(self.history.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.weigher = nn.Sequential(
            nn.Linear(2 * dimension, _WEIGHER_WIDTH),
            nn.ReLU(),
            nn.Linear(_WEIGHER_WIDTH, _WEIGHER_WIDTH),
            nn.ReLU(),
            nn.Linear(_WEIGHER_WIDTH, 1),
        )

    def users(self, items: Tensor, clicks: Tensor) -> Tensor:
        """Returns user vectors ``(B, D)`` of windows: ``(B, H)`` items, padding as item 0, and clicks, there 0."""
        shares = clicks / clicks.sum(1, keepdim=True).clamp_min(1.0)
        return torch.einsum("bh,bhd->bd", shares, self.history(items))

    def logits(self, users: Tensor, items: Tensor) -> Tensor:
        """Returns click log-odds, ``(B,)`` for one item each, or ``(B, H)``."""
        factors = self.item(items)
        bias = self.bias(items)[..., 0]
        if items.ndim == 1:
            scores: Tensor = (users * factors).sum(1) + bias
        else:
            scores = torch.einsum("bd,bhd->bh", users, factors) + bias
        return scores

    def weights(self, users: Tensor, factors: Tensor) -> Tensor:
        """Returns BOD's weights ``g(u, i)`` in (0, 1), one for each pair of vectors."""
        weights: Tensor = self.weigher(torch.cat([users, factors], dim=-1))[..., 0].sigmoid()
        return weights


class ItemModelPurifier(WorldPurifier):
    """Base class of purifiers with a network that has a row for each item.

    Args:
        config: Settings of the network.
        key: The world that it was trained on.
        item_ids: ``int64 (M,)``, the items' keys (raw ids, or hashes of text) in the order of the network's rows.
        model: The trained network.
        report: Provenance, JSON-able.
    """

    def __init__(
        self, config: Any, key: WorldKey, item_ids: NDArray[np.int64], model: nn.Module, report: Mapping[str, Any]
    ) -> None:
        super().__init__(key, report)
        self.config = config
        self._item_ids = item_ids
        self._model = model.eval().requires_grad_(False)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        space = super().bind(world)
        if not np.array_equal(self._item_ids, world.data.items.keys):
            raise MismatchError("the click model knows the items in another order; train it for these candidates")
        return space

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return network_tensors(self._model) | {"item_ids": self._item_ids}

    @classmethod
    def untrained(cls, items: int, settings: Mapping[str, Any]) -> tuple[Any, nn.Module]:
        """Returns the configuration with given settings, and an untrained network of it for so many items."""
        raise NotImplementedError

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> ItemModelPurifier:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        config, model = cls.untrained(len(tensors["item_ids"]), settings["config"])
        load_network(model, tensors)
        key = parse_as(WorldKey, settings["world"])
        return cls(config, key, tensors["item_ids"], model, parse_as(dict[str, Any], settings["report"]))


class ClickDenoiser(ItemModelPurifier):
    """The weighted mean embedding of the clicked items, ``s^ = sum_j w_j e_j / sum_j w_j``.

    * T-CE: ``w_j`` is 0 for the clicks of a window with the largest loss, a share ``eps_max`` of them, else 1.
    * R-CE: ``w_j = y_j ^ beta`` with ``y_j`` the predicted click probability. The observed state consists of clicked
      items alone, so skipped items, which the loss reweights too, have no place in it.
    * BOD: ``w_j = g(u, j)``, the learnt weight.

    Args:
        config: Loss and sizes of the click model.
        key: The world that it was trained on.
        item_ids: ``int64 (M,)``, the items' keys (raw ids, or hashes of text) in the order of the model's rows.
        model: The trained click model.
        report: Provenance, JSON-able.
    """

    config: ClickModelConfig
    _model: ClickModel

    def __init__(
        self,
        config: ClickModelConfig,
        key: WorldKey,
        item_ids: NDArray[np.int64],
        model: ClickModel,
        report: Mapping[str, Any],
    ) -> None:
        super().__init__(config, key, item_ids, model, report)
        self.kind = config.loss

    @classmethod
    def fit(cls, world: World, config: ClickModelConfig, progress: bool = False) -> ClickDenoiser:
        """Trains the click model of a training world and returns the purifier."""
        report = {
            "mode": config.loss,
            "data": world.data.provenance.as_dict(),
            "test_log": "unread",
            "training_users": len(world.users),
        }
        model = train_click_model(world, config, progress)
        return cls(config, WorldKey.of_world(world), world.data.items.keys, model, report)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return mean_embeddings(self.builder.embeddings, window.items, self.weights(window))

    @torch.inference_mode()
    def weights(self, window: HistoryWindow) -> FloatArray:
        """Returns the weight of each place of a window, ``float32 (B, H)``; 0 where nothing was clicked."""
        items, clicks, _ = window_tensors(window)
        users = self._model.users(items, clicks)
        if self.config.loss == "bod":
            factors = self._model.item(items)
            weights = self._model.weights(users[:, None, :].expand_as(factors), factors)
        elif self.config.loss == "tce":
            weights = _tce_weights(self._model.logits(users, items), clicks, self.config.drop_rate)
        else:
            weights = self._model.logits(users, items).sigmoid() ** _RCE_EXPONENT
        return (weights * clicks).numpy()

    @classmethod
    def untrained(cls, items: int, settings: Mapping[str, Any]) -> tuple[ClickModelConfig, ClickModel]:
        """See :class:`ItemModelPurifier`."""
        config = parse_as(ClickModelConfig, settings)
        return config, ClickModel(items, config.dimension)


def train_click_model(world: World, config: ClickModelConfig, progress: bool = False) -> ClickModel:
    """Trains a click model on the training log of a world, users of the test world left out.

    Raises:
        DataError: If no user has two clicks.
        ValueError: If the world is not a training world.
    """
    from tqdm import tqdm

    if world.split != "train":
        raise ValueError("click models are trained in the training world; the test world stays unseen")
    source = _ClickSource(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ClickModel(len(world.data.items), config.dimension)
    rng = np.random.default_rng(config.seed)
    factors = [*model.history.parameters(), *model.item.parameters(), *model.bias.parameters()]
    trainer = Trainer(model, torch.optim.Adam(factors, config.learning_rate))
    weigher_optimizer = torch.optim.Adam(model.weigher.parameters(), config.learning_rate)

    def batches(_: int) -> Iterator[_ClickBatch]:
        for step in tqdm(range(1, config.steps + 1), desc=f"train {config.loss}", disable=not progress):
            batch = source.draw(config.batch_size, rng)
            if config.loss == "bod" and step % _BOD_INNER_STEPS == 0:
                _train_weigher(model, weigher_optimizer, batch)
            yield batch

    def loss(model: ClickModel, batch: _ClickBatch) -> Tensor:
        users = model.users(batch.items, batch.clicks)
        if config.loss == "bod":
            positive, negative = model.item(batch.positive), model.item(batch.negative)
            weights = model.weights(users, positive), model.weights(users, negative)
            return bod_inner_loss(users, positive, negative, *weights)
        logits = torch.cat([model.logits(users, batch.positive), model.logits(users, batch.negative)])
        labels = torch.cat([torch.ones(len(users)), torch.zeros(len(users))])
        if config.loss == "tce":
            return truncated_cross_entropy(logits, labels, config.drop_rate_at(trainer.steps))
        return reweighted_cross_entropy(logits, labels, _RCE_EXPONENT)

    return trainer.fit(batches, loss, rounds=1)


class _ClickBatch(NamedTuple):
    """Windows (see :meth:`ClickModel.users`), and two ``int64 (B,)`` items each: one clicked, one drawn."""

    items: Tensor
    clicks: Tensor
    positive: Tensor
    negative: Tensor


class _ClickSource:
    """Draws windows with a click of the same user, and items drawn from all candidates."""

    def __init__(self, world: World) -> None:
        log = world.data.train
        self._log: InteractionLog = log
        self._n_users = len(world.data.users)
        self._n_items = world.n_items
        self._users = logged_users(world, min_clicks=2)
        if len(self._users) == 0:
            raise DataError("no user of the training log has two clicks; there is nothing to learn from")
        self._click_rows = np.flatnonzero(log.clicks)
        self._starts = np.searchsorted(log.users[self._click_rows], np.arange(self._n_users + 1))

    def draw(self, size: int, rng: np.random.Generator) -> _ClickBatch:
        users = rng.choice(self._users, size)
        window = sample_windows(self._log, self._n_users, users, rng)
        first, last = self._starts[users], self._starts[users + 1]
        rows = self._click_rows[first + (rng.random(size) * (last - first)).astype(np.int64)]
        positive = self._log.items[rows].astype(np.int64)
        negative = rng.integers(self._n_items, size=size)
        # The positive must not be read off the window that is to predict it.
        window.clicks[window.items == positive[:, None]] = False
        items, clicks, _ = window_tensors(window)
        return _ClickBatch(items, clicks, torch.from_numpy(positive), torch.from_numpy(negative))


def _train_weigher(model: ClickModel, optimizer: torch.optim.Optimizer, batch: _ClickBatch) -> None:
    """Takes one step of BOD's weights; the factors are constants."""
    with torch.no_grad():
        vectors = (model.users(batch.items, batch.clicks), model.item(batch.positive), model.item(batch.negative))
    user, positive, negative = (vector.clone().requires_grad_(True) for vector in vectors)
    positive_weight = model.weights(user.detach(), positive.detach())
    negative_weight = model.weights(user.detach(), negative.detach())
    loss = bod_outer_loss(user, positive, negative, positive_weight, negative_weight)
    optimizer.zero_grad()
    torch.autograd.backward(loss, inputs=list(model.weigher.parameters()))
    optimizer.step()


def _tce_weights(logits: Tensor, clicks: Tensor, drop_rate: float) -> Tensor:
    """Returns 1 for the clicks that T-CE keeps: all but a share of a window's clicks, those with the least logits."""
    # The loss of a click falls with its logit; places that were not clicked come last and are never counted.
    order = torch.where(clicks > 0, logits, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1)
    dropped = (drop_rate * clicks.sum(dim=1, keepdim=True)).floor()
    return (rank >= dropped).to(torch.float32)


def truncated_cross_entropy(logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Returns the mean cross-entropy without the positives of the largest loss (T-CE).

    As in the reference, ``rate`` is the share of the whole batch to drop, and negatives are never dropped.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    remaining = len(losses) - int(rate * len(losses))
    order = (losses.detach() * labels).argsort()
    return losses[order[:remaining]].mean()


def reweighted_cross_entropy(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Returns the cross-entropy with confident rows counting more (R-CE): ``p^beta`` of positives, ``(1-p)^beta`` else.

    The weights are constants to the gradient; with ``beta`` 0 it is plain cross-entropy.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    predicted = logits.detach().sigmoid()
    weights = torch.where(labels > 0, predicted, 1.0 - predicted) ** beta
    return (weights * losses).mean()


def weighted_bpr(
    user: Tensor, positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Returns BOD's ranking loss, ``-log sigmoid(g(u,i) <u,i> - g(u,j) <u,j>)``.

    Vectors are ``(B, d)``, of users, clicked items and drawn items; weights ``g`` are ``(B,)``.
    """
    difference = positive_weight * (user * positive).sum(1) - negative_weight * (user * negative).sum(1)
    return -functional.logsigmoid(difference).mean()


def weighted_alignment(user: Tensor, positive: Tensor, positive_weight: Tensor) -> Tensor:
    """Returns BOD's alignment loss, ``g(u,i) |u/|u| - i/|i||^2``."""
    gap = functional.normalize(user, dim=1) - functional.normalize(positive, dim=1)
    return (positive_weight * (gap * gap).sum(1)).mean()


def uniformity(vectors: Tensor) -> Tensor:
    """Returns ``log mean exp(-2 |x - y|^2)`` over pairs of unit vectors (Wang and Isola, ICML 2020)."""
    units = functional.normalize(vectors, dim=1)
    return (-_UNIFORMITY_TEMPERATURE * torch.pdist(units) ** 2).exp().mean().clamp_min(1e-12).log()


def bod_inner_loss(
    user: Tensor, positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Returns BOD's loss of the model under given weights: ranking, alignment and half of uniformity.

    The weights are constants to the gradient. For the arguments see :func:`weighted_bpr`.
    """
    ranking = weighted_bpr(user, positive, negative, positive_weight.detach(), negative_weight.detach())
    alignment = weighted_alignment(user, positive, positive_weight.detach())
    return ranking + alignment + _UNIFORMITY_WEIGHT * (uniformity(user) + uniformity(positive)) / 2


def bod_outer_loss(
    user: Tensor, positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Returns BOD's loss of the weights: how little ranking's and alignment's gradients agree.

    The gradients are those with respect to the vectors of the batch, one row each; the weights are what is trained. For
    the arguments see :func:`weighted_bpr`; the vectors are leaves that require a gradient.
    """
    ranking = weighted_bpr(user, positive, negative, positive_weight, negative_weight)
    alignment = weighted_alignment(user, positive, positive_weight)
    disagreement = torch.zeros(())
    for vectors in (user, positive):
        (ranking_gradient,) = torch.autograd.grad(ranking, vectors, create_graph=True)
        (alignment_gradient,) = torch.autograd.grad(alignment, vectors, create_graph=True)
        cosine = functional.cosine_similarity(ranking_gradient, alignment_gradient, dim=1)
        disagreement = disagreement + (1.0 - cosine).mean()
    norms = user.norm() + positive.norm() + negative.norm()
    loss: Tensor = disagreement + _NORM_PENALTY * norms / len(user)
    return loss
