"""How often intervals hold the truth, and tests claim what is not there, in simulated studies.

    python benchmarks/statistics_coverage.py --results docs/results

Each row repeats a study of known truth: training seeds, users who like items more or less (the same under every
method), users who favour a method under every seed, and chance. It counts how often the 95 % interval holds the truth,
and how often a test at 0.05 rejects although nothing differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from worlds import write_page

from hrl_policies.study.statistics import holm, linearised_ratio, probability_of_improvement, stratified_interval
from hrl_policies.study.tables import Cell, Measured, ResultTable
from kuaifair_env.intervals import Estimate, crossed_difference, crossed_mean, rate_interval

Values = NDArray[np.float64]
USERS = 200
SEED_PAIRS = ((10, 10), (10, 5), (5, 5))
COMMAND = "python benchmarks/statistics_coverage.py --results docs/results"


@dataclass(frozen=True)
class Spread:
    """Standard deviations in a simulated study.

    Attributes:
        seeds: Of training seeds, of the first method and of the second.
        favoured: Of what one user has more from one method than from the other, under every seed.
        rest: Of seed and user together.
        freedom: Degrees of freedom of the seeds' Student distribution; None is normal.
    """

    seeds: tuple[float, float]
    favoured: float
    rest: float = 1.0
    freedom: int | None = None


SPREADS = {
    "seeds alone": Spread((0.3, 0.3), 0.0),
    "seeds, users favour a method": Spread((0.3, 0.3), 2.0),
    "users favour a method, seeds hardly differ": Spread((0.05, 0.05), 2.0),
    "neither seeds nor users, chance alone": Spread((0.0, 0.0), 0.0),
    "heavy-tailed seeds (t, 4 degrees of freedom)": Spread((0.3, 0.3), 1.0, freedom=4),
    "second method varies four times as much": Spread((0.1, 0.4), 1.0),
    "first method varies four times as much": Spread((0.4, 0.1), 1.0),
}


def method(rng: np.random.Generator, seeds: int, sd: float, spread: Spread, liking: Values) -> Values:
    """Returns results of one method, ``(S, U)``, the mean of which is 0."""
    draws = rng.normal(size=seeds)
    if spread.freedom is not None:
        draws = rng.standard_t(spread.freedom, seeds) * np.sqrt(1.0 - 2.0 / spread.freedom)
    favoured = spread.favoured / np.sqrt(2.0) * rng.normal(size=USERS)
    return np.asarray(sd * draws[:, None] + liking + favoured + spread.rest * rng.normal(size=(seeds, USERS)))


def difference(rng: np.random.Generator, seeds: tuple[int, int], spread: Spread) -> Estimate:
    """Returns the estimated difference of two methods between which there is none."""
    liking = rng.normal(0.0, 2.0, USERS)
    tables = (method(rng, n, sd, spread, liking) for n, sd in zip(seeds, spread.seeds, strict=True))
    return crossed_difference(*tables)


def difference_table(repetitions: int) -> ResultTable:
    """Returns coverage and size for two methods over seeds and users, beside Welch's test over seeds alone."""
    rows: list[tuple[Cell, ...]] = []
    for title, spread in SPREADS.items():
        for seeds in (*SEED_PAIRS, (10, 1)):
            if seeds[1] == 1 and spread.seeds[0] != spread.seeds[1]:
                continue
            control = seeds[1] == 1
            own = Spread((spread.seeds[0], 0.0), spread.favoured, spread.rest, spread.freedom) if control else spread
            rng = np.random.default_rng(0)
            rejected = sum(difference(rng, seeds, own).p_value() <= 0.05 for _ in range(repetitions))
            names = f"{seeds[0]}, control" if control else f"{seeds[0]}, {seeds[1]}"
            rows.append((title, names, *share_and_complement(rejected, repetitions)))
    return ResultTable(
        title="Two methods that do not differ",
        header=("what varies", "seeds", "coverage", "size"),
        rows=tuple(rows),
        notes=(
            f"{USERS} users whom both methods meet; what they like varies with a standard deviation of 2, and falls "
            "out. Seeds: 0.3 unless told otherwise; chance: 1; what a user has more from one method: 0, 1 or 2.",
            f"{repetitions:,} studies a row. A test at 0.05 rejects (size) when the 95 % interval does not hold 0. "
            "Chance alone: no part of the variance may be negative, so that their sum comes out too large.",
        ),
    )


def share_and_complement(count: int, repetitions: int) -> tuple[Cell, Cell]:
    """Returns how often an interval held, and how often it did not."""
    return Measured(1.0 - count / repetitions), Measured(count / repetitions)


def coverage(hold: Callable[[np.random.Generator], bool], repetitions: int) -> Measured:
    """Returns how often an interval holds the truth."""
    rng = np.random.default_rng(0)
    return Measured(sum(hold(rng) for _ in range(repetitions)) / repetitions)


def rate_table(repetitions: int) -> ResultTable:
    """Returns coverage of rates over users, and over seeds and users."""

    def holds(rate: float, clustering: float, seeds: int) -> Callable[[np.random.Generator], bool]:
        def hold(rng: np.random.Generator) -> bool:
            slates = rng.integers(5, 16, USERS)
            alpha, beta = (share * (1.0 - clustering) / clustering for share in (rate, 1.0 - rate))
            # A third of the users have one rate under every seed.
            shared = rng.random(USERS) < 1.0 / 3.0
            own = rng.beta(alpha, beta, USERS)
            rates = np.where(shared, own, rng.beta(alpha, beta, (seeds, USERS)))
            table = np.stack([linearised_ratio(rng.binomial(slates, one), slates) for one in rates])
            interval = rate_interval(table)
            return interval.low <= rate <= interval.high

        return hold

    rows: list[tuple[Cell, ...]] = [
        (f"{rate:g}", f"{clustering:g}", *(coverage(holds(rate, clustering, seeds), repetitions) for seeds in (1, 5)))
        for rate in (0.01, 0.1, 0.5)
        for clustering in (0.1, 0.3, 0.9)
    ]
    return ResultTable(
        title="Rates",
        header=("rate", "clustering", "1 run", "5 seeds"),
        rows=tuple(rows),
        notes=(
            f"{USERS} users with 5 to 15 slates each; rates of users are beta, clustering is the correlation of two "
            "slates of one user. Under 5 seeds a third of the users have one rate under all, the others one for each. "
            f"{repetitions:,} studies a cell.",
        ),
    )


def order_table(repetitions: int) -> ResultTable:
    """Returns coverage of the mean over seeds and orders of users, as of services."""

    def holds(shape: tuple[int, int], sds: tuple[float, float, float]) -> Callable[[np.random.Generator], bool]:
        def hold(rng: np.random.Generator) -> bool:
            of_seeds, of_orders, rest = (
                sd * rng.normal(size=size) for sd, size in zip(sds, ((shape[0], 1), shape[1], shape), strict=True)
            )
            estimate = crossed_mean(of_seeds + of_orders + rest)
            return abs(estimate.value) <= estimate.half_width()

        return hold

    kinds = {
        "seeds and orders": (1.0, 1.0, 1.0),
        "orders": (0.0, 1.0, 1.0),
        "seeds": (1.0, 0.0, 1.0),
        "neither": (0.0, 0.0, 1.0),
    }
    shapes = ((3, 5), (5, 5), (10, 5))
    return ResultTable(
        title="Services: seeds in several orders of the users",
        header=("what varies beside chance", *(f"{seeds} seeds, {orders} orders" for seeds, orders in shapes)),
        rows=tuple(
            (title, *(coverage(holds(shape, sds), repetitions) for shape in shapes)) for title, sds in kinds.items()
        ),
        notes=(f"Coverage; standard deviations of 1. {repetitions:,} studies a cell.",),
    )


def power_table(repetitions: int) -> ResultTable:
    """Returns how often the detectable difference is shown, where it is the truth."""
    rows: list[tuple[Cell, ...]] = []
    for seeds in SEED_PAIRS:
        for title in ("seeds alone", "seeds, users favour a method"):
            spread = SPREADS[title]
            rng = np.random.default_rng(0)
            estimates = [difference(rng, seeds, spread) for _ in range(repetitions)]
            detectable = float(np.median([one.detectable() for one in estimates]))
            shown = [Estimate(one.value + detectable, one.variance, one.freedom).p_value() <= 0.05 for one in estimates]
            rows.append((title, f"{seeds[0]}, {seeds[1]}", Measured(detectable, 2), Measured(float(np.mean(shown)))))
    return ResultTable(
        title="The detectable difference",
        header=("what varies", "seeds", "median", "how often it is shown"),
        rows=tuple(rows),
        notes=(
            f"At 0.05, for a nominal power of 0.8. {repetitions:,} studies a row. Of few seeds the median of an "
            "estimated variance lies below the variance, and the median difference is too small by up to a fifteenth.",
        ),
    )


def other_table(repetitions: int) -> ResultTable:
    """Returns coverage of interquartile means and of P(X > Y), and false claims of a page of ten comparisons."""

    def holds(seeds: int, tasks: int) -> Callable[[np.random.Generator], bool]:
        def hold(rng: np.random.Generator) -> bool:
            interval = stratified_interval(rng.normal(size=(seeds, tasks)), resamples=500)
            return interval.low <= 0.0 <= interval.high

        return hold

    def holds_chance(seeds: tuple[int, int], shift: float) -> Callable[[np.random.Generator], bool]:
        truth = float(ndtr(shift / np.sqrt(2.0)))

        def hold(rng: np.random.Generator) -> bool:
            first, second = (rng.normal(size=(n, 1)) for n in seeds)
            interval = probability_of_improvement(first + shift, second)
            return interval.low <= truth <= interval.high

        return hold

    def one_of_ten(rng: np.random.Generator) -> bool:
        p_values = [difference(rng, (10, 10), SPREADS["seeds, users favour a method"]).p_value() for _ in range(10)]
        return bool((holm(np.asarray(p_values)) <= 0.05).any())

    rows: list[tuple[Cell, ...]] = [
        (f"interquartile mean, {seeds} seeds on {tasks} task(s): coverage", coverage(holds(seeds, tasks), repetitions))
        for seeds in (5, 10)
        for tasks in (1, 4)
    ]
    rows += [
        (f"P(X > Y), {seeds[0]} and {seeds[1]} seeds, {shift:g} sd apart: coverage", coverage(hold, repetitions))
        for seeds in SEED_PAIRS
        for shift in (0.0, 1.0, 2.0)
        for hold in [holds_chance(seeds, shift)]
    ]
    claims = max(repetitions // 5, 1)
    rows.append(("ten comparisons with Holm's correction: any false claim", coverage(one_of_ten, claims)))
    return ResultTable(
        title="Scores, and a page of comparisons",
        header=("what", "share"),
        rows=tuple(rows),
        notes=(f"{repetitions:,} studies a row, {claims:,} pages.",),
    )


def main() -> None:
    """Reads the arguments and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=4_000, help="studies a row")
    parser.add_argument("--results", type=Path, help="folder of the page")
    arguments = parser.parse_args()
    makers = (difference_table, rate_table, order_table, power_table, other_table)
    tables = "\n".join(make(arguments.repetitions).markdown() for make in makers)
    page = f"""# How often intervals hold, and tests claim what is not there

What `kuaifair_env/intervals.py` and `hrl_policies/study/statistics.py` say of simulated studies whose truth is known.
A 95 % interval should hold the truth in .95 of them, a test at .05 reject in .05; of 4,000 studies a share of .95 has a
standard error of .0035. Nothing here is data.

{tables}
Made by: `{COMMAND}`.
"""
    write_page(arguments.results, "statistics.md", page)


if __name__ == "__main__":
    main()
