"""All tables and figures of a store, written to a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hrl_policies.study.comparisons import difference_table, score_table
from hrl_policies.study.curves import draw_learning_curves, draw_profiles, draw_training_rewards
from hrl_policies.study.figures import draw_length_and_reward, draw_pareto, draw_purification_gain, draw_results
from hrl_policies.study.labels import PROPOSED, RunRecord
from hrl_policies.study.loading import check_same_worlds, open_worlds, purifier_of, register_data_of
from hrl_policies.study.paper_tables import Average, ablation_table, cost_table, overall_table, world_table
from hrl_policies.study.report import stored_figures, write_report
from hrl_policies.study.results import Comparison, comparisons
from hrl_policies.study.store import StoredRun, all_runs, failed_runs, stored_runs
from hrl_policies.study.tables import SUFFIXES, ResultTable, TableFormat, result_tables, write_records
from hrl_policies.worlds import WorldPair
from kuaifair_env.files import write_text_atomically

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier

FigureFormat = Literal["png", "svg", "pdf"]
FIGURE_FORMATS: tuple[FigureFormat, ...] = ("png", "svg", "pdf")

TABLES = "tables.md"
RECORDS = "runs.csv"
PAPER_TABLES = "tables"
FIGURES = "figures"
REPORT = "report.html"
"""Files and folders that a study writes besides its runs."""


def draw_study(
    folder: str | Path,
    runs: Sequence[StoredRun],
    formats: Sequence[FigureFormat] = ("png", "svg"),
    *,
    worlds: Sequence[WorldPair] = (),
) -> list[Path]:
    """Draws every figure that the runs allow: the paper's 3 and 7, Len and R_cum, the frontier, profiles, results.

    With the worlds at hand also its Fig. 2 (clicks against exposures) and, where runs were purified, its Fig. 4 (raw
    and purified states).

    Args:
        folder: Where to.
        runs: Run folders; interrupted ones are left out.
        formats: ``"png"``, ``"svg"`` or ``"pdf"``.
        worlds: The worlds of the runs; empty leaves out Figs. 2 and 4.

    Returns:
        The files.

    Raises:
        ArtifactError: If a run folder is damaged.
        ValueError: If a format is unknown, no run is finished, or runs cannot be compared.
    """
    for form in formats:
        if form not in FIGURE_FORMATS:
            raise ValueError(f"unknown format {form!r} of a figure; choose {', '.join(FIGURE_FORMATS)}")
    groups = _numbered(comparisons(runs))
    written = []
    for form in formats:
        for ending, group in groups:
            written += _draw_group(Path(folder), group, f"{ending}.{form}")
        for pair in worlds:
            written += _draw_world(Path(folder), pair, runs, f".{form}")
    return written


def _numbered(groups: Sequence[Comparison]) -> list[tuple[str, Comparison]]:
    """Returns each group with the ending of its files: a number where there are several."""
    return [(f"_{number}" if len(groups) > 1 else "", group) for number, group in enumerate(groups, 1)]


def _draw_group(folder: Path, group: Comparison, ending: str) -> list[Path]:
    written = []
    for max_len in sorted({task.max_len for task in group.tasks}):
        for name, draw in (
            ("fig_3_purification_gain", draw_purification_gain),
            ("fig_7_learning_curves", draw_learning_curves),
            ("training_rewards", draw_training_rewards),
            ("length_and_reward", draw_length_and_reward),
            ("pareto", draw_pareto),
        ):
            path = folder / f"{name}_len{max_len}{ending}"
            if draw(path, group, max_len):
                written.append(path)
    path = folder / f"profiles{ending}"
    if draw_profiles(path, group):
        written.append(path)
    for task in group.tasks:
        path = folder / f"results_{_plain(task.world)}_len{task.max_len}_{task.repeats}{ending}"
        draw_results(path, [run.record for run in group.runs if run.task == task])
        written.append(path)
    return written


def _draw_world(folder: Path, pair: WorldPair, runs: Sequence[StoredRun], ending: str) -> list[Path]:
    from dsrm.probe_data import draw_counts_and_rates, draw_states, probe_set
    from dsrm.probes import purified_states

    term = "" if pair.item_term is None else pair.item_term.mode
    name = _plain(f"{pair.name} {term}")
    path = folder / f"fig_2_counts_and_rates_{name}{ending}"
    draw_counts_and_rates(path, pair.test.data)
    written = [path]
    purifiers = _purifiers_of_runs(pair.name, term, runs)
    if purifiers:
        probes = probe_set(pair.test)
        path = folder / f"fig_4_states_{name}{ending}"
        draw_states(path, probes, purified_states(probes, pair.test, purifiers))
        written.append(path)
    return written


def _purifiers_of_runs(world: str, term: str, runs: Sequence[StoredRun]) -> dict[str, StatePurifier]:
    first: dict[str, StoredRun] = {}
    for run in runs:
        config = run.config
        if run.complete and config.purifier and (config.world, config.item_term) == (world, term):
            first.setdefault(config.purifier.name, run)
    return {name: purifier for name, run in first.items() if (purifier := purifier_of(run)) is not None}


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def study_tables(
    runs: Sequence[StoredRun],
    *,
    compare: bool = False,
    base: str | None = None,
    average: Average = "mean",
    worlds: Sequence[WorldPair] = (),
    command: str = "kuaifair study tables STORE",
) -> dict[str, ResultTable]:
    """Returns every table that the runs allow, by file name without its ending.

    Args:
        runs: Run folders; interrupted ones are left out.
        compare: Whether to show the paper's figures beside ours.
        base: Method that others are compared with; None takes DSRM-HRL if it was run, and else compares nothing.
        average: Over training seeds: the mean, or the interquartile mean.
        worlds: The worlds of the runs, for Table 1; empty leaves it out.
        command: The command that makes these numbers again.

    Raises:
        ArtifactError: If a run folder is damaged.
        ValueError: If no run is finished, runs cannot be compared, or the base was not run.
    """
    tables: dict[str, ResultTable | None] = {}
    if worlds:
        tables["table_1_environments"] = world_table(worlds, command, compare=compare)
    groups = comparisons(runs)
    name = base or PROPOSED
    if base is not None and not any(group.shipped(base) for group in groups):
        known = sorted({one.method for group in groups for one in group.variants if one.as_shipped})
        raise ValueError(f"no finished run is of {base!r}, the method to compare with; there are {', '.join(known)}")
    for ending, group in _numbered(groups):
        chosen = name if group.shipped(name) else None
        tables |= {
            f"table_2_overall{ending}": overall_table(group, command, average=average, compare=compare),
            f"table_3_ablation{ending}": ablation_table(group, command, average=average, compare=compare),
            f"table_4_training_time{ending}": cost_table(group, command, compare=compare),
            f"differences{ending}": None if chosen is None else difference_table(group, chosen, command),
            f"scores{ending}": score_table(group, chosen, command),
        }
    return {name: table for name, table in tables.items() if table is not None}


def write_tables(
    folder: str | Path, tables: Mapping[str, ResultTable], formats: Sequence[TableFormat] = ("markdown",)
) -> list[Path]:
    """Writes tables in every format, atomically.

    Args:
        folder: Where to.
        tables: Tables by file name without its ending; see :func:`study_tables`.
        formats: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.

    Returns:
        The files.

    Raises:
        ValueError: If a format is unknown.
    """
    texts = [(name, form, table.render(form)) for name, table in tables.items() for form in formats]
    paths = [Path(folder) / f"{name}{SUFFIXES[form]}" for name, form, _ in texts]
    for path, (_, _, text) in zip(paths, texts, strict=True):
        write_text_atomically(path, text)
    return paths


def worlds_of_runs(runs: Sequence[StoredRun], data_dir: str | Path | None = None) -> list[WorldPair]:
    """Makes the worlds of runs again, each once.

    Args:
        runs: Run folders in registered environments.
        data_dir: Folder with the official files.

    Raises:
        ArtifactError: If a world has changed since a run.
        DataError: If worlds cannot be made.
        ValueError: If runs were made in a study's own worlds, which have no id.
    """
    pairs: dict[str, WorldPair] = {}
    for run in runs:
        config = run.config
        key = repr((config.world, sorted(config.world_settings.items()), config.item_term))
        if key not in pairs:
            register_data_of(run)
            pairs[key] = open_worlds(config.world, config.world_settings, config.item_term, data_dir)
        check_same_worlds(run, pairs[key])
    return list(pairs.values())


def write_outputs(folder: Path, records: Sequence[RunRecord], failures: Mapping[str, str], command: str) -> list[Path]:
    """Writes everything that is made of a study's runs: tables, figures and the report.

    Args:
        folder: The store.
        records: Finished runs, in the order of the plan.
        failures: Last line of the traceback by run that failed.
        command: The command that makes these numbers again.

    Returns:
        The files.
    """
    overview, rows = folder / TABLES, folder / RECORDS
    sections = [table.markdown() for table in result_tables(records, command)] if records else []
    if failures:
        lines = [f"- {name}: {reason}" for name, reason in failures.items()]
        sections.append("\n".join([f"### {len(failures)} runs failed and are not in these tables", "", *lines, ""]))
    write_text_atomically(overview, "\n".join(sections))
    if not records:
        rows.unlink(missing_ok=True)
        return [overview]
    write_records(rows, records)
    runs = stored_runs(folder)
    tables = study_tables(runs, command=command)
    paths = write_tables(folder / PAPER_TABLES, tables, ["markdown", "latex", "csv"])
    paths += draw_study(folder / FIGURES, runs)
    report = write_report(
        folder / REPORT,
        all_runs(folder),
        title=f"KuaiFair study: {folder.name}",
        command=command,
        figures=stored_figures(folder),
        further=list(tables.values()),
        failures=failed_runs(folder),
    )
    return [overview, rows, *paths, report]
