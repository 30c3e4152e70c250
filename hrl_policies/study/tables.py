"""Results as tables in the paper's form, with the columns that it left out, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from hrl_policies.study import labels as notes_of
from hrl_policies.study.store import RunRecord as RunRecord
from hrl_policies.study.store import read_table, write_table
from hrl_policies.study.table import ResultTable
from hrl_policies.zoo import METHODS, method
from kuaifair_env.files import atomic_path

_LEVEL = 0.95


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: What stands above it.
        figure: Name in ``EvaluationResult.summary``.
        digits: Decimal places.
        interval: Whether seeds are given an interval.
    """

    title: str
    figure: str
    digits: int = 3
    interval: bool = True


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
"""The paper's four, what ends sessions, what the length formula says of them, and what AD hides."""


def result_tables(records: Sequence[RunRecord], command: str) -> list[ResultTable]:
    """Groups runs by world and session settings into tables, methods in the order of the zoo.

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
    return [_table(group, command) for group in by_conditions(records)]


def by_conditions(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups runs that belong into one table: one world, one way of running sessions, one item term."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(_conditions(record), []).append(record)
    return list(groups.values())


def write_records(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Writes the figures of runs as a small CSV, one row per run, atomically."""
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
    with atomic_path(path) as temporary:
        write_table(temporary, rows)


def learning_curve(path: str | Path) -> list[dict[str, float]]:
    """Reads the ``learning_curve.csv`` of a run folder."""
    return read_table(Path(path))


def _conditions(record: RunRecord) -> str:
    session = record.config.session.describe()
    for mode in ("action_mode", "observation_mode"):
        session.pop(mode)
    term = record.config.item_term
    return repr(
        (
            record.config.world,
            term,
            record.data_hash,
            record.response,
            sorted(session.items(), key=lambda e: e[0]),
        )
    )


def _table(records: Sequence[RunRecord], command: str) -> ResultTable:
    first = records[0]
    evaluated = {(r.users, r.config.episodes_per_user, r.config.evaluation_seed) for r in records}
    if len(evaluated) > 1:
        raise ValueError(
            f"runs in {first.config.world} were evaluated on different users or randomness {sorted(evaluated)}; "
            "they do not belong into one table"
        )
    columns = [column for column in COLUMNS if all(column.figure in record.summary for record in records)]
    order = list(METHODS)
    names = sorted({record.config.method for record in records}, key=order.index)
    variants = sorted(
        {_variant(record) for record in records},
        key=lambda variant: (order.index(variant[0]), *variant[1:]),
    )
    rows = [
        _row(variant, [record for record in records if _variant(record) == variant], columns)
        for variant in variants
    ]
    return ResultTable(
        title=f"{first.config.world}, Max Len {first.config.session.max_len}"
        + (f", item term '{first.config.item_term}'" if first.config.item_term else ""),
        header=("method", *(column.title for column in columns), "seeds"),
        rows=tuple(rows),
        notes=_notes(records, names, command),
    )


def _variant(record: RunRecord) -> tuple[str, str, str]:
    return record.config.method, record.purifier, record.config.variant


def _row(
    variant: tuple[str, str, str], records: Sequence[RunRecord], columns: Sequence[Column]
) -> tuple[str, ...]:
    seeds = sorted({record.config.seed for record in records})
    if len(seeds) != len(records):
        raise ValueError(
            f"{variant_title(*variant)} was run more than once with the same seed under the same conditions"
        )
    cells = (_cell([record.summary[column.figure] for record in records], column) for column in columns)
    return (variant_title(*variant), *cells, str(len(seeds)))


def variant_title(name: str, purifier: str, variant: str = "") -> str:
    """Returns how a method is called in tables and figures: with its purifier if not its own, † if privileged."""
    spec = method(name)
    other = f" + {purifier}" if purifier and purifier != spec.purifier else ""
    changed = f" ({variant})" if variant else ""
    return spec.title + changed + other + (" †" if spec.privileged else "")


def _cell(values: Sequence[float], column: Column) -> str:
    mean = f"{np.mean(values):.{column.digits}f}"
    if len(values) < 2 or not column.interval:
        return mean
    return f"{mean} ± {half_interval(values):.{column.digits}f}"


def half_interval(values: Sequence[float], level: float = _LEVEL) -> float:
    """Returns half the Student interval of a mean.

    Args:
        values: At least two.
        level: Coverage.
    """
    n = len(values)
    return float(stdtrit(n - 1, (1 + level) / 2) * np.std(values, ddof=1) / np.sqrt(n))


def _notes(records: Sequence[RunRecord], names: Sequence[str], command: str) -> tuple[str, ...]:
    first = records[0]
    trained = [record for record in records if method(record.config.method).learns]
    notes = [notes_of.data(first), notes_of.evaluation(first)]
    if trained:
        notes.append(
            f"{notes_of.training(trained)} ± is half the 95 % Student interval of the mean over training seeds; "
            "controls are run once."
        )
    notes += notes_of.purifiers(records)
    if any(method(name).privileged for name in names):
        notes.append(notes_of.PRIVILEGED)
    notes.append(
        "viol.: share of slates that the leave rule punishes; gap: popular minus long-tail share of exposure (AD is "
        "its size); cov.: share of the candidates that were shown."
    )
    if "len_predicted" in first.summary:
        notes.append(
            "formula: the Len that (T0 - 1)/(2 - R_each + viol.) + 0.5 predicts; floor and ceil. are the formula with "
            "every slate punished and none, at the same R_each."
        )
    return (*notes, f"Made by: {command}")
