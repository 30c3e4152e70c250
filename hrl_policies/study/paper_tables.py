"""The paper's Tables 2 and 3: rows by world and method, a group of columns for each horizon, intervals everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hrl_policies.study import notes as notes_of
from hrl_policies.study.judged import Comparison, JudgedRun, Task, Variant
from hrl_policies.study.published import PublishedResult, paper_data, published_result
from hrl_policies.study.result_table import MISSING, Cell, Measured, ResultTable, Span
from hrl_policies.study.statistics import stratified_interval
from hrl_policies.study.tables import COLUMNS, Column, half_interval
from hrl_policies.zoo import method
from kuaifair_env.metrics import implied_violation_rate, length_floor_and_ceiling

Average = Literal["mean", "iqm"]

BASE = "dsrm-hrl"
PAPER = "paper (another world)"

_FIGURES = ("len", "len_floor", "len_ceiling", "r_each", "r_cum", "ad", "violation_rate")
_SHARES = ("r_each", "ad", "violation_rate")
_RESAMPLES = 10_000


def overall_table(
    comparison: Comparison, command: str, *, average: Average = "mean", compare: bool = False
) -> ResultTable | None:
    """Returns the paper's Table 2: every method on its own states, controls included, without ablations.

    Args:
        comparison: Runs under one set of conditions.
        command: The command that makes these numbers again.
        average: Over training seeds: the mean, or the interquartile mean.
        compare: Whether to show the paper's figures beside ours.

    Returns:
        The table, or None if nothing but ablations was run.

    Raises:
        ValueError: If the average is unknown.
    """
    chosen = [one for one in comparison.variants if one.as_shipped and not _is_ablation(one)]
    return _table("Overall results", comparison, chosen, command, average, compare)


def ablation_table(
    comparison: Comparison, command: str, *, average: Average = "mean", compare: bool = False
) -> ResultTable | None:
    """Returns the paper's Table 3: the method, its parts, and any method on other states than its own.

    Args:
        comparison: See :func:`overall_table`.
        command: See :func:`overall_table`.
        average: See :func:`overall_table`.
        compare: See :func:`overall_table`.

    Returns:
        The table, or None if nothing of the kind was run.

    Raises:
        ValueError: If the average is unknown.
    """
    parts = [one for one in comparison.variants if _is_ablation(one) or not one.as_shipped]
    if not parts:
        return None
    wholes = {one.method for one in parts if not one.as_shipped} | {BASE}
    chosen = [one for one in comparison.variants if one in parts or (one.as_shipped and one.method in wholes)]
    return _table("Ablations", comparison, chosen, command, average, compare)


def _is_ablation(variant: Variant) -> bool:
    return method(variant.method).family == "hierarchical" and variant.method != BASE


def _table(
    title: str,
    comparison: Comparison,
    variants: Sequence[Variant],
    command: str,
    average: Average,
    compare: bool,
) -> ResultTable | None:
    if average not in ("mean", "iqm"):
        raise ValueError(f"unknown average {average!r}; choose 'mean' or 'iqm'")
    runs = [run for run in comparison.runs if run.variant in variants]
    if not runs:
        return None
    columns = _columns(runs)
    horizons = sorted({run.task.max_len for run in runs})
    rows: list[tuple[Cell, ...]] = []
    published = False
    for tasks in _by_world(comparison.tasks):
        for variant in variants:
            found = {task.max_len: comparison.by_cell.get((task, variant), ()) for task in tasks}
            if not any(found.values()):
                continue
            cells = [_cells(found.get(max_len, ()), columns, average) for max_len in horizons]
            rows.append((tasks[0].world_title, variant.title, *(cell for part in cells for cell in part)))
            paper = _published(tasks[0], variant, horizons) if compare else {}
            if paper:
                published = True
                cells = [_published_cells(paper.get(max_len), columns) for max_len in horizons]
                rows.append(
                    (
                        tasks[0].world_title,
                        f"{variant.title}: {PAPER}",
                        *(cell for part in cells for cell in part),
                    )
                )
    header = ("world", "method", *([*(column.title for column in columns), "seeds"] * len(horizons)))
    return ResultTable(
        title=title + (f", {comparison.conditions}" if comparison.conditions else ""),
        header=header,
        rows=tuple(rows),
        notes=_notes(runs, columns, average, compare, published, command),
        spans=tuple(Span(f"Max Len {max_len}", len(columns) + 1) for max_len in horizons),
    )


def _by_world(tasks: Sequence[Task]) -> list[list[Task]]:
    worlds: dict[str, list[Task]] = {}
    for task in tasks:
        worlds.setdefault(task.world, []).append(task)
    return list(worlds.values())


def _columns(runs: Sequence[JudgedRun]) -> list[Column]:
    """Returns the columns in the paper's order, without floor and ceiling where the leave rule has no length law."""
    known = {column.figure: column for column in COLUMNS}
    return [known[name] for name in _FIGURES if all(name in run.record.summary for run in runs)]


def _cells(runs: Sequence[JudgedRun], columns: Sequence[Column], average: Average) -> list[Cell]:
    if not runs:
        return [MISSING] * (len(columns) + 1)
    return [*(measured(runs, column, average) for column in columns), str(len(runs))]


def measured(runs: Sequence[JudgedRun], column: Column, average: Average = "mean") -> Measured:
    """Returns a figure of one method in one task with its 95 % interval.

    Over training seeds: Student's interval of the mean, or the bootstrap interval of the interquartile mean. Of one
    run: the bootstrap interval over users. Where a figure cannot leave [0, 1], neither does its interval.

    Args:
        runs: One for each seed.
        column: The figure.
        average: Over seeds.
    """
    values = np.asarray([run.record.summary[column.figure] for run in runs], np.float64)
    if not column.interval:
        return Measured(float(values.mean()), column.digits)
    if len(runs) == 1:
        found = runs[0].users.interval(column.figure)
        value, low, high = float(values[0]), found.low, found.high
    elif average == "iqm":
        found = stratified_interval(values[:, None], resamples=_RESAMPLES)
        value, low, high = found.estimate, found.low, found.high
    else:
        value, half = float(values.mean()), half_interval(values.tolist())
        low, high = value - half, value + half
    if column.figure in _SHARES:
        low, high = max(low, 0.0), min(high, 1.0)
    return Measured(value, column.digits, low, high)


def _published(task: Task, variant: Variant, horizons: Sequence[int]) -> dict[int, PublishedResult]:
    data = paper_data(task.world, task.data)
    if data is None or not variant.as_shipped:
        return {}
    found = {max_len: published_result(data, variant.method, max_len) for max_len in horizons}
    return {max_len: row for max_len, row in found.items() if row is not None}


def _published_cells(row: PublishedResult | None, columns: Sequence[Column]) -> list[Cell]:
    if row is None:
        return [MISSING] * (len(columns) + 1)
    length, reward = row.means["len"], row.means["r_each"]
    floor, ceiling = length_floor_and_ceiling(row.max_len, reward)
    implied = {
        "len_floor": float(floor),
        "len_ceiling": float(ceiling),
        "violation_rate": float(implied_violation_rate(length, row.max_len, reward)),
    }
    cells: list[Cell] = [
        Measured(implied[column.figure], column.digits)
        if column.figure in implied
        else Measured(row.means[column.figure], column.digits, spread=row.spreads[column.figure])
        for column in columns
    ]
    return [*cells, "3"]


def _notes(
    runs: Sequence[JudgedRun],
    columns: Sequence[Column],
    average: Average,
    compare: bool,
    published: bool,
    command: str,
) -> tuple[str, ...]:
    records = [run.record for run in runs]
    notes = world_notes(runs)
    trained = [record for record in records if method(record.config.method).learns]
    if trained:
        notes.append(notes_of.training(trained))
    over_seeds = (
        "interquartile mean over training seeds (below four, the mean), and its bootstrap interval"
        if average == "iqm"
        else "mean over training seeds, and its Student interval"
    )
    notes.append(
        f"Brackets: 95 % intervals. Several seeds: {over_seeds}. One run: bootstrap over users. "
        "A claim is a difference with its interval: see the table of differences."
    )
    notes += notes_of.purifiers(records)
    if any(method(record.config.method).privileged for record in records):
        notes.append(notes_of.PRIVILEGED)
    notes.append(
        "viol.: share of slates that the leave rule punishes, which is what ends sessions; AD is not."
    )
    if any(column.figure == "len_floor" for column in columns):
        notes.append(
            "floor, ceil.: Len by the length law if every slate were punished, and if none were, at the same R_each."
        )
    if published:
        notes.append(
            f"Rows marked '{PAPER}' are printed in arXiv:2603.03820, from simulators that were not released: no "
            "difference to ours says anything about a method. What its ± means is not stated; viol., floor and ceil. "
            "there follow from its Len and R_each by the length law."
        )
    elif compare:
        notes.append("The paper has no figures for these worlds and horizons.")
    return (*notes, f"Made by: {command}")


def world_notes(runs: Sequence[JudgedRun]) -> list[str]:
    """Returns what the data of each world are and how runs in it were judged, each line once."""
    lines: dict[str, None] = {}
    several = len({run.task.world for run in runs}) > 1
    for run in runs:
        before = f"{run.task.world_title}: " if several else ""
        lines[before + notes_of.data(run.record)] = None
        lines[before + notes_of.judging(run.record)] = None
    return list(lines)
