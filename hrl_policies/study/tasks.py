"""The tasks of a study, which engines run: making worlds and purifiers first, then training and evaluating."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hrl_policies.study.config import RunConfig
from hrl_policies.study.runner import open_worlds, partial_folder, resume, train
from hrl_policies.study.store import check_same_config, load_run
from hrl_policies.worlds import WorldPair, cached_purifier
from kuaifair_env.files import atomic_path

_MAX_WORLDS = 2


class WorldCache:
    """The worlds that a process has made, the last few of them; pickled, it holds none.

    Args:
        worlds: Worlds by name that are no environment ids.
        data_dir: Folder with the official files.
    """

    def __init__(
        self, worlds: Mapping[str, WorldPair] | None = None, data_dir: str | Path | None = None
    ) -> None:
        self.worlds = dict(worlds or {})
        # Workers may have another working directory.
        self.data_dir = None if data_dir is None else str(Path(data_dir).expanduser().resolve())
        self._cached: OrderedDict[str, WorldPair] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cached": OrderedDict()}

    def pair(self, world: str, settings: Mapping[str, object], item_term: str) -> WorldPair:
        """Returns the worlds of a run, with its item term.

        Raises:
            ValueError: If a name or setting is unknown.
            DataError: If they cannot be made.
        """
        key = repr((world, sorted(settings.items()), item_term))
        if key not in self._cached:
            own = self.worlds.get(world)
            if own is None:
                self._cached[key] = open_worlds(world, settings, item_term, self.data_dir)
            else:
                self._cached[key] = own.given_mode(item_term) if item_term and own.item_term is None else own
        self._cached.move_to_end(key)
        while len(self._cached) > _MAX_WORLDS:
            self._cached.popitem(last=False)
        return self._cached[key]


class Task(Protocol):
    """Something to do in a worker; it can be pickled, and doing it twice does no harm."""

    @property
    def name(self) -> str:
        """What progress and failures call it."""

    def run(self, worlds: WorldCache) -> None:
        """Does it; its result is what it writes."""


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

    def run(self, worlds: WorldCache) -> None:
        """Makes them."""
        _ = worlds.pair(self.world, self.settings, self.item_term).scorer


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

    def run(self, worlds: WorldCache) -> None:
        """Makes it; a copy in the study's folder keeps the study whole when the cache goes."""
        if Path(self.target).exists():
            return
        pair = worlds.pair(self.world, self.settings, self.item_term)
        made = cached_purifier(pair.train, self.mode)
        with atomic_path(self.target) as temporary:
            shutil.copyfile(made, temporary)


@dataclass(frozen=True)
class RunTask:
    """One run of a study.

    Attributes:
        name: What progress and failures call it.
        config: What to run.
        folder: Its run folder.
        purifier: File of its purifier, or None.
    """

    name: str
    config: RunConfig
    folder: str
    purifier: str | None

    def run(self, worlds: WorldCache) -> None:
        """Trains and evaluates, or goes on with an interrupted run.

        Raises:
            ArtifactError: If there is an interrupted run with another configuration.
            KeyboardInterrupt: If training was interrupted; the run's folder says how far it came.
        """
        config, folder = self.config, Path(self.folder)
        pair = worlds.pair(config.world, config.world_settings, config.item_term)
        partial = partial_folder(folder)
        try:
            if partial.exists():
                check_same_config(load_run(partial), config)
                result = resume(partial, pair)
            else:
                result = train(config, pair, purifier=self.purifier, output=folder)
        except Exception:
            # A worker that was thought dead may have finished the same run meanwhile.
            if not folder.exists():
                raise
            return
        if not result.complete:
            raise KeyboardInterrupt
