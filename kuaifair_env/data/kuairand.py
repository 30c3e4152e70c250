"""Reader of the official KuaiRand files: KuaiRand-Pure, KuaiRand-1K and KuaiRand-27K.

Training log: the standard logs, exposed by the platform's own policies. Test log: the random log, whose videos were
drawn uniformly, so that its feedback is free of exposure bias.

The standard logs of 1K and 27K (11.7 and 322 million rows) hold millions of videos that were never drawn at random.
They are streamed, and two kinds of rows are kept: those of the random log's videos, and each user's last ones, which
are the history that sessions start from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.clicks import Behaviour, Clicks, Positive, kuairand_clicks
from kuaifair_env.data.csv_columns import Column, iter_columns, row_error
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.encoding import RawLog, encode_features, pairs_met, rows_of, tag_matrix, time_order
from kuaifair_env.data.official import category_frame, finish_log, id_column, load_cached, read_users, tag_list
from kuaifair_env.data.published import (
    KUAIRAND,
    KUAIRAND_1K,
    KUAIRAND_27K,
    STATISTICS,
    KuaiRandName,
    OfficialDataset,
)
from kuaifair_env.data.schema import BoolArray, Catalogue, InteractionLog
from kuaifair_env.data.sources import SourceFiles, open_source, provenance_of
from kuaifair_env.errors import DataError

RECENT_ROWS = 50
"""Rows of each user that are kept of the standard logs of 1K and 27K: as many as a history window has by default."""

_TRIM_ROWS = 4_000_000
_OTHER_LOG_COLUMNS = (
    "date",
    "hourmin",
    "is_hate",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_rand",
    "tab",
)
_BASIC_NUMBERS = ("video_duration", "server_width", "server_height")
_BASIC_CODES = ("music_type",)
_BASIC_TEXTS = ("video_type", "upload_type")

Columns: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class _Version:
    """A version of KuaiRand.

    Attributes:
        facts: Its published facts.
        recent: Rows of each user that are kept of the standard logs, beside those of the random log's videos; None
            keeps all rows.
    """

    facts: OfficialDataset
    recent: int | None = None

    def named(self, start: str) -> tuple[str, ...]:
        """Returns the files whose names start so."""
        return tuple(name for name in self.facts.files if name.startswith(start))

    @property
    def users(self) -> str:
        """File of the table of users."""
        return self.named("user_features")[0]

    @property
    def basic(self) -> str:
        """File of the table of videos."""
        return self.named("video_features_basic")[0]

    def settings(self, clicks: Clicks) -> dict[str, Any]:
        """Returns what decides what is read, for cache and provenance."""
        recent = {} if self.recent is None else {"recent_rows": self.recent}
        return {"click": clicks.describe(), **recent}


_VERSIONS: Mapping[KuaiRandName, _Version] = {
    "kuairand": _Version(KUAIRAND),
    "kuairand-1k": _Version(KUAIRAND_1K, RECENT_ROWS),
    "kuairand-27k": _Version(KUAIRAND_27K, RECENT_ROWS),
}


def load_kuairand(
    path: str | Path | None = None,
    *,
    version: KuaiRandName = "kuairand",
    positive: Positive | None = None,
    cache: str | Path | None = None,
) -> InteractionData:
    """Opens a version of KuaiRand, from the cache when these files were read before.

    Args:
        path: The official archive or its unpacked folder; None looks as
            :func:`~kuaifair_env.data.sources.find_source` does.
        version: ``"kuairand"`` (KuaiRand-Pure), ``"kuairand-1k"`` or ``"kuairand-27k"``.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairand_clicks`.
        cache: The cache folder; see :func:`~kuaifair_env.data.cache.cache_dir`.

    Raises:
        DataError: When files are missing, damaged or hold what they must not; nothing is cached then.
    """
    clicks, chosen = kuairand_clicks(positive), _version(version)
    return load_cached(
        chosen.facts,
        path,
        cache,
        chosen.settings(clicks),
        lambda files: _read(files, chosen, clicks),
        chosen.facts.files,
    )


def read_kuairand(
    path: str | Path, *, version: KuaiRandName = "kuairand", positive: Positive | None = None
) -> InteractionData:
    """Reads and checks the official files of a version of KuaiRand, without the cache.

    Exact duplicate rows (equal in all columns) are dropped and counted in the ``report``. ``shown`` is
    ``show_user_num`` of the statistics table, a mean per day. Features come from that table and the basic
    one; the statistics are counts of the whole platform, not of the random log. Watch ratios are left out:
    the duration is unknown for a part of the rows.

    Of the standard logs of 1K and 27K the rows of the random log's videos and the last :data:`RECENT_ROWS` rows of
    each user are kept, by time and, where times are equal, by the order of the files; the ``report`` counts the others
    as ``rows_left_out``. The catalogue then has the videos of these rows alone. Unpack the archive of 27K before:
    within it, every file is found by decompressing what lies before it.

    Args:
        path: The archive, or the unpacked root or data folder.
        version: ``"kuairand"`` (KuaiRand-Pure), ``"kuairand-1k"`` or ``"kuairand-27k"``.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairand_clicks`.

    Raises:
        DataError: With file, line and column, for whatever is not as it must be.
    """
    chosen = _version(version)
    return _read(open_source(path, chosen.facts), chosen, kuairand_clicks(positive))


def _version(name: KuaiRandName) -> _Version:
    if name not in _VERSIONS:
        raise DataError(f"unknown version {name!r} of KuaiRand; there are {', '.join(_VERSIONS)}")
    return _VERSIONS[name]


class RowKeeper(Protocol):
    """Decides which rows of a log are kept while it streams by."""

    def add(self, table: Columns) -> None:
        """Takes the next rows."""
        ...

    def take(self) -> Columns:
        """Returns the rows that are kept, in the order of the files."""
        ...


class AllRows:
    """Keeps all rows."""

    def __init__(self) -> None:
        self._tables: list[Columns] = []

    def add(self, table: Columns) -> None:
        """See :class:`RowKeeper`."""
        self._tables.append(table)

    def take(self) -> Columns:
        """See :class:`RowKeeper`."""
        return _joined(self._tables)


class PoolAndRecentRows:
    """Keeps the rows of some videos, and the last rows of each user; memory does not grow with the others.

    Args:
        pool: ``(n,)`` increasing raw ids of the videos whose rows are all kept.
        n_users: Number of users.
        recent: Rows that are kept of each user.
        trim_rows: How many more rows than kept ones are held before they are sorted and the others dropped.
    """

    def __init__(self, pool: NDArray[np.int64], n_users: int, recent: int, trim_rows: int = _TRIM_ROWS) -> None:
        self._pool, self._recent, self._trim_rows = pool, recent, trim_rows
        self._pool_rows: list[Columns] = []
        self._recent_rows: list[Columns] = []
        self._untrimmed = 0
        # Earlier rows of a user cannot be among the last ones any more.
        self._earliest = np.full(n_users, np.iinfo(np.int64).min)

    def add(self, table: Columns) -> None:
        """See :class:`RowKeeper`."""
        in_pool = self._in_pool(table)
        if in_pool.any():
            self._pool_rows.append(_rows(table, in_pool))
        late = _rows(table, table["time_ms"] >= self._earliest[table["users"]])
        if len(late["users"]):
            late = _rows(late, _last_rows(late, self._recent))
            self._recent_rows.append(late)
            self._untrimmed += len(late["users"])
        if self._untrimmed > self._trim_rows:
            self._trim()

    def take(self) -> Columns:
        """See :class:`RowKeeper`."""
        self._trim()
        recent = self._recent_rows[0]
        table = _joined([*self._pool_rows, _rows(recent, ~self._in_pool(recent))])
        order = np.lexsort((table["row"], table["file"]))
        return {name: values[order] for name, values in table.items()}

    def _in_pool(self, table: Columns) -> BoolArray:
        return ~rows_of(table["video_id"], self._pool)[1]

    def _trim(self) -> None:
        table = _joined(self._recent_rows)
        table = _rows(table, _last_rows(table, self._recent))
        full = np.bincount(table["users"], minlength=len(self._earliest)) == self._recent
        earliest = np.full(len(full), np.iinfo(np.int64).max)
        np.minimum.at(earliest, table["users"], table["time_ms"])
        self._earliest[full] = earliest[full]
        self._recent_rows, self._untrimmed = [table], 0


def _last_rows(table: Columns, count: int) -> BoolArray:
    """Marks the last rows of each user, by time and then by their order in the table."""
    users = table["users"]
    order = time_order(users, table["time_ms"])
    ends = np.cumsum(np.bincount(users))
    last = np.zeros(len(users), np.bool_)
    last[order] = ends[users[order]] - np.arange(len(users)) <= count
    return last


def _rows(table: Columns, mask: BoolArray) -> Columns:
    return {name: values[mask] for name, values in table.items()}


def _joined(tables: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _read(files: SourceFiles, version: _Version, definition: Clicks) -> InteractionData:
    files.require(version.facts.files)
    users = read_users(files, version.users)
    random_logs, standard_logs = version.named("log_random"), version.named("log_standard")
    test, rows = _read_logs(files, random_logs, version, users.ids, AllRows())
    pool = np.unique(test["video_id"])
    keeper = AllRows() if version.recent is None else PoolAndRecentRows(pool, len(users), version.recent)
    train, standard_rows = _read_logs(files, standard_logs, version, users.ids, keeper)
    rows |= standard_rows
    wanted = None if version.recent is None else np.union1d(pool, train["video_id"])
    items, item_report = _read_items(files, version, wanted)
    report: dict[str, Any] = {"items": item_report, "users": {"total": len(users)}}
    logs: dict[str, InteractionLog] = {}
    for which, names, table in (("train", standard_logs, train), ("test", random_logs, test)):
        place = _Place(files, names, table)
        item_rows = place.known_videos(items.ids, version.basic)
        clicks, feedback = definition.of_columns(table)
        raw = RawLog(table["users"], item_rows, clicks, table["time_ms"], feedback=feedback)
        logs[which], report[which] = finish_log(raw, [table[name] for name in table if name not in ("file", "row")])
        report[which]["rows_left_out"] = sum(rows[name] for name in names) - len(item_rows)
    report["test_pairs_in_train"] = int(pairs_met(logs["train"], logs["test"], len(users), len(items)).sum())
    provenance = provenance_of(files, version.facts, version.facts.files, rows, version.settings(definition))
    return InteractionData(users, items, logs["train"], logs["test"], provenance, report)


@dataclass(frozen=True)
class _Place:
    """Rows of some files, which know where they stand: ``file``, the file's place in ``names``, and its ``row``."""

    files: SourceFiles
    names: Sequence[str]
    table: Columns

    def error(self, row: int, column: str, problem: str) -> DataError:
        """Returns the error of a value of the table."""
        name = self.names[int(self.table["file"][row])]
        return row_error(self.files, name, column, int(self.table["row"][row]), problem)

    def known_videos(self, known: NDArray[np.int64], where: str) -> NDArray[np.int32]:
        """Returns the item rows of the table's videos.

        Raises:
            DataError: With file and line of the first video that is not known.
        """
        rows, unknown = rows_of(self.table["video_id"], known)
        if unknown.any():
            row = int(np.argmax(unknown))
            raise self.error(row, "video_id", f"id {self.table['video_id'][row]} is not in {where}")
        return rows

    def check_unique(self) -> None:
        """Checks that every video stands in one row.

        Raises:
            DataError: With file and line of the first one that is repeated.
        """
        repeated = np.asarray(pd.Series(self.table["video_id"]).duplicated())
        if repeated.any():
            row = int(np.argmax(repeated))
            raise self.error(row, "video_id", f"id {self.table['video_id'][row]} occurs twice")


def _stream(files: SourceFiles, names: Sequence[str], columns: Sequence[Column]) -> Iterator[Columns]:
    """Yields the rows of files one after the other, with ``file`` and ``row`` beside their columns."""
    for file, name in enumerate(names):
        first = 0
        for table in iter_columns(files, name, columns):
            size = len(table[columns[0].name])
            table["file"], table["row"] = np.full(size, file, np.int8), np.arange(first, first + size)
            yield table
            first += size


def _read_logs(
    files: SourceFiles, names: Sequence[str], version: _Version, users: NDArray[np.int64], keeper: RowKeeper
) -> tuple[Columns, dict[str, int]]:
    """Returns the rows of logs that a keeper keeps, and how many rows each file has."""
    signals = get_args(Behaviour)
    columns = [
        id_column("user_id", users, version.users),
        Column("video_id", "integer", low=0),
        Column("time_ms", "integer", low=0),
        *(Column(signal, "integer", low=0, high=1) for signal in signals),
        *(Column(other) for other in _OTHER_LOG_COLUMNS),
    ]
    rows: dict[str, int] = {}
    for table in _stream(files, names, columns):
        ids = table.pop("user_id")
        table["users"], unknown = rows_of(ids, users)
        if unknown.any():
            row = int(np.argmax(unknown))
            raise _Place(files, names, table).error(row, "user_id", f"id {ids[row]} is not in {version.users}")
        keeper.add(table | {signal: table[signal].astype(np.int8) for signal in signals})
        rows[names[int(table["file"][-1])]] = int(table["row"][-1]) + 1
    return keeper.take(), rows


def _read_videos(
    files: SourceFiles, names: Sequence[str], columns: Sequence[Column], wanted: NDArray[np.int64] | None
) -> _Place:
    """Returns the rows of tables of videos whose ids are wanted, or all of them."""
    tables = _stream(files, names, [Column("video_id", "integer", low=0), *columns])
    if wanted is not None:
        tables = (_rows(table, ~rows_of(table["video_id"], wanted)[1]) for table in tables)
    videos = _Place(files, names, _joined(list(tables)))
    videos.check_unique()
    return videos


def _read_items(
    files: SourceFiles, version: _Version, wanted: NDArray[np.int64] | None
) -> tuple[Catalogue, dict[str, Any]]:
    columns = [
        *(Column(number, missing_ok=True, low=0) for number in _BASIC_NUMBERS),
        *(Column(code, "code", missing_ok=True) for code in _BASIC_CODES),
        *(Column(text, "text", missing_ok=True) for text in (*_BASIC_TEXTS, "tag")),
    ]
    table = _read_videos(files, [version.basic], columns, wanted).table
    texts = zip(table["row"].tolist(), table["tag"], strict=True)
    tags, tag_names = tag_matrix([tag_list(files, version.basic, "tag", row, text, "39,12") for row, text in texts])
    order = np.argsort(table["video_id"])
    ids, tags = table["video_id"][order], tags[order]
    features = {name: table[name][order] for name in (*_BASIC_NUMBERS, *_BASIC_CODES, *_BASIC_TEXTS)}
    statistics = _read_statistics(files, version, ids, wanted)
    shown = statistics["show_user_num"].to_numpy(np.float64)
    report = {
        "total": len(ids),
        "tags": len(tag_names),
        "items_without_tags": int((~tags.any(axis=1)).sum()),
        "items_without_statistics": int(np.isnan(shown).sum()),
    }
    encoded = encode_features(pd.concat([category_frame(features, _BASIC_CODES), statistics], axis=1), "item feature")
    return Catalogue(ids, encoded, tags, tag_names, np.nan_to_num(shown)), report


def _read_statistics(
    files: SourceFiles, version: _Version, ids: NDArray[np.int64], wanted: NDArray[np.int64] | None
) -> pd.DataFrame:
    columns = [Column(number, missing_ok=True, low=0) for number in STATISTICS]
    videos = _read_videos(files, version.named("video_features_statistic"), columns, wanted)
    rows = videos.known_videos(ids, version.basic)
    table = {number: videos.table[number] for number in STATISTICS}
    return pd.DataFrame(table, index=rows).reindex(range(len(ids)))
