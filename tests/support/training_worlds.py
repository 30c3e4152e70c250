"""A small training world with a taste that repeats, in which purifiers have something to learn."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from helpers import TableResponse

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.splits import held_out_users
from kuaifair_env.world import World, initial_history, svd_item_embeddings

N_USERS, N_ITEMS, N_TAGS, DIMENSION = 600, 120, 4, 8


@lru_cache(maxsize=2)
def taste_worlds(seed: int = 0) -> tuple[World, World]:
    """Users like one of four tags; popular items are clicked by everybody in training, not in the unbiased test log."""
    rng = np.random.default_rng(seed)
    tags = np.zeros((N_ITEMS, N_TAGS), np.bool_)
    tags[np.arange(N_ITEMS), rng.integers(N_TAGS, size=N_ITEMS)] = True
    likes = rng.integers(N_TAGS, size=N_USERS)
    weights = 1.0 / np.arange(1, N_ITEMS + 1)
    taste = np.where(tags[:, likes].T, 0.75, 0.15)
    herd = np.clip(taste + 0.5 * (np.arange(N_ITEMS) < N_ITEMS // 5), 0, 0.95)

    def log(table: np.ndarray, chance: np.ndarray | None, rows: int) -> InteractionLog:
        users = np.repeat(np.arange(N_USERS), rows)
        items = rng.choice(N_ITEMS, len(users), p=chance)
        return InteractionLog.sorted(users, items, rng.random(len(users)) < table[users, items])

    data = InteractionData(
        Users(np.arange(N_USERS) * 3, FeatureTable.empty(N_USERS)),
        Catalogue(np.arange(N_ITEMS) * 7, FeatureTable.empty(N_ITEMS), tags, tuple(f"t{i}" for i in range(N_TAGS))),
        log(herd, weights / weights.sum(), 80),
        log(taste, None, 40),
        Provenance("taste", "own"),
    )
    held = held_out_users(data)
    common = {
        "data": data,
        "n_items": N_ITEMS,
        "groups": popularity_groups(data.train.exposures(N_ITEMS), data.items.ids),
        "embeddings": svd_item_embeddings(data.train, N_USERS, N_ITEMS, DIMENSION),
        "initial_history": initial_history(data.train, N_USERS, 30),
    }
    free = np.setdiff1d(np.arange(N_USERS), held)
    train = World(split="train", response=TableResponse(herd), users=free, **common)
    test = World(split="test", response=TableResponse(taste), users=held, **common)
    return train, test
