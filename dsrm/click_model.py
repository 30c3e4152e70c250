"""A small inductive click model, trained with a denoising loss: how credible each click of a window is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dsrm.windows import sample_windows
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_UNIFORMITY = 0.5
_TEMPERATURE = 2.0
_SIZE_PENALTY = 1e-3


def drop_rate(step: int, gradual: int, most: float) -> float:
    """Returns T-CE's drop rate: it grows linearly over ``gradual`` steps to ``most`` and stays there.

    Args:
        step: Steps taken.
        gradual: Steps of the rise.
        most: Final rate ``eps_max``.
    """
    return most * min(step / max(gradual, 1), 1.0)


def truncated_cross_entropy(logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Returns the mean cross-entropy without the positives of the largest loss (T-CE).

    As in the reference, ``rate`` counts rows of the whole batch, and negatives are never dropped.

    Args:
        logits: ``(B,)``.
        labels: ``(B,)``, 0 or 1.
        rate: Share of the batch to drop.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    kept = len(losses) - int(rate * len(losses))
    order = (losses.detach() * labels).argsort()
    return losses[order[:kept]].mean()


def reweighted_cross_entropy(logits: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Returns the cross-entropy with confident rows counting more (R-CE): ``p^beta`` of positives, ``(1-p)^beta`` else.

    The weights are constants to the gradient.

    Args:
        logits: ``(B,)``.
        labels: ``(B,)``, 0 or 1.
        beta: Strength; 0 is plain cross-entropy.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    predicted = logits.detach().sigmoid()
    weights = torch.where(labels > 0, predicted, 1.0 - predicted) ** beta
    return (weights * losses).mean()


def weighted_bpr(
    user: Tensor, positive: Tensor, negative: Tensor, of_positive: Tensor, of_negative: Tensor
) -> Tensor:
    """Returns BOD's ranking loss, ``-log sigmoid(g(u,i) <u,i> - g(u,j) <u,j>)``.

    Args:
        user: ``(B, d)``.
        positive: ``(B, d)``, clicked items.
        negative: ``(B, d)``, drawn items.
        of_positive: ``(B,)``, weights ``g(u, i)``.
        of_negative: ``(B,)``, weights ``g(u, j)``.
    """
    difference = of_positive * (user * positive).sum(1) - of_negative * (user * negative).sum(1)
    return -functional.logsigmoid(difference).mean()


def weighted_alignment(user: Tensor, positive: Tensor, of_positive: Tensor) -> Tensor:
    """Returns BOD's alignment loss, ``g(u,i) |u/|u| - i/|i||^2``."""
    gap = functional.normalize(user, dim=1) - functional.normalize(positive, dim=1)
    return (of_positive * (gap * gap).sum(1)).mean()


def uniformity(vectors: Tensor) -> Tensor:
    """Returns ``log mean exp(-2 |x - y|^2)`` over pairs of unit vectors (Wang and Isola, ICML 2020)."""
    units = functional.normalize(vectors, dim=1)
    return (-_TEMPERATURE * torch.pdist(units) ** 2).exp().mean().clamp_min(1e-12).log()


def bod_inner_loss(
    user: Tensor, positive: Tensor, negative: Tensor, of_positive: Tensor, of_negative: Tensor
) -> Tensor:
    """Returns the loss of the model under given weights: ranking, alignment and half of uniformity.

    Args:
        user: ``(B, d)``.
        positive: ``(B, d)``.
        negative: ``(B, d)``.
        of_positive: ``(B,)``, constants here.
        of_negative: ``(B,)``, constants here.
    """
    ranking = weighted_bpr(user, positive, negative, of_positive.detach(), of_negative.detach())
    alignment = weighted_alignment(user, positive, of_positive.detach())
    return ranking + alignment + _UNIFORMITY * (uniformity(user) + uniformity(positive)) / 2


def bod_outer_loss(
    user: Tensor, positive: Tensor, negative: Tensor, of_positive: Tensor, of_negative: Tensor
) -> Tensor:
    """Returns the loss of the weights: how little ranking's and alignment's gradients agree.

    The gradients are those with respect to the vectors of the batch, one row each; the weights are what is trained.

    Args:
        user: ``(B, d)``, a leaf that requires a gradient.
        positive: ``(B, d)``, likewise.
        negative: ``(B, d)``, likewise.
        of_positive: ``(B,)``, weights ``g(u, i)``.
        of_negative: ``(B,)``, weights ``g(u, j)``.
    """
    ranking = weighted_bpr(user, positive, negative, of_positive, of_negative)
    alignment = weighted_alignment(user, positive, of_positive)
    total = torch.zeros(())
    for leaf in (user, positive):
        (first,) = torch.autograd.grad(ranking, leaf, create_graph=True)
        (second,) = torch.autograd.grad(alignment, leaf, create_graph=True)
        total = total + (1.0 - functional.cosine_similarity(first, second, dim=1)).mean()
    sizes = user.norm() + positive.norm() + negative.norm()
    result: Tensor = total + _SIZE_PENALTY * sizes / len(user)
    return result


DenoisingLoss = Literal["tce", "rce", "bod"]
DENOISING_LOSSES: tuple[DenoisingLoss, ...] = get_args(DenoisingLoss)

_INNER_PER_OUTER = 10


@dataclass(frozen=True)
class ClickModelConfig:
    """How the click model is trained; losses keep their reference settings, sizes are ours.

    Attributes:
        loss: ``"tce"``, ``"rce"`` or ``"bod"``.
        dimension: Size of the factors.
        steps: Optimiser steps.
        batch_size: Positives of a step; each is joined by one drawn negative.
        learning_rate: Of Adam.
        drop: T-CE's final drop rate ``eps_max``.
        gradual: T-CE's rise, as a share of the steps.
        beta: R-CE's exponent.
        seed: Seed of factors and batches.
    """

    loss: DenoisingLoss
    dimension: int = 64
    steps: int = 1_500
    batch_size: int = 1_024
    learning_rate: float = 1e-3
    drop: float = 0.2
    gradual: float = 0.5
    beta: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in DENOISING_LOSSES:
            raise ValueError(f"loss must be one of {DENOISING_LOSSES}, got {self.loss!r}")
        if min(self.dimension, self.steps, self.batch_size) < 1:
            raise ValueError("dimension, steps and batch_size must be at least 1")
        if not 0.0 <= self.drop < 1.0 or not 0.0 < self.gradual <= 1.0 or self.beta < 0.0:
            raise ValueError("need 0 <= drop < 1, 0 < gradual <= 1 and beta >= 0")


class ClickModel(nn.Module):
    """Scores items for windows: the mean of the clicked items' factors, times an item's own, plus its bias.

    A user is what the window says, so that the model also speaks of users and windows that it was not trained on.

    Args:
        items: Number of items ``M``.
        config: Its training.
    """

    def __init__(self, items: int, config: ClickModelConfig) -> None:
        super().__init__()
        self.history = nn.Embedding(items, config.dimension)
        self.item = nn.Embedding(items, config.dimension)
        self.bias = nn.Embedding(items, 1)
        nn.init.normal_(self.history.weight, std=0.1)
        nn.init.normal_(self.item.weight, std=0.1)
        nn.init.zeros_(self.bias.weight)
        self.weigher = nn.Sequential(
            nn.Linear(2 * config.dimension, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def users(self, items: Tensor, clicks: Tensor) -> Tensor:
        """Returns user vectors of windows, ``(B, D)``.

        Args:
            items: ``int64 (B, H)``, padding as item 0.
            clicks: ``float32 (B, H)``, what counts; 0 at padding.
        """
        counted = clicks / clicks.sum(1, keepdim=True).clamp_min(1.0)
        vectors: Tensor = torch.einsum("bh,bhd->bd", counted, self.history(items))
        return vectors

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
        weighed: Tensor = self.weigher(torch.cat([users, factors], dim=-1))[..., 0].sigmoid()
        return weighed


def train_click_model(world: World, config: ClickModelConfig, progress: bool = False) -> ClickModel:
    """Trains a click model on the training log of a world, users of the test world left out.

    Args:
        world: The training world.
        config: Loss and sizes.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If no user has two clicks.
        ValueError: If the world is not a training world.
    """
    from tqdm import tqdm

    if world.split != "train":
        raise ValueError("click models are trained in the training world; the test world stays unseen")
    positives = _Positives(world)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = ClickModel(len(world.data.items), config)
    rng = np.random.default_rng(config.seed)
    inner = [*model.history.parameters(), *model.item.parameters(), *model.bias.parameters()]
    optimiser = torch.optim.Adam(inner, config.learning_rate)
    outer = torch.optim.Adam(model.weigher.parameters(), config.learning_rate)
    for step in tqdm(range(config.steps), desc=f"train {config.loss}", disable=not progress):
        window, clicked, drawn = positives.batch(config.batch_size, rng)
        if config.loss == "bod" and step % _INNER_PER_OUTER == _INNER_PER_OUTER - 1:
            _outer_step(model, outer, window, clicked, drawn)
        loss = _loss(model, config, step, window, clicked, drawn)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
    return model.eval().requires_grad_(False)


def window_tensors(window: HistoryWindow) -> tuple[Tensor, Tensor]:
    """Returns a window's items (padding as item 0) and clicks as tensors."""
    items = torch.from_numpy(np.maximum(window.items, 0).astype(np.int64))
    return items, torch.from_numpy(window.clicks.astype(np.float32))


class _Positives:
    """Draws windows with a click that lies behind them, and items that the user did not click there."""

    def __init__(self, world: World) -> None:
        log = world.data.train
        self._log: InteractionLog = log
        self._n_users = len(world.data.users)
        self._items = world.n_items
        counts = np.bincount(log.users[log.clicks], minlength=self._n_users)
        self._users = np.intersect1d(world.users, np.flatnonzero(counts >= 2))
        if len(self._users) == 0:
            raise DataError("no user of the training log has two clicks; there is nothing to learn from")
        self._clicked = np.flatnonzero(log.clicks)
        self._starts = np.searchsorted(log.users[self._clicked], np.arange(self._n_users + 1))

    def batch(
        self, size: int, rng: np.random.Generator
    ) -> tuple[HistoryWindow, NDArray[np.int64], NDArray[np.int64]]:
        users = rng.choice(self._users, size)
        window = sample_windows(self._log, self._n_users, users, rng).window
        first, last = self._starts[users], self._starts[users + 1]
        rows = self._clicked[first + (rng.random(size) * (last - first)).astype(np.int64)]
        clicked = self._log.items[rows].astype(np.int64)
        # The positive must not be read off the window that is to predict it.
        window.clicks[window.items == clicked[:, None]] = False
        return window, clicked, rng.integers(self._items, size=size)


def _loss(
    model: ClickModel,
    config: ClickModelConfig,
    step: int,
    window: HistoryWindow,
    clicked: NDArray[np.int64],
    drawn: NDArray[np.int64],
) -> Tensor:
    users = model.users(*window_tensors(window))
    positive, negative = torch.from_numpy(clicked), torch.from_numpy(drawn)
    if config.loss == "bod":
        of_positive = model.weights(users, model.item(positive))
        of_negative = model.weights(users, model.item(negative))
        return bod_inner_loss(users, model.item(positive), model.item(negative), of_positive, of_negative)
    logits = torch.cat([model.logits(users, positive), model.logits(users, negative)])
    labels = torch.cat([torch.ones(len(users)), torch.zeros(len(users))])
    if config.loss == "tce":
        rate = drop_rate(step, int(config.gradual * config.steps), config.drop)
        return truncated_cross_entropy(logits, labels, rate)
    return reweighted_cross_entropy(logits, labels, config.beta)


def _outer_step(
    model: ClickModel,
    optimiser: torch.optim.Optimizer,
    window: HistoryWindow,
    clicked: NDArray[np.int64],
    drawn: NDArray[np.int64],
) -> None:
    with torch.no_grad():
        vectors = (
            model.users(*window_tensors(window)),
            model.item(torch.from_numpy(clicked)),
            model.item(torch.from_numpy(drawn)),
        )
    user, positive, negative = (vector.clone().requires_grad_(True) for vector in vectors)
    of_positive = model.weights(user.detach(), positive.detach())
    of_negative = model.weights(user.detach(), negative.detach())
    loss = bod_outer_loss(user, positive, negative, of_positive, of_negative)
    optimiser.zero_grad()
    torch.autograd.backward(loss, inputs=list(model.weigher.parameters()))
    optimiser.step()


def item_vectors(model: ClickModel) -> FloatArray:
    """Returns the trained factors of all items as agent-side embeddings, rows of norm ``sqrt(D)`` (the loss hook).

    A world built with them has a history state made of factors that the denoising loss has shaped.
    """
    factors: FloatArray = model.history.weight.detach().numpy()
    norms = np.linalg.norm(factors, axis=1, keepdims=True)
    return np.asarray(factors / np.maximum(norms, 1e-9) * np.sqrt(factors.shape[1]), np.float32)
