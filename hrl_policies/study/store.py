"""Run folders: written whole or not at all, read back without executing anything that is stored in them.

A finished run holds ``config.json``, ``versions.json``, ``provenance.json``, ``result.json``, ``sessions.csv``,
``timing.json``, ``log.txt``, for methods that learn ``learning_curve.csv`` and ``model.zip``, and
``purifier.safetensors`` where states were purified, with ``belief.safetensors`` where the purifier learned in training.
``SHA256SUMS`` has the checksums of all of them.
An interrupted run is called ``NAME.partial`` and holds ``progress.json`` (and ``replay.npz``, ``guard.zip``) instead of
results.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from hrl_policies.study.config import RunConfig
from hrl_policies.study.records import TRAIN_AGAIN, read_json, read_table, write_json, write_table
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import check_files, parse_as, remove_folder, temporary_beside, whole, write_checksums

FORMAT = 4
MODEL = "model.zip"
SESSION_TABLE = "sessions.csv"
PURIFIER = "purifier.safetensors"
BELIEF = "belief.safetensors"
"""The same purifier with what it learned of all users, for agents whose state is a belief."""
GUARD = "guard.zip"
"""State of the guard of a run that is interrupted."""
PARTIAL = ".partial"
FAILED = ".failed"
LOG = "log.txt"
TRACEBACK = "traceback.txt"

_CURVE = "learning_curve.csv"
_RECORDS = (
    "config.json",
    "versions.json",
    "provenance.json",
    "result.json",
    "progress.json",
    "timing.json",
    _CURVE,
)
_PACKAGES = (
    "kuaifair",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "gymnasium",
    "torch",
    "stable-baselines3",
    "sb3-contrib",
)

CurveRow = dict[str, float]
RunState = Literal["done", "failed", "missing"]


class _Fingerprint(BaseModel):
    id: str
    parts: dict[str, str]
    response: list[float]
    embeddings: list[float]


class _Data(BaseModel):
    name: str
    origin: str
    hash: str
    settings: dict[str, Any] = {}


class _World(BaseModel):
    data: _Data
    candidates: int
    response: dict[str, Any]
    fingerprint: _Fingerprint


class _Provenance(BaseModel):
    """What is read of ``provenance.json``."""

    train: _World
    test: _World


class _Result(BaseModel):
    """What is read of ``result.json``."""

    steps_done: int
    users: int
    summary: dict[str, float]


class _Progress(BaseModel):
    """What is read of ``progress.json``."""

    steps_done: int


@dataclass(frozen=True)
class StoredRun:
    """A run as it lies on disk, in its folder.

    Attributes:
        provenance: Both worlds' descriptions.
        versions: Of Python, packages and platform.
        result: ``result.json``; empty for an interrupted run.
        curve: Rows of the learning curve so far: training sessions, or the losses of an offline method.
        steps_done: Training steps taken.
        timing: Seconds and machine; empty for an interrupted run.
    """

    folder: Path
    config: RunConfig
    provenance: dict[str, Any]
    versions: dict[str, Any]
    result: dict[str, Any]
    curve: list[CurveRow]
    steps_done: int
    timing: dict[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the run was finished and evaluated."""
        return bool(self.result)

    @property
    def session_curve(self) -> list[CurveRow]:
        """Points of the curve that sum up training sessions; offline methods play none, their points are losses."""
        return [point for point in self.curve if "sessions" in point]

    @property
    def summary(self) -> dict[str, float]:
        """The headline figures by name.

        Raises:
            ArtifactError: If the run was interrupted.
        """
        if not self.complete:
            raise ArtifactError(f"{self.folder} was interrupted and has no result; resume it first")
        figures: dict[str, float] = self.result["summary"]
        return figures

    def check(self, *names: str) -> None:
        """Checks files of the folder, all without names, against their checksums.

        Raises:
            ArtifactError: If one was altered after it was written.
        """
        check_files(self.folder, names or None, TRAIN_AGAIN)

    def sessions(self) -> list[dict[str, Any]]:
        """Returns the per-session records of the evaluation, one dict each; raw user ids may be text."""
        self.check(SESSION_TABLE)
        return read_table(self.folder / SESSION_TABLE, ids=("user_id",))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives an empty temporary folder beside ``path`` that takes its name if all goes well.

    After an error, or a kill at any moment, there is no folder called ``path``.

    Raises:
        ArtifactError: If ``path`` exists already.
    """
    need_free(path)
    with temporary_beside(path) as temporary:
        temporary.mkdir()
        yield temporary
        need_free(path)
        os.replace(temporary, path)


def need_free(path: Path) -> None:
    """Checks that there is nothing at ``path``.

    Raises:
        ArtifactError: If there is.
    """
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists already; choose another output folder, or remove it")


def write_contents(
    folder: Path,
    config: RunConfig,
    provenance: Mapping[str, Any],
    curve: Sequence[CurveRow],
    save_model: Callable[[Path], None] | None,
    purifier: bytes | None = None,
) -> None:
    """Writes what every run folder holds, finished or interrupted, into a folder that is there.

    Args:
        folder: The folder.
        config: What was run.
        provenance: Both worlds' descriptions.
        curve: Rows of the learning curve so far.
        save_model: Writes the model into a folder; None for controls.
        purifier: Content of the purifier's file, if there is one.
    """
    write_json(folder / "config.json", config.as_dict())
    write_json(folder / "versions.json", versions())
    write_json(folder / "provenance.json", provenance)
    if purifier is not None:
        (folder / PURIFIER).write_bytes(purifier)
    if save_model is not None:
        save_model(folder)
        write_table(folder / _CURVE, curve)


def write_run(
    folder: Path,
    contents: Callable[[Path], None],
    result: Mapping[str, Any],
    sessions: Mapping[str, Any],
    timing: Mapping[str, Any],
    log: str,
) -> None:
    """Writes a finished run; see the module for what it holds.

    Raises:
        ArtifactError: If the folder exists already.
    """
    with new_folder(folder) as temporary:
        contents(temporary)
        write_json(temporary / "result.json", {"format": FORMAT, **result})
        (temporary / LOG).write_text(log, encoding="utf-8", newline="\n")
        write_json(temporary / "timing.json", {**timing, "machine": machine()})
        rows = zip(*(column.tolist() for column in sessions.values()), strict=True)
        write_table(temporary / SESSION_TABLE, [dict(zip(sessions, row, strict=True)) for row in rows])
        write_checksums(temporary)


def write_partial(folder: Path, contents: Callable[[Path], None], steps_done: int) -> None:
    """Writes an interrupted run in place of an earlier state of the same run."""
    earlier = _earlier(folder)
    with temporary_beside(folder) as temporary:
        temporary.mkdir()
        contents(temporary)
        write_json(temporary / "progress.json", {"format": FORMAT, "steps_done": steps_done})
        write_checksums(temporary)
        if folder.exists():
            remove_folder(earlier)
            os.replace(folder, earlier)
        os.replace(temporary, folder)
    remove_folder(earlier)


def remove_partial(folder: Path) -> None:
    """Removes an interrupted run that has been finished."""
    remove_folder(_earlier(folder))
    remove_folder(folder)


def partial_folder(target: Path) -> Path:
    """Returns the name of the folder of an interrupted run, and puts an earlier state there if no later one came."""
    folder = target.with_name(target.name + PARTIAL)
    if not folder.exists() and _earlier(folder).exists():
        os.replace(_earlier(folder), folder)
    return folder


def _earlier(folder: Path) -> Path:
    """Returns where the state of an interrupted run is while a later one takes its place."""
    return folder.with_name(f".{folder.name}.earlier")


def load_run(folder: str | Path) -> StoredRun:
    """Reads a run folder, finished or interrupted. The model stays on disk; see ``loading.load_policy``.

    Raises:
        ArtifactError: If the folder does not hold a run, or one of another format.
    """
    path = Path(folder)
    if path.is_file():
        raise ArtifactError(
            f"{path} is a file, and a run is a folder; a model file alone is not loaded, as what is pickled in it "
            "could execute code (kuaifair evaluate and serve take it with --trust)"
        )
    if not path.is_dir():
        raise ArtifactError(f"there is no run folder {path}")
    result, progress = (
        read_json(path / name) if (path / name).exists() else {} for name in ("result.json", "progress.json")
    )
    if not result and not progress:
        raise ArtifactError(f"{path} is not a run folder: it holds neither result.json nor progress.json")
    version = (result or progress).get("format")
    if version != FORMAT:
        raise ArtifactError(f"{path} has run format {version}; this version reads format {FORMAT}: {TRAIN_AGAIN}")
    check_files(path, _RECORDS, TRAIN_AGAIN)
    with whole(path / "result.json", "result of a run", TRAIN_AGAIN):
        steps_done = parse_as(_Result, result).steps_done if result else 0
    with whole(path / "progress.json", "state of a run", TRAIN_AGAIN):
        steps_done = steps_done if result else parse_as(_Progress, progress).steps_done
    provenance = read_json(path / "provenance.json")
    with whole(path / "provenance.json", "provenance of a run", TRAIN_AGAIN):
        parse_as(_Provenance, provenance)
    config = read_json(path / "config.json")
    with whole(path / "config.json", "configuration of a run of this version", TRAIN_AGAIN):
        return StoredRun(
            folder=path,
            config=RunConfig.from_dict(config),
            provenance=provenance,
            versions=read_json(path / "versions.json"),
            result=result,
            curve=read_table(path / _CURVE, columns=("steps",)) if (path / _CURVE).exists() else [],
            steps_done=steps_done,
            timing=read_json(path / "timing.json") if result else {},
        )


def stored_runs(store: str | Path) -> list[StoredRun]:
    """Returns all finished runs below a folder, in the order of their paths; raises as :func:`all_runs`."""
    return [load_run(folder) for folder in _folders_with(store, "result.json")]


def all_runs(store: str | Path) -> list[StoredRun]:
    """Returns all runs below a folder, finished and interrupted, in the order of their paths.

    Raises:
        ArtifactError: If there is no such folder, or a run folder is damaged.
    """
    folders = _folders_with(store, "result.json") + _folders_with(store, "progress.json")
    return [load_run(folder) for folder in sorted(folders)]


def failed_runs(store: str | Path) -> dict[str, str]:
    """Returns the tracebacks of the runs below a folder that failed, by name.

    Raises:
        ArtifactError: If there is no such folder.
    """
    return {
        folder.relative_to(store).as_posix().removesuffix(FAILED): read_failure(
            folder.with_name(folder.name.removesuffix(FAILED))
        ).strip()
        for folder in _folders_with(store, TRACEBACK)
    }


def _folders_with(store: str | Path, name: str) -> list[Path]:
    """Returns the folders that hold a file, in the order of their paths, without temporary ones."""
    root = Path(store)
    if not root.is_dir():
        raise ArtifactError(f"there is no folder {root}")
    return [
        path.parent
        for path in sorted(root.rglob(name))
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def state_of(folder: Path) -> RunState:
    """Returns what became of the run of a folder."""
    if folder.exists():
        return "done"
    return "failed" if failed_folder(folder).exists() else "missing"


def failed_folder(folder: Path) -> Path:
    """Returns where the failure of a run is recorded."""
    return folder.with_name(folder.name + FAILED)


def write_failure(folder: Path, config: RunConfig, traceback: str) -> None:
    """Records that a run failed, in place of an earlier record: its configuration and the traceback."""
    forget_failure(folder)
    with new_folder(failed_folder(folder)) as temporary:
        write_json(temporary / "config.json", config.as_dict())
        (temporary / TRACEBACK).write_text(traceback, encoding="utf-8", newline="\n")


def read_failure(folder: Path) -> str:
    """Returns the traceback of a run that failed.

    Raises:
        ArtifactError: If there is none.
    """
    path = failed_folder(folder) / TRACEBACK
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def forget_failure(folder: Path) -> None:
    """Removes the record of a failure, if there is one."""
    remove_folder(failed_folder(folder))


def reason_of(traceback: str) -> str:
    """Returns the last line of a traceback, which says what went wrong."""
    lines = traceback.strip().splitlines()
    return lines[-1] if lines else "no reason was recorded"


def remove_leftovers(store: Path, runs: Iterable[str]) -> None:
    """Removes what runs (by name) that were killed have left: temporary folders, and the state before their end.

    Only whoever holds the store's lock may do so.
    """
    known = set(runs)
    for run in known:
        if (store / run).exists() and partial_folder(store / run).exists():
            remove_partial(partial_folder(store / run))
    for parent in {Path(run).parent for run in known}:
        for path in (store / parent).glob(".*.tmp"):
            name = path.name[1:].removesuffix(".tmp").rpartition(".")[0].removesuffix(FAILED)
            if str(parent / name) in known:
                shutil.rmtree(path, ignore_errors=True)


def check_same_config(stored: StoredRun, config: RunConfig) -> None:
    """Checks that a folder holds the run of a configuration; a purifier that has no hash yet may be any of its name.

    Raises:
        ArtifactError: If settings differ; the message names them.
    """
    before, now = (json.loads(json.dumps(plan.as_dict())) for plan in (stored.config, config))
    if config.purifier is not None and not config.purifier.hash and before["purifier"] is not None:
        now["purifier"]["hash"] = before["purifier"]["hash"]
    different = sorted(name for name in now if before.get(name) != now[name])
    if different:
        raise ArtifactError(
            f"{stored.folder} holds a run with another configuration ({', '.join(different)} differ); "
            "use another store, or remove it"
        )


def versions() -> dict[str, Any]:
    """Returns the versions that a result depends on, JSON-able."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def machine() -> str:
    """Returns one line on the machine, for timings."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    size = f", {memory / 2**30:.0f} GiB memory" if memory else ""
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {platform.machine()}{size}, {platform.system()}, {python}"


@lru_cache(maxsize=len(_PACKAGES))
def _version(package: str) -> str | None:
    """Returns the version of a package as it was when first asked for, which is that of what was imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
