"""Sessions in a world model: what an offline agent trains in instead of a world."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from hrl_policies.baselines.feature_entropy import FeatureEntropy
from hrl_policies.baselines.learned_response import LearnedResponse, Prediction
from hrl_policies.baselines.sessions_like import purified_like, sessions_given
from hrl_policies.baselines.world_model import MAX_VARIANCE
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.sb3 import KuaiFairVecEnv

ExitKind = Literal["configured", "none"]


class PessimisticRewards(VecEnvWrapper):
    """Rewards ``max(0, r - l1 P_U + l2 P_E - r_min)``, mean over the slate, in sessions of a world model.

    ``r`` is the predicted mean of the click, ``P_U`` the largest variance that a member of the ensemble gives, ``P_E``
    the entropy term, and ``r_min`` the least that the bracket can be, ``-l1 MAX_VARIANCE`` (Gao et al., SIGIR 2023).
    Episode records keep the clicks.

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
        """Notes what each session was shown last; see :meth:`step_wait`."""
        self._previous = self._sessions.batch.simulator.window()[0][:, -1]
        self.venv.step_async(actions)

    def step_wait(self) -> VecEnvStepReturn:
        """Shows slates and takes the reward from the prediction that their clicks were drawn from."""
        observation, _, done, infos = self.venv.step_wait()
        outcome, predicted = self._sessions.batch.outcome, self._response.latest
        assert outcome is not None and predicted is not None
        bonus = self._entropy.of_slates(self._previous, outcome.items)
        return observation, pessimistic(predicted, bonus, *self._weights), done, infos


def pessimistic(
    predicted: Prediction, bonus: FloatArray, uncertainty_weight: float, entropy_weight: float
) -> FloatArray:
    """Returns DORL's reward of slates, ``float32 (B,)``; see :class:`PessimisticRewards`."""
    least = -uncertainty_weight * MAX_VARIANCE
    bracket = predicted.mean - uncertainty_weight * predicted.variance + entropy_weight * bonus
    reward: FloatArray = np.maximum(bracket - least, 0.0).mean(axis=1, dtype=np.float32)
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
    """Returns sessions like those of an environment, with the clicks and rewards of a world model.

    Users, histories, spaces and purifier are the environment's; its response model is not in them.

    Args:
        env: See :func:`~hrl_policies.baselines.sessions_like.sessions_given`; it is neither reset nor stepped.
        response: The world model.
        entropy: The entropy term.
        uncertainty_weight: See :class:`PessimisticRewards`.
        entropy_weight: See :class:`PessimisticRewards`.
        exits: ``"configured"`` applies the environment's leave rule to predicted clicks, ``"none"`` plays every session
            to its cap.
        seed: Of users and clicks.
    """
    world, config = sessions_given(env, "DORL")
    if exits == "none":
        config = replace(config, leave="never")
    sessions = KuaiFairVecEnv(replace(world, response=response), config, env.num_envs, seed=seed)
    return purified_like(env, PessimisticRewards(sessions, entropy, uncertainty_weight, entropy_weight))
