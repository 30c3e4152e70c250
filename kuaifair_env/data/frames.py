"""Checks a user's own DataFrames and turns them into the tables of a data set."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

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
from kuaifair_env.data.schema import (
    BoolArray,
    Catalogue,
    FeatureTable,
    IdArray,
    InteractionLog,
    NegativeSampling,
    Provenance,
    Users,
)
from kuaifair_env.data.tables import LogColumns, Table, read_tables
from kuaifair_env.data.times import Times, exact_limit, one_unit, read_times, time_column
from kuaifair_env.errors import DataError

PositivesOnly = Literal["train", "test", "both"]

_FEW_MOMENTS = 50
_NAME_IDS = "; name your columns with columns={'user': ..., 'item': ...}"


@dataclass(frozen=True)
class FrameReading:
    """How a user's frames are read; see :meth:`InteractionData.from_frames` for each.

    Attributes:
        columns: Names of the columns.
        positive: A column and the value from which it is a click; None reads ``columns.click``.
        drop_duplicates: Whether repeated rows are dropped; None drops them where there is time.
        positives_only: Which logs list clicks only.
        negatives_per_positive: Non-clicks drawn for each click of such a log.
        negatives_seed: Seed of the draws.
    """

    columns: LogColumns = field(default_factory=LogColumns)
    positive: tuple[str, float] | None = None
    drop_duplicates: bool | None = None
    positives_only: PositivesOnly | None = None
    negatives_per_positive: float | None = None
    negatives_seed: int = 0

    def __post_init__(self) -> None:
        if self.positives_only not in (None, *get_args(PositivesOnly)):
            raise DataError(f"positives_only is 'train', 'test', 'both' or a truth value, got {self.positives_only!r}")
        if self.positives_only is None and self.negatives_per_positive is not None:
            raise DataError("negatives_per_positive is for logs of clicks only; say which with positives_only")
        if self.positives_only in ("test", "both") and self.negatives_per_positive is None:
            raise DataError(
                "a test log of clicks only says nothing of what users did not like: say how many non-clicks are drawn "
                "for each click, such as negatives_per_positive=4; every result of the test world depends on it"
            )

    @classmethod
    def of(
        cls,
        columns: LogColumns | Mapping[str, str] | None = None,
        positive: Mapping[str, float] | None = None,
        drop_duplicates: bool | None = None,
        positives_only: PositivesOnly | bool = False,
        negatives_per_positive: float | None = None,
        negatives_seed: int = 0,
    ) -> FrameReading:
        """Returns how frames are read by the arguments of :meth:`InteractionData.from_frames`.

        Raises:
            DataError: If they do not go together.
        """
        if positive is not None and len(positive) != 1:
            raise DataError(f"positive names one column and the value from which it is a click, got {positive!r}")
        return cls(
            LogColumns.of(columns),
            None if positive is None else next(iter(positive.items())),
            drop_duplicates,
            "train" if positives_only is True else positives_only or None,
            negatives_per_positive,
            negatives_seed,
        )

    def lists_clicks_only(self, which: str) -> bool:
        """Whether a log is declared to list clicks only."""
        return self.positives_only in (which, "both")

    @property
    def negatives(self) -> NegativeSampling:
        """How non-clicks are drawn."""
        rate = NegativeSampling.per_positive if self.negatives_per_positive is None else self.negatives_per_positive
        return NegativeSampling(per_positive=rate, seed=self.negatives_seed)

    def describe(self) -> dict[str, Any]:
        """Returns what determines the data beside the frames, JSON-able."""
        described: dict[str, Any] = {}
        if self.positive is not None:
            described["positive"] = dict([self.positive])
        if self.positives_only is not None:
            described |= {"positives_only": self.positives_only, "drawn_negatives": asdict(self.negatives)}
        return described


def read_frames(
    logs: Mapping[str, Table],
    items: Table | None,
    users: Table | None,
    reading: FrameReading,
    *,
    name: str,
    provenance: Provenance | None,
) -> tuple[Users, Catalogue, InteractionLog, InteractionLog, Provenance, dict[str, Any], NegativeSampling]:
    """Checks frames, or files that hold them, and returns the fields of a data set; see its ``from_frames``."""
    names = reading.columns
    frames, files = read_tables({"train": logs["train"], "test": logs["test"], "items": items, "users": users}, names)
    id_kinds = _IdKinds()
    parsed: dict[str, RawLog] = {}
    times: dict[str, Times | None] = {}
    for which in logs:
        parsed[which], times[which] = _parse_log(frames[which], which, reading, id_kinds)
    _check_named_columns(names, [frames[which] for which in logs], frames.get("items"))
    for which, (moments, missing) in one_unit(times).items():
        parsed[which] = replace(parsed[which], times=moments, no_time=missing)
    catalogue = _catalogue(frames.get("items"), names, parsed, id_kinds)
    people = _users(frames.get("users"), names, parsed, id_kinds)
    if len(catalogue) < 2:
        raise DataError(f"there is only one item ({catalogue.ids[0]}); a recommender needs at least two to choose from")
    sorted_logs: dict[str, InteractionLog] = {}
    report: dict[str, Any] = {}
    for split, log in parsed.items():
        sorted_logs[split], report[split] = _finish_log(split, log, people.ids, catalogue.ids, reading)
    train, test = sorted_logs["train"], sorted_logs["test"]
    sizes = (len(people), len(catalogue))
    timed = all(log.times is not None for log in parsed.values())
    _check_disjoint(train, test, timed, report, sizes)
    report["users"] = _coverage(len(people), sorted_logs, "users")
    report["items"] = _coverage(len(catalogue), sorted_logs, "items")
    report["test_pairs_in_train"] = int(pairs_met(train, test, *sizes).sum())
    if reading.positives_only is not None:
        report["drawn_negatives"] = reading.describe()["drawn_negatives"]
    if provenance is None:
        told = f"{len(train):,} training and {len(test):,} test rows"
        provenance = Provenance(name, "own", told, files, reading.describe())
    return people, catalogue, train, test, provenance, report, reading.negatives


def check_columns(
    logs: Mapping[str, pd.DataFrame], items: pd.DataFrame | None, users: pd.DataFrame | None, reading: FrameReading
) -> None:
    """Checks that frames, which may be empty, have the columns that :func:`read_frames` needs.

    Raises:
        DataError: If one lacks a column.
    """
    names = reading.columns
    for which, log in logs.items():
        for name in (names.user, names.item):
            _column(log, name, f"{which} log", _NAME_IDS)
        _feedback_column(log, reading, which)
    _check_named_columns(names, list(logs.values()), items)
    for frame, name, where in ((items, names.item, "items frame"), (users, names.user, "users frame")):
        if frame is not None:
            _column(frame, name, where, _NAME_IDS)


def _check_named_columns(names: LogColumns, logs: Sequence[pd.DataFrame], items: pd.DataFrame | None) -> None:
    """Refuses names of optional columns that no table has: a slip of the pen must not leave out times or tags."""
    usual = LogColumns()
    for field_name in ("time", "watch_ratio"):
        column = getattr(names, field_name)
        if column != getattr(usual, field_name) and all(column not in log.columns for log in logs):
            raise DataError(f"no log has the column that is named as the {field_name}", column=column)
    for field_name in ("tags", "shown"):
        column = getattr(names, field_name)
        if column != getattr(usual, field_name) and (items is None or column not in items.columns):
            where = "there is no items frame with" if items is None else "the items frame has not"
            raise DataError(f"{where} the column that is named as {field_name}", column=column)


def _parse_log(
    frame: pd.DataFrame, which: str, reading: FrameReading, id_kinds: _IdKinds
) -> tuple[RawLog, Times | None]:
    """Returns a log whose times are not set yet, and its times."""
    names, where = reading.columns, f"{which} log"
    if not len(frame):
        raise DataError(f"the {where} is empty; it needs one row per exposure")
    users = id_kinds.read(frame, names.user, where)
    items = id_kinds.read(frame, names.item, where)
    ratios = _watch_ratios(frame, names.watch_ratio, where)
    clicks = _clicks(frame, reading, which)
    used = {
        names.user,
        names.item,
        names.click,
        names.watch_ratio,
        *([] if not reading.positive else reading.positive[:1]),
    }
    time, warning = time_column(frame, names.time, used, where)
    if warning:
        warnings.warn(warning, stacklevel=5)
    times = None if time is None else read_times(_column(frame, time, where), where)
    return RawLog(users, items, clicks, watch_ratios=None if ratios is None else ratios.astype(np.float32)), times


def _column(frame: pd.DataFrame, name: str, where: str, hint: str = "") -> pd.Series[Any]:
    if name not in frame.columns:
        first_names = ", ".join(map(str, frame.columns[:8]))
        raise DataError(f"the {where} has no such column; it has: {first_names}{hint}", column=name)
    series = frame[name]
    if isinstance(series, pd.DataFrame):
        raise DataError(f"the {where} has this column twice", column=name)
    return series


class _IdKinds:
    """Reads columns of ids, and checks that each is of one kind wherever it occurs."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, str]] = {}

    def read(self, frame: pd.DataFrame, name: str, where: str) -> IdArray:
        """Returns the ids of a column, ``int64`` or text."""
        ids = _ids(frame, name, where)
        kind = "text" if ids.dtype.kind == "U" else "integers"
        before, place = self._seen.setdefault(name, (kind, where))
        if kind != before:
            raise DataError(
                f"the same id would be two: ids of the {place} are {before}, those of the {where} are {kind}; "
                f"give all of them as one, such as frame['{name}'].astype(str)",
                column=name,
            )
        return ids


def _ids(frame: pd.DataFrame, name: str, where: str) -> IdArray:
    series = _column(frame, name, where, _NAME_IDS)
    missing = series.isna().to_numpy()
    if missing.any():
        raise DataError(f"the {where} has no id in row {_first(missing)}", column=name)
    if types.is_bool_dtype(series):
        raise DataError(f"ids must be integers or text, and the {where} holds {series.iloc[0]!r}", column=name)
    if not types.is_numeric_dtype(series):
        return _mixed_ids(series, name, where)
    if types.is_float_dtype(series):
        numbers = series.to_numpy(dtype=np.float64)
        wrong = ~np.isfinite(numbers) | (numbers != np.rint(numbers)) | (np.abs(numbers) >= exact_limit(series))
        if wrong.any():
            raise DataError(
                f"ids must be integers or text; row {_first(wrong)} of the {where} has {numbers[wrong][0]} in a column "
                f"of {series.dtype}, which holds no larger integers exactly than {exact_limit(series) - 1:,}",
                column=name,
            )
        return numbers.astype(np.int64)
    if types.is_unsigned_integer_dtype(series) and series.max() > np.iinfo(np.int64).max:
        raise DataError(f"an id of the {where} does not fit 64 signed bits: {series.max()}", column=name)
    return series.to_numpy(dtype=np.int64)


def _mixed_ids(series: pd.Series[Any], name: str, where: str) -> IdArray:
    """Returns the ids of a column of Python objects: text kept as it is, or integers."""
    values = series.to_numpy(dtype=object)
    is_text = np.fromiter((isinstance(value, str) for value in values), np.bool_, len(values))
    if is_text.all():
        empty = np.fromiter((not value.strip() for value in values), np.bool_, len(values))
        if empty.any():
            raise DataError(f"the {where} has no id in row {_first(empty)}", column=name)
        return values.astype(np.str_)
    is_whole = np.fromiter(
        (isinstance(value, (int, np.integer)) and not isinstance(value, bool) for value in values),
        np.bool_,
        len(values),
    )
    if not is_whole.all():
        row = _first(~(is_text if is_text.any() else is_whole))
        raise DataError(
            f"ids must be all integers or all text; row {row} of the {where} has {values[row]!r}", column=name
        )
    try:
        return values.astype(np.int64)
    except OverflowError:
        raise DataError(f"an id of the {where} does not fit 64 signed bits", column=name) from None


def _numbers(frame: pd.DataFrame, name: str, where: str) -> NDArray[np.float64]:
    series = _column(frame, name, where)
    if not (types.is_bool_dtype(series) or types.is_numeric_dtype(series)):
        raise DataError(f"feedback must be 0 or 1, or numbers; the {where} holds {series.iloc[0]!r}", column=name)
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


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


def _feedback_column(frame: pd.DataFrame, reading: FrameReading, which: str) -> str | None:
    """Returns the column that says what is a click, which must be there; None for a log of clicks that needs none."""
    name, hint = (
        reading.columns.click,
        (
            "; name it with columns={'click': ...}, give positive={column: threshold}, or "
            "positives_only for a log that lists clicks only"
        ),
    )
    if reading.positive is not None:
        name, hint = reading.positive[0], ""
    elif reading.lists_clicks_only(which) and name not in frame.columns:
        return None
    _column(frame, name, f"{which} log", hint)
    return name


def _clicks(frame: pd.DataFrame, reading: FrameReading, which: str) -> BoolArray:
    """Returns which rows are clicks, and checks that a log holds what it is declared to hold."""
    where, declared = f"{which} log", reading.lists_clicks_only(which)
    column = _feedback_column(frame, reading, which)
    if column is None:
        return np.ones(len(frame), np.bool_)
    values = _numbers(frame, column, where)
    if reading.positive is not None:
        if np.isnan(values).any():
            raise DataError(f"row {_first(np.isnan(values))} of the {where} has no value", column=column)
        clicks = np.asarray(values >= reading.positive[1])
    else:
        wrong = (values != 0) & (values != 1)
        if wrong.any():
            raise DataError(
                f"feedback must be 0 or 1; row {_first(wrong)} of the {where} has {values[wrong][0]} "
                "(for ratings or watch ratios give positive={column: threshold})",
                column=column,
            )
        clicks = np.asarray(values == 1)
    if not clicks.any():
        raise DataError(f"the {where} holds no click; see which column, and which of its values, counts as one")
    if not declared and clicks.all():
        remedy = f"'{which}' or 'both'" if reading.positives_only is None else "'both'"
        raise DataError(
            f"the {where} holds no row without a click, so that it does not say what users do not like. If it lists "
            f"clicks only (plays, purchases), say so: positives_only={remedy}, with "
            "negatives_per_positive=4 non-clicks drawn for each click"
        )
    return clicks


def _catalogue(
    items: pd.DataFrame | None, names: LogColumns, logs: Mapping[str, RawLog], id_kinds: _IdKinds
) -> Catalogue:
    if items is None:
        ids = np.unique(np.concatenate([log.items for log in logs.values()]))
        return Catalogue(ids, FeatureTable.empty(len(ids)), np.zeros((len(ids), 0), np.bool_))
    frame, ids = _by_id(items, names.item, "items frame", id_kinds)
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


def _users(users: pd.DataFrame | None, names: LogColumns, logs: Mapping[str, RawLog], id_kinds: _IdKinds) -> Users:
    if users is None:
        ids = np.unique(np.concatenate([log.users for log in logs.values()]))
        return Users(ids, FeatureTable.empty(len(ids)))
    frame, ids = _by_id(users, names.user, "users frame", id_kinds)
    return Users(ids, encode_features(frame.drop(columns=[names.user]), "user feature"))


def _by_id(frame: pd.DataFrame, name: str, where: str, id_kinds: _IdKinds) -> tuple[pd.DataFrame, IdArray]:
    if not len(frame):
        raise DataError(f"the {where} is empty")
    ids = id_kinds.read(frame, name, where)
    repeated = np.asarray(pd.Series(ids).duplicated())
    if repeated.any():
        row = _first(repeated)
        raise DataError(f"id {ids[row]} occurs twice in the {where} (again in row {row})", column=name)
    order = np.argsort(ids)
    return frame.iloc[order], ids[order]


def _finish_log(
    which: str, parsed: RawLog, user_ids: IdArray, item_ids: IdArray, reading: FrameReading
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
    positives_only = reading.lists_clicks_only(which)
    if positives_only and not raw.clicks.all():
        raise DataError(f"the {which} log is said to hold positives only, but row {_first(~raw.clicks)} has no click")
    read = len(raw.users)
    dropping = raw.times is not None if reading.drop_duplicates is None else reading.drop_duplicates
    if dropping:
        compared = [raw.users, raw.items, raw.clicks, raw.times, raw.no_time, raw.watch_ratios]
        raw = raw.take(~exact_duplicates([column for column in compared if column is not None]))
    log, counts = build_log(raw, positives_only)
    return log, {"rows_read": read, "exact_duplicates_dropped": read - len(log), **counts}


def _check_disjoint(
    train: InteractionLog, test: InteractionLog, timed: bool, report: Mapping[str, Any], sizes: tuple[int, int]
) -> None:
    """Refuses a test log that agents would see: timed rows in both, or a test log that is all in train."""
    untimed_test = test
    if timed:
        _check_units(train, test, sizes)
        known = {
            which: log.times < log.times.max() if report[which]["rows_without_time"] else np.ones(len(log), np.bool_)
            for which, log in (("train", train), ("test", test))
        }
        columns = ("users", "items", "times")
        shared = count_shared_rows(train.take(known["train"]), test.take(known["test"]), columns, *sizes)
        if shared:
            raise DataError(
                f"{shared:,} rows of the test log (user, item, time) are in the training log too; split the log "
                "so that no row is in both"
            )
        untimed_test = test.take(~known["test"])
    if 2 * len(untimed_test) < len(test):
        return
    shared = count_shared_rows(train, untimed_test, ("users", "items", "clicks"), *sizes)
    if shared == len(untimed_test):
        which = "row without time" if timed else "row"
        raise DataError(f"every {which} of the test log is in the training log too; split the log in two")


def _check_units(train: InteractionLog, test: InteractionLog, sizes: tuple[int, int]) -> None:
    """Refuses logs that are the same rows with times of two units, which do not tell by themselves what they are."""
    for factor in (10**3, 10**6, 10**9):
        for fine, coarse, words in ((test, train, "test"), (train, test, "training")):
            largest = int(coarse.times.max())
            if largest < _FEW_MOMENTS or not 0.1 <= int(fine.times.max()) / largest / factor <= 10:
                continue
            scaled = replace(fine, times=fine.times // factor)
            shared = count_shared_rows(coarse, scaled, ("users", "items", "times"), *sizes)
            if 2 * shared > min(len(train), len(test)):
                raise DataError(
                    f"{shared:,} rows are in both logs, if times of the {words} log are divided by {factor:,}; give "
                    "both logs times of one unit, and split the log so that no row is in both"
                )


def _coverage(total: int, logs: Mapping[str, InteractionLog], what: str) -> dict[str, int]:
    seen = {which: np.bincount(getattr(log, what), minlength=total) > 0 for which, log in logs.items()}
    return {
        "total": total,
        "without_training_rows": int((~seen["train"]).sum()),
        "without_test_rows": int((~seen["test"]).sum()),
    }


def _first(mask: NDArray[np.bool_]) -> int:
    return int(np.argmax(mask))
