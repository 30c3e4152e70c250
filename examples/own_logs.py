"""Your own log: from a CSV file to an agent that is trained and evaluated on purified states.

Run: python examples/own_logs.py [log.csv [items.csv]]

A log has one row per exposure: user_id, item_id, click (0 or 1) and, where known, a date; ids are integers or text.
Items may have tags and features. Without files the example draws a small shop into this folder, in which popular
articles are shown more often than they deserve.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from stable_baselines3 import A2C

import kuaifair_env
from dsrm import ClickScorer, VecDSRM, load_purifier
from hrl_policies import QuotaGreedy, cached_purifier


def main(log: Path, items: Path | None = None, steps: int = 30_000) -> None:
    # The latest fifth of the log is the test log. Files are read, and users fitted, when a world is first made.
    kuaifair_env.register_world("MyShop-v0", log, items=items)
    world = kuaifair_env.make_world("MyShop-v0", split="train")
    purifier = load_purifier(cached_purifier(world, "profile", progress=True))

    sessions = VecDSRM(kuaifair_env.make_sb3("MyShop-v0", n_envs=64, seed=11), purifier)
    agent = A2C("MlpPolicy", sessions, seed=11, device="cpu").learn(steps)

    test = VecDSRM(kuaifair_env.make_sb3("MyShop-v0", split="test"), purifier)
    slates = kuaifair_env.make_sb3("MyShop-v0", split="test", action_mode="slate")
    for name, policy, env in (
        ("A2C, purified", agent, test),
        ("QuotaGreedy", QuotaGreedy(ClickScorer.fit(world)), slates),
    ):
        print(f"\n{name}\n{kuaifair_env.evaluate(policy, env).table()}")
    print(env.world)


def draw_shop(folder: Path, users: int = 300, items: int = 120, rows: int = 30_000) -> tuple[Path, Path]:
    """Draws the log and the items of a shop: text for ids, tags in text, dates."""
    rng = np.random.default_rng(0)
    taste, appeal = rng.normal(size=(users, 4)), rng.normal(size=(items, 4))
    quality, feed = rng.normal(scale=0.7, size=items), rng.pareto(2.0, size=items) + 0.3
    user, item = rng.integers(users, size=rows), rng.choice(items, rows, p=feed / feed.sum())
    logit = quality[item] + 0.5 * (taste[user] * appeal[item]).sum(axis=1) - 1.0
    click = rng.random(rows) < 1.0 / (1.0 + np.exp(-logit))
    dates = pd.Timestamp("2025-01-01") + pd.to_timedelta(np.sort(rng.integers(30 * 86_400, size=rows)), unit="s")
    log = pd.DataFrame({"user_id": user, "item_id": item, "click": click.astype(int), "date": dates})
    log = log.assign(user_id="customer-" + log["user_id"].astype(str), item_id="sku-" + log["item_id"].astype(str))
    names = np.array(["tea", "coffee", "cups", "plates"])
    tags = ["|".join(names[row]) for row in appeal > 0.3]
    catalogue = pd.DataFrame({"item_id": [f"sku-{number}" for number in range(items)], "tags": tags})
    log.to_csv(folder / "log.csv", index=False)
    catalogue.to_csv(folder / "items.csv", index=False)
    return folder / "log.csv", folder / "items.csv"


if __name__ == "__main__":
    main(*(map(Path, sys.argv[1:]) if len(sys.argv) > 1 else draw_shop(Path.cwd())))
