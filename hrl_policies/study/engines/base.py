"""What engines have in common: tasks that can be sent away, and the events that come back."""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from hrl_policies.worlds import WorldPair

_KEPT_WORLDS = 2


@dataclass(frozen=True)
class Setting:
    """What every worker knows from the start.

    Attributes:
        worlds: Worlds by name that are no environment ids.
        data_dir: Folder with the official files.
    """

    worlds: Mapping[str, WorldPair] = field(default_factory=dict)
    data_dir: str | None = None


class WorldShelf:
    """The worlds that a process has made, the last few of them.

    Args:
        setting: Where they come from.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._held: OrderedDict[str, WorldPair] = OrderedDict()

    def pair(self, world: str, settings: Mapping[str, object], item_term: str) -> WorldPair:
        """Returns the worlds of a run, with its item term.

        Raises:
            ValueError: If a name or setting is unknown.
            DataError: If they cannot be made.
        """
        from hrl_policies.study.runner import open_worlds

        key = repr((world, sorted(settings.items()), item_term))
        if key not in self._held:
            given = self.setting.worlds.get(world)
            if given is None:
                made = open_worlds(world, settings, item_term, self.setting.data_dir)
            else:
                made = given.given_mode(item_term) if item_term else given
            self._held[key] = made
        self._held.move_to_end(key)
        while len(self._held) > _KEPT_WORLDS:
            self._held.popitem(last=False)
        return self._held[key]


class Task(Protocol):
    """Something to do in a worker; it can be pickled, and doing it twice does no harm."""

    @property
    def name(self) -> str:
        """What progress and failures call it."""

    def perform(self, shelf: WorldShelf) -> None:
        """Does it; its result is what it writes."""


@dataclass(frozen=True)
class Started:
    """A task has begun.

    Attributes:
        task: Its name.
    """

    task: str


@dataclass(frozen=True)
class Ended:
    """A task is over.

    Attributes:
        task: Its name.
        seconds: How long it took.
        error: The traceback, or how its worker died; empty if all went well.
    """

    task: str
    seconds: float
    error: str = ""


Event = Started | Ended


class Crew(Protocol):
    """Workers that are there."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        """Does every task, in no certain order, and says when each starts and ends.

        A task that raises ends with its traceback; one whose worker dies is tried again once. The others go on.
        """


class Engine(Protocol):
    """A way of doing many tasks. Results do not depend on which, nor on the number of workers."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""

    def open(self, setting: Setting) -> AbstractContextManager[Crew]:
        """Gives workers, and sends them home at the end; whatever they are doing then is lost."""


def performed(task: Task, shelf: WorldShelf) -> Ended:
    """Does a task and says how it went; only what is no ``Exception`` (Ctrl-C) goes through."""
    start = time.perf_counter()
    try:
        task.perform(shelf)
    except Exception:
        return Ended(task.name, time.perf_counter() - start, traceback.format_exc())
    return Ended(task.name, time.perf_counter() - start)


def data_dir_text(data_dir: str | Path | None) -> str | None:
    """Returns a folder as a worker in another working directory understands it."""
    return None if data_dir is None else str(Path(data_dir).expanduser().resolve())
