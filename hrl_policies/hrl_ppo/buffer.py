"""What a rollout of both levels leaves behind, and the advantages that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hrl_policies.hrl_ppo.policy import Decision
from kuaifair_env.data.schema import BoolArray, FloatArray

MANAGER, ENGAGEMENT, COST = range(3)
_STORED = (
    "slots",
    "candidates",
    "counts",
    "scale",
    "manager_features",
    "worker_features",
    "actions",
    "manager_log_probs",
    "worker_log_probs",
)


@dataclass(frozen=True)
class Minibatch:
    """Some steps of a rollout, as tensors; names as in :class:`~hrl_policies.hrl_ppo.policy.Decision`."""

    slots: Tensor
    candidates: Tensor
    counts: Tensor
    scale: Tensor
    manager_features: Tensor
    worker_features: Tensor
    actions: Tensor
    manager_log_probs: Tensor
    worker_log_probs: Tensor
    advantages: Tensor
    returns: Tensor
    credit: Tensor
    decided: Tensor


class TwoLevelRollout:
    """Steps of ``T x B`` sessions with rewards, values and advantages of the manager, of engagement and of cost.

    Args:
        steps: Steps ``T``.
        sessions: Sessions ``B``.
        device: Where minibatches go.
    """

    def __init__(self, steps: int, sessions: int, device: torch.device) -> None:
        self.buffer_size = steps
        self.sessions = sessions
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._parts: dict[str, list[Tensor]] = {name: [] for name in _STORED}
        shape = (self.buffer_size, self.sessions)
        self.values = np.zeros((*shape, 3), np.float32)
        self.rewards = np.zeros((*shape, 3), np.float32)
        self.credit = np.zeros((*shape, 0), np.float32)
        self.done = np.zeros(shape, np.bool_)
        self.final_values = np.zeros((*shape, 3), np.float32)
        self.decided = np.zeros(shape, np.bool_)
        self.pos = 0

    @property
    def full(self) -> bool:
        """Whether all steps are there."""
        return self.pos == self.buffer_size

    def size(self) -> int:
        """Returns how many steps are there."""
        return self.pos

    def add(
        self,
        decision: Decision,
        *,
        rewards: FloatArray,
        clicks: FloatArray | None,
        done: BoolArray,
        final_values: FloatArray,
        decided: BoolArray,
    ) -> None:
        """Adds a step.

        Args:
            decision: What was decided.
            rewards: ``float32 (B, 3)``, of manager, engagement and cost.
            clicks: ``float32 (B, K)`` on the slots, or None if nobody knows.
            done: ``bool (B,)``, whether the session ended.
            final_values: ``float32 (B, 3)``, values to go on with where a session was cut off, else 0.
            decided: ``bool (B,)``, whether the manager decided anew.
        """
        for name in _STORED:
            self._parts[name].append(getattr(decision, name))
        if clicks is not None:
            if self.pos == 0:
                self.credit = np.zeros((self.buffer_size, *clicks.shape), np.float32)
            self.credit[self.pos] = clicks - clicks.mean(axis=1, keepdims=True)
        self.values[self.pos] = decision.values.cpu().numpy()
        self.rewards[self.pos], self.done[self.pos] = rewards, done
        self.final_values[self.pos], self.decided[self.pos] = final_values, decided
        self.pos += 1

    def finish(self, last_values: FloatArray, gammas: tuple[float, float, float], gae_lambda: float) -> None:
        """Computes advantages and returns.

        Args:
            last_values: ``float32 (B, 3)``, values of what would come next.
            gammas: Discount of manager, engagement and cost.
            gae_lambda: Of generalised advantage estimation (Schulman et al., 2016).
        """
        self.advantages = np.zeros_like(self.values)
        for part in (ENGAGEMENT, COST):
            self.advantages[..., part] = advantages(
                self.rewards[..., part], self.values[..., part], self.done, self.final_values[..., part],
                last_values[:, part], np.ones_like(self.done), gammas[part], gae_lambda,
            )  # fmt: skip
        self.advantages[..., MANAGER] = advantages(
            self.rewards[..., MANAGER], self.values[..., MANAGER], self.done, self.final_values[..., MANAGER],
            last_values[:, MANAGER], self.decided, gammas[MANAGER], gae_lambda,
        )  # fmt: skip
        self.returns = self.advantages + self.values
        self._flat = {name: torch.cat(parts) for name, parts in self._parts.items()}
        for name in ("advantages", "returns", "credit", "decided"):
            values = getattr(self, name)
            flat = values.reshape(self.buffer_size * self.sessions, *values.shape[2:])
            self._flat[name] = torch.from_numpy(flat).to(self.device)

    def manager_actions(self) -> Tensor:
        """Returns the manager's ``x`` of all steps, ``float32 (T B, size)``."""
        return self._flat["actions"]

    def minibatches(self, size: int, rng: np.random.Generator) -> Iterator[Minibatch]:
        """Returns all steps once, in random order."""
        total = self.buffer_size * self.sessions
        order = torch.from_numpy(rng.permutation(total)).to(self.device)
        for low in range(0, total, size):
            rows = order[low : low + size]
            yield Minibatch(**{name: part[rows] for name, part in self._flat.items()})


def advantages(
    rewards: FloatArray,
    values: FloatArray,
    done: BoolArray,
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
        done: ``bool (T, B)``, session over after this step.
        final_values: ``float32 (T, B)``, value to go on with after a session that was cut off.
        last_values: ``float32 (B,)``, value after the last step.
        decided: ``bool (T, B)``, where decisions were taken; all true is the usual estimate.
        gamma: Discount of a step.
        gae_lambda: See above.
    """
    found = np.zeros_like(values)
    gained, discount = np.zeros(values.shape[1]), np.ones(values.shape[1])
    next_value, next_advantage = np.asarray(last_values), np.zeros(values.shape[1])
    for step in range(len(values) - 1, -1, -1):
        over = done[step]
        next_value = np.where(over, final_values[step], next_value)
        next_advantage = np.where(over, 0.0, next_advantage)
        gained = rewards[step] + gamma * np.where(over, 0.0, gained)
        discount = gamma * np.where(over, 1.0, discount)
        here = decided[step]
        delta = gained + discount * next_value - values[step]
        advantage = delta + discount * gae_lambda * next_advantage
        found[step] = np.where(here, advantage, 0.0)
        next_value = np.where(here, values[step], next_value)
        next_advantage = np.where(here, advantage, next_advantage)
        gained, discount = np.where(here, 0.0, gained), np.where(here, 1.0, discount)
    return found


def clicks_of(observation: object, slate_size: int) -> NDArray[np.float32] | None:
    """Returns the clicks on the slate just shown, the newest of the window, ``float32 (B, K)``; None without one."""
    if not isinstance(observation, dict) or "history_clicks" not in observation:
        return None
    return np.asarray(observation["history_clicks"][:, -slate_size:], np.float32)
