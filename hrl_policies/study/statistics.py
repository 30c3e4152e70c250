"""Intervals and tests for results over seeds and users.

Training seeds and users are drawn at random, and both vary: :func:`kuaifair_env.intervals.crossed_difference` compares
two methods over them; rates have intervals inside [0, 1] (:func:`kuaifair_env.intervals.rate_interval`). Sessions of
one user are not independent: sum or average them to one value per user first.

Bootstrap intervals have a seed of their own, so the same results always give the same interval; percentile intervals
are for many units, as of ten they hold the truth nine times in ten and not nineteen in twenty.

Sources: Efron, 1979 (bootstrap); Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", NeurIPS 2021 (interquartile mean, stratified bootstrap, probability of improvement, performance profiles);
Holm, 1979 (correction for many tests); Fisher, 1935 (sign flips).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from kuaifair_env.intervals import Interval, crossed_mean, interval_of

Values = NDArray[np.float64]
Statistic = Callable[..., Values]
"""A function of one or more arrays ``(resamples, n)`` that reduces the last axis."""

_CHUNK = 2_000_000
"""Resampled numbers held in memory at a time."""

_EXACT_UP_TO = 16
_LEVEL = 0.95
_ROUNDING = 1e-12


def student_interval(values: NDArray[Any], *, level: float = _LEVEL) -> Interval:
    """Returns the mean of independent units with Student's interval.

    Args:
        values: ``(n,)`` with ``n >= 2``.
        level: Coverage.

    Raises:
        ValueError: Fewer than two units, or values that are not finite.
    """
    units = _finite(values, 1)
    _check_two(len(units), "units")
    return interval_of(crossed_mean(units[None]), level=level)


def bootstrap(
    statistic: Statistic, *columns: NDArray[Any], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns the percentile interval of a statistic of independent units (Efron, 1979).

    Args:
        statistic: Called with each column resampled to ``(rows, n)``; returns ``(rows,)``.
        *columns: ``(n,)`` values of the n units (users, sessions or seeds), resampled together.
        level: Coverage.
        resamples: Number of resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: Fewer than two units, columns of different size, or values that are not finite.
    """
    data = [_finite(column, 1) for column in columns]
    if not data or len({len(column) for column in data}) != 1:
        raise ValueError(f"need columns of one size, got sizes {[len(column) for column in data]}")
    n = len(data[0])
    _check_two(n, "units")

    def draw(rows: int, rng: np.random.Generator) -> Values:
        units = rng.integers(n, size=(rows, n))
        return statistic(*(column[units] for column in data))

    estimate = statistic(*(column[None] for column in data))
    return _interval(float(estimate[0]), draw, n, level, resamples, seed)


def mean_interval(values: NDArray[Any], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Returns the mean of independent units with its interval; arguments as in :func:`bootstrap`."""
    return bootstrap(lambda units: units.mean(axis=-1), values, level=level, resamples=resamples, seed=seed)


def linearised_ratio(numerators: NDArray[Any], denominators: NDArray[Any]) -> Values:
    """Returns the ratio of two sums over units plus what each unit adds to it, to first order.

    The mean of the returned values is the ratio, and their variance over n is that of the ratio (delta method): a
    ratio, such as violations over slates, can so be treated as a mean over users, however many slates each has seen.

    Args:
        numerators: ``(n,)`` one sum for each unit.
        denominators: ``(n,)``, none negative and not all 0.

    Raises:
        ValueError: A negative denominator, only zeros, arrays of different size, or values that are not finite.
    """
    above, below = _finite(numerators, 1), _finite(denominators, 1)
    if len(above) != len(below):
        raise ValueError(f"need columns of one size, got sizes {[len(above), len(below)]}")
    if (below < 0).any() or not below.any():
        raise ValueError("denominators must not be negative, nor all 0")
    ratio = above.sum() / below.sum()
    return np.asarray(ratio + (above - ratio * below) / below.mean())


def interquartile_mean(scores: NDArray[Any]) -> Values:
    """Returns the mean of the middle half along the last axis (IQM; Agarwal et al., NeurIPS 2021).

    A quarter of the values, rounded down, is dropped at either end: below four values nothing is.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.asarray(scores, np.float64), 0.25, axis=-1))


def stratified_interval(scores: NDArray[Any], *, resamples: int = 50_000) -> Interval:
    """Returns the IQM of all runs with its 95 % interval, resampling seeds within tasks (Agarwal et al., 2021).

    Percentiles of a bootstrap of ten seeds are too narrow; these are moved outwards by :func:`few_seeds_factor`.

    Args:
        scores: ``(S, T)`` normalised scores of S seeds on T tasks (data set and horizon).
        resamples: Number of resamples.

    Raises:
        ValueError: Fewer than two seeds, or values that are not finite.
    """
    table = _finite(scores, 2)
    _check_two(len(table), "seeds")

    def draw(rows: int, rng: np.random.Generator) -> Values:
        return interquartile_mean(_resample_within_tasks(table, rows, rng).reshape(rows, -1))

    estimate = float(interquartile_mean(table.reshape(1, -1))[0])
    low, high = _percentiles(draw, table.size, _LEVEL, resamples)
    factor = few_seeds_factor(table)
    return Interval(
        estimate, estimate - factor * float(estimate - low), estimate + factor * float(high - estimate), _LEVEL
    )


def few_seeds_factor(scores: NDArray[Any]) -> float:
    """Returns by how much a 95 % percentile interval of few seeds is too short (Hesterberg, 2015).

    A bootstrap of S seeds takes a variance for known that is estimated, and divides by S where S - 1 is unbiased. The
    factor is ``sqrt(S / (S - 1)) t / z`` with Student's quantile and the normal one; degrees of freedom of several
    tasks are Satterthwaite's.

    Args:
        scores: ``(S, T)`` scores of S seeds on T tasks.
    """
    n_seeds = len(scores)
    variances = scores.var(axis=0, ddof=1)
    squares = float((variances**2).sum())
    freedom = (n_seeds - 1) * (float(variances.sum()) ** 2 / squares if squares > 0.0 else 1.0)
    at = (1.0 + _LEVEL) / 2.0
    return float(np.sqrt(n_seeds / (n_seeds - 1)) * stdtrit(freedom, at) / ndtri(at))


def probability_of_improvement(first: NDArray[Any], second: NDArray[Any]) -> Interval:
    """Returns the probability that a run of one method beats a run of the other, P(X > Y), averaged over tasks.

    Within a task it is Mann and Whitney's U over the number of pairs, a tie counting one half (Agarwal et al., 2021).
    The 95 % interval holds every probability ``p`` from which U is no further than Student's quantile times the
    standard error that it has at ``p`` (Newcombe, 2006, method 5): it stays inside [0, 1], and where every run of one
    method beats every run of the other it says how few these are, which a bootstrap does not.

    Args:
        first: ``(S, T)`` scores of one method for S seeds on T tasks.
        second: ``(S', T)`` scores of the other method.

    Raises:
        ValueError: Different tasks, fewer than two seeds, or values that are not finite.
    """
    # A fifth of what every worker of a study would import.
    from scipy.optimize import brentq

    x, y = _finite(first, 2), _finite(second, 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"both methods need the same tasks, got {x.shape[1]} and {y.shape[1]}")
    _check_two(min(len(x), len(y)), "seeds of each method")
    share = float(win_rate(x, y))
    quantile = float(stdtrit((len(x) + len(y) - 2) * x.shape[1], (1.0 + _LEVEL) / 2.0))

    def beyond(p: float) -> float:
        """Returns by how much p is further from the share than the quantile allows."""
        more = ((len(x) + len(y)) / 2.0 - 1.0) * ((1.0 - p) / (2.0 - p) + p / (1.0 + p))
        variance = p * (1.0 - p) * (1.0 + more) / (x.size * len(y))
        return abs(share - p) - quantile * float(np.sqrt(variance))

    low = 0.0 if share < _ROUNDING else brentq(beyond, 0.0, share - _ROUNDING)
    high = 1.0 if share > 1.0 - _ROUNDING else brentq(beyond, share + _ROUNDING, 1.0)
    return Interval(share, low, high, _LEVEL)


def win_rate(x: Values, y: Values) -> Values:
    """Returns P(X > Y) + P(X = Y) / 2 over all pairs of runs: ``(...)`` of ``(..., S, T)`` and ``(..., S', T)``."""
    gap = np.sign(x[..., :, None, :] - y[..., None, :, :])
    return np.asarray(0.5 + 0.5 * gap.mean(axis=(-3, -2, -1)))


@dataclass(frozen=True)
class Profile:
    """A performance profile with its pointwise band, from ``low`` to ``high``.

    Attributes:
        thresholds: ``(n,)`` scores, increasing.
        share: ``(n,)`` share of runs, over seeds and tasks, whose score is above each threshold.
    """

    thresholds: Values
    share: Values
    low: Values
    high: Values


def performance_profile(scores: NDArray[Any], thresholds: NDArray[Any], *, resamples: int = 2_000) -> Profile:
    """Returns the performance profile of a method, with its 95 % stratified bootstrap band (Agarwal et al.).

    Args:
        scores: ``(S, T)`` normalised scores of S training seeds on T tasks (world and horizon).
        thresholds: ``(n,)`` increasing.
        resamples: Number of resamples of the seeds within each task.

    Raises:
        ValueError: Thresholds that do not increase, fewer than two seeds, or scores that are not finite.
    """
    at = np.asarray(thresholds, np.float64)
    if at.ndim != 1 or not len(at) or not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise ValueError("thresholds must be one increasing list of finite numbers")
    table = _finite(scores, 2)
    _check_two(len(table), "seeds")

    def above(values: Values) -> Values:
        return np.asarray((values[..., None] > at).mean(axis=-2))

    def draw(rows: int, rng: np.random.Generator) -> Values:
        return above(_resample_within_tasks(table, rows, rng).reshape(rows, -1))

    low, high = _percentiles(draw, table.size * len(at), _LEVEL, resamples)
    return Profile(at, above(table.ravel()), low, high)


def holm(p_values: NDArray[Any]) -> Values:
    """Returns p-values adjusted for having made all these tests (Holm, 1979).

    Claiming each difference whose adjusted value is at most ``alpha`` claims a false one with probability at most
    ``alpha``, whatever the dependence between the tests.

    Args:
        p_values: ``(m,)`` in [0, 1], in any order.

    Returns:
        ``(m,)`` in the same order.

    Raises:
        ValueError: If it is not one list of probabilities.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1:
        raise ValueError(f"need one list of p-values, got shape {p.shape}")
    if not ((p >= 0.0) & (p <= 1.0)).all():
        raise ValueError("p-values lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def sign_flip_test(differences: NDArray[Any], *, draws: int = 20_000) -> float:
    """Returns the two-sided p-value of a mean difference of 0, by flipping signs (Fisher, 1935).

    If neither method is better, each difference might as well have had the other sign. Up to 16 differences all
    sign patterns are counted, so the value is exact, and never below ``2 / 2^n``: with fewer than six no difference
    is significant at 0.05, however large. Training seeds of two methods are no pairs, and need another test.

    Args:
        differences: ``(n,)`` paired differences of independent units, such as users whom two controls met.
        draws: Random sign patterns for more than 16 differences.

    Raises:
        ValueError: If there are no differences, or they are not finite.
    """
    values = _finite(differences, 1)
    n = len(values)
    # Sums of the same numbers in another order differ in their last digits; they count as equal.
    threshold = abs(values.sum()) - _ROUNDING * np.abs(values).sum()
    if n <= _EXACT_UP_TO:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2.0 * patterns - 1.0) @ values) >= threshold).mean())
    rng = np.random.default_rng(0)
    extreme = 0
    for rows in _chunks(draws, n):
        signs = 2.0 * rng.integers(2, size=(rows, n)) - 1.0
        extreme += int((np.abs(signs @ values) >= threshold).sum())
    return (1 + extreme) / (1 + draws)


def _interval(
    estimate: float,
    draw: Callable[[int, np.random.Generator], Values],
    size: int,
    level: float,
    resamples: int,
    seed: int = 0,
) -> Interval:
    low, high = _percentiles(draw, size, level, resamples, seed)
    return Interval(estimate, float(low), float(high), level)


def _percentiles(
    draw: Callable[[int, np.random.Generator], Values], size: int, level: float, resamples: int, seed: int = 0
) -> tuple[Values, Values]:
    """Returns both ends of a percentile interval.

    ``draw`` returns the statistic of so many resamples, ``(rows, ...)``, each of which takes ``size`` numbers.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    draws = np.concatenate([draw(rows, rng) for rows in _chunks(resamples, size)])
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
    return low, high


def _chunks(resamples: int, size: int) -> list[int]:
    """Returns numbers of resamples that add up to all of them, each small enough to be held in memory."""
    step = max(1, _CHUNK // size)
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def _resample_within_tasks(table: Values, rows: int, rng: np.random.Generator) -> Values:
    """Returns ``(rows, S, T)`` of ``(S, T)``: seeds drawn anew for each task."""
    n_seeds, n_tasks = table.shape
    return table[rng.integers(n_seeds, size=(rows, n_seeds, n_tasks)), np.arange(n_tasks)]


def _finite(values: NDArray[Any], dimensions: int) -> Values:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"need a non-empty array of {dimensions} dimensions, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite; a missing result is not a result")
    return array


def _check_two(number: int, what: str) -> None:
    if number < 2:
        raise ValueError(f"an interval needs at least two {what}")
