"""What beliefs are worth on real random exposures, with no response model in between; writes real_rows_kuairand.md.

    python benchmarks/real_rows.py --data DATA --results docs/results

First: how well the first random rows of held-out users predict their later ones. Then services in the world of real
answers, where each user can be shown only what the platform showed this user at random.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from numpy.typing import NDArray
from replay import WEIGHT, K, PriorAndMean, best_possible, smoothed_log_odds
from torch import Tensor
from worlds import PARTIAL, cell, open_worlds, write_page

from dsrm.belief import BeliefItems
from dsrm.click_scorer import ClickScorer
from dsrm.own_level import OwnLevel, OwnScales
from dsrm.shared_level import SharedLevel, SharedScales
from hrl_policies.belief_controls import BeliefQuota, ItemQuota
from hrl_policies.controls import RandomSlates
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import mean_interval
from hrl_policies.worlds import WorldPair
from kuaifair_env import EpisodeRecords, SessionConfig, World, evaluate, serve
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.intervals import Interval
from kuaifair_env.observations import observed_states
from kuaifair_env.randomisation import offset_shape
from kuaifair_env.response.calibration import WithinUserAUC, within_user_auc
from kuaifair_env.sb3 import KuaiFairVecEnv

FIRST_ROWS, MIN_ROWS = 10, 16
COUNTS = (3, 5, 10)
OWN_TASTE = (0.25, 0.5, 1.0)
ROUNDS = 40
N_ENVS, MAX_LEN = 64, 4
LEVEL = 0.95
PRIOR = "prior + 5 x clicked mean, nothing learned"
CLICKED_MEAN = "prior + 5 x mean of clicked embeddings"

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class RandomRows:
    """Random rows of held-out users that have at least 16 of them, of candidates.

    Attributes:
        users: ``int64 (U,)``, rows of the users.
        items: ``int64 (U, 10)``, the first ten items of each, in time.
        clicks: ``bool (U, 10)``, which of these were clicked.
        later: All rows after these, whose ``users`` count from 0 to U - 1.
        others: Random rows of the users who are not held out.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: NDArray[np.bool_]
    later: InteractionLog
    others: InteractionLog

    @classmethod
    def of_world(cls, world: World) -> RandomRows:
        """Divides the random rows of a test world."""
        log = world.data.test.take(world.data.test.items < world.n_items)
        own = log.take(np.isin(log.users, world.users))
        counts = np.bincount(own.users, minlength=len(world.data.users))
        users = np.flatnonzero(counts >= MIN_ROWS)
        own = own.take(np.isin(own.users, users))
        starts = own.offsets(len(world.data.users))[users]
        places = np.arange(len(own)) - np.repeat(starts, counts[users])
        first = own.take(places < FIRST_ROWS)
        later = own.take(places >= FIRST_ROWS)
        return cls(
            users,
            first.items.reshape(-1, FIRST_ROWS).astype(np.int64),
            first.clicks.reshape(-1, FIRST_ROWS),
            replace(later, users=np.searchsorted(users, later.users).astype(np.int32)),
            log.take(~np.isin(log.users, world.users)),
        )

    def auc(self, scores: NDArray[np.floating[Any]]) -> WithinUserAUC:
        """Returns how well scores ``(U, N)``, or ``(N,)``, rank each user's later rows."""
        users, items = self.later.users, self.later.items
        return within_user_auc(users, self.later.clicks, scores[items] if scores.ndim == 1 else scores[users, items])


def shared_correction(base: Tensor, rows: RandomRows, count: int, items: BeliefItems) -> SharedLevel:
    """Returns what the first rows of all users say about the items: Newton steps of the library's shared level.

    Scales begin wide and are re-estimated by empirical Bayes from these rows alone.

    Args:
        base: ``(U, N)``, log-odds of a click without the correction.
        rows: The random rows.
        count: How many rows of each user are read.
        items: Columns of the shared vector.
    """
    columns = {"vector": torch.from_numpy(items.embeddings), "features": torch.from_numpy(items.features)}
    deviations = torch.from_numpy(offset_shape(items.exposures).astype(np.float32))
    level = SharedLevel(columns, deviations, SharedScales())
    shown = torch.from_numpy(rows.items[:, :count])
    clicks = torch.from_numpy(rows.clicks[:, :count]).float().reshape(-1)
    before, shown = base.gather(1, shown).reshape(-1), shown.reshape(-1)
    for _ in range(ROUNDS):
        means = level.mean[shown]
        probability = torch.sigmoid(before + means)
        weights = (probability * (1.0 - probability)).clamp(min=1e-3)
        level.weights.zero_()
        level.values.zero_()
        level.add(shown, weights, means + (clicks - probability) / weights)
        level.update()
    return level


def personal_correction(base: Tensor, rows: RandomRows, count: int, items: BeliefItems, taste: float) -> Tensor:
    """Returns ``(U, N)``, what the first rows of each user say about this user: modes of the library's own level."""
    embeddings = torch.from_numpy(items.embeddings)
    features = torch.cat([torch.ones(len(embeddings), 1), embeddings], dim=1)
    level = OwnLevel(features, len(rows.users), OwnScales(0.5, taste, 0.7))
    shown, clicks = (torch.from_numpy(array[:, :count]) for array in (rows.items, rows.clicks))
    level.observe(torch.arange(len(rows.users)), shown, clicks, base)
    level.converge(base)
    return level.logits()


def rankings(world: World, rows: RandomRows) -> dict[str, WithinUserAUC]:
    """Returns the AUC of every ranking by its name."""
    prior = smoothed_log_odds(world.data.train, len(world.data.items))[: world.n_items]
    states = observed_states(world, world.initial_history.take(rows.users))
    items = BeliefItems.of_world(world)
    plain = without_features(items)
    base = prior + np.float32(WEIGHT / world.dimension) * states @ world.embeddings[: world.n_items].T
    found = {"item prior of the training log": rows.auc(prior), CLICKED_MEAN: rows.auc(base)}
    start = torch.from_numpy(base)
    for count in COUNTS:
        for taste in OWN_TASTE:
            own = personal_correction(start, rows, count, plain, taste)
            found[f"... then personal, first {count} rows, taste {taste}"] = rows.auc((start + own).numpy())
    for name, columns in (("shared", plain), ("shared with item features", items)):
        for count in COUNTS:
            level = shared_correction(start, rows, count, columns)
            together = start + level.mean
            found[f"... then {name}, first {count} rows of everybody"] = rows.auc(together.numpy())
            own = personal_correction(together, rows, count, plain, 0.5)
            found[f"... and personal on top, first {count}, taste 0.5 ({name})"] = rows.auc((together + own).numpy())
    rates = smoothed_log_odds(rows.others, world.n_items)
    found["item click rates of other users' random rows"] = rows.auc(rates)
    return found


def without_features(items: BeliefItems) -> BeliefItems:
    """Returns items whose shared vector runs over embeddings alone."""
    return replace(items, features=np.zeros((len(items.embeddings), 0), np.float32))


def auc_table(world: World, rows: RandomRows) -> list[str]:
    """Returns the table of within-user AUC."""
    found = rankings(world, rows)
    lines = ["| ranking by | AUC | more than the second row |", "|---|---:|---:|"]
    for name, auc in found.items():
        gain, of_gain = auc.gain_over(found[CLICKED_MEAN])
        more = "" if name == CLICKED_MEAN else cell(Interval(gain, *of_gain, LEVEL), sign=True, decimals=3)
        lines.append(f"| {name} | {cell(Interval(auc.mean, *auc.interval(), LEVEL), decimals=3)} | {more} |")
    return lines


class WithoutFeatures(BeliefQuota):
    """:class:`BeliefQuota` whose shared vector runs over embeddings alone."""

    def _items(self, world: World) -> BeliefItems:
        return without_features(super()._items(world))


SERVING: dict[str, Callable[[ClickScorer], BeliefQuota]] = {
    "ItemQuota": ItemQuota,
    "BeliefQuota without item features": WithoutFeatures,
    "BeliefQuota": BeliefQuota,
}


def services_tables(pair: WorldPair, orders: int) -> list[str]:
    """Returns the tables of the world of real answers."""
    world = pair.test
    session = SessionConfig(max_len=MAX_LEN, slate_size=K, action_mode="slate", leave="never", repeats="forbid")
    env = KuaiFairVecEnv(world, session, N_ENVS, seed=0)
    users = world.user_ids

    def clicks(sessions: EpisodeRecords) -> NDArray[np.float64]:
        return np.asarray(K * sessions.return_[np.argsort(sessions.user_ids)])

    def served(make: Callable[[ClickScorer], BeliefQuota]) -> NDArray[np.float64]:
        results = []
        for order in range(orders):
            results.append(serve(make(pair.scorer), env, users, len(users), order=order, evaluate_others=False))
            print(f"{make.__name__} order {order}: {clicks(results[-1].served.sessions).mean():.3f}", flush=True)
        return np.stack([clicks(result.served.sessions) for result in results])

    nothing_learned = {"random": RandomSlates(), PRIOR: PriorAndMean(world)}
    frozen = {"ItemQuota: its prior": ItemQuota(pair.scorer), "BeliefQuota": BeliefQuota(pair.scorer)}
    ends = {name: clicks(evaluate(control, env).sessions)[None] for name, control in nothing_learned.items()}
    evaluated = {name: clicks(evaluate(control, env).sessions)[None] for name, control in frozen.items()}
    services = {name: served(make) for name, make in SERVING.items()}
    best = f"| best possible, counted in the log | {best_possible(world, MAX_LEN):.2f} | | |"
    return [
        *("### Serving in the world of real answers", "", *_clicks_table(ends | services), best, ""),
        *("### Frozen in the world of real answers", "", *_clicks_table(ends | evaluated), best),
    ]


def _clicks_table(clicks: dict[str, NDArray[np.float64]]) -> list[str]:
    """Returns a table of clicks, ``(orders, users)`` for each agent."""
    lines = ["| agent | clicks of 20 | more than the second row | means of the orders |", "|---|---:|---:|---|"]
    for name, values in clicks.items():
        more = "" if name == PRIOR else cell(mean_interval((values - clicks[PRIOR]).mean(axis=0)), sign=True)
        means = ", ".join(f"{mean:.2f}" for mean in values.mean(axis=1)) if len(values) > 1 else ""
        lines.append(f"| {name} | {cell(mean_interval(values.mean(axis=0)))} | {more} | {means} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the partial data sets")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    parser.add_argument("--orders", type=int, default=5, help="orders of the users")
    arguments = parser.parse_args()
    single_threaded()
    world = open_worlds("kuairand", arguments.data).test
    rows = RandomRows.of_world(world)
    ranked = auc_table(world, rows)
    print("\n".join(ranked), flush=True)
    pair = open_worlds("kuairand-replay-all", arguments.data)
    data = world.data
    page = [
        f"# Beliefs on real random exposures: {PARTIAL['kuairand']}",
        "",
        "### Within-user AUC on each user's random rows from the eleventh on",
        "",
        *ranked,
        "",
        f"{len(rows.users):,} held-out users with at least {MIN_ROWS} random rows of candidates; the first "
        f"{' / '.join(map(str, COUNTS))} rows of everybody are "
        f"{' / '.join(f'{len(rows.users) * count:,}' for count in COUNTS)} rows, and {len(rows.later):,} are ranked. "
        f"Other users' rows: {len(rows.others):,}. *Taste*: prior standard deviation of each component of the user's "
        "vector, the same for everybody and not chosen by these rows; scales of the shared level begin wide and are "
        "re-estimated from the rows that it reads.",
        "",
        *services_tables(pair, arguments.orders),
        "",
        f"{len(pair.test.users):,} users with at least 30 random rows, {N_ENVS} at a time, each once; slates of {K}, "
        f"{MAX_LEN} steps, no repeats, nobody leaves. Of each user the clicks are averaged over orders before pairing.",
        "",
        "## Notes",
        "",
        "- Brackets: 95 % bootstrap intervals over users; differences are paired. They hold the orders fixed, and a "
        "service's users share what was learned, so that they say nothing of another stream of users.",
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the world "
        f"of real answers {pair.test.fingerprint}.",
        f"- Made by: python benchmarks/real_rows.py --data DATA --orders {arguments.orders} --results docs/results.",
    ]
    write_page(arguments.results, "real_rows_kuairand.md", "\n".join(page))


if __name__ == "__main__":
    main()
