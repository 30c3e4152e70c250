"""Small studies, worlds that break runs, and tasks that kill the process they run in."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import TableResponse
from worlds_for_tests import small_pair

from hrl_policies.study.checks import check_study
from hrl_policies.study.progress import StudyCallback
from hrl_policies.study.spec import StudySpec, parse_study
from hrl_policies.worlds import WorldPair

A2C = {"name": "a2c", "steps": 128, "set": {"n_steps": 2}}


def study(**settings: Any) -> StudySpec:
    """A study of a tiny A2C and two controls in the small world."""
    content = {
        "name": "small study",
        "methods": [A2C, "random", "quota-greedy"],
        "worlds": ["small"],
        "max_lens": [10],
        "seeds": [3, 4],
        "users": 15,
    }
    spec, problems = parse_study(content | settings)
    assert not problems, problems
    return spec


def problems_of(content: dict[str, Any], worlds: Mapping[str, WorldPair] | None = None) -> tuple[str, ...]:
    """Everything that is said to be wrong with a study."""
    from hrl_policies.study.spec import StudyError

    spec, problems = parse_study(content)
    try:
        check_study(spec, problems, worlds=worlds)
    except StudyError as error:
        return error.problems
    return ()


class Raising(TableResponse):
    """Raises when somebody asks what users like."""

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        raise RuntimeError("the users went home")


class Killing(TableResponse):
    """Kills the process that asks what users like, as the system does when memory runs out: the first ``times``."""

    def __init__(self, table: Any, notes: str, times: int) -> None:
        super().__init__(table)
        self.notes, self.times = notes, times

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        die_the_first(self.times, Path(self.notes))
        return super().expected(users, items, history)


def die_the_first(times: int, notes: Path) -> None:
    """Kills this process unless ``times`` processes were killed already, as a file says."""
    with notes.open("a") as stream:
        if stream.tell() < times:
            stream.write("x")
            stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def raising_pair(name: str) -> WorldPair:
    """The small worlds, in which nobody can be evaluated."""
    pair = small_pair(name=name)
    return replace(pair, test=replace(pair.test, response=Raising(pair.test.response.table)))


def killing_pair(name: str, notes: Path, times: int) -> WorldPair:
    """The small worlds, in which the first processes that evaluate are killed."""
    pair = small_pair(name=name)
    response = Killing(pair.test.response.table, str(notes), times)
    return replace(pair, test=replace(pair.test, response=response))


@dataclass(frozen=True)
class Writes:
    """Writes the id of its process, and the largest number of threads of any of its numerical libraries."""

    name: str
    folder: str

    def run(self, worlds: Any) -> None:
        # Libraries that a task loads late must be bound by the environment: nobody limits them afterwards.
        import scipy.linalg  # noqa: F401
        import sklearn.cluster  # noqa: F401
        import torch
        from threadpoolctl import threadpool_info

        threads = max(torch.get_num_threads(), *(library["num_threads"] for library in threadpool_info()))
        (Path(self.folder) / self.name).write_text(f"{os.getpid()} {threads} {os.environ.get('OMP_NUM_THREADS')}")


@dataclass(frozen=True)
class Raises:
    """Raises."""

    name: str

    def run(self, worlds: Any) -> None:
        raise LookupError(f"{self.name} found nothing")


@dataclass(frozen=True)
class Dies:
    """Kills its process the first ``times``, then writes."""

    name: str
    folder: str
    times: int

    def run(self, worlds: Any) -> None:
        die_the_first(self.times, Path(self.folder) / f"{self.name}.deaths")
        (Path(self.folder) / self.name).write_text("survived")


class Unloadable:
    """Ends the process that unpickles it, as an import that crashes does."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class RecordingCallback(StudyCallback):
    """A callback that remembers."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.errors: dict[str, str] = {}
        self.work: dict[str, float] = {}
        self.before = (0, 0)

    def on_study_start(self, work: Mapping[str, float], done: int, failed: int) -> None:
        self.work, self.before = dict(work), (done, failed)

    def on_task_start(self, name: str) -> None:
        self.started.append(name)

    def on_task_end(self, name: str, seconds: float, error: str) -> None:
        self.errors[name] = error
