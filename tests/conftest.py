"""What holds for every test: one numerical thread, since two collapse when something else uses a core, and Ctrl-C."""

from __future__ import annotations

import gc
import os
import signal

# Imports make some hundred thousand objects that stay. Garbage is first collected when all are there, and without them.
gc.disable()

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

# Where a test asks for two threads, one that waits for the other leaves the core to other work instead of spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KUAIFAIR_QUIET", "1")

import pytest  # noqa: E402  (the threads above come first)
from hypothesis import settings  # noqa: E402

# A shell ignores Ctrl-C for commands that it runs in the background, and Python then installs no handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("fixed")


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture
def rebuilt(monkeypatch, capsys):
    """Returns the lines on stderr about damaged entries of the cache since the last call."""
    monkeypatch.delenv("KUAIFAIR_QUIET")
    return lambda: [line for line in capsys.readouterr().err.splitlines() if "damaged entry of the cache" in line]
