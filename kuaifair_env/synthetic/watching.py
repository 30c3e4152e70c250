"""Draws when a twin's users watch, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.sources import KUAIREC_POSITIVE_WATCH_RATIO
from kuaifair_env.synthetic.config import Layout, QuantileDistribution, numbers
from kuaifair_env.synthetic.truth import TwinWorld

DAY_MS = 86_400_000
HOUR_MS = 3_600_000

# Shares of views by hour of the day (Beijing time), partial KuaiRand-Pure, 25 April to 8 May.
_HOURS = numbers(
    "41 24 16 10 8 9 16 25 32 39 45 51 58 57 52 51 55 59 57 53 56 58 64 63"  # in thousandths
)


@dataclass(frozen=True)
class Calendar:
    """The period of a log, and its shares of rows by day.

    Attributes:
        start_ms: First midnight (Beijing time) in milliseconds since 1970, UTC.
        days: Relative number of rows on each day.
    """

    start_ms: int
    days: tuple[float, ...]

    def draw(
        self, rng: np.random.Generator, users: NDArray[np.int32], missing: float = 0.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws times in milliseconds, increasing within a user, and the order in which the rows come at these times.

        Args:
            rng: Source of randomness.
            users: ``(R,)`` user rows, non-decreasing.
            missing: Share of rows without time; they come last, right after the latest time of the log.
        """
        rows = len(users)
        offsets = _drawn(rng, self.days, rows) * DAY_MS
        offsets += _drawn(rng, _HOURS, rows) * HOUR_MS
        offsets += (rng.random(rows, np.float32) * HOUR_MS).astype(np.int64)
        if missing:
            known, unknown = np.split(rng.permutation(rows), [rows - min(round(missing * rows), rows - 1)])
            offsets[unknown] = offsets[known].max() + 1
        order = np.argsort((users.astype(np.int64) << 36) + offsets, kind="stable")
        times: NDArray[np.int64] = self.start_ms + offsets[order]
        return times, order


# 2020-07-05 to 2020-09-05; 2022-04-09 to 2022-05-08 with the published rows per day; the random log from
# 04-22 on.
KUAIREC_CALENDAR = Calendar(1_593_878_400_000, (1.0,) * 63)
KUAIRAND_STANDARD = Calendar(
    1_649_433_600_000,
    numbers(
        "52736 227808 278835 166076 94711 71252 58892 60904 44023 24560 20443 20851 20021 22283 26645 18240 "
        "14911 14530 14328 13972 15839 21204 20790 19554 18943 17600 13390 13834 13687 15747"
    ),
)
KUAIRAND_RANDOM = Calendar(1_650_556_800_000, (1.0,) * 17)


def calendars(layout: Layout) -> tuple[Calendar, Calendar]:
    """Returns the periods of the training and the test log."""
    if layout == "kuairec":
        return KUAIREC_CALENDAR, KUAIREC_CALENDAR
    return KUAIRAND_STANDARD, KUAIRAND_RANDOM


def _drawn(rng: np.random.Generator, shares: tuple[float, ...], rows: int) -> NDArray[np.int64]:
    edges = np.cumsum(np.asarray(shares, np.float64))
    table = np.searchsorted(edges / edges[-1], (np.arange(4096) + 0.5) / 4096, side="right")
    drawn: NDArray[np.int64] = table[rng.integers(0, 4096, rows, np.uint16)]
    return drawn


_BLOCK = 1_000_000

# Watch ratios below 2: in the big matrix (published quartiles and shares from .8, 1 and 2 on) and in the
# small one (partial KuaiRec, sample of cells), as quantiles of the views below 2.
_BODY_LOGGED = QuantileDistribution(
    (0.01, 0.05, 0.13, 0.2697, 0.5394, 0.5895, 0.7141, 0.8091, 0.93, 0.999),
    (0.01, 0.06, 0.15, 0.314825, 0.723471, 0.80, 1.0, 1.177644, 1.55, 1.99),
)
_BODY_PANEL = QuantileDistribution(
    (0.0003, 0.0104, 0.0524, 0.1048, 0.262, 0.3, 0.524, 0.5511, 0.7088, 0.786, 0.9434, 0.999),
    (0.005, 0.0176, 0.0974, 0.1833, 0.4676, 0.53, 0.7692, 0.80, 1.0, 1.1206, 1.5882, 1.99),
)
# Watch ratios from 2 on, partial KuaiRec, big matrix.
_TAIL = QuantileDistribution(
    (0.0005, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999999),
    (2.0, 2.241, 2.627, 3.49, 5.273, 7.60, 18.9, 570.0),
    "log",
)
# Shares of the variance of watching scores below 2 that come from item, user and taste (partial KuaiRec).
_BODY_SHARES = (0.42, 0.05, 0.05)

# KuaiRand-Pure: a click is 7 s of play or the whole video, a long view 18 s or the whole video.
_CLICK_MS, LONG_VIEW_MS = 7_000, 18_000
_LONG_GIVEN_CLICK = {True: 0.719, False: 0.4806}
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


def watch_ratios(
    rng: np.random.Generator,
    world: TwinWorld,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    clicks: NDArray[np.bool_],
    durations_ms: NDArray[np.int64],
    logged: bool,
) -> NDArray[np.float32]:
    """Draws KuaiRec watch ratios (play time over duration): from 2 on for clicks, below 2 for all others.

    How long a user watches depends on item, user and taste. Play times are whole milliseconds: ``ratio * duration``
    gives them back. ``logged`` says whether this is the platform's log rather than the panel's.
    """
    truth = world.truth
    by_item, by_user, by_taste = _BODY_SHARES
    distribution = _BODY_LOGGED if logged else _BODY_PANEL
    by_items, by_users = np.sqrt(by_item) * world.quality_scores, np.sqrt(by_user) * world.inclination_scores
    noise = np.sqrt(1.0 - sum(_BODY_SHARES))
    shown = by_items[items[::7]] + by_users[users[::7]]  # the platform shows better videos, more to some users
    centre, spread = float(shown.mean()), float(np.sqrt(shown.var() + by_taste + noise**2))
    ratios = np.empty(len(users), np.float32)
    for start in range(0, len(users), _BLOCK):
        part = slice(start, start + _BLOCK)
        u, i, positive = users[part], items[part], clicks[part]
        scores = noise * rng.standard_normal(len(u)) + by_items[i] + by_users[u]
        scores += np.sqrt(by_taste) * np.einsum("rd,rd->r", truth.user_vectors[u], truth.item_vectors[i])
        scores = (scores - centre) / spread
        durations = durations_ms[i]
        play = np.minimum(np.floor(distribution.at(scores) * durations), KUAIREC_POSITIVE_WATCH_RATIO * durations - 1)
        tail = _TAIL.at(rng.standard_normal(int(positive.sum())))
        play[positive] = np.ceil(tail * durations[positive])
        ratios[part] = play / durations
    return ratios


def play_times(
    rng: np.random.Generator, clicks: NDArray[np.bool_], durations: NDArray[np.int64], logged: bool
) -> NDArray[np.int64]:
    """Draws KuaiRand play times: 7 s or the whole video for clicks, less for all others.

    Args:
        rng: Source of randomness.
        clicks: ``(R,)`` clicks.
        durations: ``(R,)`` durations in milliseconds, 0 where unknown.
        logged: Whether this is the platform's log rather than the random one.
    """
    rows = len(clicks)
    known = np.where(durations > 0, durations, np.iinfo(np.int32).max)
    whole, long_from = np.minimum(known, _CLICK_MS), np.minimum(known, LONG_VIEW_MS)
    play = np.minimum(_SKIPPED_MS.at(rng.standard_normal(rows)), whole - 1)
    play[rng.random(rows) < _ZERO_PLAY] = 0.0
    is_long = rng.random(rows) < _LONG_GIVEN_CLICK[logged]
    glimpse = whole + rng.random(rows) * (long_from - whole)
    longest = _LONG_MS_DISTRIBUTION.at(rng.standard_normal(rows))
    finished = np.maximum(np.minimum(longest, known * _LONG_RATIO.at(rng.standard_normal(rows))), long_from)
    drawn = np.where(clicks, np.where(is_long, finished, glimpse), play)
    return np.asarray(np.floor(drawn), np.int64)
