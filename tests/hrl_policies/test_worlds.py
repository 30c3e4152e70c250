"""The sessions that belong to a method: its modes, its purifier from the cache, its training users.

Runs with purified states: evaluated on what they were trained on, and whole in their folders.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_worlds import interrupted_pair, small_pair

import dsrm.pretraining
import hrl_policies.zoo.registry as registry
from dsrm import VecDSRM
from dsrm.baselines import IdentityPurifier, IPSPurifier, NoisePurifier
from dsrm.purifier import load_purifier, save_purifier
from hrl_policies import make_evaluation_env, make_training_env
from hrl_policies.hrl_ppo import HierarchicalPPO
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
from hrl_policies.study.loading import purifier_of
from hrl_policies.worlds import cached_purifier, load_worlds, session_seed
from hrl_policies.zoo import load_settings
from kuaifair_env.errors import ArtifactError
from kuaifair_env.evaluation import evaluate

TOY = "KuaiFair-Toy-v0"


@pytest.fixture
def ips(tmp_path, monkeypatch):
    """The file of a purifier that the cache is said to hold; the list names the worlds it was asked for."""
    save_purifier(IPSPurifier(), tmp_path / "ips.safetensors")
    asked = []

    def cached(world, mode):
        asked.append((world.split, mode))
        return tmp_path / "ips.safetensors"

    monkeypatch.setattr(registry, "cached_purifier", cached)
    return tmp_path / "ips.safetensors", asked


def test_a_method_gets_its_modes_purifier_and_randomised_training_users(ips):
    _, asked = ips
    env = make_training_env("flat", TOY, seed=3)
    assert isinstance(env, VecDSRM) and env.purifier.describe()["kind"] == "ips"
    bottom = env.unwrapped
    assert (bottom.config.action_mode, bottom.config.observation_mode) == ("slate", "history")
    assert env.num_envs == 64
    assert bottom.world.split == "train" and bottom.world.randomisation.seed == 3
    assert make_training_env("a2c", TOY, seed=3).world.randomisation == bottom.world.randomisation
    assert make_training_env("a2c", TOY, randomisation=None).world.randomisation is None
    test = make_evaluation_env("flat", TOY, n_envs=5, max_len=50)
    assert isinstance(test, VecDSRM) and (test.num_envs, test.unwrapped.config.max_len) == (5, 50)
    assert test.unwrapped.world.split == "test"
    assert asked == [("train", "profile")] * 2, "the purifier of the test world is that of the training world"
    assert test.unwrapped.world.randomisation is None


def test_a_method_without_a_purifier_sees_states_as_they_are(ips):
    path, asked = ips
    for name, action_mode in (("a2c", "embedding"), ("hrl", "slate")):
        for make in (make_training_env, make_evaluation_env):
            env = make(name, TOY, n_envs=4)
            assert env is env.unwrapped and env.config.action_mode == action_mode
    assert not asked
    for purifier in (path, str(path), IPSPurifier()):
        for make in (make_training_env, make_evaluation_env):
            assert make("a2c", TOY, n_envs=2, purifier=purifier).purifier.describe()["kind"] == "ips"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no method is called 'a3c'"):
        make_training_env("a3c", TOY)
    with pytest.raises(ValueError, match="unknown settings"):
        make_training_env("a2c", TOY, maxlen=3)


def test_conformity_is_a_setting_of_the_test_world_alone():
    pair, usual = load_worlds("KuaiFair-Toy-v0", {"conformity": 0.5}), load_worlds("KuaiFair-Toy-v0")
    assert pair.test.response.describe()["conformity"] == 0.5
    assert pair.train is usual.train


def test_an_agent_over_these_sessions_is_the_zoo_s(ips):
    """The same class, the same sessions, the same seeds: the same weights and the same evaluation."""
    path, _ = ips
    sessions = make_training_env("flat", TOY, n_envs=8, seed=5)
    settings = load_settings("flat").hyperparameters | {"click_scorer": "fit"}
    own = HierarchicalPPO("HierarchicalPolicy", sessions, seed=5, **settings)
    own.env.seed(session_seed(5))
    own.learn(512)
    config = plan_run(
        "flat", TOY, seed=5, total_steps=512, n_envs=8, n_users=20, purifier=PurifierIdentity.of_file(path)
    )
    result = train(config, purifier=path)
    for name, tensor in result.policy.policy.state_dict().items():
        assert torch.equal(tensor, own.policy.state_dict()[name]), name
    users = np.unique(result.evaluation.sessions.user_ids)
    again = evaluate(own, make_evaluation_env("flat", TOY), users, seed=config.evaluation_seed, episodes_per_user=1)
    assert again.summary() == pytest.approx(result.evaluation.summary())


@pytest.fixture
def pretrained(monkeypatch):
    """Which worlds a purifier was pretrained in."""
    worlds = []

    def pretrain(world, config, checkpoint, progress):
        worlds.append(world)
        return IPSPurifier()

    monkeypatch.setattr(dsrm.pretraining, "pretrain", pretrain)
    return worlds


def test_the_second_call_takes_the_file_of_the_first(pretrained, tmp_path):
    world = small_pair().train
    assert cached_purifier(world, "ips", folder=tmp_path) == cached_purifier(world, "ips", folder=tmp_path)
    assert len(pretrained) == 1


def test_what_a_kill_left_beside_a_file_of_the_cache_goes_with_the_next_call(pretrained, tmp_path):
    world = small_pair().train
    path = cached_purifier(world, "ips", folder=tmp_path)
    path.with_name(path.name + ".partial").touch()
    cached_purifier(world, "ips", folder=tmp_path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_other_users_other_modes_and_other_seeds_have_files_of_their_own(pretrained, tmp_path):
    """A search leaves its validation users out: what was trained on all users must not be handed to it."""
    world = small_pair().train
    fewer = replace(world, users=world.users[::2])
    paths = {
        cached_purifier(world, "ips", folder=tmp_path),
        cached_purifier(fewer, "ips", folder=tmp_path),
        cached_purifier(world, "profile", folder=tmp_path),
        cached_purifier(world, "ips", 1, folder=tmp_path),
    }
    assert len(paths) == len(pretrained) == 4


def test_a_damaged_file_is_made_again(pretrained, tmp_path, rebuilt):
    world = small_pair().train
    path = cached_purifier(world, "ips", folder=tmp_path)
    path.write_bytes(b"damaged")
    assert cached_purifier(world, "ips", folder=tmp_path) == path
    (line,) = rebuilt()
    assert str(path) in line
    assert len(pretrained) == 2


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
    with pytest.raises(ValueError, match=r"'purified by noise \w+'.*'observed'"):
        evaluate_run(stored.config, load_policy(stored, small_pair()), small_pair())


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
