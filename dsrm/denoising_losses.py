"""Losses of the heuristic denoisers that the paper compares with: T-CE, R-CE and BOD.

T-CE and R-CE: Wang, Feng, He, Nie and Chua, "Denoising implicit feedback for recommendation", WSDM 2021. BOD: Wang et
al., "Efficient bi-level optimization for recommendation denoising", KDD 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

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
