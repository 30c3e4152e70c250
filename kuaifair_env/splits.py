"""Which users learn, which are held out, and which are evaluated.

Every split is made by a hash of the raw user id with a salt of its own, so that it depends on nothing but the ids, and
one split says nothing about another.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.checks import need_number, need_whole
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import IdArray

# One salt a split; two splits with the same salt would choose the same users.
HELD_OUT, FOLDS, EVALUATION, CALIBRATION, EARLY_STOPPING, SERVING, HALVES = 0, 1, 2, 5, 7, 8, 9

CALIBRATION_SHARE = 0.1
EVALUATION_USERS = 1_000
_MIN_HELD_OUT_USERS = 1_000
_EARLY_STOPPING_SHARE = 10
_SERVED_SHARE = 0.8


def user_hashes(user_ids: IdArray, salt: int) -> seeding.Keys:
    """Returns a pseudo-random 64-bit word for each raw user id."""
    return seeding.mix(seeding.id_keys(user_ids).astype(np.uint64), np.full(1, salt, np.uint64))


def chosen_users(user_ids: IdArray, count: int, salt: int) -> NDArray[np.int64]:
    """Returns the places of the ``count`` users with the smallest hashes, increasing."""
    return np.sort(np.argsort(user_hashes(user_ids, salt), kind="stable")[:count])


def held_out_users(data: InteractionData) -> NDArray[np.int64]:
    """Returns the rows of the users that training worlds never meet, increasing.

    A fifth of the users of the test log; up to half of them where that gives fewer than 1,000.
    """
    tested = data.test.user_rows()
    count = max(len(tested) // 5, min(_MIN_HELD_OUT_USERS, len(tested) // 2))
    return tested[chosen_users(data.users.ids[tested], count, HELD_OUT)]


def calibration_users(data: InteractionData, share: float = CALIBRATION_SHARE) -> NDArray[np.int64]:
    """Returns the rows of the calibration users: the few whose unbiased feedback may be read, increasing.

    They are drawn from the users of the test log whom the test world does not hold out, so that nobody who is evaluated
    is among them. Whoever uses their feedback declares it: it is data that other methods do not have.

    Args:
        data: The data set.
        share: Share of all users of the test log.

    Raises:
        ValueError: If the share is not within (0, 1), or no user is left.
    """
    need_number("(0, 1)", share=share)
    tested = data.test.user_rows()
    free = np.setdiff1d(tested, held_out_users(data))
    count = min(round(share * len(tested)), len(free))
    if count < 1:
        raise ValueError(f"{share:.0%} of {len(tested)} users of the test log leave no calibration user")
    return free[chosen_users(data.users.ids[free], count, CALIBRATION)]


def evaluation_users(user_ids: IdArray, count: int = EVALUATION_USERS) -> IdArray:
    """Returns the raw ids of the users to evaluate policies on: all, or ``count`` of them.

    Args:
        user_ids: Increasing: raw ids of a world's users, usually the test world's.
        count: Largest number of users; a larger one only adds users.

    Raises:
        ValueError: If ``count`` is not a whole number of at least 1.
    """
    need_whole(1, count=count)
    return np.asarray(user_ids[chosen_users(user_ids, count, EVALUATION)])


def serving_split(user_ids: IdArray) -> tuple[IdArray, IdArray]:
    """Divides raw ids of users into those whom a service meets (80 %, at least one) and the others, both increasing.

    Args:
        user_ids: Increasing: raw ids of a world's users, usually the test world's.
    """
    count = max(round(_SERVED_SHARE * len(user_ids)), 1)
    served = np.zeros(len(user_ids), np.bool_)
    served[chosen_users(user_ids, count, SERVING)] = True
    return user_ids[served], user_ids[~served]


def early_stopping_split(
    data: InteractionData, users: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divides user rows into those to learn from and a tenth on whom training is stopped early."""
    held_out = user_hashes(data.users.ids[users], EARLY_STOPPING) % np.uint64(_EARLY_STOPPING_SHARE) == 0
    if held_out.all() or not held_out.any():
        held_out = np.arange(len(users)) % _EARLY_STOPPING_SHARE == 0
    return users[~held_out], users[held_out]


def user_folds(data: InteractionData, folds: int) -> NDArray[np.int64]:
    """Returns the fold of every user of a data set, ``int64 (users,)`` from 0 to ``folds - 1``."""
    return (user_hashes(data.users.ids, FOLDS) % np.uint64(folds)).astype(np.int64)
