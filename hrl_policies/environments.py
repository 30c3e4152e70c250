"""The sessions that a method of the zoo learns from, and those in which it is evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hrl_policies.worlds import cached_purifier
from hrl_policies.zoo import MethodSpec, load_settings, method
from kuaifair_env.batch import SessionConfig
from kuaifair_env.randomisation import varied
from kuaifair_env.registration import world_and_config
from kuaifair_env.world import World

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv
    from typing_extensions import Unpack

    from dsrm.purifier import StatePurifier
    from kuaifair_env.registration import Settings

SEED_LIMIT = 2**31
_SEED_STRIDE = 1_000_003
_EVALUATION_SESSIONS = 100


def make_training_env(
    method_name: str,
    env_id: str,
    n_envs: int | None = None,
    seed: int = 0,
    purifier: StatePurifier | str | Path | None = None,
    **settings: Unpack[Settings],
) -> VecEnv:
    """Makes the sessions that a method learns from, with all that belongs to the method.

    That is its action and observation mode, the tastes of their own that its training users have
    (:mod:`kuaifair_env.randomisation`) and its purifier, which is pretrained on first use and then cached.

    Args:
        method_name: Name in the zoo, such as ``"dsrm-hrl"``.
        env_id: A registered id, such as ``"KuaiFair-Toy-v0"``.
        n_envs: Concurrent sessions; None takes the method's number.
        seed: Seed of sessions and tastes.
        purifier: A purifier, or its file, instead of the method's.
        **settings: Other settings of world and sessions; see :class:`kuaifair_env.registration.Settings`.

    Raises:
        ValueError: If the method, the id or a setting is unknown.
    """
    spec = method(method_name)
    world, config = world_and_config(env_id, {**_modes(spec), **settings, "split": "train"})
    shipped = load_settings(method_name, env_id)
    return training_sessions(
        world,
        config,
        shipped.n_envs if n_envs is None else n_envs,
        seed,
        taste_noise=shipped.taste_noise,
        purifier=_purifier(spec, world, purifier),
    )


def make_evaluation_env(
    method_name: str,
    env_id: str,
    n_envs: int = _EVALUATION_SESSIONS,
    seed: int = 0,
    purifier: StatePurifier | str | Path | None = None,
    **settings: Unpack[Settings],
) -> VecEnv:
    """Makes sessions of the test world, observed as the method observes in training; for ``kuaifair_env.evaluate``.

    Args:
        method_name: See :func:`make_training_env`.
        env_id: See :func:`make_training_env`.
        n_envs: Concurrent sessions.
        seed: Seed of the sessions.
        purifier: See :func:`make_training_env`.
        **settings: See :func:`make_training_env`.

    Raises:
        ValueError: If the method, the id or a setting is unknown.
    """
    spec = method(method_name)
    given = {**_modes(spec), **settings}
    test, config = world_and_config(env_id, {**given, "split": "test"})
    if purifier is None and spec.purifier:
        # Purifiers are pretrained in the training world, whichever world they are used in.
        train, _ = world_and_config(env_id, {**given, "split": "train"})
        purifier = _purifier(spec, train, None)
    return purified_sessions(test, config, n_envs, seed, _purifier(spec, test, purifier))


def training_sessions(
    world: World,
    config: SessionConfig,
    n_envs: int,
    seed: int,
    *,
    taste_noise: float = 0.0,
    purifier: StatePurifier | None = None,
) -> VecEnv:
    """Returns sessions of a training world whose users also have tastes of their own.

    Args:
        world: The training world.
        config: How sessions run.
        n_envs: Concurrent sessions.
        seed: Seed of sessions and tastes.
        taste_noise: Deviation of the tastes, in log-odds; 0 leaves users as they are.
        purifier: The purifier of their states.
    """
    return purified_sessions(varied(world, taste_noise, seed), config, n_envs, session_seed(seed), purifier)


def purified_sessions(
    world: World, config: SessionConfig, n_envs: int, seed: int, purifier: StatePurifier | None
) -> VecEnv:
    """Returns sessions of a world, with purified states if there is a purifier."""
    from dsrm.wrappers import VecDSRM
    from kuaifair_env.sb3 import KuaiFairVecEnv

    env = KuaiFairVecEnv(world, config, n_envs, seed)
    return env if purifier is None else VecDSRM(env, purifier)


def session_seed(seed: int) -> int:
    """Returns the seed of the sessions that belongs to a training seed.

    Row ``i`` of seed ``s`` plays stream ``s + i``, so neighbouring training seeds would meet the same users with the
    same random numbers; the seeds of their sessions are far apart.
    """
    return (seed * _SEED_STRIDE) % SEED_LIMIT


def _modes(spec: MethodSpec) -> Settings:
    return {"action_mode": spec.action_mode, "observation_mode": spec.observation_mode}


def _purifier(
    spec: MethodSpec, world: World, purifier: StatePurifier | str | Path | None
) -> StatePurifier | None:
    """Returns the purifier that is given, or else the method's own, if it has one."""
    from dsrm.purifier import load_purifier

    if purifier is None and spec.purifier:
        purifier = cached_purifier(world, spec.purifier)
    return load_purifier(purifier) if isinstance(purifier, (str, Path)) else purifier
