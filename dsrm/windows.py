"""Random windows of logged histories: what purifiers are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import IntArray, InteractionLog
from kuaifair_env.response.base import PADDING, HistoryWindow

SHORTEST, LONGEST = 5, 50


@dataclass(frozen=True)
class SampledWindows:
    """Windows cut out of logs.

    Attributes:
        window: The ``n`` windows, newest item last.
        users: ``int64 (n,)``, whose they are.
        ends: ``int64 (n,)``, log row behind the last row of each window.
    """

    window: HistoryWindow
    users: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)


def sample_windows(
    log: InteractionLog,
    n_users: int,
    users: IntArray,
    rng: np.random.Generator,
    *,
    places: int = LONGEST,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
) -> SampledWindows:
    """Cuts one window of random length at a random place out of the history of each given user.

    Args:
        log: Usually the training log.
        n_users: Number of users of the data set.
        users: ``(n,)`` user rows, repeated for several windows of one user; each must have logged exposures.
        rng: Source of randomness.
        places: Width ``H`` of the windows.
        shortest: Least number of exposures (fewer where the user has fewer).
        longest: Greatest number, at most ``places``.

    Raises:
        ValueError: If the lengths are out of order, or a user has no exposures.
    """
    if not 1 <= shortest <= longest <= places:
        raise ValueError(f"need 1 <= shortest <= longest <= places, got {shortest}, {longest}, {places}")
    rows = np.asarray(users, np.int64)
    offsets = log.offsets(n_users)
    first, last = offsets[rows], offsets[rows + 1]
    if (first == last).any():
        raise ValueError(f"user row {rows[first == last][0]} has no exposures to cut a window from")
    available = last - first
    length = np.minimum(rng.integers(shortest, longest + 1, len(rows)), available)
    ends = first + length + (rng.random(len(rows)) * (available - length + 1)).astype(np.int64)
    return SampledWindows(windows_before(log, ends, length, places), rows, ends)


def windows_before(log: InteractionLog, ends: IntArray, lengths: IntArray, places: int) -> HistoryWindow:
    """Returns the ``lengths`` log rows before each of ``ends``, padded at the front to ``places``."""
    steps = np.arange(places) - places
    rows = ends[:, None] + steps
    present = steps >= -lengths[:, None]
    rows = np.where(present, rows, 0)
    items = np.where(present, log.items[rows], PADDING).astype(np.int32)
    return HistoryWindow(items, log.clicks[rows] & present)
