"""Rewards of both levels: forms of ``Fair(L_t)`` (eq. 4), and the rollout buffer that turns rewards into advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor

from hrl_policies.hrl_ppo.levels import LevelActions
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.metrics import gini, signed_gap, slate_disparity
from kuaifair_env.sb3 import KuaiFairVecEnv

FairKind = Literal["slate_ad", "ema_group", "ema_gini", "decile_gini", "policy_entropy"]

_HALF_LIFE = 5.0
_GINI_WINDOW = 20.0
_DECILES = 10


class FairnessReward:
    """Turns the slates of ``B`` sessions into a reward for each; what it knows of a session lasts until its end."""

    def reward(self, slates: NDArray[np.int64], entropies: FloatArray) -> FloatArray:
        """Returns ``float32 (B,)``; 0 is fair, less is less fair.

        Args:
            slates: ``int64 (B, K)``, what each session is shown now.
            entropies: ``float32 (B,)``, entropy of the first slot.
        """
        raise NotImplementedError

    def start_rollout(self) -> None:
        """Prepares for a rollout; sessions go on from the one before."""

    def end_sessions(self, rows: BoolArray) -> None:
        """Forgets sessions that have ended, ``bool (B,)``."""


class ShareDisparity(FairnessReward):
    """``-|2 p - 1|`` with ``p`` a moving average of the popular share of a session's slates.

    Args:
        popular: ``bool (N,)``, the popular group.
        n_envs: Concurrent sessions ``B``.
        half_life: Half-life of the average in slates (``ema_group``); 0 takes the slate alone, which is what the leave
            rule looks at (``slate_ad``).
    """

    def __init__(self, popular: BoolArray, n_envs: int, half_life: float = 0.0) -> None:
        self._popular = popular
        self._decay = 0.5 ** (1.0 / half_life) if half_life else 0.0
        self._share = np.full(n_envs, 0.5, np.float32)

    def reward(self, slates: NDArray[np.int64], entropies: FloatArray) -> FloatArray:
        """See :class:`FairnessReward`."""
        share = self._popular[slates].mean(axis=1, dtype=np.float32)
        self._share = self._decay * self._share + (1.0 - self._decay) * share
        return np.asarray(-np.abs(signed_gap(self._share)), np.float32)

    def end_sessions(self, rows: BoolArray) -> None:
        """See :class:`FairnessReward`."""
        self._share[rows] = 0.5


class SystemGini(FairnessReward):
    """How much a step moves the Gini coefficient of exposure over all sessions (``ema_gini``, ``decile_gini``).

    ``Fair_t = Phi_t - Phi_{t-1}`` with ``Phi`` minus the Gini coefficient of a moving average of exposures, scaled so
    that a whole rollout's change weighs as much as its slates. The counters belong to no session and start at zero in
    every rollout. The reward of a step is the same in all sessions.

    Args:
        owner: ``int64 (N,)``, which of ``width`` counters an item belongs to.
        width: Counters: all items, or ten popularity deciles.
        scale: What a change of 1 is worth.
    """

    def __init__(self, owner: NDArray[np.int64], width: int, scale: float) -> None:
        self._owner = owner
        self._sizes = np.maximum(np.bincount(owner, minlength=width), 1)
        self._scale = scale
        self.start_rollout()

    def start_rollout(self) -> None:
        """See :class:`FairnessReward`."""
        self._shown = np.zeros(len(self._sizes))
        self._potential: float | None = None

    def reward(self, slates: NDArray[np.int64], entropies: FloatArray) -> FloatArray:
        """See :class:`FairnessReward`."""
        decay = 1.0 - slates.size / (_GINI_WINDOW * len(self._owner) + slates.size)
        shown = np.bincount(self._owner[slates].ravel(), minlength=len(self._shown))
        self._shown = decay * self._shown + shown
        potential = -gini(self._shown / self._sizes)
        change = 0.0 if self._potential is None else potential - self._potential
        self._potential = potential
        return np.full(len(slates), self._scale * change, np.float32)


class PolicyEntropy(FairnessReward):
    """Entropy of the policy over ``log N``, minus 1 (``policy_entropy``; the form of HER4IF's successors)."""

    def __init__(self, n_items: int) -> None:
        self._max_entropy = float(np.log(max(n_items, 2)))

    def reward(self, slates: NDArray[np.int64], entropies: FloatArray) -> FloatArray:
        """See :class:`FairnessReward`."""
        return (entropies / self._max_entropy - 1.0).astype(np.float32)


def fairness_reward(
    kind: FairKind, popular: BoolArray, popularity: NDArray[Any], n_envs: int, slate_size: int
) -> FairnessReward:
    """Returns a fairness reward by name.

    Args:
        kind: See :data:`FairKind`.
        popular: ``bool (N,)``, the popular group.
        popularity: ``(N,)``, whatever orders items by popularity.
        n_envs: Concurrent sessions ``B``.
        slate_size: Items ``K`` of a slate.

    Raises:
        ValueError: If the name is unknown.
    """
    if kind == "slate_ad":
        return ShareDisparity(popular, n_envs)
    if kind == "ema_group":
        return ShareDisparity(popular, n_envs, _HALF_LIFE)
    n_items = len(popular)
    if kind == "ema_gini":
        return SystemGini(np.arange(n_items), n_items, n_items / slate_size)
    if kind == "decile_gini":
        rank = np.argsort(np.argsort(popularity, kind="stable"), kind="stable")
        return SystemGini(rank * _DECILES // n_items, _DECILES, float(_DECILES))
    if kind == "policy_entropy":
        return PolicyEntropy(n_items)
    raise ValueError(f"fair must be one of {get_args(FairKind)}, got {kind!r}")


class FairSessions(VecEnvWrapper):
    """Rewards ``r + lambda Fair(L_t)`` with ``Fair = -|2 p - 1|`` of the slate, what HRL's manager earns (eq. 4).

    Episode records keep the plain reward.

    Args:
        venv: Sessions, purified or not.
        fair_coef: ``lambda``.

    Raises:
        TypeError: If these are not KuaiFair sessions.
    """

    def __init__(self, venv: VecEnv, fair_coef: float) -> None:
        bottom = venv.unwrapped
        if not isinstance(bottom, KuaiFairVecEnv):
            raise TypeError(f"FairSessions needs a KuaiFairVecEnv, got {type(bottom).__name__}")
        super().__init__(venv)
        self._sessions = bottom
        self.fair_coef = fair_coef

    def reset(self) -> VecEnvObs:
        """Starts sessions."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates and adds the fairness term."""
        observation, reward, done, infos = self.venv.step_wait()
        outcome = self._sessions.batch.outcome
        assert outcome is not None
        fair = -slate_disparity(outcome.popular_share)
        return observation, (reward + self.fair_coef * fair).astype(np.float32), done, infos


MANAGER, ENGAGEMENT, COST = range(3)


@dataclass(frozen=True)
class HierarchicalRolloutBufferSamples:
    """Some steps of a rollout, as tensors: actions as they were taken, and what they were worth.

    Attributes:
        actions: Of both levels.
        advantages: ``float32 (n, 3)``, of manager, engagement and cost.
        returns: ``float32 (n, 3)``.
        slot_credit: ``float32 (n, K)``, each slot's feedback less the slate's mean; ``(n, 0)`` if not wanted.
    """

    actions: LevelActions
    advantages: Tensor
    returns: Tensor
    slot_credit: Tensor


class HierarchicalRolloutBuffer:
    """Steps of ``T x B`` sessions with rewards, values and advantages of the manager, of engagement and of cost."""

    def __init__(self, buffer_size: int, n_envs: int, device: torch.device) -> None:
        self.buffer_size = buffer_size
        self.n_envs = n_envs
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._actions: list[LevelActions] = []
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
        actions: LevelActions,
        *,
        rewards: FloatArray,
        feedback: FloatArray | None,
        dones: BoolArray,
        final_values: FloatArray,
    ) -> None:
        """Adds a step.

        Args:
            actions: Actions of both levels.
            rewards: ``float32 (B, 3)``, of manager, engagement and cost.
            feedback: ``float32 (B, K)`` on the slots, or None if it is not wanted.
            dones: ``bool (B,)``, whether the session ended.
            final_values: ``float32 (B, 3)``, values to go on with where a session was cut off, else 0.
        """
        self._actions.append(actions)
        if feedback is not None:
            if self.pos == 0:
                self.slot_credit = np.zeros((self.buffer_size, *feedback.shape), np.float32)
            self.slot_credit[self.pos] = feedback - feedback.mean(axis=1, keepdims=True)
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
        kind = type(self._actions[0])
        self._flat_actions = kind(
            **{field.name: torch.cat([getattr(step, field.name) for step in self._actions]) for field in fields(kind)}
        )
        self._flat: dict[str, Tensor] = {}
        for name in ("advantages", "returns", "slot_credit"):
            array = getattr(self, name)
            self._flat[name] = torch.from_numpy(array.reshape(total, *array.shape[2:])).to(self.device)

    def manager_actions(self) -> Tensor:
        """Returns the manager's actions of all steps, ``(T * B, size)``."""
        return self._flat_actions.manager_actions

    def get(self, batch_size: int, rng: np.random.Generator) -> Iterator[HierarchicalRolloutBufferSamples]:
        """Returns all steps once, in random order."""
        total = self.buffer_size * self.n_envs
        order = torch.from_numpy(rng.permutation(total)).to(self.device)
        for low in range(0, total, batch_size):
            rows = order[low : low + batch_size]
            actions = self._flat_actions
            drawn = {field.name: getattr(actions, field.name)[rows] for field in fields(actions)}
            yield HierarchicalRolloutBufferSamples(
                type(actions)(**drawn), **{name: steps[rows] for name, steps in self._flat.items()}
            )


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
