"""How unequal slates and exposures are, against definitions written out by hand and against each other."""

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuaifair_env.metrics import (
    SlateStatistics,
    absolute_difference,
    coverage_gap,
    disparate_treatment_ratio,
    item_exposure_gap,
    popular_share,
    signed_gap,
    slate_absolute_difference,
    slate_disparity,
    user_absolute_difference,
    violates,
    violation_rate,
)

shares = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(0, 1))


@st.composite
def exposures_and_groups(draw):
    size = draw(st.integers(2, 30))
    counts = draw(hnp.arrays(np.int64, size, elements=st.integers(0, 1000)))
    popular = draw(hnp.arrays(np.bool_, size))
    counts[draw(st.integers(0, size - 1))] += 1
    popular[0], popular[-1] = True, False
    return counts, popular


# --- what users react to ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("parity", [1.0, 0.6, 0.0, 0.3, 1.0]),
        ("popular_only", [0.0, 0.0, 0.0, 0.3, 1.0]),
        ("target", [0.25, 0.0, 0.375, 0.5625, 1.0]),
    ],
)
def test_disparity_of_known_shares(mode, expected):
    assert slate_disparity(np.array([0.0, 0.2, 0.5, 0.65, 1.0]), mode, 0.2) == pytest.approx(expected)


def test_a_bound_that_binary_numbers_miss_still_counts():
    assert abs(2 * 0.7 - 1) < 0.4
    assert violates(slate_disparity(np.array([7, 3]) / 10), 0.4).all()
    assert violates(slate_disparity(np.array([13, 7]) / 20), 0.3).all()
    assert not violates(slate_disparity(np.array([6, 4]) / 10), 0.3).any()


@pytest.mark.parametrize(("size", "allowed"), [(6, {3}), (10, {4, 5, 6}), (20, set(range(7, 14)) - {7, 13})])
def test_how_many_popular_items_a_slate_may_hold(size, allowed):
    counts = np.arange(size + 1)
    assert set(counts[~violates(slate_disparity(counts / size), 0.3)]) == allowed


def test_one_item_can_never_be_balanced():
    assert violates(slate_disparity(np.array([0.0, 1.0])), 1.0).all()


@given(shares, st.floats(0, 1))
def test_disparity_stays_in_the_unit_interval(share, target):
    for mode in ("parity", "popular_only", "target"):
        u = slate_disparity(share, mode, target)
        assert ((u >= 0) & (u <= 1 + 1e-12)).all()


@given(shares)
def test_target_one_half_is_parity_and_popular_only_is_its_upper_side(share):
    parity = slate_disparity(share)
    assert slate_disparity(share, "target", 0.5) == pytest.approx(parity, abs=1e-12)
    assert slate_disparity(share, "popular_only") == pytest.approx(np.where(share > 0.5, parity, 0.0))


def test_disparity_refuses_what_it_cannot_evaluate():
    with pytest.raises(ValueError, match="float64"):
        slate_disparity(np.array([0.65], np.float32))
    with pytest.raises(ValueError, match="target popular share"):
        slate_disparity(np.array([0.5]), "target", 1.2)
    with pytest.raises(ValueError, match="target"):
        slate_disparity(np.array([0.5, 0.5]), "personal", np.array([0.2, -0.1]))
    with pytest.raises(ValueError, match="choose 'parity'"):
        slate_disparity(np.array([0.5]), "equal")  # type: ignore[arg-type]


# --- who got the exposure -----------------------------------------------------------------------------------

COUNTS = np.array([30, 10, 0, 5, 5])
POPULAR = np.array([True, True, False, False, False])


def test_exposure_measures_of_five_items_by_hand():
    assert popular_share(COUNTS, POPULAR) == pytest.approx(0.8)
    assert signed_gap(popular_share(COUNTS, POPULAR)) == pytest.approx(0.6)
    assert absolute_difference(COUNTS, POPULAR) == pytest.approx(0.6)
    assert item_exposure_gap(COUNTS, POPULAR) == pytest.approx((20 - 10 / 3) / 10)
    assert coverage_gap(COUNTS, POPULAR) == pytest.approx(1 - 2 / 3)
    # 40 exposures for merit 0.8 against 10 for 0.6.
    merit = np.array([0.3, 0.5, 0.2, 0.2, 0.2])
    assert disparate_treatment_ratio(COUNTS, merit, POPULAR) == pytest.approx((40 / 0.8) / (10 / 0.6))


def test_the_sign_is_lost_in_ad_and_kept_in_the_gap():
    assert signed_gap(popular_share(COUNTS, ~POPULAR)) == pytest.approx(-0.6)
    assert absolute_difference(COUNTS, ~POPULAR) == pytest.approx(absolute_difference(COUNTS, POPULAR))
    for of_all, everything in ((1.0, np.ones(5, bool)), (0.0, np.zeros(5, bool))):
        assert (popular_share(COUNTS, everything), absolute_difference(COUNTS, everything)) == (of_all, 1.0)


def test_random_slates_have_ad_of_point_six_but_treat_items_alike():
    rng = np.random.default_rng(5)
    popular = np.arange(1000) < 200
    counts = np.bincount(rng.integers(1000, size=200_000), minlength=1000)
    assert absolute_difference(counts, popular) == pytest.approx(0.6, abs=0.01)
    assert item_exposure_gap(counts, popular) == pytest.approx(0.0, abs=0.02)
    assert disparate_treatment_ratio(counts, np.ones(1000), popular) == pytest.approx(1.0, abs=0.02)


def test_equal_shares_give_a_popular_item_four_times_the_exposure_of_a_tail_item():
    popular = np.arange(10) < 2
    counts = np.where(popular, 40, 10)
    assert absolute_difference(counts, popular) == 0.0
    # Means are 40 and 10 around 16.
    assert item_exposure_gap(counts, popular) == pytest.approx(30 / 16)


def test_treatment_is_fair_when_exposure_follows_merit():
    merit = np.array([0.9, 0.7, 0.4, 0.2, 0.1])
    assert disparate_treatment_ratio(1000 * merit, merit, POPULAR) == pytest.approx(1.0)


def test_treatment_without_any_tail_or_popular_exposure():
    assert disparate_treatment_ratio(np.array([1, 1, 0, 0, 0]), np.ones(5), POPULAR) == math.inf
    assert disparate_treatment_ratio(np.array([0, 0, 0, 1, 0]), np.ones(5), POPULAR) == 0.0


@given(exposures_and_groups())
def test_bounds_of_the_ad_family(case):
    counts, popular = case
    size, group = len(counts), popular.sum()
    assert 0.0 <= absolute_difference(counts, popular) <= 1.0
    assert -size / (size - group) - 1e-9 <= item_exposure_gap(counts, popular) <= size / group + 1e-9
    assert -1.0 <= coverage_gap(counts, popular) <= 1.0
    gap = signed_gap(popular_share(counts, popular))
    assert abs(gap) == pytest.approx(absolute_difference(counts, popular))


@given(exposures_and_groups(), st.integers(2, 9), st.randoms(use_true_random=False))
def test_gaps_know_neither_scale_nor_the_order_of_items(case, factor, random):
    counts, popular = case
    order = list(range(len(counts)))
    random.shuffle(order)
    for measure in (popular_share, absolute_difference, item_exposure_gap, coverage_gap):
        assert measure(factor * counts[order], popular[order]) == pytest.approx(measure(counts, popular))


@given(hnp.arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 10))))
def test_pooling_can_only_hide_inequality(popular_places):
    """(users, slates each, places): pooled AD <= user AD <= slate AD when all see equally much."""
    users, _, size = popular_places.shape
    counts = np.array([popular_places.sum(), (~popular_places).sum()])
    pooled = absolute_difference(counts, np.array([True, False]))
    seen = popular_places.reshape(users, -1)
    by_user = user_absolute_difference(seen.sum(axis=1), np.full(users, seen.shape[1]))
    by_slate = slate_absolute_difference(popular_places.sum(axis=2).ravel() / size)
    assert pooled <= by_user + 1e-12
    assert by_user <= by_slate + 1e-12


def test_pooled_ad_hides_users_who_see_one_group_only():
    assert absolute_difference(np.array([50, 50]), np.array([True, False])) == 0.0
    assert user_absolute_difference(np.array([50, 0]), np.array([50, 50])) == 1.0
    assert user_absolute_difference(np.array([50, 0, 0]), np.array([50, 50, 0])) == 1.0


def test_violation_rate_is_a_share():
    assert violation_rate(np.array([True, False, False, True, True])) == pytest.approx(0.6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: popular_share(np.zeros(5, int), POPULAR),
        lambda: popular_share(COUNTS, POPULAR.astype(int)),
        lambda: popular_share(COUNTS[:4], POPULAR),
        lambda: popular_share(np.array([-1, 2, 2, 2, 2]), POPULAR),
        lambda: popular_share(np.array([np.nan, 2, 2, 2, 2]), POPULAR),
        lambda: item_exposure_gap(COUNTS, np.ones(5, bool)),
        lambda: coverage_gap(COUNTS, np.zeros(5, bool)),
        lambda: disparate_treatment_ratio(COUNTS, np.zeros(5), POPULAR),
        lambda: disparate_treatment_ratio(COUNTS, POPULAR.astype(float), POPULAR),
        lambda: disparate_treatment_ratio(COUNTS, POPULAR.astype(float), ~POPULAR),
        lambda: disparate_treatment_ratio(COUNTS, np.ones(4), POPULAR),
        lambda: disparate_treatment_ratio(COUNTS, np.full(5, np.nan), POPULAR),
        lambda: violation_rate(np.array([], bool)),
        lambda: slate_absolute_difference(np.array([])),
        lambda: slate_absolute_difference(np.array([1.2])),
        lambda: slate_absolute_difference(np.array([np.nan])),
        lambda: user_absolute_difference(np.array([0]), np.array([0])),
        lambda: user_absolute_difference(np.array([3]), np.array([2])),
    ],
)
def test_measures_of_nothing_or_nonsense_are_refused(call):
    with pytest.raises(ValueError, match=r"must|need"):
        call()


# --- counting slates as they come ---------------------------------------------------------------------------


def test_streamed_report_equals_the_measures_of_all_slates_together():
    rng = np.random.default_rng(11)
    n_items, n_users, size = 60, 7, 6
    popular = np.arange(n_items) % 5 == 0
    training = rng.integers(0, 50, n_items)
    statistics = SlateStatistics(popular, training, n_users)
    batches = []
    for batch in (1, 4, 9, 0, 30):
        items = np.array([rng.permutation(n_items)[:size] for _ in range(batch)], int).reshape(batch, size)
        users, violations = rng.integers(n_users, size=batch), rng.random(batch) < 0.4
        statistics.add(items, users, violations)
        batches.append((items, users, violations))
    items = np.concatenate([b[0] for b in batches])
    users = np.concatenate([b[1] for b in batches])
    violations = np.concatenate([b[2] for b in batches])
    report = statistics.report()

    flags = popular[items]
    p = flags.mean()
    by_user = [abs(2 * flags[users == user].mean() - 1) for user in set(users)]
    assert report.slates == len(items)
    assert report.exposures == items.size
    assert report.violation_rate == pytest.approx(violations.mean())
    assert report.signed_gap == pytest.approx(2 * p - 1)
    assert report.absolute_difference == pytest.approx(abs(2 * p - 1))
    assert report.slate_absolute_difference == pytest.approx(np.abs(2 * flags.mean(axis=1) - 1).mean())
    assert report.user_absolute_difference == pytest.approx(np.mean(by_user))
    assert report.long_tail_share == pytest.approx(1 - p)
    assert report.long_tail_count == pytest.approx((~flags).sum(axis=1).mean())
    assert report.coverage == pytest.approx(len(set(items.ravel())) / n_items)
    assert report.average_popularity == pytest.approx(training[items].mean())
    counts = [int((items == item).sum()) for item in range(n_items)]
    pairs = sum(abs(a - b) for a, b in itertools.product(counts, counts))
    assert report.gini == pytest.approx(pairs / (2 * n_items * sum(counts)))
    assert all(np.isfinite(list(asdict(report).values())))


def test_a_refused_batch_is_not_half_counted():
    statistics = SlateStatistics(np.array([True, False, False]), np.ones(3), 2)
    good = np.array([[0, 1]]), np.array([1]), np.array([True])
    statistics.add(*good)
    before = statistics.report()
    for items, users in (([[0, 3]], [0]), ([[-1, 1]], [0]), ([[0, 1]], [2]), ([[0, 1]], [-1])):
        with pytest.raises(ValueError, match="outside"):
            statistics.add(np.array(items), np.array(users), np.array([True]))
    with pytest.raises(ValueError, match="need items"):
        statistics.add(np.array([[0, 1]]), np.array([0, 1]), np.array([True]))
    with pytest.raises(ValueError, match="need items"):
        statistics.add(np.array([[0, 1]]), np.array([0]), np.array([True, True]))
    assert statistics.report() == before


def test_statistics_refuse_a_world_without_two_groups_and_a_report_without_slates():
    with pytest.raises(ValueError, match="both groups"):
        SlateStatistics(np.ones(3, bool), np.ones(3), 2)
    with pytest.raises(ValueError, match="training_exposures"):
        SlateStatistics(np.array([True, False]), np.ones(3), 2)
    with pytest.raises(ValueError, match="no slate"):
        SlateStatistics(np.array([True, False]), np.ones(2), 1).report()


def test_personal_disparity_is_the_distance_to_each_users_own_share():
    np.testing.assert_allclose(
        slate_disparity(np.array([0.0, 0.5, 1.0]), "personal", np.array([0.3, 0.5, 0.1])), [0.3, 0.0, 0.9]
    )
