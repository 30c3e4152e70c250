"""The paper's three measures of engagement (section 5.1.2), and the formula that ties them together.

Measures are taken over complete sessions, from the reset until the user leaves or a cap ends the session. Dropping
sessions that still run would favour short ones, so an evaluation plays every session to its end.

Under the default leave rule a session of temper ``T0`` with mean reward ``r`` and violation rate ``v`` lasts
``Len = (T0 - 1) / (2 - r + v) + 0.5`` steps on average.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        raise ValueError(f"session {int(steps.argmin())} has {steps.min()} steps; a complete session has at least 1")
    if not np.isfinite(collected).all():
        raise ValueError(f"the return of session {int(np.argmin(np.isfinite(collected)))} is not a finite number")
    return Engagement(
        sessions=len(steps),
        length=float(steps.mean()),
        reward_per_step=float(collected.sum() / steps.sum()),
        reward_per_step_by_session=float((collected / steps).mean()),
        cumulative_reward=float(collected.mean()),
        length_deviation=float(steps.std()),
    )


Numbers = NDArray[Any] | float

_LEAVE_BELOW = 1.0


def expected_length(initial_temper: Numbers, reward: Numbers, violation_rate: Numbers) -> NDArray[np.float64]:
    """Returns the session length (Len) that the formula predicts; arguments broadcast.

    Args:
        initial_temper: T0, the paper's "Max Len".
        reward: r, mean reward per step (R_each), in [0, 1].
        violation_rate: v, share of penalised slates, in [0, 1].

    Raises:
        ValueError: An argument outside its range.
    """
    temper, rewards = _checked(initial_temper, reward)
    rate = np.asarray(violation_rate, np.float64)
    if not ((rate >= 0.0) & (rate <= 1.0)).all():
        raise ValueError("violation rate must lie in [0, 1]")
    return np.asarray((temper - _LEAVE_BELOW) / (2.0 - rewards + rate) + 0.5)


def implied_violation_rate(length: Numbers, initial_temper: Numbers, reward: Numbers) -> NDArray[np.float64]:
    """Returns the violation rate v that a reported Len and R_each imply: the formula solved for v.

    Args:
        length: Len, above 0.5.
        initial_temper: T0.
        reward: R_each in [0, 1].

    Returns:
        v; below 0 or above 1 where the formula cannot have produced the length.

    Raises:
        ValueError: An argument outside its range.
    """
    temper, rewards = _checked(initial_temper, reward)
    steps = np.asarray(length, np.float64)
    if not (steps > 0.5).all():
        raise ValueError("length must be above 0.5 steps")
    return np.asarray((temper - _LEAVE_BELOW) / (steps - 0.5) - (2.0 - rewards))


def length_floor_and_ceiling(
    initial_temper: Numbers, reward: Numbers
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the predicted Len when every slate is penalised and when none is, at the given mean reward.

    Arguments and errors are those of :func:`expected_length`.
    """
    return expected_length(initial_temper, reward, 1.0), expected_length(initial_temper, reward, 0.0)


def normalised_length(length: Numbers, initial_temper: Numbers, reward: Numbers) -> NDArray[np.float64]:
    """Returns where a Len lies between its floor (0: always penalised) and its ceiling (1: never).

    Both are taken at the same reward, which isolates what a method gains by fairness from what it gains by clicks.

    Args:
        length: Len.
        initial_temper: T0, above 1.
        reward: R_each in [0, 1].

    Raises:
        ValueError: An argument outside its range, or floor and ceiling coincide.
    """
    floor, ceiling = length_floor_and_ceiling(initial_temper, reward)
    if not (ceiling > floor).all():
        raise ValueError("floor and ceiling coincide: the initial temper must be above 1")
    return np.asarray((np.asarray(length, np.float64) - floor) / (ceiling - floor))


def _checked(initial_temper: Numbers, reward: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    temper, rewards = np.asarray(initial_temper, np.float64), np.asarray(reward, np.float64)
    if not (temper >= _LEAVE_BELOW).all() or not np.isfinite(temper).all():
        raise ValueError(f"initial temper must be at least {_LEAVE_BELOW:g}: below it the user has left already")
    if not ((rewards >= 0.0) & (rewards <= 1.0)).all():
        raise ValueError("mean reward must lie in [0, 1]")
    return temper, rewards
