"""Paired differences between methods, with intervals and with p-values that are corrected for their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.paper_tables import world_notes
from hrl_policies.study.results import Comparison, EvaluatedRun
from hrl_policies.study.scores import common_seeds
from hrl_policies.study.statistics import Interval, holm, mean_interval, paired_difference, sign_flip_test
from hrl_policies.study.table import Cell, Measured, ResultTable, Span

Values = NDArray[np.float64]
Runs = Sequence[EvaluatedRun]

_FIGURES = {"r_cum": "R_cum", "len": "Len"}
_RESAMPLES = 4_000


@dataclass(frozen=True)
class Difference:
    """A base method minus another, on one task.

    Attributes:
        task: World and horizon.
        other: The other method.
        figure: ``"r_cum"`` or ``"len"``.
        interval: Mean difference with its interval over seeds and users (users alone for one pair of runs).
        p_value: Of no difference: exact sign flips over seeds (over users for one pair of runs).
        seeds: Number of pairs of seeds.
    """

    task: Task
    other: Variant
    figure: str
    interval: Interval
    p_value: float
    seeds: int


def differences(comparison: Comparison, base: str) -> list[Difference]:
    """Compares a method with every other one, on every task and in both figures.

    The same users met the same random numbers under every method, so users are paired. Seeds are paired by number,
    which only says which runs to subtract; a control, which is run once, stands against each seed of the other. Methods
    that have no seed in common on a task are not compared there.

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo; it is taken on its own states.

    Raises:
        ValueError: If the base was not run.
    """
    return [
        _difference(task, other, first, second, figure)
        for task, other, first, second in _pairs(comparison, comparison.find(base))
        if _comparable(first, second)
        for figure in _FIGURES
    ]


def difference_table(comparison: Comparison, base: str, command: str) -> ResultTable | None:
    """Returns the paired differences to a base, with p-values adjusted for all of them together (Holm).

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo.
        command: The command that makes these numbers again.

    Returns:
        The table, or None if there is nothing to compare the base with.

    Raises:
        ValueError: See :func:`differences`.
    """
    found = differences(comparison, base)
    if not found:
        return None
    adjusted = holm(np.asarray([one.p_value for one in found]))
    rows: dict[tuple[Task, Variant], list[Cell]] = {}
    for one, p_adjusted in zip(found, adjusted, strict=True):
        rows.setdefault((one.task, one.other), []).extend(
            (
                Measured.of_interval(one.interval, 2, sign=True),
                Measured(one.p_value, 4),
                Measured(float(p_adjusted), 4),
                str(one.seeds),
            )
        )
    own = comparison.find(base)
    return ResultTable(
        title=comparison.titled(f"{own.title} minus each other method"),
        header=("world", "Max Len", "method", *(["difference", "p", "p, Holm", "seeds"] * len(_FIGURES))),
        rows=tuple(
            (task.world_title, str(task.max_len), variant.title, *cells)
            for (task, variant), cells in rows.items()
        ),
        notes=(
            *world_notes(comparison.runs),
            "difference: mean over seeds and users, with its 95 % bootstrap interval: seeds are resampled, then users; "
            "users alone where there is one pair of runs. Users and random numbers are the same under every method.",
            "p: of no difference, two-sided, by exact sign flips over seeds (users where there is one pair of runs). "
            "n seeds never give less than 2 / 2^n, three never less than 0.25. The bootstrap interval of few seeds is "
            "too short; where the two disagree, trust p.",
            f"p, Holm: adjusted for all {len(found)} comparisons of this table. A control is run once and stands "
            "against each seed of the other.",
            *_notes_on_unpaired(comparison, own),
            f"Made by: {command}",
        ),
        spans=tuple(Span(title, 4) for title in _FIGURES.values()),
    )


def _pairs(comparison: Comparison, own: Variant) -> Iterator[tuple[Task, Variant, Runs, Runs]]:
    """Yields every other method that was run on a task of the base, with the runs of both, the base's first."""
    for task in comparison.tasks:
        for other in comparison.variants:
            first, second = comparison.cell(task, own), comparison.cell(task, other)
            if other != own and first and second:
                yield task, other, first, second


def _comparable(first: Runs, second: Runs) -> bool:
    return _is_single_control(first) or _is_single_control(second) or bool(common_seeds((first, second)))


def _is_single_control(runs: Runs) -> bool:
    """Returns whether there is no training seed to pair: a control, which is run once."""
    return len(runs) == 1 and not runs[0].variant.learns


def _notes_on_unpaired(comparison: Comparison, own: Variant) -> list[str]:
    """Returns a note on the methods that could not be paired with the base, or none."""
    names = [
        f"{other.title} ({task.world_title}, Max Len {task.max_len})"
        for task, other, first, second in _pairs(comparison, own)
        if not _comparable(first, second)
    ]
    return [f"Not compared, as no training seed is common: {', '.join(names)}."] if names else []


def _difference(task: Task, other: Variant, first: Runs, second: Runs, figure: str) -> Difference:
    a, b = _paired_values(first, second, figure)
    if len(a) == 1:
        gaps = (a - b)[0]
        interval = mean_interval(gaps, resamples=_RESAMPLES)
    else:
        gaps = (a - b).mean(axis=1)
        interval = paired_difference(a, b, resamples=_RESAMPLES)
    return Difference(task, other, figure, interval, sign_flip_test(gaps), len(a))


def _paired_values(first: Runs, second: Runs, figure: str) -> tuple[Values, Values]:
    """Returns two tables ``(S, U)`` of the same seeds and users."""
    if _is_single_control(first) or _is_single_control(second):
        a, b = np.broadcast_arrays(_user_values(first, figure), _user_values(second, figure))
        return a, b
    seeds = common_seeds((first, second))
    a, b = (_user_values([run for run in runs if run.seed in seeds], figure) for runs in (first, second))
    return a, b


def _user_values(runs: Runs, figure: str) -> Values:
    """Returns ``(S, U)``: a figure of each user under each seed."""
    return np.stack([run.users.per_session(figure) for run in runs])
