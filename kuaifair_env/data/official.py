"""Gets official data: downloads, the cache of what was read, and steps that the readers share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.cache import cached
from kuaifair_env.data.csv_columns import Column, check_unique, read_columns, row_error
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.download import download
from kuaifair_env.data.encoding import (
    RawLog,
    build_log,
    encode_features,
    exact_duplicates,
    rows_of,
)
from kuaifair_env.data.published import UNKNOWN_CODE, USER_CATEGORIES, USER_NUMBERS, OfficialDataset, dataset
from kuaifair_env.data.schema import InteractionLog, Users
from kuaifair_env.data.sources import SourceFiles, download_folder, find_source, open_source
from kuaifair_env.errors import DataError
from kuaifair_env.files import file_hash, temporary_beside, write_text_atomically


def read_users(files: SourceFiles, name: str) -> Users:
    """Reads a table of users, which has the same columns in all data sets.

    The ``*_range`` columns repeat the numbers beside them and are left out. ``UNKNOWN`` and -124 are missing.
    """
    columns = [
        Column("user_id", "integer", low=0),
        Column("user_active_degree", "text", missing_ok=True),
        *(Column(number, missing_ok=True) for number in USER_NUMBERS),
        *(Column(category, "code", missing_ok=True) for category in USER_CATEGORIES),
    ]
    table = read_columns(files, name, columns)
    ids = table.pop("user_id")
    check_unique(files, name, "user_id", ids)
    order = np.argsort(ids)
    return Users(ids[order], encode_features(category_frame(table, USER_CATEGORIES).iloc[order], "user feature"))


def category_frame(table: Mapping[str, NDArray[Any]], categories: Sequence[str]) -> pd.DataFrame:
    """Puts columns of an official table into a frame, codes and text as categories, -124 and ``UNKNOWN`` as missing.

    ``categories`` names the numeric columns that hold codes.
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
        raise row_error(files, name, column, row, f"id {ids[row]} is not in {where}")
    return rows


def tag_list(files: SourceFiles, name: str, column: str, row: int, text: str | None, example: str) -> list[int]:
    """Reads the ids in a cell: numbers with commas between them, in brackets if they are so in the example.

    Raises:
        DataError: With the line of a cell that holds something else.
    """
    inner, bracketed = (text or "").strip(), example.startswith("[")
    if not bracketed or (inner.startswith("[") and inner.endswith("]")):
        tags = [tag.strip() for tag in (inner[1:-1] if bracketed else inner).split(",")] if text else []
        tags = [tag for tag in tags if tag] if bracketed else tags
        if all(tag.isdecimal() for tag in tags):
            return [int(tag) for tag in tags]
    raise row_error(files, name, column, row, f"{text!r} is not a list of tag ids such as {example}")


def finish_log(raw: RawLog, compared: Sequence[NDArray[Any]]) -> tuple[InteractionLog, dict[str, int]]:
    """Drops rows that equal an earlier one in the ``compared`` columns, sorts, and counts."""
    repeated = exact_duplicates(compared)
    read, dropped = len(repeated), int(repeated.sum())
    log, counts = build_log(raw.take(~repeated) if dropped else raw)
    return log, {"rows_read": read, "exact_duplicates_dropped": dropped, **counts}


def load_cached(
    facts: OfficialDataset,
    path: str | Path | None,
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
    place = path if path is not None else find_source(facts.name, cache=cache)
    if place is None:
        raise DataError(
            f"{facts.title} was not found; `kuaifair data fetch {facts.name}` downloads it, or set KUAIFAIR_DATA to "
            f"the folder of {facts.archive}"
        )
    files = open_source(place, facts)
    key = {"name": facts.title, "files": files.signature(used), **settings}
    return cached(key, lambda: read(files), cache)


def fetch(
    name: str,
    folder: str | Path | None = None,
    *,
    base_url: str | None = None,
    sha256: str | None = None,
    check_sum: bool = True,
    retries: int = 3,
    timeout: float = 60.0,
    progress: bool = True,
    announce: Callable[[str], None] = print,
) -> Path:
    """Downloads an official archive, unless a whole one is there already.

    The archive is downloaded beside its place, checked (checksum, then whether it opens and has the files a
    reader needs), and only then given its name. The checksum is the publisher's MD5 (the Zenodo record's), or
    ``sha256`` when given. A note ``<archive>.json`` records address, date, size and SHA-256.

    Args:
        name: ``"kuairec"``, ``"kuairand"``, ``"kuairand-1k"`` or ``"kuairand-27k"``.
        folder: Where the archive goes; None is the cache's download folder, where the readers look.
        base_url: Address of a folder that holds the archive, for mirrors; None is the publisher's.
        sha256: SHA-256 that the archive must have, instead of the publisher's MD5.
        check_sum: False accepts an archive of another version, checked for its files alone.
        retries: How often a failed download is tried again.
        timeout: Seconds without an answer after which an attempt has failed.
        progress: Whether a progress bar is shown on stderr.
        announce: Shows licence, citation and results to the user.

    Returns:
        The archive.

    Raises:
        DataError: When the archive cannot be had, or is not the right one; nothing is left behind then.
        ValueError: If ``sha256`` is not one.
    """
    facts = dataset(name)
    expected = _expected_hash(facts, sha256, check_sum)
    target = (download_folder() if folder is None else Path(folder).expanduser()) / facts.archive
    announce(f"{facts.title}: licence {facts.licence}\nPlease cite: {facts.citation}")
    if target.exists():
        if _is_whole(target, facts, expected):
            announce(f"{target} is there already and whole")
            return target
        announce(f"{target} is not whole or another version; it is downloaded again")
    url = f"{(base_url or facts.url).rstrip('/')}/{facts.archive}"
    announce(f"downloading {url} ({facts.size / 1e6:.0f} MB)")
    try:
        with temporary_beside(target) as temporary:
            temporary.mkdir()
            arrived = temporary / facts.archive
            size = facts.size if expected == f"md5:{facts.md5}" else None
            download(url, arrived, size=size, retries=retries, timeout=timeout, progress=progress)
            _check_hash(arrived, expected, url)
            open_source(arrived, facts).require(facts.files)
            digest = file_hash(arrived)
            note = {
                "url": url,
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "size": arrived.stat().st_size,
                "sha256": digest,
                "checked_against": expected or "nothing but its files",
            }
            write_text_atomically(target.with_name(f"{facts.archive}.json"), json.dumps(note, indent=1) + "\n")
            os.replace(arrived, target)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", file=target) from error
    announce(f"{target}: {target.stat().st_size:,} bytes, SHA-256 {digest}")
    return target


def _expected_hash(facts: OfficialDataset, sha256: str | None, check_sum: bool) -> str | None:
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"a SHA-256 has 64 hexadecimal digits, got {sha256!r}")
        return f"sha256:{sha256.lower()}"
    return f"md5:{facts.md5}" if check_sum else None


def _check_hash(archive: Path, expected: str | None, url: str) -> None:
    algorithm, digest = (expected or ":").split(":")
    if expected is not None and (arrived := file_hash(archive, algorithm)) != digest:
        raise DataError(
            f"not the expected archive: its {algorithm.upper()} is {arrived}, not {digest}; if the publisher has a new "
            "version, look at it and pass its SHA-256",
            file=url,
        )


def _is_whole(archive: Path, facts: OfficialDataset, expected: str | None) -> bool:
    if expected is not None:
        algorithm, digest = expected.split(":")
        return file_hash(archive, algorithm) == digest
    try:
        open_source(archive, facts).require(facts.files)
    except DataError:
        return False
    return True
