"""Figures of frontiers: reward against equity of exposure, and what an agent earns for each preference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.figures.style import Look, draw_task_panels, grid, looks
from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.results import Comparison
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from hrl_policies.mofir.policies import FrontPoint

_EQUITY = {"ad": "1 - AD: equity between groups", "gini": "1 - Gini: equity between items"}


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
    tasks = comparison.tasks_at(max_len)
    if not tasks:
        return False
    look = looks([variant.title for variant in comparison.variants])

    def draw(axis: Axes, task: Task, measure: str) -> None:
        means = []
        for variant in comparison.variants:
            runs = comparison.cell(task, variant)
            if not runs:
                continue
            points = np.asarray([(1.0 - run.summary[measure], run.summary["r_cum"]) for run in runs])
            _draw_variant(axis, variant, points, look[variant.title])
            if not variant.privileged:
                means.append(points.mean(axis=0))
        if means:
            front = np.stack(means)[pareto_front(np.stack(means))]
            axis.step(*front.T, where="pre", color="0.4", linewidth=1.0, zorder=1, label="frontier of means")
        axis.set_xlabel(_EQUITY[measure])
        if measure == "ad":
            axis.set_ylabel("R_cum")

    legend = "large: mean, small: seeds\nhollow: control"
    draw_task_panels(path, comparison, tasks, list(_EQUITY), (4.0, 3.3), draw, legend)
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


def _draw_variant(axis: Axes, variant: Variant, points: NDArray[np.float64], look: Look) -> None:
    learns = variant.learns
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
        points: See :func:`~hrl_policies.mofir.policies.preference_front`.
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
        place: f"{min(group):.2f}" + (f" to {max(group):.2f}" if len(group) > 1 else "")
        for place, group in weights.items()
    }
