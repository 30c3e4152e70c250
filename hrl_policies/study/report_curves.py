"""Learning curves as the few numbers that an inline SVG needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hrl_policies.study.store import CurveRow

WIDTH, HEIGHT = 320, 150
"""Size of a panel's drawing, in its own units."""

LEFT, RIGHT, TOP, BOTTOM = 40, 310, 12, 122
"""Where its axes run."""

_NICE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        at: Coordinate in the drawing.
        label: What stands there.
    """

    at: float
    label: str


@dataclass(frozen=True)
class CurvePanel:
    """One figure over training steps, ready to be drawn.

    Attributes:
        title: What is drawn.
        path: Data of the SVG path.
        end: Coordinates of the last point.
        across: Ticks of the axis of steps.
        up: Ticks of the other axis.
        judged: Height of the line for the figure in the test world; None without one.
        words: What the drawing shows, for those who do not see it.
    """

    title: str
    path: str
    end: tuple[float, float]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    judged: float | None
    words: str


def curve_panel(
    curve: Sequence[CurveRow], figure: str, title: str, top: float, judged: float | None = None
) -> CurvePanel | None:
    """Draws one column of a learning curve from 0 to ``top`` over steps from 0 to the last.

    Args:
        curve: Rows of ``learning_curve.csv``.
        figure: Name of the column.
        title: What the panel calls it.
        top: Upper end of the axis, such as :func:`axis_top` gives.
        judged: The figure in the test world.

    Returns:
        The panel, or None if the curve has no point that is a number.
    """
    points = [(row["steps"], row[figure]) for row in curve if figure in row]
    finite = [point for point in points if all(map(math.isfinite, point))]
    if not finite:
        return None
    last = max(steps for steps, _ in finite) or 1.0
    places = [_place(point, last, top) for point in points]
    return CurvePanel(
        title=title,
        path=_path(places),
        end=_rounded(_place(finite[-1], last, top)),
        across=(Tick(LEFT, "0"), Tick(RIGHT, f"{last:,.0f} steps")),
        up=tuple(Tick(_height(share * top, top), f"{share * top:g}") for share in (0.0, 0.5, 1.0)),
        judged=None if judged is None else round(_height(judged, top), 1),
        words=(
            f"{title} in training: {finite[0][1]:.3g} at {finite[0][0]:,.0f} steps, "
            f"{finite[-1][1]:.3g} at {finite[-1][0]:,.0f}"
        ),
    )


def axis_top(values: Sequence[float]) -> float:
    """Returns a round number that no finite value exceeds, 1 where there is nothing above 0."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0.0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return float(next((nice * unit for nice in _NICE if nice * unit >= largest), 10.0 * unit))


def _path(places: Sequence[tuple[float, float]]) -> str:
    """Joins the points; one that is not a number leaves a gap."""
    parts, pen = [], "M"
    for place in places:
        if not all(map(math.isfinite, place)):
            pen = "M"
            continue
        x, y = _rounded(place)
        parts.append(f"{pen}{x:g} {y:g}")
        pen = "L"
    return "".join(parts)


def _place(point: tuple[float, float], last: float, top: float) -> tuple[float, float]:
    return LEFT + (RIGHT - LEFT) * point[0] / last, _height(point[1], top)


def _height(value: float, top: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * value / top


def _rounded(place: tuple[float, float]) -> tuple[float, float]:
    return round(place[0], 1), round(place[1], 1)
