"""A replay buffer of executed slates: which items were shown, and what each of them earned.

Stable-Baselines3's buffers keep an agent's action and one reward per step. Agents that credit items one by one need
the items that were shown (an ``embedding`` action does not name them) and the feedback on each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import DTypeLike, NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor

from hrl_policies.common.slates import slate_shape
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.sb3 import KuaiFairVecEnv

_STATE = "state"

Column = tuple[tuple[int, ...], DTypeLike]
"""Shape (of one session's step) and dtype of an additional column."""


class ExecutedSlates(NamedTuple):
    """What one step showed in each of ``B`` sessions.

    Attributes:
        items: ``int64 (B, K)``.
        feedback: ``float32 (B, K)``, realised feedback of each item (0 or 1 for clicks); its mean is the reward.
    """

    items: NDArray[np.int64]
    feedback: FloatArray


def executed_slates(env: VecEnv, infos: list[dict[str, Any]]) -> ExecutedSlates:
    """Returns what the last step of a ``VecEnv`` showed, beneath any wrappers.

    Args:
        env: A :class:`~kuaifair_env.sb3.KuaiFairVecEnv`, wrapped or not, or a ``VecEnv`` over single KuaiFair
            environments.
        infos: The step's infos, which are read in the second case.

    Raises:
        TypeError: If there are no KuaiFair sessions beneath.
        ValueError: If there was no step yet.
    """
    bottom = env.unwrapped
    if isinstance(bottom, KuaiFairVecEnv):
        outcome = bottom.batch.outcome
        if outcome is None:
            raise ValueError("no slate was shown yet; step the environment first")
        return ExecutedSlates(outcome.items, outcome.feedback)
    if not all("items" in info and "feedback" in info for info in infos):
        raise TypeError(f"items and their feedback are read off KuaiFair sessions; {type(bottom).__name__} has none")
    return ExecutedSlates(
        np.stack([info["items"] for info in infos]),
        np.stack([np.asarray(info["feedback"], np.float32) for info in infos]),
    )


class SlateReplaySamples(NamedTuple):
    """A minibatch as tensors; the first five as in Stable-Baselines3's ``ReplayBufferSamples``.

    Attributes:
        observations: ``float32 (n, d)``.
        actions: ``(n, action size)``, as the agent gave them.
        next_observations: ``float32 (n, d)``.
        dones: ``float32 (n, 1)``, 1 where the user left; 0 where a session was only cut off.
        rewards: ``float32 (n, 1)``.
        items: ``int64 (n, K)``, shown items.
        feedback: ``float32 (n, K)``.
        extras: The additional columns.
        discounts: Always None, which Stable-Baselines3's own algorithms take for ``gamma``.
    """

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    dones: Tensor
    rewards: Tensor
    items: Tensor
    feedback: Tensor
    extras: dict[str, Tensor]
    discounts: Tensor | None = None


class SlateReplayBuffer(ReplayBuffer):
    """Transitions with the items that were shown and their feedback.

    Before each :meth:`add` the agent passes what the step showed to :meth:`note`. Of ``Dict`` observations only
    ``state`` is kept.

    Args:
        buffer_size: Transitions, over all sessions.
        observation_space: ``Box``, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``Discrete``, ``MultiDiscrete`` or, with ``slate_size``, ``Box``.
        device: Where samples go.
        n_envs: Sessions ``B``.
        optimize_memory_usage: Must be False: it would lose the last observations of sessions.
        handle_timeout_termination: See Stable-Baselines3; True bootstraps where a session was only cut off.
        slate_size: Items ``K`` of a slate; None takes it from the action space.
        columns: Additional columns: :data:`Column` by name.

    Raises:
        ValueError: If a space does not fit, or a column has a name of the buffer's own.

    Attributes:
        columns: Arrays ``(T, B, ...)`` by name: ``items``, ``feedback`` and the additional ones.
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        slate_size: int | None = None,
        columns: Mapping[str, Column] | None = None,
    ) -> None:
        if optimize_memory_usage:
            raise ValueError("a slate buffer keeps next observations; optimize_memory_usage must be False")
        self._of_dict = isinstance(observation_space, spaces.Dict)
        super().__init__(
            buffer_size,
            state_space(observation_space),
            action_space,
            device,
            n_envs,
            handle_timeout_termination=handle_timeout_termination,
        )
        size = slate_shape(action_space)[1] if slate_size is None else slate_size
        own: dict[str, Column] = {"items": ((size,), np.int32), "feedback": ((size,), np.float32)}
        given = dict(columns or {})
        if own.keys() & given.keys():
            raise ValueError(f"columns {sorted(own.keys() & given.keys())} are the buffer's own")
        self.columns: dict[str, NDArray[Any]] = {
            name: np.zeros((self.buffer_size, n_envs, *shape), dtype) for name, (shape, dtype) in (own | given).items()
        }
        self._noted: dict[str, NDArray[Any]] | None = None

    def note(self, executed: ExecutedSlates, extras: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Takes what the step showed that the next :meth:`add` stores.

        Args:
            executed: Items and feedback.
            extras: ``(B, ...)`` for each additional column.

        Raises:
            ValueError: If a column is missing or unknown, or has another shape.
        """
        noted: dict[str, NDArray[Any]] = {"items": executed.items, "feedback": executed.feedback}
        noted |= extras or {}
        if noted.keys() != self.columns.keys():
            raise ValueError(f"the buffer keeps {sorted(self.columns)}, but was given {sorted(noted)}")
        for name, values in noted.items():
            if values.shape != self.columns[name].shape[1:]:
                raise ValueError(f"{name} must have shape {self.columns[name].shape[1:]}, got {values.shape}")
        self._noted = noted

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Adds a step of all sessions; see Stable-Baselines3.

        Raises:
            ValueError: If :meth:`note` was not called for the step.
        """
        if self._noted is None:
            raise ValueError("call note(executed_slates(env, infos)) before adding a step")
        for name, values in self._noted.items():
            self.columns[name][self.pos] = values
        self._noted = None
        if self._of_dict:
            obs, next_obs = obs[_STATE], next_obs[_STATE]
        super().add(obs, next_obs, action, reward, done, infos)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SlateReplaySamples:  # type: ignore[override]
        """Draws transitions uniformly, with replacement.

        Args:
            batch_size: How many.
            env: Normalises states and rewards (feedback stays as it is).

        Raises:
            ValueError: If the buffer is empty, or ``env`` normalises ``Dict`` observations.
        """
        if not self.size():
            raise ValueError("the replay buffer is empty; there is nothing to draw")
        if env is not None and self._of_dict:
            raise ValueError("VecNormalize needs observation_mode='state': of a dict only the state is kept")
        # Torch's own generator, which Stable-Baselines3 seeds.
        steps = torch.randint(self.size(), (batch_size,)).numpy()
        sessions = torch.randint(self.n_envs, (batch_size,)).numpy()
        ended = self.dones[steps, sessions] * (1.0 - self.timeouts[steps, sessions])
        columns = {name: self.to_torch(array[steps, sessions]) for name, array in self.columns.items()}
        states = (self.observations[steps, sessions], self.next_observations[steps, sessions])
        before, after = (self.to_torch(np.asarray(self._normalize_obs(part, env))) for part in states)
        reward = self._normalize_reward(self.rewards[steps, sessions, None], env)
        return SlateReplaySamples(
            before,
            self.to_torch(self.actions[steps, sessions]),
            after,
            self.to_torch(ended[:, None]),
            self.to_torch(reward),
            columns.pop("items").to(torch.int64),
            columns.pop("feedback"),
            columns,
        )


def state_space(observation_space: spaces.Space[Any]) -> spaces.Box:
    """Returns the space of the state in an observation space.

    Raises:
        ValueError: If there is none.
    """
    space = observation_space.spaces.get(_STATE) if isinstance(observation_space, spaces.Dict) else observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(
            f"need a state that is a vector of real numbers, alone or as 'state' of a dict, got {observation_space}"
        )
    return space
