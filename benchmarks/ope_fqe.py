"""R_cum by fitted Q evaluation beside the true R_cum, where it is known; writes a section of ope_checks.md.

python benchmarks/ope_fqe.py KuaiFair-Toy-v0 --results docs/results
python benchmarks/ope_fqe.py KuaiFair-KuaiRandTwin-v0 --results docs/results
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import argument_parser, cell, open_worlds, write_section

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
    parser = argument_parser(__doc__)
    parser.add_argument("--episodes", type=int, default=3, help="sessions of each user, logged and for the truth")
    parser.add_argument("--users", type=int, default=400, help="users of the test world, if it has so many")
    arguments = parser.parse_args()
    single_threaded()
    warnings.simplefilter("ignore", SupportWarning)
    pair = open_worlds(arguments.world, arguments.data)
    world, scorer = pair.test, pair.scorer
    popular = world.groups.popular
    n_users = min(arguments.users, len(world.users))
    played = {"episodes_per_user": arguments.episodes, "n_users": n_users}
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
        log = log_sessions(behaviour, target, env, **played)
        result = fitted_q_evaluation(log)
        truth = evaluate(target, env, seed=1, **played).engagement.cumulative_reward
        error = result.interval.estimate - truth
        inside = result.interval.low <= truth <= result.interval.high
        lines.append(
            f"| {title} | {result.behaviour:.2f} | {cell(result.interval)} | {truth:.2f} | {error:+.2f} "
            f"| {'yes' if inside else 'no'} | {result.outside:.1%} |"
        )
        print(lines[-1], flush=True)
    page = [
        f"# R_cum by fitted Q evaluation: {pair.name}",
        "",
        f"Logged: {arguments.episodes} sessions of each of {n_users} users, whole, with leaving. The "
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
        f"Made by: python benchmarks/ope_fqe.py {arguments.world} --episodes {arguments.episodes} --users "
        f"{arguments.users} --results docs/results.",
    ]
    write_section(arguments.results, "ope_checks.md", "\n".join(page))


if __name__ == "__main__":
    main()
