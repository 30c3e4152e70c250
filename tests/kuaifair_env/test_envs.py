"""The three environment forms keep the contracts of Gymnasium and SB3 and play the same sessions."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from helpers import small_world
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.evaluation import evaluate
from kuaifair_env.observations import state_of
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.vector_env import KuaiFairVectorEnv

WORLD = small_world(candidates=45)
MODES = [
    SessionConfig(
        max_len=8,
        action_mode=action,
        observation_mode=observation,
        slate_size=None if action == "item" else 5,
    )
    for action in ("embedding", "slate", "item")
    for observation in ("state", "history")
]
FILLED = SessionConfig(max_len=6, action_mode="slate", slate_size=5, duplicates="replace")
MODES.append(FILLED)
MODES += [replace(config, session_clock=True) for config in MODES[2:4]]
SLATES = SessionConfig(max_len=8, action_mode="slate", slate_size=5)


def name_of(config):
    return f"{config.action_mode}-{config.observation_mode}{'-clock' * config.session_clock}"


@pytest.mark.parametrize("config", MODES, ids=name_of)
def test_both_checkers_pass_without_warnings(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(KuaiFairEnv(WORLD, config, render_mode="ansi"), skip_render_check=True)
        sb3_check_env(KuaiFairEnv(WORLD, config), warn=True)


def pickle_copy(env):
    return pickle.loads(pickle.dumps(env))


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return np.array_equal(one, other)


def row_of(stacked, row):
    return {key: part[row] for key, part in stacked.items()} if isinstance(stacked, dict) else stacked[row]


@pytest.mark.parametrize("config", MODES, ids=name_of)
def test_the_vector_env_plays_what_single_envs_play(config):
    vector = KuaiFairVectorEnv(WORLD, config, num_envs=5)
    singles = [KuaiFairEnv(WORLD, config) for _ in range(5)]
    observations, _ = vector.reset(seed=40)
    for row, env in enumerate(singles):
        assert same(env.reset(seed=40 + row)[0], row_of(observations, row))
    vector.action_space.seed(1)
    over = [False] * 5
    for _ in range(25):
        actions = vector.action_space.sample()
        observations, rewards, terminated, truncated, infos = vector.step(actions)
        assert vector.observation_space.contains(observations)
        for row, env in enumerate(singles):
            if over[row]:
                single = (env.reset()[0], 0.0, False, False)
            else:
                *single, info = env.step(actions[row])
                np.testing.assert_array_equal(info["items"], infos["items"][row])
                assert info["temper"] == infos["temper"][row]
                if single[2]:
                    assert info["session"]["len"] == infos["session"]["len"][row]
                    assert info["session"]["gini"] == pytest.approx(infos["session"]["gini"][row])
            assert same(single[0], row_of(observations, row))
            assert (single[1], single[2], single[3]) == (rewards[row], terminated[row], truncated[row])
            over[row] = single[2] or single[3]


def assert_says(infos, reference, num_envs):
    """Both say the same of the same rows; rows that a mask leaves out hold nothing."""
    for name in {key.lstrip("_") for key in infos} | {key.lstrip("_") for key in reference}:
        mask = infos.get(f"_{name}", np.zeros(num_envs, np.bool_))
        np.testing.assert_array_equal(mask, reference.get(f"_{name}", np.zeros(num_envs, np.bool_)), name)
        if not mask.any():
            continue
        if isinstance(infos[name], dict):
            assert_says(infos[name], reference[name], num_envs)
        elif name == "final_obs":
            assert all(same(infos[name][row], reference[name][row]) for row in np.flatnonzero(mask))
        elif infos[name].dtype == object:
            assert infos[name][mask].tolist() == reference[name][mask].tolist()
        else:
            np.testing.assert_allclose(infos[name][mask], reference[name][mask], err_msg=name)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("config", MODES[1:3], ids=name_of)
def test_the_vector_env_keeps_gymnasiums_own_contract(config, mode):
    ours = KuaiFairVectorEnv(WORLD, config, num_envs=4, autoreset_mode=mode)
    theirs = gym.vector.SyncVectorEnv([lambda: KuaiFairEnv(WORLD, config)] * 4, autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"]
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space

    def reset(seed, mask=None):
        options = ({}, {}) if mask is None else ({"reset_mask": mask}, {"reset_mask": mask.copy()})
        (one, infos), (other, reference) = (
            env.reset(seed=seed, options=chosen) for env, chosen in zip((ours, theirs), options, strict=True)
        )
        assert same(one, other)
        assert_says(infos, reference, 4)

    reset(3)
    ours.action_space.seed(8)
    ended = 0
    for step in range(40):
        actions = ours.action_space.sample()
        one, reward, terminated, truncated, infos = ours.step(actions)
        other, *reference = theirs.step(actions)
        assert same(one, other)
        for mine, their in zip((reward, terminated, truncated), reference[:3], strict=True):
            np.testing.assert_array_equal(mine, their)
        assert_says(infos, reference[3], 4)
        over = terminated | truncated
        ended += over.sum()
        if mode is AutoresetMode.DISABLED and over.any():
            # Some rows are seeded anew, some go on with their own stream; rows that still run are left alone.
            reset([step, None, step + 1, None], over)
    assert ended > 8
    reset([None, 5, None, 6])
    reset(None)


def test_the_sb3_env_and_the_same_step_vector_env_play_the_same_sessions():
    vector = KuaiFairVectorEnv(WORLD, SLATES, num_envs=4, autoreset_mode=AutoresetMode.SAME_STEP)
    sb3 = KuaiFairVecEnv(WORLD, SLATES, n_envs=4, seed=9)
    first, _ = vector.reset(seed=9)
    np.testing.assert_array_equal(first, sb3.reset())
    vector.action_space.seed(2)
    ended = 0
    for _ in range(30):
        actions = vector.action_space.sample()
        observation, reward, terminated, truncated, infos = vector.step(actions)
        other, other_reward, done, other_infos = sb3.step(actions)
        np.testing.assert_array_equal(observation, other)
        np.testing.assert_allclose(reward, other_reward, rtol=1e-6)
        np.testing.assert_array_equal(terminated | truncated, done)
        for row in np.flatnonzero(done):
            ended += 1
            np.testing.assert_array_equal(infos["final_obs"][row], other_infos[row]["terminal_observation"])
            assert infos["final_info"]["session"]["r_cum"][row] == other_infos[row]["session"]["r_cum"]
            assert not np.array_equal(other[row], other_infos[row]["terminal_observation"])
            episode = other_infos[row]["episode"]
            assert episode["l"] == other_infos[row]["session"]["len"]
            assert episode["r"] == pytest.approx(other_infos[row]["session"]["r_cum"])
            assert other_infos[row]["TimeLimit.truncated"] is False
    assert ended > 8


@pytest.mark.parametrize(
    "env", [KuaiFairEnv(WORLD, SLATES), KuaiFairVectorEnv(WORLD, SLATES, 3), KuaiFairVecEnv(WORLD, SLATES, 3)]
)
def test_the_text_of_an_environment_says_how_sessions_run_and_where(env):
    text = repr(env)
    assert len(text) < 1_000
    world = ("45 candidates", "small", str(WORLD.fingerprint))
    for fact in (type(env).__name__, "max_len=8", "action_mode='slate'", *world):
        assert fact in text


def test_the_same_seed_gives_the_same_trajectory_and_another_seed_another():
    def trajectory(seed):
        env = KuaiFairEnv(WORLD, SLATES)
        env.reset(seed=seed)
        env.action_space.seed(0)
        return [env.step(env.action_space.sample())[1] for _ in range(3)], env.batch.simulator.users[0]

    assert trajectory(3) == trajectory(3)
    assert len({trajectory(seed)[1] for seed in range(12)}) > 5


def test_trajectories_are_pinned_across_platforms():
    env = KuaiFairEnv(small_world(0.5), SLATES)
    _, info = env.reset(seed=11)
    rewards = [round(env.step(np.arange(5) + step)[1], 3) for step in range(3)]
    assert (info["user_id"], rewards) == PINNED


PINNED = (70, [0.4, 0.6, 0.8])


def test_an_episode_ends_with_its_record():
    env = KuaiFairEnv(WORLD, SLATES)
    env.reset(seed=0)
    rewards, shown, done = [], [], False
    while not done:
        slate = np.arange(5) + len(shown) % 3
        _, reward, terminated, truncated, info = env.step(slate)
        rewards.append(reward)
        shown.append(slate)
        done = terminated or truncated
    record = info["session"]
    counts = np.bincount(np.concatenate(shown), minlength=45)
    popular = WORLD.groups.popular[np.concatenate(shown)].mean()
    assert record["len"] == len(rewards)
    assert record["r_cum"] == pytest.approx(sum(rewards))
    assert record["r_each"] == pytest.approx(np.mean(rewards))
    assert record["ad"] == pytest.approx(abs(2 * popular - 1))
    assert record["coverage"] == pytest.approx((counts > 0).mean())
    ordered = np.sort(counts)
    ranks = np.arange(1, 46)
    assert record["gini"] == pytest.approx(((2 * ranks - 46) * ordered).sum() / (45 * ordered.sum()))
    with pytest.raises(ValueError, match="call reset"):
        env.step(slate)


def test_reset_options_choose_user_and_random_numbers():
    env = KuaiFairEnv(WORLD, SLATES)
    _, info = env.reset(seed=0, options={"user_id": 70, "session_key": 5})
    first = [env.step(np.arange(5))[1] for _ in range(3)]
    assert info["user_id"] == 70
    env.reset(options={"user_id": 70, "session_key": 5})
    assert [env.step(np.arange(5))[1] for _ in range(3)] == first
    for options, message in (
        ({"user": 1}, "user_id"),
        ({"user_id": 71}, "no sessions"),
        ({"user_id": "x"}, "integers"),
        ({"user_id": [70, 80]}, "one raw user id"),
        ({"session_key": -1}, "session_key"),
        ({"session_key": 1.5}, "session_key"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)


def test_refused_options_draw_nothing():
    env, other = KuaiFairEnv(WORLD, SLATES), KuaiFairEnv(WORLD, SLATES)
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ValueError, match="session_key"):
        env.reset(options={"session_key": "x"})
    assert env.reset()[1] == other.reset()[1]


def test_outcomes_do_not_share_memory_with_the_action():
    env = KuaiFairEnv(WORLD, SLATES)
    env.reset(seed=0)
    action = np.arange(5)
    info = env.step(action)[-1]
    action[:] = 40
    np.testing.assert_array_equal(info["items"], np.arange(5))


@pytest.mark.parametrize("make", [pickle_copy, copy.deepcopy])
def test_a_copy_plays_the_same_session(make):
    env = KuaiFairEnv(WORLD, SLATES, render_mode="ansi")
    env.reset(seed=4)
    env.step(np.arange(5))
    twin = make(env)
    for _ in range(2):
        one, other = env.step(np.arange(5)), twin.step(np.arange(5))
        assert one[1:4] == other[1:4]
        assert same(one[0], other[0])
    assert env.render() == twin.render()


def test_nothing_happens_when_an_action_is_bad():
    env = KuaiFairEnv(WORLD, SLATES)
    env.reset(seed=0)
    temper = env.batch.simulator.temper.copy()
    with pytest.raises(ValueError, match="twice"):
        env.step(np.array([1, 1, 2, 3, 4]))
    np.testing.assert_array_equal(env.batch.simulator.temper, temper)
    assert env.batch.simulator.steps[0] == 0


def test_disabled_autoreset_waits_for_the_caller():
    vector = KuaiFairVectorEnv(WORLD, SLATES, num_envs=3, autoreset_mode="Disabled")
    vector.reset(seed=0)
    done = np.zeros(3, np.bool_)
    while not done.any():
        _, _, terminated, truncated, _ = vector.step(vector.action_space.sample())
        done = terminated | truncated
    with pytest.raises(ValueError, match="reset_mask"):
        vector.step(vector.action_space.sample())
    before = vector.batch.simulator.steps.copy()
    vector.reset(options={"reset_mask": done})
    np.testing.assert_array_equal(vector.batch.simulator.steps, np.where(done, 0, before))
    vector.step(vector.action_space.sample())


def test_stepping_or_drawing_before_the_first_reset_is_a_clear_error():
    slates = np.tile(np.arange(5), (3, 1))
    for mode in AutoresetMode:
        with pytest.raises(ValueError, match="call reset"):
            KuaiFairVectorEnv(WORLD, SLATES, 3, mode).step(slates)
    with pytest.raises(ValueError, match="call reset"):
        KuaiFairVecEnv(WORLD, SLATES, 3, seed=0).step(slates)
    with pytest.raises(ValueError, match="call reset"):
        KuaiFairEnv(WORLD, SLATES, render_mode="ansi").render()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(3, np.bool_), "at least one"),
        (np.ones(2, np.bool_), r"bool \(3,\)"),
        (np.ones(3), "bool"),
        (np.array([True, False, False]), "first reset"),
    ],
)
def test_a_bad_reset_mask_is_a_clear_error(mask, message):
    with pytest.raises(ValueError, match=message):
        KuaiFairVectorEnv(WORLD, SLATES, 3).reset(options={"reset_mask": mask})


@pytest.mark.parametrize(
    "settings", [{"max_len": 8.5}, {"max_len": True}, {"slate_size": "5"}, {"leave": 5}, {"drift": True}]
)
def test_settings_of_the_wrong_type_are_clear_errors(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        KuaiFairEnv(WORLD, SessionConfig(**settings))


def test_settings_may_be_numpy_numbers():
    config = SessionConfig(max_len=np.int64(4), slate_size=np.int32(5), drift=np.float32(15), leave="never")
    assert (
        json.loads(json.dumps(config.describe()))
        == SessionConfig(max_len=4, slate_size=5, drift=15.0, leave="never").describe()
    )


def test_truncation_bootstraps_from_the_terminal_observation():
    config = SessionConfig(max_len=3, action_mode="slate", slate_size=5, leave=NeverLeave())
    sb3 = KuaiFairVecEnv(WORLD, config, n_envs=2, seed=0)
    sb3.reset()
    for step in range(3):
        _, _, done, infos = sb3.step(np.tile(np.arange(5), (2, 1)))
        assert done.all() == (step == 2)
    assert all(info["TimeLimit.truncated"] for info in infos)


def test_vec_env_methods_reach_single_sessions():
    sb3 = KuaiFairVecEnv(WORLD, SLATES, n_envs=3, seed=5)
    sb3.reset()
    windows = sb3.env_method("history_window")
    assert windows[1].items.shape == (1, 20 + 8 * 5)
    assert sb3.env_method("history_window", 20)[1].items.shape == (1, 20)
    np.testing.assert_array_equal(windows[2].items[0], sb3.history_window().items[2])
    assert sb3.get_attr("temper") == [8.0] * 3
    assert len(sb3.get_attr("user_id", indices=[0, 2])) == 2
    assert sb3.env_method("action_masks", indices=0)[0].shape == (225,)
    assert sb3.env_is_wrapped(Monitor) == [False] * 3
    sb3.seed(5)
    again = sb3.reset()
    other = KuaiFairVecEnv(WORLD, SLATES, n_envs=3, seed=5).reset()
    np.testing.assert_array_equal(again, other)


def test_vec_env_options_choose_users_and_random_numbers_once():
    sb3 = KuaiFairVecEnv(WORLD, SLATES, n_envs=3, seed=5)
    sb3.set_options([{"user_id": 70}, {}, {"user_id": 80, "session_key": 3}])
    sb3.reset()
    assert sb3.get_attr("user_id", [0, 2]) == [70, 80]
    assert [info["user_id"] for info in sb3.reset_infos] == sb3.get_attr("user_id")
    rewards = sb3.step(np.tile(np.arange(5), (3, 1)))[1]
    env = KuaiFairEnv(WORLD, SLATES)
    env.reset(options={"user_id": 80, "session_key": 3})
    assert env.step(np.arange(5))[1] == pytest.approx(rewards[2])
    sb3.reset()
    assert sb3.get_attr("user_id", [0, 2]) != [70, 80]
    sb3.set_options({"user": 1})
    with pytest.raises(ValueError, match="user_id"):
        sb3.reset()


def test_masks_of_single_sessions_are_rows_of_the_batchs():
    config = SessionConfig(max_len=4, action_mode="item", repeats="forbid", leave="never")
    sb3 = KuaiFairVecEnv(WORLD, config, n_envs=3, seed=5)
    sb3.reset()
    sb3.step(np.array([3, 4, 5]))
    masks = np.stack(sb3.env_method("action_masks"))
    np.testing.assert_array_equal(masks, sb3.batch.action_masks())
    assert [np.flatnonzero(~mask).tolist() for mask in masks] == [[3], [4], [5]]
    masks[:] = False
    assert sb3.batch.action_masks().any(), "callers get copies"


def shown_slates(env_form, config):
    """Slates that sessions of a form of the environment show, and their raw ids, when every slot names one item."""
    if env_form == "single":
        env = KuaiFairEnv(WORLD, config)
        env.reset(seed=0)
        infos = [env.step(np.full(5, 7))[-1] for _ in range(3)]
        return np.stack([info["items"] for info in infos]), np.stack([info["item_ids"] for info in infos])
    if env_form == "vector":
        vector_env = KuaiFairVectorEnv(WORLD, config, 3)
        vector_env.reset(seed=0)
        infos = vector_env.step(np.full((3, 5), 7))[-1]
        return infos["items"], infos["item_ids"]
    vec_env = KuaiFairVecEnv(WORLD, config, 3, seed=0, info_level="step")
    vec_env.reset()
    infos = vec_env.step(np.full((3, 5), 7))[-1]
    return np.stack([info["items"] for info in infos]), np.stack([info["item_ids"] for info in infos])


@pytest.mark.parametrize("repeats", ["allow", "forbid"])
@pytest.mark.parametrize("env_form", ["single", "vector", "sb3"])
def test_no_slate_shows_an_item_twice_in_any_form_of_the_environment(env_form, repeats):
    config = replace(FILLED, repeats=repeats, leave="never")
    items, item_ids = shown_slates(env_form, config)
    assert (np.sort(items, axis=1)[:, 1:] > np.sort(items, axis=1)[:, :-1]).all()
    assert items[0, 0] == 7
    np.testing.assert_array_equal(item_ids, WORLD.item_ids[items])
    if (env_form, repeats) == ("single", "forbid"):
        assert len(np.unique(items)) == items.size
    with pytest.raises(ValueError, match="twice; duplicates='replace'"):
        shown_slates(env_form, replace(config, duplicates="error"))


@pytest.mark.parametrize("repeats", ["allow", "forbid"])
def test_ppo_trains_on_slates_whose_slots_it_draws_independently(repeats):
    env = KuaiFairVecEnv(WORLD, replace(FILLED, repeats=repeats), 8, seed=0)
    shown = []
    step = env.batch.step

    def noted(actions, over=None):
        outcome = step(actions, over)
        shown.append((np.asarray(actions), outcome.items.copy()))
        return outcome

    env.batch.step = noted
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=64, n_epochs=1, seed=0).learn(256)
    actions, slates = (np.concatenate(column) for column in zip(*shown, strict=True))
    ordered = np.sort(slates, axis=1)
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert (actions != slates).any(), "nothing had to be replaced, so nothing was tested"
    assert len(evaluate(model, env, users=WORLD.user_ids[:3]).sessions) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"duplicates": "drop"}, "duplicates must be one of"),
        ({"duplicates": "replace", "action_mode": "embedding"}, "is for action_mode='slate'"),
        ({"duplicates": "replace", "action_mode": "item"}, "is for action_mode='slate'"),
    ],
)
def test_replacing_duplicates_is_a_setting_of_slates(settings, message):
    with pytest.raises(ValueError, match=message):
        SessionConfig(**settings)


def test_maskable_ppo_never_repeats_an_item():
    config = SessionConfig(max_len=6, action_mode="item", repeats="forbid")
    model = MaskablePPO("MlpPolicy", KuaiFairVecEnv(WORLD, config, 4, seed=0), n_steps=16, batch_size=16, n_epochs=1)
    model.learn(64)  # a repeated item is a ValueError


def test_histories_train_with_multi_input_policies_and_recurrent_ones_with_states():
    history = SessionConfig(max_len=6, slate_size=5, observation_mode="history")
    env = VecNormalize(KuaiFairVecEnv(WORLD, history, 4, seed=0), norm_obs_keys=["state"])
    PPO("MultiInputPolicy", env, n_steps=8, batch_size=16, n_epochs=1).learn(32)
    state = SessionConfig(max_len=6, slate_size=5)
    env = VecCheckNan(KuaiFairVecEnv(WORLD, state, 4, seed=0), raise_exception=True)
    RecurrentPPO("MlpLstmPolicy", env, n_steps=8, batch_size=16, n_epochs=1).learn(32)


def test_sb3s_own_evaluation_measures_our_sessions():
    config = SessionConfig(max_len=8, slate_size=5)
    model = A2C("MlpPolicy", VecMonitor(KuaiFairVecEnv(WORLD, config, 4, seed=0)), seed=0)
    monitored = VecMonitor(KuaiFairVecEnv(WORLD, config, 4, seed=3))
    rewards, lengths = evaluate_policy(model, monitored, 8, return_episode_rewards=True)
    assert len(rewards) == 8
    assert all(3 <= length <= 8 for length in lengths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single, _ = evaluate_policy(model, Monitor(KuaiFairEnv(WORLD, config)), 4)
        model.learn(40, callback=EvalCallback(monitored, eval_freq=5, n_eval_episodes=2, verbose=0))
    assert 0 <= single <= 8


def test_info_level_step_says_what_the_single_env_says():
    sb3 = KuaiFairVecEnv(WORLD, SLATES, n_envs=2, seed=5, info_level="step")
    sb3.reset()
    env = KuaiFairEnv(WORLD, SLATES)
    env.reset(seed=6)
    _, _, _, infos = sb3.step(np.tile(np.arange(5), (2, 1)))
    info = env.step(np.arange(5))[-1]
    assert info.keys() == infos[1].keys()
    assert all(same(info[key], infos[1][key]) for key in info)


def test_sb3_wrappers_work_on_the_native_vec_env():
    wrapped = VecNormalize(VecMonitor(KuaiFairVecEnv(WORLD, SessionConfig(max_len=8, slate_size=5), 8, seed=0)))
    model = A2C("MlpPolicy", wrapped, seed=0).learn(400)
    assert len(model.ep_info_buffer) > 0
    assert 3 <= np.mean([info["l"] for info in model.ep_info_buffer]) <= 8


def test_rendering_follows_the_session():
    text = KuaiFairEnv(WORLD, SLATES, render_mode="ansi")
    text.reset(seed=0)
    text.step(np.arange(5))
    assert str(WORLD.item_ids[3]) in text.render()
    picture = KuaiFairEnv(WORLD, SLATES, render_mode="rgb_array")
    picture.reset(seed=0)
    blank = picture.render()
    picture.step(np.arange(5))
    drawn = picture.render()
    assert drawn.dtype == np.uint8
    assert drawn.shape == blank.shape
    assert (drawn != blank).any()
    with pytest.raises(ValueError, match="render_mode"):
        KuaiFairEnv(WORLD, SLATES, render_mode="human")


OBSERVATIONS = {"state": gym.spaces.Box, "history": gym.spaces.Dict}
WRAPPERS = {
    "RecordEpisodeStatistics": gym.wrappers.RecordEpisodeStatistics,
    "TimeLimit": lambda env: gym.wrappers.TimeLimit(env, 3),
    "FlattenObservation": gym.wrappers.FlattenObservation,
    "NormalizeObservation": lambda env: gym.wrappers.NormalizeObservation(gym.wrappers.FlattenObservation(env)),
    "TransformReward": lambda env: gym.wrappers.TransformReward(env, lambda reward: 2 * reward - 1),
}


@pytest.mark.parametrize("mode", OBSERVATIONS)
@pytest.mark.parametrize("name", WRAPPERS)
def test_gymnasiums_wrappers_play_the_session_of_the_env_beneath(name, mode):
    plain = KuaiFairEnv(WORLD, replace(SLATES, observation_mode=mode))
    env = WRAPPERS[name](KuaiFairEnv(WORLD, replace(SLATES, observation_mode=mode)))
    assert isinstance(plain.observation_space, OBSERVATIONS[mode])
    observation, _ = plain.reset(seed=3)
    seen, _ = env.reset(seed=3)
    slates, done, steps = np.random.default_rng(0).permuted(np.tile(np.arange(45), (8, 1)), axis=1)[:, :5], False, 0
    while not done:
        if name == "FlattenObservation":
            np.testing.assert_array_equal(seen, gym.spaces.flatten(plain.observation_space, observation))
        assert name == "NormalizeObservation" or env.observation_space.contains(seen)
        observation, reward, left, cut, _ = plain.step(slates[steps])
        seen, got, terminated, truncated, info = env.step(slates[steps])
        steps += 1
        assert got == pytest.approx(2 * reward - 1 if name == "TransformReward" else reward)
        assert (terminated, truncated) == (left, cut or (name == "TimeLimit" and steps == 3))
        done = terminated or truncated
    assert steps == 3 if name == "TimeLimit" else steps > 3
    if name == "RecordEpisodeStatistics":
        assert info["episode"]["l"] == info["session"]["len"] == steps


@pytest.mark.parametrize("mode", OBSERVATIONS)
def test_processes_play_the_sessions_of_one_process(mode):
    makers = [lambda: KuaiFairEnv(WORLD, replace(SLATES, observation_mode=mode))] * 2
    apart, here = AsyncVectorEnv(makers), SyncVectorEnv(makers)
    assert same(apart.reset(seed=5)[0], here.reset(seed=5)[0])
    for _ in range(10):
        actions = here.action_space.sample()
        one, other = apart.step(actions), here.step(actions)
        assert all(same(left, right) for left, right in zip(one[:4], other[:4], strict=True))
    apart.close()


VEC_WRAPPERS = {
    "VecNormalize": lambda env, keys: VecNormalize(env, norm_reward=False, norm_obs_keys=keys),
    "VecFrameStack": lambda env, _: VecFrameStack(env, 2),
    "VecMonitor": lambda env, _: VecMonitor(env),
    "VecCheckNan": lambda env, _: VecCheckNan(env, raise_exception=True),
}


@pytest.mark.parametrize(
    # SB3 stacks Box alone, and a history, which is a window already, holds MultiBinary.
    ("name", "mode"),
    [(name, mode) for name in VEC_WRAPPERS for mode in OBSERVATIONS if (name, mode) != ("VecFrameStack", "history")],
)
def test_sb3s_wrappers_play_the_sessions_of_every_vec_env_beneath(name, mode):
    config = replace(SLATES, observation_mode=mode)
    makers = [lambda: KuaiFairEnv(WORLD, config)] * 2
    plain = KuaiFairVecEnv(WORLD, config, 2, seed=5)
    plain.reset()
    keys = ["state"] if mode == "history" else None
    beneath = (
        KuaiFairVecEnv(WORLD, config, 2, seed=5),
        DummyVecEnv(makers),
        SubprocVecEnv(makers, start_method="fork"),
    )
    wrapped = [VEC_WRAPPERS[name](env, keys) for env in beneath]
    for env in wrapped:
        env.seed(5)
        env.reset()
    slates = np.random.default_rng(0).permuted(np.tile(np.arange(45), (3, 2, 1)), axis=2)[:, :, :5]
    # Users have patience for three slates at least; after the first session seeds are drawn in other orders.
    for slate in slates:
        _, rewards, done, _ = plain.step(slate)
        for env in wrapped:
            observation, got, over, _ = env.step(slate)
            np.testing.assert_allclose(got, rewards, rtol=1e-6)
            np.testing.assert_array_equal(over, done)
            shapes = {key: value.shape[1:] for key, value in leaves(observation).items()}
            assert shapes == {key: space.shape for key, space in leaves(env.observation_space).items()}
    wrapped[-1].close()


def test_sessions_in_threads_are_those_of_the_main_thread():
    def play(seed):
        env = KuaiFairEnv(WORLD, SLATES)
        env.reset(seed=seed)
        return [env.step(np.arange(start, start + 5))[1] for start in (0, 5, 10)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(play, range(8))) == [play(seed) for seed in range(8)]


def leaves(observation):
    """Returns the parts of a dict of observations or spaces, or the only part."""
    if isinstance(observation, gym.spaces.Dict):
        return observation.spaces
    return observation if isinstance(observation, dict) else {"state": observation}


@pytest.mark.parametrize(("mode", "leave"), [("state", "temper"), ("history", "never")])
def test_the_session_clock_ends_the_state_and_changes_nothing_else(mode, leave):
    plain_config = SessionConfig(max_len=4, action_mode="slate", slate_size=5, observation_mode=mode, leave=leave)
    config = replace(plain_config, session_clock=True)
    plain, clocked = (KuaiFairVecEnv(WORLD, each, 6, seed=3) for each in (plain_config, config))
    slates = np.random.default_rng(0).permuted(np.tile(np.arange(45), (10, 6, 1)), axis=2)[:, :, :5]
    states, clocked_states = state_of(plain.reset()), state_of(clocked.reset())
    steps = np.zeros(6)
    ended = []
    for actions in slates:
        np.testing.assert_array_equal(clocked_states[:, :-1], states)
        np.testing.assert_allclose(clocked_states[:, -1], steps / 4, rtol=1e-6)
        states, rewards, done, infos = plain.step(actions)
        clocked_states, clocked_rewards, clocked_done, clocked_infos = clocked.step(actions)
        states, clocked_states = state_of(states), state_of(clocked_states)
        np.testing.assert_array_equal(clocked_rewards, rewards)
        np.testing.assert_array_equal(clocked_done, done)
        steps += 1
        for row in np.flatnonzero(done):
            last = state_of(clocked_infos[row]["terminal_observation"])
            np.testing.assert_array_equal(last[:-1], state_of(infos[row]["terminal_observation"]))
            assert last[-1] == steps[row] / 4
            ended.append(float(last[-1]))
        steps[done] = 0
    assert ended and (leave == "temper" or set(ended) == {1.0})


def test_an_agent_with_a_clock_is_refused_sessions_without_one():
    config = replace(SLATES, duplicates="replace", session_clock=True)
    model = A2C("MlpPolicy", KuaiFairVecEnv(WORLD, config, 4, seed=1), n_steps=4, device="cpu").learn(16)
    assert len(evaluate(model, KuaiFairEnv(WORLD, config)).sessions)
    with pytest.raises(ValueError, match="observation space"):
        evaluate(model, KuaiFairEnv(WORLD, replace(config, session_clock=False)))
    with pytest.raises(ValueError, match="session_clock must be True or False"):
        SessionConfig(session_clock="yes")
