"""What people see of a session is what happened in it."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from kuaifair_env.render import SessionTrace, render_ansi, render_rgb

VERMILLION, GREEN, BLUE = (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0x00, 0x72, 0xB2)


def trace_of(steps=6, slate=4, max_len=12, leave_reason=None, seed=3):
    rng = np.random.default_rng(seed)
    items = rng.permuted(np.tile(np.arange(50), (steps, 1)), axis=1)[:, :slate]
    popular, clicks = rng.random((2, steps, slate)) < 0.5
    shares = popular.mean(axis=1)
    violations = np.abs(2 * shares - 1) >= 0.3
    rewards = clicks.mean(axis=1)
    return SessionTrace(
        user_id=4711,
        max_len=max_len,
        items=items,
        popular=popular,
        clicks=clicks,
        rewards=rewards,
        popular_shares=shares,
        violations=violations,
        tempers=max_len - np.concatenate([[0], np.cumsum(2 - rewards + violations)]),
        leave_reason=leave_reason,
    )


def pixels_of(picture, colour):
    return int((picture == np.array(colour, np.uint8)).all(axis=2).sum())


def test_text_shows_every_item_with_its_group_and_click():
    trace = SessionTrace(
        user_id=4711,
        max_len=3,
        items=np.array([[0, 1], [2, 1]]),
        popular=np.array([[True, False], [False, True]]),
        clicks=np.array([[True, False], [False, False]]),
        rewards=np.array([0.5, 0.0]),
        popular_shares=np.array([0.5, 1.0]),
        violations=np.array([False, True]),
        tempers=np.array([3.0, 1.5, -1.5]),
        leave_reason="temper below 1",
        item_ids=np.array([100, 200, 30000]),
    )
    lines = render_ansi(trace).splitlines()
    assert "User 4711" in lines[0]
    assert "over after 2 steps: temper below 1" in lines[0]
    start, first, second = lines[-3:]
    assert start.split() == ["0", "3.00", "|" + "#" * 20 + "|"]
    assert first.split() == ["1", "[100*]", "200", "50%", "0.50", "1.50", "|" + "#" * 10 + "." * 10 + "|"]
    assert second.split() == ["2", "30000", "200*", "100%!", "0.00", "-1.50", "|" + "." * 20 + "|"]


def test_text_columns_line_up_and_rows_stand_for_items_without_ids():
    trace = trace_of(steps=9)
    lines = render_ansi(trace).splitlines()[4:]
    assert len({line.index("|") for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert all(str(item) in line for item, line in zip(trace.items[:, 0], lines[1:], strict=True))


def test_text_of_a_session_that_still_runs_or_has_not_begun():
    assert "6 steps so far" in render_ansi(trace_of())
    assert "1 step so far" in render_ansi(trace_of(steps=1))
    assert "0 steps so far" in render_ansi(trace_of(steps=0))


@pytest.mark.parametrize("steps", [0, 1, 15])
def test_pictures_of_a_session_all_have_one_size(steps):
    picture = render_rgb(trace_of(steps))
    assert picture.shape == (560, 720, 3)
    assert picture.dtype == np.uint8


def test_equal_traces_give_equal_pictures_and_different_ones_differ():
    picture = render_rgb(trace_of())
    assert np.array_equal(picture, render_rgb(trace_of()))
    assert not np.array_equal(picture, render_rgb(trace_of(seed=4)))
    assert not np.array_equal(picture, render_rgb(trace_of(leave_reason="temper below 1")))


def test_area_of_the_bars_is_the_reward():
    trace = trace_of(steps=8)
    full, half = (
        pixels_of(render_rgb(dataclasses.replace(trace, rewards=np.full(8, level))), BLUE) for level in (0.96, 0.48)
    )
    # The line of the mean covers part of each bar, the same in both.
    assert full == pytest.approx(2 * half, rel=0.1)
    assert pixels_of(render_rgb(dataclasses.replace(trace, rewards=np.zeros(8))), BLUE) == 0


def test_unfair_slates_and_fair_slates_look_different():
    trace = trace_of(steps=8)
    fair = render_rgb(dataclasses.replace(trace, violations=np.zeros(8, bool)))
    unfair = render_rgb(dataclasses.replace(trace, violations=np.ones(8, bool)))
    assert pixels_of(fair, GREEN) > pixels_of(unfair, GREEN) + 100
    assert pixels_of(unfair, VERMILLION) > pixels_of(fair, VERMILLION) + 100
    grey = fair.mean(axis=2), unfair.mean(axis=2)
    assert (np.abs(grey[0] - grey[1]) > 60).sum() > 100  # the markers' shapes differ, not only their colours


def test_a_rule_without_temper_shows_no_level_to_leave_at():
    with_level = render_rgb(trace_of(steps=0)).astype(int)[: 560 // 2]
    without = render_rgb(dataclasses.replace(trace_of(steps=0), leave_below=None)).astype(int)[: 560 // 2]
    assert (with_level[..., 0] - with_level[..., 2] > 60).sum() > 300
    assert (without[..., 0] - without[..., 2] > 60).sum() == 0


def test_rewards_below_zero_and_above_one_fit():
    trace = dataclasses.replace(trace_of(steps=3), rewards=np.array([-2.0, 0.5, 7.0]))
    assert pixels_of(render_rgb(trace), BLUE) > 500


LIGHT = """
import sys
import numpy as np
import kuaifair_env
from kuaifair_env.render import SessionTrace, render_ansi, render_rgb
heavy = ("torch", "stable_baselines3", "pandas", "matplotlib", "scipy", "sklearn")
assert not [name for name in heavy if name in sys.modules]
slate, step = np.zeros((1, 2), bool), np.zeros(1)
trace = SessionTrace(1, 3, np.array([[4, 5]]), slate, slate, step, step, step > 0, np.array([3.0, 1.0]))
render_ansi(trace)
assert "matplotlib" not in sys.modules
render_rgb(trace)
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""


@pytest.mark.slow
def test_importing_is_light_and_matplotlib_comes_with_the_first_picture_and_pyplot_never():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
