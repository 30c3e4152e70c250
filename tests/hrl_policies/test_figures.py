"""Figures are drawn from what was run, say where Len must lie, and are the same bytes for the same runs."""

from __future__ import annotations

import re
import struct
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from studies import CONTROLS, LIKE_THE_PAPERS, OWN, pairs

from hrl_policies.study.curves import (
    draw_learning_curves,
    draw_profiles,
    draw_training_rewards,
    on_common_steps,
)
from hrl_policies.study.figures import draw_pareto, draw_purification_gain, looks, pareto_front
from hrl_policies.study.labels import Variant
from hrl_policies.study.outputs import draw_study
from hrl_policies.study.results import comparisons


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """Every figure of the horizon 8 as SVG, by name."""
    chosen = [run for run in runs if run.config.session.max_len == 8]
    paths = draw_study(tmp_path_factory.mktemp("figures"), chosen, ("svg",))
    return {path.stem: path for path in paths}


def size_of(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def words_of(path):
    """Returns the words of an SVG file: its glyphs come with the text in a comment."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.just(2)), elements=st.integers(0, 4).map(float)))
def test_the_frontier_holds_whom_nobody_beats(points):
    beaten = {i for i, a in enumerate(points) for b in points if (b >= a).all() and (b > a).any()}
    front = pareto_front(points)
    assert set(front.tolist()) == set(range(len(points))) - beaten
    assert (np.diff(points[front, 0]) >= 0).all() and (np.diff(points[front, 1]) <= 0).all()


def test_a_frontier_needs_finite_pairs():
    for points in (np.ones(3), np.ones((2, 3)), np.array([[1.0, np.nan]])):
        with pytest.raises(ValueError, match="finite points"):
            pareto_front(points)


def test_looks_differ_without_colour():
    found = looks([f"method {i}" for i in range(60)])
    assert len({(look.marker, str(look.line)) for look in found.values()}) == 60
    assert len({look.marker for look in list(found.values())[:13]}) == 13
    assert len({look.hatch for look in list(found.values())[:5]}) == 5


def test_seeds_are_brought_to_the_same_steps(comparison):
    task = next(task for task in comparison.tasks if task.world == OWN and task.max_len == 8)
    runs = comparison.by_cell[task, Variant("a2c", "")]
    straight = [
        replace(
            run,
            run=replace(run.run, curve=[{"steps": 10.0 * i, "len": 3.0 * i + k} for i in range(1, 5 + k)]),
        )
        for k, run in enumerate(runs)
    ]
    steps, values = on_common_steps(straight, "len")
    assert (steps[0], steps[-1]) == (10.0, 40.0)
    assert values == pytest.approx(np.stack([0.3 * steps + k for k in range(3)]))


@pytest.mark.slow
def test_every_figure_has_a_file_of_its_own(runs, drawn, tmp_path):
    assert set(drawn) == {
        "fig_3_purification_gain_len8", "fig_7_learning_curves_len8", "length_and_reward_len8", "pareto_len8",
        "profiles", "training_rewards_len8",
        f"results_{LIKE_THE_PAPERS}_len8_allow", f"results_{OWN}_len8_allow",
    }  # fmt: skip
    controls = [run for run in runs if run.config.method == "random" and run.config.world == OWN]
    written = draw_study(tmp_path, controls, ("png",))
    names = {
        name
        for n in (8, 30)
        for name in (f"length_and_reward_len{n}.png", f"pareto_len{n}.png", f"results_{OWN}_len{n}_allow.png")
    }
    assert {path.name for path in written} == {path.name for path in tmp_path.iterdir()} == names
    for path in written:
        width, height = size_of(path)
        assert width >= 400 and height >= 150


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_equal_runs_give_equal_bytes_that_say_what_they_are_made_from(runs, tmp_path, form):
    (small,) = comparisons([run for run in runs if run.config.method in CONTROLS and run.config.world == OWN])
    first, second = tmp_path / f"a.{form}", tmp_path / f"b.{form}"
    assert draw_pareto(first, small, 8) and draw_pareto(second, small, 8)
    assert first.read_bytes() == second.read_bytes()
    if form != "pdf":
        for run in small.runs:
            assert run.record.data_hash.encode() in first.read_bytes()
        assert matplotlib.__version__.encode() not in first.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fig_7_learning_curves_len8", "fig_3_purification_gain_len8"])
def test_every_figure_of_len_shows_floor_and_ceiling(drawn, name):
    assert {"floor of Len", "ceiling of Len", "KuaiRecTwin (own), Max Len 8, repeats allowed"} <= set(
        words_of(drawn[name])
    )


@pytest.mark.slow
def test_learning_curves_are_labelled_by_method(drawn):
    words = words_of(drawn["fig_7_learning_curves_len8"])
    assert {"A2C", "A2C + ips", "Len", "AD", "violation rate", "training steps"} <= set(words)
    assert "Random" not in words


@pytest.mark.slow
def test_rewards_of_training_are_drawn_over_sessions_and_seconds_that_are_known(drawn, runs, tmp_path):
    words = words_of(drawn["training_rewards_len8"])
    assert {"A2C", "A2C + ips", "R_cum", "training sessions", "processor seconds of training"} <= set(words)
    a2c = [run for run in runs if run.config.method == "a2c" and run.config.session.max_len == 8]
    older = [replace(run, timing={"training_seconds": 1.0}) for run in a2c]
    for name, chosen in (("known", a2c), ("older", older)):
        (group,) = comparisons(chosen)
        assert draw_training_rewards(tmp_path / f"{name}.svg", group, 8)
    sizes = {name: (tmp_path / f"{name}.svg").read_text("utf-8").count("<path") for name in ("known", "older")}
    assert sizes["older"] < sizes["known"]


@pytest.mark.slow
def test_purification_is_shown_for_methods_with_several_states_only(drawn):
    words = words_of(drawn["fig_3_purification_gain_len8"])
    assert {"raw states", "ips", "A2C"} <= set(words)
    assert "HRL" not in words and not any("small (own)" in word for word in words)


def test_swept_settings_are_not_taken_for_states(runs, tmp_path):
    a2c = [run for run in runs if run.config.method == "a2c" and run.config.session.max_len == 8]
    raw = [run for run in a2c if run.config.purifier is None]
    swept = [replace(run, config=replace(run.config, variant="gamma=0.5")) for run in raw]
    (settings,) = comparisons([*raw, *swept])
    assert not draw_purification_gain(tmp_path / "a.svg", settings, 8)
    (both,) = comparisons([*a2c, *swept])
    assert draw_purification_gain(tmp_path / "a.svg", both, 8)
    assert not any("gamma" in words for words in words_of(tmp_path / "a.svg"))


@pytest.mark.slow
def test_the_frontier_is_drawn_between_groups_and_between_items(drawn):
    words = set(words_of(drawn["pareto_len8"]))
    assert {"Oracle †", "HRL", "frontier of means"} <= words
    assert any("1 - AD" in word for word in words) and any("1 - Gini" in word for word in words)


@pytest.mark.slow
def test_profiles_leave_out_what_was_run_once(drawn):
    words = words_of(drawn["profiles"])
    assert {"A2C", "2 tasks"} <= set(words)
    assert "Random" not in words


def test_where_there_is_nothing_to_draw_nothing_is_written(runs, tmp_path):
    (controls,) = comparisons([run for run in runs if run.config.method in ("random", "oracle")])
    path = tmp_path / "a.png"
    assert not draw_learning_curves(path, controls, 8)
    assert not draw_purification_gain(path, controls, 8)
    assert not draw_training_rewards(path, controls, 8)
    assert not draw_profiles(path, controls)
    assert not draw_pareto(path, controls, 99)
    assert not path.exists()


@pytest.mark.slow
def test_worlds_add_counts_and_states(runs, tmp_path):
    purified = next(run for run in runs if run.config.purifier is not None)
    written = draw_study(tmp_path, [purified], ("png",), worlds=[pairs()[LIKE_THE_PAPERS]])
    names = {path.name for path in written}
    assert f"fig_2_counts_and_rates_{LIKE_THE_PAPERS}.png" in names
    assert f"fig_4_states_{LIKE_THE_PAPERS}.png" in names


def test_unknown_formats_are_refused_before_anything_is_written(runs, comparison, tmp_path):
    with pytest.raises(ValueError, match="unknown format 'jpg'"):
        draw_study(tmp_path / "out", runs, ("png", "jpg"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"ends in \.png, \.svg or \.pdf"):
        draw_pareto(tmp_path / "a.jpg", comparison, 8)
    assert list(tmp_path.iterdir()) == []
