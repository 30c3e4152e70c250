"""Pairs of small worlds whose answers are known, for methods, runs and tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from helpers import small_world

from hrl_policies.worlds import WorldPair


def small_pair(table: Any = None, *, n_items: int = 50, name: str = "small", seed: int = 0) -> WorldPair:
    """Two worlds over one small data set: 25 users to learn from, 15 others to be judged on."""
    world = small_world(table, n_items=n_items, seed=seed)
    train = replace(world, split="train", users=np.arange(15, 40))
    return WorldPair(name, train, replace(world, users=np.arange(15)))
