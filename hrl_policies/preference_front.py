"""The front that an agent reaches whose predictions take a preference over clicks and long-tail exposure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kuaifair_env.evaluation import EvaluationResult, evaluate

Preference = tuple[float, float]


class PreferenceAgent(Protocol):
    """An agent whose ``predict`` takes a preference (:class:`~hrl_policies.mofir.MOFIR`)."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        preference: Any = None,
    ) -> tuple[Any, Any]:
        """Returns actions for a preference, and the next recurrent state."""
        ...


@dataclass(frozen=True)
class FixedPreference:
    """A policy that acts by an agent's predictions for one preference."""

    agent: PreferenceAgent
    preference: Preference

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns actions for the preference, and the next recurrent state."""
        return self.agent.predict(observation, state, episode_start, deterministic, self.preference)


@dataclass(frozen=True)
class FrontPoint:
    """An agent's result for one preference.

    Attributes:
        preference: Weights of clicks and long-tail share.
        clicks: R_each, mean clicks of an item shown.
        tail_share: Share of long-tail items among all that was shown.
        cumulative_reward: R_cum, under the sessions' leave rule.
        evaluation: The complete result.
    """

    preference: Preference
    clicks: float
    tail_share: float
    cumulative_reward: float
    evaluation: EvaluationResult


def preference_grid(size: int = 5) -> list[Preference]:
    """Returns evenly spaced preferences, from clicks alone to long-tail share alone.

    Raises:
        ValueError: If ``size`` is less than 2.
    """
    if size < 2:
        raise ValueError(f"a front needs at least 2 preferences, got {size}")
    return [(float(1.0 - share), float(share)) for share in np.linspace(0.0, 1.0, size)]


def preference_front(
    agent: PreferenceAgent,
    env: Any,
    preferences: Sequence[Preference] | None = None,
    *,
    users: Any = None,
) -> list[FrontPoint]:
    """Evaluates an agent once for every preference, always on the same users with the same random numbers.

    Args:
        agent: The agent.
        env: Sessions to evaluate in; see :func:`kuaifair_env.evaluation.evaluate`.
        preferences: Preferences to evaluate; None takes :func:`preference_grid`.
        users: Raw user ids, with one session each; None takes all.

    Returns:
        One point for each preference, in their order; some may be dominated by others.
    """
    front = []
    for preference in preference_grid() if preferences is None else preferences:
        result = evaluate(FixedPreference(agent, preference), env, users)
        engagement = result.engagement
        tail = (1.0 - result.fairness.signed_gap) / 2.0
        front.append(FrontPoint(preference, engagement.reward_per_step, tail, engagement.cumulative_reward, result))
    return front


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float] = (0.0, 0.0)) -> float:
    """Returns the area that points of two objectives dominate above a reference point.

    Args:
        points: ``(n, 2)``; larger is better. Points that are not above the reference dominate nothing.
        reference: The worst value of both objectives.
    """
    gains = np.asarray(points, np.float64).reshape(-1, 2) - np.asarray(reference, np.float64)
    gains = gains[(gains > 0).all(axis=1)]
    gains = gains[np.argsort(-gains[:, 0], kind="stable")]
    area, height = 0.0, 0.0
    for width, reached in gains:
        area += width * max(reached - height, 0.0)
        height = max(height, reached)
    return area
