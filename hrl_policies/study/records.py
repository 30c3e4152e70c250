"""JSON objects and tables of runs and studies: written whole or not at all, refused with their name where damaged."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import parse_as, whole, write_text_atomically

TRAIN_AGAIN = "train it again"

_FORMULA = re.compile(r"[=+\-@\t\r']")
"""How a cell begins that a spreadsheet takes for a formula, or that :func:`plain_cell` has marked."""
_INTEGER = re.compile(r"0|-?[1-9]\d*")


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, with sorted keys, so that equal content gives equal bytes."""
    write_text_atomically(path, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ArtifactError: If the file is missing or damaged.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing; this is not a whole run folder")
    with whole(path, "JSON object", TRAIN_AGAIN):
        return parse_as(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))


def plain_cell(value: Any) -> Any:
    """Returns a cell of a CSV that no spreadsheet computes: text that begins like a formula gets an apostrophe."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def write_table(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV atomically; numbers keep all their digits, and what a row does not have is left empty."""
    stream = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(stream, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)
    write_text_atomically(path, stream.getvalue())


def read_table(path: Path, ids: Sequence[str] = (), columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Reads a CSV of numbers (booleans count as 0 and 1) and, in the columns named ``ids``, of raw ids.

    ``columns`` are those that a table needs, if it has any.

    Raises:
        ArtifactError: If the file is missing or holds something else.
    """
    if not path.exists():
        raise ArtifactError(f"{path} is missing; this is not a whole run folder")
    with whole(path, "table of numbers", TRAIN_AGAIN):
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
        for name in columns:
            if reader.fieldnames and name not in reader.fieldnames:
                raise ValueError(f"it lacks the column '{name}'")
        as_text = {name for name in ids if not all(_INTEGER.fullmatch(row[name]) for row in rows)}
        read = dict.fromkeys(ids, int) | dict.fromkeys(as_text, _text)
        return [{name: read.get(name, _number)(text) for name, text in row.items()} for row in rows]


def _text(cell: str) -> str:
    return cell.removeprefix("'") if _FORMULA.match(cell[1:]) else cell


def _number(text: str) -> float:
    return {"True": 1.0, "False": 0.0}[text] if text in ("True", "False") else float(text)
