"""A user whose clicks depend on the history: the numpy model against torch, and against known worlds."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
from helpers import small_world
from scipy.special import expit, logit

from kuaifair_env import seeding
from kuaifair_env.abandonment import NeverLeave, TemperFairness
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.drift import TasteDrift
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import open_artifact, save_artifact
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.response import (
    FactorisedConfig,
    FactorisedResponse,
    HistoryWindow,
    InputConfig,
    ResponseModel,
    SequentialConfig,
    SequentialResponse,
    TransformerShape,
    fit_sequential,
    load_response,
)
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.simulator import RandomUsers, SessionSimulator

SHAPE = TransformerShape(dimension=8, heads=2, layers=2, hidden=16, length=12)


def random_model(seed=0, users=30, items=20, shape=SHAPE):
    rng = np.random.default_rng(seed)
    static = FactorisedResponse(
        -0.5,
        rng.normal(size=users),
        rng.normal(size=items),
        rng.normal(size=(users, 3)),
        rng.normal(size=(items, 3)),
    )
    weights = {name: rng.normal(0, 0.4, size).astype(np.float32) for name, size in shape.weight_shapes().items()}
    codes = [rng.normal(size=(n, shape.dimension)).astype(np.float32) for n in (items, users)]
    return SequentialResponse(static, shape, *codes, weights, {"note": 1})


def random_window(batch, length=12, items=20, seed=1):
    rng = np.random.default_rng(seed)
    seen = rng.integers(0, length + 1, batch)
    padding = np.arange(length) < length - seen[:, None]
    window_items = np.where(padding, -1, rng.integers(0, items, (batch, length))).astype(np.int32)
    return HistoryWindow(window_items, (rng.random((batch, length)) < 0.5) & ~padding)


def random_call(batch=16, slate=4, seed=2):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 30, batch), rng.integers(0, 20, (batch, slate))


def test_numpy_evaluates_what_torch_trains():
    import torch

    from kuaifair_env.response.sequential_fit import HistoryNetwork

    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(n, 4)).astype(np.float32)) for n in (30, 20))
    network = HistoryNetwork(SHAPE, x, y, 0.3, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    static = FactorisedResponse(0.0, np.zeros(30), np.zeros(20), np.zeros((30, 0)), np.zeros((20, 0)))
    model = SequentialResponse(static, SHAPE, **network.exported())
    users, items = random_call(16, 1)
    window = random_window(16)
    # torch reads pieces filled from the front, padding behind; numpy reads windows filled from the back.
    seen = (window.items >= 0).sum(1)
    shift = (np.arange(12) + 12 - seen[:, None]) % 12
    front_items = np.take_along_axis(window.items, shift, 1)
    front_clicks = np.take_along_axis(window.clicks, shift, 1)
    with torch.no_grad():
        fitted = network(
            torch.from_numpy(front_items).long(),
            torch.from_numpy(front_clicks),
            torch.arange(16),
            torch.from_numpy(seen),
            torch.from_numpy(users),
            torch.from_numpy(items[:, 0]),
        ).numpy()
    assert fitted.std() > 0.1
    np.testing.assert_allclose(model.history_logits(users, items, window)[:, 0], fitted, atol=1e-5)


def test_a_row_does_not_depend_on_the_other_rows_of_the_batch():
    model, (users, items), window = random_model(), random_call(256, 10), random_window(256)
    together = model.expected(users, items, window)
    for k in range(0, 256, 17):
        row = slice(k, k + 1)
        np.testing.assert_allclose(
            model.expected(users[row], items[row], window.take(np.array([k]))),
            together[row],
            rtol=0,
            atol=1e-6,
        )
    np.testing.assert_array_equal(together, model.expected(users, items, window))
    assert together.dtype == np.float32
    assert isinstance(model, ResponseModel)


def test_padding_says_nothing_and_only_the_newest_items_count():
    model, (users, items), window = random_model(), random_call(), random_window(16)
    expected = model.expected(users, items, window)
    front = np.full((16, 5), -1, np.int32)
    longer = HistoryWindow(np.concatenate([front, window.items], 1), np.concatenate([front >= 0, window.clicks], 1))
    np.testing.assert_allclose(model.expected(users, items, longer), expected, atol=1e-6)
    empty = HistoryWindow(np.full((16, 12), -1, np.int32), np.zeros((16, 12), bool))
    none = HistoryWindow(np.zeros((16, 0), np.int32), np.zeros((16, 0), bool))
    cold = model.expected(users, items, none)
    np.testing.assert_allclose(model.expected(users, items, empty), cold, atol=1e-6)
    assert np.isfinite(cold).all()


def joined(*windows):
    return HistoryWindow(
        np.concatenate([window.items for window in windows], 1),
        np.concatenate([window.clicks for window in windows], 1),
    )


def test_a_state_depends_on_so_many_places_as_its_layers_reach_and_on_no_more():
    model, (users, items) = random_model(), random_call()
    assert model.shape.reach == 23
    window = joined(random_window(16, seed=3), random_window(16, seed=4), random_window(16, seed=5))
    window = HistoryWindow(np.abs(window.items), window.clicks)
    expected = model.expected(users, items, window)
    reached = HistoryWindow(window.items[:, -23:], window.clicks[:, -23:])
    np.testing.assert_allclose(model.expected(users, items, reached), expected, atol=1e-6)
    for place, moves in ((-24, False), (-23, True)):
        other = HistoryWindow(window.items.copy(), window.clicks)
        other.items[:, place] = (other.items[:, place] + 7) % 20
        difference = np.abs(model.history_logits(users, items, other) - model.history_logits(users, items, window))
        assert (difference.max() > 1e-6) == moves


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("slate", "steps"), [(1, 30), (5, 12), (20, 4)])
def test_a_memory_gives_what_reading_the_whole_history_gives(layers, slate, steps):
    model = random_model(layers, shape=replace(SHAPE, layers=layers))
    batch = 6
    rng = np.random.default_rng(slate)
    memory = model.session_memory(batch)
    wholes = [HistoryWindow(np.zeros((1, 0), np.int32), np.zeros((1, 0), bool))] * batch
    for step in range(steps):
        users = rng.integers(0, 30, batch)
        candidates = rng.integers(0, 20, (batch, 4))
        together = model.expected(users, candidates, memory)
        catalogue = model.expected_catalogue(users, 20, memory)
        for row, whole in enumerate(wholes):
            user, asked = users[row : row + 1], candidates[row : row + 1]
            np.testing.assert_allclose(model.expected(user, asked, whole)[0], together[row], atol=1e-5)
            np.testing.assert_allclose(model.expected_catalogue(user, 20, whole)[0], catalogue[row], atol=1e-5)
        items = rng.integers(0, 20, (batch, slate)).astype(np.int32)
        clicks = rng.random((batch, slate)) < 0.3
        memory.append(items, clicks)
        wholes = [joined(w, HistoryWindow(items[r : r + 1], clicks[r : r + 1])) for r, w in enumerate(wholes)]
        if step % 3 == 0:
            rows = rng.permutation(batch)[: 1 + step % 4]
            windows = random_window(len(rows), length=int(rng.integers(0, 40)), seed=step)
            memory.reset(rows, windows)
            for number, row in enumerate(rows):
                wholes[row] = windows.take(np.array([number]))


def test_a_row_of_a_memory_does_not_depend_on_the_other_rows():
    model, (users, items), window = random_model(), random_call(70, 10), random_window(70)
    together, alone = model.session_memory(70), model.session_memory(1)
    for row in (0, 33, 69):
        together.reset(np.arange(70), window)
        alone.reset(np.arange(1), window.take(np.array([row])))
        for _ in range(4):
            for memory, rows in ((together, slice(None)), (alone, slice(row, row + 1))):
                memory.append(items[rows], items[rows] % 2 == 0)
            np.testing.assert_allclose(
                model.expected(users[row : row + 1], items[row : row + 1], alone)[0],
                model.expected(users, items, together)[row],
                rtol=0,
                atol=1e-6,
            )


def wrapped(world, wrap):
    """The world with a response model around, or made from, its history-dependent one."""
    response = world.response
    if wrap == "randomised":
        return randomised(replace(world, split="train"))
    if wrap == "graded":
        spread = np.linspace(0.2, 1.0, 4, dtype=np.float32)[None, :]
        response = GradedResponse(response, 2.0, 1.0, np.zeros(0, np.float32), spread)
    if wrap == "rearranged":
        response = response.rearranged(np.arange(20)[::-1])
    return replace(world, response=response)


@pytest.mark.parametrize("wrap", ["plain", "randomised", "graded", "rearranged"])
@pytest.mark.parametrize("initial_history", ["log", "empty"])
def test_within_a_session_users_answer_to_all_that_they_saw(wrap, initial_history):
    world = wrapped(replace(small_world(n_users=30, n_items=20, history_length=9), response=random_model()), wrap)
    source = RandomUsers(world.users, seeding.stream_keys(0, 5))
    simulator = SessionSimulator(
        world, 5, source, max_len=6, slate_size=5, leave=TemperFairness(), initial_history=initial_history
    )
    simulator.reset(np.arange(5))
    rng = np.random.default_rng(2)
    seen = [simulator.history(np.array([row])) for row in range(5)]
    # Users of a randomised world deviate throughout a session by the same log-odds.
    deviations = np.zeros((5, 20)) if wrap != "randomised" else np.full((5, 20), np.nan)
    for _ in range(15):
        now = simulator.expected_catalogue()
        for row, whole in enumerate(seen):
            expected = world.response.expected_catalogue(simulator.users[row : row + 1], 20, whole)[0]
            if np.isnan(deviations[row]).any():
                deviations[row] = logit(now[row]) - logit(expected)
                assert np.abs(deviations[row]).mean() > 0.2
            scale = 2.0 if wrap == "graded" else 1.0
            np.testing.assert_allclose(
                now[row] / scale, expit(logit(expected.astype(float) / scale) + deviations[row]), atol=1e-5
            )
        outcome = simulator.step(np.argsort(rng.random((5, 20)), axis=1)[:, :5])
        seen = [
            joined(whole, HistoryWindow(outcome.items[row : row + 1], outcome.clicks[row : row + 1]))
            for row, whole in enumerate(seen)
        ]
        finished = np.flatnonzero(outcome.done)
        if len(finished):
            simulator.reset(finished)
        for row in finished:
            seen[row] = simulator.history(np.array([row]))
            deviations[row] = 0.0 if wrap != "randomised" else np.nan


def test_sessions_that_are_restored_go_on_as_they_would_have():
    world = replace(small_world(n_users=30, n_items=20, history_length=9), response=random_model())
    slates = np.argsort(np.random.default_rng(2).random((6, 4, 20)), axis=2)[:, :, :7]

    def simulator():
        source = RandomUsers(world.users, seeding.stream_keys(0, 4))
        return SessionSimulator(world, 4, source, max_len=6, slate_size=7, leave=NeverLeave())

    first, second = simulator(), simulator()
    first.reset(np.arange(4))
    for slate in slates[:3]:
        first.step(slate)
    state = deepcopy(first.state())
    assert set(state["memory"]) == {"keys", "values", "inputs", "next", "states"}
    second.restore(state)
    for slate in slates[3:]:
        np.testing.assert_array_equal(first.expected_catalogue(), second.expected_catalogue())
        np.testing.assert_array_equal(first.step(slate).feedback, second.step(slate).feedback)


def test_users_without_tastes_do_not_drift():
    world = replace(small_world(n_users=30, n_items=20), response=random_model())
    with pytest.raises(DataError, match="SequentialResponse has no vectors of users' tastes"):
        TasteDrift(world, 4, 15.0)


def test_items_feedback_and_order_of_the_history_all_matter():
    model, (users, items), window = random_model(), random_call(), random_window(16)
    full = HistoryWindow(np.abs(window.items), window.clicks)
    expected = model.expected(users, items, full)
    for changed in (
        HistoryWindow(full.items, ~full.clicks),
        HistoryWindow((full.items + 1) % 20, full.clicks),
        HistoryWindow(full.items[:, ::-1], full.clicks[:, ::-1]),
    ):
        assert np.abs(model.expected(users, items, changed) - expected).max() > 1e-3


def test_the_catalogue_and_rearranging_agree_with_single_pairs():
    model, (users, items), window = random_model(), random_call(), random_window(16)
    catalogue = model.expected_catalogue(users, 20, window)
    np.testing.assert_allclose(np.take_along_axis(catalogue, items, 1), model.expected(users, items, window), atol=1e-6)
    order = np.random.default_rng(5).permutation(20)
    position = np.argsort(order)
    moved_items = np.where(window.items < 0, -1, position[window.items]).astype(np.int32)
    moved = model.rearranged(order).expected_catalogue(users, 20, HistoryWindow(moved_items, window.clicks))
    np.testing.assert_allclose(moved, catalogue[:, order], atol=1e-6)


def test_a_saved_model_comes_back_equal(tmp_path):
    model, (users, items), window = random_model(), random_call(), random_window(16)
    model.save(tmp_path / "s")
    back = load_response(tmp_path / "s")
    assert isinstance(back, SequentialResponse)
    np.testing.assert_array_equal(back.expected(users, items, window), model.expected(users, items, window))
    assert back.describe() == model.describe()
    json.dumps(back.describe(), allow_nan=False)


def test_a_file_that_lacks_a_weight_is_refused(tmp_path):
    random_model().save(tmp_path / "s")
    with open_artifact(tmp_path / "s") as (_, tensors, settings):
        del tensors["weights.0.query"]
        save_artifact(tmp_path / "s", "sequential", tensors, settings)
    with pytest.raises(ArtifactError, match=r"weight '0\.query' must have shape"):
        load_response(tmp_path / "s")


def test_a_file_of_another_kind_of_attention_is_refused(tmp_path):
    random_model().save(tmp_path / "s")
    with open_artifact(tmp_path / "s") as (_, tensors, settings):
        save_artifact(tmp_path / "s", "sequential", tensors, settings | {"version": 1})
    with pytest.raises(ArtifactError, match=r"an earlier kind of attention.*fit it again"):
        load_response(tmp_path / "s")


def test_calls_without_history_are_errors():
    model, (users, items) = random_model(), random_call()
    with pytest.raises(DataError, match="needs the users' history"):
        model.expected(users, items)
    with pytest.raises(DataError, match="history has 3 users, asked for 16"):
        model.expected(users, items, random_window(3))
    with pytest.raises(IndexError, match="must not be negative"):
        model.expected(users, items - 50, random_window(16))
    with pytest.raises(ValueError, match="heads do not divide"):
        TransformerShape(dimension=9, heads=2)


def history_dependent_data(n_users=400, rows_per_user=60, seed=0):
    """Users click with probability .75 after a click and .25 after none, whatever the item."""
    rng = np.random.default_rng(seed)
    uniforms = rng.random((n_users, rows_per_user))
    clicks = np.zeros((n_users, rows_per_user), bool)
    for t in range(rows_per_user):
        before = clicks[:, t - 1] if t else np.zeros(n_users, bool)
        clicks[:, t] = uniforms[:, t] < np.where(before, 0.75, 0.25)
    users = np.repeat(np.arange(n_users), rows_per_user)
    log = InteractionLog.sorted(users, rng.integers(0, 30, len(users)), clicks.ravel())
    return InteractionData(
        Users(np.arange(n_users), FeatureTable.empty(n_users)),
        Catalogue(np.arange(30), FeatureTable.empty(30), np.zeros((30, 0), bool)),
        log,
        log,
        Provenance("moody", "own"),
    )


QUICK = SequentialConfig(
    shape=TransformerShape(dimension=16, heads=2, layers=1, hidden=16, length=10),
    dropout=0.0,
    learning_rate=5e-3,
    batch_size=64,
    max_epochs=6,
)
STATIC = FactorisedConfig(rank=2, inputs=InputConfig(history_factors=0), max_epochs=4)


@pytest.fixture(scope="module")
def history_dependent_model():
    data = history_dependent_data()
    return fit_sequential(data.train, data, config=QUICK, static=STATIC, seed=3)


def test_the_fit_finds_a_mood_that_only_the_history_shows(history_dependent_model):
    users, items = np.zeros(2, np.int64), np.full((2, 1), 4)
    history = HistoryWindow(np.full((2, 10), 3, np.int32), np.tile(np.arange(10) % 2 == 0, (2, 1)))
    history.clicks[:, -1] = [True, False]
    after_click, after_none = history_dependent_model.expected(users, items, history)[:, 0]
    assert after_click == pytest.approx(0.75, abs=0.06)
    assert after_none == pytest.approx(0.25, abs=0.06)
    report = history_dependent_model.describe()
    # The static part cannot beat the base rate: log(2); the truth has the entropy of a .75 coin.
    assert report["controls"]["static_part"]["log_loss"] == pytest.approx(np.log(2), abs=0.01)
    assert report["held_out"]["log_loss"] == pytest.approx(0.5623, abs=0.02)
    assert report["held_out"]["expected_calibration_error"] < 0.04
    slope = report["slopes"]["history"]
    assert abs(slope["slope"] - 1) < 4 * slope["error"]
    json.dumps(report, allow_nan=False)


def test_held_out_rows_are_evaluated_after_all_that_stood_before_them():
    from kuaifair_env.response.rows import NegativeSampling, history_stream, labelled_rows
    from kuaifair_env.response.sequential_fit import _history_logits

    data, model = history_dependent_data(30, 80), random_model(items=30)
    log, context = data.train, data.train.take(np.arange(0, 2400, 7))
    rows = labelled_rows(log, 30, STATIC.split, NegativeSampling(), 0)
    chosen = rows.where("report")
    logits = _history_logits(model, rows, chosen, history_stream(log, context, 30, "log"))
    for row, expected in zip(chosen, logits, strict=True):
        user = rows.users[row]
        earlier = log.take((log.users == user) & (np.arange(len(log)) < rows.positions[row]))
        before = context.take(context.users == user)
        window = joined(*(HistoryWindow(part.items[None], part.clicks[None]) for part in (before, earlier)))
        assert model.history_logits(user[None], rows.items[row][None, None], window) == pytest.approx(
            expected, abs=1e-5
        )


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    data = history_dependent_data(80, 30)
    brief = replace(QUICK, dropout=0.1, max_epochs=1)
    first, again, other = (
        fit_sequential(data.train, data, config=brief, static=replace(STATIC, max_epochs=1), seed=seed)
        for seed in (3, 3, 4)
    )
    call = np.arange(16), np.zeros((16, 2), np.int64), random_window(16)
    np.testing.assert_array_equal(first.expected(*call), again.expected(*call))
    assert np.abs(first.expected(*call) - other.expected(*call)).max() > 0


def test_simulating_leaves_random_generators_alone(history_dependent_model):
    import torch

    before = torch.random.get_rng_state().clone(), np.random.get_state()[1].copy()  # noqa: NPY002
    history_dependent_model.expected(np.arange(16), np.zeros((16, 2), np.int64), random_window(16))
    assert torch.equal(torch.random.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_positives_only_have_no_history_to_learn_from():
    data = history_dependent_data(30)
    log = data.train
    only = InteractionLog(log.users, log.items, np.ones(len(log), bool), log.times, positives_only=True)
    with pytest.raises(DataError, match="non-clicks"):
        fit_sequential(only, data)
