"""Purified observations belong to their own sessions, in every form of the environment."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env as check_gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation, NormalizeObservation, TransformObservation
from gymnasium.wrappers import vector as vector_wrappers
from helpers import small_world
from purifiers import WindowPurifier
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecMonitor, VecNormalize

from dsrm.baselines import IdentityPurifier, IPSPurifier, NoisePurifier
from dsrm.purifier import save_purifier
from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError, MismatchError
from kuaifair_env.evaluation import evaluate
from kuaifair_env.observations import state_of
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.vector_env import KuaiFairVectorEnv

WORLD = small_world(0.4)
CONFIG = SessionConfig(max_len=4, slate_size=4)
HISTORY = SessionConfig(max_len=4, slate_size=4, observation_mode="history")


def single(config: SessionConfig = CONFIG, purifier: type = WindowPurifier) -> DSRMObservationWrapper:
    return DSRMObservationWrapper(KuaiFairEnv(WORLD, config), purifier())


def vec(rows: int, config: SessionConfig = CONFIG, seed: int = 3, purifier: type = WindowPurifier) -> VecDSRM:
    return VecDSRM(KuaiFairVecEnv(WORLD, config, rows, seed=seed), purifier())


def actions(rows: int, steps: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-1, 1, (steps, rows, WORLD.dimension)).astype(np.float32)


@pytest.mark.parametrize("config", [CONFIG, HISTORY])
def test_the_checkers_of_both_libraries_pass(config):
    check_gymnasium(single(config), skip_render_check=True)
    check_sb3(single(config))


def test_single_sb3_and_vector_forms_give_the_same_states_and_last_states():
    rows, steps = 3, 12
    plan = actions(rows, steps)
    native, dummy = (
        vec(rows),
        VecDSRM(DummyVecEnv([lambda: KuaiFairEnv(WORLD, CONFIG)] * rows), WindowPurifier()),
    )
    dummy.seed(3)
    same_step = DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, CONFIG, rows, AutoresetMode.SAME_STEP), WindowPurifier())
    first = native.reset()
    np.testing.assert_array_equal(first, dummy.reset())
    np.testing.assert_array_equal(first, same_step.reset(seed=3)[0])
    ended = 0
    for step in range(steps):
        states, _, done, infos = native.step(plan[step])
        others, _, done_too, infos_too = dummy.step(plan[step])
        vector, _, terminated, truncated, info = same_step.step(plan[step])
        np.testing.assert_array_equal(states, others)
        np.testing.assert_array_equal(states, vector)
        np.testing.assert_array_equal(done, done_too)
        np.testing.assert_array_equal(done, terminated | truncated)
        for row in np.flatnonzero(done):
            ended += 1
            last = infos[row]["terminal_observation"]
            np.testing.assert_array_equal(last, infos_too[row]["terminal_observation"])
            np.testing.assert_array_equal(last, info["final_obs"][row])
            assert not np.array_equal(last, states[row])
    assert ended >= rows


def test_a_last_state_is_purified_with_the_window_of_its_own_session():
    plan = actions(1, 12)
    env, lone = vec(1), single()
    env.reset()
    lone.reset(seed=3)
    for step in range(12):
        _, _, done, infos = env.step(plan[step])
        state, _, terminated, truncated, _ = lone.step(plan[step, 0])
        if done[0]:
            assert terminated or truncated
            np.testing.assert_array_equal(infos[0]["terminal_observation"], state)
            return
    pytest.fail("no session ended")


def test_next_step_autoreset_shows_the_last_state_as_an_ordinary_one():
    env = DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, CONFIG, 2), WindowPurifier())
    lone = single()
    env.reset(seed=3)
    lone.reset(seed=3)
    plan = actions(2, 12)
    for step in range(12):
        states, _, terminated, truncated, info = env.step(plan[step])
        assert "final_obs" not in info
        state, *_ = lone.step(plan[step, 0])
        np.testing.assert_array_equal(states[0], state)
        if terminated[0] or truncated[0]:
            return
    pytest.fail("no session ended")


def test_each_state_is_purified_once_per_step_whatever_the_optimiser_does():
    env = vec(4)
    PPO("MlpPolicy", env, n_steps=8, batch_size=8, n_epochs=5, device="cpu").learn(64)
    collected = 64 + 4
    ended = env.purifier.rows - collected
    # What is beyond one purification per state are the last states of the sessions that ended.
    assert 0 < ended <= 64 / 2


def test_wrapping_under_vec_normalize_and_monitor_and_evaluating_works():
    env = VecNormalize(VecMonitor(vec(4)), norm_reward=False)
    model = A2C("MlpPolicy", env, n_steps=4, device="cpu").learn(64)

    def normalised(sessions):
        test = VecNormalize(sessions, training=False, norm_reward=False)
        test.obs_rms = env.obs_rms
        return test

    result = evaluate(model, normalised(vec(4)), episodes_per_user=1)
    alone = evaluate(model, normalised(DummyVecEnv([single])), users=WORLD.user_ids[:6])
    together = evaluate(model, normalised(vec(4)), users=WORLD.user_ids[:6])
    assert len(result.sessions) == len(WORLD.users)
    assert alone.summary() == together.summary()


def purified_forms(config, purifier=WindowPurifier):
    """The same purified sessions in every form of the environment."""
    yield single(config, purifier)
    yield vec(3, config, purifier=purifier)
    yield DummyVecEnv([lambda: single(config, purifier)] * 3)
    yield make_vec_env(lambda: single(config, purifier), n_envs=3, seed=4)
    yield VecDSRM(DummyVecEnv([lambda: KuaiFairEnv(WORLD, config)] * 3), purifier())
    for mode in AutoresetMode:
        yield DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, config, 3, mode), purifier())
        yield SyncVectorEnv([lambda: single(config, purifier)] * 3, autoreset_mode=mode)


@pytest.mark.parametrize("config", [CONFIG, HISTORY])
def test_evaluations_of_every_purified_form_agree(config):
    results = [
        evaluate(lambda seen: np.tanh(state_of(seen)[:, : WORLD.dimension]), env, users=WORLD.user_ids[:9]).frame()
        for env in purified_forms(config)
    ]
    for frame in results[1:]:
        np.testing.assert_array_equal(frame, results[0])


@pytest.mark.parametrize(("length", "places"), [(None, 20 + 4 * 4), (30, 30), (7, 7)])
def test_purifiers_get_as_many_places_as_they_take(length, places):
    class Purifier(WindowPurifier):
        history_length = length

        def purify(self, states, window):
            assert window.items.shape[1] == places
            return super().purify(states, window)

    def policy(seen):
        return np.tanh(seen[:, : WORLD.dimension] + seen[:, -1:])

    results = [evaluate(policy, env, users=WORLD.user_ids[:5]).frame() for env in purified_forms(CONFIG, Purifier)]
    for frame in results[1:]:
        np.testing.assert_array_equal(frame, results[0])


def test_agents_of_purified_states_are_refused_raw_ones_of_the_same_shape_and_bounds(tmp_path):
    purifier, raw = IPSPurifier(), KuaiFairVecEnv(WORLD, CONFIG, 2, seed=0)
    env = VecDSRM(raw, purifier)
    assert env.observation_space.shape == raw.observation_space.shape
    np.testing.assert_array_equal(env.observation_space.high, raw.observation_space.high)
    for wrapped in (env, VecNormalize(env)):
        PPO("MlpPolicy", wrapped, n_steps=8, batch_size=8).save(tmp_path / "agent")
        agent = PPO.load(tmp_path / "agent")
        for sessions in (raw, KuaiFairEnv(WORLD, CONFIG), VecMonitor(raw), VecNormalize(raw)):
            with pytest.raises(ValueError, match=r"'purified by ips \w+'.*'observed'"):
                evaluate(agent, sessions)
        with pytest.raises(ValueError, match="Observation spaces do not match"):
            PPO.load(tmp_path / "agent", env=raw)
        assert evaluate(agent, env).summary() == evaluate(agent, purified_by(purifier)).summary()
        with pytest.raises(ValueError, match="purified by noise"):
            evaluate(agent, purified_by(NoisePurifier(0.5)))
    with pytest.raises(ValueError, match=r"'observed'.*'purified by ips"):
        evaluate(PPO("MlpPolicy", raw, n_steps=8, batch_size=8), env)
    history = VecDSRM(KuaiFairVecEnv(WORLD, HISTORY, 2, seed=0), purifier)
    with pytest.raises(ValueError, match="purified by ips"):
        evaluate(PPO("MultiInputPolicy", history, n_steps=8, batch_size=8), KuaiFairEnv(WORLD, HISTORY))


def purified_by(purifier):
    return DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, CONFIG, 3), purifier)


def test_the_identity_leaves_observed_states_what_they_are():
    env = VecDSRM(KuaiFairVecEnv(WORLD, CONFIG, 2, seed=0), IdentityPurifier())
    agent = PPO("MlpPolicy", env, n_steps=8, batch_size=8)
    assert evaluate(agent, env).summary() == evaluate(agent, KuaiFairEnv(WORLD, CONFIG)).summary()


@pytest.mark.parametrize("mode", ["item", "slate"])
def test_masks_reach_maskable_agents_through_purifiers(mode):
    config = SessionConfig(max_len=4, action_mode=mode, slate_size=1, repeats="forbid")
    agent = MaskablePPO("MlpPolicy", vec(4, config), n_steps=8, batch_size=16, seed=0).learn(32)
    results = [evaluate(agent, env, users=WORLD.user_ids[:9]).frame() for env in purified_forms(config)]
    for frame in results[1:]:
        np.testing.assert_array_equal(frame, results[0])


def test_other_kinds_of_agents_train_on_purified_states():
    items = SessionConfig(max_len=4, action_mode="item")
    model = DQN("MlpPolicy", vec(2, items), learning_starts=8, device="cpu").learn(64)
    assert model.predict(vec(2, items).reset())[0].shape == (2,)


def test_a_wrong_world_or_environment_is_an_error_that_says_so():
    other = WindowPurifier(dimension=3)
    for wrap in (
        lambda: DSRMObservationWrapper(KuaiFairEnv(WORLD, CONFIG), other),
        lambda: VecDSRM(KuaiFairVecEnv(WORLD, CONFIG, 2), other),
        lambda: DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, CONFIG, 2), other),
    ):
        with pytest.raises(MismatchError, match="made for 3 dimensions, not 8"):
            wrap()
    with pytest.raises(TypeError, match="needs a KuaiFair environment"):
        DSRMObservationWrapper(gym.make("CartPole-v1"), WindowPurifier())
    with pytest.raises(TypeError, match="needs KuaiFair sessions"):
        VecDSRM(DummyVecEnv([lambda: gym.make("CartPole-v1")]), WindowPurifier())
    with pytest.raises(TypeError, match="needs a KuaiFair vector environment"):
        DSRMVectorWrapper(gym.make_vec("CartPole-v1", 2), WindowPurifier())


def transformed(env):
    return TransformObservation(env, lambda state: state + 1, env.observation_space)


BENEATH_SINGLE = {
    "NormalizeObservation": NormalizeObservation,
    "TransformObservation": transformed,
    "FrameStackObservation": lambda env: FrameStackObservation(env, 2),
}
BENEATH_VEC = {"VecNormalize": VecNormalize, "VecFrameStack": lambda env: VecFrameStack(env, 2)}


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, session_clock=True)], ids=["plain", "clock"])
@pytest.mark.parametrize("name", BENEATH_SINGLE)
def test_a_wrapper_beneath_that_changes_what_the_purifier_reads_is_refused(name, config):
    changing = BENEATH_SINGLE[name]
    with pytest.raises(TypeError, match=rf"put it on top: {name}\(DSRMObservationWrapper\(env, purifier\)\)"):
        DSRMObservationWrapper(changing(KuaiFairEnv(WORLD, config)), IPSPurifier())
    with pytest.raises(TypeError, match=rf"{name} beneath VecDSRM"):
        VecDSRM(DummyVecEnv([lambda: changing(KuaiFairEnv(WORLD, config))]), IPSPurifier())
    changing(DSRMObservationWrapper(KuaiFairEnv(WORLD, config), IPSPurifier())).reset(seed=1)


@pytest.mark.parametrize("name", BENEATH_VEC)
def test_the_same_holds_for_wrappers_of_stable_baselines3(name):
    changing = BENEATH_VEC[name]
    with pytest.raises(TypeError, match=rf"put it on top: {name}\(VecDSRM\(env, purifier\)\)"):
        VecDSRM(changing(KuaiFairVecEnv(WORLD, CONFIG, 2, seed=0)), IPSPurifier())
    changing(VecDSRM(KuaiFairVecEnv(WORLD, CONFIG, 2, seed=0), IPSPurifier())).reset()


def test_wrappers_in_other_processes_are_refused_too():
    env = SubprocVecEnv([lambda: FrameStackObservation(KuaiFairEnv(WORLD, CONFIG), 2)], start_method="fork")
    try:
        with pytest.raises(TypeError, match="around the single environments in SubprocVecEnv"):
            VecDSRM(env, IPSPurifier())
    finally:
        env.close()


def test_what_leaves_observations_as_they_are_may_lie_beneath():
    env = VecNormalize(VecMonitor(KuaiFairVecEnv(WORLD, CONFIG, 2, seed=3)), norm_obs=False)
    np.testing.assert_array_equal(VecDSRM(env, WindowPurifier()).reset(), vec(2).reset())


def test_vector_wrappers_beneath_and_second_purifiers_are_refused():
    def vector():
        return KuaiFairVectorEnv(WORLD, CONFIG, 2, AutoresetMode.NEXT_STEP)

    with pytest.raises(TypeError, match=r"put it on top: NormalizeObservation\(DSRMVectorWrapper"):
        DSRMVectorWrapper(vector_wrappers.NormalizeObservation(vector()), IPSPurifier())
    for twice in (
        lambda: DSRMObservationWrapper(single(), IPSPurifier()),
        lambda: DSRMVectorWrapper(purified_by(IPSPurifier()), IPSPurifier()),
        lambda: VecDSRM(VecMonitor(vec(2)), IPSPurifier()),
        lambda: VecDSRM(DummyVecEnv([single]), IPSPurifier()),
    ):
        with pytest.raises(TypeError, match=r"purified by .* already.*use\s+one purifier alone"):
            twice()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("purifiers") / "noise.safetensors"
    save_purifier(NoisePurifier(0.5), path)
    return path


def test_a_path_does_for_a_purifier(saved):
    config, rows = CONFIG, 2
    by_object, by_path = (
        [
            DSRMObservationWrapper(KuaiFairEnv(WORLD, config), purifier).reset(seed=3)[0],
            DSRMVectorWrapper(KuaiFairVectorEnv(WORLD, config, rows), purifier).reset(seed=3)[0],
            VecDSRM(KuaiFairVecEnv(WORLD, config, rows, seed=3), purifier).reset(),
        ]
        for purifier in (NoisePurifier(0.5), str(saved))
    )
    for given, read in zip(by_object, by_path, strict=True):
        np.testing.assert_array_equal(given, read)
    with pytest.raises(ArtifactError, match=r"nowhere\.safetensors is not a file"):
        VecDSRM(KuaiFairVecEnv(WORLD, config, rows), "nowhere.safetensors")


def test_a_specification_makes_the_purified_environment_again(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    env = DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0", max_len=3), saved.name)
    text = env.spec.to_json()
    monkeypatch.chdir("/")
    for again in (gym.make(env.spec), gym.make(EnvSpec.from_json(text))):
        assert isinstance(again, DSRMObservationWrapper) and again.observation_space == env.observation_space
        np.testing.assert_array_equal(again.reset(seed=4)[0], env.reset(seed=4)[0])
        slate = env.action_space.sample()
        np.testing.assert_array_equal(again.step(slate)[0], env.step(slate)[0])
    purifier = NoisePurifier(0.5)
    held = gym.make(DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0"), purifier).spec)
    assert held.get_wrapper_attr("purifier") is purifier


def test_the_space_is_the_purifiers_and_the_rest_of_a_dict_stays():
    assert single().observation_space.shape == (WORLD.dimension + 1,)
    space = single(HISTORY).observation_space
    assert space["state"].shape == (WORLD.dimension + 1,)
    raw = KuaiFairEnv(WORLD, HISTORY)
    purified, _ = single(HISTORY).reset(seed=1)
    plain, _ = raw.reset(seed=1)
    np.testing.assert_array_equal(purified["history_items"], plain["history_items"])
    assert space.contains(purified)


@pytest.mark.parametrize("config", [CONFIG, HISTORY], ids=["state", "history"])
def test_the_session_clock_follows_the_purified_state(config):
    config = replace(config, leave="never")
    clocked = replace(config, session_clock=True)
    check_gymnasium(single(clocked), skip_render_check=True)
    plain, env = vec(3, config), vec(3, clocked)
    assert state_of(env.observation_space).shape == (WORLD.dimension + 2,)
    states, clocked_states = state_of(plain.reset()), state_of(env.reset())
    for step, choice in enumerate(actions(3, 3)):
        np.testing.assert_array_equal(clocked_states[:, :-1], states)
        np.testing.assert_allclose(clocked_states[:, -1], step / 4)
        states, clocked_states = state_of(plain.step(choice)[0]), state_of(env.step(choice)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_purified_environments_in_other_processes_play_what_this_process_plays(saved, method):
    spec = DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0", max_len=5), str(saved)).spec
    makers = [partial(gym.make, spec)] * 2
    here, there = DummyVecEnv(makers), SubprocVecEnv(makers, start_method=method)
    try:
        for env in (here, there):
            env.seed(3)
        np.testing.assert_array_equal(here.reset(), there.reset())
        for action in np.random.default_rng(5).uniform(-1, 1, (12, 2, *here.action_space.shape)).astype(np.float32):
            (state, reward, done, _), (other, *rest, _) = here.step(action), there.step(action)
            np.testing.assert_array_equal(state, other)
            np.testing.assert_allclose(reward, rest[0], rtol=1e-6)
            np.testing.assert_array_equal(done, rest[1])
    finally:
        there.close()
