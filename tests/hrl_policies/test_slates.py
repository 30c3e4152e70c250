"""The best slate under a constraint is the one that trying every slate finds."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from helpers import small_world
from hypothesis import given
from hypothesis import strategies as st

from hrl_policies.controls import best_slates, fair_counts, fair_counts_now, nearest_to_half
from kuaifair_env.abandonment import TemperFairness
from kuaifair_env.batch import SessionBatch, SessionConfig


def best_by_trying(scores, popular, counts, allowed):
    """Total score of the best slate among all slates with an allowed number of popular items, or None."""
    k = len(counts) - 1
    totals = [
        scores[list(slate)].sum()
        for slate in combinations(np.flatnonzero(allowed), k)
        if counts[popular[list(slate)].sum()]
    ]
    return max(totals) if totals else None


@given(
    seed=st.integers(0, 10_000),
    n_items=st.integers(5, 9),
    slate_size=st.integers(1, 4),
    few_values=st.booleans(),
    masked=st.booleans(),
)
def test_no_allowed_slate_has_a_larger_total_score(seed, n_items, slate_size, few_values, masked):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (6, n_items)) if few_values else rng.normal(size=(6, n_items))
    scores = scores.astype(np.float32)
    popular = rng.random(n_items) < 0.4
    counts = rng.random((6, slate_size + 1)) < 0.6
    allowed = rng.random((6, n_items)) < 0.8 if masked else np.ones((6, n_items), bool)
    allowed[:, :slate_size] = True
    slates = best_slates(scores, popular, counts, allowed if masked else None)
    for row, slate in enumerate(slates):
        assert len(set(slate.tolist())) == slate_size
        assert allowed[row, slate].all()
        ranked = scores[row, slate]
        assert (np.diff(ranked) <= 0).all(), "best first"
        best = best_by_trying(scores[row], popular, counts[row], allowed[row])
        if best is None:
            best = np.sort(scores[row, allowed[row]])[::-1][:slate_size].sum()
        else:
            assert counts[row, popular[slate].sum()]
        assert ranked.sum() == pytest.approx(best, abs=1e-5)


def test_one_set_of_counts_serves_all_rows():
    scores = np.random.default_rng(0).normal(size=(4, 20)).astype(np.float32)
    popular = np.arange(20) < 4
    counts = np.zeros(6, bool)
    counts[2] = True
    assert (popular[best_slates(scores, popular, counts)].sum(axis=1) == 2).all()


@pytest.mark.parametrize(
    ("slate_size", "rule", "expected"),
    [
        (10, "temper", [4, 5, 6]),
        (6, "temper", [3]),
        (20, "temper", [7 + 1, 9, 10, 11, 12]),
        (5, "temper", [2, 3]),
        (10, "strict", [5]),
        (10, "popular_only", [0, 1, 2, 3, 4, 5, 6]),
        (4, "no_fairness", [0, 1, 2, 3, 4]),
        (4, "never", [0, 1, 2, 3, 4]),
        (10, TemperFairness(mode="target", target_share=0.2), [0, 1, 2, 3, 4]),
    ],
)
def test_fair_counts_are_those_that_the_rule_does_not_punish(slate_size, rule, expected):
    assert np.flatnonzero(fair_counts(rule, slate_size)).tolist() == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([4, 5, 6], [5]), ([4, 6], [4, 6]), ([0, 1, 2], [2]), ([], [5])],
)
def test_a_quota_takes_the_fair_count_nearest_to_half(counts, expected):
    mask = np.zeros(11, bool)
    mask[counts] = True
    assert np.flatnonzero(nearest_to_half(mask)).tolist() == expected


def test_odd_slates_have_two_nearest_counts():
    assert np.flatnonzero(nearest_to_half(np.ones(6, bool))).tolist() == [2, 3]


def test_over_a_window_exactly_the_counts_that_will_not_be_punished_are_fair():
    """Play random slates of two under a window of three and ask before each step what would be punished."""
    rule = TemperFairness(window=3)
    world = small_world(0.5)
    config = SessionConfig(slate_size=2, action_mode="slate", leave=rule, max_len=30)
    batch = SessionBatch(world, config, 16)
    batch.reset(np.arange(16))
    rng = np.random.default_rng(0)
    punished = 0
    for step in range(8):
        slates = np.argsort(rng.random((16, world.n_items)), axis=1)[:, :2]
        counts = world.groups.popular[slates].sum(axis=1)
        expected = np.take_along_axis(fair_counts_now(batch), counts[:, None], axis=1)[:, 0]
        violation = batch.step(slates).violation
        if step > 0:  # the rule forgives the first slate: it holds too few items to evaluate
            np.testing.assert_array_equal(expected, ~violation)
        punished += violation.sum()
    assert 0 < punished < 16 * 8
