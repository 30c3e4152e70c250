"""How good single slates are: the normalised discounted gain by the true click probability."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def top_gains(relevance: NDArray[Any], slate_size: int) -> NDArray[np.float64]:
    """Returns the ``slate_size`` largest gains among each user's candidates, largest first: the ideal slate.

    Args:
        relevance: ``(S, N)`` true gain (click probability) of each candidate.
        slate_size: K, at most N.

    Returns:
        ``float64 (S, K)``.

    Raises:
        ValueError: K is not in ``1 .. N``.
    """
    gains = np.asarray(relevance, np.float64)
    if gains.ndim != 2 or not 1 <= slate_size <= gains.shape[1]:
        raise ValueError(f"need (S, N) gains with at least {slate_size} candidates, got shape {gains.shape}")
    largest = np.partition(gains, gains.shape[1] - slate_size, axis=1)[:, gains.shape[1] - slate_size :]
    return np.sort(largest, axis=1)[:, ::-1]


def ndcg(gains: NDArray[Any], ideal: NDArray[Any]) -> NDArray[np.float64]:
    """Returns R-NDCG@K of each slate: its discounted true gain over that of the best slate possible.

    The gain is the true click probability and the discount ``1 / log2(1 + rank)``, as in scikit-learn.

    Args:
        gains: ``(S, K)`` true gain of each item of each slate, in slate order.
        ideal: ``(S, K)`` gains of the ideal slate (:func:`top_gains`).

    Returns:
        ``float64 (S,)`` in [0, 1]; 0 where no candidate has any gain.

    Raises:
        ValueError: The shapes differ, or a gain is negative.
    """
    actual, best = np.asarray(gains, np.float64), np.asarray(ideal, np.float64)
    if actual.ndim != 2 or actual.shape != best.shape:
        raise ValueError(f"gains and ideal must both be (S, K), got {actual.shape} and {best.shape}")
    if (actual < 0).any() or (best < 0).any():
        raise ValueError("gains must not be negative")
    discount = 1.0 / np.log2(np.arange(2.0, actual.shape[1] + 2.0))
    reachable = best @ discount
    return np.divide(actual @ discount, reachable, out=np.zeros(len(actual)), where=reachable > 0)
