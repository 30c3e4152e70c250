"""Intervals and comparisons for results over seeds and users.

A claim is a difference with an interval, never a bold number. All intervals are bootstrap percentile
intervals with their own seed, so that the same results always give the same interval. Resample what was drawn
at random: users where one agent met many users, seeds where training was repeated, both where both vary.
Sessions of one user are not independent: sum or average them to one value per user first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Statistic = Callable[..., Values]
"""A function of one or more arrays ``(resamples, n)`` that reduces the last axis."""

_CHUNK = 2_000_000
"""Resampled numbers held in memory at a time."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: The statistic of the observed values.
        low: Lower end of the interval.
        high: Upper end of the interval.
        level: Nominal coverage, such as 0.95.
    """

    estimate: float
    low: float
    high: float
    level: float

    def excludes(self, value: float = 0.0) -> bool:
        """Says whether the value lies outside, as 0 does for a difference that may be claimed."""
        return not self.low <= value <= self.high

    def as_dict(self) -> dict[str, float]:
        """Returns a JSON-able copy."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    statistic: Statistic, *columns: NDArray[Any], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns the percentile interval of a statistic of independent units (Efron, 1979).

    Args:
        statistic: Called with each column resampled to ``(rows, n)``; returns ``(rows,)``.
        *columns: ``(n,)`` values of the n units (users, sessions or seeds), resampled together.
        level: Coverage.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: Fewer than two units, columns of different size, or values that are not finite.
    """
    data = [_finite(column, 1) for column in columns]
    if not data or len({len(column) for column in data}) != 1:
        raise ValueError(f"need columns of one size, got sizes {[len(column) for column in data]}")
    n = len(data[0])
    _need_two(n, "units")
    rng = np.random.default_rng(seed)
    draws = []
    for rows in _chunks(resamples, n):
        chosen = rng.integers(n, size=(rows, n))
        draws.append(statistic(*(column[chosen] for column in data)))
    estimate = statistic(*(column[None] for column in data))
    return _interval(float(estimate[0]), np.concatenate(draws), level)


def mean_interval(
    values: NDArray[Any], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Returns the mean of independent units with its interval; arguments as in :func:`bootstrap`."""
    return bootstrap(_mean, values, level=level, resamples=resamples, seed=seed)


def ratio_interval(
    numerators: NDArray[Any],
    denominators: NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Returns a ratio of sums with its interval, such as R_each from each user's reward and steps.

    Args:
        numerators: ``(n,)`` one sum for each unit.
        denominators: ``(n,)`` positive.
        level: Coverage.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: A denominator that is not positive, or see :func:`bootstrap`.
    """
    if not (np.asarray(denominators) > 0).all():
        raise ValueError("denominators must be positive")
    return bootstrap(_ratio, numerators, denominators, level=level, resamples=resamples, seed=seed)


def paired_difference(
    first: NDArray[Any],
    second: NDArray[Any],
    *,
    users: Literal["common", "nested"] = "common",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Returns the mean of ``first - second`` over training seeds and users, by a hierarchical bootstrap.

    Seeds are resampled first, then users. Evaluation users are the same for every seed here, and a user who
    favours one method favours it under every seed, so by default one resample of the users serves all seeds
    of a resample. ``nested`` draws users anew within each seed, which is right only where each seed met users
    of its own; for common users its intervals are too short.

    Args:
        first: ``(S, U)`` results of one method for S training seeds and U users.
        second: ``(S, U)`` results of the other method for the same seeds and users.
        users: Whether the seeds met the same users.
        level: Coverage.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: Shapes differ, fewer than two seeds or users, or values that are not finite.
    """
    a, b = _finite(first, 2), _finite(second, 2)
    if a.shape != b.shape:
        raise ValueError(f"both methods need the same seeds and users, got shapes {a.shape} and {b.shape}")
    difference = a - b
    n_seeds, n_users = difference.shape
    _need_two(n_seeds, "seeds (with one seed, use mean_interval on the users' differences)")
    _need_two(n_users, "users")
    if users not in ("common", "nested"):
        raise ValueError(f"unknown users={users!r}; choose 'common' or 'nested'")
    rng = np.random.default_rng(seed)
    resample = _resample_common if users == "common" else _resample_nested
    size = n_users if users == "common" else n_seeds * n_users
    draws = [resample(difference, rows, rng) for rows in _chunks(resamples, size)]
    return _interval(float(difference.mean()), np.concatenate(draws), level)


def interquartile_mean(scores: NDArray[Any]) -> Values:
    """Returns the mean of the middle half along the last axis (IQM; Agarwal et al., NeurIPS 2021).

    A quarter of the values, rounded down, is dropped at either end: below four values nothing is.
    """
    from scipy.stats import trim_mean

    return np.asarray(trim_mean(np.asarray(scores, np.float64), 0.25, axis=-1))


def stratified_interval(
    scores: NDArray[Any],
    statistic: Statistic = interquartile_mean,
    *,
    level: float = 0.95,
    resamples: int = 50_000,
    seed: int = 0,
) -> Interval:
    """Returns a statistic of all runs with its interval, resampling seeds within tasks (Agarwal et al.).

    Args:
        scores: ``(S, T)`` normalised scores of S seeds on T tasks (data set and horizon).
        statistic: Reduces ``(rows, S * T)`` to ``(rows,)``.
        level: Coverage.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: Fewer than two seeds, or values that are not finite.
    """
    table = _finite(scores, 2)
    _need_two(len(table), "seeds")
    rng = np.random.default_rng(seed)
    draws = [
        statistic(_resample_tasks(table, rows, rng).reshape(rows, -1))
        for rows in _chunks(resamples, table.size)
    ]
    return _interval(float(statistic(table.reshape(1, -1))[0]), np.concatenate(draws), level)


def probability_of_improvement(
    first: NDArray[Any],
    second: NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """Returns how likely a run of one method beats a run of the other, P(X > Y), averaged over tasks.

    Within a task it is Mann and Whitney's U over the number of pairs, a tie counting one half; seeds of
    either method are resampled within each task (Agarwal et al., 2021).

    Args:
        first: ``(S, T)`` scores of one method for S seeds on T tasks.
        second: ``(S', T)`` scores of the other method.
        level: Coverage.
        resamples: How many resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: Different tasks, fewer than two seeds, or values that are not finite.
    """
    x, y = _finite(first, 2), _finite(second, 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"both methods need the same tasks, got {x.shape[1]} and {y.shape[1]}")
    _need_two(min(len(x), len(y)), "seeds of each method")
    rng = np.random.default_rng(seed)
    draws = [
        _win_rate(_resample_tasks(x, rows, rng), _resample_tasks(y, rows, rng))
        for rows in _chunks(resamples, x.size * len(y))
    ]
    return _interval(float(_win_rate(x[None], y[None])[0]), np.concatenate(draws), level)


def _mean(values: Values) -> Values:
    return np.asarray(values.mean(axis=-1))


def _ratio(numerators: Values, denominators: Values) -> Values:
    return np.asarray(numerators.sum(axis=-1) / denominators.sum(axis=-1))


def _resample_common(difference: Values, rows: int, rng: np.random.Generator) -> Values:
    n_seeds, n_users = difference.shape
    seed_weights = _weights(rows, n_seeds, rng)
    user_weights = _weights(rows, n_users, rng)
    return np.asarray(((seed_weights @ difference) * user_weights).sum(axis=1))


def _resample_nested(difference: Values, rows: int, rng: np.random.Generator) -> Values:
    n_seeds, n_users = difference.shape
    seeds = rng.integers(n_seeds, size=(rows, n_seeds, 1))
    users = rng.integers(n_users, size=(rows, n_seeds, n_users))
    return np.asarray(difference[seeds, users].mean(axis=(1, 2)))


def _weights(rows: int, n: int, rng: np.random.Generator) -> Values:
    """Returns ``(rows, n)``: the share of each of n units in a resample of n."""
    cells = rng.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(cells.ravel(), minlength=rows * n).reshape(rows, n) / n


def _resample_tasks(table: Values, rows: int, rng: np.random.Generator) -> Values:
    n_seeds, n_tasks = table.shape
    return table[rng.integers(n_seeds, size=(rows, n_seeds, n_tasks)), np.arange(n_tasks)]


def _win_rate(x: Values, y: Values) -> Values:
    """Returns ``(rows,)`` P(X > Y) + P(X = Y) / 2 of ``(rows, S, T)`` against ``(rows, S', T)``."""
    gap = np.sign(x[:, :, None, :] - y[:, None, :, :])
    return np.asarray(0.5 + 0.5 * gap.mean(axis=(1, 2, 3)))


def _chunks(resamples: int, size: int) -> Iterator[int]:
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    step = max(1, _CHUNK // size)
    for start in range(0, resamples, step):
        yield min(step, resamples - start)


def _interval(estimate: float, draws: Values, level: float) -> Interval:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(estimate, float(low), float(high), level)


def _finite(values: NDArray[Any], dimensions: int) -> Values:
    array = np.asarray(values, np.float64)
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"need a non-empty array of {dimensions} dimensions, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("values must be finite; a missing result is not a result")
    return array


def _need_two(number: int, what: str) -> None:
    if number < 2:
        raise ValueError(f"an interval needs at least two {what}")


_EXACT_UP_TO = 16
_ROUNDING = 1e-12


def holm(p_values: NDArray[Any]) -> NDArray[np.float64]:
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


def sign_flip_test(differences: NDArray[Any], *, draws: int = 20_000, seed: int = 0) -> float:
    """Returns the two-sided p-value of a mean difference of 0, by flipping signs (Fisher, 1935).

    If neither method is better, each difference might as well have had the other sign. Up to 16 differences all
    sign patterns are counted, so the value is exact, and never below ``2 / 2^n``: with three seeds no difference is
    significant at 0.05, however large.

    Args:
        differences: ``(n,)`` differences of independent units: one number for each training seed, or for each user
            where both methods were run once.
        draws: Random sign patterns for more than 16 differences.
        seed: Their seed.

    Raises:
        ValueError: If there are no differences, or they are not finite.
    """
    values = np.asarray(differences, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"need one list of differences, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("differences must be finite; a missing result is not a result")
    n = len(values)
    # Sums of the same numbers in another order differ in their last digits; they count as equal.
    threshold = abs(values.sum()) - _ROUNDING * np.abs(values).sum()
    if n <= _EXACT_UP_TO:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2.0 * patterns - 1.0) @ values) >= threshold).mean())
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    extreme = 0
    for start in range(0, draws, step):
        signs = 2.0 * rng.integers(2, size=(min(step, draws - start), n)) - 1.0
        extreme += int((np.abs(signs @ values) >= threshold).sum())
    return (1 + extreme) / (1 + draws)
