"""Reads columns of CSV files, with errors that name file, line and column.

The fast path parses typed chunks and checks them as arrays. Only when something is wrong is the file read
again, record by record, to find the physical line.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.encoding import MISSING_WORDS
from kuaifair_env.data.sources import READ_ERRORS, SourceFiles
from kuaifair_env.errors import DataError

_LARGEST_INTEGER = 2**62
_INTEGER = re.compile(r"\s*[+-]?\d+(\.0*)?\s*")


@dataclass(frozen=True)
class Column:
    """The rules for a column of a CSV file.

    Attributes:
        name: Name in the header.
        kind: ``"integer"``, ``"number"`` (finite), ``"code"`` (a whole number, read as a float) or ``"text"``.
        missing_ok: Whether cells may be empty; never for integers.
        low: Smallest value.
        high: Largest value.
        meaning: What the bounds mean, for messages, such as "user_features.csv lists ids 0..7175".
    """

    name: str
    kind: Literal["integer", "number", "code", "text"] = "number"
    missing_ok: bool = False
    low: float = -math.inf
    high: float = math.inf
    meaning: str = ""

    def problem_of(self, cell: str) -> str | None:
        """Returns what is wrong with one cell, or None."""
        if cell in MISSING_WORDS:
            return None if self.missing_ok else "the value is missing"
        if self.kind == "text":
            return None
        if self.kind == "integer" and not _INTEGER.fullmatch(cell):
            return f"{cell!r} is not an integer"
        try:
            value = float(cell)
        except ValueError:
            return f"{cell!r} is not a number"
        if not math.isfinite(value) or (self.kind != "number" and abs(value) > _LARGEST_INTEGER):
            return f"{cell!r} is too large or not finite"
        if self.kind == "code" and not value.is_integer():
            return f"{cell!r} is not a code, which is a whole number"
        if not self.low <= value <= self.high:
            return f"{cell} is out of range; {self.meaning or f'it must lie in {self.low:g}..{self.high:g}'}"
        return None

    def breaks(self, values: NDArray[Any]) -> bool:
        """Returns whether any value of a parsed chunk breaks the rules."""
        if self.kind == "text":
            return not self.missing_ok and bool(pd.isna(values).any())
        if self.kind in ("number", "code"):
            if bool(np.isinf(values).any()) or (not self.missing_ok and bool(np.isnan(values).any())):
                return True
            values = values[~np.isnan(values)] if self.missing_ok else values
            if self.kind == "code" and not bool(((values % 1 == 0) & (np.abs(values) <= _LARGEST_INTEGER)).all()):
                return True
        return len(values) > 0 and not (self.low <= values.min() and values.max() <= self.high)


def read_columns(
    files: SourceFiles, name: str, columns: Sequence[Column], chunk_rows: int = 1_000_000
) -> dict[str, NDArray[Any]]:
    """Reads some columns of a CSV file with a header; see :func:`iter_columns`.

    Returns:
        Column name -> values of all rows, in file order.

    Raises:
        DataError: See there.
    """
    chunks = list(iter_columns(files, name, columns, chunk_rows))
    return {column.name: np.concatenate([chunk[column.name] for chunk in chunks]) for column in columns}


def iter_columns(
    files: SourceFiles, name: str, columns: Sequence[Column], chunk_rows: int = 1_000_000
) -> Iterator[dict[str, NDArray[Any]]]:
    """Reads some columns of a CSV file with a header, a part of the rows at a time.

    Args:
        files: Where the file lies.
        name: Its name.
        columns: What to read and what each column must hold.
        chunk_rows: Rows that are parsed at a time.

    Yields:
        Column name -> ``int64``, ``float64`` (NaN where missing) or ``object`` (None where missing), in file
        order.

    Raises:
        DataError: With file, line and column, for a missing column, a bad or missing value, a value out of
            range, a record with too few or too many fields, or a truncated or damaged file.
    """
    header = _header(files, name, columns)
    rows = 0
    cause: BaseException | None = None
    with files.open(name) as raw:
        tally = _Tally(raw)
        try:
            for frame in _chunks(tally, columns, chunk_rows):
                chunk = _checked(frame, columns)
                yield chunk
                rows += len(frame)
        except (*READ_ERRORS, ValueError, OverflowError) as error:
            cause = error
    if cause is not None:
        problem = _find_problem(files, name, header, columns, rows, strict=True)
        raise (problem or DataError(f"cannot be read: {cause}", file=files.label(name))) from cause
    if not rows:
        raise DataError("there is a header but no row", file=files.label(name), line=1)
    if not tally.fits(rows, len(header)):
        problem = _find_problem(files, name, header, columns, 0, strict=False)
        if problem is not None:
            raise problem
        if tally.last != b"\n":
            line = line_of_row(files, name, rows - 1)
            raise DataError(
                "the file ends in the middle of this line; it is truncated", file=files.label(name), line=line
            )


def _checked(frame: pd.DataFrame, columns: Sequence[Column]) -> dict[str, NDArray[Any]]:
    """Returns the columns of a parsed chunk.

    Raises:
        ValueError: When a value breaks the rules of its column.
    """
    chunk = {}
    for column in columns:
        values = frame[column.name].to_numpy(copy=column.kind == "text")
        if column.kind == "text":
            values[pd.isna(values)] = None
        if column.breaks(values):
            raise ValueError(f"a bad value in column '{column.name}'")
        chunk[column.name] = values
    return chunk


def line_of_row(files: SourceFiles, name: str, row: int) -> int:
    """Returns the physical line (1-based, the header is line 1) on which data row ``row`` begins."""
    records = _Records(files, name)
    for number, _ in enumerate(records):
        if number == row + 1:
            return records.line
    raise IndexError(f"{files.label(name)} has no row {row}")


def row_error(files: SourceFiles, name: str, column: str, row: int, problem: str) -> DataError:
    """Returns the error of a value in data row ``row`` of a column."""
    return DataError(problem, file=files.label(name), line=line_of_row(files, name, row), column=column)


class _Tally(io.BufferedIOBase):
    """Passes a binary stream on and counts separators, which shows whether every record was whole."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.commas = self.quotes = 0
        self.last = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1, /) -> bytes:
        block = self._stream.read(-1 if size is None else size)
        if block:
            self.commas += block.count(b",")
            self.quotes += block.count(b'"')
            self.last = block[-1:]
        return block

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(size if size > 0 else io.DEFAULT_BUFFER_SIZE)

    def fits(self, rows: int, width: int) -> bool:
        """Whether the file ends with a whole line and, quotes apart, has the right number of fields."""
        return self.last == b"\n" and not self.quotes and self.commas == (rows + 1) * (width - 1)


def _chunks(stream: io.BufferedIOBase, columns: Sequence[Column], chunk_rows: int) -> Iterator[pd.DataFrame]:
    kinds = {"integer": "int64", "number": "float64", "code": "float64", "text": "object"}
    return cast(
        "Iterator[pd.DataFrame]",
        pd.read_csv(
            cast(Any, stream),
            usecols=[column.name for column in columns],
            dtype=cast(Any, {column.name: kinds[column.kind] for column in columns}),
            keep_default_na=False,
            na_values=sorted(MISSING_WORDS),
            chunksize=chunk_rows,
            encoding="utf-8",
        ),
    )


def _header(files: SourceFiles, name: str, columns: Sequence[Column]) -> list[str]:
    try:
        header = next(iter(_Records(files, name)), None)
    except READ_ERRORS as error:
        raise DataError(f"cannot be read ({error}); it is truncated or damaged", file=files.label(name)) from error
    if header is None:
        raise DataError("the file is empty; it must begin with a header", file=files.label(name), line=1)
    for column in columns:
        if header.count(column.name) != 1:
            shown_header = ", ".join(header[:8]) + (", ..." if len(header) > 8 else "")
            how = "is missing" if column.name not in header else "occurs twice"
            raise DataError(
                f"this column {how}; the header is: {shown_header}",
                file=files.label(name),
                line=1,
                column=column.name,
            )
    return header


class _Records:
    """Iterates over the records of a CSV file, blank lines aside; ``line`` is where each one begins."""

    def __init__(self, files: SourceFiles, name: str, strict: bool = False) -> None:
        self._files, self._name, self._strict = files, name, strict
        self.line = 1

    def __iter__(self) -> Iterator[list[str]]:
        with self._files.open(self._name) as raw:
            text = io.TextIOWrapper(cast(Any, raw), encoding="utf-8-sig", errors="replace", newline="")
            reader = csv.reader(text, strict=self._strict)
            for record in reader:
                if record:
                    yield record
                self.line = reader.line_num + 1


def _find_problem(
    files: SourceFiles,
    name: str,
    header: Sequence[str],
    columns: Sequence[Column],
    good_rows: int,
    strict: bool,
) -> DataError | None:
    """Reads record by record and returns the first problem, or None; ``good_rows`` rows are known to be good.

    Quotes are read strictly only where the fast parser failed too: it forgives what does no harm.
    """
    label = files.label(name)
    places = [(header.index(column.name), column) for column in columns]
    records = _Records(files, name, strict)
    try:
        for number, record in enumerate(records):
            if number <= good_rows:
                continue
            if len(record) != len(header):
                short = len(record) < len(header)
                guess = "the file is truncated or the line is broken" if short else "two lines may have run together"
                return DataError(
                    f"{len(record)} fields where the header has {len(header)}; {guess}",
                    file=label,
                    line=records.line,
                    column=header[len(record)] if short else None,
                )
            for place, column in places:
                problem = column.problem_of(record[place])
                if problem is not None:
                    return DataError(problem, file=label, line=records.line, column=column.name)
    except (*READ_ERRORS, csv.Error) as error:
        return DataError(
            f"cannot be read from this line on ({error}); the file or archive is truncated or damaged",
            file=label,
            line=records.line,
        )
    return None


def check_unique(files: SourceFiles, name: str, column: str, values: NDArray[Any]) -> None:
    """Checks that an id column holds every id once.

    Raises:
        DataError: Naming the line of the first repeated id.
    """
    repeated = np.asarray(pd.Series(values).duplicated())
    if repeated.any():
        row = int(np.argmax(repeated))
        raise row_error(files, name, column, row, f"id {values[row]} occurs twice")
