"""Encodes raw tables: columns of ids as sorted logs, features as numbers, lists of tags as membership."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from kuaifair_env.data.schema import BoolArray, FeatureTable, InteractionLog, count_distinct
from kuaifair_env.errors import DataError
from kuaifair_env.seeding import mix

MISSING_WORDS = frozenset(("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None"))
"""Cells that mean "no value"."""

_LARGEST_BITMAP = 500_000_000
_BRACKETS = {"[": "]", "{": "}"}
_NUMBERS = re.compile(r"-?\d+(\s+-?\d+)+")
_NO_COMMA = re.compile(r"""(['"])\s+(?=['"])""")


@dataclass(frozen=True)
class RawLog:
    """Columns of a log in the order of their source.

    Attributes:
        users: ``(R,)`` user rows; :func:`build_log` needs ``int32``, a frame that is being read has raw ids instead.
        items: ``(R,)`` item rows, likewise.
        clicks: ``bool (R,)``.
        times: ``int64 (R,)``; None when the source has no time at all.
        no_time: ``bool (R,)``, rows whose time is unknown (their ``times`` do not count); None when there are
            none.
        watch_ratios: ``float32 (R,)`` or None.
        feedback: ``float32 (R,)`` or None.
    """

    users: NDArray[Any]
    items: NDArray[Any]
    clicks: BoolArray
    times: NDArray[np.int64] | None = None
    no_time: BoolArray | None = None
    watch_ratios: NDArray[np.float32] | None = None
    feedback: NDArray[np.float32] | None = None

    def take(self, rows: BoolArray) -> RawLog:
        """Returns the rows of a mask."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})


def rows_of(ids: NDArray[np.int64], known: NDArray[np.int64]) -> tuple[NDArray[np.int32], BoolArray]:
    """Finds raw ids among known ones.

    Args:
        ids: ``(R,)`` raw ids.
        known: ``(n,)`` increasing raw ids, at least one.

    Returns:
        The row of each id (0 where unknown), and which ids are unknown.
    """
    rows = pd.Index(known).get_indexer(pd.Index(ids)).astype(np.int32)
    return np.maximum(rows, 0), rows < 0


def exact_duplicates(columns: Sequence[NDArray[Any]]) -> BoolArray:
    """Marks every row that equals an earlier one in all columns; NaN equals NaN.

    Rows are compared by a 64-bit mix of their values first, and then, where mixes agree, by the values; columns hold
    integers, floats or booleans.
    """
    key = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        key = mix(key, _bits(column))
    repeated = np.zeros(len(key), np.bool_)
    ordered = np.sort(key)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(shared):
        alike = np.flatnonzero(shared[np.minimum(np.searchsorted(shared, key), len(shared) - 1)] == key)
        frame = pd.DataFrame({place: column[alike] for place, column in enumerate(columns)})
        repeated[alike] = np.asarray(frame.duplicated())
    return repeated


def build_log(raw: RawLog, positives_only: bool = False) -> tuple[InteractionLog, dict[str, int]]:
    """Sorts a log by user and time, and counts its rows.

    Rows without time come after all timed rows of their user, in the order of the source: their time is one
    more than the latest time of the whole log.

    Returns:
        The log, and the counts ``rows``, ``clicks``, ``users``, ``items``, ``rows_without_time``,
        ``rows_out_of_order`` (earlier than the same user's timed row before them in the source) and
        ``repeated_pairs`` (rows whose user and item occurred in an earlier row).
    """
    n_rows = len(raw.users)
    times = np.arange(n_rows, dtype=np.int64) if raw.times is None else raw.times
    without = 0 if raw.no_time is None else int(raw.no_time.sum())
    if raw.no_time is not None and without:
        known = times[~raw.no_time]
        times = np.where(raw.no_time, known.max() + 1 if len(known) else 0, times)
    order = np.argsort(raw.users, kind="stable")
    timed = order if raw.no_time is None else order[~raw.no_time[order]]
    same_user = np.diff(raw.users[timed]) == 0
    backwards = int((same_user & (np.diff(times[timed]) < 0)).sum())
    if backwards or without:
        order = time_order(raw.users, times)
    log = InteractionLog(
        raw.users[order],
        raw.items[order],
        raw.clicks[order],
        times[order],
        None if raw.watch_ratios is None else raw.watch_ratios[order],
        positives_only,
        None if raw.feedback is None else raw.feedback[order],
    )
    return log, {
        "rows": n_rows,
        "clicks": int(raw.clicks.sum()),
        "users": int(np.count_nonzero(np.bincount(raw.users))),
        "items": int(np.count_nonzero(np.bincount(raw.items))),
        "rows_without_time": without,
        "rows_out_of_order": backwards,
        "repeated_pairs": n_rows - count_distinct(_pair_keys(log.users, log.items)),
    }


def pairs_met(first: InteractionLog, second: InteractionLog, n_users: int, n_items: int) -> BoolArray:
    """Marks the rows of ``second`` whose user and item also meet in ``first``."""
    if n_users * n_items <= _LARGEST_BITMAP:
        met = np.zeros(n_users * n_items, np.bool_)
        met[first.users.astype(np.int64) * n_items + first.items] = True
        return np.asarray(met[second.users.astype(np.int64) * n_items + second.items])
    keys = pd.Index(_pair_keys(second.users, second.items))
    return np.asarray(keys.isin(pd.unique(_pair_keys(first.users, first.items))))


def count_shared_rows(
    first: InteractionLog, second: InteractionLog, columns: Sequence[str], n_users: int, n_items: int
) -> int:
    """Counts the rows of ``second`` that equal a row of ``first`` in the named columns, ids included."""
    near = second.take(pairs_met(first, second, n_users, n_items))
    far = first.take(pairs_met(second, first, n_users, n_items))
    table = pd.DataFrame({name: getattr(far, name) for name in columns}).drop_duplicates()
    probe = pd.DataFrame({name: getattr(near, name) for name in columns})
    return len(probe.merge(table, how="inner", on=list(columns)))


def time_order(users: NDArray[np.int32], times: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the stable order by user, then time; one sort where both fit one 64-bit key."""
    first, last = int(times.min()), int(times.max())
    if (int(users.max()) + 1) * (last - first + 1) < 2**62:
        return np.argsort(users.astype(np.int64) * (last - first + 1) + (times - first), kind="stable")
    return np.lexsort((times, users))


def _pair_keys(users: NDArray[np.int32], items: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.asarray(users.astype(np.int64) << 32 | items, np.int64)


def _bits(column: NDArray[Any]) -> NDArray[np.uint64]:
    if column.dtype.kind == "f":
        wide = column.astype(np.float64) + 0.0  # + 0.0 turns -0.0 into 0.0
        wide[np.isnan(wide)] = np.nan
        return wide.view(np.uint64)
    return column.astype(np.int64).view(np.uint64)


MAX_CATEGORIES = 20
"""Values of a categorical feature that get a column of their own; rarer ones share ``feature=other``."""

_SHARE_OF_LISTS = 0.1

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
                f"{what} is a date; turn it into a number first, such as days since a fixed day",
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
        tags: For each item a list, tuple, set, array or Series of tags, one number or text alone, or None for none.
            Text that is a list is read as one: ``"[8, 3]"``, ``"{'a', 'b'}"``, ``"a|b"``, ``"a;b"``.
        what: The column, for messages.

    Returns:
        ``bool (N, T)`` and the ``T`` tag names, numbers in numeric order before text.

    Raises:
        DataError: For tags that are neither integers nor text, or text that may be one tag or a list (commas, tabs).
    """
    lists = [_as_list(entry, what) for entry in tags]
    lengths = np.fromiter((len(entry) for entry in lists), np.int64, len(lists))
    flat = [int(tag) if _is_whole(tag) else tag for entry in lists for tag in entry]
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
                f"{what} holds {type(value).__name__} objects; give numbers or text (lists only as 'tags')",
                column=name,
            )
    # Each value is looked at once, however many rows have it.
    places, texts = pd.factorize(known.astype(str).to_numpy(dtype=object))
    lists = np.fromiter(map(looks_like_list, texts), np.bool_, len(texts))[places]
    if len(lists) and lists.mean() > _SHARE_OF_LISTS:
        raise DataError(
            f"{what} looks like a list: {known[lists].iloc[0]!r}; name it with columns={{'tags': '{name}'}} if "
            "it holds the items' tags, or turn it into one column per value",
            column=name,
        )
    counts = np.bincount(places, minlength=len(texts))
    ranked = sorted(range(len(texts)), key=lambda place: (-counts[place], texts[place]))
    frequent = ranked[:MAX_CATEGORIES] if len(ranked) > MAX_CATEGORIES + 1 else ranked
    code_of = np.full(len(texts), len(frequent))
    code_of[frequent] = np.arange(len(frequent))
    codes = np.full(len(series), len(frequent), np.int64)
    codes[~missing] = code_of[places]
    encoded = [(f"{name}={texts[place]}", (codes == code).astype(np.float32)) for code, place in enumerate(frequent)]
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


def _as_list(entry: Any, what: str) -> list[Any]:
    if isinstance(entry, str):
        return _list_in_text(entry, what)
    if isinstance(entry, (list, tuple, set, frozenset, np.ndarray, pd.Series)):
        return list(entry)
    return [] if pd.isna(entry) else [entry]


def _list_in_text(text: str, what: str) -> list[Any]:
    """Reads a list that became text, as a CSV file holds it; text that is none is one tag."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":  # quotes around the whole, not around a tag
        text = text[1:-1].strip() if text[0] not in text[1:-1] else text
    if looks_like_list(text):
        if text[0] in _BRACKETS:
            try:
                # NumPy writes text without commas, which Python would join.
                return list(ast.literal_eval(_NO_COMMA.sub(r"\1, ", text)))
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                text = text[1:-1]
        separator = next((sign for sign in "|;," if sign in text), None)
        if separator is None and not _NUMBERS.fullmatch(text.strip()):  # words of one tag
            separator = "|"
        pieces = (piece.strip().strip("'\"") for piece in text.split(separator))
        return [piece for piece in pieces if piece]
    if _NUMBERS.fullmatch(text):
        return text.split()
    if any(sign in text for sign in ",\t\n"):
        raise DataError(
            f"{text!r} may be one tag or several; give lists, such as frame['{what}'].str.split(','), or join tags "
            "with '|'",
            column=what,
        )
    return [text] if text else []


def looks_like_list(text: str) -> bool:
    """Whether text is a list in brackets, or joined by ``|`` or ``;``."""
    text = text.strip()
    return any(sign in text for sign in "|;") or (len(text) > 1 and _BRACKETS.get(text[0]) == text[-1])


def _is_whole(tag: Any) -> bool:
    return isinstance(tag, (float, np.floating)) and float(tag).is_integer()


def _numbers_first(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name)
