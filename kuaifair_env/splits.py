"""Calibration users: the few whose unbiased feedback may be read, and who are then never evaluated."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.world import held_out_users

DEFAULT_SHARE = 0.1


def calibration_users(data: InteractionData, share: float = DEFAULT_SHARE) -> NDArray[np.int64]:
    """Returns the rows of the calibration users, chosen by a hash of their raw id.

    They are drawn from the users of the test log whom the test world does not hold out, so that nobody who is evaluated
    is among them. Whoever uses their feedback declares it: it is data that other methods do not have.

    Args:
        data: The data set.
        share: Share of all users of the test log.

    Raises:
        ValueError: If the share is not within (0, 1), or no user is left.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    tested = np.unique(data.test.users).astype(np.int64)
    free = np.setdiff1d(tested, held_out_users(data))
    count = min(round(share * len(tested)), len(free))
    if count < 1:
        raise ValueError(f"{share:.0%} of {len(tested)} users of the test log leave no calibration user")
    hashes = seeding.mix(data.users.ids[free].astype(np.uint64), np.full(1, 5, np.uint64))
    return np.sort(free[np.argsort(hashes, kind="stable")[:count]])
