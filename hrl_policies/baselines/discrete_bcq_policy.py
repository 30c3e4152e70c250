"""The networks of discrete BCQ over items: values, a model of what was shown, and slates of the best of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import Tensor

from hrl_policies.baselines.item_heads import ItemNet
from kuaifair_env.actions import top_k


class DiscreteBCQPolicy(BasePolicy):
    """Shows the items of largest value among those that the log makes likely (Fujimoto et al., 2019).

    Item ``a`` is allowed in state ``s`` if ``pi_b(a | s) >= threshold * max_a' pi_b(a' | s)``; so that a slate can
    always be filled, its ``K`` likeliest items are allowed too, which for ``K = 1`` changes nothing. Predictions are
    deterministic.

    Args:
        observation_space: ``Box``.
        action_space: ``Discrete``, or ``MultiDiscrete`` of ``K`` times ``N``.
        lr_schedule: Learning rate.
        net_arch: Hidden layers of values and of the behaviour model, which share nothing.
        dimension: Size of the item embeddings that both score by; 0 gives each item weights of its own.
        threshold: ``tau`` of BCQ; 0 allows all items, 1 only the likeliest.
        use_sde: Must be False.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        observation_space: spaces.Box,
        action_space: spaces.Discrete | spaces.MultiDiscrete,
        lr_schedule: Schedule,
        net_arch: Sequence[int] = (256, 256),
        dimension: int = 0,
        threshold: float = 0.3,
        use_sde: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, squash_output=False, normalize_images=False)
        if use_sde:
            raise ValueError("BCQ does not explore; leave use_sde out")
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold lies in [0, 1], got {threshold}")
        self.items, self.slate_size = items_and_slots(action_space)
        state_size = int(np.prod(observation_space.shape))
        self.net_arch, self.dimension, self.threshold = list(net_arch), dimension, threshold
        self.values, self.behaviour = (
            ItemNet(state_size, net_arch, self.items, dimension, "embedding" if dimension else "linear")
            for _ in range(2)
        )
        self.values_target = deepcopy(self.values)
        self.values_target.requires_grad_(False)
        trained = [*self.values.parameters(), *self.behaviour.parameters()]
        self.optimizer = torch.optim.Adam(trained, lr=lr_schedule(1))
        self.register_buffer("embeddings", torch.zeros(self.items if dimension else 0, dimension))
        self.embeddings: Tensor

    def allowed(self, logits: Tensor, slots: int) -> Tensor:
        """Returns ``bool (B, N)``, what may be shown.

        Args:
            logits: ``float32 (B, N)``, of the behaviour model.
            slots: Items to fill a slate with ``K``.
        """
        best = logits.amax(dim=1, keepdim=True)
        # exp(logits - best) >= threshold, without an exponential for every item.
        likely = logits >= best + (math.log(self.threshold) if self.threshold else -math.inf)
        return likely.scatter(1, logits.topk(slots, dim=1).indices, True)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        assert isinstance(observation, Tensor)
        states = observation.flatten(1).float()
        allowed = self.allowed(self.behaviour(states, self.embeddings), self.slate_size)
        values = self.values(states, self.embeddings)
        slates = torch.from_numpy(top_k(values.cpu().numpy(), self.slate_size, allowed.cpu().numpy()))
        if isinstance(self.action_space, spaces.Discrete):
            return slates[:, 0] + int(self.action_space.start)
        return slates

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "net_arch": self.net_arch,
            "dimension": self.dimension,
            "threshold": self.threshold,
        }


def items_and_slots(space: spaces.Space[Any]) -> tuple[int, int]:
    """Returns the number of items ``N`` and of slots ``K`` of a space of item ids.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n), 1
    if (
        isinstance(space, spaces.MultiDiscrete)
        and space.nvec.ndim == 1
        and len(set(space.nvec.tolist())) == 1
    ):
        return int(space.nvec[0]), len(space.nvec)
    raise ValueError(
        f"discrete BCQ shows items (action_mode='slate' or 'item'): Discrete or equal MultiDiscrete, not {space}"
    )
