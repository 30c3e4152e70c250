"""What a manager can win over a constant quota where users tolerate different shares.

    python benchmarks/manager_room.py kuairand --data DATA --results docs/results
    python benchmarks/manager_room.py KuaiFair-KuaiRandTwin-v0 --results docs/results

Writes a section of manager_room.md. All rows but QuotaGreedy and the Oracle rank by the same belief, that of DSRM-HRL's
start, frozen (nothing is kept from session to session). They differ in how many popular items a slate has. The constant
that others are compared with is the best one of the training world.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from numpy.typing import NDArray
from worlds import argument_parser, cell, open_worlds, start_of_dsrm_hrl, write_section

from dsrm.candidates import CandidatePurifier
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import Oracle, QuotaGreedy
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import mean_interval
from hrl_policies.worlds import WorldPair, purified_sessions
from kuaifair_env import EvaluationResult, SessionConfig, evaluate
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.fair_counts import tolerated_counts_now, users_tolerance
from kuaifair_env.world import World

COUNTS = range(2, 8)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
N_ENVS, SEED = 128, 2603
ORACLE, UNTRAINED = "Oracle †", "DSRM-HRL, untrained"
GREEDY = "QuotaGreedy, items by features"
MYOPIC = "DSRM-HRL, untrained, without looking ahead"


class QuotaOf(BeliefQuota):
    """The best slate by the belief with numbers of popular items that a function allows."""

    privileged: ClassVar[bool] = True

    def __init__(self, start: CandidatePurifier, allows: Callable[[SessionBatch], BoolArray]) -> None:
        super().__init__(start.scorer, scales=start.scales)
        self._allows = allows

    def counts(self, batch: SessionBatch) -> BoolArray:
        """See :class:`~hrl_policies.belief_controls.BeliefQuota`."""
        return self._allows(batch)


def constant(count: int) -> Callable[[SessionBatch], BoolArray]:
    """Returns what allows one number of popular items."""
    return lambda batch: np.arange(batch.config.items_per_slate + 1) == count


def mean_tolerated(batch: SessionBatch) -> BoolArray:
    """Allows what a user would tolerate who tolerates what all do on average."""
    mean = batch.world.tolerated_shares[batch.world.users].mean()
    return tolerated_counts_now(batch, np.full(batch.batch_size, mean))


def tolerated(batch: SessionBatch) -> BoolArray:
    """Allows what the current user tolerates."""
    return tolerated_counts_now(batch, users_tolerance(batch))


@dataclass(frozen=True)
class Row:
    """What an agent does, by user.

    Attributes:
        name: Of the agent.
        rewards: ``float64 (U,)``, R_cum of each user.
        violation_rate: Share of slates that were punished.
        length: Len.
    """

    name: str
    rewards: NDArray[np.float64]
    violation_rate: float
    length: float

    @classmethod
    def of(cls, name: str, result: EvaluationResult) -> Row:
        """Returns the row of an evaluation."""
        sessions = result.sessions
        rewards = np.asarray(sessions.return_, np.float64)[np.argsort(sessions.user_ids, kind="stable")]
        print(f"{name}: {rewards.mean():.3f}", flush=True)
        return cls(name, rewards, result.fairness.violation_rate, result.engagement.length)


def evaluated(name: str, agent: Any, world: World, config: SessionConfig, n_users: int, purifier: Any = None) -> Row:
    """Evaluates a control, or a trained agent over a purifier."""
    env = purified_sessions(world, config, min(N_ENVS, n_users), 0, purifier)
    return Row.of(name, evaluate(agent, env, n_users=n_users, seed=SEED))


def untrained(start: CandidatePurifier, pair: WorldPair, config: SessionConfig) -> HierarchicalPPO:
    """Returns DSRM-HRL before its training."""
    env = purified_sessions(pair.train, config, 2, 0, start)
    return HierarchicalPPO("RankingPolicy", env, seed=11, device="cpu")


class Myopic:
    """An agent that believes each slate to be its session's last, so that learning what a user tolerates is no use."""

    def __init__(self, agent: HierarchicalPPO) -> None:
        self._agent = agent

    def predict(self, observation: dict[str, Any], *arguments: Any, **settings: Any) -> Any:
        """See Stable-Baselines3's ``BaseAlgorithm.predict``."""
        last = np.zeros_like(observation["slates_left"])
        return self._agent.predict({**observation, "slates_left": last}, *arguments, **settings)


def of_constants(start: CandidatePurifier, world: World, config: SessionConfig, n_users: int) -> list[Row]:
    """Returns the rows of all constants."""
    return [
        evaluated(f"{count} popular items", QuotaOf(start, constant(count)), world, config, n_users) for count in COUNTS
    ]


def training_rows(start: CandidatePurifier, pair: WorldPair, config: SessionConfig, n_users: int) -> list[Row]:
    """Returns rows of the training world, where all is chosen that is chosen: the best constant comes first."""
    best = max(of_constants(start, pair.train, config, n_users), key=lambda row: float(row.rewards.mean()))
    agent = untrained(start, pair, config)
    return [
        best,
        evaluated("known tolerance †", QuotaOf(start, tolerated), pair.train, config, n_users),
        evaluated(MYOPIC, Myopic(agent), pair.train, config, n_users, start),
        evaluated(UNTRAINED, agent, pair.train, config, n_users, start),
        evaluated(ORACLE, Oracle(), pair.train, config, n_users),
    ]


def personal_rows(
    start: CandidatePurifier, pair: WorldPair, config: SessionConfig, n_users: int, chosen: str
) -> list[Row]:
    """Returns all rows of leave rule ``personal`` in the test world; the constant of the training world comes first."""
    agent = untrained(start, pair, config)
    constants = of_constants(start, pair.test, config, n_users)
    best = max(constants, key=lambda row: float(row.rewards.mean()))
    reference = next(row for row in constants if row.name == chosen)
    rows = [
        Row(f"{reference.name}: best constant of the training world", *_figures(reference)),
        *(Row(f"{row.name}{', best in the test world' if row is best else ''}", *_figures(row)) for row in constants),
        evaluated("mean tolerance †", QuotaOf(start, mean_tolerated), pair.test, config, n_users),
        evaluated("known tolerance †", QuotaOf(start, tolerated), pair.test, config, n_users),
        evaluated(MYOPIC, Myopic(agent), pair.test, config, n_users, start),
        evaluated(UNTRAINED, agent, pair.test, config, n_users, start),
        evaluated(GREEDY, QuotaGreedy(start.scorer), pair.test, config, n_users),
        evaluated(ORACLE, Oracle(), pair.test, config, n_users),
    ]
    return rows


def _figures(row: Row) -> tuple[NDArray[np.float64], float, float]:
    return row.rewards, row.violation_rate, row.length


def table(rows: list[Row]) -> Iterator[str]:
    """Yields the lines of a table; differences are to its first row."""
    first = rows[0]
    yield "| agent | R_cum | more than the first row | share of the way to the Oracle | violation rate | Len |"
    yield "|---|---:|---:|---:|---:|---:|"
    room = rows[-1].rewards.mean() - first.rewards.mean()
    for row in rows:
        difference = row.rewards - first.rewards
        more = "" if row is first else cell(mean_interval(difference), sign=True)
        share = "" if row is first else f"{difference.mean() / room:+.1%}"
        rest = f"{row.violation_rate:.3f} | {row.length:.2f}"
        yield f"| {row.name} | {row.rewards.mean():.2f} | {more} | {share} | {rest} |"


def distribution(pair: WorldPair) -> Iterator[str]:
    """Yields the lines of the table of tolerated shares in both worlds."""
    yield f"| world | mean | deviation | {' | '.join(f'{100 * quantile:g} %' for quantile in QUANTILES)} |"
    yield "|---|---:|---:|" + "---:|" * len(QUANTILES)
    for world in (pair.train, pair.test):
        shares = world.tolerated_shares[world.users]
        cells = " | ".join(f"{value:.2f}" for value in np.quantile(shares, QUANTILES))
        yield f"| {world.split} | {shares.mean():.3f} | {shares.std():.3f} | {cells} |"


def summary(repeats: str, rows: list[Row]) -> str:
    """Returns in a sentence what is to be won over the constant quota, and what is won."""
    by_name = {row.name: row for row in rows}
    known, own, oracle = (by_name[name] for name in ("known tolerance †", UNTRAINED, ORACLE))
    gains = [cell(mean_interval(row.rewards - rows[0].rewards), sign=True) for row in (known, own)]
    room = oracle.rewards.mean() - rows[0].rewards.mean()
    known_part, own_part = ((row.rewards - rows[0].rewards).mean() / room for row in (known, own))
    return (
        f"Repeats {repeats}: knowing every user's tolerance is worth {gains[0]} over the constant of the training "
        f"world, {known_part:.1%} of the gap to the Oracle ({room:.2f}); DSRM-HRL, which infers it, has {gains[1]}, "
        f"{own_part:.1%}, before training."
    )


def page(pair: WorldPair, start: CandidatePurifier, arguments: Namespace) -> str:
    """Returns the page of a world."""
    sections, sentences = [], []
    for repeats in ("allow", "forbid"):
        config = SessionConfig(action_mode="slate", leave="personal", repeats=cast(Any, repeats))
        in_training = training_rows(start, pair, config, arguments.choice_users)
        rows = personal_rows(start, pair, config, arguments.users, in_training[0].name)
        sentences.append(summary(repeats, rows))
        sections += [f"## Leave rule `personal`, repeats {repeats}", "", *table(rows), ""]
        sections += ["In the training world:", "", *table(in_training), ""]
    data = pair.test.data
    lines = [
        f"# {pair.name}",
        "",
        *(f"{sentence}\n" for sentence in sentences),
        "## What users tolerate",
        "",
        *distribution(pair),
        "",
        *sections,
        "## Notes",
        "",
        f"- {arguments.users} users of the test world, one session each, seed {SEED}, Max Len 30, K 10; 95 % bootstrap "
        "intervals over users, differences paired. † knows what no agent is told.",
        f"- The constant is chosen among {COUNTS[0]} to {COUNTS[-1]} on {arguments.choice_users} users of the training "
        "world.",
        "- DSRM-HRL's prior of tolerances is fitted to training users. A slate tells it whether its number of popular "
        "items is tolerated; looking ahead, it adds what later slates gain by that.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/manager_room.py {arguments.world} --users {arguments.users} --choice-users "
        f"{arguments.choice_users} --data DATA --results docs/results.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--users", type=int, default=1_000, help="users of the test world")
    parser.add_argument("--choice-users", type=int, default=400, help="users of the training world")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(arguments.world, arguments.data)
    start = start_of_dsrm_hrl(pair)
    write_section(arguments.results, "manager_room.md", page(pair, start, arguments))


if __name__ == "__main__":
    main()
