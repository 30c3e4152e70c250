"""An evaluation is complete sessions of a fixed list, the same for every policy, form and batch size."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from helpers import TableResponse, small_world
from sb3_contrib import MaskablePPO
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
)

from hrl_policies.controls import RandomSlates
from kuaifair_env.abandonment import CategoryBoredom, NeverLeave, TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import HiddenTruthError
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import evaluation_users
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
    for fact in ("40 sessions", "small", "split='test'", WORLD.data.data_hash, "seed 5", "max_len 10",
                 str(WORLD.fingerprint)):  # fmt: skip
        assert fact in text and fact in result.table()
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
        privileged = True

        def bind(self, batch):
            self.batch = batch

        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.argsort(-self.batch.simulator.expected_catalogue(), axis=1)[:, :5], state

    env = KuaiFairVecEnv(WORLD, CONFIG, 8, seed=0)
    assert evaluate(Best(), env, ranking=True).ndcg == pytest.approx(1.0)
    assert evaluate(SameSlate([0, 1, 2, 3, 4]), env, ranking=True).ndcg < 0.95
    Best.privileged = False
    with pytest.raises(HiddenTruthError, match="privileged = True"):
        evaluate(Best(), env)


def test_a_policy_is_bound_to_the_environments_own_sessions_afterwards():
    class Bound(SameSlate):
        privileged = True

        def bind(self, batch):
            self.batch = batch

    env, policy = KuaiFairVecEnv(WORLD, CONFIG, 8, seed=0), Bound([0, 1, 2, 3, 4])
    evaluate(policy, env)
    assert policy.batch is env.batch


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


def test_the_sum_of_a_slates_feedback_is_the_mean_times_its_size_and_changes_nothing_else():
    results = [
        evaluate(
            SameSlate(range(5)),
            KuaiFairEnv(WORLD, SessionConfig(max_len=12, action_mode="slate", slate_size=5, reward=form)),
        )
        for form in ("mean", "sum")
    ]
    mean, total = (result.sessions for result in results)
    np.testing.assert_allclose(total.return_, 5 * mean.return_)
    np.testing.assert_allclose(total.mean_reward, 5 * mean.mean_reward)
    np.testing.assert_array_equal(total.length, mean.length)
    figures, others = (result.summary() for result in results)
    assert others["r_each"] == pytest.approx(5 * figures["r_each"])
    same = set(figures) - {"r_each", "r_cum"}
    assert {name: others[name] for name in same} == {name: figures[name] for name in same}, "Len's law as well"


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


def doubled(observation):
    """Acts on observations alone, as a plain function."""
    return FollowsTheState().predict(observation)[0]


def vector_forms():
    """Sessions in the forms of Gymnasium and of Stable-Baselines3, none of which changes what an agent sees."""
    singles = [lambda: KuaiFairEnv(WORLD, CONFIG)] * 3
    yield DummyVecEnv(singles)
    yield VecMonitor(DummyVecEnv(singles))
    yield DummyVecEnv([lambda: Negate(Negate(KuaiFairEnv(WORLD, CONFIG)))] * 3)
    yield make_vec_env(lambda: Negate(Negate(KuaiFairEnv(WORLD, CONFIG))), n_envs=4, seed=11)
    for mode in AutoresetMode:
        yield SyncVectorEnv(singles, autoreset_mode=mode)
        yield SyncVectorEnv([lambda: Negate(Negate(KuaiFairEnv(WORLD, CONFIG)))] * 3, autoreset_mode=mode)
        yield NegateAll(NegateAll(KuaiFairVectorEnv(WORLD, CONFIG, 3, mode)))


class NegateAll(VectorWrapper):
    """A Gymnasium vector wrapper that changes observations in every autoreset mode."""

    def reset(self, *, seed=None, options=None):
        observation, info = self.env.reset(seed=seed, options=options)
        return -observation, info

    def step(self, actions):
        observation, *others = self.env.step(actions)
        return -observation, *others


@pytest.mark.parametrize("form", range(13))
def test_every_vector_form_gives_the_figures_of_the_batch(form):
    env = list(vector_forms())[form]
    batch = evaluate(FollowsTheState(), KuaiFairVecEnv(WORLD, CONFIG, 7, seed=1), episodes_per_user=2, ranking=True)
    for policy in (FollowsTheState(), doubled):
        result = evaluate(policy, env, episodes_per_user=2, ranking=True)
        assert result.summary() == pytest.approx(batch.summary())
        np.testing.assert_array_equal(result.frame(), batch.frame())


def test_vector_wrappers_are_run_and_not_skipped():
    plain = evaluate(FollowsTheState(), KuaiFairVectorEnv(WORLD, CONFIG, 3))
    assert evaluate(FollowsTheState(), NegateAll(KuaiFairVectorEnv(WORLD, CONFIG, 3))).summary() != plain.summary()


def test_recurrent_state_begins_anew_in_every_vector_form():
    for env in vector_forms():
        assert len(evaluate(CountsSteps(), env).sessions) == len(WORLD.users)


def test_sessions_in_other_processes_and_of_several_worlds_are_refused():
    env = SubprocVecEnv([lambda: KuaiFairEnv(WORLD, CONFIG)], start_method="fork")
    try:
        with pytest.raises(TypeError, match=r"other processes.*DummyVecEnv"):
            evaluate(FollowsTheState(), env)
    finally:
        env.close()
    other = SessionConfig(max_len=9, action_mode="slate", slate_size=5)
    with pytest.raises(ValueError, match="one by one"):
        evaluate(FollowsTheState(), DummyVecEnv([lambda c=c: KuaiFairEnv(WORLD, c) for c in (CONFIG, other)]))


def test_policies_that_must_know_their_sessions_say_so_where_they_cannot():
    env = DummyVecEnv([lambda: Negate(KuaiFairEnv(WORLD, CONFIG))] * 2)
    with pytest.raises(TypeError, match="make_sb3"):
        evaluate(RandomSlates(), env)
    plain = DummyVecEnv([lambda: KuaiFairEnv(WORLD, CONFIG)] * 2)
    assert evaluate(RandomSlates(), plain).summary() == evaluate(RandomSlates(), KuaiFairEnv(WORLD, CONFIG)).summary()


def test_what_is_no_policy_or_gives_too_few_actions_is_a_clear_error():
    with pytest.raises(TypeError, match="got str"):
        evaluate("ppo", KuaiFairEnv(WORLD, CONFIG))
    with pytest.raises(ValueError, match=r"shape \(1, 5\) for 7"):
        evaluate(lambda observation: np.arange(5)[None], KuaiFairVecEnv(WORLD, CONFIG, 7, seed=1))


EMBEDDING = SessionConfig(max_len=6)
NORMALISED = {
    "alone": lambda sessions: VecNormalize(sessions),
    "beneath a monitor": lambda sessions: VecMonitor(VecNormalize(sessions)),
    "above a monitor": lambda sessions: VecNormalize(VecMonitor(sessions)),
    "rewards alone": lambda sessions: VecNormalize(sessions, norm_obs=False),
    "twice": lambda sessions: VecNormalize(VecNormalize(sessions), norm_obs=False),
    "over stacked frames": lambda sessions: VecNormalize(VecFrameStack(sessions, 2)),
}


class Interrupted(BaseCallback):
    """Evaluates after every few steps, in the environment of training itself or in one like it."""

    def __init__(self, env=None):
        super().__init__()
        self.env, self.results = env, []

    def _on_step(self):
        if self.env is not None and self.n_calls % 7 == 0:
            self.results.append(evaluate(self.model, self.env, n_users=4).summary())
        return True


@pytest.mark.parametrize(
    ("sessions", "wrapped"),
    [("singles", NORMALISED["alone"]), *(("native", wrapped) for wrapped in NORMALISED.values())],
    ids=["single environments", *NORMALISED],
)
def test_training_goes_on_as_if_it_had_not_been_evaluated(sessions, wrapped):
    """Parameters, statistics and records of episodes are, bit for bit, those of a run without evaluations."""

    def run(evaluating):
        env = (
            KuaiFairVecEnv(WORLD, EMBEDDING, 4, seed=0)
            if sessions == "native"
            else make_vec_env(lambda: KuaiFairEnv(WORLD, EMBEDDING), n_envs=4, seed=0)
        )
        env = wrapped(env)
        callback = Interrupted(env if evaluating else None)
        agent = PPO("MlpPolicy", env, n_steps=16, batch_size=32, n_epochs=1, seed=0).learn(128, callback)
        returns = [(float(info["r"]), info["l"]) for info in agent.ep_info_buffer]
        flat = torch.cat([p.flatten() for p in agent.policy.parameters()]).detach().numpy()
        return flat, env.get_attr("user_id"), returns, vars(env).get("ret_rms"), callback.results

    plain, evaluated = run(False), run(True)
    np.testing.assert_array_equal(plain[0], evaluated[0])
    assert plain[1:3] == evaluated[1:3]
    if plain[3] is not None:
        assert vars(plain[3]) == vars(evaluated[3])
    assert len(evaluated[4]) == 4


def test_running_statistics_of_gymnasium_are_frozen_too():
    single = gym.wrappers.NormalizeObservation(KuaiFairEnv(WORLD, EMBEDDING))
    batch = gym.wrappers.vector.NormalizeObservation(KuaiFairVectorEnv(WORLD, EMBEDDING, 4))
    for env in (single, batch):
        for _ in range(3):
            env.reset(seed=1)
        count, mean = env.obs_rms.count, env.obs_rms.mean.copy()
        first, second = (evaluate(lambda seen: np.tanh(seen), env).summary() for _ in range(2))
        assert first == second and env.update_running_mean
        assert env.obs_rms.count == count
        np.testing.assert_array_equal(env.obs_rms.mean, mean)


def test_networks_do_not_drop_units_while_they_are_evaluated_and_go_on_doing_so_afterwards():
    class Drops(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.always_off = torch.nn.Dropout(0.5).eval()
            self.layer = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(WORLD.dimension, WORLD.dimension))

        def predict(self, observation, **_):
            with torch.no_grad():
                return self.layer(torch.as_tensor(observation)).numpy(), None

    policy, env = Drops(), KuaiFairEnv(WORLD, EMBEDDING)
    assert evaluate(policy, env).summary() == evaluate(policy, env).summary()
    assert policy.training and policy.layer[0].training and not policy.always_off.training


def test_monitors_write_no_episode_of_an_evaluation(tmp_path):
    env = make_vec_env(lambda: Negate(KuaiFairEnv(WORLD, EMBEDDING)), n_envs=2, seed=0, monitor_dir=str(tmp_path))
    evaluate(lambda seen: np.tanh(seen), env)
    assert all(len(file.read_text().splitlines()) == 2 for file in tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["item", "slate of one"])
def test_policies_that_take_masks_get_them_in_every_form(mode):
    settings = {"action_mode": "item"} if mode == "item" else {"action_mode": "slate", "slate_size": 1}
    config = SessionConfig(max_len=6, repeats="forbid", **settings)
    agent = MaskablePPO("MlpPolicy", KuaiFairVecEnv(WORLD, config, 4, seed=1), n_steps=8, batch_size=16, seed=0)
    agent.learn(32)
    forms = [
        KuaiFairEnv(WORLD, config),
        Negate(Negate(KuaiFairEnv(WORLD, config))),
        KuaiFairVectorEnv(WORLD, config, 3),
        NegateAll(NegateAll(KuaiFairVectorEnv(WORLD, config, 3))),
        KuaiFairVecEnv(WORLD, config, 3, seed=0),
        VecMonitor(KuaiFairVecEnv(WORLD, config, 3, seed=0)),
        DummyVecEnv([lambda: Negate(Negate(KuaiFairEnv(WORLD, config)))] * 3),
        SyncVectorEnv([lambda: Negate(Negate(KuaiFairEnv(WORLD, config)))] * 3),
    ]
    results = [evaluate(agent, env, n_users=8).summary() for env in forms]
    assert all(result == pytest.approx(results[0]) for result in results)
    assert evaluate(agent.predict, forms[0], n_users=8).summary() == results[0]


def test_masks_of_wrappers_and_recurrent_states_reach_a_policy_together():
    even = np.arange(WORLD.n_items) % 2 == 0

    class Remembers:
        """Shows allowed items one after another, counted by its recurrent state."""

        def predict(self, observation, state=None, episode_start=None, deterministic=False, action_masks=None):
            assert not action_masks[:, 1::2].any(), "the wrapper's masks hold"
            state = np.where(episode_start, 0, 0 if state is None else state + 1)
            return np.asarray([np.flatnonzero(mask)[0] for mask in action_masks]), state

    config = SessionConfig(max_len=6, action_mode="item", repeats="forbid", leave=NeverLeave())
    single = ActionMasker(KuaiFairEnv(WORLD, config), lambda env: env.unwrapped.action_masks() & even)
    result = evaluate(Remembers(), single, users=WORLD.user_ids[:5])
    assert result.summary()["coverage"] == pytest.approx(6 / WORLD.n_items)


def test_an_agent_of_another_shape_or_action_space_is_refused():
    agent = PPO("MlpPolicy", KuaiFairVecEnv(WORLD, EMBEDDING, 2, seed=0), n_steps=8, batch_size=8)
    with pytest.raises(ValueError, match="observation space"):
        evaluate(agent, KuaiFairEnv(WORLD, SessionConfig(max_len=6, observation_mode="history")))
    with pytest.raises(ValueError, match="observation space"):
        evaluate(agent.policy, VecFrameStack(KuaiFairVecEnv(WORLD, EMBEDDING, 2, seed=0), 2))
    with pytest.raises(ValueError, match="action space"):
        evaluate(agent, KuaiFairEnv(WORLD, CONFIG))
    assert evaluate(lambda seen: agent.predict(seen)[0], Negate(KuaiFairEnv(WORLD, EMBEDDING)))


def test_an_agent_of_normalised_observations_is_refused_where_they_are_not():
    env = VecNormalize(KuaiFairVecEnv(WORLD, EMBEDDING, 2, seed=0))
    agent = PPO("MlpPolicy", env, n_steps=8, batch_size=8)
    with pytest.raises(ValueError, match="VecNormalize"):
        evaluate(agent, KuaiFairVecEnv(WORLD, EMBEDDING, 2, seed=0))
    assert evaluate(agent, env)


def test_users_are_ids_and_n_users_is_a_number():
    env = KuaiFairEnv(WORLD, CONFIG)
    few, more = (evaluate(SameSlate(range(5)), env, n_users=n).sessions.user_ids for n in (5, 8))
    np.testing.assert_array_equal(few, evaluation_users(WORLD.user_ids, 5))
    assert set(few) < set(more)
    assert evaluate(SameSlate(range(5)), env, users=[few[3], few[0]]).sessions.user_ids.tolist() == [few[3], few[0]]
    with pytest.raises(ValueError, match="not both"):
        evaluate(SameSlate(range(5)), env, users=few, n_users=3)
    with pytest.raises(ValueError, match="n_users"):
        evaluate(SameSlate(range(5)), env, users=5)
    with pytest.raises(ValueError, match=f"user {few[0]} is named twice; name each once"):
        evaluate(SameSlate(range(5)), env, users=[few[0], few[1], few[0]])
