"""All methods of one world as bars that read in grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrl_policies.study import notes as notes_of
from hrl_policies.study.judged import world_title
from hrl_policies.study.records import RunRecord
from hrl_policies.study.tables import variant_title
from hrl_policies.zoo import method
from kuaifair_env.figure_files import save_figure

_AGENT, _CONTROL = "#5b8db8", "#c8c8c8"


def draw_results(path: str | Path, records: Sequence[RunRecord]) -> None:
    """Draws R_cum and Len of every method, best last, with a dot for each training seed.

    Agents are dark, controls light, privileged bounds hatched. Beside Len stand its floor and ceiling, where the length
    law knows them: Len with every slate punished, and with none, at the same R_each.

    Args:
        path: File to write (``.png``, ``.svg`` or ``.pdf``).
        records: Runs of one world under one set of conditions.

    Raises:
        ValueError: If there are no runs.
    """
    if not records:
        raise ValueError("there are no finished runs to draw")
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str, str], list[RunRecord]] = {}
    for record in records:
        key = (record.config.method, record.purifier, record.config.variant)
        groups.setdefault(key, []).append(record)
    variants = sorted(groups, key=lambda one: np.mean([run.summary["r_cum"] for run in groups[one]]))
    figure = Figure(figsize=(10.0, 1.2 + 0.3 * len(variants)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, variant in enumerate(variants):
        for axis, name in ((left, "r_cum"), (right, "len")):
            _bar(axis, place, variant[0], [run.summary[name] for run in groups[variant]])
        known = [run.summary for run in groups[variant] if "len_floor" in run.summary]
        if known:
            ends = [float(np.mean([one[name] for one in known])) for name in ("len_floor", "len_ceiling")]
            right.plot(ends, [place, place], "|-", color="black", markersize=7, linewidth=1)
    left.set_yticks(range(len(variants)), [variant_title(*variant) for variant in variants])
    first = records[0]
    left.set_xlabel("R_cum")
    right.set_xlabel("Len (line: floor and ceiling)")
    figure.suptitle(
        f"{world_title(first.config.world, first.origin)}, Max Len {first.config.session.max_len}"
        + (f", item term '{first.config.item_term}'" if first.config.item_term else ""),
        fontsize=11,
    )
    save_figure(figure, path, notes_of.data(first))


def _bar(axis: Any, place: int, name: str, values: Sequence[float]) -> None:
    spec = method(name)
    look: dict[str, Any] = {"color": _AGENT if spec.learns else _CONTROL}
    if spec.privileged:
        look = {"facecolor": "white", "edgecolor": "black", "hatch": "///"}
    axis.barh(place, float(np.mean(values)), height=0.7, **look)
    if len(values) > 1:
        axis.plot(values, [place] * len(values), "o", color="white", markeredgecolor="black", markersize=4)
    axis.spines[["top", "right"]].set_visible(False)
