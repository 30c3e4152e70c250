"""What a study leaves behind when its runs are done: tables, records, figures and a report.

``tables.md`` and ``runs.csv`` are the same bytes for the same runs; tables and figures of training time are not, since
times differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hrl_policies.study.store import stored_runs
from hrl_policies.study.tables import RunRecord, result_tables, write_records
from kuaifair_env.data.files import write_text_atomically

TABLES = "tables.md"
RECORDS = "runs.csv"
PAPER_TABLES = "tables"
FIGURES = "figures"
REPORT = "report.html"


def finish(
    folder: Path, records: Sequence[RunRecord], failures: Mapping[str, str], command: str
) -> list[Path]:
    """Writes everything that is made of a study's runs.

    Args:
        folder: Where; the store.
        records: Finished runs, in the order of the plan.
        failures: Last line of the traceback by run that failed.
        command: The command that makes these numbers again.

    Returns:
        What was written.
    """
    tables, rows = folder / TABLES, folder / RECORDS
    parts = [table.markdown() for table in result_tables(records, command)] if records else []
    if failures:
        lines = [f"- {name}: {reason}" for name, reason in failures.items()]
        parts.append(
            "\n".join([f"### {len(failures)} runs failed and are not in these tables", "", *lines, ""])
        )
    write_text_atomically(tables, "\n".join(parts))
    if not records:
        rows.unlink(missing_ok=True)
        return [tables]
    write_records(rows, records)
    return [tables, rows, *_papers(folder, command)]


def _papers(folder: Path, command: str) -> list[Path]:
    """Writes the tables and figures in the paper's form, and the report that holds them all."""
    from hrl_policies.study.drawing import draw_study
    from hrl_policies.study.outputs import study_tables, write_tables
    from hrl_policies.study.report import write_report
    from hrl_policies.study.report_sources import all_runs, failed_runs, stored_figures

    runs = stored_runs(folder)
    made = write_tables(folder / PAPER_TABLES, runs, ["markdown", "latex", "csv"], command=command)
    made += draw_study(folder / FIGURES, runs)
    report = write_report(
        folder / REPORT,
        all_runs(folder),
        title=f"KuaiFair study: {folder.name}",
        command=command,
        figures=stored_figures(folder),
        further=list(study_tables(runs, command=command).values()),
        failures=failed_runs(folder),
    )
    return [*made, report]
