"""What a belief earns that notices users who answer the same item always alike; writes steady_users.md.

    python benchmarks/steady_users.py --data DATA --results docs/results

Frozen, repeats allowed: ``belief-quota-features``, which is DSRM-HRL before its training, with several shares of steady
users before any answer, and without any. Shares are chosen in the twin for settings, as it is and with an answer drawn
once for each pair of user and item. All other worlds are played with the shipped share alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from worlds import PARTIAL, TWIN_FOR_SETTINGS, cell, open_worlds, write_page

from dsrm.belief import BeliefScales
from dsrm.own_level import OwnScales
from dsrm.pretraining import PretrainConfig, pretrain
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import Control, SessionQuota
from hrl_policies.study import single_threaded
from hrl_policies.study.statistics import mean_interval
from kuaifair_env import evaluate
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.response.base import History
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)
SHIPPED = OwnScales().steady_share
OTHERS = ("KuaiFair-KuaiRandTwin-v0", "KuaiFair-KuaiRecTwin-v0", "KuaiFair-Toy-v0", "kuairand", "kuairec")
USERS, SEED = 1000, 11


class FixedAnswers(TwinResponse):
    """A twin's users who answer each item as chance had it once, always alike."""

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.known.TwinResponse`."""
        return (_drawn(users[:, None], items) < super().expected(users, items, history)).astype(np.float32)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.known.TwinResponse`."""
        drawn = _drawn(users[:, None], np.arange(n_items)[None])
        return (drawn < super().expected_catalogue(users, n_items, history)).astype(np.float32)


def _drawn(users: IntArray, items: IntArray) -> NDArray[np.float64]:
    """Returns a number in [0, 1) for each pair, the same each time (mixed as by SplitMix64)."""
    with np.errstate(over="ignore"):
        mixed = users.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + items.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def returns(world: World, control: Control) -> NDArray[np.float64]:
    """Plays the same users and random numbers whatever the control; returns each session's R_cum."""
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"))
    return np.asarray(evaluate(control, env, n_users=USERS, seed=SEED).sessions.return_, np.float64)


def rows_of(title: str, train: World, test: World, shares: tuple[float, ...]) -> Iterator[str]:
    """Yields the rows of a world."""
    start = pretrain(train, PretrainConfig(mode="candidates"))
    usual = replace(start.scales, own=replace(start.scales.own, steady=0.0))
    without = returns(test, BeliefQuota(start.scorer, scales=usual))
    session = returns(test, SessionQuota(start.scorer))
    yield f"| {title} | none | {without.mean():.2f} | | {cell(mean_interval(without - session), sign=True)} |"
    for share in shares:
        scales = BeliefScales(replace(start.scales.own, steady_share=share), start.scales.shared)
        found = returns(test, BeliefQuota(start.scorer, scales=scales))
        shipped = " (shipped)" if share == SHIPPED else ""
        gain, ahead = (cell(mean_interval(found - other), sign=True) for other in (without, session))
        yield f"| {title} | {share}{shipped} | {found.mean():.2f} | {gain} | {ahead} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds the two partial data sets; without, twins alone")
    parser.add_argument("--results", type=Path, help="folder for the page; without, it is printed")
    arguments = parser.parse_args()
    single_threaded()
    pair = open_worlds(TWIN_FOR_SETTINGS)
    truth = pair.test.response
    assert isinstance(truth, TwinResponse)
    fixed = replace(pair.test, response=FixedAnswers(truth.truth, truth.conformity, truth.provenance))
    rows = [*rows_of(TWIN_FOR_SETTINGS, pair.train, pair.test, SHARES)]
    rows += rows_of(f"{TWIN_FOR_SETTINGS}, answers drawn once", pair.train, fixed, SHARES)
    for name in OTHERS:
        if name not in PARTIAL or arguments.data:
            pair = open_worlds(name, arguments.data)
            rows += rows_of(PARTIAL.get(name, name), pair.train, pair.test, (SHIPPED,))
    text = "\n".join(
        [
            "### Users who answer the same item always alike: frozen, repeats allowed, Max Len 30",
            "",
            "| world | share of steady users before any answer | R_cum | more than without | more than SessionQuota |",
            "|---|---|---:|---:|---:|",
            *rows,
            "",
            "The rule is `belief-quota-features`, DSRM-HRL before its training; SessionQuota has its click scorer. "
            f"{USERS:,} users, or all of the test world if there are fewer, the same random numbers for all rows of a "
            "world; differences are paired, with 95 % intervals over users. The share was chosen in the first two "
            "worlds, in which no result is reported, as a large one that costs nothing there. The twins, the toy and "
            "partial KuaiRand-Pure answer by chance each time; in partial KuaiRec answers are the small matrix's.",
            "",
            f"Made by: `python benchmarks/steady_users.py --data DATA --results RESULTS`, evaluation seed {SEED}.",
        ]
    )
    write_page(arguments.results, "steady_users.md", text)


if __name__ == "__main__":
    main()
