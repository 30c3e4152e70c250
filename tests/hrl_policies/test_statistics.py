"""Intervals against scipy, against closed forms, and against how often they hold what they promise."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hrl_policies.study.statistics import (
    Interval,
    bootstrap,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
    ratio_interval,
    stratified_interval,
)

values = st.floats(-100, 100, allow_subnormal=False)


def close(interval, low, high, within):
    assert interval.low == pytest.approx(low, abs=within)
    assert interval.high == pytest.approx(high, abs=within)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_is_scipys(level):
    lengths = np.random.default_rng(1).gamma(4.0, 5.0, 80)
    reference = stats.bootstrap(
        (lengths,), np.mean, confidence_level=level, n_resamples=20_000, method="percentile", rng=7
    ).confidence_interval
    mine = mean_interval(lengths, level=level, resamples=20_000)
    assert mine.estimate == pytest.approx(lengths.mean())
    assert mine.level == level
    close(mine, reference.low, reference.high, within=0.06)


def test_ratio_interval_is_scipys():
    rng = np.random.default_rng(2)
    steps = rng.integers(5, 30, 60)
    rewards = steps * rng.beta(5, 2, 60)
    reference = stats.bootstrap(
        (rewards, steps),
        lambda r, n, axis: r.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=3,
    ).confidence_interval
    mine = ratio_interval(rewards, steps, resamples=20_000)
    assert mine.estimate == pytest.approx(rewards.sum() / steps.sum())
    close(mine, reference.low, reference.high, within=0.002)


def test_any_statistic_can_be_bootstrapped():
    scores = np.random.default_rng(3).normal(size=101)
    reference = stats.bootstrap((scores,), np.median, n_resamples=20_000, method="percentile", rng=1)
    mine = bootstrap(lambda x: np.median(x, axis=-1), scores, resamples=20_000)
    assert mine.estimate == pytest.approx(np.median(scores))
    close(mine, *reference.confidence_interval, within=0.05)


def test_interval_of_two_values_by_hand():
    """Resamples of (0, 1) have mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4."""
    assert mean_interval(np.array([0.0, 1.0]), level=0.9) == Interval(0.5, 0.0, 1.0, 0.9)
    assert mean_interval(np.array([0.0, 1.0]), level=0.4) == Interval(0.5, 0.5, 0.5, 0.4)


def test_mean_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(400):
        interval = mean_interval(
            rng.exponential(1.0, 100), level=0.9, resamples=400, seed=int(rng.integers(1 << 30))
        )
        hits += interval.low <= 1.0 <= interval.high
    assert hits / 400 == pytest.approx(0.88, abs=0.045)


def test_same_seed_same_interval_and_chunks_do_not_matter(monkeypatch):
    scores = np.random.default_rng(0).normal(size=50)
    once = mean_interval(scores, resamples=1000, seed=3)
    assert mean_interval(scores, resamples=1000, seed=3) == once
    assert mean_interval(scores, resamples=1000, seed=4) != once
    monkeypatch.setattr("hrl_policies.study.statistics._CHUNK", 333)
    assert mean_interval(scores, resamples=1000, seed=3) == once


@given(hnp.arrays(np.float64, st.integers(2, 20), elements=values), st.floats(0.5, 5), values)
def test_intervals_move_and_stretch_with_the_values(scores, scale, shift):
    plain = mean_interval(scores, resamples=200)
    moved = mean_interval(scale * scores + shift, resamples=200)
    assert plain.low <= plain.high
    assert scores.min() - 1e-9 <= plain.low
    assert plain.high <= scores.max() + 1e-9
    assert moved.estimate == pytest.approx(scale * plain.estimate + shift, abs=1e-6)
    assert moved.low == pytest.approx(scale * plain.low + shift, abs=1e-6)
    assert moved.high == pytest.approx(scale * plain.high + shift, abs=1e-6)


# --- paired differences -------------------------------------------------------------------------------------


def simulated_difference(rng, seeds=12, users=60, seed_sd=0.3, user_sd=1.0, noise_sd=0.3):
    """Differences around 0: what seeds, users and chance contribute."""
    return (
        rng.normal(0, seed_sd, (seeds, 1))
        + rng.normal(0, user_sd, (1, users))
        + rng.normal(0, noise_sd, (seeds, users))
    )


@pytest.mark.parametrize(("users", "low", "high"), [("common", 0.88, 1.0), ("nested", 0.0, 0.8)])
def test_common_users_must_be_resampled_together(users, low, high):
    """Where users favour a method under every seed, nested 95 % intervals hold the truth far too rarely."""
    rng = np.random.default_rng(9)
    hits = 0
    for _ in range(200):
        interval = paired_difference(
            simulated_difference(rng),
            np.zeros((12, 60)),
            users=users,
            resamples=300,
            seed=int(rng.integers(1 << 30)),
        )
        hits += not interval.excludes(0.0)
    assert low <= hits / 200 <= high


def test_pairing_removes_what_users_and_seeds_share():
    rng = np.random.default_rng(4)
    base = 10 * simulated_difference(rng, user_sd=3.0)
    better = base + 0.2 + rng.normal(0, 0.1, base.shape)
    interval = paired_difference(better, base, resamples=2000)
    assert interval.estimate == pytest.approx(0.2, abs=0.02)
    assert interval.excludes(0.0)
    assert paired_difference(base, better, resamples=2000).high < 0


@pytest.mark.parametrize("users", ["common", "nested"])
def test_difference_of_two_seeds_and_two_users_by_enumeration(users):
    first = np.array([[1.0, 2.1], [4.3, 8.9]])
    means = []
    pairs = list(itertools.product(range(2), repeat=2))
    for seeds in pairs:
        for users_of_first in pairs:
            for users_of_second in pairs if users == "nested" else [users_of_first]:
                drawn = [*first[seeds[0], users_of_first], *first[seeds[1], users_of_second]]
                means.append(np.mean(drawn))
    tail = 10.5 / 64  # between the steps of both distributions, which go by 1/16 and 1/64
    interval = paired_difference(first, np.zeros((2, 2)), users=users, level=1 - 2 * tail, resamples=20_000)
    assert interval.estimate == pytest.approx(first.mean())
    low, high = np.quantile(means, [tail, 1 - tail], method="inverted_cdf")
    close(interval, low, high, within=1e-9)
    whole = paired_difference(first, np.zeros((2, 2)), users=users, level=0.9999, resamples=20_000)
    close(whole, 1.0, 8.9, within=1e-9)


# --- runs over tasks ----------------------------------------------------------------------------------------


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 21)), elements=values))
def test_interquartile_mean_is_the_mean_of_the_middle_half(scores):
    n = scores.shape[1]
    middle = np.sort(scores, axis=1)[:, n // 4 : n - n // 4]
    assert interquartile_mean(scores) == pytest.approx(middle.mean(axis=1), abs=1e-9)


def test_interquartile_mean_forgets_outliers_only_from_four_values_on():
    assert interquartile_mean(np.array([0, 1, 1, 1000])) == pytest.approx(1.0)
    assert interquartile_mean(np.array([0, 1, 1000])) == pytest.approx(1001 / 3)


def test_stratified_interval_resamples_within_tasks():
    """Seeds of a task that always agree contribute no uncertainty, however far the tasks lie apart."""
    agreeing = np.tile([0.0, 10.0, 20.0], (5, 1))
    assert stratified_interval(agreeing, resamples=500) == Interval(10.0, 10.0, 10.0, 0.95)


def test_stratified_interval_of_one_task_is_scipys():
    scores = np.random.default_rng(8).normal(size=12)
    reference = stats.bootstrap(
        (scores,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=2,
    ).confidence_interval
    mine = stratified_interval(scores[:, None], resamples=20_000)
    assert mine.estimate == pytest.approx(stats.trim_mean(scores, 0.25))
    close(mine, reference.low, reference.high, within=0.03)


def test_probability_of_improvement_is_mann_whitneys_u():
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 8, (10, 4)), rng.integers(0, 7, (7, 4))
    expected = [stats.mannwhitneyu(x[:, task], y[:, task]).statistic / 70 for task in range(4)]
    forward = probability_of_improvement(x, y)
    assert forward.estimate == pytest.approx(np.mean(expected))
    assert forward.low <= forward.estimate <= forward.high
    assert probability_of_improvement(y, x).estimate == pytest.approx(1 - forward.estimate)


def test_certain_and_undecided_improvement():
    low, high = np.arange(5.0)[:, None], np.arange(5.0, 10.0)[:, None]
    assert probability_of_improvement(high, low) == Interval(1.0, 1.0, 1.0, 0.95)
    tied = probability_of_improvement(np.ones((4, 1)), np.ones((4, 1)))
    assert tied == Interval(0.5, 0.5, 0.5, 0.95)


def test_an_interval_reads_well():
    interval = Interval(0.25, 0.1, 0.4, 0.95)
    assert str(interval) == "0.250 [0.100, 0.400]"
    assert interval.excludes()
    assert not interval.excludes(0.4)
    assert interval.as_dict() == {"estimate": 0.25, "low": 0.1, "high": 0.4, "level": 0.95}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.array([1.0])), "at least two units"),
        (lambda: mean_interval(np.array([])), "non-empty"),
        (lambda: mean_interval(np.array([1.0, np.nan])), "finite"),
        (lambda: mean_interval(np.ones((2, 2))), "1 dimensions"),
        (lambda: mean_interval(np.ones(3), level=1.0), "level"),
        (lambda: mean_interval(np.ones(3), resamples=0), "resamples"),
        (lambda: bootstrap(np.mean), "columns"),
        (lambda: ratio_interval(np.ones(3), np.ones(2)), "one size"),
        (lambda: ratio_interval(np.ones(2), np.array([1.0, 0.0])), "positive"),
        (lambda: paired_difference(np.ones((2, 3)), np.ones((2, 2))), "same seeds and users"),
        (lambda: paired_difference(np.ones((1, 3)), np.ones((1, 3))), "mean_interval"),
        (lambda: paired_difference(np.ones((3, 1)), np.ones((3, 1))), "two users"),
        (lambda: paired_difference(np.ones((2, 2)), np.ones((2, 2)), users="all"), "common"),
        (lambda: stratified_interval(np.ones((1, 3))), "two seeds"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((2, 2))), "same tasks"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((1, 3))), "seeds of each method"),
    ],
)
def test_what_cannot_be_judged_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
