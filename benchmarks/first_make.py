"""What the first and the second ``gym.make`` of every id cost: clock, processor time, memory, and the cache.

    python benchmarks/first_make.py                       # every id, two threads
    python benchmarks/first_make.py KuaiFair-Toy-v0 --threads 1

Each id starts from an empty cache in a process of its own, as after installation; the second make is another process
with the cache of the first. Ids of real data sets are made from their twins. Clock and processor time include the
interpreter's start and ``import gymnasium, kuaifair_env``. Run it on an idle machine: the clock of a shared one says
nothing, and its processor time runs up to twice as long.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from kuaifair_env import ENVIRONMENTS
from kuaifair_env.data.cache import CACHE_VARIABLE
from kuaifair_env.files import folder_size

_MAKE = """
import sys, warnings
import gymnasium, kuaifair_env
warnings.simplefilter("ignore")
settings = {"source": "twin"} if sys.argv[2] == "real" else {}
gymnasium.make(sys.argv[1], **settings)
"""


@dataclass(frozen=True)
class Cost:
    """Seconds of clock and processor, and the peak of resident memory in MB, of one process."""

    clock: float
    processor: float
    memory: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", help="environment ids; all by default")
    parser.add_argument("--threads", type=int, default=2, help="threads of numerical libraries")
    arguments = parser.parse_args()
    lines = []
    for env_id in arguments.ids or [name for name, origin in ENVIRONMENTS.items() if origin.twin]:
        with tempfile.TemporaryDirectory() as cache:
            first, second = (cost_of_make(env_id, Path(cache), arguments.threads) for _ in range(2))
            size = folder_size(cache) / 1e6
        lines.append(
            f"| {env_id} | {first.clock:.1f} | {first.processor:.1f} | {first.memory:,.0f} | {second.clock:.2f} | "
            f"{second.processor:.2f} | {second.memory:,.0f} | {size:,.0f} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    head = (
        "| id | first: clock, s | processor, s | memory, MB | second: clock, s | processor, s | memory, MB | "
        "cache, MB |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    cores, load = os.cpu_count(), os.getloadavg()[0]
    machine = f"{platform.machine()}, {cores} cores, {arguments.threads} threads, load {load:.1f}"
    print(f"Machine: {machine}.\n\n{head}" + "\n".join(lines))


def cost_of_make(env_id: str, cache: Path, threads: int) -> Cost:
    """Makes an environment in a new process and returns what that cost."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    kind = "real" if ENVIRONMENTS[env_id].official else "synthetic"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _MAKE, env_id, kind], env=os.environ | counts | {CACHE_VARIABLE: str(cache)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    clock = time.perf_counter() - start
    if status:
        raise SystemExit(f"{env_id} could not be made")
    return Cost(clock, usage.ru_utime + usage.ru_stime, _megabytes(usage))


def _megabytes(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


if __name__ == "__main__":
    main()
