"""Methods of the zoo serve: they learn as they were trained, go on after a stop, and the command says what came out."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from purifiers import WindowPurifier
from small_worlds import small_pair
from stable_baselines3.common.base_class import BaseAlgorithm

import hrl_policies.study.serving as study_serving
from dsrm.belief import BeliefScales
from dsrm.belief_purifier import BeliefPurifier
from dsrm.own_level import OwnScales
from dsrm.purifier import save_purifier
from hrl_policies.study import (
    PurifierIdentity,
    evaluate_run,
    load_policy,
    load_run,
    plan_run,
    purifier_of,
    train,
)
from hrl_policies.study.curves import draw_serving
from hrl_policies.study.loading import build_policy
from hrl_policies.study.serving import sessions_like_its_own
from hrl_policies.study.submission import read_submission
from kuaifair_env import serve
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import write_checksums
from kuaifair_env.served_sessions import Service

OFF_POLICY = {"learning_starts": 16, "batch_size": 16, "buffer_size": 200, "gradient_steps": 1}
ON_POLICY = {"n_steps": 8, "batch_size": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "hrl": ON_POLICY,
    "a2c+fair": {"n_steps": 4},
    "mofir": OFF_POLICY,
    "dnair": OFF_POLICY,
    "sac4ir": OFF_POLICY,
}
SESSION = SessionConfig(max_len=8)


def agent_and_sessions(name: str) -> tuple[Any, Any]:
    pair = small_pair()
    config = plan_run(name, "small", total_steps=64, n_envs=4, overrides=SETTINGS.get(name), session=SESSION)
    agent = build_policy(config, pair)
    if isinstance(agent, BaseAlgorithm):
        agent.learn(64)
    return agent, sessions_like_its_own(agent, config, pair, None, 4)


def interrupted_at(call: int, function: Any) -> Any:
    """A function that is interrupted when it is called for this time."""
    calls = itertools.count(1)

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_methods_learn_while_they_serve_and_go_on_after_a_stop(name, tmp_path, monkeypatch):
    whole, sessions = agent_and_sessions(name)
    before = [parameter.clone() for parameter in whole.policy.parameters()]
    expected = serve(whole, sessions, sessions=40)
    assert expected.settings.learning == "gradient"
    assert any(not torch.equal(one, two) for one, two in zip(before, whole.policy.parameters(), strict=True))
    options: dict[str, Any] = {"sessions": 40, "folder": tmp_path, "checkpoint_every": 8}
    agent, sessions = agent_and_sessions(name)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Service, "record_step", interrupted_at(25, Service.record_step))
        serve(agent, sessions, **options)
    assert list(tmp_path.glob("checkpoint-*"))
    agent, sessions = agent_and_sessions(name)
    result = serve(agent, sessions, **options)
    assert result.summary() == expected.summary()
    assert np.array_equal(result.served.sessions.return_, expected.served.sessions.return_)
    for one, two in zip(agent.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
def test_a_belief_goes_on_after_a_stop(tmp_path, monkeypatch):
    agent, sessions = agent_and_sessions("belief-quota")
    expected = serve(agent, sessions, sessions=80)
    assert expected.settings.learning == "posterior"
    options: dict[str, Any] = {"sessions": 80, "folder": tmp_path, "checkpoint_every": 8}
    agent, sessions = agent_and_sessions("belief-quota")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Service, "record_step", interrupted_at(50, Service.record_step))
        serve(agent, sessions, **options)
    agent, sessions = agent_and_sessions("belief-quota")
    assert serve(agent, sessions, **options).summary() == expected.summary()


@pytest.mark.parametrize(("name", "reason"), [("bcq", "transitions alone"), ("session-quota", "nothing to learn with")])
def test_methods_that_cannot_learn_while_serving_are_frozen(name, reason):
    pair = small_pair()
    overrides = None if name == "session-quota" else {"data.transitions": 100}
    config = plan_run(name, "small", total_steps=4, n_envs=4, overrides=overrides, session=SESSION)
    agent = build_policy(config, pair)
    result = serve(agent, sessions_like_its_own(agent, config, pair, None, 4), sessions=10, evaluate_others=False)
    assert result.settings.learning == "frozen"
    assert reason in result.settings.reason


def test_purified_agents_are_shown_purified_states():
    pair = small_pair()
    config = plan_run("a2c", "small", total_steps=64, n_envs=4, overrides={"n_steps": 4}, session=SESSION)
    purifier = WindowPurifier()
    agent = build_policy(config, pair, purifier)
    sessions = sessions_like_its_own(agent, config, pair, purifier, 4)
    assert serve(agent, sessions, sessions=20).settings.learning == "gradient"


@pytest.fixture
def undrawn(monkeypatch):
    """Curves are not drawn; ``test_a_control_serves_in_several_orders_and_is_written_down`` looks at one."""
    monkeypatch.setattr(study_serving, "draw_serving", lambda *rest: None)


SERVE = ["--sessions", "40", "--n-envs", "4", "--no-progress"]
TOY = ["--env", "KuaiFair-Toy-v0"]


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds", "undrawn")
def test_an_agent_that_sees_a_belief_is_trained_kept_evaluated_and_serves(kuaifair, tmp_path):
    save_purifier(BeliefPurifier.closed_form(small_pair().train), "prior.safetensors")
    session = ["--max-len", "4", "--slate-size", "3", "--steps", "320", "--n-envs", "8", "--no-progress"]
    session += ["--randomisation", "{min_block: 200, max_block: 200}"]
    purified = ["--purifier", "prior.safetensors", "--set", "n_steps=4"]
    code, _, err = kuaifair("train", "-m", "a2c", *TOY, *session, *purified, "-o", "run")
    assert code == 0, err
    assert {"model.zip", "purifier.safetensors", "belief.safetensors"} <= {path.name for path in Path("run").iterdir()}
    assert load_run("run").config.purifier.name == "belief"
    learned = purifier_of(load_run("run")).belief(small_pair().test)
    # What was learned of a block of the randomised training world stays there.
    assert learned.sessions > 40 and not learned.shared.weights.any()
    config, pair = load_run("run").config, small_pair(name="KuaiFair-Toy-v0")
    again = evaluate_run(config, load_policy(load_run("run"), pair), pair, purifier_of(load_run("run")))
    assert again.summary() == pytest.approx(load_run("run").summary)
    learnings = {"--frozen": "frozen", "--fixed-weights": "posterior", "--progress": "gradient and posterior"}
    for option, learning in learnings.items():
        folder = f"out{len(learning)}"
        code, _, err = kuaifair("serve", "run", *SERVE, option, "--orders", "1", "-o", folder)
        assert code == 0, err
        summary = json.loads(Path(folder, "summary.json").read_text())
        assert (summary["learning"], summary["sessions"]) == (learning, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("flat", ON_POLICY),
        ("dnair", OFF_POLICY),
        ("bcq", {"data.transitions": 100, "data.source": "env_behaviour"}),
    ],
)
def test_methods_of_every_kind_take_a_belief(name, overrides, tmp_path):
    pair = small_pair()
    save_purifier(BeliefPurifier.closed_form(pair.train), tmp_path / "prior.safetensors")
    identity, session = PurifierIdentity.of_file(tmp_path / "prior.safetensors"), SessionConfig(max_len=6, slate_size=3)
    config = plan_run(name, "small", total_steps=64, n_envs=4, overrides=overrides, purifier=identity, session=session)
    assert train(config, pair, purifier=tmp_path / "prior.safetensors").complete
    if name == "bcq":
        from_log = replace(config, hyperparameters=config.hyperparameters | {"data": {"transitions": 100}})
        with pytest.raises(TypeError, match="not from the log"):
            train(from_log, pair, purifier=tmp_path / "prior.safetensors")


def test_a_run_folder_with_anothers_belief_is_refused(tmp_path):
    pair = small_pair()
    prior, other = (tmp_path / f"{name}.safetensors" for name in ("prior", "other"))
    save_purifier(BeliefPurifier.closed_form(pair.train), prior)
    save_purifier(BeliefPurifier.closed_form(pair.train, BeliefScales(OwnScales(taste=0.3))), other)
    identity = PurifierIdentity.of_file(prior)
    config = plan_run("a2c", "small", total_steps=64, n_envs=4, purifier=identity, session=SESSION)
    train(config, pair, purifier=prior, output=tmp_path / "run")
    other.replace(tmp_path / "run/belief.safetensors")
    with pytest.raises(ArtifactError, match=r"belief\.safetensors was altered after it was written"):
        purifier_of(load_run(tmp_path / "run"))
    write_checksums(tmp_path / "run")
    with pytest.raises(ArtifactError, match="files of two runs"):
        purifier_of(load_run(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds")
def test_a_control_serves_in_several_orders_and_is_written_down(kuaifair, tmp_path):
    command = ["serve", "session-quota", *TOY, *SERVE, "--orders", "3", "--max-len", "8", "-o", "out"]
    code, out, err = kuaifair(*command)
    assert code == 0, err
    words = " ".join(out.split())
    for text in ("SessionQuota in small (own data), Max Len 8", "R_cum", "40 sessions of 12 users, 4 at a time",
                 "frozen (it has nothing to learn with while serving)",
                 "Orders: 3, seeds: 1; 95 % intervals over them."):  # fmt: skip
        assert text in words
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["orders"] == [0, 1, 2]
    assert summary["command"].startswith("kuaifair serve session-quota")
    assert summary["means"]["r_cum"] == pytest.approx(np.mean([run["r_cum"] for run in summary["runs"]]))
    assert summary["world"]["data"]["hash"]
    with (tmp_path / "out/curve.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["order"] for row in rows} == {"0", "1", "2"}
    assert rows[0].keys() == {"order", "agent_seed", "sessions", "r_cum", "len", "r_each", "ad", "violation_rate"}
    assert (tmp_path / "out/curve.png").read_bytes().startswith(b"\x89PNG")
    code, out, err = kuaifair("serve", "random", *TOY, *SERVE, "--orders", "1", "--users", "10,30", "-o", "few")
    assert code == 0, err
    assert "40 sessions of 2 users" in " ".join(out.split())
    assert "intervals" not in out, "one order has none"
    written = (tmp_path / "out/summary.json").read_bytes()
    assert kuaifair(*command)[0] == 0
    assert (tmp_path / "out/summary.json").read_bytes() == written

    code, out, err = kuaifair("study", "submit", "out", "--method", "session-quota", "-o", "out.json")
    assert code == 0, err
    (result,) = read_submission(tmp_path / "out.json").results
    # It learns nothing with users, and so it is frozen though it served.
    assert (result.protocol, result.orders, result.seeds) == ("frozen", [0, 1, 2], [None] * 3)
    assert (result.world, result.origin) == ("small", "own")
    assert result.r_cum == [run["r_cum"] for run in summary["runs"]] and (result.users, result.sessions) == (12, 40)
    code, out, err = kuaifair("study", "verify", "out", "--submission", "out.json")
    assert code == 0 and "out.json is what out holds" in out, err


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds", "undrawn")
def test_a_trained_agent_goes_on_learning_unless_it_is_frozen(kuaifair, tmp_path):
    train = ["train", "-m", "a2c", *TOY, "--steps", "64", "--n-envs", "8", "-o", "run", "--no-progress"]
    assert kuaifair(*train)[0] == 0
    code, out, err = kuaifair("serve", "run", *SERVE, "--orders", "1")
    assert code == 0, err
    assert "learning: gradient" in " ".join(out.split())
    code, out, err = kuaifair("serve", "run", *SERVE, "--orders", "1", "--order", "4", "--frozen", "-o", "frozen")
    assert code == 0, err
    assert "frozen (asked to learn nothing)" in " ".join(out.split())
    assert json.loads((tmp_path / "frozen/summary.json").read_text())["orders"] == [4]
    assert (tmp_path / "serving/KuaiFair-Toy-v0/a2c-len30-k10-seed11/order-0/result.json").exists()
    assert kuaifair(*train[:-3], "-o", "other", "--no-progress", "--seed", "12")[0] == 0
    code, out, err = kuaifair("serve", "run", "other", *SERVE, "--orders", "2", "-o", "both")
    assert code == 0, err
    assert "Orders: 2, seeds: 2" in " ".join(out.split())
    summary = json.loads((tmp_path / "both/summary.json").read_text())
    assert summary["agent_seeds"] == [11, 11, 12, 12]
    low, high = summary["intervals"]["r_cum"]
    assert low < summary["means"]["r_cum"] < high
    code, _, err = kuaifair("serve", "run", "run", *SERVE)
    assert code == 2
    assert "two of the runs have the same seed" in err
    code, _, err = kuaifair("serve", "run", "session-quota", *SERVE)
    assert code == 2
    assert "give one control, one .zip, or run folders" in err
    (tmp_path / "run/model.zip").write_bytes((tmp_path / "other/model.zip").read_bytes())
    code, _, err = kuaifair("serve", "run", *SERVE, "--orders", "1")
    assert code == 1 and "model.zip was altered after it was written" in err
    write_checksums(tmp_path / "run")
    code, _, err = kuaifair("serve", "run", *SERVE, "--orders", "1")
    assert code == 1
    assert "belongs to another run: agent_hash was" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a2c", *TOY], "has to be trained before it serves: kuaifair train --method a2c"),
        (["dsrm-hrl", *TOY], "has to be trained before it serves: kuaifair train --method dsrm-hrl"),
        (["session-quota"], "session-quota is no run folder; a control of that name needs --env"),
        (["nobody", *TOY], "no method is called 'nobody'"),
        (["run", *TOY], "leave those options out"),
        (["session-quota", *TOY, "--env-kwargs", "order=3"], "no setting 'order'"),
        (["session-quota", *TOY, "--sessions", str(10**15)], "--sessions"),
        (["session-quota", *TOY, "--orders", str(10**12)], "--orders"),
    ],
)
@pytest.mark.usefixtures("small_worlds")
def test_mistakes_are_explained(kuaifair, tmp_path, arguments, words):
    (tmp_path / "run").mkdir()
    code, out, err = kuaifair("serve", *arguments)
    assert code == 2
    assert words in err
    assert "Traceback" not in out + err


@pytest.mark.usefixtures("small_worlds", "undrawn")
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(kuaifair, monkeypatch, tmp_path):
    command = ["serve", "session-quota", *TOY, *SERVE, "--orders", "2", "--max-len", "8"]
    assert kuaifair(*command, "-o", "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Service, "record_step", interrupted_at(90, Service.record_step))
        code, out, _ = kuaifair(*command, "-o", "stopped")
    assert code == 130
    assert "Go on with: kuaifair serve session-quota" in out
    assert (tmp_path / "stopped/order-0/result.json").exists()
    assert list(tmp_path.glob("stopped/order-1/checkpoint-*"))
    assert kuaifair(*command, "-o", "stopped")[0] == 0
    whole, stopped = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "stopped"))
    assert whole["runs"] == stopped["runs"]


KILLED = """
import os, signal, sys
import hrl_policies.study.loading as loading
import hrl_policies.study.serving as study_serving
from kuaifair_env.served_sessions import Service
from small_worlds import small_pair
from hrl_policies.cli.main import main

left, record_step = int(sys.argv.pop(1)), Service.record_step

def killed(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return record_step(*arguments)

Service.record_step = killed
loading.load_worlds = lambda env_id, *rest: small_pair(name=env_id)
study_serving.draw_serving = lambda *rest: None
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds", "undrawn")
def test_a_killed_service_goes_on_to_the_same_numbers(kuaifair, tmp_path):
    command = ["serve", "session-quota", *TOY, *SERVE, "--orders", "1", "--max-len", "8", "-o"]

    def run(*arguments: str) -> int:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=tmp_path, env=environment).returncode

    assert kuaifair(*command, "whole")[0] == 0
    assert run("40", *command, "killed") == -signal.SIGKILL
    assert list(Path(tmp_path, "killed/order-0").glob("checkpoint-*"))
    assert run("0", *command, "killed") == 0
    whole, killed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    assert whole["runs"] == killed["runs"]


@pytest.mark.slow
def test_curves_of_several_agents_are_drawn_alike(tmp_path):
    results = {}
    for name in ("session-quota", "quota-greedy"):
        agent, sessions = agent_and_sessions(name)
        results[name] = [serve(agent, sessions, sessions=40, order=order, evaluate_others=False) for order in range(2)]
    for path in (tmp_path / "one.svg", tmp_path / "two.svg"):
        draw_serving(path, results)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    for text in (b"sessions served", b"session-quota", b"band: all orders"):
        assert text in drawn
