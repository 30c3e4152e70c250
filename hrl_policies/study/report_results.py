"""Results in the report of a study: what was run, what it can and cannot show, and tables with every seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrl_policies.study.config import RunConfig
from hrl_policies.study.labels import ORIGINS, Variant
from hrl_policies.study.store import RunRecord, StoredRun
from hrl_policies.study.table import Cell, ResultTable
from hrl_policies.study.tables import COLUMNS, group_records, group_variants, result_table

Pairs = tuple[tuple[str, str], ...]

_LENGTHS = ("len_floor", "len_ceiling", "len")
_MARK_LEFT, _MARK_RIGHT = 4.0, 86.0
"""Ends of the small drawing of Len, 90 wide."""

_WIDE_INTERVALS_BELOW = 5
_ORIGIN_LIMITS = {
    "real": "Data are real and whole, but users are simulated by a response model of logged feedback: nothing here "
    "was shown to people.",
    "partial": "Data are a PART of the official files: numbers cannot be compared with those of the whole data set, "
    "and users are simulated.",
    "twin": "Data are a SYNTHETIC TWIN: people who do not exist, made to resemble a data set in its marginals. It "
    "shows how methods behave where the truth is known, and nothing about real users.",
    "own": "Data are the user's own logs, and users are simulated by a response model of logged feedback: nothing "
    "here was shown to people.",
}


def overview(runs: Sequence[StoredRun], failed: int) -> Pairs:
    """Returns what was run, as names and values.

    Args:
        runs: Finished and interrupted runs.
        failed: Number of runs that ended with an error.
    """
    variants = {run.folder: Variant.of_config(run.config) for run in runs}
    ordered = sorted(runs, key=lambda run: variants[run.folder].order[0])
    learners = [run for run in ordered if variants[run.folder].learns]
    controls = [run for run in ordered if not variants[run.folder].learns]
    states = {
        "finished": sum(run.complete for run in runs),
        "interrupted": sum(not run.complete for run in runs),
        "failed": failed,
    }
    evaluated = {
        f"{run.result['users']} held-out users, {run.config.episodes_per_user} session(s) each"
        for run in runs
        if run.complete
    }
    facts = (
        ("runs", ", ".join(f"{number} {state}" for state, number in states.items() if number)),
        ("trained methods", _listed(variants[run.folder].title for run in learners)),
        ("controls", _listed(variants[run.folder].title for run in controls)),
        ("worlds", _listed(run.config.world for run in runs)),
        ("data", _listed(_data_name(run) for run in runs)),
        ("Max Len", _listed(map(str, sorted({run.config.session.max_len for run in runs})))),
        ("training seeds", _listed(map(str, sorted({run.config.seed for run in learners if run.complete})))),
        ("evaluated on", "; ".join(sorted(evaluated))),
    )
    return tuple((name, value) for name, value in facts if value)


def limits(runs: Sequence[StoredRun]) -> tuple[str, ...]:
    """Returns what may and may not be concluded from runs, one sentence or two each."""
    finished = [run for run in runs if run.complete]
    learners = [run for run in finished if Variant.of_config(run.config).learns]
    controls = [variant for run in finished if not (variant := Variant.of_config(run.config)).learns]
    sentences = [_ORIGIN_LIMITS[origin] for origin in dict.fromkeys(map(_origin, runs))]
    if learners:
        sentences.append(_limit_of_seeds(learners))
        if all(variant.privileged for variant in controls):
            sentences.append(
                "No control was run that a trained method could be held against: the tables cannot show that training "
                "helped."
            )
        else:
            sentences.append(
                "A trained method is worth something only where it does better than the controls, which learn nothing "
                "by reinforcement, by more than the intervals."
            )
    if any(Variant.of_config(run.config).privileged for run in finished):
        sentences.append(
            "Rows with † know what users of the test world truly like. They are bounds that say how much could be won, "
            "not methods."
        )
    if any("len_floor" in run.summary for run in finished):
        sentences.append(
            "Len, R_each and the violation rate are tied by a formula: floor and ceiling are the shortest and longest "
            "Len at a method's own R_each, so a long Len says first of all that the leave rule was seldom broken."
        )
    sentences.append(
        "AD near 0 says that popular and long-tail items get equal shares of exposure, not that items are treated "
        "alike: there are far fewer popular ones."
    )
    return tuple(sentences)


def _limit_of_seeds(learners: Sequence[StoredRun]) -> str:
    seeds: dict[tuple[object, ...], set[int]] = {}
    for run in learners:
        config = run.config
        key = Variant.of_config(config), config.world, config.session.max_len, config.item_term
        seeds.setdefault(key, set()).add(config.seed)
    fewest = min(map(len, seeds.values()))
    if fewest == 1:
        return (
            "At least one trained method has a single training seed: its row has no interval, and a difference between "
            "two such rows may be the randomness of training."
        )
    text = f"± is half the 95 % Student interval of the mean over training seeds, of which a row has at least {fewest}"
    return text + (": so few give wide intervals." if fewest < _WIDE_INTERVALS_BELOW else ".")


@dataclass(frozen=True)
class LengthMark:
    """Where Len lies between its floor and its ceiling, as coordinates of a small drawing.

    Attributes:
        floor: Left end.
        ceiling: Right end.
        at: Len.
        words: The same in words, for screen readers.
    """

    floor: float
    ceiling: float
    at: float
    words: str


@dataclass(frozen=True)
class SeedRow:
    """One run below the row of its method.

    Attributes:
        seed: Training seed.
        run: Anchor of the run.
        cells: Its figures.
        mark: Drawing of its Len, if the table has one.
    """

    seed: int
    run: str
    cells: tuple[Cell, ...]
    mark: LengthMark | None


@dataclass(frozen=True)
class ReportRow:
    """A row of a table.

    Attributes:
        cells: Its cells, the first of which names it.
        search: Words that the filter finds it by.
        anchor: Id in the document; empty for none.
        family: Checkbox that shows it; empty for a row that always stands.
        mark: Drawing of its Len, if the table has one.
        seeds: The runs behind it.
    """

    cells: tuple[Cell, ...]
    search: str
    anchor: str = ""
    family: str = ""
    mark: LengthMark | None = None
    seeds: tuple[SeedRow, ...] = ()


@dataclass(frozen=True)
class ReportTable:
    """A table of the report.

    Attributes:
        anchor: Id in the document.
        table: What it shows.
        rows: Its rows with what makes them searchable.
        origin: Kind of data, for tables of one world.
        marked: Title of the column beside which Len is drawn; empty for none.
    """

    anchor: str
    table: ResultTable
    rows: tuple[ReportRow, ...]
    origin: str = ""
    marked: str = ""

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Title of each column, and whether it holds numbers."""
        return [(title, self.table.is_numeric(i)) for i, title in enumerate(self.table.full_header())]


def plain_tables(tables: Sequence[ResultTable]) -> tuple[ReportTable, ...]:
    """Returns tables as they are."""
    return tuple(
        ReportTable(
            f"further-{number}",
            table,
            tuple(ReportRow(row, " ".join(map(str, row)).lower()) for row in table.rows),
        )
        for number, table in enumerate(tables, 1)
    )


def result_sections(
    runs: Sequence[StoredRun], anchors: Mapping[Path, str], command: str
) -> tuple[ReportTable, ...]:
    """Returns a table of results for every world and way of running sessions, with every seed behind a mean.

    Args:
        runs: Runs, of which the finished ones are tabulated.
        anchors: Ids of the runs by folder.
        command: The command that makes these numbers again.

    Raises:
        ValueError: If runs of one table were evaluated differently, or two of a method share a seed.
    """
    finished = [(RunRecord.of_run(run), anchors[run.folder]) for run in runs if run.complete]
    anchor_of = {id(record): anchor for record, anchor in finished}
    groups = group_records([record for record, _ in finished])
    return tuple(
        _result_section(group, anchor_of, command, f"table-{n}") for n, group in enumerate(groups, 1)
    )


def _result_section(
    records: Sequence[RunRecord], anchor_of: Mapping[int, str], command: str, anchor: str
) -> ReportTable:
    table = result_table(records, command)
    columns = [column for column in COLUMNS if column.title in table.header]
    lengths = [record.summary.get(name, math.nan) for record in records for name in _LENGTHS]
    known = all(map(math.isfinite, lengths)) and max(lengths) > min(lengths)
    span = (min(lengths), max(lengths)) if known else None
    rows = []
    for number, (cells, (variant, group)) in enumerate(
        zip(table.rows, group_variants(records).items(), strict=True), 1
    ):
        rows.append(
            ReportRow(
                cells=cells,
                search=" ".join(search_words(record.config) for record in group),
                anchor=f"{anchor}-{number}",
                family=variant.family,
                mark=_length_mark(group, span),
                seeds=tuple(
                    SeedRow(
                        record.config.seed,
                        anchor_of[id(record)],
                        tuple(column.mean([record.summary[column.figure]]) for column in columns),
                        _length_mark([record], span),
                    )
                    for record in group
                ),
            )
        )
    marked = COLUMNS[0].title if known else ""
    return ReportTable(anchor, table, tuple(rows), records[0].origin, marked)


def _length_mark(records: Sequence[RunRecord], span: tuple[float, float] | None) -> LengthMark | None:
    """Draws mean floor, ceiling and Len of runs between the shortest and the longest Len of the table."""
    if span is None:
        return None
    lengths = [float(np.mean([record.summary[name] for record in records])) for name in _LENGTHS]
    shares = [(length - span[0]) / (span[1] - span[0]) for length in lengths]
    floor, ceiling, at = (round(_MARK_LEFT + (_MARK_RIGHT - _MARK_LEFT) * share, 1) for share in shares)
    words = "Len {2:.1f} between floor {0:.1f} and ceiling {1:.1f}".format(*lengths)
    return LengthMark(floor, ceiling, at, words)


def search_words(config: RunConfig) -> str:
    """Returns the words by which the filter finds a run."""
    variant = Variant.of_config(config)
    return (
        f"{variant.title} {variant.method} {variant.family} {config.world} max len {config.session.max_len} "
        f"seed {config.seed}"
    ).lower()


def _origin(run: StoredRun) -> str:
    return str(run.provenance["test"]["data"]["origin"])


def _data_name(run: StoredRun) -> str:
    return f"{run.provenance['test']['data']['name']} ({ORIGINS[_origin(run)]})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
