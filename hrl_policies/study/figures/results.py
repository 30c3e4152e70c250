"""All methods of one world as bars that read in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study import labels as notes_of
from hrl_policies.study.figures.style import Look, grid, legend_beside, looks
from hrl_policies.study.results import Comparison, EvaluatedRun, Task, Variant, world_title
from hrl_policies.study.scores import Scores, length_scores, performance_profile, reward_scores
from hrl_policies.study.store import RunRecord
from hrl_policies.study.tables import variant_title
from hrl_policies.zoo import method
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hrl_policies.mofir.front import FrontPoint


_EQUITY = (("1 - AD: equity between groups", "ad"), ("1 - Gini: equity between items", "gini"))
_FRONTIER = "frontier of means"


def draw_pareto(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws R_cum against exposure equity, between groups (1 - AD) and between items (1 - Gini), a row for each world.

    Equal shares of two groups say nothing of equal shares of items, hence both. Small dots are training seeds, large
    markers their means, hollow ones controls; privileged bounds, marked †, are left out of the frontier.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.
        max_len: Horizon.

    Returns:
        Whether there was anything to draw at this horizon.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    tasks = [task for task in comparison.tasks if task.max_len == max_len]
    if not tasks:
        return False
    look = looks([variant.title for variant in comparison.variants])
    figure, axes = grid(len(tasks), len(_EQUITY), 4.0, 3.3)
    for row, task in zip(axes, tasks, strict=True):
        for axis, (label, name) in zip(row, _EQUITY, strict=True):
            _draw(axis, comparison, task, name, look)
            axis.set_xlabel(label)
        row[0].set_ylabel("R_cum")
        row[0].set_title(task.world_title, loc="left", fontsize=10)
    legend_beside(figure, axes, f"{comparison.heading(max_len)}\nlarge: mean, small: seeds\nhollow: control")
    save_figure(figure, path, comparison.provenance)
    return True


def pareto_front(points: NDArray[Any]) -> NDArray[np.int64]:
    """Returns which points no other point beats: at least as good in both coordinates and better in one.

    Args:
        points: ``(n, 2)``, more is better.

    Returns:
        ``int64``, their rows by increasing first coordinate; of equal points all.

    Raises:
        ValueError: If the shape is another, or a point is not finite.
    """
    table = np.asarray(points, np.float64)
    if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table).all():
        raise ValueError(f"need finite points of two coordinates, got shape {table.shape}")
    at_least = (table[:, None] >= table[None]).all(axis=2)
    better = at_least & (table[:, None] > table[None]).any(axis=2)
    front = np.flatnonzero(~better.any(axis=0))
    return front[np.lexsort((table[front, 1], table[front, 0]))]


def _draw(axis: Axes, comparison: Comparison, task: Task, measure: str, look: dict[str, Look]) -> None:
    competing = []
    for variant in comparison.variants:
        runs = comparison.by_cell.get((task, variant), ())
        if not runs:
            continue
        points = _points(runs, measure)
        _draw_variant(axis, variant, points, look[variant.title])
        if not method(variant.method).privileged:
            competing.append(points.mean(axis=0))
    if competing:
        means = np.stack(competing)
        front = means[pareto_front(means)]
        axis.step(*front.T, where="pre", color="0.4", linewidth=1.0, zorder=1, label=_FRONTIER)


def _points(runs: Sequence[EvaluatedRun], measure: str) -> NDArray[np.float64]:
    return np.asarray([(1.0 - run.record.summary[measure], run.record.summary["r_cum"]) for run in runs])


def _draw_variant(axis: Axes, variant: Variant, points: NDArray[np.float64], look: Look) -> None:
    learns = method(variant.method).learns
    axis.plot(
        *points.mean(axis=0),
        look.marker,
        markersize=8,
        color=look.colour if learns else "white",
        markeredgecolor="black" if learns else look.colour,
        markeredgewidth=0.8 if learns else 1.6,
        linestyle="none",
        zorder=3,
        label=variant.title,
    )
    if len(points) > 1:
        axis.plot(
            *points.T, look.marker, markersize=3, color=look.colour, linestyle="none", alpha=0.8, zorder=2
        )


_AGENT, _CONTROL = "#5b8db8", "#c8c8c8"


def draw_results(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Draws R_cum and Len of every method, best last, with a dot for each training seed.

    Agents are dark, controls light, privileged bounds hatched. Beside Len stand its floor and ceiling, where the length
    formula knows them: Len with every slate punished, and with none, at the same R_each.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        records: Runs of one world under one set of conditions.

    Raises:
        ValueError: If there are no runs.
    """
    if not records:
        raise ValueError("there are no finished runs to draw")
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        key = (record.config.method, record.purifier, record.config.variant)
        groups.setdefault(key, []).append(record)
    variants = sorted(groups, key=lambda one: np.mean([run.summary["r_cum"] for run in groups[one]]))
    figure = Figure(figsize=(10.0, 1.2 + 0.3 * len(variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(variants):
        for axis, name in ((left, "r_cum"), (right, "len")):
            _bar(axis, place, variant[0], [run.summary[name] for run in groups[variant]])
        known = [run.summary for run in groups[variant] if "len_floor" in run.summary]
        if known:
            ends = [float(np.mean([one[name] for one in known])) for name in ("len_floor", "len_ceiling")]
            right.plot(ends, [place, place], "|-", color="black", markersize=7, linewidth=1)
    left.set_yticks(range(len(variants)), [variant_title(*variant) for variant in variants])
    first = records[0]
    left.set_xlabel("R_cum")
    right.set_xlabel("Len (line: floor and ceiling)")
    figure.suptitle(
        f"{world_title(first.config.world, first.origin)}, Max Len {first.config.session.max_len}"
        + (f", item term '{first.config.item_term}'" if first.config.item_term else ""),
        fontsize=11,
    )
    save_figure(figure, path, notes_of.data(first))


def _bar(axis: Any, place: int, name: str, values: Sequence[float]) -> None:
    spec = method(name)
    look: dict[str, Any] = {"color": _AGENT if spec.learns else _CONTROL}
    if spec.privileged:
        look = {"facecolor": "white", "edgecolor": "black", "hatch": "///"}
    axis.barh(place, float(np.mean(values)), height=0.7, **look)
    if len(values) > 1:
        axis.plot(values, [place] * len(values), "o", color="white", markeredgecolor="black", markersize=4)
    axis.spines[["top", "right"]].set_visible(False)


def draw_preference_front(
    path: str | Path,
    points: Sequence[FrontPoint],
    others: Sequence[tuple[str, float, float]] = (),
    *,
    title: str = "",
) -> None:
    """Draws what an agent earns for each preference, with its weight of the long-tail share.

    Points that no other beats are filled and joined, others hollow. Points that fall together share a label.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        points: See :func:`~hrl_policies.mofir.front.preference_front`.
        others: Names, clicks and long-tail shares of methods to compare with, drawn as crosses.
        title: Headline.

    Raises:
        ValueError: If there are no points, or the file's ending is unknown.
    """
    if not points:
        raise ValueError("there are no preferences to draw; see preference_front")
    earned = np.asarray([(point.clicks, point.tail_share) for point in points])
    best = pareto_front(earned)
    colour = looks(["front"])["front"].colour
    figure, axes = grid(1, 1, 5.6, 4.4)
    axis = axes[0, 0]
    axis.plot(*earned[best].T, "-", color=colour, linewidth=1.5, zorder=1)
    for row, (clicks, tail) in enumerate(earned):
        fill = colour if row in best else "white"
        axis.plot(clicks, tail, "o", color=fill, markeredgecolor="black", markersize=7)
    for (clicks, tail), text in _weights(points).items():
        axis.annotate(text, (clicks, tail), xytext=(6, 4), textcoords="offset points", fontsize=8)
    for name, clicks, tail in others:
        axis.plot(clicks, tail, "x", color="black", markersize=6)
        axis.annotate(name, (clicks, tail), xytext=(6, -9), textcoords="offset points", fontsize=8)
    axis.set_xlabel("clicks (R_each); numbers are weights of the long-tail share")
    axis.set_ylabel("long-tail share of what was shown")
    if title:
        axis.set_title(title, fontsize=10)
    data = points[0].evaluation.world["data"]
    save_figure(figure, path, f"{data['name']} ({data['origin']}), hash {data['hash']}")


def _weights(points: Sequence[FrontPoint]) -> dict[tuple[float, float], str]:
    """Returns the label of each place in the picture: the weight, or the range of weights, that led there."""
    weights: dict[tuple[float, float], list[float]] = {}
    for point in points:
        place = (round(point.clicks, 2), round(point.tail_share, 2))
        weights.setdefault(place, []).append(point.preference[1])
    return {
        place: f"{min(found):.2f}" + (f" to {max(found):.2f}" if len(found) > 1 else "")
        for place, found in weights.items()
    }


_POINTS = 101


def draw_profiles(path: str | Path, comparison: Comparison) -> bool:
    """Draws performance profiles of normalised Len and normalised R_cum over all tasks and seeds.

    Methods with several seeds have a pointwise 95 % stratified bootstrap band (Agarwal et al., NeurIPS 2021); a method
    that was run once in each task, as controls are, is left out.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.

    Returns:
        Whether there was anything to draw; without several seeds nothing is written.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    scores = [one for one in (length_scores(comparison), reward_scores(comparison)) if one is not None]
    scores = [one for one in scores if any(len(table) > 1 for table in one.by_variant.values())]
    if not scores:
        return False
    look = looks([variant.title for variant in comparison.variants])
    figure, axes = grid(1, len(scores), 4.2, 3.2)
    for axis, one in zip(axes[0], scores, strict=True):
        _draw_profiles(axis, one, look)
        axis.set_xlabel(f"{one.title}\n({one.explanation})", fontsize=9)
        axis.set_ylabel("share of runs above")
        axis.set_ylim(-0.03, 1.03)
    legend_beside(figure, axes, f"{comparison.conditions}\n{len(comparison.tasks)} tasks\nband: 95 %")
    save_figure(figure, path, comparison.provenance)
    return True


def _draw_profiles(axis: Axes, scores: Scores, look: dict[str, Look]) -> None:
    tables = {variant: table for variant, table in scores.by_variant.items() if len(table) > 1}
    values = np.concatenate([table.ravel() for table in tables.values()])
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1.0)
    thresholds = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), _POINTS)
    for variant, table in tables.items():
        own = look[variant.title]
        profile = performance_profile(table, thresholds)
        axis.fill_between(
            profile.thresholds,
            profile.low,
            profile.high,
            color=own.colour,
            alpha=0.15,
            linewidth=0,
            step="post",
        )
        axis.plot(
            profile.thresholds,
            profile.share,
            drawstyle="steps-post",
            color=own.colour,
            linestyle=own.line,
            marker=own.marker,
            markevery=_POINTS // 6,
            markersize=4,
            linewidth=1.4,
            label=variant.title,
        )
