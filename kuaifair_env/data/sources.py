"""Finds, opens and identifies files in the formats of the official data sets."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from kuaifair_env.data.cache import cache_dir
from kuaifair_env.data.published import DATASETS, OfficialDataset, dataset
from kuaifair_env.data.schema import Provenance
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
    def _paths(self, names: Sequence[str]) -> list[Path]:
        """Returns what lies on the disk: the archive, or those of the named files that are there."""

    @abstractmethod
    def _stream(self, name: str) -> AbstractContextManager[BinaryIO]: ...

    def hashes(self, names: Sequence[str]) -> dict[str, str]:
        """Returns file name -> SHA-256 of what was read: the archive, or each of the named files."""
        return {path.name: file_hash(path) for path in self._paths(names)}

    def signature(self, names: Sequence[str]) -> list[list[Any]]:
        """Returns name, size and time of change of what is read: changes when the files change."""
        status = [(path, path.stat()) for path in self._paths(names)]
        return [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in status]

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
            raise DataError(f"missing: {', '.join(missing)}; the whole official archive is needed", file=self.path)


class FolderFiles(SourceFiles):
    """Files in a folder; ``name.gz`` is taken where ``name`` is not there."""

    def has(self, name: str) -> bool:
        """Returns whether the file or its compressed form is there."""
        return self._find(name) is not None

    def label(self, name: str) -> str:
        """Returns the file's path."""
        return str(self._find(name) or self.path / name)

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [path for path in map(self._find, names) if path is not None]

    def _find(self, name: str) -> Path | None:
        return next((path for path in (self.path / name, self.path / f"{name}.gz") if path.is_file()), None)

    def _stream(self, name: str) -> AbstractContextManager[BinaryIO]:
        path = cast(Path, self._find(name))
        return cast("AbstractContextManager[BinaryIO]", gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


class ArchiveFiles(SourceFiles):
    """Files in a zip or tar archive, compressed or not, in whatever folder they are there."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._is_zip = path.suffix == ".zip" or zipfile.is_zipfile(path)

    @cached_property
    def _members(self) -> dict[str, str]:
        try:
            members = [member for member in self._list() if not PurePosixPath(member).name.startswith("._")]
        except READ_ERRORS as error:
            raise DataError(
                f"not a whole archive ({' '.join(str(error).split()) or type(error).__name__}); download it again",
                file=self.path,
            ) from error
        # Of two members of one name the shorter path counts.
        return {PurePosixPath(member).name: member for member in sorted(members, key=len, reverse=True)}

    def has(self, name: str) -> bool:
        """Returns whether the archive has a member of this name."""
        return name in self._members

    def label(self, name: str) -> str:
        """Returns archive and member."""
        return f"{self.path}:{self._members.get(name, name)}"

    def _paths(self, names: Sequence[str]) -> list[Path]:
        return [self.path]

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


DATA_VARIABLE = "KUAIFAIR_DATA"
"""Environment variable that names a folder with official files."""


def download_folder(cache: str | Path | None = None) -> Path:
    """Returns where ``kuaifair data fetch`` puts archives by default."""
    return cache_dir(cache) / "downloads"


def find_source(name: str, data_dir: str | Path | None = None, cache: str | Path | None = None) -> Path | None:
    """Finds the official files of a data set.

    Where ``data_dir`` is given, only that is looked at. Otherwise the place that ``KUAIFAIR_DATA`` names comes first,
    then the cache's download folder. In each an unpacked folder comes before an archive.

    Args:
        name: ``"kuairec"``, ``"kuairand"``, ``"kuairand-1k"`` or ``"kuairand-27k"``.
        data_dir: An archive, an unpacked folder, or a folder that holds one of them.
        cache: See :func:`kuaifair_env.data.cache.cache_dir`.

    Returns:
        The data folder or the archive; None when no place was named and the cache has none.

    Raises:
        DataError: If ``data_dir`` or ``KUAIFAIR_DATA`` names a place without these files. A ``KUAIFAIR_DATA`` that
            holds another data set is no mistake as long as the cache holds this one.
    """
    facts = dataset(name)
    named = os.environ.get(DATA_VARIABLE) if data_dir is None else data_dir
    if not named:
        return _find_in(download_folder(cache), facts)
    place = Path(named).expanduser()
    source = _find_in(place, facts)
    if source is None and data_dir is None and any(_find_in(place, other) for other in DATASETS.values()):
        source = _find_in(download_folder(cache), facts)
    if source is None:
        raise _not_there(place, facts, DATA_VARIABLE if data_dir is None else "")
    return source


def _find_in(place: Path, facts: OfficialDataset) -> Path | None:
    if place.is_file():
        return place if place.name == facts.archive or _holds(place, facts) else None
    folders = (place, *(place / folder for folder in facts.folders))
    for folder in folders:
        if FolderFiles(folder).has(facts.files[0]):
            return folder
    archive = place / facts.archive
    return archive if archive.is_file() else None


def _holds(archive: Path, facts: OfficialDataset) -> bool:
    """Returns whether a file is an archive, of whatever name, with a data set's first file."""
    try:
        return ArchiveFiles(archive).has(facts.files[0])
    except DataError:
        return False


def _not_there(place: Path, facts: OfficialDataset, variable: str = "") -> DataError:
    """Returns the error for a place without a data set, which says what is missing there."""
    named = f"; {variable} names this place: correct it, or unset it" if variable else ""
    if not place.exists():
        return DataError(
            f"there is no such file or folder; give {facts.archive} or its unpacked folder{named}", file=place
        )
    if place.is_file():
        problem = f"this file is neither {facts.archive} nor another archive with {facts.files[0]}"
    else:
        folders = (FolderFiles(place / folder) for folder in (".", *facts.folders))
        missing = min(([name for name in facts.files if not folder.has(name)] for folder in folders), key=len)
        problem = f"no {facts.title} files here: neither {facts.archive} nor {', '.join(missing)}"
    return DataError(f"{problem}; get them with: kuaifair data fetch {facts.name}{named}", file=place)


PROVENANCE_FILE = "kuaifair_provenance.json"
"""Lies beside files in the official format that are not the official ones, such as a twin's."""


def recognise(path: str | Path, name: str | None = None) -> OfficialDataset:
    """Returns the data set that an archive or folder holds.

    Args:
        path: An archive, an unpacked folder, or a folder that holds one of them.
        name: The data set's name when the caller knows it.

    Raises:
        DataError: When the path does not exist, or holds none or several.
    """
    place = Path(path).expanduser()
    if name is not None:
        return dataset(name)
    if not place.exists():
        raise DataError("there is no such file or folder", file=place)
    if place.is_file():
        members = ArchiveFiles(place)
        datasets = [facts for facts in DATASETS.values() if members.has(facts.files[0])]
    else:
        datasets = [facts for facts in DATASETS.values() if _find_in(place, facts) is not None]
    if len(datasets) != 1:
        problem = " and ".join(facts.title for facts in datasets) + " are" if datasets else "no official data set is"
        archives = ", ".join(facts.archive for facts in DATASETS.values())
        raise DataError(f"{problem} here; give one of {archives}, or its folder", file=place)
    return datasets[0]


def open_source(path: str | Path, facts: OfficialDataset) -> SourceFiles:
    """Opens the official files of a data set.

    Args:
        path: The archive, the unpacked root folder, its data folder, or a folder that holds one of them.
        facts: Which data set is meant.

    Raises:
        DataError: When nothing of the kind is there. Archives are opened, and files looked for, when they
            are first needed: see :meth:`~kuaifair_env.data.sources.SourceFiles.require`.
    """
    place = Path(path).expanduser()
    source = place if place.is_file() else _find_in(place, facts)
    if source is None:
        raise _not_there(place, facts)
    return FolderFiles(source) if source.is_dir() else ArchiveFiles(source)


def provenance_of(
    files: SourceFiles,
    facts: OfficialDataset,
    used: Sequence[str],
    rows: Mapping[str, int],
    settings: Mapping[str, Any],
) -> Provenance:
    """Returns the provenance of files in an official format.

    They are called real only when every log has exactly the published number of rows and no
    ``kuaifair_provenance.json`` beside them says otherwise; with other numbers of rows they are partial.

    Args:
        files: Where the files lie.
        facts: The official data set.
        used: Names of the files that were read.
        rows: Rows of each log, as read.
        settings: What else determines the data.

    Raises:
        DataError: When ``kuaifair_provenance.json`` cannot be read.
    """
    hashes = files.hashes([name for name in used if files.has(name)])
    if files.has(PROVENANCE_FILE):
        with files.open(PROVENANCE_FILE) as stream:
            try:
                written = json.loads(stream.read().decode("utf-8"))
                name, origin = str(written["name"]), written["origin"]
                if origin not in ("partial", "twin", "own"):
                    raise ValueError(f"origin {origin!r} is not 'partial', 'twin' or 'own'")
                all_settings = {**dict(written.get("settings", {})), **settings}
                return Provenance(name, origin, str(written.get("description", "")), hashes, all_settings)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"cannot be read: {error}", file=files.label(PROVENANCE_FILE)) from error
    if all(rows.get(name) == expected for name, expected in facts.rows.items()):
        return Provenance(facts.title, "real", f"official files of {facts.title}", hashes, dict(settings))
    counts = ", ".join(f"{name} {rows.get(name, 0):,} of {expected:,}" for name, expected in facts.rows.items())
    return Provenance(
        f"partial {facts.title}",
        "partial",
        f"files in the format of {facts.title} with other than the published rows: {counts}",
        hashes,
        dict(settings),
    )
