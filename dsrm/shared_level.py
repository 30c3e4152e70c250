"""The shared level of a belief: what the training log misjudges about the items, learned from all users served.

The log-odds of a click hold ``b + g . x_i + delta_i`` for every user, with Gaussian priors on ``b``, ``g`` and the
offsets. ``x_i`` are columns in groups, each with a scale of its own. An answer enters as a Gaussian observation of that
term, so two sums per item are all that is kept, and the posterior follows from them in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kuaifair_env.checks import need_number

PRIOR_PARAMETERS = 1.0
"""Weight of the first scales when scales are re-estimated, in determined parameters."""


@dataclass(frozen=True)
class SharedScales:
    """Prior standard deviations of the shared part, in log-odds.

    Attributes:
        vector: Of each component of ``g`` over unit item embeddings.
        offset: Of ``delta_i``, as a multiple of each item's deviation (in a
            :class:`~dsrm.belief.Belief`, :func:`kuaifair_env.randomisation.offset_shape` of its training exposures).
        features: Of each component of ``g`` over standardised item features.
        intercept: Of ``b``.
        log: Of each component of ``g`` over what the training log says of an item
            (:attr:`dsrm.belief.BeliefItems.log`): how far it is to be trusted, at most at its word. 0 takes it at its
            word but for what embeddings, features and offsets tell.
    """

    vector: float = 1.0
    offset: float = 1.0
    features: float = 0.2
    intercept: float = 1.0
    log: float = 0.0

    def __post_init__(self) -> None:
        need_number("[0, inf)", vector=self.vector, offset=self.offset)
        need_number("[0, inf)", features=self.features, intercept=self.intercept, log=self.log)


class SharedLevel:
    """The posterior of ``b``, ``g`` and all offsets, given sums over answers.

    Args:
        columns: ``(N, m)`` each, what ``g`` runs over, by the name of its scale; a column of ones comes before them. Of
            those named ``log`` the first is the item's part of the prior: while its coefficient would be above 0, all
            are left out.
        deviations: ``(N,)``, prior standard deviations of the offsets.
        scales: Of the priors, where re-estimation begins.

    Attributes:
        scales: Of the priors now.
        mean: ``(N,)``, posterior mean of ``b + g . x_i + delta_i``.
        deviation: ``(N,)``, posterior standard deviation of the offset given all else.
        coefficients: ``(p,)``, posterior mean of ``b`` and ``g``, in the order of the columns.
        weights: ``float64 (N,)``, summed precisions of the observations of each item.
        values: ``float64 (N,)``, summed precision times observation.
    """

    def __init__(self, columns: Mapping[str, Tensor], deviations: Tensor, scales: SharedScales) -> None:
        ones = torch.ones_like(deviations)[:, None]
        self._columns = torch.cat([ones, *columns.values()], dim=1)
        self._deviations = deviations
        self._first = scales
        ends = accumulate((group.shape[1] for group in columns.values()), initial=1)
        self._groups = {name: slice(*bounds) for name, bounds in zip(columns, pairwise(ends), strict=True)}
        self.scales = scales
        self.start_anew()

    def start_anew(self) -> None:
        """Goes back to the prior with the scales of now."""
        self.weights = torch.zeros(len(self._columns), dtype=torch.float64)
        self.values = torch.zeros(len(self._columns), dtype=torch.float64)
        self.mean = self._columns.new_zeros(len(self._columns))
        self.coefficients = self._columns.new_zeros(self._columns.shape[1])
        self.deviation = self._deviations * self.scales.offset

    def add(self, items: Tensor, weights: Tensor, values: Tensor) -> None:
        """Adds Gaussian observations of items' shared terms.

        Args:
            items: ``int64 (n,)``.
            weights: ``(n,)``, their precisions.
            values: ``(n,)``, the observations.
        """
        self.weights.index_add_(0, items, weights.to(torch.float64))
        self.values.index_add_(0, items, (weights * values).to(torch.float64))

    def update(self, reestimate: bool = True) -> None:
        """Computes the posterior of all answers so far.

        Args:
            reestimate: Whether scales then move by a step of the marginal likelihood's fixed point.
        """
        seen = torch.nonzero(self.weights)[:, 0]
        columns, dtype = self._columns[seen], self._columns.dtype
        weights, values = self.weights[seen].to(dtype), self.values[seen].to(dtype)
        variances = (self._deviations[seen] * self.scales.offset) ** 2
        remaining = 1.0 / (1.0 + variances * weights)
        widths = self._widths()
        scaled = columns * widths
        covariance, standard = _regression(scaled, weights * remaining, values * remaining)
        if "log" in self._groups and standard[self._groups["log"].start] > 0:  # it makes too little of differences
            widths[self._groups["log"]] = 0.0
            scaled = columns * widths
            covariance, standard = _regression(scaled, weights * remaining, values * remaining)
        self.coefficients = widths * standard
        linear = self._columns @ self.coefficients
        offsets = variances * remaining * (values - weights * linear[seen])
        self.mean = linear.index_add(0, seen, offsets)
        self.deviation = self._deviations * self.scales.offset
        self.deviation[seen] *= remaining.sqrt()
        if reestimate:
            gains = 1.0 - remaining
            of_linear = ((scaled @ covariance) * scaled).sum(1)
            determined = gains - gains**2 * of_linear / variances.clamp(min=1e-12)
            squares = (offsets / self._deviations[seen]) ** 2
            self.scales = self._reestimated(
                (widths * standard) ** 2, 1.0 - covariance.diagonal(), squares.sum(), determined.sum()
            )

    def restore(self, scales: SharedScales, first: SharedScales, tensors: Mapping[str, Tensor]) -> None:
        """Takes what another level had: its scales, and its tensors by name."""
        self.scales, self._first = scales, first
        self.weights, self.values = tensors["weights"], tensors["values"]
        self.mean, self.deviation = tensors["mean"], tensors["deviation"]
        self.coefficients = tensors["coefficients"]

    def _reestimated(self, squares: Tensor, determined: Tensor, of_offsets: Tensor, offsets: Tensor) -> SharedScales:
        values = {"offset": _scale(self._first.offset, of_offsets, offsets)} | {
            name: _scale(getattr(self._first, name), squares[group].sum(), determined[group].sum())
            for name, group in self._groups.items()
        }
        return replace(self._first, **values)

    def _widths(self) -> Tensor:
        widths = torch.full((self._columns.shape[1],), self.scales.intercept, dtype=self._columns.dtype)
        for name, group in self._groups.items():
            widths[group] = getattr(self.scales, name)
        return widths


def _regression(scaled: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the posterior covariance and mean of coefficients with standard normal priors.

    Args:
        scaled: ``(n, p)``, columns times the coefficients' scales.
        weights: ``(n,)``, precisions.
        values: ``(n,)``, precisions times observations.
    """
    precision = scaled.T @ (scaled * weights[:, None])
    precision += torch.eye(scaled.shape[1], dtype=scaled.dtype)
    covariance = torch.cholesky_inverse(torch.linalg.cholesky(precision))
    return covariance, covariance @ (scaled.T @ values)


def _scale(first: float, squares: Tensor, determined: Tensor) -> float:
    return float(((squares + PRIOR_PARAMETERS * first**2) / (determined + PRIOR_PARAMETERS)).clamp(min=0).sqrt())
