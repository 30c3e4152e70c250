"""Sessions of an agent's own, like those that it was given: same settings, same purifier, another world or users."""

from __future__ import annotations

from typing import cast

from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecMonitor

from dsrm.wrappers import VecDSRM
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.evaluation import changing_wrappers
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World


def sessions_given(env: VecEnv, agent: str) -> tuple[World, SessionConfig]:
    """Returns the world and settings of the sessions beneath an environment.

    Args:
        env: A ``KuaiFairVecEnv`` or a ``DummyVecEnv`` over single KuaiFair environments, within ``VecDSRM`` and
            ``VecMonitor`` at most.
        agent: Who asks, for messages.

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
        raise TypeError(
            f"{agent} needs KuaiFair sessions beneath the environment, got {type(layer).__name__}"
        )
    changed = [name for single in singles for name in changing_wrappers(single)]
    if changed:
        raise TypeError(
            f"{agent} plays sessions of its own and cannot repeat {changed[0]} over them; give it single KuaiFair "
            "environments as they are (to purify their states, VecDSRM around them all)"
        )
    bottom = cast(KuaiFairEnv, singles[0].unwrapped)
    return bottom.world, bottom.config


def purified_like(env: VecEnv, sessions: VecEnv) -> VecEnv:
    """Returns sessions within the purifiers that are around an environment."""
    purifiers = []
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecDSRM):
            purifiers.append(env.dsrm)
        env = env.venv
    for purifier in reversed(purifiers):
        sessions = VecDSRM(sessions, purifier)
    return sessions
