"""User-steps per second and memory by number of items and of users, up to a million items and ten million users.

    python benchmarks/large_catalogue.py

Every pair of sizes runs in a process of its own: 256 sessions, ``d = 16``, a factor model of 16 dimensions, slates of
10, one thread, and histories of 50 places in memory-mapped files. The numbers of the worlds are random. A step decodes
the actions, plays, keeps records, starts new sessions where one ended, and observes. ``forbid`` shows no item twice in
a session, which takes a mask of ``(256, items)``. Figures are the best of several rounds, in seconds of the processor.
Memory is the peak of the whole process, with the making of the world; pages of the mapped files are in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from env_speed import HISTORY, products_per_second, random_actions, rate, synthetic_world
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from kuaifair_env import SessionConfig, World
from kuaifair_env.batch import SessionBatch
from kuaifair_env.response.base import HistoryWindow

BATCH, DIMENSION = 256, 16
CASES = {
    "slate": SessionConfig(action_mode="slate"),
    "embedding": SessionConfig(action_mode="embedding"),
    "embedding, forbid": SessionConfig(action_mode="embedding", repeats="forbid"),
}
USERS_AT_ONCE = 100_000


def write_histories(folder: Path, n_users: int, n_items: int) -> None:
    """Writes the histories of all users, drawn at random, to two files."""
    rng = np.random.default_rng(0)
    with (folder / "items").open("wb") as items, (folder / "clicks").open("wb") as clicks:
        for begin in range(0, n_users, USERS_AT_ONCE):
            shape = min(USERS_AT_ONCE, n_users - begin), HISTORY
            items.write(rng.integers(0, n_items, shape, np.int32).tobytes())
            clicks.write(rng.integers(0, 2, shape, np.int8).tobytes())


def mapped_world(folder: Path, n_users: int, n_items: int) -> World:
    """Returns a world whose histories stay in their files."""
    items: NDArray[np.int32] = np.memmap(folder / "items", np.int32, "r", shape=(n_users, HISTORY))
    clicks: NDArray[np.bool_] = np.memmap(folder / "clicks", np.bool_, "r", shape=(n_users, HISTORY))
    return synthetic_world(n_items, n_users, DIMENSION, DIMENSION, HistoryWindow(items, clicks))


def steps(world: World, config: SessionConfig) -> Iterator[int]:
    """Plays forever; yields the number of sessions after each step."""
    batch = SessionBatch(world, config, BATCH)
    batch.reset(np.arange(BATCH))
    actions = random_actions(world, config.action_mode, BATCH)
    turn = 0
    while True:
        batch.step(actions[turn % len(actions)])
        if len(batch.finished):
            batch.reset(batch.finished)
        batch.observe()
        turn += 1
        yield BATCH


def measure(folder: Path, n_users: int, n_items: int, seconds: float, rounds: int) -> dict[str, float]:
    """Returns steps a second of every case, seconds of making the world, and memory in MiB."""
    start = time.process_time()
    world = mapped_world(folder, n_users, n_items)
    figures = {"making": time.process_time() - start}
    for name, config in CASES.items():
        figures[name] = rate(steps(world, config), seconds, rounds, time.process_time)
    figures["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def measure_in_own_process(arguments: argparse.Namespace, n_users: int, n_items: int) -> dict[str, float]:
    """Returns what :func:`measure` does in a process that has done nothing else."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        write_histories(Path(folder), n_users, n_items)
        sizes = ["--users", str(n_users), "--items", str(n_items), "--histories", folder]
        times = ["--seconds", str(arguments.seconds), "--rounds", str(arguments.rounds)]
        result = subprocess.run([sys.executable, __file__, *sizes, *times], capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(result.stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--users", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round (default 0.5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per figure; the best counts (default 3)")
    parser.add_argument("--folder", type=Path, help="where histories are written meanwhile: 250 bytes a user")
    parser.add_argument("--histories", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with threadpool_limits(1):
        if arguments.histories:
            sizes = arguments.users[0], arguments.items[0]
            print(json.dumps(measure(arguments.histories, *sizes, arguments.seconds, arguments.rounds)))
            return
        reference = products_per_second(time.process_time)
    print(f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, one thread")
    print(f"reference: {reference:.0f} products (256, 64) x (64, 10728) per second\n")
    print(f"| items | users | {' | '.join(CASES)} | peak memory, MiB | making the world, s |")
    print(f"|---:|---:|{'---:|' * len(CASES)}---:|---:|")
    for n_items in arguments.items:
        for n_users in arguments.users:
            figures = measure_in_own_process(arguments, n_users, n_items)
            speeds = " | ".join(f"{figures[name]:,.0f}" for name in CASES)
            sizes_and_costs = f"{figures['memory']:,.0f} | {figures['making']:.1f}"
            print(f"| {n_items:,} | {n_users:,} | {speeds} | {sizes_and_costs} |", flush=True)


if __name__ == "__main__":
    main()
