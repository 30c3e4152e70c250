"""Batch-constrained deep Q-learning from logged transitions, for continuous actions and for items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, mse_loss

from hrl_policies.bcq.policies import BCQPolicy, DiscreteBCQPolicy
from hrl_policies.common.offline import OfflineAlgorithm, TensorBatch, minimize
from hrl_policies.common.slates import slate_shape
from hrl_policies.common.transitions import LoggedTransitions
from kuaifair_env.data.schema import FloatArray


class BCQ(OfflineAlgorithm):
    """BCQ (Fujimoto, Meger and Precup, Off-policy deep reinforcement learning without exploration, ICML 2019).

    A generative model proposes actions that the log makes likely, a perturbation moves them a little towards larger
    values, and critics only evaluate such actions. The target of a transition is
    ``r + gamma (1 - terminated) max_n [lambda min_j Q'_j + (1 - lambda) max_j Q'_j]`` over ``n`` proposals; truncated
    sessions are bootstrapped. Defaults are those of the article and of the authors' code.

    Args:
        policy: ``"BCQPolicy"`` or a subclass of it; ``"MlpPolicy"`` is the same.
        env: See :class:`~hrl_policies.common.offline.OfflineAlgorithm`; actions must be a ``Box``.
        transitions: See :class:`~hrl_policies.common.offline.OfflineAlgorithm`.
        learning_rate: Learning rate of all networks; a number or a schedule.
        batch_size: Transitions of a gradient step.
        minimum_weight: ``lambda``, weight of the smaller critic.
        target_samples: Proposals ``n`` of the target.
        kwargs: All other arguments of :class:`~hrl_policies.common.offline.OfflineAlgorithm`; ``policy_kwargs`` are
            those of :class:`~hrl_policies.bcq.policies.BCQPolicy`.

    Raises:
        ValueError: If a setting is not valid.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"BCQPolicy": BCQPolicy, "MlpPolicy": BCQPolicy}
    policy: BCQPolicy

    def __init__(
        self,
        policy: str | type[BCQPolicy],
        env: GymEnv | str | None = None,
        transitions: LoggedTransitions | None = None,
        *,
        learning_rate: float | Schedule = 1e-3,
        batch_size: int = 100,
        minimum_weight: float = 0.75,
        target_samples: int = 10,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if target_samples < 1 or not 0.0 <= minimum_weight <= 1.0:
            raise ValueError(
                "target_samples is at least 1 and minimum_weight lies in [0, 1], "
                f"got {target_samples} and {minimum_weight}"
            )
        super().__init__(
            policy,
            env,
            transitions,
            learning_rate=learning_rate,
            batch_size=batch_size,
            supported_action_spaces=(spaces.Box,),
            **kwargs,
        )
        self.minimum_weight, self.target_samples = minimum_weight, target_samples
        if _init_setup_model:
            self._setup_model()

    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        policy = self.policy
        states = batch.observations.flatten(1)
        latent = (len(states), policy.latent_size)
        action_loss = policy.vae.loss(states, batch.actions, self._standard_normal(latent, noise))
        minimize(policy.vae_optimizer, action_loss)

        targets = self._targets(batch, noise)
        values = policy.critic(states, batch.actions)
        critic_loss = torch.stack([mse_loss(value, targets) for value in values]).sum()
        minimize(policy.critic_optimizer, critic_loss)

        with torch.no_grad():
            proposed = policy.vae.likely(states, self._standard_normal(latent, noise))
        actor_loss = -policy.critic.q1_forward(states, policy.actor(states, proposed)).mean()
        minimize(policy.actor_optimizer, actor_loss)

        polyak_update(policy.critic.parameters(), policy.critic_target.parameters(), self.tau)
        polyak_update(policy.actor.parameters(), policy.actor_target.parameters(), self.tau)
        return {
            "action_model_loss": float(action_loss.detach()),
            "critic_loss": float(critic_loss.detach()),
            "actor_loss": float(actor_loss.detach()),
            "mean_value": float(values[0].detach().mean()),
        }

    @torch.no_grad()
    def _targets(self, batch: TensorBatch, noise: torch.Generator) -> Tensor:
        """Returns the critics' targets, ``float32 (B, 1)``."""
        states = batch.next_observations.flatten(1).repeat_interleave(self.target_samples, dim=0)
        latents = self._standard_normal((len(states), self.policy.latent_size), noise)
        actions = self.policy.propose(states, latents, target=True)
        values = torch.cat(self.policy.critic_target(states, actions), dim=1)
        weight = self.minimum_weight
        mixed = weight * values.amin(dim=1) + (1.0 - weight) * values.amax(dim=1)
        best = mixed.view(-1, self.target_samples).amax(dim=1, keepdim=True)
        return batch.rewards + self.gamma * batch.not_terminated * best

    def _standard_normal(self, shape: tuple[int, int], noise: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=noise).to(self.device)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.policy.vae_optimizer, self.policy.actor_optimizer, self.policy.critic_optimizer]

    def _check_actions(self, transitions: LoggedTransitions) -> None:
        own, given = self.action_space, transitions.action_space
        assert isinstance(own, spaces.Box)
        if (
            not isinstance(given, spaces.Box)
            or own.shape != given.shape
            or not (np.array_equal(own.low, given.low) and np.array_equal(own.high, given.high))
        ):
            raise ValueError(f"transitions act in {given}, the algorithm in {own}")

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        optimizers = [f"policy.{name}_optimizer" for name in ("vae", "actor", "critic")]
        return ["policy", *optimizers], []


class DiscreteBCQ(OfflineAlgorithm):
    """Discrete BCQ (Fujimoto, Conti, Ghavamzadeh and Pineau, Benchmarking batch deep RL algorithms, 2019).

    For slates of one item this is double DQN whose maximum ranges over the items that a model of the log allows, with
    the loss ``Huber(Q) + NLL(i) + penalty mean(i^2)`` of values and behaviour logits ``i``. In slates of ``K`` items
    the target of item ``k`` is the feedback on it plus the discounted mean value of the ``K`` items that would be shown
    next. Logged slates and shown ones may differ in size.

    ``train/allowed_items`` logs the mean number of items that the threshold allows.

    Args:
        policy: ``"DiscreteBCQPolicy"`` or a subclass of it; ``"MlpPolicy"`` is the same.
        env: See :class:`~hrl_policies.common.offline.OfflineAlgorithm`; actions must be item ids.
        transitions: See :class:`~hrl_policies.common.offline.OfflineAlgorithm`; slates need ``slot_rewards``.
        item_embeddings: ``float32 (N, d)``, which both heads score by; None gives each item weights of its own.
        learning_rate: A number or a schedule.
        batch_size: Transitions of a gradient step.
        logit_penalty: Weight of ``mean(i^2)``.
        policy_kwargs: See :class:`~hrl_policies.bcq.policies.DiscreteBCQPolicy`.
        kwargs: All other arguments of :class:`~hrl_policies.common.offline.OfflineAlgorithm`.

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
        logit_penalty: float = 1e-2,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Any,
    ) -> None:
        if logit_penalty < 0:
            raise ValueError(f"logit_penalty is not negative, got {logit_penalty}")
        policy_kwargs = dict(policy_kwargs or {})
        if item_embeddings is not None:
            policy_kwargs |= {"head": "embedding", "dimension": int(item_embeddings.shape[1])}
        super().__init__(
            policy,
            env,
            transitions,
            learning_rate=learning_rate,
            batch_size=batch_size,
            policy_kwargs=policy_kwargs,
            supported_action_spaces=(spaces.Discrete, spaces.MultiDiscrete),
            **kwargs,
        )
        self.logit_penalty = logit_penalty
        self._item_embeddings = item_embeddings
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        if self._item_embeddings is not None:
            rows = len(self._item_embeddings)
            if rows != self.policy.n_items:
                raise ValueError(f"item_embeddings has {rows} rows for {self.policy.n_items} items")
            self.policy.embeddings.copy_(torch.from_numpy(self._item_embeddings))
        # The policy holds them from here on and is saved with them.
        self._item_embeddings = None

    def _update(self, batch: TensorBatch, noise: torch.Generator) -> Mapping[str, float]:
        policy, items = self.policy, batch.actions
        states = batch.observations.flatten(1)
        targets, allowed = self._targets(batch)
        values = policy.values.score_items(states, policy.embeddings, items)
        logits = policy.behaviour(states, policy.embeddings)
        value_loss = huber_loss(values, targets)
        slots = items.shape[1]
        behaviour_loss = cross_entropy(logits.repeat_interleave(slots, dim=0), items.reshape(-1))
        loss = value_loss + behaviour_loss + self.logit_penalty * logits.square().mean()
        minimize(policy.optimizer, loss)
        polyak_update(policy.values.parameters(), policy.values_target.parameters(), self.tau)
        return {
            "value_loss": float(value_loss.detach()),
            "behaviour_loss": float(behaviour_loss.detach()),
            "mean_value": float(values.detach().mean()),
            "allowed_items": allowed,
        }

    @torch.no_grad()
    def _targets(self, batch: TensorBatch) -> tuple[Tensor, float]:
        """Returns the target of each slot ``float32 (B, K)``, and the mean number of allowed items."""
        policy, states = self.policy, batch.next_observations.flatten(1)
        slots = batch.actions.shape[1]
        allowed = policy.likely(policy.behaviour(states, policy.embeddings), slots)
        online = torch.where(allowed, policy.values(states, policy.embeddings), -torch.inf)
        shown = online.topk(slots, dim=1).indices
        after = policy.values_target.score_items(states, policy.embeddings, shown).mean(dim=1, keepdim=True)
        rewards = batch.rewards if batch.slot_rewards is None else batch.slot_rewards
        return rewards + self.gamma * batch.not_terminated * after, float(allowed.sum(dim=1).float().mean())

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.policy.optimizer]

    def _check_actions(self, transitions: LoggedTransitions) -> None:
        items, slots = slate_shape(transitions.action_space)
        if items != self.policy.n_items:
            raise ValueError(f"transitions are over {items} items, the algorithm over {self.policy.n_items}")
        if slots > 1 and transitions.slot_rewards is None:
            raise ValueError("slates of several items need slot_rewards, the feedback on each item")

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_item_embeddings"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []
