"""Performance profiles: the share of runs above each score."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hrl_policies.study.figures.style import Look, grid, legend_beside, looks
from hrl_policies.study.judged import Comparison
from hrl_policies.study.profiles import performance_profile
from hrl_policies.study.scores import Scores, length_scores, reward_scores
from kuaifair_env.figure_files import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINTS = 101


def draw_profiles(path: str | Path, comparison: Comparison) -> bool:
    """Draws performance profiles of normalised Len and normalised R_cum over all tasks and seeds.

    Methods with several seeds have a pointwise 95 % stratified bootstrap band (Agarwal et al., NeurIPS 2021); a method
    that was run once in each task, as controls are, is left out.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        comparison: Runs under one set of conditions.

    Returns:
        Whether there was anything to draw; without several seeds nothing is written.

    Raises:
        ValueError: If the file's ending is unknown.
    """
    scores = [one for one in (length_scores(comparison), reward_scores(comparison)) if one is not None]
    scores = [one for one in scores if any(len(table) > 1 for table in one.by_variant.values())]
    if not scores:
        return False
    look = looks([variant.title for variant in comparison.variants])
    figure, axes = grid(1, len(scores), 4.2, 3.2)
    for axis, one in zip(axes[0], scores, strict=True):
        _draw(axis, one, look)
        axis.set_xlabel(f"{one.title}\n({one.explanation})", fontsize=9)
        axis.set_ylabel("share of runs above")
        axis.set_ylim(-0.03, 1.03)
    legend_beside(figure, axes, f"{len(comparison.tasks)} tasks\nband: 95 %")
    save_figure(figure, path, comparison.provenance)
    return True


def _draw(axis: Axes, scores: Scores, look: dict[str, Look]) -> None:
    tables = {variant: table for variant, table in scores.by_variant.items() if len(table) > 1}
    values = np.concatenate([table.ravel() for table in tables.values()])
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1.0)
    thresholds = np.linspace(low - 0.02 * (high - low), high + 0.02 * (high - low), _POINTS)
    for variant, table in tables.items():
        own = look[variant.title]
        profile = performance_profile(table, thresholds)
        axis.fill_between(
            profile.thresholds,
            profile.low,
            profile.high,
            color=own.colour,
            alpha=0.15,
            linewidth=0,
            step="post",
        )
        axis.plot(
            profile.thresholds,
            profile.share,
            drawstyle="steps-post",
            color=own.colour,
            linestyle=own.line,
            marker=own.marker,
            markevery=_POINTS // 6,
            markersize=4,
            linewidth=1.4,
            label=variant.title,
        )
