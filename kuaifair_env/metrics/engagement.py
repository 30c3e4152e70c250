"""The paper's three measures of engagement (section 5.1.2), and the formula that ties them together.

Measures are taken over complete sessions, from the reset until the user leaves or a cap ends the session. Dropping
sessions that still run would favour short ones, so an evaluation plays every session to its end.

A session starts with temper ``T0``. A step with reward r costs ``2 - r`` (r in [0, 2]), a slate over the bound costs
``penalty`` more unless it is among the first ``grace_steps``, and the user leaves as soon as temper is below 1. So a
session lasts until about ``T0 - 1`` is used up, plus half a step of overshoot:

    Len = (T0 - 1 + penalty * v * grace_steps) / (2 - r + penalty * v) + 0.5

with r the mean reward and v the violation rate, the share of slates over the bound. The formula is an approximation: it
is up to half a step off where r is constant (:func:`constant_session_length` counts exactly there) and within 2 % where
clicks vary. Without a penalty it is KuaiSim's published relation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.metrics.fairness import DisparityMode, slate_disparity, violates


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
_ROUNDING = 1e-9


def expected_length(
    initial_temper: Numbers,
    reward: Numbers,
    violation_rate: Numbers,
    *,
    penalty: float = 1.0,
    grace_steps: int = 0,
) -> NDArray[np.float64]:
    """Returns the session length (Len) that the formula predicts; arguments broadcast.

    Args:
        initial_temper: T0, the paper's "Max Len".
        reward: r, mean reward per step (R_each), in [0, 2].
        violation_rate: v, share of slates over the bound, in [0, 1].
        penalty: Temper that a violating slate costs; above 1 the formula may be more than half a step too short.
        grace_steps: First steps whose violations are in ``violation_rate`` but cost nothing; 0 where v counts penalised
            slates only, as the environment's own violation flags do.

    Returns:
        Len; infinite where no temper is lost.

    Raises:
        ValueError: An argument outside its range.
    """
    temper, rewards = _checked(initial_temper, reward, penalty, grace_steps)
    rate = np.asarray(violation_rate, np.float64)
    if not ((rate >= 0.0) & (rate <= 1.0)).all():
        raise ValueError("violation rate must lie in [0, 1]")
    extra = penalty * rate
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((temper - _LEAVE_BELOW + extra * grace_steps) / (2.0 - rewards + extra) + 0.5)


def implied_violation_rate(length: Numbers, initial_temper: Numbers, reward: Numbers) -> NDArray[np.float64]:
    """Returns the violation rate v that a reported Len and R_each imply: the formula (unit penalty) solved for v.

    It is below 0 or above 1 where the formula cannot have produced the length, which must be above 0.5.

    Raises:
        ValueError: An argument outside its range.
    """
    temper, rewards = _checked(initial_temper, reward)
    steps = np.asarray(length, np.float64)
    if not (steps > 0.5).all():
        raise ValueError("length must be above 0.5 steps")
    return np.asarray((temper - _LEAVE_BELOW) / (steps - 0.5) - (2.0 - rewards))


def length_floor_and_ceiling(
    initial_temper: Numbers, reward: Numbers, *, penalty: float = 1.0, grace_steps: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the predicted Len when every slate is penalised and when none is, at the given mean reward.

    Arguments and errors are those of :func:`expected_length`.
    """
    floor = expected_length(initial_temper, reward, 1.0, penalty=penalty, grace_steps=grace_steps)
    return floor, expected_length(initial_temper, reward, 0.0, penalty=penalty, grace_steps=grace_steps)


def normalised_length(
    length: Numbers, initial_temper: Numbers, reward: Numbers, *, penalty: float = 1.0, grace_steps: int = 0
) -> NDArray[np.float64]:
    """Returns where a Len lies between its floor (0: always penalised) and its ceiling (1: never).

    Both are taken at the same reward, which isolates what a method gains by fairness from what it gains by clicks.

    The other arguments are those of :func:`expected_length`.

    Raises:
        ValueError: An argument outside its range, or floor and ceiling coincide.
    """
    floor, ceiling = length_floor_and_ceiling(initial_temper, reward, penalty=penalty, grace_steps=grace_steps)
    if not (ceiling > floor).all():
        raise ValueError(
            "floor and ceiling coincide: the initial temper must be above 1, the penalty above 0 and the grace shorter "
            "than the session"
        )
    return np.asarray((np.asarray(length, np.float64) - floor) / (ceiling - floor))


def constant_session_length(
    initial_temper: Numbers,
    reward: Numbers,
    *,
    penalised: bool,
    penalty: float = 1.0,
    grace_steps: int = 0,
) -> NDArray[np.int64]:
    """Returns the exact number of steps when all steps have the same reward and all slates or none violate the bound.

    The other arguments and errors are those of :func:`expected_length`.
    """
    temper, rewards = _checked(initial_temper, reward, penalty, grace_steps)
    if (rewards == 2.0).any():
        raise ValueError("mean reward must be below 2, which costs no temper: such a session does not end")
    extra = penalty if penalised else 0.0
    without_penalty = _steps_to_exceed(temper - _LEAVE_BELOW, 2.0 - rewards)
    with_penalty = _steps_to_exceed(temper - _LEAVE_BELOW + extra * grace_steps, 2.0 - rewards + extra)
    return np.where(without_penalty <= grace_steps, without_penalty, with_penalty)


def violation_probability(
    popular_probability: Numbers,
    slate_size: int,
    bound: float,
    mode: DisparityMode = "parity",
    target: float = 0.5,
) -> NDArray[np.float64]:
    """Returns how likely a slate of independent draws violates the bound (closed form, binomial).

    Args:
        popular_probability: Probability that one place of the slate holds a popular item, in [0, 1], any shape.
        slate_size: K, items in a slate (W * K for a window of W slates).
        bound: ``ad_bound``.
        mode: See :func:`slate_disparity`.
        target: See :func:`slate_disparity`.

    Raises:
        ValueError: A probability outside [0, 1] or an empty slate.
    """
    probability = np.asarray(popular_probability, np.float64)[..., None]
    if slate_size < 1:
        raise ValueError(f"slate_size must be at least 1, got {slate_size}")
    if not ((probability >= 0.0) & (probability <= 1.0)).all():
        raise ValueError("popular_probability must lie in [0, 1]")
    counts = np.arange(slate_size + 1)
    violating = counts[violates(slate_disparity(counts / slate_size, mode, target), bound)]
    ways = np.array([math.comb(slate_size, int(count)) for count in violating], np.float64)
    terms = ways * probability**violating * (1.0 - probability) ** (slate_size - violating)
    return np.asarray(terms.sum(axis=-1))


def _steps_to_exceed(budget: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns the smallest whole n with ``n * cost > budget``; a budget met up to rounding is not exceeded."""
    return np.floor(budget / cost + _ROUNDING).astype(np.int64) + 1


def _checked(
    initial_temper: Numbers, reward: Numbers, penalty: float = 1.0, grace_steps: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    temper, rewards = np.asarray(initial_temper, np.float64), np.asarray(reward, np.float64)
    if not (temper >= _LEAVE_BELOW).all() or not np.isfinite(temper).all():
        raise ValueError(f"initial temper must be at least {_LEAVE_BELOW:g}: below it the user has left already")
    if not ((rewards >= 0.0) & (rewards <= 2.0)).all():
        raise ValueError("mean reward must lie in [0, 2]; a reward above 2 costs no temper, like one of 2")
    if not penalty >= 0.0 or grace_steps < 0:
        raise ValueError(f"penalty and grace_steps must not be negative, got {penalty} and {grace_steps}")
    return temper, rewards
