"""Files: checksums, writes that are whole or not there, artifacts (tensors and settings in one file), and figures.

An artifact is a safetensors file whose header holds a format, a version, a kind, JSON settings and a checksum of all of
these and of the tensors. Nothing that is loaded can execute code, and a file that is not what it should be ends in an
``ArtifactError`` with its name.
"""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from kuaifair_env.errors import ArtifactError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pydantic import TypeAdapter


Tensors = dict[str, NDArray[Any]]

Shape = TypeVar("Shape")

LOCK = ".lock"
"""File that a process holds while it works on a folder."""

CHECKSUMS = "SHA256SUMS"
"""File with the checksums of a folder's other files, as ``sha256sum`` writes and checks it."""

# A temporary name says who took it.
_OWNER = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
_STALE = 86_400.0
_HEADER = "kuaifair"
_CHECKSUM = "sha256"
# What unfit content makes this library and those beneath it raise.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MISFITS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BadZipFile,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)
_DPI = 150
# What the figure writers would add: the library's name and version, and the time.
_OMITTED: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}
_DESCRIPTION = {"png": "Description", "svg": "Description", "pdf": "Subject"}
_FIGURE_SETTINGS: dict[Any, Any] = {"svg.hashsalt": "kuaifair", "pdf.fonttype": 42}


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """Returns the hex digest of a file, by an algorithm that :mod:`hashlib` knows."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def temporary_beside(path: str | Path) -> Iterator[Path]:
    """Gives an unused name beside ``path``, in a folder that is made if need be; whatever has it is removed at the end.

    What killed processes have left under such names of ``path`` is removed first. An error of the system that names no
    file, or this one, names ``path``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        if _abandoned(leftover):
            _remove(leftover)
    temporary = target.with_name(f".{target.name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(target, temporary):
            yield temporary
    finally:
        _remove(temporary)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Has an error of the system that names no file, as of a full disk, or what is below ``temporary``, name a path."""
    try:
        yield
    except OSError as error:
        named = error.filename
        if error.errno is not None and (named is None or (temporary and Path(named).is_relative_to(temporary))):
            error.filename = str(path)
        raise


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; it takes the place of ``path`` if all goes well.

    A reader sees the old file or the new one, never a part; after an error nothing is left behind.

    Raises:
        ArtifactError: If ``path`` is a device, a pipe or a socket, whose place no file should take.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise ArtifactError(f"{path} is no file, and no file takes its place; choose another name")
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def need_writable(path: str | Path) -> None:
    """Checks that a file can be made, or written into a folder, before there is work to lose; makes nothing.

    Raises:
        ArtifactError: If it cannot.
    """
    target = Path(path) / LOCK if Path(path).is_dir() else Path(path)
    while not os.path.lexists(target.parent):
        target = target.parent
    try:
        if not target.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        with temporary_beside(target) as temporary:
            temporary.touch()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}; choose another output folder") from error


def remove_folder(path: Path) -> None:
    """Removes a folder, if it is there, so that a kill leaves the whole of it or none."""
    with temporary_beside(path) as temporary, suppress(FileNotFoundError):
        os.replace(path, temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    """Says whether the process that took a temporary name has ended, or nobody touched what has the name for a day."""
    owner = _OWNER.fullmatch(path.name)
    if owner is not None and owner["machine"] == _machine() and sys.platform != "win32":
        try:
            os.kill(int(owner["process"]), 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _STALE
    return False


def _machine() -> str:
    """Returns a short hash of this machine's name: processes of several machines may write to a folder."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def write_checksums(folder: Path) -> None:
    """Writes :data:`CHECKSUMS` into a folder of files."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    write_text_atomically(folder / CHECKSUMS, "".join(f"{file_hash(path)}  {path.name}\n" for path in files))


def check_files(folder: Path, names: Iterable[str] | None, remedy: str) -> None:
    """Checks files of a folder against :data:`CHECKSUMS`, and that none of those that it names is missing.

    Args:
        folder: The folder.
        names: The files; those that are not there may have been optional. None takes all that are named.
        remedy: What their owner can do.

    Raises:
        ArtifactError: If a file was altered or lost, or appeared, after the checksums were written.
    """
    path = folder / CHECKSUMS
    with whole(path, "list of checksums", remedy):
        lines = [line.partition("  ") for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
        digests = {name: digest for digest, _, name in lines}
        if not all(digests):
            raise ValueError("a line names no file")
        lost = [name for name in digests if not (folder / name).is_file()]
        if lost:
            raise ArtifactError(f"{folder / lost[0]} is missing, which {path} names; {remedy}")
        for name in digests if names is None else names:
            if (folder / name).exists() and file_hash(folder / name) != digests.get(name):
                raise ArtifactError(
                    f"{folder / name} was altered after it was written: its checksum is not that of {path}; {remedy}"
                )


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes UTF-8 text with :func:`atomic_path`, compressed if the name ends in .gz (to the same bytes each time)."""
    content = text.encode("utf-8")
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


@contextmanager
def locked_folder(folder: Path, work: str) -> Iterator[None]:
    """Keeps a second process out of a folder; the system lets go of the lock when its holder dies.

    Args:
        folder: The folder, made if it is not there.
        work: What is done there, for the message.

    Raises:
        ArtifactError: If another process works there, or it cannot be written.
    """
    need_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise ArtifactError(f"another process works on the {work} in {folder}; wait for it, or stop it") from None
    with lock:
        yield


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Keeps a second process from making the same file or folder at the same time, until the body ends.

    The lock is a hidden file beside ``path``, which the system lets go of when its holder dies. Folders that are made
    for it and stay empty go with it.

    Raises:
        ArtifactError: If another process makes it, or it cannot be written.
    """
    target = Path(path)
    need_writable(target)
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.parent / f".{target.name}{LOCK}"
    try:
        lock = FileLock(place).acquire(blocking=False)
    except Timeout:
        raise ArtifactError(f"another process makes {target}; wait for it, or choose another output") from None
    try:
        with lock:
            try:
                yield
            finally:
                with suppress(OSError):  # Windows removes no file that is open
                    place.unlink()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def folder_size(folder: str | Path) -> int:
    """Returns the bytes that the files under ``folder`` take, 0 when there is no such folder."""
    return sum(entry.stat().st_size for entry in Path(folder).rglob("*") if entry.is_file())


@dataclass(frozen=True)
class Family:
    """A family of artifacts that one part of the library writes and reads.

    Attributes:
        format: How the header calls it.
        version: Raised whenever older files can no longer be read.
        title: What messages call one of its files.
        remedy: What messages say about a file that cannot be used.
    """

    format: str
    version: int
    title: str
    remedy: str = "make it anew"


RESPONSES = Family("kuaifair-response", 2, "response model", "fit it again")


def save_artifact(
    path: str | Path,
    kind: str,
    tensors: Mapping[str, NDArray[Any]],
    settings: Mapping[str, Any],
    family: Family = RESPONSES,
) -> None:
    """Writes a kind of artifact, its tensors and its JSON-able settings to one safetensors file, atomically.

    Raises:
        ArtifactError: If ``path`` is a folder.
    """
    from safetensors.numpy import save

    target = Path(path)
    if target.is_dir():
        raise ArtifactError(f"{target} is a folder; give the name of a file, such as model.safetensors")
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    header = {"format": family.format, "version": family.version, "kind": kind, "settings": dict(settings)}
    text = json.dumps(with_checksum(header, arrays), allow_nan=False)
    content = save(arrays, metadata={_HEADER: text})
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


@contextmanager
def open_artifact(
    path: str | Path, kind: str | None = None, family: Family = RESPONSES
) -> Iterator[tuple[str, Tensors, dict[str, Any]]]:
    """Gives the kind, tensors and settings that :func:`save_artifact` wrote; ``kind`` None takes any.

    The checksum covers all of them, so that what is given is what was saved. An error that the body raises because the
    content does not fit becomes an ``ArtifactError`` with the file's name; see :func:`whole`.

    Raises:
        ArtifactError: If the file is missing, truncated, altered, foreign, of another version or another kind, or does
            not fit.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtifactError(f"{source} is not a file; a {family.title} is one .safetensors file")
    with whole(source, family.title, family.remedy):
        header, tensors = _read(source, family)
        if kind is not None and header["kind"] != kind:
            raise ArtifactError(f"{source} holds a {family.title} of kind '{header['kind']}', not '{kind}'")
        yield header["kind"], tensors, header["settings"]


@contextmanager
def whole(source: str | Path, title: str, remedy: str) -> Iterator[None]:
    """Turns what the body raises over a file that is damaged or does not fit into an error that names the file.

    Args:
        source: The file or folder that the body reads.
        title: What it should be, such as ``"state purifier"``.
        remedy: What its owner can do.

    Raises:
        ArtifactError: Instead of any error of a library beneath.
    """
    try:
        path = Path(source)
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe or a device may never end
            raise ArtifactError(f"{source} is not a file, and no {title}; {remedy}")
        yield
    except ArtifactError:
        raise
    except OSError as error:
        if error.errno in _OF_WRITING:  # the body writes too
            raise
        raise ArtifactError(f"{error.filename or source} cannot be read: {error.strerror or error}") from error
    except _MISFITS as error:
        raise ArtifactError(f"{source} is not a whole {title} ({problem_of(error)}); {remedy}") from error


def parse_as(shape: type[Shape], content: Any) -> Shape:
    """Returns JSON-able content as a type, such as a dataclass; numbers, texts and lists do not become each other.

    Raises:
        ValueError: If it does not fit.
    """
    parsed: Shape = _adapter(cast("Any", shape)).validate_json(json.dumps(content), strict=True)
    return parsed


@lru_cache(maxsize=128)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    """Returns what reads a type; making it takes as long as reading a small file."""
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def take_tensors(tensors: Tensors, shapes: Mapping[str, tuple[int | None, ...]]) -> Tensors:
    """Returns tensors if they are those that a model needs: name -> shape, None for any size.

    Raises:
        ValueError: If a tensor is missing or of another shape.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"it lacks the tensor '{name}'")
        actual = tensors[name].shape
        if len(shape) != len(actual) or any(want not in (None, got) for want, got in zip(shape, actual, strict=True)):
            raise ValueError(f"tensor '{name}' has shape {actual}, expected {shape}")
    return tensors


def with_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Returns tensors under names that begin with a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Tensors, prefix: str) -> Tensors:
    """Returns the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_checksum(content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]] | None = None) -> dict[str, Any]:
    """Returns JSON-able content as it is read back, with a checksum of it and of tensors under ``"sha256"``."""
    read_back: dict[str, Any] = json.loads(json.dumps(content))
    return read_back | {_CHECKSUM: _digest(read_back, tensors or {})}


def fits_checksum(content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]] | None = None) -> bool:
    """Returns whether content and tensors are what :func:`with_checksum` took."""
    return bool(content.get(_CHECKSUM) == _digest(content, tensors or {}))


def problem_of(error: BaseException) -> str:
    """Returns what an error says in one line."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        mistake = error.errors(include_url=False)[0]
        return ": ".join(filter(None, [".".join(map(str, mistake["loc"])), mistake["msg"]]))
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return " ".join(str(error).split()) or type(error).__name__


def _read(source: Path, family: Family) -> tuple[dict[str, Any], Tensors]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(source, framework="numpy") as stream:
            header = _header(source, stream.metadata(), family)
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (it is no dict)  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ArtifactError(
            f"{source} is not a whole safetensors file ({error}); it was cut short, altered, or is something else; "
            f"{family.remedy}"
        ) from error
    if not fits_checksum(header, tensors):
        raise ArtifactError(
            f"{source} was altered after it was saved: its checksum does not fit its content; {family.remedy}"
        )
    json.dumps(header, allow_nan=False)  # refuses NaN
    for name, tensor in tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ArtifactError(f"{source}: tensor '{name}' holds NaN or infinity; {family.remedy}")
    return header, tensors


def _header(source: Path, metadata: Mapping[str, str] | None, family: Family) -> dict[str, Any]:
    if not metadata or _HEADER not in metadata:
        raise ArtifactError(f"{source} is a safetensors file, but not a {family.title} of KuaiFair")
    try:
        header = json.loads(metadata[_HEADER])
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source}: its header is not JSON ({error}); {family.remedy}") from error
    if not isinstance(header, dict) or header.get("format") != family.format:
        raise ArtifactError(f"{source} is a KuaiFair file, but not a {family.title}")
    if header.get("version") != family.version:
        raise ArtifactError(
            f"{source} is of version {header.get('version')}, this release reads version {family.version}; "
            f"{family.remedy}"
        )
    if not isinstance(header.get("kind"), str) or not isinstance(header.get("settings"), dict):
        raise ArtifactError(f"{source}: its header lacks kind or settings; {family.remedy}")
    return header


def _digest(content: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    covered = {name: value for name, value in content.items() if name != _CHECKSUM}
    digest = hashlib.sha256(json.dumps(covered, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}:{tensor.dtype.str}:{tensor.shape};".encode())
        digest.update(tensor.data if tensor.size else b"")
    return digest.hexdigest()


def save_figure(figure: Figure, path: str | Path, about: str = "") -> None:
    """Writes a figure atomically, in the format that the file's ending names: ``.png``, ``.svg`` or ``.pdf``.

    ``about`` says what the figure is made from, such as the data's origin and hash; it is kept inside the file.

    Raises:
        ValueError: If the ending is another.
    """
    import matplotlib

    form = Path(path).suffix.removeprefix(".").lower()
    if form not in _OMITTED:
        raise ValueError(f"a figure ends in .png, .svg or .pdf, but {Path(path).name!r} does not")
    with atomic_path(path) as temporary, matplotlib.rc_context(_FIGURE_SETTINGS):
        figure.savefig(temporary, format=form, dpi=_DPI, metadata=_OMITTED[form] | {_DESCRIPTION[form]: about or None})
        if form == "png":
            _reduce_colours(temporary)


def _reduce_colours(path: Path) -> None:
    """Rewrites a PNG with a palette of 128 colours, a third of its size or less; its texts and resolution stay."""
    from PIL import Image, PngImagePlugin

    with Image.open(path) as image:
        texts = PngImagePlugin.PngInfo()
        for name, text in image.info.items():
            if isinstance(name, str) and isinstance(text, str):
                texts.add_text(name, text)
        palette = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        palette.save(path, "PNG", optimize=True, pnginfo=texts, dpi=image.info["dpi"])
