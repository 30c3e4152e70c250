"""The paper's Table 4: how long training takes, for a number of sessions that is the same for all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hrl_policies.study.judged import Comparison, JudgedRun
from hrl_policies.study.published import PAPER_EPISODES, PUBLISHED_SECONDS, paper_data, paper_name
from hrl_policies.study.result_table import MISSING, Cell, Measured, ResultTable
from hrl_policies.study.tables import half_interval
from hrl_policies.zoo import method

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
                    own += _cells(runs, sessions)
                    own += [_published(runs[0], sessions)] if compare else []
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
            *_notes(machines, len(trained) - len(whole), sessions, compare, command),
        ),
    )


def _cells(runs: Sequence[JudgedRun], sessions: int) -> list[Cell]:
    seconds = [float(run.run.timing["training_seconds"]) for run in runs]
    played = [sum(point["sessions"] for point in run.run.session_curve) for run in runs]
    steps = np.mean([run.run.steps_done for run in runs])
    cells: list[Cell] = [str(len(runs)), f"{steps:.0f}"]
    memory = _peak_memory(runs)
    if min(played) < 1:
        return [*cells, MISSING, memory, _mean(seconds), MISSING]
    scaled = [one * sessions / count for one, count in zip(seconds, played, strict=True)]
    return [*cells, f"{np.mean(played):.0f}", memory, _mean(seconds), _mean(scaled)]


def _peak_memory(runs: Sequence[JudgedRun]) -> Cell:
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


def _published(run: JudgedRun, sessions: int) -> Cell:
    """Returns the paper's time for as many sessions; it has times for one world and one horizon only."""
    task = run.task
    name = paper_name(run.variant.method) if run.variant.as_shipped else None
    if paper_data(task.world, task.data) != "KuaiRec" or task.max_len != _PAPER_MAX_LEN or name is None:
        return MISSING
    seconds = PUBLISHED_SECONDS.get(name)
    return MISSING if seconds is None else Measured(seconds * sessions / PAPER_EPISODES, 1)


def _notes(
    machines: Sequence[str], resumed: int, sessions: int, compare: bool, command: str
) -> tuple[str, ...]:
    notes = [f"Machine {number}: {machine}." for number, machine in enumerate(machines, 1)]
    notes.append(
        "seconds: wall time of training alone, without pretraining of a purifier and without judging, mean over seeds "
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
