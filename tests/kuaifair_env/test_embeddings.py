"""Item embeddings: what directions say, and that every candidate can be shown."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import small_data
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env.actions import EmbeddingActions
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog
from kuaifair_env.embeddings import (
    EMBEDDINGS,
    _co_exposure,
    cached_embeddings,
    item_embeddings,
    rows_with_neighbours,
    separated,
    unit_rows,
)
from kuaifair_env.errors import DataError
from kuaifair_env.files import open_artifact
from kuaifair_env.registration import ENVIRONMENTS, make_world

TOY = "KuaiFair-Toy-v0"


def catalogue(n_items, features=None):
    """Items without tags and, as a rule, without features."""
    if features is None:
        table = FeatureTable.empty(n_items)
    else:
        table = FeatureTable(np.asarray(features, np.float32), tuple(f"f{i}" for i in range(features.shape[1])))
    return Catalogue(3 * np.arange(n_items), table, np.zeros((n_items, 0), np.bool_))


def two_tastes(n_users=200, n_items=60, click_rate=0.8):
    """Users and items of two kinds; users click what is of their kind."""
    rng = np.random.default_rng(0)
    user_kind, kind = np.arange(n_users) % 2, np.arange(n_items) % 2
    users = np.repeat(np.arange(n_users), 20)
    items = rng.integers(0, n_items, len(users))
    clicks = rng.random(len(users)) < np.where(user_kind[users] == kind[items], click_rate, click_rate / 8)
    return users, items, clicks, kind, user_kind


def assert_each_ranks_its_own_item_first(embeddings):
    """The definition, item by item: as action, at any length, an item's vector ranks it first by a margin."""
    units = unit_rows(embeddings.astype(np.float64))
    for row, unit in enumerate(units):
        scores = units @ unit
        assert scores[row] - np.delete(scores, row).max(initial=-1.0) >= 1e-4
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), np.sqrt(embeddings.shape[1]), rtol=1e-5)
    assert len(np.unique(embeddings, axis=0)) == len(embeddings)
    rows = np.arange(len(embeddings))
    for actions in (embeddings, unit_rows(embeddings), embeddings / np.abs(embeddings).max()):
        np.testing.assert_array_equal(EmbeddingActions(embeddings, 1).decode(actions, None)[:, 0], rows)


SYNTHETIC = [env_id for env_id, origin in ENVIRONMENTS.items() if origin.twin]


@pytest.mark.parametrize("env_id", [TOY, *(pytest.param(name, marks=pytest.mark.slow) for name in SYNTHETIC)])
def test_every_candidate_of_every_id_can_be_shown(env_id):
    world = make_world(env_id, source="auto" if ENVIRONMENTS[env_id].official is None else "twin")
    assert_each_ranks_its_own_item_first(world.embeddings[: world.n_items])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_item_of_a_tiny_log_without_features_can_be_shown(data):
    n_users, n_items = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 30))
    dimension = data.draw(st.sampled_from([3, 4, 8, 64]))
    rows = st.tuples(st.integers(0, n_users - 1), st.integers(0, n_items - 1), st.booleans())
    drawn = [(0, 0, True), *data.draw(st.lists(rows, max_size=60))]
    log = InteractionLog.sorted(*(np.asarray(column) for column in zip(*drawn, strict=True)))
    assert_each_ranks_its_own_item_first(item_embeddings(log, n_users, catalogue(n_items), dimension))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_vectors_of_any_kind_are_separated_and_far_ones_keep_their_direction(data):
    dimension = data.draw(st.integers(2, 10))
    kinds = data.draw(st.lists(st.sampled_from(["zero", "same", "nearly the same", "other"]), min_size=1, max_size=40))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    centre = rng.normal(size=dimension)
    vectors = {
        "zero": lambda: np.zeros(dimension),
        "same": lambda: centre,
        "nearly the same": lambda: centre + 1e-4 * rng.normal(size=dimension),
        "other": lambda: rng.normal(size=dimension),
    }
    table = np.stack([vectors[kind]() for kind in kinds]).astype(np.float32)
    after = separated(table, np.arange(len(table)))
    assert_each_ranks_its_own_item_first(after)
    np.testing.assert_allclose(separated(after, np.arange(len(table))), after, atol=2e-5)


def neighbours_by_brute_force(units, distance):
    """Rows that have another one within a distance, from all pairs."""
    distances = np.sqrt(np.square(units[:, None] - units[None]).sum(axis=2))
    np.fill_diagonal(distances, np.inf)
    return np.flatnonzero((distances <= distance).any(axis=1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_close_vectors_are_found_wherever_they_lie(data):
    """Duplicates, chains of near vectors, dense balls and spread vectors."""
    dimension, distance = data.draw(st.sampled_from([1, 2, 3, 8, 64])), data.draw(st.sampled_from([0.005, 0.02, 0.3]))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    size = data.draw(st.integers(1, 60))
    centres = rng.normal(size=(4, dimension))
    noise = data.draw(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0])) * distance / np.sqrt(2 * dimension)
    dense = centres[rng.integers(0, 4, size)] + noise * rng.normal(size=(size, dimension))
    steps = (
        data.draw(st.sampled_from([0.9, 0.999, 1.001, 1.1])) * distance * unit_rows(rng.normal(size=(size, dimension)))
    )
    parts = {
        "dense": dense,
        "chain": 10 * centres[0] + 10 * steps.cumsum(axis=0),
        "spread": rng.normal(size=(size, dimension)),
    }
    chosen = data.draw(st.lists(st.sampled_from(sorted(parts)), min_size=1, max_size=3))
    units = unit_rows(rng.permutation(np.concatenate([parts[name] for name in chosen])))
    found = rows_with_neighbours(units, distance)
    np.testing.assert_array_equal(found, neighbours_by_brute_force(units, distance))


def test_actions_choose_the_same_slates_in_a_batch_of_any_size():
    world = make_world(TOY)
    decoder = EmbeddingActions(world.embeddings[: world.n_items], 10)
    actions = np.random.default_rng(0).normal(size=(256, world.dimension)).clip(-1, 1).astype(np.float32)
    together = decoder.decode(actions, None)
    np.testing.assert_array_equal(np.concatenate([decoder.decode(action[None], None) for action in actions]), together)


def test_embeddings_find_the_communities_and_not_the_popularity():
    rng = np.random.default_rng(0)
    n_users, n_items = 400, 120
    groups, kinds = rng.integers(0, 4, n_users), np.arange(n_items) % 4
    users = np.repeat(np.arange(n_users), 40)
    popularity = 1 / np.arange(1, n_items + 1) ** 0.7
    items = rng.choice(n_items, len(users), p=popularity / popularity.sum())
    clicks = rng.random(len(users)) < np.where(groups[users] == kinds[items], 0.8, 0.1)
    embeddings = item_embeddings(InteractionLog.sorted(users, items, clicks), n_users, catalogue(n_items), 3)
    cosine = embeddings @ embeddings.T / 3
    same = kinds[:, None] == kinds[None, :]
    np.fill_diagonal(same, False)
    assert cosine[same].mean() > 0.8
    assert cosine[~same].mean() < 0.1


def test_an_item_without_clicks_lies_where_its_features_say():
    users, items, clicks, kind, _ = two_tastes()
    silent = items < 10
    log = InteractionLog.sorted(users[~silent], items[~silent], clicks[~silent])
    units = unit_rows(item_embeddings(log, 200, catalogue(60, kind[:, None]), 16))
    for row in range(10):
        alike = kind[10:] == kind[row]
        assert (units[10:] @ units[row])[alike].mean() > (units[10:] @ units[row])[~alike].mean() + 0.3


def test_an_item_without_clicks_or_features_lies_near_what_the_same_users_are_shown():
    users, items, clicks, kind, user_kind = two_tastes(click_rate=0.4)
    # The platform mostly shows users what is of their kind; nobody clicks the first ten items.
    shown = (kind[items] == user_kind[users]) | (np.arange(len(items)) % 10 == 0)
    clicks = clicks & (items >= 10)
    log = InteractionLog.sorted(users[shown], items[shown], clicks[shown])
    units = unit_rows(item_embeddings(log, 200, catalogue(60), 16))
    for row in range(10):
        alike = kind[10:] == kind[row]
        assert (units[10:] @ units[row])[alike].mean() > (units[10:] @ units[row])[~alike].mean() + 0.3


def test_an_item_of_which_nothing_is_known_has_a_direction_of_its_id():
    users, items, clicks, _, _ = two_tastes()
    log = InteractionLog.sorted(users, items, clicks)
    few, more = (item_embeddings(log, 200, catalogue(n_items), 8) for n_items in (63, 65))
    # The last items were never shown; the directions of the others do not depend on how many there are.
    np.testing.assert_allclose(np.abs(few[60:]), np.abs(more[60:63]), atol=0.5)
    assert np.abs(np.corrcoef(few[60:])[np.triu_indices(3, 1)]).max() < 0.999


def test_ids_may_be_text():
    users, items, clicks, _, _ = two_tastes()
    ids = np.array([f"item {row:02d}" for row in range(60)])
    catalogue_of_text = Catalogue(ids, FeatureTable.empty(60), np.zeros((60, 0), np.bool_))
    log = InteractionLog.sorted(users, items, clicks & (items < 20))
    assert_each_ranks_its_own_item_first(item_embeddings(log, 200, catalogue_of_text, 8))


def test_features_of_any_scale_and_constant_ones_leave_embeddings_finite():
    users, items, clicks, kind, _ = two_tastes()
    log = InteractionLog.sorted(users, items, clicks)
    features = np.column_stack([np.ones(60), 1e6 * kind, np.eye(60)[:, 7]])
    embeddings = item_embeddings(log, 200, catalogue(60, features), 8)
    assert np.isfinite(embeddings).all()


def test_what_cannot_be_embedded_is_a_clear_error():
    data = small_data()
    silent = InteractionLog(data.train.users, data.train.items, np.zeros(len(data.train), np.bool_), data.train.times)
    with pytest.raises(DataError, match="no clicks"):
        item_embeddings(silent, 40, data.items, 8)
    with pytest.raises(DataError, match="at least 1"):
        item_embeddings(data.train, 40, data.items, 0)
    for dimension in (1, 2):
        enough = f"cannot tell 400 items apart; {2 * dimension + 6} are enough: embedding_dim="
        with pytest.raises(DataError, match=enough):
            separated(np.zeros((400, dimension)), np.arange(400))


def test_what_is_cached_belongs_to_these_rows_and_features(tmp_path):
    data = small_data()
    shuffled = data.arranged(np.array([30, 4, 17]))
    assert shuffled.data_hash == data.data_hash, "the logs are the same"
    embeddings = cached_embeddings(data, 4, tmp_path)
    np.testing.assert_array_equal(cached_embeddings(data, 4, tmp_path), embeddings)
    before, after = unit_rows(embeddings)[[30, 4, 17]], unit_rows(cached_embeddings(shuffled, 4, tmp_path))[:3]
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-2)


def test_damaged_embeddings_are_made_again_and_never_used(tmp_path, rebuilt):
    data = small_data()
    right = cached_embeddings(data, 4, tmp_path)
    (path,) = (tmp_path / "embeddings").iterdir()
    content = path.read_bytes()
    other = bytearray(content)
    other[-2] ^= 1  # still a number, and another one
    cached_embeddings(data, 5, tmp_path)
    (of_another,) = set((tmp_path / "embeddings").iterdir()) - {path}
    damaged = [b"", content[:40], content[:-8], bytes(other), b"\x93NUMPY" + content[6:], of_another.read_bytes()]
    for damage in [*damaged, content.replace(b'"dimension\\": 4', b'"dimension\\": 5')]:
        assert damage != content
        path.write_bytes(damage)
        np.testing.assert_array_equal(cached_embeddings(data, 4, tmp_path), right)
        (line,) = rebuilt()
        assert str(path) in line
        assert path.read_bytes() == content
    np.testing.assert_array_equal(cached_embeddings(data, 4, tmp_path), right)
    assert not rebuilt()


def test_processes_that_embed_the_same_items_at_once_do_not_harm_each_other(tmp_path):
    data = small_data()
    with ThreadPoolExecutor(4) as pool:
        tables = [pool.submit(cached_embeddings, data, 4, tmp_path) for _ in range(8)]
        while not all(table.done() for table in tables):
            for path in (tmp_path / "embeddings").glob("[!.]*"):
                with open_artifact(path, "items", EMBEDDINGS) as (_, tensors, _):
                    assert tensors["embeddings"].shape == (len(data.items), 4)
    for table in tables:
        np.testing.assert_array_equal(table.result(), tables[0].result())
    assert [path.suffix for path in (tmp_path / "embeddings").iterdir()] == [".safetensors"]


def test_rounding_errors_of_users_without_factors_are_no_direction():
    """Other processors round otherwise: scaled to length 1, the items' embeddings would differ there."""
    users, items = np.repeat([0, 1, 2], 3), np.tile([0, 1, 2], 3)
    log = InteractionLog(users, items, items == 0, np.arange(9))
    factors = np.random.default_rng(0).normal(size=(3, 4))
    assert not _co_exposure(log, 1e-8 * factors, 3).any()
    np.testing.assert_allclose(np.linalg.norm(_co_exposure(log, factors, 3)[1:], axis=1), 1.0)
