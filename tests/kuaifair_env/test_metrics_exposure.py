"""Concentration and reach of exposure, and the quality of slates, against their definitions."""

import itertools
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kuaifair_env.metrics import (
    ExposureCounter,
    average_popularity,
    coverage,
    equal_exposures,
    gini,
    gini_of_sessions,
    hit,
    intra_list_distance,
    long_tail_count,
    long_tail_share,
    ndcg,
    normalised_entropy,
    novelty,
    reciprocal_rank,
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


@given(exposure_counts())
def test_shown_candidates_alone_suffice_when_their_number_is_told(counts):
    shown = np.unique(np.repeat(np.arange(len(counts)), counts), return_counts=True)[1]
    for measure in (gini, normalised_entropy, coverage):
        assert measure(shown, len(counts)) == pytest.approx(measure(counts))
    assert top_share(shown, n_items=len(counts)) == pytest.approx(top_share(counts))


def test_gini_of_many_sessions_at_once_is_that_of_each():
    counts = np.random.default_rng(1).integers(0, 4, (20, 15))
    shown = np.stack([np.count_nonzero(counts >= times, axis=1) for times in (1, 2, 3)], axis=1)
    assert gini_of_sessions(shown, 15) == pytest.approx([gini(row) for row in counts])
    assert gini_of_sessions(shown, 90) == pytest.approx([gini(row, 90) for row in counts])
    padded = np.pad(counts, ((0, 0), (0, 75)))
    assert gini_of_sessions(shown, 90) == pytest.approx([gini(row) for row in padded])


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
    assert gini(np.ones(180), 3327) == pytest.approx(1 - 180 / 3327)
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


def test_long_tail_measures_of_three_lists():
    assert long_tail_share(np.array([0, 2, 5]), np.array([5, 4, 5])) == pytest.approx(0.5)
    assert long_tail_share(np.array([0, 2]), 4) == pytest.approx(0.25)
    assert long_tail_share(np.array([0, 1]), 1) == pytest.approx(0.5)
    assert long_tail_count(np.array([0, 2, 5])) == pytest.approx(7 / 3)


# --- equal numbers of exposures -----------------------------------------------------------------------------


def test_longer_sessions_look_fairer_until_exposures_are_made_equal():
    rng = np.random.default_rng(2)
    short, long = rng.integers(500, size=(20, 10)), rng.integers(500, size=(400, 10))
    alone = [gini(np.bincount(stream.ravel(), minlength=500)) for stream in (short, long)]
    equal = equal_exposures({"short": short, "long": long}, 500)
    assert alone[0] - alone[1] > 0.2
    assert equal["short"].sum() == equal["long"].sum() == 200
    assert gini(equal["short"]) == pytest.approx(gini(equal["long"]), abs=0.05)


def test_equal_exposures_counts_the_first_ones():
    counts = equal_exposures({"a": np.array([[2, 2], [0, 1]]), "b": np.array([1, 1, 0])}, 3)
    assert counts["a"].tolist() == [1, 0, 2]
    assert counts["b"].tolist() == [1, 2, 0]
    assert equal_exposures({"a": np.array([2, 0])}, 3, limit=1)["a"].tolist() == [0, 0, 1]
    assert equal_exposures({}, 3) == {}


# --- counting ----------------------------------------------------------------------------------------------


@given(
    st.integers(1, 200).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(
                hnp.arrays(
                    np.int64,
                    st.tuples(st.integers(0, 5), st.integers(1, 6)),
                    elements=st.integers(0, size - 1),
                ),
                max_size=5,
            ),
        )
    )
)
def test_counter_counts_every_exposure_once(case):
    size, batches = case
    counter = ExposureCounter(size)
    for batch in batches:
        counter.add(batch)
    everything = [item for batch in batches for item in batch.ravel()]
    assert counter.counts.tolist() == [everything.count(item) for item in range(size)]
    counter.clear()
    assert not counter.counts.any()


@pytest.mark.parametrize(("size", "bad"), [(3, 3), (3, -1), (1000, 1000), (1000, -1)])
def test_counter_refuses_unknown_items_without_counting_the_rest(size, bad):
    counter = ExposureCounter(size)
    with pytest.raises(ValueError, match=f"item {bad} is outside 0..{size - 1}"):
        counter.add(np.array([[0, bad]]))
    assert not counter.counts.any()


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
    assert top_gains(np.array([[0.1, 0.9, 0.5]]), 3).tolist() == [[0.9, 0.5, 0.1]]


def test_hit_rate_and_reciprocal_rank_of_four_slates():
    clicks = np.array([[0, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1]], bool)
    assert hit(clicks).tolist() == [False, True, True, True]
    assert reciprocal_rank(clicks) == pytest.approx([0, 1 / 2, 1, 1 / 3])


@pytest.mark.parametrize("kind", ["embeddings", "tags"])
def test_intra_list_distance_is_the_mean_cosine_distance_of_pairs(kind):
    rng = np.random.default_rng(6)
    vectors = rng.normal(size=(30, 8)) if kind == "embeddings" else rng.random((30, 8)) < 0.4
    vectors[:, 0] = True
    slates = np.array([rng.permutation(30)[:5] for _ in range(12)])
    expected = [scipy.spatial.distance.pdist(vectors[slate].astype(float), "cosine").mean() for slate in slates]
    assert intra_list_distance(slates, vectors) == pytest.approx(expected)


def test_distance_of_twins_strangers_and_items_without_tags():
    vectors = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    assert intra_list_distance(np.array([[0, 1], [0, 2], [0, 3], [1, 0]]), vectors) == pytest.approx([0, 1, 1, 0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: gini(np.zeros(4)),
        lambda: gini(np.array([])),
        lambda: gini(np.array([-1, 3])),
        lambda: gini(np.array([np.nan, 3])),
        lambda: gini(np.ones(5), 4),
        lambda: coverage(np.ones((2, 2))),
        lambda: top_share(np.ones(4), 0.0),
        lambda: top_share(np.ones(4), 1.5),
        lambda: average_popularity(np.ones(3), np.ones(4)),
        lambda: novelty(np.ones(3), np.array([1, -1, 0])),
        lambda: long_tail_share(np.array([3]), 2),
        lambda: long_tail_share(np.array([]), 2),
        lambda: long_tail_count(np.array([])),
        lambda: equal_exposures({"a": np.array([], int)}, 3),
        lambda: equal_exposures({"a": np.array([3])}, 3),
        lambda: equal_exposures({"a": np.array([0, 1])}, 3, limit=3),
        lambda: equal_exposures({"a": np.array([0, 1])}, 3, limit=0),
        lambda: ExposureCounter(0),
        lambda: ndcg(np.ones((2, 3)), np.ones((2, 2))),
        lambda: ndcg(-np.ones((2, 3)), np.ones((2, 3))),
        lambda: top_gains(np.ones((2, 3)), 4),
        lambda: intra_list_distance(np.array([[0]]), np.ones((2, 2))),
    ],
)
def test_measures_of_nothing_or_nonsense_are_refused(call):
    with pytest.raises(ValueError, match=r"\w{4}"):
        call()
