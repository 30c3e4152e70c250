"""Wrappers that put a purifier between an environment and any agent: single, Gymnasium vector, Stable-Baselines3.

A state is purified once, when the environment gives it, and never again in an optimizer's epochs. The last observation
of an episode is purified too, with the window of the session that ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from dsrm.purifier import StatePurifier, history_length_of, purified_space
from kuaifair_env.data.schema import IntArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.observations import extended_space, stack_observations, state_of, take_rows, with_state
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.session_view import FixedSettings
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import World

_STATE = "state"


class DSRMObservationWrapper(FixedSettings, gym.Wrapper[Any, Any, Any, Any]):
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
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, KuaiFairEnv):
            raise TypeError(f"DSRMObservationWrapper needs a KuaiFair environment, got {type(unwrapped).__name__}")
        self._sessions = unwrapped
        self._observations = _PurifiedObservations(dsrm, env.observation_space, unwrapped.world)
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
        window = self._sessions.history_window(self._observations.length)
        return self._observations.purify_each([observation], window)[0]


class DSRMVectorWrapper(FixedSettings, VectorWrapper):
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
        unwrapped = env.unwrapped
        if not isinstance(unwrapped, KuaiFairVectorEnv):
            raise TypeError(
                f"DSRMVectorWrapper needs a KuaiFair vector environment, got {type(unwrapped).__name__}; make one "
                "with gym.make_vec(id, n, vectorization_mode='vector_entry_point')"
            )
        self._sessions = unwrapped
        self._observations = _PurifiedObservations(dsrm, env.single_observation_space, unwrapped.world)
        self.single_observation_space = self._observations.space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts sessions; see ``KuaiFairVectorEnv.reset``."""
        # The base class only knows one seed for all; KuaiFair's environments take one for each row as well.
        observations, info = self.env.reset(seed=cast(Any, seed), options=options)
        return self._observations.purify(observations, self._windows()), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Shows slates; see ``KuaiFairVectorEnv.step``. ``final_obs`` is purified too."""
        observations, reward, terminated, truncated, info = self.env.step(actions)
        if "final_obs" in info:
            window = self._sessions.batch.finished_window
            assert window is not None
            ended = np.flatnonzero(info["_final_obs"])
            final = info["final_obs"].copy()
            for row, last in zip(ended, self._observations.purify_each(final[ended], window), strict=True):
                final[row] = last
            info["final_obs"] = final
        return self._observations.purify(observations, self._windows()), reward, terminated, truncated, info

    def _windows(self) -> HistoryWindow:
        return self._sessions.history_window(self._observations.length)


class VecDSRM(FixedSettings, VecEnvWrapper):
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
        world = world_beneath(venv)
        if world is None:
            raise TypeError(f"VecDSRM needs KuaiFair sessions beneath, got {type(venv.unwrapped).__name__}")
        self.dsrm = dsrm
        self._observations = _PurifiedObservations(dsrm, venv.observation_space, world)
        super().__init__(venv, self._observations.space)

    def reset(self) -> Any:
        """Starts sessions."""
        return self._observations.purify(self.venv.reset(), self._windows())

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates; ``terminal_observation`` is purified too."""
        observations, reward, done, infos = self.venv.step_wait()
        ended = np.flatnonzero(done)
        if len(ended):
            last = [infos[row]["terminal_observation"] for row in ended]
            purified = self._observations.purify_each(last, self._finished_windows(ended))
            for row, observation in zip(ended, purified, strict=True):
                infos[row]["terminal_observation"] = observation
        return self._observations.purify(observations, self._windows()), reward, done, infos

    def _windows(self) -> HistoryWindow:
        sessions = self.venv.unwrapped
        if isinstance(sessions, KuaiFairVecEnv):
            return sessions.history_window(self._observations.length)
        return HistoryWindow.concatenate(self.venv.env_method("history_window", self._observations.length))

    def _finished_windows(self, rows: IntArray) -> HistoryWindow:
        sessions = self.venv.unwrapped
        if isinstance(sessions, KuaiFairVecEnv):
            assert sessions.batch.finished_window is not None
            return sessions.batch.finished_window
        return HistoryWindow.concatenate(self.venv.get_attr("finished_window", indices=rows.tolist()))


class _PurifiedObservations:
    """Puts purified states in the place of observed ones, be the observations arrays or dicts.

    What follows the observed state (the session clock) follows the purified one as it is.

    Attributes:
        space: Space of a purified observation.
        length: How many places of what users saw the purifier takes; None for all.
    """

    def __init__(self, dsrm: StatePurifier, space: spaces.Space[Any], world: World) -> None:
        if isinstance(space, spaces.Dict) and _STATE not in space.spaces:
            raise TypeError(f"the observation has no entry '{_STATE}' to purify, only {sorted(space.spaces)}")
        self._dsrm = dsrm
        self.length = history_length_of(dsrm, world)
        self._dimension = world.dimension
        observed = state_of(space)
        low, high = observed.low[world.dimension :], observed.high[world.dimension :]
        self.space: spaces.Space[Any] = with_state(space, extended_space(purified_space(dsrm, world), low, high))

    def purify(self, observations: Any, window: HistoryWindow) -> Any:
        """Returns a batch of observations with purified states; of the windows, only the last places are read."""
        states = state_of(observations)
        observed, added = states[:, : self._dimension], states[:, self._dimension :]
        purified = self._dsrm.purify(observed, window.last(self.length))
        return with_state(observations, np.concatenate([purified, added], axis=1) if added.shape[1] else purified)

    def purify_each(self, observations: Sequence[Any], window: HistoryWindow) -> list[Any]:
        """Returns single observations with purified states, purified as one batch."""
        purified = self.purify(stack_observations(observations), window)
        return [take_rows(purified, row) for row in range(len(observations))]
