"""Paired differences and scores from run folders, against sums by hand and enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from stored_studies import LIKE_THE_PAPERS, runs_of

from hrl_policies.study.comparisons import (
    difference_table,
    differences,
    length_scores,
    reward_scores,
    score_table,
)
from hrl_policies.study.labels import Task, Variant
from hrl_policies.study.outputs import study_tables
from hrl_policies.study.results import EvaluatedRun, comparisons
from hrl_policies.study.statistics import holm, stratified_interval
from hrl_policies.study.table import MISSING

TWIN = "KuaiRecTwin (own)"


def test_differences_pair_users_and_seeds(runs, comparison):
    found = differences(comparison, "a2c")
    task = Task(LIKE_THE_PAPERS, 30, "small", "own")
    to_hrl = next(one for one in found if (one.task, one.other.method, one.figure) == (task, "hrl", "r_cum"))

    def earned(run):
        return EvaluatedRun.of_run(run).users.per_session("r_cum")

    gaps = [(earned(a) - earned(b)).mean() for a, b in zip(runs_of(runs, "a2c"), runs_of(runs, "hrl"), strict=True)]
    assert to_hrl.interval.estimate == pytest.approx(np.mean(gaps))
    flips = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=3)]
    assert to_hrl.p_value == pytest.approx(np.mean(np.asarray(flips) >= abs(sum(gaps)) - 1e-12))
    assert to_hrl.seeds == 3
    (control,) = runs_of(runs, "random")
    to_random = next(one for one in found if (one.task, one.other.method, one.figure) == (task, "random", "r_cum"))
    expected = np.mean([(earned(run) - earned(control)).mean() for run in runs_of(runs, "a2c")])
    assert to_random.interval.estimate == pytest.approx(expected)
    assert len(found) == 2 * (2 * 5 + 2 * 3)


def test_controls_are_compared_over_users(comparison):
    one = next(one for one in differences(comparison, "quota-greedy") if one.other.method == "random")
    assert one.seeds == 1 and one.p_value < 0.01 and one.interval.low > 0


def test_all_p_values_of_a_table_are_corrected_together(comparison):
    table = difference_table(comparison, "a2c", "x")
    found = differences(comparison, "a2c")
    header = table.full_header()
    raw = [row[place] for place in _places(header, ": p") for row in table.rows]
    adjusted = [row[place] for place in _places(header, "p, Holm") for row in table.rows]
    assert sorted(one.value for one in raw) == pytest.approx(sorted(one.p_value for one in found))
    assert [one.value for one in adjusted] == pytest.approx(holm(np.asarray([one.value for one in raw])).tolist())
    assert any(f"all {len(found)} comparisons" in note for note in table.notes)
    assert str(table.rows[0][3])[0] in "+-"


def _places(header, ending):
    return [place for place, title in enumerate(header) if title.endswith(ending)]


def test_a_base_that_was_not_run_is_named_with_those_that_were(runs, comparison):
    with pytest.raises(ValueError, match=r"no run of 'flat'.*a2c, hrl, oracle"):
        difference_table(comparison, "flat", "x")
    with pytest.raises(ValueError, match="no finished run is of 'flat'"):
        study_tables(runs, base="flat")
    assert "differences" not in study_tables(runs)


def test_seeds_without_a_match_are_not_compared(runs):
    a2c = [run for run in runs_of(runs, "a2c") if run.config.seed == 11]
    hrl = [run for run in runs_of(runs, "hrl") if run.config.seed == 15]
    (found,) = comparisons([*a2c, *hrl])
    assert differences(found, "a2c") == [] and difference_table(found, "a2c", "x") is None
    (found,) = comparisons([*a2c, *hrl, *runs_of(runs, "random")])
    assert {one.other.method for one in differences(found, "a2c")} == {"random"}
    notes = difference_table(found, "a2c", "x").notes
    assert f"Not compared, as no training seed is common: HRL ({TWIN}, Max Len 30)." in notes


def test_scores_are_nothing_at_the_floor_and_one_at_the_fair_control(comparison):
    lengths, rewards = length_scores(comparison), reward_scores(comparison)
    control = rewards.by_variant[Variant("quota-greedy", "")]
    assert control == pytest.approx(np.ones((1, 4)))
    assert rewards.by_variant[Variant("random", "")] == pytest.approx(np.zeros((1, 4)))
    assert (rewards.by_variant[Variant("oracle", "")] > 1.5).all()
    run = comparison.by_cell[comparison.tasks[0], Variant("a2c", "")][0]
    summary = run.record.summary
    by_hand = (summary["len"] - summary["len_floor"]) / (summary["len_ceiling"] - summary["len_floor"])
    assert lengths.by_variant[Variant("a2c", "")][0, 0] == pytest.approx(by_hand)
    assert lengths.by_variant[Variant("a2c", "")].shape == (3, 4)
    # HRL was not run in both worlds: no score over all tasks.
    assert Variant("hrl", "") not in lengths.by_variant


def test_score_table_has_intervals_for_seeds_and_chances_against_the_base(comparison):
    table = score_table(comparison, "a2c", "x")
    assert [row[0] for row in table.rows] == ["A2C", "Random", "QuotaGreedy", "Oracle †"]
    header = table.full_header()
    place = header.index("normalised R_cum: P(base better)")
    chances = {row[0]: row[place] for row in table.rows}
    assert chances["A2C"] == MISSING and chances["QuotaGreedy"].value == 0.0
    middle = table.rows[0][header.index("normalised Len: IQM")]
    expected = stratified_interval(length_scores(comparison).by_variant[Variant("a2c", "")], resamples=10_000)
    assert (middle.value, middle.low) == pytest.approx((expected.estimate, expected.low))
    assert "normalised Len: P(base better)" not in score_table(comparison, None, "x").full_header()


def test_without_the_controls_there_is_no_reward_score(runs):
    (found,) = comparisons([run for run in runs if run.config.method != "quota-greedy"])
    assert reward_scores(found) is None
    assert [span.title for span in score_table(found, None, "x").spans] == ["normalised Len"]
