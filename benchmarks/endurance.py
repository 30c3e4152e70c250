"""Does memory stay flat? An hour of stepping, 20,000 served sessions, 10,000 resets and 1,000 loads of each kind.

    python benchmarks/endurance.py step --results docs/results     # and serve, reset, load

Resident memory, open files and threads are those of Linux' ``/proc``, after a collection and with the pages given back
that the allocator keeps for itself (``malloc_trim``): without that, freed pieces between others look like growth. The
first fifth of each part is warm-up. The slope is that of a line through the samples after it; its interval takes their
errors as independent, which they are not quite, as memory grows in pieces. A part fails where memory grew by more than
20 MB with the whole interval above 1 KiB an operation, or where more files are open, or more threads run, than after
the warm-up.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gymnasium as gym
import numpy as np
from scipy.stats import linregress, t
from worlds import write_section

import kuaifair_env
from dsrm import load_purifier
from hrl_policies import load_pretrained
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.pretrained import pretrained_agents, pretrained_folder
from hrl_policies.study import single_threaded
from hrl_policies.study.store import PURIFIER, load_run, machine
from hrl_policies.study.tables import ResultTable
from hrl_policies.worlds import load_worlds

STEP_WORLD, WORLD, N_ENVS = "KuaiFair-KuaiRandTwin-v0", "KuaiFair-Toy-v0", 64
WARM_UP = 0.2
MAX_GROWTH, MAX_SLOPE = 20e6, 1024.0
HEADER = (
    "what",
    "operations",
    "seconds",
    "MB after warm-up",
    "MB at the end",
    "bytes per 1,000 operations",
    "open files",
    "threads",
    "verdict",
)


@dataclass
class Meter:
    """Samples of this process, taken between operations, up to 200 in as much time again as has passed.

    Attributes:
        name: What is done.
        samples: Operations so far, resident bytes, open files, threads.
        operations: So far.
    """

    name: str
    samples: list[tuple[int, int, int, int]] = field(default_factory=list)
    operations: int = 0
    _start: float = field(default_factory=time.monotonic)
    _last: float = 0.0

    @property
    def seconds(self) -> float:
        """Since the first operation began."""
        return time.monotonic() - self._start

    def add(self, operations: int = 1) -> None:
        """Counts operations that are done, and takes a sample if the last one is some time ago."""
        self.operations += operations
        if self.seconds - self._last >= self.seconds / 200:
            self._last = self.seconds
            self.samples.append((self.operations, *state_of_process()))

    def row(self) -> tuple[str, ...]:
        """Returns the row of the table; the last cell is the verdict."""
        samples = np.array(self.samples)
        operations, memory, files, threads = samples[samples[:, 0] >= WARM_UP * self.operations].T
        line = linregress(operations, memory)
        # Memory that never changes has no error either.
        half = t.ppf(0.975, len(operations) - 2) * line.stderr if np.ptp(memory) else 0.0
        low, high = line.slope - half, line.slope + half
        grows = low > MAX_SLOPE and memory[-1] - memory[0] > MAX_GROWTH
        return (
            self.name,
            f"{self.operations:,}",
            f"{self.seconds:,.0f}",
            f"{memory[0] / 1e6:.1f}",
            f"{memory[-1] / 1e6:.1f}",
            f"{1e3 * line.slope:,.0f} [{1e3 * low:,.0f}, {1e3 * high:,.0f}]",
            f"{files[0]}, {files[-1]}",
            f"{threads[0]}, {threads[-1]}",
            "GROWS" if grows or files[-1] > files[0] or threads[-1] > threads[0] else "flat",
        )


def state_of_process() -> tuple[int, int, int]:
    """Returns resident bytes without what is merely kept for later, open files and threads."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


class CountedQuota(BeliefQuota):
    """BeliefQuota that tells a meter which sessions ended."""

    meter: Meter

    def learn(self, step: kuaifair_env.ServedStep) -> None:
        super().learn(step)
        self.meter.add(int((step.done & step.live).sum()))


def step(arguments: argparse.Namespace) -> Iterator[Meter]:
    """Random slates in the vector environment, reset every 5,000 steps."""
    env: Any = gym.make_vec(STEP_WORLD, num_envs=N_ENVS)
    env.action_space.seed(0)
    meter = Meter(f"steps of {N_ENVS} sessions, {STEP_WORLD}")
    while meter.seconds < arguments.seconds:
        env.reset(seed=meter.operations)
        for _ in range(5_000):
            env.step(env.action_space.sample())
            meter.add()
    env.close()
    yield meter


def serve(arguments: argparse.Namespace) -> Iterator[Meter]:
    """One service of BeliefQuota."""
    pair = load_worlds(WORLD)
    agent = CountedQuota(pair.scorer)
    agent.meter = Meter(f"sessions served by BeliefQuota, {WORLD}")
    env = kuaifair_env.make_sb3(WORLD, n_envs=N_ENVS, split="test", action_mode="slate")
    kuaifair_env.serve(agent, env, sessions=arguments.sessions)
    yield agent.meter


def reset(arguments: argparse.Namespace) -> Iterator[Meter]:
    """Resets with ever new seeds, and environments made and closed."""
    env = gym.make(WORLD)
    yield repeated(f"resets, {WORLD}", arguments.resets, lambda number: env.reset(seed=number))

    def made(number: int) -> None:
        other = gym.make(WORLD)
        other.reset(seed=number)
        other.step(other.action_space.sample())
        other.close()

    yield repeated(f"environments made, stepped and closed, {WORLD}", arguments.loads, made)

    def made_vector(number: int) -> None:
        other: Any = gym.make_vec(WORLD, num_envs=N_ENVS)
        other.reset(seed=number)
        other.step(other.action_space.sample())
        other.close()

    yield repeated(f"vector environments made, stepped and closed, {WORLD}", arguments.loads, made_vector)


def load(arguments: argparse.Namespace) -> Iterator[Meter]:
    """Files read again and again; worlds differ in a setting, so that the process does not have them already."""
    folder = pretrained_folder(pretrained_agents()[0])
    yield repeated("purifiers loaded", arguments.loads, lambda _: load_purifier(folder / PURIFIER))
    yield repeated("run folders read", arguments.loads, lambda _: load_run(folder).sessions())
    yield repeated("agents loaded", arguments.loads, lambda _: load_pretrained(folder))

    def load_world(number: int) -> None:
        # More settings in turn than worlds that the process keeps.
        kuaifair_env.make_world(WORLD, split="train", history_length=1 + number % 12)

    yield repeated(f"worlds from the cache, {WORLD}", arguments.loads, load_world)


def repeated(name: str, count: int, operation: Callable[[int], object]) -> Meter:
    """Returns the meter of an operation done ``count`` times; it is told its number."""
    meter = Meter(name)
    for number in range(count):
        operation(number)
        meter.add()
    return meter


PARTS = {part.__name__: part for part in (step, serve, reset, load)}


def section(part: str, rows: list[tuple[str, ...]]) -> str:
    """Returns the section of a part, as a page of its own."""
    made_by = f"Made by: `python benchmarks/endurance.py {part} --results RESULTS` ({machine()})."
    table = ResultTable((PARTS[part].__doc__ or "").rstrip("."), HEADER, tuple(rows), (made_by,)).markdown()
    return table.removeprefix("##").replace("\n\n\n", "\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=3_600.0, help="of stepping")
    parser.add_argument("--sessions", type=int, default=20_000, help="to serve")
    parser.add_argument("--resets", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=1_000, help="of each kind, and environments made")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    rows = [meter.row() for meter in PARTS[arguments.part](arguments)]
    write_section(arguments.results, "endurance.md", section(arguments.part, rows))
    sys.exit(1 if any(row[-1] != "flat" for row in rows) else 0)


if __name__ == "__main__":
    main()
