"""Small helpers for files: checksums, and writes that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def stream_hash(stream: BinaryIO, algorithm: str = "sha256") -> str:
    """Returns the hex digest of what is left in a binary stream.

    Args:
        stream: Open for reading in binary mode.
        algorithm: A name that :func:`hashlib.new` knows.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """Returns the hex digest of a file."""
    with Path(path).open("rb") as stream:
        return stream_hash(stream, algorithm)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; it takes the place of ``path`` if all goes well.

    A reader sees the old file or the new one, never a part; after an error nothing is left behind.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes UTF-8 text to ``path`` with :func:`atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def remove_stale(folder: str | Path, prefix: str, age: float = 86_400.0) -> None:
    """Removes what a killed process left behind: folders of a temporary name that nobody touched for a day.

    Args:
        folder: Where to look.
        prefix: How the temporary names begin.
        age: Seconds without change from which a folder counts as abandoned.
    """
    for path in Path(folder).glob(f"{prefix}*"):
        with suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path, ignore_errors=True)


def folder_size(folder: str | Path) -> int:
    """Returns the bytes that the files under ``folder`` take, 0 when there is no such folder."""
    return sum(entry.stat().st_size for entry in Path(folder).rglob("*") if entry.is_file())
