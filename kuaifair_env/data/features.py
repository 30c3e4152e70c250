"""Encodes tables of users and items as numeric features, and lists of tags as membership."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from kuaifair_env.data.schema import BoolArray, FeatureTable
from kuaifair_env.errors import DataError

MAX_CATEGORIES = 20
"""Values of a categorical feature that get a column of their own; rarer ones share ``feature=other``."""

SKEWNESS_OF_COUNTS = 2.0
"""Non-negative numbers more skewed than this are taken as heavy-tailed counts and encoded as log1p."""


def encode_features(frame: pd.DataFrame, what: str = "feature") -> FeatureTable:
    """Encodes the columns of a table as numbers.

    Numbers (and booleans) are standardised over the rows; non-negative ones with skewness above 2 go through
    log1p first and are then called ``log1p(feature)``. Everything else (text, pandas categories) becomes one
    column per value, ``feature=value``, for the 20 most frequent values (ties by name) and ``feature=other``
    for the rest. Missing values become 0 and are marked in ``feature=missing``. Constant columns are dropped.

    Args:
        frame: One row per user or item; the index is ignored.
        what: What the table is, for messages.

    Returns:
        The features, ``float32 (rows, columns)``, without NaN.

    Raises:
        DataError: For infinite numbers, or columns that are neither numbers nor text (dates, lists).
    """
    columns: list[NDArray[np.float32]] = []
    names: list[str] = []
    for name in frame.columns:
        series = frame[name]
        if types.is_datetime64_any_dtype(series) or types.is_timedelta64_dtype(series):
            raise DataError(
                f"a {what} is a date; turn it into a number first, such as days since a fixed day",
                column=str(name),
            )
        numeric = types.is_numeric_dtype(series) or types.is_bool_dtype(series)
        encoded = _number(str(name), series, what) if numeric else _categories(str(name), series, what)
        for column_name, values in encoded:
            if values.min(initial=np.inf) < values.max(initial=-np.inf):
                names.append(column_name)
                columns.append(values)
    if not columns:
        return FeatureTable.empty(len(frame))
    return FeatureTable(np.ascontiguousarray(np.stack(columns, axis=1)), tuple(names))


def tag_matrix(tags: Sequence[Any], what: str = "tags") -> tuple[BoolArray, tuple[str, ...]]:
    """Turns a list of tags per item into membership.

    Args:
        tags: For each item a list, tuple, set or array of tags, one number or text alone, or None for none.
        what: The column, for messages.

    Returns:
        ``bool (N, T)`` and the ``T`` tag names, numbers in numeric order before text.
    """
    lists = [_as_list(entry) for entry in tags]
    lengths = np.fromiter((len(entry) for entry in lists), np.int64, len(lists))
    flat = [tag for entry in lists for tag in entry]
    for tag in flat:
        if not isinstance(tag, (int, str, np.integer)) or isinstance(tag, bool):
            raise DataError(f"tag {tag!r} is neither an integer nor text", column=what)
    names = sorted({str(tag) for tag in flat}, key=_numbers_first)
    place = {name: position for position, name in enumerate(names)}
    matrix = np.zeros((len(lists), len(names)), np.bool_)
    matrix[np.repeat(np.arange(len(lists)), lengths), [place[str(tag)] for tag in flat]] = True
    return matrix, tuple(names)


def _number(name: str, series: pd.Series[Any], what: str) -> list[tuple[str, NDArray[np.float32]]]:
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        row = int(np.argmax(np.isinf(values)))
        raise DataError(f"{what} of row {row} is infinite", column=name)
    missing = np.isnan(values)
    known = values[~missing]
    label = name
    if len(known) and known.min() >= 0 and _skewness(known) > SKEWNESS_OF_COUNTS:
        known, label = np.log1p(known), f"log1p({name})"
    spread = known.std() if len(known) else 0.0
    encoded = np.zeros(len(values), np.float32)
    if spread > 1e-12 * max(1.0, float(np.abs(known).max(initial=0.0))):
        encoded[~missing] = (known - known.mean()) / spread
    return [(label, encoded), (f"{name}=missing", missing.astype(np.float32))]


def _categories(name: str, series: pd.Series[Any], what: str) -> list[tuple[str, NDArray[np.float32]]]:
    missing = series.isna().to_numpy()
    known = series[~missing]
    for value in known.iloc[:1]:
        if not np.isscalar(value):
            raise DataError(
                f"a {what} holds {type(value).__name__} objects; give numbers or text (lists only as 'tags')",
                column=name,
            )
    text = known.astype(str)
    counts = text.value_counts()
    ranked = sorted(counts.index, key=lambda value: (-int(counts[value]), value))
    frequent = ranked[:MAX_CATEGORIES] if len(ranked) > MAX_CATEGORIES + 1 else ranked
    codes = np.full(len(series), len(frequent), np.int64)
    codes[~missing] = (
        text.map({value: code for code, value in enumerate(frequent)}).fillna(len(frequent)).to_numpy()
    )
    encoded = [(f"{name}={value}", (codes == code).astype(np.float32)) for code, value in enumerate(frequent)]
    other = (codes == len(frequent)) & ~missing
    return [
        *encoded,
        (f"{name}=other", other.astype(np.float32)),
        (f"{name}=missing", missing.astype(np.float32)),
    ]


def _skewness(values: NDArray[np.float64]) -> float:
    centred = values - values.mean()
    spread = centred.std()
    return float((centred**3).mean() / spread**3) if spread > 0 else 0.0


def _as_list(entry: Any) -> list[Any]:
    if entry is None or (isinstance(entry, float) and np.isnan(entry)):
        return []
    if isinstance(entry, (list, tuple, set, frozenset, np.ndarray)):
        return list(entry)
    return [entry]


def _numbers_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name)
