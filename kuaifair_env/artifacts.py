"""Models as files: safetensors with a JSON header, written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.errors import ArtifactError

_HEADER = "kuaifair"

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Family:
    """A family of files that one part of the library writes and reads.

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
    """Writes tensors and settings to one safetensors file, atomically.

    Args:
        path: The file; missing folders above it are made.
        kind: What the artifact is, such as ``"factorised"``.
        tensors: Arrays by name.
        settings: JSON-able; comes back from :func:`load_artifact`.
        family: Whose file it is.

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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def load_artifact(
    path: str | Path, kind: str | None = None, family: Family = RESPONSES
) -> tuple[str, Tensors, dict[str, Any]]:
    """Reads what :func:`save_artifact` wrote.

    Args:
        path: The file.
        kind: The kind that it must be; None takes any.
        family: Whose file it must be.

    Returns:
        Kind, tensors by name, settings.

    Raises:
        ArtifactError: If the file is missing, truncated, altered, foreign, of another version or another kind.
    """
    source = Path(path)
    header, tensors = _opened(source, family, read=True)
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
    return str(_opened(Path(path), family)[0]["kind"])


def take_tensors(
    source: str | Path, tensors: Tensors, shapes: Mapping[str, tuple[int | None, ...]]
) -> Tensors:
    """Checks that the tensors of a file are those that a model needs.

    Args:
        source: The file, for messages.
        tensors: What was read.
        shapes: Name -> shape; None stands for any size.

    Returns:
        The same tensors.

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


def _opened(source: Path, family: Family, read: bool = False) -> tuple[dict[str, Any], Tensors]:
    from safetensors import SafetensorError, safe_open

    if not source.is_file():
        raise ArtifactError(f"{source} is not a file; a {family.title} is one .safetensors file")
    try:
        with safe_open(source, framework="numpy") as stream:
            header = _header(source, stream.metadata(), family)
            names = list(stream.keys()) if read else []
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
            f"{source} is of version {header.get('version')}, this release reads version {family.version}; "
            "make it anew"
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
