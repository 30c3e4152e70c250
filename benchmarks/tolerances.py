"""Which popular shares users tolerate, and what knowing them is worth; writes docs/results/tolerances.md.

    python benchmarks/tolerances.py --data DATA --results docs/results

Beside the definition of ``leave="personal"``, the popular share of a user's clicks under unbiased exposure, stands
another: the share with both groups shown equally often, click rate on popular items / (that rate + that on others).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worlds import open_worlds, write_page

from dsrm.click_scorer import ClickScorer
from hrl_policies.controls import GreedyCTR, MeanToleranceQuota, QuotaGreedy, ToleranceQuota, best_slates
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import mean_interval
from hrl_policies.study.tables import Cell, Measured, ResultTable
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.tolerance import LIMITS
from kuaifair_env.world import World

WORLDS = ("KuaiFair-Toy-v0", "KuaiFair-KuaiRandTwin-v0", "KuaiFair-KuaiRecTwin-v0", "kuairand", "kuairec")
USERS, SLATE, BOUND = 300, 10, 0.3
Values = NDArray[np.float64]


class ConstantQuota(GreedyCTR):
    """The same number of popular items for everybody."""

    def __init__(self, scorer: ClickScorer, popular_items: int) -> None:
        super().__init__(scorer)
        self._counts = np.arange(SLATE + 1) == popular_items

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`~hrl_policies.controls.Control`."""
        scores = self._scorer.score(states)
        return best_slates(scores, batch.world.groups.popular, self._counts, batch.simulator.allowed)


def balanced(world: World) -> World:
    """Returns a world whose users tolerate the share that they click with both groups shown equally often.

    The odds of a click being popular are those under exposure in proportion to the catalogue over the odds of exposure.
    """
    popular, shares = float(world.groups.popular.mean()), world.tolerated_shares
    odds = shares / (1 - shares) * (1 - popular) / popular
    changed = replace(world)
    changed.__dict__["tolerated_shares"] = np.clip(odds / (1 + odds), *LIMITS)
    return changed


def earned(policy: GreedyCTR, world: World) -> Values:
    """Returns R_cum of each user, one session each."""
    config = SessionConfig(action_mode="slate", slate_size=SLATE, leave=f"personal:ad_bound={BOUND}")
    sessions = evaluate(policy, KuaiFairVecEnv(world, config, 150, 0), n_users=USERS, seed=1).sessions
    values = np.asarray(sessions.columns()["r_cum"], np.float64)
    return values[np.argsort(sessions.user_ids, kind="stable")]


def row_of(world: World, scorer: ClickScorer) -> Iterator[Cell]:
    """Yields what users tolerate, and what controls that know more and more of it earn."""
    shares = world.tolerated_shares[world.users]
    outside = violates(slate_disparity(np.full(len(shares), 0.5), "personal", shares), BOUND)
    yield f"{shares.mean():.3f}"
    yield f"{shares.std():.3f}"
    yield f"{100 * outside.mean():.0f} %"
    half, mean, each = (earned(control(scorer), world) for control in (QuotaGreedy, MeanToleranceQuota, ToleranceQuota))
    constant = {count: earned(ConstantQuota(scorer, count), world) for count in range(SLATE + 1)}
    best = max(constant, key=lambda count: float(constant[count].mean()))
    yield f"{half.mean():.2f}"
    for less in (half, mean, constant[best]):
        yield Measured.of_interval(mean_interval(each - less), 2, sign=True)
    yield str(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS))
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    rows: list[tuple[Cell, ...]] = []
    fingerprints = []
    for name in arguments.worlds:
        pair = open_worlds(name, arguments.data)
        fingerprints.append(f"{pair.name} {pair.test.fingerprint}")
        for exposure, world in (("as in the catalogue", pair.test), ("equal", balanced(pair.test))):
            rows.append((pair.name, exposure, *row_of(world, pair.scorer)))
            print(*rows[-1], flush=True)
    table = ResultTable(
        title="What users tolerate, and what knowing it is worth",
        header=("test world", "exposure of groups", "mean", "sd", "half is outside", "QuotaGreedy",
                "ToleranceQuota less it", "less MeanToleranceQuota", "less the best constant", "its popular items"),
        rows=tuple(rows),
        notes=(
            f"R_cum of {USERS} held-out users, one session each (seed 1), Max Len 30, slates of {SLATE}, "
            f"leave='personal', bound {BOUND}; differences paired by user with 95 % bootstrap intervals.",
            "as in the catalogue: the definition of leave='personal'. equal: another one, not used.",
            "best constant: the number of popular items, the same for everybody, of the highest R_cum on these users.",
            f"Test worlds with their fingerprints: {'; '.join(fingerprints)}.",
            "Made by: python benchmarks/tolerances.py --data DATA --results RESULTS",
        ),
    )  # fmt: skip
    write_page(arguments.results, "tolerances.md", table.markdown())


if __name__ == "__main__":
    main()
