"""The engine of one machine: a pool of processes, one numerical thread each, that outlives the death of any of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from hrl_policies.study.engines.base import Crew, Ended, Event, Setting, Started, Task, WorldShelf, performed

THREAD_VARIABLES = (
    "OMP_NUMTHREAD_VARIABLES",
    "OPENBLAS_NUMTHREAD_VARIABLES",
    "MKL_NUMTHREAD_VARIABLES",
    "NUMEXPR_NUMTHREAD_VARIABLES",
)
"""Where numerical libraries read, when they are loaded, how many threads to start."""
_READY = "ready"
_TRIES = 2
_STARTS = 3
_PATIENCE = 5.0


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class LocalEngine:
    """Runs tasks in processes of this machine.

    Attributes:
        count: Number of processes; None takes one for each core.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"need at least 1 worker, got {self.count}")

    @property
    def workers(self) -> int:
        """Number of processes."""
        return cores() if self.count is None else self.count

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Crew]:
        """Gives the processes, which start when there is something to do."""
        crew = _Pool(self.workers, setting)
        try:
            yield crew
        finally:
            crew.stop()


@dataclass
class _Job:
    task: Task
    tries: int = 0


@dataclass
class _Worker:
    """A process and what it is doing.

    Attributes:
        process: The process.
        connection: This side of its pipe.
        ready: Whether it has finished its imports.
        job: What it is doing, or None.
        since: When it began.
    """

    process: Any
    connection: Connection
    ready: bool = False
    job: _Job | None = None
    since: float = 0.0


@dataclass
class _Pool:
    count: int
    setting: Setting
    workers: list[_Worker] = field(default_factory=list)
    stillborn: int = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        waiting = deque(_Job(task) for task in tasks)
        while waiting or any(worker.job for worker in self.workers):
            while len(self.workers) < min(self.count, len(waiting) + self._busy()):
                self.workers.append(_started(self.setting))
            for worker in self.workers:
                if waiting and worker.ready and worker.job is None:
                    job = waiting.popleft()
                    if _assigned(worker, job):
                        yield Started(job.task.name)
                    else:
                        waiting.appendleft(job)
            for connection in wait([worker.connection for worker in self.workers]):
                worker = next(one for one in self.workers if one.connection is connection)
                yield from self._heard(worker, waiting)

    def stop(self) -> None:
        for worker in self.workers:
            # A worker whose pipe is closed goes home; one that is at work, or still waking up, cannot hear that.
            worker.connection.close()
            if worker.job is not None or not worker.ready:
                worker.process.kill()
        for worker in self.workers:
            worker.process.join(_PATIENCE)
            worker.process.kill()
            worker.process.join()
        self.workers.clear()

    def _busy(self) -> int:
        return sum(worker.job is not None for worker in self.workers)

    def _heard(self, worker: _Worker, waiting: deque[_Job]) -> Iterator[Event]:
        """Takes what a worker says, or notices that it has died."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._died(worker, waiting)
            return
        if message == _READY:
            worker.ready, self.stillborn = True, 0
            return
        worker.job = None
        yield message

    def _died(self, worker: _Worker, waiting: deque[_Job]) -> Iterator[Event]:
        worker.process.join()
        worker.connection.close()
        self.workers.remove(worker)
        job, how = worker.job, _how(worker.process.exitcode)
        if not worker.ready:
            self.stillborn += 1
            if self.stillborn >= _STARTS:
                raise RuntimeError(
                    f"worker processes do not start: {self.stillborn} in a row ended by {how}. What they printed says "
                    "why; a script that runs a study needs `if __name__ == '__main__':` around what it does"
                )
        if job is None:
            return
        job.tries += 1
        if job.tries < _TRIES:
            waiting.appendleft(job)
            return
        yield Ended(
            job.task.name,
            time.perf_counter() - worker.since,
            f"the process of the run ended by {how}, {job.tries} times; the system does that when memory runs out\n",
        )


def _started(setting: Setting) -> _Worker:
    """Starts a worker: a fresh interpreter, which shares no state with this one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_main, args=(there, setting), daemon=True)
    with _one_thread_in_environment():
        process.start()
    # Nobody else may hold the worker's end: its closing is how its death is noticed.
    there.close()
    return _Worker(process, here)


def _assigned(worker: _Worker, job: _Job) -> bool:
    """Sends a job; False if the worker has died, which its connection will tell."""
    try:
        worker.connection.send(job.task)
    except OSError:
        worker.ready = False
        return False
    worker.job, worker.since = job, time.perf_counter()
    return True


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        try:
            return f"signal {signal.Signals(-exit_code).name}"
        except ValueError:
            return f"signal {-exit_code}"
    return f"exit code {exit_code}"


@contextmanager
def _one_thread_in_environment() -> Iterator[None]:
    """Sets the number of threads where numerical libraries read it when they are loaded."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(connection: Connection, setting: Setting) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The run's log keeps warnings; printed by many processes they would tear the progress display apart.
    warnings.showwarning = lambda *rest, **named: None
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Ctrl-C ends a study, and no run half-way: outside the main thread training does not listen to it.
    serving = threading.Thread(target=_serve, args=(connection, setting))
    serving.start()
    serving.join()


def _serve(connection: Connection, setting: Setting) -> None:
    from tqdm import tqdm

    from hrl_policies.study.runner import single_threaded

    single_threaded()
    # tqdm's own lock is a semaphore of the system, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())
    shelf = WorldShelf(setting)
    connection.send(_READY)
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(performed(task, shelf))


def _die_with_parent() -> None:
    """Ends the process at once when the study's process is gone, so that it writes nothing that nobody expects."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
