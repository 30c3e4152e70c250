"""Engines: where the runs of a study are done. All of them give the same numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hrl_policies.worlds import WorldPair


_KEPT_WORLDS = 2


@dataclass(frozen=True)
class Setting:
    """What every worker knows from the start.

    Attributes:
        worlds: Worlds by name that are no environment ids.
        data_dir: Folder with the official files.
    """

    worlds: Mapping[str, WorldPair] = field(default_factory=dict)
    data_dir: str | None = None


class WorldShelf:
    """The worlds that a process has made, the last few of them.

    Args:
        setting: Where they come from.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._held: OrderedDict[str, WorldPair] = OrderedDict()

    def pair(self, world: str, settings: Mapping[str, object], item_term: str) -> WorldPair:
        """Returns the worlds of a run, with its item term.

        Raises:
            ValueError: If a name or setting is unknown.
            DataError: If they cannot be made.
        """
        from hrl_policies.study.runner import open_worlds

        key = repr((world, sorted(settings.items()), item_term))
        if key not in self._held:
            given = self.setting.worlds.get(world)
            if given is None:
                made = open_worlds(world, settings, item_term, self.setting.data_dir)
            else:
                made = given.given_mode(item_term) if item_term else given
            self._held[key] = made
        self._held.move_to_end(key)
        while len(self._held) > _KEPT_WORLDS:
            self._held.popitem(last=False)
        return self._held[key]


class Task(Protocol):
    """Something to do in a worker; it can be pickled, and doing it twice does no harm."""

    @property
    def name(self) -> str:
        """What progress and failures call it."""

    def perform(self, shelf: WorldShelf) -> None:
        """Does it; its result is what it writes."""


@dataclass(frozen=True)
class Started:
    """A task has begun.

    Attributes:
        task: Its name.
    """

    task: str


@dataclass(frozen=True)
class Ended:
    """A task is over.

    Attributes:
        task: Its name.
        seconds: How long it took.
        error: The traceback, or how its worker died; empty if all went well.
    """

    task: str
    seconds: float
    error: str = ""


Event = Started | Ended


class WorkerPool(Protocol):
    """Workers that are there."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        """Does every task, in no certain order, and says when each starts and ends.

        A task that raises ends with its traceback; one whose worker dies is tried again once. The others go on.
        """


class Engine(Protocol):
    """A way of doing many tasks. Results do not depend on which, nor on the number of workers."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""

    def open(self, setting: Setting) -> AbstractContextManager[WorkerPool]:
        """Gives workers, and sends them home at the end; whatever they are doing then is lost."""


def performed(task: Task, shelf: WorldShelf) -> Ended:
    """Does a task and says how it went; only what is no ``Exception`` (Ctrl-C) goes through."""
    start = time.perf_counter()
    try:
        task.perform(shelf)
    except Exception:
        return Ended(task.name, time.perf_counter() - start, traceback.format_exc())
    return Ended(task.name, time.perf_counter() - start)


def data_dir_text(data_dir: str | Path | None) -> str | None:
    """Returns a folder as a worker in another working directory understands it."""
    return None if data_dir is None else str(Path(data_dir).expanduser().resolve())


@dataclass(frozen=True)
class InsideEngine:
    """Runs tasks in the calling process, on one numerical thread."""

    @property
    def workers(self) -> int:
        """One."""
        return 1

    @contextmanager
    def open(self, setting: Setting) -> Iterator[WorkerPool]:
        """Gives the calling process as the only worker."""
        from hrl_policies.study.runner import single_threaded

        single_threaded()
        yield _Inside(WorldShelf(setting))


@dataclass(frozen=True)
class _Inside:
    shelf: WorldShelf

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        for task in tasks:
            yield Started(task.name)
            yield performed(task, self.shelf)


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
    def open(self, setting: Setting) -> Iterator[WorkerPool]:
        """Gives the processes, which start when there is something to do."""
        pool = _Pool(self.workers, setting)
        try:
            yield pool
        finally:
            pool.stop()


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


_RETRIES = 2
_PATIENCE_ray_engine = 1.0


@dataclass(frozen=True)
class RayEngine:
    """Runs tasks on a Ray cluster.

    Only configurations travel, and worlds of one's own; results go to the study's folder, which must be on a file
    system that every machine has under the same path. Ray tries a task again whose worker or machine dies.

    Attributes:
        address: Of a running cluster (``"auto"``, ``"ray://host:10001"``); None starts one on this machine, unless
            this process is connected already.
        count: How many tasks run at once; None takes the cluster's cores.
    """

    address: str | None = None
    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"need at least 1 worker, got {self.count}")
        _ray()

    @property
    def workers(self) -> int:
        """How many tasks run at once, as far as that is known before there is a cluster."""
        ray = _ray()
        if self.count is not None:
            return self.count
        return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else cores()

    @contextmanager
    def open(self, setting: Setting) -> Iterator[WorkerPool]:
        """Connects to the cluster, or starts one, which then ends with the study."""
        ray = _ray()
        own = not ray.is_initialized()
        if own:
            here = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, configure_logging=False, **here)
        try:
            yield _Cluster(ray, self, ray.put(_Sent(setting)))
        finally:
            if own:
                ray.shutdown()


class _Sent:
    """A setting in Ray's object store, told apart from others by its identity there."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting


@dataclass
class _Cluster:
    ray: Any
    engine: RayEngine
    setting: Any
    running: dict[Any, tuple[Task, float]] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        # Workers are idempotent: what a dead one had finished is found done by the next try.
        remote = self.ray.remote(
            num_cpus=1,
            max_retries=_RETRIES,
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, "1")},
        )(_perform)
        waiting = deque(tasks)
        try:
            while waiting or self.running:
                # No more than can run at once are handed over, so that a task that has started is really running.
                while waiting and len(self.running) < self.engine.workers:
                    task = waiting.popleft()
                    reference = remote.remote(task, [self.setting])
                    self.running[reference] = (task, time.perf_counter())
                    yield Started(task.name)
                done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_PATIENCE_ray_engine)
                for reference in done:
                    yield self._result(reference)
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            self.running.clear()

    def _result(self, reference: Any) -> Ended:
        task, since = self.running.pop(reference)
        try:
            ended = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            why = f"the run's Ray task failed, after {_RETRIES + 1} tries where its worker died: {error}\n"
            return Ended(task.name, time.perf_counter() - since, why)
        assert isinstance(ended, Ended)
        return ended


def _perform(task: Task, setting: list[Any]) -> Ended:
    """What a Ray worker does; the setting comes as a reference, which is opened once in each process."""
    import warnings

    # The run's log keeps warnings.
    warnings.showwarning = lambda *rest, **named: None
    return performed(task, _shelf(setting[0]))


@lru_cache(maxsize=1)
def _shelf(reference: Any) -> WorldShelf:
    from hrl_policies.study.runner import single_threaded

    single_threaded()
    return WorldShelf(_ray().get(reference).setting)


def _ray() -> Any:
    """Imports Ray.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module("ray")
    except ImportError:
        raise ValueError(
            "the ray engine needs Ray, which is not installed: pip install 'kuaifair[ray]', or take the local engine"
        ) from None


__all__ = [
    "Ended",
    "Engine",
    "Event",
    "InsideEngine",
    "LocalEngine",
    "RayEngine",
    "Setting",
    "Started",
    "Task",
    "WorkerPool",
    "WorldShelf",
]
