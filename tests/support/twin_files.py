"""Writes a twin as files in the official format of its data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from kuaifair_env.data.clicks import kuairand_clicks
from kuaifair_env.data.published import DAILY_NUMBERS, STATISTICS, UNKNOWN_CODE
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.data.sources import PROVENANCE_FILE
from kuaifair_env.errors import DataError
from kuaifair_env.files import temporary_beside
from kuaifair_env.synthetic.choices import behaviours
from kuaifair_env.synthetic.config import QuantileDistribution
from kuaifair_env.synthetic.truth import stream
from kuaifair_env.synthetic.twin import Twin

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

# KuaiRand-Pure: a click is 7 s of play or the whole video, a long view 18 s or the whole video.
_CLICK_MS, LONG_VIEW_MS = 7_000, 18_000
_ZERO_PLAY = 0.17  # of the exposures that are no click
_SKIPPED_MS = QuantileDistribution(
    (0.0005, 0.05, 0.25, 0.50, 0.75, 0.95, 0.9995), (60, 863, 1379, 2133, 3647, 6069, 6990), "log"
)
# Play ratio of long views, by duration: shorter videos are watched to their end and again.
_LONG_RATIO = QuantileDistribution(
    (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.9999),
    (0.45, 0.6, 0.9, 1.0, 1.05, 1.15, 1.35, 2.2, 24.0),
    "log",
)
_LONG_MS_DISTRIBUTION = QuantileDistribution(
    (0.001, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99),
    (18_500, 22_000, 27_000, 42_000, 75_000, 145_000, 240_000, 330_000, 600_000),
    "log",
)


def words(text: str) -> tuple[str, ...]:
    """Returns the words of a text: long headers stay legible this way."""
    return tuple(text.split())


def user_table(twin: Twin) -> pd.DataFrame:
    """Returns the official table of users, 31 columns."""
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


def category_names(codes: NDArray[Any]) -> NDArray[Any]:
    """Returns the names of the codes of a column, which may hold :data:`UNKNOWN_CODE`."""
    return np.where(codes == UNKNOWN_CODE, "UNKNOWN", np.char.add("category ", codes.astype(str)))


def statistic_columns(numbers: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Completes per-user counts (``show_user_num`` and so on) to every count that the official tables hold."""
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


_LAST_DAY_OF_FIRST_PART = 20220421

# Chance of hate given no click (published rate of the standard log).
_HATE = 0.0009
# Shares of clicks and of other exposures by surface (published shares and click rates by tab).
_TABS = (1, 0, 4, 2, 6)
_TABS_OF_CLICKS = (0.829, 0.024, 0.088, 0.037, 0.010)
_TABS_OF_OTHERS = (0.689, 0.209, 0.048, 0.033, 0.047)


def kuairand_files(twin: Twin) -> dict[str, Iterator[pd.DataFrame]]:
    """Returns file name -> its table, in parts; they are drawn as they are asked for."""
    train, test = twin.data.train, twin.data.test
    late = local_dates(train.times) > _LAST_DAY_OF_FIRST_PART
    logs: dict[str, tuple[InteractionLog, int]] = {
        "log_standard_4_08_to_4_21_pure.csv": (train.take(~late), 0),
        "log_standard_4_22_to_5_08_pure.csv": (train.take(late), 0),
        "log_random_4_22_to_5_08_pure.csv": (test, 1),
    }
    feedback = (_behaviours(twin, train, logged=True), _behaviours(twin, test, logged=False))
    columns = (_rows_of(feedback[0], ~late), _rows_of(feedback[0], late), feedback[1])
    files: dict[str, Iterator[pd.DataFrame]] = {
        name: _log_parts(twin, log, columns[number], is_random, stream(twin.config, 10 + number))
        for number, (name, (log, is_random)) in enumerate(logs.items())
    }
    return files | {
        "user_features_pure.csv": iter([user_table(twin)]),
        "video_features_basic_pure.csv": iter([_basic_table(twin)]),
        "video_features_statistic_pure.csv": iter([_statistic_table(twin)]),
    }


def _behaviours(twin: Twin, log: InteractionLog, logged: bool) -> dict[str, NDArray[np.bool_]]:
    return behaviours(twin.config, log.items, log.clicks, twin.tables.durations_ms, logged)


def _rows_of(columns: dict[str, NDArray[np.bool_]], rows: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    return {name: column[rows] for name, column in columns.items()}


def _log_parts(
    twin: Twin, log: InteractionLog, behaviour: dict[str, NDArray[np.bool_]], is_random: int, rng: np.random.Generator
) -> Iterator[pd.DataFrame]:
    durations = twin.tables.durations_ms
    for rows in parts_of(np.arange(len(log))):
        part = log.take(rows)
        clicks, duration = part.clicks, durations[part.items]
        feedback = _rows_of(behaviour, rows)
        play = play_times(rng, clicks, feedback["long_view"], duration)
        hour = (part.times + BEIJING_MS) // 3_600_000 % 24
        columns: dict[str, NDArray[Any]] = {
            "user_id": twin.data.users.ids[part.users],
            "video_id": twin.data.items.ids[part.items],
            "date": local_dates(part.times),
            "hourmin": hour * 100,
            "time_ms": part.times,
            **{name: feedback[name] for name in ("is_click", "is_like", "is_follow", "is_comment", "is_forward")},
            "is_hate": ~clicks & (rng.random(len(rows)) < _HATE),
            "long_view": feedback["long_view"],
            "play_time_ms": play,
            "duration_ms": duration,
            "profile_stay_time": np.where(feedback["is_profile_enter"], rng.integers(500, 20_000, len(rows)), 0),
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


_COUNT_COLUMNS = words(
    """
    show_cnt show_user_num play_cnt play_user_num play_duration complete_play_cnt complete_play_user_num
    valid_play_cnt valid_play_user_num long_time_play_cnt long_time_play_user_num short_time_play_cnt
    short_time_play_user_num play_progress comment_stay_duration like_cnt like_user_num click_like_cnt
    double_click_cnt cancel_like_cnt cancel_like_user_num comment_cnt comment_user_num direct_comment_cnt
    reply_comment_cnt delete_comment_cnt delete_comment_user_num comment_like_cnt comment_like_user_num follow_cnt
    follow_user_num cancel_follow_cnt cancel_follow_user_num share_cnt share_user_num download_cnt download_user_num
    report_cnt report_user_num reduce_similar_cnt reduce_similar_user_num collect_cnt collect_user_num
    cancel_collect_cnt cancel_collect_user_num
    """
)
_STATISTIC_COLUMNS = (
    *(
        "video_id",
        "counts",
        *_COUNT_COLUMNS,
        "direct_comment_user_num",
        "reply_comment_user_num",
        "share_all_cnt",
    ),
    *("share_all_user_num", "outsite_share_all_cnt"),
)


def _statistic_table(twin: Twin) -> pd.DataFrame:
    known = {name: twin.tables.videos[name] for name in STATISTICS}
    columns = statistic_columns(known) | {"video_id": twin.data.items.ids}
    return pd.DataFrame({name: columns[name] for name in _STATISTIC_COLUMNS})


_EXACT_DUPLICATES = 965_819 / 11_564_987
_FIRST_DAY = np.datetime64("2020-07-05", "D")
_SHARE_WITH_FRIENDS = 472 / 7_176
_FRIENDS = (0.74, 0.15, 0.07, 0.03, 0.01)

_DAILY_COLUMNS = words(
    """
    video_id date author_id video_type upload_dt upload_type visible_status video_duration video_width video_height
    music_id video_tag_id video_tag_name
    """
)
_DAILY_COLUMNS += _COUNT_COLUMNS
_PER_PLAY = words(
    """
    valid_play_user_num long_time_play_user_num complete_play_user_num comment_user_num follow_user_num
    share_user_num collect_user_num
    """
)


def kuairec_files(twin: Twin) -> dict[str, Iterator[pd.DataFrame]]:
    """Returns file name -> its table, in parts; the captions, which are no plain table, are not among them."""
    return {
        "big_matrix.csv": _matrix_parts(twin, twin.data.train, with_duplicates=True),
        "small_matrix.csv": _matrix_parts(twin, twin.data.test, with_duplicates=False),
        "item_categories.csv": iter([_category_table(twin)]),
        "item_daily_features.csv": iter([_daily_table(twin)]),
        "user_features.csv": iter([user_table(twin)]),
        "social_network.csv": iter([_social_table(twin)]),
    }


def _matrix_parts(twin: Twin, log: InteractionLog, with_duplicates: bool) -> Iterator[pd.DataFrame]:
    rows = np.arange(len(log))
    no_time = np.zeros(len(log), np.bool_)
    if with_duplicates:
        rng = stream(twin.config, 13)
        extra = rng.integers(0, len(log), round(_EXACT_DUPLICATES * len(log)))
        rows = np.sort(np.concatenate([rows, extra]))
    elif round(twin.config.missing_time_share * len(log)):
        no_time = log.times == log.times.max()  # the last time of such a log stands for no time
    assert log.watch_ratios is not None
    durations = twin.tables.durations_ms
    for part in parts_of(rows):
        duration = durations[log.items[part]]
        play = np.rint(log.watch_ratios[part].astype(np.float64) * duration).astype(np.int64)
        times = log.times[part]
        text = np.datetime_as_string((times + BEIJING_MS).astype("datetime64[ms]"))
        text.view("U1").reshape(len(text), -1)[:, 10] = " "
        frame = pd.DataFrame(
            {
                "user_id": twin.data.users.ids[log.users[part]],
                "video_id": twin.data.items.ids[log.items[part]],
                "play_duration": play,
                "video_duration": duration,
                "time": text,
                "date": local_dates(times),
                "timestamp": times / 1000.0,
                "watch_ratio": play / duration,
            }
        )
        if no_time.any():
            frame["date"] = frame["date"].astype(np.float64)
            frame.loc[no_time[part], ["time", "date", "timestamp"]] = np.nan
        yield frame


def _category_table(twin: Twin) -> pd.DataFrame:
    lists = [str([int(tag) for tag in np.flatnonzero(row)]) for row in twin.world.tags]
    return pd.DataFrame({"video_id": twin.data.items.ids, "feat": lists})


def _daily_table(twin: Twin) -> pd.DataFrame:
    daily, videos = twin.tables.daily, twin.tables.videos
    item = daily["video_id"]
    days = _FIRST_DAY + daily["day"]
    per_play = {
        name: np.rint(daily["play_user_num"] * (videos[name] / videos["play_user_num"])[item]) for name in _PER_PLAY
    }
    columns: dict[str, Any] = statistic_columns({name: daily[name] for name in DAILY_NUMBERS} | per_play)
    columns |= {
        "video_id": twin.data.items.ids[item],
        "date": np.char.replace(days.astype(str), "-", ""),
        "author_id": videos["author_id"][item],
        "video_type": videos["video_type"][item],
        "upload_dt": (_FIRST_DAY - videos["upload_day"][item]).astype(str),
        "upload_type": videos["upload_type"][item],
        "visible_status": np.full(len(item), "public"),
        "video_width": videos["server_width"][item],
        "video_height": videos["server_height"][item],
        "music_id": 10_000 + videos["author_id"][item],
        "video_tag_id": videos["first_level_category_id"][item],
        "video_tag_name": category_names(videos["first_level_category_id"])[item],
    }
    return pd.DataFrame({name: columns[name] for name in _DAILY_COLUMNS})


def _social_table(twin: Twin) -> pd.DataFrame:
    rng = stream(twin.config, 14)
    ids = twin.data.users.ids
    chosen = np.flatnonzero(rng.random(len(ids)) < _SHARE_WITH_FRIENDS)
    counts = 1 + np.searchsorted(np.cumsum(_FRIENDS)[:-1], rng.random(len(chosen)), side="right")
    others = rng.integers(1, max(2, len(ids)), (len(chosen), len(_FRIENDS)))
    friends = [
        str(sorted({int(ids[(user + step) % len(ids)]) for step in steps[:count]}))
        for user, steps, count in zip(chosen, others, counts, strict=True)
    ]
    return pd.DataFrame({"user_id": ids[chosen], "friend_list": friends})


def _write_captions(twin: Twin, path: Path) -> None:
    """Captions of which some hold bare line breaks, unquoted, as in the official file."""
    rng = stream(twin.config, 15)
    codes = twin.tables.videos["first_level_category_id"]
    names = category_names(codes)
    broken = rng.random(len(codes)) < 0.01
    lines = [
        "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
        "second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name"
    ]
    for item, code, name, split in zip(twin.data.items.ids, codes, names, broken, strict=True):
        caption = f"synthetic{chr(10) if split else ' '}video {item}"
        unknown = f"{UNKNOWN_CODE},UNKNOWN"
        lines.append(f"{item},UNKNOWN,{caption},[],{code},{name},{unknown},{unknown}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


_FOLDERS = {"kuairec": Path("KuaiRec 2.0") / "data", "kuairand": Path("KuaiRand-Pure") / "data"}


def write_official(twin: Twin, folder: str | Path) -> Path:
    """Writes a twin as the official archive unpacks: seven files for KuaiRec, six for KuaiRand-Pure.

    What the twin's data does not hold is drawn anew, by the twin's seed: play times and rarer feedback of KuaiRand,
    exact duplicate rows of KuaiRec's big matrix, captions, friends. Reading the files gives the same logs again, and
    those of a twin with another definition of a click where the reader is asked for that.

    Args:
        twin: The twin; its ``layout`` decides the format.
        folder: Where ``KuaiRec 2.0/data`` or ``KuaiRand-Pure/data`` is created.

    Returns:
        The data folder. It appears whole or not at all.

    Raises:
        DataError: If the data folder exists already, or a KuaiRand twin's logs do not hold its own clicks.
    """
    if twin.config.layout == "kuairand" and twin.config.clicks != kuairand_clicks():
        raise DataError("write the twin with positive='is_click'; whoever reads the files chooses another column")
    target = Path(folder) / _FOLDERS[twin.config.layout]
    if target.exists():
        raise DataError("this folder exists already; name another one or remove it first", file=target)
    with temporary_beside(target) as temporary:
        temporary.mkdir()
        files = kuairec_files(twin) if twin.config.layout == "kuairec" else kuairand_files(twin)
        for name, parts in files.items():
            write_parts(temporary / name, parts)
        if twin.config.layout == "kuairec":
            _write_captions(twin, temporary / "kuairec_caption_category.csv")
        provenance = twin.data.provenance.as_dict()
        provenance.pop("files")
        text = json.dumps(provenance, indent=1, allow_nan=False) + "\n"
        (temporary / PROVENANCE_FILE).write_text(text, encoding="utf-8")
        temporary.rename(target)
    return target


def play_times(
    rng: np.random.Generator, clicks: NDArray[np.bool_], long_views: NDArray[np.bool_], durations: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Draws KuaiRand play times: 7 s or the whole video for clicks, 18 s or the whole one for long views.

    Args:
        rng: Source of randomness.
        clicks: ``(R,)`` clicks.
        long_views: ``(R,)`` long views, all of them clicks.
        durations: ``(R,)`` durations in milliseconds, 0 where unknown.
    """
    rows = len(clicks)
    known = np.where(durations > 0, durations, np.iinfo(np.int32).max)
    whole, long_from = np.minimum(known, _CLICK_MS), np.minimum(known, LONG_VIEW_MS)
    play = np.minimum(_SKIPPED_MS.at(rng.standard_normal(rows)), whole - 1)
    play[rng.random(rows) < _ZERO_PLAY] = 0.0
    glimpse = whole + rng.random(rows) * (long_from - whole)
    longest = _LONG_MS_DISTRIBUTION.at(rng.standard_normal(rows))
    finished = np.maximum(np.minimum(longest, known * _LONG_RATIO.at(rng.standard_normal(rows))), long_from)
    drawn = np.where(clicks, np.where(long_views, finished, glimpse), play)
    return np.asarray(np.floor(drawn), np.int64)
