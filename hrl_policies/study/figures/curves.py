"""The paper's Fig. 7: what training sessions were like as training went on."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.figures.style import Look, draw_length_bounds, grid, legend_beside, looks
from hrl_policies.study.results import Comparison, EvaluatedRun, Task, Variant
from hrl_policies.study.store import write_table
from hrl_policies.study.tables import variant_title
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import atomic_path, save_figure
from kuaifair_env.metrics import length_floor_and_ceiling

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Values = NDArray[np.float64]

_FIGURES = (("Len", "len"), ("AD", "ad"), ("violation rate", "violation_rate"))
_POINTS = 60
_MIN = 2


def draw_learning_curves(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws Len, AD and violation rate of training sessions over training steps, one row for each world.

    A line is the mean over training seeds, its band reaches from the lowest seed to the highest; a method with fewer
    than two points has no line, and neither has an offline one, which plays no training sessions. Len has its floor
    and ceiling by the length formula. Exploration is included, and sessions are those that ended: a result is what the
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
                _draw_length_bounds(axis, [run for runs in found.values() for run in runs])
                axis.set_title(task.world_title, loc="left", fontsize=10)
            else:
                axis.set_ylim(-0.03, 1.03)
    legend_beside(figure, axes, f"{comparison.heading(max_len)}\nline: mean of seeds\nband: all seeds")
    save_figure(figure, path, comparison.provenance)
    return True


def on_common_steps(runs: Sequence[EvaluatedRun], figure: str) -> tuple[Values, Values]:
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


def _with_curves(comparison: Comparison, task: Task) -> dict[str, tuple[EvaluatedRun, ...]]:
    found = {}
    for variant in comparison.variants:
        runs = comparison.by_cell.get((task, variant), ())
        if runs and all(len(run.run.session_curve) >= _MIN for run in runs):
            found[variant.title] = runs
    return found


def _draw(axis: Axes, runs: Sequence[EvaluatedRun], figure: str, title: str, look: Look) -> None:
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


def _draw_length_bounds(axis: Axes, runs: Sequence[EvaluatedRun]) -> None:
    """Draws floor and ceiling at the mean rewards with which training ended."""
    known = [
        (run.initial_temper, run.run.curve[-1]["r_each"]) for run in runs if run.initial_temper is not None
    ]
    if known:
        tempers, rewards = (np.asarray(column, np.float64) for column in zip(*known, strict=True))
        floors, ceilings = length_floor_and_ceiling(tempers, rewards)
        draw_length_bounds(axis, floors.tolist(), ceilings.tolist())


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
            _draw_gain(axis, comparison, task, found, states, name)
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


def _draw_gain(
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
            _draw_length_bounds_gain(axis, -place, runs)


def _draw_length_bounds_gain(axis: Axes, place: float, runs: Sequence[EvaluatedRun]) -> None:
    known = [run.record.summary for run in runs if "len_floor" in run.record.summary]
    if not known:
        return
    for name, line in (("len_floor", ":"), ("len_ceiling", "-")):
        at = float(np.mean([summary[name] for summary in known]))
        label = "floor of Len" if name == "len_floor" else "ceiling of Len"
        axis.plot(
            [at, at], [place - 0.45, place + 0.45], color="black", linestyle=line, linewidth=1.3, label=label
        )


STEP_FIGURES = {"len": "Len", "r_each": "R_each", "r_cum": "R_cum", "ad": "AD", "violation_rate": "violation rate",
                "auc": "AUC of unbiased clicks"}  # fmt: skip
"""What may be drawn over diffusion steps, and how its axis is called."""

_BOUNDS = ("len_floor", "len_ceiling")


@dataclass(frozen=True)
class StepResult:
    """What one purifier led to.

    Attributes:
        world: Which world, with the kind of its data.
        levels: Noise levels K that it was trained with.
        steps: Evaluations that its sampler takes.
        seed: Seed of pretraining, or of training on its states.
        figures: Figures by name; see ``STEP_FIGURES``. With ``len`` go ``len_floor`` and ``len_ceiling``.
    """

    world: str
    levels: int
    steps: int
    seed: int
    figures: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.levels < 1 or self.steps < 1:
            raise ValueError(f"levels and steps are at least 1, got {self.levels} and {self.steps}")
        missing = [name for name in _BOUNDS if name not in self.figures]
        if "len" in self.figures and missing:
            raise ValueError(
                f"a result with len needs {' and '.join(missing)} too: Len says little without its floor and ceiling"
            )


def read_step_results(path: str | Path) -> list[StepResult]:
    """Reads a CSV with the columns ``world, levels, steps, seed`` and one for each figure.

    Raises:
        ArtifactError: If it is missing or holds something else.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as stream:
            return [_result(row) for row in csv.DictReader(stream)]
    except FileNotFoundError:
        raise ArtifactError(f"there is no file {path}") from None
    except KeyError as error:
        raise ArtifactError(f"{path} has no column {error}; it needs world, levels, steps and seed") from None
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} does not hold results of a study of diffusion steps: {error}") from error


def write_step_results(path: str | Path, results: Sequence[StepResult]) -> None:
    """Writes results as a CSV that :func:`read_step_results` reads, atomically; what a result lacks stays empty."""
    names = sorted({name for one in results for name in one.figures})
    rows = [
        {"world": one.world, "levels": one.levels, "steps": one.steps, "seed": one.seed}
        | {name: one.figures.get(name, "") for name in names}
        for one in results
    ]
    with atomic_path(path) as temporary:
        write_table(temporary, rows)


def draw_diffusion_steps(
    path: str | Path, results: Sequence[StepResult], figures: Sequence[str] = ("len", "r_cum", "ad")
) -> None:
    """Draws figures over the number of sampler steps, a line for each number of noise levels, a row for each world.

    The paper moves both together; where a study moves them apart, they have lines of their own. A line is the mean over
    seeds, which are dots. A result that lacks a figure is left out of its panel. Len has its floor and ceiling.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        results: What was measured.
        figures: Names in ``STEP_FIGURES``, one column each.

    Raises:
        ValueError: If there are no results, or none of a world has a figure.
    """
    if not results:
        raise ValueError("there are no results of diffusion steps to draw")
    worlds = list(dict.fromkeys(one.world for one in results))
    for name in figures:
        if name not in STEP_FIGURES:
            raise ValueError(f"unknown figure {name!r}; choose {', '.join(STEP_FIGURES)}")
        for world in worlds:
            if not any(name in one.figures for one in results if one.world == world):
                raise ValueError(f"no result of {world} has {name!r}")
    together = all(one.levels == one.steps for one in results)
    kinds = (
        ["steps = levels"]
        if together
        else [f"{levels} levels" for levels in sorted({r.levels for r in results})]
    )
    look = looks(kinds)
    figure, axes = grid(len(worlds), len(figures), 3.3, 2.7)
    for row, world in zip(axes, worlds, strict=True):
        own = [one for one in results if one.world == world]
        for axis, name in zip(row, figures, strict=True):
            held = [one for one in own if name in one.figures]
            for kind in kinds:
                chosen = held if together else [one for one in held if f"{one.levels} levels" == kind]
                _draw_steps(axis, chosen, name, kind, look[kind])
            if name == "len":
                draw_length_bounds(axis, *([one.figures[end] for one in held] for end in _BOUNDS))
            _label(axis, own, STEP_FIGURES[name])
        row[0].set_title(world, loc="left", fontsize=10)
    legend_beside(figure, axes, "line: mean of seeds\ndots: seeds")
    save_figure(figure, path)


def _draw_steps(axis: Axes, results: Sequence[StepResult], figure: str, label: str, look: Look) -> None:
    if not results:
        return
    steps = sorted({one.steps for one in results})
    values = [[one.figures[figure] for one in results if one.steps == at] for at in steps]
    axis.plot(
        steps,
        [float(np.mean(one)) for one in values],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=6,
        linewidth=1.4,
        label=label,
    )
    for at, one in zip(steps, values, strict=True):
        axis.plot([at] * len(one), one, ".", color=look.colour, markersize=5, alpha=0.6)


def _label(axis: Axes, results: Sequence[StepResult], name: str) -> None:
    axis.set_xscale("log")
    steps = sorted({one.steps for one in results})
    axis.set_xticks(steps, [str(step) for step in steps])
    axis.minorticks_off()
    axis.set_xlabel("diffusion steps")
    axis.set_ylabel(name)


def _result(row: Mapping[str, str]) -> StepResult:
    keys = ("world", "levels", "steps", "seed")
    world, levels, steps, seed = (row[name] for name in keys)
    figures = {name: float(text) for name, text in row.items() if name not in keys and text != ""}
    return StepResult(world, int(levels), int(steps), int(seed), figures)
