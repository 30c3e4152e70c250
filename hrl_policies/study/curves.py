"""Figures of curves: training sessions (the paper's Fig. 7), performance profiles, and numbers of diffusion steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.comparisons import Scores, all_scores
from hrl_policies.study.figures import (
    FIGURE_TITLES,
    Look,
    draw_length_bounds,
    draw_task_panels,
    grid,
    legend_beside,
    looks,
)
from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.results import Comparison, EvaluatedRun
from hrl_policies.study.statistics import performance_profile
from kuaifair_env.files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from kuaifair_env.serving_results import ServingResult


Values = NDArray[np.float64]

_CURVE_POINTS, _PROFILE_POINTS = 60, 101
_MIN_POINTS = 2


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

    shown = {task: _with_curves(comparison, task) for task in comparison.tasks_at(max_len)}
    shown = {task: curves for task, curves in shown.items() if curves}
    if not shown:
        return False
    look = looks(list(dict.fromkeys(variant.title for curves in shown.values() for variant in curves)))

    def draw(axis: Axes, task: Task, figure: str) -> None:
        for variant, runs in shown[task].items():
            steps, values = on_common_steps(runs, figure)
            if len(values) > 1:
                ends = values.min(axis=0), values.max(axis=0)
                axis.fill_between(steps, *ends, color=look[variant.title].colour, alpha=0.15, linewidth=0)
            _draw_line(axis, steps, values.mean(axis=0), look[variant.title], variant.title)
        axis.set_ylabel(FIGURE_TITLES[figure])
        axis.set_xlabel("training steps")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if figure == "len":
            _draw_final_bounds(axis, [run for runs in shown[task].values() for run in runs])
        else:
            axis.set_ylim(-0.03, 1.03)

    legend = "line: mean of seeds\nband: all seeds"
    caption = (
        f"Len, AD and violation rate of training sessions, Max Len {max_len} (the paper's Fig. 7), with exploration: "
        "means of the training seeds, with bands from the lowest to the highest. Hatched: floor and ceiling of Len."
    )
    draw_task_panels(path, comparison, list(shown), list(FIGURE_TITLES), (3.4, 2.7), draw, legend, caption)
    return True


def on_common_steps(runs: Sequence[EvaluatedRun], figure: str) -> tuple[Values, Values]:
    """Returns a column of the curves of several seeds at the same steps, those that all of them reached.

    Returns:
        Steps ``float64 (n,)`` and values ``float64 (S, n)``, interpolated linearly.
    """
    steps = [np.asarray([point["steps"] for point in run.run.curve], np.float64) for run in runs]
    values = [np.asarray([point[figure] for point in run.run.curve], np.float64) for run in runs]
    first, last = max(one[0] for one in steps), min(one[-1] for one in steps)
    common = np.linspace(first, last, _CURVE_POINTS)
    return common, np.stack([np.interp(common, at, value) for at, value in zip(steps, values, strict=True)])


def draw_serving(path: str | Path, agents: Mapping[str, Sequence[ServingResult]]) -> None:
    """Draws R_cum, Len, AD and violation rate over sessions served.

    A line is the mean over orders of the users (and seeds), its band reaches from the lowest to the highest.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        agents: Services of one world by the name of the agent, all of equally many sessions.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    from matplotlib.ticker import EngFormatter

    titles = {"r_cum": "R_cum"} | FIGURE_TITLES
    look = looks(list(agents))
    figure, axes = grid(2, 2, 3.4, 2.5)
    for axis, (name, title) in zip(axes.ravel(), titles.items(), strict=True):
        for agent, results in agents.items():
            curves = [result.curve() for result in results]
            values = np.stack([curve[name] for curve in curves])
            if len(values) > 1:
                ends = values.min(axis=0), values.max(axis=0)
                axis.fill_between(curves[0]["sessions"], *ends, color=look[agent].colour, alpha=0.15, linewidth=0)
            _draw_line(axis, curves[0]["sessions"], values.mean(axis=0), look[agent], agent)
        axis.set_ylabel(title)
        axis.set_xlabel("sessions served")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        if name in ("ad", "violation_rate"):
            axis.set_ylim(-0.03, 1.03)
    first = next(iter(agents.values()))[0].served
    data = first.world["data"]
    legend_beside(
        figure, axes, f"{data['name']}, {data['origin']} data\nMax Len {first.config['max_len']}\nband: all orders"
    )
    caption = (
        "R_cum, Len, AD and violation rate over sessions served: means, with bands from the lowest to the highest."
    )
    save_figure(figure, path, f"{caption} Data: {data['name']} ({data['origin']}), hash {data['hash']}.")


def draw_profiles(path: str | Path, comparison: Comparison) -> bool:
    """Draws performance profiles of normalised Len and normalised R_cum over all tasks and seeds.

    Methods with several seeds have a pointwise 95 % stratified bootstrap band (Agarwal et al., NeurIPS 2021); a method
    that was run once on each task, as controls are, is left out.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.

    Returns:
        Whether there was anything to draw; without several seeds nothing is written.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    scores = [one for one in all_scores(comparison) if any(len(table) > 1 for table in one.by_variant.values())]
    if not scores:
        return False
    look = looks([variant.title for variant in comparison.variants])
    figure, axes = grid(1, len(scores), 4.2, 3.2)
    for axis, one in zip(axes[0], scores, strict=True):
        _draw_profile(axis, one, look)
        axis.set_xlabel(f"{one.title}\n({one.explanation})", fontsize=9)
        axis.set_ylabel("share of runs above")
        axis.set_ylim(-0.03, 1.03)
    legend_beside(figure, axes, f"{comparison.conditions}\n{len(comparison.tasks)} tasks\nband: 95 %")
    caption = (
        "Performance profiles: the share of runs, over all tasks and training seeds, whose score is above a value."
    )
    save_figure(figure, path, f"{caption} {comparison.provenance}")
    return True


def _with_curves(comparison: Comparison, task: Task) -> dict[Variant, tuple[EvaluatedRun, ...]]:
    cells = {variant: comparison.cell(task, variant) for variant in comparison.variants}
    return {
        variant: runs
        for variant, runs in cells.items()
        if runs and all(len(run.run.session_curve) >= _MIN_POINTS for run in runs)
    }


def _draw_line(axis: Axes, x: Values, y: Values, look: Look, label: str, *, drawstyle: str = "default") -> None:
    """Draws a line that is told from others by its dashes and by a marker every sixth of its points."""
    axis.plot(
        x,
        y,
        drawstyle=drawstyle,
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markevery=max(len(x) // 6, 1),
        markersize=4,
        linewidth=1.4,
        label=label,
    )


def _draw_final_bounds(axis: Axes, runs: Sequence[EvaluatedRun]) -> None:
    """Draws floor and ceiling at the mean rewards with which training ended."""
    bounds = [run.length_bounds(run.run.curve[-1]["r_each"]) for run in runs if "len_floor" in run.summary]
    if bounds:
        floors, ceilings = zip(*bounds, strict=True)
        draw_length_bounds(axis, floors, ceilings)


def _draw_profile(axis: Axes, scores: Scores, look: Mapping[str, Look]) -> None:
    tables = {variant: table for variant, table in scores.by_variant.items() if len(table) > 1}
    values = np.concatenate([table.ravel() for table in tables.values()])
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1.0)
    thresholds = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), _PROFILE_POINTS)
    for variant, table in tables.items():
        own, profile = look[variant.title], performance_profile(table, thresholds)
        axis.fill_between(thresholds, profile.low, profile.high, color=own.colour, alpha=0.15, linewidth=0, step="post")
        _draw_line(axis, thresholds, profile.share, own, variant.title, drawstyle="steps-post")


STEP_FIGURES = FIGURE_TITLES | {"r_each": "R_each", "r_cum": "R_cum", "auc": "AUC of unbiased clicks"}
"""Figures that may be drawn over diffusion steps, with the titles of their axes."""

_BOUNDS = ("len_floor", "len_ceiling")


@dataclass(frozen=True)
class StepResult:
    """Figures of sessions on states that one purifier purified.

    Attributes:
        world: Title of the world, with the kind of its data.
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
    worlds = list(dict.fromkeys(result.world for result in results))
    for name in figures:
        if name not in STEP_FIGURES:
            raise ValueError(f"unknown figure {name!r}; choose {', '.join(STEP_FIGURES)}")
        for world in worlds:
            if not any(name in result.figures for result in results if result.world == world):
                raise ValueError(f"no result of {world} has {name!r}")
    lines: defaultdict[str, list[StepResult]] = defaultdict(list)
    together = all(result.levels == result.steps for result in results)
    for result in sorted(results, key=lambda one: one.levels):
        lines["steps = levels" if together else f"{result.levels} levels"].append(result)
    look = looks(list(lines))
    figure, axes = grid(len(worlds), len(figures), 3.3, 2.7)
    for row, world in zip(axes, worlds, strict=True):
        for axis, name in zip(row, figures, strict=True):
            for label, line in lines.items():
                shown = [one for one in line if one.world == world and name in one.figures]
                _draw_steps(axis, shown, name, label, look[label])
            own = [one for one in results if one.world == world]
            if name == "len":
                bounded = [one.figures for one in own if name in one.figures]
                draw_length_bounds(axis, *([one[end] for one in bounded] for end in _BOUNDS))
            steps = sorted({result.steps for result in own})
            axis.set_xscale("log")
            axis.set_xticks(steps, [str(step) for step in steps])
            axis.minorticks_off()
            axis.set_xlabel("diffusion steps")
            axis.set_ylabel(STEP_FIGURES[name])
        row[0].set_title(world, loc="left", fontsize=10)
    legend_beside(figure, axes, "line: mean of seeds\ndots: seeds")
    save_figure(figure, path, "Figures over the number of diffusion steps: means of the seeds, which are dots.")


def _draw_steps(axis: Axes, results: Sequence[StepResult], figure: str, label: str, look: Look) -> None:
    by_steps: defaultdict[int, list[float]] = defaultdict(list)
    for result in sorted(results, key=lambda one: one.steps):
        by_steps[result.steps].append(result.figures[figure])
    if not by_steps:
        return
    axis.plot(
        list(by_steps),
        [float(np.mean(values)) for values in by_steps.values()],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=6,
        linewidth=1.4,
        label=label,
    )
    for steps, values in by_steps.items():
        axis.plot([steps] * len(values), values, ".", color=look.colour, markersize=5, alpha=0.6)
