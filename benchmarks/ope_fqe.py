"""R_cum by fitted Q evaluation beside the true R_cum, in the toy; writes a section of ope_checks.md.

python benchmarks/ope_fqe.py --results docs/results
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import cell, open_worlds, write_section

from hrl_policies.controls import Control, GreedyCTR, QuotaGreedy, RandomSlates, SessionQuota
from hrl_policies.ope import SupportWarning, fitted_q_evaluation, log_sessions
from hrl_policies.study import single_threaded
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.sb3 import KuaiFairVecEnv


class Mixture(Control):
    """A behaviour policy that draws the control that each slate comes from."""

    def __init__(self, controls: list[Control], seed: int = 0) -> None:
        super().__init__()
        self._controls = controls
        self._rng = np.random.default_rng(seed)

    def bind(self, batch: SessionBatch) -> None:
        """See :class:`Control`."""
        super().bind(batch)
        for control in self._controls:
            control.bind(batch)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        slates = np.stack([control.slates(states, batch) for control in self._controls])
        return slates[self._rng.integers(len(slates), size=len(states)), np.arange(len(states))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=3, help="sessions of each user, logged and for the truth")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    warnings.simplefilter("ignore", SupportWarning)
    pair = open_worlds("KuaiFair-Toy-v0")
    world, scorer = pair.test, pair.scorer
    popular = world.groups.popular
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"), 256, seed=0)
    targets = {
        "RandomSlates": RandomSlates(),
        "GreedyCTR": GreedyCTR(scorer),
        "QuotaGreedy": QuotaGreedy(scorer),
        "SessionQuota": SessionQuota(scorer),
    }
    lines = []
    for title, target in targets.items():
        random = [RandomSlates(), RandomSlates(popular), RandomSlates(~popular)]
        behaviour = Mixture([*random, GreedyCTR(scorer), QuotaGreedy(scorer)])
        log = log_sessions(behaviour, target, env, episodes_per_user=arguments.episodes)
        result = fitted_q_evaluation(log)
        truth = evaluate(target, env, episodes_per_user=arguments.episodes, seed=1).engagement.cumulative_reward
        error = result.interval.estimate - truth
        inside = result.interval.low <= truth <= result.interval.high
        lines.append(
            f"| {title} | {result.behaviour:.2f} | {cell(result.interval)} | {truth:.2f} | {error:+.2f} "
            f"| {'yes' if inside else 'no'} | {result.outside:.1%} |"
        )
        print(lines[-1], flush=True)
    page = [
        "# R_cum by fitted Q evaluation, in the toy",
        "",
        f"Logged: {arguments.episodes} sessions of each of {len(world.users)} users, whole, with leaving. The "
        "behaviour policy draws for each slate one of RandomSlates (of all items, popular ones, long-tail ones), "
        f"GreedyCTR and QuotaGreedy. Truth: the policy's own {arguments.episodes} sessions of each user, with another "
        "seed. Brackets: "
        "95 % by a cluster bootstrap over users.",
        "",
        "| policy | R_cum logged | fitted Q evaluation | true R_cum | error | truth inside | slates unlike the log's |",
        "|---|---:|---:|---:|---:|---|---:|",
        *lines,
        "",
        "Errors hold a bias of the regression (nine numbers, a polynomial of second degree) that no interval shows, "
        "and for policies far from what was logged intervals are wide: an order of magnitude, no comparison of "
        "policies.",
        "",
        f"Made by: python benchmarks/ope_fqe.py --episodes {arguments.episodes} --results docs/results.",
    ]
    write_section(arguments.results, "ope_checks.md", "\n".join(page))


if __name__ == "__main__":
    main()
