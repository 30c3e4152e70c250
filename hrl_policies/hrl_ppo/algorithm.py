"""HierarchicalPPO: two levels of PPO over slates, as an algorithm of Stable-Baselines3 (paper 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import FloatSchedule, explained_variance, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional
from typing_extensions import Unpack

from dsrm.click_scorer import ClickScorer
from hrl_policies.common.sessions import AlgorithmArguments, AmongItsItems, allowed_items, is_purified
from hrl_policies.common.slates import executed_slates
from hrl_policies.hrl_ppo.levels import ManagerState, TwoLevelPolicy
from hrl_policies.hrl_ppo.policy import HierarchicalPolicy
from hrl_policies.hrl_ppo.ranking import RankingPolicy
from hrl_policies.hrl_ppo.rewards import (
    COST,
    ENGAGEMENT,
    MANAGER,
    FairKind,
    HierarchicalRolloutBuffer,
    HierarchicalRolloutBufferSamples,
    fairness_reward,
)
from kuaifair_env.batch import SessionBatch
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.observations import reached_observations, take_rows
from kuaifair_env.sb3 import world_beneath
from kuaifair_env.world import World

SelfHierarchicalPPO = TypeVar("SelfHierarchicalPPO", bound="HierarchicalPPO")
RatioKind = Literal["per_slot", "slate", "mean"]
ConstraintKind = Literal["none", "lagrange"]
Records = dict[str, list[Tensor]]


class LiteralArguments(TypedDict):
    """The arguments of :class:`HierarchicalPPO` by which the paper's equations differ from the method's defaults."""

    hierarchy: dict[str, Any]
    click_scorer: None
    ratio: RatioKind
    slot_credit: float
    fair_coef: float
    n_epochs: int


LITERAL: LiteralArguments = {
    "hierarchy": {"weights": "paper", "memory": False},
    "click_scorer": None,
    "ratio": "slate",
    "slot_credit": 0.0,
    "fair_coef": 0.1,
    "n_epochs": 4,
}
"""The paper's equations 4 to 6 as they stand: similarity alone, softplus weights, no memory, ratio and advantage of
slates."""


class HierarchicalPPO(AmongItsItems, OnPolicyAlgorithm):
    """A manager that weighs accuracy against fairness and a worker that ranks, each with a PPO of its own.

    Nothing trainable is shared ("gradient separation"): parameters, critics, optimisers, advantages, learning rates and
    target KLs are separate, and each level takes the other's action as data. The manager earns ``r + lambda Fair``
    (eq. 4), the worker ``r``; a flat agent (``hierarchy={"manager": "flat"}``) has one level, which earns
    ``r + lambda Fair``.

    The defaults are those of the method: over purified sessions (:class:`dsrm.VecDSRM`) the agent is DSRM-HRL, over
    sessions as they are it is HRL. :func:`hrl_policies.make_training_env` makes such sessions. The paper's literal form
    is ``HierarchicalPPO("HierarchicalPolicy", env, **LITERAL)``.

    Args:
        policy: ``"HierarchicalPolicy"`` or a subclass of it.
        env: Sessions with ``action_mode="slate"`` and ``observation_mode="history"``.
        hierarchy: Arguments of :class:`~hrl_policies.hrl_ppo.networks.HierarchySettings`.
        click_scorer: Click model whose log-odds the accuracy term starts from, as the greedy controls rank by it.
            ``"fit"`` fits it to the training log of the environment's world; it is saved with the agent. None starts
            from similarity alone, which is eq. 6 to the letter.
        learning_rate: Of the worker; a number or a schedule.
        manager_learning_rate: Of the manager; None takes the worker's.
        gamma: The worker's discount.
        manager_gamma: The manager's discount.
        ent_coef: Weight of the worker's first-slot entropy.
        manager_ent_coef: Weight of the manager's entropy.
        ratio: ``"per_slot"`` clips the ratio of each slot, ``"slate"`` that of the whole slate (exact, and nearly
            always clipped), ``"mean"`` its geometric mean over slots.
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
        policy_kwargs: See :class:`~hrl_policies.hrl_ppo.policy.HierarchicalPolicy`.
        **kwargs: See :class:`~hrl_policies.common.sessions.AlgorithmArguments`.

    All other arguments are those of Stable-Baselines3's PPO, for each level apart.

    Attributes:
        stateful_parts: Attributes whose own attributes belong to a checkpoint (:func:`kuaifair_env.serve`).

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the environment is not a KuaiFair environment.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "RankingPolicy": RankingPolicy,
        "HierarchicalPolicy": HierarchicalPolicy,
    }
    policy: TwoLevelPolicy  # type: ignore[assignment]
    stateful_parts: ClassVar[tuple[str, ...]] = ("_fairness",)

    def __init__(
        self,
        policy: str | type[TwoLevelPolicy],
        env: GymEnv | str,
        *,
        hierarchy: Mapping[str, Any] | None = None,
        click_scorer: ClickScorer | Literal["fit"] | None = "fit",
        learning_rate: float | Schedule = 1e-3,
        manager_learning_rate: float | Schedule | None = None,
        n_steps: int = 32,
        batch_size: int = 512,
        n_epochs: int = 1,
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
        slot_credit: float = 1.0,
        fair: FairKind = "slate_ad",
        fair_coef: float = 0.0,
        constraint: ConstraintKind = "none",
        ad_bound: float = 0.3,
        cost_limit: float = 0.05,
        multiplier_rate: float = 0.05,
        start_multiplier: float = 0.1,
        policy_kwargs: dict[str, Any] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[AlgorithmArguments],
    ) -> None:
        for name, value, kinds in (
            ("ratio", ratio, RatioKind),
            ("constraint", constraint, ConstraintKind),
            ("fair", fair, FairKind),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        if not (click_scorer in ("fit", None) or isinstance(click_scorer, ClickScorer)):
            raise ValueError(f"click_scorer must be a ClickScorer, 'fit' or None, got {click_scorer!r}")
        if slot_credit and ratio != "per_slot":
            raise ValueError("slot_credit needs ratio='per_slot'")
        if min(batch_size, n_epochs, n_steps) < 1:
            raise ValueError("n_steps, batch_size and n_epochs must be at least 1")
        policy_kwargs = dict(policy_kwargs or {})
        if hierarchy is not None:
            policy_kwargs["hierarchy"] = dict(hierarchy)
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
            policy_kwargs=policy_kwargs,
            _init_setup_model=False,
            **kwargs,
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
        self._click_scorer = click_scorer
        if _init_setup_model:
            self._setup_model()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method}, {self.policy.forms()})"

    @property
    def method(self) -> str:
        """``"DSRM-HRL"`` over purified sessions, ``"HRL"`` over sessions as they are."""
        return "DSRM-HRL" if self.purified else "HRL"

    def _setup_model(self) -> None:
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        world = None if self.env is None else world_beneath(self.env)
        if self.env is not None:
            if world is None:
                raise TypeError(
                    "HierarchicalPPO reads items and popularity groups off a KuaiFair environment; "
                    f"{type(self.env.unwrapped).__name__} has no world"
                )
            self.purified = is_purified(self.env)
            if issubclass(self.policy_class, HierarchicalPolicy):
                self.policy_kwargs.setdefault("dimension", world.dimension)
        self.manager_lr_schedule = FloatSchedule(
            self.learning_rate if self.manager_learning_rate is None else self.manager_learning_rate
        )
        self.policy = cast(
            TwoLevelPolicy,
            self.policy_class(
                self.observation_space,
                self.action_space,
                self.lr_schedule,
                manager_lr_schedule=self.manager_lr_schedule,
                **self.policy_kwargs,
            ),
        ).to(self.device)
        if world is not None:
            self.policy.read_items(world, self._click_scorer)
        # What the policy read of it is saved with the policy: a loaded agent fits none.
        self._click_scorer = None
        self._bound: SessionBatch | None = None
        self.multiplier = torch.tensor(float(self.start_multiplier))
        self._minibatch_rng = np.random.default_rng(self.seed)
        self.rollout_buffer = cast(Any, HierarchicalRolloutBuffer(self.n_steps, self.n_envs, self.device))
        if self.verbose and self.env is not None:
            hint = "" if self.purified else " (states are not purified; dsrm.VecDSRM around the sessions does it)"
            print(f"{self!r}{hint}")

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None
        starts_sessions = reset_num_timesteps or self._last_obs is None
        if starts_sessions and not reset_num_timesteps and self.num_timesteps > 0:
            # A loaded agent goes on: the environment's own streams would bring the first users again.
            sequence = np.random.SeedSequence([self.seed or 0, self.num_timesteps])
            self.env.seed(int(sequence.generate_state(1)[0]))
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if starts_sessions:
            world = self._world()
            self._fairness = fairness_reward(
                self.fair, world.groups.popular, world.exposures, self.n_envs, self.policy.slate_size
            )
        return result

    def _world(self) -> World:
        """Returns the world of the sessions."""
        assert self.env is not None
        return cast(World, world_beneath(self.env))

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Plays ``n_rollout_steps`` steps in every session; see Stable-Baselines3.

        The manager decides anew at the start of a rollout.

        Returns:
            False if the callback ended training.
        """
        buffer = cast(HierarchicalRolloutBuffer, rollout_buffer)
        self.policy.set_training_mode(False)
        buffer.reset()
        self._fairness.start_rollout()
        popular = self._world().groups.popular
        manager_state: ManagerState | None = None
        callback.on_rollout_start()
        for _ in range(n_rollout_steps):
            with torch.inference_mode():
                allowed = self.policy.masks(allowed_items(env)) if self.policy.reads_masks else None
                actions = self.policy.act(self._last_obs, manager_state=manager_state, allowed=allowed)
            slates = actions.slates.cpu().numpy()
            new_obs, rewards, dones, infos = env.step(slates)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            reached = reached_observations(new_obs, infos, dones)
            fair = self._fairness.reward(slates, actions.entropies.cpu().numpy())
            cost = violates(slate_disparity(popular[slates].mean(axis=1)), self.ad_bound)
            buffer.add(
                actions,
                rewards=self._level_rewards(rewards, fair, cost),
                feedback=executed_slates(env, infos).feedback if self.slot_credit else None,
                dones=dones,
                final_values=self._final_values(infos, reached, dones),
            )
            self._fairness.end_sessions(dones)
            if self.policy.interval > 1:
                over = torch.from_numpy(dones).to(self.device)
                manager_state = ManagerState(actions.manager_actions, actions.steps_left.masked_fill(over, 0))
            self._last_obs = cast(Any, new_obs)
            self._last_episode_starts = dones
        with torch.inference_mode():
            last_values = self.policy.predict_values(self._last_obs).cpu().numpy()
        buffer.compute_returns_and_advantages(
            last_values, (self.manager_gamma, self.gamma, self.gamma), self.gae_lambda
        )
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Updates both levels from the rollout, each in its own way."""
        self.policy.set_training_mode(True)
        buffer = cast(HierarchicalRolloutBuffer, self.rollout_buffer)
        progress = self._current_progress_remaining
        update_learning_rate(self.policy.worker_optimizer, self.lr_schedule(progress))
        update_learning_rate(self.policy.manager_optimizer, self.manager_lr_schedule(progress))
        worker_learns, manager_learns = True, self.policy.manager_learns
        records: Records = {}
        for _ in range(self.n_epochs):
            for samples in buffer.get(self.batch_size, self._minibatch_rng):
                worker_learns = worker_learns and self._update_worker(samples, records)
                manager_learns = manager_learns and self._update_manager(samples, records)
            self._n_updates += 1
        if self.constraint == "lagrange":
            gap = float(buffer.rewards[..., COST].mean()) - self.cost_limit
            self.multiplier = (self.multiplier + self.multiplier_rate * gap).clamp_min(0.0)
        self._log(buffer, records)

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
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def bind(self, batch: SessionBatch) -> None:
        """Takes the sessions whose observations :meth:`predict` will get, so that it shows what may be shown there."""
        self._bound = batch

    def predict(
        self,
        observation: Any,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[np.bool_] | None = None,
        deterministic: bool = False,
        action_masks: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.int64], tuple[NDArray[Any], ...] | None]:
        """Returns slates; see :meth:`~hrl_policies.hrl_ppo.levels.TwoLevelPolicy.predict`.

        Without ``action_masks`` those of the sessions given to :meth:`bind` hold.
        """
        if action_masks is None and self._bound is not None and self.policy.reads_masks:
            action_masks = self._bound.simulator.allowed
        return self.policy.predict(observation, state, episode_start, deterministic, action_masks)

    def _level_rewards(
        self, reward: NDArray[np.float32], fair: NDArray[np.float32], cost: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Returns the rewards of manager and engagement, and the cost, ``float32 (B, 3)``."""
        shaped = reward + self.fair_coef * fair
        own = shaped if self.policy.flat else reward
        return np.stack([shaped, own, cost.astype(np.float32)], axis=1).astype(np.float32)

    def _final_values(self, infos: list[dict[str, Any]], reached: Any, dones: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Returns the values of sessions that were cut off, not left, ``float32 (B, 3)``; 0 elsewhere."""
        values = np.zeros((len(dones), 3), np.float32)
        cut = np.asarray(
            [row for row in np.flatnonzero(dones) if infos[row].get("TimeLimit.truncated", False)], np.int64
        )
        if len(cut):
            with torch.inference_mode():
                values[cut] = self.policy.predict_values(take_rows(reached, cut)).cpu().numpy()
        return values

    def _update_worker(self, samples: HierarchicalRolloutBufferSamples, records: Records) -> bool:
        log_probs, entropy, engagement, cost = self.policy.evaluate_worker(samples.actions)
        old_log_probs = samples.actions.worker_log_probs
        advantage = self._normalized(samples.advantages[:, ENGAGEMENT])
        value_loss = functional.mse_loss(engagement, samples.returns[:, ENGAGEMENT])
        if self.constraint == "lagrange":
            cost_advantage = samples.advantages[:, COST]
            multiplier = self.multiplier.to(advantage.device)
            advantage = (advantage - multiplier * (cost_advantage - cost_advantage.mean())) / (1.0 + multiplier)
            value_loss = value_loss + functional.mse_loss(cost, samples.returns[:, COST])
        advantage = advantage[:, None]
        if self.ratio == "per_slot":
            if self.slot_credit:
                advantage = advantage + self.slot_credit * samples.slot_credit
        elif self.ratio == "slate":
            log_probs, old_log_probs = log_probs.sum(1, keepdim=True), old_log_probs.sum(1, keepdim=True)
        else:
            log_probs, old_log_probs = log_probs.mean(1, keepdim=True), old_log_probs.mean(1, keepdim=True)
        return self._update_level(
            "worker", log_probs - old_log_probs, advantage, value_loss, entropy.mean(), self.ent_coef, records
        )

    def _update_manager(self, samples: HierarchicalRolloutBufferSamples, records: Records) -> bool:
        rows = samples.actions.decided
        if not bool(rows.any()):
            return True
        log_probs, entropy, values = self.policy.evaluate_manager(samples.actions, rows)
        advantage = self._normalized(samples.advantages[rows, MANAGER])
        value_loss = functional.mse_loss(values, samples.returns[rows, MANAGER])
        log_ratio = log_probs - samples.actions.manager_log_probs[rows]
        return self._update_level(
            "manager", log_ratio, advantage, value_loss, entropy.mean(), self.manager_ent_coef, records
        )

    def _update_level(
        self,
        name: Literal["manager", "worker"],
        log_ratio: Tensor,
        advantage: Tensor,
        value_loss: Tensor,
        entropy: Tensor,
        ent_coef: float,
        records: Records,
    ) -> bool:
        """Takes a gradient step of PPO for one level; returns False, and takes none, once it has moved too far."""
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        policy_loss = -torch.min(advantage * ratio, advantage * clipped).mean()
        with torch.no_grad():
            approx_kl = (ratio - 1.0 - log_ratio).mean()
            clip_fraction = ((ratio - 1.0).abs() > self.clip_range).to(torch.float32).mean()
        values = {
            "policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "approx_kl": approx_kl,
            "clip_fraction": clip_fraction,
        }  # fmt: skip
        for quantity, value in values.items():
            records.setdefault(f"{name}_{quantity}", []).append(value.detach())
        if self.target_kl is not None and approx_kl > 1.5 * self.target_kl:
            return False
        level, optimizer = self.policy.level(name)
        optimizer.zero_grad()
        torch.autograd.backward(policy_loss + self.vf_coef * value_loss - ent_coef * entropy)
        torch.nn.utils.clip_grad_norm_(level.parameters(), self.max_grad_norm)
        optimizer.step()
        return True

    def _normalized(self, advantage: Tensor) -> Tensor:
        if not self.normalize_advantage or len(advantage) < 2:
            return advantage
        return (advantage - advantage.mean()) / (advantage.std() + 1e-8)

    def _log(self, buffer: HierarchicalRolloutBuffer, records: Mapping[str, list[Tensor]]) -> None:
        for name, values in records.items():
            self.logger.record(f"train/{name}", float(torch.stack(values).mean()))
        for name, part in (("manager", MANAGER), ("worker", ENGAGEMENT), ("cost", COST)):
            rows = buffer.decided if part == MANAGER else np.ones_like(buffer.decided)
            variance = explained_variance(buffer.values[rows, part], buffer.returns[rows, part])
            self.logger.record(f"train/{name}_explained_variance", variance)
        for name, value in self.policy.diagnostics(buffer.manager_actions()).items():
            self.logger.record(f"train/{name}", value)
        self.logger.record("train/violation_rate", float(buffer.rewards[..., COST].mean()))
        self.logger.record("train/lagrange_multiplier", float(self.multiplier))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _excluded_save_params(self) -> list[str]:
        own = ["manager_lr_schedule", "multiplier", "_fairness", "_minibatch_rng", "_bound"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.manager_optimizer", "policy.worker_optimizer"], ["multiplier"]
