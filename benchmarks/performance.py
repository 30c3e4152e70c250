"""What the hot paths cost beside a bare matrix product, and whether one has become slower.

    python benchmarks/performance.py           # prints the table
    python benchmarks/performance.py --check   # fails where a ratio is more than twice the one in performance.json
    python benchmarks/performance.py --store   # makes today's ratios those of performance.json

The product is (256, 64) x (64, 10,728) in float32. Product and calls take turns on one thread, in processor time, and
the least of each counts, so that a machine that does other things too hardly moves a ratio. Where a ratio is above its
limit all are measured again: only what is slow in three attempts fails.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from belief_costs import item_features
from env_speed import sb3_steps, simulator_steps, synthetic_world
from preference_costs import evidence, models

from dsrm.own_level import OwnLevel
from hrl_policies.study import plan_run, single_threaded
from hrl_policies.study.loading import build_policy
from hrl_policies.worlds import load_worlds
from kuaifair_env.files import write_text_atomically

BASELINE = Path(__file__).with_suffix(".json")
FACTOR, ATTEMPTS, ROUNDS, SECONDS = 2.0, 3, 8, 0.05
ITEMS, SESSIONS, SLATE = 10_000, 64, 10


def calls() -> dict[str, Callable[[], object]]:
    """Returns one call of every hot path, by name."""
    world = synthetic_world(10_728)
    return {
        "simulator step, 256 users": partial(next, simulator_steps(world, "slate", 256)),
        "environment step, 64 users, embeddings": partial(next, sb3_steps(world, "embedding", 64)),
        "purifier step, 64 users": partial(models()["diffusion: student"].moments, evidence(64)),
        "belief, 16 slates of 64 users": belief_session(),
        "PPO update, HRL, 256 steps": ppo_update(),
    }


def belief_session() -> Callable[[], object]:
    """Returns what takes 16 slates of each session into the own level, no item twice."""
    generator = torch.Generator().manual_seed(0)
    level = OwnLevel(item_features(ITEMS, 64, generator), SESSIONS)
    base, rows = torch.randn(SESSIONS, ITEMS, generator=generator), torch.arange(SESSIONS)
    slates = torch.rand(SESSIONS, ITEMS, generator=generator).argsort(dim=1)[:, : 16 * SLATE].split(SLATE, dim=1)

    def session() -> None:
        level.start(rows)
        for items in slates:
            level.observe(rows, items, items % 3 == 0)
            level.update(base)

    return session


def ppo_update() -> Callable[[], object]:
    """Returns the update of HRL after a rollout in the toy world."""
    config = plan_run("hrl", "KuaiFair-Toy-v0", seed=1, total_steps=256, n_envs=16)
    model = build_policy(config, load_worlds(config.world))
    model.learn(256)
    return model.train


def ratios(timed: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the least time of each call, over rounds that alternate with the product, in products."""
    factors = torch.randn(256, 64), torch.randn(64, 10_728)
    everything = {"product": lambda: factors[0] @ factors[1]} | timed
    least = dict.fromkeys(everything, float("inf"))
    for _ in range(ROUNDS):
        for name, call in everything.items():
            end = time.process_time() + SECONDS
            while (start := time.process_time()) < end:
                call()
                least[name] = min(least[name], time.process_time() - start)
    return {name: least[name] / least["product"] for name in timed}


def table(now: dict[str, float], stored: dict[str, float]) -> str:
    """Returns ratios beside those that are stored."""
    lines = [f"{'':<42}{'now':>8}{'stored':>8}", *(f"{n:<42}{now[n]:>8.3g}{stored.get(n, 0):>8.3g}" for n in now)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where something has become slower")
    parser.add_argument("--store", action="store_true", help="keep the ratios as those to compare with")
    arguments = parser.parse_args()
    single_threaded()
    timed = calls()
    stored = json.loads(BASELINE.read_text("utf-8")) if BASELINE.exists() else {}
    now, slow = ratios(timed), []
    for attempt in range(ATTEMPTS):
        slow = [name for name, ratio in now.items() if ratio > FACTOR * stored.get(name, float("inf"))]
        if not (arguments.check and slow) or attempt == ATTEMPTS - 1:
            break
        again = ratios(timed)
        now = {name: min(ratio, again[name]) for name, ratio in now.items()}
    print(table(now, stored))
    if arguments.store:
        rounded = {name: float(f"{ratio:.3g}") for name, ratio in now.items()}
        write_text_atomically(BASELINE, json.dumps(rounded, indent=2) + "\n")
    if arguments.check and slow:
        raise SystemExit(f"more than {FACTOR:g} times as slow as in {BASELINE.name}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
