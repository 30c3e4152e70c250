"""Engines: where the tasks of a study run. All of them give the same results, whatever the number of workers."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

from joblib.externals.loky import ProcessPoolExecutor, cpu_count

from hrl_policies.study.runner import single_threaded

OnStart = Callable[[str], None]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Where numerical libraries read, when they are loaded, how many threads to start."""

_ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")
_MAX_TRIES = 2
_MAX_FAILED_STARTS = 3
_RAY_RETRIES = 2
_RAY_POLL_SECONDS = 1.0
_PARENT_POLL_SECONDS = 0.5


class Task(Protocol):
    """Something to do in a worker; it can be pickled, and doing it twice does no harm."""

    @property
    def name(self) -> str:
        """What progress and failures call it."""

    def run(self, context: Any) -> None:
        """Does it; its result is what it writes.

        Args:
            context: What :meth:`Engine.open` was given, a copy in each process.
        """


@dataclass(frozen=True)
class TaskResult:
    """How a task went: its name, its seconds, and the traceback, or how its worker died (empty if all went well)."""

    task: str
    seconds: float
    error: str = ""


class WorkerPool(Protocol):
    """Workers that are ready for tasks."""

    def run(self, tasks: Sequence[Task], on_start: OnStart) -> Iterator[TaskResult]:
        """Runs every task, in no certain order, and yields how each went as soon as it ends.

        A task that raises gives its traceback; one whose worker dies is tried again. The others go on.

        Args:
            tasks: What to run.
            on_start: Called with the name of each task that starts.
        """


class Engine(Protocol):
    """A way of running many tasks. Results do not depend on which, nor on the number of workers."""

    @property
    def workers(self) -> int:
        """Returns how many tasks run at once."""

    def open(self, context: Any) -> AbstractContextManager[WorkerPool]:
        """Opens a pool of workers and stops it at the end; whatever runs then is lost.

        Args:
            context: What every task is given, such as the worlds that runs share; it can be pickled.
        """


def perform_task(task: Task, context: Any) -> TaskResult:
    """Performs a task and returns how it went; only what is no ``Exception`` (Ctrl-C) goes through."""
    start, error = time.perf_counter(), ""
    try:
        task.run(context)
    except Exception:
        error = traceback.format_exc()
    return TaskResult(task.name, time.perf_counter() - start, error)


@dataclass(frozen=True)
class InProcessEngine:
    """Runs tasks one after the other in the calling process, on one numerical thread."""

    workers = 1

    @contextmanager
    def open(self, context: Any) -> Iterator[WorkerPool]:
        """Opens a pool of the calling process alone."""
        single_threaded()
        yield _InProcessPool(context)


@dataclass(frozen=True)
class _InProcessPool:
    context: Any

    def run(self, tasks: Sequence[Task], on_start: OnStart) -> Iterator[TaskResult]:
        for task in tasks:
            on_start(task.name)
            yield perform_task(task, self.context)


def _need_workers(count: int | None) -> None:
    if count is not None and count < 1:
        raise ValueError(f"need at least 1 worker, got {count}")


@dataclass(frozen=True)
class LocalEngine:
    """Runs tasks in processes of this machine.

    Attributes:
        count: Number of processes; None takes one for each core.
    """

    count: int | None = None

    def __post_init__(self) -> None:
        _need_workers(self.count)

    @property
    def workers(self) -> int:
        """Returns the number of processes."""
        return cpu_count() if self.count is None else self.count

    @contextmanager
    def open(self, context: Any) -> Iterator[WorkerPool]:
        """Opens a pool of processes, which start when there is something to do."""
        pool = _ProcessPool(self.workers, context)
        try:
            yield pool
        finally:
            pool.stop()


@dataclass
class _Attempt:
    task: Task
    tries: int = 0
    since: float = 0.0


class _Worker:
    """One process, in an executor of its own: its death breaks nobody else's tasks, and says which task it had.

    It has started when it has finished its imports; the future is that of its start, or of what it runs.
    """

    def __init__(self, context: Any) -> None:
        self._executor = ProcessPoolExecutor(
            max_workers=1, initializer=_start_worker, initargs=(context, os.getpid()), env=_ONE_THREAD
        )
        self.started = False
        self.attempt: _Attempt | None = None
        self.future: Future[Any] | None = self._executor.submit(os.getpid)

    def run(self, attempt: _Attempt) -> None:
        attempt.tries += 1
        attempt.since = time.perf_counter()
        self.attempt = attempt
        try:
            self.future = self._executor.submit(_perform_in_worker, attempt.task)
        except BrokenProcessPool as error:
            self.future = Future()
            self.future.set_exception(error)

    def stop(self) -> None:
        self._executor.shutdown(kill_workers=True)


@dataclass
class _ProcessPool:
    count: int
    context: Any
    workers: list[_Worker] = field(default_factory=list)
    failed_starts: int = 0

    def run(self, tasks: Sequence[Task], on_start: OnStart) -> Iterator[TaskResult]:
        waiting = deque(_Attempt(task) for task in tasks)
        while waiting or self._busy():
            while len(self.workers) < min(self.count, len(waiting) + self._busy()):
                self.workers.append(_Worker(self.context))
            for worker in self.workers:
                if waiting and worker.future is None:
                    attempt = waiting.popleft()
                    worker.run(attempt)
                    on_start(attempt.task.name)
            wait([worker.future for worker in self.workers if worker.future], return_when=FIRST_COMPLETED)
            for worker in [worker for worker in self.workers if worker.future and worker.future.done()]:
                yield from self._collect(worker, waiting)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        self.workers.clear()

    def _busy(self) -> int:
        return sum(worker.attempt is not None for worker in self.workers)

    def _collect(self, worker: _Worker, waiting: deque[_Attempt]) -> Iterator[TaskResult]:
        assert worker.future is not None
        try:
            result = worker.future.result()
        except BrokenProcessPool as error:
            yield from self._replace(worker, waiting, " ".join(str(error).split()))
            return
        worker.future = None
        if worker.attempt is None:
            worker.started, self.failed_starts = True, 0
        else:
            worker.attempt = None
            yield result

    def _replace(self, worker: _Worker, waiting: deque[_Attempt], reason: str) -> Iterator[TaskResult]:
        """Drops a worker that has died, and lets its task be tried again unless it was tried often enough."""
        worker.stop()
        self.workers.remove(worker)
        if not worker.started:
            self.failed_starts += 1
            if self.failed_starts >= _MAX_FAILED_STARTS:
                raise RuntimeError(
                    f"worker processes do not start, {self.failed_starts} in a row; see what they printed: {reason}"
                )
        attempt = worker.attempt
        if attempt is None:
            return
        if attempt.tries < _MAX_TRIES:
            waiting.appendleft(attempt)
            return
        yield TaskResult(
            attempt.task.name,
            time.perf_counter() - attempt.since,
            f"the process of the run died {attempt.tries} times, as it does when memory runs out: {reason}\n",
        )


_context: Any = None
"""The context of a worker process, as :func:`_start_worker` was given it."""


def _start_worker(context: Any, parent_id: int) -> None:
    """Prepares a worker process: one numerical thread, no output of its own, no life without its parent."""
    import signal

    from tqdm import tqdm

    global _context
    _context = context
    # Ctrl-C is for the process of the study, which kills its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, args=(parent_id,), daemon=True).start()
    single_threaded()
    # The run's log keeps warnings; printed by many processes they would tear the progress display apart.
    warnings.showwarning = lambda *arguments, **options: None
    # tqdm's own lock is a semaphore of the system, which a killed process leaves behind.
    tqdm.set_lock(threading.RLock())


def _perform_in_worker(task: Task) -> TaskResult:
    return perform_task(task, _context)


def _exit_with_parent(parent_id: int) -> None:
    """Ends the process soon after its parent, so that it writes nothing that nobody expects."""
    if sys.platform == "win32":
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
    else:
        while os.getppid() == parent_id:
            time.sleep(_PARENT_POLL_SECONDS)
    os._exit(1)


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
        _need_workers(self.count)
        _import_ray()

    @property
    def workers(self) -> int:
        """Returns how many tasks run at once, as far as that is known before there is a cluster."""
        ray = _import_ray()
        if self.count is not None:
            return self.count
        return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else cpu_count()

    @contextmanager
    def open(self, context: Any) -> Iterator[WorkerPool]:
        """Connects to the cluster, or starts one, which then ends with the study."""
        ray = _import_ray()
        own = not ray.is_initialized()
        if own:
            local = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
            ray.init(address=self.address, log_to_driver=False, configure_logging=False, **local)
        try:
            yield _RayPool(ray, self.workers, ray.put(context))
        finally:
            if own:
                ray.shutdown()


@dataclass
class _RayPool:
    ray: Any
    count: int
    context: Any
    running: dict[Any, tuple[Task, float]] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task], on_start: OnStart) -> Iterator[TaskResult]:
        perform = self.ray.remote(num_cpus=1, max_retries=_RAY_RETRIES, runtime_env={"env_vars": _ONE_THREAD})(
            _perform_in_ray
        )
        waiting = deque(tasks)
        try:
            while waiting or self.running:
                # No more than can run at once are submitted, so that a task that has started is really running.
                while waiting and len(self.running) < self.count:
                    task = waiting.popleft()
                    self.running[perform.remote(task, [self.context])] = (task, time.perf_counter())
                    on_start(task.name)
                done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_RAY_POLL_SECONDS)
                for reference in done:
                    yield self._result(reference)
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
            self.running.clear()

    def _result(self, reference: Any) -> TaskResult:
        task, since = self.running.pop(reference)
        try:
            ended: TaskResult = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            reason = f"the run's Ray task failed, after {_RAY_RETRIES + 1} tries where its worker died: {error}\n"
            return TaskResult(task.name, time.perf_counter() - since, reason)
        return ended


def _perform_in_ray(task: Task, context: list[Any]) -> TaskResult:
    """Performs a task in a Ray worker; in a list, the reference of the context is not resolved for every task."""
    # The run's log keeps warnings.
    warnings.showwarning = lambda *arguments, **options: None
    return perform_task(task, _ray_context(context[0]))


@lru_cache(maxsize=1)
def _ray_context(reference: Any) -> Any:
    single_threaded()
    return _import_ray().get(reference)


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise ValueError(
            "the ray engine needs Ray, which is not installed: pip install 'kuaifair[ray]', or take the local engine"
        ) from None
