"""Wrappers that put a purifier between an environment and any agent: single, Gymnasium vector, Stable-Baselines3.

A state is purified once, when the environment gives it, and never again in an optimizer's epochs. The last observation
of an episode is purified too, with the window of the session that ended.

What lies beneath must leave observations as they are; wrappers that normalise or stack them go on top.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from dsrm.purified_observations import PurifiedRows, as_purifier, check_observed, recorded
from dsrm.purifier import StatePurifier
from kuaifair_env.data.schema import IntArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.observations import stack_observations, take_rows
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.session_view import FixedSettings
from kuaifair_env.vector_env import KuaiFairVectorEnv


class DSRMObservationWrapper(FixedSettings, RecordConstructorArgs, gym.Wrapper[Any, Any, Any, Any]):
    """Purifies the observations of a single KuaiFair environment.

    In ``state`` mode the observation is the purified state; in ``history`` mode the entry ``state`` is.
    ``gym.make(env.spec)`` makes the same environment again; its specification can be written as JSON
    (``env.spec.to_json()``) where the purifier was given as a path.

    Args:
        env: A KuaiFair environment, wrapped or not.
        purifier: The purifier, or the path of its file.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair environment, or a wrapper beneath changes observations.
    """

    def __init__(self, env: gym.Env[Any, Any], purifier: StatePurifier | str | Path) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, purifier=recorded(purifier))
        gym.Wrapper.__init__(self, env)
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, KuaiFairEnv):
            raise TypeError(f"DSRMObservationWrapper needs a KuaiFair environment, got {type(unwrapped).__name__}")
        check_observed(env, unwrapped.world, unwrapped.config, DSRMObservationWrapper)
        self.purifier = as_purifier(purifier)
        self._observations = PurifiedRows(
            self.purifier, env.observation_space, unwrapped.world, unwrapped.history_window
        )
        self.observation_space = self._observations.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a session; see ``KuaiFairEnv.reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._purify(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Shows a slate; see ``KuaiFairEnv.step``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._purify(observation), reward, terminated, truncated, info

    def _purify(self, observation: Any) -> Any:
        return take_rows(self._observations.purify(stack_observations([observation])), 0)


class DSRMVectorWrapper(FixedSettings, VectorWrapper):
    """Purifies the observations of a batched KuaiFair environment (``gym.make_vec``), in any autoreset mode.

    Args:
        env: A KuaiFair vector environment.
        purifier: The purifier, or the path of its file.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair vector environment, or a wrapper beneath changes observations.
    """

    def __init__(self, env: VectorEnv[Any, Any, Any], purifier: StatePurifier | str | Path) -> None:
        super().__init__(env)
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, KuaiFairVectorEnv):
            raise TypeError(
                f"DSRMVectorWrapper needs a KuaiFair vector environment, got {type(unwrapped).__name__}; make one "
                "with gym.make_vec(id, n, vectorization_mode='vector_entry_point')"
            )
        check_observed(env, unwrapped.world, unwrapped.config, DSRMVectorWrapper)
        self.purifier = as_purifier(purifier)
        self._sessions = unwrapped
        self._observations = PurifiedRows(
            self.purifier, env.single_observation_space, unwrapped.world, unwrapped.history_window
        )
        self.single_observation_space = self._observations.space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts sessions; see ``KuaiFairVectorEnv.reset``."""
        # The base class only knows one seed for all; KuaiFair's environments take one for each row as well.
        observations, info = self.env.reset(seed=cast(Any, seed), options=options)
        return self._observations.purify(observations), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Shows slates; see ``KuaiFairVectorEnv.step``. ``final_obs`` is purified too."""
        observations, reward, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            window = self._sessions.batch.finished_window
            assert window is not None
            ended = np.flatnonzero(info["_final_obs"])
            final = info["final_obs"].copy()
            for row, last in zip(ended, self._observations.purify_last(final[ended], window), strict=True):
                final[row] = last
            info["final_obs"] = final
        return self._observations.purify(observations), reward, terminated, truncated, info


class VecDSRM(FixedSettings, VecEnvWrapper):
    """Purifies the observations of a Stable-Baselines3 environment, all sessions at once.

    Takes a :class:`~kuaifair_env.sb3.KuaiFairVecEnv`, wrapped or not, and any ``VecEnv`` over single KuaiFair
    environments (``make_vec_env``, ``DummyVecEnv``, ``SubprocVecEnv``).

    Args:
        venv: The environment.
        purifier: The purifier, or the path of its file.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If there are no KuaiFair sessions beneath, or a wrapper beneath changes observations.
    """

    def __init__(self, venv: VecEnv, purifier: StatePurifier | str | Path) -> None:
        world = world_beneath(venv)
        if world is None:
            raise TypeError(f"VecDSRM needs KuaiFair sessions beneath, got {type(venv.unwrapped).__name__}")
        check_observed(venv, world, venv.get_attr("config", indices=0)[0], VecDSRM)
        self.purifier = as_purifier(purifier)
        self._observations = PurifiedRows(self.purifier, venv.observation_space, world, self._windows)
        super().__init__(venv, self._observations.space)

    def reset(self) -> Any:
        """Starts sessions."""
        return self._observations.purify(self.venv.reset())

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates; ``terminal_observation`` is purified too."""
        observations, reward, done, infos = self.venv.step_wait()
        ended = np.flatnonzero(done)
        if len(ended):
            last = [infos[row]["terminal_observation"] for row in ended]
            purified = self._observations.purify_last(last, self._finished_windows(ended))
            for row, observation in zip(ended, purified, strict=True):
                infos[row]["terminal_observation"] = observation
        return self._observations.purify(observations), reward, done, infos

    def _windows(self, length: int | None) -> HistoryWindow:
        sessions = self.venv.unwrapped
        if isinstance(sessions, KuaiFairVecEnv):
            return sessions.history_window(length)
        return HistoryWindow.concatenate(self.venv.env_method("history_window", length))

    def _finished_windows(self, rows: IntArray) -> HistoryWindow:
        sessions = self.venv.unwrapped
        if isinstance(sessions, KuaiFairVecEnv):
            assert sessions.batch.finished_window is not None
            return sessions.batch.finished_window
        return HistoryWindow.concatenate(self.venv.get_attr("finished_window", indices=rows.tolist()))
