"""Logged transitions are what the environment would have shown, and say where they came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from helpers import TableResponse, small_world
from small_worlds import small_pair
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from hrl_policies.common.transition_sources import (
    LogReading,
    NoisyState,
    collect_transitions,
    log_transitions,
    slate_embeddings,
)
from hrl_policies.common.transitions import LoggedTransitions
from hrl_policies.common.yaml_files import validated
from hrl_policies.controls import RandomSlates
from kuaifair_env import make_world
from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.observations import StateObserver
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.simulator import Sessions, SessionSimulator

ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")


def same(one: LoggedTransitions, other: LoggedTransitions) -> bool:
    assert one.observation_space == other.observation_space and one.action_space == other.action_space
    assert dict(one.provenance) == dict(other.provenance)
    for name in (*ARRAYS, "slot_rewards"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert left.dtype == right.dtype, name
            np.testing.assert_array_equal(left, right, name)
    return True


def simple(n: int = 6, **changes) -> LoggedTransitions:
    chain = np.arange(n + 1, dtype=np.float32)[:, None] / n
    parts = {
        "observations": chain[:-1],
        "actions": np.zeros((n, 1), np.float32),
        "rewards": np.ones(n, np.float32),
        "next_observations": chain[1:],
        "terminated": np.arange(n) == n - 1,
        "truncated": np.zeros(n, np.bool_),
        "observation_space": spaces.Box(0, 1, (1,)),
        "action_space": spaces.Box(-2, 2, (1,)),
    }
    return LoggedTransitions(**{**parts, **changes})


class Scripted(TableResponse):
    """Clicks what the log says, exposure after exposure."""

    def __init__(self, shape, clicks) -> None:
        super().__init__(np.zeros(shape))
        self.clicks = list(clicks)

    def expected(self, users, items, history=None):
        return np.asarray([[self.clicks.pop(0) for _ in row] for row in items], np.float32)

    def feedback(self, expected, uniforms):
        return expected


@pytest.mark.parametrize("size", [1, 3, 10])
def test_observations_and_rewards_are_those_of_the_environment_after_the_same_exposures(size):
    pair = small_pair()
    data = log_transitions(pair.train, reading=LogReading(slate_size=size, session_length=1_000))
    log, per_user = pair.train.data.train, 60 // size
    assert len(data) == 25 * per_user
    for place, user in enumerate(pair.train.users[:3]):
        own = log.users == user
        clicks, items = log.clicks[own][: per_user * size], log.items[own][: per_user * size]
        world = replace(pair.train, response=Scripted((40, 50), clicks))
        simulator = SessionSimulator(
            world, 1, None, max_len=100, slate_size=size, leave=NeverLeave(), initial_history="empty"
        )
        observer = StateObserver(world)
        simulator.reset(np.arange(1), Sessions(np.asarray([user]), np.zeros(1, np.uint64), np.zeros(1, int)))
        for step, slate in enumerate(items.reshape(-1, size)):
            row = place * per_user + step
            np.testing.assert_array_equal(data.observations[row], observer.observe(simulator)[0])
            outcome = simulator.step(slate[None].astype(np.int64))
            np.testing.assert_array_equal(data.next_observations[row], observer.observe(simulator)[0])
            assert data.rewards[row] == pytest.approx(outcome.reward[0])


def test_the_last_observation_is_the_one_that_a_session_starts_from():
    pair = small_pair()
    data = log_transitions(pair.train, reading=LogReading(session_length=6))
    env = KuaiFairVecEnv(pair.train, n_envs=25)
    env.set_options([{"user_id": int(user)} for user in pair.train.user_ids])
    np.testing.assert_array_equal(data.next_observations[data.ends], env.reset())


def test_only_users_of_the_training_world_are_read():
    pair = small_pair()
    data = log_transitions(pair.train, "item", LogReading(slate_size=1))
    log = pair.train.data.train
    own = np.isin(log.users, pair.train.users)
    np.testing.assert_array_equal(data.actions, log.items[own])
    np.testing.assert_array_equal(data.rewards, log.clicks[own])
    assert data.action_space == spaces.Discrete(50)


@pytest.mark.parametrize("end", ["truncated", "terminated"])
def test_sessions_are_cut_where_they_are_declared_to_be(end):
    # 60 exposures a user: 8 slates of 7 and a rest, in sessions of 3, 3 and 2 slates.
    reading = LogReading(slate_size=7, session_length=3, session_end=end)
    data = log_transitions(small_pair().train, reading=reading)
    lengths = [rows.stop - rows.start for rows in data.sessions]
    assert lengths == [3, 3, 2] * 25
    flags = {"truncated": data.truncated, "terminated": data.terminated}
    np.testing.assert_array_equal(flags.pop(end), data.ends)
    assert not next(iter(flags.values())).any()
    # A cut is no gap: the next session of the user begins with the state that the last one ended with.
    np.testing.assert_array_equal(data.next_observations[2], data.observations[3])


def test_logged_sessions_have_the_clock_of_sessions_that_are_played():
    pair = small_pair()
    plain = log_transitions(pair.train, reading=LogReading(slate_size=7, session_length=3))
    data = log_transitions(pair.train, reading=LogReading(slate_size=7, session_length=3, session_clock=True))
    np.testing.assert_array_equal(data.observations[:, :-1], plain.observations)
    for rows in data.sessions:
        steps = np.arange(rows.stop - rows.start)
        np.testing.assert_allclose(data.observations[rows, -1], steps / 3)
        np.testing.assert_allclose(data.next_observations[rows, -1], (steps + 1) / 3)
    played = KuaiFairVecEnv(pair.train, SessionConfig(slate_size=7, max_len=3, session_clock=True), 1)
    assert data.observation_space == played.observation_space


def test_embedding_actions_point_at_what_was_clicked_or_else_shown():
    embeddings = np.asarray([[3, 0], [0, 4], [0, 0], [-1, 1]], np.float32)
    items = np.asarray([[0, 1], [0, 1], [2, 2], [0, 3]])
    clicks = np.asarray([[True, False], [False, False], [True, True], [True, True]])
    expected = [[1, 0], [0.6, 0.8], [0, 0], [2 / 5**0.5, 1 / 5**0.5]]
    np.testing.assert_allclose(slate_embeddings(embeddings, items, clicks), expected, rtol=1e-6)
    shown = slate_embeddings(embeddings, items[:1], clicks[:1], "shown")
    np.testing.assert_allclose(shown, [[0.6, 0.8]], rtol=1e-6)


def test_slates_that_are_no_actions_are_dropped_and_cut_the_session():
    world = replace(small_world(candidates=20), split="train", users=np.arange(15, 40))
    reading = LogReading(slate_size=2, session_length=10)
    data = log_transitions(world, "slate", reading)
    log = world.data.train
    rows, ends = [], []
    for user in world.users:
        own = np.flatnonzero(log.users == user)
        slates = log.items[own].reshape(-1, 2)
        valid = [slate.max() < 20 and slate[0] != slate[1] for slate in slates]
        for place in np.flatnonzero(valid):
            rows.append(own[2 * place])
            ends.append(place % 10 == 9 or place == 29 or not valid[place + 1])
    assert 0 < len(rows) < 25 * 30
    np.testing.assert_array_equal(data.actions, log.items[np.asarray(rows)[:, None] + np.arange(2)])
    np.testing.assert_array_equal(data.slot_rewards, log.clicks[np.asarray(rows)[:, None] + np.arange(2)])
    np.testing.assert_array_equal(data.ends, ends)
    assert data.provenance["dropped_slates"] == 25 * 30 - len(rows)
    assert all(data.action_space.contains(action) for action in data.actions)


def test_a_limit_takes_whole_sessions_at_random():
    pair = small_pair()
    whole = log_transitions(pair.train, reading=LogReading(session_length=3))
    some = log_transitions(pair.train, reading=LogReading(session_length=3, max_transitions=40))
    again = log_transitions(pair.train, reading=LogReading(session_length=3, max_transitions=40))
    other = log_transitions(pair.train, reading=LogReading(session_length=3, max_transitions=40, seed=1))
    assert len(some) == 39 and same(some, again) and not np.array_equal(some.observations, other.observations)
    kept = {row.tobytes() for row in np.concatenate([whole.observations, whole.actions], axis=1)}
    assert {row.tobytes() for row in np.concatenate([some.observations, some.actions], axis=1)} <= kept
    assert all(rows.stop - rows.start == 3 for rows in some.sessions)


def test_purified_agents_learn_from_purified_states():
    from dsrm.baselines import IPSPurifier
    from dsrm.wrappers import VecDSRM

    pair, purifier = small_pair(), IPSPurifier()
    purifier.bind(pair.train)
    data = log_transitions(pair.train, reading=LogReading(session_length=6), purifier=purifier)
    env = VecDSRM(KuaiFairVecEnv(pair.train, n_envs=25), purifier)
    env.set_options([{"user_id": int(user)} for user in pair.train.user_ids])
    np.testing.assert_array_equal(data.next_observations[data.ends], env.reset())
    assert data.observation_space == env.observation_space
    assert data.provenance["purifier"] == purifier.describe()


def test_logs_that_hold_no_transitions_are_refused():
    pair = small_pair()
    with pytest.raises(DataError, match="the training world, got the test world"):
        log_transitions(pair.test)
    positives = replace(pair.train.data, train=replace(pair.train.data.train, positives_only=True))
    with pytest.raises(DataError, match=r"positive feedback only.*env_behaviour"):
        log_transitions(replace(pair.train, data=positives))
    with pytest.raises(DataError, match=r"no user .* whole slate of 50"):
        log_transitions(pair.train, "slate", LogReading(slate_size=50))
    for setting, text in (
        ({"session_end": "left"}, "session_end must be 'truncated' or 'terminated'"),
        ({"action_items": "liked"}, "action_items must be 'clicked' or 'shown'"),
        ({"slate_size": 0}, "slate_size must be greater than 0"),
        ({"max_transitions": 7}, "at least one session of 30"),
    ):
        with pytest.raises(ValueError, match=text):
            validated(LogReading, setting, "data")


def test_the_log_s_provenance_names_the_data():
    pair = small_pair()
    provenance = log_transitions(pair.train).provenance
    assert provenance["source"] == "log" and provenance["split"] == "train"
    assert provenance["data"]["hash"] == pair.train.data.data_hash
    assert provenance["data"]["origin"] == "own"
    assert provenance["reading"]["session_end"] == "truncated"


@pytest.mark.parametrize("mode", ["embedding", "slate"])
def test_collected_transitions_replay_in_the_environment(mode):
    pair = small_pair()
    config = SessionConfig(action_mode=mode, max_len=8)
    env = KuaiFairVecEnv(pair.train, config, 4)
    policy = NoisyState(seed=1) if mode == "embedding" else RandomSlates(seed=1)
    data = collect_transitions(policy, env, 90, seed=5, behaviour={"noise": 1.0})
    assert len(data) == 92
    env.seed(5)
    observation = env.reset()
    per_row = {name: getattr(data, name).reshape(4, 23, -1) for name in ARRAYS}
    for step in range(23):
        np.testing.assert_array_equal(per_row["observations"][:, step], observation)
        observation, rewards, done, infos = env.step(per_row["actions"][:, step])
        np.testing.assert_array_equal(per_row["rewards"][:, step, 0], rewards)
        if mode == "slate":
            of_slots = data.slot_rewards.reshape(4, 23, 10)[:, step]
            np.testing.assert_array_equal(of_slots, env.batch.outcome.feedback)
        for row in range(4):
            last = infos[row]["terminal_observation"] if done[row] else observation[row]
            np.testing.assert_array_equal(per_row["next_observations"][row, step], last)
            cut = done[row] and infos[row]["TimeLimit.truncated"]
            assert per_row["truncated"][row, step, 0] == (cut or (step == 22 and not done[row]))
            assert per_row["terminated"][row, step, 0] == (done[row] and not cut)
    assert data.terminated.any() and data.provenance["source"] == "env_behaviour"
    assert data.provenance["behaviour"] == {"policy": type(policy).__name__, "noise": 1.0}
    assert data.provenance["data"]["hash"] == pair.train.data.data_hash


def test_the_test_world_is_never_collected_from():
    pair = small_pair()
    with pytest.raises(DataError, match="the training world, got the test world"):
        collect_transitions(NoisyState(), KuaiFairVecEnv(pair.test, n_envs=2), 10)
    with pytest.raises(ValueError, match="at least 1"):
        collect_transitions(NoisyState(), KuaiFairVecEnv(pair.train, n_envs=2), 0)
    history = SessionConfig(observation_mode="history")
    with pytest.raises(ValueError, match="observation_mode='state'"):
        collect_transitions(NoisyState(), KuaiFairVecEnv(pair.train, history, 2), 10)


def test_normalised_sessions_are_not_collected_from():
    env = KuaiFairVecEnv(small_pair().train, SessionConfig(action_mode="slate"), 2)
    with pytest.raises(ValueError, match="collect without VecNormalize"):
        collect_transitions(RandomSlates(), VecNormalize(env), 4)


class Narrow:
    """Names items in fewer bits than logged transitions do."""

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.tile(np.arange(10, dtype=np.int32), (len(observation), 1)), state


def test_items_named_in_few_bits_are_kept_as_item_ids():
    env = KuaiFairVecEnv(small_pair().train, SessionConfig(action_mode="slate"), 2)
    assert collect_transitions(Narrow(), env, 4).actions.dtype == np.int64


def test_control_tasks_can_be_collected_too():
    class Torque:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.ones((len(observation), 1), np.float32), state

    data = collect_transitions(Torque(), make_vec_env("Pendulum-v1", 3), 3 * 450)
    assert not data.terminated.any()
    assert np.flatnonzero(data.truncated).tolist() == [199, 399, 449, 649, 849, 899, 1099, 1299, 1349]
    assert "data" not in data.provenance


def test_sessions_may_last_one_step_each():
    data = simple(terminated=np.ones(6, bool))
    assert len(data.sessions) == 6
    read = log_transitions(small_pair().train, "slate", LogReading(slate_size=3, session_length=1))
    assert read.ends.all() and len(read.sessions) == len(read)


def test_a_replay_buffer_bootstraps_truncated_sessions_only():
    n = 6
    data = simple(
        actions=np.linspace(-2, 2, n, dtype=np.float32)[:, None],
        terminated=np.asarray([0, 0, 1, 0, 0, 0], bool),
        truncated=np.asarray([0, 0, 0, 0, 0, 1], bool),
    )
    buffer = data.to_replay_buffer("cpu")
    np.random.seed(0)  # noqa: NPY002 (what the buffer draws from)
    batch = buffer.sample(500)
    rows = np.rint(batch.observations[:, 0].numpy() * n).astype(int)
    assert set(rows) == set(range(n))
    np.testing.assert_array_equal(batch.dones[:, 0].numpy(), rows == 2)
    np.testing.assert_allclose(batch.actions[:, 0].numpy(), np.linspace(-1, 1, n)[rows], rtol=1e-6)
    after = (batch.next_observations - batch.observations).numpy()
    np.testing.assert_allclose(after, 1 / n, rtol=1e-5)
    np.testing.assert_array_equal(batch.rewards.numpy(), 1.0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"truncated": np.arange(6) == 5}, "not both"),
        ({"terminated": np.zeros(6, bool)}, "last transition must end"),
        ({"next_observations": np.zeros((6, 1), np.float32)}, "transition 0 is followed by another"),
        ({"rewards": np.full(6, np.nan, np.float32)}, "rewards of logged transitions hold NaN"),
        ({"rewards": np.ones(6)}, "rewards must be float32"),
        ({"rewards": np.ones(5, np.float32)}, "observations must have shape \\(5, 1\\)"),
        ({"actions": np.full((6, 1), 3, np.float32)}, "transition 0 is outside"),
        ({"actions": np.full(6, 7), "action_space": spaces.Discrete(7)}, "transition 0 is outside"),
        ({"actions": np.zeros(6, np.int32), "action_space": spaces.Discrete(7)}, "must be int64, got int32"),
        ({"action_space": spaces.MultiBinary(1)}, "not MultiBinary"),
        ({"observation_space": spaces.Box(0, 1, (2,))}, "observations must have shape"),
        ({"slot_rewards": np.ones((6, 2), np.float32)}, "slot_rewards must have shape"),
    ],
)
def test_broken_transitions_are_refused(changes, text):
    with pytest.raises(DataError, match=text):
        simple(**changes)


@pytest.fixture
def minari(tmp_path, monkeypatch):
    module = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedding", "slate", "item", "collected"])
@pytest.mark.parametrize("by", ["id", "path"])
def test_minari_gives_back_what_it_was_given(minari, tmp_path, kind, by):
    pair = small_pair()
    if kind == "collected":
        env = KuaiFairVecEnv(pair.train, SessionConfig(action_mode="slate", max_len=6), 3)
        data = collect_transitions(RandomSlates(), env, 60)
    else:
        data = log_transitions(pair.train, kind, LogReading(slate_size=1 if kind == "item" else 3))
    target: str | Path = "kuaifair/small/log-v0" if by == "id" else tmp_path / "sets" / "log"
    data.to_minari(target)
    assert same(LoggedTransitions.from_minari(target), data)
    dataset = minari.load_dataset(target) if by == "id" else minari.MinariDataset(target)
    assert dataset.total_episodes == len(data.sessions) and dataset.total_steps == len(data)
    with pytest.raises(ArtifactError, match=r"already|exists"):
        data.to_minari(target)


@pytest.mark.parametrize("by", ["id", "path"])
def test_minari_makes_the_environment_of_a_data_set_again(minari, tmp_path, by):
    env = gym.make("KuaiFair-Toy-v0", max_len=8, action_mode="slate", slate_size=5)
    data = log_transitions(make_world("KuaiFair-Toy-v0", split="train"), "slate", LogReading(slate_size=5))
    target: str | Path = "kuaifair/toy/log-v0" if by == "id" else tmp_path / "log"
    data.to_minari(target, env)
    dataset = minari.load_dataset(target) if by == "id" else minari.MinariDataset(target)
    again = dataset.recover_environment()
    # Gymnasium gives to JSON and back what is in kwargs.
    assert again.unwrapped.spec.kwargs == env.unwrapped.spec.kwargs
    first, _ = again.reset(seed=3)
    np.testing.assert_array_equal(first, env.reset(seed=3)[0])
    episode = next(iter(dataset.iterate_episodes()))
    for observation, action in zip(episode.observations, episode.actions, strict=False):
        assert again.observation_space.contains(observation) and again.action_space.contains(action)
    for other, message in (
        (gym.make("KuaiFair-Toy-v0", action_mode="slate", slate_size=4), "acts in"),
        (KuaiFairEnv(small_pair().train), "make it with gym.make"),
    ):
        with pytest.raises(DataError, match=message):
            data.to_minari("kuaifair/toy/other-v0", other)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_minari_sets_of_others_are_read(minari):
    episodes = [
        minari.data_collector.EpisodeBuffer(
            observations=np.arange(4.0)[:, None] + start,
            actions=np.asarray([0, 1, 0], np.int32),
            rewards=[0.0, 1.0, 2.0],
            terminations=[False, False, end],
            truncations=[False, False, True],
        )
        for start, end in ((0, True), (5, False))
    ]
    minari.create_dataset_from_buffers(
        "other/set-v0",
        episodes,
        action_space=spaces.Discrete(2),
        observation_space=spaces.Box(0, 10, (1,), np.float64),
    )
    data = LoggedTransitions.from_minari("other/set-v0")
    assert data.observations[:, 0].tolist() == [0, 1, 2, 5, 6, 7]
    assert data.terminated.tolist() == [False, False, True, False, False, False]
    assert data.truncated.tolist() == [False] * 5 + [True]
    assert data.actions.dtype == np.int64
    assert data.provenance == {"source": "minari", "dataset_id": "other/set-v0"}
    with pytest.raises(ArtifactError, match="no Minari data set nowhere/set-v0"):
        LoggedTransitions.from_minari("nowhere/set-v0")


@pytest.mark.parametrize("damage", ["cut", "emptied", "provenance"])
def test_damaged_minari_sets_are_named(minari, tmp_path, damage):
    log_transitions(small_pair().train, "item", LogReading(slate_size=1)).to_minari(tmp_path / "set")
    (data,) = (tmp_path / "set").rglob("*.hdf5")
    (about,) = (tmp_path / "set").rglob("metadata.json")
    if damage == "provenance":
        about.write_text(about.read_text().replace('"{', '"{{'))
    else:
        data.write_bytes(data.read_bytes()[: 2_000 if damage == "cut" else 0])
    with pytest.raises(ArtifactError, match=str(tmp_path / "set")):
        LoggedTransitions.from_minari(tmp_path / "set")


def test_minari_sets_without_data_are_refused(minari, tmp_path):
    spaces_of = {"observation_space": spaces.Box(0, 1, (1,)), "action_space": spaces.Discrete(2)}
    storage = minari.dataset.minari_storage.MinariStorage.new(tmp_path / "set", data_format="hdf5", **spaces_of)
    storage.update_metadata({"dataset_id": "empty/set-v0", "minari_version": minari.__version__})
    with pytest.raises(ArtifactError, match=r"set cannot be read: Unable to"):
        LoggedTransitions.from_minari(tmp_path / "set")
    storage.update_episodes([])
    with pytest.raises(DataError, match="holds no episodes"):
        LoggedTransitions.from_minari(tmp_path / "set")
