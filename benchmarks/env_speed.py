"""User-steps per second of every environment form, per action mode and batch size.

    python benchmarks/env_speed.py --threads 2
    python benchmarks/env_speed.py --profile slate 256

The world is as large as KuaiRec (7,176 users, 10,728 items, d = 64, windows of 50) with a factor model of 32
dimensions; its numbers are random, since the speed does not depend on them. A figure is the best of several
rounds, in processor time of the calling thread, which other programs disturb less than seconds on the wall. The last
column multiplies it by the time that a bare numpy product takes in the rounds between, so that figures of different
machines and hours can be read side by side.
"""

from __future__ import annotations

import argparse
import platform
import resource
import time
from collections.abc import Callable, Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from kuaifair_env import KuaiFairEnv, KuaiFairVectorEnv, SessionConfig, World
from kuaifair_env.actions import ActionMode
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data import (
    Catalogue,
    FeatureTable,
    InteractionData,
    InteractionLog,
    Provenance,
    Users,
    groups_of,
)
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.world import initial_history

USERS, FACTORS, DIMENSION, HISTORY = 7_176, 32, 64, 50
MODES: tuple[ActionMode, ...] = ("slate", "embedding", "item")


def synthetic_world(
    n_items: int,
    n_users: int = USERS,
    dimension: int = DIMENSION,
    factors: int = FACTORS,
    histories: HistoryWindow | None = None,
) -> World:
    """Returns a world whose numbers are random, by default with the users of KuaiRec.

    Args:
        n_items: Number of candidates.
        n_users: Number of users; only the first 7,176 have a log.
        dimension: Size of the item embeddings.
        factors: Of the response model.
        histories: From which sessions start; None takes the log's.
    """
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(min(n_users, USERS)), 60)
    items = (n_items * rng.beta(0.5, 2.0, len(users))).astype(np.int64)
    log = InteractionLog.sorted(users, items, rng.random(len(users)) < 0.45)
    data = InteractionData(
        Users(np.arange(n_users), FeatureTable.empty(n_users)),
        Catalogue(np.arange(n_items), FeatureTable.empty(n_items), np.zeros((n_items, 0), np.bool_)),
        log,
        log,
        Provenance("benchmark", "own"),
    )
    embeddings = rng.standard_normal((n_items, dimension), np.float32)
    embeddings *= np.sqrt(dimension) / np.linalg.norm(embeddings, axis=1, keepdims=True)
    response = FactorisedResponse(
        -1.5,
        0.5 * rng.standard_normal(n_users, np.float32),
        0.5 * rng.standard_normal(n_items, np.float32),
        0.2 * rng.standard_normal((n_users, factors), np.float32),
        0.2 * rng.standard_normal((n_items, factors), np.float32),
    )
    return World(
        split="test",
        data=data,
        n_items=n_items,
        groups=groups_of(data),
        embeddings=embeddings,
        response=response,
        users=np.arange(n_users),
        initial_history=initial_history(log, n_users, HISTORY) if histories is None else histories,
    )


def random_actions(world: World, mode: ActionMode, batch: int) -> list[np.ndarray]:
    """Returns a few batches of valid actions, drawn beforehand so that drawing is not timed."""
    rng = np.random.default_rng(1)
    if mode == "embedding":
        return [rng.uniform(-1, 1, (batch, world.dimension)).astype(np.float32) for _ in range(8)]
    if mode == "item":
        return [rng.integers(world.n_items, size=batch) for _ in range(8)]
    slates = [rng.choice(world.n_items, (batch, 12)) for _ in range(8)]
    return [np.stack([np.unique(row)[:10] for row in slate]) for slate in slates]


def simulator_steps(world: World, mode: ActionMode, batch: int) -> Iterator[int]:
    sessions = SessionBatch(world, SessionConfig(action_mode=mode), batch)
    sessions.reset(np.arange(batch))
    simulator, decode = sessions.simulator, sessions.decoder.decode
    actions = random_actions(world, mode, batch)
    turn = 0
    while True:
        # Slates are valid as they were drawn; the simulator itself takes them without a second look.
        items = actions[turn % 8] if mode == "slate" else decode(actions[turn % 8], None)
        outcome = simulator.step(items)
        finished = np.flatnonzero(outcome.done)
        if len(finished):
            simulator.reset(finished)
        turn += 1
        yield batch


def vector_steps(world: World, mode: ActionMode, batch: int) -> Iterator[int]:
    env = KuaiFairVectorEnv(world, SessionConfig(action_mode=mode), batch)
    env.reset(seed=0)
    actions = random_actions(world, mode, batch)
    turn = 0
    while True:
        env.step(actions[turn % 8])
        turn += 1
        yield batch


def sb3_steps(world: World, mode: ActionMode, batch: int) -> Iterator[int]:
    from kuaifair_env.sb3 import KuaiFairVecEnv  # needs torch

    env = KuaiFairVecEnv(world, SessionConfig(action_mode=mode), batch, seed=0)
    env.reset()
    actions = random_actions(world, mode, batch)
    turn = 0
    while True:
        env.step(actions[turn % 8])
        turn += 1
        yield batch


def single_steps(world: World, mode: ActionMode, batch: int) -> Iterator[int]:
    env = KuaiFairEnv(world, SessionConfig(action_mode=mode))
    env.reset(seed=0)
    actions = [action[0] for action in random_actions(world, mode, 1)]
    turn = 0
    while True:
        *_, terminated, truncated, _ = env.step(actions[turn % 8])
        if terminated or truncated:
            env.reset()
        turn += 1
        yield 1


FORMS: dict[str, Callable[[World, ActionMode, int], Iterator[int]]] = {
    "simulator": simulator_steps,
    "gymnasium vector": vector_steps,
    "sb3 vec env": sb3_steps,
    "single env": single_steps,
}


def rate(steps: Iterator[int], seconds: float, rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the best round's user-steps per second of a clock."""
    start = clock()
    for _ in range(20):
        next(steps)
        if clock() - start > seconds:
            break
    best = 0.0
    for _ in range(rounds):
        done, start = 0, clock()
        while clock() - start < seconds:
            done += next(steps)
        best = max(best, done / (clock() - start))
    return best


def products_per_second(clock: Callable[[], float] = time.perf_counter, seconds: float = 0.5, rounds: int = 3) -> float:
    """Returns how many (256, 64) x (64, 10728) products the machine does in a second."""
    left, right = np.ones((256, 64), np.float32), np.ones((64, 10_728), np.float32)
    return rate(iter(lambda: int((left @ right)[0, 0] > 0), 0), seconds, rounds, clock)


def speed_and_products(steps: Iterator[int], seconds: float, rounds: int) -> tuple[float, float]:
    """Returns user-steps and products per second of processor time, the best of rounds that alternate."""
    speed, products = 0.0, 0.0
    for _ in range(rounds):
        products = max(products, products_per_second(time.thread_time, 0.1, 1))
        speed = max(speed, rate(steps, seconds, 1, time.thread_time))
    return speed, products


def profile(world: World, mode: ActionMode, batch: int) -> None:
    """Prints where the time of each form goes."""
    import cProfile
    import pstats

    for name in FORMS:
        steps = FORMS[name](world, mode, batch)
        for _ in range(20):
            next(steps)
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(2000):
            next(steps)
        profiler.disable()
        print(f"== {name}, {mode}, batch {batch}, 2,000 steps")
        pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="numerical threads (default 2)")
    parser.add_argument("--seconds", type=float, default=0.6, help="length of a round (default 0.6)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per figure; the best counts (default 3)")
    parser.add_argument("--items", type=int, default=10_728, help="number of candidates (default 10728)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument(
        "--profile", nargs=2, metavar=("MODE", "BATCH"), help="profile the simulator and SB3 form instead"
    )
    arguments = parser.parse_args()
    world = synthetic_world(arguments.items)
    with threadpool_limits(arguments.threads):
        if arguments.profile:
            profile(world, arguments.profile[0], int(arguments.profile[1]))
        else:
            report(world, arguments)


def report(world: World, arguments: argparse.Namespace) -> None:
    """Prints the speed of every form, mode and batch size."""
    print(
        f"{platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}, {arguments.threads} threads"
    )
    print(f"{'form':<18}{'mode':<11}{'batch':>6}{'user-steps/s':>15}{'product, ms':>13}{'per product':>13}")
    for mode in MODES:
        for form, steps in FORMS.items():
            for batch in arguments.batches if form != "single env" else [1]:
                speed, products = speed_and_products(steps(world, mode, batch), arguments.seconds, arguments.rounds)
                print(
                    f"{form:<18}{mode:<11}{batch:>6}{speed:>15,.0f}{1000 / products:>13.2f}{speed / products:>13,.0f}",
                    flush=True,
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
