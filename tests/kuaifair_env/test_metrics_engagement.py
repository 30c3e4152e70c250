"""Engagement by hand, and session lengths from temper, reward and violations against simulation and publications."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuaifair_env.metrics import (
    engagement,
    expected_length,
    implied_violation_rate,
    length_floor_and_ceiling,
    normalised_length,
)

rewards = st.floats(0, 1)
rates = st.floats(0, 1)
tempers = st.integers(2, 200)

# README of KuaiSim, whole-session baselines: depth, average reward; and what the formula makes of it by hand.
KUAISIM = [
    ("TD3", 14.63, 0.6476, 14.55),
    ("A2C", 14.02, 0.5950, 14.02),
    ("DDPG", 14.89, 0.6841, 14.94),
    ("HAC", 14.98, 0.6895, 15.00),
]


def simulate(temper, reward, penalised):
    """Plays the rule with constant rewards: pay for each step, leave below 1."""
    steps = 0
    while temper >= 1.0 - 1e-9:
        steps += 1
        temper -= 2.0 - reward + penalised
    return steps


@given(tempers, rewards, st.booleans())
def test_formula_is_within_half_a_step_of_constant_sessions(temper, reward, penalised):
    exact = simulate(temper, reward, penalised)
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


@pytest.mark.parametrize(("method", "depth", "reward", "by_hand"), KUAISIM)
def test_without_penalty_the_formula_gives_the_published_depths_of_kuaisim(method, depth, reward, by_hand):
    predicted = expected_length(20, reward, 0.0)
    assert predicted == pytest.approx(by_hand, abs=0.006)
    assert predicted == pytest.approx(depth, abs=0.1)


@given(tempers, rewards, rates)
def test_implied_rate_undoes_the_formula(temper, reward, rate):
    length = expected_length(temper, reward, rate)
    assert implied_violation_rate(length, temper, reward) == pytest.approx(rate, abs=1e-9)


@given(tempers, rewards, rates)
def test_length_lies_between_floor_and_ceiling_and_falls_with_violations(temper, reward, rate):
    floor, ceiling = length_floor_and_ceiling(temper, reward)
    length = expected_length(temper, reward, rate)
    assert floor - 1e-9 <= length <= ceiling + 1e-9
    assert -1e-9 <= normalised_length(length, temper, reward) <= 1 + 1e-9
    assert normalised_length(floor, temper, reward) == pytest.approx(0, abs=1e-9)
    assert normalised_length(ceiling, temper, reward) == pytest.approx(1)


def test_formula_takes_arrays():
    together = expected_length(np.array([30, 50]), np.array([0.5, 0.9]), np.array([0.2, 0.4]))
    assert together == pytest.approx([29 / 1.7 + 0.5, 49 / 1.5 + 0.5])


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
        lambda: expected_length(30, 1.5, 0.5),
        lambda: expected_length(30, math.nan, 0.5),
        lambda: expected_length(30, 0.5, -0.1),
        lambda: normalised_length(20, 1, 0.5),
        lambda: implied_violation_rate(0.5, 30, 0.5),
    ],
)
def test_impossible_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"must|coincide"):
        call()
