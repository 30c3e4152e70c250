"""Soft actor-critic over items: expectations over the whole catalogue are exact, slates are credited item by item.

Christodoulou, Soft actor-critic for discrete action settings, arXiv:1910.07207, 2019; Haarnoja et al., Soft
actor-critic algorithms and applications, arXiv:1812.05905, 2018.

Where the time of training goes (cProfile; 7,583 items, 64 sessions, four updates of 128 transitions for each of their
steps): a third into products of queries with all item embeddings, six an update and one for acting; a quarter into
element-wise passes over transitions x items (softmax, minimum, expectations); a tenth each into hidden layers and
backward passes; a twentieth into the noise that draws slates. The environment takes next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, polyak_update, update_learning_rate
from torch import Tensor, nn

from hrl_policies.common.buffers import SlateReplaySamples
from hrl_policies.common.item_agent import ItemAgent
from hrl_policies.common.item_policy import HeadKind, ItemNet, ItemPolicy
from hrl_policies.common.slates import SlateDistribution

SelfDiscreteSAC = TypeVar("SelfDiscreteSAC", bound="DiscreteSAC")

_LOG_ENT_COEF = (-10.0, 2.0)


class SoftItemPolicy(ItemPolicy):
    """Logits over items, two critics ``Q(s, .)`` and their targets; slates are Plackett-Luce draws from the logits.

    Args:
        observation_space: See :class:`~hrl_policies.common.item_policy.ItemPolicy`.
        action_space: See there.
        lr_schedule: Learning rate of the critics.
        net_arch: See there.
        head: See there.
        dimension: See there.
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
        self.actor = self.net()
        self.critics = nn.ModuleList([self.net(), self.net()])
        self.target_critics = nn.ModuleList([self.net(), self.net()]).requires_grad_(False)
        self.target_critics.load_state_dict(self.critics.state_dict())
        actor_rate = lr_schedule if actor_lr_schedule is None else actor_lr_schedule
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=actor_rate(1))
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=lr_schedule(1))
        # Stable-Baselines3 saves and schedules "the" optimiser of a policy; ours are listed one by one.
        self.optimizer = self.critic_optimizer

    def choose(self, observation: Any, deterministic: bool, allowed: Tensor | None = None) -> Tensor:
        """See :class:`~hrl_policies.common.item_policy.ItemPolicy`."""
        logits = self.actor(self.states(observation), self.units)
        distribution = SlateDistribution(logits, self.slate_size, allowed)
        return distribution.mode() if deterministic else distribution.sample()

    def least_q(self, states: Tensor, target: bool = False) -> Tensor:
        """Returns the lesser of both critics' values of every item, ``float32 (B, N)``."""
        first, second = self.target_critics if target else self.critics
        values: Tensor = torch.minimum(first(states, self.units), second(states, self.units))
        return values


class DiscreteSAC(ItemAgent):
    """SAC with an exact expectation over items; for slates, every slot is a sample of its own.

    With ``V(s) = sum_a pi(a|s) (min_j Q'_j(s, a) - alpha log pi(a|s))`` the target of slot ``k`` is
    ``r_k + gamma (1 - left) V(s')``, where ``r_k`` is the item's own feedback, and ``left`` is 0 for sessions that were
    only cut off. For one item a step this is the discrete SAC of any ``Discrete`` environment.

    Args:
        policy: ``"SoftItemPolicy"`` or a subclass of it.
        env: Sessions with ``action_mode="slate"`` or ``"item"``, or another environment with ``Discrete`` actions.
        learning_rate: Of the critics and of ``alpha``; a number or a schedule.
        actor_learning_rate: Of the actor; None takes the critics'.
        buffer_size: Transitions kept, over all sessions.
        learning_starts: Steps with uniformly random slates before learning starts.
        batch_size: Transitions of an update.
        tau: How far the target critics move in an update.
        gamma: Discount.
        train_freq: Steps of all sessions between updates.
        gradient_steps: Updates each time; -1 as many as there were steps.
        ent_coef: ``alpha``; ``"auto"`` learns it from 1, ``"auto_0.2"`` from 0.2, a number fixes it.
        target_entropy_ratio: Share of the largest entropy, ``log N``, that a learnt ``alpha`` aims at.
        huber_delta: Errors of the critics that are larger count linearly, so that values lean from the mean towards the
            median: with a small one critics overlook that users leave.
        max_grad_norm: Where each network's gradient is cut off.
        stats_window_size: See Stable-Baselines3.
        tensorboard_log: See Stable-Baselines3.
        policy_kwargs: See :class:`SoftItemPolicy`; without item embeddings the head is ``"linear"``.
        verbose: See Stable-Baselines3.
        seed: Seed of everything random.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        _init_setup_model: See Stable-Baselines3.

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
        learning_rate: float | Schedule = 3e-4,
        actor_learning_rate: float | Schedule | None = None,
        buffer_size: int = 100_000,
        learning_starts: int = 1_000,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        ent_coef: float | str = "auto",
        target_entropy_ratio: float = 0.98,
        huber_delta: float = 10.0,
        max_grad_norm: float = 10.0,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        if not 0.0 < target_entropy_ratio <= 1.0:
            raise ValueError(f"target_entropy_ratio must lie in (0, 1], got {target_entropy_ratio}")
        if not huber_delta > 0.0:
            raise ValueError(f"huber_delta must be positive, got {huber_delta}")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            max_grad_norm=max_grad_norm,
            columns=None,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
        )
        self.actor_learning_rate = actor_learning_rate
        self.ent_coef = ent_coef
        self.target_entropy_ratio = target_entropy_ratio
        self.huber_delta = huber_delta
        start, self._learns_ent_coef = _start_of(ent_coef)
        self._start_log_ent_coef = math.log(start)
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        rate = self.learning_rate if self.actor_learning_rate is None else self.actor_learning_rate
        self._actor_schedule = FloatSchedule(rate)
        own = self.policy_kwargs
        self.policy_kwargs = {**own, "actor_lr_schedule": self._actor_schedule}
        super()._setup_model()
        # Settings that are saved hold no schedule, which would have to be unpickled.
        self.policy_kwargs = {
            name: value for name, value in self.policy_kwargs.items() if name != "actor_lr_schedule"
        }
        self.log_ent_coef = torch.tensor(
            self._start_log_ent_coef, device=self.device, requires_grad=self._learns_ent_coef
        )
        if self._learns_ent_coef:
            self.ent_coef_optimizer = torch.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))
        self.target_entropy = self.target_entropy_ratio * math.log(self.policy.items)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Updates critics, actor and ``alpha``; see Stable-Baselines3."""
        self.policy.set_training_mode(True)
        self._schedule_rates()
        records: dict[str, list[Tensor]] = {}
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            alpha = self.log_ent_coef.detach().exp()
            critic_loss = self._update_critics(batch, alpha)
            actor_loss, entropy = self._update_actor(batch.observations, alpha)
            self._update_ent_coef(entropy)
            polyak_update(self.policy.critics.parameters(), self.policy.target_critics.parameters(), self.tau)
            parts = (("critic_loss", critic_loss), ("actor_loss", actor_loss), ("entropy", entropy))
            for name, value in parts:
                records.setdefault(name, []).append(value)
        self._n_updates += gradient_steps
        for name, values in records.items():
            self.logger.record(f"train/{name}", float(torch.stack(values).mean()))
        self.logger.record("train/ent_coef", float(self.log_ent_coef.detach().exp()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def learn(
        self: SelfDiscreteSAC,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "DiscreteSAC",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDiscreteSAC:
        """Trains the agent; see Stable-Baselines3."""
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _update_critics(self, batch: SlateReplaySamples, alpha: Tensor) -> Tensor:
        with torch.no_grad():
            logs = self.policy.actor(batch.next_observations, self.policy.units).log_softmax(dim=1)
            following = soft_values(logs, self.policy.least_q(batch.next_observations, target=True), alpha)
            discounts = self.gamma * (1.0 - batch.dones)
            targets = self._slot_rewards(batch) + discounts * following[:, None]
        units, items = self.policy.units, batch.items
        losses = [
            nn.functional.huber_loss(
                critic.of(batch.observations, units, items), targets, delta=self.huber_delta
            )
            for critic in cast(Iterable[ItemNet], self.policy.critics)
        ]
        loss = torch.stack(losses).sum()
        self._descend(self.policy.critic_optimizer, loss)
        return loss.detach()

    def _update_actor(self, states: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Takes a step of the actor; returns its loss and its mean entropy."""
        logits = self.policy.actor(states, self.policy.units)
        with torch.no_grad():
            logs = logits.log_softmax(dim=1)
            values = self.policy.least_q(states)
            gradient, loss = policy_gradient(logs, values, alpha)
            entropy = -(logs.exp() * logs).sum(dim=1).mean()
        self.policy.actor_optimizer.zero_grad()
        logits.backward(gradient)
        self._step(self.policy.actor_optimizer)
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
            self.log_ent_coef.clamp_(*_LOG_ENT_COEF)

    def _schedule_rates(self) -> None:
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

    In closed form: ``pi(a) (c(a) - sum_b pi(b) c(b)) / B`` with ``c = alpha log pi - Q``. Automatic differentiation
    finds the same with several more passes over ``(B, N)``.

    Args:
        logs: See :func:`soft_values`.
        values: See :func:`soft_values`.
        alpha: See :func:`soft_values`.
    """
    chances = logs.exp()
    costs = alpha * logs - values
    means = (chances * costs).sum(dim=1, keepdim=True)
    return chances * (costs - means) / len(logs), means.mean()


def _start_of(ent_coef: float | str) -> tuple[float, bool]:
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
