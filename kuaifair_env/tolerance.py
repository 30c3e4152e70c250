"""The share of popular items that each user tolerates, for the leave rule ``personal``; agents never see it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.response.known import TwinResponse

LIMITS = (0.1, 0.9)
PRIOR_CLICKS = 10.0
"""Clicks at which a user's own share counts as much as the mean of all users."""

_USERS_AT_ONCE = 256


def tolerated_shares(
    response: ResponseModel,
    users: NDArray[np.int64],
    popular: BoolArray,
    log: InteractionLog,
    weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns ``float64 (U,)``, the popular share ``t_u`` of each user's clicks under unbiased exposure.

    Where users answer by the known truth of a twin it is the true share with every candidate shown once, and users
    without sessions have the mean; else that of the log (:func:`logged_shares`). All are clipped to [.1, .9].

    Args:
        response: What users do.
        users: ``int64 (n,)``, users who have sessions.
        popular: ``bool (N,)``, group of each candidate.
        log: The log that tells what users like where no truth does; items behind the candidates do not count.
        weights: ``float64 (N,)``, what a click on each candidate counts: 1 over its exposures where they are biased.

    Raises:
        DataError: If no candidate was clicked in the log.
    """
    inner = response.inner if isinstance(response, GradedResponse) else response
    if isinstance(inner, TwinResponse):
        shares = _true_shares(inner, users, popular)
    else:
        shares = logged_shares(log, response.n_users, popular, weights)
    return np.clip(shares, *LIMITS)


def logged_shares(
    log: InteractionLog, n_users: int, popular: BoolArray, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Returns ``float64 (U,)``, the popular share of each user's weighted clicks in a log, shrunken.

    With ``n`` clicks (``(sum w)^2 / sum w^2`` for weights ``w``) of which a share ``s`` is popular, and ``m`` the share
    of all users together, it is ``(n s + 10 m) / (n + 10)``. Arguments and errors are those of
    :func:`tolerated_shares`.
    """
    clicked = log.clicks & (log.items < len(popular))
    users, items = log.users[clicked], log.items[clicked]
    if not len(items):
        raise DataError("no candidate was clicked in the log, so that nothing says which popular shares users tolerate")
    of_rows = weights[items]
    total, squares, on_popular = (
        np.bincount(users, values, n_users) for values in (of_rows, of_rows**2, of_rows * popular[items])
    )
    mean = on_popular.sum() / total.sum()
    known = np.maximum(squares, np.finfo(np.float64).tiny)
    # n s, where n = total^2 / squares and s = on_popular / total
    clicks, popular_clicks = total**2 / known, total * on_popular / known
    shares: NDArray[np.float64] = (popular_clicks + PRIOR_CLICKS * mean) / (clicks + PRIOR_CLICKS)
    return shares


def _true_shares(response: TwinResponse, users: NDArray[np.int64], popular: BoolArray) -> NDArray[np.float64]:
    on_popular, total = np.zeros(len(users)), np.zeros(len(users))
    for low in range(0, len(users), _USERS_AT_ONCE):
        block = slice(low, low + _USERS_AT_ONCE)
        expected = response.expected_catalogue(users[block], len(popular))
        on_popular[block] = expected[:, popular].sum(axis=1, dtype=np.float64)
        total[block] = expected.sum(axis=1, dtype=np.float64)
    shares = np.full(response.n_users, on_popular.sum() / total.sum())
    shares[users] = on_popular / total
    return shares
