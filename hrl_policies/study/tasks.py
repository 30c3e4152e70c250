"""What a study has done by its workers: worlds and purifiers to begin with, then the runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrl_policies.study.config import RunConfig
from hrl_policies.study.engines import WorldShelf
from kuaifair_env.files import atomic_path


@dataclass(frozen=True)
class WorldTask:
    """Makes worlds, so that the caches hold what runs will read.

    Attributes:
        world: Their name.
        settings: See :class:`~hrl_policies.study.config.RunConfig`.
        item_term: Mode of their item term; empty for none.
    """

    world: str
    settings: Mapping[str, Any]
    item_term: str

    @property
    def name(self) -> str:
        """What progress and failures call it."""
        return f"worlds of {self.world}"

    def perform(self, shelf: WorldShelf) -> None:
        """Makes them."""
        _ = shelf.pair(self.world, self.settings, self.item_term).scorer


@dataclass(frozen=True)
class PurifierTask:
    """Pretrains a purifier, or takes it from the cache, and puts its file into the study's folder.

    Attributes:
        world: Name of the worlds.
        settings: See :class:`WorldTask`.
        item_term: See :class:`WorldTask`.
        mode: One of ``dsrm.MODES``.
        target: The file to write.
    """

    world: str
    settings: Mapping[str, Any]
    item_term: str
    mode: str
    target: str

    @property
    def name(self) -> str:
        """What progress and failures call it."""
        return f"purifier '{self.mode}' of {self.world}"

    def perform(self, shelf: WorldShelf) -> None:
        """Makes it; a copy in the study's folder keeps the study whole when the cache goes."""
        from hrl_policies.worlds import cached_purifier

        if Path(self.target).exists():
            return
        pair = shelf.pair(self.world, self.settings, self.item_term)
        made = cached_purifier(pair.train, self.mode)
        with atomic_path(self.target) as temporary:
            shutil.copyfile(made, temporary)


@dataclass(frozen=True)
class RunTask:
    """One run of a study.

    Attributes:
        config: What to run.
        folder: Its run folder.
        purifier: File of its purifier, or None.
        label: What progress calls it.
    """

    config: RunConfig
    folder: str
    purifier: str | None
    label: str

    @property
    def name(self) -> str:
        """What progress and failures call it."""
        return self.label

    def perform(self, shelf: WorldShelf) -> None:
        """Runs it, unless its folder is there already."""
        from hrl_policies.study.cells import run_cell, stored_record

        config, folder = self.config, Path(self.folder)
        pair = shelf.pair(config.world, config.world_settings, config.item_term)
        try:
            run_cell(config, folder, pair, self.purifier)
        except Exception:
            # A worker that was thought dead may have finished the same run meanwhile.
            if not folder.exists():
                raise
            stored_record(config, folder)
