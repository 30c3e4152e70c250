"""How unequal one slate is: the quantity that users react to, and the test against their bound."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

DisparityMode = Literal["parity", "popular_only", "target"]
"""``parity``: both groups should get half of the slate; ``popular_only``: only too many popular items count;
``target``: popular items should get a given share."""

BOUND_TOLERANCE = 1e-9
"""A slate this close below the bound violates it: ``|2 * 0.7 - 1|`` is 0.4, but less than 0.4 in binary."""


def slate_disparity(
    popular_share: NDArray[Any] | float, mode: DisparityMode = "parity", target: float = 0.5
) -> NDArray[np.float64]:
    """Returns the disparity u of each slate (or window of slates).

    With p the popular share, u is ``|2p - 1|`` for ``parity`` (the paper's AD of what one user saw, section
    5.1.2), ``max(0, 2p - 1)`` for ``popular_only`` (the wording of section 5.1.1: too many popular items),
    and ``|p - target| / max(target, 1 - target)`` for ``target``. All lie in [0, 1]; ``target`` with 0.5 is
    ``parity``.

    Args:
        popular_share: p, share of popular items, ``float64`` of any shape, in [0, 1]. Narrower floats are
            refused: rounded to 24 bits a share of 0.65 misses a bound of 0.3 by more than the tolerance.
        mode: Which distance.
        target: Wanted popular share in [0, 1], read by ``target`` only.

    Raises:
        ValueError: Unknown mode, target outside [0, 1], or shares narrower than ``float64``.
    """
    share = np.asarray(popular_share)
    if share.dtype.kind == "f" and share.dtype.itemsize < 8:
        raise ValueError(
            f"popular shares must be float64 (got {share.dtype}): compute them as counts / slate size"
        )
    if mode == "parity":
        return np.abs(2.0 * share - 1.0)
    if mode == "popular_only":
        return np.maximum(2.0 * share - 1.0, 0.0)
    if mode == "target":
        if not 0.0 <= target <= 1.0:
            raise ValueError(f"target popular share must lie in [0, 1], got {target}")
        return np.abs(share - target) / max(target, 1.0 - target)
    raise ValueError(f"unknown disparity mode {mode!r}; choose 'parity', 'popular_only' or 'target'")


def violates(disparity: NDArray[np.float64], bound: float) -> NDArray[np.bool_]:
    """Returns whether each disparity u is at or above the bound (``ad_bound``), up to ``BOUND_TOLERANCE``."""
    return disparity >= bound - BOUND_TOLERANCE
