"""Builds columns and writes CSV files that the official formats of both data sets share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.sources import UNKNOWN_CODE
from kuaifair_env.synthetic.tables import Columns
from kuaifair_env.synthetic.twin import Twin

if TYPE_CHECKING:
    import pandas as pd

PART_ROWS = 500_000
BEIJING_MS = 8 * 3_600_000

# Upper ends and names of the ranges in the official user tables; the first range is exactly 0 where it begins so.
_RANGES: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {
    "follow_user_num": (
        (0, 10, 50, 100, 150, 250, 500),
        ("0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+"),
    ),
    "fans_user_num": (
        (0, 9, 99, 999, 4_999, 9_999, 99_999, 999_999),
        (
            *("0", "[1,10)", "[10,100)", "[100,1k)", "[1k,5k)", "[5k,1w)", "[1w,10w)"),
            *("[10w,100w)", "[100w,1000w)"),
        ),
    ),
    "friend_user_num": (
        (0, 4, 29, 59, 119, 249),
        ("0", "[1,5)", "[5,30)", "[30,60)", "[60,120)", "[120,250)", "250+"),
    ),
    "register_days": (
        (14, 30, 60, 90, 180, 365, 730),
        ("8-14", "15-30", "31-60", "61-90", "91-180", "181-365", "366-730", "730+"),
    ),
}

# The statistic table's columns that follow from others: per-user counts times what a user does in a day.
_VIEWS_PER_USER = {
    "show": 1.12,
    "play": 1.14,
    "complete_play": 1.07,
    "valid_play": 1.07,
    "long_time_play": 1.07,
    "like": 1.01,
    "comment": 1.15,
    "follow": 1.02,
    "share": 1.08,
    "collect": 1.01,
}


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a text: long headers stay legible this way."""
    return tuple(text.split())


def user_table(twin: Twin) -> pd.DataFrame:
    """Returns the official table of users, 31 columns."""
    import pandas as pd

    users = twin.tables.users
    columns: dict[str, Any] = {"user_id": twin.data.users.ids}
    for name in ("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"):
        columns[name] = users[name]
    for name, (ends, labels) in _RANGES.items():
        columns[name] = users[name]
        columns[f"{name}_range"] = np.asarray(labels)[np.searchsorted(ends, users[name])]
    return pd.DataFrame(columns | {name: users[name] for name in users if name.startswith("onehot_feat")})


def write_parts(path: Path, parts: Iterator[pd.DataFrame]) -> None:
    """Writes tables one below the other into one CSV file."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        for number, part in enumerate(parts):
            part.to_csv(stream, index=False, header=number == 0, lineterminator="\n")


def parts_of(rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Cuts row numbers into parts of :data:`PART_ROWS`."""
    for start in range(0, len(rows), PART_ROWS):
        yield rows[start : start + PART_ROWS]


def local_dates(times_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns days in Beijing as numbers such as 20220408."""
    days = ((times_ms + BEIJING_MS) // 86_400_000).astype("datetime64[D]")
    months = days.astype("datetime64[M]")
    years = days.astype("datetime64[Y]").astype(np.int64) + 1970
    month = months.astype(np.int64) % 12 + 1
    day = (days - months).astype(np.int64) + 1
    dates: NDArray[np.int64] = years * 10_000 + month * 100 + day
    return dates


def known_code(values: NDArray[Any]) -> Columns:
    """Splits a column with :data:`UNKNOWN_CODE` into codes and names."""
    names = np.where(values == UNKNOWN_CODE, "UNKNOWN", np.char.add("category ", values.astype(str)))
    return {"id": values, "name": names}


def statistic_columns(numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Completes per-user counts to every count that the official tables hold.

    Args:
        numbers: ``show_user_num``, ``play_user_num``, ``like_user_num`` and so on, and ``play_progress``.

    Returns:
        The given columns, and those that follow from them.
    """
    columns = dict(numbers)
    for name, factor in _VIEWS_PER_USER.items():
        columns[f"{name}_cnt"] = np.round(numbers[f"{name}_user_num"] * factor, 4)
    plays, likes = columns["play_cnt"], columns["like_cnt"]
    columns["play_duration"] = np.round(plays * 12_000.0, 2)
    for suffix in ("cnt", "user_num"):
        columns[f"short_time_play_{suffix}"] = np.round(0.4 * columns[f"play_{suffix}"], 4)
        for name, base, share in (
            ("cancel_like", "like", 0.08),
            ("delete_comment", "comment", 0.05),
            ("comment_like", "comment", 0.9),
            ("cancel_follow", "follow", 0.05),
            ("download", "share", 0.5),
            ("report", "comment", 0.01),
            ("reduce_similar", "comment", 0.2),
            ("cancel_collect", "collect", 0.2),
            ("direct_comment", "comment", 0.7),
            ("reply_comment", "comment", 0.3),
            ("share_all", "share", 1.3),
        ):
            columns[f"{name}_{suffix}"] = np.round(share * columns[f"{base}_{suffix}"], 4)
    columns["comment_stay_duration"] = np.round(plays * 90.0, 2)
    columns["click_like_cnt"] = np.round(0.45 * likes, 4)
    columns["double_click_cnt"] = np.round(0.55 * likes, 4)
    columns["outsite_share_all_cnt"] = np.round(0.2 * columns["share_cnt"], 4)
    return columns
