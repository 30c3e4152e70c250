"""``kuaifair study report``: a store of runs as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    context: typer.Context,
    store: Annotated[
        Path, typer.Argument(help="Folder of run folders, as a study or `kuaifair train` writes them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading; the store's name by default.")] = None,
) -> None:
    """Write the runs of a store as one HTML file that needs no network: tables, figures, learning curves, provenance.

    Pictures (.svg, .png) in the store and its folder `figures` go into it; NAME.caption.txt beside one is its caption.

    Example: kuaifair study report runs --output report.html
    """
    from hrl_policies.study.outputs import study_tables
    from hrl_policies.study.report import write_report
    from hrl_policies.study.report_sources import all_runs, failed_runs, stored_figures

    runs, failures = all_runs(store), failed_runs(store)
    if not runs and not failures:
        raise ValueError(
            f"{store} holds no runs; `kuaifair train --output {store}/NAME` or a study writes some"
        )
    finished = [run for run in runs if run.complete]
    further = study_tables(finished, command=str(context.obj)) if finished else {}
    written = write_report(
        output,
        runs,
        title=title or f"KuaiFair study: {store.resolve().name}",
        command=str(context.obj),
        figures=stored_figures(store),
        further=list(further.values()),
        failures=failures,
    )
    Console().print(
        f"Report: {written} ({len(finished)} finished, {len(runs) - len(finished)} interrupted, "
        f"{len(failures)} failed runs)",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
