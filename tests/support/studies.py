"""Small stores of runs, for tables, figures and reports.

Small studies, worlds that break runs, and tasks that kill the process they run in.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers import TableResponse
from small_worlds import interrupted_pair, small_pair

from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.study import PurifierIdentity, RunConfig, plan_run, run_folder, run_study, train
from hrl_policies.study.checks import check_study
from hrl_policies.study.progress import StudyCallback
from hrl_policies.study.spec import StudySpec, parse_study
from hrl_policies.study.store import StoredRun
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig

LIKE_THE_PAPERS = "KuaiFair-KuaiRecTwin-v0"
OWN = "small"
SEEDS = (11, 15, 19)
MAX_LENS = (8, 30)
CONTROLS = ("random", "quota-greedy", "oracle")
ERROR = "ValueError: a rate is <positive>, got -1"


def pairs() -> dict[str, WorldPair]:
    """Two pairs of small worlds; one bears the name of a twin, so that the paper has figures for it."""
    return {name: small_pair(name=name, seed=seed) for seed, name in enumerate((LIKE_THE_PAPERS, OWN))}


def write_comparison_store(folder: Path) -> Path:
    """Writes A2C and controls in two worlds at two horizons; in one world also HRL, and A2C on purified states."""
    path = folder / "ips.safetensors"
    save_purifier(IPSPurifier(), path)
    ips = PurifierIdentity.of_file(path)
    runs = []
    for session in (SessionConfig(max_len=max_len) for max_len in MAX_LENS):
        for seed in SEEDS:
            runs += [
                a2c(LIKE_THE_PAPERS, seed, session),
                a2c(LIKE_THE_PAPERS, seed, session, ips),
                a2c(OWN, seed, session),
                plan_run("hrl", LIKE_THE_PAPERS, seed=seed, session=session, total_steps=256, n_envs=8),
            ]
        runs += [plan_run(name, world, session=session) for world in (LIKE_THE_PAPERS, OWN) for name in CONTROLS]
    run_study(runs, folder / "store", pairs(), purifiers={ips: path}).raise_for_failures()
    return folder / "store"


def write_report_store(folder: Path, store: Path) -> Path:
    """Copies the runs of one world, and adds an interrupted run and a failed one."""
    shutil.copytree(store / OWN, folder / OWN)
    stopped = a2c(OWN, 23, SessionConfig())
    result = train(stopped, interrupted_pair(at=20), output=folder / run_folder(stopped))
    assert not result.complete
    failed = folder / OWN / "td3-len30-k10-seed11.failed"
    failed.mkdir()
    (failed / "traceback.txt").write_text(
        f'Traceback (most recent call last):\n  File "x.py", line 1\n{ERROR}\n', encoding="utf-8"
    )
    return folder


def a2c(world: str, seed: int, session: SessionConfig, purifier: PurifierIdentity | None = None) -> RunConfig:
    """A2C as it is trained in these stores."""
    return plan_run(
        "a2c",
        world,
        seed=seed,
        session=session,
        total_steps=256,
        n_envs=8,
        overrides={"n_steps": 8},
        purifier=purifier,
    )


def runs_of(
    runs: Sequence[StoredRun],
    method: str,
    world: str = LIKE_THE_PAPERS,
    max_len: int = 30,
    purified: bool = False,
) -> list[StoredRun]:
    """Returns the seeds of one method on one task."""
    return [
        run
        for run in runs
        if (run.config.method, run.config.world, run.config.session.max_len) == (method, world, max_len)
        and (run.config.purifier is not None) == purified
    ]


A2C = {"name": "a2c", "steps": 128, "set": {"n_steps": 2}}


def study(**settings: Any) -> StudySpec:
    """A study of a tiny A2C and two controls in the small world."""
    content = {
        "name": "small study",
        "methods": [A2C, "random", "quota-greedy"],
        "worlds": ["small"],
        "max_lens": [10],
        "seeds": [3, 4],
        "n_users": 15,
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


# What is typed after `kuaifair`.
ENV = ["--env", "KuaiFair-Toy-v0"]


TRAIN = [
    "train",
    "--method",
    "a2c",
    "--env",
    "KuaiFair-Toy-v0",
    "--steps",
    "256",
    "--n-envs",
    "8",
    "--no-progress",
]
