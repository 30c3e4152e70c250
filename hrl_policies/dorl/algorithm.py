"""DORL: A2C in a world model, with rewards that penalise its uncertainty and favour what varies in the log.

Gao et al., Alleviating Matthew Effect of Offline Reinforcement Learning in Interactive Recommendation, SIGIR 2023.
Differences from the article: observed states instead of the mean of the last three items; slates; sessions with the
library's own dynamics, in which clicks come from the world model. The original steps the true environment and takes
its exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import numpy as np
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from typing_extensions import Unpack

from hrl_policies.common.arguments import AlgorithmArguments
from hrl_policies.common.sessions import sessions_given
from hrl_policies.common.yaml_files import validated
from hrl_policies.dorl.simulation import (
    ExitKind,
    FeatureEntropy,
    LearnedResponse,
    item_levels,
    learned_sessions,
)
from hrl_policies.dorl.world_model import WorldModel, WorldModelSettings, WorldModelSizes, fit_world_model
from hrl_policies.worlds import session_seed
from kuaifair_env.errors import DataError

SelfDORL = TypeVar("SelfDORL", bound="DORL")


class A2CArguments(AlgorithmArguments, total=False):
    """What :class:`DORL` leaves to Stable-Baselines3's ``A2C``.

    Attributes:
        gae_lambda: Weight of longer returns in generalised advantage estimation, in ``[0, 1]``.
        ent_coef: Weight of the entropy.
        vf_coef: Weight of the value loss.
        max_grad_norm: Largest norm of a gradient.
        rms_prop_eps: Epsilon of RMSprop.
        use_sde: Whether exploration noise depends on the state (gSDE).
        sde_sample_freq: Steps for which a noise matrix of gSDE holds; -1 keeps it for a rollout.
        rollout_buffer_class: Class of the rollout buffer.
        rollout_buffer_kwargs: Its arguments.
        normalize_advantage: Whether advantages are normalised.
        policy_kwargs: Arguments of the policy.
    """

    gae_lambda: float
    ent_coef: float
    vf_coef: float
    max_grad_norm: float
    rms_prop_eps: float
    use_sde: bool
    sde_sample_freq: int
    rollout_buffer_class: type[RolloutBuffer] | None
    rollout_buffer_kwargs: dict[str, Any] | None
    normalize_advantage: bool
    policy_kwargs: dict[str, Any] | None


class DORL(A2C):
    """Offline, model-based A2C, which fits a world model to the training log and learns in it.

    ``learn`` never resets or steps the environment: it takes users, histories, items, settings and spaces from it, fits
    the ensemble on its first call, and plays sessions of its own. Callbacks see those as ``training_env``; their
    ``session`` records hold predicted clicks. The ensemble is saved and loaded with the policy.

    Args:
        policy: See Stable-Baselines3's A2C.
        env: KuaiFair sessions, purified or not.
        world_model: Arguments of :class:`~hrl_policies.dorl.world_model.WorldModelSettings`.
        uncertainty_weight: ``l1`` of the reward ``max(0, r - l1 P_U + l2 P_E - r_min)``.
        entropy_weight: ``l2`` of the reward.
        exits: ``"configured"`` applies the sessions' leave rule to predicted clicks, ``"none"`` plays every session to
            its cap.
        learning_rate: See Stable-Baselines3's A2C, like all that follows.
        n_steps: Steps of a rollout in each session.
        gamma: Discount.
        use_rms_prop: RMSprop instead of Adam.
        **kwargs: See :class:`A2CArguments`; the ensemble stays on the CPU, whatever the ``device``.

    Attributes:
        world_model_report: Report of the ensemble's fit; None before, and after parameters alone were restored.

    Raises:
        ValueError: If a setting is not valid.
        TypeError: If the environment is not a KuaiFair environment that can be modelled.
    """

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str | None,
        *,
        world_model: Mapping[str, Any] | None = None,
        uncertainty_weight: float = 0.01,
        entropy_weight: float = 0.05,
        exits: ExitKind = "configured",
        learning_rate: float | Schedule = 1e-3,
        n_steps: int = 16,
        gamma: float = 0.9,
        use_rms_prop: bool = False,
        _init_setup_model: bool = True,
        **kwargs: Unpack[A2CArguments],
    ) -> None:
        if exits not in get_args(ExitKind):
            raise ValueError(f"exits must be one of {get_args(ExitKind)}, got {exits!r}")
        if not (uncertainty_weight >= 0 and entropy_weight >= 0):
            raise ValueError(
                "uncertainty_weight and entropy_weight must not be negative, "
                f"got {uncertainty_weight} and {entropy_weight}"
            )
        # A plain dict, because settings are saved as JSON.
        self.world_model_settings = validated(WorldModelSettings, dict(world_model or {}), "world_model").model_dump()
        self.uncertainty_weight, self.entropy_weight, self.exits = uncertainty_weight, entropy_weight, exits
        self.world_model_sizes: dict[str, int] | None = None
        self.world_model_report: dict[str, Any] | None = None
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,
            gamma=gamma,
            use_rms_prop=use_rms_prop,
            _init_setup_model=_init_setup_model,
            **kwargs,
        )

    def _setup_model(self) -> None:
        super()._setup_model()
        if self.env is not None:
            world, _ = sessions_given(self.env, "DORL")
            self.world_model_sizes = vars(WorldModelSizes.of(world))
        assert self.world_model_sizes is not None
        self.world_model = WorldModel(
            WorldModelSizes(**self.world_model_sizes),
            WorldModelSettings(**self.world_model_settings),
            0 if self.seed is None else self.seed,
        )

    def learn(
        self: SelfDORL,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str = "DORL",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfDORL:
        """Fits the world model if that has not been done, and trains in it; see Stable-Baselines3.

        Raises:
            DataError: If this is a test world, or the training log does not allow a world model.
            ValueError: If there is no environment.
        """
        env, last_obs = self.env, self._last_obs
        if env is None:
            raise ValueError("DORL has no environment; call set_env, or load(..., env=...)")
        self.env = self._learned_sessions(env)
        self._last_obs = None
        try:
            return super().learn(
                total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar
            )
        finally:
            self.env, self._last_obs = env, last_obs

    def _learned_sessions(self, env: Any) -> Any:
        """Returns sessions in the world model, which is fitted now unless it was before."""
        world, _ = sessions_given(env, "DORL")
        if world.split != "train":
            raise DataError(f"DORL learns about the users of the training world, got the {world.split} world")
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if self.seed is None else self.seed
        if not bool(self.world_model.fitted):
            settings = WorldModelSettings(**self.world_model_settings)
            self.world_model_report = fit_world_model(self.world_model, world, settings, seed)
        return learned_sessions(
            env,
            LearnedResponse(self.world_model, world),
            FeatureEntropy.of_log(world.data.train, item_levels(world)),
            uncertainty_weight=self.uncertainty_weight,
            entropy_weight=self.entropy_weight,
            exits=self.exits,
            seed=session_seed(seed + self.num_timesteps),
        )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "world_model"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, variables = super()._get_torch_save_params()
        return [*modules, "world_model"], variables
