"""Worlds whose training log says what users do, so that offline methods have something to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import TableResponse

from hrl_policies.worlds import WorldPair
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.world import World, initial_history


class SilentResponse(TableResponse):
    """Knows everything and must not be asked."""

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        raise AssertionError("the world's response model was asked")

    def expected_catalogue(self, users: Any, n_items: int, history: Any = None) -> Any:
        raise AssertionError("the world's response model was asked")

    def feedback(self, expected: Any, uniforms: Any) -> Any:
        raise AssertionError("the world's response model was asked")


def logged_data(
    table: Any,
    rows_per_user: int = 60,
    *,
    shown: Any = None,
    n_tags: int = 0,
    positives_only: bool = False,
    seed: int = 0,
) -> InteractionData:
    """Both logs show items with weights ``shown`` (uniform) and are clicked with the probabilities of a table."""
    rng = np.random.default_rng(seed)
    table = np.asarray(table, float)
    n_users, n_items = table.shape
    weights = np.ones(n_items) if shown is None else np.asarray(shown, float)

    def log() -> InteractionLog:
        users = np.repeat(np.arange(n_users), rows_per_user)
        items = rng.choice(n_items, len(users), p=weights / weights.sum())
        clicks = rng.random(len(users)) < table[users, items]
        kept = clicks if positives_only else np.ones(len(users), np.bool_)
        return InteractionLog.sorted(users[kept], items[kept], clicks[kept], positives_only=positives_only)

    tags = np.arange(n_items)[:, None] % max(n_tags, 1) == np.arange(n_tags)
    return InteractionData(
        Users(10 * np.arange(n_users), FeatureTable.empty(n_users)),
        Catalogue(10 * np.arange(n_items), FeatureTable.empty(n_items), tags, tuple(f"t{i}" for i in range(n_tags))),
        log(),
        log(),
        Provenance("logged", "own"),
    )


def logged_pair(
    table: Any, *, response: Any = None, dimension: int = 8, embeddings: Any = None, **settings: Any
) -> WorldPair:
    """Two worlds over one such log: the last three fifths of the users to learn from, the others to be evaluated on."""
    data = logged_data(table, **settings)
    n_users, n_items = len(data.users), len(data.items)
    if embeddings is None:
        embeddings = item_embeddings(data.train, n_users, data.items, dimension)
    first = 2 * n_users // 5

    def world(split: Any, users: Any) -> World:
        return World(
            split=split,
            data=data,
            n_items=n_items,
            groups=popularity_groups(data.train.exposures(n_items), data.items.ids),
            embeddings=embeddings,
            response=TableResponse(table) if response is None else response,
            users=users,
            initial_history=initial_history(data.train, n_users, 20),
        )

    return WorldPair("logged", world("train", np.arange(first, n_users)), world("test", np.arange(first)))
