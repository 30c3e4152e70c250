"""How much the toy's order of methods depends on its draw of users, items and tastes; writes toy_draws.md.

    python benchmarks/toy_draws.py --results docs/results

The toy is one draw of a twin of 200 held-out users. Each row is another one, of the same settings and another seed; the
first is the toy itself. DSRM-HRL is played before its training, from which its guard has kept nothing in any world.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import cell, twin_worlds, write_page

from dsrm.pretraining import PretrainConfig, fitted_scorer, pretrain
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import Control, Oracle, QuotaGreedy, SessionQuota
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import mean_interval, student_interval
from hrl_policies.worlds import WorldPair
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.batch import Repeats
from kuaifair_env.sb3 import KuaiFairVecEnv

DRAWS, SEED = 10, 2603
OWN = "DSRM-HRL, untrained"
OTHERS = ("BeliefQuota", "SessionQuota")
REPEATS: tuple[Repeats, ...] = ("allow", "forbid")


def agents(pair: WorldPair) -> dict[str, Control]:
    """Returns all agents by name."""
    log, start = fitted_scorer(pair.train, "log"), pretrain(pair.train, PretrainConfig(mode="candidates"))
    return {
        OWN: BeliefQuota(start.scorer, scales=start.scales),
        "BeliefQuota": BeliefQuota(log),
        "SessionQuota": SessionQuota(log),
        "QuotaGreedy": QuotaGreedy(log),
        "Oracle": Oracle(),
    }


def returns(pair: WorldPair, agent: Control, repeats: Repeats) -> NDArray[np.float64]:
    """Returns R_cum of one session of each test user, ``float64 (U,)``."""
    env = KuaiFairVecEnv(pair.test, SessionConfig(action_mode="slate", repeats=repeats))
    return np.asarray(evaluate(agent, env, n_users=len(pair.test.users), seed=SEED).sessions.return_, np.float64)


def table(earned: list[dict[str, NDArray[np.float64]]]) -> list[str]:
    """Returns the lines of a table with a row for each draw, and one for their mean."""
    names = list(earned[0])
    header = [*names, *(f"{OWN}, less {other}" for other in OTHERS)]
    lines = [f"| draw | {' | '.join(header)} |", "|---|" + "---:|" * len(header)]
    for draw, found in enumerate(earned):
        means = [f"{found[name].mean():.2f}" for name in names]
        gains = [cell(mean_interval(found[OWN] - found[other]), sign=True) for other in OTHERS]
        lines.append(f"| {draw}{' (the toy)' if draw == 0 else ''} | {' | '.join([*means, *gains])} |")
    means = [f"{np.mean([found[name].mean() for found in earned]):.2f}" for name in names]
    of_draws = [np.asarray([(found[OWN] - found[other]).mean() for found in earned]) for other in OTHERS]
    gains = [cell(student_interval(values), sign=True) for values in of_draws]
    return [*lines, f"| mean | {' | '.join([*means, *gains])} |"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=DRAWS, help="draws of the toy's world, the toy itself first")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    earned: dict[Repeats, list[dict[str, NDArray[np.float64]]]] = {repeats: [] for repeats in REPEATS}
    for draw in range(arguments.draws):
        pair = twin_worlds(f"Toy, draw {draw}", "Toy", seed=draw)
        of_all = agents(pair)
        for repeats, rows in earned.items():
            rows.append({name: returns(pair, agent, repeats) for name, agent in of_all.items()})
    text = "\n".join(
        [
            "# Draws of the toy",
            "",
            "R_cum, frozen, in worlds that differ from `KuaiFair-Toy-v0` in the seed of users, items and tastes alone.",
            "",
            *(line for repeats in REPEATS for line in (f"## Repeats {repeats}", "", *table(earned[repeats]), "")),
            f"- All {len(earned['allow'][0]['Oracle'])} test users of each draw, one session each, evaluation seed "
            f"{SEED}, Max Len 30, slates of 10. Brackets: 95 % intervals, of a draw over its users (bootstrap, "
            "paired), of the mean over draws (Student).",
            "- DSRM-HRL is played before its training: `belief-quota-features`, slate by slate. Nothing is trained, "
            "and nothing was chosen in these worlds.",
            f"- Made by: python benchmarks/toy_draws.py --draws {arguments.draws} --results docs/results",
        ]
    )
    write_page(arguments.results, "toy_draws.md", text)


if __name__ == "__main__":
    main()
