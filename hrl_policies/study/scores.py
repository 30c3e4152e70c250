"""Scores that can be averaged over worlds and horizons: what fairness gained, and what was earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import LOWER_CONTROL, UPPER_CONTROL, Task, Variant
from hrl_policies.study.results import Comparison, EvaluatedRun
from hrl_policies.study.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
    win_rate,
)
from hrl_policies.study.table import MISSING, Cell, Measured, ResultTable, Span

Values = NDArray[np.float64]
Score = Callable[[EvaluatedRun], float]

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """Scores of every method that was run on every task with common seeds.

    Attributes:
        title: Name of the score.
        explanation: Meaning of 0 and 1.
        by_variant: ``float64 (S, T)`` for S common seeds and T tasks.
    """

    title: str
    explanation: str
    by_variant: Mapping[Variant, Values]


def length_scores(comparison: Comparison) -> Scores | None:
    """Returns where Len lies between floor (0: every slate punished) and ceiling (1: none), at the run's own R_each.

    It isolates what a method gains by fairness from what it gains by clicks.

    Returns:
        The scores, or None where a leave rule has no length formula.
    """
    if any("len_floor" not in run.summary for run in comparison.runs):
        return None

    def score(run: EvaluatedRun) -> float:
        floor, ceiling = run.summary["len_floor"], run.summary["len_ceiling"]
        return (run.summary["len"] - floor) / (ceiling - floor)

    return Scores(
        "normalised Len",
        "0: every slate punished, 1: none, at the same R_each",
        _score_tables(comparison, score),
    )


def reward_scores(comparison: Comparison) -> Scores | None:
    """Returns R_cum scaled so that Random earns 0 and QuotaGreedy 1 on each task.

    Returns:
        The scores, or None where one of the two was not run on every task, or did not earn more than the other.
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
    scores = (length_scores(comparison), reward_scores(comparison))
    return [one for one in scores if one is not None and one.by_variant]


def common_seeds(groups: Sequence[Sequence[EvaluatedRun]]) -> list[int]:
    """Returns the training seeds that all groups of runs have, increasing."""
    return sorted(set.intersection(*({run.seed for run in group} for group in groups))) if groups else []


def score_table(comparison: Comparison, base: str | None, command: str) -> ResultTable | None:
    """Returns scores over all worlds and horizons: interquartile means, and how likely the base beats each method.

    Only methods that were run on every task with common seeds have a row.

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo; None leaves out the probability of improvement.
        command: The command that makes these numbers again.

    Returns:
        The table, or None if there is no score.

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
        f"Tasks: {', '.join(f'{task.world_title} {task.max_len}' for task in comparison.tasks)}.",
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
        iqm = Measured.of_interval(stratified_interval(table, resamples=_RESAMPLES))
    cells: list[Cell] = [iqm, Measured(float(table.mean()))]
    if base is not None:
        own = scores.by_variant.get(base)
        cells.append(MISSING if base == variant or own is None else _improvement(own, table))
    return cells


def _improvement(first: Values, second: Values) -> Measured:
    if min(len(first), len(second)) < 2:
        return Measured(float(win_rate(first, second)), 2)
    return Measured.of_interval(probability_of_improvement(first, second), 2)


def _score_tables(comparison: Comparison, score: Score) -> dict[Variant, Values]:
    """Returns ``(S, T)`` for each variant that has seeds which were run on every task."""
    tables = {}
    for variant in comparison.variants:
        groups = [comparison.cell(task, variant) for task in comparison.tasks]
        by_seed = [{run.seed: score(run) for run in group} for group in groups]
        seeds = common_seeds(groups)
        if seeds:
            tables[variant] = np.asarray([[scores[seed] for scores in by_seed] for seed in seeds])
    return tables
