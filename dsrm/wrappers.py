"""Wrappers that put a purifier between an environment and any agent: single, Gymnasium vector, Stable-Baselines3.

A state is purified once, when the environment gives it, and never again in an optimiser's epochs. What an episode
ends with is purified too, with the window of the session that ended.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from dsrm.purifier import StatePurifier
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.spaces import stack_observations, take_rows
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import World

_STATE = "state"


class DSRMObservationWrapper(gym.Wrapper[Any, Any, Any, Any]):
    """Purifies the observations of a single KuaiFair environment.

    In ``state`` mode the observation is the purified state; in ``history`` mode the entry ``state`` is.

    Args:
        env: A KuaiFair environment, wrapped or not; wrappers below must leave observations as they are.
        dsrm: The purifier.

    Raises:
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair environment.
    """

    def __init__(self, env: gym.Env[Any, Any], dsrm: StatePurifier) -> None:
        super().__init__(env)
        bottom = env.unwrapped
        if not isinstance(bottom, KuaiFairEnv):
            raise TypeError(f"DSRMObservationWrapper needs a KuaiFair environment, got {_name(bottom)}")
        self._bottom = bottom
        self._dsrm = dsrm
        self.observation_space = _space(env.observation_space, dsrm, bottom.world)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts a session; see ``KuaiFairEnv.reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._purified(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Shows a slate; see ``KuaiFairEnv.step``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._purified(observation), reward, terminated, truncated, info

    def _purified(self, observation: Any) -> Any:
        stacked = _purify(self._dsrm, stack_observations([observation]), self._bottom.history_window())
        return take_rows(stacked, 0)


class DSRMVectorWrapper(VectorWrapper):
    """Purifies the observations of a batched KuaiFair environment (``gym.make_vec``), in any autoreset mode.

    Args:
        env: A KuaiFair vector environment.
        dsrm: The purifier.

    Raises:
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair vector environment.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], dsrm: StatePurifier) -> None:
        super().__init__(env)
        bottom = env.unwrapped
        if not isinstance(bottom, KuaiFairVectorEnv):
            raise TypeError(
                f"DSRMVectorWrapper needs a KuaiFair vector environment, got {_name(bottom)}; make one with "
                "gym.make_vec(id, n, vectorization_mode='vector_entry_point')"
            )
        self._bottom = bottom
        self._dsrm = dsrm
        self.single_observation_space = _space(env.single_observation_space, dsrm, bottom.world)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts sessions; see ``KuaiFairVectorEnv.reset``."""
        # The base class only knows one seed for all; KuaiFair's environments take one for each row as well.
        observation, info = self.env.reset(seed=cast(Any, seed), options=options)
        return _purify(self._dsrm, observation, self._bottom.history_window()), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Shows slates; see ``KuaiFairVectorEnv.step``."""
        observation, reward, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            window = self._bottom.batch.finished_window
            assert window is not None
            ended = np.flatnonzero(info["_final_obs"])
            final = _purify(self._dsrm, stack_observations(list(info["final_obs"][ended])), window)
            info["final_obs"] = info["final_obs"].copy()
            for place, row in enumerate(ended):
                info["final_obs"][row] = take_rows(final, place)
        purified = _purify(self._dsrm, observation, self._bottom.history_window())
        return purified, reward, terminated, truncated, info


class VecDSRM(VecEnvWrapper):
    """Purifies the observations of a Stable-Baselines3 environment, all sessions at once.

    Takes a :class:`~kuaifair_env.sb3.KuaiFairVecEnv`, wrapped or not, and any ``VecEnv`` over single KuaiFair
    environments (``make_vec_env``, ``DummyVecEnv``, ``SubprocVecEnv``).

    Args:
        venv: The environment; wrappers below must leave observations as they are (``VecNormalize`` goes on top).
        dsrm: The purifier.

    Raises:
        MismatchError: If the purifier was made for another world.
        TypeError: If there are no KuaiFair sessions beneath.
    """

    def __init__(self, venv: VecEnv, dsrm: StatePurifier) -> None:
        self._sessions: _Native | _Foreign
        bottom = venv.unwrapped
        self._sessions = _Native(bottom) if isinstance(bottom, KuaiFairVecEnv) else _Foreign(venv)
        self.dsrm = dsrm
        super().__init__(venv, _space(venv.observation_space, dsrm, self._sessions.world))

    def reset(self) -> Any:
        """Starts sessions."""
        return _purify(self.dsrm, self.venv.reset(), self._sessions.windows())

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates; ``terminal_observation`` is purified too."""
        observation, reward, done, infos = self.venv.step_wait()
        ended = np.flatnonzero(done)
        if len(ended):
            last = stack_observations([infos[row]["terminal_observation"] for row in ended])
            purified = _purify(self.dsrm, last, self._sessions.finished(ended))
            for place, row in enumerate(ended):
                infos[row]["terminal_observation"] = take_rows(purified, place)
        return _purify(self.dsrm, observation, self._sessions.windows()), reward, done, infos


class _Native:
    """The sessions of a ``KuaiFairVecEnv``."""

    def __init__(self, env: KuaiFairVecEnv) -> None:
        self._env = env
        self.world = env.world

    def windows(self) -> HistoryWindow:
        return self._env.history_window()

    def finished(self, rows: Any) -> HistoryWindow:
        window = self._env.batch.finished_window
        assert window is not None
        return window


class _Foreign:
    """Single environments in a ``VecEnv`` that knows nothing of them."""

    def __init__(self, venv: VecEnv) -> None:
        try:
            worlds = venv.get_attr("world", indices=0)
        except AttributeError as error:
            raise TypeError(
                f"VecDSRM needs KuaiFair sessions beneath, got {_name(venv.unwrapped)}"
            ) from error
        self._venv = venv
        self.world = cast(World, worlds[0])

    def windows(self) -> HistoryWindow:
        return _joined(self._venv.env_method("history_window"))

    def finished(self, rows: Any) -> HistoryWindow:
        return _joined(self._venv.get_attr("finished_window", indices=rows.tolist()))


def _space(space: spaces.Space[Any], dsrm: StatePurifier, world: World) -> spaces.Space[Any]:
    purified = dsrm.bind(world)
    if isinstance(space, spaces.Dict):
        if _STATE not in space.spaces:
            raise TypeError(f"the observation has no entry '{_STATE}' to purify, only {sorted(space.spaces)}")
        return spaces.Dict({**space.spaces, _STATE: purified})
    return purified


def _purify(dsrm: StatePurifier, observation: Any, window: HistoryWindow) -> Any:
    if isinstance(observation, dict):
        return {**observation, _STATE: dsrm.purify(observation[_STATE], window)}
    return dsrm.purify(observation, window)


def _joined(windows: list[HistoryWindow]) -> HistoryWindow:
    return HistoryWindow(
        np.concatenate([window.items for window in windows]),
        np.concatenate([window.clicks for window in windows]),
    )


def _name(env: Any) -> str:
    return type(env).__name__
