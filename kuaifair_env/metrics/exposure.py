"""How exposure spreads over the candidates: concentration, reach, popularity, novelty.

Everything here is a function of exposure counts: how often each of the N candidates was shown. Candidates
that were never shown count, always: leaving them out hides exactly what the measures are for. Gini, entropy
and coverage also depend on how many exposures were counted, so methods are compared at equal numbers
(:func:`equal_exposures`).
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
        exposures: ``(N,)`` counts, or the counts of the shown candidates only when ``n_items`` is given.
        n_items: N, where ``exposures`` leaves out candidates that were never shown.

    Raises:
        ValueError: No exposure, a negative count, or more counts than candidates.
    """
    counts, size = _checked(exposures, n_items)
    return float(gini_of_rows(counts[None, counts > 0], size)[0])


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

    Raises:
        ValueError: See :func:`gini`.
    """
    counts, size = _checked(exposures, n_items)
    if size == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / math.log(size)))


def coverage(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns the fraction of the candidates that were shown at all.

    Args:
        exposures: See :func:`gini`.
        n_items: See :func:`gini`.

    Raises:
        ValueError: See :func:`gini`.
    """
    counts, size = _checked(exposures, n_items)
    return np.count_nonzero(counts) / size


def top_share(exposures: NDArray[Any], fraction: float = 0.1, n_items: int | None = None) -> float:
    """Returns the share of all exposure that the most shown candidates take.

    Args:
        exposures: See :func:`gini`.
        fraction: How many of the candidates count as the most shown, in (0, 1]; rounded up to whole
            candidates.
        n_items: See :func:`gini`.

    Raises:
        ValueError: A fraction outside (0, 1], or see :func:`gini`.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    counts, size = _checked(exposures, n_items)
    top = math.ceil(fraction * size - 1e-9)
    if top < len(counts):
        counts = np.partition(counts, len(counts) - top)
        return float(counts[len(counts) - top :].sum() / counts.sum())
    return 1.0


def average_popularity(exposures: NDArray[Any], training_exposures: NDArray[Any]) -> float:
    """Returns ARP, the mean popularity of what was shown (Abdollahpouri et al., FLAIRS 2019).

    Args:
        exposures: ``(N,)`` counts.
        training_exposures: ``(N,)`` popularity of each candidate: its exposures in the training log.

    Raises:
        ValueError: See :func:`gini`, or the sizes differ.
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

    Raises:
        ValueError: See :func:`gini`, or the sizes differ.
    """
    counts, popularity = _paired(exposures, training_exposures)
    bits = np.log2(popularity.sum() + len(popularity)) - np.log2(popularity + 1.0)
    return float(counts @ bits / counts.sum())


def long_tail_share(tail_counts: NDArray[Any], list_sizes: NDArray[Any] | int) -> float:
    """Returns APLT, the mean share of long-tail items in a list (Abdollahpouri et al., 2019).

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
    """Returns ACLT, the mean number of long-tail items in a list (Abdollahpouri et al., 2019).

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
        streams: For each method the item rows it showed, in the order in which they count, of any shape
            (flattened in C order). Whole sessions of the same users in the same order make the fairest
            streams.
        n_items: N, number of candidates.
        limit: How many exposures to count; by default as many as the shortest stream has.

    Returns:
        For each method ``int64 (N,)`` counts that sum to the same number.

    Raises:
        ValueError: A stream is empty, shorter than ``limit``, or holds an item that is not below ``n_items``.
    """
    flat = {name: np.ravel(stream) for name, stream in streams.items()}
    for name, stream in flat.items():
        if not len(stream):
            raise ValueError(f"method {name!r} has shown nothing")
        if stream.min() < 0 or stream.max() >= n_items:
            raise ValueError(f"method {name!r} has shown an item outside 0..{n_items - 1}")
    shortest = min((len(stream) for stream in flat.values()), default=0)
    limit = shortest if limit is None else limit
    if flat and not 0 < limit <= shortest:
        raise ValueError(f"limit must lie between 1 and {shortest}, the shortest stream; got {limit}")
    return {
        name: np.bincount(stream[:limit], minlength=n_items).astype(np.int64) for name, stream in flat.items()
    }


def _checked(exposures: NDArray[Any], n_items: int | None) -> tuple[NDArray[Any], int]:
    counts = np.asarray(exposures)
    size = len(counts) if n_items is None else n_items
    if counts.ndim != 1 or not len(counts):
        raise ValueError(
            f"exposures must be a vector with one count for each candidate, got shape {counts.shape}"
        )
    if counts.min() < 0:
        raise ValueError(f"candidate {int(counts.argmin())} has a negative exposure count")
    if not 0 < counts.sum() < np.inf:
        raise ValueError("nothing was shown: the exposure counts must have a positive, finite sum")
    if len(counts) > size:
        raise ValueError(f"{len(counts)} exposure counts do not fit {size} candidates")
    return counts, size


def _paired(exposures: NDArray[Any], popularity: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    counts, size = _checked(exposures, None)
    values = np.asarray(popularity, np.float64)
    if values.shape != (size,):
        raise ValueError(f"popularity of shape {values.shape} does not fit {size} candidates")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("training exposures must be finite and not negative")
    return counts, values
