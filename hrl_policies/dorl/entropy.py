"""The entropy term ``P_E`` of DORL: how varied the log is after what was shown last.

For every unordered tuple of the levels (tags) of the last ``k`` exposures of a user (``k`` = 1 and 2) the log holds a
distribution of the next exposure's level. Its entropy, divided by the log of the number of distinct levels that
followed, lies in [0, 1]; a tuple that the log does not hold, and a history that is too short, count 1. ``P_E`` is the
sum over ``k`` (Gao et al., SIGIR 2023, with the feature level of EasyRL4Rec instead of the item level of the first
release).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import PADDING
from kuaifair_env.world import World

if TYPE_CHECKING:
    import scipy.sparse as sp

_ROWS_AT_ONCE = 500_000
_DECILES = 10
_QUARTILES = 4


@dataclass(frozen=True)
class ItemLevels:
    """Groups of items whose sequences are counted.

    Attributes:
        members: ``bool (M, L)``, each item in at least one level.
        source: Description of the levels.
    """

    members: BoolArray
    source: str


def item_levels(world: World) -> ItemLevels:
    """Returns the levels of a world's items: their tags, or bins where no item has any.

    Items without a tag among tagged ones share one level. Bins are deciles of training exposures, crossed
    with quartiles of the duration where the items' features have one.
    """
    tags = world.data.items.tags
    if tags.any():
        untagged = ~tags.any(axis=1)
        return ItemLevels(np.column_stack([tags, untagged]) if untagged.any() else tags, "tags")
    code = _quantiles(world.data.train.exposures(len(tags)), _DECILES)
    source = "popularity deciles"
    features = world.data.items.features
    duration = [place for place, name in enumerate(features.names) if "duration" in name and "=" not in name]
    if duration:
        code = code * _QUARTILES + _quantiles(features.values[:, duration[0]], _QUARTILES)
        source += " x duration quartiles"
    return ItemLevels(code[:, None] == np.unique(code), source)


def _quantiles(values: NDArray[Any], bins: int) -> NDArray[np.int64]:
    """Returns the quantile bin of each value; equal values share a bin."""
    return np.searchsorted(np.sort(values), values, side="left") * bins // len(values)


class FeatureEntropy:
    """``P_E`` of items, given what was shown before them.

    For an item with several levels it is the mean over them, and over their combinations with the levels before.

    Args:
        singles: ``float32 (L,)``, entropy after each level.
        pairs: ``float32 (L, L)``, entropy after each unordered pair of levels; symmetric.
        levels: Levels of the items.
    """

    def __init__(self, singles: FloatArray, pairs: FloatArray, levels: ItemLevels) -> None:
        self.singles, self.pairs, self.levels = singles, pairs, levels
        members = levels.members.astype(np.float32)
        self._shares = members / members.sum(axis=1, keepdims=True)
        self._of_item = self._shares @ singles
        self._after_item = self._shares @ pairs

    @classmethod
    def of_log(cls, log: InteractionLog, levels: ItemLevels) -> FeatureEntropy:
        """Counts a log; every combination of the levels involved counts once.

        Args:
            log: Usually the training log; rows of a user in the order of exposure.
            levels: Levels of its items.
        """
        from scipy import sparse

        count = levels.members.shape[1]
        members = sparse.csr_matrix(levels.members.astype(np.int64))
        after_one = sparse.csr_matrix((count, count), dtype=np.int64)
        after_two = sparse.csr_matrix((count * count, count), dtype=np.int64)
        for low in range(0, len(log), _ROWS_AT_ONCE):
            rows = np.arange(max(low, 1), min(low + _ROWS_AT_ONCE, len(log)))
            rows = rows[log.users[rows] == log.users[rows - 1]]
            after_one = after_one + members[log.items[rows - 1]].T @ members[log.items[rows]]
            rows = rows[(rows > 1) & (log.users[rows] == log.users[rows - 2])]
            contexts = _unordered_pairs(members, log.items[rows - 2], log.items[rows - 1])
            after_two = after_two + contexts.T @ members[log.items[rows]]
        pairs = _normalised_entropies(after_two).reshape(count, count)
        # Pairs were counted above the diagonal only.
        return cls(_normalised_entropies(after_one), np.triu(pairs) + np.triu(pairs, 1).T, levels)

    def of_slates(self, previous: IntArray, slates: IntArray) -> FloatArray:
        """Returns ``P_E`` of every item, a slate's items taken as shown one after the other.

        Args:
            previous: ``(B,)``, the item shown before each slate, or ``PADDING``.
            slates: ``(B, K)``.

        Returns:
            ``float32 (B, K)``, within 0..2.
        """
        before = np.column_stack([previous, slates[:, :-1]])
        pair = np.einsum("bkl,bkl->bk", self._after_item[before], self._shares[slates])
        entropy: FloatArray = self._of_item[slates] + np.where(before == PADDING, np.float32(1.0), pair)
        return entropy


def _unordered_pairs(members: sp.csr_matrix, first: IntArray, second: IntArray) -> sp.csr_matrix:
    """Returns ``(rows, L * L)``, how often each unordered pair of levels occurs among those of two items."""
    from scipy import sparse

    count = members.shape[1]
    sizes = np.diff(members.indptr)
    combinations = sizes[first] * sizes[second]
    rows = np.repeat(np.arange(len(first)), combinations)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(combinations) - combinations, combinations)
    level = members.indices[members.indptr[first[rows]] + number // sizes[second[rows]]]
    other = members.indices[members.indptr[second[rows]] + number % sizes[second[rows]]]
    codes = np.minimum(level, other).astype(np.int64) * count + np.maximum(level, other)
    return sparse.csr_matrix((np.ones(len(rows), np.int64), (rows, codes)), shape=(len(first), count * count))


def _normalised_entropies(counts: sp.csr_matrix) -> FloatArray:
    """Returns the entropy of each row over the log of its number of non-zeros; 1 for empty rows, 0 for one entry."""
    counts = counts.tocsr()
    counts.sum_duplicates()
    distinct = np.diff(counts.indptr)
    rows = np.repeat(np.arange(len(distinct)), distinct)
    totals = np.bincount(rows, weights=counts.data, minlength=len(distinct))
    shares = counts.data / totals[rows]
    entropy = np.bincount(rows, weights=-shares * np.log(shares), minlength=len(distinct))
    normalised = entropy / np.log(np.maximum(distinct, 2))
    normalised = np.where(distinct > 1, normalised, np.where(distinct == 1, 0.0, 1.0))
    return np.minimum(normalised, 1.0).astype(np.float32)
