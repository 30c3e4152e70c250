"""Worlds of real answers: everybody is shown what was shown to them at random, once, and answers what was logged."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from gymnasium.vector import AutoresetMode
from helpers import small_data
from official_files import write_kuairand

from kuaifair_env import (
    DataError,
    KuaiFairEnv,
    KuaiFairVectorEnv,
    SessionConfig,
    evaluate,
    held_out_users,
    make_sb3,
    make_world,
    register_world,
)
from kuaifair_env.agent_view import world_for_agents
from kuaifair_env.data.cache import CACHE_VARIABLE
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import ArtifactError, HiddenTruthError
from kuaifair_env.metrics import ndcg
from kuaifair_env.replay import build_replay_world
from kuaifair_env.response import LoggedResponse, load_response
from kuaifair_env.response.logged import UserItems
from kuaifair_env.sb3 import KuaiFairVecEnv

N_USERS, N_ITEMS = 40, 50


def random_log(seed: int = 0) -> InteractionLog:
    """User ``u`` was shown ``u % 20`` distinct items at random, and clicked about two in five."""
    rng = np.random.default_rng(seed)
    shown = [rng.choice(N_ITEMS, user % 20, replace=False) for user in range(N_USERS)]
    users = np.repeat(np.arange(N_USERS), [len(items) for items in shown])
    return InteractionLog.sorted(users, np.concatenate(shown), rng.random(len(users)) < 0.4)


def replay_data(log: InteractionLog | None = None):
    return replace(small_data(N_USERS, N_ITEMS), test=random_log() if log is None else log)


def answers(log: InteractionLog, feedback=None) -> dict[tuple[int, int], float]:
    """The last logged feedback of each pair of user and item."""
    values = log.clicks if feedback is None else feedback
    return {
        (int(user), int(item)): float(value) for user, item, value in zip(log.users, log.items, values, strict=True)
    }


@pytest.fixture(scope="module")
def data():
    return replay_data()


@pytest.fixture(scope="module")
def world(data):
    """All items are candidates, and all users have sessions who were shown at least 5."""
    return build_replay_world(data, candidates=np.arange(N_ITEMS), users=np.arange(N_USERS))


# ---------------------------------------------------------------- the logged response


def repeated_log(seed: int = 1) -> InteractionLog:
    """Pairs come up to several times, with other answers each time."""
    rng = np.random.default_rng(seed)
    return InteractionLog.sorted(rng.integers(12, size=300), rng.integers(9, size=300), rng.random(300) < 0.5)


@pytest.mark.parametrize("graded", [False, True])
def test_feedback_is_what_was_logged_last_and_nothing_else(graded):
    log = repeated_log()
    if graded:
        weights = np.random.default_rng(2).integers(1, 5, len(log)).astype(np.float32)
        log = replace(log, feedback=weights * log.clicks)
    data = replace(small_data(12, 9), test=log)
    known = answers(log, log.feedback)
    response = LoggedResponse.from_log(log, data)
    assert response.describe()["pairs"] == len(known)
    assert response.describe()["repeated_rows_dropped"] == len(log) - len(known)
    catalogue = response.expected_catalogue(np.arange(12), 9)
    for user in range(12):
        for item in range(9):
            assert catalogue[user, item] == known.get((user, item), 0.0)
            pair = np.asarray([user]), np.asarray([[item]])
            if (user, item) not in known:
                with pytest.raises(DataError, match=f"item row {item} was never logged for user row {user}"):
                    response.expected(*pair)
                continue
            expected = response.expected(*pair)
            assert expected.dtype == np.float32 and expected[0, 0] == known[user, item]
            for uniform in (0.0, 0.999):
                np.testing.assert_array_equal(response.feedback(expected, np.full((1, 1), uniform)), expected)
            assert response.clicked(expected)[0, 0] == (known[user, item] > 0)
    means = response.item_means(8)
    assert means == pytest.approx([np.mean([v for (_, item), v in known.items() if item == i]) for i in range(8)])


def test_another_order_of_the_catalogue_gives_the_same_answers():
    log = repeated_log()
    response = LoggedResponse.from_log(log, replace(small_data(12, 9), test=log), items=np.asarray([1, 4, 6, 8]))
    order = np.random.default_rng(3).permutation(9)
    moved = response.rearranged(order)
    before, after = (model.expected_catalogue(np.arange(12), 9) for model in (response, moved))
    np.testing.assert_array_equal(after, before[:, order])
    np.testing.assert_array_equal(moved.pairs.mask(np.arange(12), 9), response.pairs.mask(np.arange(12), 9)[:, order])
    kept = {item for item in range(9) if response.pairs.mask(np.arange(12), 9)[:, item].any()}
    assert kept == {1, 4, 6, 8}
    assert response.describe()["rows_of_other_items"] == np.count_nonzero(~np.isin(log.items, [1, 4, 6, 8]))


def test_a_logged_response_is_saved_and_read(tmp_path, world):
    path = tmp_path / "logged.safetensors"
    world.response.save(path)
    loaded = load_response(path)
    assert isinstance(loaded, LoggedResponse) and loaded.describe() == world.response.describe()
    everybody = np.arange(N_USERS)
    np.testing.assert_array_equal(
        loaded.expected_catalogue(everybody, N_ITEMS), world.response.expected_catalogue(everybody, N_ITEMS)
    )
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError):
        load_response(path)


def test_a_log_that_does_not_say_what_was_shown_is_refused(data):
    log = replace(data.test.take(data.test.clicks), positives_only=True)
    with pytest.raises(DataError, match="positives only"):
        LoggedResponse.from_log(log, replace(data, test=log))
    with pytest.raises(DataError, match="needs pairs"):
        LoggedResponse.from_log(data.test, data, items=np.zeros(0, np.int64))


def test_lists_of_a_million_users_are_held_sparsely():
    users, per_user, n_items = 1_000_000, 3, 200_000
    items = (np.arange(users * per_user, dtype=np.int64) * 7 % n_items).astype(np.int32).reshape(users, per_user)
    lists = UserItems(np.arange(users + 1) * per_user, np.sort(items, axis=1).ravel())
    some = np.asarray([0, 17, 999_999])
    mask = lists.mask(some, n_items)
    assert [set(np.flatnonzero(row)) for row in mask] == [set(items[user]) for user in some]
    assert set(lists.spread(some, 3)[1]) == set(items[17])


# ---------------------------------------------------------------- the world


def test_candidates_are_the_users_rows_of_the_test_log(data):
    # The order of candidates is another one than that of the data.
    chosen = np.random.default_rng(4).permutation(N_ITEMS)[:30]
    world = build_replay_world(data, candidates=chosen, min_candidates=6)
    of_user = {
        user: set(data.items.ids[data.test.items[data.test.users == user]]) & set(data.items.ids[chosen])
        for user in range(N_USERS)
    }
    mask = world.user_candidates.mask(np.arange(N_USERS), world.n_items)
    assert [set(world.item_ids[row]) for row in mask] == list(of_user.values())
    assert set(world.users) == {user for user in held_out_users(data) if len(of_user[user]) >= 6}
    assert world.response.describe()["rows_of_other_items"] == np.count_nonzero(~np.isin(data.test.items, chosen))
    everybody = build_replay_world(data, candidates=chosen, users=np.arange(N_USERS), min_candidates=6)
    assert set(everybody.users) == {user for user in range(N_USERS) if len(of_user[user]) >= 6}
    with pytest.raises(DataError, match="none of 40 users of small was shown 20 of the candidates"):
        build_replay_world(data, candidates=chosen, users=np.arange(N_USERS), min_candidates=20)


def test_other_answers_and_other_lists_are_other_worlds(data, world):
    assert not world.fingerprint.differences(
        build_replay_world(data, candidates=np.arange(N_ITEMS), users=np.arange(N_USERS)).fingerprint
    )
    log = replace(data.test, clicks=~data.test.clicks)
    other = build_replay_world(replace(data, test=log), candidates=np.arange(N_ITEMS), users=np.arange(N_USERS))
    assert "response" in world.fingerprint.differences(other.fingerprint)
    fewer = build_replay_world(data, candidates=np.arange(N_ITEMS), users=np.arange(N_USERS), min_candidates=9)
    assert "users" in world.fingerprint.differences(fewer.fingerprint)


# ---------------------------------------------------------------- sessions


def sessions(world, **settings):
    defaults = {"action_mode": "slate", "slate_size": 3, "repeats": "forbid", "leave": "never", "max_len": 4}
    return SessionConfig(**{**defaults, **settings})


def random_actions(env, rng):
    if env.config.action_mode == "embedding":
        return rng.uniform(-1, 1, (env.batch.batch_size, env.world.dimension)).astype(np.float32)
    masks = env.batch.action_masks()
    slates = [rng.permutation(np.flatnonzero(mask))[: env.config.items_per_slate] for mask in masks]
    return np.asarray(slates)[:, 0] if env.config.action_mode == "item" else np.asarray(slates)


@pytest.mark.parametrize("mode", ["embedding", "slate", "item"])
@pytest.mark.parametrize("max_len", [4, 30])
def test_sessions_show_own_items_once_and_answer_from_the_log(data, world, mode, max_len):
    size = 1 if mode == "item" else 3
    env = KuaiFairEnv(world, sessions(world, action_mode=mode, slate_size=size, max_len=max_len))
    known, rng = answers(data.test), np.random.default_rng(0)
    for user in world.users:
        own = {item for who, item in known if who == user}
        env.reset(seed=int(user), options={"user_id": data.users.ids[user]})
        steps, over = 0, False
        while not over:
            mask = env.action_masks()
            assert set(data.items.ids[list(own)]) == set(world.item_ids[mask.reshape(-1, world.n_items)[0]])
            _, reward, terminated, truncated, info = env.step(random_actions(env, rng)[0])
            shown = [int(np.flatnonzero(data.items.ids == raw)[0]) for raw in info["item_ids"]]
            assert set(shown) <= own and len(set(shown)) == size
            np.testing.assert_array_equal(info["feedback"], [known[user, item] for item in shown])
            assert reward == pytest.approx(np.mean(info["feedback"]))
            own -= set(shown)
            steps, over = steps + 1, terminated or truncated
            assert not terminated
        assert steps == min(max_len, (user % 20) // size)
        assert info["session"]["len"] == steps and not info["session"]["left"]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_of_every_kind_play_lists_of_different_lengths(world, mode):
    env = KuaiFairVectorEnv(world, sessions(world, max_len=30), 8, mode)
    env.reset(seed=3)
    rng = np.random.default_rng(1)
    lengths, over = [], np.zeros(8, np.bool_)
    for _ in range(60):
        if mode is AutoresetMode.DISABLED and over.any():
            env.reset(options={"reset_mask": over})
        # Masks of finished sessions are whole, so that whoever acts in all of them can.
        assert (env.batch.action_masks().sum(axis=1) >= 3).all()
        _, _, terminated, truncated, _ = env.step(random_actions(env, rng))
        over = terminated | truncated
        if env.batch.finished_records is not None:
            lengths += env.batch.finished_records.length.tolist()
    assert not terminated.any() and set(lengths) <= {1, 2, 3, 4, 5, 6} and len(set(lengths)) > 3


def test_embedding_actions_rank_and_duplicates_are_replaced_within_the_list(world):
    config = sessions(world, action_mode="embedding")
    env = KuaiFairVecEnv(world, config, 16, seed=0)
    env.reset()
    actions = np.random.default_rng(2).uniform(-1, 1, (16, world.dimension)).astype(np.float32)
    own = [set(np.flatnonzero(row)) for row in env.batch.action_masks()]
    env.step(actions)
    scores = actions @ world.embeddings[: world.n_items].T
    for row, items in enumerate(env.batch.outcome.items):
        assert list(items) == sorted(own[row], key=lambda item: -scores[row, item])[:3]
    filled = KuaiFairVecEnv(world, replace(config, action_mode="slate", duplicates="replace"), 16, seed=0)
    filled.reset()
    filled.step(np.zeros((16, 3), np.int64))
    for row, items in enumerate(filled.batch.outcome.items):
        assert set(items) <= own[row] and len(set(items)) == 3


def test_a_slate_of_foreign_items_is_refused(world):
    env = KuaiFairEnv(world, sessions(world))
    env.reset(seed=0)
    foreign = np.flatnonzero(~env.action_masks()[: world.n_items])[:3]
    with pytest.raises(ValueError, match=f"may not be shown item {foreign[0]}.* none of the user's own candidates"):
        env.step(foreign)


def test_what_a_replay_cannot_do_is_said(world):
    with pytest.raises(ValueError, match="would get the same answer again, so repeats='forbid' is needed"):
        KuaiFairEnv(world, sessions(world, repeats="allow"))
    with pytest.raises(ValueError, match=r"slates of 6 need users .* one of this world has 5; .*min_candidates=6"):
        KuaiFairEnv(world, sessions(world, slate_size=6))
    with pytest.raises(DataError, match="no vectors of users' tastes that could drift"):
        KuaiFairEnv(world, sessions(world, drift=15))


def test_agents_see_what_may_be_shown_and_not_what_was_answered(world):
    view = world_for_agents(world)
    assert view.user_candidates is world.user_candidates
    with pytest.raises(HiddenTruthError):
        view.response.expected_catalogue(world.users, N_ITEMS)


def test_users_leave_as_elsewhere(data, world):
    """Under ``personal`` a user tolerates the popular share of the own clicks among random exposures."""
    env = KuaiFairVecEnv(world, sessions(world, leave="personal", max_len=6), 16, seed=0)
    result = evaluate(lambda seen, action_masks: slates_by(np.arange(N_ITEMS), seen, action_masks, 3), env)
    popular = world.groups.popular
    clicks = world.data.test.take(world.data.test.clicks)
    user = int(world.users[-1])
    own = clicks.items[clicks.users == user]
    mean = popular[clicks.items].mean()
    expected = (popular[own].sum() + 10 * mean) / (len(own) + 10)
    assert world.tolerated_shares[user] == pytest.approx(np.clip(expected, 0.1, 0.9))
    assert 0 < result.fairness.violation_rate < 1


# ---------------------------------------------------------------- evaluation, against brute force


def slates_by(scores, observations, action_masks, size):
    """The allowed items of the largest scores, best first."""
    masks = action_masks.reshape(len(observations), -1)[:, : len(scores)]
    ranked = np.where(masks, scores, -np.inf)
    return np.argsort(-ranked, axis=1, kind="stable")[:, :size]


@pytest.mark.parametrize("max_len", [2, 30])
def test_evaluation_agrees_with_a_loop_over_the_log(data, world, max_len):
    scores = np.random.default_rng(6).normal(size=N_ITEMS)
    of_rows = dict(zip(world.item_ids.tolist(), scores, strict=True))
    known = answers(data.test)
    clicks, ranking = [], []
    for user in world.users:
        own = sorted((item for who, item in known if who == user), key=lambda item: -of_rows[data.items.ids[item]])
        steps = min(max_len, len(own) // 3)
        gains = np.asarray([known[user, item] for item in own])
        clicks.append(gains[: 3 * steps].sum())
        for step in range(steps):
            best = np.sort(gains[3 * step :])[::-1][:3]
            if best[0] > 0:
                ranking.append(ndcg(gains[None, 3 * step : 3 * step + 3], best[None])[0])
    config = sessions(world, max_len=max_len)

    def policy(observations, action_masks):
        return slates_by(scores, observations, action_masks, 3)

    forms = (
        KuaiFairVecEnv(world, config, 7, seed=0),
        KuaiFairEnv(world, config),
        KuaiFairVectorEnv(world, config, 5, AutoresetMode.NEXT_STEP),
    )
    for env in forms:
        result = evaluate(policy, env, ranking=True)
        np.testing.assert_allclose(3 * result.sessions.return_, clicks, rtol=1e-9)
        assert result.ndcg == pytest.approx(np.mean(ranking))
        assert result.world["response"]["kind"] == "logged"


# ---------------------------------------------------------------- ids


def frames(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A training log, and random exposures of 30 users who were shown 12 to 17 of 20 articles."""
    rng = np.random.default_rng(seed)
    rows = 1_500
    train = pd.DataFrame(
        {"user_id": rng.integers(60, size=rows), "item_id": rng.integers(20, size=rows), "time": np.arange(rows)}
    )
    train["click"] = rng.random(rows) < 0.2 + 0.5 * ((train.user_id + train.item_id) % 2)
    shown = [rng.choice(20, 12 + user % 6, replace=False) for user in range(30)]
    users = np.repeat(np.arange(30), [len(items) for items in shown])
    test = pd.DataFrame({"user_id": users, "item_id": np.concatenate(shown), "time": 10_000 + np.arange(len(users))})
    test["click"] = rng.random(len(test)) < 0.4
    return train, test


def test_an_own_log_is_replayed_in_every_form(registry):
    train, test = frames()
    register_world("Replay-v0", train, test, replay=True, min_test_exposures=1)
    register_world("Modelled-v0", train, test, name="Replay-v0", min_test_exposures=1)
    with pytest.raises(ValueError, match="registered with other data"):
        register_world("Replay-v0", train, test, min_test_exposures=1)
    settings = {"embedding_dim": 4, "action_mode": "slate", "split": "test"}
    single = gym.make("Replay-v0", **settings)
    vector = gym.make_vec("Replay-v0", num_envs=2, **settings)
    native = make_sb3("Replay-v0", n_envs=2, **settings)
    for env in (single.unwrapped, vector.unwrapped, native):
        assert (env.config.items_per_slate, env.config.repeats) == (5, "forbid")
        assert env.world is single.unwrapped.world
    item = gym.make("Replay-v0", embedding_dim=4, action_mode="item", split="test").unwrapped
    assert item.config.items_per_slate == 1 and item.world is single.unwrapped.world
    assert gym.make("Replay-v0", **{**settings, "slate_size": None}).unwrapped.config.items_per_slate == 5
    for size, fewest in ((8, 8), (14, 14)):
        large = gym.make("Replay-v0", slate_size=size, **settings).unwrapped.world
        assert large.user_candidates.counts[large.users].min() >= fewest
    few = make_world("Replay-v0", embedding_dim=4, split="test", min_candidates=16)
    assert set(few.user_candidates.counts[few.users]) <= {16, 17}
    with pytest.raises(ValueError, match="repeats='forbid' is needed"):
        gym.make("Replay-v0", repeats="allow", **settings)
    with pytest.raises(ValueError, match="nothing is modelled; drop response='factorised'"):
        gym.make("Replay-v0", response="factorised", **settings)
    with pytest.raises(ValueError, match=r"'min_candidates' is a setting of replays, .*Modelled-v0 is none"):
        make_world("Modelled-v0", min_candidates=3)
    with pytest.raises(ValueError, match="min_candidates must be a whole number of at least 1, got 0"):
        make_world("Replay-v0", split="test", min_candidates=0)


def test_training_worlds_of_replays_are_the_usual_ones_and_know_no_random_answer(registry):
    train, test = frames()
    changed = test.assign(click=~test.click)
    register_world("Replay-v0", train, test, replay=True, min_test_exposures=1)
    register_world("Modelled-v0", train, test, name="Replay-v0", min_test_exposures=1)
    register_world("Changed-v0", train, changed, name="Replay-v0", replay=True, min_test_exposures=1)
    worlds = {name: make_world(name, embedding_dim=4) for name in ("Replay-v0", "Modelled-v0", "Changed-v0")}
    usual = worlds["Replay-v0"]
    assert not usual.fingerprint.differences(worlds["Modelled-v0"].fingerprint)
    assert usual.fingerprint.differences(worlds["Changed-v0"].fingerprint) == ["data"]
    assert usual.user_candidates is None
    replayed = make_world("Replay-v0", split="test", embedding_dim=4)
    np.testing.assert_array_equal(usual.item_ids, replayed.item_ids)
    np.testing.assert_array_equal(usual.embeddings, replayed.embeddings)
    assert not np.intersect1d(usual.users, replayed.users).size


def test_files_that_are_replayed_say_so(registry, tmp_path):
    for name, frame in zip(("train.csv", "random.csv"), frames(), strict=True):
        frame.to_csv(tmp_path / name, index=False)
    files = [str(tmp_path / name) for name in ("train.csv", "random.csv")]
    register_world("Replay-v0", *files, replay=True, min_test_exposures=1)
    world = make_world("Replay-v0", split="test", embedding_dim=4)
    assert isinstance(world.response, LoggedResponse)
    assert world.data.provenance.settings["tables"]["replay"] is True


def test_official_files_are_replayed(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "KuaiRand-Pure" / "data"
    random = write_kuairand(folder, n_users=80, size=8)["log_random_4_22_to_5_08_pure.csv"]
    files = {"data_dir": tmp_path, "allow_partial": True}
    env_id = "KuaiFair-KuaiRandReplay-v0"
    env = gym.make(env_id, split="test", action_mode="slate", **files).unwrapped
    known = {(row.user_id, row.video_id): row.is_click for row in random.sort_values("time_ms").itertuples()}
    env.reset(seed=0)
    over = False
    while not over:
        slate = np.flatnonzero(env.action_masks()[: env.world.n_items])[:5]
        _, _, terminated, truncated, info = env.step(slate)
        assert list(info["clicks"]) == [known[info["user_id"], item] for item in info["item_ids"]]
        over = terminated or truncated
    train, plain = (make_world(name, split="train", **files) for name in (env_id, "KuaiFair-KuaiRand-v0"))
    assert train is plain
