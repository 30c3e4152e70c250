"""Slates: how they are drawn from scores of items, and the replay buffer of those that were shown.

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

from kuaifair_env.data.schema import FloatArray
from kuaifair_env.sb3 import KuaiFairVecEnv

MASKED = -1e30
"""Logit of items that are not allowed: finite, because differences of infinities are undefined."""


def slate_shape(action_space: spaces.Space[Any]) -> tuple[int, int]:
    """Returns the number of items ``N`` and the slate size ``K`` of an action space of item ids.

    Raises:
        ValueError: If its actions are not item ids from 0 to ``N - 1``.
    """
    if isinstance(action_space, spaces.Discrete) and action_space.start == 0:
        return int(action_space.n), 1
    if isinstance(action_space, spaces.MultiDiscrete) and action_space.nvec.ndim == 1:
        size, items = len(action_space.nvec), int(action_space.nvec[0])
        if size <= items and (action_space.nvec == items).all():
            return items, size
    raise ValueError(
        f"this agent names items; make the environment with action_mode='slate' or 'item' (got {action_space})"
    )


def item_masks(action_masks: NDArray[np.bool_], n_items: int, slate_size: int) -> NDArray[np.bool_]:
    """Returns which items may be shown, ``bool (B, N)``.

    Args:
        action_masks: ``bool (B, N)`` or ``(N,)``; or such masks once for each slot, ``(B, K N)``, as sb3-contrib's
            ``get_action_masks`` gives them.
        n_items: Number of items ``N``.
        slate_size: Items ``K`` of a slate.

    Raises:
        ValueError: If the masks do not fit, or allow fewer than ``K`` items.
    """
    masks = np.atleast_2d(np.asarray(action_masks, np.bool_))
    if masks.shape[1] not in (n_items, n_items * slate_size):
        raise ValueError(f"action masks hold {n_items} items, got shape {masks.shape}")
    masks = masks[:, :n_items]
    if (np.count_nonzero(masks, axis=1) < slate_size).any():
        raise ValueError(f"fewer than {slate_size} items are allowed; use a smaller slate or repeats='allow'")
    return masks


class SlateDistribution:
    """The Plackett-Luce distribution over slates.

    Items are drawn one after another, each with probability proportional to ``exp(logit)`` among those left:
    ``log p(a_1 .. a_K) = sum_j [psi_{a_j} - log sum_{i not in a_1 .. a_{j-1}} exp(psi_i)]`` (Luce, 1959; Plackett,
    1975).

    Args:
        logits: ``float32 (B, N)``, scores ``Psi``.
        slate_size: Items ``K`` of a slate.
        mask: ``bool (B, N)`` or ``(N,)``, items that may be shown; None allows all.

    Raises:
        ValueError: If there are fewer than ``K`` items.
    """

    def __init__(self, logits: Tensor, slate_size: int, mask: Tensor | None = None) -> None:
        if not 1 <= slate_size <= logits.shape[1]:
            raise ValueError(f"a slate has 1 to {logits.shape[1]} items, got {slate_size}")
        self.slate_size = slate_size
        self.logits = logits if mask is None else torch.where(mask, logits, MASKED)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates exactly, as the ``K`` largest of logits plus Gumbel noise, ``int64 (B, K)`` in order of drawing.

        Args:
            generator: Source of randomness; None takes torch's global generator.
        """
        return (self.logits + gumbel(self.logits, generator)).topk(self.slate_size, dim=1).indices

    def mode(self) -> Tensor:
        """Returns the likeliest slates: the ``K`` largest logits, largest first."""
        return self.logits.topk(self.slate_size, dim=1).indices

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``.

        Args:
            slates: ``int64 (B, K)``, distinct items.
        """
        chosen = self.logits.gather(1, slates)
        return chosen - _log_remaining_mass(self.logits.scatter(1, slates, MASKED), chosen)

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of ordered slates, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the exact entropy of the first slot, ``float32 (B,)``."""
        return _entropy(self.logits)


class QuotaSlateDistribution:
    """Slates with a given number of popular items: Plackett-Luce among the popular items, and among the others.

    This is eq. 6 of the paper with the price of popularity at which the slate meets its constraint: within a group the
    price is a constant, which does not change Plackett-Luce probabilities.

    Args:
        logits: ``float32 (B, N)``.
        popular: ``bool (B, N)``.
        counts: ``int64 (B,)``, popular items in each slate.
        slate_size: Items ``K`` of a slate; no count may ask for more items than its group holds.
    """

    def __init__(self, logits: Tensor, popular: Tensor, counts: Tensor, slate_size: int) -> None:
        self.slate_size = slate_size
        self._counts = counts[:, None]
        self._groups = (torch.where(popular, logits, MASKED), torch.where(popular, MASKED, logits))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draws slates, popular items first, ``int64 (B, K)``; see :class:`SlateDistribution`."""
        return self._merge(*(group + gumbel(group, generator) for group in self._groups))

    def mode(self) -> Tensor:
        """Returns the likeliest slates, popular items first."""
        return self._merge(*self._groups)

    def slot_log_probs(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of each slot given those before it, ``float32 (B, K)``."""
        first = torch.arange(self.slate_size, device=slates.device) < self._counts
        log_probs = []
        for group, inside in zip(self._groups, (first, ~first), strict=True):
            chosen = torch.where(inside, group.gather(1, slates), MASKED)
            remaining = _log_remaining_mass(group.scatter(1, slates, MASKED), chosen)
            log_probs.append(torch.where(inside, chosen - remaining, 0.0))
        return log_probs[0] + log_probs[1]

    def log_prob(self, slates: Tensor) -> Tensor:
        """Returns the log-probability of slates, ordered within each group, ``float32 (B,)``."""
        return self.slot_log_probs(slates).sum(dim=1)

    def entropy(self) -> Tensor:
        """Returns the mean entropy of the first slot of both groups, ``float32 (B,)``."""
        return (_entropy(self._groups[0]) + _entropy(self._groups[1])) / 2

    def _merge(self, popular: Tensor, tail: Tensor) -> Tensor:
        """Returns slates of the best popular items, as many as the counts say, and the best others behind them."""
        slots = torch.arange(self.slate_size, device=popular.device).expand(len(popular), -1)
        best_popular = popular.topk(self.slate_size, dim=1).indices
        best_tail = tail.topk(self.slate_size, dim=1).indices
        tail_rank = (slots - self._counts).clamp_min(0)
        return torch.where(slots < self._counts, best_popular, best_tail.gather(1, tail_rank))


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Returns standard Gumbel noise of the shape of ``like``."""
    return -torch.empty_like(like).exponential_(generator=generator).clamp_min(1e-20).log()


def _log_remaining_mass(rest: Tensor, chosen: Tensor) -> Tensor:
    """Returns the log of the mass left at each slot ``(B, K)``: of this and all later slots, and of items not shown.

    Summing from the last slot on adds positive terms only; subtracting prefixes from the total would cancel.

    Args:
        rest: ``(B, N)``, logits of items not shown; others masked.
        chosen: ``(B, K)``, logits of the slots.
    """
    outside = rest.logsumexp(dim=1, keepdim=True)
    backwards = torch.cat([outside, chosen.flip(1)], dim=1).logcumsumexp(dim=1)
    return backwards[:, 1:].flip(1)


def _entropy(logits: Tensor) -> Tensor:
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs.clamp_min(MASKED / 10)).sum(dim=1)


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
        buffer_size: See Stable-Baselines3's ``ReplayBuffer``, like all that is not described here.
        observation_space: ``Box``, or ``Dict`` with a ``Box`` called ``state``.
        action_space: ``Discrete``, ``MultiDiscrete`` or, with ``slate_size``, ``Box``.
        device: Where samples go.
        n_envs: Sessions ``B``.
        optimize_memory_usage: Must be False: it would lose the last observations of sessions.
        handle_timeout_termination: Whether values are bootstrapped where a session was only cut off.
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
