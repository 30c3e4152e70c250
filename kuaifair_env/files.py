"""Files: checksums, writes that are whole or not there, artifacts (tensors and settings in one file), and figures.

An artifact is a safetensors file whose header holds a format, a version, a kind, JSON settings and a checksum. Nothing
that is loaded can execute code, and a file that is not what it should be ends in an ``ArtifactError``.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.errors import ArtifactError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Tensors = dict[str, NDArray[Any]]

_HEADER = "kuaifair"
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

    ``prefix`` is how the temporary names in ``folder`` begin; ``age`` is in seconds without change.
    """
    for path in Path(folder).glob(f"{prefix}*"):
        with suppress(OSError):
            if path.is_dir() and time.time() - path.stat().st_mtime > age:
                shutil.rmtree(path, ignore_errors=True)


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
    """

    format: str
    version: int
    title: str


RESPONSES = Family("kuaifair-response", 1, "response model")


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
    header = {
        "format": family.format,
        "version": family.version,
        "kind": kind,
        "sha256": _digest(arrays),
        "settings": dict(settings),
    }
    content = save(arrays, metadata={_HEADER: json.dumps(header, allow_nan=False)})
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)


def load_artifact(
    path: str | Path, kind: str | None = None, family: Family = RESPONSES
) -> tuple[str, Tensors, dict[str, Any]]:
    """Returns the kind, tensors and settings that :func:`save_artifact` wrote; ``kind`` None takes any.

    Raises:
        ArtifactError: If the file is missing, truncated, altered, foreign, of another version or another kind.
    """
    source = Path(path)
    header, tensors = _read(source, family)
    if kind is not None and header["kind"] != kind:
        raise ArtifactError(f"{source} holds a {family.title} of kind '{header['kind']}', not '{kind}'")
    if header["sha256"] != _digest(tensors):
        raise ArtifactError(f"{source} was altered after it was saved: its checksum does not fit its content")
    return header["kind"], tensors, header["settings"]


def artifact_kind(path: str | Path, family: Family = RESPONSES) -> str:
    """Returns the kind of a saved model, reading the header alone.

    Raises:
        ArtifactError: If the file is missing, no safetensors file, foreign or of another version.
    """
    return str(_read(Path(path), family, header_only=True)[0]["kind"])


def take_tensors(source: str | Path, tensors: Tensors, shapes: Mapping[str, tuple[int | None, ...]]) -> Tensors:
    """Returns the tensors of a file if they are those that a model needs: name -> shape, None for any size.

    Raises:
        ArtifactError: If a tensor is missing, of another shape, or holds NaN or infinity.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ArtifactError(f"{source} lacks the tensor '{name}'")
        tensor = tensors[name]
        fits = len(shape) == tensor.ndim and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ArtifactError(f"{source}: tensor '{name}' has shape {tensor.shape}, expected {shape}")
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise ArtifactError(f"{source}: tensor '{name}' holds NaN or infinity")
    return tensors


def take_setting(source: str | Path, settings: Mapping[str, Any], name: str) -> Any:
    """Returns one setting of a file.

    Raises:
        ArtifactError: If it is missing.
    """
    if name not in settings:
        raise ArtifactError(f"{source} lacks the setting '{name}'")
    return settings[name]


def _read(source: Path, family: Family, header_only: bool = False) -> tuple[dict[str, Any], Tensors]:
    from safetensors import SafetensorError, safe_open

    if not source.is_file():
        raise ArtifactError(f"{source} is not a file; a {family.title} is one .safetensors file")
    try:
        with safe_open(source, framework="numpy") as stream:
            header = _header(source, stream.metadata(), family)
            names = [] if header_only else list(stream.keys())
            return header, {name: stream.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ArtifactError(
            f"{source} is not a whole safetensors file ({error}); it was cut short, altered, or is something else"
        ) from error


def _header(source: Path, metadata: Mapping[str, str] | None, family: Family) -> dict[str, Any]:
    if not metadata or _HEADER not in metadata:
        raise ArtifactError(f"{source} is a safetensors file, but not a {family.title} of KuaiFair")
    try:
        header = json.loads(metadata[_HEADER])
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{source}: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != family.format:
        raise ArtifactError(f"{source} is a KuaiFair file, but not a {family.title}")
    if header.get("version") != family.version:
        raise ArtifactError(
            f"{source} is of version {header.get('version')}, this release reads version {family.version}; make it anew"
        )
    if not isinstance(header.get("kind"), str) or not isinstance(header.get("settings"), dict):
        raise ArtifactError(f"{source}: its header lacks kind or settings")
    return header


def _digest(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
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
