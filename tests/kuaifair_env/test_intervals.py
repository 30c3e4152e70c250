"""Means over seeds and users: against scipy, closed forms, and how often intervals hold and tests reject."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kuaifair_env.intervals import Estimate, crossed_difference, crossed_mean


def standard_error(estimate):
    return np.sqrt(estimate.variance)


def test_one_row_and_one_column_are_students_one_sample_test():
    values = np.random.default_rng(0).normal(0.3, 1.0, 12)
    reference = stats.ttest_1samp(values, 0.0)
    for table in (values[None], values[:, None]):
        found = crossed_mean(table)
        assert (found.value, found.freedom) == (pytest.approx(values.mean()), 11)
        assert found.p_value() == pytest.approx(reference.pvalue)
        ends = reference.confidence_interval(0.9)
        assert found.value - found.half_width(0.9) == pytest.approx(ends.low)
        assert found.value + found.half_width(0.9) == pytest.approx(ends.high)
        assert found.half_width() == pytest.approx(found.half_width(0.95))
        assert found.quantile() == pytest.approx(stats.t.ppf(0.975, 11))


def test_where_users_do_not_matter_a_difference_is_welchs_test():
    """Users who all behave alike leave the seeds' means, which Welch's test compares."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.5, 1.0, 10), rng.normal(0.0, 2.0, 5)
    found = crossed_difference(np.repeat(first[:, None], 40, axis=1), np.repeat(second[:, None], 40, axis=1))
    reference = stats.ttest_ind(first, second, equal_var=False)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.freedom == pytest.approx(reference.df)
    assert found.p_value() == pytest.approx(reference.pvalue)


def test_two_controls_are_compared_over_users_who_are_paired():
    rng = np.random.default_rng(2)
    first = rng.normal(5.0, 3.0, 80)
    second = first - rng.normal(0.2, 0.5, 80)
    reference = stats.ttest_rel(first, second)
    found = crossed_difference(first[None], second[None])
    assert (found.p_value(), found.freedom) == (pytest.approx(reference.pvalue), 79)


def test_variance_of_a_difference_by_hand():
    """Two seeds against a control on two users: V1 / 2 + D / 2 - E1 / 4, and Satterthwaite's degrees of freedom."""
    found = crossed_difference(np.array([[1.0, 2.0], [4.0, 9.0]]), np.array([[0.0, 1.0]]))
    # Means of seeds 1.5 and 6.5; of users 2.5 - 0 and 5.5 - 1; residuals +-1 in all four cells.
    of_seeds, of_users, rest = 12.5 / 2, 2.0 / 2, 4.0 / 4
    assert found.value == 3.5
    # The users differ no more than the rest makes them differ, so the rest stands for them.
    assert (of_users, rest) == (1.0, 1.0)
    assert found.variance == pytest.approx(of_seeds)
    wider = crossed_difference(np.array([[1.0, 4.0], [4.0, 11.0]]), np.array([[0.0, 0.0]]))
    of_users = 12.5 / 2
    assert wider.variance == pytest.approx(of_seeds + of_users - rest)
    assert wider.freedom == pytest.approx((of_seeds + of_users - rest) ** 2 / (of_seeds**2 + of_users**2 + rest**2))


def test_all_seeds_count_and_their_order_and_numbers_do_not():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(7, 30)), rng.normal(size=(4, 30))
    found = crossed_difference(first, second)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert crossed_difference(first[::-1], second[[2, 0, 3, 1]]).variance == pytest.approx(found.variance)
    assert crossed_difference(second, first).value == pytest.approx(-found.value)
    extreme = crossed_difference(np.concatenate([first, np.full((1, 30), 9.0)]), second)
    assert extreme.value > found.value + 1 and extreme.variance > found.variance


def test_seeds_and_orders_can_change_places():
    table = np.random.default_rng(4).normal(size=(3, 5)) + np.arange(5)
    found, turned = crossed_mean(table), crossed_mean(table.T)
    assert (found.variance, found.freedom) == pytest.approx((turned.variance, turned.freedom))


def test_methods_that_are_the_same_do_not_differ():
    table = np.random.default_rng(5).normal(size=(1, 20))
    found = crossed_difference(table, table)
    assert (found.value, found.half_width(), found.p_value()) == (0.0, 0.0, 1.0)
    assert Estimate(0.5, 0.0, 9.0).p_value() == 0.0


def test_methods_that_differ_by_rounding_alone_do_not_differ():
    rewards = np.random.default_rng(0).integers(1, 9, (1, 500)) / 10
    added = sum(np.full_like(rewards, 0.1) for _ in range(10)) * rewards  # 0.9999999999999999 of them
    assert (added != rewards).any()
    estimate = crossed_difference(np.repeat(added, 5, axis=0), rewards)
    assert (estimate.value, estimate.variance, estimate.p_value()) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crossed_mean(np.ones((1, 1))), "two units"),
        (lambda: crossed_mean(np.ones(4)), "two dimensions"),
        (lambda: crossed_mean(np.array([[1.0, np.nan]])), "finite"),
        (lambda: crossed_difference(np.ones((2, 3)), np.ones((2, 2))), "same users"),
        (lambda: crossed_difference(np.ones((2, 1)), np.ones((2, 1))), "two units"),
    ],
)
def test_what_has_no_interval_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- how often intervals hold, and what tests show -----------------------------------------------------------


def seeds_on_users(rng, seeds, users, seed_sd, rest_sd, favoured, freedom=None):
    """Results of a method: seeds of one spread (heavy tails with few degrees of freedom), on users it is good for."""
    of_seeds = rng.normal(size=seeds) if freedom is None else rng.standard_t(freedom, seeds) / np.sqrt(2)
    return seed_sd * of_seeds[:, None] + favoured + rest_sd * rng.normal(size=(seeds, users))


def share_of_false_claims(repetitions, seeds, seed_sds, interaction_sd, freedom=None, users=200, effect=0.0):
    """How often two methods that differ by ``effect`` are said to differ, at a level of 0.05."""
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(repetitions):
        liking = rng.normal(0.0, 2.0, users)
        first, second = (
            seeds_on_users(rng, n, users, sd, 1.0, liking + interaction_sd * rng.normal(size=users), freedom)
            for n, sd in zip(seeds, seed_sds, strict=True)
        )
        rejected += crossed_difference(first + effect, second).p_value() <= 0.05
    return rejected / repetitions


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(10, 10), (10, 5), (5, 5)])
@pytest.mark.parametrize(
    ("seed_sds", "interaction_sd", "freedom"),
    [
        ((0.3, 0.3), 0.0, None),
        ((0.3, 0.3), 2.0, None),
        ((0.05, 0.05), 2.0, None),
        ((0.3, 0.3), 1.0, 4),
        ((0.1, 0.4), 1.0, None),
        ((0.4, 0.1), 1.0, None),
    ],
    ids=["seeds", "seeds and users", "users", "heavy-tailed seeds", "second varies more", "first varies more"],
)
def test_false_claims_are_as_rare_as_they_say(seeds, seed_sds, interaction_sd, freedom):
    """Where nothing differs, the interval holds 0 exactly when the test does not reject: coverage .93 to .97."""
    share = share_of_false_claims(2_000, seeds, seed_sds, interaction_sd, freedom)
    assert 0.03 <= share <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_sd"), [((10, 10), 0.3), ((5, 5), 0.1)])
def test_false_claims_are_rare_with_users_who_favour_a_method_under_every_seed(seeds, seed_sd):
    assert 0.03 <= share_of_false_claims(1_000, seeds, (seed_sd, seed_sd), 2.0) <= 0.07


def test_a_detectable_difference_is_shown_four_times_in_five():
    """Ten seeds each: the difference of the closed form, at the true variance, is shown in .8 of simulated studies."""
    users, seed_sd, interaction_sd = 200, 0.4, 0.5
    variance = 2 * seed_sd**2 / 10 + 2 * interaction_sd**2 / users + 2 / (10 * users)
    # The seeds' part has 18 degrees of freedom, the users' about 199.
    of_seeds, of_users = 2 * (seed_sd**2 + 1 / users) / 10, 2 * interaction_sd**2 / users
    freedom = variance**2 / (of_seeds**2 / 18 + of_users**2 / 199)
    difference = Estimate(0.0, variance, freedom).detectable()
    shown = share_of_false_claims(1_000, (10, 10), (seed_sd, seed_sd), interaction_sd, effect=difference)
    assert shown == pytest.approx(0.8, abs=0.05)
    # In the difference itself, .05 of power is less than a tenth: power rises by .28 a standard error there.
    assert 0.05 / 0.28 * np.sqrt(variance) < 0.1 * difference


@pytest.mark.parametrize("freedom", [4.0, 18.0, 200.0])
@pytest.mark.parametrize("significance", [0.05, 0.05 / 20])
def test_detectable_is_scipys_power_of_the_noncentral_t(freedom, significance):
    found = Estimate(1.0, 0.25, freedom).detectable(significance) / 0.5
    critical = stats.t.isf(significance / 2, freedom)
    assert stats.nct.sf(critical, freedom, found) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sds", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)], ids=["both", "orders", "seeds"])
@pytest.mark.parametrize("shape", [(3, 5), (5, 5), (10, 5)])
def test_the_interval_over_seeds_and_orders_holds_the_mean(shape, sds):
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2_000):
        of_seeds, of_orders = (sd * rng.normal(size=n) for sd, n in zip(sds, shape, strict=True))
        found = crossed_mean(of_seeds[:, None] + of_orders + rng.normal(size=shape))
        covered += abs(found.value) <= found.half_width()
    assert 0.93 <= covered / 2_000 <= 0.985
