"""Figures of bars: all methods of one world, and the gain by purification (the paper's Fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hrl_policies.study.figures.style import draw_task_panels, looks
from hrl_policies.study.labels import Task, Variant, data_note, item_term_suffix
from hrl_policies.study.results import Comparison
from hrl_policies.study.store import RunRecord
from hrl_policies.study.tables import group_variants
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FIGURES = {"len": "Len", "ad": "AD", "violation_rate": "violation rate"}
_RAW = "raw states"
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

    groups = group_variants(records)
    variants = sorted(groups, key=lambda one: np.mean([run.summary["r_cum"] for run in groups[one]]))
    figure = Figure(figsize=(10.0, 1.2 + 0.3 * len(variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(variants):
        summaries = [run.summary for run in groups[variant]]
        for axis, name in ((left, "r_cum"), (right, "len")):
            _draw_bar(axis, place, variant, [summary[name] for summary in summaries])
        if all("len_floor" in summary for summary in summaries):
            ends = [
                float(np.mean([summary[end] for summary in summaries]))
                for end in ("len_floor", "len_ceiling")
            ]
            right.plot(ends, [place, place], "|-", color="black", markersize=7, linewidth=1)
    left.set_yticks(range(len(variants)), [variant.title for variant in variants])
    left.set_xlabel("R_cum")
    right.set_xlabel("Len (line: floor and ceiling)")
    task, item_term = Task.of_record(records[0]), records[0].config.item_term
    figure.suptitle(f"{task.world_title}, Max Len {task.max_len}{item_term_suffix(item_term)}", fontsize=11)
    save_figure(figure, path, data_note(records[0]))


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
            style: dict[str, Any] = {
                "edgecolor": look[state].colour,
                "hatch": look[state].hatch,
                "linewidth": 1.2,
            }
            values = [summary[figure] for summary in summaries]
            axis.barh(-place, float(np.mean(values)), height=0.8, facecolor="white", label=state, **style)
            _draw_seeds(axis, -place, values)
            if figure == "len" and all("len_floor" in summary for summary in summaries):
                _draw_length_ends(axis, -place, summaries)
        axis.set_xlabel(_FIGURES[figure])
        axis.set_yticks(*(_ticks(shown[task]) if figure == "len" else ([], [])))

    size = 3.2, 1.0 + 0.34 * max(map(len, shown.values()))
    draw_task_panels(path, comparison, list(shown), list(_FIGURES), size, draw, "bar: mean, dots: seeds")
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


def _draw_length_ends(axis: Axes, place: float, summaries: Sequence[Any]) -> None:
    """Draws the floor and the ceiling of Len as lines across a bar."""
    for name, line, label in (("len_floor", ":", "floor of Len"), ("len_ceiling", "-", "ceiling of Len")):
        at = float(np.mean([summary[name] for summary in summaries]))
        ends = [place - 0.45, place + 0.45]
        axis.plot([at, at], ends, color="black", linestyle=line, linewidth=1.3, label=label)


def _on_several_states(comparison: Comparison, task: Task) -> list[Variant]:
    """Returns the variants of methods with more than one kind of states under the same settings, raw states first."""
    groups: dict[str, list[Variant]] = {}
    for variant in comparison.variants:
        if comparison.cell(task, variant):
            groups.setdefault(variant.title_on_any_states, []).append(variant)
    return [variant for group in groups.values() if len(group) > 1 for variant in group]


def _ticks(variants: Sequence[Variant]) -> tuple[list[float], list[str]]:
    """Returns one tick for each method, in the middle of its bars."""
    places: dict[str, list[int]] = {}
    for place, variant in enumerate(variants):
        places.setdefault(variant.title_on_any_states, []).append(-place)
    return [float(np.mean(group)) for group in places.values()], list(places)
