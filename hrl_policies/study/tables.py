"""Results as tables in the paper's form, with the columns that it left out, for the terminal and for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from hrl_policies.study.config import RunConfig
from hrl_policies.study.store import StoredRun, read_table, write_table
from hrl_policies.zoo import METHODS, method
from kuaifair_env.data.files import atomic_path
from kuaifair_env.evaluation import EvaluationResult

if TYPE_CHECKING:
    from rich.console import Console

_LEVEL = 0.95
_ORIGINS = {
    "real": "real data, official files",
    "partial": "PARTIAL data: a part of the official files",
    "twin": "SYNTHETIC TWIN, not real data",
    "own": "the user's own logs",
}


@dataclass(frozen=True)
class RunRecord:
    """One finished run, as tables need it.

    Attributes:
        config: What was run.
        summary: The headline figures.
        data: Name of the data set.
        origin: ``"real"``, ``"partial"``, ``"twin"`` or ``"own"``.
        data_hash: Of the data set.
        candidates: Number of candidates ``N``.
        users: Users that it was judged on.
        response: Kind of the test world's response model.
    """

    config: RunConfig
    summary: Mapping[str, float]
    data: str
    origin: str
    data_hash: str
    candidates: int
    users: int
    response: str

    @property
    def purifier(self) -> str:
        """Name of the purifier, empty without one."""
        return "" if self.config.purifier is None else self.config.purifier.name

    @classmethod
    def of_evaluation(cls, config: RunConfig, evaluation: EvaluationResult) -> RunRecord:
        """Returns the record of a run in memory."""
        users = len(np.unique(evaluation.sessions.user_ids))
        return cls._of_world(config, evaluation.summary(), evaluation.world, users)

    @classmethod
    def of_run(cls, run: StoredRun) -> RunRecord:
        """Returns the record of a run folder.

        Raises:
            ArtifactError: If the run was interrupted.
        """
        return cls._of_world(run.config, run.summary, run.provenance["test"], int(run.result["users"]))

    @classmethod
    def _of_world(
        cls, config: RunConfig, summary: Mapping[str, float], world: Mapping[str, Any], users: int
    ) -> RunRecord:
        data = world["data"]
        return cls(
            config=config,
            summary={name: float(value) for name, value in summary.items()},
            data=data["name"],
            origin=data["origin"],
            data_hash=data["hash"],
            candidates=int(world["candidates"]),
            users=users,
            response=str(world["response"].get("kind", "unknown")),
        )


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: What stands above it.
        figure: Name in ``EvaluationResult.summary``.
        digits: Decimal places.
        interval: Whether seeds are given an interval.
    """

    title: str
    figure: str
    digits: int = 3
    interval: bool = True


COLUMNS = (
    Column("Len", "len", 2),
    Column("R_each", "r_each"),
    Column("R_cum", "r_cum", 2),
    Column("AD", "ad"),
    Column("viol.", "violation_rate"),
    Column("law", "len_predicted", 2, interval=False),
    Column("floor", "len_floor", 2, interval=False),
    Column("ceil.", "len_ceiling", 2, interval=False),
    Column("gap", "signed_gap", interval=False),
    Column("cov.", "coverage", interval=False),
)
"""The paper's four, what ends sessions, what the length law says of them, and what AD hides."""


@dataclass(frozen=True)
class ResultTable:
    """Methods under the same conditions: one world, one way of running sessions.

    Attributes:
        title: World and Max Len.
        header: Column titles.
        rows: One list of cells per method.
        notes: What the numbers are, one line each; never left out.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def markdown(self) -> str:
        """Returns the table as Markdown."""
        lines = [f"### {self.title}", ""]
        lines += [_markdown_row(self.header), "|" + " --- |" + " ---: |" * (len(self.header) - 1)]
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes), ""])

    def text(self) -> str:
        """Returns title and aligned rows as plain text, without the notes."""
        # One run of each method needs no column to say so.
        shown = len(self.header) - (self.header[-1] == "seeds" and all(row[-1] == "1" for row in self.rows))
        lines = [self.header[:shown], *(row[:shown] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            "  ".join(
                [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
            )
            for line in lines
        ]
        return "\n".join([self.title, "", aligned[0], "-" * len(aligned[0]), *aligned[1:]])

    def show(self, console: Console) -> None:
        """Prints the table whole: lines may wrap in a narrow terminal, but no cell is cut."""
        # Rich's own tables cut cells to the width of the terminal.
        console.print(self.text(), markup=False, highlight=False, soft_wrap=True)
        console.print()
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)
        console.print()


def result_tables(records: Sequence[RunRecord], command: str) -> list[ResultTable]:
    """Groups runs by world and session settings into tables, methods in the order of the zoo.

    A cell is the mean over training seeds; ``±`` is half the 95 % Student interval of that mean, given where there
    are at least two seeds.

    Args:
        records: Finished runs.
        command: The command that makes these numbers again.

    Raises:
        ValueError: If there are no runs, or runs of one table were judged differently.
    """
    if not records:
        raise ValueError("there are no finished runs to tabulate")
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        groups.setdefault(_conditions(record), []).append(record)
    return [_table(group, command) for group in groups.values()]


def write_records(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Writes the figures of runs as a small CSV, one row per run, atomically."""
    rows = [
        {
            "world": record.config.world,
            "data": record.data,
            "origin": record.origin,
            "data_hash": record.data_hash,
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
            "total_steps": record.config.total_steps,
            **{name: float(value) for name, value in record.summary.items()},
        }
        for record in records
    ]
    with atomic_path(path) as temporary:
        write_table(temporary, rows)


def learning_curve(path: str | Path) -> list[dict[str, float]]:
    """Reads the ``learning_curve.csv`` of a run folder."""
    return read_table(Path(path))


def _conditions(record: RunRecord) -> str:
    session = record.config.session.describe()
    for mode in ("action_mode", "observation_mode"):
        session.pop(mode)
    term = record.config.item_term
    return repr(
        (
            record.config.world,
            term,
            record.data_hash,
            record.response,
            sorted(session.items(), key=lambda e: e[0]),
        )
    )


def _table(records: Sequence[RunRecord], command: str) -> ResultTable:
    first = records[0]
    judged = {(r.users, r.config.episodes_per_user, r.config.evaluation_seed) for r in records}
    if len(judged) > 1:
        raise ValueError(
            f"runs in {first.config.world} were judged on different users or luck {sorted(judged)}; "
            "they do not belong into one table"
        )
    columns = [column for column in COLUMNS if all(column.figure in record.summary for record in records)]
    order = list(METHODS)
    names = sorted({record.config.method for record in records}, key=order.index)
    variants = sorted(
        {_variant(record) for record in records},
        key=lambda variant: (order.index(variant[0]), *variant[1:]),
    )
    rows = [
        _row(variant, [record for record in records if _variant(record) == variant], columns)
        for variant in variants
    ]
    return ResultTable(
        title=f"{first.config.world}, Max Len {first.config.session.max_len}"
        + (f", item term '{first.config.item_term}'" if first.config.item_term else ""),
        header=("method", *(column.title for column in columns), "seeds"),
        rows=tuple(rows),
        notes=_notes(records, names, command),
    )


def _variant(record: RunRecord) -> tuple[str, str, str]:
    return record.config.method, record.purifier, record.config.variant


def _row(
    variant: tuple[str, str, str], records: Sequence[RunRecord], columns: Sequence[Column]
) -> tuple[str, ...]:
    seeds = sorted({record.config.seed for record in records})
    if len(seeds) != len(records):
        raise ValueError(
            f"{variant_title(*variant)} was run more than once with the same seed under the same conditions"
        )
    cells = (_cell([record.summary[column.figure] for record in records], column) for column in columns)
    return (variant_title(*variant), *cells, str(len(seeds)))


def variant_title(name: str, purifier: str, variant: str = "") -> str:
    """Returns how a method is called in tables and figures: with its purifier if not its own, † if privileged."""
    spec = method(name)
    other = f" + {purifier}" if purifier and purifier != spec.purifier else ""
    changed = f" ({variant})" if variant else ""
    return spec.title + changed + other + (" †" if spec.privileged else "")


def _cell(values: Sequence[float], column: Column) -> str:
    mean = f"{np.mean(values):.{column.digits}f}"
    if len(values) < 2 or not column.interval:
        return mean
    return f"{mean} ± {half_interval(values):.{column.digits}f}"


def half_interval(values: Sequence[float], level: float = _LEVEL) -> float:
    """Returns half the Student interval of a mean.

    Args:
        values: At least two.
        level: Coverage.
    """
    n = len(values)
    return float(stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))


def _notes(records: Sequence[RunRecord], names: Sequence[str], command: str) -> tuple[str, ...]:
    first = records[0]
    session = first.config.session.describe()
    trained = [record for record in records if method(record.config.method).learns]
    notes = [
        f"Data: {first.data} ({_ORIGINS[first.origin]}), hash {first.data_hash}; response model of the test world: "
        f"{first.response}; {first.candidates} candidates.",
        f"Judged on {first.users} held-out users, {first.config.episodes_per_user} session(s) each, the same users and "
        f"the same luck for every method; slates of {session['slate_size']}; leave rule {_rule(session['leave'])}.",
    ]
    if trained:
        seeds = ", ".join(str(seed) for seed in sorted({record.config.seed for record in trained}))
        steps = ", ".join(
            f"{method(name).title} {max(r.config.total_steps for r in trained if r.config.method == name):,}"
            for name in names
            if method(name).learns
        )
        notes.append(
            f"Trained in the training world with seeds {seeds}; steps: {steps}. "
            "± is half the 95 % Student interval of the mean over training seeds; controls are run once."
        )
    purified = {
        (record.purifier, record.config.purifier.hash) for record in records if record.config.purifier
    }
    if purified:
        files = ", ".join(f"{name} {digest}" for name, digest in sorted(purified))
        notes.append(f"Purifiers (name and hash of the file): {files}.")
    if any(method(name).privileged for name in names):
        notes.append("† knows what users of the test world truly like: a bound, not a method.")
    notes.append(
        "viol.: share of slates that the leave rule punishes; gap: popular minus long-tail share of exposure (AD is "
        "its size); cov.: share of the candidates that were shown."
    )
    if "len_predicted" in first.summary:
        notes.append(
            "law: the Len that (T0 - 1)/(2 - R_each + viol.) + 0.5 predicts; floor and ceil. are the law with every "
            "slate punished and none, at the same R_each."
        )
    return (*notes, f"Made by: {command}")


def _rule(rule: Mapping[str, Any]) -> str:
    settings = ", ".join(
        f"{name}={value}" for name, value in rule.items() if name != "rule" and value is not None
    )
    return f"{rule['rule']}({settings})"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
