"""Holm's correction and sign flips, against enumeration and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from hrl_policies.study.statistics import holm, sign_flip_test

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
        (lambda: holm(np.array([np.nan])), "lie in"),
        (lambda: holm(np.ones((2, 2))), "one list"),
        (lambda: sign_flip_test(np.array([])), "one list"),
        (lambda: sign_flip_test(np.array([1.0, np.nan])), "finite"),
    ],
)
def test_what_cannot_be_tested_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
