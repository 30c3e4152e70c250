"""Small files in the official formats, for tests of readers, downloads and the command line."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

KUAIREC_USERS, KUAIREC_ITEMS, KUAIREC_SMALL = 12, 20, (5, 8)
KUAIRAND_USERS, KUAIRAND_ITEMS = 15, 30

_SIGNALS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")


def write_kuairec(folder: Path, seed: int = 0) -> dict[str, pd.DataFrame]:
    """Writes all KuaiRec files; the big matrix has 3 exact duplicates, the small one 4 rows without time.

    Returns:
        The two matrices as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    big = _kuairec_matrix(rng, rng.integers(0, KUAIREC_USERS, 200), rng.integers(0, KUAIREC_ITEMS, 200))
    big = pd.concat([big, big.iloc[[3, 3, 50]]], ignore_index=True)
    pairs = np.indices(KUAIREC_SMALL).reshape(2, -1)
    small = _kuairec_matrix(rng, *pairs)
    small.loc[[0, 7, 8, 39], ["time", "date", "timestamp"]] = np.nan
    big.to_csv(folder / "big_matrix.csv", index=False)
    small.to_csv(folder / "small_matrix.csv", index=False)
    tags = [f"[{item % 4}]" if item % 3 else f"[{item % 4}, 9]" for item in range(KUAIREC_ITEMS)]
    pd.DataFrame({"video_id": range(KUAIREC_ITEMS), "feat": tags}).to_csv(folder / "item_categories.csv", index=False)
    _users(rng, KUAIREC_USERS).to_csv(folder / "user_features.csv", index=False)
    days = pd.DataFrame(
        {
            "video_id": np.repeat(np.arange(KUAIREC_ITEMS), 2),
            "date": np.tile([20200705, 20200706], KUAIREC_ITEMS),
            "video_type": "NORMAL",
            "upload_type": np.repeat(np.where(np.arange(KUAIREC_ITEMS) % 2, "Web", "ShortImport"), 2),
            "video_duration": 1000.0 * (1 + np.repeat(np.arange(KUAIREC_ITEMS), 2)),
            "show_user_num": np.repeat(100 * np.arange(KUAIREC_ITEMS), 2) + np.tile([0, 10], KUAIREC_ITEMS),
            "play_user_num": rng.integers(1, 50, 2 * KUAIREC_ITEMS),
            "like_user_num": rng.integers(1, 9, 2 * KUAIREC_ITEMS),
            "play_progress": rng.random(2 * KUAIREC_ITEMS),
        }
    )
    days.to_csv(folder / "item_daily_features.csv", index=False)
    write_captions(folder / "kuairec_caption_category.csv")
    return {"big": big, "small": small}


def write_captions(path: Path) -> None:
    """Writes captions of which item 2's holds a bare carriage return and item 5's a bare line feed."""
    lines = [
        "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,first_level_category_name,"
        "second_level_category_id,second_level_category_name,third_level_category_id,third_level_category_name"
    ]
    for item in range(KUAIREC_ITEMS):
        caption = {2: "a caption\rin two lines", 5: "one\n7 two", 6: '"quoted, with comma"'}.get(item, f"video {item}")
        lines.append(f"{item},UNKNOWN,{caption},[],{item % 5},name,-124,UNKNOWN,-124,UNKNOWN")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


def write_kuairand(
    folder: Path, seed: int = 0, suffix: str = "pure", n_users: int = KUAIRAND_USERS, size: int = 1
) -> dict[str, pd.DataFrame]:
    """Writes all files of KuaiRand-Pure, or of 1K (``suffix="1k"``); the first standard log has 2 exact duplicates.

    Args:
        folder: Where the files go.
        seed: Seed of what is drawn.
        suffix: End of the file names.
        n_users: Number of users.
        size: How many times 330 rows the logs have.

    Returns:
        The three logs as written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    early = _kuairand_log(rng, 120 * size, 20220408, 0, n_users)
    logs = {
        f"log_standard_4_08_to_4_21_{suffix}.csv": pd.concat([early, early.iloc[[1, 60]]], ignore_index=True),
        f"log_standard_4_22_to_5_08_{suffix}.csv": _kuairand_log(rng, 60 * size, 20220422, 0, n_users),
        f"log_random_4_22_to_5_08_{suffix}.csv": _kuairand_log(rng, 150 * size, 20220422, 1, n_users),
    }
    for name, log in logs.items():
        log.to_csv(folder / name, index=False)
    _users(rng, n_users).to_csv(folder / f"user_features_{suffix}.csv", index=False)
    items = np.arange(KUAIRAND_ITEMS)
    tags = np.where(items % 5 == 0, None, np.where(items % 2, "39", "39,12"))
    basic = pd.DataFrame(
        {
            "video_id": items,
            "author_id": rng.integers(0, 10**7, KUAIRAND_ITEMS),
            "video_type": np.where(items == 4, "AD", "NORMAL"),
            "upload_dt": "2022-04-10",
            "upload_type": np.where(items % 3, "Web", "Kmovie"),
            "visible_status": 0.0,
            "video_duration": np.where(items == 7, np.nan, rng.integers(5000, 90000, KUAIRAND_ITEMS)),
            "server_width": 720.0,
            "server_height": 1280.0,
            "music_id": rng.integers(0, 10**10, KUAIRAND_ITEMS),
            "music_type": np.where(items % 4, 9.0, np.nan),
            "tag": tags,
        }
    )
    basic.to_csv(folder / f"video_features_basic_{suffix}.csv", index=False)
    numbers = [
        "show",
        "play",
        "valid_play",
        "long_time_play",
        "complete_play",
        "like",
        "comment",
        "follow",
        "share",
    ]
    statistic = pd.DataFrame({"video_id": items, "counts": rng.integers(80, 180, KUAIRAND_ITEMS)})
    for number in (*numbers, "collect"):
        statistic[f"{number}_user_num"] = rng.lognormal(6, 1.5, KUAIRAND_ITEMS)
    statistic["play_progress"] = rng.random(KUAIRAND_ITEMS)
    statistic = statistic.sample(frac=1, random_state=seed)
    statistic.to_csv(folder / f"video_features_statistic_{suffix}.csv", index=False)
    return logs


def write_kuairand_27k(folder: Path, seed: int = 0, pool: int = 12) -> dict[str, pd.DataFrame]:
    """Writes all KuaiRand-27K files: standard logs in two parts each, statistics in three, a random log of a pool.

    The rows of the standard logs are in no order, so that a user's last rows may stand in any part.

    Args:
        folder: Where the files go.
        seed: Seed of what is drawn.
        pool: Items of the random log, the first ones.

    Returns:
        The five logs as written.
    """
    logs = write_kuairand(folder, seed, "27k")
    random = logs["log_random_4_22_to_5_08_27k.csv"]
    random = random[random.video_id < pool].reset_index(drop=True)
    random.to_csv(folder / "log_random_4_22_to_5_08_27k.csv", index=False)
    split = {"log_random_4_22_to_5_08_27k.csv": random}
    for name, parts in (
        ("log_standard_4_08_to_4_21_27k", 2),
        ("log_standard_4_22_to_5_08_27k", 2),
        ("video_features_statistic_27k", 3),
    ):
        whole = folder / f"{name}.csv"
        table = pd.read_csv(whole)
        whole.unlink()
        for part in range(parts):
            rows = table.iloc[part::parts].reset_index(drop=True)
            rows.to_csv(folder / f"{name}_part{part + 1}.csv", index=False)
            if name.startswith("log"):
                split[f"{name}_part{part + 1}.csv"] = rows
    return split


def pack_zip(folder: Path, archive: Path, inside: str = "KuaiRec 2.0/data") -> Path:
    """Packs a folder's files as the official KuaiRec archive does."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, f"{inside}/{path.name}")
    return archive


def pack_tar(folder: Path, archive: Path, inside: str = "KuaiRand-Pure/data") -> Path:
    """Packs a folder's files as the official KuaiRand archive does."""
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(folder.iterdir()):
            packed.add(path, f"{inside}/{path.name}")
    return archive


def _kuairec_matrix(rng: np.random.Generator, users: np.ndarray, items: np.ndarray) -> pd.DataFrame:
    rows = len(users)
    played, duration = rng.integers(0, 30_000, rows), 1000 * (1 + items)
    seconds = 1_593_878_903.0 + rng.integers(0, 5_000_000, rows) + 0.001 * rng.integers(0, 1000, rows)
    return pd.DataFrame(
        {
            "user_id": users,
            "video_id": items,
            "play_duration": played,
            "video_duration": duration,
            "time": pd.to_datetime(seconds, unit="s").strftime("%Y-%m-%d %H:%M:%S.%f"),
            "date": 20200705.0,
            "timestamp": np.round(seconds, 3),
            "watch_ratio": played / duration,
        }
    )


def _kuairand_log(rng: np.random.Generator, rows: int, date: int, is_random: int, n_users: int) -> pd.DataFrame:
    log = pd.DataFrame(
        {
            "user_id": rng.integers(0, n_users, rows),
            "video_id": rng.integers(0, KUAIRAND_ITEMS, rows),
            "date": date,
            "hourmin": rng.integers(0, 2400, rows),
            "time_ms": 1_649_000_000_000 + (date - 20220400) * 10**9 + rng.integers(0, 10**8, rows),
        }
    )
    for signal in _SIGNALS:
        log[signal] = rng.integers(0, 2, rows)
    for number in ("play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"):
        log[number] = rng.integers(0, 10**5, rows)
    log["is_profile_enter"] = 0
    log["is_rand"] = is_random
    log["tab"] = rng.integers(0, 15, rows)
    return log


def _users(rng: np.random.Generator, n_users: int) -> pd.DataFrame:
    users = pd.DataFrame(
        {
            "user_id": np.arange(n_users),
            "user_active_degree": np.where(np.arange(n_users) % 4, "full_active", "UNKNOWN"),
            "is_lowactive_period": 0,
            "is_live_streamer": np.where(np.arange(n_users) % 5, 0, -124),
            "is_video_author": rng.integers(0, 2, n_users),
        }
    )
    for number in ("follow_user_num", "fans_user_num", "friend_user_num", "register_days"):
        users[number] = rng.integers(0, 500, n_users)
        users[f"{number}_range"] = "(0,10]"
    for number in range(18):
        users[f"onehot_feat{number}"] = rng.integers(0, 3, n_users)
    users.loc[2, "onehot_feat4"] = np.nan
    return users
