"""What users tolerate follows from unbiased clicks alone, and agents are not told."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import small_world

from kuaifair_env import SessionConfig, make_world
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.tolerance import logged_shares

TOY = "KuaiFair-Toy-v0"
POPULAR = np.array([True, False, False])


def log_of(rows: list[tuple[int, int, int]]) -> InteractionLog:
    users, items, clicks = np.array(rows).T
    return InteractionLog.sorted(users, items, clicks)


def test_shares_are_counted_and_shrunken_by_the_number_of_clicks():
    # User 0: 3 of 4 clicks popular; user 1: none of 1; user 2 clicked what is no candidate; user 3 nothing.
    log = log_of([(0, 0, 1), (0, 0, 1), (0, 0, 1), (0, 1, 1), (0, 2, 0), (1, 2, 1), (2, 3, 1), (3, 0, 0)])
    mean = 3 / 5
    expected = [(3 + 10 * mean) / 14, (0 + 10 * mean) / 11, mean, mean]
    np.testing.assert_allclose(logged_shares(log, 4, POPULAR, np.ones(3)), expected)


def test_weights_undo_what_the_log_showed_too_often():
    # The popular item was shown four times as often as the others; by weight users like all three alike.
    log = log_of([(0, 0, 1)] * 4 + [(0, 1, 1), (0, 2, 1)])
    (share,) = logged_shares(log, 1, POPULAR, np.array([0.25, 1.0, 1.0]))
    assert share == pytest.approx(1 / 3)
    # Weights w of unequal size are worth (sum w)^2 / sum w^2 clicks.
    two = log_of([(0, 0, 1)] * 4 + [(1, 1, 1), (1, 2, 1)])
    shares = logged_shares(two, 2, POPULAR, np.array([0.25, 1.0, 1.0]))
    np.testing.assert_allclose(shares, [(4 + 10 / 3) / 14, (0 + 10 / 3) / 12])


def test_a_log_without_clicks_says_so():
    with pytest.raises(DataError, match="no candidate was clicked"):
        logged_shares(log_of([(0, 0, 0)]), 1, POPULAR, np.ones(3))


def test_each_world_reads_its_own_source_alone():
    test = small_world()
    train = replace(test, split="train")
    ones, popular = np.ones(50), test.groups.popular
    np.testing.assert_array_equal(test.tolerated_shares, logged_shares(test.data.test, 40, popular, ones))
    weighted = logged_shares(train.data.train, 40, popular, 1 / np.maximum(train.exposures, 1))
    np.testing.assert_array_equal(train.tolerated_shares, np.clip(weighted, 0.1, 0.9))


def test_in_a_twin_it_is_the_popular_share_of_true_clicks_on_random_slates():
    world = make_world(TOY, split="test")
    expected = world.response.expected_catalogue(world.users, world.n_items).astype(np.float64)
    shares = expected[:, world.groups.popular].sum(axis=1) / expected.sum(axis=1)
    np.testing.assert_allclose(world.tolerated_shares[world.users], np.clip(shares, 0.1, 0.9), rtol=1e-5)
    assert len(np.unique(world.tolerated_shares[world.users])) > 100, "users differ"


def test_agents_see_nothing_of_it_but_whether_temper_fell():
    """Two worlds that differ in tolerance alone show agents the same until a slate is punished in one of them."""
    seen = []
    for share in (0.3, 0.7):
        world = small_world(0.5)
        vars(world)["tolerated_shares"] = np.full(40, share)
        config = SessionConfig(leave="personal", action_mode="slate", observation_mode="history")
        env = KuaiFairVecEnv(world, config, 8, seed=0)
        observations = [env.reset()]
        popular, tail = np.flatnonzero(world.groups.popular)[:5], np.flatnonzero(~world.groups.popular)[:5]
        for _ in range(3):
            observation, reward, _, infos = env.step(np.tile(np.r_[popular, tail], (8, 1)))
            observations += [observation, reward, infos]
        seen.append(observations)
    np.testing.assert_equal(seen[0], seen[1])


def test_sessions_are_the_same_in_any_batch_and_with_the_same_seed():
    world = small_world()
    slates = np.argsort(np.random.default_rng(0).random((6, world.n_items)), axis=1)[:, :10]

    def tempers(rows: np.ndarray) -> np.ndarray:
        batch = SessionBatch(world, SessionConfig(leave="personal", action_mode="slate"), len(rows))
        batch.seed(np.arange(6, dtype=np.uint64)[rows])
        batch.reset(np.arange(len(rows)))
        return np.stack([batch.step(slates[rows]).temper for _ in range(4)], axis=1)

    together = tempers(np.arange(6))
    np.testing.assert_array_equal(together, np.concatenate([tempers(np.array([row])) for row in range(6)]))
    np.testing.assert_array_equal(together, tempers(np.arange(6)))


def test_it_is_a_setting_like_every_leave_rule():
    env = gym.make(TOY, split="test", leave="personal:ad_bound=0.2")
    env.reset(seed=0)
    info = env.step(env.action_space.sample())[4]
    assert info["disparity"] == pytest.approx(abs(2 * info["popular_share"] - 1))
    assert gym.make(env.spec).unwrapped.batch.config == env.unwrapped.batch.config
