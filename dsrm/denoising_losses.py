"""Losses that make a click model robust to false clicks: T-CE and R-CE (Wang et al., WSDM 2021), and BOD."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_UNIFORMITY_WEIGHT = 0.5
_UNIFORMITY_TEMPERATURE = 2.0
_NORM_PENALTY = 1e-3


def truncated_cross_entropy(logits: Tensor, labels: Tensor, rate: float) -> Tensor:
    """Returns the mean cross-entropy without the positives of the largest loss (T-CE).

    As in the reference, ``rate`` counts rows of the whole batch, and negatives are never dropped.

    Args:
        logits: ``(B,)``.
        labels: ``(B,)``, 0 or 1.
        rate: Share of the batch to drop.
    """
    losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    remaining = len(losses) - int(rate * len(losses))
    order = (losses.detach() * labels).argsort()
    return losses[order[:remaining]].mean()


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
    user: Tensor, positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Returns BOD's ranking loss, ``-log sigmoid(g(u,i) <u,i> - g(u,j) <u,j>)``.

    Args:
        user: ``(B, d)``.
        positive: ``(B, d)``, clicked items.
        negative: ``(B, d)``, drawn items.
        positive_weight: ``(B,)``, weights ``g(u, i)``.
        negative_weight: ``(B,)``, weights ``g(u, j)``.
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

    The weights are constants to the gradient.

    Args:
        user: ``(B, d)``.
        positive: ``(B, d)``, clicked items.
        negative: ``(B, d)``, drawn items.
        positive_weight: ``(B,)``, weights ``g(u, i)``.
        negative_weight: ``(B,)``, weights ``g(u, j)``.
    """
    ranking = weighted_bpr(user, positive, negative, positive_weight.detach(), negative_weight.detach())
    alignment = weighted_alignment(user, positive, positive_weight.detach())
    return ranking + alignment + _UNIFORMITY_WEIGHT * (uniformity(user) + uniformity(positive)) / 2


def bod_outer_loss(
    user: Tensor, positive: Tensor, negative: Tensor, positive_weight: Tensor, negative_weight: Tensor
) -> Tensor:
    """Returns BOD's loss of the weights: how little ranking's and alignment's gradients agree.

    The gradients are those with respect to the vectors of the batch, one row each; the weights are what is trained.

    Args:
        user: ``(B, d)``, a leaf that requires a gradient.
        positive: ``(B, d)``, likewise.
        negative: ``(B, d)``, likewise.
        positive_weight: ``(B,)``, weights ``g(u, i)``.
        negative_weight: ``(B,)``, weights ``g(u, j)``.
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
