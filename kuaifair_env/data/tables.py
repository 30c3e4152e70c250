"""Tables of one's own: data frames, or CSV, TSV and Parquet files, and one log split in two."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api import types

from kuaifair_env.data.encoding import MISSING_WORDS
from kuaifair_env.data.times import exact_limit, read_times, time_column
from kuaifair_env.errors import DataError
from kuaifair_env.files import file_hash

Table: TypeAlias = "pd.DataFrame | str | Path"
SplitRule = Literal["time", "user"]

_INTEGER = r"-?(?:0|[1-9]\d{0,17})"
_SEPARATORS = ("\t", ",", ";")
_BLOCK = 1 << 20
_PARQUET = (".parquet", ".pq")
_NO_TIME = "the log has no column of times to split by; name it with columns={'time': ...}"


@dataclass(frozen=True)
class LogColumns:
    """Names of the columns of a user's frames.

    Attributes:
        user: User ids, in the logs and the users frame.
        item: Item ids, in the logs and the items frame.
        click: Feedback, 0 or 1.
        time: Time of the exposure: integers of any unit, float seconds, datetimes, or text of these. None takes the
            column of the log that is called ``time``, ``timestamp``, ``ts``, ``date`` or ``datetime``, if there is one.
        watch_ratio: Play time over duration, used when the log has it.
        tags: In the items frame: tags of each item, as lists or as text that holds lists (``"[8, 3]"``, ``"A|B"``).
        shown: In the items frame: platform-wide exposure counts.
    """

    user: str = "user_id"
    item: str = "item_id"
    click: str = "click"
    time: str | None = None
    watch_ratio: str = "watch_ratio"
    tags: str = "tags"
    shown: str = "shown"

    @classmethod
    def of(cls, columns: LogColumns | Mapping[str, str] | None) -> LogColumns:
        """Returns names of columns that may be given by field, as ``{"user": "customer"}``; None takes the usual ones.

        Raises:
            DataError: If there is no such field.
        """
        if columns is None or isinstance(columns, LogColumns):
            return columns or cls()
        known = [column.name for column in fields(cls)]
        unknown = sorted(set(columns) - set(known))
        if unknown:
            raise DataError(f"columns has no {unknown[0]!r}; it names {', '.join(known)}")
        return cls(**columns)


def read_tables(
    tables: Mapping[str, Table | None], columns: LogColumns
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Reads tables that are given as files, and leaves data frames as they are.

    Ids of text files stay the text that they are (``007``, ``NA``), unless all ids of a column are plain integers in
    every table.

    Args:
        tables: By name; None for a table that there is not.
        columns: Names of the columns.

    Returns:
        The tables that there are, and the SHA-256 of every file by its name.

    Raises:
        DataError: If a file is missing or cannot be read.
    """
    ids = (columns.user, columns.item)
    frames: dict[str, pd.DataFrame] = {}
    hashes: dict[str, str] = {}
    for name, table in tables.items():
        if isinstance(table, (str, Path)):
            frames[name] = read_table(table, ids)
            hashes[Path(table).name] = file_hash(Path(table))
        elif isinstance(table, pd.DataFrame):
            frames[name] = table
        elif table is not None:
            raise DataError(f"{name} must be a pandas DataFrame or a file, got {type(table).__name__}")
    for column in ids:
        holders = [name for name, frame in frames.items() if column in frame.columns]
        read = [name for name in holders if not isinstance(tables[name], pd.DataFrame)]
        given = [name for name in holders if name not in read]
        integers = all(types.is_numeric_dtype(frames[name][column]) for name in given)
        if integers and all(_plain_integers(frames[name][column]) for name in read):
            for name in read:
                frames[name] = frames[name].assign(**{column: frames[name][column].astype(np.int64)})
    return frames, hashes


def read_table(path: str | Path, text_columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Reads a CSV or TSV file with a header (also compressed), or a Parquet file.

    Args:
        path: The file; its first line says what separates columns: tabs, commas or semicolons.
        text_columns: Columns that are read as the text that they are.

    Raises:
        DataError: If the file is missing or cannot be read.
    """
    file = Path(path).expanduser()
    with _table_errors(file):
        if file.suffix.lower() in _PARQUET:
            return pd.read_parquet(file)
        header, separator = _text_header(file)
        return pd.read_csv(
            file,
            sep=separator,
            encoding="utf-8-sig",
            dtype=dict.fromkeys(text_columns, str),
            keep_default_na=False,
            na_values={name: [""] if name in text_columns else sorted(MISSING_WORDS) for name in header},
        )


def read_header(path: str | Path) -> pd.DataFrame:
    """Reads the columns of what :func:`read_table` reads, without its rows.

    Raises:
        DataError: If the file is missing or cannot be read.
    """
    file = Path(path).expanduser()
    with _table_errors(file):
        if file.suffix.lower() in _PARQUET:
            from pyarrow.parquet import read_schema

            return pd.DataFrame(columns=read_schema(file).names)
        return pd.DataFrame(columns=_text_header(file)[0])


def _text_header(file: Path) -> tuple[pd.Index[Any], str]:
    """Returns the columns of a text file, and what separates them."""
    _check_text(file)
    # The fast parser reads a line of any separator as one field of the header.
    (first_line,) = pd.read_csv(file, sep="\x00", nrows=0, encoding="utf-8-sig").columns
    separator = max(_SEPARATORS, key=first_line.count)
    return pd.read_csv(file, sep=separator, nrows=0, encoding="utf-8-sig").columns, separator


def _check_text(file: Path) -> None:
    """Refuses what is no table of text: a first line that does not end, or NUL bytes.

    Raises:
        ValueError: If it is not.
    """
    if file.suffix not in ("", ".csv", ".tsv", ".txt", ".gz"):
        return
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        block = stream.read(_BLOCK)
        if len(block) == _BLOCK and b"\n" not in block and b"\r" not in block:
            raise ValueError(f"its first line has more than {_BLOCK:,} bytes")
        while block:
            if b"\0" in block:
                raise ValueError("it holds NUL bytes, which no text in UTF-8 has")
            block = stream.read(_BLOCK)


@contextmanager
def _table_errors(file: Path) -> Iterator[None]:
    """Turns what reading a table raises into errors that name the file."""
    if not file.is_file():
        raise DataError("there is no such file", file=file)
    try:
        yield
    except ImportError as error:
        raise DataError(
            "reading Parquet needs pyarrow: pip install 'kuaifair[parquet]', or write the table as CSV", file=file
        ) from error
    except MemoryError as error:
        raise DataError("is larger than the memory, or says so of itself", file=file) from error
    except (ArithmeticError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        # The readers' own errors are among them.
        problem = " ".join(str(error).split())
        raise DataError(f"cannot be read as a table with a header: {problem}", file=file) from error


def split_log(
    log: Table, rule: SplitRule, share: float = 0.2, columns: LogColumns | Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Splits one log into a training and a test log; rows of one moment stay together.

    The test log then has the exposure bias of the training log: what a test world says about items that were hardly
    shown is an extrapolation.

    Args:
        log: A data frame or a file.
        rule: ``"time"``: the latest rows of the whole log are the test log, rows without time are training rows.
            ``"user"``: the latest rows of each user are; without a column of times, those that stand last.
        share: Share of the rows that the test log gets.
        columns: Names of the columns.

    Returns:
        The training log and the test log.

    Raises:
        DataError: If there is no time to split by, or a part would be empty.
        ValueError: If the rule or the share is not valid.
    """
    names = LogColumns.of(columns)
    frames, _ = read_tables({"train": log}, names)
    frame = frames["train"]
    check_split(frame, rule, share, names)
    moments = _moments(frame, names)
    if rule == "time":
        if moments is None:
            raise DataError(_NO_TIME)
        known = np.sort(moments[moments >= 0])
        first = known[min(int(np.ceil(len(known) * (1 - share))), len(known) - 1)]
        tested = moments >= first
    else:
        table = pd.DataFrame({"user": frame[names.user].to_numpy(), "moment": np.arange(len(frame))})
        if moments is not None:
            table["moment"] = moments
        by_user = table.groupby("user")["moment"]
        place = by_user.rank(method="min") - 1
        size = by_user.transform("size")
        tested = np.asarray((place >= np.round(size * (1 - share))) & (place > 0))
    if tested.all() or not tested.any():
        raise DataError(f"splitting the log by {rule} leaves one part without rows; it has {len(frame)} rows")
    return frame[~tested], frame[tested]


def check_split(frame: pd.DataFrame, rule: str, share: float, names: LogColumns) -> None:
    """Checks that a log, which may be an empty frame, can be split by a rule.

    Raises:
        DataError: If it lacks the column to split by.
        ValueError: If the rule or the share is not valid.
    """
    if rule not in get_args(SplitRule):
        raise ValueError(f"a log is split by one of {get_args(SplitRule)}, got {rule!r}")
    if not 0 < share < 1:
        raise ValueError(f"the test log's share must lie between 0 and 1, got {share}")
    if rule == "time" and _time_of(frame, names) is None:
        raise DataError(_NO_TIME)
    if rule == "user" and names.user not in frame.columns:
        raise DataError("the log has no such column", column=names.user)


def _time_of(frame: pd.DataFrame, names: LogColumns) -> str | None:
    used = {names.user, names.item, names.click, names.watch_ratio}
    return time_column(frame, names.time, used, "log")[0]


def _moments(frame: pd.DataFrame, names: LogColumns) -> NDArray[np.int64] | None:
    """Returns the rank of each row's time among all times, -1 where it is missing, or None without times."""
    column = _time_of(frame, names)
    times = None if column is None else read_times(frame[column], "log")
    if times is None:
        return None
    ranks = np.unique(times.values, return_inverse=True)[1]
    return np.where(times.missing, -1, ranks).astype(np.int64)


def _plain_integers(series: Any) -> bool:
    """Whether a column holds integers, or text that is nothing else."""
    if not isinstance(series, pd.Series) or types.is_bool_dtype(series):
        return False
    if types.is_integer_dtype(series):
        return not series.isna().any() and (series.empty or bool(series.max() <= np.iinfo(np.int64).max))
    if types.is_numeric_dtype(series):
        numbers = series.to_numpy(na_value=np.nan)
        return bool(((np.abs(numbers) < exact_limit(series)) & (numbers == np.rint(numbers))).all())
    distinct = pd.Series(series.unique())
    return bool(distinct.map(lambda value: isinstance(value, str)).all() and distinct.str.fullmatch(_INTEGER).all())
