"""Runs with purified states: evaluated on what they were trained on, and whole in their folders."""

from __future__ import annotations

import numpy as np
import pytest
from worlds_for_tests import interrupted_pair, small_pair

from dsrm.baselines import IdentityPurifier, IPSPurifier, NoisePurifier
from dsrm.purifier import load_purifier, save_purifier
from hrl_policies.study import (
    PurifierIdentity,
    RunRecord,
    evaluate_run,
    load_policy,
    load_run,
    plan_run,
    result_tables,
    resume,
    train,
)
from hrl_policies.study.runner import purifier_of
from kuaifair_env.errors import ArtifactError


@pytest.fixture
def files(tmp_path):
    made = {"identity": IdentityPurifier(), "ips": IPSPurifier(), "noise": NoisePurifier(0.5, 0)}
    for name, purifier in made.items():
        save_purifier(purifier, tmp_path / f"{name}.safetensors")
    return {name: tmp_path / f"{name}.safetensors" for name in made}


def plan(path=None, **settings):
    given = {"total_steps": 1_000, "n_envs": 8, "seed": 11} | settings
    identity = None if path is None else PurifierIdentity.of_file(path)
    return plan_run("a2c", "small", overrides={"n_steps": 8}, purifier=identity, **given)


def summary(result):
    return result.evaluation.summary()


def test_the_identity_changes_nothing_and_another_purifier_does(files):
    raw = train(plan(), small_pair())
    found = {name: train(plan(path), small_pair(), purifier=path) for name, path in files.items() if name != "ips"}
    assert summary(found["identity"]) == summary(raw)
    assert summary(found["noise"]) != summary(raw)


def test_a_folder_holds_its_purifier_and_reproduces_the_result(files, tmp_path):
    result = train(plan(files["noise"]), small_pair(), purifier=files["noise"], output=tmp_path / "run")
    files["noise"].unlink()
    stored = load_run(tmp_path / "run")
    assert stored.config.purifier == PurifierIdentity("noise", stored.config.purifier.hash)
    again = evaluate_run(stored.config, load_policy(stored, small_pair()), small_pair(), purifier_of(stored))
    assert again.summary() == summary(result)
    raw = evaluate_run(stored.config, load_policy(stored, small_pair()), small_pair())
    assert raw.summary() != summary(result)


def test_an_interrupted_purified_run_goes_on_with_its_purifier(files, tmp_path):
    train(plan(files["ips"]), interrupted_pair(at=40), purifier=files["ips"], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    files["ips"].unlink()
    result = resume(tmp_path / "run.partial", small_pair())
    assert result.complete and result.config.purifier.name == "ips"
    assert load_purifier(tmp_path / "run/purifier.safetensors").describe()["kind"] == "ips"


def test_a_missing_or_a_different_purifier_is_refused(files):
    with pytest.raises(ValueError, match="needs the file of its purifier 'ips'"):
        train(plan(files["ips"]), small_pair())
    with pytest.raises(ArtifactError, match="the run names"):
        train(plan(files["ips"]), small_pair(), purifier=files["noise"])
    with pytest.raises(ValueError, match="names none"):
        train(plan(), small_pair(), purifier=files["ips"])


def test_tables_say_which_state_an_agent_saw(files):
    records = []
    for path in (None, files["noise"]):
        result = train(plan(path), small_pair(), purifier=path)
        records.append(RunRecord.of_evaluation(result.config, result.evaluation))
    (table,) = result_tables(records, "test")
    text = table.markdown()
    assert "| A2C |" in text and "| A2C + noise |" in text
    assert PurifierIdentity.of_file(files["noise"]).hash in text


def test_an_item_term_is_given_to_controls_and_agents_alike():
    pair = small_pair()
    with pytest.raises(ValueError, match="wants the item term 'log'"):
        train(plan_run("quota-greedy", "small", item_term="log"), pair)
    given = pair.given_mode("log")
    control = train(plan_run("quota-greedy", "small", item_term="log"), given)
    agent = train(plan(item_term="log"), given)
    assert control.complete and agent.complete
    assert agent.policy.action_space.shape == (pair.train.dimension + 1,)
    assert np.isfinite(list(summary(control).values())).any()
