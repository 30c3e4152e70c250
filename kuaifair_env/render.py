"""Rendering of a session, as text and as a picture of temper, reward and popular share.

Both renderers are pure functions of a :class:`SessionTrace`, which a :class:`SessionRecorder` collects. matplotlib is
imported with the first picture; pyplot, with its global figures and backend, is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import CategoryBoredom, LeaveRule, TemperFairness
from kuaifair_env.data.schema import BoolArray, IdArray, IntArray, raw_id
from kuaifair_env.simulator import Outcome, SessionSimulator
from kuaifair_env.world import World

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_WIDTH = 20
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
        item_ids: ``(N,)`` raw id of each item row; None shows the rows themselves.
        leave_below: Temper below which the user leaves; None where the leave rule does not go by temper.
    """

    user_id: int | str
    max_len: int
    items: IntArray
    popular: BoolArray
    clicks: BoolArray
    rewards: NDArray[Any]
    popular_shares: NDArray[Any]
    violations: BoolArray
    tempers: NDArray[Any]
    leave_reason: str | None = None
    item_ids: IdArray | None = None
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
    width = max(len(str(item)) for item in ids.flat) + 4 if ids.size else 0
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
            _item(str(item), bool(popular), bool(clicked)).rjust(width)
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

    figure = Figure(figsize=(7.2, 5.6), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(
        3, sharex=True, gridspec_kw={"left": 0.1, "right": 0.97, "bottom": 0.09, "top": 0.92, "hspace": 0.25}
    )
    figure.text(0.1, 0.955, _headline(trace), fontsize=11)
    for panel, name, draw in zip(
        panels,
        ("temper", "reward", "popular share"),
        (_draw_temper, _draw_rewards, _draw_shares),
        strict=True,
    ):
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_ylabel(name)
        draw(panel, trace)
    panels[-1].set(xlabel="step", xlim=(-0.6, trace.extent + 0.6), xticks=_round_steps(trace.extent))
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return pixels[..., :3].copy()


def _headline(trace: SessionTrace) -> str:
    if trace.leave_reason is not None:
        state = f"over after {_counted(trace.steps, 'step')}: {trace.leave_reason}"
    else:
        state = f"{_counted(trace.steps, 'step')} so far"
    return f"User {trace.user_id} (max_len {trace.max_len}): {state}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _item(item: str, popular: bool, clicked: bool) -> str:
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


def _note(panel: Axes, x: float, y: float, text: str, colour: str) -> None:
    """Writes right-aligned text at a share ``x`` of the panel's width and above ``y``, in the panel's units."""
    panel.text(x, y, text, color=colour, ha="right", va="bottom", transform=panel.get_yaxis_transform())


def _draw_temper(panel: Axes, trace: SessionTrace) -> None:
    tempers = np.asarray(trace.tempers, np.float64)
    steps = np.arange(len(tempers))
    top = max(float(tempers.max()), float(trace.max_len))
    panel.set(ylim=(min(-2.5, float(tempers.min()) - 0.5), top * 1.05), yticks=_round_steps(round(top))[::2])
    if trace.leave_below is not None:
        panel.axhline(trace.leave_below, color=_VERMILLION, linestyle="--", linewidth=1.2)
        _note(panel, 1.0, trace.leave_below, f"leaves below {trace.leave_below:g}", _VERMILLION)
    panel.plot(steps, tempers, color=_BLACK, marker="o", markersize=4)
    if trace.leave_reason is not None:
        panel.plot(steps[-1:], tempers[-1:], color=_VERMILLION, marker="X", markersize=10, clip_on=False)


def _draw_rewards(panel: Axes, trace: SessionTrace) -> None:
    rewards = np.asarray(trace.rewards, np.float64)
    low, high = float(rewards.min(initial=0.0)), float(rewards.max(initial=1.0))
    panel.set(ylim=(low, low + (high - low) * 1.08), yticks=[low, 0.0, high] if low < 0.0 else [0.0, high / 2, high])
    panel.bar(np.arange(1, trace.steps + 1), rewards, width=0.6, color=_BLUE)
    if trace.steps:
        panel.axhline(float(rewards.mean()), color=_BLACK, linestyle=":", linewidth=1.2)
        _note(panel, 1.0, low + (high - low) * 1.1, f"dotted: mean {rewards.mean():.2f}", _BLACK)


def _draw_shares(panel: Axes, trace: SessionTrace) -> None:
    steps, shares = np.arange(1, trace.steps + 1), np.asarray(trace.popular_shares, np.float64)
    unfair = np.asarray(trace.violations, np.bool_)
    panel.set(ylim=(-0.06, 1.06), yticks=[0.0, 0.5, 1.0])
    panel.axhline(0.5, color=_GREY, linestyle="--", linewidth=1.2)
    panel.plot(steps, shares, color=_GREY, linewidth=0.8)
    panel.plot(steps[~unfair], shares[~unfair], color=_GREEN, marker="^", markersize=7, linestyle="none")
    panel.plot(steps[unfair], shares[unfair], color=_VERMILLION, marker="X", markersize=7, linestyle="none")
    _note(panel, 1.0, 1.12, "\u25b2 within the user's bound", _GREEN)
    _note(panel, 0.69, 1.12, "\u2716 unfair slate", _VERMILLION)


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
        self._user_id: int | str = 0
        self._max_len = 0
        self._slate_size = 0
        self._start_temper = 0.0
        self.started = False

    def start(self, simulator: SessionSimulator) -> None:
        """Forgets the last session and begins with the simulator's current one."""
        self._outcomes = []
        self._user_id = raw_id(self._world.data.users.ids[simulator.users[0]])
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
