"""What the answers to single items say: modes of their offsets, and Gaussian sites that match their moments.

All functions are elementwise: ``(B, M)`` items of ``B`` sessions, each shown some times and clicked some of these.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

_OFFSET_STEPS, _MAX_OFFSET_STEPS = 6, 100
_MIN_PRECISION = 1e-6
_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
_LEAST = 1e-6
"""Probability below which no answer is taken to be."""
_FEW_NODES = torch.linspace(-5.0, 5.0, 21, dtype=torch.float64)
"""Evenly spaced, in deviations of a prior: to deviations of 3 the sum of a logistic function is near its integral."""


def posterior_offsets(
    logits: Tensor, shows: Tensor, clicks: Tensor, variance: Tensor, start: Tensor, tolerance: float | None = None
) -> Tensor:
    """Returns the posterior modes of offsets given everything else.

    An offset's mode ``x`` solves ``x = variance (clicks - shows sigmoid(logits + x))``, whose right-hand side falls in
    ``x``: Newton's method inside a bracket that always holds the solution.

    Args:
        logits: ``(B, M)``, log-odds without the offsets.
        shows: ``(B, M)``, how often each item was shown.
        clicks: ``(B, M)``, how often it was clicked.
        variance: Of the prior, ``(B, 1)``.
        start: ``(B, M)``, where to begin.
        tolerance: Largest step after which to stop; what is left is about its square. None leaves rounding alone.
    """
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 if tolerance is None else tolerance
    most, high = variance * shows, variance * clicks
    low, offsets = high - most, start
    for _ in range(_OFFSET_STEPS):
        offsets = offsets.clamp(low, high)
        probability = torch.sigmoid(logits + offsets)
        slope = most * probability
        change = (offsets - high).add_(slope).div_(slope.addcmul(slope, probability, value=-1).add_(1.0))
        offsets = offsets.sub_(change)
        if change.abs_().max() <= tolerance:
            return offsets
    slow = ~(change <= tolerance)
    return offsets.masked_scatter_(slow, _bracketed_offsets(logits[slow], most[slow], high[slow], tolerance))


def _bracketed_offsets(logits: Tensor, most: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """Solves ``x = high - most sigmoid(logits + x)`` by Newton's method in brackets, halved where it is slow."""
    low = high - most
    upper, offsets, last_change = high, (low + high) / 2, most
    for _ in range(_MAX_OFFSET_STEPS):
        slope = most * torch.sigmoid(logits + offsets)
        excess = offsets - upper + slope
        low, high = torch.where(excess < 0, offsets, low), torch.where(excess > 0, offsets, high)
        moved = offsets - excess / (1.0 + slope * torch.sigmoid(-logits - offsets))
        slow = (moved <= low) | (moved >= high) | ((moved - offsets).abs() > last_change / 2)
        moved = torch.where(slow, (low + high) / 2, moved)
        last_change, offsets = (moved - offsets).abs(), moved
        if (last_change - tolerance * offsets.abs()).max() <= tolerance:
            break
    return offsets


def linear_weights(curvatures: Tensor, variance: Tensor) -> Tensor:
    """Returns the precision with which items speak of the linear part: 1 / (1 / curvature + variance)."""
    return curvatures / (1.0 + variance * curvatures)


def click_probabilities(logits: Tensor, shows: Tensor, clicks: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Returns the probabilities of another click on items, given earlier answers and normal priors of their offsets.

    Args:
        logits: ``(M,)``, log-odds without the offsets.
        shows: ``(M,)``, how often each item was shown before.
        clicks: ``(M,)``, how often it was clicked.
        scales: Standard deviations of the priors.

    Returns:
        ``(len(scales), M)``.
    """
    nodes = _FEW_NODES.to(logits.dtype)
    points = logits[:, None] + logits.new_tensor(scales)[:, None, None] * nodes
    log_density = torch.addcmul(clicks[:, None] * points, shows[:, None], softplus(points), value=-1) - nodes**2 / 2
    return (torch.softmax(log_density, dim=-1) * torch.sigmoid(points)).sum(-1).clamp(_LEAST, 1.0 - _LEAST)


def matched_sites(
    base: Tensor,
    shows: Tensor,
    clicks: Tensor,
    means: Tensor,
    variances: Tensor,
    precisions: Tensor,
    shifts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns Gaussian sites in place of the answers to each item, by one step of expectation propagation.

    A site ``exp(shift x - precision x^2 / 2)`` is chosen so that with it the marginal of an item's own log-odds ``x``
    has the mean and variance that it has with the answers themselves (Minka, "Expectation propagation for approximate
    Bayesian inference", UAI 2001). Integrals are adaptive Gauss-Hermite quadrature.

    Args:
        base: ``(B, M)``, log-odds without the own part.
        shows: ``(B, M)``, how often each item was shown; at least once.
        clicks: ``(B, M)``, how often it was clicked.
        means: ``(B, M)``, means of the marginals with the sites so far.
        variances: ``(B, M)``, their variances, positive.
        precisions: ``(B, M)``, of the sites so far.
        shifts: ``(B, M)``, of the sites so far.

    Returns:
        Precisions and shifts, ``(B, M)``.
    """
    without = (1.0 / variances - precisions).clamp(min=_MIN_PRECISION)
    shift_without = means / variances - shifts
    nodes, weights = (torch.from_numpy(array).to(means.dtype) for array in (_NODES, np.log(_NODE_WEIGHTS)))
    points = means[..., None] + variances.sqrt()[..., None] * nodes
    logits = base[..., None] + points
    log_answers = clicks[..., None] * logits - shows[..., None] * softplus(logits)
    log_rest = shift_without[..., None] * points - without[..., None] * points**2 / 2
    density = torch.softmax(log_answers + log_rest + nodes**2 / 2 + weights, dim=-1)
    matched = (density * points).sum(-1)
    spread = (density * (points - matched[..., None]) ** 2).sum(-1)
    return (1.0 / spread - without).clamp(min=0.0), matched / spread - shift_without
