"""Offline methods in the zoo: runs, their curves, interruptions, purified states and the data they learn from."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from small_worlds import small_pair

import hrl_policies.study.outputs as outputs
import hrl_policies.study.training as training
from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.study import (
    PurifierIdentity,
    evaluate_run,
    load_policy,
    load_run,
    plan_run,
    resume,
    run_study,
    train,
)
from hrl_policies.study.loading import build_policy
from hrl_policies.study.outputs import write_outputs
from hrl_policies.study.records import read_table
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo.methods import OfflineData
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import DataError

torch.set_num_threads(1)
SMALL = {
    "bcq": {"policy_kwargs.net_arch": [16], "policy_kwargs.action_net_arch": [16], "batch_size": 16},
    "bcq-discrete": {"policy_kwargs.net_arch": [16], "batch_size": 16},
}
METHODS = list(SMALL)


def config(name: str, overrides=None, **settings):
    given = {"total_steps": 40, "n_envs": 3, "seed": 11} | settings
    return plan_run(name, "small", overrides=SMALL[name] | (overrides or {}), **given)


@pytest.mark.parametrize("name", METHODS)
def test_a_run_writes_its_losses_as_its_curve_and_its_policy_is_found_again(name, tmp_path):
    pair = small_pair()
    result = train(config(name), pair, output=tmp_path / "run")
    assert result.steps_done == result.policy.num_timesteps == 40
    curve = read_table(tmp_path / "run" / "learning_curve.csv")
    assert [row["steps"] for row in curve] == list(range(1, 41))
    loss = "critic_loss" if name == "bcq" else "behaviour_loss"
    assert curve == result.curve and all(np.isfinite(row[loss]) for row in curve)
    stored = load_run(tmp_path / "run")
    again = evaluate_run(stored.config, load_policy(stored, small_pair()), pair)
    assert again.summary() == stored.summary
    mode = "embedding" if name == "bcq" else "slate"
    assert result.evaluation.config["action_mode"] == mode


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(name, tmp_path):
    for folder, plan in (("one", config(name)), ("two", config(name)), ("other", config(name, seed=15))):
        train(plan, small_pair(), output=tmp_path / folder)
    for file in ("learning_curve.csv", "result.json", "sessions.csv", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert (tmp_path / "one/learning_curve.csv").read_bytes() != (tmp_path / "other/learning_curve.csv").read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_goes_on(name, tmp_path, monkeypatch):
    noted = training.LossCurveCallback._collect

    def press(monitor):
        noted(monitor)
        if monitor.num_timesteps == 20:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.LossCurveCallback, "_collect", press)
    first = train(config(name), small_pair(), output=tmp_path / "run")
    assert not first.complete and 20 <= first.steps_done < 40
    stored = load_run(tmp_path / "run.partial")
    assert stored.steps_done == first.steps_done and not (tmp_path / "run.partial" / "replay.npz").exists()
    monkeypatch.setattr(training.LossCurveCallback, "_collect", noted)
    last = resume(tmp_path / "run.partial", small_pair())
    assert last.complete and last.steps_done == 40
    assert [row["steps"] for row in last.curve] == list(range(1, 41))
    assert not (tmp_path / "run.partial").exists() and load_run(tmp_path / "run").result["resumed_at"] >= 20


def test_a_resumed_run_starts_from_the_parameters_it_was_left_with(tmp_path, monkeypatch):
    noted = training.LossCurveCallback._collect

    def press(monitor):
        noted(monitor)
        if monitor.num_timesteps == 20:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.LossCurveCallback, "_collect", press)
    left = train(config("bcq"), small_pair(), output=tmp_path / "run").policy
    stored = load_run(tmp_path / "run.partial")
    model = build_policy(stored.config, small_pair(), seed_shift=stored.steps_done)
    training.restore_checkpoint(model, tmp_path / "run.partial", stored.steps_done)
    for name, value in left.policy.state_dict().items():
        assert torch.equal(value, model.policy.state_dict()[name]), name
    moments = left.policy.critic_optimizer.state_dict()["state"][0]["exp_avg"]
    assert torch.equal(moments, model.policy.critic_optimizer.state_dict()["state"][0]["exp_avg"])


@pytest.mark.slow
def test_methods_that_play_no_training_sessions_run_beside_others_and_are_tabulated_drawn_and_reported(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(outputs, "draw_study", partial(outputs.draw_study, formats=("svg",)))
    play = {"policy_kwargs.net_arch": [16], "n_steps": 2}
    plans = [config("bcq"), config("bcq-discrete")]
    plans += [plan_run("a2c", "small", seed=11, total_steps=2_560, n_envs=64, overrides=play)]
    plans += [plan_run("random", "small", seed=11)]
    records = run_study(plans, tmp_path, {"small": small_pair()}).raise_for_failures().records
    assert len(records) == 4 and all(record.summary["len"] > 1 for record in records)
    written = {path.name: path for path in write_outputs(tmp_path, records, {}, "x")}
    assert {"fig_7_learning_curves_len30.svg", "report.html"} <= set(written)
    rows = written["table_4_training_time.csv"].read_text().splitlines()
    offline = next(row for row in rows if ",BCQ," in row)
    titles = next(row for row in rows if row.startswith("world,")).split(",")
    found = dict(zip(titles, offline.split(","), strict=False))
    assert found["steps"] == "40" and found["sessions"] == "" and float(found["seconds"]) >= 0.0
    curves = re.findall(r"<!-- (.*?) -->", written["fig_7_learning_curves_len30.svg"].read_text("utf-8"))
    assert "A2C" in curves and not any("BCQ" in words for words in curves)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_purified_runs_learn_from_the_purified_log(name, tmp_path):
    purifier = IPSPurifier()
    save_purifier(purifier, tmp_path / "p.safetensors")
    plan = config(name, purifier=PurifierIdentity.of_file(tmp_path / "p.safetensors"))
    pair = small_pair()
    purified = train(plan, pair, purifier=tmp_path / "p.safetensors").policy.transitions
    plain = train(config(name), pair).policy.transitions
    assert purified.provenance["purifier"]["kind"] == purifier.describe()["kind"]
    assert not np.array_equal(purified.observations, plain.observations)
    np.testing.assert_array_equal(purified.actions, plain.actions)


@pytest.mark.parametrize("name", METHODS)
def test_data_can_come_from_a_behaviour_policy_in_the_training_world(name):
    pair = small_pair()
    seen = set()
    original = pair.train.response.expected
    pair.train.response.expected = lambda users, items, history=None: (
        seen.update(users.tolist()),
        original(users, items),
    )[1]
    overrides = {"data.source": "env_behaviour", "data.transitions": 200}
    model = build_policy(config(name, overrides), pair)
    assert model.transitions.provenance["source"] == "env_behaviour" and len(model.transitions) == 201
    assert seen <= set(range(15, 40))
    seen.clear()
    model.learn(20)
    assert not seen


def test_every_training_seed_learns_from_the_same_transitions():
    overrides = {"data.transitions": 30, "data.session_length": 3}
    first, second = (build_policy(config("bcq", overrides, seed=seed), small_pair()).transitions for seed in (11, 15))
    for name in ("observations", "actions", "rewards", "next_observations", "terminated", "truncated"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), name)


def test_single_exposures_are_cut_where_as_many_slates_would_be():
    session = SessionConfig(max_len=5, slate_size=4)
    one = build_policy(config("bcq-discrete", session=session), small_pair()).transitions
    assert {rows.stop - rows.start for rows in one.sessions} == {20}
    slates = config("bcq-discrete", {"data.exposures": "slates"}, session=session)
    found = build_policy(slates, small_pair()).transitions
    assert found.slots == 4 and found.provenance["reading"]["session_length"] == 5


def test_what_cannot_be_learned_from_is_explained():
    pair = small_pair()
    positives = replace(pair.train.data, train=replace(pair.train.data.train, positives_only=True))
    only = WorldPair("small", replace(pair.train, data=positives), replace(pair.test, data=positives))
    with pytest.raises(DataError, match="env_behaviour"):
        train(config("bcq"), only)
    overrides = {"data.source": "env_behaviour", "data.transitions": 100}
    assert train(config("bcq", overrides, total_steps=5), only).complete
    clock = SessionConfig(session_clock=True)
    assert train(config("bcq", overrides, session=clock, total_steps=5), pair).complete
    assert train(config("bcq", session=clock, total_steps=5), pair).complete
    history = SessionConfig(observation_mode="history")
    with pytest.raises(ValueError, match="observe"):
        train(config("bcq", session=history), pair)
    with pytest.raises(ValueError, match="repeats='allow'"):
        train(config("bcq-discrete", session=SessionConfig(repeats="forbid", max_len=4)), pair)
    for setting, text in (
        ({"data.source": "logs"}, "data: source must be"),
        ({"data.exposures": "all"}, "data: exposures must be"),
        ({"data.from": "log"}, "data: from is unknown; there are action_items"),
        ({"data.transitions": "many"}, "data: transitions must be a valid integer, got 'many'"),
        ({"data.session_length": 2.5}, "data: session_length must be a valid integer"),
        ({"data.seed": None}, "data: seed must be a valid integer"),
        ({"data.noise": "loud"}, "data: noise must be a valid number"),
        ({"data.session_end": "left"}, "session_end must be"),
        ({"item_head": "wide"}, "item_head must be"),
        ({"learning_starts": 3}, "DiscreteBCQ has no hyperparameter learning_starts"),
    ):
        with pytest.raises(ValueError, match=text):
            train(config("bcq-discrete", setting), pair)
    with pytest.raises(ValueError, match="data: must be a group"):
        train(config("bcq-discrete", {"data": "log"}), pair)
    with pytest.raises(ValueError, match="how many to collect"):
        OfflineData(source="env_behaviour", transitions=None)


def test_linear_heads_give_each_item_weights_of_its_own():
    model = train(config("bcq-discrete", {"item_head": "linear"}), small_pair()).policy
    assert model.policy.dimension == 0 and model.policy.values.rows.out_features == 50
    assert train(config("bcq-discrete"), small_pair()).policy.policy.dimension == 8
