"""The best slate for given scores when only some counts of popular items are allowed."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kuaifair_env.abandonment import LeaveRule, TemperFairness, leave_rule
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.spaces import top_k

# Finite, so that what is masked has probability 0 and gradient 0, and never an undefined difference of infinities.
MASKED = -1e30


class SlateDistribution:
    """Plackett-Luce: items are drawn one after another, each in proportion to ``exp(logit)`` among those left.

    ``log p(a_1 .. a_K) = sum_j [psi_{a_j} - log sum_{i not in a_1 .. a_{j-1}} exp(psi_i)]`` (Luce, 1959; Plackett,
    1975).

    Args:
        logits: ``float32 (B, N)``, scores ``Psi``.
        slate_size: Items ``K`` of a slate.
        mask: ``bool (B, N)`` or ``(N,)``, items that may be shown; None allows all.

    Raises:
        ValueError: If there are fewer than ``K`` items.
    """

    def __init__(self, logits: Tensor, slate_size: int, mask: Tensor | None = None) -> None:
        if not 1 <= slate_size <= logits.shape[1]:
            raise ValueError(f"a slate has 1 to {logits.shape[1]} items, got {slate_size}")
        self.slate_size = slate_size
        self.logits = logits if mask is None else torch.where(mask, logits, MASKED)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates exactly, as the ``K`` largest of logits plus Gumbel noise, ``int64 (B, K)`` in order of drawing.

        Args:
            generator: Source of randomness; None takes torch's own.
        """
        return (self.logits + gumbel(self.logits, generator)).topk(self.slate_size, dim=1).indices

    def mode(self) -> Tensor:
        """Returns the likeliest slates: the ``K`` largest logits, largest first."""
        return self.logits.topk(self.slate_size, dim=1).indices

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``.

        Args:
            slates: ``int64 (B, K)``, distinct items.
        """
        chosen = self.logits.gather(1, slates)
        return chosen - _left(self.logits.scatter(1, slates, MASKED), chosen)

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of ordered slates, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the exact entropy of the first slot, ``float32 (B,)``."""
        return _entropy(self.logits)


class QuotaSlateDistribution:
    """A given number of popular items by Plackett-Luce among the popular, the rest by it among the long tail.

    This is eq. 6 with the price of popularity that makes the slate meet its constraint: within a group the price is a
    constant, which Plackett-Luce does not see.

    Args:
        logits: ``float32 (B, N)``.
        popular: ``bool (B, N)``.
        counts: ``int64 (B,)``, popular items in each slate.
        slate_size: Items ``K`` of a slate; each group holds as many, or no count asks for more.
    """

    def __init__(self, logits: Tensor, popular: Tensor, counts: Tensor, slate_size: int) -> None:
        self.slate_size = slate_size
        self._counts = counts[:, None]
        self._groups = (torch.where(popular, logits, MASKED), torch.where(popular, MASKED, logits))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates, popular items first, ``int64 (B, K)``; see :class:`SlateDistribution`."""
        return self._joined(*(group + gumbel(group, generator) for group in self._groups))

    def mode(self) -> Tensor:
        """Returns the likeliest slates, popular items first."""
        return self._joined(*self._groups)

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``."""
        first = torch.arange(self.slate_size, device=slates.device) < self._counts
        found = []
        for group, inside in zip(self._groups, (first, ~first), strict=True):
            chosen = torch.where(inside, group.gather(1, slates), MASKED)
            left = _left(group.scatter(1, slates, MASKED), chosen)
            found.append(torch.where(inside, chosen - left, 0.0))
        return found[0] + found[1]

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of slates, ordered within each group, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the mean entropy of the first slot of both groups, ``float32 (B,)``."""
        return (_entropy(self._groups[0]) + _entropy(self._groups[1])) / 2

    def _joined(self, popular: Tensor, tail: Tensor) -> Tensor:
        places = torch.arange(self.slate_size, device=popular.device).expand(len(popular), -1)
        head = popular.topk(self.slate_size, dim=1).indices
        rest = tail.topk(self.slate_size, dim=1).indices
        behind = (places - self._counts).clamp_min(0)
        return torch.where(places < self._counts, head, rest.gather(1, behind))


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns standard Gumbel noise of the shape of ``like``."""
    return -torch.empty_like(like).exponential_(generator=generator).clamp_min(1e-20).log()


def _left(rest: Tensor, chosen: Tensor) -> Tensor:
    """Returns, for each slot, the log of the mass that is left: its own and all later slots' and what is never shown.

    Summing up from the last slot adds positive terms only; subtracting prefixes from the whole would cancel.

    Args:
        rest: ``(B, N)``, logits of what the slate does not hold.
        chosen: ``(B, K)``, logits of the slots.
    """
    outside = rest.logsumexp(dim=1, keepdim=True)
    backwards = torch.cat([outside, chosen.flip(1)], dim=1).logcumsumexp(dim=1)
    return backwards[:, 1:].flip(1)


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs.clamp_min(MASKED / 10)).sum(dim=1)


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

    All of them under rules that do not evaluate exposure. For rules over a window of several slates this treats the
    slate as the first; :class:`FairCounts` follows the window.
    """
    parts = _temper_rule(rule)
    if parts is None:
        return np.ones(slate_size + 1, np.bool_)
    return _within_bound(parts, np.arange(slate_size + 1) / slate_size)


class FairCounts:
    """Which numbers of popular items each session of a batch can be shown now without breaking its leave rule.

    Follows windows of several slates exactly. First steps that a rule forgives are treated as if it evaluated them.

    Args:
        batch: The sessions.
    """

    def __init__(self, batch: SessionBatch) -> None:
        self._simulator = batch.simulator
        self._slate_size = batch.config.items_per_slate
        self._rule = _temper_rule(batch.config.leave)
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


def _temper_rule(rule: str | LeaveRule) -> TemperFairness | None:
    """Returns the rule if it punishes unequal exposure."""
    found = leave_rule(rule)
    return found if isinstance(found, TemperFairness) and found.unfair_penalty > 0 else None


def _within_bound(rule: TemperFairness, shares: NDArray[np.float64]) -> BoolArray:
    return ~violates(slate_disparity(shares, rule.mode, rule.target_share), rule.ad_bound)
