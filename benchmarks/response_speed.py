"""User-steps per second of simulators whose users answer to what they saw: the history-dependent response model.

    python benchmarks/response_speed.py

The model has the size that KuaiSim ships (two layers, width 128, four heads, history 100), the world that of KuaiRec
(7,176 users, 10,728 items); slates hold 10 items, and all numbers are random, since the speed does not depend on them.
"reading windows" is the same model without its memory of sessions: it reads the newest 100 places anew at each step.
Seconds are processor time of one thread, and "per product" divides by how many (256, 64) x (64, 10728) products of
float32 the same thread does in a second, so that figures of different machines can be read side by side. Each round
measures all lines in turn. Random slates offend the default leave rule early, and a session that starts reads a
history of 100; users who never leave stay for 20 slates.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--seconds", type=float, default=1.0, help="length of a measurement (default 1)")
parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts (default 7)")
parser.add_argument("--batches", type=int, nargs="+", default=[32, 256])
arguments = parser.parse_args()
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402  (threads are set before numpy loads)
from env_speed import USERS, synthetic_world  # noqa: E402

from kuaifair_env import World, seeding  # noqa: E402
from kuaifair_env.abandonment import leave_rule  # noqa: E402
from kuaifair_env.response import FactorisedResponse, SequentialResponse, TransformerShape  # noqa: E402
from kuaifair_env.response.base import HistoryWindow  # noqa: E402
from kuaifair_env.simulator import RandomUsers, SessionSimulator  # noqa: E402

ITEMS, SLATE, MAX_LEN = 10_728, 10, 20
SHAPE = TransformerShape(dimension=128, heads=4, layers=2, hidden=128, length=100)


class ReadingWindows(SequentialResponse):
    """The model without a memory of sessions."""

    def session_memory(self, batch_size: int) -> None:  # type: ignore[override]
        """Returns None: the simulator hands over windows."""


def random_response(kind: type[SequentialResponse], static: FactorisedResponse) -> SequentialResponse:
    """Returns a model whose numbers are random, the same for both kinds."""
    rng = np.random.default_rng(2)
    codes = [rng.normal(size=(size, SHAPE.dimension)).astype(np.float32) for size in (ITEMS, USERS)]
    weights = {name: rng.normal(0, 0.1, size).astype(np.float32) for name, size in SHAPE.weight_shapes().items()}
    return kind(static, SHAPE, *codes, weights)


def random_world(kind: type[SequentialResponse]) -> World:
    """Returns a world of KuaiRec's size whose numbers are random, with a history-dependent model."""
    rng = np.random.default_rng(0)
    shape = USERS, SHAPE.length
    histories = HistoryWindow(rng.integers(ITEMS, size=shape, dtype=np.int32), rng.random(shape) < 0.45)
    world = synthetic_world(ITEMS, dimension=8, histories=histories)
    assert isinstance(world.response, FactorisedResponse)
    return replace(world, response=random_response(kind, world.response))


def stepping(world: World, leave: str, batch_size: int) -> Callable[[], int]:
    """Returns a function that shows one slate to each of ``batch_size`` users, and returns their number."""
    source = RandomUsers(world.users, seeding.stream_keys(0, batch_size))
    simulator = SessionSimulator(world, batch_size, source, max_len=MAX_LEN, slate_size=SLATE, leave=leave_rule(leave))
    simulator.reset(np.arange(batch_size))
    rng = np.random.default_rng(1)
    first = rng.integers(0, ITEMS // SLATE, (64, batch_size, 1))
    slates = first + ITEMS // SLATE * np.arange(SLATE)
    turn = 0

    def step() -> int:
        nonlocal turn
        outcome = simulator.step(slates[turn % len(slates)])
        finished = np.flatnonzero(outcome.done)
        if len(finished):
            simulator.reset(finished)
        turn += 1
        return batch_size

    return step


def product() -> Callable[[], int]:
    """Returns a function that takes one product of the size that figures are compared with."""
    left, right = np.ones((256, 64), np.float32), np.ones((64, 10_728), np.float32)
    return lambda: len(left @ right) // 256


def rate(step: Callable[[], int]) -> float:
    """Returns what ``step`` counts per second of processor time."""
    step()
    count, start = 0, time.process_time()
    while time.process_time() - start < arguments.seconds:
        count += step()
    return count / (time.process_time() - start)


def main() -> None:
    world, windows = random_world(SequentialResponse), random_world(ReadingWindows)
    steps = {"product": product()}
    for leave in ("temper", "never"):
        for batch in arguments.batches:
            steps[f"{leave:<8}{batch:>4}  reading windows"] = stepping(windows, leave, batch)
            steps[f"{leave:<8}{batch:>4}  memory"] = stepping(world, leave, batch)
    rates = [{name: rate(step) for name, step in steps.items()} for _ in range(arguments.rounds)]
    medians = {name: float(np.median([round_rates[name] for round_rates in rates])) for name in steps}
    reference = medians.pop("product")
    print(f"one product takes {1e3 / reference:.2f} ms")
    print(f"{'leave':<8}{'B':>4}  {'history':<16}{'user-steps/s':>14}{'per product':>13}")
    for name, value in medians.items():
        print(f"{name:<30}{value:>14,.0f}{value / reference:>13.1f}")


if __name__ == "__main__":
    main()
