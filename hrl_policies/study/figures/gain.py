"""The paper's Fig. 3: the same method on raw and on purified states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hrl_policies.study.figures.style import grid, legend_beside, looks
from hrl_policies.study.judged import Comparison, JudgedRun, Task, Variant
from hrl_policies.study.tables import variant_title
from kuaifair_env.figure_files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIGURES = (("Len", "len"), ("AD", "ad"), ("violation rate", "violation_rate"))
_RAW = "raw states"


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
    tasks = [task for task in comparison.tasks if task.max_len == max_len]
    shown = {task: _several_states(comparison, task) for task in tasks}
    shown = {task: found for task, found in shown.items() if found}
    if not shown:
        return False
    states = sorted({variant.purifier for found in shown.values() for variant in found})
    most = max(map(len, shown.values()))
    figure, axes = grid(len(shown), len(_FIGURES), 3.2, 1.0 + 0.34 * most)
    for row, (task, found) in zip(axes, shown.items(), strict=True):
        for axis, (label, name) in zip(row, _FIGURES, strict=True):
            _draw(axis, comparison, task, found, states, name)
            axis.set_xlabel(label)
        row[0].set_yticks(*_ticks(found))
        row[0].set_title(task.world_title, loc="left", fontsize=10)
        for axis in row[1:]:
            axis.set_yticks([])
    legend_beside(figure, axes, f"{comparison.heading(max_len)}\nbar: mean, dots: seeds")
    save_figure(figure, path, comparison.provenance)
    return True


def _several_states(comparison: Comparison, task: Task) -> list[Variant]:
    """Returns the variants of methods with more than one kind of states under the same settings, raw states first."""
    groups: dict[str, list[Variant]] = {}
    for variant in comparison.variants:
        if comparison.by_cell.get((task, variant)):
            groups.setdefault(_on_any_states(variant), []).append(variant)
    return [one for group in groups.values() if len(group) > 1 for one in group]


def _on_any_states(variant: Variant) -> str:
    """Returns what a variant is called, whatever states it sees."""
    return variant_title(variant.method, "", variant.setting)


def _ticks(variants: Sequence[Variant]) -> tuple[list[float], list[str]]:
    """Returns one tick for each method, in the middle of its bars."""
    names = list(dict.fromkeys(map(_on_any_states, variants)))
    places = [[-i for i, one in enumerate(variants) if _on_any_states(one) == name] for name in names]
    return [float(np.mean(place)) for place in places], names


def _draw(
    axis: Axes,
    comparison: Comparison,
    task: Task,
    variants: Sequence[Variant],
    states: Sequence[str],
    figure: str,
) -> None:
    look = looks([state or _RAW for state in states])
    for place, variant in enumerate(variants):
        runs = comparison.by_cell[task, variant]
        values = [run.record.summary[figure] for run in runs]
        name = variant.purifier or _RAW
        axis.barh(
            -place,
            float(np.mean(values)),
            height=0.8,
            facecolor="white",
            edgecolor=look[name].colour,
            hatch=look[name].hatch,
            linewidth=1.2,
            label=name,
        )
        axis.plot(values, [-place] * len(values), "o", color="white", markeredgecolor="black", markersize=4)
        if figure == "len":
            _draw_law(axis, -place, runs)


def _draw_law(axis: Axes, place: float, runs: Sequence[JudgedRun]) -> None:
    known = [run.record.summary for run in runs if "len_floor" in run.record.summary]
    if not known:
        return
    for name, line in (("len_floor", ":"), ("len_ceiling", "-")):
        at = float(np.mean([summary[name] for summary in known]))
        label = "floor of Len" if name == "len_floor" else "ceiling of Len"
        axis.plot(
            [at, at], [place - 0.45, place + 0.45], color="black", linestyle=line, linewidth=1.3, label=label
        )
