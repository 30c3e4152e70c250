"""Running of studies: makes worlds and purifiers, and does the runs that the study's folder does not hold yet."""

from __future__ import annotations

import shutil
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hrl_policies.study.config import PurifierIdentity, RunConfig, run_folder, unusual_worlds
from hrl_policies.study.engines import Engine, InProcessEngine, Task, WorkerPool
from hrl_policies.study.labels import RunRecord
from hrl_policies.study.loading import open_worlds
from hrl_policies.study.progress import StudyCallback, work_of
from hrl_policies.study.runner import RunResult, resume, train
from hrl_policies.study.store import (
    check_same_config,
    forget_failure,
    load_run,
    partial_folder,
    read_failure,
    reason_of,
    remove_leftovers,
    remove_partial,
    state_of,
    write_failure,
)
from hrl_policies.worlds import WorldPair, cached_purifier
from kuaifair_env.errors import KuaiFairError
from kuaifair_env.files import atomic_path, locked_folder
from kuaifair_env.registration import own_origins, register_origin

_MAX_WORLDS = 2
PURIFIERS = "purifiers"
"""Folder of a store with the purifiers that were pretrained for its runs."""


class FailedRunsError(KuaiFairError):
    """Runs of a study failed."""


@dataclass(frozen=True)
class StudyResult:
    """What became of a study: finished runs, as they were given, and tracebacks by name of the run that failed."""

    records: list[RunRecord]
    failures: Mapping[str, str]

    @property
    def reasons(self) -> dict[str, str]:
        """The last line of each traceback, by name of the run."""
        return {name: reason_of(traceback) for name, traceback in self.failures.items()}

    def raise_for_failures(self) -> StudyResult:
        """Returns the result itself if every run was finished.

        Raises:
            FailedRunsError: If a run failed; the message holds the first traceback.
        """
        if self.failures:
            name, traceback = next(iter(self.failures.items()))
            raise FailedRunsError(f"{len(self.failures)} runs failed; the first is {name}:\n{traceback}")
        return self


def run_study(
    runs: Sequence[RunConfig],
    store: str | Path,
    worlds: Mapping[str, WorldPair] | None = None,
    *,
    purifiers: Mapping[PurifierIdentity, str | Path] | None = None,
    engine: Engine | None = None,
    callback: StudyCallback | None = None,
    data_dir: str | Path | None = None,
    retry_failed: bool = False,
) -> StudyResult:
    """Does the runs that a store does not hold yet, and returns the records of all.

    A run is there whole or not at all, so a kill at any moment loses what was running, and the same call goes on. A
    run that raises, or whose process dies twice, is recorded as ``NAME.failed`` and does not hinder the others.
    Within this process, Ctrl-C keeps the run that is being trained as ``NAME.partial``, which the same call resumes.

    Args:
        runs: What to run; see :func:`~hrl_policies.study.spec.planned_runs` and
            :func:`~hrl_policies.study.checks.check_study`.
        store: Folder of the study.
        worlds: Worlds by name; those of environment ids are made.
        purifiers: Files of the purifiers that runs name; those that runs name by their mode alone are pretrained.
        engine: Where tasks run; None takes this process.
        callback: Is told of every run.
        data_dir: Folder with the official files.
        retry_failed: Whether to try again what failed in an earlier call.

    Raises:
        ArtifactError: If a run's folder holds another run, or another process works on the store.
        KeyboardInterrupt: If interrupted; call again to go on.
        ValueError: If the file of a purifier is missing.
    """
    root = Path(store).resolve()
    engine, callback = engine or InProcessEngine(), callback or StudyCallback()
    by_name = {str(run_folder(run)): run for run in runs}
    files = {identity: str(path) for identity, path in (purifiers or {}).items()}
    for name, run in by_name.items():
        if run.purifier is not None and run.purifier.hash and run.purifier not in files:
            raise ValueError(f"{name} needs the file of the purifier {run.purifier.name!r}")
    with locked_folder(root, "study"):
        remove_leftovers(root, by_name)
        if retry_failed:
            for name in by_name:
                forget_failure(root / name)
        states = {name: state_of(root / name) for name in by_name}
        missing = {name: run for name, run in by_name.items() if states[name] == "missing"}
        count = Counter(states.values())
        work = {name: work_of(run) for name, run in missing.items()}
        callback.on_study_start(work, count["done"], count["failed"])
        if missing:
            cache = WorldCache(worlds, data_dir)
            with engine.open(cache) as pool:
                _run_missing(pool, missing, cache, files, root, callback)
        remove_leftovers(root, by_name)
        return _stored_result(runs, root)


def _run_missing(
    pool: WorkerPool,
    runs: Mapping[str, RunConfig],
    cache: WorldCache,
    files: Mapping[PurifierIdentity, str],
    root: Path,
    callback: StudyCallback,
) -> None:
    # Caches on disk then hold what runs read. Where worlds cannot be made, each of their runs says so itself.
    tasks_of_worlds = (WorldTask(run) for run in runs.values() if run.world not in cache.worlds)
    worlds = {task.name: task for task in tasks_of_worlds}
    _run_tasks(pool, list(worlds.values()), callback)
    pretraining = {
        name: _purifier_task(run, root)
        for name, run in runs.items()
        if run.purifier is not None and not run.purifier.hash
    }
    unique_tasks = {task.name: task for task in pretraining.values()}
    broken = _run_tasks(pool, list(unique_tasks.values()), callback)
    identities = {
        name: replace(PurifierIdentity.of_file(task.target), name=task.mode)
        for name, task in unique_tasks.items()
        if name not in broken
    }
    tasks = []
    for name, run in runs.items():
        file = None if run.purifier is None else files.get(run.purifier)
        if name in pretraining:
            task = pretraining[name]
            if task.name in broken:
                write_failure(root / name, run, broken[task.name])
                callback.on_task_end(name, 0.0, broken[task.name])
                continue
            run, file = replace(run, purifier=identities[task.name]), task.target
        tasks.append(RunTask(name, run, str(root / name), file))
    for result in pool.run(tasks, callback.on_task_start):
        if result.error:
            write_failure(root / result.task, runs[result.task], result.error)
        callback.on_task_end(result.task, result.seconds, result.error)


def _run_tasks(pool: WorkerPool, tasks: Sequence[Task], callback: StudyCallback) -> dict[str, str]:
    """Runs tasks that come before the runs; returns the tracebacks of those that failed."""
    errors = {}
    for result in pool.run(tasks, callback.on_task_start):
        callback.on_task_end(result.task, result.seconds, result.error)
        if result.error:
            errors[result.task] = result.error
    return errors


def _purifier_task(run: RunConfig, root: Path) -> PurifierTask:
    assert run.purifier is not None
    # Worlds are part of the run folder's name, in a form that suits files.
    term = unusual_worlds(run.world_settings) + (f"-item-{run.item_term}" if run.item_term else "")
    target = root / PURIFIERS / f"{run_folder(run).parts[0]}{term}-{run.purifier.name}.safetensors"
    return PurifierTask(run, run.purifier.name, str(target))


def _stored_result(runs: Sequence[RunConfig], root: Path) -> StudyResult:
    records, failures = [], {}
    for run in runs:
        folder = root / run_folder(run)
        state = state_of(folder)
        if state == "done":
            # Read back, never taken from memory: tables are those of the files, however often a study was stopped.
            stored = load_run(folder)
            check_same_config(stored, run)
            records.append(RunRecord.of_run(stored))
        elif state == "failed":
            failures[str(run_folder(run))] = read_failure(folder)
    return StudyResult(records, failures)


class WorldCache:
    """The worlds that a process has made, the last few of them; pickled, it holds what it takes to make them again.

    Args:
        worlds: Worlds by name that are no environment ids.
        data_dir: Folder with the official files.
    """

    def __init__(self, worlds: Mapping[str, WorldPair] | None = None, data_dir: str | Path | None = None) -> None:
        self.worlds = dict(worlds or {})
        # Workers may have another working directory.
        self.data_dir = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
        # What was registered here is not known in other processes.
        self._own_origins = own_origins()
        self._cached: OrderedDict[str, WorldPair] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cached": OrderedDict()}

    def pair(self, config: RunConfig) -> WorldPair:
        """Returns the worlds of a run, with its item term.

        Raises:
            ValueError: If a name or setting is unknown.
            DataError: If they cannot be made.
        """
        world, settings, term = config.world, config.world_settings, config.item_term
        key = repr((world, sorted(settings.items()), term))
        if key not in self._cached:
            for origin in self._own_origins:
                register_origin(origin)
            own = self.worlds.get(world)
            if own is None:
                self._cached[key] = open_worlds(world, settings, term, self.data_dir)
            else:
                self._cached[key] = own.given_mode(term) if term and own.item_term is None else own
        self._cached.move_to_end(key)
        while len(self._cached) > _MAX_WORLDS:
            self._cached.popitem(last=False)
        return self._cached[key]


@dataclass(frozen=True)
class WorldTask:
    """Makes the worlds of a run, so that the caches on disk hold what it and others will read."""

    config: RunConfig

    @property
    def name(self) -> str:
        """What progress and failures call it."""
        return f"worlds of {self.config.world}{unusual_worlds(self.config.world_settings)}"

    def run(self, worlds: WorldCache) -> None:
        """Makes the worlds, and the click scorer of their controls."""
        _ = worlds.pair(self.config).scorer


@dataclass(frozen=True)
class PurifierTask:
    """Pretrains the purifier of a run in a mode, or takes it from the cache, and puts it into the store."""

    config: RunConfig
    mode: str
    target: str

    @property
    def name(self) -> str:
        """What progress and failures call it."""
        term = f" with the item term '{self.config.item_term}'" if self.config.item_term else ""
        return f"purifier '{self.mode}' of {self.config.world}{unusual_worlds(self.config.world_settings)}{term}"

    def run(self, worlds: WorldCache) -> None:
        """Makes it; a copy in the study's folder keeps the study whole when the cache goes."""
        if not Path(self.target).exists():
            path = cached_purifier(worlds.pair(self.config).train, self.mode)
            with atomic_path(self.target) as temporary:
                shutil.copyfile(path, temporary)


@dataclass(frozen=True)
class RunTask:
    """One run of a study, with its name for progress and failures, its run folder, and the file of its purifier."""

    name: str
    config: RunConfig
    folder: str
    purifier: str | None

    def run(self, worlds: WorldCache) -> None:
        """Trains and evaluates, or goes on with an interrupted run.

        Raises:
            ArtifactError: If there is an interrupted run with another configuration.
            KeyboardInterrupt: If training was interrupted; the run's folder says how far it came.
        """
        config, folder = self.config, Path(self.folder)
        pair = worlds.pair(config)
        partial = partial_folder(folder)
        try:
            if partial.exists():
                check_same_config(load_run(partial), config)
                result = resume(partial, pair)
            else:
                result = self._begin(pair)
        except Exception:
            # A worker that was thought dead may have finished the same run meanwhile.
            if not folder.exists():
                raise
            return
        if not result.complete:
            raise KeyboardInterrupt

    def _begin(self, pair: WorldPair) -> RunResult:
        try:
            return train(self.config, pair, purifier=self.purifier, output=self.folder)
        except MemoryError:
            # Tried again it begins anew, to the bytes that it would have ended in.
            remove_partial(partial_folder(Path(self.folder)))
            raise
