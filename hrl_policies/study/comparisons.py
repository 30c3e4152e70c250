"""Comparisons of methods: paired differences with corrected p-values, and scores over worlds and horizons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import LOWER_CONTROL, UPPER_CONTROL, Task, Variant
from hrl_policies.study.results import Comparison, EvaluatedRun, world_notes
from hrl_policies.study.statistics import (
    Interval,
    holm,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
    sign_flip_test,
    stratified_interval,
    win_rate,
)
from hrl_policies.study.tables import MISSING, Cell, Measured, ResultTable, Span

Values = NDArray[np.float64]
Runs = Sequence[EvaluatedRun]

_FIGURES = {"r_cum": "R_cum", "len": "Len"}
_DIFFERENCE_RESAMPLES, _SCORE_RESAMPLES = 4_000, 10_000


@dataclass(frozen=True)
class Difference:
    """A base method minus another, on one task.

    Attributes:
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

    Arguments are those of :func:`differences`, and the command that makes these numbers again; None is returned if
    there is nothing to compare the base with.

    Raises:
        ValueError: See :func:`differences`.
    """
    all_differences = differences(comparison, base)
    if not all_differences:
        return None
    adjusted = holm(np.asarray([one.p_value for one in all_differences]))
    rows: defaultdict[tuple[Task, Variant], list[Cell]] = defaultdict(list)
    for one, p_adjusted in zip(all_differences, adjusted, strict=True):
        gap = Measured.of_interval(one.interval, 2, sign=True)
        p_values = (Measured(one.p_value, 4), Measured(float(p_adjusted), 4))
        rows[one.task, one.other] += [gap, *p_values, str(one.seeds)]
    own = comparison.find(base)
    return ResultTable(
        title=comparison.titled(f"{own.title} minus each other method"),
        header=("world", "Max Len", "repeats", "method", *(["difference", "p", "p, Holm", "seeds"] * len(_FIGURES))),
        rows=tuple(
            (task.world_title, str(task.max_len), task.repeats, variant.title, *cells)
            for (task, variant), cells in rows.items()
        ),
        notes=(
            *world_notes(comparison.runs),
            "difference: mean over seeds and users, with its 95 % bootstrap interval: seeds are resampled, then users; "
            "users alone where there is one pair of runs. Users and random numbers are the same under every method.",
            "p: of no difference, two-sided, by exact sign flips over seeds (users where there is one pair of runs). "
            "n seeds never give less than 2 / 2^n, three never less than 0.25. The bootstrap interval of few seeds is "
            "too short; where the two disagree, trust p.",
            f"p, Holm: adjusted for all {len(all_differences)} comparisons of this table. A control is run once and "
            "stands against each seed of the other.",
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
    names = [
        f"{other.title} ({task.world_title}, {task.session_title})"
        for task, other, first, second in _pairs(comparison, own)
        if not _comparable(first, second)
    ]
    return [f"Not compared, as no training seed is common: {', '.join(names)}."] if names else []


def _difference(task: Task, other: Variant, first: Runs, second: Runs, figure: str) -> Difference:
    a, b = _paired_values(first, second, figure)
    if len(a) == 1:
        gaps = (a - b)[0]
        interval = mean_interval(gaps, resamples=_DIFFERENCE_RESAMPLES)
    else:
        gaps = (a - b).mean(axis=1)
        interval = paired_difference(a, b, resamples=_DIFFERENCE_RESAMPLES)
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
    return np.stack([run.users.per_session(figure) for run in runs])


@dataclass(frozen=True)
class Scores:
    """Scores of every method that was run on every task with common seeds, ``float64 (S, T)`` for S seeds and T tasks.

    ``explanation`` is the meaning of 0 and 1.
    """

    title: str
    explanation: str
    by_variant: Mapping[Variant, Values]


def length_scores(comparison: Comparison) -> Scores | None:
    """Returns where Len lies between floor (0: every slate punished) and ceiling (1: none), at the run's own R_each.

    It isolates what a method gains by fairness from what it gains by clicks.

    Returns:
        The scores, or None where a leave rule has no length formula, or punishes no slate.
    """
    if any(run.summary.get("len_floor", 0.0) >= run.summary.get("len_ceiling", 0.0) for run in comparison.runs):
        return None

    def score(run: EvaluatedRun) -> float:
        floor, ceiling = run.summary["len_floor"], run.summary["len_ceiling"]
        return (run.summary["len"] - floor) / (ceiling - floor)

    return Scores(
        "normalised Len", "0: every slate punished, 1: none, at the same R_each", _score_tables(comparison, score)
    )


def reward_scores(comparison: Comparison) -> Scores | None:
    """Returns R_cum scaled so that Random earns 0 and QuotaGreedy 1 on each task.

    None where one of the two was not run on every task, or did not earn more than the other.
    """
    ends: dict[Task, tuple[float, float]] = {}
    for task in comparison.tasks:
        controls = [comparison.cell(task, Variant(name)) for name in (LOWER_CONTROL, UPPER_CONTROL)]
        if not all(controls):
            return None
        low, high = (float(np.mean([run.summary["r_cum"] for run in runs])) for runs in controls)
        if not high > low:
            return None
        ends[task] = low, high

    def score(run: EvaluatedRun) -> float:
        low, high = ends[run.task]
        return (run.summary["r_cum"] - low) / (high - low)

    titles = [Variant(name).title for name in (LOWER_CONTROL, UPPER_CONTROL)]
    return Scores("normalised R_cum", f"0: {titles[0]}, 1: {titles[1]}", _score_tables(comparison, score))


def all_scores(comparison: Comparison) -> list[Scores]:
    """Returns the scores that the runs allow."""
    return [one for one in (length_scores(comparison), reward_scores(comparison)) if one is not None and one.by_variant]


def common_seeds(groups: Sequence[Runs]) -> list[int]:
    """Returns the training seeds that all groups of runs have, increasing."""
    return sorted(set.intersection(*({run.seed for run in group} for group in groups))) if groups else []


def score_table(comparison: Comparison, base: str | None, command: str) -> ResultTable | None:
    """Returns scores over all worlds and horizons: interquartile means, and how likely the base beats each method.

    Only methods that were run on every task with common seeds have a row.

    Arguments are those of :func:`difference_table`; without a base, the probability of improvement is left out. None is
    returned if there is no score.

    Raises:
        ValueError: If the base was not run.
    """
    scores = all_scores(comparison)
    if not scores:
        return None
    own = None if base is None else comparison.find(base)
    titles = ["IQM", "mean", *([] if own is None else ["P(base better)"])]
    rows = [
        (
            variant.title,
            str(len(scores[0].by_variant[variant])),
            *(cell for one in scores for cell in _score_cells(one, variant, own)),
        )
        for variant in comparison.variants
        if all(variant in one.by_variant for one in scores)
    ]
    notes = [
        comparison.provenance,
        *(f"{one.title}: {one.explanation}." for one in scores),
        f"Tasks: {'; '.join(f'{task.world_title}, {task.session_title}' for task in comparison.tasks)}.",
        "IQM: interquartile mean over seeds and tasks, with its 95 % stratified bootstrap interval (seeds resampled "
        "within tasks; none for one seed).",
    ]
    if own is not None:
        notes.append(
            f"P(base better): how likely a run of {own.title} scores above one of the method, averaged over tasks, "
            "a tie counting one half, with its 95 % bootstrap interval (Agarwal et al., NeurIPS 2021)."
        )
    return ResultTable(
        title=comparison.titled("Scores over worlds and horizons"),
        header=("method", "seeds", *(titles * len(scores))),
        rows=tuple(rows),
        notes=(*notes, f"Made by: {command}"),
        spans=tuple(Span(one.title, len(titles)) for one in scores),
    )


def _score_cells(scores: Scores, variant: Variant, base: Variant | None) -> list[Cell]:
    table = scores.by_variant[variant]
    if len(table) < 2:
        iqm = Measured(float(interquartile_mean(table.ravel())))
    else:
        iqm = Measured.of_interval(stratified_interval(table, resamples=_SCORE_RESAMPLES))
    cells: list[Cell] = [iqm, Measured(float(table.mean()))]
    if base is not None:
        own = scores.by_variant.get(base)
        cells.append(MISSING if base == variant or own is None else _improvement(own, table))
    return cells


def _improvement(first: Values, second: Values) -> Measured:
    if min(len(first), len(second)) < 2:
        return Measured(float(win_rate(first, second)), 2)
    return Measured.of_interval(probability_of_improvement(first, second), 2)


def _score_tables(comparison: Comparison, score: Callable[[EvaluatedRun], float]) -> dict[Variant, Values]:
    """Returns ``(S, T)`` for each variant that has seeds which were run on every task."""
    tables = {}
    for variant in comparison.variants:
        groups = [comparison.cell(task, variant) for task in comparison.tasks]
        by_seed = [{run.seed: score(run) for run in group} for group in groups]
        seeds = common_seeds(groups)
        if seeds:
            tables[variant] = np.asarray([[scores[seed] for scores in by_seed] for seed in seeds])
    return tables
