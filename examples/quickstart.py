"""Sixty seconds: a session, an agent, and the control that it has to beat. No download, no GPU.

Run: python examples/quickstart.py [training steps]
"""

import sys

import gymnasium as gym
import torch
from stable_baselines3 import A2C

import kuaifair_env
from dsrm import ClickScorer
from hrl_policies import QuotaGreedy


def main(steps: int = 200_000) -> None:
    torch.set_num_threads(1)

    # One user, one session, random actions: any Gymnasium agent could sit here.
    env = gym.make("KuaiFair-Toy-v0", render_mode="ansi")
    env.reset(seed=0)
    over = False
    while not over:
        _, _, left, truncated, _ = env.step(env.action_space.sample())
        over = left or truncated
    print(env.render())

    # A2C learns in the training world; both are evaluated on held-out users of the test world.
    agent = A2C("MlpPolicy", kuaifair_env.make_sb3("KuaiFair-Toy-v0", seed=11), seed=11, device="cpu")
    agent.learn(steps)
    control = QuotaGreedy(ClickScorer.fit(kuaifair_env.make_world("KuaiFair-Toy-v0", split="train")))
    for name, policy, action_mode in (("A2C", agent, "embedding"), ("QuotaGreedy", control, "slate")):
        test = gym.make("KuaiFair-Toy-v0", split="test", action_mode=action_mode)
        print(f"\n{name}\n{kuaifair_env.evaluate(policy, test).table()}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
