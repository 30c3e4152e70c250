"""Writes a twin in the official file formats, so that readers can be tested at full size.

The files are synthetic: a ``kuaifair_provenance.json`` beside them says so to every reader of this library.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kuaifair_env.data.sources import PROVENANCE_FILE
from kuaifair_env.data.twin import Twin
from kuaifair_env.data.twin_files_kuairand import kuairand_files
from kuaifair_env.data.twin_files_kuairec import kuairec_files
from kuaifair_env.errors import DataError

Writer = Callable[[Path], None]

_FOLDERS = {"kuairec": Path("KuaiRec 2.0") / "data", "kuairand": Path("KuaiRand-Pure") / "data"}


def write_official(twin: Twin, folder: str | Path) -> Path:
    """Writes a twin as the official archive unpacks: seven files for KuaiRec, six for KuaiRand-Pure.

    What the twin's data does not hold is drawn anew, by the twin's seed: play times and rarer feedback of KuaiRand,
    exact duplicate rows of KuaiRec's big matrix, captions, friends. Reading the files gives the same logs again.

    Args:
        twin: The twin; its ``layout`` decides the format.
        folder: Where ``KuaiRec 2.0/data`` or ``KuaiRand-Pure/data`` is made.

    Returns:
        The data folder. It appears whole or not at all.

    Raises:
        DataError: If the data folder exists already.
    """
    target = Path(folder) / _FOLDERS[twin.config.layout]
    if target.exists():
        raise DataError("this folder exists already; name another one or remove it first", file=target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        files = kuairec_files(twin) if twin.config.layout == "kuairec" else kuairand_files(twin)
        for name, write in files.items():
            write(temporary / name)
        _write_provenance(twin, temporary / PROVENANCE_FILE)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_provenance(twin: Twin, path: Path) -> None:
    provenance: dict[str, Any] = twin.data.provenance.as_dict()
    provenance.pop("files")
    path.write_text(json.dumps(provenance, indent=1, allow_nan=False) + "\n", encoding="utf-8")
