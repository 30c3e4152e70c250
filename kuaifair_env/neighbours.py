"""Which unit vectors have another one close by: exact, and for vectors that are spread out in near-linear time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray

Matrix = NDArray[np.float64]
Rows = NDArray[np.int64]

_SMALL_CELL = 2048
_WORTHWHILE = 0.9
"""Pairs left by a split, over those before, from which a cell is compared as it is."""
_SAMPLE = 4096
_ROWS_AT_ONCE = 512
_COLUMNS_AT_ONCE = 8192


def rows_with_neighbours(units: Matrix, distance: float) -> Rows:
    """Returns the increasing rows of the unit vectors that have another one within a distance.

    Vectors are split into two halves, again and again, by the coordinate in which they vary most. A vector within
    ``distance`` of the border is in both halves, so that every close pair stays together in one of them. Cells that are
    small, or too dense to be split, are compared pair by pair: by inner products in float32, and by exact distances
    where rounding could matter. The largest dense cell costs the square of its size.

    Args:
        units: ``float64 (M, d)``, of length 1.
        distance: Euclidean distance, inclusive.
    """
    search = _Search(units, distance)
    cells = [np.arange(len(units))] if len(units) else []
    while cells:
        rows = cells.pop()
        halves = search.halves(rows)
        if halves is None:
            search.compare(rows)
        else:
            cells += halves
    return np.flatnonzero(search.close)


class _Search:
    """The vectors, rounded ones for a first look, and which have been found to have a neighbour."""

    def __init__(self, units: Matrix, distance: float) -> None:
        self.close: BoolArray = np.zeros(len(units), np.bool_)
        self._units = units
        self._distance = distance
        self._rounded: FloatArray = units.astype(np.float32)
        # An inner product of d float32 terms, and its rounded factors, are off by no more.
        self._rounding = (units.shape[1] + 2) * float(np.finfo(np.float32).eps)

    def halves(self, rows: Rows) -> list[Rows] | None:
        """Returns two overlapping parts of a cell, or None if it is to be compared as it is."""
        if len(rows) <= _SMALL_CELL:
            return None
        places = self._widest_coordinate(rows)
        middle = np.median(places[:: _step(len(rows))])
        parts = [rows[places <= middle + self._reach], rows[places > middle]]
        return parts if sum(len(part) ** 2 for part in parts) < _WORTHWHILE * len(rows) ** 2 else None

    def compare(self, rows: Rows) -> None:
        """Looks at all pairs of a cell that are close in its widest coordinate."""
        places = self._widest_coordinate(rows)
        order = np.argsort(places)
        rows, places = rows[order], places[order]
        vectors = self._rounded[rows]
        ends = np.searchsorted(places, places + self._reach, side="right")
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            block = vectors[begin : begin + _ROWS_AT_ONCE]
            end = int(ends[begin + len(block) - 1])
            for first in range(begin, end, _COLUMNS_AT_ONCE):
                others = vectors[first : min(first + _COLUMNS_AT_ONCE, end)]
                self._mark(block @ others.T, rows[begin:], rows[first:], first - begin)

    @property
    def _reach(self) -> np.float32:
        """How far apart close vectors are in a coordinate at most, rounding included."""
        return np.float32(self._distance + self._rounding)

    def _widest_coordinate(self, rows: Rows) -> FloatArray:
        sample = self._rounded[rows[:: _step(len(rows))]]
        places: FloatArray = self._rounded[rows, int(np.argmax(sample.var(axis=0)))]
        return places

    def _mark(self, products: FloatArray, rows: Rows, others: Rows, offset: int) -> None:
        """Marks the close pairs among inner products; of the products at ``[i, j]`` only ``j > i - offset`` count."""
        nearest = 1.0 - self._distance**2 / 2
        found = np.flatnonzero(products >= np.float32(nearest - self._rounding))
        left, right = np.divmod(found, products.shape[1])
        later = right + offset > left
        if not later.any():
            return
        certain = products.ravel()[found[later]] > np.float32(nearest + self._rounding)
        first, second = rows[left[later]], others[right[later]]
        self.close[first[certain]] = self.close[second[certain]] = True
        open_ = ~certain & ~(self.close[first] & self.close[second])
        first, second = first[open_], second[open_]
        near = np.square(self._units[first] - self._units[second]).sum(axis=1) <= self._distance**2
        self.close[first[near]] = self.close[second[near]] = True


def _step(size: int) -> int:
    """Returns the step that leaves a sample of so many rows."""
    return -(-size // _SAMPLE)
