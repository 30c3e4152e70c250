"""PPO in one file, shaped like CleanRL's, on the vector environment: no reinforcement learning library.

Run: python examples/cleanrl_ppo.py [training steps]

Loss and advantages are those of PPO (Schulman et al., 2017) as CleanRL writes them for continuous actions. A session
that ends is replaced in the same step, and its last observation is in the infos; values are bootstrapped where a
session was cut, and are not where the user left.
"""

import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from torch.distributions import Normal

import kuaifair_env

ENV = "KuaiFair-Toy-v0"
N_ENVS, N_STEPS, EPOCHS, BATCHES = 16, 32, 4, 4
GAMMA, LAMBDA, CLIP, VALUE_WEIGHT, MAX_GRAD_NORM, LEARNING_RATE = 0.9, 0.95, 0.2, 0.5, 0.5, 3e-4


class Agent(nn.Module):
    """A normal distribution over the space of item embeddings, and a value."""

    def __init__(self, observations: int, actions: int) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(observations, 64), nn.Tanh(), nn.Linear(64, 1))
        self.mean = nn.Sequential(nn.Linear(observations, 64), nn.Tanh(), nn.Linear(64, actions))
        self.log_std = nn.Parameter(torch.full((actions,), -1.0))

    def distribution(self, observations: torch.Tensor) -> Normal:
        """Returns the distribution of actions."""
        return Normal(self.mean(observations), self.log_std.exp())

    def value(self, observations: torch.Tensor) -> torch.Tensor:
        """Returns values, one for each observation."""
        return self.critic(observations).squeeze(-1)


def train(steps: int, seed: int = 11) -> Agent:
    """Returns the trained agent."""
    torch.manual_seed(seed)
    sessions = gym.make_vec(
        ENV, N_ENVS, vectorization_mode="vector_entry_point", autoreset_mode=AutoresetMode.SAME_STEP
    )
    space, actions = sessions.single_action_space, sessions.single_action_space.shape[0]
    agent = Agent(sessions.single_observation_space.shape[0], actions)
    optimizer = torch.optim.Adam(agent.parameters(), LEARNING_RATE, eps=1e-5)
    observation = torch.as_tensor(sessions.reset(seed=seed)[0])
    for _ in range(max(steps // (N_ENVS * N_STEPS), 1)):
        rollout: list[tuple[torch.Tensor, ...]] = []
        for _ in range(N_STEPS):
            with torch.no_grad():
                distribution = agent.distribution(observation)
                action = distribution.sample()
                log_prob = distribution.log_prob(action).sum(-1)
            clipped = np.clip(action.numpy(), space.low, space.high)
            following, reward, terminated, truncated, infos = sessions.step(clipped)
            last = np.array(following)
            for row in np.flatnonzero(terminated | truncated):
                last[row] = infos["final_obs"][row]
            with torch.no_grad():
                value, next_value = agent.value(observation), agent.value(torch.as_tensor(last))
            done = torch.as_tensor(terminated | truncated)
            reward = torch.as_tensor(reward, dtype=torch.float32) + GAMMA * next_value * ~torch.as_tensor(terminated)
            rollout.append((observation, action, log_prob, reward - value, value, done.float()))
            observation = torch.as_tensor(following)
        columns = [torch.stack(column) for column in zip(*rollout, strict=True)]
        observations, taken, log_probs, errors, values, dones = columns
        advantages, running = torch.zeros_like(errors), torch.zeros(N_ENVS)
        for step in reversed(range(N_STEPS)):
            running = errors[step] + GAMMA * LAMBDA * (1.0 - dones[step]) * running
            advantages[step] = running
        data = [part.flatten(0, 1) for part in (observations, taken, log_probs, advantages, advantages + values)]
        for _ in range(EPOCHS):
            for rows in torch.randperm(N_ENVS * N_STEPS).chunk(BATCHES):
                update(agent, optimizer, *(part[rows] for part in data))
    sessions.close()
    return agent


def update(agent: Agent, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> None:
    """Takes one step on the clipped surrogate and the squared error of values."""
    observations, actions, old_log_probs, advantages, returns = batch
    ratio = (agent.distribution(observations).log_prob(actions).sum(-1) - old_log_probs).exp()
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    loss = policy_loss + VALUE_WEIGHT * (agent.value(observations) - returns).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(agent.parameters(), MAX_GRAD_NORM)
    optimizer.step()


def acting(agent: Agent) -> Callable[..., tuple[Any, None]]:
    """Returns the agent as `evaluate` asks it: observations in, actions and no memory out."""

    def predict(observation: Any, *_: Any, **__: Any) -> tuple[Any, None]:
        with torch.no_grad():
            return agent.mean(torch.as_tensor(observation)).clamp(-1.0, 1.0).numpy(), None

    return predict


def main(steps: int = 100_000) -> None:
    torch.set_num_threads(1)
    env = gym.make(ENV, split="test")
    for name, trained in (("PPO, untrained", 0), ("PPO", steps)):
        agent = train(trained) if trained else Agent(env.observation_space.shape[0], env.action_space.shape[0])
        print(f"\n{name}\n{kuaifair_env.evaluate(acting(agent), env, n_users=200).table()}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
