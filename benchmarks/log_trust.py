"""What a belief earns that weighs what the log says of items, while it serves; writes log_trust.md.

    python benchmarks/log_trust.py --data DATA --store STORE --results docs/results

``belief-quota-features``, which is DSRM-HRL before its training, serves the same users in the same orders with several
scales of :attr:`dsrm.shared_level.SharedScales.log`: 0 takes the log at its word. The scale is chosen in the twin for
settings; all other worlds are played with 0 and with the shipped one, and so is the twin for settings with a log that
makes too little of the differences between items. What the store holds is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from serving import N_ENVS, users_of
from worlds import PARTIAL, TWIN_FOR_SETTINGS, cell, open_worlds, short_name, write_page

from dsrm.candidates import CandidatePurifier
from dsrm.click_scorer import ClickScorer
from dsrm.purifier import load_purifier
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import holm, student_interval
from hrl_policies.worlds import WorldPair, cached_purifier, purified_sessions
from kuaifair_env import SessionConfig, serve
from kuaifair_env.files import write_text_atomically
from kuaifair_env.intervals import crossed_mean, interval_of
from kuaifair_env.simulator import Repeats

SCALES = (0.0, 0.1, 0.25, 0.5)
AT_ITS_WORD = 0.0
FLATTENED, UNDERSTATED = 0.3, f"{TWIN_FOR_SETTINGS}, log flattened"
OTHERS = ("KuaiFair-KuaiRandTwin-v0", "kuairand", "kuairec")
REPEATS: tuple[Repeats, ...] = ("allow", "forbid")
PARTS = ("least shown third", "middle third", "most shown third", "all")
ORDERS, ORDERS_OF_SETTINGS = 10, 5
RATES_OF, EDGE = 1_000, 1e-3

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Services:
    """R_cum of one scale in one world: ``returns (orders, users)``."""

    world: str
    repeats: Repeats
    scale: float
    returns: Values

    @property
    def of_orders(self) -> Values:
        """Mean of each order."""
        return np.asarray(self.returns.mean(axis=1))


def title(world: str) -> str:
    """Returns how the page calls a world."""
    return PARTIAL.get(world, world.removeprefix("KuaiFair-").removesuffix("-v0"))


def slopes(pair: WorldPair, purifier: CandidatePurifier) -> list[str]:
    """Returns by how many log-odds users differ about items between which the prior makes a difference of one."""
    scores = purifier.scorer.item_scores.astype(np.float64)
    users = np.random.default_rng(0).permutation(pair.test.users)[:RATES_OF]
    rates = np.zeros(len(scores))
    for part in np.array_split(users, 20):
        rates += pair.test.response.expected_catalogue(part, len(scores)).sum(axis=0)
    rates = np.clip(rates / len(users), EDGE, 1.0 - EDGE)
    appeals = np.log(rates / (1.0 - rates))
    order = np.argsort(pair.train.exposures, kind="stable")
    return [f"{np.polyfit(scores[items], appeals[items], 1)[0]:.2f}" for items in (*np.array_split(order, 3), order)]


def flattened(scorer: ClickScorer) -> ClickScorer:
    """Returns a scorer whose differences between items are smaller."""
    mean = scorer.item_scores.mean()
    return replace(scorer, item_scores=mean + np.float32(FLATTENED) * (scorer.item_scores - mean))


def services(
    pair: WorldPair, purifier: CandidatePurifier, world: str, repeats: Repeats, scale: float, store: Path
) -> Services:
    """Has the rule serve with one scale, in every order of the users."""
    scales = replace(purifier.scales, shared=replace(purifier.scales.shared, log=scale))
    scorer = flattened(purifier.scorer) if world == UNDERSTATED else purifier.scorer
    env = purified_sessions(pair.test, SessionConfig(action_mode="slate", repeats=repeats), N_ENVS, 0, None)
    users, found = users_of(pair), []
    for order in range(ORDERS_OF_SETTINGS if world == TWIN_FOR_SETTINGS else ORDERS):
        result = serve(
            BeliefQuota(scorer, seed=order, scales=scales),
            env,
            users,
            len(users),
            order=order,
            n_envs=N_ENVS,
            evaluate_others=False,
            folder=store / short_name(world) / repeats / f"{scale}" / f"order-{order}",
        ).served.sessions
        found.append(result.return_[np.argsort(result.user_ids)].astype(np.float64))
    served = Services(world, repeats, scale, np.stack(found))
    print(f"{title(world)}, repeats {repeats}, scale {scale}: {served.of_orders.mean():.3f}", flush=True)
    return served


def of_settings(found: Sequence[Services]) -> Iterable[str]:
    """Yields the table of the world in which the scale is chosen."""
    yield "| repeats | " + " | ".join(f"scale {one:g}" for one in SCALES) + " |"
    yield "|---|" + "---:|" * len(SCALES)
    for repeats in REPEATS:
        cells = [cell(student_interval(one.of_orders)) for one in found if one.repeats == repeats]
        yield f"| {repeats} | {' | '.join(cells)} |"


def of_others(found: Sequence[Services]) -> Iterable[str]:
    """Yields the table of all other worlds."""
    pairs = [*zip(found[::2], found[1::2], strict=True)]
    estimates = [crossed_mean(weighed.returns - plain.returns) for plain, weighed in pairs]
    adjusted = holm(np.asarray([one.p_value() for one in estimates]))
    yield "| world | repeats | orders | log at its word | log weighed | difference | p, Holm |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for (plain, weighed), estimate, p_value in zip(pairs, estimates, adjusted, strict=True):
        cells = [cell(student_interval(one.of_orders)) for one in (plain, weighed)]
        yield (
            f"| {title(plain.world)} | {plain.repeats} | {len(plain.returns)} | {' | '.join(cells)} "
            f"| {cell(interval_of(estimate), sign=True)} | {p_value:.4f} |"
        )


def records(found: Iterable[Services]) -> str:
    """Returns R_cum of every service as CSV."""
    lines = ["world,repeats,scale,order,r_cum"]
    for one in found:
        lines += [
            f'"{title(one.world)}",{one.repeats},{one.scale:g},{order},{mean:.4f}'
            for order, mean in enumerate(one.of_orders)
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets; without, twins alone")
    parser.add_argument("--store", type=Path, required=True, help="folder for services")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    said, found = [], []
    for world in (TWIN_FOR_SETTINGS, UNDERSTATED, *OTHERS):
        if world in PARTIAL and arguments.data is None:
            continue
        pair = open_worlds(TWIN_FOR_SETTINGS if world == UNDERSTATED else world, arguments.data)
        purifier = load_purifier(cached_purifier(pair.train, "candidates"))
        assert isinstance(purifier, CandidatePurifier)
        if world != UNDERSTATED:
            said.append(f"| {title(world)} | {' | '.join(slopes(pair, purifier))} |")
        scales = SCALES if world == TWIN_FOR_SETTINGS else (AT_ITS_WORD, purifier.scales.shared.log)
        for repeats in REPEATS:
            found += [services(pair, purifier, world, repeats, scale, arguments.store) for scale in scales]
    settings, others = (
        [one for one in found if (one.world == TWIN_FOR_SETTINGS) == chosen] for chosen in (True, False)
    )
    lines = [
        "# How far the log is to be trusted",
        "",
        "## By how much users differ where the log makes a difference of one",
        "",
        f"| world | {' | '.join(PARTS)} |",
        "|---|" + "---:|" * len(PARTS),
        *said,
        "",
        "Slopes of the log-odds of an item's mean click rate in the test world on its part of the prior's log-odds "
        "(least squares over items, by their exposures in the training log). 1: the log is right about differences.",
        "",
        f"## Serving in the {TWIN_FOR_SETTINGS}, where the scale was chosen",
        "",
        *of_settings(settings),
        "",
        "## Serving in other worlds",
        "",
        *of_others(others),
        "",
        "## Notes",
        "",
        "- The rule is `belief-quota-features`, DSRM-HRL before its training; columns differ in "
        f"`SharedScales(log=...)`: {AT_ITS_WORD:g}, or weighed as shipped, {found[-1].scale:g}. R_cum of 1,000 users "
        f"of the test world, or all if there are fewer, once each, {N_ENVS} at a time; Max Len 30, K 10. Nothing "
        "differs frozen, where nothing is learned of all users.",
        f"- {ORDERS_OF_SETTINGS} orders of the users in the first world, {ORDERS} in the others. Intervals of R_cum: "
        "Student's, 95 %, over orders. Differences are paired by order and user, "
        "both in the interval; p is adjusted for all differences of the table (Holm).",
        "- A belief leaves the log's columns out while the log makes too little of the differences between items, as "
        "in partial KuaiRec; that was put in after weighing had cost .19 [.10, .28] there, repeats allowed (this page "
        f"at 996d2c7). *Log flattened*: in the world for settings, differences times {FLATTENED}.",
        f"- *{TWIN_FOR_SETTINGS}*: another draw of the synthetic twin, where settings are chosen and no result is "
        "reported; *KuaiRandTwin*: the draw that results are reported in.",
        "- Made by: python benchmarks/log_trust.py --data DATA --store STORE --results docs/results.",
    ]
    if arguments.results is not None:
        write_text_atomically(arguments.results / "log_trust.csv.gz", records(found))
    write_page(arguments.results, "log_trust.md", "\n".join(lines))


if __name__ == "__main__":
    main()
