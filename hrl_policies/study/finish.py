"""What a study leaves behind when its runs are done: tables and records, the same bytes for the same runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hrl_policies.study.tables import RunRecord, result_tables, write_records
from kuaifair_env.data.files import write_text_atomically

TABLES = "tables.md"
RECORDS = "runs.csv"


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
    return [tables, rows]
