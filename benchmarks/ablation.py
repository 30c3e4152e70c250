"""The paper's Table 3 and the controls that could refute it, in the test world; writes docs/results/ablation_WORLD.md.

    python benchmarks/ablation.py kuairand --data ../shared/data --store runs/ablation --results docs/results
    python benchmarks/ablation.py KuaiFair-KuaiRandTwin-v0 --store runs/ablation --results docs/results

Purifiers are pretrained once (seed 0) and kept in the cache. ``--item-term unbiased`` gives every method and every
control the same item term. Runs are kept in the store; several processes, or machines, may share the work with
``--seeds``. ``--stored`` runs nothing and makes the page of what the store holds.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from partial_worlds import NAMES
from purifiers import pair_of

from hrl_policies.study import (
    PurifierIdentity,
    RunConfig,
    RunRecord,
    StoredRun,
    load_run,
    plan_run,
    result_tables,
    run_folder,
    run_study,
)
from hrl_policies.study.labels import Variant
from hrl_policies.study.results import UserSums
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import mean_interval, paired_difference, stratified_interval
from hrl_policies.study.store import stored_runs
from hrl_policies.study.table import Cell, Measured, ResultTable
from hrl_policies.study.tables import write_records
from hrl_policies.worlds import WorldPair, cached_purifier
from hrl_policies.zoo import method
from kuaifair_env.batch import SessionConfig
from kuaifair_env.files import write_text_atomically

METHODS = (
    "dsrm-hrl",
    "hrl",
    "hrl+tce",
    "hrl+rce",
    "hrl+bod",
    "dsrm-hrl-constant",
    "dsrm-hrl-no-memory",
    "dsrm-hrl-query",
    "flat",
    "flat+fair",
    "dsrm-hrl-literal",
    "a2c",
    "a2c+fair",
)
OTHER_STATES = ("regression", "ips", "unbiased")
CONTROLS = ("random", "greedy-ctr", "quota-greedy", "session-quota", "quality-oracle", "oracle")
PURIFIED_CONTROLS = ("quota-greedy", "session-quota")
SEEDS = (11, 15, 19, 23, 27, 31, 35, 39, 43, 47)
BASE = "dsrm-hrl"
RESAMPLES = 4_000

FloatArray = NDArray[np.float64]


def files(pair: WorldPair, modes: Sequence[str]) -> dict[str, Path]:
    """Returns the files of the purifiers of some modes, pretrained now if need be."""
    return {mode: cached_purifier(pair.train, mode, progress=False) for mode in modes}


def cells_of(
    pair: WorldPair,
    identities: dict[str, PurifierIdentity],
    seeds: Sequence[int],
    max_len: int,
    item_term: str,
    methods: Sequence[str],
) -> list[RunConfig]:
    """Returns all runs: methods on their own states, DSRM-HRL on other states, and controls."""
    session = SessionConfig(max_len=max_len)

    def cell(name: str, seed: int, mode: str) -> RunConfig:
        return plan_run(
            name,
            pair.name,
            seed=seed,
            session=session,
            purifier=identities[mode] if mode else None,
            item_term=item_term,
        )

    found = [cell(name, SEEDS[0], "") for name in CONTROLS]
    found += [cell(name, SEEDS[0], mode) for mode in ("profile", "unbiased") for name in PURIFIED_CONTROLS]
    for seed in seeds:
        found += [cell(name, seed, method(name).purifier) for name in methods]
        if BASE in methods:
            found += [cell(BASE, seed, mode) for mode in OTHER_STATES]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--item-term", default="", choices=["", "log", "ips", "features", "unbiased"])
    parser.add_argument("--max-len", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--stored", action="store_true")
    arguments = parser.parse_args()
    if arguments.stored:
        name = NAMES.get(arguments.world, arguments.world)
        write_page(
            arguments, [run for run in stored_runs(arguments.store) if _wanted(run.config, name, arguments)]
        )
        return
    single_threaded()
    pair = pair_of(arguments.world, arguments.data)
    if arguments.item_term:
        pair = pair.given_mode(arguments.item_term)
    own = {method(name).purifier for name in arguments.methods} - {""}
    paths = files(pair, sorted(own | {"profile", *OTHER_STATES}))
    identities = {
        mode: PurifierIdentity(mode, PurifierIdentity.of_file(path).hash) for mode, path in paths.items()
    }
    cells = cells_of(
        pair, identities, arguments.seeds, arguments.max_len, arguments.item_term, arguments.methods
    )
    purifiers = {identities[mode]: path for mode, path in paths.items()}
    run_study(cells, arguments.store, {pair.name: pair}, purifiers=purifiers).raise_for_failures()
    write_page(arguments, [load_run(arguments.store / run_folder(cell)) for cell in cells])


def write_page(arguments: argparse.Namespace, runs: Sequence[StoredRun]) -> None:
    """Prints the page of finished runs, and writes it and one row for each run where results go."""
    stem = arguments.world.removeprefix("KuaiFair-").removesuffix("-v0").lower()
    term = f"_{arguments.item_term}" if arguments.item_term else ""
    command = f"python benchmarks/ablation.py {arguments.world} --store STORE --max-len {arguments.max_len}"
    command += f" --item-term {arguments.item_term}" if arguments.item_term else ""
    records = [RunRecord.of_run(run) for run in runs]
    parts = [table.markdown() for table in result_tables(records, command)]
    parts.append(comparison_table(runs, command).markdown())
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.results:
        name = f"ablation_{stem}{term}_{arguments.max_len}"
        write_text_atomically(arguments.results / f"{name}.md", text)
        write_records(arguments.results / f"{name}.csv", records)


def comparison_table(runs: Sequence[StoredRun], command: str) -> ResultTable:
    """Returns methods against DSRM-HRL and QuotaGreedy, and how far each goes from QuotaGreedy to the Oracle."""
    grouped: dict[Variant, list[StoredRun]] = defaultdict(list)
    for run in sorted(runs, key=lambda one: one.config.seed):
        grouped[Variant.of_config(run.config)].append(run)
    users = {
        variant: [UserSums.of_sessions(run.sessions()) for run in group] for variant, group in grouped.items()
    }
    earned = {one: np.stack([sums.per_session("r_cum") for sums in group]) for one, group in users.items()}
    stayed = {one: np.stack([sums.per_session("len") for sums in group]) for one, group in users.items()}
    base, floor, ceiling = Variant(BASE, method(BASE).purifier), Variant("quota-greedy"), Variant("oracle")
    low, high = earned[floor].mean(), earned[ceiling].mean()
    rows: list[tuple[Cell, ...]] = [
        (
            variant.title,
            str(len(own)),
            _middle(stayed[variant]),
            _middle(own),
            " ".join(f"{value:.2f}" for value in own.mean(axis=1)),
            "" if variant == floor else _difference(own, earned[floor]),
            "" if variant == base else _difference(own, earned[base]),
            "" if variant == floor else _difference(stayed[variant], stayed[floor]),
            f"{100 * (own.mean() - low) / (high - low):.0f} %",
        )
        for variant, own in sorted(earned.items(), key=lambda entry: -float(entry[1].mean()))
    ]
    header = ("method", "seeds", "Len, IQM", "R_cum, IQM", "R_cum of every seed", f"R_cum - {floor.title}",
              f"R_cum - {base.title}", f"Len - {floor.title}", "way to the Oracle")  # fmt: skip
    notes = (
        "Interquartile means over training seeds with stratified bootstrap intervals; differences are paired by seed "
        "and user, both resampled (95 %).",
        f"Made by: {command}",
    )
    return ResultTable("Differences and headroom", header, tuple(rows), notes)


def _middle(table: FloatArray) -> Measured:
    """Returns the interquartile mean over seeds of ``(S, U)`` results."""
    if len(table) < 2:
        return Measured(float(table.mean()), 2)
    return Measured.of_interval(stratified_interval(table.mean(axis=1)[:, None], resamples=RESAMPLES), 2)


def _difference(first: FloatArray, second: FloatArray) -> Measured:
    """Pairs seeds where there are several on both sides; what has one run stands against each seed of the other."""
    if len(first) != len(second) and 1 in (len(first), len(second)):
        first, second = np.broadcast_arrays(first, second)
    count = min(len(first), len(second))
    if count < 2:
        interval = mean_interval(first[0] - second[0], resamples=RESAMPLES)
    else:
        interval = paired_difference(first[:count], second[:count], resamples=RESAMPLES)
    return Measured.of_interval(interval, 2, sign=True)


def _wanted(config: RunConfig, world: str, arguments: argparse.Namespace) -> bool:
    asked = (world, arguments.max_len, arguments.item_term)
    known = config.method in METHODS or config.method in CONTROLS
    return known and (config.world, config.session.max_len, config.item_term) == asked


if __name__ == "__main__":
    main()
