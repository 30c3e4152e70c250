"""Popularity groups: the most exposed share of the candidates is popular, the rest is the long tail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IdArray, IntArray
from kuaifair_env.errors import DataError

PopularitySource = Literal["train", "shown"]
"""``"train"``: exposures in the training log; ``"shown"``: the platform's own counts (``show_user_num``)."""

POPULAR_SHARE = 0.2
"""Share of the candidates that are popular, unless another is chosen."""


@dataclass(frozen=True)
class PopularityGroups:
    """The popularity group of every candidate item.

    Attributes:
        item_ids: ``(N,)``, distinct raw item ids, in the order of the candidates.
        counts: ``float64 (N,)``, the exposure counts that decide, at least 0.
        popular: ``bool (N,)``, True for the popular items; neither all nor none.
        source: Where the counts come from, such as ``"train"`` or ``"shown"``.
    """

    item_ids: IdArray
    counts: NDArray[np.float64]
    popular: BoolArray
    source: str

    def __len__(self) -> int:
        return len(self.item_ids)

    def popularity(self) -> FloatArray:
        """Returns ``float32 (N,)``, log1p exposure scaled to [0, 1]: the paper's p~_i for score penalties."""
        scaled = np.log1p(self.counts)
        low, high = scaled.min(), scaled.max()
        return np.asarray((scaled - low) / (high - low), np.float32)

    def describe(self) -> dict[str, Any]:
        """Returns source, sizes and the exposure that each group holds, JSON-able."""
        total = float(self.counts.sum())
        return {
            "source": self.source,
            "candidates": len(self),
            "popular": int(self.popular.sum()),
            "smallest_popular_count": float(self.counts[self.popular].min()),
            "largest_long_tail_count": float(self.counts[~self.popular].max()),
            "popular_share_of_exposure": float(self.counts[self.popular].sum()) / total,
        }


def popularity_groups(
    counts: NDArray[Any] | IntArray, ids: IdArray, share: float = POPULAR_SHARE, source: str = "train"
) -> PopularityGroups:
    """Calls the ``share`` of the candidates with the most exposures popular.

    ``round(share * N)`` items are popular, at least one and at most ``N - 1`` (halves round up). Items of
    equal count are ranked by id, the smaller id first, so the order of the candidates does not matter. Where
    all counts are equal there is no popularity, and groups by id alone would be arbitrary: that is an error.

    Args:
        counts: ``(N,)`` exposure counts, finite and at least 0.
        ids: ``(N,)`` distinct raw item ids.
        share: Share of popular items, in (0, 1).
        source: Where the counts come from, for reports.

    Returns:
        The groups, in the order of ``ids``.

    Raises:
        DataError: For fewer than two candidates, equal counts throughout, or values out of range.
    """
    item_ids = np.asarray(ids)
    weights = np.asarray(counts, np.float64)
    if item_ids.ndim != 1 or item_ids.dtype.kind not in "iuU" or weights.shape != item_ids.shape:
        raise DataError(
            f"need a vector of ids and one count each, got ids {item_ids.dtype} {item_ids.shape} "
            f"and counts {weights.shape}"
        )
    if not isinstance(share, Real) or not 0.0 < share < 1.0:
        raise DataError(f"share must be a number between 0 and 1, got {share!r}")
    if len(item_ids) < 2:
        raise DataError(f"{len(item_ids)} candidate(s): popularity groups need at least two items")
    if len(np.unique(item_ids)) != len(item_ids):
        raise DataError("item ids must be distinct")
    wrong = ~np.isfinite(weights) | (weights < 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"count of item {item_ids[row]} is {weights[row]}; counts are finite and at least 0")
    if weights.min() == weights.max():
        raise DataError(
            f"all {len(item_ids)} candidates have the same {source} count ({weights[0]:g}), so none is more "
            "popular; use another source of counts or a longer log"
        )
    n_popular = min(max(int(np.floor(share * len(item_ids) + 0.5)), 1), len(item_ids) - 1)
    ranking = np.lexsort((item_ids, -weights))
    popular = np.zeros(len(item_ids), np.bool_)
    popular[ranking[:n_popular]] = True
    return PopularityGroups(item_ids, weights, popular, source)


def log_popularity(exposures: NDArray[Any]) -> NDArray[np.float64]:
    """Returns the standardised log-popularity of items: ``log(1 + exposures)`` with mean 0 and standard deviation 1.

    Args:
        exposures: ``(N,)``, how often each item was shown.

    Returns:
        ``float64 (N,)``; zero where all counts are equal.
    """
    logs = np.log1p(exposures)
    return np.asarray((logs - logs.mean()) / max(float(logs.std()), 1e-6))


def groups_of(
    data: InteractionData,
    candidates: IntArray | None = None,
    share: float = POPULAR_SHARE,
    source: PopularitySource = "train",
) -> PopularityGroups:
    """Groups the candidates of a data set; the test log is never looked at.

    Args:
        data: The data set.
        candidates: Item rows, in the order of the result; None takes the whole catalogue.
        share: Share of popular items.
        source: Exposures in the training log, or the platform's counts.

    Raises:
        DataError: When ``source="shown"`` and the catalogue has no such counts, or for a positives-only log
            whose exposures are unknown and equal throughout.
    """
    sources: Mapping[str, NDArray[Any] | None] = {
        "train": data.train.exposures(len(data.items)),
        "shown": data.items.shown,
    }
    if source not in sources:
        raise DataError(f"popularity source {source!r} is unknown; take one of {', '.join(map(repr, sources))}")
    counts = sources[source]
    if counts is None:
        raise DataError(
            f"{data.provenance.name} has no 'shown' counts; use popularity='train' in gym.make, make_world and "
            "build_world, source='train' in kuaifair_env.data.groups_of"
        )
    rows = np.arange(len(data.items)) if candidates is None else np.asarray(candidates)
    return popularity_groups(counts[rows], data.items.ids[rows], share, source)
