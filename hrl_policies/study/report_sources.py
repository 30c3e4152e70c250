"""What a report is made from: finished, interrupted and failed runs of a store, and its figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hrl_policies.study.folders import FAILED, TRACEBACK, reason_of
from hrl_policies.study.report_figures import PICTURES
from hrl_policies.study.store import PARTIAL, StoredRun, load_run
from kuaifair_env.errors import ArtifactError

_FIGURES = "figures"


@dataclass(frozen=True)
class FailedRun:
    """A run that ended with an error.

    Attributes:
        name: Its folder, relative to the store.
        traceback: What Python said.
    """

    name: str
    traceback: str

    @property
    def error(self) -> str:
        """The last line of the traceback, which names the error."""
        return reason_of(self.traceback)


def all_runs(store: str | Path) -> list[StoredRun]:
    """Returns all runs of a store, finished and interrupted, in the order of their folders.

    Raises:
        ArtifactError: If there is no such folder, or a run folder is damaged.
    """
    root = _existing(store)
    folders = {path.parent for path in root.rglob("result.json")}
    folders |= {path.parent for path in root.rglob("progress.json") if path.parent.name.endswith(PARTIAL)}
    return [load_run(folder) for folder in sorted(folders) if not _unlisted(folder, root)]


def failed_runs(store: str | Path) -> list[FailedRun]:
    """Returns the runs of a store that ended with an error: folders ``NAME.failed`` that hold a ``traceback.txt``.

    Raises:
        ArtifactError: If there is no such folder.
    """
    root = _existing(store)
    return [
        FailedRun(
            path.parent.relative_to(root).as_posix().removesuffix(FAILED),
            path.read_text(encoding="utf-8", errors="replace").strip(),
        )
        for path in sorted(root.rglob(TRACEBACK))
        if path.parent.name.endswith(FAILED)
    ]


def stored_figures(store: str | Path) -> list[Path]:
    """Returns the pictures in a store and in its folder ``figures``; of two kinds of one picture the SVG.

    Raises:
        ArtifactError: If there is no such folder.
    """
    root = _existing(store)
    found: dict[Path, Path] = {}
    for kind in PICTURES:
        for folder in (root, root / _FIGURES):
            for path in folder.glob(f"*{kind}"):
                found.setdefault(path.with_suffix(""), path)
    return [found[name] for name in sorted(found)]


def common_folder(runs: Sequence[StoredRun]) -> Path:
    """Returns the deepest folder that holds all runs, so that a report can name them without it."""
    if not runs:
        return Path()
    return Path(os.path.commonpath([run.folder.absolute().parent for run in runs]))


def _existing(store: str | Path) -> Path:
    root = Path(store)
    if not root.is_dir():
        raise ArtifactError(f"there is no folder {root}")
    return root


def _unlisted(folder: Path, root: Path) -> bool:
    """Says whether a folder is temporary, or what a failed run left."""
    parts = folder.relative_to(root).parts
    return any(part.startswith(".") or part.endswith(FAILED) for part in parts)
