"""Top-K: exact, with ties and masks, in one piece or in blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env import ranking
from kuaifair_env.ranking import top_k, top_k_products


def brute_force(scores: np.ndarray, k: int) -> np.ndarray:
    return np.array([sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in scores])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4000), st.integers(1, 12), st.integers(0, 5), st.integers(0, 9))
def test_top_k_is_the_sorted_list_with_ties_to_the_smaller_item(rows, columns, k, distinct, seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, columns)).astype(np.float32)
    if distinct:
        scores = rng.integers(0, distinct, scores.shape).astype(np.float32)
    k = min(k, columns)
    np.testing.assert_array_equal(top_k(scores, k), brute_force(scores, k))


def test_top_k_never_returns_a_masked_item_even_when_all_others_are_worse():
    scores = np.full((1, 1000), -1e30, np.float32)
    scores[0, :500] = 1e30
    allowed = np.ones((1, 1000), np.bool_)
    allowed[0, :500] = False
    assert top_k(scores, 10, allowed).min() >= 500


def test_top_k_refuses_what_cannot_be_ranked():
    with pytest.raises(ValueError, match="NaN"):
        top_k(np.array([[0.0, np.nan, 1.0]], np.float32), 1)
    with pytest.raises(ValueError, match="fewer than 3 items"):
        top_k(np.zeros((1, 5), np.float32), 3, np.array([True, True, False, False, False]))
    with pytest.raises(ValueError, match="top 6 of 5"):
        top_k(np.zeros((1, 5), np.float32), 6)


def test_large_nan_scores_are_refused_on_the_fast_path_too():
    scores = np.random.default_rng(0).normal(size=(2, 10_000)).astype(np.float32)
    scores[1, 77] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        top_k(scores, 10)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(30, 400), st.integers(1, 12), st.integers(0, 3), st.data())
def test_ranking_in_blocks_is_ranking_at_once(rows, columns, k, distinct, data):
    """Whatever blocks a large catalogue is cut into: ties, masks and the order of the best are those of the whole."""
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    left = rng.integers(-2, 3, (rows, 4)).astype(np.float32)
    right = rng.integers(-(2**18), 2**18, (4, columns)).astype(np.float32)  # all products are exact
    if distinct:
        right %= distinct
    allowed = rng.random((rows, columns)) < data.draw(st.sampled_from([0.5, 0.95]))
    allowed[:, -k:] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES_AT_ONCE", data.draw(st.integers(1, 2000)))
        patch.setattr(ranking, "_ROWS_AT_ONCE", data.draw(st.integers(1, 10)))
        of_products = top_k_products(left, right, k)
        of_scores = top_k(left @ right, k)
        masked = top_k(left @ right, k, allowed)
        for_all_rows = top_k(left @ right, k, allowed[0])
        with pytest.raises(ValueError, match="fewer than"):
            top_k(left @ right, k, np.arange(columns) < k - 1)
    np.testing.assert_array_equal(of_scores, brute_force(left @ right, k))
    np.testing.assert_array_equal(of_products, of_scores)
    np.testing.assert_array_equal(masked, brute_force(np.where(allowed, left @ right, -np.inf), k))
    np.testing.assert_array_equal(for_all_rows, brute_force(np.where(allowed[0], left @ right, -np.inf), k))
