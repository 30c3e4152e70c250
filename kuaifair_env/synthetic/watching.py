"""Draws when a twin's users watch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.synthetic.config import Layout, numbers

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
