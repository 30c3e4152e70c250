"""Builds sorted logs from columns of raw ids: ids to rows, exact duplicates, order in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, InteractionLog
from kuaifair_env.seeding import mix

_LARGEST_TABLE = 50_000_000
_LARGEST_BITMAP = 500_000_000


@dataclass(frozen=True)
class RawLog:
    """Columns of a log in the order of their source, with user and item rows.

    Attributes:
        users: ``int32 (R,)`` user rows.
        items: ``int32 (R,)`` item rows.
        clicks: ``bool (R,)``.
        times: ``int64 (R,)``; None when the source has no time at all.
        no_time: ``bool (R,)``, rows whose time is unknown (their ``times`` do not count); None when there are
            none.
        watch_ratios: ``float32 (R,)`` or None.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    clicks: BoolArray
    times: NDArray[np.int64] | None = None
    no_time: BoolArray | None = None
    watch_ratios: NDArray[np.float32] | None = None

    def take(self, rows: BoolArray) -> RawLog:
        """Returns the rows of a mask."""
        return RawLog(
            self.users[rows],
            self.items[rows],
            self.clicks[rows],
            None if self.times is None else self.times[rows],
            None if self.no_time is None else self.no_time[rows],
            None if self.watch_ratios is None else self.watch_ratios[rows],
        )


def rows_of(ids: NDArray[np.int64], known: NDArray[np.int64]) -> tuple[NDArray[np.int32], BoolArray]:
    """Finds raw ids among known ones.

    Args:
        ids: ``(R,)`` raw ids.
        known: ``(n,)`` increasing raw ids, at least one.

    Returns:
        The row of each id (0 where unknown), and which ids are unknown.
    """
    low, high = int(known[0]), int(known[-1])
    if high - low < _LARGEST_TABLE:
        table = np.full(high - low + 2, -1, np.int32)
        table[known - low] = np.arange(len(known), dtype=np.int32)
        outside = (ids < low) | (ids > high)
        rows = table[np.where(outside, high - low + 1, ids - low) if outside.any() else ids - low]
        unknown = rows < 0
    else:
        rows = np.minimum(np.searchsorted(known, ids), len(known) - 1).astype(np.int32)
        unknown = known[rows] != ids
    return np.where(unknown, np.int32(0), rows), unknown


def exact_duplicates(columns: Sequence[NDArray[Any]]) -> BoolArray:
    """Marks every row that equals an earlier one in all columns; NaN equals NaN.

    Rows are compared by a 64-bit mix of their values first, and then, where mixes agree, by the values.

    Args:
        columns: Equally long integer, float or boolean columns.
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
        order = _time_order(raw.users, times)
    log = InteractionLog(
        raw.users[order],
        raw.items[order],
        raw.clicks[order],
        times[order],
        None if raw.watch_ratios is None else raw.watch_ratios[order],
        positives_only,
    )
    return log, {
        "rows": n_rows,
        "clicks": int(raw.clicks.sum()),
        "users": int(np.count_nonzero(np.bincount(raw.users))) if n_rows else 0,
        "items": int(np.count_nonzero(np.bincount(raw.items))) if n_rows else 0,
        "rows_without_time": without,
        "rows_out_of_order": backwards,
        "repeated_pairs": n_rows - count_pairs(log.users, log.items),
    }


def count_pairs(users: NDArray[np.int32], items: NDArray[np.int32]) -> int:
    """Counts the distinct (user, item) pairs."""
    keys = np.sort(_pair_keys(users, items))
    return len(keys) and 1 + int(np.count_nonzero(np.diff(keys)))


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


def _time_order(users: NDArray[np.int32], times: NDArray[np.int64]) -> NDArray[np.int64]:
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
