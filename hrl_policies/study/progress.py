"""Live progress of a study: what runs, what is done, how long it will take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hrl_policies.study.estimate import duration
from hrl_policies.study.folders import reason_of

_SHOWN_FAILURES = 5
_SHOWN_RUNNING = 16


class StudyProgress:
    """Keeps count of a study's runs and foretells its end from the runs that have ended.

    Args:
        workers: How many runs go on at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.total = self.done = self.failed = 0
        self.running: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        self._weights: dict[str, float] = {}
        # Kept as a number: a display in a thread of its own must not walk through what changes under it.
        self._left = self._spent = self._spent_weight = 0.0

    def planned(self, weights: Mapping[str, float], done: int, failed: int) -> None:
        """See :class:`hrl_policies.study.conduct.Watch`."""
        self._weights, self._left = dict(weights), sum(weights.values())
        self.done, self.failed = done, failed
        self.total = len(weights) + done + failed

    def started(self, name: str) -> None:
        """See :class:`hrl_policies.study.conduct.Watch`."""
        self.running[name] = time.monotonic()

    def ended(self, name: str, seconds: float, error: str) -> None:
        """See :class:`hrl_policies.study.conduct.Watch`."""
        self.running.pop(name, None)
        if error:
            self.failures[name] = reason_of(error)
        if name not in self._weights:
            # Worlds and purifiers are no runs.
            return
        weight = self._weights.pop(name)
        self._left -= weight
        if error:
            self.failed += 1
            return
        self.done += 1
        self._spent += seconds
        self._spent_weight += weight

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end, if the runs that are left go as those that have ended; None while none has."""
        if not self._spent_weight:
            return None
        left = self._left * self._spent / self._spent_weight
        return left / max(1, min(self.workers, len(self._weights)))

    def summary(self) -> str:
        """Returns one line on where the study stands."""
        left = self.total - self.done - self.failed
        parts = [f"{self.done} of {self.total} runs done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if left:
            remaining = self.seconds_left
            parts.append(f"{left} left" + ("" if remaining is None else f", about {duration(remaining)}"))
        return ", ".join(parts)


class PlainProgress(StudyProgress):
    """Prints one line for each run that ends; for files and pipes.

    Args:
        workers: See :class:`StudyProgress`.
        console: Where to print.
    """

    def __init__(self, workers: int, console: Console) -> None:
        super().__init__(workers)
        self._console = console

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def planned(self, weights: Mapping[str, float], done: int, failed: int) -> None:
        """Prints where the study stands."""
        super().planned(weights, done, failed)
        self._print(self.summary())

    def ended(self, name: str, seconds: float, error: str) -> None:
        """Prints how it went."""
        super().ended(name, seconds, error)
        how = (
            f"FAILED after {duration(seconds)}: {reason_of(error)}"
            if error
            else f"done in {duration(seconds)}"
        )
        self._print(f"{name}: {how} ({self.summary()})")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveProgress(StudyProgress):
    """Shows bar, time left, running and failed runs in place, in a terminal.

    Args:
        workers: See :class:`StudyProgress`.
        console: The terminal.
    """

    def __init__(self, workers: int, console: Console) -> None:
        super().__init__(workers)
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=2, transient=True)

    def __enter__(self) -> LiveProgress:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def render(self) -> Group:
        """Returns what the terminal shows now."""
        table = Table.grid(padding=(0, 2))
        for name, since in list(self.running.items())[:_SHOWN_RUNNING]:
            table.add_row(Text("running", style="cyan"), Text(name), duration(time.monotonic() - since))
        for name, reason in list(self.failures.items())[-_SHOWN_FAILURES:]:
            table.add_row(Text("failed", style="red"), Text(name), Text(reason, overflow="ellipsis"))
        bar = ProgressBar(total=max(self.total, 1), completed=self.done + self.failed, width=60)
        return Group(Text(self.summary(), style="bold"), bar, table)


def progress_for(console: Console, workers: int) -> PlainProgress | LiveProgress:
    """Returns the live display in a terminal, plain lines elsewhere."""
    return LiveProgress(workers, console) if console.is_terminal else PlainProgress(workers, console)
