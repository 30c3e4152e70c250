"""Figures of curves: training sessions (the paper's Fig. 7), services, and performance profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    shown, look = _all_curves(comparison, max_len)
    if not shown:
        return False

    def draw(axis: Axes, task: Task, figure: str) -> None:
        for variant, runs in shown[task].items():
            _draw_seeds(axis, *on_common_steps(runs, figure), look[variant.title], variant.title)
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


def draw_training_rewards(path: str | Path, comparison: Comparison, max_len: int) -> bool:
    """Draws R_cum of training sessions over the sessions and over the processor seconds of training.

    Lines and bands are those of :func:`draw_learning_curves`, which has the arguments and errors too. Seconds are those
    of a run shared out evenly over its steps; runs of which they are not known have lines over sessions alone.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter

    shown, look = _all_curves(comparison, max_len)
    if not shown:
        return False

    def draw(axis: Axes, task: Task, figure: str) -> None:
        for variant, runs in shown[task].items():
            if figure == "sessions" or all("training_cpu_seconds" in run.run.timing for run in runs):
                _draw_seeds(
                    axis, *_on_common_places(runs, _PLACES[figure], "r_cum"), look[variant.title], variant.title
                )
        axis.set_ylabel("R_cum")
        axis.set_xlabel("training sessions" if figure == "sessions" else "processor seconds of training")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_formatter(NullFormatter())

    caption = (
        f"R_cum of training sessions, Max Len {max_len}, with exploration, over sessions and over processor seconds of "
        "training: means of the training seeds, with bands from the lowest to the highest."
    )
    legend = "line: mean of seeds\nband: all seeds"
    draw_task_panels(path, comparison, list(shown), list(_PLACES), (4.2, 3.2), draw, legend, caption)
    return True


def on_common_steps(runs: Sequence[EvaluatedRun], figure: str) -> tuple[Values, Values]:
    """Returns a column of the curves of several seeds at the same steps, those that all of them reached.

    Returns:
        Steps ``float64 (n,)`` and values ``float64 (S, n)``, interpolated linearly.
    """
    return _on_common_places(runs, _steps, figure)


def _on_common_places(
    runs: Sequence[EvaluatedRun], places: Callable[[EvaluatedRun], Values], figure: str
) -> tuple[Values, Values]:
    at = [places(run) for run in runs]
    values = [np.asarray([point[figure] for point in run.run.curve], np.float64) for run in runs]
    first, last = max(one[0] for one in at), min(one[-1] for one in at)
    common = np.linspace(first, last, _CURVE_POINTS)
    return common, np.stack([np.interp(common, one, value) for one, value in zip(at, values, strict=True)])


def _steps(run: EvaluatedRun) -> Values:
    return np.asarray([point["steps"] for point in run.run.curve], np.float64)


def _sessions(run: EvaluatedRun) -> Values:
    return np.cumsum([point["sessions"] for point in run.run.curve], dtype=np.float64)


def _seconds(run: EvaluatedRun) -> Values:
    return _steps(run) * (float(run.run.timing["training_cpu_seconds"]) / run.run.steps_done)


_PLACES: Mapping[str, Callable[[EvaluatedRun], Values]] = {"sessions": _sessions, "seconds": _seconds}


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
            _draw_seeds(axis, curves[0]["sessions"], np.stack([curve[name] for curve in curves]), look[agent], agent)
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


def _all_curves(
    comparison: Comparison, max_len: int
) -> tuple[dict[Task, dict[Variant, tuple[EvaluatedRun, ...]]], Mapping[str, Look]]:
    """Returns the runs with curves by task and variant, and how the lines of each variant look."""
    found = {task: _with_curves(comparison, task) for task in comparison.tasks_at(max_len)}
    shown = {task: curves for task, curves in found.items() if curves}
    return shown, looks(list(dict.fromkeys(variant.title for curves in shown.values() for variant in curves)))


def _with_curves(comparison: Comparison, task: Task) -> dict[Variant, tuple[EvaluatedRun, ...]]:
    cells = {variant: comparison.cell(task, variant) for variant in comparison.variants}
    return {
        variant: runs
        for variant, runs in cells.items()
        if runs and all(len(run.run.session_curve) >= _MIN_POINTS for run in runs)
    }


def _draw_seeds(axis: Axes, x: Values, values: Values, look: Look, label: str) -> None:
    """Draws the mean of several curves and, where there are several, a band from the lowest to the highest."""
    if len(values) > 1:
        axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=look.colour, alpha=0.15, linewidth=0)
    _draw_line(axis, x, values.mean(axis=0), look, label)


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
