"""Figures of a study, after the paper's: they read in print, in grey and for the colour-blind.

Here are the look of all figures and those that compare methods: bars, the gain by purification (the paper's Fig. 3)
and frontiers. Curves are in :mod:`hrl_policies.study.curves`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import RunRecord, Task, Variant, conditions, data_note
from hrl_policies.study.results import Comparison
from hrl_policies.study.tables import group_rows
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hrl_policies.preference_front import FrontPoint

FIGURE_TITLES = {"len": "Len", "ad": "AD", "violation_rate": "violation rate"}
"""Headline figures that are drawn side by side, with the titles of their axes."""

# Okabe and Ito's palette without its yellow, which is too light on paper.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "p", ">", "*", "h", "d")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\")
_BOUNDS = "0.55"
_SIZE = 9
_POINTS = "large: mean, small: seeds\nhollow: control"
_LEGEND_WIDTH = 30
_MARGIN = 0.15
_EQUITY = {"ad": "1 - AD: equity between groups", "gini": "1 - Gini: equity between items"}
# Controls that are named in the figure of Len and R_cum, with the offset of the name in points.
_NAMED = {"quota-greedy": (16, -20), "belief-quota": (-16, 18), "oracle": (-20, -18)}
_RAW = "raw states"
_AGENT, _CONTROL = "#5b8db8", "#c8c8c8"


@dataclass(frozen=True)
class Look:
    """The style in which every panel of a figure draws one method: its points, its line (a dash pattern), its bars."""

    colour: str
    marker: str
    line: Any
    hatch: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Returns a look for each name; without colour lines differ up to 65 names, and markers alone up to 13."""
    # The numbers of colours, markers and lines have no common factor: pairs repeat late.
    styles = zip(*map(cycle, (_COLOURS, _MARKERS, _LINES, _HATCHES)), strict=True)
    return {name: Look(*style) for name, style in zip(names, styles, strict=False)}


def grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NDArray[Any]]:
    """Returns a figure with rows and columns of panels of some inches, without the global state of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=_SIZE - 1)
    return figure, axes


def legend_beside(figure: Figure, axes: NDArray[Any], title: str = "") -> None:
    """Puts one legend of all labelled artists to the right of the panels, each label once; long titles are wrapped."""
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
    caption: str,
) -> None:
    """Draws a row of panels for each task, a panel for each figure, with one legend, and writes the file.

    Tasks are worlds at one horizon, ``size`` the inches of one panel (width, height); ``draw`` draws a figure of a task
    into a panel, and the legend names the conditions of the comparison above the explanation that is given. The caption
    is kept inside the file, with the data behind the figure.
    """
    panels, axes = grid(len(tasks), len(figures), *size)
    for row, task in zip(axes, tasks, strict=True):
        for axis, figure in zip(row, figures, strict=True):
            draw(axis, task, figure)
        row[0].set_title(f"{task.world_title}, {task.session_title}", loc="left", fontsize=10)
    unusual = [comparison.conditions] if comparison.conditions else []
    legend_beside(panels, axes, "\n".join([*unusual, legend]))
    save_figure(panels, path, f"{caption} {comparison.provenance}")


def draw_length_bounds(axis: Axes, floors: Sequence[float], ceilings: Sequence[float]) -> None:
    """Draws between which Len must lie by the length formula: a grey band for the floor and one for the ceiling.

    Each band spans what follows from the lowest and the highest R_each in the panel: Len if every slate of a method
    were punished, and if none were.
    """
    if not len(floors):
        return
    for values, hatch, label in ((floors, "\\\\\\", "floor of Len"), (ceilings, "///", "ceiling of Len")):
        low, high = float(np.min(values)), float(np.max(values))
        axis.axhspan(low, high, facecolor="0.93", edgecolor=_BOUNDS, hatch=hatch, linewidth=0.6, zorder=0, label=label)


def draw_results(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Draws R_cum and Len of every method, best last, with a dot for each training seed.

    Agents are dark, controls light, privileged bounds hatched. Beside Len stand its floor and ceiling, where the length
    formula knows them: Len with every slate punished, and with none, at the same R_each.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        records: Runs on one task under one set of conditions.

    Raises:
        ValueError: If there are no runs.
    """
    if not records:
        raise ValueError("there are no finished runs to draw")
    from matplotlib.figure import Figure

    groups = {variant: group for (variant, _), group in group_rows(records).items()}
    variants = sorted(groups, key=lambda one: np.mean([run.summary["r_cum"] for run in groups[one]]))
    figure = Figure(figsize=(10.0, 1.2 + 0.3 * len(variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(variants):
        summaries = [run.summary for run in groups[variant]]
        for axis, name in ((left, "r_cum"), (right, "len")):
            _draw_bar(axis, place, variant, [summary[name] for summary in summaries])
        if all("len_floor" in summary for summary in summaries):
            ends = [float(np.mean([summary[end] for summary in summaries])) for end in ("len_floor", "len_ceiling")]
            right.plot(ends, [place, place], "|-", color="black", markersize=7, linewidth=1)
    left.set_yticks(range(len(variants)), [variant.title for variant in variants])
    left.set_xlabel("R_cum")
    right.set_xlabel("Len (line: floor and ceiling)")
    task, unusual = Task.of_record(records[0]), conditions(records[0].config)
    title = ", ".join([task.world_title, task.session_title, *([unusual] if unusual else [])])
    figure.suptitle(title, fontsize=11)
    caption = (
        f"R_cum and Len of every method in {title}: agents dark, controls light, privileged bounds hatched. Bars are "
        "means, dots training seeds; the line across a bar of Len reaches from its floor to its ceiling."
    )
    save_figure(figure, path, f"{caption} {data_note(records[0])}")


def draw_purification_gain(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws Len, AD and violation rate of each method that was run on several kinds of states, one row for each world.

    A bar is the mean over training seeds, which are dots. Across each bar of Len stand its floor and its ceiling.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.
        max_len: Horizon.

    Returns:
        Whether there was anything to draw; without such methods nothing is written.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    shown = {task: _on_several_states(comparison, task) for task in comparison.tasks_at(max_len)}
    shown = {task: variants for task, variants in shown.items() if variants}
    if not shown:
        return False
    states = sorted({variant.purifier for variants in shown.values() for variant in variants})
    look = looks([state or _RAW for state in states])

    def draw(axis: Axes, task: Task, figure: str) -> None:
        for place, variant in enumerate(shown[task]):
            state = variant.purifier or _RAW
            summaries = [run.summary for run in comparison.cell(task, variant)]
            style: dict[str, Any] = {"edgecolor": look[state].colour, "hatch": look[state].hatch, "linewidth": 1.2}
            values = [summary[figure] for summary in summaries]
            axis.barh(-place, float(np.mean(values)), height=0.8, facecolor="white", label=state, **style)
            _draw_seeds(axis, -place, values)
            if figure == "len" and all("len_floor" in summary for summary in summaries):
                _draw_length_ends(axis, -place, summaries)
        axis.set_xlabel(FIGURE_TITLES[figure])
        axis.set_yticks(*(_ticks(shown[task]) if figure == "len" else ([], [])))

    size = 3.2, 1.0 + 0.34 * max(map(len, shown.values()))
    caption = (
        f"Len, AD and violation rate on raw and on purified states, Max Len {max_len} (the paper's Fig. 3), of the "
        "methods that were run on both. Lines across bars of Len are its floor and ceiling."
    )
    draw_task_panels(path, comparison, list(shown), list(FIGURE_TITLES), size, draw, "bar: mean, dots: seeds", caption)
    return True


def _draw_bar(axis: Axes, place: int, variant: Variant, values: Sequence[float]) -> None:
    look: dict[str, Any] = {"color": _AGENT if variant.learns else _CONTROL}
    if variant.privileged:
        look = {"facecolor": "white", "edgecolor": "black", "hatch": "///"}
    axis.barh(place, float(np.mean(values)), height=0.7, **look)
    if len(values) > 1:
        _draw_seeds(axis, place, values)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_seeds(axis: Axes, place: float, values: Sequence[float]) -> None:
    axis.plot(values, [place] * len(values), "o", color="white", markeredgecolor="black", markersize=4)


def _draw_length_ends(axis: Axes, place: float, summaries: Sequence[Mapping[str, float]]) -> None:
    for name, line, label in (("len_floor", ":", "floor of Len"), ("len_ceiling", "-", "ceiling of Len")):
        at = float(np.mean([summary[name] for summary in summaries]))
        ends = [place - 0.45, place + 0.45]
        axis.plot([at, at], ends, color="black", linestyle=line, linewidth=1.3, label=label)


def _on_several_states(comparison: Comparison, task: Task) -> list[Variant]:
    """Returns the variants of methods with more than one kind of states under the same settings, raw states first."""
    groups = _by_method([variant for variant in comparison.variants if comparison.cell(task, variant)])
    return [variant for group in groups.values() if len(group) > 1 for variant in group]


def _by_method(variants: Sequence[Variant]) -> dict[str, list[Variant]]:
    groups: defaultdict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        groups[Variant(variant.method, "", variant.setting).title].append(variant)
    return groups


def _ticks(variants: Sequence[Variant]) -> tuple[list[float], list[str]]:
    groups = _by_method(variants)
    return [-float(np.mean([variants.index(one) for one in group])) for group in groups.values()], list(groups)


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

    def draw(axis: Axes, task: Task, measure: str) -> None:
        places = _draw_variants(axis, comparison, task, lambda summary: (1.0 - summary[measure], summary["r_cum"]))
        means = [mean for variant, mean in places.items() if not variant.privileged]
        if means:
            front = np.stack(means)[pareto_front(np.stack(means))]
            axis.step(*front.T, where="pre", color="0.4", linewidth=1.0, zorder=1, label="frontier of means")
        axis.set_xlabel(_EQUITY[measure])
        if measure == "ad":
            axis.set_ylabel("R_cum")

    caption = (
        f"R_cum against equal exposure, Max Len {max_len}: of the two groups (1 - AD, left) and of single items "
        "(1 - Gini, right). More is better on all axes; bounds, marked †, are left out of the frontier."
    )
    draw_task_panels(path, comparison, tasks, list(_EQUITY), (4.0, 3.3), draw, _POINTS, caption)
    return True


def draw_length_and_reward(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws R_cum against Len, a panel for each world, with QuotaGreedy, BeliefQuota and the Oracle named in it.

    Arguments, result and markers are those of :func:`draw_pareto`.
    """
    tasks = comparison.tasks_at(max_len)
    if not tasks:
        return False

    def draw(axis: Axes, task: Task, figure: str) -> None:
        for variant, place in _draw_variants(axis, comparison, task, lambda run: (run["len"], run[figure])).items():
            if variant.as_shipped and variant.method in _NAMED:
                arrow = {"arrowstyle": "-", "linewidth": 0.7}
                offset = _NAMED[variant.method]
                side = "left" if offset[0] > 0 else "right"
                style: dict[str, Any] = {"textcoords": "offset points", "arrowprops": arrow, "fontsize": _SIZE - 1}
                axis.annotate(variant.title, (place[0], place[1]), offset, horizontalalignment=side, **style)
        axis.set_xlabel("Len")
        axis.set_ylabel("R_cum")

    caption = (
        f"R_cum against Len, Max Len {max_len}. A method above another at the same Len earns more in each step; one to "
        "the right of another keeps users longer. Named: the controls to beat, and the bound of what can be had."
    )
    draw_task_panels(path, comparison, tasks, ["r_cum"], (7.0, 3.6), draw, _POINTS, caption)
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


def _draw_variants(
    axis: Axes, comparison: Comparison, task: Task, coordinates: Callable[[Mapping[str, float]], tuple[float, float]]
) -> dict[Variant, NDArray[np.float64]]:
    """Draws every method that was run on a task, at coordinates of its summaries; returns their means, ``(2,)``."""
    look = looks([variant.title for variant in comparison.variants])
    places = {}
    for variant in comparison.variants:
        runs = comparison.cell(task, variant)
        if runs:
            points = np.asarray([coordinates(run.summary) for run in runs])
            _draw_variant(axis, variant, points, look[variant.title])
            places[variant] = points.mean(axis=0)
    return places


def _draw_variant(axis: Axes, variant: Variant, points: NDArray[np.float64], look: Look) -> None:
    learns = variant.learns
    axis.plot(
        *points.mean(axis=0),
        look.marker,
        markersize=8,
        color=look.colour,
        markerfacecolor=look.colour if learns else "none",
        markeredgecolor="black" if learns else look.colour,
        markeredgewidth=0.8 if learns else 1.6,
        linestyle="none",
        zorder=3 if learns else 4,
        label=variant.title,
    )
    if len(points) > 1:
        axis.plot(*points.T, look.marker, markersize=3, color=look.colour, linestyle="none", alpha=0.8, zorder=2)


def draw_preference_front(
    path: str | Path, points: Sequence[FrontPoint], others: Sequence[tuple[str, float, float]] = (), *, title: str = ""
) -> None:
    """Draws what an agent earns for each preference, with its weight of the long-tail share.

    Points that no other beats are filled and joined, others hollow. Points that fall together share a label.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        points: See :func:`~hrl_policies.mofir.preference_front`.
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
    caption = "Clicks against the long-tail share of exposure, by the weight that the preference gives to the latter."
    save_figure(figure, path, f"{caption} Data: {data['name']} ({data['origin']}), hash {data['hash']}.")


def _weights(points: Sequence[FrontPoint]) -> dict[tuple[float, float], str]:
    """Returns the label of each place in the picture: the weight, or the range of weights, that led there."""
    weights: defaultdict[tuple[float, float], list[float]] = defaultdict(list)
    for point in points:
        weights[round(point.clicks, 2), round(point.tail_share, 2)].append(point.preference[1])
    return {
        place: f"{min(group):.2f}" + (f" to {max(group):.2f}" if len(group) > 1 else "")
        for place, group in weights.items()
    }
