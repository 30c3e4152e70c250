"""The look of figures: colours that the colour-blind can tell apart, and lines, markers and hatches for grey prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import Task
from hrl_policies.study.results import Comparison
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_TITLES = {"len": "Len", "ad": "AD", "violation_rate": "violation rate"}
"""Headline figures that are drawn side by side, with the titles of their axes."""

# Okabe and Ito's palette without its yellow, which is too light on paper.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h", "d")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
_BOUNDS = "0.55"
_SIZE = 9
_LEGEND_WIDTH = 30
_MARGIN = 0.15


@dataclass(frozen=True)
class Look:
    """The style in which every panel of a figure draws one method.

    Attributes:
        colour: Of line, marker and edge.
        marker: Of its points.
        line: Dash pattern.
        hatch: Of its bars.
    """

    colour: str
    marker: str
    line: Any
    hatch: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Returns a look for each name; without colour lines differ up to 65 names, and markers alone up to 13."""
    # The numbers of colours, markers and lines have no common factor: pairs repeat late.
    return {
        name: Look(
            _COLOURS[place % len(_COLOURS)],
            _MARKERS[place % len(_MARKERS)],
            _LINES[place % len(_LINES)],
            _HATCHES[place % len(_HATCHES)],
        )
        for place, name in enumerate(names)
    }


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """Returns a figure with panels, without the global state of pyplot.

    Args:
        rows: Rows of panels.
        columns: Columns of panels.
        width: Inches of one panel.
        height: Inches of one panel.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=_SIZE - 1)
    return figure, axes


def legend_beside(figure: Figure, axes: NDArray[Any], title: str = "") -> None:
    """Puts one legend of all labelled artists to the right of the panels, each label once.

    Args:
        figure: The figure.
        axes: Its panels.
        title: Title of the legend; long lines are wrapped.
    """
    entries: dict[str, Any] = {}
    for axis in axes.ravel():
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        legend = figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside right upper",
            fontsize=_SIZE - 1,
            frameon=False,
            handlelength=3.2,
            title="\n".join(fill(line, _LEGEND_WIDTH) for line in title.splitlines()) or None,
            title_fontsize=_SIZE - 1,
        )
        # Many methods need a taller legend than the panels are.
        needed = legend.get_window_extent().height / figure.dpi + 2 * _MARGIN
        figure.set_figheight(max(float(figure.get_figheight()), needed))


def draw_task_panels(
    path: str | Path,
    comparison: Comparison,
    tasks: Sequence[Task],
    figures: Sequence[str],
    size: tuple[float, float],
    draw: Callable[[Axes, Task, str], None],
    legend: str,
) -> None:
    """Draws a row of panels for each task, a panel for each figure, with one legend, and writes the file.

    Args:
        path: File to write.
        comparison: Runs under one set of conditions, which the legend names.
        tasks: Worlds at one horizon.
        figures: Names of the figures.
        size: Inches of one panel, width and height.
        draw: Draws a figure of a task into a panel.
        legend: Explanation of lines and markers.
    """
    panels, axes = grid(len(tasks), len(figures), *size)
    for row, task in zip(axes, tasks, strict=True):
        for axis, figure in zip(row, figures, strict=True):
            draw(axis, task, figure)
        row[0].set_title(task.world_title, loc="left", fontsize=10)
    conditions = [comparison.conditions] if comparison.conditions else []
    legend_beside(panels, axes, "\n".join([f"Max Len {tasks[0].max_len}", *conditions, legend]))
    save_figure(panels, path, comparison.provenance)


def draw_length_bounds(axis: Axes, floors: Sequence[float], ceilings: Sequence[float]) -> None:
    """Draws between which Len must lie by the length formula: a grey band for the floor and one for the ceiling.

    Each band spans what follows from the lowest and the highest R_each in the panel.

    Args:
        axis: A panel with Len on its vertical axis.
        floors: Len if every slate were punished, for each method.
        ceilings: Len if none were.
    """
    if not len(floors):
        return
    for values, hatch, label in ((floors, "\\\\\\", "floor of Len"), (ceilings, "///", "ceiling of Len")):
        low, high = float(np.min(values)), float(np.max(values))
        axis.axhspan(low, high, facecolor="0.93", edgecolor=_BOUNDS, hatch=hatch, linewidth=0.6, zorder=0, label=label)
