"""The record of the searches behind the shipped hyperparameters; writes docs/results/tuning.md and tuning/METHOD.csv.

    kuaifair tune METHOD --env KuaiFair-KuaiRandTwin-v0 --trials 12 --steps STEPS --confirm 3 -o runs/tuning/METHOD
    python benchmarks/tuning_record.py runs/tuning --results docs/results

Every method gets 12 trials of a quarter of its training steps and, if a trial beat the shipped settings, three runs of
all its steps for either side. STEPS of each are in the page.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hrl_policies.study import plan_run, train
from hrl_policies.study.confirmation import CONFIRMATION
from hrl_policies.study.result_table import Cell, Measured, ResultTable
from hrl_policies.study.tuning import CRITERION, TRIALS, validation_pair
from hrl_policies.zoo import METHODS, controls, method
from kuaifair_env.data.files import write_text_atomically
from kuaifair_env.registration import make_world

Row = dict[str, str]
WORLD = "KuaiFair-KuaiRandTwin-v0"


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


def summary(name: str, folder: Path) -> tuple[Cell, ...]:
    """Returns the line of a method."""
    trials, confirmed = rows_of(folder / TRIALS), rows_of(folder / CONFIRMATION)
    scored = [row for row in trials if row[CRITERION]]
    best = max(scored, key=lambda row: float(row[CRITERION]))
    sides = {
        side: [float(row[CRITERION]) for row in confirmed if row["settings"] == side]
        for side in ("start", "found")
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
        method(name).title,
        str(len(trials)),
        Measured(float(trials[0][CRITERION]), 2),
        Measured(float(best[CRITERION]), 2),
        *cells,
        f"found, trial {best['number']}" if kept == "found" else "as it was",
        settings,
        f"{seconds:.0f}",
    )


def controls_on_validation_users() -> str:
    """Returns what the controls earn with the users that trials are judged on."""
    pair = validation_pair(make_world(WORLD, split="train"), WORLD)
    earned = {}
    for name in controls():
        config = plan_run(name, WORLD, users=500, episodes_per_user=10)
        result = train(config, pair).evaluation
        assert result is not None
        earned[method(name).title] = result.summary()[CRITERION]
    return ", ".join(f"{title} {score:.1f}" for title, score in earned.items())


def steps_of(folder: Path) -> str:
    """Returns how many steps each trial trained for."""
    for line in (folder / "trials.jsonl").read_text(encoding="utf-8").splitlines():
        plan = json.loads(line).get("user_attr", {}).get("plan")
        if plan:
            return f"{plan['settings']['total_steps']:,}"
    return "-"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("searches", type=Path, help="a folder of searches, each named as its method")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    folders = {
        name: arguments.searches / name for name in METHODS if (arguments.searches / name / TRIALS).exists()
    }
    table = ResultTable(
        title="Searches",
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
        rows=tuple(summary(name, folder) for name, folder in folders.items()),
        notes=(
            "R_cum of 500 validation users (10 sessions each) of the training world of KuaiFair-KuaiRandTwin-v0 "
            "(twin), Max Len 30; no user of the test world, and not its response, was touched.",
            "shipped before, best trial: one training seed, a quarter of the steps. confirmed: three other seeds "
            "(each in parentheses), all steps, on the same validation users; what has the larger mean is shipped.",
            f"Controls with the same users: {controls_on_validation_users()}.",
            "steps of each trial: "
            + "; ".join(f"{method(name).title} {steps_of(folder)}" for name, folder in folders.items())
            + ".",
            "Made by: python benchmarks/tuning_record.py SEARCHES --results RESULTS",
        ),
    )
    text = table.markdown()
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "tuning_searches.md", text + "\n")
        target = arguments.results / "tuning"
        target.mkdir(parents=True, exist_ok=True)
        for name, folder in folders.items():
            for source in (TRIALS, CONFIRMATION):
                if (folder / source).exists():
                    content = (folder / source).read_text(encoding="utf-8")
                    write_text_atomically(target / f"{name}.{source}", content)


if __name__ == "__main__":
    main()
