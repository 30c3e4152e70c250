"""What the training log says of items, against counting by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_data, small_world

from hrl_policies.dnair.policies import ItemTables, SimilarItems
from kuaifair_env.data.schema import InteractionLog

N = 50
WORLD = small_world(candidates=40)
LOG = WORLD.data.train


def cosine(world) -> np.ndarray:
    """``|U_i & U_j| / sqrt(|U_i| |U_j|)`` by sets of users."""
    log = world.data.train
    fans = [
        set(log.users[(log.items == item) & log.clicks].tolist()) for item in range(len(world.data.items))
    ]
    return np.array(
        [[len(a & b) / max(np.sqrt(len(a) * len(b)), 1e-9) for b in fans[: world.n_items]] for a in fans]
    )


def test_counts_quality_and_popularity_are_those_of_the_training_log():
    tables = ItemTables.of_world(WORLD)
    shown = np.array([(LOG.items == item).sum() for item in range(N)])
    clicked = np.array([((LOG.items == item) & LOG.clicks).sum() for item in range(N)])
    np.testing.assert_array_equal(tables.exposures, shown)
    np.testing.assert_array_equal(tables.clicks, clicked)
    np.testing.assert_allclose(tables.quality, (clicked + 1) / (shown + 2), rtol=1e-6)
    np.testing.assert_allclose(
        tables.popularity, (shown - shown.min()) / (shown.max() - shown.min()), rtol=1e-6
    )
    raw = tables.quality / np.log10(tables.popularity + 1.1)
    np.testing.assert_allclose(tables.novelty, raw / raw.max(), rtol=1e-6)
    assert tables.novelty.max() == 1.0 and tables.novelty.min() > 0.0
    np.testing.assert_array_equal(tables.item_ids, WORLD.data.items.ids)


def test_neighbours_are_the_most_similar_candidates_by_users_in_common():
    tables, expected = ItemTables.of_world(WORLD, 7), cosine(WORLD)
    assert tables.neighbours.shape == tables.similarities.shape == (N, 7)
    assert tables.neighbours.max() < 40, "items that may not be shown are no candidates"
    for item in range(N):
        others = expected[item].copy()
        if item < 40:
            others[item] = -1
        best = np.sort(others)[::-1][:7]
        np.testing.assert_allclose(tables.similarities[item], best, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(others[tables.neighbours[item]], best, rtol=1e-5, atol=1e-7)


def test_the_test_log_says_nothing():
    data = WORLD.data
    other = InteractionLog.sorted(data.test.users, (data.test.items + 1) % N, ~data.test.clicks)
    changed = replace(WORLD, data=replace(data, test=other))
    before, after = ItemTables.of_world(WORLD), ItemTables.of_world(changed)
    for name in ("exposures", "clicks", "neighbours", "similarities"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_many_items_are_counted_as_few_are(monkeypatch):
    import hrl_policies.dnair.policies as module

    whole = ItemTables.of_world(WORLD, 7)
    monkeypatch.setattr(module, "_ITEMS_AT_ONCE", 9)
    np.testing.assert_array_equal(ItemTables.of_world(WORLD, 7).neighbours, whole.neighbours)


def test_few_candidates_and_no_neighbours_will_do():
    assert ItemTables.of_world(small_world(candidates=5), 50).neighbours.shape == (N, 4)
    none = ItemTables.of_world(WORLD, 0)
    assert none.neighbours.shape == (N, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        ItemTables.of_world(WORLD, -1)


def observed(rows: list[list[tuple[int, int]]], length: int = 20) -> dict[str, np.ndarray]:
    """Windows of (item, click), newest last."""
    items = np.zeros((len(rows), length), np.int64)
    clicks = np.zeros((len(rows), length), np.int8)
    for row, window in enumerate(rows):
        for place, (item, click) in enumerate(reversed(window)):
            items[row, -1 - place], clicks[row, -1 - place] = item + 1, click
    return {"history_items": items, "history_clicks": clicks}


def similar(world=WORLD, neighbours: int = 39) -> SimilarItems:
    found = SimilarItems(world.n_items, N, neighbours)
    found.fill(ItemTables.of_world(world, neighbours))
    return found


def test_similarity_sums_over_the_last_ten_clicks_newest_first():
    rng = np.random.default_rng(0)
    rows = [[(int(rng.integers(N)), int(rng.integers(2))) for _ in range(size)] for size in (0, 3, 20, 20)]
    rows[3] = [(item, 1) for item, _ in rows[3]]
    sims = cosine(WORLD)
    sims[np.arange(40), np.arange(40)] = 0.0
    expected = np.zeros((4, 40))
    for row, window in enumerate(rows):
        liked = [item for item, click in reversed(window) if click][:10]
        for place, item in enumerate(liked):
            expected[row] += 0.9**place * sims[item]
    np.testing.assert_allclose(similar().scores(observed(rows)), expected, rtol=1e-4, atol=1e-6)
    assert not expected[0].any() and expected[3].any()


def test_who_liked_nothing_is_shown_what_is_good():
    found = similar().best(observed([[(3, 0), (4, 0)], []]), 6)
    good = np.sort(ItemTables.of_world(WORLD).quality[:40])[::-1][:6]
    quality = ItemTables.of_world(WORLD).quality[found]
    np.testing.assert_allclose(quality, np.tile(good, (2, 1)))


def test_what_may_not_be_shown_comes_last():
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, 30:] = True
    found = similar().best(observed([[(1, 1)]]), 12, allowed)[0].tolist()
    assert set(found[:10]) == set(range(30, 40)) and len(set(found)) == 12


def test_a_click_counts_once_a_user():
    data = small_data()
    doubled = InteractionLog.sorted(*(np.tile(column, 2) for column in (LOG.users, LOG.items, LOG.clicks)))
    twice = replace(WORLD, data=replace(data, train=doubled))
    before, after = ItemTables.of_world(WORLD, 5), ItemTables.of_world(twice, 5)
    np.testing.assert_allclose(before.similarities, after.similarities, rtol=1e-6)
    np.testing.assert_array_equal(2 * before.exposures, after.exposures)
