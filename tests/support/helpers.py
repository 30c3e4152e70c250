"""Small worlds whose answers are known, and what tests of every package need: stops, scripts, a registry put back."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnvWrapper

from kuaifair_env import ENVIRONMENTS
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.world import World, initial_history


class TableResponse:
    """Click probabilities from a table, ``float32 (users, items)``."""

    uses_history = False

    def __init__(self, table: Any) -> None:
        self.table = np.asarray(table, np.float32)
        self.n_users, self.n_items = self.table.shape

    def expected(self, users: Any, items: Any, history: Any = None) -> Any:
        return self.table[users[:, None], items]

    def feedback(self, expected: Any, uniforms: Any) -> Any:
        return (uniforms < expected).astype(np.float32)

    def clicked(self, feedback: Any) -> Any:
        return feedback > 0

    def rearranged(self, items: Any) -> TableResponse:
        return TableResponse(self.table[:, items])

    def expected_catalogue(self, users: Any, n_items: int, history: Any = None) -> Any:
        return self.table[users, :n_items]

    def save(self, path: str | Path) -> None:
        raise AssertionError("a test table is never saved")

    def describe(self) -> dict[str, Any]:
        return {"kind": "table"}


@cache
def small_data(
    n_users: int = 40, n_items: int = 50, rows_per_user: int = 60, n_tags: int = 5, seed: int = 0
) -> InteractionData:
    """Item ``i`` is shown with weight ``1 / (i + 1)`` and clicked in 2 cases of 5; ids are 10 * row."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, n_items + 1)

    def log() -> InteractionLog:
        users = np.repeat(np.arange(n_users), rows_per_user)
        items = rng.choice(n_items, len(users), p=weights / weights.sum())
        return InteractionLog.sorted(users, items, rng.random(len(users)) < 0.4)

    tags = np.zeros((n_items, n_tags), np.bool_)
    tags[np.arange(n_items), np.arange(n_items) % max(n_tags, 1)] = n_tags > 0
    return InteractionData(
        Users(
            10 * np.arange(n_users),
            FeatureTable(rng.normal(size=(n_users, 3)).astype(np.float32), ("a", "b", "c")),
        ),
        Catalogue(10 * np.arange(n_items), FeatureTable.empty(n_items), tags, tuple(f"t{i}" for i in range(n_tags))),
        log(),
        log(),
        Provenance("small", "own"),
    )


def small_world(
    table: Any = None,
    *,
    n_users: int = 40,
    n_items: int = 50,
    candidates: int | None = None,
    dimension: int = 8,
    history_length: int = 20,
    seed: int = 0,
) -> World:
    """A world over :func:`small_data`; ``table`` may be a scalar click probability."""
    data = small_data(n_users, n_items, seed=seed)
    if table is None:
        table = np.random.default_rng(seed).random((n_users, n_items))
    count = n_items if candidates is None else candidates
    return World(
        split="test",
        data=data,
        n_items=count,
        groups=popularity_groups(data.train.exposures(n_items)[:count], data.items.ids[:count]),
        embeddings=_embeddings(n_users, n_items, seed, dimension).copy(),
        response=TableResponse(np.broadcast_to(table, (n_users, n_items))),
        users=np.arange(n_users),
        initial_history=initial_history(data.train, n_users, history_length),
    )


@cache
def _embeddings(n_users: int, n_items: int, seed: int, dimension: int) -> Any:
    data = small_data(n_users, n_items, seed=seed)
    return item_embeddings(data.train, n_users, data.items, dimension)


class Stops(VecEnvWrapper):
    """Is interrupted at the step of this number."""

    def __init__(self, venv: Any, step: int) -> None:
        super().__init__(venv)
        self._left = step

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self.venv.step_wait()


def module_of(path: Path) -> ModuleType:
    """A module made anew from the script of a path, which no package holds."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by its name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def registry_put_back() -> Iterator[Callable[[], None]]:
    """Ids that are registered within are gone after it, and whenever the function that it gives is called."""
    before, known = dict(ENVIRONMENTS), set(gym.registry)

    def forget() -> None:
        ENVIRONMENTS.clear()
        ENVIRONMENTS.update(before)
        for env_id in set(gym.registry) - known:
            del gym.registry[env_id]

    try:
        yield forget
    finally:
        forget()
