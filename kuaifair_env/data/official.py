"""Steps that the readers of the two official data sets share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.archives import SourceFiles
from kuaifair_env.data.cache import cached
from kuaifair_env.data.csv_columns import Column, check_unique, line_of_row, read_columns
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.features import encode_features
from kuaifair_env.data.logs import RawLog, build_log, exact_duplicates, pairs_met, rows_of
from kuaifair_env.data.schema import InteractionLog, Users
from kuaifair_env.data.sources import (
    UNKNOWN_CODE,
    USER_CATEGORIES,
    USER_NUMBERS,
    OfficialDataset,
    find_source,
    open_source,
)
from kuaifair_env.errors import DataError


def read_users(files: SourceFiles, name: str) -> Users:
    """Reads a table of users, which has the same columns in both data sets.

    The ``*_range`` columns repeat the numbers beside them and are left out. ``UNKNOWN`` and -124 are missing.
    """
    columns = [
        Column("user_id", "integer", low=0),
        Column("user_active_degree", "text", missing_ok=True),
        *(Column(number, missing_ok=True) for number in USER_NUMBERS),
        *(Column(category, missing_ok=True) for category in USER_CATEGORIES),
    ]
    table = read_columns(files, name, columns)
    ids = table.pop("user_id")
    check_unique(files, name, "user_id", ids)
    order = np.argsort(ids)
    return Users(
        ids[order], encode_features(category_frame(table, USER_CATEGORIES).iloc[order], "user feature")
    )


def category_frame(table: Mapping[str, NDArray[Any]], categories: Sequence[str]) -> pd.DataFrame:
    """Puts columns of an official table into a frame, codes and text as categories, -124 and ``UNKNOWN`` as missing.

    Args:
        table: Columns by name; text as ``object`` with None where missing, all else as numbers.
        categories: Names of the numeric columns that hold codes.
    """
    frame = pd.DataFrame(
        {name: pd.Categorical(values) if values.dtype == object else values for name, values in table.items()}
    )
    for name in frame.columns:
        if name in categories and frame[name].dtype.kind == "f":
            codes = frame[name].where(frame[name] != UNKNOWN_CODE).astype("Int64")
            frame[name] = codes.astype("category")
        elif isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].cat.remove_categories(
                [value for value in frame[name].cat.categories if value == "UNKNOWN"]
            )
    return frame


def id_column(name: str, known: NDArray[np.int64], where: str) -> Column:
    """Describes a column of ids that must be among the known ones."""
    meaning = f"{where} lists ids {known[0]}..{known[-1]}"
    return Column(name, "integer", low=float(known[0]), high=float(known[-1]), meaning=meaning)


def known_rows(
    files: SourceFiles, name: str, column: str, ids: NDArray[np.int64], known: NDArray[np.int64], where: str
) -> NDArray[np.int32]:
    """Turns raw ids of a log into rows.

    Raises:
        DataError: With the line of the first id that is not known.
    """
    rows, unknown = rows_of(ids, known)
    if unknown.any():
        row = int(np.argmax(unknown))
        raise DataError(
            f"id {ids[row]} is not in {where}",
            file=files.label(name),
            line=line_of_row(files, name, row),
            column=column,
        )
    return rows


def finish_log(raw: RawLog, compared: Sequence[NDArray[Any]]) -> tuple[InteractionLog, dict[str, int]]:
    """Drops exact duplicates, sorts, and counts.

    Args:
        raw: The log as read.
        compared: The columns in which a row must equal an earlier one to be a duplicate.
    """
    repeated = exact_duplicates(compared)
    read, dropped = len(repeated), int(repeated.sum())
    log, counts = build_log(raw.take(~repeated) if dropped else raw)
    return log, {"rows_read": read, "exact_duplicates_dropped": dropped, **counts}


def overlap(train: InteractionLog, test: InteractionLog, n_users: int, n_items: int) -> int:
    """Counts the test rows whose user and item also meet in the training log."""
    return int(pairs_met(train, test, n_users, n_items).sum())


def load_cached(
    facts: OfficialDataset,
    path: str | Path | None,
    data_dir: str | Path | None,
    cache: str | Path | None,
    settings: Mapping[str, Any],
    read: Callable[[SourceFiles], InteractionData],
    used: Sequence[str],
) -> InteractionData:
    """Reads official files on first use and opens the cached result afterwards.

    The cache entry belongs to these very files: when size or time of change of one of them changes, they are
    read again.

    Raises:
        DataError: If there are no files, or from the reader.
    """
    place = path if path is not None else find_source(facts.name, data_dir, cache)
    if place is None:
        raise DataError(
            f"{facts.title} was not found"
            + (f" in {data_dir}" if data_dir is not None else "")
            + f"; `kuaifair data fetch {facts.name}` downloads it, or set KUAIFAIR_DATA to the folder of "
            f"{facts.archive}"
        )
    files = open_source(place, facts)
    key = {"name": facts.title, "files": files.signature(used), **settings}
    return cached(key, lambda: read(files), cache)
