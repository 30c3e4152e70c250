"""Damaged artifacts: every way in which a file can be wrong, and what must become of each."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Family, open_artifact, save_artifact

Load = Callable[[Path], Any]

_WRONG: tuple[Any, ...] = (None, [1, "two"], {}, "many", 0.5)
_DEPTH = 3
_FEW = 8
_REPORTS = ("report", "provenance")


def contents(path: Path, family: Family) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Returns kind, tensors and settings of a file."""
    with open_artifact(path, family=family) as (kind, tensors, settings):
        return kind, tensors, settings


def with_bits_flipped(path: Path, bits: Iterable[int]) -> Iterator[int]:
    """Yields bit by bit while it is flipped in the file, which is written in place: truncating it takes a disk 4 ms."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as stream:
        for bit in bits:
            for byte in (content[bit // 8] ^ 1 << bit % 8, content[bit // 8]):
                stream.seek(bit // 8)
                stream.write(bytes([byte]))
                if byte != content[bit // 8]:
                    yield bit


def needs_error(load: Load, path: Path, damage: str) -> None:
    """A file must end in one sentence that names it."""
    with pytest.raises(ArtifactError) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message, f"{damage}: {message}"


def try_damaged_bytes(path: Path, family: Family, load: Load, count: int) -> None:
    """Flips a bit at ``count`` places, shortens and empties the file: an error, or exactly what was saved."""
    whole = path.read_bytes()
    right = contents(path, family)
    (header,) = struct.unpack("<Q", whole[:8])
    places = {*range(8), *np.linspace(8, 8 + header - 1, count).astype(int).tolist()}
    places |= set(np.linspace(8 + header, len(whole) - 1, count).astype(int).tolist())
    for place in sorted(place for place in places if place < len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            load(path)
        except ArtifactError as error:
            assert str(path) in str(error)
        else:
            assert same(contents(path, family), right), f"bit {place % 8} of byte {place} changed what was loaded"
    for size in {0, 4, 8, 8 + header // 2, 8 + header, len(whole) // 2, len(whole) - 1} - {len(whole)}:
        path.write_bytes(whole[:size])
        needs_error(load, path, f"the first {size} bytes alone")
    path.write_bytes(whole)


def try_foreign_files(path: Path, family: Family, load: Load) -> None:
    """Files of other things, versions and kinds, headers that are not what they should be, no file at all."""
    whole = path.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    meta, body = json.loads(header["__metadata__"]["kuaifair"]), whole[8 + size :]

    def write(text: str, extra: Mapping[str, Any] | None = None, more: bytes = b"") -> None:
        altered = json.dumps(header | {"__metadata__": {"kuaifair": text}} | dict(extra or {})).encode()
        path.write_bytes(struct.pack("<Q", len(altered)) + altered + body + more)

    texts = {
        "deeply nested": "[" * 100_000,
        "not JSON": "{",
        "a list": "[]",
        "another family": json.dumps(meta | {"format": "kuaifair-cake"}),
        "older": json.dumps(meta | {"version": family.version - 1}),
        "newer": json.dumps(meta | {"version": family.version + 1}),
        "version of another type": json.dumps(meta | {"version": [family.version]}),
        "another kind": json.dumps(meta | {"kind": "cake"}),
        "no checksum": json.dumps({name: value for name, value in meta.items() if name != "sha256"}),
        "no kind": json.dumps({name: value for name, value in meta.items() if name != "kind"}),
        "another setting": json.dumps(meta | {"settings": meta["settings"] | {"added": 1}}),
        "NaN": json.dumps(meta | {"settings": meta["settings"] | {"added": float("nan")}}),
        "settings that are a list": json.dumps(meta | {"settings": []}),
    }
    for damage, text in texts.items():
        write(text)
        needs_error(load, path, damage)
    for kind, width in (("BF16", 2), ("F8_E4M3", 1), ("F32", 4), ("Q77", 1)):
        tensor = {"dtype": kind, "shape": [2], "data_offsets": [len(body), len(body) + 2 * width]}
        write(json.dumps(meta), {"added": tensor}, bytes(2 * width))
        needs_error(load, path, f"an added tensor of {kind}")
    for content in (b"\x80\x04K*.", b"{}", b"PK\x03\x04", bytes(64), b"\xff" * 64):
        path.write_bytes(content)
        needs_error(load, path, repr(content))
    path.unlink()
    needs_error(load, path, "no file")
    path.mkdir()
    needs_error(load, path, "a folder")
    path.rmdir()
    path.write_bytes(whole)


def try_wrong_settings(path: Path, family: Family, load: Load, optional: Sequence[str] = ()) -> None:
    """Settings without an entry, and entries of another type, under a checksum that is right.

    Those at the top must be refused, unless they may be None (``optional``); deeper ones must be refused or taken. What
    reports hold is not looked at.
    """
    whole = path.read_bytes()
    kind, tensors, settings = contents(path, family)
    for wrong, place, old, new in wrong_contents(settings):
        save_artifact(path, kind, tensors, wrong, family)
        damage = f"settings {place}: {new!r} for {old!r}"
        number_for_number = isinstance(old, int | float) and isinstance(new, int | float)
        allowed = place[0] in optional and None in (old, new)
        if len(place) == 1 and not number_for_number and not allowed:
            needs_error(load, path, damage)
            continue
        try:
            load(path)
        except ArtifactError as error:
            assert str(path) in str(error), damage
    path.write_bytes(whole)


def wrong_contents(content: dict[str, Any]) -> Iterator[tuple[dict[str, Any], tuple[Any, ...], Any, Any]]:
    """Yields JSON content with one entry taken away or of another type: all of it, the place, old and new value.

    An entry at the top meets every damage, a deeper one every third, so that all of them meet deeper entries in turn.
    """
    number = 0
    for place, old in _entries(content):
        for new in (_REMOVED, *_WRONG):
            if new is _REMOVED or type(new) is not type(old):
                number += 1
                if len(place) == 1 or number % 3 == 0:
                    yield _replaced(content, place, new), place, old, new


def try_wrong_tensors(path: Path, family: Family, load: Load) -> None:
    """Tensors that are missing, of another shape, or hold NaN, under a checksum that is right."""
    whole = path.read_bytes()
    kind, tensors, settings = contents(path, family)
    for number, (name, tensor) in enumerate(tensors.items()):
        changes = {"missing": None}
        # Of networks each tensor has one of the other two: layers have two tensors each, weights and biases.
        turn = number % 4 < 2 if len(tensors) > _FEW else None
        is_numbers = bool(tensor.dtype.kind == "f" and tensor.size)
        if not is_numbers or turn in (True, None):
            changes["of one more dimension"] = tensor[None]
        if is_numbers and turn in (False, None):
            changes["with NaN"] = np.where(np.arange(tensor.size).reshape(tensor.shape) == 0, np.nan, tensor)
        for damage, changed in changes.items():
            rest = {other: value for other, value in tensors.items() if other != name}
            if changed is not None:
                rest[name] = changed.astype(tensor.dtype)
            save_artifact(path, kind, rest, settings, family)
            needs_error(load, path, f"tensor {name} {damage}")
    path.write_bytes(whole)


def same(one: Any, two: Any) -> bool:
    """Says whether kind, tensors and settings of two files are the same."""
    return bool(
        one[0] == two[0]
        and one[2] == two[2]
        and one[1].keys() == two[1].keys()
        and all(one[1][name].dtype == two[1][name].dtype for name in one[1])
        and all(np.array_equal(one[1][name], two[1][name]) for name in one[1])
    )


_REMOVED = object()


def _entries(content: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(content, list):
        content = dict(enumerate(content[:1]))
    for name, value in content.items() if isinstance(content, dict) else ():
        yield (*place, name), value
        if len(place) + 1 < _DEPTH and name not in _REPORTS:
            yield from _entries(value, (*place, name))


def _replaced(content: Any, place: tuple[Any, ...], new: Any) -> Any:
    copied = json.loads(json.dumps(content))
    inner = copied
    for name in place[:-1]:
        inner = inner[name]
    if new is _REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return copied
