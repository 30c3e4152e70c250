"""How many popular items a slate may hold: what leave rules do not punish."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import LeaveRuleLike, TemperFairness, leave_rule
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.metrics import slate_disparity, violates


def fair_counts(rule: LeaveRuleLike, slate_size: int) -> BoolArray:
    """Says which numbers of popular items in a slate of ``K`` a leave rule does not punish, as ``bool (K + 1,)``.

    All of them under rules that do not depend on exposure, or of which agents do not know on what share
    (``personal``). For rules over a window of several slates this treats the slate as the first;
    :func:`fair_counts_now` follows the window.
    """
    temper = _exposure_rule(rule)
    if temper is None:
        return np.ones(slate_size + 1, np.bool_)
    return _within_bound(temper, np.arange(slate_size + 1) / slate_size)


def fair_counts_now(batch: SessionBatch) -> BoolArray:
    """Says which numbers of popular items each session can be shown now without breaking its leave rule.

    Follows windows of several slates exactly. First steps that a rule forgives are treated as if it did not.

    Returns:
        ``bool (K + 1,)`` if the same for all sessions at all times, else ``bool (B, K + 1)``.
    """
    rule = _exposure_rule(batch.config.leave)
    if rule is None or rule.window_for(batch.config.items_per_slate) == 1:
        return fair_counts(batch.config.leave, batch.config.items_per_slate)
    return _within_bound(rule, _possible_shares(batch, rule))


def users_tolerance(batch: SessionBatch) -> NDArray[np.float64]:
    """Returns ``float64 (B,)``, the popular share that each current user tolerates (for privileged controls only)."""
    return batch.world.tolerated_shares[batch.simulator.users]


def tolerated_counts_now(batch: SessionBatch, tolerated: NDArray[np.float64]) -> BoolArray:
    """Says the same as :func:`fair_counts_now`, taking users to tolerate given popular shares, ``float64 (B,)``."""
    rule = leave_rule(batch.config.leave)
    if not isinstance(rule, TemperFairness) or rule.mode != "personal" or not rule.unfair_penalty:
        return fair_counts_now(batch)
    disparity = slate_disparity(_possible_shares(batch, rule), rule.mode, tolerated[:, None])
    return ~violates(disparity, rule.ad_bound)


def _possible_shares(batch: SessionBatch, rule: TemperFairness) -> NDArray[np.float64]:
    """Returns ``(B, K + 1)``, the popular share of the rule's window by the popular items in the next slate."""
    simulator, slate_size = batch.simulator, batch.config.items_per_slate
    before = np.minimum(simulator.steps, rule.window_for(slate_size) - 1)
    shown = simulator.shown(np.arange(batch.batch_size))
    recent = np.arange(shown.shape[1]) >= (shown.shape[1] - before)[:, None]
    items = np.where(recent[:, :, None], shown, 0)  # elsewhere there may be none
    popular = (batch.world.groups.popular[items].sum(axis=2) * recent).sum(axis=1)
    possible = popular[:, None] + np.arange(slate_size + 1)
    shares: NDArray[np.float64] = possible / (slate_size * (before + 1))[:, None]
    return shares


def _exposure_rule(rule: LeaveRuleLike) -> TemperFairness | None:
    """Returns the rule if it punishes unequal exposure, by a share that agents know."""
    rule = leave_rule(rule)
    known = isinstance(rule, TemperFairness) and rule.unfair_penalty > 0 and rule.mode != "personal"
    return rule if known else None  # type: ignore[return-value]


def _within_bound(rule: TemperFairness, shares: NDArray[np.float64]) -> BoolArray:
    return ~violates(slate_disparity(shares, rule.mode, rule.target_share), rule.ad_bound)
