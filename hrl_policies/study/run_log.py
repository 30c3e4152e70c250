"""What is noted of a run besides its result: its log, the most memory it takes, versions and machine."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from hrl_policies.study.config import RunConfig

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Resets the largest resident size of a process; see proc_pid_clear_refs(5).
_RESET_PEAK = "5"
_KIB, _MIB = 2**10, 2**20
# What the process held at most before the object was made may exceed by so much what it holds then.
_SLACK = 8 * _MIB
_PACKAGES = (
    "kuaifair",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "gymnasium",
    "torch",
    "stable-baselines3",
    "sb3-contrib",
)


class PeakMemory:
    """The largest resident memory of this process since the object was made, worlds and libraries included.

    Linux forgets earlier peaks when asked to. Other systems, and containers that forbid the question, remember them
    for as long as the process lives: there, the peak is known once it exceeds all earlier ones.
    """

    def __init__(self) -> None:
        _forget_earlier_peaks()
        self._at_start = _peak()
        resident = _status("VmRSS")
        self._starts_low = self._at_start is not None and resident is not None and self._at_start <= resident + _SLACK

    def mib(self) -> float | None:
        """Returns the peak in MiB; None where the system does not tell, or an earlier peak hides this one."""
        peak = _peak()
        if peak is None or self._at_start is None or not (self._starts_low or peak > self._at_start):
            return None
        return round(peak / _MIB, 1)


def _forget_earlier_peaks() -> None:
    try:
        _RESET.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        # Not Linux, or not allowed; what was reached before is then told apart by its size.
        return


def _peak() -> int | None:
    size = _status("VmHWM")
    return _peak_of_process() if size is None else size


def _status(name: str) -> int | None:
    """Returns a line of the process's status, in bytes."""
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    sizes = (int(line.split()[1]) * _KIB for line in text.splitlines() if line.startswith(f"{name}:"))
    return next(sizes, None)


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * _KIB


class RunLog:
    """Lines of a run's ``log.txt``, collected while it runs and written with its folder.

    Args:
        config: The run.
    """

    def __init__(self, config: RunConfig) -> None:
        steps = f", {config.total_steps:,} steps in {config.n_envs} sessions" if config.total_steps else ""
        variant = f" ({config.variant})" if config.variant else ""
        where = f"{config.world}, Max Len {config.session.max_len}"
        environment = versions()
        packages = ", ".join(f"{name} {number}" for name, number in environment["packages"].items() if number)
        self._lines = [
            f"run: {config.method}{variant} in {where}, seed {config.seed}{steps}",
            f"purifier: {f'{config.purifier.name} {config.purifier.hash}' if config.purifier else 'none'}",
            f"on: Python {environment['python']}, {environment['platform']}; {machine()}",
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


def versions() -> dict[str, Any]:
    """Returns the versions that a result depends on, JSON-able."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def machine() -> str:
    """Returns one line on the machine, for timings."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    size = f", {memory / 2**30:.0f} GiB memory" if memory else ""
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {platform.machine()}{size}, {platform.system()}, {python}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
