"""How exposure spreads over the candidates: concentration, reach, popularity, novelty.

All measures are functions of exposure counts: how often each of the N candidates was shown, those never shown
included. Gini, entropy and coverage also depend on how many exposures were counted. Where nothing was shown, or a count
is negative or of another shape, they raise a ``ValueError``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def gini(exposures: NDArray[Any]) -> float:
    """Returns the Gini coefficient of exposure over all candidates, zeros included.

    ``G = sum_i (2i - N - 1) x_(i) / (N sum x)`` with ``x_(i)`` in increasing order: 0 when all candidates are
    shown equally often, ``1 - 1/N`` when one takes everything; at least ``1 - m/N`` after m exposures.

    Args:
        exposures: ``(N,)``, how often each candidate was shown.
    """
    counts = checked_counts(exposures)
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


def normalised_entropy(exposures: NDArray[Any]) -> float:
    """Returns ``H / log N``, the entropy of exposure over all candidates: 1 when even, 0 when one takes all.

    Args:
        exposures: See :func:`gini`.

    Returns:
        The entropy in [0, 1]; 1 where there is a single candidate.
    """
    counts = checked_counts(exposures)
    if len(counts) == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / math.log(len(counts))))


def coverage(exposures: NDArray[Any]) -> float:
    """Returns the fraction of the candidates that were shown at all."""
    counts = checked_counts(exposures)
    return np.count_nonzero(counts) / len(counts)


def top_share(exposures: NDArray[Any], fraction: float = 0.1) -> float:
    """Returns the share of all exposure that the most shown candidates take.

    Args:
        exposures: See :func:`gini`.
        fraction: How many of the candidates count as the most shown, in (0, 1]; rounded up to whole
            candidates.

    Raises:
        ValueError: A fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    counts = checked_counts(exposures)
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


def checked_counts(exposures: NDArray[Any]) -> NDArray[Any]:
    """Returns exposure counts as an array if they are a vector of counts of which one is positive."""
    counts = np.asarray(exposures)
    if counts.ndim != 1 or not len(counts):
        raise ValueError(f"exposures must be a vector with one count for each candidate, got shape {counts.shape}")
    if counts.min() < 0:
        raise ValueError(f"exposure counts must not be negative; that of candidate {int(counts.argmin())} is")
    if not 0 < counts.sum() < np.inf:
        raise ValueError("nothing was shown: exposure counts must have a positive, finite sum")
    return counts


def _paired(exposures: NDArray[Any], popularity: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    counts = checked_counts(exposures)
    values = np.asarray(popularity, np.float64)
    if values.shape != counts.shape:
        raise ValueError(f"popularity of shape {values.shape} does not fit {len(counts)} candidates")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("training exposures must be finite and not negative")
    return counts, values
