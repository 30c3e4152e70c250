"""What every control earns among logged answers only; writes replay_kuairand.md.

    python benchmarks/replay.py --data DATA --results docs/results

Everybody with at least 30 candidates, four slates of five and nobody leaves: 20 answers for each user. Then everybody,
and the users that the environment id has, under the usual leave rule. ``PriorAndMean`` is the ranking of the trial that
the figures are checked against.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import PARTIAL, cell, open_worlds, write_page

from hrl_policies.controls import Control
from hrl_policies.study import plan_run
from hrl_policies.study.loading import build_policy
from hrl_policies.study.runner import single_threaded
from hrl_policies.study.statistics import mean_interval
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import controls, method
from kuaifair_env import EvaluationResult, SessionConfig, World, evaluate
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.ranking import top_k
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import EVALUATION_USERS

K = 5
BATCH_SIZE = 256
PRIOR_EXPOSURES, WEIGHT = 20.0, 5.0
HEADER = (
    f"| control | clicks | more than Random | R_cum | Len | R-NDCG@{K} | AD | violation rate |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def smoothed_log_odds(log: InteractionLog, n_items: int) -> FloatArray:
    """Returns ``float32 (N,)``, log-odds of a click on each item, shrunken towards the log's click rate."""
    clicks = log.click_counts(n_items)[:n_items] + PRIOR_EXPOSURES * log.clicks.mean()
    rates = clicks / (log.exposures(n_items)[:n_items] + PRIOR_EXPOSURES)
    return np.asarray(np.log(rates / (1.0 - rates)), np.float32)


class PriorAndMean(Control):
    """Shrunken log-odds of a click on the item in the training log, plus 5 times its product with the state.

    Item embeddings have length 1 there, and the state is the mean of those clicked in the window.

    Args:
        world: Its training log and embeddings are read.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._prior = smoothed_log_odds(world.data.train, world.n_items)
        self._directions = world.embeddings[: world.n_items].T * np.float32(WEIGHT / world.dimension)

    def slates(self, states: FloatArray, batch: SessionBatch) -> NDArray[np.int64]:
        """See :class:`Control`."""
        return top_k(self._prior + states @ self._directions, K, batch.simulator.allowed)


@dataclass(frozen=True)
class Part:
    """A table of the page.

    Attributes:
        worlds: See :func:`worlds.open_worlds`.
        title: What it is about.
        leave: Leave rule.
        max_len: Max Len.
        n_users: Number of users to evaluate on; None takes all.
    """

    worlds: str
    title: str
    leave: str
    max_len: int
    n_users: int | None = None


PARTS = (
    Part("kuairand-replay-all", "Everybody with 30 candidates, 20 answers each", "never", 4),
    Part("kuairand-replay-all", "Everybody with 30 candidates, who may leave", "temper", 30, EVALUATION_USERS),
    Part(
        "kuairand-replay",
        "The users of the environment id: held out, with 5 candidates",
        "temper",
        30,
        EVALUATION_USERS,
    ),
)


def results(pair: WorldPair, part: Part) -> Iterator[tuple[str, EvaluationResult]]:
    """Yields every control of the zoo, and the ranking of the trial before the bounds, with what it earned."""
    session = SessionConfig(max_len=part.max_len, slate_size=K, action_mode="slate", leave=part.leave, repeats="forbid")
    env = KuaiFairVecEnv(pair.test, session, BATCH_SIZE, seed=0)
    policies: dict[str, Any] = {"PriorAndMean": PriorAndMean(pair.test)}
    for name in controls():
        title = method(name).title + (" †" if method(name).privileged else "")
        policies[title] = build_policy(plan_run(name, pair.name, session=session), pair)
    for title in sorted(policies, key=lambda title: title in ("QualityOracle †", "Oracle †")):
        print(title, flush=True)
        yield title, evaluate(policies[title], env, n_users=part.n_users, ranking=True)


def table(pair: WorldPair, part: Part) -> list[str]:
    """Returns a table with its heading and notes."""
    found = dict(results(pair, part))
    clicks = {title: K * result.sessions.return_ for title, result in found.items()}
    lines = [f"### {part.title}; leave={part.leave}, Max Len {part.max_len}", "", HEADER]
    for title in ["Random", *(title for title in found if title != "Random")]:
        result = found[title]
        more = "" if title == "Random" else cell(mean_interval(clicks[title] - clicks["Random"]), sign=True)
        engagement, fairness = result.engagement, result.fairness
        lines.append(
            f"| {title} | {cell(mean_interval(clicks[title]))} | {more} | {engagement.cumulative_reward:.3f} "
            f"| {engagement.length:.2f} | {result.ndcg:.3f} | {fairness.absolute_difference:.3f} "
            f"| {fairness.violation_rate:.3f} |"
        )
    own = pair.test.user_candidates.counts[pair.test.users]  # type: ignore[union-attr]
    lines += [
        "",
        f"{len(own):,} users with {own.min()} to {own.max()} candidates each, {own.mean():.1f} on average, of whom "
        f"{len(clicks['Random']):,} are evaluated; fingerprint {pair.test.fingerprint}.",
    ]
    if part.leave == "never":
        lines[-1] += f" Best possible, counted in the log: {best_possible(pair.test, part.max_len):.3f} clicks."
    return [*lines, ""]


def best_possible(world: World, max_len: int) -> float:
    """Returns the mean number of clicks in the best slates of a session that nobody leaves."""
    lists = world.user_candidates
    assert lists is not None
    clicks = world.response.expected_catalogue(world.users, world.n_items).sum(axis=1)
    return float(np.minimum(clicks, K * np.minimum(lists.counts[world.users] // K, max_len)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    pairs = {name: open_worlds(name, arguments.data) for name in dict.fromkeys(part.worlds for part in PARTS)}
    pair = next(iter(pairs.values()))
    described, data = pair.test.response.describe(), pair.test.data
    page = [
        f"# Logged answers only: {PARTIAL['kuairand']}",
        "",
        "Each user is shown, in slates of five and once at most, the items that the platform showed this user at "
        "random, and answers what was logged. *Clicks* are those of a session; R_cum, in mean clicks per slate, is a "
        "fifth of them. Brackets: 95 % bootstrap intervals over users; differences are paired. † knows answers or "
        "tolerances: a bound, not a method.",
        "",
        *(line for part in PARTS for line in table(pairs[part.worlds], part)),
        "## Notes",
        "",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; {pair.test.n_items:,} "
        f"candidates, items with at least 20 random exposures. {described['rows_of_other_items']:,} of "
        f"{described['logged_rows']:,} random rows are of other items and left out; "
        f"{described['repeated_rows_dropped']} repeat a pair.",
        "- `PriorAndMean`: shrunken log-odds of the training log plus 5 times the mean of clicked embeddings, the "
        "ranking of a trial outside this library.",
        "- The click scorer of the other controls learns from the training log of users who are not held out, some of "
        "whom are among everybody. Nothing but † reads a random row before it is shown.",
        "- QualityOracle ranks by an item's mean over everybody who was shown it, the current user among them.",
        "- Made by: python benchmarks/replay.py --data DATA --results docs/results. One session for each user; nothing "
        "is left to chance but the slates of random controls, and nothing depends on the machine.",
    ]
    write_page(arguments.results, "replay_kuairand.md", "\n".join(page))


if __name__ == "__main__":
    main()
