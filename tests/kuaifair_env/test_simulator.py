"""The dynamics: invariants that hold for every policy, and agreement with closed forms."""

from __future__ import annotations

import copy
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers import small_world
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env import seeding
from kuaifair_env.abandonment import NeverLeave, TemperFairness
from kuaifair_env.batch import SessionBatch, SessionConfig
from kuaifair_env.metrics import expected_length
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import FixedSessions, RandomUsers, SessionSimulator

WORLD = small_world()


def simulator(world=WORLD, batch_size=4, seed=0, **settings):
    settings = {"max_len": 12, "slate_size": 5, "leave": TemperFairness()} | settings
    source = RandomUsers(world.users, seeding.stream_keys(seed, batch_size))
    built = SessionSimulator(world, batch_size, source, **settings)
    built.reset(np.arange(batch_size))
    return built


def random_slates(rng, batch_size, slate_size, n_items=50):
    return np.argsort(rng.random((batch_size, n_items)), axis=1)[:, :slate_size]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.integers(4, 12),
    st.integers(1, 15),
    st.sampled_from(["log", "empty"]),
    st.integers(0, 1000),
)
def test_invariants_of_every_session(batch_size, slate_size, max_len, initial_history, seed):
    sim = simulator(
        batch_size=batch_size,
        slate_size=slate_size,
        max_len=max_len,
        initial_history=initial_history,
        seed=seed,
    )
    rng = np.random.default_rng(seed)
    shown = [[] for _ in range(batch_size)]
    length = WORLD.history_length
    start = sim.history(length=length)
    before = [list(zip(start.items[row], start.clicks[row], strict=True)) for row in range(batch_size)]
    users = sim.users.copy()
    temper = sim.temper.copy()
    for _ in range(3 * max_len):
        items = random_slates(rng, batch_size, slate_size)
        outcome = sim.step(items)
        assert (outcome.temper < temper).all(), "temper only falls"
        temper = outcome.temper.copy()
        assert (sim.steps <= max_len).all(), "Len <= max_len"
        np.testing.assert_array_equal(sim.users, users)
        np.testing.assert_allclose(outcome.popular_share, WORLD.groups.popular[items].mean(axis=1))
        np.testing.assert_allclose(outcome.reward, outcome.feedback.mean(axis=1))
        for row in range(batch_size):
            shown[row] += list(zip(items[row], outcome.clicks[row], strict=True))
            expected = (before[row] + shown[row])[-length:]
            window = sim.history(length=length)
            assert list(zip(window.items[row], window.clicks[row], strict=True)) == expected
        over = np.flatnonzero(outcome.done)
        sim.reset(over)
        fresh = sim.history(length=length)
        for row in over:
            shown[row] = []
            before[row] = list(zip(fresh.items[row], fresh.clicks[row], strict=True))
            own = WORLD.initial_history.items[sim.users[row]] if initial_history == "log" else np.full(20, -1)
            np.testing.assert_array_equal(fresh.items[row], own, "no user leaks into the next session")
        users, temper = sim.users.copy(), sim.temper.copy()
        assert (temper[over] == max_len).all()


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from(["embedding", "slate"]),
    st.sampled_from(["allow", "forbid"]),
    st.integers(4, 8),
    st.integers(0, 1000),
)
def test_slates_are_distinct_and_the_state_is_the_mean_of_what_was_clicked(mode, repeats, slate_size, seed):
    config = SessionConfig(max_len=6, slate_size=slate_size, action_mode=mode, repeats=repeats)
    batch = SessionBatch(WORLD, config, 3)
    batch.seed(seeding.stream_keys(seed, 3))
    batch.reset(np.arange(3))
    rng = np.random.default_rng(seed)
    shown = [[] for _ in range(3)]
    for _ in range(12):
        actions = rng.normal(size=(3, 8)).astype(np.float32)
        if mode == "slate":
            weights = batch.action_masks() * rng.random((3, 50))
            actions = np.argsort(-weights, axis=1)[:, :slate_size]
        outcome = batch.step(actions)
        state, window = batch.observe(), batch.history_window(WORLD.history_length)
        for row in range(3):
            assert len(set(outcome.items[row])) == slate_size
            shown[row] += outcome.items[row].tolist()
            if repeats == "forbid":
                assert len(set(shown[row])) == len(shown[row])
            clicked = window.items[row][window.clicks[row]]
            mean = WORLD.embeddings[clicked].mean(axis=0) if len(clicked) else np.zeros(8)
            np.testing.assert_allclose(state[row], mean, atol=1e-5)
        for row in batch.finished:
            shown[row] = []
        batch.reset(batch.finished)


def play(batch_size, n_sessions, seed=3):
    """Plays a fixed list of sessions whose slates depend on user and step only; returns their records."""
    sim = simulator(batch_size=batch_size)
    sessions = FixedSessions.of_users(WORLD.users[:n_sessions], 1, seed)
    sim.source = sessions
    sim.reset(np.arange(batch_size))
    rows_by_user = {}
    histories = [[] for _ in range(batch_size)]
    while len(rows_by_user) < n_sessions:
        items = (sim.users[:, None] * 3 + sim.steps[:, None] * 7 + np.arange(5)) % 50
        outcome = sim.step(items)
        for row in range(batch_size):
            histories[row].append((outcome.feedback[row].tolist(), outcome.temper[row]))
        over = np.flatnonzero(outcome.done)
        for row in over:
            if sim.numbers[row] >= 0:
                rows_by_user[int(sim.numbers[row])] = histories[row]
            histories[row] = []
        sim.reset(over)
    return rows_by_user


def test_a_session_is_the_same_in_any_batch():
    alone, together, many = play(1, 20), play(7, 20), play(64, 20)
    assert alone == together == many


def test_constant_clicks_obey_the_length_formula():
    for probability in (0.1, 0.4, 0.75):
        world = small_world(probability)
        sim = simulator(world, batch_size=512, max_len=30, slate_size=10, seed=1)
        rng = np.random.default_rng(0)
        lengths, rewards, violations, steps = [], 0.0, 0, 0
        # The first session of every row, so that short sessions are not over-represented.
        running = np.ones(512, np.bool_)
        while running.any():
            outcome = sim.step(random_slates(rng, 512, 10))
            rewards += outcome.reward[running].sum()
            violations += outcome.violation[running].sum()
            steps += running.sum()
            ended = running & outcome.done
            lengths += sim.steps[ended].tolist()
            running &= ~outcome.done
            sim.reset(np.flatnonzero(outcome.done))
        predicted = expected_length(30, rewards / steps, violations / steps)
        assert np.mean(lengths) == pytest.approx(predicted, rel=0.02)
        assert rewards / steps == pytest.approx(probability, abs=0.01)


# KuaiSim's README: total reward and depth of trained agents at temper 20.
@pytest.mark.parametrize(("depth", "mean_reward"), [(14.02, 0.598), (14.89, 0.679), (14.63, 0.648), (14.98, 0.688)])
def test_without_the_fairness_penalty_sessions_last_as_long_as_kuaisims(depth, mean_reward):
    world = small_world(mean_reward)
    sim = simulator(world, 2000, max_len=20, slate_size=6, leave=TemperFairness(unfair_penalty=0.0), seed=5)
    rng = np.random.default_rng(1)
    lengths = np.zeros(2000)
    while (lengths == 0).any():
        outcome = sim.step(random_slates(rng, 2000, 6))
        lengths = np.where((lengths == 0) & outcome.done, sim.steps, lengths)
        sim.reset(np.flatnonzero(outcome.done))
    assert lengths.mean() == pytest.approx(depth, abs=0.25)


def test_users_are_drawn_uniformly_and_seeds_differ():
    users = np.arange(10)
    source = RandomUsers(users, seeding.stream_keys(0, 50))
    drawn = np.concatenate([source.next(np.arange(50)).users for _ in range(200)])
    assert np.abs(np.bincount(drawn, minlength=10) / len(drawn) - 0.1).max() < 0.012
    again = RandomUsers(users, seeding.stream_keys(0, 50)).next(np.arange(50))
    other = RandomUsers(users, seeding.stream_keys(1000, 50)).next(np.arange(50))
    first = RandomUsers(users, seeding.stream_keys(0, 50)).next(np.arange(50))
    np.testing.assert_array_equal(first.keys, again.keys)
    assert not np.intersect1d(first.keys, other.keys).size


def test_a_row_draws_the_same_sessions_whatever_the_other_rows_do():
    keys = seeding.stream_keys(3, 4)
    numbers = np.arange(60, dtype=np.uint64)
    expected = seeding.derive(keys[:, None], numbers)
    users = (seeding.uniforms(expected, np.zeros(1, np.uint64)) * 10).astype(int)
    source = RandomUsers(np.arange(10), keys)
    rng, started = np.random.default_rng(0), np.zeros(4, int)
    while started.max() < 59:
        rows = np.flatnonzero(rng.random(4) < (0.2, 0.5, 0.5, 0.9))
        if rng.random() < 0.05:
            source.reseed(np.asarray([1]), keys[[1]])
            started[1] = 0
        sessions = source.next(rows)
        np.testing.assert_array_equal(sessions.keys, expected[rows, started[rows]])
        np.testing.assert_array_equal(sessions.users, users[rows, started[rows]])
        started[rows] += 1


def test_uniforms_are_uniform_and_the_stream_is_pinned():
    keys = seeding.stream_keys(7, 200)
    draws = seeding.uniforms(keys[:, None], np.arange(500, dtype=np.uint64))
    counts = np.bincount((draws.ravel() * 20).astype(int), minlength=20)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi-square, 19 degrees, p = .001
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01
    # SplitMix64 seeded with 0 is published to begin with this word.
    assert seeding.mix(np.zeros(1, np.uint64), np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF
    # So that a seed means the same sessions in all versions.
    assert seeding.derive(np.arange(2, dtype=np.uint64), np.asarray([0, 3])).tolist() == [
        0x2D0F28C7E7E786B2,
        0x31F6C0CAFB925D54,
    ]


def test_keys_of_text_are_those_of_its_letters_alone():
    ids = np.asarray(["", "a", "b", "ab", "ba", "aa", "Ü9_"])
    keys = seeding.id_keys(ids)
    assert keys.dtype == np.int64 and len(set(keys.tolist())) == len(ids)
    for width in (3, 4, 40):
        np.testing.assert_array_equal(seeding.id_keys(ids.astype(f"<U{width}")), keys)
    for place in range(len(ids)):
        assert seeding.id_keys(ids[[place]].astype(f"<U{max(len(ids[place]), 1)}")) == keys[place]
    assert seeding.id_keys(np.asarray([7, -1])).tolist() == [7, -1]


def test_forbidding_repeats_masks_what_was_shown():
    sim = simulator(batch_size=2, max_len=6, slate_size=5, repeats="forbid", leave=NeverLeave())
    items = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    sim.step(items)
    assert not sim.allowed[0, :5].any()
    assert sim.allowed[0, 5:].all()
    sim.reset(np.array([0]))
    assert sim.allowed[0].all()
    assert not sim.allowed[1, 5:10].any()


def test_never_leave_is_cut_at_max_len():
    sim = simulator(batch_size=3, max_len=7, leave=NeverLeave())
    for step in range(1, 8):
        outcome = sim.step(random_slates(np.random.default_rng(step), 3, 5))
        assert outcome.truncated.all() == (step == 7)
        assert not outcome.terminated.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"max_len": 0}, "max_len"),
        ({"slate_size": 51}, r"1\.\.50"),
        ({"initial_history": "cold"}, "initial_history"),
        ({"repeats": "maybe"}, "repeats"),
        ({"repeats": "forbid"}, "needs max_len"),
    ],
)
def test_bad_settings_are_clear_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        simulator(**settings)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 4),
    st.integers(4, 25),
    st.integers(1, 7),
    st.integers(1, 23),
    st.sampled_from(["log", "empty"]),
    st.integers(0, 1000),
)
def test_histories_and_states_are_those_of_everything_shown(
    batch_size, slate_size, max_len, history_length, initial_history, seed
):
    world = small_world(history_length=history_length, seed=1)
    sim = simulator(world, batch_size, seed, slate_size=slate_size, max_len=max_len, initial_history=initial_history)
    rng = np.random.default_rng(seed)
    whole = history_length + max_len * slate_size

    def start(row):
        window = world.initial_history.take(sim.users[row : row + 1])
        seen = zip(window.items[0].tolist(), window.clicks[0].tolist(), strict=True)
        return [place for place in seen if place[0] >= 0] if initial_history == "log" else []

    everything = [start(row) for row in range(batch_size)]
    for _ in range(3 * max_len):
        items = random_slates(rng, batch_size, slate_size)
        outcome = sim.step(items)
        for row in range(batch_size):
            everything[row] += zip(items[row].tolist(), outcome.clicks[row].tolist(), strict=True)
        for length in (None, 1, history_length, whole - 1, whole + 3):
            window = sim.history(length=length)
            expected = [([(-1, False)] * (whole + 3) + seen)[-(length or whole) :] for seen in everything]
            np.testing.assert_array_equal(window.items, np.asarray(expected)[..., 0])
            np.testing.assert_array_equal(window.clicks, np.asarray(expected)[..., 1])
        # Bitwise: running sums are exact.
        states = observed_states(world, sim.history(length=history_length))
        np.testing.assert_array_equal(sim.clicked_means(), states)
        some = rng.permutation(batch_size)[: batch_size // 2]
        np.testing.assert_array_equal(sim.clicked_means(some), states[some])
        np.testing.assert_array_equal(sim.history(some).items, sim.history().items[some])
        np.testing.assert_array_equal(sim.history().last(whole + 3).items, sim.history(length=whole + 3).items)
        shown = sim.shown(np.arange(batch_size))
        for row in range(batch_size):
            slates = [item for item, _ in everything[row][len(start(row)) :]]
            assert shown[row, max_len - sim.steps[row] :].ravel().tolist() == slates
        over = np.flatnonzero(outcome.done)
        sim.reset(over)
        for row in over:
            everything[row] = start(row)


def test_states_are_means_to_float32_whatever_the_order():
    world = small_world(history_length=50)
    rng = np.random.default_rng(0)
    items = rng.integers(50, size=(200, 50)).astype(np.int32)
    clicks = rng.random((200, 50)) < rng.random((200, 1))
    states = observed_states(world, HistoryWindow(items, clicks))
    sums = (world.embeddings.astype(np.float64)[items] * clicks[:, :, None]).sum(axis=1)
    means = sums / np.maximum(clicks.sum(axis=1), 1)[:, None]
    np.testing.assert_allclose(states, means, rtol=0, atol=3e-7 * np.abs(world.embeddings).max())
    order = rng.permutation(50)
    np.testing.assert_array_equal(observed_states(world, HistoryWindow(items[:, order], clicks[:, order])), states)


def test_restored_sessions_go_on_with_their_histories_and_states():
    sim, again = simulator(seed=1), simulator(seed=2)
    rng = np.random.default_rng(0)
    again.clicked_means()
    for _ in range(3):
        sim.step(random_slates(rng, 4, 5))
    again.restore(copy.deepcopy(sim.state()))
    for _ in range(4):
        np.testing.assert_array_equal(again.history().items, sim.history().items)
        np.testing.assert_array_equal(again.clicked_means(), sim.clicked_means())
        items = random_slates(rng, 4, 5)
        np.testing.assert_array_equal(again.step(items).clicks, sim.step(items).clicks)


def test_a_window_of_no_places_is_empty_and_one_of_fewer_a_clear_error():
    sim = simulator()
    assert sim.history(length=0).items.shape == sim.history().last(0).items.shape == (4, 0)
    with pytest.raises(ValueError, match="-1 places"):
        sim.history(length=-1)


def test_a_window_wider_than_the_state_is_pooled_over_is_refused():
    world = small_world(history_length=20)
    window = HistoryWindow(np.zeros((2, 21), np.int32), np.ones((2, 21), np.bool_))
    with pytest.raises(ValueError, match="20 places, got windows of 21"):
        observed_states(world, window)


def test_histories_in_mapped_files_are_read_where_they_lie(tmp_path, monkeypatch):
    """Sessions are those of histories in memory, and starting and playing them copies a small part of the files."""
    # As in a world with too many users to remember the sums from which they start.
    monkeypatch.setattr("kuaifair_env.pooling._MAX_BYTES", 0)
    n_users, places = 5_000, 50
    world = small_world(0.3, n_users=n_users, n_items=20, history_length=places)
    mapped = []
    for name in ("items", "clicks"):
        in_memory = getattr(world.initial_history, name)
        in_memory.tofile(tmp_path / name)
        mapped.append(np.memmap(tmp_path / name, in_memory.dtype, "r", shape=in_memory.shape))
    worlds = [world, replace(world, initial_history=HistoryWindow(*mapped))]
    played = []
    for either in worlds:
        assert either.click_pool.length == places, "made once a world"
        tracemalloc.start()
        batch = SessionBatch(either, SessionConfig(max_len=5, slate_size=5, action_mode="slate"), 4)
        batch.seed(seeding.stream_keys(0, 4))
        batch.reset(np.arange(4))
        rng = np.random.default_rng(0)
        observations = []
        for _ in range(20):
            batch.step(random_slates(rng, 4, 5, 20))
            if len(batch.finished):
                batch.reset(batch.finished)
            observations.append(batch.observe())
        assert tracemalloc.get_traced_memory()[1] < n_users * places, "no byte for each place"
        tracemalloc.stop()
        played.append(np.stack(observations))
    np.testing.assert_array_equal(*played)


def test_draws_of_a_session_follow_from_its_key_and_step_whenever_it_starts():
    rng = np.random.default_rng(3)
    draws = seeding.SessionDraws(4, 3)
    keys, steps = np.zeros(4, np.uint64), np.zeros(4, np.int64)
    starting = np.arange(4)
    for _ in range(40):
        keys[starting] = rng.integers(2**63, size=len(starting), dtype=np.uint64)
        steps[starting] = 0
        draws.start(starting, keys[starting])
        counters = (1 + 3 * steps[:, None] + np.arange(3)).astype(np.uint64)
        np.testing.assert_array_equal(draws.of_step(steps), seeding.uniforms(keys[:, None], counters))
        steps += 1
        starting = np.flatnonzero(rng.random(4) < 0.2)
