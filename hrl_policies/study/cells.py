"""Many runs: every cell of a study once, each in a folder of its own, going on where an earlier attempt stopped."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hrl_policies.study.config import STUDY_SEEDS, PurifierIdentity, RunConfig, plan_run
from hrl_policies.study.runner import RunResult, partial_folder, resume, train
from hrl_policies.study.store import RunRecord, StoredRun, load_run, stored_runs
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import method
from kuaifair_env.abandonment import LEAVE_RULES, leave_rule
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError
from kuaifair_env.splits import EVALUATION_USERS

_LONGEST_SLUG = 60


def study_cells(
    methods: Sequence[str],
    world: str,
    *,
    seeds: Sequence[int] = STUDY_SEEDS,
    max_lens: Sequence[int] = (30, 50),
    session: SessionConfig | None = None,
    total_steps: Mapping[str, int] | None = None,
    users: int = EVALUATION_USERS,
    episodes_per_user: int = 1,
    purifiers: Sequence[PurifierIdentity | None] = (None,),
    item_term: str = "",
) -> list[RunConfig]:
    """Returns every combination of method, horizon and seed; controls, which do not train, with the first seed only.

    Args:
        methods: Names in the zoo.
        world: Environment id or name of a :class:`~hrl_policies.worlds.WorldPair`.
        seeds: Training seeds.
        max_lens: Horizons.
        session: What else sessions are like.
        total_steps: Training steps by method, instead of the zoo's.
        users: Held-out users to evaluate on.
        episodes_per_user: Sessions of each.
        purifiers: Every method is run with each of them; None is without.
        item_term: Mode of the item term that all methods and controls are given; empty for none.

    Raises:
        ValueError: If a method is unknown or a number is not valid.
    """
    base = SessionConfig() if session is None else session
    return [
        plan_run(
            name,
            world,
            seed=seed,
            session=replace(base, max_len=max_len),
            total_steps=(total_steps or {}).get(name) if method(name).learns else None,
            users=users,
            episodes_per_user=episodes_per_user,
            purifier=purifier,
            item_term=item_term,
        )
        for max_len in max_lens
        for name in methods
        for purifier in purifiers
        for seed in (seeds if method(name).learns else seeds[:1])
    ]


def run_study(
    cells: Sequence[RunConfig],
    store: str | Path,
    worlds: Mapping[str, WorldPair] | None = None,
    *,
    purifiers: Mapping[PurifierIdentity, str | Path] | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
) -> list[RunRecord]:
    """Runs the cells that the store does not hold yet, and returns the records of all.

    A cell that was interrupted is resumed; a folder of the right name with another configuration is an error, never
    overwritten. Ctrl-C keeps what is finished. Two processes may share a store if their cells differ (by seed, say).

    Args:
        cells: What to run; see :func:`study_cells`.
        store: Folder of run folders.
        worlds: Worlds by name; ids that are missing here are made.
        purifiers: Files of the purifiers that cells name.
        data_dir: Folder with the official files for those.
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If a folder holds a run with another configuration.
        KeyboardInterrupt: If interrupted; run the same study again to go on.
    """
    records = []
    for cell in cells:
        folder = Path(store) / cell_folder(cell)
        pair = None if worlds is None else worlds.get(cell.world)
        records.append(run_cell(cell, folder, pair, _file_of(cell, purifiers or {}), data_dir, progress))
    return records


def run_cell(
    cell: RunConfig,
    folder: Path,
    worlds: WorldPair | None = None,
    purifier: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: bool = False,
) -> RunRecord:
    """Runs one cell, or reads its record if its folder is there already.

    Args:
        cell: What to run.
        folder: Its run folder.
        worlds: Its worlds; None makes those of its environment id.
        purifier: File of its purifier.
        data_dir: Folder with the official files, if worlds are made.
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If the folder holds a run with another configuration.
        KeyboardInterrupt: If interrupted; call again to go on.
    """
    if folder.exists():
        return stored_record(cell, folder)
    result = _run(cell, folder, worlds, purifier, data_dir, progress)
    if result.evaluation is None:
        raise KeyboardInterrupt
    return RunRecord.of_evaluation(cell, result.evaluation)


def stored_record(cell: RunConfig, folder: Path) -> RunRecord:
    """Reads the record of a cell that has run.

    Raises:
        ArtifactError: If the folder holds a run with another configuration, or is damaged.
    """
    stored = load_run(folder)
    _check_same_config(stored, cell)
    return RunRecord.of_run(stored)


def stored_records(store: str | Path) -> list[RunRecord]:
    """Returns the records of all finished runs in a store.

    Raises:
        ArtifactError: If there is no such folder, or a run folder is damaged.
    """
    return [RunRecord.of_run(run) for run in stored_runs(store)]


def cell_folder(cell: RunConfig) -> Path:
    """Returns the name of a run's folder inside a store."""
    world = re.sub(r"[^A-Za-z0-9.]+", "-", cell.world).strip("-")
    session = cell.session
    name = cell.method if cell.purifier is None else f"{cell.method}+{cell.purifier.name}"
    name += f"-item-{cell.item_term}" if cell.item_term else ""
    name += f"-{_slug(cell.variant)}" if cell.variant else ""
    kind = f"len{session.max_len}-k{session.items_per_slate}{_unusual(session)}"
    return Path(world) / f"{name}-{kind}-seed{cell.seed}"


def _slug(text: str) -> str:
    """Returns a text as part of a file name; a hash tells apart texts that a file name cannot."""
    plain = re.sub(r"[^A-Za-z0-9.=+_-]+", "-", text).strip("-.")[:_LONGEST_SLUG]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unusual(session: SessionConfig) -> str:
    """Returns what is unusual about sessions, besides their length and slates; nothing for the default ones."""
    usual = SessionConfig()
    rule = leave_rule(session.leave)
    parts = []
    if rule != leave_rule(usual.leave):
        names = [name for name, known in LEAVE_RULES.items() if known == rule]
        parts.append(names[0] if names else _slug(str(session.describe()["leave"])))
    if session.initial_history != usual.initial_history:
        parts.append(f"{session.initial_history}-history")
    if session.repeats != usual.repeats:
        parts.append(f"{session.repeats}-repeats")
    return "".join(f"-{part}" for part in parts)


def _file_of(cell: RunConfig, purifiers: Mapping[PurifierIdentity, str | Path]) -> str | Path | None:
    if cell.purifier is None:
        return None
    if cell.purifier not in purifiers:
        raise ValueError(f"{cell_folder(cell)} needs the file of the purifier '{cell.purifier.name}'")
    return purifiers[cell.purifier]


def _run(
    cell: RunConfig,
    folder: Path,
    pair: WorldPair | None,
    purifier: str | Path | None,
    data_dir: str | Path | None,
    progress: bool,
) -> RunResult:
    partial = partial_folder(folder)
    if not partial.exists():
        return train(cell, pair, purifier=purifier, output=folder, data_dir=data_dir, progress=progress)
    _check_same_config(load_run(partial), cell)
    return resume(partial, pair, data_dir=data_dir, progress=progress)


def _check_same_config(stored: StoredRun, cell: RunConfig) -> None:
    before, now = _plain(stored.config.as_dict()), _plain(cell.as_dict())
    different = sorted(name for name in now if before.get(name) != now[name])
    if different:
        raise ArtifactError(
            f"{stored.folder} holds a run with another configuration ({', '.join(different)} differ); "
            "use another store, or remove it"
        )


def _plain(content: Any) -> Any:
    import json

    return json.loads(json.dumps(content))
