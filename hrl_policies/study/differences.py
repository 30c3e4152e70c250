"""Methods over seeds against the controls that could refute them: interquartile means, paired differences, headroom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.paper_tables import world_notes
from hrl_policies.study.results import Comparison, EvaluatedRun, Task, UserSums, Variant
from hrl_policies.study.scores import Scores, common_seeds, length_scores, reward_scores
from hrl_policies.study.statistics import (
    Interval,
    holm,
    interquartile_mean,
    mean_interval,
    paired_difference,
    probability_of_improvement,
    sign_flip_test,
    stratified_interval,
)
from hrl_policies.study.store import StoredRun
from hrl_policies.study.table import MISSING, Cell, Measured, ResultTable, Span
from hrl_policies.zoo import method

_RESAMPLES = 4_000


def label(run: StoredRun) -> str:
    """Returns how a comparison calls the method of a run: its title, and its purifier where that is not its own."""
    spec = method(run.config.method)
    purifier = "" if run.config.purifier is None else run.config.purifier.name
    name = f"{spec.title} ({run.config.variant})" if run.config.variant else spec.title
    return name if purifier == spec.purifier else f"{name} + {purifier}"


def comparison_table(runs: Sequence[StoredRun], base: str, floor: str, ceiling: str) -> str:
    """Returns a Markdown table over all methods.

    Len and R_cum are interquartile means over training seeds with stratified bootstrap intervals (Agarwal et al.,
    NeurIPS 2021). Differences of R_cum are paired: the same users met the same random numbers under every method; seeds
    are resampled, then users. The last column says how far a method goes from ``floor`` to ``ceiling``.

    Args:
        runs: Finished runs in one world, with one horizon and one item term.
        base: Label of the method that others are compared with.
        floor: Label of the control to beat.
        ceiling: Label of the bound.

    Raises:
        ValueError: If one of the three was not run.
    """
    grouped: dict[str, list[StoredRun]] = defaultdict(list)
    for run in runs:
        grouped[label(run)].append(run)
    for name in (base, floor, ceiling):
        if name not in grouped:
            raise ValueError(f"there is no run of {name!r} to compare with; there are {sorted(grouped)}")
    earned = {name: _of_users(group, "r_cum") for name, group in grouped.items()}
    stayed = {name: _of_users(group, "len") for name, group in grouped.items()}
    low, high = earned[floor].mean(), earned[ceiling].mean()
    titles = ("method", "seeds", "Len, IQM", "R_cum, IQM", "R_cum of every seed", f"R_cum - {floor}",
              f"R_cum - {base}", f"Len - {floor}", "way to the Oracle")  # fmt: skip
    lines = [_row(titles), _row(["---"] * len(titles))]
    for name in sorted(earned, key=lambda one: float(-earned[one].mean())):
        own = earned[name]
        cells = [
            name,
            str(len(own)),
            _middle(stayed[name]),
            _middle(own),
            " ".join(f"{value:.2f}" for value in own.mean(axis=1)),
            "" if name == floor else _difference(own, earned[floor]),
            "" if name == base else _difference(own, earned[base]),
            "" if name == floor else _difference(stayed[name], stayed[floor]),
            f"{100 * (own.mean() - low) / (high - low):.0f} %",
        ]
        lines.append(_row(cells))
    return "\n".join(lines)


def _of_users(runs: Sequence[StoredRun], figure: str) -> NDArray[np.float64]:
    """Returns ``(S, U)``, one row for each seed in order, one column for each user."""
    ordered = sorted(runs, key=lambda one: one.config.seed)
    return np.stack([UserSums.of_sessions(run.sessions()).per_session(figure) for run in ordered])


def _middle(table: NDArray[np.float64]) -> str:
    if len(table) < 2:
        return f"{table.mean():.2f}"
    return _shown(stratified_interval(table.mean(axis=1)[:, None], resamples=_RESAMPLES))


def _difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Pairs seeds where there are several on both sides; what has one run stands against each seed of the other."""
    seeds = max(len(first), len(second))
    if len(first) != len(second):
        first, second = (
            np.broadcast_to(one, (seeds, one.shape[1])) if len(one) == 1 else one for one in (first, second)
        )
    count = min(len(first), len(second))
    if count < 2:
        return _shown(mean_interval(first[0] - second[0], resamples=_RESAMPLES), sign=True)
    return _shown(paired_difference(first[:count], second[:count], resamples=_RESAMPLES), sign=True)


def _shown(interval: Interval, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{interval.estimate:{plus}.2f} [{interval.low:{plus}.2f}, {interval.high:{plus}.2f}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


Values = NDArray[np.float64]
Runs = Sequence[EvaluatedRun]

_FIGURES = (("R_cum", "r_cum"), ("Len", "len"))
_SCORE_RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """A base method minus another, in one task.

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
    """Compares a method with every other one, in every task and in both figures.

    The same users met the same random numbers under every method, so users are paired. Seeds are paired by number,
    which only says which runs to subtract; a control, which is run once, stands against each seed of the other. Methods
    that have no seed in common in a task are not compared there.

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo; it is taken on its own states.

    Raises:
        ValueError: If the base was not run.
    """
    own = comparison.find(base)
    return [
        _difference_difference_table(task, other, *pair, figure)
        for task, other, pair in _pairs(comparison, own)
        if _comparable(*pair)
        for _, figure in _FIGURES
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
    made = differences(comparison, base)
    if not made:
        return None
    adjusted = holm(np.asarray([one.p_value for one in made]))
    rows: dict[tuple[Task, Variant], list[Cell]] = {}
    for one, p_adjusted in zip(made, adjusted, strict=True):
        cells = rows.setdefault((one.task, one.other), [])
        digits = 2
        found = one.interval
        cells += [
            Measured(found.estimate, digits, found.low, found.high, sign=True),
            Measured(one.p_value, 4),
            Measured(float(p_adjusted), 4),
            str(one.seeds),
        ]
    own = comparison.find(base)
    return ResultTable(
        title=f"{own.title} minus each other method"
        + (f", {comparison.conditions}" if comparison.conditions else ""),
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
            f"p, Holm: adjusted for all {len(made)} comparisons of this table. A control is run once and stands "
            "against each seed of the other.",
            *_left_out(comparison, own),
            f"Made by: {command}",
        ),
        spans=tuple(Span(title, 4) for title, _ in _FIGURES),
    )


def score_table(comparison: Comparison, base: str | None, command: str) -> ResultTable | None:
    """Returns scores over all worlds and horizons: interquartile means, and how likely the base beats each method.

    Only methods that were run in every task with common seeds have a row.

    Args:
        comparison: Runs under one set of conditions.
        base: Name of the method in the zoo; None leaves out the probability of improvement.
        command: The command that makes these numbers again.

    Returns:
        The table, or None if there is no score.

    Raises:
        ValueError: If the base was not run.
    """
    scores = [one for one in (length_scores(comparison), reward_scores(comparison)) if one is not None]
    scores = [one for one in scores if one.by_variant]
    if not scores:
        return None
    own = None if base is None else comparison.find(base)
    header, spans = ["method", "seeds"], []
    for one in scores:
        header += ["IQM", "mean", *([] if own is None else ["P(base better)"])]
        spans.append(Span(one.title, 2 if own is None else 3))
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
        "Scores over worlds and horizons" + (f", {comparison.conditions}" if comparison.conditions else ""),
        tuple(header),
        tuple(rows),
        (*notes, f"Made by: {command}"),
        tuple(spans),
    )


def _score_cells(scores: Scores, variant: Variant, base: Variant | None) -> list[Cell]:
    table = scores.by_variant[variant]
    if len(table) < 2:
        middle = Measured(float(interquartile_mean(table.ravel())), 3)
    else:
        found = stratified_interval(table, resamples=_SCORE_RESAMPLES)
        middle = Measured(found.estimate, 3, found.low, found.high)
    cells: list[Cell] = [middle, Measured(float(table.mean()), 3)]
    if base is None:
        return cells
    own = scores.by_variant.get(base)
    if base == variant or own is None:
        return [*cells, MISSING]
    return [*cells, _improvement(own, table)]


def _improvement(first: Values, second: Values) -> Measured:
    if min(len(first), len(second)) < 2:
        gap = np.sign(first[:, None, :] - second[None, :, :])
        return Measured(float(0.5 + 0.5 * gap.mean()), 2)
    found = probability_of_improvement(first, second)
    return Measured(found.estimate, 2, found.low, found.high)


def _pairs(comparison: Comparison, own: Variant) -> Iterator[tuple[Task, Variant, tuple[Runs, Runs]]]:
    """Yields every other method that was run in a task of the base, with the runs of both, the base's first."""
    for task in comparison.tasks:
        for other in comparison.variants:
            first, second = (comparison.by_cell.get((task, variant), ()) for variant in (own, other))
            if other != own and first and second:
                yield task, other, (first, second)


def _comparable(first: Runs, second: Runs) -> bool:
    return _once(first) or _once(second) or bool(common_seeds((first, second)))


def _left_out(comparison: Comparison, own: Variant) -> list[str]:
    """Returns a note on the methods that could not be paired with the base, or none."""
    names = [
        f"{other.title} ({task.world_title}, Max Len {task.max_len})"
        for task, other, pair in _pairs(comparison, own)
        if not _comparable(*pair)
    ]
    return [f"Not compared, as no training seed is common: {', '.join(names)}."] if names else []


def _difference_difference_table(
    task: Task, other: Variant, first: Runs, second: Runs, figure: str
) -> Difference:
    a, b = _paired(first, second, figure)
    if len(a) < 2:
        gaps = (a - b)[0]
        return Difference(
            task, other, figure, mean_interval(gaps, resamples=_RESAMPLES), sign_flip_test(gaps), 1
        )
    interval = paired_difference(a, b, resamples=_RESAMPLES)
    return Difference(task, other, figure, interval, sign_flip_test((a - b).mean(axis=1)), len(a))


def _paired(first: Runs, second: Runs, figure: str) -> tuple[Values, Values]:
    """Returns two tables ``(S, U)`` of the same seeds and users."""
    if _once(first) or _once(second):
        count = max(len(first), len(second))
        a, b = _table(first, figure), _table(second, figure)
        return np.broadcast_to(a, (count, a.shape[1])), np.broadcast_to(b, (count, b.shape[1]))
    seeds = common_seeds((first, second))
    return (
        _table([run for run in first if run.seed in seeds], figure),
        _table([run for run in second if run.seed in seeds], figure),
    )


def _once(runs: Runs) -> bool:
    """Says whether there is no training seed to pair: a control, which is run once."""
    return len(runs) == 1 and not method(runs[0].variant.method).learns


def _table(runs: Runs, figure: str) -> Values:
    return np.stack([run.users.per_session(figure) for run in runs])
