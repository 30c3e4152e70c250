"""DSRM-HRL from its parts: purify, train both levels, save, load, evaluate beside HRL and two controls.

Run: python examples/train_dsrm_hrl.py [training steps]

``kuaifair train --method dsrm-hrl`` does the same with run folders, resuming and the shipped settings. HRL is the same
agent on raw states; QuotaGreedy and SessionQuota learn nothing by reinforcement.
"""

import sys
import tempfile
from pathlib import Path

from stable_baselines3.common.vec_env import VecEnv

import kuaifair_env
from dsrm import PretrainConfig, StatePurifier, TrainingConfig, VecDSRM, pretrain
from hrl_policies.common.click_scorer import ClickScorer
from hrl_policies.controls import QuotaGreedy, SessionQuota
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.study import single_threaded
from kuaifair_env.randomisation import varied
from kuaifair_env.sb3 import KuaiFairVecEnv

ENV = "KuaiFair-Toy-v0"


def main(steps: int = 100_000, rounds: int = 6) -> None:
    single_threaded()
    world = kuaifair_env.make_world(ENV, split="train")
    scorer = ClickScorer.fit(world)
    dsrm = pretrain(world, PretrainConfig(training=TrainingConfig(rounds=rounds)), progress=True)
    print(f"{'method':<14}{'Len':>7}{'R_each':>9}{'R_cum':>8}{'viol.':>8}")
    for name, purifier in (("DSRM-HRL", dsrm), ("HRL", None)):
        report(name, trained(scorer, purifier, steps), evaluation(purifier))
    for control in (QuotaGreedy(scorer), SessionQuota(scorer)):
        report(type(control).__name__, control, evaluation(None))


def trained(scorer: ClickScorer, purifier: StatePurifier | None, steps: int) -> HierarchicalPPO:
    """Trains on users who also have tastes of their own, and returns the agent as a file gives it back."""
    world = varied(kuaifair_env.make_world(ENV, split="train"), 2.0, seed=11)
    session = kuaifair_env.SessionConfig(action_mode="slate", observation_mode="history")
    env = KuaiFairVecEnv(world, session, 64, seed=11)
    agent = HierarchicalPPO(
        "HierarchicalPolicy",
        env if purifier is None else VecDSRM(env, purifier),
        click_scorer=scorer,
        seed=11,
        device="cpu",
    )
    agent.learn(steps)
    with tempfile.TemporaryDirectory() as folder:
        agent.save(Path(folder) / "agent.zip")
        return HierarchicalPPO.load(Path(folder) / "agent.zip", device="cpu")


def evaluation(purifier: StatePurifier | None) -> VecEnv:
    """Returns sessions of the test world, purified where training was."""
    test = kuaifair_env.make_sb3(
        ENV, n_envs=100, split="test", action_mode="slate", observation_mode="history"
    )
    return test if purifier is None else VecDSRM(test, purifier)


def report(name: str, policy: object, env: VecEnv) -> None:
    """Prints a line of the table."""
    found = kuaifair_env.evaluate(policy, env).summary()
    print(
        f"{name:<14}{found['len']:>7.2f}{found['r_each']:>9.3f}{found['r_cum']:>8.2f}{found['violation_rate']:>8.3f}"
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:2]))
