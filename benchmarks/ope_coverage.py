"""How often intervals of off-policy estimates hold the truth, where it is known; writes a section of ope_checks.md.

    python benchmarks/ope_coverage.py --results docs/results

Users are drawn again and again from a twin's test users, each with as many random rows as in the twin's log. Items are
drawn uniformly, and clicked with the true probabilities.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import open_worlds, write_section

from hrl_policies.controls import Control, QuotaGreedy, RandomSlates
from hrl_policies.ope import (
    ESTIMATORS,
    CrossFittedClicks,
    RandomLog,
    SampledSlates,
    SupportWarning,
    WorldClicks,
    estimate_click_rate,
    first_slates,
)
from hrl_policies.ope.estimators import Estimator
from hrl_policies.study import single_threaded
from hrl_policies.worlds import WorldPair
from kuaifair_env import SessionConfig
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.intervals import rate_interval
from kuaifair_env.sb3 import KuaiFairVecEnv

HEADER = (
    "| world | policy | users | effective rows | estimator | truth | mean estimate | bias | standard deviation "
    "| mean half width | coverage of 95 % |\n|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Population:
    """Users whose click probabilities are known, with a policy's first slates.

    Attributes:
        rows: ``int64 (P,)``, random rows of each user.
        chances: ``float32 (P, N)``, true click probabilities.
        slates: ``int64 (P, S, K)``.
        predicted: ``float32 (P, N)``, a model's click probabilities, for the doubly robust estimate.
    """

    rows: NDArray[np.int64]
    chances: FloatArray
    slates: NDArray[np.int64]
    predicted: FloatArray

    @classmethod
    def of_world(cls, pair: WorldPair, policy: Any) -> Population:
        """Takes the test users of a world that have random rows; the model is fitted on the log that it has."""
        world = pair.test
        log = RandomLog.of_world(world)
        users = np.unique(log.users)
        env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"), 256, seed=0)
        items = np.broadcast_to(np.arange(world.n_items), (len(users), world.n_items))
        model = CrossFittedClicks.fit(world)
        predicted = [model.predict(users[part], items[part]) for part in _parts(len(users))]
        return cls(
            np.bincount(log.users)[users],
            WorldClicks(world).predict(users, items),
            first_slates(policy, env, users).items,
            np.concatenate(predicted),
        )

    @property
    def truth(self) -> float:
        """The click rate of first slates, users weighing as their rows."""
        flat = self.slates.reshape(len(self.rows), -1)
        rates = np.take_along_axis(self.chances, flat, axis=1).mean(axis=1, dtype=np.float64)
        return float(rates @ self.rows / self.rows.sum())

    def drawn(self, n_users: int, rng: np.random.Generator) -> tuple[RandomLog, SampledSlates, TableClicks]:
        """Draws users, their random rows and clicks."""
        users = rng.integers(len(self.rows), size=n_users)
        places = np.repeat(np.arange(n_users), self.rows[users])
        n_items = self.chances.shape[1]
        items = rng.integers(n_items, size=len(places))
        clicks = rng.random(len(places)) < self.chances[users[places], items]
        log = RandomLog(places, items, clicks, np.full(n_items, 1.0 / n_items))
        return log, SampledSlates(np.arange(n_users), self.slates[users]), TableClicks(self.predicted, users)


@dataclass(frozen=True)
class TableClicks:
    """A model of clicks that was evaluated beforehand, for users ``rows (U,)`` of its table."""

    table: FloatArray
    rows: NDArray[np.int64]

    def predict(self, users: IntArray, items: IntArray) -> FloatArray:
        """See :class:`hrl_policies.ope.ClickModel`."""
        return self.table[self.rows[users][:, None], items]


@dataclass(frozen=True)
class Repetitions:
    """Estimates and interval ends of every repetition, ``(repetitions,)`` by estimator, and mean effective rows."""

    estimates: dict[Estimator, NDArray[np.float64]]
    low: dict[Estimator, NDArray[np.float64]]
    high: dict[Estimator, NDArray[np.float64]]
    effective_rows: float

    @classmethod
    def of(cls, population: Population, n_users: int, count: int, seed: int) -> Repetitions:
        """Draws logs and estimates from each."""
        results = []
        for repetition in range(count):
            log, slates, model = population.drawn(n_users, np.random.default_rng([seed, repetition]))
            results.append(estimate_click_rate(log, slates, model=model, seed=repetition))

        def column(end: str) -> dict[Estimator, NDArray[np.float64]]:
            return {
                name: np.asarray([getattr(result.estimates[name], end) for result in results]) for name in ESTIMATORS
            }

        effective = float(np.mean([result.effective_rows for result in results]))
        return cls(column("estimate"), column("low"), column("high"), effective)


def _parts(count: int, size: int = 256) -> Iterator[slice]:
    for low in range(0, count, size):
        yield slice(low, low + size)


def rows_of(world: str, policy: str, population: Population, n_users: int, count: int, seed: int) -> list[str]:
    """Returns a line of the table for each estimator."""
    found, truth = Repetitions.of(population, n_users, count, seed), population.truth
    lines = []
    for name in ESTIMATORS:
        estimates, low, high = found.estimates[name], found.low[name], found.high[name]
        covered = rate_interval(((low <= truth) & (truth <= high)).astype(float)[None])
        lines.append(
            f"| {world} | {policy} | {n_users:,} | {found.effective_rows:.0f} | {name} | {truth:.4f} "
            f"| {estimates.mean():.4f} | {estimates.mean() - truth:+.4f} | {estimates.std(ddof=1):.4f} "
            f"| {(high - low).mean() / 2:.4f} | {covered.estimate:.3f} [{covered.low:.3f}, {covered.high:.3f}] |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    warnings.simplefilter("ignore", SupportWarning)
    lines = []
    toy, twin = open_worlds("KuaiFair-Toy-v0"), open_worlds("KuaiFair-KuaiRandTwin-v0")
    cases: tuple[tuple[str, WorldPair, str, Control, float], ...] = (
        ("toy", toy, "QuotaGreedy", QuotaGreedy(toy.scorer), 1.0),
        ("toy", toy, "QuotaGreedy", QuotaGreedy(toy.scorer), 0.1),
        ("toy", toy, "RandomSlates", RandomSlates(), 1.0),
        ("KuaiRand twin", twin, "QuotaGreedy", QuotaGreedy(twin.scorer), 1.0),
    )
    for name, pair, title, policy, share in cases:
        population = Population.of_world(pair, policy)
        n_users = round(share * len(population.rows))
        lines += rows_of(name, title, population, n_users, arguments.repetitions, arguments.seed)
    page = [
        "# Coverage of off-policy intervals",
        "",
        f"{arguments.repetitions:,} repetitions each. Users are drawn with replacement from the test world's, each "
        "with as many random rows as in the twin's log; items are drawn uniformly, clicks from the true probabilities. "
        "The truth is the click rate of the policy's first slates (K = 10), users weighing as their rows. Beside the "
        "coverage its 95 % interval. The model of the doubly robust estimate is fitted once, on the twin's own log.",
        "",
        HEADER,
        *lines,
        "",
        "A tenth of the users is there to show what too few do: effective rows below 50 are warned of.",
        "",
        f"Made by: python benchmarks/ope_coverage.py --repetitions {arguments.repetitions} --seed {arguments.seed} "
        "--results docs/results.",
    ]
    write_section(arguments.results, "ope_checks.md", "\n".join(page))


if __name__ == "__main__":
    main()
