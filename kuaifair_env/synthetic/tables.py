"""Draws the tables of users and items of a twin, with the columns of the official files.

What a table says about an item comes from hidden causes (exposure propensity, quality, tags) with noise,
never from the logs. Features are encoded as the readers of the official files encode them, so a twin that was
written to files and read back has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.published import DAILY_NUMBERS, STATISTICS, UNKNOWN_CODE, USER_CATEGORIES, USER_NUMBERS
from kuaifair_env.data.schema import BoolArray, Catalogue, Users
from kuaifair_env.synthetic.config import Layout, QuantileDistribution, TwinConfig
from kuaifair_env.synthetic.truth import (
    TwinWorld,
    categories,
    correlated,
    distribution_by_rank,
    ranks_of,
    stream,
)

Columns = dict[str, NDArray[Any]]
Shares = tuple[tuple[Any, float], ...]

# Shares of users by activity degree, most active first (official user tables).
_DEGREES: Mapping[Layout, Shares] = {
    "kuairec": (("full_active", 0.849), ("high_active", 0.131), ("UNKNOWN", 0.016), ("middle_active", 0.004)),
    "kuairand": (
        ("full_active", 0.658),
        ("high_active", 0.226),
        ("middle_active", 0.078),
        ("2_14_day_new", 0.025),
        ("low_active", 0.013),
    ),
}
_LEVELS = (0.05, 0.25, 0.50, 0.75, 0.95, 0.99)
# Quantiles of social counts plus one, and of days since registration (official user tables).
_SOCIAL: Mapping[Layout, tuple[tuple[float, ...], ...]] = {
    "kuairec": (
        (3, 10, 34, 131, 1410, 2000),
        (1, 1, 3, 7, 24, 108),
        (1, 1, 1, 2, 12, 50),
        (50, 132, 225, 324, 955, 1494),
    ),
    "kuairand": (
        (8, 51, 156, 431, 1744, 4129),
        (2, 11, 49, 222, 1160, 4375),
        (1, 4, 17, 84, 551, 1626),
        (124, 683, 1188, 1701, 2381, 2700),
    ),
}
_FLAGS: Mapping[Layout, Mapping[str, Shares]] = {
    "kuairec": {
        "is_lowactive_period": ((0, 0.999), (1, 0.001)),
        "is_live_streamer": ((0, 0.993), (1, 0.007)),
        "is_video_author": ((0, 0.83), (1, 0.17)),
    },
    "kuairand": {
        "is_lowactive_period": ((0, 1.0),),
        "is_live_streamer": ((UNKNOWN_CODE, 0.774), (1, 0.226)),
        "is_video_author": ((1, 0.816), (0, 0.184)),
    },
}
# Number of values of the anonymous features 0..17; from 12 on 2.6 % of the users have none (official user
# tables).
_ONEHOT_VALUES: Mapping[Layout, tuple[int, ...]] = {
    "kuairec": (2, 8, 30, 1076, 13, 10, 3, 47, 340, 7, 5, 3, 2, 2, 2, 2, 2, 2),
    "kuairand": (2, 7, 50, 1471, 16, 34, 3, 118, 454, 7, 5, 5, 2, 2, 2, 2, 2, 2),
}
_FIRST_ONEHOT_WITH_GAPS, _ONEHOT_GAPS = 12, 0.026

VIDEO_CATEGORIES: Mapping[str, Shares] = {  # official tables of videos
    "video_type": (("NORMAL", 0.99), ("AD", 0.01)),
    "upload_type": (
        ("LongImport", 0.40),
        ("Web", 0.33),
        ("ShortImport", 0.13),
        ("Kmovie", 0.12),
        ("LongPicture", 0.02),
    ),
    "music_type": ((9, 0.90), (4, 0.09), (8, 0.01)),
    "server_width": ((720, 0.75), (1280, 0.19), (960, 0.03), (1080, 0.02), (540, 0.01)),
    "server_height": ((1280, 0.70), (720, 0.25), (1440, 0.03), (960, 0.02)),
}
_MISSING_DURATION = 0.0315

# Quantiles of ratios between platform statistics: plays to shows, all others to plays (published statistic table).
_RATIO_LEVELS = (0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99)
_RATIOS = {
    "play_user_num": (0.154, 0.268, 0.475, 0.660, 0.827, 0.966, 0.999),
    "valid_play_user_num": (0.187, 0.289, 0.471, 0.593, 0.682, 0.779, 0.827),
    "long_time_play_user_num": (0.071, 0.144, 0.320, 0.459, 0.562, 0.676, 0.741),
    "complete_play_user_num": (0.013, 0.028, 0.100, 0.187, 0.300, 0.502, 0.630),
    "like_user_num": (0.0034, 0.006, 0.013, 0.024, 0.045, 0.106, 0.185),
    "comment_user_num": (0.00005, 0.0001, 0.0004, 0.0010, 0.0020, 0.0060, 0.0146),
    "follow_user_num": (0.00015, 0.0003, 0.0008, 0.0016, 0.0031, 0.0085, 0.0151),
    "share_user_num": (0.00002, 0.00004, 0.0001, 0.00025, 0.0007, 0.0030, 0.0073),
    "collect_user_num": (0.0005, 0.0007, 0.0014, 0.0025, 0.0054, 0.0153, 0.0299),
}
_PROGRESS = QuantileDistribution(_RATIO_LEVELS, (0.02, 0.045, 0.099, 0.155, 0.225, 0.359, 0.5))
# Correlations of a ratio with the platform's exposure count and with item quality. Those with the count are published
# (.311, .311, .161, -.006); those with quality are set so that counts correlate with random click rates as published.
_TIES = {
    "play_user_num": (0.26, 0.15),
    "valid_play_user_num": (0.31, 0.42),
    "long_time_play_user_num": (0.31, 0.4),
    "complete_play_user_num": (0.16, 0.2),
    "like_user_num": (0.0, -0.3),
}

DAILY_DAYS = 63
_DAILY_ROWS_PER_ITEM = 32  # of 63 days: 343,341 rows of 10,728 videos


@dataclass(frozen=True)
class TwinTables:
    """Raw tables of a twin, by official column name.

    Attributes:
        users: ``(U,)`` columns of the user table, but for the ranges, which follow from the numbers.
        videos: ``(N,)`` columns: durations in milliseconds (NaN where unknown), kinds, sizes, platform
            statistics.
        daily: Statistics per video and day: ``video_id``, ``day`` and :data:`DAILY_NUMBERS`; empty without
            days.
    """

    users: Columns
    videos: Columns
    daily: Columns

    @property
    def durations_ms(self) -> NDArray[np.int64]:
        """``int64 (N,)`` durations of the videos, 0 where unknown."""
        return np.nan_to_num(self.videos["video_duration"]).astype(np.int64)


def build_tables(config: TwinConfig, world: TwinWorld) -> TwinTables:
    """Draws the tables of a world."""
    users = _draw_users(config, world, stream(config, 4))
    rng = stream(config, 5)
    videos = _draw_videos(config, world, rng)
    return TwinTables(users, videos, _draw_daily(videos, rng) if config.layout == "kuairec" else {})


def users_of(config: TwinConfig, tables: TwinTables) -> Users:
    """Returns the users with their features."""
    from kuaifair_env.data.encoding import encode_features  # needs pandas
    from kuaifair_env.data.official import category_frame

    frame = category_frame(_as_read(tables.users), USER_CATEGORIES)
    return Users(np.arange(config.n_users, dtype=np.int64), encode_features(frame, "user feature"))


def catalogue_of(config: TwinConfig, world: TwinWorld, tables: TwinTables) -> Catalogue:
    """Returns the items with their features, tags and platform-wide exposure counts."""
    import pandas as pd

    from kuaifair_env.data.encoding import encode_features
    from kuaifair_env.data.official import category_frame

    if config.layout == "kuairec":
        columns = _daily_means(config.n_items, tables.daily)
        kinds: tuple[str, ...] = ("video_type", "upload_type")
        shown = columns["show_user_num"]
    else:
        columns = {name: tables.videos[name] for name in ("video_duration", "server_width", "server_height")}
        kinds = ("music_type", "video_type", "upload_type")
        shown = tables.videos["show_user_num"].astype(np.float64)
    columns |= {name: tables.videos[name] for name in kinds}
    frame = category_frame(_as_read(columns), ("music_type",))
    if config.layout == "kuairec":
        category = tables.videos["first_level_category_id"]
        known = pd.Series(category).where(category != UNKNOWN_CODE).astype("Int64").astype("category")
        frame["first_level_category"] = known
    else:
        frame = pd.concat([frame, pd.DataFrame({name: tables.videos[name] for name in STATISTICS})], axis=1)
    used = world.tags.any(axis=0)
    names = tuple(str(tag) for tag in np.flatnonzero(used))
    tags: BoolArray = np.ascontiguousarray(world.tags[:, used])
    ids = np.arange(config.n_items, dtype=np.int64)
    return Catalogue(ids, encode_features(frame, "item feature"), tags, names, shown)


def _as_read(columns: Columns) -> Columns:
    """Gives columns the types that the readers give them: text as objects, numbers as doubles."""
    return {
        name: values.astype(object) if values.dtype.kind in "UO" else values.astype(np.float64)
        for name, values in columns.items()
    }


def _draw_users(config: TwinConfig, world: TwinWorld, rng: np.random.Generator) -> Columns:
    size, layout = config.n_users, config.layout
    columns: Columns = {}
    names, shares = zip(*_DEGREES[layout], strict=True)
    place = ranks_of(-correlated(rng, world.activity_scores, 0.6))
    columns["user_active_degree"] = np.asarray(names)[np.searchsorted(np.cumsum(shares)[:-1], place)]
    fame = rng.standard_normal(size)
    for name, values in zip(USER_NUMBERS, _SOCIAL[layout], strict=True):
        is_count = name != "register_days"
        scores = correlated(rng, fame, 0.7 if is_count else 0.0)
        numbers = QuantileDistribution(_LEVELS, values, "log").at(scores) - is_count
        columns[name] = np.rint(numbers).astype(np.int64)
    for name, flag in _FLAGS[layout].items():
        columns[name] = _kinds(rng, flag, size)
    for number, count in enumerate(_ONEHOT_VALUES[layout]):
        codes = _kinds(rng, tuple((value, 1.0 / (1.0 + value)) for value in range(count)), size)
        if number >= _FIRST_ONEHOT_WITH_GAPS:
            codes = np.where(rng.random(size) < _ONEHOT_GAPS, np.nan, codes)
        columns[f"onehot_feat{number}"] = codes
    return columns


def _draw_videos(config: TwinConfig, world: TwinWorld, rng: np.random.Generator) -> Columns:
    size = config.n_items
    columns: Columns = {}
    durations = np.rint(1000.0 * distribution_by_rank(config.durations, rng.standard_normal(size)))
    if config.layout == "kuairand":
        durations[rng.random(size) < _MISSING_DURATION] = np.nan
    columns["video_duration"] = durations
    columns["author_id"] = rng.integers(0, 3 * size, size)
    columns["upload_day"] = rng.integers(0, 3, size)
    for name, shares in VIDEO_CATEGORIES.items():
        columns[name] = _kinds(rng, shares, size)
    unknown = rng.random(size) < 0.02
    columns["first_level_category_id"] = np.where(unknown, UNKNOWN_CODE, world.first_tags)
    columns |= _draw_statistics(config, world, rng)
    return columns


def _draw_statistics(config: TwinConfig, world: TwinWorld, rng: np.random.Generator) -> Columns:
    """Platform statistics: per-day means of users who were shown a video, played it, and so on."""
    size = config.n_items
    columns: Columns = {"counts": np.minimum(180, 105 + rng.integers(0, 90, size))}
    popularity = (world.exposure_logs - world.exposure_logs.mean()) / world.exposure_logs.std()
    shown_scores = correlated(rng, popularity, float(np.sqrt(1.0 - config.shown_noise**2)))
    shown = distribution_by_rank(config.shown, shown_scores)
    counts = shown
    columns["show_user_num"] = np.round(shown, 4)
    for name, quantiles in _RATIOS.items():
        with_count, with_quality = _TIES.get(name, (0.0, 0.0))
        scores = with_count * shown_scores + with_quality * world.quality_scores
        scores += np.sqrt(1.0 - with_count**2 - with_quality**2) * rng.standard_normal(size)
        ratio = distribution_by_rank(QuantileDistribution(_RATIO_LEVELS, quantiles), scores)
        columns[name] = np.round(counts * ratio, 4)
        if name == "play_user_num":
            counts = counts * ratio
    columns["play_progress"] = np.round(distribution_by_rank(_PROGRESS, rng.standard_normal(size)), 6)
    return columns


def _draw_daily(videos: Columns, rng: np.random.Generator) -> Columns:
    """Half of the days of each video, in whole counts that vary from day to day."""
    size = len(videos["video_duration"])
    keys = rng.random((size, DAILY_DAYS))
    days = np.argsort(keys, axis=1, kind="stable")[:, :_DAILY_ROWS_PER_ITEM]
    video = np.repeat(np.arange(size), _DAILY_ROWS_PER_ITEM)
    swing = np.exp(0.4 * rng.standard_normal(len(video)))
    daily: Columns = {"video_id": video, "day": np.sort(days, axis=1).ravel()}
    daily["video_duration"] = videos["video_duration"][video]
    for name in ("show_user_num", "play_user_num", "like_user_num"):
        daily[name] = np.rint(videos[name][video] * swing)
    daily["play_progress"] = np.round(np.clip(videos["play_progress"][video] * swing, 0.0, 1.0), 6)
    return daily


def _daily_means(size: int, daily: Columns) -> Columns:
    rows = np.bincount(daily["video_id"], minlength=size)
    return {name: np.bincount(daily["video_id"], daily[name], size) / rows for name in DAILY_NUMBERS}


def _kinds(rng: np.random.Generator, shares: Shares, size: int) -> NDArray[Any]:
    """Draws ``size`` of the named kinds by their shares."""
    names, weights = zip(*shares, strict=True)
    return np.asarray(names)[categories(rng, weights, size)]
