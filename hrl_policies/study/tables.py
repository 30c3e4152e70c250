"""Tables: what a study reports, in any form (terminal, text, Markdown, LaTeX, CSV), and the table of results.

There is a table of results for each world and way of running sessions, with the columns that the paper left out.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hrl_policies.study import labels
from hrl_policies.study.config import unusual_settings
from hrl_policies.study.labels import RunRecord, Variant
from hrl_policies.study.records import plain_cell, write_table
from hrl_policies.study.statistics import student_interval
from kuaifair_env.abandonment import leave_rule, rule_text
from kuaifair_env.fingerprint import WorldFingerprint
from kuaifair_env.intervals import Interval, rate_interval
from kuaifair_env.simulator import Repeats

if TYPE_CHECKING:
    from rich.console import Console

TableFormat = Literal["text", "markdown", "latex", "csv"]

SUFFIXES: dict[TableFormat, str] = {"text": ".txt", "markdown": ".md", "latex": ".tex", "csv": ".csv"}
"""Formats with the endings of their files."""

MISSING = "-"
"""A cell for which there is nothing; empty in CSV."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "†": r"\dag{}",
    "−": r"$-$",  # noqa: RUF001
    "[": "{[}",
    "<": r"$<$",
    ">": r"$>$",
    "×": r"$\times$",  # noqa: RUF001
    "µ": r"$\mu$",
    "²": r"$^2$",
}
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LATEX_SPECIAL = re.compile("[" + re.escape("".join(_LATEX)) + "]")
_LEADING_NUMBER = re.compile(r"[-+]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Measured:
    """A number in a table with its uncertainty.

    Attributes:
        value: The number.
        digits: Decimal places to show; CSV keeps them all.
        low: Lower end of its interval, if it has one.
        high: Upper end.
        spread: What is shown behind ``±``; the notes of the table say what it is.
        sign: Whether a positive number shows its sign, as differences do.
    """

    value: float
    digits: int = 3
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    sign: bool = False

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends; give both low and high, or neither")

    @classmethod
    def of_interval(cls, interval: Interval, digits: int = 3, *, sign: bool = False) -> Measured:
        """Returns the estimate and the ends of an interval."""
        return cls(interval.estimate, digits, interval.low, interval.high, sign=sign)

    @property
    def number(self) -> str:
        """The number alone, as text."""
        return self._shown(self.value)

    @property
    def uncertainty(self) -> str:
        """Interval or spread as text, empty without one."""
        if self.low is not None and self.high is not None:
            return f"[{self._shown(self.low)}, {self._shown(self.high)}]"
        return "" if self.spread is None else f"± {self.spread:.{self.digits}f}"

    def __str__(self) -> str:
        return f"{self.number} {self.uncertainty}".rstrip()

    def _shown(self, number: float) -> str:
        return f"{number:{'+' if self.sign else ''}.{self.digits}f}"


Cell = str | Measured
Row = tuple[Variant, Repeats]


def sort_value(cell: Cell) -> float | None:
    """Returns the number that a cell is, or that its text begins with; None if there is none."""
    if isinstance(cell, Measured):
        return cell.value
    match = _LEADING_NUMBER.match(cell.strip())
    return None if match is None else float(match[0].replace(",", ""))


@dataclass(frozen=True)
class Span:
    """A title over a number of neighbouring columns, such as a horizon."""

    title: str
    columns: int


@dataclass(frozen=True)
class ResultTable:
    """A table, independent of the form in which it is shown.

    Attributes:
        title: Subject of the table.
        header: Column titles.
        rows: Cells of each row.
        notes: Explanations of the numbers, one line each; every form shows them.
        spans: Titles over groups of columns, which end at the last column; the columns before the first group belong
            to all groups. Empty for none.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"'{self.title}' has {len(self.header)} columns, but a row has {len(row)} cells")
        if self.common < 0:
            raise ValueError(f"'{self.title}' has {len(self.header)} columns, fewer than its groups name")

    @property
    def common(self) -> int:
        """Number of columns before the first group."""
        return len(self.header) - sum(span.columns for span in self.spans)

    @property
    def _left(self) -> int:
        """Number of columns of words at the left."""
        return self.common if self.spans else 1

    def is_numeric(self, column: int) -> bool:
        """Returns whether a column, not the first, holds numbers or texts that begin with one, or nothing."""
        cells = [row[column] for row in self.rows]
        return column > 0 and all(cell in ("", MISSING) or sort_value(cell) is not None for cell in cells)

    def full_header(self) -> tuple[str, ...]:
        """Returns column titles that need no line above them: each with the title of its group."""
        titles = list(self.header[: self.common]) if self.spans else list(self.header)
        for span, columns in self._groups():
            titles += [f"{span.title}: {self.header[column]}" for column in columns]
        return tuple(titles)

    def render(self, form: TableFormat) -> str:
        """Returns the table in a form.

        Raises:
            ValueError: If the form is unknown.
        """
        if form not in SUFFIXES:
            raise ValueError(f"unknown format {form!r} of a table; choose {', '.join(SUFFIXES)}")
        if form == "text":
            return "\n".join([self.text(), "", *(f"- {note}" for note in self.notes), ""])
        return {"markdown": self.markdown, "latex": self.latex, "csv": self.csv}[form]()

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        rule = "|" + " --- |" * self._left + " ---: |" * (len(self.header) - self._left)
        header, *rows = (
            "| " + " | ".join(_no_tags(str(cell)).replace("|", "\\|") for cell in row) + " |"
            for row in (self.full_header(), *self.rows)
        )
        notes = [f"- {_no_tags(note)}" for note in self.notes]
        return "\n".join([f"### {_no_tags(self.title)}", "", header, rule, *rows, "", *notes, ""])

    def text(self) -> str:
        """Returns title and aligned rows as plain text, without notes; groups of columns stand one below another."""
        lines = [self.title]
        for span, columns in self._blocks():
            # With one run of each method the column of seeds says nothing.
            if span is None and self.header[-1] == "seeds" and all(str(row[-1]) == "1" for row in self.rows):
                columns = columns[:-1]
            lines += ["", *([] if span is None else [span.title])]
            lines += _aligned(self.header, self.rows, columns, self._left)
        return "\n".join(lines)

    def latex(self) -> str:
        r"""Returns the table as LaTeX; the document needs the package ``booktabs``.

        Text is escaped, intervals are set small, groups of columns stand one below another, and notes below the rows.
        """
        lines = [r"\begin{table}", r"\centering\footnotesize", rf"\caption{{{escape_latex(self.title)}}}"]
        for number, (span, columns) in enumerate(self._blocks()):
            alignment = "l" * self._left + "r" * (len(columns) - self._left)
            lines += [r"\par\medskip"] if number else []
            lines += [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule"]
            if span is not None:
                above = rf"\multicolumn{{{span.columns}}}{{c}}{{{escape_latex(span.title)}}} \\"
                lines.append("& " * self.common + above)
                lines.append(rf"\cmidrule(lr){{{self.common + 1}-{len(columns)}}}")
            header, *rows = (
                " & ".join(_latex_cell(row[column]) for column in columns) + r" \\" for row in (self.header, *self.rows)
            )
            lines += [header, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\raggedright {escape_latex(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def csv(self) -> str:
        """Returns the table as CSV with all digits; notes stand above it behind ``#``.

        A measured column is followed by ``TITLE low`` and ``TITLE high`` where a row has an interval, and by
        ``TITLE spread`` where one has a ``±``. ``pandas.read_csv(path, comment="#")`` reads it.
        """
        columns = [
            column
            for place, title in enumerate(self.full_header())
            for column in _csv_columns(title, [row[place] for row in self.rows])
        ]
        stream = io.StringIO()
        stream.writelines(f"# {' '.join(note.split())}\n" for note in (self.title, *self.notes))
        csv.writer(stream, lineterminator="\n").writerows(zip(*columns, strict=True))
        return stream.getvalue()

    def show(self, console: Console) -> None:
        """Prints the table whole: lines may wrap in a narrow terminal, but no cell is cut."""
        # Rich's own tables cut cells to the width of the terminal.
        console.print(f"{self.text()}\n", markup=False, highlight=False, soft_wrap=True)
        notes = "".join(f"- {note}\n" for note in self.notes)
        console.print(notes, markup=False, highlight=False)

    def _groups(self) -> list[tuple[Span, range]]:
        starts = accumulate((span.columns for span in self.spans), initial=self.common)
        return [(span, range(start, start + span.columns)) for span, start in zip(self.spans, starts, strict=False)]

    def _blocks(self) -> list[tuple[Span | None, list[int]]]:
        """Returns each group with the columns of all groups before its own; without groups the whole."""
        if not self.spans:
            return [(None, list(range(len(self.header))))]
        return [(span, [*range(self.common), *columns]) for span, columns in self._groups()]


def escape_latex(text: str) -> str:
    """Returns text in which no character means anything to LaTeX."""
    return _LATEX_SPECIAL.sub(lambda match: _LATEX[match[0]], text)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[Cell]], columns: Sequence[int], left: int) -> list[str]:
    lines = [[str(line[column]) for column in columns] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [aligned[0], "-" * len(aligned[0]), *aligned[1:]]


def _no_tags(text: str) -> str:
    """Returns text in which Markdown finds no HTML."""
    return _TAG.sub("&lt;", text)


def _csv_text(cell: str) -> str:
    """Returns text that no spreadsheet computes; a number stays one."""
    try:
        float(cell)
    except ValueError:
        return cell if cell == MISSING else str(plain_cell(cell))
    return cell


def _csv_columns(title: str, cells: Sequence[Cell]) -> Iterator[list[str]]:
    """Yields a column, and behind it those with the ends of intervals and with spreads, if any; titles come first."""
    texts = [repr(float(cell.value)) if isinstance(cell, Measured) else _csv_text(cell) for cell in cells]
    yield [plain_cell(title), *("" if text == MISSING else text for text in texts)]
    for part in ("low", "high", "spread"):
        values = [getattr(cell, part, None) for cell in cells]
        if any(value is not None for value in values):
            yield [f"{title} {part}", *("" if value is None else repr(float(value)) for value in values)]


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, str) or cell.low is None:
        return escape_latex(str(cell))
    return rf"{escape_latex(cell.number)} {{\tiny {escape_latex(cell.uncertainty)}}}"


@dataclass(frozen=True)
class Column:
    """A headline figure as a column of a table.

    Attributes:
        title: Title of the column.
        figure: Name in ``EvaluationResult.summary``.
        digits: Decimal places.
        interval: Whether the mean over seeds is given an interval.
        rate: Whether the figure is a share. R_each is one only where rewards are clicks: a mean outside [0, 1] tells.
    """

    title: str
    figure: str
    digits: int = 3
    interval: bool = True
    rate: bool = False

    def mean(self, values: Sequence[float], users: int) -> Measured:
        """Returns the mean over training seeds, from two seeds on with its 95 % interval.

        That is Student's, of which ``±`` is half. A rate, whose values lie in [0, 1], has both ends of Wilson's, which
        lie there too (:func:`rate_interval`).

        Args:
            values: One for each seed.
            users: Number of users behind each value.
        """
        mean = float(np.mean(values))
        if not self.interval or len(values) < 2:
            return Measured(mean, self.digits)
        if self.rate and min(values) >= 0.0 and max(values) <= 1.0:
            interval = rate_interval(np.asarray(values)[:, None], users)
            return Measured(mean, self.digits, interval.low, interval.high)
        return Measured(mean, self.digits, spread=student_interval(np.asarray(values)).half_width)


COLUMNS = (
    Column("Len", "len", 2),
    Column("R_each", "r_each", rate=True),
    Column("R_cum", "r_cum", 2),
    Column("AD", "ad", rate=True),
    Column("viol.", "violation_rate", rate=True),
    Column("formula", "len_predicted", 2, interval=False),
    Column("floor", "len_floor", 2, interval=False),
    Column("ceil.", "len_ceiling", 2, interval=False),
    Column("gap", "signed_gap", interval=False),
    Column("cov.", "coverage", rate=True),
)
"""The paper's four figures, what ends sessions, what the length formula says of them, and what AD hides."""


def result_tables(records: Sequence[RunRecord], command: str) -> list[ResultTable]:
    """Returns a table for each world and way of running sessions, methods in the order of the zoo.

    Rows with repeats forbidden stand below those with repeats allowed; that of a method which needs repeats is empty.
    A cell is the mean over training seeds, with its interval where there are at least two (:meth:`Column.mean`).
    ``command`` is the one that makes these numbers again.

    Raises:
        ValueError: If there are no runs, or runs of one table were evaluated differently.
    """
    if not records:
        raise ValueError("there are no finished runs to tabulate")
    tables = []
    for group in group_records(records):
        table = result_table(group, command)
        tables.append(replace(table, notes=(*_notes_on_other_worlds(group, records), *table.notes)))
    return tables


def group_records(records: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Groups runs that belong into one table: one world, one way of running sessions, one item term."""
    groups: dict[str, list[RunRecord]] = {}
    worlds: list[WorldFingerprint] = []
    for record in records:
        config = record.config
        session = labels.session_conditions(config.session) | {"max_len": config.session.max_len}
        place = next((n for n, world in enumerate(worlds) if not world.differences(record.fingerprint)), len(worlds))
        if place == len(worlds):
            worlds.append(record.fingerprint)
        world = (config.world, config.item_term, unusual_settings(config.world_settings), place)
        groups.setdefault(repr((world, sorted(session.items()))), []).append(record)
    return list(groups.values())


def _notes_on_other_worlds(group: Sequence[RunRecord], records: Sequence[RunRecord]) -> list[str]:
    """Returns a note for each world that bears the name and settings of a group's and is another one."""
    first = group[0]
    own = first.config.world, unusual_settings(first.config.world_settings)
    others = {
        str(record.fingerprint): record.fingerprint.differences(first.fingerprint)
        for record in records
        if (record.config.world, unusual_settings(record.config.world_settings)) == own
    }
    return [
        f"NOT COMPARABLE with the runs in {first.config.world} of fingerprint {other}: {', '.join(parts)} differ."
        for other, parts in others.items()
        if parts
    ]


def group_rows(records: Sequence[RunRecord]) -> dict[Row, list[RunRecord]]:
    """Groups the runs of a table into its rows: repeats allowed first, methods as in the zoo, seeds increasing.

    A method that needs repeats has a row without runs where others were run with repeats forbidden.

    Raises:
        ValueError: If two runs of a method share a seed.
    """
    rows: dict[Row, list[RunRecord]] = {}
    for record in records:
        rows.setdefault((Variant.of_config(record.config), record.config.session.repeats), []).append(record)
    for (variant, _), group in rows.items():
        if len({record.config.seed for record in group}) != len(group):
            raise ValueError(f"{variant.title} was run more than once with the same seed under the same conditions")
    if any(repeats == "forbid" for _, repeats in rows):
        rows |= {(variant, "forbid"): [] for variant, _ in rows if variant.spec.needs_repeats}
    ordered = sorted(rows, key=lambda row: (row[1], row[0].order))
    return {row: sorted(rows[row], key=lambda record: record.config.seed) for row in ordered}


def result_table(records: Sequence[RunRecord], command: str) -> ResultTable:
    """Returns the table of runs that belong into one; see :func:`result_tables`."""
    first = records[0]
    evaluated = {(r.users, r.config.episodes_per_user, r.config.evaluation_seed) for r in records}
    if len(evaluated) > 1:
        raise ValueError(
            f"runs in {first.config.world} were evaluated on different users or randomness {sorted(evaluated)}; "
            "they do not belong into one table"
        )
    columns = [column for column in COLUMNS if all(column.figure in record.summary for record in records)]
    conditions = labels.conditions(first.config)
    return ResultTable(
        title=", ".join(filter(None, (first.config.world, f"Max Len {first.config.session.max_len}", conditions))),
        header=("method", "repeats", *(column.title for column in columns), "seeds"),
        rows=tuple(
            (
                variant.title,
                repeats,
                *(
                    column.mean([record.summary[column.figure] for record in group], first.users) if group else MISSING
                    for column in columns
                ),
                str(len(group)),
            )
            for (variant, repeats), group in group_rows(records).items()
        ),
        notes=_notes(records, command),
    )


def write_records(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Writes the figures of runs as a small CSV, one row for each run, atomically."""
    rows = [
        {
            "world": record.config.world,
            "data": record.data,
            "origin": record.origin,
            "data_hash": record.data_hash,
            "fingerprint": str(record.fingerprint),
            "response": record.response,
            "candidates": record.candidates,
            "users": record.users,
            "method": record.config.method,
            "purifier": record.purifier,
            "variant": record.config.variant,
            "item_term": record.config.item_term,
            "seed": record.config.seed,
            "max_len": record.config.session.max_len,
            "slate_size": record.config.session.items_per_slate,
            "leave": rule_text(leave_rule(record.config.session.leave)),
            "repeats": record.config.session.repeats,
            "drift": record.config.session.drift,
            "reward": record.config.session.reward,
            "world_settings": json.dumps(unusual_settings(record.config.world_settings)),
            "total_steps": record.config.total_steps,
            **{name: float(value) for name, value in record.summary.items()},
        }
        for record in records
    ]
    write_table(path, rows)


def _notes(records: Sequence[RunRecord], command: str) -> tuple[str, ...]:
    first = records[0]
    remark = (
        " ± is half the 95 % Student interval of the mean for other training seeds, on these users; brackets are "
        "Wilson's interval, for rates. Controls are run once."
    )
    notes = [
        labels.data_note(first),
        labels.evaluation_note(first),
        *labels.training_notes(records, remark),
        *labels.method_notes(records),
        *labels.repeats_notes(
            [Variant.of_config(record.config) for record in records],
            [record.config.session.repeats for record in records],
        ),
        "viol.: share of slates that the leave rule punishes; gap: popular minus long-tail share of exposure (AD is "
        "its size); cov.: share of the candidates that were shown.",
    ]
    if "len_predicted" in first.summary:
        notes.append(
            "formula: the Len that (T0 - 1)/(2 - R_each + penalty * viol.) + 0.5 predicts; floor and ceil. are it "
            "with every slate punished and none, at the same R_each."
        )
    return (*notes, f"Made by: {command}")
