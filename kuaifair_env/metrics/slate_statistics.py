"""Measures of slates: exposure and fairness counted as they come, and how well single slates rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.metrics import fairness
from kuaifair_env.metrics.fairness import slate_disparity

# What SlateStatistics adds up, besides exposures.
_SUMS = ("_shown", "_shown_popular", "_slates", "_violations", "_disparity", "_tail_share")


class ExposureCounter:
    """Counts how often each candidate was shown.

    Args:
        n_items: N, number of candidates.

    Attributes:
        counts: ``int64 (N,)``, live; copy it before changing it.
    """

    def __init__(self, n_items: int) -> None:
        if n_items < 1:
            raise ValueError(f"n_items must be at least 1, got {n_items}")
        self.counts: NDArray[np.int64] = np.zeros(n_items, np.int64)

    def add(self, items: NDArray[Any]) -> None:
        """Counts the items of some slates, rows of any shape, usually ``(B, K)``.

        Raises:
            ValueError: An item outside ``0 .. N - 1``; nothing is counted then.
        """
        shown = np.ravel(items)
        if not len(shown):
            return
        smallest, largest = int(shown.min()), int(shown.max())
        if smallest < 0 or largest >= len(self.counts):
            raise ValueError(f"item {smallest if smallest < 0 else largest} is outside 0..{len(self.counts) - 1}")
        np.add.at(self.counts, shown, 1)

    def clear(self) -> None:
        """Sets all counts to 0."""
        self.counts[:] = 0


@dataclass(frozen=True)
class FairnessReport:
    """Every exposure measure of a set of slates; see :mod:`fairness` for each formula.

    Attributes:
        slates: Number of slates.
        exposures: Number of exposures, which Gini, entropy and both coverages depend on.
        violation_rate: v, share of slates at or above the bound.
        absolute_difference: The paper's AD, pooled.
        signed_gap: AD with its sign: above 0, popular items get more than half.
        slate_absolute_difference: Mean ``|2p - 1|`` over slates.
        user_absolute_difference: Mean ``|2p_u - 1|`` over users.
        item_exposure_gap: Signed gap in exposure per item; 0 for random slates.
        coverage_gap: Signed gap in the fraction of the group ever shown.
        gini: Gini of exposure over all candidates.
        entropy: Normalised entropy of exposure over all candidates.
        coverage: Fraction of the candidates ever shown.
        top_share: Share of exposure of the most shown tenth of the candidates.
        average_popularity: ARP.
        long_tail_share: APLT, per slate.
        long_tail_count: ACLT, per slate.
        novelty: Mean self-information in bits.
    """

    slates: int
    exposures: int
    violation_rate: float
    absolute_difference: float
    signed_gap: float
    slate_absolute_difference: float
    user_absolute_difference: float
    item_exposure_gap: float
    coverage_gap: float
    gini: float
    entropy: float
    coverage: float
    top_share: float
    average_popularity: float
    long_tail_share: float
    long_tail_count: float
    novelty: float


class SlateStatistics:
    """Accumulates what :class:`FairnessReport` needs, in memory that does not grow with the number of slates.

    Args:
        popular: ``bool (N,)`` group of each candidate.
        training_exposures: ``(N,)`` exposures of each candidate in the training log.
        n_users: Number of users whose rows may occur.

    Raises:
        ValueError: The sizes do not fit, or a group is empty.
    """

    def __init__(self, popular: NDArray[np.bool_], training_exposures: NDArray[Any], n_users: int) -> None:
        if popular.ndim != 1 or popular.dtype != np.bool_ or popular.all() or not popular.any():
            raise ValueError("popular must be a bool vector with candidates in both groups")
        if np.shape(training_exposures) != popular.shape:
            raise ValueError(f"training_exposures must have one count for each of the {len(popular)} candidates")
        self._popular = popular
        self._training_exposures = np.asarray(training_exposures, np.float64)
        self._exposures = ExposureCounter(len(popular))
        self._shown: NDArray[np.int64] = np.zeros(n_users, np.int64)
        self._shown_popular: NDArray[np.int64] = np.zeros(n_users, np.int64)
        self._slates = 0
        self._violations = 0
        self._disparity = 0.0
        self._tail_share = 0.0

    def add(self, items: NDArray[Any], users: NDArray[Any], violations: NDArray[np.bool_]) -> None:
        """Counts one slate for each of B sessions.

        Args:
            items: ``int (B, K)`` item rows of each slate.
            users: ``int (B,)`` user row of each slate; a user may occur several times.
            violations: ``bool (B,)`` whether each slate was at or above the bound.

        Raises:
            ValueError: The shapes do not fit, or an item or user is out of range; nothing is counted then.
        """
        if items.ndim != 2 or users.shape != (len(items),) or violations.shape != users.shape:
            raise ValueError(
                f"need items (B, K), users (B,) and violations (B,), got {items.shape}, {users.shape} "
                f"and {violations.shape}"
            )
        if users.size and (users.min() < 0 or users.max() >= len(self._shown)):
            raise ValueError(f"a row of the users is outside 0..{len(self._shown) - 1}")
        self._exposures.add(items)
        popular_counts = self._popular[items].sum(axis=1)
        size = items.shape[1]
        shares = popular_counts / size
        np.add.at(self._shown, users, size)
        np.add.at(self._shown_popular, users, popular_counts)
        self._slates += len(items)
        self._violations += int(np.count_nonzero(violations))
        self._disparity += float(slate_disparity(shares).sum())
        self._tail_share += float((1.0 - shares).sum())

    def state(self) -> dict[str, Any]:
        """Returns everything added so far, as numbers and arrays by name."""
        return {"counts": self._exposures.counts} | {name: getattr(self, name) for name in _SUMS}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state` returned in place of everything added so far."""
        self._exposures.counts[:] = state["counts"]
        for name in _SUMS:
            setattr(self, name, state[name])

    def report(self) -> FairnessReport:
        """Returns the measures of everything added so far.

        Raises:
            ValueError: Nothing was added.
        """
        if not self._slates:
            raise ValueError("no slate was added")
        counts = self._exposures.counts
        return FairnessReport(
            slates=self._slates,
            exposures=int(counts.sum()),
            violation_rate=self._violations / self._slates,
            absolute_difference=fairness.absolute_difference(counts, self._popular),
            signed_gap=float(fairness.signed_gap(fairness.popular_share(counts, self._popular))),
            slate_absolute_difference=self._disparity / self._slates,
            user_absolute_difference=fairness.user_absolute_difference(self._shown_popular, self._shown),
            item_exposure_gap=fairness.item_exposure_gap(counts, self._popular),
            coverage_gap=fairness.coverage_gap(counts, self._popular),
            gini=fairness.gini(counts),
            entropy=fairness.normalised_entropy(counts),
            coverage=fairness.coverage(counts),
            top_share=fairness.top_share(counts),
            average_popularity=fairness.average_popularity(counts, self._training_exposures),
            long_tail_share=self._tail_share / self._slates,
            long_tail_count=float(counts[~self._popular].sum()) / self._slates,
            novelty=fairness.novelty(counts, self._training_exposures),
        )


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
    """Returns whether each slate of ``bool (S, K)`` clicks was clicked at all, ``bool (S,)``; the mean is HR."""
    return np.asarray(np.asarray(clicks, np.bool_).any(axis=1))


def reciprocal_rank(clicks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Returns 1 / rank of the first click in each slate, or 0 without a click; the mean is MRR.

    ``clicks`` are ``bool (S, K)`` in slate order, the ranks ``float64 (S,)``.
    """
    clicked = np.asarray(clicks, np.bool_)
    return np.where(clicked.any(axis=1), 1.0 / (clicked.argmax(axis=1) + 1.0), 0.0)


def intra_list_distance(items: NDArray[Any], vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Returns ILD of each slate, the mean ``1 - cosine`` over its pairs of items (Ziegler et al., WWW 2005).

    Args:
        items: ``int (S, K)`` item rows, K at least 2.
        vectors: ``(N, d)`` one vector per item: embeddings, or tag membership as 0 and 1. A zero vector (an item
            without tags) is at distance 1 from every item.

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
    unit_vectors = np.divide(table, norms, out=np.zeros_like(table), where=norms > 0)[slates]
    # Over pairs the cosines sum to half of |sum of vectors|^2 - sum of |vector|^2: no K x K table needed.
    pair_cosines = 0.5 * ((unit_vectors.sum(axis=1) ** 2).sum(axis=1) - (unit_vectors**2).sum(axis=(1, 2)))
    size = slates.shape[1]
    return np.asarray(1.0 - pair_cosines / (size * (size - 1) / 2))
