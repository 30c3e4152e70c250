"""Sessions in a world model: clicks from its predictions, and rewards that are pessimistic where it is unsure."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor

from hrl_policies.common.sessions import purified_like, sessions_given
from hrl_policies.dorl.entropy import FeatureEntropy
from hrl_policies.dorl.world_model import MAX_VARIANCE, Side, WorldModel
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.response.base import BernoulliFeedback, HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

ExitKind = Literal["configured", "none"]


class Prediction(NamedTuple):
    """A world model's prediction for pairs of users and items.

    Attributes:
        mean: ``float32 (B, K)``, ensemble mean of the click, within 0..1.
        variance: ``float32 (B, K)``, the largest variance over the members.
    """

    mean: FloatArray
    variance: FloatArray


class LearnedResponse(BernoulliFeedback):
    """Clicks with the probability that an ensemble predicts; the world's own response model is not used.

    Args:
        model: The ensemble, fitted.
        world: The world whose users, items, features and tags it was fitted on.

    Attributes:
        latest: The prediction of the last call of :meth:`expected`, from which rewards are computed; None before it.
    """

    uses_history = False

    def __init__(self, model: WorldModel, world: World) -> None:
        self._model = model
        self._users, self._items = model.tables(world)
        self.n_users, self.n_items = self._users.line.shape[1], self._items.line.shape[1]
        self.latest: Prediction | None = None

    def predict(self, users: IntArray, items: IntArray) -> Prediction:
        """Returns the prediction for users ``(B,)`` with items ``(B, K)``."""
        return self._predicted(users, self._items.rows(_rows(items)))

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns the predicted means, ``float32 (B, K)``; ``history`` is not read."""
        self.latest = self.predict(users, items)
        return self.latest.mean

    def expected_catalogue(
        self, users: IntArray, n_items: int, history: HistoryWindow | None = None
    ) -> FloatArray:
        """Returns the predicted means on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        side = Side(*(part[:, None, :n_items] for part in self._items))
        return np.concatenate([self._predicted(users[row : row + 1], side).mean for row in range(len(users))])

    def rearranged(self, items: IntArray) -> LearnedResponse:
        """Returns the same model for the catalogue ``old_items[items]``."""
        other = copy.copy(self)
        other._items, other.n_items, other.latest = self._items.rows(_rows(items)), len(items), None
        return other

    def save(self, path: str | Path) -> None:
        """Refuses: an ensemble is saved with the agent that fitted it.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a learned response is saved with its agent; call DORL.save")

    def describe(self) -> dict[str, Any]:
        """Returns kind and sizes, JSON-able."""
        return {
            "kind": "learned",
            "users": self.n_users,
            "items": self.n_items,
            "members": self._model.members,
        }

    def _predicted(self, users: IntArray, items: Side) -> Prediction:
        user = self._users.rows(_rows(users)).spread()
        with torch.inference_mode():
            mean, log_variance = self._model.combined(user, items)
            return Prediction(
                mean.mean(0).clamp(0.0, 1.0).numpy(), log_variance.amax(0).exp().numpy().astype(np.float32)
            )


def _rows(rows: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))


class PessimisticRewards(VecEnvWrapper):
    """Rewards ``max(0, r - l1 P_U + l2 P_E - r_min)``, mean over the slate, in sessions of a world model.

    ``r`` is the predicted mean of the click, ``P_U`` the largest variance over the members of the ensemble, ``P_E``
    the entropy term, and ``r_min = -l1 MAX_VARIANCE`` a lower bound of the rest (Gao et al., SIGIR 2023). Episode
    records keep the clicks.

    Args:
        venv: Sessions whose response is a :class:`LearnedResponse`.
        entropy: The entropy term.
        uncertainty_weight: ``l1``.
        entropy_weight: ``l2``.

    Raises:
        TypeError: If the sessions' clicks do not come from a world model.
    """

    def __init__(
        self, venv: KuaiFairVecEnv, entropy: FeatureEntropy, uncertainty_weight: float, entropy_weight: float
    ) -> None:
        response = venv.world.response
        if not isinstance(response, LearnedResponse):
            raise TypeError(f"PessimisticRewards needs a learned response, got {type(response).__name__}")
        super().__init__(venv)
        self._sessions, self._response, self._entropy = venv, response, entropy
        self._weights = (uncertainty_weight, entropy_weight)
        self._previous: NDArray[np.int32] = np.zeros(0, np.int32)

    def reset(self) -> VecEnvObs:
        """Starts sessions."""
        return self.venv.reset()

    def step_async(self, actions: NDArray[Any]) -> None:
        """Notes the last item of each session, for the entropy term, and sends the actions."""
        self._previous = self._sessions.batch.simulator.history().items[:, -1]
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Replaces the rewards by those of the prediction that the clicks were drawn from."""
        observation, _, done, infos = self.venv.step_wait()
        outcome, predicted = self._sessions.batch.outcome, self._response.latest
        assert outcome is not None and predicted is not None
        bonus = self._entropy.of_slates(self._previous, outcome.items)
        return observation, pessimistic(predicted, bonus, *self._weights), done, infos


def pessimistic(
    predicted: Prediction, bonus: FloatArray, uncertainty_weight: float, entropy_weight: float
) -> FloatArray:
    """Returns DORL's reward of slates, ``float32 (B,)``; see :class:`PessimisticRewards`."""
    lower_bound = -uncertainty_weight * MAX_VARIANCE
    value = predicted.mean - uncertainty_weight * predicted.variance + entropy_weight * bonus
    reward: FloatArray = np.maximum(value - lower_bound, 0.0).mean(axis=1, dtype=np.float32)
    return reward


def learned_sessions(
    env: VecEnv,
    response: LearnedResponse,
    entropy: FeatureEntropy,
    *,
    uncertainty_weight: float,
    entropy_weight: float,
    exits: ExitKind,
    seed: int | None,
) -> VecEnv:
    """Returns sessions like those of an environment, with clicks and rewards of a world model.

    Users, histories, spaces and purifier are the environment's.

    Args:
        env: See :func:`~hrl_policies.common.sessions.sessions_given`; it is neither reset nor stepped.
        response: The world model.
        entropy: The entropy term.
        uncertainty_weight: See :class:`PessimisticRewards`.
        entropy_weight: See :class:`PessimisticRewards`.
        exits: ``"configured"`` applies the environment's leave rule to predicted clicks, ``"none"`` plays every session
            to its cap.
        seed: Seed of users and clicks.
    """
    world, config = sessions_given(env, "DORL")
    if exits == "none":
        config = replace(config, leave="never")
    sessions = KuaiFairVecEnv(replace(world, response=response), config, env.num_envs, seed=seed)
    return purified_like(env, PessimisticRewards(sessions, entropy, uncertainty_weight, entropy_weight))
