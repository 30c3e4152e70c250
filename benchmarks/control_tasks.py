"""TD3, BCQ and discrete SAC on public control tasks, beside reference figures; writes docs/results/control_tasks.md.

    python benchmarks/control_tasks.py --results docs/results

The same settings as the slow tests (tests/hrl_policies/test_control_task.py, test_discrete_sac.py), with several
training seeds. Returns are means over 20 episodes (24 for CartPole) from the same starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/hrl_policies"))

from stable_baselines3 import TD3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from test_control_task import LENGTH, PENDULUM, Cloned, EnergyController, returns

from hrl_policies.baselines.bcq import BCQ
from hrl_policies.baselines.collection import collect_transitions
from hrl_policies.baselines.discrete_sac import DiscreteSAC
from hrl_policies.study.result_table import Measured, ResultTable
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.tables import half_interval
from kuaifair_env.data.files import write_text_atomically


def td3(seed: int) -> dict[str, float]:
    """Trains TD3 on Pendulum."""
    model = TD3(
        "MlpPolicy",
        PENDULUM,
        learning_starts=500,
        batch_size=100,
        gamma=0.98,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 0.1)),
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    ).learn(8_000)
    return {"TD3, Pendulum-v1, 8,000 steps": float(returns(model).mean())}


def bcq(seed: int) -> dict[str, float]:
    """Learns Pendulum from a log in which every other session flails, beside cloning the same log."""
    flailing = np.tile([0.1, 0.9], 10)
    data = collect_transitions(
        EnergyController(flailing, seed), make_vec_env(PENDULUM, 20), 20 * 3 * LENGTH, seed
    )
    model = BCQ(
        "BCQPolicy",
        None,
        data,
        gamma=0.98,
        tau=0.01,
        policy_kwargs={
            "net_arch": [64, 64],
            "action_net_arch": [64, 64],
            "perturbation": 0.2,
            "samples": 20,
        },
        seed=seed,
        device="cpu",
    )
    learned = []
    for steps in (2_000, 500, 500):
        model.learn(steps, log_interval=None, reset_num_timesteps=False)
        learned.append(returns(model).mean())
    return {
        "the log that BCQ learns from": float(data.rewards.reshape(-1, LENGTH).sum(axis=1).mean()),
        "behaviour cloning of that log": float(returns(Cloned(data)).mean()),
        "BCQ, Pendulum-v1, 3,000 gradient steps": float(np.mean(learned)),
    }


def discrete_sac(seed: int) -> dict[str, float]:
    """Trains discrete SAC on CartPole."""
    model = DiscreteSAC(
        "SoftItemPolicy",
        make_vec_env("CartPole-v1", 8, seed=seed),
        learning_rate=1e-3,
        learning_starts=1_000,
        batch_size=64,
        gradient_steps=4,
        tau=0.005,
        target_entropy_ratio=0.5,
        huber_delta=1.0,
        buffer_size=30_000,
        policy_kwargs={"net_arch": [64, 64]},
        seed=seed,
        device="cpu",
    ).learn(30_000)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8, seed=99), 24)
    return {"discrete SAC, CartPole-v1, 30,000 steps": float(np.asarray(mean))}


REFERENCES = {
    "TD3, Pendulum-v1, 8,000 steps": "-196 ± 119: Stable-Baselines3's published model (RL Zoo, 20,000 steps)",
    "behaviour cloning of that log": "what BCQ must beat to be more than imitation",
    "BCQ, Pendulum-v1, 3,000 gradient steps": "-155: the log's controller without flailing",
    "discrete SAC, CartPole-v1, 30,000 steps": "195: where CartPole-v0 counts as solved; 500 is the most",
}
TASKS: tuple[Callable[[int], dict[str, float]], ...] = (td3, bcq, discrete_sac)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    found: dict[str, list[float]] = {}
    for task in TASKS:
        for seed in arguments.seeds:
            for name, value in task(seed).items():
                found.setdefault(name, []).append(value)
                print(name, seed, round(value, 1), flush=True)
    rows = []
    for name, values in found.items():
        mean, half = float(np.mean(values)), half_interval(values)
        each = ", ".join(f"{value:.0f}" for value in values)
        rows.append((name, Measured(mean, 0, mean - half, mean + half), each, REFERENCES.get(name, "-")))
    table = ResultTable(
        title="Public control tasks",
        header=("what", "mean return", "each seed", "reference"),
        rows=tuple(rows),
        notes=(
            f"Training seeds {', '.join(map(str, arguments.seeds))}; brackets: 95 % Student interval over them. BCQ "
            "learns from 12,000 transitions of a controller that flails in a tenth or nine tenths of its steps.",
            "Made by: python benchmarks/control_tasks.py --results RESULTS",
        ),
    )
    text = table.markdown()
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "control_tasks.md", text + "\n")


if __name__ == "__main__":
    main()
