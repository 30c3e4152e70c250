"""Comparisons of methods: differences with corrected p-values, and scores over worlds and horizons."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import LOWER_CONTROL, UPPER_CONTROL, Task, Variant
from hrl_policies.study.results import Comparison, EvaluatedRun, world_notes
from hrl_policies.study.statistics import (
    holm,
    interquartile_mean,
    probability_of_improvement,
    sign_flip_test,
    stratified_interval,
    win_rate,
)
from hrl_policies.study.tables import MISSING, Cell, Measured, ResultTable, Span
from kuaifair_env.intervals import Estimate, crossed_difference, interval_of

Values = NDArray[np.float64]
Runs = Sequence[EvaluatedRun]

_FIGURES = {"r_cum": "R_cum", "len": "Len"}
_SCORE_RESAMPLES = 10_000
_SIGNIFICANCE = 0.05
_MIN_TEST_SEEDS = 4
"""With three seeds, nothing shows whether their results are normal, on which a t-test then rests."""

_MIN_TEST_USERS = 6
"""Sign flips of fewer never give a p-value of 0.05."""


@dataclass(frozen=True)
class Difference:
    """A base method minus another, on one task.

    Attributes:
        figure: ``"r_cum"`` or ``"len"``.
        estimate: Mean difference over all seeds of both methods and over users, with its variance.
        seeds: Number of runs of the base and of the other.
        learners: Whether the base, and the other, was trained: its runs differ in a training seed.
        p_value: Of no difference, or None where no test can be made.
    """

    task: Task
    other: Variant
    figure: str
    estimate: Estimate
    seeds: tuple[int, int]
    learners: tuple[bool, bool]
    p_value: float | None

    @property
    def min_seeds(self) -> int | None:
        """Number of training seeds of the method that has fewer; None between two controls."""
        return min((n for n, learns in zip(self.seeds, self.learners, strict=True) if learns), default=None)

    @property
    def seeds_text(self) -> str:
        """Numbers of training seeds, such as ``"10, 5"``; a control that was run once has none."""
        return ", ".join(
            str(n) if learns or n > 1 else "control" for n, learns in zip(self.seeds, self.learners, strict=True)
        )

    @property
    def why_untested(self) -> str:
        """Why there is no p-value; empty where there is one."""
        if self.p_value is not None:
            return ""
        if self.min_seeds is None:
            return f"No test, as there are fewer than {_MIN_TEST_USERS} users"
        if self.min_seeds == 1:
            return "No interval and no test, as one of the methods was trained with a single seed"
        return f"No test, as one of the methods was trained with fewer than {_MIN_TEST_SEEDS} seeds"

    def measured(self) -> Measured:
        """Returns the difference with its 95 % interval; a single training seed says nothing of others: none."""
        if self.min_seeds == 1:
            return Measured(self.estimate.value, 2, sign=True)
        return Measured.of_interval(interval_of(self.estimate), 2, sign=True)


def differences(comparison: Comparison, base: str) -> list[Difference]:
    """Compares a method with every other one, on every task and in both figures.

    The same users met the same random numbers under every method, so users are paired. Training seeds of two methods
    are independent, whatever their numbers, and all count; a control that was run once has none. See
    :func:`kuaifair_env.intervals.crossed_difference`.

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo; it is taken on its own states.

    Raises:
        ValueError: If the base was not run.
    """
    own = comparison.find(base)
    return [
        _difference(task, other, first, second, figure)
        for task in comparison.tasks
        for other in comparison.variants
        if other != own and (first := comparison.cell(task, own)) and (second := comparison.cell(task, other))
        for figure in _FIGURES
    ]


def difference_table(comparison: Comparison, base: str, command: str) -> ResultTable | None:
    """Returns the differences to a base, with p-values adjusted for all of them together (Holm).

    Where a difference is not shown, the table says which would have been (see ``Estimate.detectable``): at the level
    that Holm's correction leaves to it.

    Arguments are those of :func:`differences`, and the command that makes these numbers again; None is returned if
    there is nothing to compare the base with.

    Raises:
        ValueError: See :func:`differences`.
    """
    all_differences = differences(comparison, base)
    if not all_differences:
        return None
    tested = [one for one in all_differences if one.p_value is not None]
    adjusted = holm(np.asarray([one.p_value for one in tested], np.float64))
    adjusted_of = {id(one): float(p) for one, p in zip(tested, adjusted, strict=True)}
    remaining = sum(p > _SIGNIFICANCE for p in adjusted_of.values())
    rows: defaultdict[tuple[Task, Variant], list[Cell]] = defaultdict(list)
    for one in all_differences:
        p_adjusted = adjusted_of.get(id(one))
        cells: list[Cell] = [one.measured(), MISSING, MISSING, MISSING, one.seeds_text]
        if one.p_value is not None and p_adjusted is not None:
            cells[1:3] = Measured(one.p_value, 4), Measured(p_adjusted, 4)
            if p_adjusted > _SIGNIFICANCE:
                cells[3] = Measured(one.estimate.detectable(_SIGNIFICANCE / remaining), 2)
        rows[one.task, one.other] += cells
    own = comparison.find(base)
    titles = ["difference", "p", "p, Holm", "detectable", "seeds"]
    return ResultTable(
        title=comparison.titled(f"{own.title} minus each other method"),
        header=("world", "Max Len", "repeats", "method", *(titles * len(_FIGURES))),
        rows=tuple(
            (task.world_title, str(task.max_len), task.repeats, variant.title, *cells)
            for (task, variant), cells in rows.items()
        ),
        notes=(
            *world_notes(comparison.runs),
            "difference: mean over all training seeds of both methods and over users, with its 95 % interval for other "
            "seeds and other users. Seeds of two methods are independent; users and random numbers are the same under "
            "every method. Student's interval with Satterthwaite's degrees of freedom.",
            "p: of no difference, two-sided, by the same t; between two controls by sign flips over users.",
            f"p, Holm: adjusted for the {len(tested)} tests of this table.",
            "detectable: where p, Holm is above 0.05, the true difference that so many seeds and users would have "
            "shown with probability 0.8, given the spread of these runs. Any smaller difference may be there.",
            f"seeds: of {own.title}, of the other; a control is run once.",
            *_notes_on_untested(all_differences),
            f"Made by: {command}",
        ),
        spans=tuple(Span(title, len(titles)) for title in _FIGURES.values()),
    )


def _notes_on_untested(all_differences: Sequence[Difference]) -> list[str]:
    """Returns a note for each reason why there is no test, with the methods, and their tasks unless it is all."""
    rows: defaultdict[Variant, dict[Task, str]] = defaultdict(dict)
    for one in all_differences:
        rows[one.other][one.task] = one.why_untested
    names: defaultdict[str, list[str]] = defaultdict(list)
    for variant, reasons in rows.items():
        for reason in dict.fromkeys(filter(None, reasons.values())):
            tasks = [f"{task.world_title}, {task.session_title}" for task, why in reasons.items() if why == reason]
            names[reason].append(variant.title + (f" ({'; '.join(tasks)})" if len(tasks) < len(reasons) else ""))
    return [f"{reason}: {', '.join(methods)}." for reason, methods in names.items()]


def _difference(task: Task, other: Variant, first: Runs, second: Runs, figure: str) -> Difference:
    a, b = _user_values(first, figure), _user_values(second, figure)
    estimate = crossed_difference(a, b)
    learners = first[0].variant.learns, second[0].variant.learns
    seeds = [len(table) for table, learns in zip((a, b), learners, strict=True) if learns]
    p_value: float | None = None
    if not seeds and len(a) == len(b) == 1:
        p_value = sign_flip_test((a - b)[0]) if a.shape[1] >= _MIN_TEST_USERS else None
    elif min(seeds, default=_MIN_TEST_SEEDS) >= _MIN_TEST_SEEDS:
        p_value = estimate.p_value()
    return Difference(task, other, figure, estimate, (len(a), len(b)), learners, p_value)


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


def _common_seeds(groups: Sequence[Runs]) -> list[int]:
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
            "a tie counting one half (Agarwal et al., NeurIPS 2021), with Newcombe's 95 % interval."
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
        seeds = _common_seeds(groups)
        if seeds:
            tables[variant] = np.asarray([[scores[seed] for scores in by_seed] for seed in seeds])
    return tables
