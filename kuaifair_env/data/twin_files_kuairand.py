"""A twin in the six files of KuaiRand-Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.data.twin_files_common import (
    BEIJING_MS,
    local_dates,
    parts_of,
    user_table,
    words,
    write_parts,
)
from kuaifair_env.data.twin_tables import STATISTICS
from kuaifair_env.data.twin_truth import stream
from kuaifair_env.data.twin_watching import LONG_VIEW_MS, play_times

if TYPE_CHECKING:
    import pandas as pd

    from kuaifair_env.data.twin import Twin

_LAST_DAY_OF_FIRST_PART = 20220421

# Chance of rarer feedback given a click, and of hate given none (published rates of the standard log).
_AFTER_CLICK = {
    "is_like": 0.040,
    "is_follow": 0.0023,
    "is_comment": 0.0055,
    "is_forward": 0.0021,
    "is_profile_enter": 0.040,
}
_HATE = 0.0009
# Shares of clicks and of other exposures by surface (published shares and click rates by tab).
_TABS = (1, 0, 4, 2, 6)
_TABS_OF_CLICKS = (0.829, 0.024, 0.088, 0.037, 0.010)
_TABS_OF_OTHERS = (0.689, 0.209, 0.048, 0.033, 0.047)

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


def kuairand_files(twin: Twin) -> dict[str, Callable[[Path], None]]:
    """Returns file name -> how to write it."""
    train, test = twin.data.train, twin.data.test
    late = local_dates(train.times) > _LAST_DAY_OF_FIRST_PART
    logs: dict[str, tuple[InteractionLog, int]] = {
        "log_standard_4_08_to_4_21_pure.csv": (train.take(~late), 0),
        "log_standard_4_22_to_5_08_pure.csv": (train.take(late), 0),
        "log_random_4_22_to_5_08_pure.csv": (test, 1),
    }
    files: dict[str, Callable[[Path], None]] = {
        name: partial(_write_log, twin, log, is_random, number)
        for number, (name, (log, is_random)) in enumerate(logs.items())
    }
    files["user_features_pure.csv"] = lambda path: write_parts(path, iter([user_table(twin)]))
    files["video_features_basic_pure.csv"] = lambda path: write_parts(path, iter([_basic_table(twin)]))
    files["video_features_statistic_pure.csv"] = lambda path: write_parts(
        path, iter([_statistic_table(twin)])
    )
    return files


def _write_log(twin: Twin, log: InteractionLog, is_random: int, number: int, path: Path) -> None:
    write_parts(path, _log_parts(twin, log, is_random, stream(twin.config, 10 + number)))


def _log_parts(
    twin: Twin, log: InteractionLog, is_random: int, rng: np.random.Generator
) -> Iterator[pd.DataFrame]:
    import pandas as pd

    durations = twin.tables.durations_ms
    for rows in parts_of(np.arange(len(log))):
        part = log.take(rows)
        clicks, duration = part.clicks, durations[part.items]
        play = play_times(rng, clicks, duration, logged=not is_random)
        feedback = {name: clicks & (rng.random(len(rows)) < rate) for name, rate in _AFTER_CLICK.items()}
        is_long = play >= np.where(duration > 0, np.minimum(duration, LONG_VIEW_MS), LONG_VIEW_MS)
        hour = (part.times + BEIJING_MS) // 3_600_000 % 24
        columns: dict[str, NDArray[Any]] = {
            "user_id": twin.data.users.ids[part.users],
            "video_id": twin.data.items.ids[part.items],
            "date": local_dates(part.times),
            "hourmin": hour * 100,
            "time_ms": part.times,
            "is_click": clicks,
            **{name: feedback[name] for name in ("is_like", "is_follow", "is_comment", "is_forward")},
            "is_hate": ~clicks & (rng.random(len(rows)) < _HATE),
            "long_view": clicks & is_long,
            "play_time_ms": play,
            "duration_ms": duration,
            "profile_stay_time": np.where(
                feedback["is_profile_enter"], rng.integers(500, 20_000, len(rows)), 0
            ),
            "comment_stay_time": np.where(feedback["is_comment"], rng.integers(500, 30_000, len(rows)), 0),
            "is_profile_enter": feedback["is_profile_enter"],
            "is_rand": np.full(len(rows), is_random),
            "tab": _surfaces(rng, clicks),
        }
        yield pd.DataFrame({name: values.astype(np.int64, copy=False) for name, values in columns.items()})


def _surfaces(rng: np.random.Generator, clicks: NDArray[np.bool_]) -> NDArray[np.int64]:
    draws = rng.random(len(clicks))
    places = []
    for shares in (_TABS_OF_CLICKS, _TABS_OF_OTHERS):
        edges = np.cumsum(shares)
        places.append(np.minimum(np.searchsorted(edges / edges[-1], draws, side="right"), len(_TABS) - 1))
    return np.asarray(_TABS)[np.where(clicks, *places)]


def _basic_table(twin: Twin) -> pd.DataFrame:
    import pandas as pd

    videos, tags = twin.tables.videos, twin.world.tags
    uploaded = np.asarray(["2022-04-08", "2022-04-09", "2022-04-10"])[videos["upload_day"]]
    return pd.DataFrame(
        {
            "video_id": twin.data.items.ids,
            "author_id": videos["author_id"],
            "video_type": videos["video_type"],
            "upload_dt": uploaded,
            "upload_type": videos["upload_type"],
            "visible_status": np.zeros(len(tags)),
            "video_duration": videos["video_duration"],
            "server_width": videos["server_width"].astype(np.float64),
            "server_height": videos["server_height"].astype(np.float64),
            "music_id": 10_000 + videos["author_id"],
            "music_type": videos["music_type"].astype(np.float64),
            "tag": [",".join(str(tag) for tag in np.flatnonzero(row)) for row in tags],
        }
    )


_STATISTIC_COLUMNS = words(
    """
    video_id counts show_cnt show_user_num play_cnt play_user_num play_duration complete_play_cnt
    complete_play_user_num valid_play_cnt valid_play_user_num long_time_play_cnt long_time_play_user_num
    short_time_play_cnt short_time_play_user_num play_progress comment_stay_duration like_cnt like_user_num
    click_like_cnt double_click_cnt cancel_like_cnt cancel_like_user_num comment_cnt comment_user_num
    direct_comment_cnt reply_comment_cnt delete_comment_cnt delete_comment_user_num comment_like_cnt
    comment_like_user_num follow_cnt follow_user_num cancel_follow_cnt cancel_follow_user_num share_cnt
    share_user_num download_cnt download_user_num report_cnt report_user_num reduce_similar_cnt
    reduce_similar_user_num collect_cnt collect_user_num cancel_collect_cnt cancel_collect_user_num
    direct_comment_user_num reply_comment_user_num share_all_cnt share_all_user_num outsite_share_all_cnt
    """
)


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


def _statistic_table(twin: Twin) -> pd.DataFrame:
    import pandas as pd

    known = {name: twin.tables.videos[name] for name in STATISTICS}
    columns = statistic_columns(known) | {"video_id": twin.data.items.ids}
    return pd.DataFrame({name: columns[name] for name in _STATISTIC_COLUMNS})
