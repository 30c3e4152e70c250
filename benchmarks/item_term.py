"""What an item term is worth to policies that do not learn, and whether it leaks; writes item_term_WORLD.md.

    python benchmarks/item_term.py kuairand --data ../shared/data --results docs/results

The leak check concerns the ``unbiased`` term alone. It reads the test log of declared calibration users, and the test
world's response was fitted on the whole test log, so both share the randomness of those rows. The check fits the
response again without them; what the term is worth there, it is worth by knowledge.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import PARTIAL, argument_parser, open_worlds, short_name, write_page

from dsrm.item_term import ITEM_TERM_MODES
from hrl_policies.study import evaluate_run, plan_run
from hrl_policies.study.runner import build_policy, single_threaded
from hrl_policies.study.statistics import mean_interval
from hrl_policies.study.store import machine
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig
from kuaifair_env.intervals import Interval
from kuaifair_env.response import fit_response
from kuaifair_env.splits import calibration_users

POLICIES = ("greedy-ctr", "quota-greedy", "session-quota")
BOUNDS = ("random", "quality-oracle", "oracle")
HEADER = "| item term | " + " | ".join(POLICIES) + " |\n|---|" + "---:|" * len(POLICIES)


def earned(pair: WorldPair, name: str) -> Interval:
    """Returns a policy's R_cum with its interval over users."""
    config = plan_run(name, pair.name, session=SessionConfig(max_len=30), item_term="")
    result = evaluate_run(config, build_policy(config, pair), pair)
    return mean_interval(result.sessions.columns()["r_cum"])


def line(pair: WorldPair, name: str, policies: tuple[str, ...] = POLICIES) -> str:
    """Returns a line of the table."""
    found = [earned(pair, policy) for policy in policies]
    cells = [f"{one.estimate:.2f} [{one.low:.2f}, {one.high:.2f}]" for one in found]
    return f"| {name} | " + " | ".join(cells) + " |"


def without_calibration_users(pair: WorldPair) -> WorldPair:
    """Returns the pair with a test world whose response has not seen the calibration users' feedback."""
    data = pair.test.data
    kept = data.test.take(~np.isin(data.test.users, calibration_users(data)))
    response = fit_response(replace(data, test=kept), "test")
    return WorldPair(pair.name, pair.train, replace(pair.test, response=response))


def table(pair: WorldPair) -> list[str]:
    """Returns the lines of one world: no term, then every mode."""
    lines = [HEADER, line(pair, "none")]
    for mode in ITEM_TERM_MODES:
        mark = "*" if mode == "unbiased" else ""
        lines.append(line(pair.given_mode(mode), mode + mark))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argument_parser(__doc__)
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    data = pair.test.data
    bounds = ", ".join(f"{name} {earned(pair, name).estimate:.2f}" for name in BOUNDS)
    page = [
        f"### {pair.name}: R_cum by item term, Max Len 30",
        "",
        *table(pair),
        "",
        f"Bounds: {bounds}.",
        "",
    ]
    if arguments.world in PARTIAL:
        page += [
            "The same in a test world whose response was fitted without the calibration users' feedback:",
            "",
            *table(without_calibration_users(pair)),
            "",
        ]
    page += [
        f"Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; 1,000 held-out users, 95 % "
        "bootstrap intervals over users; no agent learns here. * reads the test log of declared calibration users (a "
        "tenth), none of whom is evaluated.",
        "",
        f"Made by: `python benchmarks/item_term.py {arguments.world} --results RESULTS` ({machine()}).",
    ]
    write_page(arguments.results, f"item_term_{short_name(arguments.world)}.md", "\n".join(page))


if __name__ == "__main__":
    main()
