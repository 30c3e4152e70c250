"""What the users of running sessions saw: the last places of their log, then every slate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.response.base import PADDING, HistoryWindow

# A place holds 2 * item + click, so that one array is written and read.
_EMPTY_PLACE = np.int32(2 * PADDING)
_ONE = np.asarray(1, np.int32)


class SessionHistories:
    """Items and clicks that ``B`` users saw, in a ring of places in which all sessions have their newest at one column.

    Args:
        batch_size: Number of sessions ``B``.
        slate_size: Items per slate ``K``.
        max_len: Steps of the longest session.
        log_places: Places ``H`` of the log context.

    Attributes:
        length: Places of the log context and the longest session, ``H + max_len K``.
    """

    def __init__(self, batch_size: int, slate_size: int, max_len: int, log_places: int) -> None:
        self.length = log_places + max_len * slate_size
        slates = -(-self.length // slate_size)
        self._slate_size = slate_size
        self._places = np.full((batch_size, slates * slate_size), _EMPTY_PLACE)
        self._end = 0

    def of(self, rows: IntArray) -> SessionHistories:
        """Returns a copy of the histories of the given sessions as they are now."""
        some = object.__new__(SessionHistories)
        vars(some).update(vars(self), _places=self._places.take(rows, axis=0))
        return some

    def start(self, rows: IntArray, log: HistoryWindow) -> None:
        """Starts sessions in the given rows, after ``len(rows)`` windows of the log."""
        places = np.full((len(rows), self._places.shape[1]), _EMPTY_PLACE)
        begin = self._end - log.items.shape[1]
        recent = log.items + log.items + log.clicks
        places[:, max(begin, 0) : self._end] = recent[:, max(-begin, 0) :]
        if begin < 0:
            places[:, begin:] = recent[:, :-begin]
        self._places[rows] = places

    def append(self, items: NDArray[np.int64], clicks: BoolArray) -> None:
        """Appends a slate to each session, ``(B, K)`` each."""
        end = self._end + self._slate_size
        np.add(items + items, clicks, out=self._places[:, self._end : end], casting="same_kind")
        self._end = end % self._places.shape[1]

    def shown(self, slates: IntArray) -> NDArray[np.int32]:
        """Returns the items in the last slates of each session, one session after the other, in no particular order.

        Args:
            slates: ``int (B,)``, how many slates of each session.
        """
        n_slates = self._places.shape[1] // self._slate_size
        ages = (self._end // self._slate_size - np.arange(1, n_slates + 1)) % n_slates
        chosen = (ages < slates[:, None]).ravel().nonzero()[0]
        return self._places.reshape(-1, self._slate_size).take(chosen, axis=0).ravel() >> _ONE

    def last(self, length: int, rows: IntArray | None = None) -> HistoryWindow:
        """Returns the last places of the given sessions, or of all, newest last.

        Args:
            length: How many, at most :attr:`length`.
            rows: Which sessions.
        """
        places = self._places if rows is None else self._places[rows]
        begin = self._end - length
        if begin >= 0:
            places = places[:, begin : self._end]
        else:
            places = np.concatenate([places[:, begin:], places[:, : self._end]], axis=1)
        return HistoryWindow(places >> _ONE, (places & _ONE).astype(np.bool_))
