"""The log of one run: what ran, with which versions, and what it was warned of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from hrl_policies.study.config import RunConfig
from hrl_policies.study.store import machine, versions


class RunLog:
    """Lines of a run's ``log.txt``, collected while it runs and written with its folder.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        steps = f", {config.total_steps:,} steps in {config.n_envs} sessions" if config.total_steps else ""
        variant = f" ({config.variant})" if config.variant else ""
        where = f"{config.world}, Max Len {config.session.max_len}"
        found = versions()
        packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
        self._lines = [
            f"run: {config.method}{variant} in {where}, seed {config.seed}{steps}",
            f"purifier: {f'{config.purifier.name} {config.purifier.hash}' if config.purifier else 'none'}",
            f"on: Python {found['python']}, {found['platform']}; {machine()}",
            f"with: {packages}",
        ]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Notes every warning once, and shows it as it would have been shown."""
        shown = warnings.showwarning
        seen: set[str] = set()

        def note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            said = f"warning: {category.__name__}: {' '.join(str(message).split())}"
            if said not in seen:
                seen.add(said)
                self._lines.append(said)
            shown(message, category, filename, lineno, file, line)

        # Entering this makes Python forget which warnings earlier runs of the process have shown.
        with warnings.catch_warnings():
            warnings.showwarning = note
            yield

    def add(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(line)

    def text(self) -> str:
        """Returns the log."""
        return "\n".join(self._lines) + "\n"
