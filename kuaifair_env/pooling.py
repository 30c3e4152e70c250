"""States from history windows: mean embeddings of their items, anew or from running sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.response.base import HistoryWindow

_INT32_RANGE = 2.0**31
_TINY = 1e-30
_WINDOWS_AT_ONCE = 32
_MANY_ROWS = 32
_SUMS_AT_ONCE = 256
_USERS_AT_ONCE = 256
_MAX_BYTES = 2**26
_NO_CLICK = np.asarray(-1)


def mean_embeddings(embeddings: FloatArray, items: IntArray, weights: FloatArray) -> FloatArray:
    """Returns the weighted mean embedding of each window.

    Args:
        embeddings: ``float32 (M, d)``.
        items: ``int (B, H)``; padding (-1) must have weight 0.
        weights: ``float32 (B, H)``, not negative.

    Returns:
        ``float32 (B, d)``; zero where all weights are zero.
    """
    sums = embedding_sums(embeddings, items, weights)
    sums /= np.maximum(np.add.reduce(weights, axis=1), np.float32(1e-6))[:, None]
    return sums


def embedding_sums(embeddings: FloatArray, items: IntArray, weights: FloatArray) -> FloatArray:
    """Returns the weighted sum of the embeddings of each window; see :func:`mean_embeddings`."""
    sums = np.empty((len(items), embeddings.shape[1]), np.float32)
    # The embeddings of a few windows at a time stay in the processor's cache.
    for begin in range(0, len(items), _WINDOWS_AT_ONCE):
        part = slice(begin, begin + _WINDOWS_AT_ONCE)
        # One small product per window, so that a row does not depend on the batch it is in.
        np.matmul(weights[part, None, :], embeddings.take(items[part], axis=0), out=sums[part, None, :])
    return sums


class ClickPool:
    """Mean embeddings of the clicked items of windows, the same in any order and batch.

    Embeddings are rounded once to multiples of the smallest power of two of which a sum over ``H`` items fits in 32
    bits (about 2e-7 for ``H = 50``), so that sums are exact: those kept up to date (:class:`RunningClicks`) equal those
    of whole windows.

    Args:
        embeddings: ``float32 (M, d)``.
        log: The windows from which sessions start, ``H`` places for every user.
    """

    def __init__(self, embeddings: FloatArray, log: HistoryWindow) -> None:
        length = log.items.shape[1]
        largest = max(float(np.abs(embeddings).max()), _TINY)
        unit = np.float32(2.0 ** np.floor(np.log2((_INT32_RANGE - length) / (length * largest))))
        # The last column counts clicks; the last row stands for places without one.
        self._table = np.zeros((len(embeddings) + 1, embeddings.shape[1] + 1), np.int32)
        self._table[:-1, :-1] = np.rint(embeddings * unit)
        self._table[:-1, -1] = 1
        self._divisors = np.maximum(np.arange(length + 1, dtype=np.float32), 1.0) * unit
        self.length = length
        self._log = log
        self._log_sums: dict[int, _LogSums] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_log_sums": {}}  # copies of a world compute their own

    @property
    def width(self) -> int:
        """Columns of sums: one for each component and one for the number of clicks, ``d + 1``."""
        width: int = self._table.shape[1]
        return width

    def means(self, window: HistoryWindow) -> FloatArray:
        """Returns the mean embedding of the clicked items of each window, ``float32 (B, d)``; zero without clicks.

        Raises:
            ValueError: If the windows are wider than :attr:`length`.
        """
        if window.items.shape[1] > self.length:
            raise ValueError(f"states are pooled over {self.length} places, got windows of {window.items.shape[1]}")
        sums = np.empty((len(window.items), self.width), np.int32)
        for begin in range(0, len(sums), _SUMS_AT_ONCE):
            part = slice(begin, begin + _SUMS_AT_ONCE)
            sums[part] = self.sums(window.items[part], window.clicks[part])
        return self.divide(sums)

    def sums(self, items: IntArray, clicks: BoolArray) -> NDArray[np.int32]:
        """Returns the sums behind :meth:`means` and, in the last column, the numbers of clicks, ``int32 (B, d + 1)``.

        Args:
            items: ``int (B, L)``.
            clicks: ``bool (B, L)``.
        """
        n, length = items.shape
        if n < _MANY_ROWS:
            clicked = np.where(clicks, items, _NO_CLICK)
            sums: NDArray[np.int32] = np.add.reduce(self._table.take(clicked, axis=0), axis=1, dtype=np.int32)
            return sums
        totals = self._totals(items, clicks, np.arange(0, n * length + 1, length))
        return totals[1:] - totals[:-1]

    def _totals(self, items: IntArray, clicks: BoolArray, edges: IntArray) -> NDArray[np.int32]:
        """Returns the sums over all clicks before the given places of all rows, one row after the other.

        They may overflow, which leaves their differences as they are.
        """
        places = clicks.ravel().nonzero()[0]
        totals = np.zeros((len(places) + 1, self.width), np.int32)
        self._table.take(items.ravel().take(places), axis=0, out=totals[1:], mode="clip")
        np.add.accumulate(totals, axis=0, out=totals)
        return totals.take(places.searchsorted(edges), axis=0)

    def slate_sums(self, window: HistoryWindow, slate_size: int) -> NDArray[np.int32]:
        """Returns :meth:`sums` up to each ``K``-th place of windows of ``H``, ``int32 (B, H / K, d + 1)``.

        Where ``K`` does not divide ``H``, one more entry is the sum over the places that are left.
        """
        slates, rest = divmod(self.length, slate_size)
        edges = [place * slate_size for place in range(slates + 1)] + [self.length] * (rest > 0)
        begins = self.length * np.arange(len(window.items))
        totals = self._totals(window.items, window.clicks, begins[:, None] + edges)
        sums = totals[:, 1:] - totals[:, :1]
        if rest and slates:
            sums[:, -1] -= sums[:, -2]
        return sums

    def log_sums(self, users: IntArray, slate_size: int) -> NDArray[np.int32]:
        """Returns :meth:`slate_sums` of the windows from which sessions of users ``(B,)`` start."""
        if slate_size not in self._log_sums:
            self._log_sums[slate_size] = _LogSums(self, self._log, slate_size)
        return self._log_sums[slate_size].of(users)

    def divide(self, sums: NDArray[np.int32]) -> FloatArray:
        """Returns means, ``float32 (B, d)``, of what :meth:`sums` returned."""
        means: FloatArray = sums[:, :-1].astype(np.float32)
        means /= self._divisors.take(sums[:, -1:])
        return means


class _LogSums:
    """Remembers :meth:`ClickPool.slate_sums` of users' logs, a block of users at a time, unless there are too many."""

    def __init__(self, pool: ClickPool, log: HistoryWindow, slate_size: int) -> None:
        self._pool, self._log, self._slate_size = pool, log, slate_size
        users = len(log.items)
        shape = users, -(-pool.length // slate_size), pool.width
        self._sums = np.empty(shape, np.int32) if 4 * np.prod(shape) <= _MAX_BYTES else None
        self._known = np.zeros(users // _USERS_AT_ONCE + 1, np.bool_)

    def of(self, users: IntArray) -> NDArray[np.int32]:
        if self._sums is None:
            return self._pool.slate_sums(self._log.take(users), self._slate_size)
        blocks = users // _USERS_AT_ONCE
        known = self._known.take(blocks)
        if np.count_nonzero(known) < len(known):
            self._add(np.unique(blocks[~known]))
        return self._sums.take(users, axis=0)

    def _add(self, blocks: IntArray) -> None:
        assert self._sums is not None
        for block in blocks.tolist():
            part = slice(block * _USERS_AT_ONCE, (block + 1) * _USERS_AT_ONCE)
            self._sums[part] = self._pool.slate_sums(self._log.take(part), self._slate_size)
            self._known[block] = True


class RunningClicks:
    """The mean embedding of the clicked items in the last ``H`` places of ``B`` sessions, kept up to date.

    A ring keeps the sums over all clicks of a session at its last ``H / K + 1`` steps; what a window holds is the
    difference between the newest and the oldest. Sums may overflow, which leaves their differences as they are.

    Args:
        pool: Pools windows of ``H`` places.
        batch_size: Number of sessions ``B``.
        slate_size: Places ``K`` that enter a window at each step.
    """

    def __init__(self, pool: ClickPool, batch_size: int, slate_size: int) -> None:
        self._pool = pool
        self._slate_size = slate_size
        full, self._rest = divmod(pool.length, slate_size)
        self._ring_size = full + 1
        # Sums up to the start of the windows, and up to each K-th place from there.
        self._ring = np.zeros((self._ring_size, batch_size, pool.width), np.int32)
        self._newest = full
        # The newest places, fewer than K, which leave together with the first ones of the next slate.
        self._begun = np.zeros((batch_size, pool.width), np.int32)

    def start(self, rows: IntArray, users: IntArray) -> None:
        """Starts sessions in the given rows, from the logs of ``len(rows)`` users."""
        self._set(rows, self._pool.log_sums(users, self._slate_size))

    def reset(self, rows: IntArray, history: HistoryWindow) -> None:
        """Goes on in the given rows from ``len(rows)`` windows of ``H`` places."""
        self._set(rows, self._pool.slate_sums(history, self._slate_size))

    def _set(self, rows: IntArray, slate_sums: NDArray[np.int32]) -> None:
        slates = self._ring_size - 1
        self._ring[self._oldest, rows] = 0
        places = np.arange(self._newest - slates + 1, self._newest + 1)
        self._ring[places, rows[:, None]] = slate_sums[:, :slates]
        if self._rest:
            self._begun[rows] = slate_sums[:, slates]

    @property
    def _oldest(self) -> int:
        oldest: int = (self._newest + 1) % self._ring_size
        return oldest

    def append(self, items: IntArray, clicks: BoolArray) -> None:
        """Moves all windows on by slates, ``(B, K)`` each."""
        split = self._slate_size - self._rest
        entering = self._pool.sums(items[:, :split], clicks[:, :split])
        if self._rest:
            entering += self._begun
            self._begun = self._pool.sums(items[:, split:], clicks[:, split:])
        following = self._oldest
        np.add(self._ring[self._newest], entering, out=self._ring[following])
        self._newest = following

    def means(self, rows: IntArray | None = None) -> FloatArray:
        """Returns the means of the given sessions, or of all, ``float32 (B, d)``; zero without clicks."""
        newest, oldest, begun = self._ring[self._newest], self._ring[self._oldest], self._begun
        if rows is not None:
            newest, oldest, begun = newest.take(rows, axis=0), oldest.take(rows, axis=0), begun.take(rows, axis=0)
        return self._pool.divide(newest - oldest + begun if self._rest else newest - oldest)
