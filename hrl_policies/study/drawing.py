"""All figures of a store, drawn into a folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hrl_policies.study.figures import (
    draw_learning_curves,
    draw_pareto,
    draw_profiles,
    draw_purification_gain,
    draw_results,
)
from hrl_policies.study.judged import Comparison, comparisons
from hrl_policies.study.runner import purifying_of
from hrl_policies.study.store import StoredRun
from hrl_policies.worlds import WorldPair

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier

FigureFormat = Literal["png", "svg", "pdf"]
FORMATS: tuple[FigureFormat, ...] = ("png", "svg", "pdf")


def draw_study(
    folder: str | Path,
    runs: Sequence[StoredRun],
    formats: Sequence[FigureFormat] = ("png", "svg"),
    *,
    worlds: Sequence[WorldPair] = (),
) -> list[Path]:
    """Draws every figure that the runs allow: the paper's 3 and 7, the Pareto frontier, profiles and results.

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
        if form not in FORMATS:
            raise ValueError(f"unknown format {form!r} of a figure; choose {', '.join(FORMATS)}")
    groups = comparisons(runs)
    written = []
    for form in formats:
        for number, group in enumerate(groups, 1):
            ending = f"_{number}" if len(groups) > 1 else ""
            written += _draw_group(Path(folder), group, ending, form)
        for pair in worlds:
            written += _draw_world(Path(folder), pair, runs, form)
    return written


def _draw_group(folder: Path, group: Comparison, ending: str, form: FigureFormat) -> list[Path]:
    written = []
    for max_len in sorted({task.max_len for task in group.tasks}):
        for name, draw in (
            ("fig_3_purification_gain", draw_purification_gain),
            ("fig_7_learning_curves", draw_learning_curves),
            ("pareto", draw_pareto),
        ):
            path = folder / f"{name}_len{max_len}{ending}.{form}"
            if draw(path, group, max_len):
                written.append(path)
    path = folder / f"profiles{ending}.{form}"
    if draw_profiles(path, group):
        written.append(path)
    for task in group.tasks:
        path = folder / f"results_{_plain(task.world)}_len{task.max_len}{ending}.{form}"
        draw_results(path, [run.record for run in group.runs if run.task == task])
        written.append(path)
    return written


def _draw_world(folder: Path, pair: WorldPair, runs: Sequence[StoredRun], form: FigureFormat) -> list[Path]:
    from dsrm.probe_data import probe_set
    from dsrm.probe_figures import draw_counts_and_rates, draw_states
    from dsrm.probes import purified_states

    path = folder / f"fig_2_counts_and_rates_{_plain(pair.name)}.{form}"
    draw_counts_and_rates(path, pair.test.data)
    written = [path]
    purifiers = _purifiers(pair, runs)
    if purifiers:
        probes = probe_set(pair.test)
        path = folder / f"fig_4_states_{_plain(pair.name)}.{form}"
        draw_states(path, probes, purified_states(probes, pair.test, purifiers))
        written.append(path)
    return written


def _purifiers(pair: WorldPair, runs: Sequence[StoredRun]) -> dict[str, StatePurifier]:
    """Returns the purifiers of finished runs in a world, one of each name."""
    term = "" if pair.item_term is None else pair.item_term.mode
    found: dict[str, StatePurifier] = {}
    for run in runs:
        config = run.config
        if run.complete and config.purifier and (config.world, config.item_term) == (pair.name, term):
            purifying = None if config.purifier.name in found else purifying_of(run)
            if purifying is not None:
                found[config.purifier.name] = purifying.purifier
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
