"""Lines on stderr that say what a long step does."""

from __future__ import annotations

import os
import sys

QUIET_VARIABLE = "KUAIFAIR_QUIET"
"""Environment variable that silences :func:`announce`, whatever its value."""


def announce_rebuilt(error: Exception) -> None:
    """Prints one line about an entry of the cache that cannot be used, and why, unless ``KUAIFAIR_QUIET`` is set."""
    announce(f"a damaged entry of the cache is made again: {error}")


def announce(step: str) -> None:
    """Prints one line about a step that takes long, unless ``KUAIFAIR_QUIET`` is set."""
    if not os.environ.get(QUIET_VARIABLE):
        print(f"kuaifair: {step} ...", file=sys.stderr, flush=True)
