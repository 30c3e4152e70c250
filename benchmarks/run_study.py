"""A study file in worlds that have no environment id: partial real data, the twin for settings, validation users.

    python benchmarks/run_study.py benchmarks/studies/baselines.yml --world kuairand --data DATA
    python benchmarks/run_study.py benchmarks/studies/discount.yml --world KuaiFair-KuaiRandTwin-v0 --validation
    python benchmarks/run_study.py benchmarks/studies/table3.yml --world KuaiFair-KuaiRandTwin-v0 --base hrl \
        --results docs/results

Where the world is an environment, ``kuaifair study run FILE`` does the same on all cores. What the store holds is not
run again. ``kuaifair study tables`` and ``report`` make more of it. With ``--base`` a page of all rows and of their
differences to that method is printed, and written where results go, with learning curves, and all runs in a
``.csv.gz``. ``--stored`` makes it of the runs that are done, and lists those that are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rich.console import Console
from worlds import PARTIAL, TWIN_FOR_SETTINGS, open_worlds, short_name, write_page

from hrl_policies.study import (
    RunConfig,
    RunRecord,
    check_study,
    load_run,
    read_study,
    run_folder,
    run_study,
    single_threaded,
)
from hrl_policies.study.curves import draw_learning_curves, draw_training_rewards
from hrl_policies.study.outputs import study_tables, write_outputs
from hrl_policies.study.progress import progress_for
from hrl_policies.study.results import comparisons
from hrl_policies.study.store import StoredRun, state_of, stored_runs
from hrl_policies.study.tables import result_tables, write_records
from hrl_policies.study.tuning import validation_pair
from hrl_policies.zoo import method


def guard_table(runs: Sequence[StoredRun]) -> list[str]:
    """Returns what the guards of runs measured and kept, as a table; nothing if no run had one."""
    guarded = [run for run in runs if "guard" in run.result]
    if not guarded:
        return []
    lines = [
        "### What training earned, by the guard",
        "",
        "R_cum in validation sessions of the training world less that of the starting point, with the interval that a "
        "gain has to show, after half of the training and at its end. Without a gain the agent ends as it started.",
        "",
        "| method | repeats | seed | at the start | after half | at the end | kept |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for run in guarded:
        guard = run.result["guard"]
        half, end = (f"{e['difference']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}]" for e in guard["evaluations"])
        lines.append(
            f"| {method(run.config.method).title} | {run.config.session.repeats} | {run.config.seed} "
            f"| {guard['start_r_cum']:.2f} | {half} | {end} | {guard['kept']} |"
        )
    return ["\n".join([*lines, ""])]


def curve_figures(runs: Sequence[StoredRun], results: Path | None, stem: str) -> list[str]:
    """Draws learning curves beside a page, and returns what shows them there; nothing if there is nothing to draw."""
    if results is None:
        return []
    lines = []
    for name, draw in (("curves", draw_training_rewards), ("fig_7", draw_learning_curves)):
        for group in comparisons(runs):
            path = results / f"{stem}_{name}.png"
            if draw(path, group, max(task.max_len for task in group.tasks)):
                lines += [f"![Learning curves]({path.name})", ""]
    title = ["### Learning curves", "", "Training sessions, with exploration and with users who deviate (*auto*).", ""]
    return ["\n".join([*title, *lines])] if lines else []


def list_of_missing(missing: Sequence[RunConfig]) -> list[str]:
    """Returns which runs of the study were not made; nothing if all were."""
    if not missing:
        return []
    seeds: dict[str, list[str]] = {}
    for run in missing:
        seeds.setdefault(f"{method(run.method).title}, repeats {run.session.repeats}", []).append(str(run.seed))
    lines = [f"- {name}: seeds {', '.join(of_method)}" for name, of_method in seeds.items()]
    return ["\n".join(["### Not run", "", *lines, ""])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument(
        "--world",
        default=TWIN_FOR_SETTINGS,
        help=f"an environment id, {', '.join(PARTIAL)}, '{TWIN_FOR_SETTINGS}'",
    )
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument(
        "--validation", action="store_true", help="validation users of the training world, not the test world"
    )
    parser.add_argument("--item-term", choices=["log", "ips", "features", "unbiased"])
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--base", help="method that the others are compared with on a page")
    parser.add_argument("--results", type=Path, help="folder for the page")
    parser.add_argument("--stored", action="store_true", help="run nothing: make the page of what the store holds")
    parser.add_argument("--output", type=Path, help="folder of the study; studies/NAME-WORLD by default")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    if arguments.validation:
        pair = validation_pair(pair.train, f"{pair.name}, validation users")
    if arguments.item_term:
        pair = pair.given_mode(arguments.item_term)
    spec, problems = read_study(arguments.study)
    changes: dict[str, Any] = {"worlds": (pair.name,), "item_term": arguments.item_term or spec.item_term}
    if arguments.seeds:
        changes["seeds"] = tuple(arguments.seeds)
    runs = check_study(spec.model_copy(update=changes), problems, worlds={pair.name: pair})
    store = arguments.output or Path("studies") / f"{spec.name}-{short_name(arguments.world)}"
    if arguments.stored:
        names = {str(run_folder(run)): run for run in runs}
        done = {name: run for name, run in names.items() if state_of(store / name) == "done"}
        records = [RunRecord.of_run(load_run(store / name)) for name in done]
        missing = [run for name, run in names.items() if name not in done]
    else:
        with progress_for(Console(), 1) as progress:
            result = run_study(runs, store, {pair.name: pair}, callback=progress)
        records, missing = result.raise_for_failures().records, []
    command = f"python benchmarks/run_study.py benchmarks/studies/{arguments.study.name} --world '{arguments.world}'"
    command += " --validation" if arguments.validation else ""
    command += f" --item-term {arguments.item_term}" if arguments.item_term else ""
    if arguments.base:
        command += f" --base {arguments.base}"
    write_outputs(store, records, {}, command)
    if arguments.base:
        tables = study_tables(stored_runs(store), base=arguments.base, command=command)
        differences = [table.markdown() for name, table in tables.items() if name.startswith("differences")]
        page = [table.markdown() for table in result_tables(records, command)] + differences
        stem = f"{spec.name}_{short_name(arguments.world)}"
        page += curve_figures(stored_runs(store), arguments.results, stem)
        page += guard_table(stored_runs(store)) + list_of_missing(missing)
        write_page(arguments.results, f"{stem}.md", "\n".join(page))
        if arguments.results is not None:
            write_records(arguments.results / f"{stem}.csv.gz", records)
    print(f"Tables, figures and a report: {store}")


if __name__ == "__main__":
    main()
