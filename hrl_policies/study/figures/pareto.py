"""Utility against exposure equity: who is beaten in both, with every training seed as a dot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.figures.style import Look, grid, legend_beside, looks
from hrl_policies.study.judged import Comparison, JudgedRun, Task, Variant
from hrl_policies.zoo import method
from kuaifair_env.figure_files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    legend_beside(figure, axes, f"Max Len {max_len}\nlarge: mean, small: seeds\nhollow: control")
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


def _points(runs: Sequence[JudgedRun], measure: str) -> NDArray[np.float64]:
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
