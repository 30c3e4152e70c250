"""First slates by the random log and by the simulator, on partial KuaiRand-Pure; writes ope_kuairand.md.

    python benchmarks/ope_main_table.py --data DATA --store STORE --results docs/results

Controls and agents of the main table. Agents are untrained, or trained for a few steps with one seed, and the table
says so: estimates and simulator are compared on the same policies, not methods with each other. Runs that the store
holds are not done again.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from worlds import PARTIAL, cell, open_worlds, write_page

from hrl_policies.ope import (
    CrossFittedClicks,
    OffPolicyResult,
    RandomLog,
    SampledSlates,
    SupportWarning,
    WorldClicks,
    estimate_click_rate,
    first_slates,
)
from hrl_policies.study import PurifierIdentity, load_policy, load_run, plan_run, purifier_of, single_threaded, train
from hrl_policies.study.loading import build_policy
from hrl_policies.study.serving import sessions_like_its_own
from hrl_policies.worlds import WorldPair, cached_purifier
from hrl_policies.zoo import controls, method
from kuaifair_env.world import World

N_ENVS = 256
RANDOM_SAMPLES = 20
EVALUATED_AFTER_TRAINING = 100
HEADER = (
    "| first slate of | rows that match | users of these | mean weight | IPS | SNIPS | doubly robust | simulator "
    "| simulator minus doubly robust |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)


@dataclass(frozen=True)
class Row:
    """A policy's line of a table: what the log says, and the simulator.

    Attributes:
        title: Name of the policy.
        result: Estimates, with propensities all the same.
        uneven: The doubly robust estimate where propensities are the items' shares of the whole random log.
        simulated: The simulator's click rate of the same first slates, users weighing the same, times the same factor.
    """

    title: str
    result: OffPolicyResult
    uneven: float
    simulated: float

    def line(self) -> str:
        """Returns the line."""
        found = self.result.estimates
        gap = self.simulated - found["dr"].estimate
        inside = found["dr"].low <= self.simulated <= found["dr"].high
        figures = (cell(found[name], decimals=3) for name in ("ips", "snips", "dr"))
        return (
            f"| {self.title} | {self.result.hits:,} | {self.result.hit_users:,} "
            f"| {self.result.mean_weight.estimate:.2f} | {' | '.join(figures)} "
            f"| {self.simulated:.3f} | {gap:+.3f}{'' if inside else ', outside'} |"
        )


def rate_factor(pair: WorldPair) -> float:
    """Returns the share of the random log's rows whose users have any click; the others are missing."""
    return float(pair.test.data.provenance.settings["random_rate_factor"])


def policies(pair: WorldPair, steps: int, store: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yields title, policy, and sessions of the test world as it observes them."""
    for name in controls():
        config = plan_run(name, pair.name)
        policy = build_policy(config, pair)
        title = method(name).title + (" †" if method(name).privileged else "")
        yield title, policy, sessions_like_its_own(policy, config, pair, None, N_ENVS)
    path = cached_purifier(pair.train, "candidates")
    config = plan_run("dsrm-hrl", pair.name, purifier=PurifierIdentity.of_file(path))
    from dsrm.purifier import load_purifier

    purifier = load_purifier(path)
    policy = build_policy(config, pair, purifier)
    yield "DSRM-HRL, untrained", policy, sessions_like_its_own(policy, config, pair, purifier, N_ENVS)
    for name in ("hrl", "a2c"):
        folder = store / f"{name}-{steps}"
        config = plan_run(name, pair.name, total_steps=steps, n_users=EVALUATED_AFTER_TRAINING)
        if not folder.exists():
            train(config, pair, output=folder)
        run = load_run(folder)
        policy = load_policy(run, pair)
        title = f"{method(name).title}, {steps:,} steps"
        yield title, policy, sessions_like_its_own(policy, config, pair, purifier_of(run), N_ENVS)


def rows(pair: WorldPair, steps: int, store: Path) -> Iterator[Row]:
    """Yields the lines of the table, over the users who are held out."""
    world, factor = pair.test, rate_factor(pair)
    log = RandomLog.of_world(world, rate_factor=factor)
    shown = np.bincount(world.data.test.items, minlength=len(world.data.items))[: world.n_items]
    by_share = replace(log, propensities=shown / shown.sum())
    listed = np.unique(log.users)
    weights = np.bincount(log.users)[listed]
    model, simulator = CrossFittedClicks.fit(world), WorldClicks(world)
    for title, policy, env in policies(pair, steps, store):
        samples = RANDOM_SAMPLES if title == "Random" else 1
        slates: SampledSlates = first_slates(policy, env, listed, samples=samples)
        result = estimate_click_rate(log, slates, model=model)
        uneven = estimate_click_rate(by_share, slates, ("dr",), model=model).estimates["dr"].estimate
        simulated = float(slates.mean(simulator) @ weights / weights.sum())
        row = Row(title, result, uneven, factor * simulated)
        print(row.line(), flush=True)
        yield row


def repeated_pairs(world: World) -> tuple[int, float]:
    """Returns how many random rows repeat a pair of the training log, and how many would if draws were uniform."""
    train, test, n_items = world.data.train, world.data.test, len(world.data.items)
    kept = train.items < world.n_items
    pairs = np.unique(train.users[kept].astype(np.int64) * n_items + train.items[kept])
    rows = test.take(test.items < world.n_items)
    repeated = np.isin(rows.users.astype(np.int64) * n_items + rows.items, pairs).sum()
    counts = np.bincount(rows.users, minlength=len(world.data.users))
    seen = np.bincount(pairs // n_items, minlength=len(counts))
    return int(repeated), float(counts @ seen / world.n_items)


def table(found: list[Row]) -> list[str]:
    """Returns the table and what it sums up to."""
    result = found[0].result
    real = [row for row in found if "†" not in row.title]
    off = [row.title for row in real if not row.result.mean_weight.low <= 1.0 <= row.result.mean_weight.high]
    estimates = np.asarray([row.result.estimates["dr"].estimate for row in real])
    simulated = np.asarray([row.simulated for row in real])
    shifts = [abs(row.uneven - row.result.estimates["dr"].estimate) for row in real]
    inside = sum("outside" not in row.line() for row in real)
    return [
        HEADER,
        *(row.line() for row in found),
        "",
        f"{result.rows:,} random rows of {result.users:,} held-out users, on whom nothing was trained. Of "
        f"{len(real)} policies without † the simulator lies inside the doubly robust interval for {inside}; "
        "correlation of both over them "
        f"{np.corrcoef(estimates, simulated)[0, 1]:.2f}, mean difference {(simulated - estimates).mean():+.3f}. "
        f"Exposures are uneven by {result.unevenness:.2f} beyond chance; with the items' shares of the log as "
        f"propensities the doubly robust estimates move by {max(shifts):.3f} at most. Policies whose mean weight is "
        f"not 1 (99 % interval): {', '.join(off) or 'none'}.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the partial data sets")
    parser.add_argument("--steps", type=int, default=20_000, help="training steps of HRL and A2C")
    parser.add_argument("--store", type=Path, required=True, help="folder of the trained agents")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    warnings.simplefilter("ignore", SupportWarning)
    pair = open_worlds("kuairand", arguments.data)
    world, data = pair.test, pair.test.data
    tables = table(list(rows(pair, arguments.steps, arguments.store)))
    repeated, expected = repeated_pairs(world)
    page = [
        f"# First slates without a simulator: {PARTIAL['kuairand']}",
        "",
        "What is estimated: the mean click rate of the items in the *first slate* (K = 10) that a policy shows each "
        "user at the start of a session, users weighing as often as the random log shows them. The log shows single "
        "items at random: what other items of a slate do to a click, later slates, and leaving are not in it "
        "([how](../how-to/without-a-simulator.md)). Propensities are uniform over the candidates. All rates, the "
        "simulator's too, are "
        f"times {rate_factor(pair)}, since rows of users without any random click are missing.",
        "",
        "Brackets: 95 % intervals over users (Wilson's, for the effective number of trials). *Rows that match* are the "
        "effective sample size but for Random; rejection equals SNIPS but for Random. *Mean weight* is 1 where the log "
        "shows what the policy shows with the propensities assumed. Simulator: its response model on the same slates. "
        "† reads the simulator's response model or tolerances: a bound, not a method.",
        "",
        *tables,
        "## Notes",
        "",
        "- Oracles read the response model, which has read these users' random rows: they show what a user has clicked "
        "in the very rows that then evaluate them, so that every estimate of them is too high.",
        "- SessionQuota raises what a user has clicked in the training log, and the random log hardly shows anybody an "
        f"item again: {repeated:,} of its rows repeat a pair of the training log, where uniform draws would repeat "
        f"{expected:,.0f}. So IPS of SessionQuota is too low, and its doubly robust estimate leans on the model.",
        "- ItemQuota and BeliefQuota, and the quotas by tolerance, begin with the same slates: they differ from the "
        "second on, which no such log can evaluate.",
        "- The simulator's response model was fitted on this random log, these users' rows among it. So agreement says "
        "that the model is calibrated on what policies choose, not that it would be on other users. The doubly robust "
        "estimate's own model is fitted without the user's fold of users.",
        f"- Random shows {RANDOM_SAMPLES} slates drawn for each user. HRL and A2C were trained for {arguments.steps:,} "
        "steps with one seed, DSRM-HRL not at all: the lines compare estimates of the same policy, not methods.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; {world.n_items:,} "
        f"candidates; fingerprint {world.fingerprint}.",
        f"- Made by: python benchmarks/ope_main_table.py --data DATA --steps {arguments.steps} --store STORE --results "
        "docs/results.",
    ]
    write_page(arguments.results, "ope_kuairand.md", "\n".join(page))


if __name__ == "__main__":
    main()
