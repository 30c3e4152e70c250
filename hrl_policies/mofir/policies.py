"""Actor and critics that take a preference over objectives as a further input, and the front that they reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import Unpack

from hrl_policies.common.buffers import state_space
from kuaifair_env.evaluation import DEFAULT_SEED, EvaluationResult, evaluate
from kuaifair_env.spaces import state_of

OBJECTIVES = ("clicks", "tail_share")
"""The two components of rewards, preferences and values."""


class ConditionedActor(Actor):
    """``mu(s, w)``, a unit vector; arguments as Stable-Baselines3's ``Actor``.

    The items that a query shows depend on its direction alone. A tanh, as in DDPG, saturates in a corner of the box
    within a few updates, where its gradient vanishes for every preference.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: nn.Module,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim + len(OBJECTIVES),
            activation_fn,
            normalize_images,
        )
        layers = create_mlp(self.features_dim, action_space.shape[0], self.net_arch, self.activation_fn)
        self.mu = nn.Sequential(*layers)

    def forward(self, obs: Tensor, preferences: Tensor) -> Tensor:  # type: ignore[override]
        """Returns unit vectors ``(B, d)`` for states and preferences ``(B, 2)``."""
        features = self.extract_features(obs, self.features_extractor)
        return functional.normalize(self.mu(torch.cat([features, preferences], dim=1)), dim=1)


class VectorCritics(BaseModel):
    """One critic or two, each ``Q(s, a, w)`` in two dimensions; arguments as ``ContinuousCritic``'s."""

    features_extractor: BaseFeaturesExtractor
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 1,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        inputs = features_dim + action_space.shape[0] + len(OBJECTIVES)
        self.share_features_extractor = share_features_extractor
        self.networks = nn.ModuleList(
            nn.Sequential(*create_mlp(inputs, len(OBJECTIVES), net_arch, activation_fn)) for _ in range(n_critics)
        )

    def forward(self, obs: Tensor, actions: Tensor, preferences: Tensor) -> Tensor:
        """Returns values ``(critics, B, 2)``."""
        features = self.extract_features(obs, self.features_extractor)
        inputs = torch.cat([features, actions, preferences], dim=1)
        return torch.stack([network(inputs) for network in self.networks])


class TD3PolicyArguments(TypedDict, total=False):
    """What :class:`PreferencePolicy` leaves to Stable-Baselines3's ``TD3Policy``.

    Attributes:
        net_arch: Units of hidden layers, or ``{"pi": ..., "qf": ...}`` for actor and critics.
        activation_fn: Their activation.
        features_extractor_class: Class of what turns observations into features.
        features_extractor_kwargs: Its arguments.
        normalize_images: Whether images are divided by 255.
        optimizer_class: Class of both optimisers.
        optimizer_kwargs: Their arguments, without the learning rate.
        n_critics: Number of critics.
        share_features_extractor: Whether actor and critics have one extractor.
    """

    net_arch: list[int] | dict[str, list[int]] | None
    activation_fn: type[nn.Module]
    features_extractor_class: type[BaseFeaturesExtractor]
    features_extractor_kwargs: dict[str, Any] | None
    normalize_images: bool
    optimizer_class: type[torch.optim.Optimizer]
    optimizer_kwargs: dict[str, Any] | None
    n_critics: int
    share_features_extractor: bool


class PreferencePolicy(TD3Policy):
    """Actor and critics for states and preferences, with a default preference.

    Of ``Dict`` observations only ``state`` is read. The default preference is a buffer, saved with the networks.

    Args:
        observation_space: ``Box``, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``Box``.
        lr_schedule: Learning rate of the actor, and of the critics until the algorithm sets theirs.
        **kwargs: See :class:`TD3PolicyArguments`.
    """

    preference: Tensor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        **kwargs: Unpack[TD3PolicyArguments],
    ) -> None:
        super().__init__(state_space(observation_space), action_space, lr_schedule, **kwargs)
        self.register_buffer("preference", torch.full((len(OBJECTIVES),), 1.0 / len(OBJECTIVES)))

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> ConditionedActor:
        """Returns a new actor."""
        settings = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return ConditionedActor(**settings).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> VectorCritics:  # type: ignore[override]
        """Returns new critics."""
        settings = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return VectorCritics(**settings).to(self.device)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        preference: Any = None,
    ) -> tuple[NDArray[Any], Any]:
        """Returns actions, which are always deterministic.

        Args:
            observation: One observation, or a batch.
            state: Passed through.
            episode_start: Ignored.
            deterministic: Ignored.
            preference: Weights of clicks and long-tail share, ``(2,)`` or ``(B, 2)``; only their ratio counts. None
                takes the policy's default.

        Raises:
            ValueError: If it is not a preference.
        """
        self.set_training_mode(False)
        states = state_of(observation)
        tensor, batched = self.obs_to_tensor(states)
        weights = self.preference
        if preference is not None:
            weights = torch.as_tensor(as_preferences(preference), device=self.device)
        if weights.ndim == 2 and len(weights) != len(cast(Tensor, tensor)):
            raise ValueError(
                f"{len(cast(Tensor, tensor))} observations need as many preferences or one, got {len(weights)}"
            )
        with torch.no_grad():
            actions = self.actor(tensor, weights.expand(len(cast(Tensor, tensor)), -1)).cpu().numpy()
        actions = self.unscale_action(actions)
        return (actions if batched else actions[0]), state

    def _predict(self, observation: Any, deterministic: bool = False) -> Tensor:
        return cast(Tensor, self.actor(observation, self.preference.expand(len(observation), -1)))


def as_preferences(preference: Any) -> NDArray[np.float32]:
    """Returns a preference, or one for each session, scaled to sum to 1.

    Args:
        preference: Weights of clicks and long-tail share, ``(2,)`` or ``(B, 2)``.

    Raises:
        ValueError: If the shape is another, or weights are negative, infinite or all 0.
    """
    weights = np.asarray(preference, np.float64)
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(OBJECTIVES):
        raise ValueError(f"a preference is (weight of clicks, weight of long-tail share), got {preference!r}")
    totals = weights.sum(axis=-1, keepdims=True)
    if not np.isfinite(weights).all() or (weights < 0).any() or (totals <= 0).any():
        raise ValueError(f"weights of a preference are finite, not negative and not all 0, got {preference!r}")
    return np.asarray(weights / totals, np.float32)


Preference = tuple[float, float]


class PreferenceAgent(Protocol):
    """An agent whose ``predict`` takes a preference (:class:`~hrl_policies.mofir.algorithm.MOFIR`)."""

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
    """A policy that acts by an agent's predictions for one preference.

    Attributes:
        agent: The agent.
        preference: Weights of clicks and long-tail share.
    """

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
    episodes_per_user: int = 1,
    seed: int = DEFAULT_SEED,
) -> list[FrontPoint]:
    """Evaluates an agent once for every preference, always on the same users with the same random numbers.

    Args:
        agent: The agent.
        env: Sessions to evaluate in; see :func:`kuaifair_env.evaluation.evaluate`.
        preferences: Preferences to evaluate; None takes :func:`preference_grid`.
        users: Raw user ids; None takes all.
        episodes_per_user: Sessions of each user.
        seed: Seed of the sessions' randomness.

    Returns:
        One point for each preference, in their order; some may be dominated by others.
    """
    front = []
    for preference in preference_grid() if preferences is None else preferences:
        result = evaluate(FixedPreference(agent, preference), env, users, episodes_per_user, seed=seed)
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
