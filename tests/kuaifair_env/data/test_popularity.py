from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kuaifair_env.data import InteractionData, groups_of, popularity_groups
from kuaifair_env.errors import DataError

counts_with_ids = st.lists(
    st.tuples(st.integers(-1000, 1000), st.integers(0, 12)),
    min_size=2,
    max_size=60,
    unique_by=lambda pair: pair[0],
).filter(lambda pairs: len({count for _, count in pairs}) > 1)


def popular_ids(groups):
    return np.sort(groups.item_ids[groups.popular]).tolist()


@given(counts_with_ids, st.floats(0.01, 0.99))
def test_groups_agree_with_brute_force(pairs: list[tuple[int, int]], share: float) -> None:
    ids, counts = (np.array(column) for column in zip(*pairs, strict=True))
    groups = popularity_groups(counts, ids, share)
    ranked = sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
    size = min(max(int(share * len(pairs) + 0.5), 1), len(pairs) - 1)
    assert set(popular_ids(groups)) == {item for item, _ in ranked[:size]}


@given(counts_with_ids, st.randoms(use_true_random=False))
def test_groups_belong_to_ids_and_not_to_places(pairs: list[tuple[int, int]], random: object) -> None:
    ids, counts = (np.array(column) for column in zip(*pairs, strict=True))
    order = np.random.default_rng(len(pairs)).permutation(len(ids))
    straight, shuffled = popularity_groups(counts, ids), popularity_groups(counts[order], ids[order])
    np.testing.assert_array_equal(straight.popular[order], shuffled.popular)
    np.testing.assert_array_equal(shuffled.lookup(ids), straight.popular)


@given(counts_with_ids, st.floats(0.05, 0.95))
def test_no_long_tail_item_was_shown_more_than_a_popular_one(pairs: list[tuple[int, int]], share: float) -> None:
    ids, counts = (np.array(column) for column in zip(*pairs, strict=True))
    popular = popularity_groups(counts, ids, share).popular
    assert counts[popular].min() >= counts[~popular].max()


@settings(max_examples=30)
@given(st.integers(5, 400), st.integers(0, 10_000))
def test_training_popularity_tells_the_groups_perfectly(n_items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    train = pd.DataFrame(
        {
            "user_id": rng.integers(0, 50, 40 * n_items),
            "item_id": np.minimum(rng.zipf(1.3, 40 * n_items), n_items) - 1,
            "click": rng.integers(0, 2, 40 * n_items),
        }
    )
    items = pd.DataFrame({"item_id": np.arange(n_items)})
    data = InteractionData.from_frames(train, train.iloc[::2].assign(click=1), items=items, drop_duplicates=False)
    groups = groups_of(data)
    exposures = data.train.exposures(n_items)
    cut = exposures[groups.popular].min()
    untied = (exposures != cut) | groups.popular
    if (~groups.popular & untied).any():
        assert roc_auc_score(groups.popular[untied], exposures[untied]) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_array_equal(groups.counts, np.bincount(train.item_id, minlength=n_items))


def test_a_fifth_of_the_candidates_is_popular() -> None:
    for n_items, expected in ((5, 1), (10, 2), (5123, 1025), (10_728, 2146), (2, 1), (7, 1), (8, 2)):
        assert popularity_groups(np.arange(n_items), np.arange(n_items)).popular.sum() == expected


def test_ties_go_to_the_smaller_id() -> None:
    groups = popularity_groups(np.array([4, 4, 4, 9, 1]), np.array([30, 10, 20, 5, 7]), share=0.6)
    assert popular_ids(groups) == [5, 10, 20]


def small_data() -> InteractionData:
    train = pd.DataFrame({"user_id": [1, 1, 2, 2, 2, 3], "item_id": [5, 5, 5, 6, 7, 8], "click": 1})
    test = pd.DataFrame({"user_id": [1] * 9 + [2], "item_id": [8] * 9 + [5], "click": 0})
    items = pd.DataFrame({"item_id": [5, 6, 7, 8, 9], "shown": [1.0, 2.0, 3.0, 4.0, 50.0]})
    return InteractionData.from_frames(train, test, items=items)


def test_the_source_decides_and_the_test_log_never_does() -> None:
    data = small_data()
    assert popular_ids(groups_of(data)) == [5]
    assert popular_ids(groups_of(data, source="shown")) == [9]
    chosen = groups_of(data, np.array([3, 1, 0]))
    assert chosen.item_ids.tolist() == [8, 6, 5]
    assert chosen.popular.tolist() == [False, False, True]
    assert chosen.describe()["popular_share_of_exposure"] == pytest.approx(3 / 5)


def test_scaled_popularity_spans_the_unit_interval_in_order_of_the_counts() -> None:
    counts = np.array([0, 3, 1, 100])
    scaled = popularity_groups(counts, np.arange(4)).popularity()
    np.testing.assert_allclose(scaled, np.log1p(counts) / np.log1p(100), rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "ids", "share", "words"),
    [
        ([3, 3, 3], [1, 2, 3], 0.2, "same train count"),
        ([3], [1], 0.2, "at least two"),
        ([], [], 0.2, "at least two|integer ids"),
        ([1, 2], [1, 1], 0.2, "distinct"),
        ([1, -2], [1, 2], 0.2, "item 2"),
        ([1, np.nan], [1, 2], 0.2, "finite"),
        ([1, 2, 3], [1, 2], 0.2, "one count each"),
        ([1, 2], ["a", "b"], 0.2, "integer ids"),
        ([1, 2], [1, 2], 0.0, "between 0 and 1"),
        ([1, 2], [1, 2], 1.0, "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(counts: list[float], ids: list[object], share: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        popularity_groups(np.array(counts), np.array(ids), share)


def test_unknown_candidates_and_sources_are_refused() -> None:
    data = small_data()
    with pytest.raises(DataError, match="77 is not among"):
        groups_of(data).lookup(np.array([5, 77]))
    with pytest.raises(DataError, match="unknown"):
        groups_of(data, source="test")  # type: ignore[arg-type]
    bare = InteractionData(data.users, data.items.take(np.arange(5)), data.train, data.test, data.provenance)
    object.__setattr__(bare.items, "shown", None)
    with pytest.raises(DataError, match="no 'shown' counts"):
        groups_of(bare, source="shown")
