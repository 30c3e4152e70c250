"""The policies of BCQ: generative model, perturbation and twin critics; for items, values and a behaviour model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy, ContinuousCritic
from stable_baselines3.common.torch_layers import FlattenExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor, nn

from hrl_policies.common.item_agent import HeadKind, ItemPolicy
from kuaifair_env.spaces import top_k

_LATENT_BOUND = 0.5
_LOG_STD_RANGE = (-4.0, 15.0)
_PREDICTION_SEED = 0


class ActionModel(nn.Module):
    """``G_omega(s)``: a conditional variational autoencoder of logged actions.

    Args:
        state_size: Size of a state.
        action_size: Size ``m`` of an action.
        net_arch: Hidden layers of encoder and decoder.
        latent_size: Size of the latent ``z``.
    """

    def __init__(self, state_size: int, action_size: int, net_arch: Sequence[int], latent_size: int) -> None:
        super().__init__()
        *hidden, last = net_arch
        self.encoder = nn.Sequential(*create_mlp(state_size + action_size, last, list(hidden)), nn.ReLU())
        self.mean = nn.Linear(last, latent_size)
        self.log_std = nn.Linear(last, latent_size)
        self.decoder = nn.Sequential(
            *create_mlp(state_size + latent_size, action_size, list(net_arch), squash_output=True)
        )
        self.latent_size = latent_size

    def forward(self, states: Tensor, actions: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns reconstructed actions, means and deviations of ``z``; ``noise`` is standard normal."""
        hidden = self.encoder(torch.cat([states, actions], dim=1))
        mean, std = self.mean(hidden), self.log_std(hidden).clamp(*_LOG_STD_RANGE).exp()
        return self.decode(states, mean + std * noise), mean, std

    def decode(self, states: Tensor, latents: Tensor) -> Tensor:
        """Returns ``(B, m)`` actions in ``[-1, 1]``."""
        actions: Tensor = self.decoder(torch.cat([states, latents], dim=1))
        return actions

    def likely(self, states: Tensor, latents: Tensor) -> Tensor:
        """Decodes latents clipped to ``[-0.5, 0.5]``, which gives actions that the log makes likely."""
        return self.decode(states, latents.clamp(-_LATENT_BOUND, _LATENT_BOUND))

    def loss(self, states: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
        """Returns the negative evidence bound as BCQ weighs it: mean squared error plus half the mean KL."""
        reconstructed, mean, std = self(states, actions, noise)
        divergence = -0.5 * (1.0 + 2.0 * std.log() - mean.square() - std.square()).mean()
        loss: Tensor = nn.functional.mse_loss(reconstructed, actions) + 0.5 * divergence
        return loss


class Perturbation(nn.Module):
    """``xi_phi(s, a)``: moves an action by at most ``Phi`` in each coordinate, and keeps it in ``[-1, 1]``.

    Args:
        state_size: Size of a state.
        action_size: Size ``m`` of an action.
        net_arch: Hidden layers.
        bound: ``Phi``.
    """

    def __init__(self, state_size: int, action_size: int, net_arch: Sequence[int], bound: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *create_mlp(state_size + action_size, action_size, list(net_arch), squash_output=True)
        )
        self.bound = bound

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Returns the moved actions, ``(B, m)``."""
        moved: Tensor = actions + self.bound * self.net(torch.cat([states, actions], dim=1))
        return moved.clamp(-1.0, 1.0)


class BCQPolicy(BasePolicy):
    """Chooses the action of largest value among some that the log makes likely (Fujimoto, Meger and Precup, ICML 2019).

    Deterministic predictions decode one fixed set of latents, which is saved with the policy, so that an action
    depends on its own observation alone; others draw new latents.

    Args:
        observation_space: ``Box``.
        action_space: ``Box``.
        lr_schedule: Learning rate of all three optimisers.
        net_arch: Hidden layers of critics and perturbation.
        action_net_arch: Hidden layers of the generative model.
        latent_size: Size of its latent; None takes twice the action's.
        perturbation: ``Phi``.
        samples: Actions among which a prediction chooses.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (400, 300),
        action_net_arch: Sequence[int] = (750, 750),
        latent_size: int | None = None,
        perturbation: float = 0.05,
        samples: int = 100,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=True, normalize_images=False)
        if not net_arch or not action_net_arch:
            raise ValueError("net_arch and action_net_arch need at least one layer")
        if samples < 1 or perturbation < 0:
            raise ValueError(
                f"samples is at least 1 and perturbation not negative, got {samples} and {perturbation}"
            )
        state_size, action_size = int(np.prod(observation_space.shape)), int(np.prod(action_space.shape))
        self.net_arch, self.action_net_arch = list(net_arch), list(action_net_arch)
        self.latent_size = 2 * action_size if latent_size is None else latent_size
        self.perturbation, self.samples = perturbation, samples
        self.vae = ActionModel(state_size, action_size, self.action_net_arch, self.latent_size)
        self.actor = Perturbation(state_size, action_size, self.net_arch, perturbation)
        self.critic = ContinuousCritic(
            observation_space,
            action_space,
            self.net_arch,
            FlattenExtractor(observation_space),
            state_size,
            normalize_images=False,
            share_features_extractor=False,
        )
        self.actor_target = deepcopy(self.actor).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        rate = lr_schedule(1)
        self.vae_optimizer = torch.optim.Adam(self.vae.parameters(), lr=rate)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=rate)
        # Stable-Baselines3 expects a policy to have one optimiser of this name.
        self.optimizer = self.critic_optimizer
        fixed = torch.Generator().manual_seed(_PREDICTION_SEED)
        self.register_buffer("latents", torch.randn(samples, self.latent_size, generator=fixed))
        self.latents: Tensor

    def propose(self, states: Tensor, latents: Tensor, target: bool = False) -> Tensor:
        """Returns decoded and perturbed actions.

        Args:
            states: ``(B, d)``.
            latents: ``(B, latent)``, standard normal.
            target: Whether the target network perturbs.
        """
        actions = self.vae.likely(states, latents)
        moved: Tensor = (self.actor_target if target else self.actor)(states, actions)
        return moved

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor)
        states = observation.flatten(1).float()
        latents = self.latents if deterministic else torch.randn_like(self.latents)
        repeated = states.repeat_interleave(self.samples, dim=0)
        actions = self.propose(repeated, latents.repeat(len(states), 1))
        values = self.critic.q1_forward(repeated, actions).view(len(states), self.samples)
        best = values.argmax(dim=1)
        return actions.view(len(states), self.samples, -1)[torch.arange(len(states)), best]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "net_arch": self.net_arch,
            "action_net_arch": self.action_net_arch,
            "latent_size": self.latent_size,
            "perturbation": self.perturbation,
            "samples": self.samples,
        }


class DiscreteBCQPolicy(ItemPolicy):
    """Shows the items of largest value among those that the log makes likely (Fujimoto et al., 2019).

    Item ``a`` is allowed in state ``s`` if ``pi_b(a | s) >= threshold * max_a' pi_b(a' | s)``; so that a slate can
    always be filled, its ``K`` likeliest items are allowed too, which for ``K = 1`` changes nothing. Predictions are
    deterministic.

    Args:
        observation_space: ``Box``.
        action_space: ``Discrete``, or ``MultiDiscrete`` of ``K`` times ``N``.
        lr_schedule: Learning rate.
        head: ``"embedding"`` or ``"linear"``; see :class:`~hrl_policies.common.item_agent.ItemPolicy`.
        threshold: ``tau`` of BCQ; 0 allows all items, 1 only the likeliest.
        kwargs: All other arguments of ``ItemPolicy``.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        head: HeadKind = "linear",
        threshold: float = 0.3,
        **kwargs: Any,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, head=head, **kwargs)
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold lies in [0, 1], got {threshold}")
        self.threshold = threshold
        self.values, self.behaviour = self.make_net(), self.make_net()
        self.values_target = deepcopy(self.values).requires_grad_(False)
        trained = [*self.values.parameters(), *self.behaviour.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=lr_schedule(1))

    def likely(self, logits: Tensor, slots: int) -> Tensor:
        """Returns ``bool (B, N)``, the items that the log makes likely.

        Args:
            logits: ``float32 (B, N)``, of the behaviour model.
            slots: Items ``K`` of a slate.
        """
        best = logits.amax(dim=1, keepdim=True)
        # exp(logits - best) >= threshold, without an exponential for every item.
        likely = logits >= best + (math.log(self.threshold) if self.threshold else -math.inf)
        return likely.scatter(1, logits.topk(slots, dim=1).indices, True)

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_agent.ItemPolicy`."""
        states = self.states(observation)
        logits = self.behaviour(states, self.embeddings)
        if allowed is not None:
            logits = torch.where(allowed, logits, -torch.inf)
        likely = self.likely(logits, self.slate_size)
        # Unlike torch's, this top_k breaks ties by the smaller item.
        values = self.values(states, self.embeddings).cpu().numpy()
        return torch.from_numpy(top_k(values, self.slate_size, likely.cpu().numpy()))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | {"threshold": self.threshold}
