"""The engine of many machines: the same tasks as Ray tasks, over a folder that all machines share."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

from hrl_policies.study.engines.base import Crew, Ended, Event, Setting, Started, Task, WorldShelf, performed
from hrl_policies.study.engines.local import THREAD_VARIABLES, cores

_RETRIES = 2
_PATIENCE = 1.0


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
    def open(self, setting: Setting) -> Iterator[Crew]:
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
                done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=_PATIENCE)
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
