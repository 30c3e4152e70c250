"""How far ahead agents look: every method with other discounts; writes docs/results/discount_WORLD.md.

    python benchmarks/discount.py KuaiFair-KuaiRandTwin-v0 --store runs/discount --results docs/results
    python benchmarks/discount.py KuaiFair-KuaiRandTwin-v0 --store runs/discount --methods dorl --share 1 --seeds 1 2 3

Each trains in the training world, a quarter of its steps (both BCQs: half), and is evaluated there on validation users,
as trials of ``kuaifair tune`` are. The store keeps what was measured; ``--stored`` measures nothing more.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hrl_policies.study.runner import single_threaded
from hrl_policies.study.table import Cell, ResultTable
from hrl_policies.study.tuning import TuningPlan, search_purifier, train_and_score, validation_pair
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import load_settings, method
from kuaifair_env.files import write_text_atomically
from kuaifair_env.registration import make_world

METHODS = (
    "a2c",
    "td3",
    "bcq",
    "bcq-discrete",
    "mofir",
    "dorl",
    "dnair",
    "sac4ir",
    "ppo",
    "recurrent-ppo",
    "dsrm-hrl",
)
DISCOUNTS = (0.0, 0.5)
# A quarter of their steps would be too few to learn anything.
TWICE = ("bcq", "bcq-discrete")


def wanted(
    name: str, world: str, discounts: Sequence[float] | None, seeds: Sequence[int], share: float
) -> list[dict[str, Any]]:
    """Returns what is to be measured of a method: the discounts, or those of the page and its own."""
    settings = load_settings(name, world)
    share = min(1.0, 2 * share) if name in TWICE else share
    if discounts is None:
        discounts = sorted({*DISCOUNTS, settings.hyperparameters["gamma"]})
    return [
        {
            "method": name,
            "gamma": gamma,
            "seed": seed,
            "steps": round(settings.total_steps * share),
            "settings": dict(settings.hyperparameters),
        }
        for gamma in discounts
        for seed in seeds
    ]


def measured(task: Mapping[str, Any], world: str, pair: WorldPair, store: Path) -> dict[str, Any]:
    """Returns a task with its score; what the store holds is not measured again."""
    path = store / f"{task['method']}-gamma{task['gamma']}-seed{task['seed']}-steps{task['steps']}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {key: found[key] for key in task} != json.loads(json.dumps(dict(task))):
            raise ValueError(f"{path} was measured with other settings; choose another store, or remove it")
        return found
    plan = TuningPlan(task["method"], world, total_steps=task["steps"])
    purifier = search_purifier(plan, pair, store)
    start = time.perf_counter()
    score = train_and_score(plan, pair, purifier, {"gamma": task["gamma"]}, task["seed"])
    found = {**task, "r_cum": score, "seconds": round(time.perf_counter() - start, 1)}
    store.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(found))
    return found


def rows(found: Sequence[Mapping[str, Any]], world: str) -> tuple[tuple[Cell, ...], ...]:
    """Returns a line for each method and number of steps."""
    lines = []
    groups = {(METHODS.index(one["method"]), one["steps"]) for one in found}
    for place, steps in sorted(groups):
        name = METHODS[place]
        runs = [one for one in found if (one["method"], one["steps"]) == (name, steps)]
        far = [f"{gamma:g}: {scores(runs, gamma)}" for gamma in gammas(runs) if gamma not in DISCOUNTS]
        near = [scores(runs, gamma) or "-" for gamma in DISCOUNTS]
        shipped = f"{load_settings(name, world).hyperparameters['gamma']:g}"
        lines.append((method(name).title, f"{steps:,}", *near, "; ".join(far) or "-", shipped))
    return tuple(lines)


def gammas(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the discounts of some runs."""
    return sorted({one["gamma"] for one in runs})


def scores(runs: Sequence[Mapping[str, Any]], gamma: float) -> str:
    """Returns what the runs with a discount earned, by seed."""
    chosen = sorted((one["seed"], one["r_cum"]) for one in runs if one["gamma"] == gamma)
    return ", ".join(f"{score:.1f}" for _, score in chosen)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("world", help="environment id")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--discounts", nargs="+", type=float, help="instead of 0, 0.5 and the shipped one")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--share", type=float, default=0.25, help="of the training steps; both BCQs get twice as many"
    )
    parser.add_argument("--stored", action="store_true", help="make the page of what the store holds")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    single_threaded()
    pair = validation_pair(make_world(arguments.world, split="train"), arguments.world)
    if not arguments.stored:
        for name in arguments.methods:
            for task in wanted(name, arguments.world, arguments.discounts, arguments.seeds, arguments.share):
                one = measured(task, arguments.world, pair, arguments.store)
                print(f"{name}, gamma {one['gamma']:g}, seed {one['seed']}: {one['r_cum']:.2f}", flush=True)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.store.glob("*.json"))]
    provenance = pair.train.data.provenance
    table = ResultTable(
        title=f"R_cum by discount, training world of {arguments.world}",
        header=("method", "steps", *(f"gamma {gamma:g}" for gamma in DISCOUNTS), "other gamma", "shipped"),
        rows=rows(found, arguments.world),
        notes=(
            f"R_cum of {min(500, len(pair.test.users))} validation users, 10 sessions each, {provenance.name} "
            f"({provenance.origin} data), Max Len 30; all other settings as shipped. One number for each seed: seed 0 "
            "with a quarter of the steps, 1, 2, 3 with all.",
            "DSRM-HRL: gamma of the worker; its manager's stays as it is.",
            f"Made by: python benchmarks/discount.py {arguments.world} --store STORE --results RESULTS",
        ),
    )
    print(table.markdown())
    if arguments.results:
        stem = arguments.world.removeprefix("KuaiFair-").rpartition("-v")[0].lower()
        write_text_atomically(arguments.results / f"discount_{stem}.md", table.markdown() + "\n")


if __name__ == "__main__":
    main()
