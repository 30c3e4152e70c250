"""The paper's own figures: complete, typed once, and within what the length formula allows."""

from __future__ import annotations

import numpy as np
import pytest

from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.published import (
    PUBLISHED_LOGS,
    PUBLISHED_RESULTS,
    PUBLISHED_SECONDS,
    paper_data,
    published_result,
)
from hrl_policies.zoo import METHODS
from kuaifair_env.metrics import implied_violation_rate, length_floor_and_ceiling, normalised_length

WORLDS = (("KuaiRec", 30), ("KuaiRand-Pure", 30), ("KuaiRec", 50), ("KuaiRand-Pure", 50))

# The violation rate that the distribution, solved by hand, gives for each row, in the order of WORLDS.
BY_HAND = {
    "A2C": (0.86, 0.93, 0.89, 0.98),
    "TD3": (0.73, 0.65, 0.39, 0.44),
    "BCQ": (0.19, 0.53, 0.28, 0.77),
    "MOFIR": (0.77, 0.91, 0.8, 0.95),
    "DORL": (0.62, 0.92, 0.93, 0.98),
    "DNaIR": (0.17, 0.65, 0.91, 0.41),
    "SAC4IR": (0.18, 0.94, 0.34, 0.59),
    "Ours": (0.03, 0.08, 0.3, 0.26),
    "FLAT": (0.13, 0.19, 0.46, 0.43),
    "HRL": (0.17, 0.39, 0.35, 0.66),
    "+RCE": (0.63, 0.75, 0.7, 0.77),
    "+TCE": (0.63, 0.74, 0.73, 0.79),
    "+BOD": (0.65, 0.89, 0.56, 0.8),
}


@pytest.mark.parametrize("row", PUBLISHED_RESULTS, ids=lambda row: f"{row.data}-{row.name}-{row.max_len}")
def test_every_published_row_lies_between_floor_and_ceiling(row):
    length, reward = row.means["len"], row.means["r_each"]
    floor, ceiling = length_floor_and_ceiling(row.max_len, reward)
    assert floor <= length <= ceiling
    by_hand = BY_HAND[row.name][WORLDS.index((row.data, row.max_len))]
    assert implied_violation_rate(length, row.max_len, reward) == pytest.approx(by_hand, abs=0.0051)
    assert 0.0 <= normalised_length(length, row.max_len, reward) <= 1.0


def test_all_published_rows_are_here():
    keys = {(row.data, row.name, row.max_len) for row in PUBLISHED_RESULTS}
    assert len(keys) == len(PUBLISHED_RESULTS) == 52
    assert keys == {(data, name, max_len) for name in BY_HAND for data, max_len in WORLDS}
    assert [row.table for row in PUBLISHED_RESULTS] == [2] * 32 + [3] * 20


def test_every_figure_is_what_the_tables_add_up_to():
    """Column sums, added up from the printed page: a mistyped digit does not survive them."""
    sums = {
        name: sum(row.means[name] + row.spreads[name] for row in PUBLISHED_RESULTS)
        for name in ("len", "r_each", "r_cum", "ad")
    }
    assert sums == pytest.approx(
        {"len": 1276.703, "r_each": 42.212, "r_cum": 1020.113, "ad": 23.038}, abs=1e-6
    )


def test_published_cumulative_reward_is_len_times_reward_up_to_twelve_percent():
    ratios = [row.means["r_cum"] / (row.means["len"] * row.means["r_each"]) for row in PUBLISHED_RESULTS]
    assert min(ratios) == pytest.approx(0.88, abs=0.005)
    assert max(ratios) < 1.04
    assert np.mean(ratios) == pytest.approx(0.974, abs=0.002)


def test_methods_of_the_zoo_find_their_published_rows():
    task = Task("mine", 30, "KuaiRec", "real")
    row = published_result(task, Variant("dsrm-hrl", "profile"), 30)
    assert row is not None and row.means == {"len": 26.6, "r_each": 0.917, "r_cum": 23.752, "ad": 0.008}
    assert row.spreads["len"] == 0.816
    assert published_result(task, Variant("dsrm-hrl", "profile"), 40) is None
    assert published_result(task, Variant("dsrm-hrl", "ips"), 30) is None
    assert published_result(task, Variant("quota-greedy"), 30) is None
    named = {Variant(name, spec.purifier).paper_name for name, spec in METHODS.items()} - {None}
    assert {"A2C", "TD3", "Ours", "FLAT", "HRL", "+RCE", "+TCE", "+BOD"} <= named
    assert named <= {row.name for row in PUBLISHED_RESULTS}
    assert set(PUBLISHED_SECONDS) <= {row.name for row in PUBLISHED_RESULTS}


def test_worlds_are_matched_to_the_papers_by_name():
    assert paper_data("KuaiFair-KuaiRandTwin-v0", "anything") == "KuaiRand-Pure"
    assert paper_data("mine", "KuaiRec") == "KuaiRec"
    assert paper_data("KuaiFair-Toy-v0", "Toy") is None
    assert {log.data for log in PUBLISHED_LOGS} == {row.data for row in PUBLISHED_RESULTS}
