"""How good and how varied single slates are."""

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


def hit(clicks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Returns ``bool (S,)``, whether a ``(S, K)`` slate was clicked at all; the mean is the hit rate (HR)."""
    return np.asarray(np.asarray(clicks, np.bool_).any(axis=1))


def reciprocal_rank(clicks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns ``float64 (S,)``, 1 / rank of the first click in a ``(S, K)`` slate, or 0; the mean is MRR."""
    clicked = np.asarray(clicks, np.bool_)
    return np.where(clicked.any(axis=1), 1.0 / (clicked.argmax(axis=1) + 1.0), 0.0)


def intra_list_distance(items: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Returns ILD of each slate, the mean ``1 - cosine`` over its pairs of items (Ziegler et al., WWW 2005).

    Args:
        items: ``int (S, K)`` item rows, K at least 2.
        vectors: ``(N, d)`` one vector per item: embeddings, or tag membership as 0 and 1. A zero vector (an
            item without tags) is at distance 1 from every item.

    Returns:
        ``float64 (S,)``, in [0, 2], and in [0, 1] for tags.

    Raises:
        ValueError: Slates of one item have no pair.
    """
    slates = np.asarray(items)
    if slates.ndim != 2 or slates.shape[1] < 2:
        raise ValueError(f"items must be (S, K) with K at least 2, got shape {slates.shape}")
    table = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    units = np.divide(table, norms, out=np.zeros_like(table), where=norms > 0)
    shown = units[slates]
    # Over pairs the cosines sum to half of |sum of vectors|^2 - sum of |vector|^2: no K x K table needed.
    pair_cosines = 0.5 * ((shown.sum(axis=1) ** 2).sum(axis=1) - (shown**2).sum(axis=(1, 2)))
    size = slates.shape[1]
    return np.asarray(1.0 - pair_cosines / (size * (size - 1) / 2))
