"""Batch-Constrained deep Q-learning over items, from logged transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss

from hrl_policies.baselines.discrete_bcq_policy import DiscreteBCQPolicy, items_and_slots
from hrl_policies.baselines.offline import OfflineAlgorithm, TensorBatch
from hrl_policies.baselines.transitions import LoggedTransitions
from kuaifair_env.data.schema import FloatArray


class DiscreteBCQ(OfflineAlgorithm):
    """Discrete BCQ (Fujimoto, Conti, Ghavamzadeh and Pineau, Benchmarking batch deep RL algorithms, 2019).

    For one item a step this is double DQN whose maximum runs over the items that a model of the log allows, with the
    loss ``Huber(Q) + NLL(i) + penalty mean(i^2)`` of values and behaviour logits ``i``. Slates of ``K`` items are taken
    apart: item ``k`` earns its own feedback, and what follows is worth the mean value of the ``K`` items that would
    be shown next, so that for ``K = 1`` it is the same. Logged slates and shown ones may differ in size.

    ``train/allowed_items`` logs the mean number of items that the threshold allows.

    Args:
        policy: ``"DiscreteBCQPolicy"`` or a subclass of it; ``"MlpPolicy"`` is the same.
        env: See :class:`~hrl_policies.baselines.offline.OfflineAlgorithm`; actions must be item ids.
        transitions: See :class:`~hrl_policies.baselines.offline.OfflineAlgorithm`; slates need ``slot_rewards``.
        item_embeddings: ``float32 (N, d)``, which both heads score by; None gives each item weights of its own.
        learning_rate: A number or a schedule.
        batch_size: Transitions of a gradient step.
        tau: Step of the target network.
        gamma: Discount.
        logit_penalty: Weight of ``mean(i^2)``.
        tensorboard_log: See Stable-Baselines3.
        policy_kwargs: See :class:`~hrl_policies.baselines.discrete_bcq_policy.DiscreteBCQPolicy`.
        verbose: See Stable-Baselines3.
        seed: Seed of everything random.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        _init_setup_model: See Stable-Baselines3.

    Raises:
        ValueError: If a setting is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "DiscreteBCQPolicy": DiscreteBCQPolicy,
        "MlpPolicy": DiscreteBCQPolicy,
    }
    policy: DiscreteBCQPolicy

    def __init__(
        self,
        policy: str | type[DiscreteBCQPolicy],
        env: GymEnv | str | None = None,
        transitions: LoggedTransitions | None = None,
        *,
        item_embeddings: FloatArray | None = None,
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 64,
        tau: float = 0.005,
        gamma: float = 0.99,
        logit_penalty: float = 1e-2,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if logit_penalty < 0:
            raise ValueError(f"logit_penalty is not negative, got {logit_penalty}")
        kwargs = dict(policy_kwargs or {})
        if item_embeddings is not None:
            kwargs["dimension"] = int(item_embeddings.shape[1])
        super().__init__(
            policy,
            env,
            transitions,
            learning_rate=learning_rate,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            tensorboard_log=tensorboard_log,
            policy_kwargs=kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            supported_action_spaces=(spaces.Discrete, spaces.MultiDiscrete),
        )
        self.logit_penalty = logit_penalty
        self._item_embeddings = item_embeddings
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        if self._item_embeddings is not None:
            given = self._item_embeddings
            if len(given) != self.policy.items:
                raise ValueError(f"item_embeddings has {len(given)} rows for {self.policy.items} items")
            self.policy.embeddings.copy_(torch.from_numpy(given))
        # They are in the policy's tables now and are saved with them.
        self._item_embeddings = None

    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        policy, items = self.policy, batch.actions
        states = batch.observations.flatten(1)
        targets, allowed = self._targets(batch)
        values = policy.values.of(states, policy.embeddings, items)
        logits = policy.behaviour(states, policy.embeddings)
        value_loss = huber_loss(values, targets)
        slots = items.shape[1]
        behaviour_loss = cross_entropy(logits.repeat_interleave(slots, dim=0), items.reshape(-1))
        loss = value_loss + behaviour_loss + self.logit_penalty * logits.square().mean()
        policy.optimizer.zero_grad()
        torch.autograd.backward(loss)
        policy.optimizer.step()
        polyak_update(policy.values.parameters(), policy.values_target.parameters(), self.tau)
        return {
            "value_loss": float(value_loss.detach()),
            "behaviour_loss": float(behaviour_loss.detach()),
            "mean_value": float(values.detach().mean()),
            "allowed_items": allowed,
        }

    @torch.no_grad()
    def _targets(self, batch: TensorBatch) -> tuple[Tensor, float]:
        """Returns ``float32 (B, K)``, what each slot's value should be, and the mean number of allowed items."""
        policy, states = self.policy, batch.next_observations.flatten(1)
        slots = batch.actions.shape[1]
        allowed = policy.allowed(policy.behaviour(states, policy.embeddings), slots)
        online = torch.where(allowed, policy.values(states, policy.embeddings), -torch.inf)
        shown = online.topk(slots, dim=1).indices
        after = policy.values_target.of(states, policy.embeddings, shown).mean(dim=1, keepdim=True)
        rewards = batch.rewards if batch.slot_rewards is None else batch.slot_rewards
        return rewards + self.gamma * batch.going_on * after, float(allowed.sum(dim=1).float().mean())

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.policy.optimizer]

    def _check_actions(self, transitions: LoggedTransitions) -> None:
        items, slots = items_and_slots(transitions.action_space)
        if items != self.policy.items:
            raise ValueError(f"transitions are over {items} items, the algorithm over {self.policy.items}")
        if slots > 1 and transitions.slot_rewards is None:
            raise ValueError("slates of several items need slot_rewards, the feedback on each item")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_item_embeddings"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
