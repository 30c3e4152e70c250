"""Exact top-K of score matrices and of inner products, in blocks, so that memory does not grow with the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray

_STRIDES = 64
_MAX_SURPLUS = 16
_SCORES_AT_ONCE = 2**21
_ROWS_AT_ONCE = 256
_MASKED = np.float32(-np.inf)


def top_k(scores: FloatArray, k: int, allowed: BoolArray | None = None) -> NDArray[np.int64]:
    """Returns the ``k`` best columns of each row, best first; equal scores go to the smaller column.

    The one top-K of the library; exact.

    Args:
        scores: ``float32 (B, N)``.
        k: How many, at most ``N``.
        allowed: ``bool (B, N)`` or ``(N,)``; what is not allowed is scored minus infinity (an additive mask).

    Raises:
        ValueError: If a row has fewer than ``k`` allowed columns, or a score is NaN.
    """
    if scores.size < 2 * _SCORES_AT_ONCE:
        return _ranked_at_once(scores, k, allowed)
    return _ranked_in_blocks(lambda rows, columns: scores[rows, columns], scores.shape, k, allowed)


def top_k_products(left: FloatArray, right: FloatArray, k: int, allowed: BoolArray | None = None) -> NDArray[np.int64]:
    """Returns :func:`top_k` of ``left @ right``, of which only blocks are held at a time.

    Args:
        left: ``float32 (B, d)``.
        right: ``float32 (d, N)``.
        k: How many, at most ``N``.
        allowed: See :func:`top_k`, which also says what is raised.
    """
    shape = len(left), right.shape[1]
    if shape[0] * shape[1] < 2 * _SCORES_AT_ONCE:
        return _ranked_at_once(left @ right, k, allowed)
    return _ranked_in_blocks(lambda rows, columns: left[rows] @ right[:, columns], shape, k, allowed)


def _ranked_at_once(scores: FloatArray, k: int, allowed: BoolArray | None) -> NDArray[np.int64]:
    if allowed is None:
        return _best_of_block(scores, k)
    return _checked(_best_of_block(np.where(allowed, scores, _MASKED), k), k, allowed)


def _ranked_in_blocks(
    scores: Callable[[slice, slice], FloatArray], shape: tuple[int, ...], k: int, allowed: BoolArray | None
) -> NDArray[np.int64]:
    """Ranks a matrix of which ``scores`` gives any block of rows and columns."""
    if allowed is not None:
        allowed = np.broadcast_to(allowed, shape)
    row_blocks = _blocks(shape[0], -(-shape[0] // _ROWS_AT_ONCE))
    items = np.concatenate([_best_of_rows(scores, rows, shape[1], k, allowed) for rows in row_blocks])
    return items if allowed is None else _checked(items, k, allowed)


def _checked(items: NDArray[np.int64], k: int, allowed: BoolArray) -> NDArray[np.int64]:
    """Checks that every row has enough allowed columns; a row that has too few shows one that is not."""
    shown = allowed[items] if allowed.ndim == 1 else allowed[np.arange(len(items))[:, None], items]
    if not shown.all() and (np.count_nonzero(allowed, axis=-1) < k).any():
        raise ValueError(f"fewer than {k} items are allowed; use a smaller slate or repeats='allow'")
    return items


def _best_of_rows(
    scores: Callable[[slice, slice], FloatArray], rows: slice, n_columns: int, k: int, allowed: BoolArray | None
) -> NDArray[np.int64]:
    """Ranks the columns of some rows block by block, and then the best of all blocks."""
    n_scores = (rows.stop - rows.start) * n_columns
    best_items, best_scores = [], []
    for columns in _blocks(n_columns, min(n_scores // _SCORES_AT_ONCE, n_columns // max(k, 1))):
        block = scores(rows, columns)
        if allowed is not None:
            block = np.where(allowed[rows, columns], block, _MASKED)
        items = _best_of_block(block, k)
        best_scores.append(np.take_along_axis(block, items, axis=1))
        best_items.append(items + columns.start)
    # Blocks are in the order of their columns, so that equal scores still go to the smaller one.
    places = _sorted_top_k(np.concatenate(best_scores, axis=1), k)
    return np.take_along_axis(np.concatenate(best_items, axis=1), places, axis=1)


def _blocks(size: int, count: int) -> list[slice]:
    """Returns ``count`` slices of about equal length that cover ``size``, at least one."""
    count = max(count, 1)
    edges = [size * part // count for part in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def _best_of_block(scores: FloatArray, k: int) -> NDArray[np.int64]:
    """Ranks scores that are held at once."""
    n, columns = scores.shape
    if not 1 <= k <= columns:
        raise ValueError(f"cannot take the top {k} of {columns} items")
    if columns < 8 * k:
        return _sorted_top_k(scores, k)
    # The k-th largest of maxima over disjoint columns bounds the k-th best score from below, at the price of a SIMD
    # pass or two; only what reaches that bound is sorted.
    maxima = _maxima(scores, max(columns // _STRIDES, 4 * k))
    _refuse_nan(maxima)
    maxima.partition(maxima.shape[1] - k, axis=1)
    # One-dimensional nonzero is ten times as fast as the two-dimensional one.
    reaching = (scores >= maxima[:, -k, None]).ravel().nonzero()[0]
    rows = np.arange(n)
    begins = reaching.searchsorted(rows * columns)
    counts = np.append(begins[1:], len(reaching)) - begins
    most = int(counts.max())
    if most > _MAX_SURPLUS * k:
        return _sorted_top_k(scores, k)
    places = np.arange(len(reaching)) + (rows * most - begins).repeat(counts)
    negated = np.full(n * most, np.inf, np.float32)
    negated[places] = -scores.take(reaching)
    members = np.zeros(n * most, np.int64)
    members[places] = reaching
    best = negated.reshape(n, most).argsort(axis=1, kind="stable")[:, :k]
    items: NDArray[np.int64] = members.take(best + (rows * most)[:, None])
    items -= (rows * columns)[:, None]
    return items


def _maxima(scores: FloatArray, width: int) -> FloatArray:
    """Returns the maxima of each row over at least ``width`` disjoint sets of columns that cover all."""
    columns = scores.shape[1]
    strides = columns // width
    if strides > _STRIDES // 2:
        strided = scores[:, : strides * width].reshape(len(scores), strides, width)
        maxima: FloatArray = np.maximum.reduce(strided, axis=1)
        rest = scores[:, strides * width :]
        np.maximum(maxima[:, : rest.shape[1]], rest, out=maxima[:, : rest.shape[1]])
        return maxima
    # Short inner loops make reductions slow; halves are compared at full speed.
    maxima = scores
    while (half := maxima.shape[1] // 2) >= width:
        odd = maxima[:, 2 * half :]
        maxima = np.maximum(maxima[:, :half], maxima[:, half : 2 * half])
        np.maximum(maxima[:, : odd.shape[1]], odd, out=maxima[:, : odd.shape[1]])
    return maxima


def _sorted_top_k(scores: FloatArray, k: int) -> NDArray[np.int64]:
    """Top-K by a stable sort: equal scores keep the order of their columns."""
    _refuse_nan(scores)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _refuse_nan(scores: FloatArray) -> None:
    if np.count_nonzero(np.isnan(scores)):
        raise ValueError("scores hold NaN; items cannot be ranked")
