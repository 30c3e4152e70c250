"""The front of an agent that takes preferences: clicks against long-tail share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hrl_policies.baselines.preference_front import FrontPoint
from hrl_policies.study.figures.pareto import pareto_front
from hrl_policies.study.figures.style import grid, looks
from kuaifair_env.figure_files import save_figure


def draw_preference_front(
    path: str | Path,
    points: Sequence[FrontPoint],
    others: Sequence[tuple[str, float, float]] = (),
    *,
    title: str = "",
) -> None:
    """Draws what an agent earns for each preference, with its weight of the long-tail share.

    Points that no other beats are filled and joined, others hollow. Points that fall together share a label.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        points: See :func:`~hrl_policies.baselines.preference_front.preference_front`.
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
    save_figure(figure, path, f"{data['name']} ({data['origin']}), hash {data['hash']}")


def _weights(points: Sequence[FrontPoint]) -> dict[tuple[float, float], str]:
    """Returns the label of each place in the picture: the weight, or the range of weights, that led there."""
    weights: dict[tuple[float, float], list[float]] = {}
    for point in points:
        place = (round(point.clicks, 2), round(point.tail_share, 2))
        weights.setdefault(place, []).append(point.preference[1])
    return {
        place: f"{min(found):.2f}" + (f" to {max(found):.2f}" if len(found) > 1 else "")
        for place, found in weights.items()
    }
