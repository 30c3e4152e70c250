"""Means over crossed random factors, such as training seeds and users, with their variances and intervals.

A method that is trained with ``S`` seeds and evaluated on ``U`` users gives a table ``(S, U)``. Seeds are a sample
of all seeds, users a sample of all users, and every seed meets the same users. The model of a table is::

    result = mean + seed + user + rest

with independent seeds, users and rests (the rest holds the interaction of seed and user, and chance). The variance of
the mean is then ``var(seed) / S + var(user) / U + var(rest) / (S U)``; a bootstrap or a t-test over seeds alone leaves
out the second term.

Source: Searle, Casella and McCulloch, "Variance Components", 1992 (two-way random effects); Satterthwaite, 1946, and
Welch, 1947 (degrees of freedom of a sum of variances); Wilson, 1927 (intervals of rates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

_ROUNDING = 1e-12


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, with its estimated variance.

    Attributes:
        value: The estimate.
        variance: Variance of the estimate (not of one unit); 0 where all units agree.
        freedom: Degrees of freedom of the variance: (value - truth) / sqrt(variance) is about Student's t with these.
    """

    value: float
    variance: float
    freedom: float

    def half_width(self, level: float = 0.95) -> float:
        """Returns half the length of Student's interval of coverage ``level``."""
        return self.quantile(level) * math.sqrt(self.variance)

    def quantile(self, level: float = 0.95) -> float:
        """Returns what Student's t stays below in size with probability ``level``."""
        from scipy.special import stdtrit

        return float(stdtrit(self.freedom, (1.0 + level) / 2.0))

    def p_value(self) -> float:
        """Returns the two-sided p-value of a truth of 0; 1 where estimate and variance are 0, and 0 where one is."""
        from scipy.special import stdtr

        if self.variance == 0.0:
            return float(self.value == 0.0)
        return 2.0 * float(stdtr(self.freedom, -abs(self.value) / math.sqrt(self.variance)))

    def detectable(self, significance: float = 0.05, power: float = 0.8) -> float:
        """Returns the size of truth that the two-sided test of :meth:`p_value` would have shown.

        By the noncentral t distribution, at the estimated variance: with a truth of this size the p-value is at most
        ``significance`` with probability ``power``. The variance is an estimate, and so is this.
        """
        from scipy.special import nctdtrinc

        critical = self.quantile(1.0 - significance)
        return float(nctdtrinc(self.freedom, 1.0 - power, critical)) * math.sqrt(self.variance)


@dataclass(frozen=True)
class Interval:
    """The statistic of the observed values with its interval, and the nominal coverage, such as 0.95."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def half_width(self) -> float:
        """Half the length of the interval."""
        return (self.high - self.low) / 2.0


def crossed_mean(table: NDArray[Any]) -> Estimate:
    """Returns the mean over two crossed random factors, or over the one that varies.

    Args:
        table: ``(S, U)``, such as results of S training seeds on the same U users, or of S seeds in U orders. With one
            row the columns alone are the units, as in Student's one-sample t, and the other way round.

    Raises:
        ValueError: A single number, or values that are not finite.
    """
    values = _table(table)
    return _contrast([values if values.shape[1] > 1 else values.T], [1.0])


def crossed_difference(first: NDArray[Any], second: NDArray[Any]) -> Estimate:
    """Returns the mean of one method minus that of another: training seeds independent, users paired.

    All seeds of both methods count, whatever their numbers: ``S1`` and ``S2`` may differ. A method favoured by a user
    is favoured under every seed, so users enter by the variance of their difference of means over seeds. With ``V1``,
    ``V2`` the variances between the seeds' means, ``D`` that between the users' differences, and ``E1``, ``E2`` the
    mean squares of what seed and user leave unexplained, the variance is
    ``V1 / S1 + V2 / S2 + D / U - E1 / (S1 U) - E2 / (S2 U)``: V and D both contain the rest, which must not count
    twice. A factor that varies no more than the rest makes it vary is left out. Degrees of freedom are Satterthwaite's.
    For many users, or users who do not matter, this is Welch's test on the
    seeds' means.

    It assumes that seeds' means are about normal, and that the users are a sample: of all users if they were drawn, of
    users like them if all held-out users were evaluated.

    Args:
        first: ``(S1, U)``. One row is a method without a training seed (a control): it has no variance between seeds.
        second: ``(S2, U)``, the same users in the same order.

    Raises:
        ValueError: Other users, fewer than two, or values that are not finite.
    """
    a, b = _table(first), _table(second)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"both methods need the same users, got {a.shape[1]} and {b.shape[1]}")
    return _contrast([a, b], [1.0, -1.0])


def interval_of(estimate: Estimate, *, level: float = 0.95) -> Interval:
    """Returns Student's interval of an estimate."""
    half = estimate.half_width(level)
    return Interval(estimate.value, estimate.value - half, estimate.value + half, level)


def rate_interval(table: NDArray[Any], units: int | None = None, *, level: float = 0.95) -> Interval:
    """Returns a rate with an interval that stays inside [0, 1]: Wilson's, for units that are not single trials.

    Wilson's interval holds every rate ``p`` with ``|rate - p| <= t sqrt(p (1 - p) / n)``. Here ``n`` is the effective
    number of trials, ``rate (1 - rate) / variance``, by the variance of :func:`crossed_mean`; so slates of one user
    need not be independent, nor users under one training seed. ``t`` is Student's quantile, with fewer degrees of
    freedom where few users make up the rate (kurtosis of what users add).

    Where all units agree, there is no variance to go by. A rate of exactly 0 or 1 then has a one-sided bound: what
    ``units`` independent trials without exception leave possible. Any other has Wilson's interval of ``units`` trials.

    Args:
        table: ``(S, U)`` values whose mean is the rate: S training seeds on U users (see :func:`linearised_ratio`), S
            seeds alone ``(S, 1)``, or U users alone ``(1, U)``.
        units: Number of users behind the rate; None takes U.
        level: Coverage.

    Raises:
        ValueError: A mean outside [0, 1], a single number, or values that are not finite.

    Source: Wilson, 1927; Korn and Graubard, 1998 (effective number of trials).
    """
    from scipy.special import ndtri, stdtrit

    values = _table(table)
    estimate = crossed_mean(values)
    rate, trials = estimate.value, float(units or values.shape[1])
    if not -_ROUNDING <= rate <= 1.0 + _ROUNDING:
        raise ValueError(f"a rate lies in [0, 1], got {rate:g}")
    rate = min(max(rate, 0.0), 1.0)
    if min(rate, 1.0 - rate) <= _ROUNDING:
        bound = 1.0 - (1.0 - level) ** (1.0 / trials)
        return Interval(rate, max(rate - bound, 0.0), min(rate + bound, 1.0), level)
    quantile = float(ndtri((1.0 + level) / 2.0))
    if estimate.variance > _ROUNDING**2:
        trials = rate * (1.0 - rate) / estimate.variance
        quantile = float(stdtrit(_rate_freedom(values, estimate), (1.0 + level) / 2.0))
    shrunk = quantile**2 / trials
    centre = (rate + shrunk / 2.0) / (1.0 + shrunk)
    half = quantile * np.sqrt(rate * (1.0 - rate) / trials + shrunk / (4.0 * trials)) / (1.0 + shrunk)
    return Interval(rate, max(float(centre - half), 0.0), min(float(centre + half), 1.0), level)


def _rate_freedom(table: Values, estimate: Estimate) -> float:
    """Returns degrees of freedom that take account of users who add far more to a rate than others do."""
    pooled = table.mean(axis=0) if table.shape[1] > 1 else table[:, 0]
    squares = (pooled - pooled.mean()) ** 2
    if not squares.any():
        return estimate.freedom
    kurtosis = float((squares**2).mean() / squares.mean() ** 2)
    part = float(pooled.var(ddof=1)) / len(pooled)
    # A variance of n values with this kurtosis varies as one of so many normal values does.
    of_users = 2.0 * len(pooled) / max(kurtosis - 1.0, _ROUNDING) * (estimate.variance / part) ** 2
    return min(estimate.freedom, of_users)


class _Part(NamedTuple):
    """A part of a variance, and its degrees of freedom."""

    variance: float
    freedom: float


def _contrast(tables: Sequence[Values], weights: Sequence[float]) -> Estimate:
    """Returns a weighted sum of the means of tables of the same columns; weights are 1 or -1."""
    n_columns = tables[0].shape[1]
    if n_columns < 2:
        raise ValueError(f"an interval needs at least two units, got one value in {len(tables[0])} row(s)")
    pooled = np.sum([weight * table.mean(axis=0) for weight, table in zip(weights, tables, strict=True)], axis=0)
    several = [table for table in tables if len(table) > 1]
    rows = [_Part(float(table.mean(axis=1).var(ddof=1)) / len(table), len(table) - 1) for table in several]
    rests = [_Part(_residual_mean_square(table) / table.size, (len(table) - 1) * (n_columns - 1)) for table in several]
    columns = _Part(float(pooled.var(ddof=1)) / n_columns, n_columns - 1)
    # The variance between rows and that between columns both contain the rest. A factor that varies no more than the
    # rest makes it vary is taken to have no effect.
    columns_vary = columns.variance > math.fsum(rest.variance for rest in rests)
    parts = [columns] if columns_vary else []
    for row, rest in zip(rows, rests, strict=True):
        rows_vary = row.variance > rest.variance
        parts += [row] if rows_vary else []
        parts.append(_Part((1.0 - rows_vary - columns_vary) * rest.variance, rest.freedom))
    variance = math.fsum(part.variance for part in parts)
    scale = max(float(np.abs(table).max()) for table in tables)
    if float(np.abs(pooled).max()) <= _ROUNDING * scale and variance <= (_ROUNDING * scale) ** 2:
        # Sums in another order: a test of rounding would find a difference.
        return Estimate(0.0, 0.0, columns.freedom)
    uncertainty = math.fsum(part.variance**2 / part.freedom for part in parts)
    freedom = variance**2 / uncertainty if uncertainty > 0.0 else columns.freedom
    return Estimate(float(pooled.mean()), variance, freedom)


def _residual_mean_square(table: Values) -> float:
    """Returns the mean square of what the means of rows and columns leave unexplained."""
    residuals = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    return float((residuals**2).sum() / ((table.shape[0] - 1) * (table.shape[1] - 1)))


def _table(values: NDArray[Any]) -> Values:
    table = np.asarray(values, np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError(f"need a table of two dimensions, got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError("values must be finite; a missing result is not a result")
    return table
