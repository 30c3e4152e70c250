"""The paper's Tables 2 and 3: rows by world and method, a group of columns for each horizon, intervals everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hrl_policies.study import labels as notes_of
from hrl_policies.study.published import (
    PAPER_EPISODES,
    PUBLISHED_LOGS,
    PUBLISHED_SECONDS,
    PublishedResult,
    paper_data,
    paper_name,
    published_result,
)
from hrl_policies.study.results import Comparison, EvaluatedRun, Task, Variant, world_title
from hrl_policies.study.statistics import stratified_interval
from hrl_policies.study.table import MISSING, Cell, Measured, ResultTable, Span
from hrl_policies.study.tables import COLUMNS, Column, half_interval
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import method
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.metrics import implied_violation_rate, length_floor_and_ceiling
from kuaifair_env.world import World

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


def _columns(runs: Sequence[EvaluatedRun]) -> list[Column]:
    """Returns the columns in the paper's order; floor and ceiling only where the leave rule has a length formula."""
    known = {column.figure: column for column in COLUMNS}
    return [known[name] for name in _FIGURES if all(name in run.record.summary for run in runs)]


def _cells(runs: Sequence[EvaluatedRun], columns: Sequence[Column], average: Average) -> list[Cell]:
    if not runs:
        return [MISSING] * (len(columns) + 1)
    return [*(measured(runs, column, average) for column in columns), str(len(runs))]


def measured(runs: Sequence[EvaluatedRun], column: Column, average: Average = "mean") -> Measured:
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
    runs: Sequence[EvaluatedRun],
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
            "floor, ceil.: Len by the formula if every slate were punished, and if none were, at the same R_each."
        )
    if published:
        notes.append(
            f"Rows marked '{PAPER}' are printed in arXiv:2603.03820, from simulators that were not released: no "
            "difference to ours says anything about a method. What its ± means is not stated; viol., floor and ceil. "
            "there follow from its Len and R_each by the length formula."
        )
    elif compare:
        notes.append("The paper has no figures for these worlds and horizons.")
    return (*notes, f"Made by: {command}")


def world_notes(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Returns what the data of each world are and how runs in it were evaluated, each line once."""
    lines: dict[str, None] = {}
    several = len({run.task.world for run in runs}) > 1
    for run in runs:
        before = f"{run.task.world_title}: " if several else ""
        lines[before + notes_of.data(run.record)] = None
        lines[before + notes_of.evaluation(run.record)] = None
    return list(lines)


_HEADER = (
    "world",
    "usage",
    "users",
    "items",
    "interactions",
    "density, %",
    "clicks, %",
    "session users",
    "candidates",
)


def world_table(pairs: Sequence[WorldPair], command: str, *, compare: bool = False) -> ResultTable:
    """Returns users, items, interactions and density of the logs, and whom and what sessions are played with.

    Args:
        pairs: The worlds; the same data under the same name is shown once.
        command: The command that makes these numbers again.
        compare: Whether to show the paper's figures below ours.

    Raises:
        ValueError: If there are no worlds.
    """
    if not pairs:
        raise ValueError("there are no worlds to tabulate")
    rows: list[tuple[Cell, ...]] = []
    matched = False
    unique = {(pair.name, pair.test.data.data_hash): pair for pair in pairs}.values()
    for pair in unique:
        for world in (pair.train, pair.test):
            log = world.data.train if world.split == "train" else world.data.test
            rows.append(
                (*_named(pair, world), *_cells_world_table(log), str(len(world.users)), str(world.n_items))
            )
            published = _published_world_table(pair, world) if compare else None
            if published is not None:
                matched = True
                rows.append(published)
    notes = [
        f"{pair.name}: {pair.test.data.provenance.name} ({pair.test.data.provenance.origin}), "
        f"hash {pair.test.data.data_hash}."
        for pair in unique
    ]
    notes.append(
        "users, items, interactions: in the log that the world's users and response model come from; density: share of "
        "the pairs of those users and items that were seen; clicks: share of interactions. session users may start a "
        "session; candidates may be shown."
    )
    if matched:
        notes.append("Rows of the paper: arXiv:2603.03820, Table 1; interactions there are rounded.")
    return ResultTable(
        title="Training and test environments",
        header=_HEADER,
        rows=tuple(rows),
        notes=(*notes, f"Made by: {command}"),
    )


def _named(pair: WorldPair, world: World) -> tuple[str, str]:
    return world_title(pair.name, world.data.provenance.origin), world.split


def _cells_world_table(log: InteractionLog) -> tuple[Cell, ...]:
    users, items = len(np.unique(log.users)), len(np.unique(log.items))
    largest = int(log.items.max(initial=0)) + 1
    pairs = len(np.unique(log.users.astype(np.int64) * largest + log.items))
    return (
        str(users),
        str(items),
        str(len(log)),
        Measured(100.0 * pairs / max(users * items, 1), 2),
        Measured(100.0 * float(log.clicks.mean()) if len(log) else 0.0, 1),
    )


def _published_world_table(pair: WorldPair, world: World) -> tuple[Cell, ...] | None:
    data = paper_data(pair.name, world.data.provenance.name)
    for row in PUBLISHED_LOGS:
        if (row.data, row.split) == (data, world.split):
            # The paper gives no density; it follows only if no pair was logged twice.
            numbers = (str(row.users), str(row.items), str(row.interactions))
            return (f"{row.data} in the paper", row.split, *numbers, MISSING, MISSING, MISSING, MISSING)
    return None


_PAPER_MAX_LEN = 30


def cost_table(
    comparison: Comparison, command: str, *, sessions: int = PAPER_EPISODES, compare: bool = False
) -> ResultTable | None:
    """Returns the time that training takes, by world, horizon, method and machine.

    Args:
        comparison: Runs under one set of conditions.
        command: The command that makes these numbers again.
        sessions: Training sessions that times are scaled to.
        compare: Whether to show the paper's times beside ours.

    Returns:
        The table, or None if nothing was trained in one go.

    Raises:
        ValueError: If ``sessions`` is less than 1.
    """
    if sessions < 1:
        raise ValueError(f"need at least 1 session to scale to, got {sessions}")
    trained = [run for run in comparison.runs if method(run.variant.method).learns]
    whole = [run for run in trained if not run.run.result.get("resumed_at")]
    machines = sorted({run.run.timing["machine"] for run in whole})
    rows: list[tuple[Cell, ...]] = []
    for task in comparison.tasks:
        for variant in comparison.variants:
            for number, machine in enumerate(machines, 1):
                runs = [
                    run
                    for run in comparison.by_cell.get((task, variant), ())
                    if run in whole and run.run.timing["machine"] == machine
                ]
                if runs:
                    own: list[Cell] = [task.world_title, str(task.max_len), variant.title]
                    own += _cells_cost_table(runs, sessions)
                    own += [_published_cost_table(runs[0], sessions)] if compare else []
                    rows.append((*own, str(number)))
    if not rows:
        return None
    titles = [
        "world",
        "Max Len",
        "method",
        "seeds",
        "steps",
        "sessions",
        "peak MiB",
        "seconds",
        f"s per {sessions:,} sessions",
    ]
    titles += ["paper (another machine)"] if compare else []
    return ResultTable(
        title="Training time",
        header=(*titles, "machine"),
        rows=tuple(rows),
        notes=(
            comparison.provenance,
            *_notes_cost_table(machines, len(trained) - len(whole), sessions, compare, command),
        ),
    )


def _cells_cost_table(runs: Sequence[EvaluatedRun], sessions: int) -> list[Cell]:
    seconds = [float(run.run.timing["training_seconds"]) for run in runs]
    played = [sum(point["sessions"] for point in run.run.session_curve) for run in runs]
    steps = np.mean([run.run.steps_done for run in runs])
    cells: list[Cell] = [str(len(runs)), f"{steps:.0f}"]
    memory = _peak_memory(runs)
    if min(played) < 1:
        return [*cells, MISSING, memory, _mean(seconds), MISSING]
    scaled = [one * sessions / count for one, count in zip(seconds, played, strict=True)]
    return [*cells, f"{np.mean(played):.0f}", memory, _mean(seconds), _mean(scaled)]


def _peak_memory(runs: Sequence[EvaluatedRun]) -> Cell:
    """Returns the largest peak; older runs and some systems do not tell."""
    known = [run.run.timing.get("peak_memory_mib") for run in runs]
    told = [float(value) for value in known if value is not None]
    return Measured(max(told), 0) if told else MISSING


def _mean(values: Sequence[float]) -> Measured:
    value = float(np.mean(values))
    if len(values) < 2:
        return Measured(value, 1)
    half = half_interval(values)
    return Measured(value, 1, max(value - half, 0.0), value + half)


def _published_cost_table(run: EvaluatedRun, sessions: int) -> Cell:
    """Returns the paper's time for as many sessions; it has times for one world and one horizon only."""
    task = run.task
    name = paper_name(run.variant.method) if run.variant.as_shipped else None
    if paper_data(task.world, task.data) != "KuaiRec" or task.max_len != _PAPER_MAX_LEN or name is None:
        return MISSING
    seconds = PUBLISHED_SECONDS.get(name)
    return MISSING if seconds is None else Measured(seconds * sessions / PAPER_EPISODES, 1)


def _notes_cost_table(
    machines: Sequence[str], resumed: int, sessions: int, compare: bool, command: str
) -> tuple[str, ...]:
    notes = [f"Machine {number}: {machine}." for number, machine in enumerate(machines, 1)]
    notes.append(
        "seconds: wall time of training alone, without pretraining of a purifier and evaluation, mean over seeds "
        f"with its 95 % Student interval; the next column scales each run to {sessions:,} training sessions. "
        f"sessions counts those that ended during training; {MISSING} where there were none, as offline."
    )
    notes.append(
        "peak MiB: the largest resident memory of a run's process, its worlds included; largest of the seeds."
    )
    notes.append("Compare times within a machine, and only of runs that had it to themselves.")
    if resumed:
        notes.append(
            f"Left out: {resumed} run(s) that were interrupted and resumed, whose time is known in part only."
        )
    if compare:
        notes.append(
            "paper: arXiv:2603.03820, Table 4 (KuaiRec, Max Len 30, 20,000 episodes); its machine is not named."
        )
    return (*notes, f"Made by: {command}")
