"""SAC4IR: discrete soft actor-critic with clicks debiased by exposure; entropy and reward both oppose popularity.

Shi et al., Maximum entropy policy for long-term fairness in interactive recommender systems, IEEE TSC 17(3), 2024.
Their released code trains one agent a user, on a table of item-to-item click rates that was not released, lowers
``alpha`` where SAC raises it, and never uses the end of a session. This is the online form over many users, with those
corrected.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import Tensor

from hrl_policies.common.buffers import SlateReplaySamples
from hrl_policies.common.item_tables import ItemTables
from hrl_policies.sac4ir.discrete_sac import DiscreteSAC, SoftItemPolicy
from kuaifair_env.world import World

SAC4IRMode = Literal["debiased", "kuaisim"]


class SAC4IR(DiscreteSAC):
    """Discrete SAC over slates, with debiased clicks.

    ``mode="debiased"``: slot ``k`` earns ``click_k (pop_ref / pop_k)^beta / Z``, with ``pop`` the training log's
    exposure and ``Z`` the mean weight of what the batch showed (self-normalised, so ``pop_ref`` cancels).
    ``mode="kuaisim"``: the version of the authors' group in KuaiSim: plain clicks; fairness only through users who
    leave.

    Args:
        policy: See :class:`~hrl_policies.sac4ir.discrete_sac.DiscreteSAC`.
        env: KuaiFair sessions with ``action_mode="slate"`` or ``"item"``.
        mode: ``"debiased"`` or ``"kuaisim"``.
        popularity_power: ``beta``; must be 0 in ``"kuaisim"`` mode.
        learning_rate: See there.
        actor_learning_rate: See there.
        buffer_size: See there.
        learning_starts: See there.
        batch_size: See there.
        tau: See there.
        gamma: See there.
        train_freq: See there.
        gradient_steps: See there.
        ent_coef: See there.
        target_entropy_ratio: See there.
        huber_delta: See there.
        max_grad_norm: See there.
        stats_window_size: See there.
        tensorboard_log: See there.
        policy_kwargs: See there.
        verbose: See there.
        seed: See there.
        device: See there.
        _init_setup_model: See there.

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
        learning_rate: float | Schedule = 3e-4,
        actor_learning_rate: float | Schedule | None = None,
        buffer_size: int = 100_000,
        learning_starts: int = 6_400,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.95,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        ent_coef: float | str = "auto",
        target_entropy_ratio: float = 0.7,
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
        if mode not in get_args(SAC4IRMode):
            raise ValueError(f"mode must be one of {get_args(SAC4IRMode)}, got {mode!r}")
        if popularity_power < 0.0 or (mode == "kuaisim" and popularity_power != 0.0):
            raise ValueError(
                f"popularity_power must not be negative, and 0 in mode='kuaisim', got {popularity_power}"
            )
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            actor_learning_rate=actor_learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            ent_coef=ent_coef,
            target_entropy_ratio=target_entropy_ratio,
            huber_delta=huber_delta,
            max_grad_norm=max_grad_norm,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.mode = mode
        self.popularity_power = popularity_power
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.weights = torch.zeros(0)
        super()._setup_model()
        if not len(self.weights):
            if self.env is not None:
                raise TypeError(
                    "SAC4IR reads exposures off a KuaiFair environment; use DiscreteSAC elsewhere"
                )
            self.weights = torch.zeros(self.policy.items, device=self.device)

    def _fill(self, world: World) -> None:
        super()._fill(world)
        weights = ItemTables.of_world(world, neighbours=0).inverse_exposures(self.popularity_power)[
            : world.n_items
        ]
        self.weights = torch.from_numpy(weights).to(self.device)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "SAC4IR",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SAC4IR:
        """Trains the agent; see Stable-Baselines3."""
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
        )

    def _slot_rewards(self, batch: SlateReplaySamples) -> Tensor:
        plain = super()._slot_rewards(batch)
        weights = self.weights[batch.items]
        # What wrappers add to the reward is no click, and is not debiased.
        return plain + batch.feedback * (weights / weights.mean() - 1.0)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "weights"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return modules, [*variables, "weights"]
