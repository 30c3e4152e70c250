"""A versioned cache of data sets: plain ``.npy`` files and a JSON manifest, written whole or not at all.

Reading memory-maps the arrays, so that a log of 12.5 million rows opens in a fraction of a second; users and items
of the rows are stored smaller than they are used. Every file has a SHA-256 to be checked against; nothing that is
loaded can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import platformdirs
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, NegativeSampling, Provenance, Users
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import (
    file_hash,
    fits_checksum,
    folder_size,
    remove_folder,
    temporary_beside,
    whole,
    with_checksum,
)
from kuaifair_env.progress import announce_rebuilt

CACHE_VARIABLE = "KUAIFAIR_CACHE"
"""Environment variable that moves the cache folder."""

CacheKind = Literal["data", "responses", "embeddings", "purifiers", "downloads"]
"""Folders of the cache: data sets and twins, fitted models, item embeddings, purifiers, official archives."""

FORMAT = "kuaifair-data"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
_TITLE, _REMEDY = "data set", "it has to be built again"

_LOG_KINDS = {
    "users": "<i4",
    "items": "<i4",
    "clicks": "|b1",
    "times": "<i8",
    "watch_ratios": "<f4",
    "feedback": "<f4",
}
_KINDS = {
    "users.ids": "<i8",
    "users.features": "<f4",
    "items.ids": "<i8",
    "items.features": "<f4",
    "items.tags": "|b1",
    "items.shown": "<f8",
    **{f"{log}.{column}": kind for log in ("train", "test") for column, kind in _LOG_KINDS.items()},
}
_IDS = ("users.ids", "items.ids")
# Users of rows are stored as where each user's rows begin, items in the smallest type that holds them.
_KINDS |= {"train.users": "<i8", "test.users": "<i8"}
_ITEM_COLUMNS = ("train.items", "test.items")
_ITEM_KINDS = ("|u1", "<u2", "<i4")
_ALWAYS_HASHED = 1 << 22
_OPTIONAL = {"items.shown", "train.watch_ratios", "test.watch_ratios", "train.feedback", "test.feedback"}


def cache_dir(override: str | Path | None = None) -> Path:
    """Returns the cache folder: the argument, else ``KUAIFAIR_CACHE``, else the platform's user cache.

    The folder need not exist yet.
    """
    if override is not None:
        return Path(override).expanduser()
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("kuaifair"))


def save_data(data: InteractionData, folder: str | Path) -> Path:
    """Writes a data set to a new folder, or in place of an older data set there.

    Everything is written beside the target and renamed at the end: a crash leaves no half-written folder
    under the final name, and of two processes that write at the same time the later one wins.

    Args:
        data: The data set.
        folder: Where it goes; must be absent, empty, or hold a data set of this library.

    Returns:
        The folder.

    Raises:
        ArtifactError: When the folder holds something else.
    """
    target = Path(folder)
    ours = target.is_dir() and (not any(target.iterdir()) or (target / MANIFEST).exists())
    if target.exists() and not ours:
        raise ArtifactError(f"{target} holds something that is not a KuaiFair data set; it is left alone")
    _store(data, target, {}, keep_existing=False)
    return target


def load_data(folder: str | Path, hashed_up_to: float = float("inf")) -> InteractionData:
    """Opens a data set that :func:`save_data` wrote; the arrays are read-only.

    Args:
        folder: The data set's folder.
        hashed_up_to: Files of at most so many bytes are compared with their SHA-256; of larger ones type and size alone
            must be right.

    Raises:
        ArtifactError: When the folder is missing, foreign, damaged, or of another format version.
    """
    target = Path(folder)
    manifest = read_manifest(target)
    with whole(target, _TITLE, _REMEDY):
        return _assemble(target, manifest, hashed_up_to)


def cached(
    key_parts: Mapping[str, Any],
    build: Callable[[], InteractionData],
    folder: str | Path | None = None,
) -> InteractionData:
    """Returns the data set of a key from the cache, building and storing it on first use.

    A damaged or foreign entry is rebuilt, which one line on stderr says. Processes that build the same entry at once
    do not harm each other: each writes its own copy, the first to finish is kept, and the entry appears whole.

    Args:
        key_parts: Everything that determines the data, JSON-able; ``"name"`` also names the folder.
        build: Makes the data set.
        folder: The cache folder; see :func:`cache_dir`.

    Returns:
        The data set, opened from the cache.

    Raises:
        DataError: When ``key_parts`` is not JSON-able, or by ``build``.
    """
    target = entry_folder(key_parts, folder)
    if target.exists():
        try:
            return load_data(target, _ALWAYS_HASHED)
        except ArtifactError as error:
            announce_rebuilt(error)
            remove_folder(target)
    data = build()
    _store(data, target, key_parts, keep_existing=True)
    try:
        return load_data(target, 0)
    except ArtifactError:  # another process is replacing a damaged entry at this moment
        return data


def entry_folder(key_parts: Mapping[str, Any], folder: str | Path | None = None) -> Path:
    """Returns where the cache keeps the data set of a key, whether or not it is there."""
    try:
        text = json.dumps(dict(key_parts), sort_keys=True, ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"cache key {key_parts!r} is not JSON-able: {error}") from error
    name = re.sub(r"[^a-z0-9]+", "-", str(key_parts.get("name", "data")).lower()).strip("-") or "data"
    digest = hashlib.sha256(text.encode("ascii")).hexdigest()[:16]
    return cache_dir(folder) / "data" / f"{name}-v{FORMAT_VERSION}-{digest}"


def cached_entries(folder: str | Path | None = None) -> list[Path]:
    """Returns the folders of all readable data sets in the cache, sorted by name."""
    root = cache_dir(folder) / "data"
    if not root.is_dir():
        return []
    return sorted(entry for entry in root.iterdir() if not entry.name.startswith(".") and _is_data(entry))


@dataclass(frozen=True)
class CacheEntry:
    """Something that the cache holds and that is made again when it is missing; downloads are fetched again.

    Attributes:
        kind: The folder of the cache that it lies in.
        path: File or folder.
        size: Bytes.
    """

    kind: CacheKind
    path: Path
    size: int


def cache_entries(folder: str | Path | None = None, kinds: Sequence[CacheKind] | None = None) -> list[CacheEntry]:
    """Returns what the cache holds, damaged and outdated entries too, of some kinds or of all."""
    entries = []
    for kind in kinds or get_args(CacheKind):
        place = cache_dir(folder) / kind
        paths = sorted(place.iterdir()) if place.is_dir() else []
        sizes = [folder_size(path) if path.is_dir() else path.stat().st_size for path in paths]
        entries += [CacheEntry(kind, path, size) for path, size in zip(paths, sizes, strict=True)]
    return entries


def remove_entries(entries: Sequence[CacheEntry]) -> None:
    """Deletes entries of the cache; one that another process deleted meanwhile is no error."""
    for entry in entries:
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Returns the checked manifest of a stored data set.

    Raises:
        ArtifactError: When it is missing, unreadable, altered, or not of this format and version.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} holds no data set: {MANIFEST} is missing")
    with whole(path, "manifest", _REMEDY):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ArtifactError(f"{path} is not the manifest of a KuaiFair data set")
        if manifest.get("version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {manifest.get('version')}, this release reads {FORMAT_VERSION}; {_REMEDY}"
            )
        if not fits_checksum(manifest):
            raise ArtifactError(f"{path} was altered after it was written; {_REMEDY}")
        return manifest


def _arrays_of(data: InteractionData) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any] | None] = {
        "users.ids": data.users.ids,
        "users.features": data.users.features.values,
        "items.ids": data.items.ids,
        "items.features": data.items.features.values,
        "items.tags": data.items.tags,
        "items.shown": data.items.shown,
    }
    for name, log in (("train", data.train), ("test", data.test)):
        arrays |= {f"{name}.{column}": getattr(log, column) for column in _LOG_KINDS}
    for name, log in (("train", data.train), ("test", data.test)):
        arrays[f"{name}.users"] = log.offsets(len(data.users))
        if len(data.items) <= 1 << 16:
            arrays[f"{name}.items"] = log.items.astype(np.min_scalar_type(len(data.items) - 1))
    return {
        name: np.ascontiguousarray(array, _kind(name, array)) for name, array in arrays.items() if array is not None
    }


def _kind(name: str, array: NDArray[Any]) -> str:
    """Returns how an array is stored; ids may be text, and few items need few bits."""
    if name in _ITEM_COLUMNS and array.dtype.str in _ITEM_KINDS:
        return array.dtype.str
    return f"<U{array.dtype.itemsize // 4}" if name in _IDS and array.dtype.kind == "U" else _KINDS[name]


def _write(data: InteractionData, folder: Path, key: Mapping[str, Any]) -> None:
    def written(name: str, array: NDArray[Any]) -> dict[str, Any]:
        path = folder / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        return {"shape": list(array.shape), "sha256": file_hash(path)}

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(written, name, array) for name, array in _arrays_of(data).items()}
        data_hash = data.data_hash
    files = {name: future.result() for name, future in futures.items()}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "key": dict(key),
        "data_hash": data_hash,
        "provenance": data.provenance.as_dict(),
        "report": dict(data.report),
        "feature_names": {"users": data.users.features.names, "items": data.items.features.names},
        "tag_names": data.items.tag_names,
        "positives_only": {"train": data.train.positives_only, "test": data.test.positives_only},
        "negatives": asdict(data.negatives),
        "arrays": files,
    }
    try:
        text = json.dumps(with_checksum(manifest), indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"report, provenance and cache key must be JSON-able: {error}") from error
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8", newline="\n")


def _assemble(folder: Path, manifest: Mapping[str, Any], hashed_up_to: float) -> InteractionData:
    arrays: dict[str, Any] = dict.fromkeys(_OPTIONAL)
    for name in _KINDS:
        if name in manifest["arrays"] or name not in _OPTIONAL:
            arrays[name] = _open_array(folder, name, manifest["arrays"][name], hashed_up_to)
    for log in ("train", "test"):
        starts = arrays[f"{log}.users"]
        arrays[f"{log}.users"] = np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts))
        arrays[f"{log}.items"] = arrays[f"{log}.items"].astype(np.int32)
        for column in ("users", "items"):
            arrays[f"{log}.{column}"].flags.writeable = False
    names = manifest["feature_names"]
    logs = {
        log: InteractionLog(
            **{column: arrays[f"{log}.{column}"] for column in _LOG_KINDS},
            positives_only=bool(manifest["positives_only"][log]),
        )
        for log in ("train", "test")
    }
    data = InteractionData(
        users=Users(arrays["users.ids"], FeatureTable(arrays["users.features"], tuple(names["users"]))),
        items=Catalogue(
            arrays["items.ids"],
            FeatureTable(arrays["items.features"], tuple(names["items"])),
            arrays["items.tags"],
            tuple(manifest["tag_names"]),
            arrays["items.shown"],
        ),
        provenance=Provenance(**manifest["provenance"]),
        report=manifest["report"],
        negatives=NegativeSampling(**manifest.get("negatives", {})),
        **logs,
    )
    data.__dict__["data_hash"] = str(manifest["data_hash"])
    return data


def _open_array(folder: Path, name: str, entry: Mapping[str, Any], hashed_up_to: float) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    if path.stat().st_size <= hashed_up_to and file_hash(path) != entry["sha256"]:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the recorded one; {_REMEDY}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.str != _kind(name, array) or list(array.shape) != entry["shape"]:
        raise ArtifactError(f"{path} holds {array.dtype.str} {array.shape}, not what {MANIFEST} says")
    return np.asarray(array)


def _store(data: InteractionData, target: Path, key: Mapping[str, Any], keep_existing: bool) -> None:
    with temporary_beside(target) as temporary:
        temporary.mkdir()
        _write(data, temporary, key)
        while True:
            try:
                os.rename(temporary, target)
                return
            except OSError:
                if not target.exists():
                    raise
            if keep_existing and _is_data(target):
                return
            remove_folder(target)


def _is_data(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except ArtifactError:
        return False
    return True
