"""Wrappers that put a purifier between an environment and any agent: single, Gymnasium vector, Stable-Baselines3.

A state is purified once, when the environment gives it, and never again in an optimizer's epochs. The last observation
of an episode is purified too, with what the user of the session that ended saw.

What lies beneath must leave observations as they are; wrappers that normalise or stack them go on top.

A :class:`~dsrm.belief_purifier.BeliefPurifier` may go on learning inside its wrapper what all users share. With
``learns=True`` it does so in every step, while agents train. :func:`kuaifair_env.serve` has it learn whatever
``learns`` says, and an evaluation has it learn nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import VectorEnv, VectorWrapper
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from dsrm.belief import Belief
from dsrm.belief_purifier import BeliefObservations, BeliefPurifier, HasBatch
from dsrm.candidates import CandidateObservations, CandidatePurifier
from dsrm.purified_observations import PurifiedRows, SessionObservations, as_purifier, check_observed, recorded
from dsrm.purifier import StatePurifier, save_purifier
from kuaifair_env.data.schema import IntArray
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.observations import stack_observations, take_rows
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.session_view import FixedSettings
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import World

if TYPE_CHECKING:
    from typing_extensions import Self


class Purifying(FixedSettings):
    """What wrappers that purify have in common.

    Attributes:
        purifier: The purifier, as it was given.
        belief: What a belief has learned of all users; None for purifiers that learn nothing.
        learns: Whether it goes on learning.
    """

    purifier: StatePurifier
    belief: Belief | None
    learns: bool
    _observations: SessionObservations
    _world: World

    def _purify_with(
        self, purifier: StatePurifier, observations: SessionObservations, world: World, learns: bool
    ) -> None:
        """Sets what the wrapper purifies with.

        Raises:
            ValueError: If the purifier is to learn and cannot.
        """
        if learns and not isinstance(observations, BeliefObservations):
            raise ValueError("learns=True is for beliefs (BeliefPurifier); this purifier stays as it was pretrained")
        self.purifier, self._observations, self._world, self.learns = purifier, observations, world, learns
        self.belief = observations.belief if isinstance(observations, BeliefObservations) else None

    def learned(self) -> StatePurifier:
        """Returns the purifier with what it has learned of all users, for other environments to begin with."""
        if self.belief is None:
            return self.purifier
        return cast(BeliefPurifier, self.purifier).with_learned(self.belief, self._world)

    def save(self, path: str | Path) -> None:
        """Writes purifier and what it has learned of all users to one safetensors file, for :meth:`load`.

        It is what belongs beside an agent's file, as ``VecNormalize`` does. Running sessions are not kept.

        Raises:
            ArtifactError: If the purifier is none of this library's, or the path is a folder.
        """
        save_purifier(self.learned(), path)

    @classmethod
    def load(cls, path: str | Path, env: Any, **settings: Any) -> Self:
        """Puts what :meth:`save` wrote around an environment; the same as giving the path to the constructor.

        Args:
            path: The file.
            env: The environment.
            **settings: Other arguments of the constructor.
        """
        return cls(env, path, **settings)  # type: ignore[call-arg]

    def served_state(self) -> dict[str, Any]:
        """Returns all that is known, of all users and of running sessions, as arrays and numbers."""
        return cast(BeliefObservations, self._observations).state()

    def restore_served(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`served_state` returned."""
        cast(BeliefObservations, self._observations).restore(state)


class DSRMObservationWrapper(Purifying, RecordConstructorArgs, gym.Wrapper[Any, Any, Any, Any]):
    """Purifies the observations of a single KuaiFair environment.

    In ``state`` mode the observation is the purified state; in ``history`` mode the entry ``state`` is.
    ``gym.make(env.spec)`` makes the same environment again; its specification can be written as JSON
    (``env.spec.to_json()``) where the purifier was given as a path.

    Args:
        env: A KuaiFair environment, wrapped or not.
        purifier: The purifier, or the path of its file.
        learns: Whether a belief goes on learning what all users share.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair environment, or a wrapper beneath changes observations.
        ValueError: If the purifier is to learn and cannot.
    """

    def __init__(self, env: gym.Env[Any, Any], purifier: StatePurifier | str | Path, learns: bool = False) -> None:
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, purifier=recorded(purifier), learns=learns)
        gym.Wrapper.__init__(self, env)
        sessions = env.unwrapped
        if not isinstance(sessions, KuaiFairEnv):
            raise TypeError(f"DSRMObservationWrapper needs a KuaiFair environment, got {type(sessions).__name__}")
        check_observed(env, sessions.world, sessions.config, DSRMObservationWrapper)
        given = as_purifier(purifier)
        self._purify_with(given, _of_batch(given, env.observation_space, sessions), sessions.world, learns)
        self.observation_space = self._observations.space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Starts a session; see ``KuaiFairEnv.reset``."""
        observation, info = self.env.reset(seed=seed, options=options)
        return take_rows(self._observations.started(stack_observations([observation]), self.learns), 0), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Shows a slate; see ``KuaiFairEnv.step``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        purified = self._observations.stepped(stack_observations([observation]), self.learns)
        return take_rows(purified, 0), reward, terminated, truncated, info


class DSRMVectorWrapper(Purifying, VectorWrapper):
    """Purifies the observations of a batched KuaiFair environment (``gym.make_vec``), in any autoreset mode.

    Args:
        env: A KuaiFair vector environment.
        purifier: The purifier, or the path of its file.
        learns: Whether a belief goes on learning what all users share.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If the environment is not a KuaiFair vector environment, or a wrapper beneath changes observations.
        ValueError: If the purifier is to learn and cannot.
    """

    def __init__(
        self, env: VectorEnv[Any, Any, Any], purifier: StatePurifier | str | Path, learns: bool = False
    ) -> None:
        super().__init__(env)
        sessions = env.unwrapped
        if not isinstance(sessions, KuaiFairVectorEnv):
            raise TypeError(
                f"DSRMVectorWrapper needs a KuaiFair vector environment, got {type(sessions).__name__}; make one "
                "with gym.make_vec(id, n, vectorization_mode='vector_entry_point')"
            )
        check_observed(env, sessions.world, sessions.config, DSRMVectorWrapper)
        given = as_purifier(purifier)
        self._purify_with(given, _of_batch(given, env.single_observation_space, sessions), sessions.world, learns)
        self.single_observation_space = self._observations.space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts sessions; see ``KuaiFairVectorEnv.reset``."""
        # The base class only knows one seed for all; KuaiFair's environments take one for each row as well.
        observations, info = self.env.reset(seed=cast(Any, seed), options=options)
        return self._observations.started(observations, self.learns), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Shows slates; see ``KuaiFairVectorEnv.step``. ``final_obs`` is purified too."""
        observations, reward, terminated, truncated, info = self.env.step(actions)
        purified = self._observations.stepped(observations, self.learns)
        if "final_obs" in info:
            ended = np.flatnonzero(info["_final_obs"])
            final = info["final_obs"].copy()
            for row, last in zip(ended, self._observations.last(final[ended], ended), strict=True):
                final[row] = last
            info["final_obs"] = final
        return purified, reward, terminated, truncated, info


class VecDSRM(Purifying, VecEnvWrapper):
    """Purifies the observations of a Stable-Baselines3 environment, all sessions at once.

    Takes a :class:`~kuaifair_env.sb3.KuaiFairVecEnv`, wrapped or not, and any ``VecEnv`` over single KuaiFair
    environments (``make_vec_env``, ``DummyVecEnv``, ``SubprocVecEnv``) for purifiers of single states.

    Args:
        venv: The environment.
        purifier: The purifier, or the path of its file.
        learns: Whether a belief goes on learning what all users share.

    Raises:
        ArtifactError: If the file is missing or damaged.
        MismatchError: If the purifier was made for another world.
        TypeError: If there are no KuaiFair sessions beneath, a wrapper beneath changes observations, or the purifier
            needs all sessions as one batch.
        ValueError: If the purifier is to learn and cannot.
    """

    def __init__(self, venv: VecEnv, purifier: StatePurifier | str | Path, learns: bool = False) -> None:
        world = world_beneath(venv)
        if world is None:
            raise TypeError(f"VecDSRM needs KuaiFair sessions beneath, got {type(venv.unwrapped).__name__}")
        check_observed(venv, world, venv.get_attr("config", indices=0)[0], VecDSRM)
        given, sessions = as_purifier(purifier), venv.unwrapped
        observations: SessionObservations
        if isinstance(sessions, KuaiFairVecEnv):
            observations = _of_batch(given, venv.observation_space, sessions)
        elif isinstance(given, BeliefPurifier):
            raise TypeError(
                f"a belief learns from one batch of sessions, and {type(sessions).__name__} has single ones; give "
                "VecDSRM an environment of kuaifair_env.make_sb3(...), or wrap each single environment in "
                "DSRMObservationWrapper"
            )
        else:
            observations = PurifiedRows(given, venv.observation_space, world, self._windows, self._finished_windows)
        self._purify_with(given, observations, world, learns)
        super().__init__(venv, self._observations.space)

    def reset(self) -> Any:
        """Starts sessions."""
        return self._observations.started(self.venv.reset(), self.learns)

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates; ``terminal_observation`` is purified too."""
        observations, reward, done, infos = self.venv.step_wait()
        purified = self._observations.stepped(observations, self.learns)
        ended = np.flatnonzero(done)
        if len(ended):
            last = self._observations.last([infos[row]["terminal_observation"] for row in ended], ended)
            for row, observation in zip(ended, last, strict=True):
                infos[row]["terminal_observation"] = observation
        return purified, reward, done, infos

    def _windows(self, length: int | None) -> HistoryWindow:
        return HistoryWindow.concatenate(self.venv.env_method("history_window", length))

    def _finished_windows(self, rows: IntArray) -> HistoryWindow:
        return HistoryWindow.concatenate(self.venv.get_attr("finished_window", indices=rows.tolist()))


def _of_batch(purifier: StatePurifier, space: Any, sessions: HasBatch) -> SessionObservations:
    """Returns the purified observations of an environment that plays one batch of sessions."""
    if isinstance(purifier, CandidatePurifier):
        return CandidateObservations(purifier, sessions)
    if isinstance(purifier, BeliefPurifier):
        return BeliefObservations(purifier, space, sessions)

    def windows(length: int | None) -> HistoryWindow:
        return sessions.batch.history_window(length)

    def finished_windows(rows: IntArray) -> HistoryWindow:
        window = sessions.batch.finished_window
        assert window is not None
        return window

    return PurifiedRows(purifier, space, sessions.world, windows, finished_windows)
