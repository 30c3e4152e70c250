"""How exposure is divided between popular and long-tail items (the AD family), and how it spreads over all.

The paper's Absolute Difference is ``AD = |f(G_pop) - f(G_longtail)|`` with f the group's part in the lists
(section 5.1.2). Only f = share of all exposures can reach its published values up to .954, so that is the
headline (:func:`absolute_difference`); the other readings stand beside it, because one number hides too much:

* the headline loses the sign; :func:`signed_gap` keeps it;
* pooled over users it hides slates that are all popular for some and all long-tail for others; the slate and
  user levels do not;
* 0 means half of the exposure for the popular fifth of the items. Equal treatment of *items* is
  :func:`item_exposure_gap` 0, where uniformly random slates lie; there the headline reads .6.

Exposures count how often each of the N candidates was shown, those never shown included. Gini, entropy and coverage
also depend on how many exposures were counted, so methods are compared at equal numbers (:func:`equal_exposures`).
Where nothing was shown, or a count is negative or of another shape, measures raise a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

DisparityMode = Literal["parity", "popular_only", "target", "personal"]
"""``parity``: both groups should get half of the slate; ``popular_only``: only too many popular items count;
``target``: popular items should get a given share; ``personal``: the share that each user tolerates."""

# Arrays, since a small ufunc takes twice as long with a Python number.
_ONE, _TWO = np.asarray(1.0), np.asarray(2.0)
BOUND_TOLERANCE = 1e-9
"""A slate this close below the bound violates it: ``|2 * 0.7 - 1|`` is 0.4, but less than 0.4 in binary."""


def signed_gap(popular_share: NDArray[Any] | float) -> NDArray[Any]:
    """Returns ``2p - 1``, the popular minus the long-tail share, for popular shares of any shape; in [-1, 1]."""
    return np.asarray(_TWO * popular_share - _ONE)


def slate_disparity(
    popular_share: NDArray[Any] | float, mode: DisparityMode = "parity", target: NDArray[Any] | float = 0.5
) -> NDArray[np.float64]:
    """Returns the disparity u of each slate (or window of slates).

    With p the popular share, u is ``|2p - 1|`` for ``parity`` (the paper's AD of what one user saw, section
    5.1.2), ``max(0, 2p - 1)`` for ``popular_only`` (the wording of section 5.1.1: too many popular items),
    ``|p - target| / max(target, 1 - target)`` for ``target``, and ``|p - target|`` for ``personal``, with each user's
    own target. All lie in [0, 1]; ``target`` with 0.5 is ``parity``.

    Args:
        popular_share: p, share of popular items, ``float64`` of any shape, in [0, 1]. Narrower floats are
            refused: rounded to 24 bits a share of 0.65 misses a bound of 0.3 by more than the tolerance.
        mode: Which distance.
        target: Wanted popular share in [0, 1], read by ``target`` and ``personal`` only: one number, or an array that
            broadcasts with the shares.

    Raises:
        ValueError: Unknown mode, target outside [0, 1], or shares narrower than ``float64``.
    """
    share = np.asarray(popular_share)
    if share.dtype.kind == "f" and share.dtype.itemsize < 8:
        raise ValueError(f"popular shares must be float64 (got {share.dtype}): compute them as counts / slate size")
    if mode == "parity":
        return np.asarray(np.abs(signed_gap(share)))
    if mode == "popular_only":
        return np.asarray(np.maximum(signed_gap(share), 0.0))
    if mode not in ("target", "personal"):
        raise ValueError(f"unknown disparity mode {mode!r}; choose {', '.join(map(repr, get_args(DisparityMode)))}")
    if not (np.less_equal(0.0, target) & np.less_equal(target, 1.0)).all():
        raise ValueError(f"target popular shares must lie in [0, 1], got {target}")
    distance: NDArray[np.float64] = np.abs(share - target)
    return distance if mode == "personal" else distance / np.maximum(target, np.subtract(1.0, target))


def violates(disparity: NDArray[np.float64], bound: float) -> NDArray[np.bool_]:
    """Returns whether each disparity u is at or above the bound (``ad_bound``), up to ``BOUND_TOLERANCE``."""
    return disparity >= least_violation(bound)


def least_violation(bound: float) -> float:
    """Returns the disparity from which a slate violates the bound (``ad_bound``)."""
    return bound - BOUND_TOLERANCE


def popular_share(exposures: NDArray[Any], popular: NDArray[np.bool_]) -> float:
    """Returns p, the share of all exposures that went to popular items.

    Args:
        exposures: ``(N,)`` how often each candidate was shown.
        popular: ``bool (N,)`` group of each candidate.

    Raises:
        ValueError: Nothing was shown, a negative count, or the sizes differ.
    """
    counts, group = _checked(exposures, popular)
    return float(counts[group].sum() / counts.sum())


def absolute_difference(exposures: NDArray[Any], popular: NDArray[np.bool_]) -> float:
    """Returns the headline AD, ``|2p - 1|`` pooled over all exposures (paper, section 5.1.2), in [0, 1].

    Arguments and errors are those of :func:`popular_share`.
    """
    return float(slate_disparity(popular_share(exposures, popular)))


def slate_absolute_difference(popular_shares: NDArray[Any]) -> float:
    """Returns the mean of ``|2p - 1|`` over ``(S,)`` slates, which is never below the pooled AD of the same slates.

    Raises:
        ValueError: No slate, or a share outside [0, 1].
    """
    shares = np.asarray(popular_shares, np.float64)
    if not shares.size or not ((shares >= 0.0) & (shares <= 1.0)).all():
        raise ValueError("there must be at least one slate, and popular shares must lie in [0, 1]")
    return float(slate_disparity(shares).mean())


def user_absolute_difference(popular_counts: NDArray[Any], counts: NDArray[Any]) -> float:
    """Returns the mean over users of ``|2p_u - 1|``, with p_u pooled over all that user u saw.

    Args:
        popular_counts: ``(U,)`` popular items shown to each user.
        counts: ``(U,)`` items shown to each user; users who saw nothing are left out.

    Raises:
        ValueError: Nobody saw anything, or more popular items than items.
    """
    shown = np.asarray(counts, np.float64)
    popular_shown = np.asarray(popular_counts, np.float64)
    if shown.shape != popular_shown.shape or not (shown > 0).any():
        raise ValueError("counts must have one entry for each user, and somebody must have seen something")
    seen = shown > 0
    return slate_absolute_difference(popular_shown[seen] / shown[seen])


def item_exposure_gap(exposures: NDArray[Any], popular: NDArray[np.bool_]) -> float:
    """Returns the signed per-item gap: mean exposure of a popular less that of a tail item, over the mean.

    Uniformly random slates score 0 whatever the sizes of the groups; its absolute value is the per-item AD.

    Arguments and errors are those of :func:`popular_share`; neither group may be empty.
    """
    counts, group = _checked(exposures, popular, both=True)
    return float((counts[group].mean() - counts[~group].mean()) / counts.mean())


def coverage_gap(exposures: NDArray[Any], popular: NDArray[np.bool_]) -> float:
    """Returns the signed gap in coverage: fraction of the popular less fraction of the tail items shown.

    Its absolute value is the coverage AD, the most literal reading of the paper's text ("average proportion
    of items in the group"). It depends on the number of exposures; see :func:`equal_exposures`.

    Arguments and errors are those of :func:`popular_share`; neither group may be empty.
    """
    counts, group = _checked(exposures, popular, both=True)
    return float(np.count_nonzero(counts[group]) / group.sum() - np.count_nonzero(counts[~group]) / (~group).sum())


def disparate_treatment_ratio(exposures: NDArray[Any], relevance: NDArray[Any], popular: NDArray[np.bool_]) -> float:
    """Returns exposure per relevance of the popular group over that of the long tail.

    It is the disparate treatment ratio of Singh and Joachims (KDD 2018): 1 means that both groups are shown in
    proportion to their relevance; above 1 the popular group gets more.

    Args:
        exposures: ``(N,)`` how often each candidate was shown.
        relevance: ``(N,)`` true merit of each candidate, such as its unbiased click rate; not negative.
        popular: ``bool (N,)`` group of each candidate; neither group may be empty or without merit.

    Returns:
        The ratio; 0 when no popular item was shown and infinity when no long-tail item was.

    Raises:
        ValueError: See :func:`popular_share`, or a group that is empty or has no relevance.
    """
    counts, group = _checked(exposures, popular, both=True)
    merit = np.asarray(relevance, np.float64)
    if merit.shape != counts.shape or not np.isfinite(merit).all() or (merit < 0).any():
        raise ValueError("relevance must have one finite value, not negative, for each candidate")
    popular_merit, tail_merit = float(merit[group].sum()), float(merit[~group].sum())
    if popular_merit == 0.0 or tail_merit == 0.0:
        raise ValueError("each group needs some relevance, or exposure per relevance is undefined")
    popular_treatment = float(counts[group].sum()) / popular_merit
    tail_treatment = float(counts[~group].sum()) / tail_merit
    return popular_treatment / tail_treatment if tail_treatment else math.inf


def violation_rate(violations: NDArray[Any]) -> float:
    """Returns v, the share of ``bool (S,)`` slates that violate the bound (:func:`violates`), unseen by AD.

    Raises:
        ValueError: No slate.
    """
    flags = np.asarray(violations, np.bool_)
    if not flags.size:
        raise ValueError("there must be at least one slate")
    return float(flags.mean())


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
    ordered = np.sort(counts)
    n = len(ordered)
    return float(((2.0 * np.arange(1, n + 1) - n - 1.0) * ordered).sum() / (n * ordered.sum()))


def gini_of_sessions(candidates_shown: NDArray[np.int64], n_items: int) -> NDArray[np.float64]:
    """Returns :func:`gini` of the exposures in each of many sessions, without checks.

    With ``n_c`` candidates shown at least ``c`` times, ``G = 1 - sum_c n_c^2 / (N sum_c n_c)``: they have the ``n_c``
    highest ranks.

    Args:
        candidates_shown: ``int64 (n, C)``, ``n_c`` of each session; none was shown more than ``C`` times.
        n_items: N.
    """
    exposures = np.add.reduce(candidates_shown, axis=1)
    squares = np.add.reduce(candidates_shown * candidates_shown, axis=1)
    return np.asarray(1.0 - squares / (n_items * exposures))


def normalised_entropy(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns ``H / log N``, the entropy of exposure over all candidates: 1 when even, 0 when one takes all.

    It is 1 where there is a single candidate. Arguments are those of :func:`gini`.
    """
    counts = checked_counts(exposures, n_items)
    if len(counts) == 1:
        return 1.0
    shares = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(shares * np.log(shares)).sum() / math.log(len(counts))))


def coverage(exposures: NDArray[Any], n_items: int | None = None) -> float:
    """Returns the fraction of the candidates that were shown at all; arguments are those of :func:`gini`."""
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

    Both arguments are ``(N,)`` counts; the popularity of a candidate is its exposures in the training log.
    """
    counts, popularity = _paired(exposures, training_exposures)
    return float(counts @ popularity / counts.sum())


def novelty(exposures: NDArray[Any], training_exposures: NDArray[Any]) -> float:
    """Returns the mean self-information ``-log2 popularity`` of what was shown, in bits.

    The popularity of candidate i is ``(n_i + 1) / (sum n + N)``: one added exposure each keeps candidates
    without a row in the training log finite. Even popularity gives ``log2 N``. For the arguments see
    :func:`average_popularity`.
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
    """Returns ACLT, the mean of ``(L,)`` numbers of long-tail items in a list (Abdollahpouri et al., FLAIRS 2019).

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


def _checked(
    exposures: NDArray[Any], popular: NDArray[np.bool_], both: bool = False
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    counts, group = checked_counts(exposures), np.asarray(popular)
    if counts.shape != group.shape or group.dtype != np.bool_:
        raise ValueError(
            f"popular must have one bool for each of {len(counts)} candidates, got {group.dtype} {group.shape}"
        )
    if both and (group.all() or not group.any()):
        raise ValueError("both groups need at least one candidate")
    return counts, group
