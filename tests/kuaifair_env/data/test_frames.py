"""A user's own frames as logs, features and tags."""

from __future__ import annotations

import codecs
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import skew
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from kuaifair_env.data import InteractionData, LogColumns, Provenance, groups_of, popularity_groups
from kuaifair_env.data.encoding import MAX_CATEGORIES, encode_features, tag_matrix
from kuaifair_env.data.schema import among, count_distinct
from kuaifair_env.data.tables import read_table, split_log
from kuaifair_env.errors import DataError


def train_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "user_id": [7, -3, 7, 7, 40],
            "item_id": [100, 5, 5, 100, 2**40],
            "click": [1, 0, 0, 1, 1],
            "time": [30, 10, 20, 10, 5],
        }
    )


def test_frame() -> pd.DataFrame:
    return pd.DataFrame({"user_id": [40, 7], "item_id": [5, 5], "click": [0, 1], "time": [90, 91]})


test_frame.__test__ = False  # type: ignore[attr-defined]


def test_ids_may_be_any_integers_and_rows_any_order() -> None:
    data = InteractionData.from_frames(train_frame(), test_frame())
    assert data.users.ids.tolist() == [-3, 7, 40]
    assert data.items.ids.tolist() == [5, 100, 2**40]
    assert data.users.ids[data.train.users].tolist() == [-3, 7, 7, 7, 40]
    assert data.items.ids[data.train.items].tolist() == [5, 100, 5, 100, 2**40]
    assert data.train.times.tolist() == [10, 10, 20, 30, 5]
    assert data.train.clicks.tolist() == [False, True, False, True, True]
    assert data.report["train"]["rows_out_of_order"] == 2
    assert data.provenance.origin == "own"


def test_the_frames_are_left_as_they_are() -> None:
    train, test = train_frame(), test_frame()
    InteractionData.from_frames(train, test)
    pd.testing.assert_frame_equal(train, train_frame())
    pd.testing.assert_frame_equal(test, test_frame())


rows = st.lists(
    st.tuples(st.integers(-5, 5), st.integers(0, 6), st.booleans(), st.integers(0, 4)),
    min_size=1,
    max_size=60,
)


@settings(max_examples=40)
@given(rows, rows)
def test_the_log_is_the_sorted_frame(train_rows: list[tuple[int, ...]], test_rows: list[tuple[int, ...]]) -> None:
    names = ["user_id", "item_id", "click", "time"]
    train, test = pd.DataFrame(train_rows, columns=names), pd.DataFrame(test_rows, columns=names)
    test["time"] += 100
    one_item = pd.concat([train, test]).item_id.nunique() < 2
    if one_item or {train.click.mean(), test.click.mean()} & {0.0, 1.0}:
        with pytest.raises(DataError, match=r"one item|without a click|holds no click"):
            InteractionData.from_frames(train, test)
        return
    data = InteractionData.from_frames(train, test)
    for log, frame, which in ((data.train, train, "train"), (data.test, test, "test")):
        expected = frame.drop_duplicates().sort_values(["user_id", "time"], kind="stable")
        np.testing.assert_array_equal(data.users.ids[log.users], expected.user_id)
        np.testing.assert_array_equal(data.items.ids[log.items], expected.item_id)
        np.testing.assert_array_equal(log.clicks, expected.click)
        np.testing.assert_array_equal(log.times, expected.time)
        assert data.report[which]["exact_duplicates_dropped"] == len(frame) - len(expected)
        pairs = frame.drop_duplicates()[["user_id", "item_id"]]
        assert data.report[which]["repeated_pairs"] == int(pairs.duplicated().sum())
        backwards = frame.drop_duplicates().groupby("user_id").time.diff() < 0
        assert data.report[which]["rows_out_of_order"] == int(backwards.sum())


def test_without_time_the_order_of_the_frame_counts_and_repeats_are_kept() -> None:
    train = pd.DataFrame({"user_id": [2, 1, 2, 2], "item_id": [9, 8, 8, 9], "click": [1, 1, 0, 1]})
    data = InteractionData.from_frames(train, pd.DataFrame({"user_id": [1, 1], "item_id": [9, 9], "click": [0, 1]}))
    assert data.items.ids[data.train.items].tolist() == [8, 9, 8, 9]
    assert data.report["train"]["exact_duplicates_dropped"] == 0
    assert data.report["train"]["repeated_pairs"] == 1
    dropped = InteractionData.from_frames(
        train, pd.DataFrame({"user_id": [1, 1], "item_id": [9, 9], "click": [0, 1]}), drop_duplicates=True
    )
    assert dropped.report["train"]["exact_duplicates_dropped"] == 1


def test_rows_without_time_come_last_in_their_order() -> None:
    train = pd.DataFrame(
        {"user_id": 1, "item_id": [4, 3, 2, 1], "click": [0, 1, 0, 0], "time": [np.nan, 2.5, np.nan, 0.25]},
        index=[9, 9, 9, 9],
    )
    data = InteractionData.from_frames(train, pd.DataFrame({"user_id": [1, 1], "item_id": [9, 9], "click": [0, 1]}))
    assert data.items.ids[data.train.items].tolist() == [1, 3, 4, 2]
    assert data.train.times.tolist() == [250, 2500, 2501, 2501]
    assert data.report["train"]["rows_without_time"] == 2


def test_datetimes_become_milliseconds() -> None:
    moments = pd.to_datetime(["2024-01-01 00:00:01.5", None, "2024-01-01 00:00:00.0"])
    train = pd.DataFrame({"user_id": 1, "item_id": [1, 2, 3], "click": [0, 1, 0], "time": moments})
    for frame in (train, train.assign(time=train.time.dt.tz_localize("Asia/Shanghai").dt.tz_convert("UTC"))):
        log = InteractionData.from_frames(
            frame, pd.DataFrame({"user_id": [1, 1], "item_id": [9, 9], "click": [0, 1]})
        ).train
        assert log.times[1] - log.times[0] == 1500
        assert log.items.tolist() == [2, 0, 1]


def test_a_threshold_on_watch_ratios_makes_clicks() -> None:
    train = pd.DataFrame({"user_id": 1, "item_id": [1, 2, 3], "watch_ratio": [0.5, 2.0, 7.0]})
    test = pd.DataFrame({"user_id": 1, "item_id": [1, 2], "watch_ratio": [2.5, 0.0]})
    data = InteractionData.from_frames(train, test, positive={"watch_ratio": 2.0})
    assert data.train.clicks.tolist() == [False, True, True]
    assert data.train.watch_ratios is not None
    assert data.train.watch_ratios.tolist() == [0.5, 2.0, 7.0]
    with pytest.raises(DataError, match="watch_ratio"):
        InteractionData.from_frames(train.drop(columns="watch_ratio"), test, positive={"watch_ratio": 2.0})
    with pytest.raises(DataError, match="positive="):
        InteractionData.from_frames(train, test)


def test_nullable_columns_count_as_what_they_hold() -> None:
    train, test = train_frame(), test_frame()
    kinds = {"user_id": "Int64", "item_id": "Float64", "click": "boolean", "time": "Int64"}
    nullable = InteractionData.from_frames(train.astype(kinds), test.astype(kinds))
    assert nullable.data_hash == InteractionData.from_frames(train, test).data_hash
    half = train.astype({"item_id": "Float64"})
    half.loc[2, "item_id"] = 4.5
    with pytest.raises(DataError, match=r"row 2 .* 4\.5"):
        InteractionData.from_frames(half, test)


def test_columns_may_have_any_name() -> None:
    names = LogColumns(user="u", item="i", click="liked", time="t")
    renamed = {"user_id": "u", "item_id": "i", "click": "liked", "time": "t"}
    data = InteractionData.from_frames(
        train_frame().rename(columns=renamed), test_frame().rename(columns=renamed), columns=names
    )
    assert data.data_hash == InteractionData.from_frames(train_frame(), test_frame()).data_hash


def test_items_and_users_bring_tags_counts_and_features() -> None:
    items = pd.DataFrame(
        {
            "item_id": [2**40, 5, 100, 6],
            "tags": [["jazz"], None, ["jazz", "live"], []],
            "shown": [10, 20, 30, 40],
            "length": [1.0, 2.0, np.nan, 3.0],
            "kind": ["a", "b", "a", None],
        }
    )
    users = pd.DataFrame({"user_id": [40, 7, -3, 1000], "age": [20, 30, 40, 50]})
    data = InteractionData.from_frames(train_frame(), test_frame(), items=items, users=users)
    assert data.items.ids.tolist() == [5, 6, 100, 2**40]
    assert data.items.tag_names == ("jazz", "live")
    assert data.items.tags.tolist() == [[False, False], [False, False], [True, True], [True, False]]
    assert data.items.shown is not None
    assert data.items.shown.tolist() == [20, 40, 30, 10]
    assert data.items.features.names == ("length", "length=missing", "kind=a", "kind=b", "kind=missing")
    np.testing.assert_allclose(data.items.features.values[:, 0], [0, 1.2247449, 0, -1.2247449], atol=1e-6)
    np.testing.assert_allclose(data.users.features.values[:, 0], np.array([1, -1, -3, 3]) / np.sqrt(5), rtol=1e-6)
    assert data.report["users"] == {"total": 4, "without_training_rows": 1, "without_test_rows": 2}
    assert data.report["items"] == {"total": 4, "without_training_rows": 1, "without_test_rows": 3}


def test_a_given_provenance_travels_with_the_data() -> None:
    told = Provenance("partial KuaiRand-Pure", "partial", "a part", {"f": "0"}, {"seed": 1})
    assert InteractionData.from_frames(train_frame(), test_frame(), provenance=told).provenance == told


def test_positives_only_is_checked_and_kept() -> None:
    clicks = train_frame().assign(click=1)
    data = InteractionData.from_frames(clicks, test_frame(), positives_only=True)
    assert data.train.positives_only
    assert not data.test.positives_only
    with pytest.raises(DataError, match="positives only"):
        InteractionData.from_frames(train_frame(), test_frame(), positives_only=True)


BAD = [
    (lambda f: f.iloc[:0], "empty", None),
    (lambda f: f.drop(columns="item_id"), "no such column", "item_id"),
    (lambda f: f.drop(columns="click"), "no such column", "click"),
    (lambda f: f.assign(user_id=[7.0, np.nan, 7, 7, 40]), "no id in row 1", "user_id"),
    (lambda f: f.assign(user_id=[7.0, 7.5, 7, 7, 40]), "row 1 .* 7.5", "user_id"),
    (lambda f: f.assign(user_id=list("abcde")), "the same id would be two", "user_id"),
    (lambda f: f.assign(item_id=["1", "2", "3", "4", "5"]), "the same id would be two", "item_id"),
    (lambda f: f.assign(item_id=["1", 2, "3", "4", "5"]), "row 1 of the .* has 2", "item_id"),
    (lambda f: f.assign(item_id=["1", "2", " ", "4", "5"]), "no id in row 2", "item_id"),
    (lambda f: f.assign(user_id=[True, False, True, True, True]), "must be integers", "user_id"),
    (lambda f: f.assign(item_id=np.array([1, 2, 3, 4, 2**63], np.uint64)), "64 signed bits", "item_id"),
    (lambda f: f.assign(click=[0, 1, 2, 0, 1]), "row 2 .* 2.0", "click"),
    (lambda f: f.assign(click=[0, 1, np.nan, 0, 1]), "row 2 .* nan", "click"),
    (lambda f: f.assign(click=["yes", "no", "no", "no", "no"]), "0 or 1.*'yes'", "click"),
    (lambda f: f.assign(watch_ratio=[0, 1, -2.0, 0, 1]), "row 2 .* -2.0", "watch_ratio"),
    (lambda f: f.assign(watch_ratio=[0, np.inf, 2.0, 0, 1]), "row 1 .* inf", "watch_ratio"),
    (lambda f: f.assign(time=["a", "b", "c", "d", "e"]), "numbers or datetimes", "time"),
    (lambda f: f.assign(time=[1.0, np.inf, 2, 3, 4]), "row 1 .* inf", "time"),
    (lambda f: f.assign(time=["1", None, "3", str(2**63), "5"]), "64 signed bits", "time"),
]


@pytest.mark.parametrize(("change", "words", "column"), BAD)
def test_bad_logs_are_refused(change: object, words: str, column: str | None) -> None:
    for which in ("train", "test"):
        frames = {"train": train_frame(), "test": train_frame().assign(time=lambda f: f.time + 1000)}
        frames[which] = change(frames[which])  # type: ignore[operator]
        with pytest.raises(DataError, match=words) as caught:
            InteractionData.from_frames(frames["train"], frames["test"])
        assert caught.value.column == column
        assert which in str(caught.value)


def test_ids_that_no_table_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"item 1099511627776 in row 4 of the train log .*1 such"):
        InteractionData.from_frames(train_frame(), test_frame(), items=pd.DataFrame({"item_id": [5, 100]}))
    with pytest.raises(DataError, match="user 40 in row 4 of the train log"):
        InteractionData.from_frames(train_frame(), test_frame(), users=pd.DataFrame({"user_id": [7, -3]}))


def test_bad_tables_are_refused() -> None:
    items = pd.DataFrame({"item_id": [5, 100, 2**40]})
    cases = [
        (pd.DataFrame({"item_id": [5, 100, 5, 2**40]}), "id 5 occurs twice"),
        (items.iloc[:0], "empty"),
        (items.assign(shown=[1, -1, 2]), "item 100"),
        (items.assign(shown=[1, None, 2]), "item 100"),
        (items.assign(added=pd.Timestamp("2024-01-01")), "is a date"),
        (items.assign(size=[1.0, np.inf, 2.0]), "infinite"),
        (items.assign(lists=[[1], [2], [3]]), "list objects"),
        (items.assign(tags=[[1.5], [2], [3]]), "neither an integer nor text"),
        ({"item_id": [5]}, "DataFrame"),
    ]
    for table, words in cases:
        with pytest.raises(DataError, match=words):
            InteractionData.from_frames(train_frame(), test_frame(), items=table)  # type: ignore[arg-type]


def test_one_item_is_no_catalogue() -> None:
    train = pd.DataFrame({"user_id": [1, 2], "item_id": [4, 4], "click": [0, 1]})
    with pytest.raises(DataError, match="only one item"):
        InteractionData.from_frames(train, train.assign(click=[1, 0]))


def test_a_log_in_both_places_is_refused() -> None:
    with pytest.raises(DataError, match="2 rows of the test log"):
        InteractionData.from_frames(train_frame(), pd.concat([test_frame(), train_frame().iloc[[0, 3]]]))
    untimed = train_frame().drop(columns="time")
    with pytest.raises(DataError, match="every row"):
        InteractionData.from_frames(untimed, untimed)
    shared = InteractionData.from_frames(untimed, pd.concat([untimed, test_frame().drop(columns="time")]))
    assert shared.report["test_pairs_in_train"] == 6


numbers = st.lists(st.one_of(st.none(), st.floats(-1e6, 1e6)), min_size=1, max_size=50)


@given(numbers)
def test_numbers_are_finite_and_standardised(values: list[float | None]) -> None:
    table = encode_features(pd.DataFrame({"x": pd.array(values, dtype="Float64")}))
    assert np.isfinite(table.values).all()
    missing = np.array([value is None for value in values])
    for name, column in zip(table.names, table.values.T, strict=True):
        if name == "x=missing":
            np.testing.assert_array_equal(column, missing)
        else:
            known = column[~missing].astype(np.float64)
            assert abs(known.mean()) < 1e-3
            assert abs(known.std() - 1) < 1e-3
            np.testing.assert_array_equal(column[missing], 0)


def test_numbers_agree_with_scikit_learn() -> None:
    values = np.random.default_rng(0).normal(3, 7, 500)
    table = encode_features(pd.DataFrame({"x": values}))
    np.testing.assert_allclose(table.values, StandardScaler().fit_transform(values[:, None]), atol=1e-6)


def test_heavy_tailed_counts_go_through_log1p() -> None:
    counts = np.random.default_rng(0).lognormal(5, 1.5, 1000)
    assert skew(counts) > 2
    table = encode_features(pd.DataFrame({"views": counts, "debt": -counts}))
    assert table.names == ("log1p(views)", "debt")
    expected = StandardScaler().fit_transform(np.log1p(counts)[:, None])[:, 0]
    np.testing.assert_allclose(table.values[:, 0], expected, atol=1e-5)


def test_rare_categories_share_a_column() -> None:
    values = [f"v{k:02d}" for k in range(30) for _ in range(40 - k)]
    table = encode_features(pd.DataFrame({"c": values}))
    assert table.names == (*(f"c=v{k:02d}" for k in range(MAX_CATEGORIES)), "c=other")
    np.testing.assert_array_equal(table.values.sum(axis=1), 1)
    assert table.values[:, -1].sum() == sum(40 - k for k in range(MAX_CATEGORIES, 30))


def test_constant_columns_are_dropped_and_booleans_are_numbers() -> None:
    frame = pd.DataFrame({"one": 1.0, "text": "same", "nothing": np.nan, "flag": [True, False, True]})
    assert encode_features(frame).names == ("flag",)
    assert encode_features(frame[["one"]]).values.shape == (3, 0)


def test_the_index_does_not_matter() -> None:
    frame = pd.DataFrame({"x": [1.0, 2.0, 4.0], "c": ["a", "b", "a"]})
    np.testing.assert_array_equal(
        encode_features(frame).values, encode_features(frame.set_index(pd.Index([5, 5, 5]))).values
    )


@given(st.lists(st.one_of(st.none(), st.integers(0, 40), st.lists(st.integers(0, 40), max_size=4)), max_size=30))
def test_tags_are_membership(tags: list[int | list[int] | None]) -> None:
    matrix, names = tag_matrix(tags)
    assert list(names) == [str(tag) for tag in sorted(int(name) for name in names)]
    for row, entry in zip(matrix, tags, strict=True):
        expected = set() if entry is None else {entry} if isinstance(entry, int) else set(entry)
        assert {int(name) for name, member in zip(names, row, strict=True) if member} == expected


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
    assert set(popular_ids(shuffled)) == set(popular_ids(straight))


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
    test = train.iloc[::2].assign(click=lambda frame: 1 - frame.click)
    data = InteractionData.from_frames(train, test, items=items, drop_duplicates=False)
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
    train = pd.DataFrame({"user_id": [1, 1, 2, 2, 2, 3], "item_id": [5, 5, 5, 6, 7, 8], "click": [1, 1, 1, 1, 1, 0]})
    test = pd.DataFrame({"user_id": [1] * 9 + [2], "item_id": [8] * 9 + [5], "click": [0] * 9 + [1]})
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
        ([], [], 0.2, "at least two|vector of ids"),
        ([1, 2], [1, 1], 0.2, "distinct"),
        ([1, -2], [1, 2], 0.2, "item 2"),
        ([1, np.nan], [1, 2], 0.2, "finite"),
        ([1, 2, 3], [1, 2], 0.2, "one count each"),
        ([1, 2], [0.5, 1.5], 0.2, "vector of ids"),
        ([1, 2], [1, 2], 0.0, "between 0 and 1"),
        ([1, 2], [1, 2], 1.0, "between 0 and 1"),
    ],
)
def test_bad_input_is_refused(counts: list[float], ids: list[object], share: float, words: str) -> None:
    with pytest.raises(DataError, match=words):
        popularity_groups(np.array(counts), np.array(ids), share)


def test_unknown_sources_are_refused() -> None:
    data = small_data()
    with pytest.raises(DataError, match="unknown"):
        groups_of(data, source="test")  # type: ignore[arg-type]
    bare = InteractionData(data.users, data.items.take(np.arange(5)), data.train, data.test, data.provenance)
    object.__setattr__(bare.items, "shown", None)
    with pytest.raises(DataError, match="no 'shown' counts"):
        groups_of(bare, source="shown")


def timed_log(times: object) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns = {
        "user_id": rng.integers(9, size=60),
        "item_id": rng.integers(9, size=60),
        "click": rng.integers(2, size=60),
    }
    return pd.DataFrame(columns).assign(time=times)


MOMENTS = 1_600_000_000 + 7 * np.arange(60)
SAME_TIMES = {
    "floats": MOMENTS.astype(float),
    "fractions of seconds": MOMENTS + 0.25,
    "text of numbers": MOMENTS.astype(str),
    "Python integers": MOMENTS.astype(object),
    "milliseconds": MOMENTS * 1000,
    "nanoseconds as floats": (MOMENTS * 10**9).astype(float),
    "datetimes": pd.to_datetime(MOMENTS, unit="s"),
    "datetimes with a zone": pd.to_datetime(MOMENTS, unit="s", utc=True),
    "text of dates": pd.to_datetime(MOMENTS, unit="s").astype(str),
    "days": pd.to_datetime(MOMENTS, unit="s").floor("D"),
    "days as numbers": pd.to_datetime(MOMENTS, unit="s").strftime("%Y%m%d").astype(int),
    "places": np.arange(60),
}


@pytest.mark.parametrize("first", SAME_TIMES)
@pytest.mark.parametrize("second", SAME_TIMES)
def test_a_test_log_that_is_the_training_log_is_refused_whatever_its_times_are(first: str, second: str) -> None:
    with pytest.raises(DataError, match=r"in the training log too|cannot be compared|no exact number"):
        InteractionData.from_frames(timed_log(SAME_TIMES[first]), timed_log(SAME_TIMES[second]))


def test_rows_of_both_logs_are_found_beside_rows_without_time() -> None:
    train, test = timed_log(MOMENTS), timed_log(pd.Series(MOMENTS).where(np.arange(60) % 3 == 0))
    with pytest.raises(DataError, match="20 rows of the test log"):
        InteractionData.from_frames(train, test)
    later = test.assign(time=test.time + 10_000)
    with pytest.raises(DataError, match="every row without time"):
        InteractionData.from_frames(train, later)
    with pytest.raises(DataError, match="every row"):
        InteractionData.from_frames(train, test.assign(time=np.nan))


def test_a_log_that_is_the_other_in_another_unit_is_refused_where_times_do_not_say_what_they_are() -> None:
    since_start = np.arange(60)
    for one, two in ((1, 1000), (1000, 1), (1, 10**6)):
        first, second = timed_log(since_start * one), timed_log(since_start * two)
        with pytest.raises(DataError, match=r"rows are in both logs, if times of the (test|training) log are divided"):
            InteractionData.from_frames(first.iloc[1:], second.iloc[1:])
    mixed = timed_log(np.where(since_start < 30, MOMENTS, MOMENTS * 1000))
    with pytest.raises(DataError, match="of several units since 1970: row 0 in seconds and row 30 in milliseconds"):
        InteractionData.from_frames(mixed, timed_log(MOMENTS + 10**6))


@pytest.mark.parametrize(("kind", "limit"), [(np.float32, 2**24), (np.float64, 2**53)])
def test_ids_that_floats_do_not_tell_apart_are_refused(kind: type, limit: int) -> None:
    log = timed_log(MOMENTS)
    with pytest.raises(DataError, match=rf"holds no larger integers exactly than {limit - 1:,}"):
        InteractionData.from_frames(log.assign(item_id=(limit + log.item_id).astype(kind)), timed_log(MOMENTS + 10**6))


def damaged_csv(text: bytes) -> dict[str, bytes]:
    return {
        "NUL bytes": text.replace(b"\n40", b"\n4\x000"),
        "more than 1,048,576 bytes": b"x" * (3 << 20) + text,
        "Error tokenizing": text + b"1,2,3,4,5,6,7\n",
    }


@pytest.mark.parametrize("problem", damaged_csv(b""))
def test_text_that_is_no_table_is_one_line(tmp_path: Path, problem: str) -> None:
    path = tmp_path / "train.csv"
    path.write_bytes(damaged_csv(train_frame().to_csv(index=False).encode())[problem])
    with pytest.raises(DataError, match=problem) as caught:
        InteractionData.from_frames(path, test_frame())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["CRLF", "a byte order mark", "both", "line breaks within fields"])
def test_forms_of_text_that_other_programs_write_hold_the_same(tmp_path: Path, form: str) -> None:
    train = train_frame()
    if form == "line breaks within fields":
        train = train.assign(note='as "they"\nsay,\r\nor not')
    text = train.to_csv(index=False).encode()
    if form in ("CRLF", "both"):
        text = text.replace(b"\n", b"\r\n")
    if form in ("a byte order mark", "both"):
        text = codecs.BOM_UTF8 + text
    (tmp_path / "train.csv").write_bytes(text)
    read = InteractionData.from_frames(tmp_path / "train.csv", test_frame())
    assert read.data_hash == InteractionData.from_frames(train_frame(), test_frame()).data_hash


def test_ids_with_line_breaks_are_whole(tmp_path: Path) -> None:
    frames = [frame.assign(item_id="item\n" + frame.item_id.astype(str)) for frame in (train_frame(), test_frame())]
    paths = [tmp_path / "train.csv", tmp_path / "test.csv"]
    for frame, path in zip(frames, paths, strict=True):
        frame.to_csv(path, index=False)
    assert InteractionData.from_frames(*paths).data_hash == InteractionData.from_frames(*frames).data_hash


def test_a_parquet_file_of_which_a_bit_changed_is_refused_or_read(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    train_frame().to_parquet(path)
    content = path.read_bytes()
    # Footer and headers of pages, which say how much there is to read, are the last part.
    for bit in np.random.default_rng(0).choice(8 * len(content), 200, replace=False):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with suppress(DataError):
            read_table(path)


@pytest.mark.parametrize("kind", ["float32", "Float32"])
def test_times_that_single_precision_has_rounded_are_refused(kind: str) -> None:
    with pytest.raises(DataError, match="no exact number in a column of"):
        InteractionData.from_frames(timed_log(pd.Series(MOMENTS).astype(kind)), timed_log(MOMENTS))
    early = pd.Series(np.arange(60), dtype=kind)
    assert InteractionData.from_frames(timed_log(early), timed_log(np.arange(100, 160))).train.times.max() == 59


@pytest.mark.parametrize("field", ["time", "watch_ratio", "tags", "shown"])
def test_named_columns_that_no_table_has_are_an_error(field: str) -> None:
    for items in (None, pd.DataFrame({"item_id": [5, 100, 2**40], "tags": ["a", "b", "c"], "shown": 1})):
        if items is not None or field in ("tags", "shown"):
            with pytest.raises(DataError, match=f"nope.*named as (the )?{field}"):
                InteractionData.from_frames(train_frame(), test_frame(), items=items, columns={field: "nope"})


def test_a_data_set_is_shown_in_one_line() -> None:
    data = InteractionData.from_frames(train_frame(), test_frame())
    assert data.data_hash in repr(data) and len(repr(data)) < 200


def test_dates_as_text_are_times() -> None:
    train = timed_log(["2024-01-01T00:00:01.5Z"] * 30 + ["2024-01-01 00:00:00+00:00"] * 30)
    test = timed_log(["2024-01-02T00:00:01.25Z"] * 59 + [None])
    data = InteractionData.from_frames(train, test)
    assert np.ptp(data.train.times) == 1500 and data.report["test"]["rows_without_time"] == 1
    with pytest.raises(DataError, match="ISO form"):
        InteractionData.from_frames(timed_log("31/01/2024"), test)


@pytest.mark.parametrize("name", ["timestamp", "ts", "date", "Timestamp"])
def test_times_are_recognised_by_their_names(name: str) -> None:
    train = timed_log(MOMENTS[::-1]).rename(columns={"time": name})
    data = InteractionData.from_frames(train, train.assign(**{name: MOMENTS + 10_000}))
    assert data.train.times.min() == MOMENTS[0]
    with pytest.raises(DataError, match="several columns"):
        InteractionData.from_frames(train.assign(event_time=MOMENTS), train)


@pytest.mark.parametrize("name", ["watched_at", "event_time", "createdAt", "unnamed"])
def test_what_looks_like_a_time_is_not_ignored_in_silence(name: str) -> None:
    train = timed_log(MOMENTS).rename(columns={"time": name})
    test = train.drop(columns=name).assign(click=1 - train.click)
    with pytest.warns(UserWarning, match=rf"{name}.*columns={{'time': ...}}"):
        InteractionData.from_frames(train, test)
    named = InteractionData.from_frames(train, test, columns=LogColumns(time=name))
    assert named.train.times.min() == MOMENTS[0]
    with pytest.raises(DataError, match="named as the time"):
        InteractionData.from_frames(train, test, columns=LogColumns(time="moment"))


TAGS_IN_TEXT = [
    ("[8, 3]", {"8", "3"}),
    ("[8 3]", {"8", "3"}),
    ("8|3", {"8", "3"}),
    ("8 3", {"8", "3"}),
    ("8;3", {"8", "3"}),
    ("{8, 3}", {"8", "3"}),
    ("['a b', 'c']", {"a b", "c"}),
    ("['a b' 'c']", {"a b", "c"}),
    ('["a b", "c"]', {"a b", "c"}),
    ("[a b, c]", {"a b", "c"}),
    ("Action|Comedy ", {"Action", "Comedy"}),
    ("(no genres listed)", {"(no genres listed)"}),
    ("a b", {"a b"}),
    (8.0, {"8"}),
    ('"a b|c"', {"a b", "c"}),
    ('"a b"|"c"', {"a b", "c"}),
    ("'a b'", {"a b"}),
    ("{a b, c}", {"a b", "c"}),
    ("{a b}", {"a b"}),
    ("[8 3]", {"8", "3"}),
    ("{8}", {"8"}),
    (pd.Series([8, 3]), {"8", "3"}),
    ("[]", set()),
    (" ", set()),
    (np.nan, set()),
]


@pytest.mark.parametrize(("entry", "expected"), TAGS_IN_TEXT)
def test_lists_of_tags_that_became_text_are_lists(entry: object, expected: set[str]) -> None:
    matrix, names = tag_matrix([entry, "other"])
    assert {name for name, member in zip(names, matrix[0], strict=True) if member} == expected


def test_text_with_commas_and_features_that_are_lists_are_refused() -> None:
    for text in ("Action, Comedy", "Action\tComedy", "(8, 3)"):
        with pytest.raises(DataError, match="one tag or several"):
            tag_matrix([text])
    items = pd.DataFrame({"item_id": [5, 100, 2**40], "genres": ["A|B", "A", "B"]})
    with pytest.raises(DataError, match=r"item feature looks like a list.*columns={'tags': 'genres'}"):
        InteractionData.from_frames(train_frame(), test_frame(), items=items)
    data = InteractionData.from_frames(train_frame(), test_frame(), items=items, columns={"tags": "genres"})
    assert data.items.tag_names == ("A", "B") and data.items.tags.sum() == 4


@pytest.mark.parametrize("which", ["train", "test"])
def test_a_log_of_clicks_alone_is_named_with_its_remedy(which: str) -> None:
    frames = {"train": train_frame(), "test": test_frame()}
    frames[which] = frames[which].assign(click=1)
    with pytest.raises(DataError, match=f"{which} log.*positives_only='{which}'.*negatives_per_positive"):
        InteractionData.from_frames(**frames)
    with pytest.raises(DataError, match=f"the {which} log holds no click"):
        InteractionData.from_frames(**(frames | {which: frames[which].assign(click=0)}))


def test_clicks_only_logs_declare_how_non_clicks_are_drawn() -> None:
    frames = {"train": train_frame().drop(columns="click"), "test": test_frame().drop(columns="click")}
    with pytest.raises(DataError, match="negatives_per_positive=4"):
        InteractionData.from_frames(**frames, positives_only="both")
    with pytest.raises(DataError, match="positives_only"):
        InteractionData.from_frames(train_frame(), test_frame(), negatives_per_positive=4)
    for number in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negatives_per_positive must be finite"):
            InteractionData.from_frames(**frames, positives_only="both", negatives_per_positive=number)
    data = InteractionData.from_frames(**frames, positives_only="both", negatives_per_positive=3, negatives_seed=5)
    assert data.train.positives_only and data.test.positives_only and data.test.clicks.all()
    assert (data.negatives.per_positive, data.negatives.seed) == (3, 5)
    declared = data.provenance.settings["drawn_negatives"]
    assert declared["per_positive"] == 3 and declared["seed"] == 5 and data.report["drawn_negatives"] == declared
    other = InteractionData.from_frames(**frames, positives_only="both", negatives_per_positive=4)
    assert other.data_hash != data.data_hash


def test_ids_that_are_text_are_kept() -> None:
    names = {7: "ann", -3: "Bob", 40: "007"}
    train, test = (frame.assign(user_id=frame.user_id.map(names)) for frame in (train_frame(), test_frame()))
    data = InteractionData.from_frames(train, test)
    assert data.users.ids.tolist() == ["007", "Bob", "ann"]
    assert data.users.ids[data.train.users].tolist() == ["007", "Bob", "ann", "ann", "ann"]
    with_others = InteractionData.from_frames(
        train, test, users=pd.DataFrame({"user_id": ["ann", "Bob", "007", "x" * 50]})
    )
    assert with_others.data_hash == data.data_hash
    assert (
        dict(zip(with_others.users.ids, with_others.users.keys, strict=True)).items()
        >= dict(zip(data.users.ids, data.users.keys, strict=True)).items()
    )


def test_files_are_read_as_the_frames_that_they_hold(tmp_path) -> None:  # type: ignore[no-untyped-def]
    train, test = train_frame(), test_frame()
    expected = InteractionData.from_frames(train, test)
    train.to_csv(tmp_path / "train.csv", index=False)
    test.to_csv(tmp_path / "test.tsv.gz", index=False, sep="\t")
    data = InteractionData.from_frames(tmp_path / "train.csv", str(tmp_path / "test.tsv.gz"))
    assert data.data_hash == expected.data_hash and set(data.provenance.files) == {"train.csv", "test.tsv.gz"}
    train.assign(user_id=["007", "7", "NA", "x", "x"]).to_csv(tmp_path / "train.csv", index=False)
    test.assign(user_id=["7", "NA"]).to_csv(tmp_path / "test.csv", index=False)
    text = InteractionData.from_frames(tmp_path / "train.csv", tmp_path / "test.csv")
    assert text.users.ids.tolist() == ["007", "7", "NA", "x"]
    with pytest.raises(DataError, match="no such file"):
        InteractionData.from_frames(tmp_path / "train.csv", tmp_path / "nothing.csv")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pyarrow|cannot be read"):
        InteractionData.from_frames(tmp_path / "train.parquet", tmp_path / "test.csv")


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([7.0, 7.5, 7, 7, 40], "row 1 .* 7.5"),
        ([7.0, np.nan, 7, 7, 40], "no id in row 1"),
        ([7.0, np.inf, 7, 7, 40], "row 1"),
        (np.array([7, 7, 7, 7, 2**63], np.uint64), "64 signed bits"),
        (pd.array([7, None, 7, 7, 40], "Int64"), "no id in row 1"),
    ],
)
def test_ids_in_parquet_are_no_other_integers_than_they_were(tmp_path: Path, ids: object, words: str) -> None:
    pytest.importorskip("pyarrow")
    train_frame().assign(user_id=ids).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=words):
        InteractionData.from_frames(tmp_path / "train.parquet", test_frame())


def test_parquet_holds_the_same_as_csv(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("pyarrow")
    train_frame().to_parquet(tmp_path / "train.parquet")
    data = InteractionData.from_frames(tmp_path / "train.parquet", test_frame())
    assert data.data_hash == InteractionData.from_frames(train_frame(), test_frame()).data_hash


@settings(max_examples=30)
@given(rows.filter(lambda entries: len(entries) > 5), st.sampled_from(["time", "user"]), st.floats(0.1, 0.9))
def test_one_log_is_split_by_time_and_loses_no_row(entries: list[tuple[int, ...]], rule: str, share: float) -> None:
    frame = pd.DataFrame(entries, columns=["user_id", "item_id", "click", "time"])
    try:
        train, test = split_log(frame, rule, share)  # type: ignore[arg-type]
    except DataError:
        return
    pd.testing.assert_frame_equal(pd.concat([train, test]).sort_index(), frame)
    if rule == "time":
        assert train.time.max() < test.time.min()
    latest = train.groupby("user_id").time.max()
    assert (test.time > test.user_id.map(latest).fillna(-1)).all()


def test_a_split_log_says_so() -> None:
    log = timed_log(MOMENTS)
    data = InteractionData.from_log(log, split="time", test_share=0.25)
    assert len(data.test) == 15 and data.test.times.min() > data.train.times.max()
    assert data.provenance.settings["split"] == "time" and "split by time" in data.provenance.description
    by_user = InteractionData.from_log(log.drop(columns="time"), split="user")
    counts = np.bincount(log.user_id)
    np.testing.assert_array_equal(np.bincount(by_user.test.users), counts - np.round(counts * 0.8))
    with pytest.raises(DataError, match="column of times"):
        InteractionData.from_log(log.drop(columns="time"))


@pytest.mark.parametrize("size", [0, 1, 7, 400])
def test_integers_are_counted_and_found_as_numpy_does(size):
    rng = np.random.default_rng(size)
    keys, pool = (rng.integers(-(2**40), 2**40, 100)[rng.integers(0, 100, count)] for count in (300, size))
    assert count_distinct(pool) == len(set(pool.tolist()))
    pool = np.concatenate([pool, keys[:size:2]])
    np.testing.assert_array_equal(among(keys, np.sort(pool)), np.isin(keys, pool))
