"""The table behind everything that a study reports, and its forms: terminal, text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from hrl_policies.study.statistics import Interval

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
        """Returns an estimate with its interval."""
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


def sort_value(cell: Cell) -> float | None:
    """Returns the number that a cell is, or that its text begins with; None if there is none."""
    if isinstance(cell, Measured):
        return cell.value
    match = _LEADING_NUMBER.match(cell.strip())
    return None if match is None else float(match[0].replace(",", ""))


@dataclass(frozen=True)
class Span:
    """A title over neighbouring columns, such as a horizon.

    Attributes:
        title: The title.
        columns: Number of columns.
    """

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
    notes: tuple[str, ...] = field(default=())
    spans: tuple[Span, ...] = field(default=())

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
        if form == "text":
            return "\n".join([self.text(), "", *(f"- {note}" for note in self.notes), ""])
        if form == "markdown":
            return self.markdown()
        if form == "latex":
            return self.latex()
        if form == "csv":
            return self.csv()
        raise ValueError(f"unknown format {form!r} of a table; choose {', '.join(SUFFIXES)}")

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        header = self.full_header()
        lines = [f"### {self.title}", ""]
        lines += [
            _markdown_row(header),
            "|" + " --- |" * self._left + " ---: |" * (len(header) - self._left),
        ]
        lines += [_markdown_row([str(cell) for cell in row]) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

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
            lines += [_latex_row([self.header[column] for column in columns]), r"\midrule"]
            lines += [_latex_row([row[column] for column in columns]) for row in self.rows]
            lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\raggedright {escape_latex(note)}" for note in self.notes]
        return "\n".join([*lines, r"\end{table}", ""])

    def csv(self) -> str:
        """Returns the table as CSV with all digits; notes stand above it behind ``#``.

        A measured column is followed by ``TITLE low`` and ``TITLE high`` where a row has an interval, and by
        ``TITLE spread`` where one has a ``±``. ``pandas.read_csv(path, comment="#")`` reads it.
        """
        stream = io.StringIO()
        for note in (self.title, *self.notes):
            stream.write(f"# {note}\n")
        expanded = [
            _csv_column(title, [row[column] for row in self.rows]) for column, title in enumerate(self.full_header())
        ]
        titles = [title for columns in expanded for title in columns]
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(titles)
        filled = [values for columns in expanded for values in columns.values()]
        writer.writerows(zip(*filled, strict=True))
        return stream.getvalue()

    def show(self, console: Console) -> None:
        """Prints the table whole: lines may wrap in a narrow terminal, but no cell is cut."""
        # Rich's own tables cut cells to the width of the terminal.
        console.print(self.text(), markup=False, highlight=False, soft_wrap=True)
        console.print()
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)
        console.print()

    def _groups(self) -> list[tuple[Span, range]]:
        """Returns each group with its columns."""
        starts = accumulate((span.columns for span in self.spans), initial=self.common)
        return [(span, range(start, start + span.columns)) for span, start in zip(self.spans, starts, strict=False)]

    def _blocks(self) -> list[tuple[Span | None, list[int]]]:
        """Returns the groups, each with its own columns behind those of all groups; without groups the whole."""
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


def _csv_column(title: str, cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Returns a column, and behind it those with the ends of intervals and with spreads, if any."""
    columns = {title: ["" if cell == MISSING else _csv_cell(cell) for cell in cells]}
    for part in ("low", "high", "spread"):
        values = [getattr(cell, part, None) for cell in cells]
        if any(value is not None for value in values):
            columns[f"{title} {part}"] = ["" if value is None else repr(float(value)) for value in values]
    return columns


def _csv_cell(cell: Cell) -> str:
    return repr(float(cell.value)) if isinstance(cell, Measured) else cell


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _latex_row(cells: Sequence[Cell]) -> str:
    return " & ".join(map(_latex_cell, cells)) + r" \\"


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, str) or cell.low is None:
        return escape_latex(str(cell))
    return rf"{escape_latex(cell.number)} {{\tiny {escape_latex(cell.uncertainty)}}}"
