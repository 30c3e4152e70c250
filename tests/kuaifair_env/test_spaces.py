"""Actions become slates of distinct, allowed items or an error that says why not; windows become states."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env.actions import SlateSpace, action_decoder
from kuaifair_env.observations import reached_observations, replace_rows, stack_observations, state_of, take_rows
from kuaifair_env.pooling import mean_embeddings


def test_an_embedding_action_shows_the_items_with_the_largest_inner_product():
    rng = np.random.default_rng(3)
    embeddings = rng.normal(size=(300, 8)).astype(np.float32)
    action = rng.uniform(-1, 1, (5, 8)).astype(np.float32)
    items = action_decoder("embedding", embeddings, 4).decode(action, None)
    np.testing.assert_array_equal(items, np.argsort(-action @ embeddings.T, axis=1, kind="stable")[:, :4])


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_slate_space_samples_are_members_and_members_are_distinct(n_items, slate_size, seed):
    slate_size = min(slate_size, n_items)
    space = SlateSpace(n_items, slate_size, seed=seed)
    slate = space.sample()
    assert space.contains(slate)
    assert len(set(slate.tolist())) == slate_size
    if slate_size > 1:
        assert not space.contains(np.full(slate_size, slate[0]))
    assert not space.contains(np.full(slate_size, n_items))
    batched = batch_space(space, 3)
    assert batched.contains(batched.sample())
    assert batched.shape == (3, slate_size)


def test_a_mask_restricts_samples_and_must_leave_enough():
    space = SlateSpace(8, 3, seed=0)
    mask = np.array([0, 1, 1, 0, 1, 0, 0, 1], np.bool_)
    assert all(mask[space.sample(mask)].all() for _ in range(20))
    with pytest.raises(ValueError, match="allows 2 items"):
        space.sample(np.arange(8) < 2)


def test_a_batched_space_draws_its_own_samples():
    space = SlateSpace(8, 3, seed=0)
    expected = SlateSpace(8, 3, seed=0).sample()
    batch_space(space, 2).sample()
    np.testing.assert_array_equal(space.sample(), expected)


def test_slate_space_samples_every_item_equally_often():
    space = SlateSpace(6, 2, seed=0)
    counts = np.bincount(np.concatenate([space.sample() for _ in range(3000)]), minlength=6)
    assert np.abs(counts / counts.sum() - 1 / 6).max() < 0.02


EMBEDDINGS = np.eye(12, 4, dtype=np.float32)


@pytest.mark.parametrize(
    ("mode", "slate_size", "action", "message"),
    [
        ("embedding", 3, [[0.0, np.nan, 0.0, 0.0]], "session 0 holds NaN"),
        ("embedding", 3, [[0.0, 0.0, 0.0]], r"shape \(4,\)"),
        ("embedding", 3, [["1", "2", "3", "4"]], "numbers"),
        ("slate", 3, [[0, 1, 1]], "holds an item twice"),
        ("slate", 3, [[0, 1, 12]], r"leaves 0\.\.11"),
        ("slate", 3, [[0, 1, -1]], r"leaves 0\.\.11"),
        ("slate", 3, [[0, 1]], "holds 3 item ids"),
        ("slate", 3, [[0.0, 1.0, 2.0]], "integers"),
        ("slate", 3, [["a", "b", "c"]], "integers"),
        ("item", 1, [12], r"leaves 0\.\.11"),
    ],
)
def test_a_bad_action_is_a_clear_error(mode, slate_size, action, message):
    with pytest.raises(ValueError, match=message):
        action_decoder(mode, EMBEDDINGS, slate_size).decode(np.asarray(action), None)


def filled_by_definition(slate, allowed, embeddings):
    """First places stand; each other gives way to the most similar item that is free, the smaller id among equals."""
    units = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    stands = [allowed[item] and item not in slate[:slot] for slot, item in enumerate(slate)]
    chosen = {item for item, stand in zip(slate, stands, strict=True) if stand}
    result = []
    for item, stand in zip(slate, stands, strict=True):
        if not stand:
            free = [other for other in range(len(units)) if allowed[other] and other not in chosen]
            item = max(free, key=lambda other: (units[other] @ units[item], -other))
            chosen.add(item)
        result.append(item)
    return result


@given(st.data())
def test_repeated_items_of_a_slate_give_way_to_the_most_similar_ones(data):
    embeddings = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    decoder = action_decoder("slate", embeddings, 4, "replace")
    slates = np.asarray(
        data.draw(st.lists(st.lists(st.integers(0, 8), min_size=4, max_size=4), min_size=1, max_size=5))
    )
    forbidden = data.draw(st.lists(st.integers(0, 8), max_size=5, unique=True))
    allowed = np.ones((len(slates), 9), np.bool_)
    allowed[:, forbidden] = False
    given_slates = slates.copy()
    decoded = decoder.decode(slates, allowed)
    np.testing.assert_array_equal(slates, given_slates, err_msg="the action itself is left alone")
    expected = [filled_by_definition(slate, allowed[0], embeddings) for slate in slates.tolist()]
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(
        np.concatenate([decoder.decode(slate[None], allowed[:1]) for slate in slates]), decoded
    )
    assert not forbidden or not np.isin(decoded, forbidden).any()


def test_a_slate_that_cannot_be_filled_is_a_clear_error():
    decoder = action_decoder("slate", EMBEDDINGS, 3, "replace")
    with pytest.raises(ValueError, match="smaller slate"):
        decoder.decode(np.array([[0, 0, 0]]), np.arange(12)[None] < 2)
    with pytest.raises(ValueError, match=r"leaves 0\.\.11"):
        decoder.decode(np.array([[0, 0, 12]]), None)


@pytest.mark.parametrize(
    ("mode", "slate_size", "message"),
    [
        ("slate", 13, r"1\.\.12"),
        ("slate", 0, r"1\.\.12"),
        ("item", 2, "one item a step"),
        ("query", 2, "action_mode must be one of"),
    ],
)
def test_a_slate_that_does_not_fit_is_a_clear_error(mode, slate_size, message):
    with pytest.raises(ValueError, match=message):
        action_decoder(mode, EMBEDDINGS, slate_size)


def test_a_window_is_pooled_by_its_weights_and_padding_counts_for_nothing():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(9, 4)).astype(np.float32)
    items = np.array([[3, 5, 3], [-1, 7, 0], [-1, -1, 2]])
    weights = np.array([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    expected = [(1.5 * embeddings[3] + 2 * embeddings[5]) / 3.5, embeddings[7], np.zeros(4)]
    np.testing.assert_allclose(mean_embeddings(embeddings, items, weights), expected, atol=1e-6)


def test_a_window_is_pooled_alike_in_every_batch():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(30, 7)).astype(np.float32)
    items = rng.integers(-1, 30, (70, 9))
    weights = (rng.random((70, 9)) * (items >= 0)).astype(np.float32)
    pooled = mean_embeddings(embeddings, items, weights)
    alone = [mean_embeddings(embeddings, items[row, None], weights[row, None])[0] for row in range(70)]
    np.testing.assert_array_equal(pooled, alone)
    by_definition = np.einsum("bh,bhd->bd", weights, embeddings[items]) / weights.sum(1)[:, None]
    np.testing.assert_allclose(pooled, by_definition, rtol=1e-4, atol=1e-6)
    assert mean_embeddings(embeddings, items[:0], weights[:0]).shape == (0, 7)


@pytest.mark.parametrize("as_dict", [False, True])
def test_observations_are_taken_stacked_and_replaced_be_they_arrays_or_dicts(as_dict):
    def observed(values):
        array = np.asarray(values, np.float32)
        return {"state": array, "history_items": array.astype(int)} if as_dict else array

    batch = observed([[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(state_of(take_rows(batch, 1)), [3, 4])
    np.testing.assert_array_equal(state_of(take_rows(batch, np.array([2, 0]))), [[5, 6], [1, 2]])
    again = stack_observations([take_rows(batch, row) for row in range(3)])
    np.testing.assert_array_equal(state_of(again), state_of(batch))
    replaced = replace_rows(batch, np.array([1]), observed([[9, 9]]))
    np.testing.assert_array_equal(state_of(replaced), [[1, 2], [9, 9], [5, 6]])
    infos = [{}, {}, {"terminal_observation": take_rows(observed([[7, 8]]), 0)}]
    reached = reached_observations(batch, infos, np.array([False, False, True]))
    np.testing.assert_array_equal(state_of(reached), [[1, 2], [3, 4], [7, 8]])
    np.testing.assert_array_equal(state_of(batch), [[1, 2], [3, 4], [5, 6]], "the batch is left as it is")
    assert reached_observations(batch, infos, np.zeros(3, np.bool_)) is batch
