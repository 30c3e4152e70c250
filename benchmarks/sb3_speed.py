"""Training speed of SB3's PPO and A2C on the native environment, beside an environment that costs nothing.

    python benchmarks/sb3_speed.py

The empty environment has the same spaces and returns the same arrays at every step: what it reaches is the ceiling of
SB3 itself on this machine. Rounds of the two alternate; a figure is the best round in processor time, and the ratio is
what the sessions cost.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from kuaifair_env import make_sb3

ENVS = 64


class EmptyVecEnv(VecEnv):
    """Sessions that never end and cost nothing."""

    def __init__(self, like: VecEnv) -> None:
        super().__init__(like.num_envs, like.observation_space, like.action_space)
        self._observations = np.zeros((like.num_envs, *like.observation_space.shape), np.float32)
        self._rewards = np.zeros(like.num_envs, np.float32)
        self._dones = np.zeros(like.num_envs, np.bool_)

    def reset(self) -> np.ndarray:
        return self._observations

    def step_async(self, actions: np.ndarray) -> None:
        """Ignores the actions."""

    def step_wait(self) -> Any:
        return self._observations, self._rewards, self._dones, [{} for _ in range(self.num_envs)]

    def close(self) -> None:
        """Has nothing to close."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Has no attributes."""

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        return [None] * self.num_envs

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


AGENTS: dict[str, tuple[Callable[[VecEnv], BaseAlgorithm], int]] = {
    "PPO n_steps=64, batch=1024, 4 epochs": (
        lambda env: PPO("MlpPolicy", env, n_steps=64, batch_size=1024, n_epochs=4, device="cpu"),
        ENVS * 64 * 8,
    ),
    "A2C n_steps=5": (lambda env: A2C("MlpPolicy", env, n_steps=5, device="cpu"), ENVS * 5 * 120),
    "A2C n_steps=32": (lambda env: A2C("MlpPolicy", env, n_steps=32, device="cpu"), ENVS * 32 * 24),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", nargs="+", default=["KuaiFair-Toy-v0"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'agent':<40}{'environment':<28}{'steps/s':>9}{'of empty':>10}")
    for name, (build, steps) in AGENTS.items():
        envs = {env_id: make_sb3(env_id, ENVS, seed=0, split="train") for env_id in arguments.env}
        runs: dict[str, VecEnv] = {"empty": EmptyVecEnv(next(iter(envs.values()))), **envs}
        models = {label: build(env) for label, env in runs.items()}
        best = dict.fromkeys(runs, 0.0)
        for model in models.values():
            model.learn(ENVS * 64)
        for _ in range(arguments.rounds):
            for label, model in models.items():
                start = time.process_time()
                model.learn(steps)
                best[label] = max(best[label], steps / (time.process_time() - start))
        for label, speed in best.items():
            print(f"{name:<40}{label:<28}{speed:>9,.0f}{speed / best['empty']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
