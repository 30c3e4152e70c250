from __future__ import annotations

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import skew
from sklearn.preprocessing import StandardScaler

from kuaifair_env.data.encoding import MAX_CATEGORIES, encode_features, tag_matrix

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


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 40), st.lists(st.integers(0, 40), max_size=4)), max_size=30)
)
def test_tags_are_membership(tags: list[int | list[int] | None]) -> None:
    matrix, names = tag_matrix(tags)
    assert list(names) == [str(tag) for tag in sorted(int(name) for name in names)]
    for row, entry in zip(matrix, tags, strict=True):
        expected = set() if entry is None else {entry} if isinstance(entry, int) else set(entry)
        assert {int(name) for name, member in zip(names, row, strict=True) if member} == expected
