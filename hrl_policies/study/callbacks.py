"""Callbacks of training: progress, learning curves and a clean end at Ctrl-C."""

from __future__ import annotations

import signal
import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import tqdm

from hrl_policies.study.store import CurveRow
from kuaifair_env.metrics import signed_gap

_POINTS = 50
_MIN_SESSIONS = 50


class LearningCurveCallback(BaseCallback):
    """Shows progress, adds points to a learning curve, and stops training when asked to.

    Args:
        total_steps: Steps of the whole run.
        curve: Points that earlier parts of the run wrote.
        progress: Whether to show a progress bar.
        label: What the bar says.
    """

    def __init__(self, total_steps: int, curve: list[CurveRow], progress: bool, label: str) -> None:
        super().__init__()
        self.curve = list(curve)
        self.stop_requested = False
        self._total = total_steps
        self._every = max(total_steps // _POINTS, 1)
        self._progress = progress
        self._label = label
        self._bar: Any = None

    def _on_training_start(self) -> None:
        self._next = self.num_timesteps + self._every
        self._bar = tqdm(
            total=self._total,
            initial=min(self.num_timesteps, self._total),
            unit="step",
            desc=self._label,
            disable=not self._progress,
            leave=False,
        )

    def _on_step(self) -> bool:
        self._collect()
        if self.num_timesteps >= self._next and self._ready():
            self._next = self.num_timesteps + self._every
            self._add_point()
        self._bar.update(min(self.num_timesteps, self._total) - self._bar.n)
        return not self.stop_requested

    def _on_training_end(self) -> None:
        self._add_point()
        self._bar.close()

    @abstractmethod
    def _collect(self) -> None:
        """Takes what the step showed."""

    @abstractmethod
    def _ready(self) -> bool:
        """Says whether enough was noted for a point."""

    @abstractmethod
    def _add_point(self) -> None:
        """Adds what was noted since the last point, if anything, to the curve."""


class SessionCurveCallback(LearningCurveCallback):
    """Writes the learning curve from finished training sessions.

    A point of the curve sums up the sessions that ended since the last one, at least 50, exploration included:
    ``steps, sessions, len, r_each, r_cum, ad, signed_gap, violation_rate``.

    Args:
        total_steps: See :class:`LearningCurveCallback`.
        curve: See :class:`LearningCurveCallback`.
        progress: See :class:`LearningCurveCallback`.
        label: See :class:`LearningCurveCallback`.
    """

    def __init__(self, total_steps: int, curve: list[CurveRow], progress: bool, label: str) -> None:
        super().__init__(total_steps, curve, progress, label)
        self._sessions: list[dict[str, Any]] = []

    def _collect(self) -> None:
        for row in np.flatnonzero(self.locals["dones"]):
            self._sessions.append(self.locals["infos"][row]["session"])

    def _ready(self) -> bool:
        return len(self._sessions) >= _MIN_SESSIONS

    def _add_point(self) -> None:
        if not self._sessions:
            return
        columns = {name: np.asarray([session[name] for session in self._sessions]) for name in _CURVE_INPUTS}
        lengths = columns["len"]
        steps = lengths.sum()
        gap = float(signed_gap((columns["popular_share"] * lengths).sum() / steps))
        self.curve.append(
            {
                "steps": self.num_timesteps,
                "sessions": len(lengths),
                "len": float(lengths.mean()),
                "r_each": float(columns["r_cum"].sum() / steps),
                "r_cum": float(columns["r_cum"].mean()),
                "ad": abs(gap),
                "signed_gap": gap,
                "violation_rate": float((columns["violation_rate"] * lengths).sum() / steps),
            }
        )
        self._sessions.clear()


_CURVE_INPUTS = ("len", "r_cum", "popular_share", "violation_rate")


class LossCurveCallback(LearningCurveCallback):
    """Writes the learning curve of an offline method, which plays no sessions: ``steps`` and its mean losses.

    The mean is over the gradient steps since the last point.

    Args:
        total_steps: See :class:`LearningCurveCallback`.
        curve: See :class:`LearningCurveCallback`.
        progress: See :class:`LearningCurveCallback`.
        label: See :class:`LearningCurveCallback`.
    """

    def __init__(self, total_steps: int, curve: list[CurveRow], progress: bool, label: str) -> None:
        super().__init__(total_steps, curve, progress, label)
        self._losses: list[dict[str, float]] = []

    def _collect(self) -> None:
        self._losses.append(self.locals["losses"])

    def _ready(self) -> bool:
        return True

    def _add_point(self) -> None:
        if not self._losses:
            return
        means = {name: float(np.mean([losses[name] for losses in self._losses])) for name in self._losses[0]}
        self.curve.append({"steps": self.num_timesteps, **means})
        self._losses.clear()


@contextmanager
def stops_cleanly(callback: LearningCurveCallback) -> Iterator[None]:
    """Makes the first Ctrl-C end training after the current step; the second interrupts at once.

    It does nothing where Ctrl-C is ignored, as in the workers of a study, and outside the main thread, where signals
    cannot be caught.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return

    def request(number: int, frame: FrameType | None) -> None:
        callback.stop_requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
