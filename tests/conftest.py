"""What holds for every test: one numerical thread, since two collapse when something else uses a core, and Ctrl-C."""

from __future__ import annotations

import os
import signal

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

os.environ.setdefault("KUAIFAIR_QUIET", "1")

from hypothesis import settings  # noqa: E402  (the threads above come first)

# A shell ignores Ctrl-C for commands that it runs in the background, and Python then installs no handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("fixed")
