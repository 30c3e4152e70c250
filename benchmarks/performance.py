"""What the hot paths cost beside a bare matrix product, and whether one has become slower.

    python benchmarks/performance.py           # prints the table
    python benchmarks/performance.py --check   # fails where ratios are more than twice those in performance.json
    python benchmarks/performance.py --store   # makes today's ratios those of performance.json

Machines differ in how fast they multiply, call small operations and read memory, so that there are three measures: a
product of (256, 64) and (64, 10,728), a hundred sums of ten numbers, and a copy of (64, 10,728). Slow is what is
slower beside all three. Measures and calls take turns on one thread, in processor time, and the least of each counts,
so that a machine that does other things too hardly moves a ratio. Where ratios are above their limits all are
measured again: only what is slow in three attempts fails.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
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
PRODUCT, SMALL, COPY = "products", "small sums", "copies"

Ratios = dict[str, dict[str, float]]
"""Times by call and measure."""


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
            level.observe(rows, items, items % 3 == 0, base)
            level.update(base)

    return session


def ppo_update() -> Callable[[], object]:
    """Returns the update of HRL after a rollout in the toy world."""
    config = plan_run("hrl", "KuaiFair-Toy-v0", seed=1, total_steps=256, n_envs=16)
    model = build_policy(config, load_worlds(config.world))
    model.learn(256)
    return model.train


def ratios(timed: dict[str, Callable[[], object]]) -> Ratios:
    """Returns the least time of each call, over rounds that alternate with the measures, in each of them."""
    factors, numbers = (torch.randn(256, 64), torch.randn(64, 10_728)), np.zeros(10, np.float32)
    measures = {
        PRODUCT: lambda: factors[0] @ factors[1],
        SMALL: lambda: [numbers + numbers for _ in range(100)],
        COPY: lambda: factors[1].clone(),
    }
    everything: dict[str, Callable[[], object]] = measures | timed
    least = dict.fromkeys(everything, float("inf"))
    for _ in range(ROUNDS):
        for name, call in everything.items():
            end = time.process_time() + SECONDS
            while (start := time.process_time()) < end:
                call()
                least[name] = min(least[name], time.process_time() - start)
    return {name: {measure: least[name] / least[measure] for measure in measures} for name in timed}


def slower(now: Ratios, stored: Ratios) -> list[str]:
    """Returns what has become more than ``FACTOR`` times as slow beside every measure."""
    return [
        name
        for name, ratio in now.items()
        if name in stored and all(ratio[measure] > FACTOR * limit for measure, limit in stored[name].items())
    ]


def table(now: Ratios, stored: Ratios) -> str:
    """Returns ratios, and in brackets those that are stored."""
    lines = [f"{'':<40}" + "".join(f"{measure:>22}" for measure in (PRODUCT, SMALL, COPY))]
    for name, ratio in now.items():
        before = stored.get(name, {})
        cells = [f"{value:.3g} [{before.get(measure, float('nan')):.3g}]" for measure, value in ratio.items()]
        lines.append(f"{name:<40}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where something has become slower")
    parser.add_argument("--store", action="store_true", help="keep the ratios as those to compare with")
    arguments = parser.parse_args()
    single_threaded()
    timed = calls()
    stored: Ratios = json.loads(BASELINE.read_text("utf-8")) if BASELINE.exists() else {}
    now, slow = ratios(timed), []
    for attempt in range(ATTEMPTS):
        slow = slower(now, stored)
        if not (arguments.check and slow) or attempt == ATTEMPTS - 1:
            break
        again = ratios(timed)
        now = {name: {m: min(value, again[name][m]) for m, value in ratio.items()} for name, ratio in now.items()}
    print(table(now, stored))
    if arguments.store:
        rounded = {name: {m: float(f"{value:.3g}") for m, value in ratio.items()} for name, ratio in now.items()}
        write_text_atomically(BASELINE, json.dumps(rounded, indent=2) + "\n")
    if arguments.check and slow:
        raise SystemExit(f"more than {FACTOR:g} times as slow as in {BASELINE.name}: {', '.join(slow)}")


if __name__ == "__main__":
    main()
