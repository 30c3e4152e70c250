"""TD3, BCQ and discrete SAC on public control tasks, beside reference figures; writes docs/results/control_tasks.md.

    python benchmarks/control_tasks.py --results docs/results

What the slow tests of tests/hrl_policies/test_control_task.py and test_discrete_sac.py train, with several seeds.
Returns are means over 20 episodes (24 for CartPole) from the same starts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/hrl_policies"))

from test_control_task import LENGTH, Cloned, bcq_returns, flailing_log, returns, td3_return
from test_discrete_sac import cart_pole_return

from hrl_policies.study.runner import single_threaded
from hrl_policies.study.table import Measured, ResultTable
from hrl_policies.study.tables import half_interval
from kuaifair_env.files import write_text_atomically


def td3(seed: int) -> dict[str, float]:
    """Trains TD3 on Pendulum."""
    return {"TD3, Pendulum-v1, 8,000 steps": td3_return(seed)}


def bcq(seed: int) -> dict[str, float]:
    """Learns Pendulum from a log in which every other session flails, beside cloning the same log."""
    data = flailing_log(seed, seed)
    return {
        "the log that BCQ learns from": float(data.rewards.reshape(-1, LENGTH).sum(axis=1).mean()),
        "behaviour cloning of that log": float(returns(Cloned(data)).mean()),
        "BCQ, Pendulum-v1, 3,000 gradient steps": float(np.mean(bcq_returns(data, seed))),
    }


def discrete_sac(seed: int) -> dict[str, float]:
    """Trains discrete SAC on CartPole."""
    return {"discrete SAC, CartPole-v1, 30,000 steps": float(cart_pole_return(seed))}


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
