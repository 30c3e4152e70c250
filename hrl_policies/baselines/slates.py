"""The best slate for given scores when only some counts of popular items are allowed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.actions import top_k
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.leave import LeaveRule, TemperFairness, leave_rule
from kuaifair_env.metrics import slate_disparity, violates


def best_slates(
    scores: FloatArray,
    popular: BoolArray,
    counts: BoolArray,
    allowed: BoolArray | None = None,
) -> NDArray[np.int64]:
    """Returns, for each row, the slate of the largest total score whose number of popular items is allowed.

    Exact: for each count ``c`` the best slate is the best ``c`` popular and the best ``K - c`` long-tail items.
    Items come best first, equal scores by the smaller item; of equally good counts the smallest is taken. A row
    in which no allowed count can be filled gets the best slate of any count.

    Args:
        scores: ``float32 (B, N)``, finite.
        popular: ``bool (N,)``.
        counts: ``bool (K + 1,)`` or ``(B, K + 1)``; entry ``c`` says whether ``c`` popular items are allowed.
        allowed: ``bool (B, N)``, items that may be shown, or None for all.

    Returns:
        ``int64 (B, K)``.

    Raises:
        ValueError: If a row has fewer than ``K`` items to show, or a score is NaN.
    """
    slate_size = counts.shape[-1] - 1
    wanted = np.broadcast_to(counts, (len(scores), slate_size + 1))
    head = _best_of_group(scores, popular, slate_size, allowed)
    tail = _best_of_group(scores, ~popular, slate_size, allowed)
    totals = _totals(head.scores) + _totals(tail.scores)[:, ::-1]
    totals = np.where(wanted, totals, -np.inf)
    best = totals.argmax(axis=1)
    items = np.concatenate([head.items, tail.items], axis=1)
    values = np.concatenate([head.scores, tail.scores], axis=1)
    places = np.arange(slate_size)
    taken = np.concatenate([places < best[:, None], places < slate_size - best[:, None]], axis=1)
    order = np.lexsort((items, np.where(taken, -values, np.inf)), axis=1)[:, :slate_size]
    slates = np.take_along_axis(items, order, axis=1)
    stuck = np.isneginf(totals.max(axis=1))
    if stuck.any():
        slates[stuck] = top_k(scores[stuck], slate_size, None if allowed is None else allowed[stuck])
    return slates


class _Ranked:
    """The best ``K`` items of one group, ``(B, K)``; missing ones have score minus infinity."""

    def __init__(self, items: NDArray[np.int64], scores: NDArray[np.float64]) -> None:
        self.items = items
        self.scores = scores


def _best_of_group(
    scores: FloatArray, group: BoolArray, slate_size: int, allowed: BoolArray | None
) -> _Ranked:
    members = np.flatnonzero(group)
    items = np.zeros((len(scores), slate_size), np.int64)
    values = np.full((len(scores), slate_size), -np.inf)
    kept = min(slate_size, len(members))
    if kept:
        own = scores[:, members]
        if allowed is not None:
            own = np.where(allowed[:, members], own, np.float32(-np.inf))
        best = top_k(own, kept)
        items[:, :kept] = members[best]
        values[:, :kept] = np.take_along_axis(own, best, axis=1)
    return _Ranked(items, values)


def _totals(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ``(B, K + 1)``, the sum of the best 0, 1, ..., K scores."""
    return np.concatenate([np.zeros((len(scores), 1)), np.cumsum(scores, axis=1)], axis=1)


def fair_counts(rule: str | LeaveRule, slate_size: int) -> BoolArray:
    """Says which numbers of popular items in a slate of ``K`` a leave rule does not punish, as ``bool (K + 1,)``.

    All of them under rules that do not judge exposure. For rules over a window of several slates this treats the
    slate as the first; :class:`FairCounts` follows the window.
    """
    parts = _judging(rule)
    if parts is None:
        return np.ones(slate_size + 1, np.bool_)
    return _within_bound(parts, np.arange(slate_size + 1) / slate_size)


class FairCounts:
    """Which numbers of popular items each session of a batch can be shown now without breaking its leave rule.

    Follows windows of several slates exactly. First steps that a rule forgives are treated as if it judged them.

    Args:
        batch: The sessions.
    """

    def __init__(self, batch: SessionBatch) -> None:
        self._simulator = batch.simulator
        self._slate_size = batch.config.items_per_slate
        self._rule = _judging(batch.config.leave)
        self._fixed = fair_counts(batch.config.leave, self._slate_size)
        self._popular = batch.world.groups.popular
        window = None if self._rule is None else self._rule.window
        self._window = window or (10 if self._slate_size == 1 and self._rule is not None else 1)
        self._rows = np.arange(batch.batch_size)

    def now(self) -> BoolArray:
        """Returns ``bool (K + 1,)`` if the same for all sessions at all times, else ``bool (B, K + 1)``."""
        if self._rule is None or self._window == 1:
            return self._fixed
        steps = self._simulator.steps
        back = np.minimum(steps, self._window - 1)
        shown = self._simulator.shown(self._rows)
        places = np.arange(shown.shape[1])
        recent = (places >= (steps - back)[:, None]) & (places < steps[:, None])
        popular = (self._popular[shown].sum(axis=2) * recent).sum(axis=1)
        possible = popular[:, None] + np.arange(self._slate_size + 1)
        return _within_bound(self._rule, possible / (self._slate_size * (back + 1))[:, None])


def nearest_to_half(counts: BoolArray) -> BoolArray:
    """Keeps of the allowed counts those nearest to half a slate (two of them for odd slates).

    Where no count is allowed all are taken to be.

    Args:
        counts: ``bool (..., K + 1)``.
    """
    slate_size = counts.shape[-1] - 1
    usable = counts | ~counts.any(axis=-1, keepdims=True)
    distance = np.where(usable, np.abs(2 * np.arange(slate_size + 1) - slate_size), 2 * slate_size + 1)
    return np.asarray(usable & (distance == distance.min(axis=-1, keepdims=True)))


def _judging(rule: str | LeaveRule) -> TemperFairness | None:
    """Returns the rule if it punishes unequal exposure."""
    found = leave_rule(rule)
    return found if isinstance(found, TemperFairness) and found.unfair_penalty > 0 else None


def _within_bound(rule: TemperFairness, shares: NDArray[np.float64]) -> BoolArray:
    return ~violates(slate_disparity(shares, rule.mode, rule.target_share), rule.ad_bound)
