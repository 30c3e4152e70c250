"""The folder of a study: which runs are done, failed or missing, and who works on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from hrl_policies.study.config import RunConfig
from hrl_policies.study.spec import StudySpec
from hrl_policies.study.store import new_folder, read_json, write_json
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import atomic_path

FAILED = ".failed"
STUDY = "study.json"
TRACEBACK = "traceback.txt"

_LOCK = ".lock"
_FORMAT = 2

RunState = Literal["done", "failed", "missing"]


@contextmanager
def study_lock(store: Path) -> Iterator[None]:
    """Keeps a second study process out of a store; the system lets go of the lock when its holder dies.

    Raises:
        ArtifactError: If another process works on the store.
    """
    store.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(store / _LOCK).acquire(blocking=False)
    except Timeout:
        raise ArtifactError(
            f"another process works on the study in {store}; wait for it, or stop it"
        ) from None
    with lock:
        yield


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
    shutil.rmtree(failed_folder(folder), ignore_errors=True)


def reason_of(traceback: str) -> str:
    """Returns the last line of a traceback, which says what went wrong."""
    lines = traceback.strip().splitlines()
    return lines[-1] if lines else "no reason was recorded"


def remove_leftovers(store: Path, runs: Iterable[str]) -> None:
    """Removes the temporary folders of runs that were killed while they were written.

    Only whoever holds the store's lock may do so.

    Args:
        store: The store.
        runs: Names of its run folders.
    """
    known = set(runs)
    for parent in {Path(run).parent for run in known}:
        for path in (store / parent).glob(".*.tmp"):
            name = path.name[1:].removesuffix(".tmp").rpartition(".")[0].removesuffix(FAILED)
            if str(parent / name) in known:
                shutil.rmtree(path, ignore_errors=True)


def write_study(store: Path, spec: StudySpec, command: str) -> str:
    """Writes what a store is the store of, once.

    Args:
        store: The store.
        spec: The study.
        command: The command that makes it.

    Returns:
        The command that made the store in the first place.

    Raises:
        ArtifactError: If the store holds another study.
    """
    path, study = store / STUDY, spec.model_dump(mode="json")
    if path.exists():
        before, made_by = read_study_file(store)
        # Where the official files lie is the machine's business; results depend on what is in them.
        different = sorted(name for name in study if name != "data_dir" and before.get(name) != study[name])
        if different:
            raise ArtifactError(
                f"{store} holds another study ({', '.join(different)} differ); use another store, or remove it"
            )
        return made_by
    store.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write_json(temporary, {"format": _FORMAT, "command": command, "study": study})
    return command


def read_study_file(store: Path) -> tuple[dict[str, Any], str]:
    """Returns the study of a store, and the command that made it.

    Raises:
        ArtifactError: If the folder is not that of a study.
    """
    path = store / STUDY
    if not path.exists():
        raise ArtifactError(f"{store} is not the folder of a study: it holds no {STUDY}")
    content = read_json(path)
    if content.get("format") != _FORMAT or not isinstance(content.get("study"), dict):
        raise ArtifactError(
            f"{path} is damaged, or of another version (format {content.get('format')}, this one reads {_FORMAT})"
        )
    return content["study"], str(content.get("command", ""))
