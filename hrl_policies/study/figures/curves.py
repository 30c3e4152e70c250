"""The paper's Fig. 7: what training sessions were like as training went on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.figures.style import Look, draw_law, grid, legend_beside, looks
from hrl_policies.study.judged import Comparison, JudgedRun, Task
from kuaifair_env.figure_files import save_figure
from kuaifair_env.metrics import length_floor_and_ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]

_FIGURES = (("Len", "len"), ("AD", "ad"), ("violation rate", "violation_rate"))
_POINTS = 60
_FEWEST = 2


def draw_learning_curves(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws Len, AD and violation rate of training sessions over training steps, one row for each world.

    A line is the mean over training seeds, its band reaches from the lowest seed to the highest; a method with fewer
    than two points has no line, and neither has an offline one, which plays no training sessions. Len has its floor
    and ceiling by the length law. Exploration is included, and sessions are those that ended: a result is what the
    tables say of held-out users, not a curve.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.
        max_len: Horizon.

    Returns:
        Whether there was anything to draw; without curves nothing is written.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    from matplotlib.ticker import EngFormatter

    tasks = [task for task in comparison.tasks if task.max_len == max_len]
    shown = {task: _with_curves(comparison, task) for task in tasks}
    shown = {task: found for task, found in shown.items() if found}
    if not shown:
        return False
    titles = list(dict.fromkeys(title for found in shown.values() for title in found))
    look = looks(titles)
    figure, axes = grid(len(shown), len(_FIGURES), 3.4, 2.7)
    for row, (task, found) in zip(axes, shown.items(), strict=True):
        for axis, (label, name) in zip(row, _FIGURES, strict=True):
            for title, runs in found.items():
                _draw(axis, runs, name, title, look[title])
            axis.set_ylabel(label)
            axis.set_xlabel("training steps")
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            if name == "len":
                _draw_law(axis, [run for runs in found.values() for run in runs])
                axis.set_title(task.world_title, loc="left", fontsize=10)
            else:
                axis.set_ylim(-0.03, 1.03)
    legend_beside(figure, axes, f"{comparison.heading(max_len)}\nline: mean of seeds\nband: all seeds")
    save_figure(figure, path, comparison.provenance)
    return True


def on_common_steps(runs: Sequence[JudgedRun], figure: str) -> tuple[Values, Values]:
    """Returns curves of several seeds at the same steps, those that all of them reached.

    Args:
        runs: Seeds of one method, each with at least two points.
        figure: Column of the curve.

    Returns:
        Steps ``float64 (n,)`` and values ``float64 (S, n)``, interpolated linearly.
    """
    steps = [np.asarray([point["steps"] for point in run.run.curve], np.float64) for run in runs]
    values = [np.asarray([point[figure] for point in run.run.curve], np.float64) for run in runs]
    first, last = max(one[0] for one in steps), min(one[-1] for one in steps)
    common = np.linspace(first, last, _POINTS)
    return common, np.stack([np.interp(common, at, value) for at, value in zip(steps, values, strict=True)])


def _with_curves(comparison: Comparison, task: Task) -> dict[str, tuple[JudgedRun, ...]]:
    found = {}
    for variant in comparison.variants:
        runs = comparison.by_cell.get((task, variant), ())
        if runs and all(len(run.run.session_curve) >= _FEWEST for run in runs):
            found[variant.title] = runs
    return found


def _draw(axis: Axes, runs: Sequence[JudgedRun], figure: str, title: str, look: Look) -> None:
    steps, values = on_common_steps(runs, figure)
    if len(values) > 1:
        axis.fill_between(
            steps, values.min(axis=0), values.max(axis=0), color=look.colour, alpha=0.15, linewidth=0
        )
    axis.plot(
        steps,
        values.mean(axis=0),
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markevery=_POINTS // 6,
        markersize=4,
        linewidth=1.4,
        label=title,
    )


def _draw_law(axis: Axes, runs: Sequence[JudgedRun]) -> None:
    """Draws floor and ceiling at the mean rewards with which training ended."""
    known = [
        (run.initial_temper, run.run.curve[-1]["r_each"]) for run in runs if run.initial_temper is not None
    ]
    if known:
        tempers, rewards = (np.asarray(column, np.float64) for column in zip(*known, strict=True))
        floors, ceilings = length_floor_and_ceiling(tempers, rewards)
        draw_law(axis, floors.tolist(), ceilings.tolist())
