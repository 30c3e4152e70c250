"""Your own logs as a world: from DataFrames to a trained and evaluated agent.

Run: python examples/own_logs.py [--train train.csv --test test.csv] [--steps 100000]

Each CSV has one row per exposure: user_id, item_id, click (0 or 1) and, where known, time. Without files the example
draws a small log, in which popular items are shown more often than they deserve.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hrl_policies.study import RunRecord, plan_run, result_tables, single_threaded, train
from hrl_policies.worlds import WorldPair
from kuaifair_env import InteractionData, build_world
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.response import fit_world_responses

EMBEDDING_DIM = 16
METHODS = ("a2c", "random", "greedy-ctr", "quota-greedy", "oracle")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", help="CSV of the log that agents and the training world learn from")
    parser.add_argument("--test", help="CSV of the log that the test world is fitted on")
    parser.add_argument("--steps", type=int, default=100_000, help="training steps")
    given = parser.parse_args(arguments)
    if (given.train is None) != (given.test is None):
        parser.error("give both --train and --test, or neither")

    single_threaded()
    train_log, test_log = drawn_logs() if given.train is None else (pd.read_csv(given.train), pd.read_csv(given.test))
    data = InteractionData.from_frames(train_log, test_log, name="own logs")

    # Two models of users, fitted on logs that share no row; agents never see either.
    responses = fit_world_responses(data)
    embeddings = item_embeddings(data.train, len(data.users), data.items, EMBEDDING_DIM)
    worlds = WorldPair(
        "own logs",
        build_world(data, "train", responses.train, embeddings=embeddings),
        build_world(data, "test", responses.test, embeddings=embeddings),
    )

    records = []
    for name in METHODS:
        steps = given.steps if name == "a2c" else None
        result = train(plan_run(name, worlds.name, total_steps=steps), worlds)
        assert result.evaluation is not None
        records.append(RunRecord.of_evaluation(result.config, result.evaluation))
    for table in result_tables(records, "python examples/own_logs.py"):
        print(table.markdown())


def drawn_logs(users: int = 300, items: int = 200, rows: int = 12_000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draws a training log shown by a popularity-biased feed and a test log shown at random."""
    rng = np.random.default_rng(0)
    taste, appeal = rng.normal(size=(users, 4)), rng.normal(size=(items, 4))
    quality = rng.normal(scale=0.7, size=items)
    feed = rng.pareto(1.0, size=items) + 0.05

    def log(shares: np.ndarray) -> pd.DataFrame:
        user, item = rng.integers(users, size=rows), rng.choice(items, rows, p=shares / shares.sum())
        logit = quality[item] + 0.5 * (taste[user] * appeal[item]).sum(axis=1) - 1.0
        click = rng.random(rows) < 1.0 / (1.0 + np.exp(-logit))
        return pd.DataFrame({"user_id": user, "item_id": item, "click": click.astype(int), "time": np.arange(rows)})

    return log(feed), log(np.ones(items))


if __name__ == "__main__":
    main()
