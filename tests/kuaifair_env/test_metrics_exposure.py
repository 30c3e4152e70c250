"""Concentration and reach of exposure, and the quality of slates, against their definitions."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuaifair_env.metrics import (
    average_popularity,
    coverage,
    gini,
    gini_of_rows,
    ndcg,
    normalised_entropy,
    novelty,
    top_gains,
    top_share,
)


@st.composite
def exposure_counts(draw):
    counts = draw(hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 500)))
    counts[draw(st.integers(0, len(counts) - 1))] += 1
    return counts


# --- concentration ------------------------------------------------------------------------------------------


@given(exposure_counts())
def test_gini_is_the_mean_difference_between_all_candidates(counts):
    differences = sum(abs(int(a) - int(b)) for a, b in itertools.product(counts, counts))
    assert gini(counts) == pytest.approx(differences / (2 * len(counts) * counts.sum()))


@given(exposure_counts(), st.integers(2, 9), st.randoms(use_true_random=False))
def test_concentration_stays_in_bounds_and_knows_neither_scale_nor_order(counts, factor, random):
    order = list(range(len(counts)))
    random.shuffle(order)
    size = len(counts)
    for measure, low, high in (
        (gini, 0.0, 1 - 1 / size),
        (normalised_entropy, 0.0, 1.0),
        (coverage, 1 / size, 1.0),
        (top_share, min(1.0, math.ceil(0.1 * size) / size), 1.0),
    ):
        value = measure(counts)
        assert low - 1e-9 <= value <= high + 1e-9
        assert measure(factor * counts[order]) == pytest.approx(value)


def test_gini_of_many_sessions_at_once_is_that_of_each():
    counts = np.random.default_rng(1).integers(0, 4, (20, 15))
    assert gini_of_rows(counts, 15) == pytest.approx([gini(row) for row in counts])
    padded = np.pad(counts, ((0, 0), (0, 75)))
    assert gini_of_rows(counts, 90) == pytest.approx([gini(row) for row in padded])


@given(exposure_counts())
def test_gini_of_a_short_session_is_high_however_fair(counts):
    shown = np.count_nonzero(counts)
    assert gini(counts) >= 1 - shown / len(counts) - 1e-9


@pytest.mark.parametrize("size", [2, 3, 10, 3327])
def test_extremes_of_concentration(size):
    even, single = np.full(size, 7), np.eye(1, size, size - 1)[0]
    assert gini(even) == pytest.approx(0.0, abs=1e-12)
    assert gini(single) == pytest.approx(1 - 1 / size)
    assert normalised_entropy(even) == pytest.approx(1.0)
    assert normalised_entropy(single) == pytest.approx(0.0, abs=1e-12)
    assert coverage(even) == 1.0
    assert coverage(single) == 1 / size
    assert top_share(single) == 1.0


def test_published_example_of_a_sessions_gini():
    """180 distinct exposures among 3,327 candidates: at least .946 even if perfectly even."""
    assert gini(np.arange(3327) < 180) == pytest.approx(1 - 180 / 3327)


def test_one_candidate_is_as_even_as_it_gets():
    assert gini(np.array([5])) == 0.0
    assert normalised_entropy(np.array([5])) == 1.0


@given(exposure_counts().filter(lambda counts: len(counts) > 1))
def test_entropy_is_scipys(counts):
    assert normalised_entropy(counts) == pytest.approx(scipy.stats.entropy(counts) / math.log(len(counts)), abs=1e-9)


def test_top_share_takes_a_tenth_of_the_candidates():
    counts = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3)
    assert top_share(counts) == pytest.approx(27 / 135)
    assert top_share(counts, 0.2) == pytest.approx(51 / 135)
    assert top_share(counts, 1.0) == 1.0
    assert top_share(np.array([1, 3]), 0.1) == pytest.approx(0.75)


# --- popularity ---------------------------------------------------------------------------------------------


def test_popularity_and_novelty_of_three_items_by_hand():
    training, shown = np.array([7, 2, 0]), np.array([1, 1, 2])
    assert average_popularity(shown, training) == pytest.approx((7 + 2) / 4)
    bits = [-math.log2(8 / 12), -math.log2(3 / 12), -math.log2(1 / 12)]
    assert novelty(shown, training) == pytest.approx((bits[0] + bits[1] + 2 * bits[2]) / 4)


def test_even_popularity_is_log_n_bits_and_rarer_items_are_newer():
    assert novelty(np.arange(1, 9), np.full(8, 3)) == pytest.approx(3.0)
    training = np.array([100, 10, 1, 0])
    assert np.all(np.diff([novelty(shown, training) for shown in np.eye(4)]) > 0)


# --- slates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slate_size", [1, 3, 10])
def test_ndcg_is_scikit_learns(slate_size):
    rng = np.random.default_rng(4)
    relevance, scores = rng.random((25, 40)), rng.random((25, 40))
    slates = np.argsort(-scores, axis=1)[:, :slate_size]
    mine = ndcg(np.take_along_axis(relevance, slates, axis=1), top_gains(relevance, slate_size))
    assert mine.mean() == pytest.approx(sklearn.metrics.ndcg_score(relevance, scores, k=slate_size))


def test_ndcg_is_one_for_the_ideal_slate_and_zero_where_nothing_helps():
    ideal = top_gains(np.array([[0.1, 0.9, 0.5], [0.0, 0.0, 0.0]]), 2)
    assert ideal.tolist() == [[0.9, 0.5], [0.0, 0.0]]
    assert ndcg(ideal, ideal).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: gini(np.zeros(4)),
        lambda: gini(np.array([])),
        lambda: gini(np.array([-1, 3])),
        lambda: gini(np.array([np.nan, 3])),
        lambda: coverage(np.ones((2, 2))),
        lambda: top_share(np.ones(4), 0.0),
        lambda: top_share(np.ones(4), 1.5),
        lambda: average_popularity(np.ones(3), np.ones(4)),
        lambda: novelty(np.ones(3), np.array([1, -1, 0])),
        lambda: ndcg(np.ones((2, 3)), np.ones((2, 2))),
        lambda: ndcg(-np.ones((2, 3)), np.ones((2, 3))),
        lambda: top_gains(np.ones((2, 3)), 4),
    ],
)
def test_measures_of_nothing_or_nonsense_are_refused(call):
    with pytest.raises(ValueError, match=r"\w{4}"):
        call()
