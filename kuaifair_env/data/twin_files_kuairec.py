"""A twin in the seven files of KuaiRec."""

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
    known_code,
    local_dates,
    parts_of,
    user_table,
    words,
    write_parts,
)
from kuaifair_env.data.twin_files_kuairand import statistic_columns
from kuaifair_env.data.twin_tables import DAILY_NUMBERS, UNKNOWN_CODE
from kuaifair_env.data.twin_truth import stream

if TYPE_CHECKING:
    import pandas as pd

    from kuaifair_env.data.twin import Twin

_EXACT_DUPLICATES = 965_819 / 11_564_987
_FIRST_DAY = np.datetime64("2020-07-05", "D")
_SHARE_WITH_FRIENDS = 472 / 7_176
_FRIENDS = (0.74, 0.15, 0.07, 0.03, 0.01)

_DAILY_COLUMNS = words(
    """
    video_id date author_id video_type upload_dt upload_type visible_status video_duration video_width
    video_height music_id video_tag_id video_tag_name show_cnt show_user_num play_cnt play_user_num
    play_duration complete_play_cnt complete_play_user_num valid_play_cnt valid_play_user_num
    long_time_play_cnt long_time_play_user_num short_time_play_cnt short_time_play_user_num play_progress
    comment_stay_duration like_cnt like_user_num click_like_cnt double_click_cnt cancel_like_cnt
    cancel_like_user_num comment_cnt comment_user_num direct_comment_cnt reply_comment_cnt delete_comment_cnt
    delete_comment_user_num comment_like_cnt comment_like_user_num follow_cnt follow_user_num
    cancel_follow_cnt cancel_follow_user_num share_cnt share_user_num download_cnt download_user_num
    report_cnt report_user_num reduce_similar_cnt reduce_similar_user_num collect_cnt collect_user_num
    cancel_collect_cnt cancel_collect_user_num
    """
)
_PER_PLAY = words(
    """
    valid_play_user_num long_time_play_user_num complete_play_user_num comment_user_num follow_user_num
    share_user_num collect_user_num
    """
)


def kuairec_files(twin: Twin) -> dict[str, Callable[[Path], None]]:
    """Returns file name -> how to write it."""

    def table(make: Callable[[Twin], pd.DataFrame]) -> Callable[[Path], None]:
        return lambda path: write_parts(path, iter([make(twin)]))

    return {
        "big_matrix.csv": partial(_write_matrix, twin, twin.data.train, True),
        "small_matrix.csv": partial(_write_matrix, twin, twin.data.test, False),
        "item_categories.csv": table(_category_table),
        "item_daily_features.csv": table(_daily_table),
        "user_features.csv": table(user_table),
        "social_network.csv": table(_social_table),
        "kuairec_caption_category.csv": partial(_write_captions, twin),
    }


def _write_matrix(twin: Twin, log: InteractionLog, with_duplicates: bool, path: Path) -> None:
    rows = np.arange(len(log))
    no_time = np.zeros(len(log), np.bool_)
    if with_duplicates:
        rng = stream(twin.config, 13)
        extra = rng.integers(0, len(log), round(_EXACT_DUPLICATES * len(log)))
        rows = np.sort(np.concatenate([rows, extra]))
    elif round(twin.config.missing_time_share * len(log)):
        no_time = log.times == log.times.max()  # the last time of such a log stands for no time
    write_parts(path, _matrix_parts(twin, log, rows, no_time))


def _matrix_parts(
    twin: Twin, log: InteractionLog, rows: NDArray[np.int64], no_time: NDArray[np.bool_]
) -> Iterator[pd.DataFrame]:
    import pandas as pd

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
    import pandas as pd

    lists = [str([int(tag) for tag in np.flatnonzero(row)]) for row in twin.world.tags]
    return pd.DataFrame({"video_id": twin.data.items.ids, "feat": lists})


def _daily_table(twin: Twin) -> pd.DataFrame:
    import pandas as pd

    daily, videos = twin.tables.daily, twin.tables.videos
    item = daily["video_id"]
    days = _FIRST_DAY + daily["day"]
    per_play = {
        name: np.rint(daily["play_user_num"] * (videos[name] / videos["play_user_num"])[item])
        for name in _PER_PLAY
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
        "video_tag_name": known_code(videos["first_level_category_id"])["name"][item],
    }
    return pd.DataFrame({name: columns[name] for name in _DAILY_COLUMNS})


def _social_table(twin: Twin) -> pd.DataFrame:
    import pandas as pd

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
    names = known_code(codes)["name"]
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
