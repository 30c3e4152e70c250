"""Engagement by hand, and session lengths from temper, reward and violations against simulation and publications."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuaifair_env.metrics import (
    constant_session_length,
    engagement,
    expected_length,
    implied_violation_rate,
    length_floor_and_ceiling,
    normalised_length,
    violation_probability,
)

rewards = st.floats(0, 1)
rates = st.floats(0, 1)
tempers = st.integers(2, 200)
twentieths = st.integers(0, 20).map(lambda n: n / 20)

# README of KuaiSim, whole-session baselines: depth, average reward; and what the formula makes of it by hand.
KUAISIM = [
    ("TD3", 14.63, 0.6476, 14.55),
    ("A2C", 14.02, 0.5950, 14.02),
    ("DDPG", 14.89, 0.6841, 14.94),
    ("HAC", 14.98, 0.6895, 15.00),
]


# T0, constant reward, steps when always penalised (without, with one step of grace), steps when never.
EXACT = [
    (30, 0.0, 10, 11, 15),
    (30, 0.5, 12, 13, 20),
    (30, 0.73, 13, 14, 23),
    (30, 0.788, 14, 14, 24),
    (30, 0.9, 14, 15, 27),
    (30, 1.0, 15, 16, 30),
    (50, 0.0, 17, 17, 25),
    (50, 0.5, 20, 21, 33),
    (50, 0.73, 22, 23, 39),
    (50, 0.9, 24, 24, 45),
    (50, 1.0, 25, 26, 50),
]


def simulate(temper, reward_of_step, violates_at_step, penalty=1.0, grace=0):
    """Plays the rule: pay for each step, leave below 1."""
    steps = 0
    while temper >= 1.0 - 1e-9:
        steps += 1
        temper -= min(max(2.0 - reward_of_step(steps), 0.0), 2.0)
        if steps > grace and violates_at_step(steps):
            temper -= penalty
    return steps


@pytest.mark.parametrize(("temper", "reward", "always", "always_with_grace", "never"), EXACT)
def test_sessions_of_constant_reward_last_as_counted_by_hand(temper, reward, always, always_with_grace, never):
    assert constant_session_length(temper, reward, penalised=True) == always
    assert constant_session_length(temper, reward, penalised=True, grace_steps=1) == always_with_grace
    assert constant_session_length(temper, reward, penalised=False) == never
    assert constant_session_length(temper, reward, penalised=False, grace_steps=1) == never


def test_a_temper_of_exactly_one_is_not_below_one_whatever_the_rounding():
    """30 steps of 1.1 leave 34 - 33 = 1, so there is a 31st; in binary 33 / 1.1 is less than 30."""
    assert 33 / (2.0 - 0.9) < 30
    assert constant_session_length(34, 0.9, penalised=False) == 31


@given(
    tempers,
    twentieths,
    st.booleans(),
    st.integers(0, 12),
    st.sampled_from([0.5, 1, 2]),
)
def test_exact_count_is_what_playing_the_rule_gives(temper, reward, penalised, grace, penalty):
    counted = constant_session_length(temper, reward, penalised=penalised, penalty=penalty, grace_steps=grace)
    assert counted == simulate(temper, lambda _: reward, lambda _: penalised, penalty, grace)


@given(tempers, rewards, st.booleans())
def test_formula_is_within_half_a_step_of_the_exact_count(temper, reward, penalised):
    exact = constant_session_length(temper, reward, penalised=penalised)
    assert abs(expected_length(temper, reward, float(penalised)) - exact) <= 0.5 + 1e-6


@pytest.mark.parametrize(("temper", "click", "violation"), list(product((30, 50), (0.3, 0.7, 0.9), (0.1, 0.5, 0.9))))
def test_formula_is_within_two_percent_of_random_sessions(temper, click, violation):
    rng = np.random.default_rng(7)
    sessions, horizon, slate = 4000, temper + 1, 10
    rewards_drawn = rng.binomial(slate, click, (sessions, horizon)) / slate
    violations = rng.random((sessions, horizon)) < violation
    left = temper - np.cumsum(2.0 - rewards_drawn + violations, axis=1)
    lengths = (left >= 1.0 - 1e-9).sum(axis=1) + 1
    seen = np.arange(horizon) < lengths[:, None]
    predicted = expected_length(temper, rewards_drawn[seen].mean(), violations[seen].mean())
    assert lengths.mean() == pytest.approx(predicted, rel=0.02)


def test_grace_counts_violations_that_cost_nothing():
    rng = np.random.default_rng(3)
    lengths = [simulate(30, lambda _: rng.binomial(10, 0.7) / 10, lambda _: True, grace=2) for _ in range(3000)]
    assert np.mean(lengths) == pytest.approx(expected_length(30, 0.7, 1.0, grace_steps=2), rel=0.02)
    assert np.mean(lengths) > expected_length(30, 0.7, 1.0) + 0.5


@pytest.mark.parametrize(("method", "depth", "reward", "by_hand"), KUAISIM)
def test_without_penalty_the_formula_gives_the_published_depths_of_kuaisim(method, depth, reward, by_hand):
    predicted = expected_length(20, reward, 0.0)
    assert predicted == pytest.approx(by_hand, abs=0.006)
    assert predicted == pytest.approx(depth, abs=0.1)


@given(tempers, rewards, rates)
def test_implied_rate_undoes_the_formula(temper, reward, rate):
    length = expected_length(temper, reward, rate)
    assert implied_violation_rate(length, temper, reward) == pytest.approx(rate, abs=1e-9)


@given(tempers, rewards, rates, st.floats(0.01, 3))
def test_length_lies_between_floor_and_ceiling_and_falls_with_violations(temper, reward, rate, penalty):
    floor, ceiling = length_floor_and_ceiling(temper, reward, penalty=penalty)
    length = expected_length(temper, reward, rate, penalty=penalty)
    assert floor - 1e-9 <= length <= ceiling + 1e-9
    assert -1e-9 <= normalised_length(length, temper, reward, penalty=penalty) <= 1 + 1e-9
    assert normalised_length(floor, temper, reward, penalty=penalty) == pytest.approx(0, abs=1e-9)
    assert normalised_length(ceiling, temper, reward, penalty=penalty) == pytest.approx(1)


def test_formula_takes_arrays():
    together = expected_length(np.array([30, 50]), np.array([0.5, 0.9]), np.array([0.2, 0.4]))
    assert together == pytest.approx([29 / 1.7 + 0.5, 49 / 1.5 + 0.5])


@pytest.mark.parametrize(("slate", "bound", "published"), [(6, 0.3, 0.688), (10, 0.3, 0.344), (20, 0.3, 0.263)])
def test_independent_half_and_half_slates_violate_as_often_as_published(slate, bound, published):
    assert violation_probability(0.5, slate, bound) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize(
    ("bound", "published"),
    [(0.3, (0.880, 0.437, 0.344, 0.437, 0.623, 0.880)), (0.1, (0.974, 0.799, 0.754, 0.799, 0.882, 0.974))],
)
def test_slates_of_ten_violate_as_often_as_published(bound, published):
    shares = np.array([0.2, 0.4, 0.5, 0.6, 0.685, 0.8])
    assert violation_probability(shares, 10, bound) == pytest.approx(published, abs=6e-4)


@pytest.mark.parametrize("mode", ["parity", "popular_only", "target"])
def test_violation_probability_is_the_sum_over_all_slates(mode):
    p, size, bound, target = 0.3, 5, 0.4, 0.2
    total = 0.0
    for slate in product((0, 1), repeat=size):
        share = sum(slate) / size
        u = {
            "parity": abs(2 * share - 1),
            "popular_only": max(0.0, 2 * share - 1),
            "target": abs(share - target) / max(target, 1 - target),
        }[mode]
        if u > bound or math.isclose(u, bound):
            total += p ** sum(slate) * (1 - p) ** (size - sum(slate))
    assert violation_probability(p, size, bound, mode, target) == pytest.approx(total)


def test_a_single_item_always_violates_and_a_certain_slate_is_certain():
    assert violation_probability(0.5, 1, 0.3) == pytest.approx(1.0)
    assert violation_probability(np.array([0.0, 1.0]), 10, 0.3) == pytest.approx([1.0, 1.0])
    assert violation_probability(0.0, 10, 0.3, "popular_only") == 0.0


def test_engagement_of_three_sessions_by_hand():
    result = engagement(np.array([10, 20, 30]), np.array([5.0, 4.0, 27.0]))
    assert result.sessions == 3
    assert result.length == 20
    assert result.cumulative_reward == 12
    assert result.reward_per_step == pytest.approx(36 / 60)
    assert result.reward_per_step_by_session == pytest.approx((0.5 + 0.2 + 0.9) / 3)
    assert result.length_deviation == pytest.approx(math.sqrt(200 / 3))


@given(hnp.arrays(np.int64, st.integers(1, 50), elements=st.integers(1, 100)), st.integers(0, 2**32 - 1))
def test_cumulative_reward_is_exactly_length_times_reward(lengths, seed):
    returns = np.random.default_rng(seed).random(len(lengths)) * lengths
    result = engagement(lengths, returns)
    assert result.length * result.reward_per_step == pytest.approx(result.cumulative_reward)
    per_session = returns / lengths
    assert per_session.min() - 1e-9 <= result.reward_per_step <= per_session.max() + 1e-9


@pytest.mark.parametrize(
    ("lengths", "returns"), [([], []), ([0, 3], [1.0, 1.0]), ([2, 3], [1.0]), ([2, 3], [1.0, math.nan])]
)
def test_engagement_of_incomplete_sessions_is_refused(lengths, returns):
    with pytest.raises(ValueError, match="session"):
        engagement(np.array(lengths, int), np.array(returns))


@pytest.mark.parametrize(
    "call",
    [
        lambda: expected_length(0.5, 0.5, 0.5),
        lambda: expected_length(math.nan, 0.5, 0.5),
        lambda: expected_length(30, 2.5, 0.5),
        lambda: expected_length(30, -0.1, 0.5),
        lambda: expected_length(30, math.nan, 0.5),
        lambda: expected_length(30, 0.5, -0.1),
        lambda: expected_length(30, 0.5, 0.5, penalty=-1),
        lambda: expected_length(30, 0.5, 0.5, grace_steps=-1),
        lambda: normalised_length(20, 1, 0.5),
        lambda: normalised_length(20, 30, 0.5, penalty=0.0),
        lambda: implied_violation_rate(0.5, 30, 0.5),
        lambda: violation_probability(1.2, 10, 0.3),
        lambda: violation_probability(0.5, 0, 0.3),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"must|coincide"):
        call()
