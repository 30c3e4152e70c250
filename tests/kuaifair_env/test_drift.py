"""Tastes that drift do so as the formula says, and oracles know where they are."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import small_world

from kuaifair_env import KuaiFairEnv, SessionConfig, make_world
from kuaifair_env.batch import SessionBatch
from kuaifair_env.drift import TasteDrift
from kuaifair_env.errors import DataError
from kuaifair_env.response.factorised import FactorisedResponse

TOY = "KuaiFair-Toy-v0"
SLATES = 15


def taste_world(scale: float = 1.0):
    """40 users and 50 items in two dimensions of taste, of which the second is half as wide."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 2)) * [scale, scale / 2]
    items = rng.standard_normal((50, 2))
    response = FactorisedResponse(0.0, np.zeros(40), np.zeros(50), vectors, items)
    return replace(small_world(0.5), response=response)


def test_after_so_many_slates_tastes_correlate_by_half_with_the_start_and_are_as_spread_as_before():
    world, batch_size = taste_world(), 20_000
    drift = TasteDrift(world, batch_size, SLATES)
    users = np.arange(batch_size) % 40
    drift.reset(np.arange(batch_size), users, np.arange(batch_size, dtype=np.uint64))
    start = drift.tastes.copy()
    np.testing.assert_array_equal(start, world.response.tastes(users))
    correlations = []
    for step in range(1, 2 * SLATES + 1):
        drift.step(np.full(batch_size, step))
        correlations.append([np.corrcoef(start[:, axis], drift.tastes[:, axis])[0, 1] for axis in (0, 1)])
    # Five standard deviations of a correlation over 20,000 sessions are .035.
    expected = 0.5 ** (np.arange(1, 2 * SLATES + 1) / SLATES)
    np.testing.assert_allclose(np.array(correlations), np.tile(expected[:, None], 2), atol=0.035)
    np.testing.assert_allclose(np.sqrt((drift.tastes**2).mean(axis=0)), np.sqrt((start**2).mean(axis=0)), rtol=0.03)


def test_the_oracle_sees_the_current_taste():
    """With tastes this strong feedback is certain: what the catalogue says now is what happens."""
    world = taste_world(1e4)
    batch = SessionBatch(world, SessionConfig(action_mode="slate", drift=2, leave="never"), 16)
    batch.reset(np.arange(16))
    simulator = batch.simulator
    start = simulator.expected_catalogue()
    np.testing.assert_array_equal(start, world.response.expected_catalogue(simulator.users, 50))
    rng = np.random.default_rng(1)
    for _ in range(6):
        slates = np.argsort(rng.random((16, 50)), axis=1)[:, :10]
        expected = np.take_along_axis(simulator.expected_catalogue(), slates, axis=1)
        certain = np.abs(expected - 0.5) > 0.49
        clicks = batch.step(slates).clicks
        np.testing.assert_array_equal(clicks[certain], expected[certain] > 0.5)
        assert certain.mean() > 0.9
    assert np.abs(simulator.expected_catalogue() - start).mean() > 0.2, "tastes have moved"


def test_what_is_shown_does_not_matter_to_the_drift():
    catalogues = []
    for first in (0, 20):
        batch = SessionBatch(taste_world(), SessionConfig(action_mode="slate", drift=SLATES), 4)
        batch.reset(np.arange(4))
        for _ in range(3):
            batch.step(np.tile(np.arange(first, first + 10), (4, 1)))
        catalogues.append(batch.simulator.expected_catalogue())
    np.testing.assert_array_equal(*catalogues)


def test_sessions_are_the_same_in_any_batch_and_with_the_same_seed():
    world = taste_world()
    slates = np.argsort(np.random.default_rng(0).random((6, 50)), axis=1)[:, :10]

    def played(rows: np.ndarray) -> np.ndarray:
        batch = SessionBatch(world, SessionConfig(action_mode="slate", drift=SLATES), len(rows))
        batch.seed(np.arange(6, dtype=np.uint64)[rows])
        batch.reset(np.arange(len(rows)))
        clicks = [batch.step(slates[rows]).clicks for _ in range(12)]
        return np.concatenate([*clicks, batch.simulator._drift.tastes.view(np.uint8)], axis=1)

    together = played(np.arange(6))
    np.testing.assert_array_equal(together, np.concatenate([played(np.array([row])) for row in range(6)]))
    np.testing.assert_array_equal(together, played(np.arange(6)))


def test_a_new_session_starts_from_the_users_own_taste():
    world = taste_world()
    batch = SessionBatch(world, SessionConfig(action_mode="slate", drift=3), 4)
    batch.reset(np.arange(4))
    for _ in range(5):
        batch.step(np.tile(np.arange(10), (4, 1)))
    batch.reset(np.array([2]))
    now, users = batch.simulator.expected_catalogue(), batch.simulator.users
    fresh = world.response.expected_catalogue(users, 50)
    assert [bool(np.array_equal(*rows)) for rows in zip(now, fresh, strict=True)] == [False, False, True, False]


@pytest.mark.parametrize("positive", ["is_click", {"is_click": 1.0, "is_like": 2.0}])
def test_users_with_their_own_tastes_are_the_users_of_the_twin(positive):
    world = make_world(TOY, split="test", positive=positive)
    response, users = world.response, world.users[:7]
    same = response.with_tastes(users, response.tastes(users))
    np.testing.assert_allclose(
        same.expected_catalogue(np.arange(7), 30), response.expected_catalogue(users, 30), rtol=1e-6
    )
    items = np.tile(np.arange(30), (7, 1))
    np.testing.assert_allclose(same.expected(np.arange(7), items), response.expected(users, items), rtol=1e-6)


def test_it_is_a_setting_and_users_without_tastes_are_refused():
    env = gym.make(TOY, split="test", drift=SLATES)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert gym.make(env.spec).unwrapped.batch.config.drift == SLATES
    for wrong in (0, -1.0, "slow", float("nan")):
        with pytest.raises(ValueError, match="positive number of slates"):
            SessionConfig(drift=wrong)
    with pytest.raises(DataError, match="TableResponse has no vectors of users' tastes"):
        KuaiFairEnv(small_world(), SessionConfig(drift=SLATES))
