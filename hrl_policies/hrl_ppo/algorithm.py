"""HierarchicalPPO: two levels of PPO over slates, as an algorithm of Stable-Baselines3 (paper 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from hrl_policies.common.click_scorer import ClickScorer
from hrl_policies.hrl_ppo.buffer import (
    COST,
    ENGAGEMENT,
    MANAGER,
    Minibatch,
    TwoLevelRollout,
    clicks_of,
)
from hrl_policies.hrl_ppo.networks import omegas
from hrl_policies.hrl_ppo.policy import Held, HierarchicalPolicy
from hrl_policies.hrl_ppo.rewards import FairKind, fairness_reward
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.sb3 import world_beneath
from kuaifair_env.spaces import reached_observations, take_rows
from kuaifair_env.world import World

SelfHierarchicalPPO = TypeVar("SelfHierarchicalPPO", bound="HierarchicalPPO")
RatioKind = Literal["per_slot", "slate", "mean"]
ConstraintKind = Literal["none", "lagrange"]


class HierarchicalPPO(OnPolicyAlgorithm):
    """A manager that weighs accuracy against fairness and a worker that ranks, each with a PPO of its own.

    Nothing trainable is shared: parameters, critics, optimisers, advantages, learning rates and target KLs are
    separate, and each level takes the other's action as data. The manager earns ``r + lambda Fair`` (eq. 4), the
    worker ``r``; a flat agent (``hierarchy={"manager": "flat"}``) has one level, which earns ``r + lambda Fair``.

    Args:
        policy: ``"HierarchicalPolicy"`` or a subclass of it.
        env: Sessions with ``action_mode="slate"``; ``observation_mode="history"`` lets both levels see the window.
        hierarchy: Arguments of :class:`~hrl_policies.hrl_ppo.settings.HierarchySettings`.
        scorer: Click model whose log-odds the accuracy term starts from, as the greedy controls rank by it; None
            starts from similarity alone, which is eq. 6 to the letter.
        learning_rate: Of the worker; a number or a schedule.
        manager_learning_rate: Of the manager; None takes the worker's.
        n_steps: Steps of a rollout in each session.
        batch_size: Steps of a minibatch.
        n_epochs: Passes over a rollout.
        gamma: The worker's discount.
        manager_gamma: The manager's discount.
        gae_lambda: Of generalised advantage estimation.
        clip_range: Where ratios are clipped.
        normalize_advantage: Whether to standardise each level's advantages in each minibatch.
        ent_coef: Weight of the worker's first-slot entropy.
        manager_ent_coef: Weight of the manager's entropy.
        vf_coef: Weight of the critics' losses.
        max_grad_norm: Where each level's gradient is cut off.
        target_kl: Where each level's epochs end early; None never.
        ratio: ``"per_slot"`` clips the ratio of each slot, ``"slate"`` that of the whole slate (exact, and nearly
        always
            clipped), ``"mean"`` its geometric mean over slots.
        slot_credit: Weight of a slot's own click beside the slate's advantage, ``click_j - mean click``; needs the
            window and ``ratio="per_slot"``.
        fair: Form of ``Fair(L_t)``; see :mod:`hrl_policies.hrl_ppo.rewards`.
        fair_coef: ``lambda`` of eq. 4.
        constraint: ``"none"``, or ``"lagrange"``: PPO-Lagrangian on the share of slates whose disparity reaches
            ``ad_bound`` (``A = (A_r - mu A_c) / (1 + mu)``).
        ad_bound: ``delta``.
        cost_limit: Share of such slates that is allowed.
        multiplier_rate: Step of ``mu``.
        start_multiplier: ``mu`` at the start.
        stats_window_size: See Stable-Baselines3.
        tensorboard_log: See Stable-Baselines3.
        policy_kwargs: See :class:`~hrl_policies.hrl_ppo.policy.HierarchicalPolicy`.
        verbose: See Stable-Baselines3.
        seed: Seed of everything random.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        _init_setup_model: See Stable-Baselines3.

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the environment is not a KuaiFair environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"HierarchicalPolicy": HierarchicalPolicy}
    policy: HierarchicalPolicy  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[HierarchicalPolicy],
        env: GymEnv | str,
        *,
        hierarchy: Mapping[str, Any] | None = None,
        scorer: ClickScorer | None = None,
        learning_rate: float | Schedule = 3e-4,
        manager_learning_rate: float | Schedule | None = None,
        n_steps: int = 32,
        batch_size: int = 512,
        n_epochs: int = 4,
        gamma: float = 0.95,
        manager_gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: float = 0.2,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        manager_ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        target_kl: float | None = 0.02,
        ratio: RatioKind = "per_slot",
        slot_credit: float = 0.0,
        fair: FairKind = "slate_ad",
        fair_coef: float = 0.1,
        constraint: ConstraintKind = "none",
        ad_bound: float = 0.3,
        cost_limit: float = 0.05,
        multiplier_rate: float = 0.05,
        start_multiplier: float = 0.1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        for name, value, kinds in (("ratio", ratio, RatioKind), ("constraint", constraint, ConstraintKind)):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        if fair not in get_args(FairKind):
            raise ValueError(f"fair must be one of {get_args(FairKind)}, got {fair!r}")
        if slot_credit and ratio != "per_slot":
            raise ValueError("slot_credit needs ratio='per_slot'")
        if min(batch_size, n_epochs, n_steps) < 1:
            raise ValueError("n_steps, batch_size and n_epochs must be at least 1")
        kwargs = dict(policy_kwargs or {})
        if hierarchy is not None:
            kwargs["hierarchy"] = dict(hierarchy)
        super().__init__(
            policy,  # type: ignore[arg-type]
            env,
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.manager_learning_rate = manager_learning_rate
        self.batch_size, self.n_epochs = batch_size, n_epochs
        self.manager_gamma = manager_gamma
        self.clip_range = clip_range
        self.normalize_advantage = normalize_advantage
        self.manager_ent_coef = manager_ent_coef
        self.target_kl = target_kl
        self.ratio, self.slot_credit = ratio, slot_credit
        self.fair, self.fair_coef = fair, fair_coef
        self.constraint = constraint
        self.ad_bound, self.cost_limit = ad_bound, cost_limit
        self.multiplier_rate, self.start_multiplier = multiplier_rate, start_multiplier
        self._n_updates = 0
        self._scorer = scorer
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        if self.slot_credit and not isinstance(self.observation_space, spaces.Dict):
            raise ValueError(
                "slot_credit needs the window: make the environment with observation_mode='history'"
            )
        world = None if self.env is None else _need_world(self.env)
        if world is not None:
            self.policy_kwargs.setdefault("dimension", world.dimension)
        manager_rate = (
            self.learning_rate if self.manager_learning_rate is None else self.manager_learning_rate
        )
        self._manager_schedule = FloatSchedule(manager_rate)
        self.policy = cast(
            HierarchicalPolicy,
            self.policy_class(
                self.observation_space,
                self.action_space,
                self.lr_schedule,
                manager_lr_schedule=self._manager_schedule,
                **self.policy_kwargs,
            ),
        ).to(self.device)
        if world is not None:
            self.policy.table.fill(world, self._scorer)
        # The scorer is in the policy's tables now and is saved with them.
        self._scorer = None
        self.multiplier = torch.tensor(float(self.start_multiplier))
        self._shuffle = np.random.default_rng(self.seed)
        self.rollout_buffer = cast(Any, TwoLevelRollout(self.n_steps, self.n_envs, self.device))

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Plays ``n_rollout_steps`` steps in every session; see Stable-Baselines3.

        Returns:
            False if the callback ended training.
        """
        rollout = cast(TwoLevelRollout, rollout_buffer)
        self.policy.set_training_mode(False)
        rollout.reset()
        table = self.policy.table
        popular = table.popular[table.place].cpu().numpy()
        popularity = table.popularity[table.place].cpu().numpy()
        fairness = fairness_reward(self.fair, popular, popularity, env.num_envs, self.policy.slate_size)
        held = _Holding(env.num_envs, self.policy.hierarchy.action_size, self.policy.hierarchy.interval)
        callback.on_rollout_start()
        for _ in range(n_rollout_steps):
            with torch.inference_mode():
                found = self.policy.decide(self._last_obs, held=held.now(self.device))
            decided = held.took(found.actions)
            slates = found.slates.cpu().numpy()
            new_obs, rewards, dones, infos = env.step(slates)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            seen = reached_observations(new_obs, infos, dones)
            fair = fairness.reward(slates, found.entropies.cpu().numpy())
            cost = violates(slate_disparity(popular[slates].mean(axis=1)), self.ad_bound)
            rollout.add(
                found,
                rewards=self._rewards(rewards, fair, cost),
                clicks=clicks_of(seen, self.policy.slate_size) if self.slot_credit else None,
                done=dones,
                final_values=self._final_values(infos, seen, dones),
                decided=decided,
            )
            fairness.ended(dones)
            held.ended(dones)
            self._last_obs = cast(Any, new_obs)
            self._last_episode_starts = dones
        with torch.inference_mode():
            last = self.policy.predict_values(self._last_obs).cpu().numpy()
        rollout.finish(last, (self.manager_gamma, self.gamma, self.gamma), self.gae_lambda)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Updates both levels from the rollout, each in its own way."""
        self.policy.set_training_mode(True)
        rollout = cast(TwoLevelRollout, self.rollout_buffer)
        update_learning_rate(self.policy.worker_optimizer, self.lr_schedule(self._current_progress_remaining))
        update_learning_rate(
            self.policy.manager_optimizer, self._manager_schedule(self._current_progress_remaining)
        )
        levels = {"worker": True, "manager": self.policy.hierarchy.manager == "learned"}
        records: dict[str, list[Tensor]] = {}
        for _ in range(self.n_epochs):
            for batch in rollout.minibatches(self.batch_size, self._shuffle):
                for level, active in levels.items():
                    if active:
                        update = self._update_worker if level == "worker" else self._update_manager
                        levels[level] = update(batch, records)
            self._n_updates += 1
        if self.constraint == "lagrange":
            gap = float(rollout.rewards[..., COST].mean()) - self.cost_limit
            self.multiplier = (self.multiplier + self.multiplier_rate * gap).clamp_min(0.0)
        self._log(rollout, records)

    def learn(
        self: SelfHierarchicalPPO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "HierarchicalPPO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfHierarchicalPPO:
        """Trains both levels; see Stable-Baselines3."""
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _rewards(
        self, reward: NDArray[np.float32], fair: NDArray[np.float32], cost: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        shaped = reward + self.fair_coef * fair
        own = shaped if self.policy.hierarchy.manager == "flat" else reward
        return np.stack([shaped, own, cost.astype(np.float32)], axis=1).astype(np.float32)

    def _final_values(
        self, infos: list[dict[str, Any]], seen: Any, done: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Returns the values of sessions that were cut off, not left, ``float32 (B, 3)``; 0 elsewhere."""
        found = np.zeros((len(done), 3), np.float32)
        cut = np.asarray(
            [row for row in np.flatnonzero(done) if infos[row].get("TimeLimit.truncated", False)], np.int64
        )
        if len(cut):
            with torch.inference_mode():
                found[cut] = self.policy.predict_values(take_rows(seen, cut)).cpu().numpy()
        return found

    def _update_worker(self, batch: Minibatch, records: dict[str, list[Tensor]]) -> bool:
        logs, entropy = self.policy.evaluate_worker(
            batch.worker_features, batch.candidates, batch.counts, batch.scale, batch.slots
        )
        advantage = self._normalised(batch.advantages[:, ENGAGEMENT])
        engagement, cost = self.policy.worker.values(batch.worker_features)
        value_loss = torch.nn.functional.mse_loss(engagement, batch.returns[:, ENGAGEMENT])
        if self.constraint == "lagrange":
            of_cost = batch.advantages[:, COST]
            multiplier = self.multiplier.to(advantage.device)
            advantage = (advantage - multiplier * (of_cost - of_cost.mean())) / (1.0 + multiplier)
            value_loss = value_loss + torch.nn.functional.mse_loss(cost, batch.returns[:, COST])
        old, each = batch.worker_log_probs, advantage[:, None]
        if self.ratio == "per_slot":
            each = each + self.slot_credit * batch.credit if self.slot_credit else each
        elif self.ratio == "slate":
            logs, old = logs.sum(1, keepdim=True), old.sum(1, keepdim=True)
        else:
            logs, old = logs.mean(1, keepdim=True), old.mean(1, keepdim=True)
        surrogate, divergence, clipped = _clipped(logs - old, each, self.clip_range)
        _note(records, "worker", surrogate, value_loss, entropy.mean(), divergence, clipped)
        if self.target_kl is not None and divergence > 1.5 * self.target_kl:
            return False
        loss = surrogate + self.vf_coef * value_loss - self.ent_coef * entropy.mean()
        self._step(self.policy.worker_optimizer, self.policy.worker, loss)
        return True

    def _update_manager(self, batch: Minibatch, records: dict[str, list[Tensor]]) -> bool:
        rows = batch.decided
        if not bool(rows.any()):
            return True
        features, actions = batch.manager_features[rows], batch.actions[rows]
        logs, entropy = self.policy.manager.evaluate(features, self.policy.table.feasible, actions)
        advantage = self._normalised(batch.advantages[rows, MANAGER])
        value_loss = torch.nn.functional.mse_loss(
            self.policy.manager.value(features), batch.returns[rows, MANAGER]
        )
        surrogate, divergence, clipped = _clipped(
            logs - batch.manager_log_probs[rows], advantage, self.clip_range
        )
        _note(records, "manager", surrogate, value_loss, entropy.mean(), divergence, clipped)
        if self.target_kl is not None and divergence > 1.5 * self.target_kl:
            return False
        loss = surrogate + self.vf_coef * value_loss - self.manager_ent_coef * entropy.mean()
        self._step(self.policy.manager_optimizer, self.policy.manager, loss)
        return True

    def _step(self, optimizer: torch.optim.Optimizer, level: torch.nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(level.parameters(), self.max_grad_norm)
        optimizer.step()

    def _normalised(self, advantage: Tensor) -> Tensor:
        if not self.normalize_advantage or len(advantage) < 2:
            return advantage
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    def _log(self, rollout: TwoLevelRollout, records: Mapping[str, list[Tensor]]) -> None:
        for name, parts in records.items():
            self.logger.record(f"train/{name}", float(torch.stack(parts).mean()))
        for name, part in (("manager", MANAGER), ("worker", ENGAGEMENT), ("cost", COST)):
            rows = rollout.decided if part == MANAGER else np.ones_like(rollout.decided)
            fit = explained_variance(rollout.values[rows, part], rollout.returns[rows, part])
            self.logger.record(f"train/{name}_explained_variance", fit)
        actions = rollout.manager_actions()
        form = self.policy.hierarchy.weights
        if form == "quota":
            self.logger.record("train/popular_count_mean", float(actions.mean()))
            self.logger.record("train/popular_count_std", float(actions.std()))
        elif self.policy.hierarchy.manager != "flat" and form != "her4if":
            accuracy, fairness = omegas(actions, form)
            for name, weight in (("omega_acc", accuracy), ("omega_fair", fairness)):
                self.logger.record(f"train/{name}_mean", float(weight.mean()))
                self.logger.record(f"train/{name}_std", float(weight.std()))
        worker = self.policy.worker
        self.logger.record("train/temperature", float(worker.temperature.detach()))
        if worker.settings.memory:
            for name, weight in zip(("click", "skip"), worker.memory.detach(), strict=True):
                self.logger.record(f"train/memory_{name}", float(weight))
        self.logger.record("train/violation_rate", float(rollout.rewards[..., COST].mean()))
        self.logger.record("train/lagrange_multiplier", float(self.multiplier))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(), "_scorer", "_shuffle", "_manager_schedule", "multiplier",
        ]  # fmt: skip

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.manager_optimizer", "policy.worker_optimizer"], ["multiplier"]


class _Holding:
    """Which sessions' manager may decide now, and what holds elsewhere.

    Args:
        sessions: Sessions ``B``.
        size: Components of the manager's action.
        interval: Steps for which an action holds.
    """

    def __init__(self, sessions: int, size: int, interval: int) -> None:
        self._interval = interval
        self._actions = torch.zeros(sessions, size)
        self._left = np.zeros(sessions, np.int64)

    def now(self, device: torch.device) -> Held | None:
        """Returns what holds; None where every step is decided anew."""
        if self._interval == 1:
            return None
        return Held(self._actions.to(device), torch.from_numpy(self._left <= 0).to(device))

    def took(self, actions: Tensor) -> NDArray[np.bool_]:
        """Notes the actions of a step and returns where they were decided now."""
        fresh = self._left <= 0
        self._actions = actions
        self._left = np.where(fresh, self._interval, self._left) - 1
        return fresh

    def ended(self, done: NDArray[np.bool_]) -> None:
        """Lets new sessions decide anew."""
        self._left[done] = 0


def _need_world(env: VecEnv) -> World:
    world = world_beneath(env)
    if world is None:
        raise TypeError(
            "HierarchicalPPO reads items and popularity groups off a KuaiFair environment; "
            f"{type(env.unwrapped).__name__} has no world"
        )
    return world


def _clipped(change: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns PPO's clipped surrogate loss, the approximate KL divergence and the share of clipped ratios."""
    ratio = change.exp()
    surrogate = -torch.min(advantage * ratio, advantage * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()
    with torch.no_grad():
        divergence = (ratio - 1.0 - change).mean()
        clipped = ((ratio - 1.0).abs() > clip_range).to(torch.float32).mean()
    return surrogate, divergence, clipped


def _note(records: dict[str, list[Tensor]], level: str, *values: Tensor) -> None:
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")
    for name, value in zip(names, values, strict=True):
        records.setdefault(f"{level}_{name}", []).append(value.detach())
