"""Further tables of a report: any :class:`~hrl_policies.study.result_table.ResultTable`, made sortable."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hrl_policies.study.result_table import ResultTable

_NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_EMPTY = ("", "-", "—")


@dataclass(frozen=True)
class FurtherCell:
    """A cell of a further table.

    Attributes:
        text: What is shown.
        value: What is sorted by; empty for a missing number, None in a column of text.
    """

    text: str
    value: str | None


@dataclass(frozen=True)
class FurtherTable:
    """A table that is shown as it is.

    Attributes:
        anchor: Id in the document.
        title: What it is of.
        header: Column titles, and whether the column holds numbers.
        rows: Cells.
        notes: What the numbers are.
    """

    anchor: str
    title: str
    header: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[FurtherCell, ...], ...]
    notes: tuple[str, ...]


def further_tables(tables: Sequence[ResultTable]) -> tuple[FurtherTable, ...]:
    """Returns tables whose columns sort by the number that their cells begin with, if all but empty ones do."""
    return tuple(_further(table, f"further-{number}") for number, table in enumerate(tables, 1))


def _further(table: ResultTable, anchor: str) -> FurtherTable:
    texts = [[str(cell).strip() for cell in row] for row in table.rows]
    numeric = [
        place > 0 and all(row[place] in _EMPTY or _NUMBER.match(row[place]) for row in texts)
        for place in range(len(table.full_header()))
    ]
    return FurtherTable(
        anchor,
        table.title,
        tuple(zip(table.full_header(), numeric, strict=True)),
        tuple(
            tuple(
                FurtherCell(text, _key(text) if number else None)
                for text, number in zip(row, numeric, strict=True)
            )
            for row in texts
        ),
        table.notes,
    )


def _key(text: str) -> str:
    found = _NUMBER.match(text)
    return "" if found is None else found[0].replace(",", "")
