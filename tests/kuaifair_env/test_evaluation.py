"""An evaluation is complete sessions of a fixed list, the same for every policy, form and batch size."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import TableResponse, small_world
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize

from kuaifair_env.abandonment import CategoryBoredom, NeverLeave, TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.vector_env import KuaiFairVectorEnv

WORLD = small_world()
CONFIG = SessionConfig(max_len=10, action_mode="slate", slate_size=5)


class SameSlate:
    """Shows the same items to everyone."""

    def __init__(self, items):
        self.items = np.asarray(items)

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.tile(self.items, (len(observation), 1)), state


class FollowsTheState:
    """A slate that depends on the observation."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.argsort(observation @ WORLD.embeddings.T, axis=1, kind="stable")[:, :5], state


class CountsSteps:
    """Checks that state and episode starts are passed on as recurrent policies need them."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        state = np.zeros(len(observation)) if state is None else state
        state = np.where(episode_start, 1, state + 1)
        assert (state <= 10).all(), "no session is longer than max_len"
        return np.tile(np.arange(5), (len(observation), 1)), state


def forms():
    yield KuaiFairEnv(WORLD, CONFIG)
    yield KuaiFairVectorEnv(WORLD, CONFIG, num_envs=3)
    yield KuaiFairVecEnv(WORLD, CONFIG, n_envs=7, seed=1)
    yield gym.wrappers.RecordEpisodeStatistics(KuaiFairEnv(WORLD, CONFIG))


def test_every_form_and_batch_size_gives_the_same_result():
    results = [evaluate(FollowsTheState(), env, episodes_per_user=2) for env in forms()]
    results += [evaluate(FollowsTheState(), KuaiFairEnv(WORLD, CONFIG), None, 2, n_envs=size) for size in (1, 13, 500)]
    for result in results[1:]:
        assert result.summary() == pytest.approx(results[0].summary())
        np.testing.assert_array_equal(result.sessions.user_ids, results[0].sessions.user_ids)
        np.testing.assert_array_equal(result.sessions.length, results[0].sessions.length)
    assert len(results[0].sessions) == 2 * len(WORLD.users)


class Negate(gym.ObservationWrapper):
    def observation(self, observation):
        return -observation


def test_wrappers_that_change_observations_are_run_and_not_skipped():
    plain = evaluate(FollowsTheState(), KuaiFairEnv(WORLD, CONFIG), WORLD.user_ids[:8])
    wrapped = evaluate(FollowsTheState(), Negate(KuaiFairEnv(WORLD, CONFIG)), WORLD.user_ids[:8])
    twice = evaluate(FollowsTheState(), Negate(Negate(KuaiFairEnv(WORLD, CONFIG))), WORLD.user_ids[:8])
    assert wrapped.summary() != plain.summary()
    assert twice.summary() == pytest.approx(plain.summary())


def test_wrappers_that_cut_sessions_short_are_refused():
    with pytest.raises(ValueError, match="complete sessions"):
        evaluate(FollowsTheState(), gym.wrappers.TimeLimit(KuaiFairEnv(WORLD, CONFIG), 2))
    longer = gym.wrappers.TimeLimit(KuaiFairEnv(WORLD, CONFIG), 50)
    assert len(evaluate(FollowsTheState(), longer, WORLD.user_ids[:3]).sessions) == 3


class ResetsEarly(VecEnvWrapper):
    def reset(self):
        return self.venv.reset()

    def step_wait(self):
        self.venv.step_wait()
        return self.reset(), np.zeros(self.num_envs), np.ones(self.num_envs, np.bool_), [{}] * self.num_envs


def test_vec_wrappers_that_replace_running_sessions_are_refused():
    with pytest.raises(ValueError, match="complete sessions"):
        evaluate(FollowsTheState(), ResetsEarly(KuaiFairVecEnv(WORLD, CONFIG, 4, seed=0)))


def test_a_seed_that_waits_for_the_reset_does_not_replace_the_list_of_sessions():
    plain = evaluate(FollowsTheState(), KuaiFairVecEnv(WORLD, CONFIG, 4, seed=0))
    env = KuaiFairVecEnv(WORLD, CONFIG, 4, seed=0)
    env.seed(3)
    assert evaluate(FollowsTheState(), env).summary() == plain.summary()
    first = env.reset()
    np.testing.assert_array_equal(first, KuaiFairVecEnv(WORLD, CONFIG, 4, seed=3).reset())


def test_figures_agree_with_the_records_and_with_the_length_formula():
    result = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, CONFIG), episodes_per_user=20)
    frame = result.frame()
    assert result.summary()["len"] == pytest.approx(frame["len"].mean())
    assert result.summary()["r_each"] == pytest.approx(frame["r_cum"].sum() / frame["len"].sum())
    assert result.summary()["r_cum"] == pytest.approx(result.summary()["r_each"] * result.summary()["len"])
    popular = WORLD.groups.popular[:5].mean()
    assert result.summary()["signed_gap"] == pytest.approx(2 * popular - 1)
    assert result.summary()["coverage"] == pytest.approx(5 / 50)
    floor, ceiling = result.length_range
    assert floor <= result.predicted_length <= ceiling
    # At temper 10 the distribution's constant of one half is good to about a third of a step.
    assert result.summary()["len"] == pytest.approx(result.predicted_length, abs=0.35)


def test_the_text_of_a_result_has_the_headline_figures_and_their_provenance():
    result = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, CONFIG), seed=5)
    text = repr(result)
    assert len(text) < 1_000
    summary = result.summary()
    for name in ("len", "r_each", "r_cum", "ad", "violation_rate"):
        assert f"{name} {summary[name]:.4f}" in text
    for fact in ("40 sessions", "small", "split='test'", WORLD.data.data_hash, "seed 5", "max_len 10"):
        assert fact in text
    assert len(repr(result.sessions)) < 100


def test_the_true_reward_of_a_constant_slate_is_the_mean_of_the_table():
    everyone = evaluate(SameSlate([3, 9, 20, 31, 44]), KuaiFairEnv(WORLD, CONFIG), episodes_per_user=60)
    steps = everyone.sessions.length
    expected = WORLD.response.table[:, [3, 9, 20, 31, 44]].mean(axis=1)
    per_user = np.repeat(expected, 60)
    assert everyone.engagement.reward_per_step == pytest.approx((per_user * steps).sum() / steps.sum(), abs=0.01)


def test_policies_meet_the_same_random_numbers():
    one = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, CONFIG), seed=5)
    same = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, CONFIG), seed=5)
    other = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, CONFIG), seed=6)
    np.testing.assert_array_equal(one.sessions.return_, same.sessions.return_)
    assert (one.sessions.return_ != other.sessions.return_).any()


def test_recurrent_state_is_passed_on():
    assert len(evaluate(CountsSteps(), KuaiFairVecEnv(WORLD, CONFIG, 4, seed=0)).sessions) == 40


def test_ranking_quality_of_the_best_slate_is_one():
    class Best:
        def bind(self, batch):
            self.batch = batch

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.argsort(-self.batch.simulator.expected_catalogue(), axis=1)[:, :5], state

    env = KuaiFairVecEnv(WORLD, CONFIG, 8, seed=0)
    assert evaluate(Best(), env, ranking=True).ndcg == pytest.approx(1.0)
    assert evaluate(SameSlate([0, 1, 2, 3, 4]), env, ranking=True).ndcg < 0.95


def test_the_environments_own_sessions_go_on_afterwards():
    env = KuaiFairVecEnv(WORLD, CONFIG, 3, seed=4)
    first = env.reset()
    evaluate(SameSlate([0, 1, 2, 3, 4]), env)
    env.seed(4)
    np.testing.assert_array_equal(env.reset(), first)


def test_normalised_observations_come_from_the_wrapper():
    wrapped = VecNormalize(KuaiFairVecEnv(WORLD, CONFIG, 4, seed=0), training=False)
    assert len(evaluate(FollowsTheState(), wrapped).sessions) == 40


LAWFUL = {
    "temper": TemperFairness(),
    "no_fairness": TemperFairness(unfair_penalty=0.0),
    "half a penalty": TemperFairness(unfair_penalty=0.5),
    "grace": TemperFairness(grace_steps=4),
    "window": TemperFairness(window=3),
    "only_popular": TemperFairness(mode="popular_only"),
}


@pytest.mark.parametrize("name", LAWFUL)
@pytest.mark.parametrize("slate", [range(5), range(20, 30), [0, 1, 2, 30, 31, 32]])
def test_the_predicted_length_is_the_true_one_for_every_rule_it_is_printed_for(name, slate):
    config = SessionConfig(max_len=30, action_mode="slate", slate_size=len(slate), leave=LAWFUL[name])
    result = evaluate(SameSlate(slate), KuaiFairEnv(WORLD, config), episodes_per_user=20)
    summary = result.summary()
    assert summary["len_predicted"] == pytest.approx(summary["len"], rel=0.02)
    assert summary["len_floor"] <= summary["len_predicted"] + 1e-9 <= summary["len_ceiling"] + 2e-9
    assert (summary["len_floor"] == summary["len_ceiling"]) == (name == "no_fairness")


class Ratios(TableResponse):
    """Feedback is the table itself, as watch ratios are."""

    def feedback(self, expected, uniforms):
        return expected


@pytest.mark.parametrize(("least", "most"), [(0.0, 1.9), (-1.0, 0.5), (0.5, 5.0), (2.0, 5.0), (-3.0, -1.0)])
def test_feedback_beyond_0_and_1_is_measured_like_any_other(least, most):
    table = np.random.default_rng(3).uniform(least, most, (40, 50))
    world = replace(WORLD, response=Ratios(table))
    config = SessionConfig(max_len=30, action_mode="slate", slate_size=5)
    result = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(world, config))
    assert result.summary()["r_each"] == pytest.approx(
        np.average(table[:, :5].mean(axis=1), weights=result.sessions.length), rel=1e-4
    )
    if result.sessions.left.all():
        assert result.summary()["len_predicted"] == pytest.approx(result.summary()["len"], abs=0.5)
    else:
        assert most > 2.0 and "len_predicted" not in result.summary()
    assert result.table() and repr(result)


@pytest.mark.parametrize(
    "leave", [NeverLeave(), TemperFairness(unfair_penalty=3.0), TemperFairness(initial_temper=50.0), CategoryBoredom()]
)
def test_no_length_is_predicted_where_the_law_does_not_hold(leave):
    config = SessionConfig(max_len=8, action_mode="slate", slate_size=5, leave=leave)
    result = evaluate(SameSlate([0, 1, 2, 3, 4]), KuaiFairEnv(WORLD, config))
    assert result.predicted_length is None
    assert "len_predicted" not in result.summary()
    assert result.table()


def test_foreign_environments_and_unknown_users_are_clear_errors():
    with pytest.raises(TypeError, match="KuaiFair environment"):
        evaluate(SameSlate([0]), gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="make_sb3"):
        evaluate(SameSlate([0]), DummyVecEnv([lambda: gym.make("CartPole-v1")]))
    with pytest.raises(ValueError, match="no sessions"):
        evaluate(SameSlate([0]), KuaiFairEnv(WORLD, CONFIG), users=[5])
    with pytest.raises(ValueError, match="at least one"):
        evaluate(SameSlate([0]), KuaiFairEnv(WORLD, CONFIG), users=[])
    with pytest.raises(ValueError, match="integers"):
        evaluate(SameSlate([0]), KuaiFairEnv(WORLD, CONFIG), users=["70"])
    with pytest.raises(ValueError, match="episodes_per_user"):
        evaluate(SameSlate([0]), KuaiFairEnv(WORLD, CONFIG), episodes_per_user=0)
