"""Evaluation and the vector interface, with what Stable-Baselines3 and Gymnasium let users do to environments."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from sb3_contrib import MaskablePPO
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from kuaifair_env import KuaiFairEnv, evaluate, make_sb3

ID = "KuaiFair-Toy-v0"


@pytest.fixture(scope="module")
def normalised():
    """An agent trained for a moment on normalised observations, and its environment."""
    env = VecNormalize(make_sb3(ID, 8, seed=1))
    return PPO("MlpPolicy", env, n_steps=8, n_epochs=1, seed=0).learn(64), env


def like(env, n_envs):
    """Returns sessions of the test world with the statistics of an environment."""
    test = VecNormalize(make_sb3(ID, n_envs, seed=2, split="test"))
    test.obs_rms = copy.deepcopy(env.obs_rms)
    return test


def test_case_02_evaluation_leaves_the_statistics_of_normalisation_alone(normalised):
    agent, env = normalised
    count, before = env.obs_rms.count, env.obs_rms.mean.copy()
    try:
        evaluate(agent, env, n_users=20)
        assert env.training, "the flag must be as it was"
        assert env.obs_rms.count == count
        np.testing.assert_array_equal(env.obs_rms.mean, before)
    finally:
        env.obs_rms.count, env.obs_rms.mean = count, before


def test_case_02_results_do_not_depend_on_the_number_of_sessions_at_once(normalised):
    agent, env = normalised
    first, second = (evaluate(agent, like(env, n_envs), n_users=40).summary() for n_envs in (8, 40))
    assert first["r_cum"] == pytest.approx(second["r_cum"])


def test_case_03_an_agent_that_needs_masks_can_be_evaluated():
    settings = {"action_mode": "item", "repeats": "forbid"}
    train = make_sb3(ID, 4, seed=1, **settings)
    agent = MaskablePPO("MlpPolicy", train, n_steps=8, batch_size=16, n_epochs=1, seed=0).learn(32)
    result = evaluate(agent, make_sb3(ID, 4, seed=1, split="test", **settings), n_users=8)
    assert result.engagement.length > 0


def test_case_17_a_setting_that_cannot_be_changed_is_refused_by_set_attr():
    env = make_sb3(ID, 2, seed=1, leave="never")
    with pytest.raises((AttributeError, ValueError), match="max_len"):
        env.set_attr("max_len", 10)


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ({"render_mode": "rgb_array"}, "gym.make"),
        ({"max_episode_steps": 5}, "use max_len instead"),
        ({"n_envs": 5}, "num_envs"),
    ],
)
def test_case_17_make_vec_says_what_to_use_instead_of_settings_of_single_environments(setting, instead):
    with pytest.raises((TypeError, ValueError), match=instead):
        gym.make_vec(ID, 2, **setting)


def test_case_17_make_sb3_says_how_it_calls_the_number_of_sessions():
    with pytest.raises(ValueError, match="n_envs"):
        make_sb3(ID, num_envs=2)


SETTABLE = {
    "make_sb3": lambda: make_sb3(ID, 2, seed=1, leave="never"),
    "within wrappers": lambda: VecNormalize(VecMonitor(make_sb3(ID, 2, seed=1, leave="never"))),
    "DummyVecEnv": lambda: DummyVecEnv([lambda: gym.make(ID, leave="never").unwrapped] * 2),
    "make_vec": lambda: gym.make_vec(ID, 2, leave="never"),
    "SyncVectorEnv": lambda: SyncVectorEnv([lambda: gym.make(ID, leave="never")] * 2),
}


@pytest.mark.parametrize("form", SETTABLE.values(), ids=SETTABLE)
@pytest.mark.parametrize("name", ["max_len", "leave", "slate_size"])
def test_case_17_no_form_of_the_environment_takes_a_setting_that_has_no_effect(form, name):
    env = form()
    with pytest.raises(AttributeError, match=rf"'{name}' is fixed when an environment is made.*{name}="):
        env.set_attr(name, 10)


@pytest.mark.parametrize("name", ["config", "world", "no_such_thing"])
def test_case_17_what_is_read_once_or_never_cannot_be_set_either(name):
    for form in ("make_sb3", "within wrappers", "make_vec", "SyncVectorEnv"):
        with pytest.raises(AttributeError, match=f"'{name}' is nothing that can be set"):
            SETTABLE[form]().set_attr(name, 10)


def test_case_17_attributes_of_subclasses_and_wrappers_can_be_set():
    class Coached(KuaiFairEnv):
        difficulty = 1

    world = make_sb3(ID, 1, seed=0).world
    env = SyncVectorEnv([lambda: gym.wrappers.TimeLimit(Coached(world), 7)] * 2)
    env.set_attr("difficulty", (2, 3))
    env.set_attr("_max_episode_steps", 5)
    assert env.get_attr("difficulty") == (2, 3) and env.get_attr("_max_episode_steps") == (5, 5)


def test_case_17_every_form_has_the_same_attributes_of_sessions():
    for form in SETTABLE.values():
        env = form()
        env.reset()
        assert [float(temper) for temper in env.get_attr("temper")] == [31.0, 31.0]
        assert len(set(env.get_attr("user_id"))) <= 2
        assert [config.leave for config in env.get_attr("config")] == ["never"] * 2
        call = env.call if isinstance(env, gym.vector.VectorEnv) else env.env_method
        assert [window.items.shape[0] for window in call("history_window")] == [1, 1]
        assert [mask.shape for mask in call("action_masks")] == [(env.get_attr("world")[0].n_items,)] * 2
