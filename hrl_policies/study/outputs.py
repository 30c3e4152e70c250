"""All tables and figures of a store, written to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hrl_policies.study.cost_table import cost_table
from hrl_policies.study.difference_table import difference_table, score_table
from hrl_policies.study.judged import Comparison, comparisons
from hrl_policies.study.paper_tables import BASE, Average, ablation_table, overall_table
from hrl_policies.study.result_table import SUFFIXES, ResultTable, TableFormat
from hrl_policies.study.runner import open_worlds
from hrl_policies.study.store import StoredRun
from hrl_policies.study.world_table import world_table
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.files import write_text_atomically
from kuaifair_env.errors import ArtifactError

_COMMAND = "kuaifair study tables STORE"


def study_tables(
    runs: Sequence[StoredRun],
    *,
    compare: bool = False,
    base: str | None = None,
    average: Average = "mean",
    worlds: Sequence[WorldPair] = (),
    command: str = _COMMAND,
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
    found: dict[str, ResultTable] = {}
    if worlds:
        found["table_1_environments"] = world_table(worlds, command, compare=compare)
    groups = comparisons(runs)
    if base is not None and not any(_holds(one, base) for one in groups):
        held = sorted({one.method for group in groups for one in group.variants if one.as_shipped})
        raise ValueError(
            f"no finished run is of {base!r}, the method to compare with; there are {', '.join(held)}"
        )
    for number, group in enumerate(groups, 1):
        ending = f"_{number}" if len(groups) > 1 else ""
        chosen = (base or BASE) if _holds(group, base or BASE) else None
        made = {
            "table_2_overall": overall_table(group, command, average=average, compare=compare),
            "table_3_ablation": ablation_table(group, command, average=average, compare=compare),
            "table_4_training_time": cost_table(group, command, compare=compare),
            "differences": None if chosen is None else difference_table(group, chosen, command),
            "scores": score_table(group, chosen, command),
        }
        found |= {name + ending: table for name, table in made.items() if table is not None}
    return found


def write_tables(
    folder: str | Path,
    runs: Sequence[StoredRun],
    formats: Sequence[TableFormat] = ("markdown",),
    *,
    compare: bool = False,
    base: str | None = None,
    average: Average = "mean",
    worlds: Sequence[WorldPair] = (),
    command: str = _COMMAND,
) -> list[Path]:
    """Writes every table in every format, atomically; arguments as in :func:`study_tables`.

    Args:
        folder: Where to.
        runs: See :func:`study_tables`.
        formats: ``"text"``, ``"markdown"``, ``"latex"`` or ``"csv"``.
        compare: See :func:`study_tables`.
        base: See :func:`study_tables`.
        average: See :func:`study_tables`.
        worlds: See :func:`study_tables`.
        command: See :func:`study_tables`.

    Returns:
        The files.

    Raises:
        ArtifactError: See :func:`study_tables`.
        ValueError: If a format is unknown, or see :func:`study_tables`.
    """
    for form in formats:
        if form not in SUFFIXES:
            raise ValueError(f"unknown format {form!r} of a table; choose {', '.join(SUFFIXES)}")
    tables = study_tables(runs, compare=compare, base=base, average=average, worlds=worlds, command=command)
    written = []
    for name, table in tables.items():
        for form in formats:
            path = Path(folder) / f"{name}{SUFFIXES[form]}"
            write_text_atomically(path, table.render(form))
            written.append(path)
    return written


def worlds_of_runs(runs: Sequence[StoredRun], data_dir: str | Path | None = None) -> list[WorldPair]:
    """Makes the worlds of runs again, each once.

    Args:
        runs: Run folders in registered environments.
        data_dir: Folder with the official files.

    Raises:
        ArtifactError: If the data has changed since a run.
        DataError: If worlds cannot be made.
        ValueError: If runs were made in a study's own worlds, which have no id.
    """
    made: dict[str, WorldPair] = {}
    for run in runs:
        config = run.config
        key = repr((config.world, sorted(config.world_settings.items()), config.item_term))
        if key not in made:
            made[key] = open_worlds(config.world, config.world_settings, config.item_term, data_dir)
        before, now = run.provenance["test"]["data"]["hash"], made[key].test.data.data_hash
        if before != now:
            raise ArtifactError(
                f"{run.folder} was made on data with hash {before}; here {config.world} has {now}. "
                "Point --data-dir at the same files"
            )
    return list(made.values())


def _holds(comparison: Comparison, method_name: str) -> bool:
    return any(one.method == method_name and one.as_shipped for one in comparison.variants)
