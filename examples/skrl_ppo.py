"""PPO of skrl on the vector environment, as skrl's own examples train it.

Run: python examples/skrl_ppo.py [training steps]      (pip install skrl)
"""

import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import torch
from skrl.agents.torch.ppo import PPO, PPO_CFG
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
from skrl.utils import set_seed
from torch import nn

import kuaifair_env

ENV, N_ENVS, N_STEPS = "KuaiFair-Toy-v0", 16, 32


class Policy(GaussianMixin, Model):
    """A normal distribution over the space of item embeddings."""

    def __init__(self, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        GaussianMixin.__init__(self, clip_actions=True)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 64), nn.Tanh(), nn.Linear(64, self.num_actions))
        self.log_std = nn.Parameter(torch.full((self.num_actions,), -1.0))

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns means and log deviations."""
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    """A value."""

    def __init__(self, **spaces: Any) -> None:
        Model.__init__(self, **spaces)
        DeterministicMixin.__init__(self)
        self.net = nn.Sequential(nn.Linear(self.num_observations, 64), nn.Tanh(), nn.Linear(64, 1))

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[torch.Tensor, dict[str, Any]]:
        """Returns values."""
        return self.net(inputs["observations"]), {}


def train(steps: int, seed: int = 11) -> PPO:
    """Returns the trained agent."""
    set_seed(seed)
    env = wrap_env(gym.make_vec(ENV, N_ENVS, vectorization_mode="vector_entry_point"), verbose=False)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}
    config = PPO_CFG(rollouts=N_STEPS, learning_epochs=4, mini_batches=4, discount_factor=0.9, learning_rate=3e-4)
    config.experiment.write_interval = config.experiment.checkpoint_interval = 0  # no files
    agent = PPO(
        models={"policy": Policy(**spaces), "value": Value(**spaces)},
        memory=RandomMemory(memory_size=N_STEPS, num_envs=N_ENVS, device="cpu"),
        cfg=config,
        **spaces,
    )
    settings = SequentialTrainerCfg(
        timesteps=max(steps // N_ENVS, N_STEPS),
        headless=True,
        disable_progressbar=True,
        close_environment_at_exit=False,
    )
    SequentialTrainer(env=env, agents=agent, cfg=settings).train()
    return agent


def acting(agent: PPO) -> Callable[..., tuple[Any, None]]:
    """Returns the agent as `evaluate` asks it: observations in, actions and no memory out."""

    def predict(observation: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        with torch.no_grad():
            mean, _ = agent.models["policy"].compute({"observations": torch.as_tensor(observation)})
            return mean.clamp(-1.0, 1.0).numpy(), None

    return predict


def main(steps: int = 100_000) -> None:
    torch.set_num_threads(1)
    test = gym.make(ENV, split="test")
    print(kuaifair_env.evaluate(acting(train(steps)), test, n_users=200).table())


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
