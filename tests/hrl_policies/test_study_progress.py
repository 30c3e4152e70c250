"""Progress and estimates: time left follows from the runs that have ended, and what is written fits the figures."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from studies import study

import hrl_policies.study.progress as estimate
from hrl_policies.study.progress import (
    LiveProgress,
    PlainProgress,
    StudyProgress,
    duration,
    estimate_study,
    progress_for,
    size,
    work_of,
)
from hrl_policies.study.spec import planned_runs
from hrl_policies.zoo import METHODS

FAILURE = "Traceback (most recent call last):\nRuntimeError: no users\n"


def test_time_left_follows_from_work_done_and_from_the_number_of_workers():
    progress = StudyProgress(workers=2)
    progress.on_study_start({"short": 1.0, "long": 3.0, "longer": 6.0, "broken": 2.0}, done=5, failed=1)
    assert progress.seconds_left is None
    assert progress.summary() == "5 of 10 runs done, 1 failed, 4 left"
    progress.on_task_start("worlds")
    progress.on_task_end("worlds", 1_000.0, "")
    assert progress.seconds_left is None, "worlds are no runs"
    progress.on_task_start("short")
    progress.on_task_end("short", 10.0, "")
    # 10 s for each unit of work, 11 units left, two at a time.
    assert progress.seconds_left == pytest.approx(55.0)
    progress.on_task_end("broken", 500.0, FAILURE)
    assert progress.seconds_left == pytest.approx(45.0)
    progress.on_task_end("longer", 30.0, "")
    # 40 s for 7 units, 3 units left in one run, which two workers cannot share.
    assert progress.seconds_left == pytest.approx(3 * 40 / 7)
    assert progress.summary() == "7 of 10 runs done, 2 failed, 1 left, about 17 s"
    progress.on_task_end("long", 1.0, "")
    assert progress.summary() == "8 of 10 runs done, 2 failed" and not progress.running


def test_without_a_terminal_every_run_is_a_plain_line():
    out = io.StringIO()
    with progress_for(Console(file=out, width=40), 1) as progress:
        assert isinstance(progress, PlainProgress)
        progress.on_study_start({"a/run[0]": 1.0, "b": 1.0}, 0, 0)
        progress.on_task_start("a/run[0]")
        progress.on_task_end("a/run[0]", 90.0, "")
        progress.on_task_end("b", 3.0, FAILURE)
    assert out.getvalue().splitlines() == [
        "0 of 2 runs done, 2 left",
        "a/run[0]: done in 1.5 min (1 of 2 runs done, 1 left, about 1.5 min)",
        "b: FAILED after 3 s: RuntimeError: no users (1 of 2 runs done, 1 failed)",
    ]


def test_in_a_terminal_running_and_failed_runs_are_shown_in_place():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with progress_for(console, 1) as progress:
        assert isinstance(progress, LiveProgress)
        progress.on_study_start({"one[0]": 1.0, "two": 1.0, "three": 1.0}, 0, 0)
        progress.on_task_end("two", 1.0, FAILURE)
        progress.on_task_start("one[0]")
        plain = Console(file=io.StringIO(), width=100)
        plain.print(progress.render())
        shown = plain.file.getvalue()
    assert "0 of 3 runs done, 1 failed, 2 left" in shown
    assert "running  one[0]" in shown and "failed   two" in shown and "RuntimeError: no users" in shown
    assert "runs done" in out.getvalue()


def test_work_grows_with_steps_users_and_candidates():
    def work(**settings):
        return work_of(planned_runs(study(worlds=["KuaiFair-Toy-v0"], **settings))[0])

    def trained(steps, **settings):
        return work(methods=[{"name": "a2c", "steps": steps}], **settings)

    assert trained(2_000) - trained(1_000) == pytest.approx(trained(3_000) - trained(2_000))
    assert trained(2_000) > trained(1_000) > trained(1)
    controls = [work(methods=["quota-greedy"], users=users) for users in (100, 200, 300)]
    assert controls[2] - controls[1] == pytest.approx(controls[1] - controls[0]) and controls[1] > controls[0]
    large = {"worlds": ["KuaiFair-KuaiRandTwin-v0"]}
    small = planned_runs(study(methods=["quota-greedy"]))[0]
    assert work_of(planned_runs(study(methods=["quota-greedy"], **large))[0]) > work_of(small)


def test_an_estimate_adds_up_and_says_what_was_guessed(monkeypatch):
    monkeypatch.setattr(estimate, "calibration_seconds", lambda: 0.5)
    runs = planned_runs(study(methods=["a2c", "random"]))
    found = estimate_study(runs)
    assert found.seconds == pytest.approx(0.5 * sum(work_of(run) for run in runs))
    assert found.longest == pytest.approx(0.5 * max(work_of(run) for run in runs))
    assert found.wall_seconds(1) == pytest.approx(found.seconds)
    assert found.wall_seconds(1_000) == pytest.approx(found.longest)
    assert found.guessed == () and found.bytes > 0
    known = dict(estimate._costs()["methods"])
    dearest = known.pop("a2c")
    monkeypatch.setattr(estimate, "_costs", lambda: {"methods": {"td3": dearest, **known}, "purifiers": {}})
    assert estimate_study(runs).guessed == ("a2c",)


def test_a_purifier_is_counted_once_for_each_world(monkeypatch):
    monkeypatch.setattr(estimate, "calibration_seconds", lambda: 1.0)
    purified = estimate_study(planned_runs(study(methods=["random"], purifiers=["tce"], max_lens=[10, 20])))
    plain = estimate_study(planned_runs(study(methods=["random"], max_lens=[10, 20])))
    pretraining = estimate._costs()["purifiers"]["tce"]["work"]
    assert purified.seconds - plain.seconds == pytest.approx(pretraining)


def test_the_table_of_costs_holds_methods_of_the_zoo_with_positive_costs():
    costs = estimate._costs()
    measured = set(costs["methods"])
    assert {"a2c", "td3", "dsrm-hrl", "random", "oracle"} <= measured <= set(METHODS)
    for name, cost in costs["methods"].items():
        assert set(cost) == {"start", "step", "step_item", "session", "session_item", "bytes"}
        assert min(cost.values()) >= 0 and cost["session"] + cost["session_item"] > 0, name
        assert (cost["step"] + cost["step_item"] > 0) == METHODS[name].learns == (cost["bytes"] > 0)
    assert json.dumps(costs)


def test_the_unit_is_small_and_positive():
    assert 1e-5 < estimate.calibration_seconds() < 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (3_000, "50 min"), (7_200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_sizes_as_people_say_them():
    assert [size(count) for count in (512, 3 * 2**20, 5 * 2**30)] == ["0 KiB", "3.0 MiB", "5.0 GiB"]
