"""Checks a user's own DataFrames and turns them into the tables of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from kuaifair_env.data.encoding import (
    RawLog,
    build_log,
    count_shared_rows,
    encode_features,
    exact_duplicates,
    pairs_met,
    rows_of,
    tag_matrix,
)
from kuaifair_env.data.schema import BoolArray, Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.errors import DataError


@dataclass(frozen=True)
class LogColumns:
    """Names of the columns of a user's frames.

    Attributes:
        user: User ids, in the logs and the users frame.
        item: Item ids, in the logs and the items frame.
        click: Feedback, 0 or 1.
        time: Time of the exposure, used if the log has it: integers of any unit, float seconds, or datetimes.
        watch_ratio: Play time over duration, used when the log has it.
        tags: In the items frame: a list of tags per item.
        shown: In the items frame: platform-wide exposure counts.
    """

    user: str = "user_id"
    item: str = "item_id"
    click: str = "click"
    time: str = "time"
    watch_ratio: str = "watch_ratio"
    tags: str = "tags"
    shown: str = "shown"


def read_frames(
    logs: Mapping[str, pd.DataFrame],
    items: pd.DataFrame | None,
    users: pd.DataFrame | None,
    *,
    name: str,
    columns: LogColumns,
    positive_watch_ratio: float | None,
    drop_duplicates: bool | None,
    positives_only: bool,
    provenance: Provenance | None,
) -> tuple[Users, Catalogue, InteractionLog, InteractionLog, Provenance, dict[str, Any]]:
    """Checks frames and turns them into the fields of an ``InteractionData``; see its ``from_frames``."""
    parsed = {split: _parse_log(frame, split, columns, positive_watch_ratio) for split, frame in logs.items()}
    catalogue = _catalogue(items, columns, parsed)
    people = _users(users, columns, parsed)
    if len(catalogue) < 2:
        raise DataError(f"there is only one item ({catalogue.ids[0]}); a recommender needs at least two to choose from")
    sorted_logs: dict[str, InteractionLog] = {}
    report: dict[str, Any] = {}
    for split, log in parsed.items():
        sorted_logs[split], report[split] = _finish_log(
            split, log, people.ids, catalogue.ids, drop_duplicates, positives_only and split == "train"
        )
    train, test = sorted_logs["train"], sorted_logs["test"]
    timed = all(log.times is not None for log in parsed.values())
    sizes = (len(people), len(catalogue))
    _check_disjoint(train, test, timed, sizes)
    report["users"] = _coverage(len(people), sorted_logs, "users")
    report["items"] = _coverage(len(catalogue), sorted_logs, "items")
    report["test_pairs_in_train"] = int(pairs_met(train, test, *sizes).sum())
    if provenance is None:
        provenance = Provenance(name, "own", f"{len(train):,} training and {len(test):,} test rows")
    return people, catalogue, train, test, provenance, report


def _parse_log(frame: pd.DataFrame, which: str, names: LogColumns, threshold: float | None) -> RawLog:
    where = f"{which} log"
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"the {where} must be a pandas DataFrame, got {type(frame).__name__}")
    if not len(frame):
        raise DataError(f"the {where} is empty; it needs one row per exposure")
    users = _ids(frame, names.user, where)
    items = _ids(frame, names.item, where)
    ratios = _watch_ratios(frame, names.watch_ratio, where)
    clicks = _clicks(frame, names, where, ratios, threshold)
    times, no_time = _times(frame, names.time, where)
    return RawLog(users, items, clicks, times, no_time, None if ratios is None else ratios.astype(np.float32))


def _column(frame: pd.DataFrame, name: str, where: str, hint: str = "") -> pd.Series[Any]:
    if name not in frame.columns:
        first_names = ", ".join(map(str, frame.columns[:8]))
        raise DataError(f"the {where} has no such column; it has: {first_names}{hint}", column=name)
    series = frame[name]
    if isinstance(series, pd.DataFrame):
        raise DataError(f"the {where} has this column twice", column=name)
    return series


def _ids(frame: pd.DataFrame, name: str, where: str) -> NDArray[np.int64]:
    series = _column(frame, name, where, "; name your columns with columns=LogColumns(...)")
    missing = series.isna().to_numpy()
    if missing.any():
        raise DataError(f"the {where} has no id in row {_first(missing)}", column=name)
    if types.is_bool_dtype(series) or not types.is_numeric_dtype(series):
        raise DataError(
            f"ids must be integers, and the {where} holds {series.iloc[0]!r}; encode them once for all, "
            f"for instance codes = {{v: n for n, v in enumerate(sorted(all_ids))}}, then "
            f"frame['{name}'].map(codes)",
            column=name,
        )
    if types.is_float_dtype(series):
        numbers = series.to_numpy(dtype=np.float64)
        wrong = ~np.isfinite(numbers) | (numbers != np.rint(numbers)) | (np.abs(numbers) > 2**53)
        if wrong.any():
            raise DataError(
                f"ids must be integers; row {_first(wrong)} of the {where} has {numbers[wrong][0]}",
                column=name,
            )
        return numbers.astype(np.int64)
    if types.is_unsigned_integer_dtype(series) and series.max() > np.iinfo(np.int64).max:
        raise DataError(f"an id of the {where} does not fit 64 signed bits: {series.max()}", column=name)
    return series.to_numpy(dtype=np.int64)


def _watch_ratios(frame: pd.DataFrame, name: str, where: str) -> NDArray[np.float64] | None:
    if name not in frame.columns:
        return None
    series = _column(frame, name, where)
    if not types.is_numeric_dtype(series):
        raise DataError(f"watch ratios of the {where} must be numbers", column=name)
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = ~np.isfinite(values) | (values < 0)
    if wrong.any():
        raise DataError(
            f"watch ratios are finite and not negative; row {_first(wrong)} of the {where} has {values[wrong][0]}",
            column=name,
        )
    return values


def _clicks(
    frame: pd.DataFrame,
    names: LogColumns,
    where: str,
    ratios: NDArray[np.float64] | None,
    threshold: float | None,
) -> BoolArray:
    if threshold is not None:
        if ratios is None:
            raise DataError(f"positive_watch_ratio needs this column in the {where}", column=names.watch_ratio)
        if not threshold > 0:
            raise DataError(f"positive_watch_ratio must be above 0, got {threshold}")
        return ratios >= threshold
    series = _column(
        frame, names.click, where, "; name it with columns=LogColumns(click=...) or give positive_watch_ratio"
    )
    if not (types.is_bool_dtype(series) or types.is_numeric_dtype(series)):
        raise DataError(f"feedback must be 0 or 1; the {where} holds {series.iloc[0]!r}", column=names.click)
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = (values != 0) & (values != 1)
    if wrong.any():
        raise DataError(
            f"feedback must be 0 or 1; row {_first(wrong)} of the {where} has {values[wrong][0]} "
            "(for watch ratios give positive_watch_ratio)",
            column=names.click,
        )
    return np.asarray(values == 1)


def _times(frame: pd.DataFrame, name: str, where: str) -> tuple[NDArray[np.int64] | None, BoolArray | None]:
    """Returns integer times, and which are missing: datetimes and float seconds in ms, integers unchanged."""
    if name not in frame.columns:
        return None, None
    series = _column(frame, name, where)
    missing = np.asarray(series.isna(), np.bool_)
    if types.is_datetime64_any_dtype(series):
        if isinstance(series.dtype, pd.DatetimeTZDtype):
            series = series.dt.tz_convert("UTC").dt.tz_localize(None)
        moments = series.to_numpy().astype("datetime64[ms]").astype(np.int64)
        return moments, missing if missing.any() else None
    if not types.is_numeric_dtype(series) or types.is_bool_dtype(series):
        raise DataError(
            f"times of the {where} must be numbers or datetimes (see pandas.to_datetime), not {series.iloc[0]!r}",
            column=name,
        )
    if types.is_integer_dtype(series) and not missing.any():
        return series.to_numpy().astype(np.int64), None
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    wrong = np.isinf(values) | (np.abs(values) > 2**52 / 1000)
    if wrong.any():
        raise DataError(
            f"row {_first(wrong)} of the {where} has time {values[wrong][0]}; float times are seconds",
            column=name,
        )
    moments = np.rint(np.where(missing, 0.0, values) * 1000.0).astype(np.int64)
    return moments, missing if missing.any() else None


def _catalogue(items: pd.DataFrame | None, names: LogColumns, logs: Mapping[str, RawLog]) -> Catalogue:
    if items is None:
        ids = np.unique(np.concatenate([log.items for log in logs.values()]))
        return Catalogue(ids, FeatureTable.empty(len(ids)), np.zeros((len(ids), 0), np.bool_))
    frame, ids = _by_id(items, names.item, "items frame")
    tag_names: tuple[str, ...] = ()
    tags: BoolArray = np.zeros((len(ids), 0), np.bool_)
    if names.tags in frame.columns:
        tags, tag_names = tag_matrix(list(frame[names.tags]), names.tags)
    shown = None
    if names.shown in frame.columns:
        shown = pd.to_numeric(frame[names.shown], errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = ~np.isfinite(shown) | (shown < 0)
        if wrong.any():
            raise DataError(
                f"shown counts are finite and at least 0; item {ids[_first(wrong)]} has "
                f"{frame[names.shown].iloc[_first(wrong)]!r}",
                column=names.shown,
            )
    features = frame.drop(columns=[names.item, names.tags, names.shown], errors="ignore")
    return Catalogue(ids, encode_features(features, "item feature"), tags, tag_names, shown)


def _users(users: pd.DataFrame | None, names: LogColumns, logs: Mapping[str, RawLog]) -> Users:
    if users is None:
        ids = np.unique(np.concatenate([log.users for log in logs.values()]))
        return Users(ids, FeatureTable.empty(len(ids)))
    frame, ids = _by_id(users, names.user, "users frame")
    return Users(ids, encode_features(frame.drop(columns=[names.user]), "user feature"))


def _by_id(frame: pd.DataFrame, name: str, where: str) -> tuple[pd.DataFrame, NDArray[np.int64]]:
    if not isinstance(frame, pd.DataFrame):
        raise DataError(f"the {where} must be a pandas DataFrame, got {type(frame).__name__}")
    if not len(frame):
        raise DataError(f"the {where} is empty")
    ids = _ids(frame, name, where)
    repeated = np.asarray(pd.Series(ids).duplicated())
    if repeated.any():
        row = _first(repeated)
        raise DataError(f"id {ids[row]} occurs twice in the {where} (again in row {row})", column=name)
    order = np.argsort(ids)
    return frame.iloc[order], ids[order]


def _finish_log(
    which: str,
    parsed: RawLog,
    user_ids: NDArray[np.int64],
    item_ids: NDArray[np.int64],
    drop_duplicates: bool | None,
    positives_only: bool,
) -> tuple[InteractionLog, dict[str, int]]:
    rows: dict[str, NDArray[np.int32]] = {}
    for what, ids, known in (("user", parsed.users, user_ids), ("item", parsed.items, item_ids)):
        rows[what], unknown = rows_of(ids, known)
        if unknown.any():
            row = _first(unknown)
            raise DataError(
                f"{what} {ids[row]} in row {row} of the {which} log is not in the {what}s frame "
                f"({int(unknown.sum()):,} such rows)"
            )
    raw = replace(parsed, users=rows["user"], items=rows["item"])
    if positives_only and not raw.clicks.all():
        raise DataError(f"the {which} log is said to hold positives only, but row {_first(~raw.clicks)} has no click")
    read = len(raw.users)
    dropping = raw.times is not None if drop_duplicates is None else drop_duplicates
    if dropping:
        compared = [raw.users, raw.items, raw.clicks, raw.times, raw.no_time, raw.watch_ratios]
        raw = raw.take(~exact_duplicates([column for column in compared if column is not None]))
    log, counts = build_log(raw, positives_only)
    return log, {"rows_read": read, "exact_duplicates_dropped": read - len(log), **counts}


def _check_disjoint(train: InteractionLog, test: InteractionLog, timed: bool, sizes: tuple[int, int]) -> None:
    """Refuses a test log that agents would see: timed rows in both, or a test log that is all in train."""
    columns = ("users", "items", "times") if timed else ("users", "items", "clicks")
    shared = count_shared_rows(train, test, columns, *sizes)
    if shared and timed:
        raise DataError(
            f"{shared:,} rows of the test log (user, item, time) are in the training log too; split the log "
            "so that no row is in both"
        )
    if shared == len(test):
        raise DataError("every row of the test log is in the training log too; split the log in two")


def _coverage(total: int, logs: Mapping[str, InteractionLog], what: str) -> dict[str, int]:
    seen = {which: np.bincount(getattr(log, what), minlength=total) > 0 for which, log in logs.items()}
    return {
        "total": total,
        "without_training_rows": int((~seen["train"]).sum()),
        "without_test_rows": int((~seen["test"]).sum()),
    }


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))
