"""Intervals and tests against scipy, rliable, closed forms and enumeration, and against how often they hold true."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hrl_policies.study.statistics import (
    bootstrap,
    few_seeds_factor,
    holm,
    interquartile_mean,
    linearised_ratio,
    mean_interval,
    performance_profile,
    probability_of_improvement,
    sign_flip_test,
    stratified_interval,
    student_interval,
)
from kuaifair_env.intervals import Interval, crossed_mean, rate_interval

values = st.floats(-100, 100, allow_subnormal=False)


def close(interval, low, high, within):
    assert interval.low == pytest.approx(low, abs=within)
    assert interval.high == pytest.approx(high, abs=within)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_students_interval_is_scipys(level):
    lengths = np.random.default_rng(1).gamma(4.0, 5.0, 6)
    interval = student_interval(lengths, level=level)
    assert interval.estimate == pytest.approx(lengths.mean())
    reference = stats.t.interval(level, 5, lengths.mean(), stats.sem(lengths))
    assert (interval.low, interval.high) == pytest.approx(reference)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_mean_interval_is_scipys(level):
    lengths = np.random.default_rng(1).gamma(4.0, 5.0, 80)
    reference = stats.bootstrap(
        (lengths,), np.mean, confidence_level=level, n_resamples=20_000, method="percentile", random_state=7
    ).confidence_interval
    mine = mean_interval(lengths, level=level, resamples=20_000)
    assert mine.estimate == pytest.approx(lengths.mean())
    assert mine.level == level
    close(mine, reference.low, reference.high, within=0.06)


def test_any_statistic_can_be_bootstrapped():
    scores = np.random.default_rng(3).normal(size=101)
    reference = stats.bootstrap((scores,), np.median, n_resamples=20_000, method="percentile", random_state=1)
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
        interval = mean_interval(rng.exponential(1.0, 100), level=0.9, resamples=400, seed=int(rng.integers(1 << 30)))
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


# --- rates --------------------------------------------------------------------------------------------------


def test_a_linearised_ratio_is_the_ratio_with_the_variance_of_the_jackknife():
    rng = np.random.default_rng(2)
    slates = rng.integers(5, 30, 400).astype(float)
    punished = rng.binomial(slates.astype(int), 0.2).astype(float)
    found = linearised_ratio(punished, slates)
    assert found.mean() == pytest.approx(punished.sum() / slates.sum())
    without = (punished.sum() - punished) / (slates.sum() - slates)
    jackknife = 399 / 400 * ((without - without.mean()) ** 2).sum()
    assert found.var(ddof=1) / 400 == pytest.approx(jackknife, rel=0.02)


def test_of_single_trials_a_rate_has_wilsons_interval():
    """Scipy's, but for Student's quantile and n - 1 in place of n, which many users make equal."""
    trials = np.zeros(20_000)
    trials[:6_000] = 1.0
    reference = stats.binomtest(6_000, 20_000).proportion_ci(method="wilson")
    found = rate_interval(trials[None])
    assert found.estimate == pytest.approx(0.3)
    close(found, reference.low, reference.high, within=2e-6)


def test_slates_of_one_user_do_not_count_as_independent():
    """Each user's slates, seen ten times over, tell no more than once."""
    users = np.random.default_rng(1).binomial(1, 0.2, 300).astype(float)
    once = rate_interval(linearised_ratio(users, np.ones(300))[None])
    ten_times = rate_interval(linearised_ratio(10 * users, np.full(300, 10.0))[None])
    assert (ten_times.low, ten_times.high) == pytest.approx((once.low, once.high))


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0.0, 0.0149), (1.0, 0.9851, 1.0)])
def test_a_rate_without_exception_has_a_one_sided_bound(rate, low, high):
    """By the rule of three: 3 / 200; with so large a rate, 200 users show no exception once in twenty times."""
    found = rate_interval(np.full((3, 200), rate))
    assert found.estimate == rate
    close(found, low, high, within=1e-4)
    assert pytest.approx(0.05, abs=5e-4) == (1 - 0.0149) ** 200


def test_a_rate_in_which_all_users_agree_is_still_not_certain():
    reference = stats.binomtest(50, 100).proportion_ci(method="wilson")
    found = rate_interval(np.full((1, 100), 0.5))
    close(found, reference.low, reference.high, within=1e-9)
    alike = rate_interval(np.full((3, 1), 0.5), units=100)
    assert (alike.low, alike.high) == (found.low, found.high)


def test_where_few_users_make_up_a_rate_its_interval_has_their_degrees_of_freedom():
    """Its ends are p with |rate - p| = t sqrt(p (1 - p) / n); t is that of a variance of values of such kurtosis."""
    table = np.zeros((3, 40))
    table[:, 0], table[:, 1], table[0, 2:10] = 0.9, 0.5, 0.1
    users, estimate = table.mean(axis=0), crossed_mean(table)
    freedom = 2 * 40 / (stats.kurtosis(users, fisher=False) - 1) * (estimate.variance / (users.var(ddof=1) / 40)) ** 2
    assert freedom < estimate.freedom
    found = rate_interval(table)
    trials = found.estimate * (1 - found.estimate) / estimate.variance
    for end in (found.low, found.high):
        expected = stats.t.ppf(0.975, freedom) * np.sqrt(end * (1 - end) / trials)
        assert abs(found.estimate - end) == pytest.approx(expected)


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(2, 12)), elements=st.floats(0, 1)))
def test_a_rates_interval_lies_inside_zero_and_one_and_is_never_empty(table):
    found = rate_interval(table)
    assert 0.0 <= found.low <= found.estimate <= found.high <= 1.0
    assert found.high > found.low


def share_of_intervals_that_hold(repetitions, rate, clustering, users=200):
    """How often the interval of a rate holds it: users with 5 to 15 slates each, and rates of their own (beta)."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(repetitions):
        slates = rng.integers(5, 16, users)
        alpha, beta = (share * (1 - clustering) / clustering for share in (rate, 1 - rate))
        punished = rng.binomial(slates, rng.beta(alpha, beta, users))
        found = rate_interval(linearised_ratio(punished, slates)[None])
        held += found.low <= rate <= found.high
    return held / repetitions


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("clustering", [0.1, 0.3, 0.9])
def test_a_rates_interval_holds_it_as_often_as_it_says(rate, clustering):
    assert 0.93 <= share_of_intervals_that_hold(2_000, rate, clustering) <= 0.97


def test_a_rare_rates_interval_holds_it_where_few_users_make_it_up():
    assert 0.93 <= share_of_intervals_that_hold(1_000, 0.01, 0.3) <= 0.97


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


def test_percentiles_of_few_seeds_are_moved_outwards():
    """Of one task, to the length of Student's interval, which the bootstrap's would have of many seeds."""
    normal = stats.norm.isf(0.025)
    for seeds in (2, 10):
        factor = few_seeds_factor(np.arange(seeds)[:, None])
        assert factor == pytest.approx(np.sqrt(seeds / (seeds - 1)) * stats.t.isf(0.025, seeds - 1) / normal)
    # Two tasks of one spread have twice the degrees of freedom; one that never varies has none to add.
    spread = np.arange(10.0)[:, None]
    twice, once = (few_seeds_factor(np.concatenate([spread, other], axis=1)) for other in (spread + 5, 0 * spread))
    assert twice == pytest.approx(np.sqrt(10 / 9) * stats.t.isf(0.025, 18) / normal)
    assert once == pytest.approx(few_seeds_factor(spread))
    assert few_seeds_factor(np.arange(2_000.0)[:, None]) == pytest.approx(1.0, abs=2e-3)


@pytest.mark.parametrize("seeds", [2, 3])
def test_two_and_three_seeds_have_a_wide_interval(seeds):
    """Nearly as Student's (of two: the range, by 1.41 / 1.96); the range alone holds the mean half of the time."""
    scores = np.random.default_rng(0).normal(size=(seeds, 1))
    found, students = stratified_interval(scores), student_interval(scores[:, 0])
    assert found.half_width > 0.7 * students.half_width


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "tasks"), [(5, 1), (10, 1), (5, 4), (10, 4)])
def test_stratified_intervals_hold_the_mean_about_as_often_as_they_say(seeds, tasks):
    """The interquartile mean of few seeds is one of few values, so no interval holds it exactly as often."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2_000):
        found = stratified_interval(rng.normal(size=(seeds, tasks)), resamples=400)
        held += found.low <= 0.0 <= found.high
    assert 0.92 <= held / 2_000 <= 0.98


def test_stratified_interval_of_one_task_is_scipys():
    scores = np.random.default_rng(8).normal(size=12)
    reference = stats.bootstrap(
        (scores,),
        lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        random_state=2,
    ).confidence_interval
    mine = stratified_interval(scores[:, None], resamples=20_000)
    assert mine.estimate == pytest.approx(stats.trim_mean(scores, 0.25))
    factor = few_seeds_factor(scores[:, None])
    ends = [mine.estimate + factor * (end - mine.estimate) for end in (reference.low, reference.high)]
    close(mine, *ends, within=0.03)


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
    certain, never = probability_of_improvement(high, low), probability_of_improvement(low, high)
    assert (certain.estimate, certain.high) == (1.0, 1.0) and (never.estimate, never.low) == (0.0, 0.0)
    # Of 25 pairs, though not independent ones, each won: no more than Wilson's interval of as many trials allows.
    assert 0.5 < certain.low < stats.binomtest(25, 25).proportion_ci(method="wilson").low
    assert never.high == pytest.approx(1 - certain.low)
    # Where all pairs are won, the end is as far as the variance of U there and Student's quantile put it.
    p = certain.low
    variance = p * (1 - p) * (1 + 4 * ((1 - p) / (2 - p) + p / (1 + p))) / 25
    assert 1 - p == pytest.approx(stats.t.ppf(0.975, 5 + 5 - 2) * np.sqrt(variance), rel=1e-6)
    two_tasks = probability_of_improvement(np.tile(high[:2], 2), np.tile(low[:3], 2))
    p = two_tasks.low
    variance = p * (1 - p) * (1 + 1.5 * ((1 - p) / (2 - p) + p / (1 + p))) / (4 * 3)
    assert 1 - p == pytest.approx(stats.t.ppf(0.975, (2 + 3 - 2) * 2) * np.sqrt(variance), rel=1e-6)
    tied = probability_of_improvement(np.ones((4, 1)), np.ones((4, 1)))
    assert tied.estimate == 0.5 and tied.low == pytest.approx(1 - tied.high) and tied.low < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(10, 10), (10, 5), (5, 5)])
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0])
def test_improvement_intervals_hold_the_probability_as_often_as_they_say(seeds, shift):
    """A percentile bootstrap holds it in .6 to .9 of these studies."""
    rng = np.random.default_rng(0)
    truth = stats.norm.cdf(shift / np.sqrt(2))
    held = 0
    for _ in range(2_000):
        found = probability_of_improvement(rng.normal(shift, 1.0, (seeds[0], 1)), rng.normal(size=(seeds[1], 1)))
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 2_000 <= 0.99


def test_half_the_width_of_an_interval():
    assert Interval(0.25, 0.1, 0.4, 0.95).half_width == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval(np.array([1.0])), "at least two units"),
        (lambda: student_interval(np.array([1.0])), "at least two units"),
        (lambda: mean_interval(np.array([])), "non-empty"),
        (lambda: mean_interval(np.array([1.0, np.nan])), "finite"),
        (lambda: mean_interval(np.ones((2, 2))), "1 dimensions"),
        (lambda: mean_interval(np.ones(3), level=1.0), "level"),
        (lambda: mean_interval(np.ones(3), resamples=0), "resamples"),
        (lambda: bootstrap(np.mean), "columns"),
        (lambda: linearised_ratio(np.ones(3), np.ones(2)), "one size"),
        (lambda: linearised_ratio(np.ones(2), np.array([1.0, -1.0])), "negative"),
        (lambda: linearised_ratio(np.ones(2), np.zeros(2)), "all 0"),
        (lambda: rate_interval(np.full((2, 3), 1.5)), "lies in"),
        (lambda: rate_interval(np.ones((1, 1))), "two units"),
        (lambda: stratified_interval(np.ones((1, 3))), "two seeds"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((2, 2))), "same tasks"),
        (lambda: probability_of_improvement(np.ones((2, 3)), np.ones((1, 3))), "seeds of each method"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- many tests ---------------------------------------------------------------------------------------------


probabilities = hnp.arrays(np.float64, st.integers(1, 6), elements=st.floats(0, 1))


def closed_test(p):
    """A hypothesis is rejected if every set of hypotheses that holds it is, each set by Bonferroni (Marcus, 1976)."""
    m = len(p)
    sets = [subset for size in range(1, m + 1) for subset in itertools.combinations(range(m), size)]
    of_set = {subset: min(1.0, len(subset) * min(p[i] for i in subset)) for subset in sets}
    return [max(value for subset, value in of_set.items() if i in subset) for i in range(m)]


@given(probabilities)
def test_holm_is_the_closed_test_with_bonferroni(p):
    assert holm(p) == pytest.approx(closed_test(p))


def test_holm_by_hand():
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.6, 0.6])) == pytest.approx([1.0, 1.0])
    assert holm(np.array([])).shape == (0,)


def test_holm_makes_false_claims_as_rarely_as_it_says():
    rng = np.random.default_rng(0)
    false = np.mean([(holm(rng.random(12)) <= 0.05).any() for _ in range(4_000)])
    assert false == pytest.approx(0.05, abs=0.012)
    uncorrected = np.mean([(rng.random(12) <= 0.05).any() for _ in range(4_000)])
    assert uncorrected > 0.4


@given(hnp.arrays(np.float64, st.integers(1, 7), elements=st.integers(-5, 5).map(float)))
def test_sign_flips_are_counted_one_by_one(differences):
    observed = abs(differences.sum())
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=len(differences))]
    assert sign_flip_test(differences) == pytest.approx(np.mean(np.asarray(sums) >= observed - 1e-9))


def test_sign_flips_are_scipys():
    differences = np.random.default_rng(1).normal(0.4, 1.0, 10)
    reference = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_test(differences) == pytest.approx(reference.pvalue)


@pytest.mark.parametrize(("seeds", "least"), [(1, 1.0), (3, 0.25), (6, 2 / 64), (10, 2 / 1024)])
def test_few_seeds_cannot_be_significant_however_large_the_difference(seeds, least):
    assert sign_flip_test(np.full(seeds, 1e6) + np.arange(seeds)) == pytest.approx(least)


def test_many_differences_are_drawn_and_agree_with_the_normal_limit():
    differences = np.random.default_rng(2).normal(0.12, 1.0, 400)
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert sign_flip_test(differences) == pytest.approx(2 * stats.norm.sf(abs(z)), abs=0.01)
    assert sign_flip_test(differences) == sign_flip_test(differences)
    assert sign_flip_test(np.ones(400), draws=99) == pytest.approx(0.01)


def test_rounding_does_not_hide_a_tie():
    """In binary, 0.1 + 0.2 - 0.3 is not 0; each pattern and its mirror still count as equal."""
    assert sign_flip_test(np.array([0.1, 0.2, 0.3])) == pytest.approx(0.25)
    assert sign_flip_test(np.array([0.1, 0.2, -0.3])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: holm(np.array([0.5, 1.2])), "lie in"),
        (lambda: holm(np.array([0.5, -0.2])), "lie in"),
        (lambda: holm(np.array([np.nan])), "lie in"),
        (lambda: holm(np.ones((2, 2))), "one list"),
        (lambda: sign_flip_test(np.array([])), "non-empty"),
        (lambda: sign_flip_test(np.array([1.0, np.nan])), "finite"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- against the reference library --------------------------------------------------------------------------

# The examples with which rliable (Agarwal et al., NeurIPS 2021) tests itself: runs by tasks.
X = np.array([[1.0, 2], [2, 2], [1, 1], [2, 1]])
Y = np.array([[1.0, 1], [2, 2], [3, 3]])
LARGE = np.arange(80.0).reshape(5, 16)


@pytest.fixture(scope="module")
def library():
    """The reference library.

    Its bootstrap comes from arch, whose time series (not used here) call a helper of pandas that pandas 3 changed; for
    the import the helper is replaced by one that does nothing.
    """
    pandas_helpers = pytest.importorskip("pandas.util._decorators")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(pandas_helpers, "deprecate_kwarg", lambda *_, **__: lambda function: function)
        return pytest.importorskip("rliable.library")


@pytest.fixture(scope="module")
def metrics(library):
    return pytest.importorskip("rliable.metrics")


def test_published_answers_of_the_reference_library_come_out():
    assert interquartile_mean(X.ravel()) == 1.5
    assert interquartile_mean(Y.ravel()) == 2.0
    assert probability_of_improvement(X, Y).estimate == pytest.approx(1 / 3)


@pytest.mark.parametrize("scores", [X, Y, LARGE, np.random.default_rng(0).gamma(2.0, 1.0, (7, 6))])
def test_estimates_are_the_reference_librarys(metrics, scores):
    assert interquartile_mean(scores.ravel()) == pytest.approx(metrics.aggregate_iqm(scores))
    other = scores[::-1] * 1.1
    assert probability_of_improvement(scores, other).estimate == pytest.approx(
        metrics.probability_of_improvement(scores, other)
    )


def test_stratified_interval_is_the_reference_librarys(library, metrics):
    np.random.seed(0)  # noqa: NPY002  (the library draws from numpy's global generator)
    points, intervals = library.get_interval_estimates(
        {"x": LARGE},
        lambda x: np.array([metrics.aggregate_iqm(x)]),
        reps=2_000,
    )
    mine = stratified_interval(LARGE, resamples=20_000)
    assert mine.estimate == pytest.approx(points["x"][0])
    low, high = mine.estimate + few_seeds_factor(LARGE) * (intervals["x"][:, 0] - mine.estimate)
    assert (mine.low, mine.high) == (pytest.approx(low, abs=1.0), pytest.approx(high, abs=1.0))


def test_improvement_interval_is_the_reference_librarys(library, metrics):
    rng = np.random.default_rng(4)
    x, y = rng.normal(0.4, 1.0, (6, 4)), rng.normal(0.0, 1.0, (8, 4))
    np.random.seed(1)  # noqa: NPY002
    _, intervals = library.get_interval_estimates(
        {"x,y": [x, y]}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=200
    )
    mine = probability_of_improvement(x, y)
    low, high = intervals["x,y"][:, 0]
    assert (mine.low, mine.high) == (pytest.approx(low, abs=0.04), pytest.approx(high, abs=0.04))


@pytest.mark.parametrize("scores", [X, LARGE / 80, np.random.default_rng(3).normal(0.5, 0.3, (6, 3))])
def test_profile_and_band_are_the_reference_librarys(library, scores):
    thresholds = np.array([0.0, 0.25, 0.5, 1.0, 1.5])
    np.random.seed(2)  # noqa: NPY002
    profiles, bands = library.create_performance_profile({"x": scores}, thresholds, reps=1_000)
    mine = performance_profile(scores, thresholds, resamples=8_000)
    assert mine.share == pytest.approx(profiles["x"])
    # A share moves in steps of one run of all.
    step = 1.0 / scores.size + 1e-9
    assert mine.low == pytest.approx(bands["x"][0], abs=step)
    assert mine.high == pytest.approx(bands["x"][1], abs=step)


def test_a_profile_counts_runs_above_and_falls():
    scores = np.random.default_rng(5).normal(size=(4, 3))
    thresholds = np.linspace(-3, 3, 31)
    profile = performance_profile(scores, thresholds, resamples=200)
    assert profile.share.tolist() == [sum(score > at for score in scores.ravel().tolist()) / 12 for at in thresholds]
    for curve in (profile.share, profile.low, profile.high):
        assert (np.diff(curve) <= 1e-12).all()
    assert (profile.low <= profile.share).all() and (profile.share <= profile.high).all()
    assert profile.share[0] == 1.0 and profile.share[-1] == 0.0


def test_a_run_at_the_threshold_is_not_above_it():
    assert performance_profile(np.full((3, 2), 0.5), np.array([0.4, 0.5]), resamples=10).share.tolist() == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("scores", "thresholds", "message"),
    [
        (X, np.array([0.5, 0.5]), "increasing"),
        (X, np.array([]), "increasing"),
        (X, np.array([0.0, np.nan]), "increasing"),
        (X[:1], np.array([0.0]), "two seeds"),
        (np.array([[1.0], [np.nan]]), np.array([0.0]), "finite"),
    ],
)
def test_what_has_no_profile_is_refused(scores, thresholds, message):
    with pytest.raises(ValueError, match=message):
        performance_profile(scores, thresholds)
