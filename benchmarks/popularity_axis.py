"""A2C where item embeddings hold popularity, beside A2C where they do not; writes docs/results/popularity_axis.md.

    python benchmarks/popularity_axis.py KuaiFair-KuaiRandTwin-v0 --results docs/results
    python benchmarks/popularity_axis.py kuairand --data DATA

Every item's embedding gets one more dimension, its standardised log-popularity in the training log times a weight and
the embedding's length, and is scaled to its old length; with weight 0 the dimension is empty. Nothing else changes:
same users, responses and randomness.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import argument_parser, open_worlds, write_page

from hrl_policies.study import STUDY_SEEDS, plan_run, train
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.tables import ResultTable
from hrl_policies.worlds import WorldPair
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.world import World

WEIGHTS = (0.0, 0.5, 1.0)


def with_axis(world: World, weight: float, popularity: FloatArray) -> World:
    """Returns a world whose embeddings hold popularity, ``float32 (N,)``, as a dimension of their own."""
    lengths = np.linalg.norm(world.embeddings, axis=1, keepdims=True)
    axis = weight * lengths * popularity[: len(world.embeddings), None]
    wide = np.concatenate([world.embeddings, axis], axis=1)
    wide *= lengths / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-9)
    return replace(world, embeddings=wide.astype(np.float32))


def popularity_of(pair: WorldPair) -> FloatArray:
    """Returns the standardised log-popularity of each embedded item in the training log."""
    counts = np.bincount(pair.train.data.train.items, minlength=len(pair.train.embeddings))
    logs = np.log1p(counts[: len(pair.train.embeddings)])
    found: FloatArray = ((logs - logs.mean()) / logs.std()).astype(np.float32)
    return found


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(STUDY_SEEDS))
    parser.add_argument("--weights", nargs="+", type=float, default=list(WEIGHTS))
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    popularity = popularity_of(pair)
    rows = []
    for weight in arguments.weights:
        made = WorldPair(
            pair.name,
            with_axis(pair.train, weight, popularity),
            with_axis(pair.test, weight, popularity),
        )
        for seed in arguments.seeds:
            result = train(plan_run("a2c", pair.name, seed=seed), made)
            assert result.evaluation is not None
            found = result.evaluation.summary()
            shown = [f"{found[name]:.3f}" for name in ("len", "r_each", "r_cum", "ad", "violation_rate")]
            rows.append((f"{weight:g}", str(seed), *shown))
            print(*rows[-1], flush=True)
    table = ResultTable(
        title=f"A2C and popularity in item embeddings, {pair.name}, Max Len 30",
        header=("weight of the popularity axis", "seed", "Len", "R_each", "R_cum", "AD", "violation rate"),
        rows=tuple(rows),
        notes=(
            "1,000 held-out users of the test world; settings of the zoo. Weight 0: an empty dimension.",
            f"Made by: python benchmarks/popularity_axis.py {arguments.world} --results RESULTS",
        ),
    )
    write_page(arguments.results, "popularity_axis.md", table.markdown())


if __name__ == "__main__":
    main()
