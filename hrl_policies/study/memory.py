"""The most memory that a run takes."""

from __future__ import annotations

import sys
from pathlib import Path

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
# Resets the largest resident size of a process; see proc_pid_clear_refs(5).
_RESET_PEAK = "5"
_KIB, _MIB = 2**10, 2**20
# What the process held at most before the object was made may exceed by so much what it holds then.
_SLACK = 8 * _MIB


class PeakMemory:
    """The largest resident memory of this process since the object was made, worlds and libraries included.

    Linux forgets earlier peaks when asked to. Other systems, and containers that forbid the question, remember them
    for as long as the process lives: there, the peak is known once it exceeds all earlier ones.
    """

    def __init__(self) -> None:
        _forget_earlier_peaks()
        self._at_start = _peak()
        held = _status("VmRSS")
        self._starts_low = self._at_start is not None and held is not None and self._at_start <= held + _SLACK

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
