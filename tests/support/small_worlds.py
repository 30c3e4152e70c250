"""A world whose front of clicks against long-tail share is known.

A small training world with a taste that repeats, in which purifiers have something to learn. Pairs of small
worlds whose answers are known, for methods, runs and tables.
"""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from helpers import TableResponse, small_world
from logged_worlds import logged_pair

from hrl_policies.worlds import WorldPair
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.splits import held_out_users
from kuaifair_env.world import World, initial_history

KIND = np.repeat([0, 1, 2], [10, 20, 20])
CHANCE = np.asarray([0.9, 0.6, 0.0])
"""Clicks on popular items, on good and on bad ones of the long tail."""

ENDS = ((0.9, 0.0), (0.6, 1.0))
"""Both ends of the front, popular items alone and good ones of the tail alone; what mixes them lies between."""


def front_pair(response: Any = None) -> WorldPair:
    """Embeddings tell the three kinds of items apart; users are all alike."""
    rng = np.random.default_rng(0)
    embeddings = 2.0 * np.eye(8)[KIND] + 0.3 * rng.normal(size=(50, 8))
    embeddings *= 8**0.5 / np.linalg.norm(embeddings, axis=1, keepdims=True)
    return logged_pair(
        np.tile(CHANCE[KIND], (40, 1)),
        response=response,
        shown=np.where(KIND == 0, 10.0, 1.0),
        embeddings=embeddings.astype(np.float32),
    )


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
        "embeddings": item_embeddings(data.train, N_USERS, data.items, DIMENSION),
        "initial_history": initial_history(data.train, N_USERS, 30),
    }
    free = np.setdiff1d(np.arange(N_USERS), held)
    train = World(split="train", response=TableResponse(herd), users=free, **common)
    test = World(split="test", response=TableResponse(taste), users=held, **common)
    return train, test


def small_pair(table: Any = None, *, n_items: int = 50, name: str = "small", seed: int = 0) -> WorldPair:
    """Two worlds over one small data set: 25 users to learn from, 15 others to be evaluated on."""
    world = small_world(table, n_items=n_items, seed=seed)
    train = replace(world, split="train", users=np.arange(15, 40))
    return WorldPair(name, train, replace(world, users=np.arange(15)))


class Interrupting(TableResponse):
    """Presses Ctrl-C, sends another signal, or raises, when users were asked for the given time."""

    def __init__(self, table: Any, at: int, number: signal.Signals | Exception = signal.SIGINT) -> None:
        super().__init__(table)
        self.left = at
        self.number = number

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        self.left -= 1
        if self.left == 0 and isinstance(self.number, Exception):
            raise self.number
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().expected(users, items, history)


def interrupted_pair(at: int, number: signal.Signals | Exception = signal.SIGINT) -> WorldPair:
    """The small worlds, in which training is interrupted."""
    pair = small_pair()
    # The fingerprints of the world and of the randomised one ask users once each.
    train = replace(pair.train, response=Interrupting(pair.train.response.table, at + 2, number))
    assert train.fingerprint
    return replace(pair, train=train)
