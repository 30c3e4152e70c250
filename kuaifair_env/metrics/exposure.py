"""How exposure spreads over the candidates: concentration, reach, popularity, novelty.

All measures are functions of exposure counts: how often each of the N candidates was shown, those never shown
included. Gini, entropy and coverage also depend on how many exposures were counted, so methods are compared at equal
numbers (:func:`equal_exposures`). Where nothing was shown, or a count is negative or of another shape, they raise a
``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def gini(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns the Gini coefficient of exposure over all candidates, zeros included.

    ``G = sum_i (2i - N - 1) x_(i) / (N sum x)`` with ``x_(i)`` in increasing order: 0 when all candidates are
    shown equally often, ``1 - 1/N`` when one takes everything; at least ``1 - m/N`` after m exposures.

    Args:
        exposures: ``(N,)``, how often each candidate was shown; with ``n_items``, counts of the shown candidates
            suffice.
        n_items: N, where ``exposures`` leaves out candidates that were never shown.
    """
    counts = checked_counts(exposures, n_items)
    return float(gini_of_rows(counts[None, counts > 0], len(counts))[0])


def gini_of_rows(exposures: NDArray[Any], n_items: int) -> NDArray[np.float64]:
    """Returns :func:`gini` of each row of counts, for many sessions at once and without checks.

    Args:
        exposures: ``(n, M)`` with ``M <= n_items``: counts of any M candidates, the others were never shown.
        n_items: N.
    """
    ordered = np.sort(exposures, axis=1)
    ranks = np.arange(n_items - ordered.shape[1] + 1, n_items + 1)
    weighted: NDArray[np.float64] = ((2.0 * ranks - n_items - 1.0) * ordered).sum(axis=1)
    return np.asarray(weighted / (n_items * ordered.sum(axis=1)))


def normalised_entropy(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns ``H / log N``, the entropy of exposure over all candidates: 1 when even, 0 when one takes all.

    Args:
        exposures: See :func:`gini`.
        n_items: See :func:`gini`.

    Returns:
        The entropy in [0, 1]; 1 where there is a single candidate.
    """
    counts = checked_counts(exposures, n_items)
    if len(counts) == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / math.log(len(counts))))


def coverage(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns the fraction of the candidates that were shown at all.

    Args:
        exposures: See :func:`gini`.
        n_items: See :func:`gini`.
    """
    counts = checked_counts(exposures, n_items)
    return np.count_nonzero(counts) / len(counts)


def top_share(exposures: NDArray[Any], fraction: float = 0.1, n_items: int | None = None) -> float:
    """Returns the share of all exposure that the most shown candidates take.

    Args:
        exposures: See :func:`gini`.
        fraction: How many of the candidates count as the most shown, in (0, 1]; rounded up to whole
            candidates.
        n_items: See :func:`gini`.

    Raises:
        ValueError: A fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    counts = checked_counts(exposures, n_items)
    top = math.ceil(fraction * len(counts) - 1e-9)
    return float(np.sort(counts)[len(counts) - top :].sum() / counts.sum())


def average_popularity(exposures: NDArray[Any], training_exposures: NDArray[Any]) -> float:
    """Returns ARP, the mean popularity of what was shown (Abdollahpouri et al., FLAIRS 2019).

    Args:
        exposures: ``(N,)`` counts.
        training_exposures: ``(N,)`` popularity of each candidate: its exposures in the training log.
    """
    counts, popularity = _paired(exposures, training_exposures)
    return float(counts @ popularity / counts.sum())


def novelty(exposures: NDArray[Any], training_exposures: NDArray[Any]) -> float:
    """Returns the mean self-information ``-log2 popularity`` of what was shown, in bits.

    The popularity of candidate i is ``(n_i + 1) / (sum n + N)``: one added exposure each keeps candidates
    without a row in the training log finite. Even popularity gives ``log2 N``.

    Args:
        exposures: ``(N,)`` counts.
        training_exposures: ``(N,)`` n, exposures in the training log.
    """
    counts, popularity = _paired(exposures, training_exposures)
    bits = np.log2(popularity.sum() + len(popularity)) - np.log2(popularity + 1.0)
    return float(counts @ bits / counts.sum())


def long_tail_share(tail_counts: NDArray[Any], list_sizes: NDArray[Any] | int) -> float:
    """Returns APLT, the mean share of long-tail items in a list (Abdollahpouri et al., FLAIRS 2019).

    Args:
        tail_counts: ``(L,)`` long-tail items in each list (a slate, or all that one user saw).
        list_sizes: Items in each list, ``(L,)`` or one size for all, at least 1.

    Raises:
        ValueError: No list, an empty list, or more long-tail items than items.
    """
    tail = np.asarray(tail_counts, np.float64)
    sizes = np.broadcast_to(np.asarray(list_sizes, np.float64), tail.shape)
    if not tail.size or (sizes < 1).any() or (tail < 0).any() or (tail > sizes).any():
        raise ValueError("each list needs at least one item and between 0 and all of them from the long tail")
    return float((tail / sizes).mean())


def long_tail_count(tail_counts: NDArray[Any]) -> float:
    """Returns ACLT, the mean number of long-tail items in a list (Abdollahpouri et al., FLAIRS 2019).

    Args:
        tail_counts: ``(L,)`` long-tail items in each list.

    Raises:
        ValueError: No list, or a negative count.
    """
    tail = np.asarray(tail_counts, np.float64)
    if not tail.size or (tail < 0).any():
        raise ValueError("there must be at least one list, and no negative count")
    return float(tail.mean())


def equal_exposures(
    streams: Mapping[str, NDArray[Any]], n_items: int, limit: int | None = None
) -> dict[str, NDArray[np.int64]]:
    """Counts the first exposures of each method, equally many for all, so that Gini and coverage compare.

    Args:
        streams: For each method the item rows it showed, in the order in which they count, of any shape (flattened
            in C order). Whole sessions of the same users in the same order make the fairest streams.
        n_items: N, number of candidates.
        limit: How many exposures to count; by default as many as the shortest stream has.

    Returns:
        For each method ``int64 (N,)`` counts that sum to the same number.

    Raises:
        ValueError: A stream is empty, shorter than ``limit``, or holds an item outside ``0 .. N - 1``.
    """
    items_shown = {name: np.ravel(stream) for name, stream in streams.items()}
    for name, items in items_shown.items():
        if not len(items):
            raise ValueError(f"method {name!r} has shown nothing")
        if items.min() < 0 or items.max() >= n_items:
            raise ValueError(f"method {name!r} has shown an item outside 0..{n_items - 1}")
    shortest = min((len(items) for items in items_shown.values()), default=0)
    limit = shortest if limit is None else limit
    if items_shown and not 0 < limit <= shortest:
        raise ValueError(f"limit must lie between 1 and {shortest}, the shortest stream; got {limit}")
    return {name: np.bincount(items[:limit], minlength=n_items).astype(np.int64) for name, items in items_shown.items()}


def checked_counts(exposures: NDArray[Any], n_items: int | None = None) -> NDArray[Any]:
    """Returns exposure counts as a vector with one entry for each candidate, at least one of them positive.

    Args:
        exposures: ``(M,)`` counts.
        n_items: N, at least M: zeros are appended for the other candidates. By default M.
    """
    counts = np.asarray(exposures)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"exposures must be a vector with one count for each candidate, got shape {counts.shape}")
    if counts.min() < 0:
        raise ValueError(f"exposure counts must not be negative; that of candidate {int(counts.argmin())} is")
    if not 0 < counts.sum() < np.inf:
        raise ValueError("nothing was shown: exposure counts must have a positive, finite sum")
    if n_items is None:
        return counts
    if len(counts) > n_items:
        raise ValueError(f"{len(counts)} exposure counts do not fit {n_items} candidates")
    return np.pad(counts, (0, n_items - len(counts)))


def _paired(exposures: NDArray[Any], popularity: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    counts = checked_counts(exposures)
    values = np.asarray(popularity, np.float64)
    if values.shape != counts.shape:
        raise ValueError(f"popularity of shape {values.shape} does not fit {len(counts)} candidates")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("training exposures must be finite and not negative")
    return counts, values
