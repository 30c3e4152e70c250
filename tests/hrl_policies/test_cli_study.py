"""``kuaifair study``: what people type works, and what they mistype is explained without a traceback."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from small_worlds import interrupted_pair, small_pair
from studies import OWN, raising_pair

import hrl_policies.study.engines as engines
import hrl_policies.study.loading as loading
import hrl_policies.study.outputs as outputs
import hrl_policies.study.progress as progress
from hrl_policies.study.engines import InProcessEngine, LocalEngine
from hrl_policies.study.outputs import worlds_of_runs
from hrl_policies.study.store import stored_runs
from hrl_policies.study.submission import read_submission
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import write_checksums

PLAN = """
name: from the command line
methods: [{name: a2c, steps: 128, set: {n_steps: 2}}, random, quota-greedy]
worlds: [KuaiFair-Toy-v0]
max_lens: [10]
seeds: [3, 4]
n_users: 15
"""
RUN = ["study", "run", "plan.yml", "--output", "store"]


@pytest.fixture
def small_worlds(monkeypatch, tmp_path):
    """The id of the toy world stands for a smaller one, and the pool for this process; figures are not drawn."""
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    monkeypatch.setattr(engines, "LocalEngine", lambda count: LocalEngine(count) and InProcessEngine())
    monkeypatch.setattr(outputs, "draw_study", lambda *rest: [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yml").write_text(PLAN)


@pytest.mark.usefixtures("small_worlds")
def test_plan_says_what_would_run_and_what_it_would_cost(kuaifair, tmp_path):
    code, out, err = kuaifair("study", "plan", "plan.yml", "--workers", "2")
    assert code == 0, err
    assert "from the command line: 4 runs" in out
    assert "- A2C (n_steps=2): 2 runs, seeds 3, 4, 128 steps" in out
    assert "- Random: 1 runs, seeds 3, does not train" in out
    assert "Estimate, not a promise" in out and "worker(s)" in out and "of disk" in out
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yml"]


@pytest.mark.usefixtures("small_worlds")
def test_plan_says_how_much_memory_the_largest_run_takes_and_whether_there_is_as_much(kuaifair, monkeypatch, tmp_path):
    monkeypatch.setattr(progress, "available_memory", lambda: 20 * 2**30)
    for size, enough in ((100_000, True), (20_000_000, False)):
        method = f"{{name: td3, steps: 128, set: {{buffer_size: {size}}}}}"
        (tmp_path / "plan.yml").write_text(PLAN.replace("random", method))
        code, out, err = kuaifair("study", "plan", "plan.yml", "--workers", "2")
        assert code == 0, err
        words = " ".join(out.split())
        found = re.search(r"Memory: about ([\d.]+) GiB for each of 1 worker\(s\).*; 20.0 GiB are left here", words)
        # Two states and an action of at least 8 numbers, in 4 bytes each.
        assert found, words
        assert float(found[1]) * 2**30 > 24 * 4 * size
        assert ("not enough" in words) != enough


@pytest.mark.usefixtures("small_worlds")
def test_run_status_and_resume(kuaifair, tmp_path):
    code, out, err = kuaifair(*RUN)
    assert code == 0, err
    assert "4 of 4 runs done" in out and "Written: " in out and "Made by: kuaifair study run plan.yml" in out
    code, out, _ = kuaifair("study", "status", "store")
    assert code == 0 and out.splitlines() == ["from the command line: 4 of 4 runs done, 0 failed, 0 missing"]

    tables = (tmp_path / "store/tables.md").read_bytes()
    run = tmp_path / "store/KuaiFair-Toy-v0/random-len10-k10-seed3"
    result = (run / "result.json").read_bytes()
    run.rename(tmp_path / "away")
    code, out, _ = kuaifair("study", "status", "store")
    assert "3 of 4 runs done, 0 failed, 1 missing" in out
    assert "Go on with: kuaifair study resume store\n" in out
    code, out, _ = kuaifair("study", "resume", "store")
    assert code == 0 and "random-len10-k10-seed3: done" in out
    assert (run / "result.json").read_bytes() == result
    assert (tmp_path / "store/tables.md").read_bytes() == tables


@pytest.mark.usefixtures("small_worlds")
def test_failed_runs_end_with_a_code_and_a_way_on(kuaifair, monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: raising_pair(env_id))
    code, out, err = kuaifair(*RUN)
    assert code == 1 and "Traceback" not in err
    assert out.count("RuntimeError: the users went home") >= 4
    assert "try again with: kuaifair study resume store --retry-failed" in out
    code, out, _ = kuaifair("study", "status", "store")
    assert "0 of 4 runs done, 4 failed, 0 missing" in out and "--retry-failed" in out
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    code, _, _ = kuaifair("study", "resume", "store")
    assert code == 1, "failures stay until they are asked for"
    code, _, _ = kuaifair("study", "resume", "store", "--retry-failed")
    assert code == 0 and not list(tmp_path.rglob("*.failed"))


@pytest.mark.usefixtures("small_worlds")
def test_a_run_for_which_memory_does_not_suffice_ends_in_the_same_bytes_later(kuaifair, monkeypatch, tmp_path):
    pairs = iter([interrupted_pair(3, MemoryError("Unable to allocate 9 TiB"))])
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: replace(next(pairs, small_pair()), name=env_id))
    code, out, err = kuaifair(*RUN)
    assert code == 1 and err == ""
    (line,) = (line for line in out.splitlines() if line.startswith("failed: "))
    assert line.startswith("failed: KuaiFair-Toy-v0/a2c-") and line.endswith("MemoryError: Unable to allocate 9 TiB")
    assert kuaifair(*RUN, "--retry-failed")[0] == 0
    assert kuaifair(*RUN[:-1], "undisturbed")[0] == 0
    for name in ("result.json", "sessions.csv", "learning_curve.csv", "provenance.json"):
        first, second = (
            sorted(tmp_path.glob(f"{store}/KuaiFair-Toy-v0/*/{name}")) for store in ("store", "undisturbed")
        )
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []


@pytest.mark.usefixtures("small_worlds")
def test_ctrl_c_says_how_to_go_on(kuaifair, monkeypatch):
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr("hrl_policies.study.engines.perform_task", interrupted)
    code, out, _ = kuaifair(*RUN)
    assert code == 130 and "Go on with: kuaifair study resume store" in out


@pytest.mark.usefixtures("small_worlds")
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
def test_bad_input_is_explained(kuaifair, tmp_path, arguments, problem):
    (tmp_path / "wrong.yml").write_text(PLAN.replace("random", "sarsa").replace("n_users: 15", "n_users: 0"))
    code, _, err = kuaifair("study", *arguments)
    assert code == (1 if problem.startswith("nowhere") else 2)
    assert problem in err and "Traceback" not in err


@pytest.mark.usefixtures("small_worlds")
def test_a_store_is_not_used_for_another_study(kuaifair, tmp_path):
    assert kuaifair(*RUN)[0] == 0
    (tmp_path / "plan.yml").write_text(PLAN.replace("n_users: 15", "n_users: 14"))
    code, _, err = kuaifair(*RUN)
    assert code == 1 and "holds another study (n_users differ)" in err


def test_tables_are_printed_whole(kuaifair, store):
    code, out, err = kuaifair("study", "tables", store, "--base", "a2c", "--compare", "paper")
    assert code == 0, err
    for part in ("Overall results", "Ablations", "Training time", "A2C minus each other method", "Scores over",
                 "paper (another world)", "Made by: kuaifair study tables"):  # fmt: skip
        assert part in out
    assert not (store / "tables").exists()


def test_tables_are_written_where_asked(kuaifair, store, tmp_path):
    code, out, err = kuaifair(
        "study",
        "tables",
        store,
        "--format",
        "latex",
        "--format",
        "csv",
        "-o",
        tmp_path,
        "--average",
        "iqm",
    )
    assert code == 0, err
    names = {path.name for path in tmp_path.iterdir()}
    assert {"table_2_overall.tex", "table_2_overall.csv", "table_3_ablation.tex", "scores.csv"} <= names
    assert all(name in out for name in names)
    assert "interquartile mean" in (tmp_path / "table_2_overall.tex").read_text()


@pytest.mark.slow
def test_figures_are_written_where_asked(kuaifair, store, tmp_path):
    for run in (store / OWN).glob("*-len30-*"):
        shutil.copytree(run, tmp_path / "runs" / run.name)
    code, out, err = kuaifair("study", "figures", tmp_path / "runs", "--format", "svg", "-o", tmp_path / "figures")
    assert code == 0, err
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg"}
    assert "pareto_len30.svg" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tables", "nowhere"), "no folder nowhere"),
        (("figures", "nowhere"), "no folder nowhere"),
        (("report", "empty"), "holds no runs"),
        (("tables", "empty"), "holds no finished run; a run folder has a result.json"),
        (("tables", "STORE", "--output", "x"), "--format says which"),
        (("tables", "STORE", "--data-dir", "x"), "--data-dir goes with --worlds"),
        (("tables", "STORE", "--base", "flat"), "no finished run is of 'flat'"),
        (("tables", "STORE", "--format", "html"), "'html' is not one of"),
        (("figures", "STORE", "--format", "jpg"), "'jpg' is not one of"),
    ],
)
def test_bad_input_about_finished_runs_is_explained(kuaifair, store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, err = kuaifair("study", *(store if argument == "STORE" else argument for argument in arguments))
    assert code == (1 if message.startswith("no folder") else 2)
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("study tables runs", "result.json"),
        ("study tables runs", "sessions.csv"),
        ("study report runs", "config.json"),
        ("study figures runs", "provenance.json"),
        ("evaluate runs/run", "config.json"),
        ("serve runs/run", "result.json"),
    ],
)
def test_a_damaged_run_is_one_sentence(kuaifair, store, tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    (run,) = (store / OWN).glob("a2c-len30-*-seed11")
    shutil.copytree(run, tmp_path / "runs/run")
    path = tmp_path / "runs/run" / name
    path.write_bytes(path.read_bytes()[:20])
    code, _, err = kuaifair(*command.split())
    (sentence,) = err.splitlines()
    assert code == 1 and sentence.startswith("error: ") and name in sentence


def test_worlds_are_made_again_only_if_their_data_are_the_same(store):
    runs = stored_runs(store)
    with pytest.raises(ValueError, match=OWN):
        worlds_of_runs([run for run in runs if run.config.world == OWN])
    elsewhere = replace(runs[0], config=replace(runs[0].config, world="KuaiFair-Toy-v0"))
    with pytest.raises(ArtifactError, match=r"in another train world, .* \(Toy twin, twin\): .* differ. It needs"):
        worlds_of_runs([elsewhere])


@pytest.fixture
def verified_store(monkeypatch, tmp_path, kuaifair):
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    for seed in ("11", "15", "19"):
        arguments = ["--method", "a2c", "--steps", "256", "--n-envs", "8", "--seed", seed, "--no-progress"]
        assert kuaifair("train", "--env", "KuaiFair-Toy-v0", *arguments, "--output", tmp_path / "store" / seed)[0] == 0
    return tmp_path / "store"


def changed(path, **values):
    """Writes other values into a JSON object of the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    (content["summary"] if "summary" in content else content["packages"]).update(values)
    path.write_text(json.dumps(content), encoding="utf-8")
    write_checksums(path.parent)


@pytest.mark.slow
def test_verify_makes_runs_again_and_says_which_do_not_come_out(kuaifair, verified_store):
    code, out, err = kuaifair("study", "verify", verified_store, "--sample", 2, "--seed", 1)
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "2 of 3 runs, drawn with --seed 1" and len(lines) == 3
    assert all(line.startswith("agrees to the byte: ") for line in lines[1:])

    # A figure that was improved by hand.
    changed(verified_store / "15" / "result.json", r_cum=99.0)
    code, out, _ = kuaifair("study", "verify", verified_store, "--sample", 3)
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == [
        "agrees to the byte",
        "DIFFERS",
        "agrees to the byte",
    ]


@pytest.mark.slow
def test_verify_compares_with_an_interval_where_versions_differ(kuaifair, verified_store):
    for run in stored_runs(verified_store):
        changed(run.folder / "versions.json", numpy="0.1")
        # As if rounding had gone the other way somewhere.
        changed(run.folder / "result.json", r_cum=run.summary["r_cum"] + 1e-6)
    code, out, _ = kuaifair("study", "verify", verified_store)
    assert code == 0
    assert all("agrees within the interval" in line and "3 training seeds" in line for line in out.splitlines()[1:])
    for folder in verified_store.iterdir():
        changed(folder / "result.json", r_cum=1e6)
    code, out, _ = kuaifair("study", "verify", verified_store)
    assert code == 1 and all(line.startswith("DIFFERS") for line in out.splitlines()[1:])


def test_a_submission_holds_every_seed_and_is_checked_against_its_folder(kuaifair, verified_store, tmp_path):
    file = tmp_path / "mine.json"
    code, out, err = kuaifair(
        "study", "submit", verified_store, "--method", "a2c", "-o", file, "--link", "https://a.b/c"
    )
    assert code == 0 and "(1 results)" in out, err
    (result,) = read_submission(file).results
    runs = stored_runs(verified_store)
    assert (result.seeds, result.r_cum) == ([11, 15, 19], [run.summary["r_cum"] for run in runs])
    assert (result.protocol, result.orders, result.steps) == ("frozen", [], 256)
    interval = result.interval("r_cum")
    assert interval.estimate == pytest.approx(sum(result.r_cum) / 3)
    # Student's quantile with two degrees of freedom is 4.303.
    assert interval.half_width == pytest.approx(4.3027 * np.std(result.r_cum, ddof=1) / 3**0.5, rel=1e-4)

    code, out, _ = kuaifair("study", "verify", verified_store, "--submission", file, "--sample", 1)
    assert code == 0 and out.startswith(f"{file} is what {verified_store} holds\n1 of 3 runs")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["results"][0]["r_cum"][1] += 1.0
    file.write_text(json.dumps(content), encoding="utf-8")
    code, _, err = kuaifair("study", "verify", verified_store, "--submission", file)
    assert code and "A2C, KuaiFair-Toy-v0, 30, allow: r_cum differ from what" in err

    for arguments, message in (
        (["--method", "td3"], "holds no finished runs of td3; its methods: a2c"),
        (["--method", "a2c", "--link", "javascript:alert(1)"], "a link is an https address"),
    ):
        code, _, err = kuaifair("study", "submit", verified_store, *arguments, "-o", tmp_path / "no.json")
        assert code and message in err and not (tmp_path / "no.json").exists()
