"""Times of logs: which column holds them, what kind they are, and both logs brought to one unit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from kuaifair_env.data.schema import BoolArray
from kuaifair_env.errors import DataError

TIME_NAMES = ("time", "timestamp", "ts", "date", "datetime")
"""Columns that are taken for the time of a log, in any case, where none is named."""

_TIME_WORDS = {*TIME_NAMES, "when", "day", "moment", "unixtime", "created", "updated"}
_DURATION_WORDS = {"watch", "watched", "play", "played", "dwell", "stay", "spent", "duration", "listen", "read", "view"}
_UNITS = (("seconds", 1.0), ("milliseconds", 1e3), ("microseconds", 1e6), ("nanoseconds", 1e9))
_EPOCH = (5e8, 4e9)  # 1985 to 2096, in seconds since 1970
_DIGITS = {"float16": 11, "float32": 24, "float[pyarrow]": 24, "halffloat[pyarrow]": 11}
"""Binary digits of kinds of floats; others have 53."""
_FEW = 10
_ISO_DATE = re.compile(r"\d{4}-?\d{2}-?\d{2}")
_ZONE = re.compile(r":.*(?:Z|[+-]\d{2}:?\d{2})$")


@dataclass(frozen=True)
class Times:
    """The times of one log.

    Attributes:
        kind: What they are, in words; times of different kinds cannot be compared.
        values: ``int64 (R,)`` or whole-or-fractional ``float64 (R,)`` numbers; milliseconds for datetimes.
        missing: ``bool (R,)``, rows whose time is unknown; their values do not count.
        precision: What they were rounded to, as far as the rows tell; empty where they are too few.
    """

    kind: str
    values: NDArray[Any]
    missing: BoolArray
    precision: str = ""


def time_column(frame: pd.DataFrame, name: str | None, used: Collection[str], where: str) -> tuple[str | None, str]:
    """Returns which column holds the times of a log, and what its reader should be told.

    Args:
        frame: The log.
        name: The column that the user named; None looks for one of :data:`TIME_NAMES`, in any case.
        used: Columns that hold something else.
        where: The log, for messages.

    Returns:
        The column or None, and a warning, empty for none.

    Raises:
        DataError: If several columns may be the time and none is called ``time``.
    """
    if name is not None:
        return (name if name in frame.columns else None), ""
    others = [column for column in frame.columns if column not in used]
    named = [column for column in others if str(column).lower() in TIME_NAMES]
    if "time" in named:
        return "time", ""
    like = [column for column in others if column not in named and _looks_like_time(str(column), frame[column])]
    if len(named) == 1 and not like:
        return named[0], ""
    candidates = ", ".join(f"'{column}'" for column in [*named, *like])
    if named:
        raise DataError(
            f"several columns of the {where} may be its time ({candidates}); name the right one with "
            "columns={'time': ...}"
        )
    if like:
        return None, (
            f"the {where} has no column called {' or '.join(TIME_NAMES[:3])}, and {candidates}, which looks like a "
            "time, is not read: rows count as sorted. Name it with columns={'time': ...}, or drop it"
        )
    return None, ""


def read_times(series: pd.Series[Any], where: str) -> Times | None:
    """Reads a column of times: numbers, datetimes, or text of either (dates in ISO form); None if all are missing.

    Raises:
        DataError: If it holds something else, or numbers that are not exact.
    """
    name = str(series.name)
    if isinstance(series.dtype, pd.CategoricalDtype):
        series = series.astype(object)
    if types.is_object_dtype(series) or types.is_string_dtype(series):
        series = _of_text(series, where)
    missing = np.asarray(series.isna(), np.bool_)
    if missing.all():
        return None
    if types.is_datetime64_any_dtype(series):
        kind = "dates without a time zone"
        if isinstance(series.dtype, pd.DatetimeTZDtype):
            kind, series = "dates with a time zone", series.dt.tz_convert("UTC").dt.tz_localize(None)
        moments = series.to_numpy().astype("datetime64[ms]").astype(np.int64)
        return Times(kind, moments, missing, _precision(moments[~missing], 1000))
    if not types.is_numeric_dtype(series) or types.is_bool_dtype(series):
        raise DataError(
            f"times of the {where} must be numbers or datetimes (see pandas.to_datetime), not {series.iloc[0]!r}",
            column=name,
        )
    values: NDArray[Any]
    if types.is_integer_dtype(series):
        if series.max() > np.iinfo(np.int64).max:
            raise DataError(f"a time of the {where} does not fit 64 signed bits: {series.max()}", column=name)
        values = np.asarray(series.to_numpy(dtype=np.int64, na_value=0))
    else:
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
        single = series.dtype.name.lower() in _DIGITS
        wrong = np.isinf(values) | (np.abs(values) >= exact_limit(series))
        if wrong.any():
            row = int(np.argmax(wrong))
            remedy = "read times as 64-bit numbers" if single else "read it as 'Int64'"
            raise DataError(
                f"row {row} of the {where} has time {values[row]}, which is no exact number in a column of "
                f"{series.dtype} (a missing time turns a column of integers into floats: {remedy})",
                column=name,
            )
        values = np.where(missing, 0.0, values)
    _check_one_unit(values, missing, where, name)
    kind = _kind_of_numbers(values[~missing])
    second = next((factor for unit, factor in _UNITS if kind.startswith(f"{unit} ")), 1.0)
    return Times(kind, values, missing, _precision(values[~missing], second))


def exact_limit(series: pd.Series[Any]) -> int:
    """Returns the integer from which on a column of floats may hold another integer than was written."""
    return 1 << _DIGITS.get(series.dtype.name.lower(), 53)


def _check_one_unit(values: NDArray[Any], missing: BoolArray, where: str, name: str) -> None:
    """Refuses a column in which some times since 1970 are of one unit and some of another."""
    units: dict[str, int] = {}
    for unit, factor in _UNITS:
        rows = np.flatnonzero(~missing & (values >= _EPOCH[0] * factor) & (values <= _EPOCH[1] * factor))
        if len(rows):
            units[unit] = int(rows[0])
    if len(units) > 1:
        told = " and ".join(f"row {row} in {unit}" for unit, row in units.items())
        raise DataError(f"times of the {where} are of several units since 1970: {told}; bring them to one", column=name)


def one_unit(times: Mapping[str, Times | None]) -> dict[str, tuple[NDArray[np.int64] | None, BoolArray | None]]:
    """Brings the times of several logs to one unit, so that equal times are equal numbers.

    Whole numbers stay as they are; where a log has fractions, all logs are multiplied by 1000 and rounded.

    Args:
        times: By log; None for a log without time.

    Returns:
        For each log its ``int64 (R,)`` times, and which are missing; None for neither.

    Raises:
        DataError: If the logs' times are of different kinds, or too large to be multiplied.
    """
    known = {which: log for which, log in times.items() if log is not None}
    for kinds in (
        {log.kind: which for which, log in known.items()},
        {log.precision: which for which, log in known.items() if log.precision},
    ):
        if len(kinds) > 1:
            told = " and ".join(f"those of the {which} log are {kind}" for kind, which in kinds.items())
            raise DataError(f"times cannot be compared: {told}; give both logs times of one kind, unit and precision")
    scale = 1
    for log in known.values():
        if log.values.dtype.kind == "f" and (log.values != np.rint(log.values)).any():
            scale = 1000
    united: dict[str, tuple[NDArray[np.int64] | None, BoolArray | None]] = dict.fromkeys(times, (None, None))
    for which, log in known.items():
        if scale > 1 and np.abs(log.values).max() > np.iinfo(np.int64).max / scale:
            raise DataError(f"times of the {which} log are too large beside fractions of a second in another log")
        values = log.values * scale if log.values.dtype.kind == "i" else np.rint(log.values * scale)
        united[which] = values.astype(np.int64), log.missing if log.missing.any() else None
    return united


def _of_text(series: pd.Series[Any], where: str) -> pd.Series[Any]:
    """Turns text and Python objects into numbers or datetimes."""
    values = series.reset_index(drop=True)
    known = values.dropna()
    known = known[[not (isinstance(value, str) and not value.strip()) for value in known]]
    try:
        parsed: pd.Series[Any] = pd.to_numeric(known)
    except (ValueError, TypeError):
        text = known.astype(str).str.strip()
        zoned = text.str.contains(_ZONE)
        try:
            if zoned.any() and not zoned.all():
                raise ValueError("some have a time zone") from None
            parsed = pd.to_datetime(text, format="ISO8601", utc=bool(zoned.any()))
        except (ValueError, TypeError, OverflowError):
            raise DataError(
                f"times of the {where} must be numbers or datetimes, or dates as text in ISO form "
                f"(2024-01-31 12:00:00), not {known.iloc[0]!r}; see pandas.to_datetime",
                column=str(series.name),
            ) from None
    if types.is_integer_dtype(parsed):
        # Stays exact beside missing values.
        parsed = parsed.astype("UInt64" if types.is_unsigned_integer_dtype(parsed) else "Int64")
    return parsed.reindex(values.index)


def _kind_of_numbers(values: NDArray[Any]) -> str:
    middle = float(np.median(np.abs(values)))
    for unit, factor in _UNITS:
        if _EPOCH[0] * factor <= middle <= _EPOCH[1] * factor:
            return f"{unit} since 1970"
    year, month_day = np.divmod(values, 10_000)
    month, day = np.divmod(month_day, 100)
    if ((year >= 1900) & (year < 2100) & (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)).all():
        return "dates as numbers (20240131)"
    return "plain numbers"


def _precision(values: NDArray[Any], second: float) -> str:
    """Returns what known times were rounded to; ``second`` is the number of units in one."""
    if len(values) < _FEW:
        return ""
    if not (values % (86_400 * second)).any():
        return "whole days"
    return "with fractions of a second" if (values % second).any() else "whole seconds"


def _looks_like_time(name: str, series: Any) -> bool:
    """Whether a column that nobody named holds times, by its name or by what it holds."""
    if not isinstance(series, pd.Series) or types.is_bool_dtype(series):
        return False
    if types.is_datetime64_any_dtype(series):
        return True
    spelled = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    if spelled and spelled[-1] == "at":  # created_at
        return True
    words = set(spelled)
    if words & _DURATION_WORDS:
        return False
    known = series.dropna()
    if types.is_numeric_dtype(series):
        numbers = known.to_numpy(dtype=np.float64)
        return bool(words & _TIME_WORDS) or (len(numbers) > 0 and "since 1970" in _kind_of_range(numbers))
    text = known.iloc[:20]
    return len(text) > 0 and all(isinstance(value, str) and bool(_ISO_DATE.match(value.strip())) for value in text)


def _kind_of_range(values: NDArray[np.float64]) -> str:
    kinds = {_kind_of_numbers(values.min(keepdims=True)), _kind_of_numbers(values.max(keepdims=True))}
    return kinds.pop() if len(kinds) == 1 else "plain numbers"
