"""The paper's main comparison and ablation, with the controls that it left out, as one study.

Run: python examples/reproduce_paper.py quick    (the toy world, hardly trained: shows that it all runs)
     python examples/reproduce_paper.py full     (synthetic twins of both data sets, trained as the zoo says: hours)

It is `kuaifair study run paper [--quick]` from Python. Stop it when you like; the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from hrl_policies import LocalEngine, StudyResult, check_study, read_study, run_study
from hrl_policies.study.outputs import write_outputs
from hrl_policies.study.progress import FACTOR, duration, estimate_study, progress_for
from hrl_policies.study.spec import StudySpec, write_study
from hrl_policies.study.tables import result_tables


def reproduce(spec: StudySpec, store: Path, command: str) -> StudyResult:
    """Runs what is missing of a study and prints its tables."""
    console = Console()
    runs = check_study(spec)
    engine = LocalEngine()
    guess = estimate_study(runs).wall_seconds(engine.workers)
    low, high = duration(guess / FACTOR), duration(guess * FACTOR)
    console.print(f"{len(runs)} runs, about {low} to {high} with {engine.workers} workers")
    command = write_study(store, spec, command)
    with progress_for(console, engine.workers) as progress:
        result = run_study(runs, store, engine=engine, callback=progress)
    write_outputs(store, result.records, result.reasons, command)
    for table in result_tables(result.records, command):
        table.show(console)
    for name in result.failures:
        console.print(f"failed: {name}; see {store / name}.failed/traceback.txt", soft_wrap=True)
    console.print(f"Everything is in {store}", soft_wrap=True)
    return result


def main(size: str = "quick") -> None:
    if size not in ("quick", "full"):
        raise SystemExit(f"say quick or full, not {size!r}")
    spec, problems = read_study("paper", quick=size == "quick")
    assert not problems
    reproduce(spec, Path("studies") / spec.name, f"python examples/reproduce_paper.py {size}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
