"""``kuaifair study``: what people type works, and what they mistype is explained without a traceback."""

from __future__ import annotations

import pytest
from studies_for_tests import raising_pair
from worlds_for_tests import small_pair

import hrl_policies.study.engines as engines
import hrl_policies.study.runner as runner
from hrl_policies.cli.main import main
from hrl_policies.study.engines import InsideEngine, LocalEngine

PLAN = """
name: from the command line
methods: [{name: a2c, steps: 128, set: {n_steps: 2}}, random, quota-greedy]
worlds: [KuaiFair-Toy-v0]
max_lens: [10]
seeds: [3, 4]
users: 15
"""
RUN = ["study", "run", "plan.yml", "--store", "store"]


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch, tmp_path):
    """The id of the toy world stands for a smaller one, and the pool for this process."""
    monkeypatch.setattr(runner, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    monkeypatch.setattr(engines, "LocalEngine", lambda count: LocalEngine(count) and InsideEngine())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yml").write_text(PLAN)


def kuaifair(capsys, *arguments):
    """Runs the command; returns exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def test_plan_says_what_would_run_and_what_it_would_cost(capsys, tmp_path):
    code, out, err = kuaifair(capsys, "study", "plan", "plan.yml", "--workers", "2")
    assert code == 0, err
    assert "from the command line: 4 runs" in out
    assert "- A2C (n_steps=2): 2 runs, seeds 3, 4, 128 steps" in out
    assert "- Random: 1 runs, seeds 3, does not train" in out
    assert "Estimate, not a promise" in out and "worker(s)" in out and "of disk" in out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yml"]


def test_run_status_and_resume(capsys, tmp_path):
    code, out, err = kuaifair(capsys, *RUN)
    assert code == 0, err
    assert "4 of 4 runs done" in out and "Written: " in out and "Made by: kuaifair study run plan.yml" in out
    code, out, _ = kuaifair(capsys, "study", "status", "store")
    assert code == 0 and out.splitlines() == ["from the command line: 4 of 4 runs done, 0 failed, 0 missing"]

    tables = (tmp_path / "store/tables.md").read_bytes()
    run = tmp_path / "store/KuaiFair-Toy-v0/random-len10-k10-seed3"
    result = (run / "result.json").read_bytes()
    run.rename(tmp_path / "away")
    code, out, _ = kuaifair(capsys, "study", "status", "store")
    assert "3 of 4 runs done, 0 failed, 1 missing" in out
    assert "Go on with: kuaifair study resume store\n" in out
    code, out, _ = kuaifair(capsys, "study", "resume", "store")
    assert code == 0 and "random-len10-k10-seed3: done" in out
    assert (run / "result.json").read_bytes() == result
    assert (tmp_path / "store/tables.md").read_bytes() == tables


def test_failed_runs_end_with_a_code_and_a_way_on(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "load_worlds", lambda env_id, *rest: raising_pair(env_id))
    code, out, err = kuaifair(capsys, *RUN)
    assert code == 1 and "Traceback" not in err
    assert out.count("RuntimeError: the users went home") >= 4
    assert "try again with: kuaifair study resume store --retry-failed" in out
    code, out, _ = kuaifair(capsys, "study", "status", "store")
    assert "0 of 4 runs done, 4 failed, 0 missing" in out and "--retry-failed" in out
    monkeypatch.setattr(runner, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    code, _, _ = kuaifair(capsys, "study", "resume", "store")
    assert code == 1, "failures stay until they are asked for"
    code, _, _ = kuaifair(capsys, "study", "resume", "store", "--retry-failed")
    assert code == 0 and not list(tmp_path.rglob("*.failed"))


def test_ctrl_c_says_how_to_go_on(capsys, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrl_policies.study.engines.performed", interrupted)
    code, out, _ = kuaifair(capsys, *RUN)
    assert code == 130 and "Go on with: kuaifair study resume store" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["run", "none.yml"], "there is no file none.yml"),
        (["run", "plan.yml", "--quick"], "only shipped studies have a quick form: paper"),
        (["plan", "wrong.yml"], "wrong.yml has 2 problems:"),
        (["resume", "nowhere"], "nowhere is not the folder of a study"),
        (["status", "nowhere"], "nowhere is not the folder of a study"),
        (["run", "plan.yml", "--address", "auto"], "--address is that of a Ray cluster"),
        (["plan", "plan.yml", "--data-dir", "nowhere"], "there is no file or folder nowhere"),
    ],
)
def test_bad_input_is_explained(capsys, tmp_path, arguments, problem):
    (tmp_path / "wrong.yml").write_text(PLAN.replace("random", "sarsa").replace("users: 15", "users: 0"))
    code, _, err = kuaifair(capsys, "study", *arguments)
    assert code == 2 and problem in err and "Traceback" not in err


def test_a_store_is_not_used_for_another_study(capsys, tmp_path):
    assert kuaifair(capsys, *RUN)[0] == 0
    (tmp_path / "plan.yml").write_text(PLAN.replace("users: 15", "users: 14"))
    code, _, err = kuaifair(capsys, *RUN)
    assert code == 2 and "holds another study (users differ)" in err
