"""Probes give known answers on states whose content is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_worlds import taste_worlds

from dsrm.baselines import IdentityPurifier
from dsrm.probe_data import KINDS, SHORT, draw_counts_and_rates, draw_states, probe_set
from dsrm.probes import RAW, probe, purified_states, report_table
from kuaifair_env.spaces import observed_states

TRAIN, TEST = taste_worlds()
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def probes():
    return probe_set(TEST)


@pytest.fixture(scope="module")
def measures(probes):
    noise = RNG.normal(size=probes.states.shape).astype(np.float32)
    oracle = np.zeros_like(noise)
    oracle[np.arange(len(probes)), np.maximum(probes.interest, 0)] = 3.0
    popular = noise * 0.1
    popular[:, 0] = probes.popularity
    tags = TEST.data.items.tags[:, :].astype(np.float32)
    centroids = tags.T @ probes.embeddings / tags.sum(axis=0)[:, None]
    states = {
        RAW: probes.states,
        "noise": noise,
        "interest": oracle + 0.1 * noise,
        "popularity": popular,
        "centroid": centroids[np.maximum(probes.interest, 0)].astype(np.float32),
        "scaled": 3.0 * probes.states,
    }
    return probe(probes, states).measures


def test_each_probe_finds_what_is_there_and_nothing_where_nothing_is(measures):
    assert measures["interest"]["interest"].value > 0.97
    assert measures["interest"]["interest_purity"].value > 0.95
    assert measures["noise"]["interest"].value < 0.4
    assert measures["popularity"]["popularity_r2"].value > 0.99
    assert measures["noise"]["popularity_r2"].value < 0.05
    assert measures["popularity"]["popularity_purity"].value > measures["noise"]["popularity_purity"].value + 0.07
    assert measures["centroid"]["auc"].value > 0.7 > 0.55 > measures["noise"]["auc"].value > 0.45
    assert measures["noise"]["effective_rank"].value == pytest.approx(8, abs=0.4)
    assert measures["centroid"]["effective_rank"].value < 4.5


def test_the_identity_is_recognised(measures):
    for name in (RAW, "scaled"):
        assert measures[name]["raw_cosine"].value == pytest.approx(1.0, abs=1e-5)
        assert measures[name]["raw_r2"].value > 0.995
    assert measures["noise"]["raw_r2"].value < 0.1
    assert measures["scaled"]["auc"].value == pytest.approx(measures[RAW]["auc"].value, abs=1e-6)


def test_intervals_hold_their_value_and_gains_are_paired(measures):
    for state, by_name in measures.items():
        for name, measure in by_name.items():
            low, high = measure.interval
            assert low - 1e-9 <= measure.value <= high + 1e-9 or name.endswith("silhouette"), (state, name)
    gain = measures["scaled"]["auc"].gain_over(measures[RAW]["auc"])
    assert gain.interval == pytest.approx((0.0, 0.0), abs=1e-9)


def test_short_windows_keep_the_last_exposures_alone():
    short, log = probe_set(TEST, "short"), probe_set(TEST)
    assert (short.window.items >= 0).sum(axis=1).max() == SHORT
    rows = np.searchsorted(log.users, short.users)
    np.testing.assert_array_equal(short.window.items[:, -SHORT:], log.window.items[rows][:, -SHORT:])
    np.testing.assert_array_equal(short.states, observed_states(TEST, short.window))


@pytest.mark.parametrize("kind", KINDS)
def test_probe_sets_hold_no_training_user_and_nobody_without_a_click(kind):
    probes = probe_set(TEST, kind, max_users=60)
    assert len(probes) <= 60 and np.isin(probes.users, TEST.users).all()
    assert probes.window.clicks.any(axis=1).all()
    assert np.isin(probes.log.users, probes.users).all()


def test_the_training_world_and_unknown_windows_are_refused(probes):
    with pytest.raises(ValueError, match="test world"):
        probe_set(TRAIN)
    with pytest.raises(ValueError, match="windows are of one of the kinds"):
        probe_set(TEST, "future")
    with pytest.raises(ValueError, match="raw"):
        probe(probes, {"mine": probes.states})


def test_tables_and_figures_are_drawn_and_do_not_change_from_run_to_run(probes, tmp_path):
    few = probe_set(TEST, max_users=40)
    states = purified_states(few, TEST, {"identity": IdentityPurifier()})
    table = report_table(probe(few, states))
    assert "identity" in table and "recovery" not in table
    for name in ("a.png", "b.png"):
        draw_states(tmp_path / name, few, states)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    explained = draw_counts_and_rates(tmp_path / "c.png", TEST.data)
    # Counts of clicks follow counts of exposures by construction; rates need not.
    assert explained["counts"] > 0.9 > explained["rates"]
    assert dataclasses.is_dataclass(few)
