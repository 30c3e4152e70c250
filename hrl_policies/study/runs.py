"""Conducts a study: sees to worlds and purifiers, has the runs done that are missing, and tabulates them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hrl_policies.study.cells import stored_record
from hrl_policies.study.config import PurifierIdentity
from hrl_policies.study.engines import Engine, Setting, Started, Task, WorkerPool, data_dir_text
from hrl_policies.study.folders import (
    forget_failure,
    read_failure,
    reason_of,
    remove_leftovers,
    state_of,
    study_lock,
    write_failure,
    write_study,
)
from hrl_policies.study.outputs import write_outputs
from hrl_policies.study.progress import work_of
from hrl_policies.study.spec import PlannedRun
from hrl_policies.study.store import RunRecord, load_run
from hrl_policies.study.tasks import PurifierTask, RunTask, WorldTask
from hrl_policies.worlds import WorldPair

PURIFIERS = "purifiers"
"""Folder of a store with the purifiers of its runs."""


class Watch(Protocol):
    """Whoever wants to know how a study gets on."""

    def planned(self, weights: Mapping[str, float], done: int, failed: int) -> None:
        """The runs that are left, with how much work each is believed to be; how many were done before, or failed."""

    def started(self, name: str) -> None:
        """A task has begun."""

    def ended(self, name: str, seconds: float, error: str) -> None:
        """A task is over; ``error`` is empty if all went well."""


@dataclass(frozen=True)
class StudyResult:
    """What became of a study.

    Attributes:
        records: Finished runs, in the order of the plan.
        failures: Traceback by run that failed.
        files: What was written about them all.
    """

    records: tuple[RunRecord, ...]
    failures: Mapping[str, str]
    files: tuple[Path, ...]


def conduct(
    runs: Sequence[PlannedRun],
    store: str | Path,
    engine: Engine,
    watch: Watch,
    *,
    command: str,
    worlds: Mapping[str, WorldPair] | None = None,
    data_dir: str | Path | None = None,
    retry_failed: bool = False,
) -> StudyResult:
    """Has every run of a study done that its store does not hold yet, and writes the tables of all.

    A run is there whole or not at all, so a kill at any moment loses what was running, and the same call goes on. A
    run that raises, or whose process dies twice, is recorded as ``NAME.failed`` and does not hinder the others.

    Args:
        runs: All runs of one study; see :func:`hrl_policies.study.checks.check_study`.
        store: Its folder.
        engine: What does the runs.
        watch: Is told of everything.
        command: The command that makes the study, for the tables.
        worlds: Worlds by name that are no environment ids.
        data_dir: Folder with the official files, instead of the study's.
        retry_failed: Whether to try again what failed in an earlier call.

    Raises:
        ArtifactError: If the store holds another study, or another process works on it.
        KeyboardInterrupt: If interrupted; call again to go on.
    """
    root, spec = Path(store).resolve(), runs[0].spec
    where = data_dir_text(data_dir or spec.data_dir)
    setting = Setting(worlds or {}, where)
    named = {str(run.folder): run for run in runs}
    with study_lock(root):
        command = write_study(root, spec.as_dict() | {"data_dir": where}, command)
        remove_leftovers(root, named)
        if retry_failed:
            for name in named:
                forget_failure(root / name)
        states = {name: state_of(root / name) for name in named}
        left = {name: run for name, run in named.items() if states[name] == "missing"}
        count = Counter(states.values())
        watch.planned({name: work_of(run) for name, run in left.items()}, count["done"], count["failed"])
        if left:
            with engine.open(setting) as pool:
                _run_all(pool, left, setting, root, watch)
        remove_leftovers(root, named)
        return _result(named, root, command)


def _run_all(
    pool: WorkerPool, left: Mapping[str, PlannedRun], setting: Setting, root: Path, watch: Watch
) -> None:
    _perform(pool, _world_tasks(left.values(), setting), watch)
    purifiers = {name: task for name, run in left.items() if (task := _purifier_task(run, root)) is not None}
    pretraining = {task.name: task for task in purifiers.values()}
    broken = _perform(pool, list(pretraining.values()), watch)
    identities = {
        name: PurifierIdentity.of_file(task.target)
        for name, task in pretraining.items()
        if name not in broken
    }
    tasks, configs = [], {}
    for name, run in left.items():
        task = purifiers.get(name)
        if task is not None and task.name in broken:
            write_failure(root / name, run.config(), broken[task.name])
            watch.ended(name, 0.0, broken[task.name])
            continue
        configs[name] = run.config(None if task is None else identities[task.name])
        tasks.append(RunTask(configs[name], str(root / name), None if task is None else task.target, name))
    for event in pool.run(tasks):
        if isinstance(event, Started):
            watch.started(event.task)
            continue
        if event.error:
            write_failure(root / event.task, configs[event.task], event.error)
        watch.ended(event.task, event.seconds, event.error)


def _perform(pool: WorkerPool, tasks: Sequence[Task], watch: Watch) -> dict[str, str]:
    """Has tasks done that come before the runs; returns the tracebacks of those that failed."""
    broken = {}
    for event in pool.run(tasks):
        if isinstance(event, Started):
            watch.started(event.task)
            continue
        watch.ended(event.task, event.seconds, event.error)
        if event.error:
            broken[event.task] = event.error
    return broken


def _world_tasks(runs: Iterable[PlannedRun], setting: Setting) -> list[WorldTask]:
    """Returns the worlds to make first; where that fails, each run says so itself."""
    spec = next(iter(runs)).spec
    names = dict.fromkeys(run.world for run in runs if run.world not in setting.worlds)
    return [WorldTask(name, spec.world_settings, spec.item_term) for name in names]


def _purifier_task(run: PlannedRun, root: Path) -> PurifierTask | None:
    if not run.purifier:
        return None
    spec = run.spec
    # Worlds are part of the run folder's name, in a form that suits files.
    term = f"-item-{spec.item_term}" if spec.item_term else ""
    target = root / PURIFIERS / f"{run.folder.parts[0]}{term}-{run.purifier}.safetensors"
    return PurifierTask(run.world, spec.world_settings, spec.item_term, run.purifier, str(target))


def _result(named: Mapping[str, PlannedRun], root: Path, command: str) -> StudyResult:
    records, failures = [], {}
    for name, run in named.items():
        state = state_of(root / name)
        if state == "done":
            # Read back, never taken from memory: tables are those of the files, however often a study was stopped.
            stored = load_run(root / name)
            records.append(stored_record(run.config(stored.config.purifier), root / name))
        elif state == "failed":
            failures[name] = read_failure(root / name)
    reasons = {name: reason_of(text) for name, text in failures.items()}
    return StudyResult(tuple(records), failures, tuple(write_outputs(root, records, reasons, command)))
