"""The paper's Table 1: what the two logs behind a pair of worlds hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hrl_policies.study.judged import world_title
from hrl_policies.study.published import PUBLISHED_LOGS, paper_data
from hrl_policies.study.result_table import MISSING, Cell, Measured, ResultTable
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.worlds import World

_HEADER = (
    "world",
    "usage",
    "users",
    "items",
    "interactions",
    "density, %",
    "clicks, %",
    "session users",
    "candidates",
)


def world_table(pairs: Sequence[WorldPair], command: str, *, compare: bool = False) -> ResultTable:
    """Returns users, items, interactions and density of the logs, and whom and what sessions are played with.

    Args:
        pairs: The worlds; the same data under the same name is shown once.
        command: The command that makes these numbers again.
        compare: Whether to show the paper's figures below ours.

    Raises:
        ValueError: If there are no worlds.
    """
    if not pairs:
        raise ValueError("there are no worlds to tabulate")
    rows: list[tuple[Cell, ...]] = []
    matched = False
    unique = {(pair.name, pair.test.data.data_hash): pair for pair in pairs}.values()
    for pair in unique:
        for world in (pair.train, pair.test):
            log = world.data.train if world.split == "train" else world.data.test
            rows.append((*_named(pair, world), *_cells(log), str(len(world.users)), str(world.n_items)))
            published = _published(pair, world) if compare else None
            if published is not None:
                matched = True
                rows.append(published)
    notes = [
        f"{pair.name}: {pair.test.data.provenance.name} ({pair.test.data.provenance.origin}), "
        f"hash {pair.test.data.data_hash}."
        for pair in unique
    ]
    notes.append(
        "users, items, interactions: in the log that the world's users and response model come from; density: share of "
        "the pairs of those users and items that were seen; clicks: share of interactions. session users may start a "
        "session; candidates may be shown."
    )
    if matched:
        notes.append("Rows of the paper: arXiv:2603.03820, Table 1; interactions there are rounded.")
    return ResultTable(
        title="Training and test environments",
        header=_HEADER,
        rows=tuple(rows),
        notes=(*notes, f"Made by: {command}"),
    )


def _named(pair: WorldPair, world: World) -> tuple[str, str]:
    return world_title(pair.name, world.data.provenance.origin), world.split


def _cells(log: InteractionLog) -> tuple[Cell, ...]:
    users, items = len(np.unique(log.users)), len(np.unique(log.items))
    largest = int(log.items.max(initial=0)) + 1
    pairs = len(np.unique(log.users.astype(np.int64) * largest + log.items))
    return (
        str(users),
        str(items),
        str(len(log)),
        Measured(100.0 * pairs / max(users * items, 1), 2),
        Measured(100.0 * float(log.clicks.mean()) if len(log) else 0.0, 1),
    )


def _published(pair: WorldPair, world: World) -> tuple[Cell, ...] | None:
    data = paper_data(pair.name, world.data.provenance.name)
    for row in PUBLISHED_LOGS:
        if (row.data, row.split) == (data, world.split):
            # The paper gives no density; it follows only if no pair was logged twice.
            numbers = (str(row.users), str(row.items), str(row.interactions))
            return (f"{row.data} in the paper", row.split, *numbers, MISSING, MISSING, MISSING, MISSING)
    return None
