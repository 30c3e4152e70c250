"""What a study costs, and how it gets on: estimates, peak memory, callbacks and displays of progress."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hrl_policies.study.config import RunConfig
from hrl_policies.study.store import reason_of
from hrl_policies.zoo import method
from kuaifair_env import ENVIRONMENTS
from kuaifair_env.synthetic.config import twin_config

FACTOR = 2.0
"""By how much an estimate may be wrong, either way."""
_MIN_SHARE_DONE = 0.02

_PRODUCTS = 200
_REPEATS = 5
_USUAL_LENGTH = 30
_SESSION_BYTES = 130
_OTHER_BYTES = 12_000
# Runs of A2C, TD3, HRL, DSRM-HRL and controls in KuaiRand-Pure's twin took 613 to 966 MiB at their peak; a transition
# of 64-dimensional states takes 684 bytes in replay buffers, and 1,484 with a history.
_RUN_MEMORY, _TRANSITION_MEMORY = 2**30, 1_484
# Resets the largest resident size of a process; see proc_pid_clear_refs(5).
_RESET, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"
_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_CONTAINER, _CONTAINER_FILES = Path("/sys/fs/cgroup"), ("memory.max", "memory.current")
_KIB, _MIB = 2**10, 2**20
# What the process held at most before the object was made may exceed by so much what it holds then.
_SLACK = 8 * _MIB


@dataclass(frozen=True)
class Estimate:
    """What a study is believed to cost.

    Attributes:
        seconds: With one worker: divide by the number of workers.
        longest: Seconds of its longest run: it takes no less, with however many workers.
        bytes: On disk.
        memory: Bytes of memory of its largest run, with libraries and a world no larger than KuaiRand-Pure's.
        guessed: Methods that were not measured, for which the median of their kind stands in.
    """

    seconds: float
    longest: float
    bytes: int
    memory: int
    guessed: tuple[str, ...]

    def wall_seconds(self, workers: int) -> float:
        """Returns the estimate for a number of workers that do nothing else."""
        return max(self.seconds / workers, self.longest)


def estimate_study(runs: Sequence[RunConfig]) -> Estimate:
    """Estimates a study, once calibrated on this machine.

    Making worlds is not counted: they are made once, then read from the cache.
    """
    unit = calibration_seconds()
    works = [work_of(run) for run in runs]
    known = {mode: float(cost["work"]) for mode, cost in _costs()["purifiers"].items()}
    purifiers = {(run.world, run.purifier.name) for run in runs if run.purifier is not None}
    pretraining = sum(known[mode] if mode in known else max(known.values()) for _, mode in purifiers)
    names = dict.fromkeys(run.method for run in runs)
    return Estimate(
        seconds=unit * (sum(works) + pretraining),
        longest=unit * max(works, default=0.0),
        bytes=sum(_bytes_of(run) for run in runs),
        memory=max(_memory_of(run) for run in runs),
        guessed=tuple(name for name in names if name not in _costs()["methods"]),
    )


def work_of(run: RunConfig) -> float:
    """Returns how much work a run is, in calibration products."""
    cost, items = _cost_of(run.method), max_candidates(run.world)
    sessions = run.user_count * run.episodes_per_user * run.session.max_len / _USUAL_LENGTH
    training = (cost["step"] + cost["step_item"] * items) * run.total_steps
    evaluation = (cost["session"] + cost["session_item"] * items) * sessions
    return float(cost["start"] + training + evaluation)


def calibration_seconds() -> float:
    """Measures the unit of the table: one product of 64 x 64 by 64 x 4096 numbers, on one thread, at its best."""
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    left = rng.standard_normal((64, 64), np.float32)
    right = rng.standard_normal((64, 4096), np.float32)
    best = np.inf
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(_REPEATS):
            start = time.process_time()
            for _ in range(_PRODUCTS):
                left @ right
            best = min(best, (time.process_time() - start) / _PRODUCTS)
    return float(best)


def duration(seconds: float) -> str:
    """Returns a duration as people say it, to two figures at most."""
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.0f} {name}" if count >= 10 else f"{count:.1f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Returns a number of bytes as people say it."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.0f} KiB"


def _bytes_of(run: RunConfig) -> int:
    purifier = 0 if run.purifier is None else _costs()["purifiers"].get(run.purifier.name, {}).get("bytes", 0)
    sessions = _SESSION_BYTES * run.user_count * run.episodes_per_user
    return int(_cost_of(run.method)["bytes"] + purifier + sessions + _OTHER_BYTES)


def _memory_of(run: RunConfig) -> int:
    return _RUN_MEMORY + _TRANSITION_MEMORY * int(run.hyperparameters.get("buffer_size", 0))


def _cost_of(name: str) -> dict[str, float]:
    known: dict[str, dict[str, float]] = _costs()["methods"]
    if name in known:
        return known[name]
    alike = [cost for other, cost in known.items() if method(other).learns == method(name).learns]
    return {part: statistics.median(cost[part] for cost in alike) for part in alike[0]}


@cache
def _costs() -> dict[str, Any]:
    text = resources.files("hrl_policies.study").joinpath("plans", "costs.json").read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def max_candidates(world: str) -> int:
    """Returns the most candidates that a world can have; worlds of one's own count as the toy world."""
    twin = ENVIRONMENTS[world].twin if world in ENVIRONMENTS else None
    return twin_config(twin or "Toy").n_items


class PeakMemory:
    """The largest resident memory of this process since the object was made, worlds and libraries included.

    Linux forgets earlier peaks when asked to. Other systems, and containers that forbid the question, remember them
    for as long as the process lives: there, the peak is known once it exceeds all earlier ones.
    """

    def __init__(self) -> None:
        # Elsewhere than on Linux, or where it is forbidden, what was reached before is told apart by its size.
        with suppress(OSError):
            _RESET.write_text(_RESET_PEAK, encoding="ascii")
        self._at_start, resident = _peak(), _status("VmRSS")
        self._starts_low = self._at_start is not None and resident is not None and self._at_start <= resident + _SLACK

    def mib(self) -> float | None:
        """Returns the peak in MiB; None where the system does not tell, or an earlier peak hides this one."""
        peak = _peak()
        if peak is None or self._at_start is None or not (self._starts_low or peak > self._at_start):
            return None
        return round(peak / _MIB, 1)


def available_memory() -> int | None:
    """Returns the bytes that the machine, or the container of this process, has left; None where neither tells."""
    left = [size for size in (_field(_MACHINE, "MemAvailable"), _left_in_container()) if size is not None]
    return min(left, default=None)


def _left_in_container() -> int | None:
    try:
        most, used = ((_CONTAINER / name).read_text(encoding="ascii").strip() for name in _CONTAINER_FILES)
    except OSError:
        return None
    return None if most == "max" else int(most) - int(used)


def _peak() -> int | None:
    size = _status("VmHWM")
    return _peak_of_process() if size is None else size


def _status(name: str) -> int | None:
    return _field(_STATUS, name)


def _field(path: Path, name: str) -> int | None:
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return None
    sizes = (int(line.split()[1]) * _KIB for line in text.splitlines() if line.startswith(f"{name}:"))
    return next(sizes, None)


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KIB)


_SHOWN_FAILURES = 5
_SHOWN_RUNNING = 16


class StudyCallback:
    """Is told how a study gets on; this one does nothing with it."""

    def on_study_start(self, work: Mapping[str, float], done: int, failed: int) -> None:
        """Is called once, before the first task.

        Args:
            work: Runs that are left, by name, each with how much work it is believed to be.
            done: Runs that were finished before.
            failed: Runs that failed before.
        """

    def on_task_start(self, name: str) -> None:
        """Is called when a run, or the making of worlds or a purifier, starts."""

    def on_task_end(self, name: str, seconds: float, error: str) -> None:
        """Is called when a task ends; ``error`` is its traceback, empty if all went well."""


class StudyProgress(StudyCallback):
    """Counts the runs of a study, ``workers`` of which go on at once, and foretells its end from those that ended."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.total = self.done = self.failed = 0
        self.running: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._work: dict[str, float] = {}
        # Kept as numbers: a display in a thread of its own must not walk through what changes under it.
        self._work_left = self._work_done = self._seconds_done = 0.0

    def on_study_start(self, work: Mapping[str, float], done: int, failed: int) -> None:
        """See :class:`StudyCallback`."""
        self._work, self._work_left = dict(work), sum(work.values())
        self.done, self.failed = done, failed
        self.total = len(work) + done + failed

    def on_task_start(self, name: str) -> None:
        """See :class:`StudyCallback`."""
        self.running[name] = time.monotonic()

    def on_task_end(self, name: str, seconds: float, error: str) -> None:
        """See :class:`StudyCallback`."""
        self.running.pop(name, None)
        if error:
            self.failures[name] = reason_of(error)
        if name not in self._work:
            # Worlds and purifiers are no runs.
            return
        work = self._work.pop(name)
        self._work_left -= work
        if error:
            self.failed += 1
            return
        self.done += 1
        self._seconds_done += seconds
        self._work_done += work

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end, if the runs that are left go as those that have ended; None while these say little.

        A control takes longer to load its world than to act, which says nothing of how long a training takes.
        """
        if self._work_done <= _MIN_SHARE_DONE * (self._work_done + self._work_left):
            return None
        left = self._work_left * self._seconds_done / self._work_done
        return left / max(1, min(self.workers, len(self._work)))

    def summary(self) -> str:
        """Returns one line on where the study stands."""
        left = self.total - self.done - self.failed
        parts = [f"{self.done} of {self.total} runs done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if left:
            remaining = self.seconds_left
            parts.append(f"{left} left" + ("" if remaining is None else f", about {duration(remaining)}"))
        return ", ".join(parts)


class PlainProgress(StudyProgress):
    """Prints one line for each run that ends; for files and pipes."""

    def __init__(self, workers: int, console: Console) -> None:
        super().__init__(workers)
        self._console = console

    def on_study_start(self, work: Mapping[str, float], done: int, failed: int) -> None:
        """Prints where the study stands."""
        super().on_study_start(work, done, failed)
        self._print(self.summary())

    def on_task_end(self, name: str, seconds: float, error: str) -> None:
        """Prints how it went."""
        super().on_task_end(name, seconds, error)
        how = f"FAILED after {duration(seconds)}: {reason_of(error)}" if error else f"done in {duration(seconds)}"
        self._print(f"{name}: {how} ({self.summary()})")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(StudyProgress):
    """Renders bar, time left, running and failed runs, for a terminal that shows them in place."""

    def render(self) -> Group:
        """Returns what the terminal shows now."""
        table = Table.grid(padding=(0, 2))
        for name, since in list(self.running.items())[:_SHOWN_RUNNING]:
            table.add_row(Text("running", style="cyan"), Text(name), duration(time.monotonic() - since))
        for name, reason in list(self.failures.items())[-_SHOWN_FAILURES:]:
            table.add_row(Text("failed", style="red"), Text(name), Text(reason, overflow="ellipsis"))
        bar = ProgressBar(total=max(self.total, 1), completed=self.done + self.failed, width=60)
        return Group(Text(self.summary(), style="bold"), bar, table)


@contextmanager
def progress_for(console: Console, workers: int) -> Iterator[StudyProgress]:
    """Shows the progress of a study: in place in a terminal, as plain lines elsewhere."""
    if not console.is_terminal:
        yield PlainProgress(workers, console)
        return
    progress = LiveProgress(workers)
    with Live(console=console, get_renderable=progress.render, refresh_per_second=2, transient=True):
        yield progress
