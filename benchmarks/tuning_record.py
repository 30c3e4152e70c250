"""The record of the searches behind the shipped hyperparameters: a section of tuning.md, and tuning_WORLD.csv.gz.

    kuaifair tune METHOD --env KuaiFair-KuaiRandTwin-v0 --trials 12 --steps STEPS --confirm 3 -o runs/tuning/METHOD
    python benchmarks/tuning_record.py runs/tuning --results docs/results

Every method gets 12 trials of a quarter of its training steps and, if a trial beat the shipped settings, three runs of
all its steps for either side. STEPS of each are in the section. A folder of searches is one world's; its parts may be
called otherwise than their methods, where one was searched again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worlds import short_name, write_section

from hrl_policies.study import plan_run, train
from hrl_policies.study.records import write_table
from hrl_policies.study.tables import Cell, Measured, ResultTable
from hrl_policies.study.tuning import CONFIRMATION, CRITERION, JOURNAL, TRIALS, validation_pair
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import METHODS, controls, method
from kuaifair_env.registration import make_world

Row = dict[str, str]


def rows_of(path: Path) -> list[Row]:
    """Reads a table; an absent one is empty."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def searched(trials: Sequence[Row]) -> list[str]:
    """Returns the names of what was searched."""
    return [name for name in trials[0] if name not in ("number", CRITERION, "seconds", "error")]


def short(value: Any) -> str:
    """Returns a setting as it is read, not as it is stored."""
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def plan_of(folder: Path) -> dict[str, Any]:
    """Returns what was searched: the plan that the journal of a search begins with.

    Raises:
        ValueError: If there is none.
    """
    for line in (folder / JOURNAL).read_text(encoding="utf-8").splitlines():
        plan = json.loads(line).get("user_attr", {}).get("plan")
        if plan:
            return dict(plan)
    raise ValueError(f"{folder / JOURNAL} does not say what was searched")


def title_of(folder: Path) -> str:
    """Returns the name of a method, and of its search where it is called otherwise."""
    name = plan_of(folder)["method"]
    title = method(name).title
    return title if folder.name == name else f"{title} ({folder.name})"


def summary(folder: Path) -> tuple[Cell, ...]:
    """Returns the line of a search."""
    trials, confirmed = rows_of(folder / TRIALS), rows_of(folder / CONFIRMATION)
    scored = [row for row in trials if row[CRITERION]]
    best = max(scored, key=lambda row: float(row[CRITERION]))
    sides = {
        side: [float(row[CRITERION]) for row in confirmed if row["settings"] == side] for side in ("start", "found")
    }
    kept = "start"
    cells: list[Cell] = ["-", "-"]
    if confirmed:
        means = {side: sum(scores) / len(scores) for side, scores in sides.items()}
        kept = "found" if means["found"] > means["start"] else "start"
        cells = [f"{means[side]:.2f} ({', '.join(f'{one:.1f}' for one in sides[side])})" for side in sides]
    if kept == "found":
        values = json.loads(next(row["values"] for row in confirmed if row["settings"] == "found"))
    else:
        values = {part: trials[0][part] for part in searched(trials)}
    settings = ", ".join(f"{part.split('.')[-1]} {short(value)}" for part, value in values.items())
    seconds = sum(float(row["seconds"]) for row in (*trials, *confirmed))
    return (
        title_of(folder),
        str(len(trials)),
        Measured(float(trials[0][CRITERION]), 2),
        Measured(float(best[CRITERION]), 2),
        *cells,
        f"found, trial {best['number']}" if kept == "found" else "as it was",
        settings,
        f"{seconds:.0f}",
    )


def controls_on_validation_users(pair: WorldPair) -> str:
    """Returns what the controls earn with the users that trials are evaluated on."""
    earned = {}
    for name in controls():
        config = plan_run(name, pair.name, n_users=500, episodes_per_user=10)
        result = train(config, pair).evaluation
        assert result is not None
        earned[method(name).title] = result.summary()[CRITERION]
    return ", ".join(f"{title} {score:.1f}" for title, score in earned.items())


def searches_in(folder: Path) -> tuple[str, list[Path]]:
    """Returns the world of a folder's searches, and the searches in the order of the zoo.

    Raises:
        ValueError: If there are none, or of several worlds.
    """
    found = sorted(path.parent for path in folder.glob(f"*/{TRIALS}"))
    worlds = {plan_of(search)["world"] for search in found}
    if len(worlds) != 1:
        raise ValueError(f"{folder} must hold searches of one world, it has {sorted(worlds)}")
    order = list(METHODS)
    return worlds.pop(), sorted(found, key=lambda search: (order.index(plan_of(search)["method"]), search.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("searches", type=Path, help="a folder of searches, each named as its method")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    world, searches = searches_in(arguments.searches)
    pair = validation_pair(make_world(world, split="train"), world)
    provenance = pair.train.data.provenance
    table = ResultTable(
        title=f"Searches in the training world of {world}",
        header=(
            "method",
            "trials",
            "shipped before",
            "best trial",
            "confirmed: before",
            "confirmed: found",
            "now shipped",
            "settings that were searched",
            "seconds",
        ),
        rows=tuple(summary(search) for search in searches),
        notes=(
            f"R_cum of {min(500, len(pair.test.users))} validation users (10 sessions each) of the training world "
            f"({provenance.name}, {provenance.origin} data), Max Len 30; no user of the test world, and not its "
            "response, was touched.",
            "shipped before, best trial: one training seed, a quarter of the steps. confirmed: three other seeds "
            "(each in parentheses), all steps, on the same validation users; what has the larger mean is shipped.",
            f"Controls with the same users: {controls_on_validation_users(pair)}.",
            "steps of each trial: "
            + "; ".join(f"{title_of(search)} {plan_of(search)['settings']['total_steps']:,}" for search in searches)
            + ".",
            "Made by: python benchmarks/tuning_record.py SEARCHES --results RESULTS",
        ),
    )
    write_section(arguments.results, "tuning.md", table.markdown().removeprefix("##"))
    if arguments.results:
        records = [
            {"search": search.name, "part": Path(source).stem, **row}
            for search in searches
            for source in (TRIALS, CONFIRMATION)
            for row in rows_of(search / source)
        ]
        write_table(arguments.results / f"tuning_{short_name(world)}.csv.gz", records)


if __name__ == "__main__":
    main()
