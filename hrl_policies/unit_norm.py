"""Stable-Baselines3 policies whose actions are directions: what ``action_mode="embedding"`` asks for.

An embedding action ranks items by inner product, so that its length changes nothing. An ordinary actor, a tanh over
``d`` components, does not know that: it saturates in a corner of the box within a few updates, where its gradient
vanishes. Here the actor gives vectors of length 1, and critics see directions with components of order one.

Where the state lies among the items' embeddings the actor begins at it, the query of a recommender without learning,
and learns what to add. A random direction of 64 dimensions is near no item in particular: slates of such queries differ
by little but chance, and tell a critic next to nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import Tensor, nn
from torch.nn.functional import normalize

from kuaifair_env.observations import StateSpace


def directions(actions: Tensor) -> Tensor:
    """Returns actions ``(B, d)`` scaled to length ``sqrt(d)``, so that components are of order one.

    At length 1, components of 64 dimensions have deviation 1/8: beside a state of order one the first layer of a
    network hardly hears them.
    """
    scaled: Tensor = normalize(actions, dim=1) * actions.shape[1] ** 0.5
    return scaled


def begins_with_query(observation_space: spaces.Space[Any], dimension: int) -> bool:
    """Returns whether observations begin with a state among item embeddings of ``dimension`` components.

    A state may end with the session clock.
    """
    return isinstance(observation_space, StateSpace) and observation_space.shape[0] in (dimension, dimension + 1)


class UnitNormActor(Actor):
    """``mu(s)``, a vector of length 1; arguments as ``Actor``'s.

    It is the direction of ``s / |s| + c f(s)`` with a network ``f`` and a small ``c``, where the state is a query
    (:func:`begins_with_query`), and that of ``f(s)`` elsewhere.

    Attributes:
        step: ``c``. Adam moves each of a last layer's weights by the learning rate, whatever the gradient, and 256 of
            them meet in a component: at 1 a few updates turn the query as far as exploration reaches, before a critic
            has seen any of it.
    """

    step: ClassVar[float] = 0.05

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
            observation_space, action_space, net_arch, features_extractor, features_dim, activation_fn, normalize_images
        )
        self.mu = nn.Sequential(*create_mlp(features_dim, action_space.shape[0], net_arch, activation_fn))
        self.from_state = begins_with_query(observation_space, action_space.shape[0])

    def forward(self, obs: Tensor) -> Tensor:
        """Returns actions ``(B, d)`` of length 1."""
        features = self.extract_features(obs, self.features_extractor)
        return self.direction(features, self.mu(features))

    def direction(self, features: Tensor, output: Tensor) -> Tensor:
        """Returns actions ``(B, d)`` of length 1, of states and what a network adds to them, ``(B, d)``."""
        if self.from_state:
            output = self.step * output + normalize(features[:, : output.shape[1]], dim=1)
        return normalize(output, dim=1)


def critic_inputs(features: Tensor, actions: Tensor, from_state: bool) -> Tensor:
    """Returns what critics see of states and the directions of actions.

    Where the state is a query (:func:`begins_with_query`) they see its product with the action too, component by
    component: what the two have in common is what a slate fits a user by, and a network of sums learns no products from
    rewards as noisy as these.

    Args:
        features: ``(B, n)``, which begin with the state.
        actions: ``(B, d)``.
        from_state: Whether the state is a query.
    """
    queries = directions(actions)
    products = [queries * directions(features[:, : queries.shape[1]])] if from_state else []
    return torch.cat([features, *products, queries], dim=1)


class UnitNormCritic(ContinuousCritic):
    """Critics ``Q(s, a)`` of :func:`critic_inputs`; arguments as ``ContinuousCritic``'s."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ) -> None:
        from_state = begins_with_query(observation_space, action_space.shape[0])
        super().__init__(
            observation_space,
            action_space,
            net_arch,
            features_extractor,
            features_dim + (action_space.shape[0] if from_state else 0),
            activation_fn,
            normalize_images,
            n_critics,
            share_features_extractor,
        )
        self.from_state = from_state

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        """Returns the value of every critic, ``(B, 1)`` each."""
        inputs = self._inputs(obs, actions)
        return tuple(network(inputs) for network in self.q_networks)

    def q1_forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Returns the first critic's values, ``(B, 1)``."""
        values: Tensor = self.q_networks[0](self._inputs(obs, actions))
        return values

    def _inputs(self, obs: Tensor, actions: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        return critic_inputs(features, actions, self.from_state)


class UnitNormPolicy(TD3Policy):
    """Actor and critics of directions, for Stable-Baselines3's ``TD3`` and ``DDPG``.

    Noise must be meant for vectors of length 1: a deviation of ``c / sqrt(d)`` in each component is noise of about
    length ``c``::

        TD3(UnitNormPolicy, env, action_noise=QueryNoise(d, 1.0), target_policy_noise=0.2 / d**0.5,
            target_noise_clip=0.5 / d**0.5)

    Arguments are those of ``TD3Policy``.
    """

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> UnitNormActor:
        """Returns a new actor."""
        settings = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return UnitNormActor(**settings).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> UnitNormCritic:
        """Returns new critics."""
        settings = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return UnitNormCritic(**settings).to(self.device)


class QueryNoise(ActionNoise):
    """Exploration around a query: a Gaussian vector whose length is drawn anew for every step.

    In many dimensions Gaussian vectors of one deviation have nearly one length: queries so explored would all lie at
    one angle from the actor's own, about which, and whose slates, critics would learn nothing.

    Args:
        dimension: Size ``d`` of an action.
        length: Largest length, about; lengths are uniform from 0 to it, where the actor's query has length 1.

    Raises:
        ValueError: If the length is negative.
    """

    def __init__(self, dimension: int, length: float) -> None:
        if not length >= 0:
            raise ValueError(f"length of noise must not be negative, got {length}")
        super().__init__()
        self._dimension, self._length = dimension, length

    def __call__(self) -> NDArray[np.float32]:
        """Returns noise ``(d,)`` from numpy's global generator, which Stable-Baselines3 seeds."""
        # Stable-Baselines3 copies noise for every session: generators of its own would all draw the same.
        deviation = self._length * np.random.uniform() / self._dimension**0.5  # noqa: NPY002
        return np.random.normal(0.0, deviation, self._dimension).astype(np.float32)  # noqa: NPY002

    def __repr__(self) -> str:
        return f"QueryNoise(dimension={self._dimension}, length={self._length})"
