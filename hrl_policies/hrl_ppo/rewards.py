"""The fairness part of the manager's reward, ``Fair(L_t)`` of the paper's eq. 4, in five forms."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

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
        self._batch = bottom.batch
        self._fair_coef = fair_coef

    def reset(self) -> VecEnvObs:
        """Starts sessions."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates and adds the fairness term."""
        observation, reward, done, infos = self.venv.step_wait()
        outcome = self._batch.outcome
        assert outcome is not None
        fair = -slate_disparity(outcome.popular_share)
        return observation, (reward + self._fair_coef * fair).astype(np.float32), done, infos
