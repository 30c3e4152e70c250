"""The paper's order of methods beside the one here, in both protocols; writes reproduction.md.

    python benchmarks/run_study.py benchmarks/studies/baselines.yml --world kuairand --data DATA --output STUDY
    python benchmarks/reproduction.py kuairand --data DATA --study STUDY --store STORE --results docs/results

*Two worlds*: agents are evaluated among held-out users of the test world, as everywhere in this project. *One world*:
the same agents are evaluated again in the world that they were trained in, as the paper does. What the store holds is
not evaluated again.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from scipy.stats import kendalltau
from worlds import argument_parser, open_worlds, write_page

from hrl_policies.study import evaluate_run, single_threaded
from hrl_policies.study.labels import Variant
from hrl_policies.study.loading import load_policy, purifier_of
from hrl_policies.study.paper_tables import PublishedResult, published_result
from hrl_policies.study.results import EvaluatedRun, comparisons
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.store import stored_runs
from hrl_policies.study.tuning import validation_pair
from hrl_policies.worlds import WorldPair
from kuaifair_env.files import write_text_atomically

MAX_LEN = 30
FIGURES = ("len", "r_cum", "violation_rate")
EXPLANATIONS: Mapping[str, str] = {
    "dsrm-hrl": "first in two worlds by its belief: its start is the same; in one world HRL's interval holds it",
    "hrl": "its quota keeps the bound; in one world it is near QuotaGreedy, as all quotas are",
    "flat": "nothing makes it keep the bound, and most of its slates break it; the paper's meets it (AD .18)",
    "dnair": "more than half of its slates break the bound, as in the paper (AD .56)",
    "bcq": "it imitates logged slates, which do not keep the bound; the paper's nearly does (AD .30)",
    "td3": "it begins at the state; most of its slates break the bound",
    "mofir": "whatever its preference, nearly all of its slates break the bound, as in the paper (AD .81)",
    "sac4ir": "ahead where fewer of its slates break the bound; without debiasing, which its search took away",
    "a2c": "the paper's shows popular items alone (AD .92); here both groups, most slates inside the bound",
    "dorl": "it learns in a model of the log, where the log is right; the paper's shows popular items alone (AD .95)",
}
"""What explains where a method stands, as far as figures show, by method."""
READING = """**The paper's order is not reproduced**, in either protocol: the two orders agree no more than
chance may have it. Three differences matter most.

- *Worlds.* In the paper's simulators .7 to .8 of what is shown is clicked, here .2 to .5 in two worlds and .4 to .7
  in one. Most sessions are shorter here (not those of SAC4IR and A2C, nor in one world of HRL and DORL), and more is
  lost by a slate that breaks the bound.
- *The bound.* Most of our order follows the violation rate. The paper has no rule with a quota; of what has to learn a
  bound from shorter sessions only SAC4IR and A2C with a fairness reward earn more than QuotaGreedy on average, in two
  worlds and within what other seeds may change; in one world nothing does.
- *One world or two.* Where agents are evaluated in the world of their own log, the log is never wrong: every rule with
  a quota earns about the same, QuotaGreedy as much as a belief. Evaluated on other feedback they part, by what they
  remember of the session.

The place of a method with two or three seeds among its neighbours says little. All agents see the session's clock.
"""

Figures = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Row:
    """A method: figures of its seeds in both protocols, and the paper's."""

    variant: Variant
    two_worlds: Figures
    one_world: Figures
    published: PublishedResult | None

    def means(self, protocol: str) -> float:
        """Returns mean R_cum of the seeds in a protocol."""
        return float(np.mean(getattr(self, protocol)["r_cum"]))


def in_one_world(run: EvaluatedRun, worlds: WorldPair, store: Path) -> dict[str, float]:
    """Returns what an agent earns in the world that it was trained in, from the store if it was evaluated before."""
    place = store / f"{run.run.folder.name}.json"
    if not place.exists():
        config = run.run.config
        users = min(config.n_users or len(worlds.train.users), len(worlds.train.users) // 5)
        same = validation_pair(worlds.train, f"{worlds.name}, training world")
        policy = load_policy(run.run, worlds)
        result = evaluate_run(replace(config, n_users=users), policy, same, purifier_of(run.run))
        figures = {name: float(result.summary()[name]) for name in FIGURES}
        write_text_atomically(place, json.dumps(figures))
        print(f"{place.stem}: R_cum {figures['r_cum']:.2f} in its training world", flush=True)
    stored: dict[str, float] = json.loads(place.read_text(encoding="utf-8"))
    return stored


def rows_of(study: Path, worlds: WorldPair, store: Path) -> list[Row]:
    """Returns all methods that were run with repeats allowed and need not know the test world, best first."""
    (group,) = comparisons(
        [
            run
            for run in stored_runs(study)
            if run.config.session.repeats == "allow" and run.config.session.max_len == MAX_LEN
        ]
    )
    by_variant: dict[Variant, list[EvaluatedRun]] = defaultdict(list)
    for run in group.runs:
        if not run.variant.privileged:
            by_variant[run.variant].append(run)
    rows = []
    for variant, runs in by_variant.items():
        again = [in_one_world(run, worlds, store) for run in runs]
        rows.append(
            Row(
                variant,
                {name: [run.summary[name] for run in runs] for name in FIGURES},
                {name: [figures[name] for figures in again] for name in FIGURES},
                published_result(runs[0].task, variant, MAX_LEN),
            )
        )
    return sorted(rows, key=lambda row: -row.means("two_worlds"))


def ranks_of(rows: Sequence[Row]) -> dict[str, dict[Variant, int]]:
    """Returns the rank of each method of the paper, best first: in both protocols and in the paper."""
    compared = [row for row in rows if row.published is not None]
    keys = {
        "two_worlds": lambda row: row.means("two_worlds"),
        "one_world": lambda row: row.means("one_world"),
        "paper": lambda row: row.published.means["r_cum"],
    }
    return {
        name: {row.variant: rank for rank, row in enumerate(sorted(compared, key=key, reverse=True), 1)}
        for name, key in keys.items()
    }


def table(rows: Sequence[Row]) -> list[str]:
    """Returns the table of all methods, the paper's with its ranks, and how the orders agree."""
    ranks = ranks_of(rows)
    lines = [
        "| method | seeds | two worlds: rank | Len | R_cum | violation rate | one world: rank | Len | R_cum "
        "| violation rate | the paper: rank | Len | R_cum | what explains it, as far as figures show |",
        "|---|---:|" + "---:|" * 11 + "---|",
    ]
    for row in rows:
        cells = [row.variant.title, str(len(row.two_worlds["r_cum"]))]
        for name, figures in (("two_worlds", row.two_worlds), ("one_world", row.one_world)):
            cells += [str(ranks[name].get(row.variant, "")), *(_cell(figures[figure]) for figure in FIGURES)]
        cells += [""] * 3 if row.published is None else [
            str(ranks["paper"][row.variant]),
            *(f"{row.published.means[name]:.2f} ± {row.published.spreads[name]:.2f}" for name in ("len", "r_cum")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join([*cells, EXPLANATIONS.get(row.variant.method, '')])} |")
    agreement = [
        f"{title} {_kendall(ranks[name], ranks['paper'])}"
        for name, title in (("two_worlds", "two worlds"), ("one_world", "one world"))
    ]
    return [
        *lines,
        "",
        f"Agreement of orders by R_cum, among the {len(ranks['paper'])} methods that the paper has (Kendall's tau; 1: "
        f"the same order, 0: none): {', '.join(agreement)}.",
    ]


def _kendall(ours: Mapping[Variant, int], paper: Mapping[Variant, int]) -> str:
    result = kendalltau([ours[variant] for variant in paper], list(paper.values()))
    return f"{result.statistic:+.2f} (p {result.pvalue:.2f})"


def _cell(values: Sequence[float]) -> str:
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    interval = student_interval(np.asarray(values))
    return f"{mean:.2f} ± {(interval.high - interval.low) / 2:.2f}"


def notes(worlds: WorldPair, arguments: Namespace) -> list[str]:
    """Returns what the table is made from."""
    data, option = worlds.test.data, " --data DATA" if arguments.data else ""
    return [
        "",
        f"- Two worlds: 1,000 held-out users of the test world, whose feedback is fitted on random exposures. One "
        f"world: {min(1_000, len(worlds.train.users) // 5):,} users of the training world, fitted on the log that "
        "agents read, without deviations. Frozen, one session each, repeats allowed, Max Len 30, slates of 10. ± is "
        "half the 95 % Student interval for other training seeds; of the paper the spread that it prints.",
        "- All agents that learn in sessions train with deviations of users, drawn anew for each session, which the "
        "paper does not have. Ranks are among methods that the paper has; the others are controls and variants.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprints "
        f"{worlds.train.fingerprint} (training) and {worlds.test.fingerprint} (test). The paper's simulators were not "
        "released.",
        f"- Made by: python benchmarks/reproduction.py {arguments.world}{option} --study STUDY --store STORE --results "
        "docs/results, of the runs of benchmarks/studies/baselines.yml.",
    ]


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--study", type=Path, required=True, help="folder of the study of baselines")
    parser.add_argument("--store", type=Path, required=True, help="folder for evaluations in the training world")
    arguments = parser.parse_args()
    single_threaded()
    worlds = open_worlds(arguments.world, arguments.data)
    arguments.store.mkdir(parents=True, exist_ok=True)
    rows = rows_of(arguments.study, worlds, arguments.store)
    heading = ["# The paper's order of methods, and ours", "", READING]
    write_page(arguments.results, "reproduction.md", "\n".join([*heading, *table(rows), *notes(worlds, arguments)]))


if __name__ == "__main__":
    main()
