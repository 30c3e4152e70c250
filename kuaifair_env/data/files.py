"""Small helpers for files: checksums, and writes that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
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


def folder_size(folder: str | Path) -> int:
    """Returns the bytes that the files under ``folder`` take, 0 when there is no such folder."""
    return sum(entry.stat().st_size for entry in Path(folder).rglob("*") if entry.is_file())
