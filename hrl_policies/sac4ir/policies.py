"""The networks of discrete SAC: an actor and two critics over all items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from hrl_policies.common.item_policy import HeadKind, ItemPolicy
from hrl_policies.common.slates import SlateDistribution


class SoftItemPolicy(ItemPolicy):
    """Logits over items, two critics ``Q(s, .)`` and their targets; slates are Plackett-Luce draws from the logits.

    Args:
        observation_space: See :class:`~hrl_policies.common.item_policy.ItemPolicy`, like all but the last argument.
        action_space: ``MultiDiscrete`` of ``K`` times ``N``, or ``Discrete``.
        lr_schedule: Learning rate of the critics.
        net_arch: Units of hidden layers.
        head: ``"embedding"`` or ``"linear"``.
        dimension: Size of item embeddings.
        actor_lr_schedule: Learning rate of the actor; None takes the critics'.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256),
        head: HeadKind = "embedding",
        dimension: int = 0,
        actor_lr_schedule: Schedule | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, net_arch, head, dimension)
        self.actor = self.make_net()
        self.critics = nn.ModuleList([self.make_net(), self.make_net()])
        self.target_critics = nn.ModuleList([self.make_net(), self.make_net()]).requires_grad_(False)
        self.target_critics.load_state_dict(self.critics.state_dict())
        actor_rate = lr_schedule if actor_lr_schedule is None else actor_lr_schedule
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=actor_rate(1))
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=lr_schedule(1))
        # Stable-Baselines3 expects a policy to have one optimiser of this name.
        self.optimizer = self.critic_optimizer

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_policy.ItemPolicy`."""
        logits = self.actor(self.states(observation), self.embeddings)
        distribution = SlateDistribution(logits, self.slate_size, allowed)
        return distribution.mode() if deterministic else distribution.sample()

    def min_q(self, states: Tensor, target: bool = False) -> Tensor:
        """Returns the smaller of both critics' values of every item, ``float32 (B, N)``."""
        first, second = self.target_critics if target else self.critics
        values: Tensor = torch.minimum(first(states, self.embeddings), second(states, self.embeddings))
        return values
