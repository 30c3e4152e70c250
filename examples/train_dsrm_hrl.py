"""DSRM-HRL: train both levels from a belief on, save, load, and evaluate beside HRL and two controls.

Run: python examples/train_dsrm_hrl.py [training steps]

``kuaifair train --method dsrm-hrl`` does the same with run folders and resuming. HRL reads states as
they are; QuotaGreedy and SessionQuota learn nothing by reinforcement.
"""

import sys
import tempfile
from pathlib import Path

from stable_baselines3.common.vec_env import VecEnv

import kuaifair_env
from dsrm import ClickScorer
from hrl_policies import (
    HierarchicalPPO,
    QuotaGreedy,
    SessionQuota,
    make_evaluation_env,
    make_training_env,
    single_threaded,
)

ENV = "KuaiFair-Toy-v0"


def main(steps: int = 100_000) -> None:
    single_threaded()
    print(f"{'method':<14}{'Len':>7}{'R_each':>9}{'R_cum':>8}{'viol.':>8}")
    for method, policy in (("dsrm-hrl", "RankingPolicy"), ("hrl", "HierarchicalPolicy")):
        agent = trained(method, policy, steps)
        report(agent.method, agent, make_evaluation_env(method, ENV))
    scorer = ClickScorer.fit(kuaifair_env.make_world(ENV, split="train"))
    for control in (QuotaGreedy(scorer), SessionQuota(scorer)):
        report(type(control).__name__, control, make_evaluation_env("hrl", ENV))


def trained(method: str, policy: str, steps: int) -> HierarchicalPPO:
    """Trains an agent, and returns it as its file gives it back."""
    # The sessions bring what belongs to the method: for DSRM-HRL the candidates of a belief.
    agent = HierarchicalPPO(policy, make_training_env(method, ENV, seed=11), seed=11, device="cpu")
    agent.learn(steps)
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "agent.zip")
        return HierarchicalPPO.load(Path(folder) / "agent.zip", device="cpu")


def report(name: str, policy: object, env: VecEnv) -> None:
    """Prints a line of the table."""
    summary = kuaifair_env.evaluate(policy, env).summary()
    print(
        f"{name:<14}{summary['len']:>7.2f}{summary['r_each']:>9.3f}{summary['r_cum']:>8.2f}"
        f"{summary['violation_rate']:>8.3f}"
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
