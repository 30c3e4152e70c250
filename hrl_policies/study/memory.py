"""The most memory that a run takes."""

from __future__ import annotations

import sys
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Resets the largest resident size of a process; see proc_pid_clear_refs(5).
_RESET_PEAK = "5"
_KIB, _MIB = 2**10, 2**20


class PeakMemory:
    """The largest resident memory of this process since the object was made, worlds and libraries included.

    Where the system does not let a process forget earlier peaks (other than Linux), the peak since the process began,
    which is no smaller.
    """

    def __init__(self) -> None:
        try:
            _RESET.write_text(_RESET_PEAK, encoding="ascii")
        except OSError:
            # Not Linux, or not allowed: the peak since the process began it is.
            return

    def mib(self) -> float | None:
        """Returns the peak in MiB; None where the system does not tell."""
        size = _peak_of_status()
        size = _peak_of_process() if size is None else size
        return None if size is None else round(size / _MIB, 1)


def _peak_of_status() -> int | None:
    try:
        text = _STATUS.read_text(encoding="ascii")
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * _KIB for line in text.splitlines() if line.startswith("VmHWM:")), None
    )


def _peak_of_process() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * _KIB
