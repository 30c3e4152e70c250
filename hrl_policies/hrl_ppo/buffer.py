"""The rollout buffer of both levels, and generalised advantages of decisions that hold for several steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrl_policies.hrl_ppo.policy import HierarchicalActions
from kuaifair_env.data.schema import BoolArray, FloatArray

MANAGER, ENGAGEMENT, COST = range(3)


@dataclass(frozen=True)
class HierarchicalRolloutBufferSamples:
    """Some steps of a rollout, as tensors; names as in :class:`~hrl_policies.hrl_ppo.policy.HierarchicalActions`.

    Attributes:
        advantages: ``float32 (n, 3)``, of manager, engagement and cost.
        returns: ``float32 (n, 3)``.
        slot_credit: ``float32 (n, K)``, each slot's click less the slate's mean; ``(n, 0)`` if not known.
    """

    slots: Tensor
    candidates: Tensor
    window_counts: Tensor
    scale: Tensor
    manager_features: Tensor
    worker_features: Tensor
    manager_actions: Tensor
    manager_log_probs: Tensor
    worker_log_probs: Tensor
    decided: Tensor
    advantages: Tensor
    returns: Tensor
    slot_credit: Tensor


_STORED = [
    name
    for name in HierarchicalRolloutBufferSamples.__dataclass_fields__
    if name in HierarchicalActions.__dataclass_fields__
]
"""What samples hold of the actions as they were."""


class HierarchicalRolloutBuffer:
    """Steps of ``T x B`` sessions with rewards, values and advantages of the manager, of engagement and of cost.

    Args:
        buffer_size: Steps ``T``.
        n_envs: Sessions ``B``.
        device: Device of the samples.
    """

    def __init__(self, buffer_size: int, n_envs: int, device: torch.device) -> None:
        self.buffer_size = buffer_size
        self.n_envs = n_envs
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._tensors: dict[str, list[Tensor]] = {name: [] for name in _STORED}
        shape = (self.buffer_size, self.n_envs)
        self.values = np.zeros((*shape, 3), np.float32)
        self.rewards = np.zeros((*shape, 3), np.float32)
        self.slot_credit = np.zeros((*shape, 0), np.float32)
        self.dones = np.zeros(shape, np.bool_)
        self.final_values = np.zeros((*shape, 3), np.float32)
        self.decided = np.zeros(shape, np.bool_)
        self.pos = 0

    @property
    def full(self) -> bool:
        """Whether all steps are there."""
        return self.pos == self.buffer_size

    def add(
        self,
        actions: HierarchicalActions,
        *,
        rewards: FloatArray,
        clicks: FloatArray | None,
        dones: BoolArray,
        final_values: FloatArray,
    ) -> None:
        """Adds a step.

        Args:
            actions: Actions of both levels.
            rewards: ``float32 (B, 3)``, of manager, engagement and cost.
            clicks: ``float32 (B, K)`` on the slots, or None if nobody knows.
            dones: ``bool (B,)``, whether the session ended.
            final_values: ``float32 (B, 3)``, values to go on with where a session was cut off, else 0.
        """
        for name in _STORED:
            self._tensors[name].append(getattr(actions, name))
        if clicks is not None:
            if self.pos == 0:
                self.slot_credit = np.zeros((self.buffer_size, *clicks.shape), np.float32)
            self.slot_credit[self.pos] = clicks - clicks.mean(axis=1, keepdims=True)
        self.values[self.pos] = actions.values.cpu().numpy()
        self.decided[self.pos] = actions.decided.cpu().numpy()
        self.rewards[self.pos], self.dones[self.pos] = rewards, dones
        self.final_values[self.pos] = final_values
        self.pos += 1

    def compute_returns_and_advantages(
        self, last_values: FloatArray, gammas: tuple[float, float, float], gae_lambda: float
    ) -> None:
        """Computes advantages and returns.

        Args:
            last_values: ``float32 (B, 3)``, values of what would come next.
            gammas: Discount of manager, engagement and cost.
            gae_lambda: Of generalised advantage estimation (Schulman et al., 2016).
        """
        self.advantages = np.zeros_like(self.values)
        always = np.ones_like(self.decided)
        for part, decided in ((MANAGER, self.decided), (ENGAGEMENT, always), (COST, always)):
            self.advantages[..., part] = advantages(
                self.rewards[..., part], self.values[..., part], self.dones, self.final_values[..., part],
                last_values[:, part], decided, gammas[part], gae_lambda,
            )  # fmt: skip
        self.returns = self.advantages + self.values
        total = self.buffer_size * self.n_envs
        self._flat = {name: torch.cat(steps) for name, steps in self._tensors.items()}
        for name in ("advantages", "returns", "slot_credit"):
            array = getattr(self, name)
            self._flat[name] = torch.from_numpy(array.reshape(total, *array.shape[2:])).to(self.device)

    def manager_actions(self) -> Tensor:
        """Returns the manager's actions of all steps, ``(T * B, size)``."""
        return self._flat["manager_actions"]

    def get(self, batch_size: int, rng: np.random.Generator) -> Iterator[HierarchicalRolloutBufferSamples]:
        """Returns all steps once, in random order."""
        total = self.buffer_size * self.n_envs
        order = torch.from_numpy(rng.permutation(total)).to(self.device)
        for low in range(0, total, batch_size):
            rows = order[low : low + batch_size]
            yield HierarchicalRolloutBufferSamples(**{name: steps[rows] for name, steps in self._flat.items()})


def advantages(
    rewards: FloatArray,
    values: FloatArray,
    dones: BoolArray,
    final_values: FloatArray,
    last_values: FloatArray,
    decided: BoolArray,
    gamma: float,
    gae_lambda: float,
) -> FloatArray:
    """Returns generalised advantages at decisions that may hold for several steps; 0 at steps between decisions.

    With ``c`` the steps that a decision held, ``delta = sum_j gamma^j r_j + gamma^c V' - V``, and the next decision's
    advantage counts ``gamma^c lambda``. A session's end cuts both; the end of the rollout cuts the last decision short.

    Args:
        rewards: ``float32 (T, B)``.
        values: ``float32 (T, B)``, at each step.
        dones: ``bool (T, B)``, session over after this step.
        final_values: ``float32 (T, B)``, value to go on with after a session that was cut off.
        last_values: ``float32 (B,)``, value after the last step.
        decided: ``bool (T, B)``, where decisions were taken; all true is the usual estimate.
        gamma: Discount of a step.
        gae_lambda: See above.
    """
    result = np.zeros_like(values)
    segment_reward, segment_discount = np.zeros(values.shape[1]), np.ones(values.shape[1])
    next_value, next_advantage = np.asarray(last_values), np.zeros(values.shape[1])
    for step in range(len(values) - 1, -1, -1):
        over, here = dones[step], decided[step]
        next_value = np.where(over, final_values[step], next_value)
        next_advantage = np.where(over, 0.0, next_advantage)
        segment_reward = rewards[step] + gamma * np.where(over, 0.0, segment_reward)
        segment_discount = gamma * np.where(over, 1.0, segment_discount)
        delta = segment_reward + segment_discount * next_value - values[step]
        advantage = delta + segment_discount * gae_lambda * next_advantage
        result[step] = np.where(here, advantage, 0.0)
        next_value = np.where(here, values[step], next_value)
        next_advantage = np.where(here, advantage, next_advantage)
        segment_reward = np.where(here, 0.0, segment_reward)
        segment_discount = np.where(here, 1.0, segment_discount)
    return result


def newest_clicks(observation: object, slate_size: int) -> NDArray[np.float32] | None:
    """Returns the clicks on the slate just shown, the newest of the window, ``float32 (B, K)``; None without one."""
    if not isinstance(observation, dict) or "history_clicks" not in observation:
        return None
    return np.asarray(observation["history_clicks"][:, -slate_size:], np.float32)
