"""Reads the files of a data set from a folder, a zip archive or a tar archive."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from kuaifair_env.errors import DataError
from kuaifair_env.files import file_hash

READ_ERRORS = (EOFError, OSError, zlib.error, zipfile.BadZipFile, tarfile.TarError)
"""What reading a truncated or damaged file or archive raises."""

_BLOCK = 1 << 20


class SourceFiles(ABC):
    """The files of a data set, addressed by their names alone, wherever they lie."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def has(self, name: str) -> bool:
        """Returns whether there is a file of this name."""

    @abstractmethod
    def label(self, name: str) -> str:
        """Returns where a file lies, for messages."""

    @abstractmethod
    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """Returns file name -> SHA-256 of what was read: the archive, or each of the named files."""

    @abstractmethod
    def signature(self, names: Sequence[str]) -> list[list[Any]]:
        """Returns name, size and time of change of what is read: changes when the files change."""

    @abstractmethod
    def _stream(self, name: str) -> AbstractContextManager[BinaryIO]: ...

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Opens a file for reading in binary mode.

        Raises:
            DataError: When there is no such file.
        """
        if not self.has(name):
            raise DataError(f"{name} is missing", file=self.path)
        with self._stream(name) as stream:
            yield stream

    def require(self, names: Sequence[str]) -> None:
        """Checks that all named files are there.

        Raises:
            DataError: Naming those that are not.
        """
        missing = [name for name in names if not self.has(name)]
        if missing:
            raise DataError(
                f"missing: {', '.join(missing)}; the whole official archive is needed", file=self.path
            )


class FolderFiles(SourceFiles):
    """Files in a folder; ``name.gz`` is taken where ``name`` is not there."""

    def has(self, name: str) -> bool:
        """Returns whether the file or its compressed form is there."""
        return self._find(name) is not None

    def label(self, name: str) -> str:
        """Returns the file's path."""
        return str(self._find(name) or self.path / name)

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """Returns the SHA-256 of each of the files."""
        return {path.name: file_hash(path) for path in map(self._find, names) if path is not None}

    def signature(self, names: Sequence[str]) -> list[list[Any]]:
        """Returns what changes when one of the files changes."""
        return [_file_signature(path) for path in map(self._find, names) if path is not None]

    def _find(self, name: str) -> Path | None:
        return next((path for path in (self.path / name, self.path / f"{name}.gz") if path.is_file()), None)

    def _stream(self, name: str) -> AbstractContextManager[BinaryIO]:
        path = cast(Path, self._find(name))
        return cast(
            "AbstractContextManager[BinaryIO]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        )


class ArchiveFiles(SourceFiles):
    """Files in a zip or tar archive, compressed or not, in whatever folder they are there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._is_zip = path.suffix == ".zip" or zipfile.is_zipfile(path)

    @cached_property
    def _members(self) -> dict[str, str]:
        try:
            return _by_name(self._list())
        except READ_ERRORS as error:
            raise DataError(
                f"not a whole archive ({error or type(error).__name__}); download it again", file=self.path
            ) from error

    def has(self, name: str) -> bool:
        """Returns whether the archive has a member of this name."""
        return name in self._members

    def label(self, name: str) -> str:
        """Returns archive and member."""
        return f"{self.path}:{self._members.get(name, name)}"

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """Returns the SHA-256 of the archive."""
        return {self.path.name: file_hash(self.path)}

    def signature(self, names: Sequence[str]) -> list[list[Any]]:
        """Returns what changes when the archive changes."""
        return [_file_signature(self.path)]

    def _list(self) -> list[str]:
        if self._is_zip:
            with zipfile.ZipFile(self.path) as archive:
                return [info.filename for info in archive.infolist() if not info.is_dir()]
        with tarfile.open(self.path) as archive:
            members = [member.name for member in archive if member.isfile()]
            rest = cast(BinaryIO, archive.fileobj)
            while rest.read(_BLOCK):  # to the end, where a compressed archive has its checksum
                pass
            return members

    @contextmanager
    def _stream(self, name: str) -> Iterator[BinaryIO]:
        member = self._members[name]
        if self._is_zip:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as stream:
                yield cast(BinaryIO, stream)
        else:
            with tarfile.open(self.path) as tar, cast(BinaryIO, tar.extractfile(member)) as content:
                yield content


def _by_name(members: Sequence[str]) -> dict[str, str]:
    """Maps file names to archive members; of two members of one name the shorter path counts."""
    real = [member for member in members if not PurePosixPath(member).name.startswith("._")]
    return {PurePosixPath(member).name: member for member in sorted(real, key=len, reverse=True)}


def _file_signature(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
