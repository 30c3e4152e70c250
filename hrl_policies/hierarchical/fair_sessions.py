"""Sessions whose reward holds the fairness term, for agents that know of no second level."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from kuaifair_env.sb3 import KuaiFairVecEnv


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
        fair = -np.abs(2.0 * outcome.popular_share - 1.0)
        return observation, (reward + self._fair_coef * fair).astype(np.float32), done, infos
