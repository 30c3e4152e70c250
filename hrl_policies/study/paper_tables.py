"""The paper's Tables 1 to 4, with intervals everywhere and, where asked for, the paper's figures beside ours.

What the paper prints (arXiv:2603.03820) comes from another world: its simulators were never released, so a difference
between its numbers and ours says nothing about either method. The paper does not state what its ``±`` means; with
three seeds, one of them 0.000, it reads as a standard deviation.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain, groupby
from typing import Literal, NamedTuple

import numpy as np

from hrl_policies.study import labels
from hrl_policies.study.labels import PROPOSED, Task, Variant, session_title, world_title
from hrl_policies.study.results import Comparison, EvaluatedRun, figure_interval, world_notes
from hrl_policies.study.statistics import stratified_interval, student_interval
from hrl_policies.study.tables import COLUMNS, MISSING, Cell, Column, Measured, ResultTable, Span
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.schema import count_distinct
from kuaifair_env.metrics import implied_violation_rate, length_floor_and_ceiling
from kuaifair_env.world import World

Average = Literal["mean", "iqm"]

PAPER = "paper (another world)"

PAPER_EPISODES = 20_000
"""Training sessions behind the paper's Table 4, as it counts them."""

_FIGURES = ("len", "len_floor", "len_ceiling", "r_each", "r_cum", "ad", "violation_rate")
_RESAMPLES = 10_000


@dataclass(frozen=True)
class PublishedResult:
    """A row of the paper's Table 2 or 3 at one horizon.

    Attributes:
        data: ``"KuaiRec"`` or ``"KuaiRand-Pure"``.
        name: The method's name in the paper (SAC4IR, which its tables print as SAC4IF).
        max_len: Horizon.
        table: 2 or 3; the row "+DSRM" of Table 3 is "Ours" of Table 2, digit for digit, and not repeated.
        means: ``len``, ``r_each``, ``r_cum`` and ``ad``; ``spreads`` has the numbers behind ``±``.
    """

    data: str
    name: str
    max_len: int
    table: int
    means: dict[str, float]
    spreads: dict[str, float]


class PublishedLog(NamedTuple):
    """A row of the paper's Table 1: data, split, users, items, and interactions rounded to hundreds."""

    data: str
    split: str
    users: int
    items: int
    interactions: int


_PUBLISHED_FIGURES = ("len", "r_each", "r_cum", "ad")

PUBLISHED_RESULTS = tuple(
    PublishedResult(
        data=row["data"],
        name=row["method"],
        max_len=int(row["max_len"]),
        table=int(row["table"]),
        means={name: float(row[name]) for name in _PUBLISHED_FIGURES},
        spreads={name: float(row[f"{name}_spread"]) for name in _PUBLISHED_FIGURES},
    )
    for row in csv.DictReader(
        resources.files("hrl_policies.study").joinpath("published.csv").read_text("utf-8").splitlines()
    )
)
"""All 52 rows of Tables 2 and 3."""

PUBLISHED_LOGS = (
    PublishedLog("KuaiRec", "train", 7_176, 10_728, 12_530_800),
    PublishedLog("KuaiRec", "test", 1_411, 3_327, 4_676_500),
    PublishedLog("KuaiRand-Pure", "train", 26_285, 7_551, 1_436_600),
    PublishedLog("KuaiRand-Pure", "test", 27_285, 7_583, 1_186_100),
)
"""Table 1. The 26,285 training users of KuaiRand-Pure are likely a misprint: the log that it describes has 27,285."""

PUBLISHED_SECONDS = {
    "A2C": 7_512.144,
    "SAC4IR": 6_754.545,
    "DNaIR": 5_934.623,
    "HRL": 8_462.525,
    "+RCE": 29_919.296,
    "Ours": 15_909.175,
}
"""Table 4: training time in seconds on KuaiRec, Max Len 30, 20,000 episodes, on a machine that is not named."""


def paper_data(*names: str) -> str | None:
    """Returns the paper's data set behind a world, told by names of world and data (a twin's too); None if none is."""
    for data, mark in (("KuaiRec", "kuairec"), ("KuaiRand-Pure", "kuairand")):
        if any(mark in name.lower() for name in names):
            return data
    return None


def published_result(task: Task, variant: Variant, max_len: int) -> PublishedResult | None:
    """Returns the paper's row for a method in a world, at any horizon, or None if it has none."""
    key = (paper_data(task.world, task.data), variant.paper_name, max_len)
    return next((row for row in PUBLISHED_RESULTS if (row.data, row.name, row.max_len) == key), None)


def published_seconds(task: Task, variant: Variant) -> float | None:
    """Returns the paper's training time of a method; it has times for one world and one horizon only."""
    if paper_data(task.world, task.data) != "KuaiRec" or task.max_len != 30:
        return None
    return PUBLISHED_SECONDS.get(variant.paper_name or "")


def overall_table(
    comparison: Comparison, command: str, *, average: Average = "mean", compare: bool = False
) -> ResultTable:
    """Returns the paper's Table 2 with every method that was run, on whatever states, controls included.

    Args:
        comparison: Runs under one set of conditions.
        command: The command that makes these numbers again.
        average: Over training seeds: the mean, or the interquartile mean.
        compare: Whether to show the paper's figures beside ours.

    Raises:
        ValueError: If the average is unknown.
    """
    return _figures_table("Overall results", comparison, comparison.variants, command, average, compare)


def ablation_table(
    comparison: Comparison, command: str, *, average: Average = "mean", compare: bool = False
) -> ResultTable | None:
    """Returns the paper's Table 3: the method, its parts, and any method on other states than its own.

    Arguments are those of :func:`overall_table`; None is returned if nothing of the kind was run.
    """
    parts = [one for one in comparison.variants if one.is_ablation or not one.as_shipped]
    if not parts:
        return None
    wholes = {one.method for one in parts if not one.as_shipped} | {PROPOSED}
    variants = [one for one in comparison.variants if one in parts or (one.as_shipped and one.method in wholes)]
    return _figures_table("Ablations", comparison, variants, command, average, compare)


def _figures_table(
    title: str, comparison: Comparison, variants: Sequence[Variant], command: str, average: Average, compare: bool
) -> ResultTable:
    """Returns headline figures: rows by world and method, groups of columns by horizon and repeats."""
    if average not in ("mean", "iqm"):
        raise ValueError(f"unknown average {average!r}; choose 'mean' or 'iqm'")
    runs = [run for run in comparison.runs if run.variant in variants]
    columns = _columns(runs)
    sessions = sorted({(task.max_len, task.repeats) for task in comparison.tasks})
    rows: list[tuple[Cell, ...]] = []
    published = False
    for _, group in groupby(comparison.tasks, key=lambda task: task.world):
        tasks = list(group)
        world = tasks[0].world_title
        for variant in variants:
            own = {(task.max_len, task.repeats): comparison.cell(task, variant) for task in tasks}
            if not any(own.values()):
                continue
            cells = [_figure_cells(own.get(session, ()), columns, average) for session in sessions]
            rows.append((world, variant.title, *chain.from_iterable(cells)))
            # The paper forbids no repeats.
            paper = [
                published_result(tasks[0], variant, max_len) if repeats == "allow" else None
                for max_len, repeats in sessions
                if compare
            ]
            if any(paper):
                published = True
                cells = [_published_cells(row, columns) for row in paper]
                rows.append((world, f"{variant.title}: {PAPER}", *chain.from_iterable(cells)))
    return ResultTable(
        title=comparison.titled(title),
        header=("world", "method", *([*(column.title for column in columns), "seeds"] * len(sessions))),
        rows=tuple(rows),
        notes=(
            *labels.repeats_notes(variants, [repeats for _, repeats in sessions]),
            *_figures_notes(runs, columns, average, compare, published, command),
        ),
        spans=tuple(Span(session_title(*session), len(columns) + 1) for session in sessions),
    )


def _columns(runs: Sequence[EvaluatedRun]) -> list[Column]:
    """Returns the columns in the paper's order; floor and ceiling only where the leave rule has a length formula."""
    by_figure = {column.figure: column for column in COLUMNS}
    return [by_figure[name] for name in _FIGURES if all(name in run.summary for run in runs)]


def _figure_cells(runs: Sequence[EvaluatedRun], columns: Sequence[Column], average: Average) -> list[Cell]:
    if not runs:
        return [MISSING] * (len(columns) + 1)
    return [*(_figure_cell(runs, column, average) for column in columns), str(len(runs))]


def _figure_cell(runs: Sequence[EvaluatedRun], column: Column, average: Average) -> Measured:
    """Returns a figure of one method on one task with its 95 % interval.

    For other training seeds and users, of one run for other users alone; around an interquartile mean over seeds, for
    other seeds alone.
    """
    values = np.asarray([run.summary[column.figure] for run in runs], np.float64)
    if not column.interval:
        return Measured(float(values.mean()), column.digits)
    if len(runs) == 1 or average == "mean":
        interval = figure_interval(runs, column.figure)
        return Measured(float(values.mean()), column.digits, interval.low, interval.high)
    interval = stratified_interval(values[:, None], resamples=_RESAMPLES)
    return Measured.of_interval(interval, column.digits)


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
    values = implied | row.means
    cells = [
        Measured(values[column.figure], column.digits, spread=row.spreads.get(column.figure)) for column in columns
    ]
    return [*cells, "3"]


def _figures_notes(
    runs: Sequence[EvaluatedRun],
    columns: Sequence[Column],
    average: Average,
    compare: bool,
    published: bool,
    command: str,
) -> tuple[str, ...]:
    records = [run.record for run in runs]
    brackets = (
        "interquartile mean over training seeds (below four, the mean), with the bootstrap interval for other seeds"
        if average == "iqm"
        else "mean over training seeds, with the interval for other seeds and other users"
    )
    notes = [
        *world_notes(runs),
        *labels.training_notes(records),
        f"Brackets: 95 % intervals. Several seeds: {brackets}. One run: for other users. Rates: Wilson's interval, "
        "inside [0, 1]. A claim is a difference with its interval: see the table of differences.",
        *labels.method_notes(records),
        "viol.: share of slates that the leave rule punishes, which is what ends sessions; AD is not.",
    ]
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


def world_table(pairs: Sequence[WorldPair], command: str, *, compare: bool = False) -> ResultTable:
    """Returns the paper's Table 1: users, items, interactions and density of the logs, and who plays sessions.

    Args:
        pairs: The worlds; the same data under the same name is shown once.
        command: The command that makes these numbers again.
        compare: Whether to show the paper's figures below ours.

    Raises:
        ValueError: If there are no worlds.
    """
    if not pairs:
        raise ValueError("there are no worlds to tabulate")
    unique = {(pair.name, pair.test.data.data_hash): pair for pair in pairs}.values()
    rows: list[tuple[Cell, ...]] = []
    published = False
    for pair in unique:
        for world in (pair.train, pair.test):
            rows.append(_world_row(pair.name, world))
            paper = _published_world_rows(pair.name, world) if compare else []
            published = published or bool(paper)
            rows += paper
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
    if published:
        notes.append("Rows of the paper: arXiv:2603.03820, Table 1; interactions there are rounded.")
    return ResultTable(
        title="Training and test environments",
        header=("world", "usage", "users", "items", "interactions", "density, %", "clicks, %", "session users",
                "candidates"),
        rows=tuple(rows),
        notes=(*notes, f"Made by: {command}"),
    )  # fmt: skip


def _world_row(name: str, world: World) -> tuple[Cell, ...]:
    log = world.data.train if world.split == "train" else world.data.test
    users, items = len(np.unique(log.users)), len(np.unique(log.items))
    seen_pairs = count_distinct(log.users.astype(np.int64) * (int(log.items.max(initial=0)) + 1) + log.items)
    return (
        world_title(name, world.data.provenance.origin),
        world.split,
        str(users),
        str(items),
        str(len(log)),
        Measured(100.0 * seen_pairs / max(users * items, 1), 2),
        Measured(100.0 * float(log.clicks.mean()) if len(log) else 0.0, 1),
        str(len(world.users)),
        str(world.n_items),
    )


def _published_world_rows(name: str, world: World) -> list[tuple[Cell, ...]]:
    """Returns the paper's row for a world, or none. It gives no density, which follows only without repeated pairs."""
    data = paper_data(name, world.data.provenance.name)
    return [
        (f"{row.data} in the paper", row.split, str(row.users), str(row.items), str(row.interactions), *[MISSING] * 4)
        for row in PUBLISHED_LOGS
        if (row.data, row.split) == (data, world.split)
    ]  # fmt: skip


def cost_table(comparison: Comparison, command: str, *, compare: bool = False) -> ResultTable | None:
    """Returns the paper's Table 4: the time that training takes, by world, horizon, method and machine.

    Arguments are those of :func:`overall_table`; None is returned if nothing was trained in one go.
    """
    trained = [run for run in comparison.runs if run.variant.learns]
    whole = [run for run in trained if not run.run.result.get("resumed_at")]
    groups: defaultdict[tuple[Task, Variant, str], list[EvaluatedRun]] = defaultdict(list)
    for run in whole:
        groups[run.task, run.variant, run.run.timing["machine"]].append(run)
    if not groups:
        return None
    machines = sorted({machine for _, _, machine in groups})
    rows: list[tuple[Cell, ...]] = []
    for task, variant, machine in sorted(groups, key=lambda key: (key[0], key[1].order, key[2])):
        runs = groups[task, variant, machine]
        paper: list[Cell] = []
        if compare:
            published = published_seconds(task, variant)
            paper.append(MISSING if published is None else Measured(published, 1))
        row = (task.world_title, str(task.max_len), task.repeats, variant.title, *_cost_cells(runs), *paper)
        rows.append((*row, str(machines.index(machine) + 1)))
    return ResultTable(
        title="Training time",
        header=("world", "Max Len", "repeats", "method", "seeds", "steps", "sessions", "peak MiB", "seconds",
                f"s per {PAPER_EPISODES:,} sessions", f"processor s per {PAPER_EPISODES:,} sessions",
                *(["paper (another machine)"] if compare else []), "machine"),
        rows=tuple(rows),
        notes=(
            comparison.provenance,
            *_cost_notes(machines, len(trained) - len(whole), compare),
            f"Made by: {command}",
        ),
    )  # fmt: skip


def _cost_cells(runs: Sequence[EvaluatedRun]) -> list[Cell]:
    seconds = [float(run.run.timing["training_seconds"]) for run in runs]
    sessions = [sum(point["sessions"] for point in run.run.session_curve) for run in runs]
    # Older runs and some systems do not tell their peak memory.
    cpu_seconds = [float(run.run.timing.get("training_cpu_seconds", np.nan)) for run in runs]
    memories = [run.run.timing.get("peak_memory_mib") for run in runs]
    peaks = [float(memory) for memory in memories if memory is not None]
    offline = min(sessions) < 1
    return [
        str(len(runs)),
        f"{np.mean([run.run.steps_done for run in runs]):.0f}",
        MISSING if offline else f"{np.mean(sessions):.0f}",
        Measured(max(peaks), 0) if peaks else MISSING,
        _mean_seconds(seconds),
        *[
            MISSING
            if offline or np.isnan(times).any()
            else _mean_seconds([s * PAPER_EPISODES / n for s, n in zip(times, sessions, strict=True)])
            for times in (seconds, cpu_seconds)
        ],
    ]


def _mean_seconds(values: Sequence[float]) -> Measured:
    if len(values) < 2:
        return Measured(values[0], 1)
    interval = student_interval(np.asarray(values))
    return Measured(interval.estimate, 1, max(interval.low, 0.0), interval.high)


def _cost_notes(machines: Sequence[str], resumed: int, compare: bool) -> list[str]:
    notes = [f"Machine {number}: {machine}." for number, machine in enumerate(machines, 1)]
    notes += [
        "seconds: wall time of training alone, without pretraining of a purifier and evaluation, mean over seeds "
        f"with its 95 % Student interval; the next columns scale each run to {PAPER_EPISODES:,} training sessions, in "
        "wall time and in processor time, which other programs on the machine hardly change. "
        f"sessions counts those that ended during training; {MISSING} where there were none, as offline.",
        "peak MiB: the largest resident memory of a run's process, its worlds included; largest of the seeds.",
        "Compare times within a machine, and only of runs that had it to themselves.",
    ]
    if resumed:
        notes.append(f"Left out: {resumed} run(s) that were interrupted and resumed, whose time is known in part only.")
    if compare:
        notes.append(
            "paper: arXiv:2603.03820, Table 4 (KuaiRec, Max Len 30, 20,000 episodes); its machine is not named."
        )
    return notes
