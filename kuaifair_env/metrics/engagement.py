"""The paper's three measures of engagement (section 5.1.2), from complete sessions only.

A session counts from its reset until its user leaves (or a hard cap ends it). Sessions that still run must
not be
passed: dropping them instead would favour short ones, so an evaluation has to run every session to its end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Engagement:
    """Engagement over a set of complete sessions.

    Attributes:
        sessions: Number of sessions.
        length: Len, mean number of steps (slates) in a session.
        reward_per_step: R_each as a ratio of sums: all reward over all steps. ``length * reward_per_step``
            equals ``cumulative_reward`` exactly.
        reward_per_step_by_session: R_each as a mean of means: each session's own mean reward, averaged.
        cumulative_reward: R_cum, mean of the reward collected in a session.
        length_deviation: Standard deviation of the session length over sessions (population, ddof 0).
    """

    sessions: int
    length: float
    reward_per_step: float
    reward_per_step_by_session: float
    cumulative_reward: float
    length_deviation: float

    def as_dict(self) -> dict[str, float]:
        """Returns the measures by name, JSON-able."""
        return asdict(self)


def engagement(lengths: NDArray[Any], returns: NDArray[Any]) -> Engagement:
    """Returns Len, R_each and R_cum of complete sessions (paper, section 5.1.2).

    Args:
        lengths: ``(S,)`` steps in each session, at least 1.
        returns: ``(S,)`` sum of the rewards of each session.

    Raises:
        ValueError: No session, different shapes, a session without steps, or a return that is not finite.
    """
    steps = np.asarray(lengths)
    collected = np.asarray(returns, np.float64)
    if steps.ndim != 1 or steps.shape != collected.shape or not len(steps):
        raise ValueError(
            f"lengths and returns must be vectors of one size with at least one session, "
            f"got shapes {steps.shape} and {collected.shape}"
        )
    if steps.min() < 1:
        raise ValueError(
            f"session {int(steps.argmin())} has {steps.min()} steps; a complete session has at least 1"
        )
    if not np.isfinite(collected).all():
        raise ValueError(
            f"the return of session {int(np.argmin(np.isfinite(collected)))} is not a finite number"
        )
    return Engagement(
        sessions=len(steps),
        length=float(steps.mean()),
        reward_per_step=float(collected.sum() / steps.sum()),
        reward_per_step_by_session=float((collected / steps).mean()),
        cumulative_reward=float(collected.mean()),
        length_deviation=float(steps.std()),
    )
