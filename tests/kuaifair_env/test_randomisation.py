"""Structured randomisation: what is shared in a block, what is a session's own, lengths of blocks, and scales."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
from helpers import TableResponse, small_world
from scipy import stats

from kuaifair_env import KuaiFairEnv, SessionConfig, make_world, seeding
from kuaifair_env.agent_view import sessions_for_agents
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import DataError, HiddenTruthError
from kuaifair_env.files import save_artifact
from kuaifair_env.randomisation import (
    Randomisation,
    SessionBlocks,
    SessionRandomisation,
    WorldRandomisation,
    offset_shape,
    randomisation_setting,
)
from kuaifair_env.randomised_worlds import SCALES, at_least, estimated_randomisation, log_disagreement, randomised
from kuaifair_env.response.base import sigmoid
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import HALVES, user_hashes
from kuaifair_env.world import World

NOTHING = Randomisation(offset=0.0, vector=0.0, own_level=0.0, own_vector=0.0, noise=0.0)
SHARED = replace(NOTHING, offset=1.0, vector=1.0)
SHORT = replace(Randomisation(), min_block=6, max_block=6)
CONFIG = SessionConfig(action_mode="slate", max_len=4, slate_size=5)


def training_world(table: float | None = 0.5, n_items: int = 50) -> World:
    return replace(small_world(table, n_items=n_items), split="train")


def started(scales: Randomisation, n_sessions: int, *, first: int = 0, seed: int = 0, world: World | None = None):
    """Deviations of sessions that start one after the other, of users in turn."""
    world = training_world() if world is None else world
    sessions = SessionRandomisation(
        WorldRandomisation(scales, seed), world.item_directions, world.exposures, n_sessions
    )
    numbers = first + np.arange(n_sessions)
    sessions.reset(np.arange(n_sessions), numbers % 40, seeding.stream_keys(first, n_sessions), numbers)
    return sessions


def log_odds(expected: np.ndarray) -> np.ndarray:
    return np.log(expected.astype(np.float64)) - np.log1p(-expected.astype(np.float64))


def test_within_a_block_shared_deviations_are_the_same_for_all_users_and_sessions():
    sessions = started(replace(SHARED, min_block=20, max_block=20), 60)
    np.testing.assert_array_equal(sessions.blocks, np.repeat([0, 1, 2], 20))
    deviations = sessions.of_catalogue(50).reshape(3, 20, 50)
    np.testing.assert_allclose(deviations, np.repeat(deviations[:, :1], 20, axis=1), atol=1e-5)


def test_between_blocks_shared_deviations_are_unrelated():
    world = training_world(n_items=400)
    sessions = started(replace(SHARED, vector=0.0, min_block=1, max_block=1), 40, world=world)
    correlations = np.corrcoef(sessions.of_catalogue(400))[np.triu_indices(40, 1)]
    # 780 correlations over 400 items, each with a standard deviation of .05.
    assert abs(correlations.mean()) < 0.01 and np.abs(correlations).max() < 0.25
    sessions = started(replace(NOTHING, vector=1.0, min_block=1, max_block=1), 3000)
    vectors = np.linalg.lstsq(training_world().item_directions, sessions.of_catalogue(50).T, rcond=None)[0].T
    np.testing.assert_allclose(vectors[1:].T @ vectors[:-1] / 2999, 0, atol=0.1)
    np.testing.assert_allclose(np.cov(vectors.T), np.eye(8), atol=0.15)


def test_offsets_are_as_wide_as_the_exposures_say():
    world = training_world()
    sessions = started(replace(NOTHING, offset=0.7, min_block=1, max_block=1), 4000)
    deviations = sessions.of_catalogue(50)
    np.testing.assert_allclose(deviations.std(axis=0), 0.7 * (0.35 + 0.6 / (1 + world.exposures / 50)), rtol=0.06)
    np.testing.assert_allclose(offset_shape(np.asarray([0, 50, 10**9])), [0.95, 0.65, 0.35], atol=1e-6)


def test_lengths_of_blocks_are_log_uniform():
    scales = Randomisation(min_block=64, max_block=5_000)
    blocks = SessionBlocks(WorldRandomisation(scales, seed=3))
    numbers = np.arange(2_000_000)
    lengths = np.bincount(blocks.of_sessions(numbers))[:-1]
    assert len(lengths) > 1000 and lengths.min() >= 64 and lengths.max() <= 5000
    assert stats.kstest(lengths, stats.loguniform(64, 5001).cdf).pvalue > 0.01
    np.testing.assert_array_equal(blocks.of_sessions(numbers[::-1]), np.sort(blocks.of_sessions(numbers))[::-1])
    again = SessionBlocks(WorldRandomisation(scales, seed=3))
    np.testing.assert_array_equal(again.of_sessions(numbers[::997]), blocks.of_sessions(numbers)[::997])


def test_each_session_has_a_level_and_a_vector_of_its_own():
    sessions = started(replace(NOTHING, own_level=0.5, own_vector=0.3), 4000)
    design = np.column_stack([np.ones(50), training_world().item_directions])
    parts = np.linalg.lstsq(design, sessions.of_catalogue(50).T, rcond=None)[0].T
    np.testing.assert_allclose(np.cov(parts.T), np.diag([0.25] + [0.09] * 8), atol=0.03)
    # The same 40 users come a hundred times.
    level = parts[:, 0].reshape(100, 40)
    assert np.abs(np.corrcoef(level.T)[np.triu_indices(40, 1)]).max() < 0.6


def test_noise_belongs_to_user_and_item_for_good():
    sessions = started(replace(NOTHING, noise=0.4), 80)
    deviations = sessions.of_catalogue(50)
    np.testing.assert_array_equal(deviations[:40], deviations[40:])
    assert deviations[:40].std() == pytest.approx(0.4, rel=0.05)
    assert np.abs(np.corrcoef(deviations[:40])[np.triu_indices(40, 1)]).max() < 0.7


def test_log_odds_are_those_of_the_model_and_the_sum_of_all_parts():
    """Each part, drawn alone with the same seed, in a world whose response is a table."""
    world = training_world(None)
    scales = replace(Randomisation(), min_block=7, max_block=7)
    parts = [replace(NOTHING, **{name: getattr(scales, name)}) for name in asdict(scales) if "block" not in name]
    parts = [replace(part, min_block=7, max_block=7) for part in parts]
    total = sum(started(part, 30).of_catalogue(50).astype(np.float64) for part in parts)
    sessions = started(scales, 30)
    assert len(set(sessions.blocks)) == 5
    users = np.arange(30)
    model = sessions.response(world.response)
    expected = log_odds(world.response.expected_catalogue(users, 50)) + total
    np.testing.assert_allclose(log_odds(model.expected_catalogue(users, 50)), expected, atol=2e-4)
    slates = np.argsort(np.random.default_rng(0).random((30, 50)), axis=1)[:, :9]
    np.testing.assert_allclose(
        log_odds(model.expected(users, slates)), np.take_along_axis(expected, slates, axis=1), atol=2e-4
    )


def test_graded_feedback_deviates_in_the_log_odds_of_its_share_of_the_largest():
    world = training_world(None)
    spread = np.linspace(0.2, 1.0, 4, dtype=np.float32)[None, :]
    graded = GradedResponse(world.response, 2.0, 1.0, np.zeros(0, np.float32), spread)
    sessions, users = started(Randomisation(), 30), np.arange(30)
    np.testing.assert_allclose(
        sessions.response(graded).expected_catalogue(users, 50),
        2.0 * sessions.response(world.response).expected_catalogue(users, 50),
        rtol=1e-6,
    )


def test_clicks_follow_the_deviations():
    batch = SessionBatch(randomised(training_world(0.5), replace(NOTHING, offset=100.0)), CONFIG, 20)
    batch.reset(np.arange(20))
    expected = batch.simulator.expected_catalogue()
    slates = np.tile(np.arange(5), (20, 1))
    certain = np.abs(expected[:, :5] - 0.5) > 0.4999
    assert certain.mean() > 0.5
    np.testing.assert_array_equal(batch.step(slates).clicks[certain], expected[:, :5][certain] > 0.5)


def test_sessions_are_counted_in_the_order_of_starting_and_keep_their_block():
    world = randomised(training_world(), replace(SHARED, min_block=6, max_block=6))
    batch = SessionBatch(world, CONFIG, 4)
    batch.reset(np.arange(4))
    np.testing.assert_array_equal(batch.blocks, [0, 0, 0, 0])
    first = batch.simulator.expected_catalogue()
    batch.reset(np.asarray([2]))
    np.testing.assert_array_equal(batch.blocks, [0, 0, 0, 0])
    batch.reset(np.asarray([3, 0]))
    np.testing.assert_array_equal(batch.blocks, [1, 0, 0, 0], "six have started, and row 3 is the sixth")
    second = batch.simulator.expected_catalogue()
    np.testing.assert_array_equal(second[1:], first[1:])
    assert np.abs(log_odds(second[0]) - log_odds(first[0])).mean() > 0.3
    batch.seed(seeding.stream_keys(0, 4))
    batch.reset(np.arange(4))
    np.testing.assert_array_equal(batch.simulator.expected_catalogue(), first, "counted anew where all are seeded")


@pytest.mark.parametrize("n_envs", [1, 3, 8])
def test_the_block_of_a_session_does_not_depend_on_how_many_run_at_once(n_envs):
    world = randomised(training_world(), replace(SHARED, min_block=4, max_block=9), seed=5)
    blocks = SessionBlocks(world.randomisation).of_sessions(np.arange(24))
    env = KuaiFairVecEnv(world, CONFIG, n_envs, seed=0)
    env.reset()
    seen, rows = list(env.batch.blocks), np.arange(n_envs)
    while len(seen) < 24:
        _, _, done, _ = env.step(np.tile(np.arange(5), (n_envs, 1)))
        seen += env.batch.blocks[rows[done]].tolist()
    np.testing.assert_array_equal(seen[:24], blocks)


def test_the_same_seed_gives_the_same_sessions_and_another_one_others():
    def sessions(seed: int) -> list[tuple]:
        env = KuaiFairVecEnv(randomised(training_world(), SHORT, seed), CONFIG, 4, seed=1)
        env.reset()
        steps = [env.step(np.tile(np.arange(5) + step, (4, 1))) for step in range(12)]
        return [(step[1].tolist(), env.batch.simulator.expected_catalogue().tolist()) for step in steps]

    assert sessions(0) == sessions(0)
    assert sessions(0) != sessions(1)


def test_a_single_environment_gives_the_same_again_after_a_reset_with_a_seed():
    env = KuaiFairEnv(randomised(training_world(), SHORT), CONFIG)
    catalogues = []
    for _ in range(2):
        env.reset(seed=4)
        for _ in range(9):
            env.reset()
        assert env.batch.blocks.tolist() == [1]
        catalogues.append(env.batch.simulator.expected_catalogue())
    np.testing.assert_array_equal(*catalogues)


def test_tastes_may_drift_as_well():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 2))
    response = FactorisedResponse(0.0, np.zeros(40), np.zeros(50), vectors, rng.standard_normal((50, 2)))
    plain = replace(training_world(), response=response)
    differences = []
    batches = [SessionBatch(world, replace(CONFIG, drift=2, leave="never"), 6) for world in (plain, randomised(plain))]
    for batch in batches:
        batch.reset(np.arange(6))
    for _ in range(3):
        catalogues = [log_odds(batch.simulator.expected_catalogue()) for batch in batches]
        differences.append(catalogues[1] - catalogues[0])
        for batch in batches:
            batch.step(np.tile(np.arange(5), (6, 1)))
    np.testing.assert_allclose(differences, np.tile(differences[0], (3, 1, 1)), atol=1e-4)
    assert np.abs(differences[0]).mean() > 0.3


def test_running_sessions_that_are_restored_go_on_in_their_blocks():
    world = randomised(training_world(), SHORT)
    batches = [SessionBatch(world, replace(CONFIG, leave="never"), 4) for _ in range(2)]
    first, second = batches
    for rows in ([0, 1, 2, 3], [1], [2], [1]):
        first.reset(np.asarray(rows))
    first.step(np.tile(np.arange(5), (4, 1)))
    state = {name: np.copy(value) for name, value in first.simulator.state()["randomisation"].items()}
    assert max(array.size for array in state.values()) < 50, "no tables of all items"
    second.restore(first.state())
    second.simulator.source.next(np.asarray([1, 1, 2]))
    second.simulator.source.next(np.arange(4))
    assert first.simulator.started == second.simulator.started == 7
    np.testing.assert_array_equal(first.simulator.expected_catalogue(), second.simulator.expected_catalogue())
    for batch in batches:
        batch.reset(np.asarray([0]))
        assert batch.blocks.tolist() == [1, 1, 0, 0]


def test_a_randomised_world_is_another_one_and_says_how_it_is_made():
    world = training_world()
    one, two = randomised(world, SHORT, 1), randomised(world, SHORT, 2)
    assert one.fingerprint.differences(world.fingerprint) == two.fingerprint.differences(one.fingerprint) == ["form"]
    assert one.describe()["randomisation"] == {**asdict(SHORT), "seed": 1}
    assert "randomisation" not in world.describe() and randomised(world, None) is world
    assert one.response is world.response
    json.dumps(one.describe())


def test_only_training_worlds_are_randomised():
    with pytest.raises(DataError, match="only training worlds are randomised"):
        randomised(small_world())
    with pytest.raises(DataError, match="only training worlds are randomised"):
        replace(small_world(), randomisation=WorldRandomisation(SHORT))


def test_agents_know_the_blocks_and_nothing_of_the_deviations():
    batch = SessionBatch(randomised(training_world(), SHORT), CONFIG, 8)
    batch.reset(np.arange(8))
    shown = sessions_for_agents(batch)
    assert shown.blocks.tolist() == shown.simulator.blocks.tolist() == [0] * 6 + [1] * 2
    with pytest.raises(HiddenTruthError, match="how training users deviate"):
        _ = shown.world.randomisation.seed
    with pytest.raises(HiddenTruthError):
        _ = shown.simulator._randomisation
    plain = SessionBatch(training_world(), CONFIG, 3)
    plain.reset(np.arange(3))
    assert plain.blocks.tolist() == [0, 0, 0]


def test_settings_are_names_or_numbers_by_name():
    assert randomisation_setting("auto") == "auto"
    assert randomisation_setting("none") is randomisation_setting(None) is None
    assert randomisation_setting({"offset": 2}) == Randomisation(offset=2)
    for value, words in (
        ("loud", "must be auto, none, or numbers by name"),
        ({"ofset": 1}, "randomisation has no ofset; it has offset, vector"),
        ({"noise": -1}, "randomisation.noise must be finite and not negative, got -1"),
        ({"noise": "x"}, "randomisation.noise must be a number"),
        ({"min_block": 0}, "needs 1 <= min_block <= max_block"),
        ({"min_block": 100, "max_block": 99}, "needs 1 <= min_block <= max_block"),
        ({"min_block": 1.5}, "randomisation.min_block must be a number"),
    ):
        with pytest.raises(ValueError, match=words):
            randomisation_setting(value)


def log_made_with(scales: Randomisation, world: World, seed: int) -> InteractionLog:
    """The log's exposures, answered by two halves of the users who differ in the shared part, twice a user."""
    rng, log, directions = np.random.default_rng(seed), world.data.train, world.item_directions
    n_users, dimension = len(world.data.users), directions.shape[1]
    half = (user_hashes(world.data.users.ids, HALVES) % np.uint64(2)).astype(int)[log.users]
    shared = scales.offset * offset_shape(log.exposures(len(directions))) * rng.standard_normal((2, len(directions)))
    shared += scales.vector * rng.standard_normal((2, dimension)) @ directions.T
    offsets = log.offsets(n_users)
    later = np.arange(len(log)) - offsets[log.users] >= np.diff(offsets)[log.users] // 2
    session = 2 * log.users.astype(int) + later
    logits = -0.2 + rng.standard_normal(n_users)[log.users] * 0.5 + shared[half, log.items]
    logits += scales.own_level * rng.standard_normal(2 * n_users)[session]
    vectors = scales.own_vector * rng.standard_normal((2 * n_users, dimension))
    logits += (vectors[session] * directions[log.items]).sum(axis=1)
    return replace(log, clicks=rng.random(len(log)) < sigmoid(logits))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "margin"),
    [("offset", 0.8, 0.2), ("vector", 0.7, 0.15), ("own_level", 0.6, 0.15), ("own_vector", 0.9, 0.3)],
)
def test_scales_with_which_a_log_was_made_are_recovered(name, value, margin):
    """Over three logs of the toy twin's exposures; the other scales come out small."""
    world = make_world("KuaiFair-Toy-v0", split="train")
    ids, directions = world.data.users.ids, world.item_directions
    measured = [
        asdict(log_disagreement(log_made_with(replace(NOTHING, **{name: value}), world, seed), ids, directions))
        for seed in range(3)
    ]
    means = {scale: np.mean([of_log[scale] for of_log in measured]) for scale in asdict(NOTHING)}
    assert means[name] == pytest.approx(value, abs=margin)
    assert all(means[other] < 0.35 for other in ("offset", "vector", "own_level", "own_vector") if other != name)
    assert means["noise"] == 0.0


def test_a_log_agrees_with_itself_so_that_scales_are_at_least_the_wide_ones(tmp_path):
    world = make_world("KuaiFair-Toy-v0", split="train")
    measured = log_disagreement(world.data.train, world.data.users.ids, world.item_directions)
    assert max(measured.offset, measured.vector, measured.own_level, measured.own_vector) < 0.5
    assert estimated_randomisation(world, tmp_path) == Randomisation()
    assert at_least(replace(NOTHING, vector=3.0), Randomisation()) == replace(Randomisation(), vector=3.0)


def test_estimated_scales_are_kept_and_damaged_files_made_again(tmp_path, rebuilt):
    world = training_world()
    scales = estimated_randomisation(world, tmp_path)
    (path,) = (tmp_path / "responses").iterdir()
    kept = replace(scales, offset=7.0, noise=0.1, min_block=64, max_block=5_000)  # of other defaults
    save_artifact(path, "randomisation", {}, asdict(kept), SCALES)
    assert estimated_randomisation(world, tmp_path) == replace(Randomisation(), offset=7.0)
    assert not rebuilt()
    for content in (b"", b"{", path.read_bytes().replace(b"7.0", b"7.5")):
        path.write_bytes(content)
        assert estimated_randomisation(world, tmp_path) == scales
        (line,) = rebuilt()
        assert str(path) in line
    save_artifact(path, "randomisation", {}, {"offset": "wide"}, SCALES)
    assert estimated_randomisation(world, tmp_path) == scales
    assert len(rebuilt()) == 1


def test_the_truth_is_not_read_for_the_scales(tmp_path):
    class Silent(TableResponse):
        def expected(self, users, items, history=None):
            raise AssertionError("asked what users like")

    world = training_world()
    scales = estimated_randomisation(world, tmp_path)
    other = replace(world, response=Silent(world.response.table))
    assert estimated_randomisation(other, tmp_path / "again") == scales


def test_plain_environments_are_not_randomised():
    env = gym.make("KuaiFair-Toy-v0")
    assert env.unwrapped.world.randomisation is None
