"""One table of results for each world and way of running sessions, with the columns that the paper left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrl_policies.study import labels
from hrl_policies.study.labels import MODES, RunRecord, Variant
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.store import write_table
from hrl_policies.study.table import Measured, ResultTable


@dataclass(frozen=True)
class Column:
    """A headline figure as a column of a table.

    Attributes:
        title: Title of the column.
        figure: Name in ``EvaluationResult.summary``.
        digits: Decimal places.
        interval: Whether the mean over seeds is given an interval.
    """

    title: str
    figure: str
    digits: int = 3
    interval: bool = True

    def mean(self, values: Sequence[float]) -> Measured:
        """Returns the mean over training seeds; ``±`` is half its 95 % Student interval, given from two seeds on."""
        half = student_interval(np.asarray(values)).half_width if self.interval and len(values) > 1 else None
        return Measured(float(np.mean(values)), self.digits, spread=half)


COLUMNS = (
    Column("Len", "len", 2),
    Column("R_each", "r_each"),
    Column("R_cum", "r_cum", 2),
    Column("AD", "ad"),
    Column("viol.", "violation_rate"),
    Column("formula", "len_predicted", 2, interval=False),
    Column("floor", "len_floor", 2, interval=False),
    Column("ceil.", "len_ceiling", 2, interval=False),
    Column("gap", "signed_gap", interval=False),
    Column("cov.", "coverage", interval=False),
)
"""The paper's four figures, what ends sessions, what the length formula says of them, and what AD hides."""


def result_tables(records: Sequence[RunRecord], command: str) -> list[ResultTable]:
    """Returns a table for each world and way of running sessions, methods in the order of the zoo.

    A cell is the mean over training seeds; ``±`` is half the 95 % Student interval of that mean, given where there
    are at least two seeds.

    Args:
        records: Finished runs.
        command: The command that makes these numbers again.

    Raises:
        ValueError: If there are no runs, or runs of one table were evaluated differently.
    """
    if not records:
        raise ValueError("there are no finished runs to tabulate")
    return [result_table(group, command) for group in group_records(records)]


def group_records(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups runs that belong into one table: one world, one way of running sessions, one item term."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        config = record.config
        session = {name: value for name, value in config.session.describe().items() if name not in MODES}
        key = repr((config.world, config.item_term, record.data_hash, record.response, sorted(session.items())))
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def group_variants(records: Sequence[RunRecord]) -> dict[Variant, list[RunRecord]]:
    """Groups the runs of a table into its rows: methods in the order of the zoo, each with its seeds increasing.

    Raises:
        ValueError: If two runs of a method share a seed.
    """
    rows: dict[Variant, list[RunRecord]] = {}
    for record in sorted(records, key=lambda one: (Variant.of_config(one.config).order, one.config.seed)):
        rows.setdefault(Variant.of_config(record.config), []).append(record)
    for variant, group in rows.items():
        if len({record.config.seed for record in group}) != len(group):
            raise ValueError(f"{variant.title} was run more than once with the same seed under the same conditions")
    return rows


def result_table(records: Sequence[RunRecord], command: str) -> ResultTable:
    """Returns the table of runs that belong into one; see :func:`result_tables`."""
    first = records[0]
    evaluated = {(r.users, r.config.episodes_per_user, r.config.evaluation_seed) for r in records}
    if len(evaluated) > 1:
        raise ValueError(
            f"runs in {first.config.world} were evaluated on different users or randomness {sorted(evaluated)}; "
            "they do not belong into one table"
        )
    columns = [column for column in COLUMNS if all(column.figure in record.summary for record in records)]
    return ResultTable(
        title=f"{first.config.world}, Max Len {first.config.session.max_len}"
        + labels.item_term_suffix(first.config.item_term),
        header=("method", *(column.title for column in columns), "seeds"),
        rows=tuple(
            (
                variant.title,
                *(column.mean([record.summary[column.figure] for record in group]) for column in columns),
                str(len(group)),
            )
            for variant, group in group_variants(records).items()
        ),
        notes=_notes(records, command),
    )


def write_records(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Writes the figures of runs as a small CSV, one row for each run, atomically."""
    rows = [
        {
            "world": record.config.world,
            "data": record.data,
            "origin": record.origin,
            "data_hash": record.data_hash,
            "response": record.response,
            "candidates": record.candidates,
            "users": record.users,
            "method": record.config.method,
            "purifier": record.purifier,
            "variant": record.config.variant,
            "item_term": record.config.item_term,
            "seed": record.config.seed,
            "max_len": record.config.session.max_len,
            "slate_size": record.config.session.items_per_slate,
            "total_steps": record.config.total_steps,
            **{name: float(value) for name, value in record.summary.items()},
        }
        for record in records
    ]
    write_table(path, rows)


def _notes(records: Sequence[RunRecord], command: str) -> tuple[str, ...]:
    first = records[0]
    remark = " ± is half the 95 % Student interval of the mean over training seeds; controls are run once."
    notes = [
        labels.data_note(first),
        labels.evaluation_note(first),
        *labels.training_notes(records, remark),
        *labels.purifier_notes(records),
        *labels.privileged_notes(records),
        "viol.: share of slates that the leave rule punishes; gap: popular minus long-tail share of exposure (AD is "
        "its size); cov.: share of the candidates that were shown.",
    ]
    if "len_predicted" in first.summary:
        notes.append(
            "formula: the Len that (T0 - 1)/(2 - R_each + viol.) + 0.5 predicts; floor and ceil. are the formula with "
            "every slate punished and none, at the same R_each."
        )
    return (*notes, f"Made by: {command}")
