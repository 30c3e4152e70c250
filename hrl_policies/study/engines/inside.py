"""The simplest engine: one task after the other in the calling process, for notebooks and debuggers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hrl_policies.study.engines.base import Crew, Event, Setting, Started, Task, WorldShelf, performed


@dataclass(frozen=True)
class InsideEngine:
    """Runs tasks in the calling process, on one numerical thread."""

    @property
    def workers(self) -> int:
        """One."""
        return 1

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Crew]:
        """Gives the calling process as the only worker."""
        from hrl_policies.study.runner import single_threaded

        single_threaded()
        yield _Inside(WorldShelf(setting))


@dataclass(frozen=True)
class _Inside:
    shelf: WorldShelf

    def run(self, tasks: Sequence[Task]) -> Iterator[Event]:
        for task in tasks:
            yield Started(task.name)
            yield performed(task, self.shelf)
