"""Several comparisons at once: exact tests over training seeds, and p-values that stay honest when many are read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXACT_UP_TO = 16
_ROUNDING = 1e-12
_CHUNK = 2_000_000


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
