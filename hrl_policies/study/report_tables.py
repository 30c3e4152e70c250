"""Tables of results as plain data: what is shown, what is sorted by, and every seed behind a mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrl_policies.study.config import RunConfig
from hrl_policies.study.store import StoredRun
from hrl_policies.study.table import ResultTable
from hrl_policies.study.tables import (
    COLUMNS,
    Column,
    RunRecord,
    by_conditions,
    half_interval,
    result_tables,
    variant_title,
)
from hrl_policies.zoo import METHODS, method

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


MISSING = "—"
_LENGTHS = ("len_floor", "len_ceiling", "len")
_MARK_LEFT, _MARK_RIGHT = 4.0, 86.0
"""Ends of the small drawing of Len, 90 wide."""


@dataclass(frozen=True)
class Cell:
    """A number as it is shown and as it is sorted.

    Attributes:
        text: What is shown.
        value: What is sorted by, empty if there is none.
        interval: Half the interval as text, empty without one.
    """

    text: str = MISSING
    value: str = ""
    interval: str = ""

    @classmethod
    def of(cls, values: Sequence[float], column: Column) -> Cell:
        """Returns the mean of values with their Student interval, if the column has one."""
        if not values or not np.isfinite(values).all():
            return cls()
        mean = float(np.mean(values))
        spread = f"{half_interval(values):.{column.digits}f}" if len(values) > 1 and column.interval else ""
        return cls(f"{mean:.{column.digits}f}", f"{mean:.9g}", spread)

    @classmethod
    def count(cls, number: int) -> Cell:
        """Returns a whole number; 0 counts as missing."""
        return cls(f"{number:,}", str(number)) if number else cls()


@dataclass(frozen=True)
class LengthMark:
    """Where Len lies between its floor and its ceiling, as coordinates of a small drawing.

    Attributes:
        floor: Left end.
        ceiling: Right end.
        at: Len.
        words: The same for those who do not see it.
    """

    floor: float
    ceiling: float
    at: float
    words: str


@dataclass(frozen=True)
class SeedRow:
    """One run in a table of results.

    Attributes:
        seed: Training seed.
        run: Anchor of the run.
        cells: Its figures.
        mark: See :class:`LengthMark`.
    """

    seed: int
    run: str
    cells: tuple[Cell, ...]
    mark: LengthMark | None


@dataclass(frozen=True)
class MethodRow:
    """One method in a table of results.

    Attributes:
        anchor: Id in the document.
        title: What tables call it.
        family: Which checkbox shows it.
        search: What the filter looks into.
        cells: Means over seeds.
        mark: See :class:`LengthMark`.
        seeds: Its runs.
    """

    anchor: str
    title: str
    family: str
    search: str
    cells: tuple[Cell, ...]
    mark: LengthMark | None
    seeds: tuple[SeedRow, ...]


@dataclass(frozen=True)
class TableSection:
    """One table of results.

    Attributes:
        anchor: Id in the document.
        title: World and Max Len.
        origin: Where the data comes from.
        columns: Titles and meanings of the figures.
        rows: Methods in the order of the zoo.
        notes: What the numbers are.
        marked: Whether the length formula is known, and so floor and ceiling.
    """

    anchor: str
    title: str
    origin: str
    columns: tuple[Column, ...]
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    marked: bool


def run_title(config: RunConfig) -> str:
    """Returns how tables call the method of a run."""
    purifier = "" if config.purifier is None else config.purifier.name
    return variant_title(config.method, purifier, config.variant)


def search_words(config: RunConfig) -> str:
    """Returns what the filter finds a run by."""
    name, session = config.method, config.session
    words = f"{run_title(config)} {name} {family_of(name)} {config.world} max len {session.max_len} seed {config.seed}"
    return words.lower()


def family_of(name: str) -> str:
    """Returns how the report groups a method: its family, bounds apart from other controls."""
    spec = method(name)
    return "privileged bound" if spec.privileged else spec.family


def families(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Returns the families of all runs, those that are trained first."""
    present = {run.config.method for run in runs}
    order = sorted(
        (spec for spec in METHODS.values() if spec.name in present), key=lambda one: not one.learns
    )
    return tuple(dict.fromkeys(family_of(spec.name) for spec in order))


def table_sections(
    runs: Sequence[StoredRun], anchors: Mapping[Path, str], command: str
) -> tuple[TableSection, ...]:
    """Returns a table of results for every world and way of running sessions.

    Args:
        runs: Runs, of which the finished ones are tabulated.
        anchors: Ids of the runs by folder.
        command: The command that makes these numbers again.

    Raises:
        ValueError: If runs of one table were evaluated differently, or two of a method share a seed.
    """
    pairs = [(RunRecord.of_run(run), anchors[run.folder]) for run in runs if run.complete]
    of_run = {id(record): anchor for record, anchor in pairs}
    groups = by_conditions([record for record, _ in pairs])
    return tuple(_table(group, of_run, command, f"table-{n}") for n, group in enumerate(groups, 1))


@dataclass(frozen=True)
class _Layout:
    """What the rows of one table have in common.

    Attributes:
        columns: Figures that all runs have.
        low: Len at the left end of the drawings.
        high: Len at the right end; not above ``low`` if there are none.
        anchors: Ids of the runs by identity of their records.
    """

    columns: tuple[Column, ...]
    low: float
    high: float
    anchors: Mapping[int, str]

    @property
    def marked(self) -> bool:
        return self.high > self.low

    def cells(self, records: Sequence[RunRecord]) -> tuple[Cell, ...]:
        return tuple(
            Cell.of([one.summary[column.figure] for one in records], column) for column in self.columns
        )

    def mark(self, records: Sequence[RunRecord]) -> LengthMark | None:
        if not self.marked:
            return None
        lengths = [float(np.mean([one.summary[name] for one in records])) for name in _LENGTHS]
        floor, ceiling, at = (
            round(_MARK_LEFT + (_MARK_RIGHT - _MARK_LEFT) * (value - self.low) / (self.high - self.low), 1)
            for value in lengths
        )
        words = "Len {2:.1f} between floor {0:.1f} and ceiling {1:.1f}".format(*lengths)
        return LengthMark(floor, ceiling, at, words)


def _table(
    records: Sequence[RunRecord], anchors: Mapping[int, str], command: str, anchor: str
) -> TableSection:
    (table,) = result_tables(records, command)
    columns = tuple(column for column in COLUMNS if column.title in table.header)
    lengths = [one.summary.get(name, math.nan) for one in records for name in _LENGTHS]
    low, high = (min(lengths), max(lengths)) if all(map(math.isfinite, lengths)) else (0.0, 0.0)
    layout = _Layout(columns, low, high, anchors)
    order = list(METHODS)
    variants: dict[str, list[RunRecord]] = {}
    for record in sorted(
        records, key=lambda one: (order.index(one.config.method), run_title(one.config), one.config.seed)
    ):
        variants.setdefault(run_title(record.config), []).append(record)
    rows = tuple(
        _method_row(title, group, layout, f"{anchor}-{number}")
        for number, (title, group) in enumerate(variants.items(), 1)
    )
    return TableSection(anchor, table.title, records[0].origin, columns, rows, table.notes, layout.marked)


def _method_row(title: str, records: Sequence[RunRecord], layout: _Layout, anchor: str) -> MethodRow:
    name = records[0].config.method
    return MethodRow(
        anchor=anchor,
        title=title,
        family=family_of(name),
        search=" ".join(search_words(one.config) for one in records),
        cells=layout.cells(records),
        mark=layout.mark(records),
        seeds=tuple(
            SeedRow(one.config.seed, layout.anchors[id(one)], layout.cells([one]), layout.mark([one]))
            for one in records
        ),
    )
