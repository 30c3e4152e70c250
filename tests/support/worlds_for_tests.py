"""Pairs of small worlds whose answers are known, for methods, runs and tables."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
from helpers import TableResponse, small_world

from hrl_policies.worlds import WorldPair


def small_pair(table: Any = None, *, n_items: int = 50, name: str = "small", seed: int = 0) -> WorldPair:
    """Two worlds over one small data set: 25 users to learn from, 15 others to be evaluated on."""
    world = small_world(table, n_items=n_items, seed=seed)
    train = replace(world, split="train", users=np.arange(15, 40))
    return WorldPair(name, train, replace(world, users=np.arange(15)))


class Interrupting(TableResponse):
    """Presses Ctrl-C when users were asked for the given time."""

    def __init__(self, table: Any, at: int) -> None:
        super().__init__(table)
        self.left = at

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().expected(users, items, history)


def interrupted_pair(at: int) -> WorldPair:
    """The small worlds, in which training is interrupted."""
    pair = small_pair()
    return replace(pair, train=replace(pair.train, response=Interrupting(pair.train.response.table, at)))
