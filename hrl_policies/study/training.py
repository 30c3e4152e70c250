"""Training: callbacks for progress, learning curves and a clean end at Ctrl-C; checkpoints of models and buffers."""

from __future__ import annotations

import signal
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import unwrap_vec_wrapper
from tqdm import tqdm

from dsrm.wrappers import VecDSRM
from hrl_policies.study.progress import available_memory, size
from hrl_policies.study.records import read_json, write_json
from hrl_policies.study.store import BELIEF, MODEL, CurveRow
from kuaifair_env.files import parse_as, whole
from kuaifair_env.metrics import signed_gap
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.sb3_files import buffer_arrays, restore_parameters, restore_replay_buffer, save_replay_buffer

REPLAY = "replay.npz"
SESSIONS = "sessions.json"
_POINTS = 50


class LearningCurveCallback(BaseCallback):
    """Shows progress with a label, adds points to the curve of earlier parts of the run, and stops when asked to."""

    _min_notes = 1

    def __init__(self, total_steps: int, curve: list[CurveRow], progress: bool, label: str) -> None:
        super().__init__()
        self.curve = list(curve)
        self.stop_requested = False
        self._notes: list[Mapping[str, Any]] = []
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
        if self.num_timesteps >= self._next and len(self._notes) >= self._min_notes:
            self._next = self.num_timesteps + self._every
            self._add_point()
        self._bar.update(min(self.num_timesteps, self._total) - self._bar.n)
        return not self.stop_requested

    def _on_training_end(self) -> None:
        self._add_point()
        self._bar.close()

    def _add_point(self) -> None:
        if self._notes:
            self.curve.append({"steps": self.num_timesteps, **self._point()})
            self._notes.clear()

    @abstractmethod
    def _collect(self) -> None:
        """Notes what the step showed."""

    @abstractmethod
    def _point(self) -> CurveRow:
        """Sums up what was noted since the last point."""


class SessionCurveCallback(LearningCurveCallback):
    """Writes the learning curve from finished training sessions.

    A point of the curve sums up the sessions that ended since the last one, at least 50, exploration included:
    ``steps, sessions, len, r_each, r_cum, ad, signed_gap, violation_rate``.
    """

    _min_notes = 50

    def _collect(self) -> None:
        self._notes += [self.locals["infos"][row]["session"] for row in np.flatnonzero(self.locals["dones"])]

    def _point(self) -> CurveRow:
        lengths, rewards, popular, violations = (
            np.asarray([session[name] for session in self._notes])
            for name in ("len", "r_cum", "popular_share", "violation_rate")
        )
        steps = lengths.sum()
        gap = float(signed_gap((popular * lengths).sum() / steps))
        return {
            "sessions": len(lengths),
            "len": float(lengths.mean()),
            "r_each": float(rewards.sum() / steps),
            "r_cum": float(rewards.mean()),
            "ad": abs(gap),
            "signed_gap": gap,
            "violation_rate": float((violations * lengths).sum() / steps),
        }


class LossCurveCallback(LearningCurveCallback):
    """Writes the learning curve of an offline method, which plays no sessions: ``steps`` and its mean losses.

    The mean is over the gradient steps since the last point.
    """

    def _collect(self) -> None:
        self._notes.append(self.locals["losses"])

    def _point(self) -> CurveRow:
        return {name: float(np.mean([losses[name] for losses in self._notes])) for name in self._notes[0]}


@contextmanager
def stops_cleanly(callback: LearningCurveCallback) -> Iterator[None]:
    """Makes the first Ctrl-C or SIGTERM end training after the current step; the second interrupts at once.

    A signal that is ignored, as Ctrl-C in the workers of a study and in the background of a shell script, or that ends
    the process, as SIGTERM where the command has no handler of its own, stays so. Outside the main thread, where
    signals cannot be caught, nothing is done.
    """
    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        callback.stop_requested = True
        restore()

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        restore()


def need_memory(model: Any) -> None:
    """Checks that the replay buffer of a model, which takes memory only as it fills, will find it.

    Raises:
        MemoryError: If it is larger than what is left; says how large.
    """
    buffer, left = getattr(model, "replay_buffer", None), available_memory()
    if not isinstance(model, OffPolicyAlgorithm) or buffer is None or left is None:
        return
    needed = sum(array.nbytes for array in buffer_arrays(buffer).values())
    if needed > left:
        raise MemoryError(
            f"a replay buffer of {model.buffer_size:,} transitions takes {size(needed)} and {size(left)} are left; "
            "give a smaller buffer_size"
        )


def save_model(model: Any, folder: Path) -> None:
    """Writes ``model.zip`` in Stable-Baselines3's own format, and ``belief.safetensors`` where it sees a belief."""
    model.save(folder / MODEL)
    around = purifying_wrapper(model)
    if around is not None and around.belief is not None:
        around.save(folder / BELIEF)


def purifying_wrapper(model: Any) -> VecDSRM | None:
    """Returns what purifies the states that a model learns on, or None."""
    env = model.get_env()
    return None if env is None else unwrap_vec_wrapper(env, VecDSRM)


def save_checkpoint(model: Any, folder: Path) -> None:
    """Writes what :func:`save_model` does, how many sessions have started, and replay buffers as plain arrays."""
    save_model(model, folder)
    sessions = _sessions_of(model)
    if sessions is not None:
        write_json(folder / SESSIONS, {"started": sessions.batch.simulator.started})
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(model, OffPolicyAlgorithm) and buffer is not None:
        save_replay_buffer(buffer, folder / REPLAY)


def restore_checkpoint(model: Any, folder: Path, steps_done: int) -> None:
    """Brings a freshly built model to the state that :func:`save_checkpoint` wrote.

    Raises:
        ArtifactError: If a file is missing or damaged.
    """
    restore_parameters(model, folder / MODEL)
    model.num_timesteps = steps_done
    sessions = _sessions_of(model)
    if sessions is not None:
        with whole(folder / SESSIONS, "count of sessions", "train again"):
            sessions.count_sessions_from(parse_as(int, read_json(folder / SESSIONS)["started"]))
    buffer = getattr(model, "replay_buffer", None)
    if isinstance(model, OffPolicyAlgorithm) and buffer is not None:
        restore_replay_buffer(buffer, folder / REPLAY)


def _sessions_of(model: Any) -> KuaiFairVecEnv | None:
    """Returns the sessions that a model learns from, or None if it learns from none of this library."""
    env = model.get_env()
    return env.unwrapped if env is not None and isinstance(env.unwrapped, KuaiFairVecEnv) else None
