"""Reader of the official KuaiRand-Pure files.

Training log: the two standard logs, exposed by the platform's own policies. Test log: the random log, whose
videos were drawn uniformly, so that its feedback is free of exposure bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.clicks import Behaviour, Clicks, Positive, kuairand_clicks
from kuaifair_env.data.csv_columns import Column, check_unique, read_columns
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.encoding import RawLog, encode_features, pairs_met, tag_matrix
from kuaifair_env.data.official import (
    category_frame,
    finish_log,
    id_column,
    known_rows,
    load_cached,
    read_users,
    tag_list,
)
from kuaifair_env.data.schema import Catalogue, InteractionLog
from kuaifair_env.data.sources import KUAIRAND, STATISTICS, SourceFiles, open_source, provenance_of

_STANDARD = ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv")
_RANDOM = "log_random_4_22_to_5_08_pure.csv"
_USERS, _BASIC, _STATISTIC = KUAIRAND.files[3:]
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


def load_kuairand(
    path: str | Path | None = None,
    *,
    positive: Positive | None = None,
    cache: str | Path | None = None,
) -> InteractionData:
    """Opens KuaiRand-Pure, from the cache when these files were read before.

    Args:
        path: ``KuaiRand-Pure.tar.gz`` or its unpacked folder; None looks as
            :func:`~kuaifair_env.data.sources.find_source` does.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairand_clicks`.
        cache: The cache folder; see :func:`~kuaifair_env.data.cache.cache_dir`.

    Raises:
        DataError: When files are missing, damaged or hold what they must not; nothing is cached then.
    """
    clicks = kuairand_clicks(positive)
    return load_cached(
        KUAIRAND, path, cache, {"click": clicks.describe()}, lambda files: _read(files, clicks), KUAIRAND.files
    )


def read_kuairand(path: str | Path, *, positive: Positive | None = None) -> InteractionData:
    """Reads and checks the official KuaiRand-Pure files, without the cache.

    Exact duplicate rows (equal in all columns) are dropped and counted in the ``report``. ``shown`` is
    ``show_user_num`` of the statistics table, a mean per day. Features come from that table and the basic
    one; the statistics are counts of the whole platform, not of the random log. Watch ratios are left out:
    the duration is unknown for a part of the rows.

    Args:
        path: ``KuaiRand-Pure.tar.gz``, or the unpacked root or data folder.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairand_clicks`.

    Raises:
        DataError: With file, line and column, for whatever is not as it must be.
    """
    return _read(open_source(path, KUAIRAND), kuairand_clicks(positive))


def _read(files: SourceFiles, definition: Clicks) -> InteractionData:
    files.require(KUAIRAND.files)
    users = read_users(files, _USERS)
    items, item_report = _read_items(files)
    rows: dict[str, int] = {}
    report: dict[str, Any] = {"items": item_report, "users": {"total": len(users)}}
    logs: dict[str, InteractionLog] = {}
    for which, names in (("train", _STANDARD), ("test", (_RANDOM,))):
        tables = [_read_log(files, name, users.ids, items.ids) for name in names]
        rows.update({name: len(table["user_id"]) for name, table in zip(names, tables, strict=True)})
        table = {column: np.concatenate([part[column] for part in tables]) for column in tables[0]}
        clicks, feedback = definition.of_columns(table)
        raw = RawLog(table["users"], table["items"], clicks, table["time_ms"], feedback=feedback)
        logs[which], report[which] = finish_log(raw, list(table.values()))
    report["test_pairs_in_train"] = int(pairs_met(logs["train"], logs["test"], len(users), len(items)).sum())
    provenance = provenance_of(files, KUAIRAND, KUAIRAND.files, rows, {"click": definition.describe()})
    return InteractionData(users, items, logs["train"], logs["test"], provenance, report)


def _read_log(
    files: SourceFiles, name: str, users: NDArray[np.int64], items: NDArray[np.int64]
) -> dict[str, NDArray[Any]]:
    columns = [
        id_column("user_id", users, _USERS),
        id_column("video_id", items, _BASIC),
        Column("time_ms", "integer", low=0),
        *(Column(signal, "integer", low=0, high=1) for signal in get_args(Behaviour)),
        *(Column(other) for other in _OTHER_LOG_COLUMNS),
    ]
    table = read_columns(files, name, columns)
    table["users"] = known_rows(files, name, "user_id", table["user_id"], users, _USERS)
    table["items"] = known_rows(files, name, "video_id", table["video_id"], items, _BASIC)
    return table


def _read_items(files: SourceFiles) -> tuple[Catalogue, dict[str, Any]]:
    columns = [
        Column("video_id", "integer", low=0),
        *(Column(number, missing_ok=True, low=0) for number in _BASIC_NUMBERS),
        *(Column(code, missing_ok=True) for code in _BASIC_CODES),
        *(Column(text, "text", missing_ok=True) for text in (*_BASIC_TEXTS, "tag")),
    ]
    table = read_columns(files, _BASIC, columns)
    ids, tag_texts = table.pop("video_id"), table.pop("tag")
    check_unique(files, _BASIC, "video_id", ids)
    tags, tag_names = tag_matrix(
        [tag_list(files, _BASIC, "tag", row, text, "39,12") for row, text in enumerate(tag_texts)]
    )
    order = np.argsort(ids)
    ids, tags = ids[order], tags[order]
    basic = category_frame(table, _BASIC_CODES).iloc[order].reset_index(drop=True)
    statistics = _read_statistics(files, ids)
    shown = statistics["show_user_num"].to_numpy(np.float64)
    report = {
        "total": len(ids),
        "tags": len(tag_names),
        "items_without_tags": int((~tags.any(axis=1)).sum()),
        "items_without_statistics": int(np.isnan(shown).sum()),
    }
    features = encode_features(pd.concat([basic, statistics], axis=1), "item feature")
    return Catalogue(ids, features, tags, tag_names, np.nan_to_num(shown)), report


def _read_statistics(files: SourceFiles, ids: NDArray[np.int64]) -> pd.DataFrame:
    columns = [id_column("video_id", ids, _BASIC), *(Column(number, low=0) for number in STATISTICS)]
    table = read_columns(files, _STATISTIC, columns)
    check_unique(files, _STATISTIC, "video_id", table["video_id"])
    rows = known_rows(files, _STATISTIC, "video_id", table.pop("video_id"), ids, _BASIC)
    return pd.DataFrame(table, index=rows).reindex(range(len(ids)))
