"""Reader of the official KuaiRec files.

Training log: ``big_matrix.csv``. Test log: ``small_matrix.csv``, in which nearly every user saw every item. A
click is ``watch_ratio >= 1`` by default: the video was watched to its end (33.8 % of the big, 32.4 % of the small
matrix). The KuaiRec and CIRS papers take ``watch_ratio >= 2`` as "like" (7.3 % and 4.6 %).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.clicks import Clicks, FeedbackKind, Positive, kuairec_clicks
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
from kuaifair_env.data.published import DAILY_NUMBERS, KUAIREC, UNKNOWN_CODE
from kuaifair_env.data.schema import Catalogue, InteractionLog
from kuaifair_env.data.sources import READ_ERRORS, SourceFiles, open_source, provenance_of
from kuaifair_env.errors import DataError

_DAILY = "item_daily_features.csv"
_CAPTIONS = "kuairec_caption_category.csv"
_USED = (*KUAIREC.files, _DAILY, _CAPTIONS)
_DAILY_CATEGORIES = ("video_type", "upload_type")
_CAPTION_FIELDS = 10
_LONGEST_CAPTION = 50


def load_kuairec(
    path: str | Path | None = None,
    *,
    positive: Positive | None = None,
    feedback: FeedbackKind = "click",
    clip: float | None = None,
    cache: str | Path | None = None,
) -> InteractionData:
    """Opens KuaiRec, from the cache when these files were read before.

    Args:
        path: ``KuaiRec.zip`` or its unpacked folder; None looks as
            :func:`~kuaifair_env.data.sources.find_source` does.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairec_clicks`, also for the next two.
        feedback: What feedback is.
        clip: Largest watch ratio as feedback.
        cache: The cache folder; see :func:`~kuaifair_env.data.cache.cache_dir`.

    Raises:
        DataError: When files are missing, damaged or hold what they must not; nothing is cached then.
    """
    clicks = kuairec_clicks(positive, feedback, clip)
    return load_cached(KUAIREC, path, cache, {"click": clicks.describe()}, lambda files: _read(files, clicks), _USED)


def read_kuairec(
    path: str | Path,
    *,
    positive: Positive | None = None,
    feedback: FeedbackKind = "click",
    clip: float | None = None,
) -> InteractionData:
    """Reads and checks the official KuaiRec files, without the cache.

    Exact duplicate rows are dropped; rows without time come last within their user; both are counted in the
    ``report``, as are captions with line breaks. ``item_daily_features.csv`` (for ``shown``, the mean daily
    ``show_user_num``, and item features) and the caption file (for the first-level category) are used when
    they are there.

    Args:
        path: ``KuaiRec.zip``, or the unpacked root or data folder.
        positive: What counts as a click; see :func:`~kuaifair_env.data.clicks.kuairec_clicks`, also for the next two.
        feedback: What feedback is.
        clip: Largest watch ratio as feedback.

    Raises:
        DataError: With file, line and column, for whatever is not as it must be.
    """
    return _read(open_source(path, KUAIREC), kuairec_clicks(positive, feedback, clip))


def _read(files: SourceFiles, clicks: Clicks) -> InteractionData:
    files.require(KUAIREC.files)
    users = read_users(files, "user_features.csv")
    items, item_report = _read_items(files)
    report: dict[str, Any] = {"items": {"total": len(items), **item_report}, "users": {"total": len(users)}}
    logs: dict[str, InteractionLog] = {}
    for which, name in (("train", "big_matrix.csv"), ("test", "small_matrix.csv")):
        logs[which], report[which] = _read_matrix(files, name, users.ids, items.ids, clicks)
    report["test_pairs_in_train"] = int(pairs_met(logs["train"], logs["test"], len(users), len(items)).sum())
    rows = {"big_matrix.csv": report["train"]["rows_read"], "small_matrix.csv": report["test"]["rows_read"]}
    provenance = provenance_of(files, KUAIREC, _USED, rows, {"click": clicks.describe()})
    return InteractionData(users, items, logs["train"], logs["test"], provenance, report)


def _read_matrix(
    files: SourceFiles, name: str, users: NDArray[np.int64], items: NDArray[np.int64], definition: Clicks
) -> tuple[InteractionLog, dict[str, int]]:
    columns = [
        id_column("user_id", users, "user_features.csv"),
        id_column("video_id", items, "item_categories.csv"),
        Column("play_duration", low=0),
        Column("video_duration", low=0),
        Column("timestamp", missing_ok=True, low=0, high=1e11),
        Column("watch_ratio", low=0),
    ]
    table = read_columns(files, name, columns)
    seconds = table["timestamp"]
    no_time = np.isnan(seconds)
    clicks, feedback = definition.of_watch_ratios(table["watch_ratio"])
    raw = RawLog(
        known_rows(files, name, "user_id", table["user_id"], users, "user_features.csv"),
        known_rows(files, name, "video_id", table["video_id"], items, "item_categories.csv"),
        clicks,
        np.rint(np.where(no_time, 0.0, seconds) * 1000.0).astype(np.int64),
        no_time if no_time.any() else None,
        table["watch_ratio"].astype(np.float32),
        feedback,
    )
    # `time` and `date` follow from `timestamp`, so these are all columns that can differ.
    durations = (table["play_duration"], table["video_duration"])
    return finish_log(raw, [raw.users, raw.items, *durations, seconds, table["watch_ratio"]])


def _read_items(files: SourceFiles) -> tuple[Catalogue, dict[str, Any]]:
    name = "item_categories.csv"
    table = read_columns(files, name, [Column("video_id", "integer", low=0), Column("feat", "text")])
    ids = table["video_id"]
    check_unique(files, name, "video_id", ids)
    tags, tag_names = tag_matrix(
        [tag_list(files, name, "feat", row, text, "[27, 9]") for row, text in enumerate(table["feat"])]
    )
    order = np.argsort(ids)
    ids, tags = ids[order], tags[order]
    features = pd.DataFrame(index=range(len(ids)))
    report: dict[str, Any] = {"tags": len(tag_names)}
    shown = None
    if files.has(_DAILY):
        daily, days = _read_daily(files, ids)
        shown = np.nan_to_num(daily["show_user_num"].to_numpy(np.float64))
        features = pd.concat([features, daily], axis=1)
        report["daily_rows"] = days
        report["items_without_daily_rows"] = int(daily["show_user_num"].isna().sum())
    if files.has(_CAPTIONS):
        features["first_level_category"], caption_report = _read_captions(files, ids)
        report.update(caption_report)
    return Catalogue(ids, encode_features(features, "item feature"), tags, tag_names, shown), report


def _read_daily(files: SourceFiles, ids: NDArray[np.int64]) -> tuple[pd.DataFrame, int]:
    """Returns per-day means of the platform's statistics for each item, and the number of rows read."""
    columns = [
        id_column("video_id", ids, "item_categories.csv"),
        *(Column(number, missing_ok=True, low=0) for number in DAILY_NUMBERS),
        *(Column(category, "text", missing_ok=True) for category in _DAILY_CATEGORIES),
    ]
    table = read_columns(files, _DAILY, columns)
    rows = known_rows(files, _DAILY, "video_id", table.pop("video_id"), ids, "item_categories.csv")
    groups = category_frame(table, ()).groupby(rows)
    means = groups[list(DAILY_NUMBERS)].mean()
    kinds = groups[list(_DAILY_CATEGORIES)].first()
    return pd.concat([means, kinds], axis=1).reindex(range(len(ids))), len(rows)


def _read_captions(files: SourceFiles, ids: NDArray[np.int64]) -> tuple[pd.Series[Any], dict[str, int]]:
    """Reads the first-level category of each item from a file whose captions may hold bare line breaks."""
    categories = np.full(len(ids), UNKNOWN_CODE, np.int64)
    place = {int(item): row for row, item in enumerate(ids)}
    counts = {"captions": 0, "captions_with_line_breaks": 0, "captions_unreadable": 0}
    try:
        with files.open(_CAPTIONS) as raw:
            text = raw.read().decode("utf-8-sig", errors="replace")
    except READ_ERRORS as error:
        label = files.label(_CAPTIONS)
        raise DataError(f"cannot be read ({error}); it is truncated or damaged", file=label) from error
    pending: list[str] = []
    lines = iter(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    header = next(csv.reader(io.StringIO(next(lines))), [])
    if len(header) != _CAPTION_FIELDS or header[0] != "video_id" or header[4] != "first_level_category_id":
        raise DataError(
            f"the header must have {_CAPTION_FIELDS} columns, video_id first, first_level_category_id fifth",
            file=files.label(_CAPTIONS),
            line=1,
        )
    for line in lines:
        pending.append(line)
        fields = _caption_fields("\n".join(pending))
        if len(fields) < _CAPTION_FIELDS and len(pending) < _LONGEST_CAPTION:
            continue
        broken, pending = len(pending) > 1, []
        if len(fields) != _CAPTION_FIELDS or not fields[0].isdecimal() or int(fields[0]) not in place:
            counts["captions_unreadable"] += 1
            continue
        counts["captions"] += 1
        counts["captions_with_line_breaks"] += broken
        if fields[4].lstrip("-").isdecimal():
            categories[place[int(fields[0])]] = int(fields[4])
    counts["captions_unreadable"] += any(line.strip() for line in pending)
    known = pd.Series(categories).where(categories != UNKNOWN_CODE).astype("Int64").astype("category")
    return cast("pd.Series[Any]", known), counts


def _caption_fields(text: str) -> list[str]:
    """Splits one record; a quote that is still open means that the record goes on."""
    try:
        return next(csv.reader(io.StringIO(text.replace("\n", " ")), strict=True), [])
    except csv.Error:
        return []
