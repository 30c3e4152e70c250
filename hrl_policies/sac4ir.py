"""SAC4IR: discrete soft actor-critic with clicks debiased by exposure; entropy and reward both oppose popularity.

Shi et al., Maximum entropy policy for long-term fairness in interactive recommender systems, IEEE TSC 17(3), 2024.
Their released code trains one agent per user on a table of item-to-item click rates that was not released, lowers
``alpha`` where SAC raises it, and ignores the end of sessions. This is the online form over many users, with those
corrected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from torch import Tensor, nn
from typing_extensions import Unpack

from hrl_policies.common.item_agent import ItemAgent, ItemAgentArguments, ItemNet, ItemPolicy, ItemPolicyArguments
from hrl_policies.common.slates import SlateDistribution, SlateReplaySamples
from kuaifair_env.world import World


class SoftItemPolicy(ItemPolicy):
    """Logits over items, two critics ``Q(s, .)`` and their targets; slates are Plackett-Luce draws from the logits.

    Args:
        observation_space: As in :class:`~hrl_policies.common.item_agent.ItemPolicy`.
        action_space: As in ``ItemPolicy``.
        lr_schedule: Learning rate of the critics.
        actor_lr_schedule: Learning rate of the actor; None takes the critics'.
        **kwargs: See :class:`~hrl_policies.common.item_agent.ItemPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        actor_lr_schedule: Schedule | None = None,
        **kwargs: Unpack[ItemPolicyArguments],
    ) -> None:
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)
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
        """See :class:`~hrl_policies.common.item_agent.ItemPolicy`."""
        logits = self.actor(self.states(observation), self.embeddings)
        distribution = SlateDistribution(logits, self.slate_size, allowed)
        return distribution.mode() if deterministic else distribution.sample()

    def min_q(self, states: Tensor, target: bool = False) -> Tensor:
        """Returns the smaller of both critics' values of every item, ``float32 (B, N)``."""
        first, second = self.target_critics if target else self.critics
        values: Tensor = torch.minimum(first(states, self.embeddings), second(states, self.embeddings))
        return values


SAC4IRMode = Literal["debiased", "kuaisim"]

_LOG_ENT_COEF_BOUNDS = (-10.0, 2.0)


class DiscreteSACArguments(ItemAgentArguments, total=False):
    """What :class:`SAC4IR` leaves to :class:`DiscreteSAC`, where each is described."""

    actor_learning_rate: float | Schedule | None
    ent_coef: float | str


class DiscreteSAC(ItemAgent):
    """SAC with exact expectations over items, as for any ``Discrete`` actions; each slot of a slate is a sample.

    With ``V(s) = sum_a pi(a|s) (min_j Q'_j(s, a) - alpha log pi(a|s))`` the target of slot ``k`` is
    ``r_k + gamma (1 - left) V(s')``, where ``r_k`` is the feedback on its item, and ``left`` is 0 for truncated
    sessions (Christodoulou, Soft actor-critic for discrete action settings, arXiv:1910.07207, 2019; Haarnoja et al.,
    Soft actor-critic algorithms and applications, arXiv:1812.05905, 2018).

    Args:
        policy: ``"SoftItemPolicy"`` or a subclass of it, which takes ``policy_kwargs``.
        env: Sessions with ``action_mode="slate"`` or ``"item"``, or another environment with ``Discrete`` actions.
        actor_learning_rate: Learning rate of the actor; None takes ``learning_rate``, that of critics and ``alpha``.
        learning_starts: Steps with uniformly random slates before learning starts.
        gamma: Discount.
        ent_coef: ``alpha``; ``"auto"`` learns it from 1, ``"auto_0.2"`` from 0.2, a number fixes it.
        target_entropy_ratio: Share of the largest entropy, ``log N``, that a learnt ``alpha`` aims at.
        **kwargs: See :class:`~hrl_policies.common.item_agent.ItemAgent`.

    Raises:
        ValueError: If a setting is not valid, or actions are not items.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"SoftItemPolicy": SoftItemPolicy}
    policy: SoftItemPolicy

    def __init__(
        self,
        policy: str | type[SoftItemPolicy],
        env: GymEnv | str,
        *,
        actor_learning_rate: float | Schedule | None = None,
        learning_starts: int = 1_000,
        gamma: float = 0.99,
        ent_coef: float | str = "auto",
        target_entropy_ratio: float = 0.98,
        **kwargs: Unpack[ItemAgentArguments],
    ) -> None:
        if not 0.0 < target_entropy_ratio <= 1.0:
            raise ValueError(f"target_entropy_ratio must lie in (0, 1], got {target_entropy_ratio}")
        self.actor_learning_rate = actor_learning_rate
        self.ent_coef = ent_coef
        self.target_entropy_ratio = target_entropy_ratio
        start, self._learns_ent_coef = _initial_ent_coef(ent_coef)
        self._initial_log_ent_coef = math.log(start)
        super().__init__(policy, env, learning_starts=learning_starts, gamma=gamma, **kwargs)

    def _setup_model(self) -> None:
        rate = self.learning_rate if self.actor_learning_rate is None else self.actor_learning_rate
        self._actor_schedule = FloatSchedule(rate)
        self.policy_kwargs["actor_lr_schedule"] = self._actor_schedule
        super()._setup_model()
        # Saved settings must not hold a schedule, which would have to be unpickled.
        del self.policy_kwargs["actor_lr_schedule"]
        self.log_ent_coef = torch.tensor(
            self._initial_log_ent_coef, device=self.device, requires_grad=self._learns_ent_coef
        )
        if self._learns_ent_coef:
            self.ent_coef_optimizer = torch.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        self.target_entropy = self.target_entropy_ratio * math.log(self.policy.n_items)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Updates critics, actor and ``alpha``; see Stable-Baselines3."""
        super().train(gradient_steps, batch_size)
        self.logger.record("train/ent_coef", float(self.log_ent_coef.detach().exp()))

    def _update(self, batch: SlateReplaySamples) -> Mapping[str, Tensor]:
        alpha = self.log_ent_coef.detach().exp()
        critic_loss = self._update_critics(batch, alpha)
        actor_loss, entropy = self._update_actor(batch.observations, alpha)
        self._update_ent_coef(entropy)
        polyak_update(self.policy.critics.parameters(), self.policy.target_critics.parameters(), self.tau)
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy}

    def _update_critics(self, batch: SlateReplaySamples, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            logs = self.policy.actor(batch.next_observations, self.policy.embeddings).log_softmax(dim=1)
            following = soft_values(logs, self.policy.min_q(batch.next_observations, target=True), alpha)
            targets = self._slot_rewards(batch) + self.gamma * (1.0 - batch.dones) * following[:, None]
        embeddings, items = self.policy.embeddings, batch.items
        losses = [
            nn.functional.huber_loss(
                critic.score_items(batch.observations, embeddings, items), targets, delta=self.huber_delta
            )
            for critic in cast(Iterable[ItemNet], self.policy.critics)
        ]
        loss = torch.stack(losses).sum()
        self._minimize(self.policy.critic_optimizer, loss)
        return loss.detach()

    def _update_actor(self, states: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step of the actor; returns its loss and its mean entropy."""
        logits = self.policy.actor(states, self.policy.embeddings)
        with torch.no_grad():
            logs = logits.log_softmax(dim=1)
            values = self.policy.min_q(states)
            gradient, loss = policy_gradient(logs, values, alpha)
            entropy = -(logs.exp() * logs).sum(dim=1).mean()
        self._minimize(self.policy.actor_optimizer, logits, gradient)
        return loss, entropy

    def _update_ent_coef(self, entropy: Tensor) -> None:
        """Raises ``alpha`` while the policy has less entropy than wanted, and lowers it while it has more."""
        if not self._learns_ent_coef:
            return
        loss = self.log_ent_coef * (entropy - self.target_entropy)
        self.ent_coef_optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.ent_coef_optimizer.step()
        with torch.no_grad():
            self.log_ent_coef.clamp_(*_LOG_ENT_COEF_BOUNDS)

    def _update_learning_rates(self) -> None:
        left = self._current_progress_remaining
        update_learning_rate(self.policy.critic_optimizer, self.lr_schedule(left))
        update_learning_rate(self.policy.actor_optimizer, self._actor_schedule(left))
        if self._learns_ent_coef:
            update_learning_rate(self.ent_coef_optimizer, self.lr_schedule(left))

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(), "log_ent_coef", "ent_coef_optimizer", "_actor_schedule",
        ]  # fmt: skip

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy.actor_optimizer", "policy.critic_optimizer"]
        return [*names, *(["ent_coef_optimizer"] if self._learns_ent_coef else [])], ["log_ent_coef"]


class SAC4IR(DiscreteSAC):
    """Discrete SAC over slates, with debiased clicks.

    In ``mode="debiased"`` slot ``k`` earns ``click_k (pop_ref / pop_k)^beta / Z``, with ``pop`` the training log's
    exposure and ``Z`` the mean weight of what the batch showed (self-normalised, so ``pop_ref`` cancels).
    ``mode="kuaisim"`` is the version of the authors' group in KuaiSim: plain clicks; fairness only through users who
    leave.

    Args:
        policy: ``"SoftItemPolicy"`` or a subclass of it.
        env: KuaiFair sessions with ``action_mode="slate"`` or ``"item"``.
        mode: ``"debiased"`` or ``"kuaisim"``.
        popularity_power: ``beta``; must be 0 in ``"kuaisim"`` mode.
        learning_starts: Steps with uniformly random slates before learning starts.
        gamma: Discount.
        target_entropy_ratio: See :class:`DiscreteSAC`.
        **kwargs: See :class:`DiscreteSAC`.

    Raises:
        TypeError: If the environment is not a KuaiFair environment.
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        policy: str | type[SoftItemPolicy],
        env: GymEnv | str,
        *,
        mode: SAC4IRMode = "debiased",
        popularity_power: float = 0.25,
        learning_starts: int = 6_400,
        gamma: float = 0.95,
        target_entropy_ratio: float = 0.7,
        **kwargs: Unpack[DiscreteSACArguments],
    ) -> None:
        if mode not in get_args(SAC4IRMode):
            raise ValueError(f"mode must be one of {get_args(SAC4IRMode)}, got {mode!r}")
        if popularity_power < 0.0 or (mode == "kuaisim" and popularity_power != 0.0):
            raise ValueError(f"popularity_power must not be negative, and 0 in mode='kuaisim', got {popularity_power}")
        self.mode, self.popularity_power = mode, popularity_power
        super().__init__(
            policy,
            env,
            learning_starts=learning_starts,
            gamma=gamma,
            target_entropy_ratio=target_entropy_ratio,
            **kwargs,
        )

    def _setup_model(self) -> None:
        self.weights = torch.zeros(0)
        super()._setup_model()
        if not len(self.weights):
            if self.env is not None:
                raise TypeError("SAC4IR reads exposures off a KuaiFair environment; use DiscreteSAC elsewhere")
            self.weights = torch.zeros(self.policy.n_items, device=self.device)

    def _read_items(self, world: World) -> None:
        super()._read_items(world)
        shown = np.maximum(world.data.train.exposures(len(world.data.items)), 1)
        weights = (shown.mean() / shown[: world.n_items]) ** self.popularity_power
        self.weights = torch.from_numpy(weights.astype(np.float32)).to(self.device)

    def _slot_rewards(self, batch: SlateReplaySamples) -> Tensor:
        plain = super()._slot_rewards(batch)
        weights = self.weights[batch.items]
        # Only clicks are debiased, not what wrappers add to the reward.
        return plain + batch.feedback * (weights / weights.mean() - 1.0)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "weights"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return modules, [*variables, "weights"]


def soft_values(logs: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Returns ``V = sum_a pi(a) (Q(a) - alpha log pi(a))``, ``float32 (B,)``.

    Args:
        logs: ``float32 (B, N)``, ``log pi``.
        values: ``float32 (B, N)``, ``Q``.
        alpha: ``float32 ()``.
    """
    return (logs.exp() * (values - alpha * logs)).sum(dim=1)


def policy_gradient(logs: Tensor, values: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the actor's loss by its logits, ``float32 (B, N)``, and the loss, the mean of ``-V``.

    In closed form: ``pi(a) (c(a) - sum_b pi(b) c(b)) / B`` with ``c = alpha log pi - Q``, which takes fewer passes over
    ``(B, N)`` than automatic differentiation.
    Arguments are those of :func:`soft_values`.
    """
    probabilities = logs.exp()
    costs = alpha * logs - values
    means = (probabilities * costs).sum(dim=1, keepdim=True)
    return probabilities * (costs - means) / len(logs), means.mean()


def _initial_ent_coef(ent_coef: float | str) -> tuple[float, bool]:
    """Returns the first ``alpha``, and whether it is learnt."""
    text = str(ent_coef)
    learns = text.startswith("auto")
    try:
        start = float(text.removeprefix("auto").removeprefix("_") or 1.0) if learns else float(text)
    except ValueError:
        start = math.nan
    if not (start > 0.0 and math.isfinite(start)):
        raise ValueError(f"ent_coef must be 'auto', 'auto_' and a positive number, or one, got {ent_coef!r}")
    return start, learns
