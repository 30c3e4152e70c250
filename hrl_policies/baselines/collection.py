"""Transitions that a behaviour policy collects in the training world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped

from hrl_policies.baselines.transitions import LoggedTransitions
from hrl_policies.hierarchical.algorithm import with_terminal
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import DataError
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath


class BehaviourPolicy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns actions for a batch of observations, and the next ``state``."""
        ...


class NoisyState:
    """Shows what is near the observed state, with noise: a behaviour of mixed quality for embedding actions.

    The action is ``s~ / |s~| + scale * g / sqrt(d)`` with standard normal ``g``, scaled to length 1.

    Args:
        scale: Length of the noise beside the state's 1.
        seed: Seed of the noise.
    """

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        if scale < 0:
            raise ValueError(f"scale is not negative, got {scale}")
        self._scale = scale
        self._rng = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[FloatArray, Any]:
        """Returns ``float32 (B, d)`` actions; ``deterministic`` leaves the noise out."""
        states = np.asarray(observation, np.float32)
        direction = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-6)
        if not deterministic:
            noise = self._rng.standard_normal(states.shape) / np.sqrt(states.shape[-1])
            direction = direction + self._scale * noise
        length = np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-6)
        return np.clip(direction / length, -1.0, 1.0).astype(np.float32), state


def collect_transitions(
    policy: BehaviourPolicy,
    env: VecEnv,
    steps: int,
    seed: int = 0,
    *,
    deterministic: bool = False,
    behaviour: Mapping[str, Any] | None = None,
) -> LoggedTransitions:
    """Lets a policy play in the training world and keeps what happened.

    Sessions that still run at the end are truncated. KuaiFair's own ``VecEnv`` gives each item's feedback
    (``slot_rewards``) too, where actions are item ids. Other environments (control tasks) are taken as they are.

    Args:
        policy: Who acts.
        env: Sessions of the training world, purified or not; they are reset.
        steps: Transitions at least; the number is rounded up to a whole step of all sessions.
        seed: Seed of the sessions, and of what the policy draws from torch.
        deterministic: Passed to ``predict``.
        behaviour: What to say of the policy in the provenance, JSON-able; its class is always said.

    Raises:
        DataError: If the environment plays the test world.
        ValueError: If ``steps`` is less than 1, observations are not a ``Box``, or ``VecNormalize`` changes them.
    """
    world = world_beneath(env)
    if world is not None and world.split != "train":
        raise DataError(f"transitions are collected in the training world, got the {world.split} world")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not isinstance(env.observation_space, spaces.Box):
        raise ValueError(
            f"offline methods observe a Box (observation_mode='state'), not {env.observation_space}"
        )
    if is_vecenv_wrapped(env, VecNormalize):
        raise ValueError("logged transitions are not normalised; collect without VecNormalize")
    rounds = -(-steps // env.num_envs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        played = _play(policy, env, rounds, seed, deterministic)
    return LoggedTransitions(
        **played,
        observation_space=env.observation_space,
        action_space=env.action_space,
        provenance={
            "source": "env_behaviour",
            "behaviour": {"policy": type(policy).__name__, **(behaviour or {})},
            "deterministic": deterministic,
            "seed": seed,
            "num_envs": env.num_envs,
            **({} if world is None else {"split": world.split, "data": world.describe()["data"]}),
        },
    )


def _play(
    policy: BehaviourPolicy, env: VecEnv, rounds: int, seed: int, deterministic: bool
) -> dict[str, Any]:
    """Plays and returns the arrays of :class:`LoggedTransitions`, session after session."""
    bottom = env.unwrapped
    batch = bottom.batch if isinstance(bottom, KuaiFairVecEnv) else None
    named = batch is not None and batch.config.action_mode != "embedding"
    bind = getattr(policy, "bind", None)
    if batch is not None and bind is not None:
        bind(batch)
    continuous = isinstance(env.action_space, spaces.Box)
    parts: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    env.seed(seed)
    observation: Any = env.reset()
    state, starts = None, np.ones(env.num_envs, np.bool_)
    for _ in range(rounds):
        actions, state = policy.predict(observation, state, starts, deterministic)
        following, rewards, done, infos = env.step(actions)
        cut = np.asarray([bool(info.get("TimeLimit.truncated", False)) for info in infos]) & done
        row = {
            "observations": observation,
            "actions": np.array(actions, np.float32 if continuous else np.int64),
            "rewards": rewards,
            "next_observations": with_terminal(following, infos, np.flatnonzero(done)),
            "terminated": done & ~cut,
            "truncated": cut,
        }
        for name, values in row.items():
            parts[name].append(values)
        if named and batch is not None and batch.outcome is not None:
            parts["slot_rewards"].append(batch.outcome.feedback)
        observation, starts = following, done
    parts["truncated"][-1] |= ~parts["terminated"][-1]
    return {name: _in_sessions(values, _DTYPES.get(name)) for name, values in parts.items() if values}


_COLUMNS = (
    "observations", "actions", "rewards", "next_observations", "terminated", "truncated", "slot_rewards",
)  # fmt: skip
_DTYPES = dict.fromkeys(("observations", "rewards", "next_observations", "slot_rewards"), np.float32)


def _in_sessions(parts: list[Any], dtype: Any) -> Any:
    """Turns rounds of ``(B, ...)`` into ``(B * rounds, ...)``, each row of the batch in one piece."""
    stacked = np.stack(parts, axis=1)
    return np.ascontiguousarray(stacked.reshape(-1, *stacked.shape[2:]), dtype or stacked.dtype)
