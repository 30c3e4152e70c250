"""Sections of a study's report as plain data: tables with every seed behind a mean, runs, and what runs share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrl_policies.study.config import RunConfig
from hrl_policies.study.labels import ORIGINS, RunRecord, Variant
from hrl_policies.study.store import CurveRow, StoredRun
from hrl_policies.study.tables import COLUMNS, Cell, Measured, ResultTable, group_records, group_rows, result_table

Pairs = tuple[tuple[str, str], ...]

RUN_COLUMNS = COLUMNS[:5]
"""Figures of a run in the list of all runs: Len, R_each, R_cum, AD and the violation rate."""

WIDTH, HEIGHT = 320, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 310, 12, 122
"""Size of a panel's drawing, in its own units, and where its axes run."""

_LENGTHS = ("len_floor", "len_ceiling", "len")
# Ends of the small drawing of Len, 90 wide.
_MARK_LEFT, _MARK_RIGHT = 4.0, 86.0
_NICE = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@dataclass(frozen=True)
class LengthMark:
    """Where Len lies between its floor and its ceiling, as coordinates of a small drawing and in words."""

    floor: float
    ceiling: float
    at: float
    words: str


@dataclass(frozen=True)
class ReportRow:
    """A row of a table, the first cell of which names it, with the rows of the seeds behind it.

    Attributes:
        anchor: Id in the document; of a row of one seed, id of the run that it leads to. Empty for none.
        search: Words that the filter finds it by.
        family: Checkbox that shows it; empty for a row that always stands.
    """

    cells: tuple[Cell, ...]
    anchor: str = ""
    search: str = ""
    family: str = ""
    mark: LengthMark | None = None
    seeds: tuple[ReportRow, ...] = ()


@dataclass(frozen=True)
class ReportTable:
    """A table of the report, its rows with what makes them searchable.

    Attributes:
        origin: Kind of data, for tables of one world.
        marked: Title of the column beside which Len is drawn; empty for none.
    """

    anchor: str
    table: ResultTable
    rows: tuple[ReportRow, ...]
    origin: str = ""
    marked: str = ""

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Title of each column, and its sort: the ``name`` of the row, a ``number``, or ``text``."""
        name = self.table.header.index("method") if "method" in self.table.header else 0
        return [
            (title, "name" if place == name else "number" if self.table.is_numeric(place) else "text")
            for place, title in enumerate(self.table.header)
        ]


def plain_tables(tables: Sequence[ResultTable]) -> tuple[ReportTable, ...]:
    """Returns tables as they are."""
    rows = [tuple(ReportRow(row, search=" ".join(map(str, row)).lower()) for row in table.rows) for table in tables]
    return tuple(ReportTable(f"further-{n}", *pair) for n, pair in enumerate(zip(tables, rows, strict=True), 1))


def result_sections(runs: Sequence[StoredRun], anchors: Mapping[Path, str], command: str) -> tuple[ReportTable, ...]:
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
    return tuple(_result_section(group, anchor_of, command, f"table-{n}") for n, group in enumerate(groups, 1))


def _result_section(
    records: Sequence[RunRecord], anchor_of: Mapping[int, str], command: str, anchor: str
) -> ReportTable:
    table = result_table(records, command)
    columns = [column for column in COLUMNS if column.title in table.header]
    lengths = [record.summary.get(name, math.nan) for record in records for name in _LENGTHS]
    known = all(map(math.isfinite, lengths)) and max(lengths) > min(lengths)
    span = (min(lengths), max(lengths)) if known else None

    def seed_row(record: RunRecord) -> ReportRow:
        figures: list[Cell] = [column.mean([record.summary[column.figure]], record.users) for column in columns]
        cells = [f"seed {record.config.seed}", "", *figures, ""]
        return ReportRow(tuple(cells), anchor_of[id(record)], mark=_length_mark([record], span))

    rows = [
        ReportRow(
            cells=cells,
            anchor=f"{anchor}-{number}",
            search=" ".join(map(search_words, (record.config for record in group))) or variant.title.lower(),
            family=variant.family,
            mark=_length_mark(group, span),
            seeds=tuple(map(seed_row, group)),
        )
        for number, (cells, ((variant, _), group)) in enumerate(
            zip(table.rows, group_rows(records).items(), strict=True), 1
        )
    ]
    marked = COLUMNS[0].title if known else ""
    return ReportTable(anchor, table, tuple(rows), records[0].origin, marked)


def _length_mark(records: Sequence[RunRecord], span: tuple[float, float] | None) -> LengthMark | None:
    """Places mean floor, ceiling and Len of runs between the shortest and the longest Len of the table."""
    if span is None or not records:
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
        f"repeats {config.session.repeats} seed {config.seed}"
    ).lower()


@dataclass(frozen=True)
class RunSection:
    """One run with all that is known of it.

    Attributes:
        state: ``"finished"`` or ``"interrupted"``.
        figures: Training steps taken, then those of ``RUN_COLUMNS``; empty cells for missing ones.
        facts: What is known of method, settings, hyperparameters and provenance, by these titles.
        timing: Seconds and machine; differs from one run to the next.
        worlds: Anchor of its worlds; ``software`` is that of its versions.
    """

    run: StoredRun
    variant: Variant
    anchor: str
    state: str
    search: str
    figures: tuple[Cell, ...]
    panels: tuple[CurvePanel, ...]
    facts: Mapping[str, Pairs]
    timing: str
    worlds: str
    software: str


@dataclass(frozen=True)
class SharedFacts:
    """Facts that several runs share: their worlds (with the kind of data, and all of it as JSON), or their software."""

    anchor: str
    title: str
    facts: Pairs
    origin: str = ""
    full: str = ""


def run_sections(
    runs: Sequence[StoredRun],
    anchors: Mapping[Path, str],
    root: Path,
    worlds: Mapping[str, SharedFacts],
    software: Mapping[str, SharedFacts],
) -> tuple[RunSection, ...]:
    """Returns a section for every run; curves of one world and horizon have one scale.

    Args:
        runs: The runs.
        anchors: Their ids by folder.
        root: Folder that is left out of their names.
        worlds: See :func:`shared_worlds`.
        software: See :func:`shared_software`.
    """
    rewards: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        own = rewards.setdefault((run.config.world, run.config.session.max_len), [])
        own += [row["r_cum"] for row in run.session_curve]
        own += [run.summary["r_cum"]] if run.complete else []
    return tuple(
        _run_section(
            run,
            anchors[run.folder],
            run.folder.absolute().relative_to(root).as_posix(),
            axis_top(rewards[run.config.world, run.config.session.max_len]),
            worlds[_as_json(_worlds_of(run))].anchor,
            software[_as_json(run.versions)].anchor,
        )
        for run in runs
    )


def _run_section(run: StoredRun, anchor: str, name: str, top: float, worlds: str, software: str) -> RunSection:
    variant, state, timing = Variant.of_config(run.config), "finished" if run.complete else "interrupted", ""
    if run.timing:
        timing = "training {training_seconds:.1f} s, evaluation {evaluation_seconds:.1f} s ({machine})"
    summary = run.summary if run.complete else {}
    figures = [Measured(summary[c.figure], c.digits) if summary else "" for c in RUN_COLUMNS]
    panels = (
        curve_panel(run.curve, "r_cum", "R_cum", top, summary.get("r_cum")),
        curve_panel(run.curve, "violation_rate", "violation rate", 1.0, summary.get("violation_rate")),
    )
    return RunSection(
        run=run,
        variant=variant,
        anchor=anchor,
        state=state,
        search=f"{search_words(run.config)} {state}",
        figures=(f"{run.steps_done:,}" if run.steps_done else "", *figures),
        panels=tuple(panel for panel in panels if panel is not None),
        facts={
            "Method": (
                ("what", variant.spec.kind),
                ("acts by", variant.spec.action_mode),
                ("sees", variant.spec.sees),
                ("from", variant.spec.reference),
            ),
            "Settings": _settings(run),
            "Hyperparameters": tuple(_flat(run.config.hyperparameters)),
            "Provenance": _provenance(run, name),
        },
        timing=timing.format(**run.timing),
        worlds=worlds,
        software=software,
    )


@dataclass(frozen=True)
class CurvePanel:
    """One figure over training steps, ready to be drawn: an SVG path, its end, ticks of both axes, and words.

    Attributes:
        across: Ticks of the axis of steps, coordinate and label; ``up`` has those of the other axis.
        evaluated: Height of the line for the figure in the test world; None without one.
    """

    title: str
    path: str
    end: tuple[float, float]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]
    evaluated: float | None
    words: str


def curve_panel(
    curve: Sequence[CurveRow], figure: str, title: str, top: float, evaluated: float | None = None
) -> CurvePanel | None:
    """Draws one column of a learning curve from 0 to ``top`` over steps from 0 to the last.

    Args:
        curve: Rows of ``learning_curve.csv``.
        figure: Name of the column.
        title: Title of the panel.
        top: Upper end of the axis, such as :func:`axis_top` gives.
        evaluated: The figure in the test world.

    Returns:
        The panel, or None if the curve has no point that is a number.
    """
    points = [(row["steps"], row[figure]) for row in curve if figure in row]
    finite = [point for point in points if all(map(math.isfinite, point))]
    if not finite:
        return None
    last = max(steps for steps, _ in finite) or 1.0
    return CurvePanel(
        title=title,
        path=_path([_place(point, last, top) for point in points]),
        end=_place(finite[-1], last, top),
        across=((LEFT, "0"), (RIGHT, f"{last:,.0f} steps")),
        up=tuple((BOTTOM - (BOTTOM - TOP) * share, f"{share * top:g}") for share in (0.0, 0.5, 1.0)),
        evaluated=None if evaluated is None else _place((0.0, evaluated), last, top)[1],
        words=(
            f"{title} in training: {finite[0][1]:.3g} at {finite[0][0]:,.0f} steps, "
            f"{finite[-1][1]:.3g} at {finite[-1][0]:,.0f}"
        ),
    )


def axis_top(values: Sequence[float]) -> float:
    """Returns a round number that no finite value exceeds, 1 where there is nothing above 0."""
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    if largest <= 0.0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(largest))
    return float(next((nice * unit for nice in _NICE if nice * unit >= largest), 10.0 * unit))


def _path(places: Sequence[tuple[float, float]]) -> str:
    """Joins the points; one that is not a number leaves a gap."""
    path, pen = "", "M"
    for x, y in places:
        drawn = math.isfinite(x) and math.isfinite(y)
        path += f"{pen}{x:g} {y:g}" if drawn else ""
        pen = "L" if drawn else "M"
    return path


def _place(point: tuple[float, float], last: float, top: float) -> tuple[float, float]:
    return round(LEFT + (RIGHT - LEFT) * point[0] / last, 1), round(BOTTOM - (BOTTOM - TOP) * point[1] / top, 1)


def _settings(run: StoredRun) -> Pairs:
    config = run.config
    trained = (
        ("policy", config.policy),
        ("training sessions at once", str(config.n_envs)),
        ("training steps", f"{run.steps_done:,} of {config.total_steps:,}"),
        *_flat({"randomisation": run.provenance.get("randomisation") or "none"}),
    )
    return (
        *(trained if Variant.of_config(config).learns else ()),
        ("item term", config.item_term or "none"),
        ("evaluated on", f"{config.user_count} users, {config.episodes_per_user} session(s) each"),
        ("evaluation seed", str(config.evaluation_seed)),
        *(("world " + name, value) for name, value in _flat(config.world_settings)),
        *_flat(config.session.describe()),
    )


def _provenance(run: StoredRun, name: str) -> Pairs:
    config, data = run.config, run.provenance["test"]["data"]
    resumed = run.result.get("resumed_at", 0)
    return (
        ("run folder", name),
        ("data", f"{data['name']} ({ORIGINS[data['origin']]})"),
        ("data hash", data["hash"]),
        ("fingerprint", run.provenance["test"]["fingerprint"]["id"]),
        ("purifier", f"{config.purifier.name}, hash {config.purifier.hash}" if config.purifier else "none"),
        *((("resumed", f"after {resumed:,} steps"),) if resumed else ()),
    )


def shared_worlds(runs: Sequence[StoredRun]) -> dict[str, SharedFacts]:
    """Returns every pair of worlds once, by its provenance as JSON."""
    different = {_as_json(_worlds_of(run)): _worlds_of(run) for run in runs}
    return {text: _worlds(pair, f"worlds-{number}") for number, (text, pair) in enumerate(different.items(), 1)}


def shared_software(runs: Sequence[StoredRun]) -> dict[str, SharedFacts]:
    """Returns every set of versions once, by its JSON."""
    different = {_as_json(run.versions): run.versions for run in runs}
    return {
        text: SharedFacts(
            f"software-{number}",
            f"Software {number}",
            (
                ("Python", str(stored["python"])),
                ("platform", str(stored["platform"])),
                *((name, str(version)) for name, version in sorted(stored["packages"].items())),
            ),
        )
        for number, (text, stored) in enumerate(different.items(), 1)
    }


def _worlds_of(run: StoredRun) -> dict[str, Any]:
    """Returns the provenance of a run's worlds; how training sessions depart from them differs from run to run."""
    return {name: part for name, part in run.provenance.items() if name != "randomisation"}


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)


def _worlds(provenance: Mapping[str, Any], anchor: str) -> SharedFacts:
    data = provenance["test"]["data"]
    facts = [
        ("data", f"{data['name']}: {ORIGINS[data['origin']]}"),
        ("what it is", str(data.get("description", ""))),
        ("data hash", data["hash"]),
        *((f"file {name}", str(digest)) for name, digest in sorted(data.get("files", {}).items())),
    ]
    for split in ("train", "test"):
        world = provenance[split]
        sizes = f"{world['candidates']:,} candidates, {world['users']:,} users"
        facts.append((f"{split} world", f"{sizes}, response model: {world['response'].get('kind', 'unknown')}"))
        facts.append((f"fingerprint of the {split} world", world["fingerprint"]["id"]))
    title = str(provenance.get("name", data["name"]))
    full = json.dumps(provenance, indent=1, sort_keys=True)
    # Lists of numbers stand on one line each.
    full = re.sub(r"\[[^][{}\"]*\]", lambda match: re.sub(r"\s+", " ", match[0]), full)
    return SharedFacts(anchor, title, tuple(fact for fact in facts if fact[1]), data["origin"], full)


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in sorted(content.items()):
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = "none" if value is None else json.dumps(value)
            yield f"{prefix}{name}", value if isinstance(value, str) else text
