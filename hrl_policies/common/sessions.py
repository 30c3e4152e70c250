"""What algorithms are given: arguments by Stable-Baselines3's names, the sessions beneath a ``VecEnv``, their items."""

from __future__ import annotations

from typing import Any, TypedDict, TypeVar, cast

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    is_vecenv_wrapped,
    unwrap_vec_wrapper,
)

from dsrm.wrappers import DSRMObservationWrapper, VecDSRM
from kuaifair_env.adapters import changing_wrappers
from kuaifair_env.batch import SessionConfig
from kuaifair_env.catalogue import check_catalogues
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.sb3_files import check_finite
from kuaifair_env.world import World

SelfAmongItsItems = TypeVar("SelfAmongItsItems", bound="AmongItsItems")


class AlgorithmArguments(TypedDict, total=False):
    """What every algorithm takes; see Stable-Baselines3's ``BaseAlgorithm``.

    Attributes:
        stats_window_size: Episodes over which logged rewards and lengths are averaged.
        tensorboard_log: Folder of the TensorBoard log; None writes none.
        verbose: 0 prints nothing, 1 information, 2 debug messages.
        seed: Seed of everything random; None draws one.
        device: Device of the networks; ``"auto"`` takes a GPU if there is one.
    """

    stats_window_size: int
    tensorboard_log: str | None
    verbose: int
    seed: int | None
    device: torch.device | str


class OffPolicyArguments(AlgorithmArguments, total=False):
    """What every off-policy algorithm with a buffer of slates takes; see Stable-Baselines3's ``OffPolicyAlgorithm``.

    Attributes:
        tau: Step of the target networks, in ``(0, 1]``.
        train_freq: Steps between updates, or ``(number, "step" or "episode")``.
        gradient_steps: Gradient steps of an update; -1 takes as many as there were steps.
    """

    tau: float
    train_freq: int | tuple[int, str]
    gradient_steps: int


class AmongItsItems(BaseAlgorithm):
    """Base of the algorithms of this library, which say so where an environment has other items than they know.

    Stable-Baselines3 refuses such an environment as well, since its states are others, and prints both spaces.
    """

    @classmethod
    def load(cls: type[SelfAmongItsItems], path: Any, env: GymEnv | None = None, **kwargs: Any) -> SelfAmongItsItems:  # type: ignore[override]
        """Loads an agent; see Stable-Baselines3.

        Raises:
            ArtifactError: If a parameter is NaN or infinite.
            MismatchError: If the environment's items are not those that the agent was trained on.
            ValueError: If the environment's spaces are others.
        """
        try:
            agent = super().load(path, env, **kwargs)
        except ValueError:
            if env is not None:
                check_catalogues(super().load(path, **kwargs).observation_space, env.observation_space)
            raise
        check_finite(agent.get_parameters(), path)
        return agent

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Sets the environment; see Stable-Baselines3.

        Raises:
            MismatchError: If its items are not those that the agent was trained on.
        """
        check_catalogues(self.observation_space, env.observation_space)
        super().set_env(env, force_reset)


def sessions_given(env: VecEnv, agent: str) -> tuple[World, SessionConfig]:
    """Returns the world and settings of the sessions beneath an environment, for an agent that makes others like them.

    Args:
        env: A ``KuaiFairVecEnv`` or a ``DummyVecEnv`` over single KuaiFair environments, within ``VecDSRM`` and
            ``VecMonitor`` at most.
        agent: Name of the agent, for messages.

    Raises:
        TypeError: If it is not a KuaiFair environment, or a wrapper changes what agents see in a way that cannot be
            repeated over other sessions.
    """
    layer = env
    while isinstance(layer, VecEnvWrapper):
        if not isinstance(layer, (VecDSRM, VecMonitor)):
            raise TypeError(
                f"{agent} plays sessions of its own and cannot repeat {type(layer).__name__} over them; give it a "
                "KuaiFair environment with nothing but VecDSRM or VecMonitor around it"
            )
        layer = layer.venv
    if isinstance(layer, KuaiFairVecEnv):
        return layer.world, layer.config
    singles = layer.envs if isinstance(layer, DummyVecEnv) else []
    if not singles or not all(isinstance(single.unwrapped, KuaiFairEnv) for single in singles):
        raise TypeError(f"{agent} needs KuaiFair sessions beneath the environment, got {type(layer).__name__}")
    changing = [name for single in singles for name in changing_wrappers(single)]
    if changing:
        raise TypeError(
            f"{agent} plays sessions of its own and cannot repeat {changing[0]} over them; give it single KuaiFair "
            "environments as they are (to purify their states, VecDSRM around them all)"
        )
    bottom = cast(KuaiFairEnv, singles[0].unwrapped)
    return bottom.world, bottom.config


def is_purified(env: VecEnv) -> bool:
    """Returns whether agents of an environment see purified states."""
    return is_vecenv_wrapped(env, VecDSRM) or any(env.env_is_wrapped(DSRMObservationWrapper))


def purified_like(env: VecEnv, sessions: VecEnv) -> VecEnv:
    """Returns sessions within the purifier that is around an environment, if there is one, as far as it has learned."""
    around = unwrap_vec_wrapper(env, VecDSRM)
    return sessions if around is None else VecDSRM(sessions, around.learned(), learns=around.learns)


def allowed_items(env: VecEnv) -> BoolArray | None:
    """Returns the items that the sessions beneath a ``VecEnv`` may be shown now, ``bool (B, N)``; None for all."""
    if isinstance(env.unwrapped, KuaiFairVecEnv):
        return env.unwrapped.batch.simulator.allowed
    if world_beneath(env) is None or env.get_attr("config", indices=0)[0].repeats == "allow":
        return None
    return np.stack(env.env_method("action_masks"))
