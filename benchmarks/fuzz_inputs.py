"""Mutated inputs for fuzzing: bytes decide how small valid bytes, tables, trees, arrays and archives are changed."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kuaifair_env.files import CHECKSUMS, file_hash, with_checksum, write_checksums

NOISE = ("\n", "\r\n", "\r", '"', "'", ",", ";", "\t", "\0", "\ufeff", "é", "[", "{", ": ", "- ", "&a ", "*a ", "!!x ")
SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
    *(2**24 + 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 10**30, 10**400),
    *("", " ", "a", "NA", "nan", "null", "true", "1", "007", "1.0", "1e3", "1e999", "-1", "0x10", "1_000", "\u0661"),
    *("2024-01-31", "2024-01-31T12:00:00Z", "20240131", "1593878903.5", "1593878903123", "99999-01-01"),
    *("=1+1", "<b>", "a\nb", "a\0b", "\ud7ff", "[1, 2]", "{}", "A|B", "../x", "/", "x" * 3_000),
    *([], {}, [1], ["a", None], {"a": 1}, [[]], {"": {}}),
)


class Draws:
    """Decisions read from bytes; where they are used up, the first choice and no change."""

    def __init__(self, data: bytes) -> None:
        self._data, self._place = data, 0

    def below(self, count: int) -> int:
        """Returns a number from 0 to ``count - 1``."""
        size = 1 if count <= 256 else 3
        word = self._data[self._place : self._place + size]
        self._place += size
        return int.from_bytes(word, "little") % max(count, 1)

    def chance(self, percent: int) -> bool:
        """Returns whether something of a probability happens."""
        return self.below(100) >= 100 - percent

    def of(self, options: Sequence[Any]) -> Any:
        """Returns one of some options."""
        return options[self.below(len(options))]

    def scalar(self) -> Any:
        """Returns a value that something may not expect."""
        return copy.deepcopy(self.of(SCALARS))

    def raw(self, limit: int = 24) -> bytes:
        """Returns bytes."""
        size = self.below(limit)
        self._place += size
        return self._data[self._place - size : self._place]


def mutated_bytes(draws: Draws, content: bytes, changes: int = 4) -> bytes:
    """Returns content with some bytes flipped, replaced, cut, repeated or inserted."""
    for _ in range(draws.below(changes)):
        place, size = draws.below(len(content) or 1), 1 + draws.below(64)
        kind = draws.below(6)
        middle = {
            0: bytes([content[place] ^ (1 << draws.below(8))]) + content[place + 1 : place + size] if content else b"",
            1: draws.raw(),
            2: b"",
            3: 2 * content[place : place + size],
            4: draws.of(NOISE).encode() + content[place : place + size],
            5: content[place : place + size],
        }[kind]
        content = content[:place] + middle + (b"" if kind == 5 else content[place + size :])
    return content


def mutated_text(draws: Draws, text: str, separator: str = ",") -> str:
    """Returns a table of text with other cells, columns, lines or bytes."""
    rows = [line.split(separator) for line in text.splitlines()]
    for _ in range(draws.below(4)):
        row, kind = draws.of(rows), draws.below(7)
        place = draws.below(len(row))
        if kind <= 2:
            row[place] = str(draws.scalar())
        elif kind == 3:
            cell = str(draws.scalar())
            for other in rows[1:]:
                other[place : place + 1] = [cell]
        elif kind == 4:
            rows[0][draws.below(len(rows[0])) : 1 + draws.below(len(rows[0]))] = [
                draws.of([*rows[0], str(draws.scalar())])
            ]
        elif kind == 5:
            del row[place + 1 :]
        else:
            rows.append(list(row))
    end = draws.of(("\n", "\r\n", "\r", "\n\n"))
    return end.join(draws.of((separator, separator, ";", "\t", "|")).join(row) for row in rows) + end


def mutated_tree(draws: Draws, content: Any, changes: int = 4) -> Any:
    """Returns JSON-able content with entries replaced, removed, added, nested or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(draws.below(changes)):
        holders = [holder for holder in _holders(content) if len(holder)]
        if not holders:
            return draws.scalar()
        holder, kind = draws.of(holders), draws.below(6)
        key = draws.of(list(holder)) if isinstance(holder, dict) else draws.below(len(holder))
        if kind <= 1:
            holder[key] = draws.scalar()
        elif kind == 2:
            del holder[key]
        elif kind == 3:
            other = draws.of(holders)
            holder[key] = copy.deepcopy(draws.of(list(other.values()) if isinstance(other, dict) else other))
        elif kind == 4:
            holder[key] = draws.of(([holder[key]], {"a": holder[key]}, [holder[key]] * 3))
        elif isinstance(holder, dict):
            holder[draws.of(("a", "name", "", "__class__", 1))] = draws.scalar()
    return content


def _holders(content: Any) -> Iterator[Any]:
    if isinstance(content, dict | list):
        yield content
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _holders(entry)


def mutated_array(draws: Draws, array: np.ndarray) -> np.ndarray:
    """Returns an array of another type, shape or content."""
    kind = draws.below(6)
    if kind == 0 and array.size:
        array = array.copy()
        with contextlib.suppress(ValueError, OverflowError, TypeError):
            array.flat[draws.below(array.size)] = draws.of((np.nan, np.inf, -1, 2**31, 10**18, 0))
        return array
    if kind == 1:
        return array.astype(draws.of((np.float32, np.float64, np.int8, np.int64, np.uint64, np.bool_, np.complex64)))
    return draws.of((array[None], array.reshape(-1), array[:0], array[..., None], np.concatenate([array] * 2)[:1_000]))


def typed_column(draws: Draws, column: pd.Series) -> pd.Series:
    """Returns a column of another type, or with other values."""
    types = (
        "int8",
        "int64",
        "uint64",
        "float16",
        "float32",
        "Int64",
        "string",
        "category",
        "bool",
        "boolean",
        "object",
    )
    types += ("datetime64[s]", "datetime64[ns]", "datetime64[ns, UTC]", "timedelta64[ns]", "complex64")
    if draws.chance(50):
        return column.astype(draws.of(types))
    values = column.astype(object).tolist()
    for _ in range(1 + draws.below(3)):
        values[draws.below(len(values))] = draws.scalar()
    return pd.Series(values, name=column.name)


def change_file(draws: Draws, path: Path) -> None:
    """Changes a file of a folder, and then the checksums that cover it."""
    old, content = file_hash(path), path.read_bytes()
    if draws.chance(15):
        content = mutated_bytes(draws, content)
    elif path.suffix == ".json":
        tree = mutated_tree(draws, json.loads(content))
        tree = (
            with_checksum({key: value for key, value in tree.items() if key != "sha256"})
            if isinstance(tree, dict) and "sha256" in tree
            else tree
        )
        content = json.dumps(tree).encode()
    elif path.suffix in (".npz", ".zip"):
        content = changed_archive(draws, content)
    elif path.suffix == ".npy":
        stream = io.BytesIO()
        np.save(stream, mutated_array(draws, np.load(io.BytesIO(content))))
        content = stream.getvalue()
    else:
        content = mutated_text(draws, content.decode("utf-8")).encode("utf-8", "replace")
    path.write_bytes(content)
    for header in path.parent.rglob("*.json") if draws.chance(90) else ():
        if header != path and old in (text := header.read_text("utf-8")):
            tree = json.loads(text.replace(old, file_hash(path)))
            tree.pop("sha256", None)
            header.write_text(json.dumps(with_checksum(tree)), "utf-8")
    if (path.parent / CHECKSUMS).exists() and path.name != CHECKSUMS:
        write_checksums(path.parent)


def changed_archive(draws: Draws, content: bytes) -> bytes:
    """Returns an archive with a member changed, under a checksum that fits, missing, or under another name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        chosen = draws.of(old.namelist())
        for name in old.namelist():
            member = old.read(name)
            if name == chosen and name.endswith(".npy") and draws.chance(80):
                buffer = io.BytesIO()
                np.save(buffer, mutated_array(draws, np.load(io.BytesIO(member))))
                member = buffer.getvalue()
            elif name == chosen and member[:2] == b"PK":
                member = changed_archive(draws, member)
            elif name == chosen:
                name, member = draws.of((name, name, name, "other", None)), mutated_bytes(draws, member)
            if name is not None:
                new.writestr(name, member)
    return stream.getvalue()
