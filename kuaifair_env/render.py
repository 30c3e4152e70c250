"""Rendering of a session, as text and as a picture of temper, reward and popular share.

Both renderers are pure functions of a :class:`SessionTrace`, which a :class:`SessionRecorder` collects. matplotlib is
imported with the first picture; pyplot, with its global figures and backend, is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kuaifair_env.abandonment import CategoryBoredom, LeaveRule, TemperFairness
from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.simulator import Outcome, SessionSimulator
from kuaifair_env.world import World

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

LineStyle = Literal["-", "--", ":", "none"]

_BAR_WIDTH = 20
_WIDTH, _HEIGHT, _DPI = 720, 560, 100
_LEFT, _RIGHT = 0.1, 0.97
# Okabe and Ito's colours, which stay apart for colour-blind eyes; markers and line styles differ for grey.
_BLACK, _GREY, _BLUE, _GREEN, _VERMILLION = "#000000", "#6E6E6E", "#0072B2", "#009E73", "#D55E00"


@dataclass(frozen=True)
class SessionTrace:
    """The course of one session up to now: T steps with slates of K items.

    Attributes:
        user_id: Raw id of the user.
        max_len: The environment's ``max_len``; pictures of one session keep its scale.
        items: ``int (T, K)`` item rows shown.
        popular: ``bool (T, K)``, whether each item is popular.
        clicks: ``bool (T, K)``, what was clicked.
        rewards: ``float (T,)`` reward of each step.
        popular_shares: ``float (T,)`` popular share of each slate, in [0, 1].
        violations: ``bool (T,)``, whether each slate was at or above the bound.
        tempers: ``float (T + 1,)``, at reset and after each step.
        leave_reason: Why the session is over, in a few words, or None while it runs.
        item_ids: ``int (N,)`` raw id of each item row; None shows the rows themselves.
        leave_below: Temper below which the user leaves; None where the leave rule does not go by temper.
    """

    user_id: int
    max_len: int
    items: IntArray
    popular: BoolArray
    clicks: BoolArray
    rewards: NDArray[Any]
    popular_shares: NDArray[Any]
    violations: BoolArray
    tempers: NDArray[Any]
    leave_reason: str | None = None
    item_ids: IntArray | None = None
    leave_below: float | None = 1.0

    @property
    def steps(self) -> int:
        """Number of slates shown so far, T."""
        return len(self.items)

    @property
    def extent(self) -> int:
        """Steps that a picture has room for."""
        return max(self.max_len, self.steps)


def render_ansi(trace: SessionTrace) -> str:
    """Returns a readable table of the session, one line a step.

    A popular item carries a ``*``, a clicked one stands in brackets, one over the bound has a ``!``.
    """
    ids = trace.items if trace.item_ids is None else trace.item_ids[trace.items]
    width = max(len(str(int(item))) for item in ids.flat) + 4 if ids.size else 0
    slate_width = max(width * trace.items.shape[1], len("slate"))
    lines = [
        _headline(trace),
        "* popular   [ ] clicked   ! unfair: the slate is over the user's bound",
        "",
        f"step  {'slate':<{slate_width}}  popular  reward  temper",
        f"{0:>4}  {'':<{slate_width}}  {'':>7}  {'':>6}  {_temper(trace, 0)}",
    ]
    for step in range(trace.steps):
        slate = "".join(
            _item(int(item), bool(popular), bool(clicked)).rjust(width)
            for item, popular, clicked in zip(ids[step], trace.popular[step], trace.clicks[step], strict=True)
        )
        share = f"{trace.popular_shares[step]:.0%}{'!' if trace.violations[step] else ' '}"
        lines.append(
            f"{step + 1:>4}  {slate:<{slate_width}}  {share:>7}  {trace.rewards[step]:>6.2f}"
            f"  {_temper(trace, step + 1)}"
        )
    return "\n".join(lines) + "\n"


def render_rgb(trace: SessionTrace) -> NDArray[np.uint8]:
    """Returns a picture of temper, reward and popular share over the session, ``uint8 (560, 720, 3)``.

    All pictures of one session have the same axes, so that they can follow each other in a film.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(_LEFT, 0.955, _headline(trace), fontsize=11)
    _draw_temper(figure, trace)
    _draw_rewards(figure, trace)
    _draw_shares(figure, trace)
    figure.text((_LEFT + _RIGHT) / 2, 0.015, "step", fontsize=10, ha="center")
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


class _Panel:
    """One plot of the picture, drawn straight onto the figure: three Axes take longer to lay out than a frame may."""

    def __init__(
        self, figure: Figure, name: str, place: tuple[float, float], values: tuple[float, float], max_len: int
    ) -> None:
        from matplotlib.transforms import Bbox, BboxTransform

        self._figure = figure
        self.first, self.last = -0.6, max_len + 0.6
        self._low, self._high = values
        data = Bbox([[self.first, self._low], [self.last, self._high]])
        self._transform: Transform = BboxTransform(data, Bbox([[_LEFT, place[0]], [_RIGHT, place[1]]]))
        self._transform += figure.transFigure
        figure.text(0.03, sum(place) / 2, name, fontsize=10, rotation=90, ha="center", va="center")
        self.line([self.first, self.first, self.last], [self._high, self._low, self._low], _BLACK, width=0.8)

    def line(
        self,
        x: ArrayLike,
        y: ArrayLike,
        colour: str,
        *,
        style: LineStyle = "-",
        width: float = 1.0,
        marker: str = "",
        size: float = 5.0,
    ) -> None:
        from matplotlib.lines import Line2D

        artist = Line2D(
            np.asarray(x),
            np.asarray(y),
            color=colour,
            linestyle=style,
            linewidth=width,
            marker=marker,
            markersize=size,
        )
        artist.set_transform(self._transform)
        self._figure.add_artist(artist)

    def level(self, y: float, colour: str, style: LineStyle) -> None:
        self.line([self.first, self.last], [y, y], colour, style=style, width=1.2)

    def bars(self, x: NDArray[Any], y: NDArray[Any], colour: str) -> None:
        from matplotlib.collections import LineCollection

        width = 0.6 * (_RIGHT - _LEFT) * _WIDTH / (self.last - self.first) * 72 / _DPI
        feet = np.stack([x, np.zeros(len(x))], axis=1)
        bars = LineCollection(
            list(np.stack([feet, np.stack([x, y], axis=1)], axis=1)),
            colors=colour,
            linewidths=width,
            capstyle="butt",
        )
        bars.set_transform(self._transform)
        self._figure.add_artist(bars)

    def text(self, x: float, y: float, text: str, colour: str, ha: str = "right", va: str = "bottom") -> None:
        self._figure.text(x, y, text, color=colour, fontsize=10, ha=ha, va=va, transform=self._transform)

    def ticks_y(self, values: Sequence[float]) -> None:
        for value in values:
            self.line([self.first], [value], _BLACK, marker="_", size=6, style="none")
            self.text(self.first - 0.012 * (self.last - self.first), value, f"{value:g}", _BLACK, va="center")

    def ticks_x(self, values: Sequence[int]) -> None:
        self.line(values, np.full(len(values), self._low), _BLACK, marker="|", size=6, style="none")
        for value in values:
            self.text(
                value, self._low - 0.05 * (self._high - self._low), f"{value}", _BLACK, ha="center", va="top"
            )


def _headline(trace: SessionTrace) -> str:
    if trace.leave_reason is not None:
        state = f"over after {_counted(trace.steps, 'step')}: {trace.leave_reason}"
    else:
        state = f"{_counted(trace.steps, 'step')} so far"
    return f"User {trace.user_id} (max_len {trace.max_len}): {state}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _item(item: int, popular: bool, clicked: bool) -> str:
    text = f"{item}*" if popular else f"{item}"
    return f"[{text}]" if clicked else text


def _temper(trace: SessionTrace, step: int) -> str:
    temper, start = float(trace.tempers[step]), float(trace.tempers[0])
    filled = round(_BAR_WIDTH * min(max(temper / start, 0.0), 1.0)) if start > 0.0 else 0
    return f"{temper:>6.2f}  |{'#' * filled}{'.' * (_BAR_WIDTH - filled)}|"


def _round_steps(max_len: int) -> list[int]:
    """Returns a handful of evenly spaced whole numbers from 0 to at most ``max_len``."""
    exact = max_len / 6
    spacing = max(1, round(exact) if exact < 4 else 5 * round(exact / 5))
    return list(range(0, max_len + 1, spacing))


def _draw_temper(figure: Figure, trace: SessionTrace) -> None:
    tempers = np.asarray(trace.tempers, np.float64)
    steps = np.arange(len(tempers))
    top = max(float(tempers.max()), float(trace.max_len))
    low = min(-2.5, float(tempers.min()) - 0.5)
    panel = _Panel(figure, "temper", (0.59, 0.92), (low, top * 1.05), trace.extent)
    panel.ticks_y(_round_steps(round(top))[::2])
    if trace.leave_below is not None:
        panel.level(trace.leave_below, _VERMILLION, "--")
        panel.text(panel.last, trace.leave_below, f"leaves below {trace.leave_below:g}", _VERMILLION)
    panel.line(steps, tempers, _BLACK, width=1.5, marker="o", size=4)
    if trace.leave_reason is not None:
        panel.line(steps[-1:], tempers[-1:], _VERMILLION, marker="X", size=10)


def _draw_rewards(figure: Figure, trace: SessionTrace) -> None:
    rewards = np.asarray(trace.rewards, np.float64)
    low, high = float(rewards.min(initial=0.0)), float(rewards.max(initial=1.0))
    panel = _Panel(figure, "reward", (0.34, 0.54), (low, low + (high - low) * 1.08), trace.extent)
    panel.ticks_y([low, 0.0, high] if low < 0.0 else [0.0, high / 2, high])
    panel.bars(np.arange(1, trace.steps + 1), rewards, _BLUE)
    if trace.steps:
        panel.level(float(rewards.mean()), _BLACK, ":")
        panel.text(panel.last, low + (high - low) * 1.1, f"dotted: mean {rewards.mean():.2f}", _BLACK)


def _draw_shares(figure: Figure, trace: SessionTrace) -> None:
    steps, shares = np.arange(1, trace.steps + 1), np.asarray(trace.popular_shares, np.float64)
    unfair = np.asarray(trace.violations, np.bool_)
    panel = _Panel(figure, "popular share", (0.09, 0.29), (-0.06, 1.06), trace.extent)
    panel.ticks_y([0.0, 0.5, 1.0])
    panel.ticks_x(_round_steps(trace.extent))
    panel.level(0.5, _GREY, "--")
    panel.line(steps, shares, _GREY, width=0.8)
    panel.line(steps[~unfair], shares[~unfair], _GREEN, marker="^", size=7, style="none")
    panel.line(steps[unfair], shares[unfair], _VERMILLION, marker="X", size=7, style="none")
    panel.text(panel.last, 1.12, "\u25b2 within the user's bound", _GREEN)
    panel.text(panel.last - 0.31 * (panel.last - panel.first), 1.12, "\u2716 unfair slate", _VERMILLION)


class SessionRecorder:
    """Collects the steps of the session in row 0 of a simulator.

    Args:
        world: For ids and popularity groups.
        rule: The leave rule, for the reason of leaving.

    Attributes:
        started: Whether there is a session.
    """

    def __init__(self, world: World, rule: LeaveRule) -> None:
        self._world = world
        self._rule = rule
        self._outcomes: list[Outcome] = []
        self._user_id = 0
        self._max_len = 0
        self._slate_size = 0
        self._start_temper = 0.0
        self.started = False

    def start(self, simulator: SessionSimulator) -> None:
        """Forgets the last session and begins with the simulator's current one."""
        self._outcomes = []
        self._user_id = int(self._world.data.users.ids[simulator.users[0]])
        self._max_len = simulator.max_len
        self._slate_size = simulator.slate_size
        self._start_temper = float(simulator.temper[0])
        self.started = True

    def add(self, outcome: Outcome) -> None:
        """Notes one step."""
        self._outcomes.append(outcome)

    def trace(self) -> SessionTrace:
        """Returns the session so far."""
        items = self._stack("items").reshape(-1, self._slate_size).astype(np.int64)
        return SessionTrace(
            items=items,
            popular=self._world.groups.popular[items],
            clicks=self._stack("clicks").reshape(-1, self._slate_size).astype(np.bool_),
            rewards=self._stack("reward"),
            tempers=np.concatenate([[self._start_temper], self._stack("temper")]),
            popular_shares=self._stack("popular_share"),
            violations=self._stack("violation").astype(np.bool_),
            user_id=self._user_id,
            max_len=self._max_len,
            leave_reason=self._leave_reason(),
            item_ids=self._world.item_ids,
            leave_below=1.0 if isinstance(self._rule, TemperFairness) else None,
        )

    def text(self) -> str:
        """Returns the session so far as text."""
        return render_ansi(self.trace())

    def picture(self) -> Any:
        """Returns the session so far as a picture, ``uint8 (height, width, 3)``."""
        return render_rgb(self.trace())

    def _stack(self, name: str) -> Any:
        return np.asarray([getattr(outcome, name)[0] for outcome in self._outcomes])

    def _leave_reason(self) -> str | None:
        if not self._outcomes or not self._outcomes[-1].done[0]:
            return None
        if self._outcomes[-1].truncated[0]:
            return "max_len reached"
        if isinstance(self._rule, TemperFairness):
            return "lost patience"
        return "bored by repetition" if isinstance(self._rule, CategoryBoredom) else "left"
