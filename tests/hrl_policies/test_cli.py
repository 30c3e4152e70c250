"""The command line: what people type works, and what they mistype is explained without a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from worlds_for_tests import interrupted_pair, small_pair

import hrl_policies.study.runner as runner
from hrl_policies.cli.main import main
from hrl_policies.study import load_run
from hrl_policies.zoo import controls


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch, tmp_path):
    """The id of the toy world stands for a smaller one here; runs go to a folder of their own."""
    monkeypatch.setattr(runner, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    monkeypatch.chdir(tmp_path)


def kuaifair(capsys, *arguments):
    """Runs the command; returns exit code, standard output and standard error."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


TRAIN = [
    "train",
    "--method",
    "a2c",
    "--env",
    "KuaiFair-Toy-v0",
    "--steps",
    "256",
    "--n-envs",
    "8",
    "--no-progress",
]


def test_version(capsys):
    code, out, _ = kuaifair(capsys, "--version")
    assert code == 0 and out.startswith("kuaifair ")


def test_envs_and_methods_are_listed_whole(capsys):
    code, out, _ = kuaifair(capsys, "envs")
    assert code == 0 and "KuaiFair-KuaiRandTwin-v0" in out
    code, out, _ = kuaifair(capsys, "methods")
    assert code == 0
    for word in ("recurrent-ppo", "quality-oracle", "privileged", "ICML 2018", "the leave rule's bound"):
        assert word in out


def test_train_then_evaluate_reproduces_the_result(capsys, tmp_path):
    code, out, err = kuaifair(capsys, *TRAIN, "--output", "run", "--max-len", "20", "--set", "n_steps=4")
    assert code == 0, err
    assert "Max Len 20" in out and "Run folder: run" in out and "Made by: kuaifair train --method a2c" in out
    stored = load_run(tmp_path / "run")
    assert stored.config.hyperparameters["n_steps"] == 4
    assert stored.config.world_settings == {"source": "auto", "response": "auto"}
    code, out, _ = kuaifair(capsys, "evaluate", "run", "--no-progress")
    assert code == 0 and "Reproduces result.json exactly" in out


def test_evaluate_says_when_a_result_does_not_come_out(capsys, tmp_path):
    kuaifair(capsys, "train", "-m", "random", "-e", "KuaiFair-Toy-v0", "-o", "run", "--no-progress")
    path = tmp_path / "run/result.json"
    content = json.loads(path.read_text())
    content["summary"]["len"] += 1.0
    path.write_text(json.dumps(content))
    code, out, _ = kuaifair(capsys, "evaluate", "run", "--no-progress")
    assert code == 1 and "len: stored" in out


def test_evaluate_on_other_sessions_does_not_compare(capsys):
    kuaifair(capsys, "train", "-m", "random", "-e", "KuaiFair-Toy-v0", "-o", "run", "--no-progress")
    code, out, _ = kuaifair(capsys, "evaluate", "run", "--users", "5", "--episodes", "3", "--no-progress")
    assert code == 0 and "5 held-out users, 3 session(s)" in out and "Reproduces" not in out


def test_without_output_runs_have_a_folder_each(capsys, tmp_path):
    kuaifair(capsys, "train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--no-progress")
    assert load_run(tmp_path / "runs/KuaiFair-Toy-v0/random-len30-k10-seed11").complete
    code, _, err = kuaifair(capsys, "train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--no-progress")
    assert code == 2 and "exists already" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "-m", "a3c", "-e", "KuaiFair-Toy-v0"], "no method is called 'a3c'"),
        (["train", "-m", "a2c"], "--method and --env"),
        (["train", "--resume", "x", "-m", "a2c"], "leave them out"),
        (["train", "--resume", "nowhere.partial"], "no run folder nowhere.partial"),
        ([*TRAIN, "--leave", "never-ever"], "no leave rule is called 'never-ever'"),
        ([*TRAIN, "--set", "gamma"], "name=value"),
        ([*TRAIN, "--set", "gama=1"], "A2C has no hyperparameter gama"),
        ([*TRAIN, "--slate-size", "51"], "slate_size"),
        ([*TRAIN, "--slate-size", "3"], "too small to measure"),
        ([*TRAIN, "--taste", "sweet"], "--taste is"),
        ([*TRAIN, "--repeats", "forbid"], "repeats='forbid' needs"),
        (["evaluate", "nowhere"], "no run folder nowhere"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--max-len", "many"], "--max-len"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(capsys, arguments, words):
    code, out, err = kuaifair(capsys, *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in out + err


def test_tracebacks_are_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("KUAIFAIR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no method"):
        main(["train", "-m", "a3c", "-e", "KuaiFair-Toy-v0"])


def test_an_unknown_environment_is_explained(monkeypatch, capsys):
    monkeypatch.undo()
    code, _, err = kuaifair(
        capsys, "train", "-m", "random", "-e", "KuaiFair-Nowhere-v0", "-o", "never-written"
    )
    assert code == 2 and "no environment is called 'KuaiFair-Nowhere-v0'; there are" in err


def test_interrupted_training_can_be_resumed(capsys, tmp_path, monkeypatch):
    def worlds(env_id, *rest):
        pair = interrupted_pair(at=10)
        return type(pair)(env_id, pair.train, pair.test)

    monkeypatch.setattr(runner, "load_worlds", worlds)
    code, out, _ = kuaifair(capsys, *TRAIN, "-o", "run", "--set", "n_steps=4")
    assert code == 130 and "after 80 of 256 steps" in out and "--resume run.partial" in out
    code, _, err = kuaifair(capsys, "evaluate", "run.partial")
    assert code == 2 and "was interrupted" in err
    monkeypatch.setattr(runner, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    code, out, err = kuaifair(capsys, "train", "--resume", "run.partial", "--no-progress")
    assert code == 0, err
    assert load_run(tmp_path / "run").result["resumed_at"] == 80


def test_the_package_is_light_and_threads_are_left_alone():
    """Importing sets no thread count and loads neither torch nor Stable-Baselines3, nor does asking for help."""
    code = (
        "import sys, hrl_policies, hrl_policies.cli.main, hrl_policies.zoo, hrl_policies.common\n"
        "print([name for name in ('torch', 'stable_baselines3', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_demo_shows_agents_beside_all_controls_and_says_what_that_means(capsys, tmp_path, monkeypatch):
    import hrl_policies.cli.demo as demo

    monkeypatch.setattr(demo, "load_worlds", lambda env_id: small_pair(name=env_id))
    code, out, err = kuaifair(capsys, "demo", "--steps", "128", "--output", "kept", "--no-progress")
    assert code == 0, err
    for name in (
        "A2C",
        "A2C + profile",
        "A2C + noise",
        "HRL",
        "DSRM-HRL",
        "DSRM-HRL + noise",
        "Random",
        "PopOnly",
        "TailOnly",
        "GreedyCTR",
        "QuotaGreedy",
        "QuotaGreedy + profile",
        "SessionQuota",
        "SessionQuota + noise",
        "QualityOracle †",
    ):
        assert f"\n{name} " in out
    assert "What it does not show" in out
    assert len(list((tmp_path / "kept").glob("KuaiFair-Toy-v0/*/result.json"))) == 2 + len(controls()) + 2 * 4
    assert (tmp_path / "kept" / "kuaifair-demo.png").read_bytes().startswith(b"\x89PNG")
