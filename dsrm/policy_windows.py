"""Windows that a recommender made: what a purifier meets once an agent, not the platform, picks the slates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.actions import top_k
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.leave import NeverLeave
from kuaifair_env.observation import StateObserver
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sessions import FixedSessions, SessionSimulator
from kuaifair_env.worlds import World

MOST_STEPS = 12
SLATE_SIZE = 10
_BATCH = 512
_TASTE, _POPULARITY = 8.0, 1.5
_POOLS = (32, 128, 512)


def policy_windows(world: World, users: IntArray, rng: np.random.Generator) -> HistoryWindow:
    """Plays one short session of each given user and returns where its window ended.

    Each session is served by another policy, so that training meets the whole range: slates are the top items by
    ``a cos(s~, e_i) + b popularity_i`` with ``a`` from 0 to 8 and ``b`` from -1.5 to 1.5 drawn for the session, among
    32, 128 or 512 random candidates drawn for the step (from nearly random to nearly greedy), for 1 to 12 steps after
    the logged history. Feedback comes from the given world.

    Args:
        world: The training world to learn from; the test world to probe what was learned.
        users: ``(n,)`` user rows; they may repeat.
        rng: Source of randomness.

    Returns:
        ``n`` windows.
    """
    rows = np.asarray(users, np.int64)
    steps = rng.integers(1, MOST_STEPS + 1, len(rows))
    # Sessions of equal length share a batch, so that none runs longer than it must.
    order = np.argsort(steps, kind="stable")
    parts = [
        _played(world, rows[part], steps[part], rng)
        for part in np.array_split(order, max(1, len(order) // _BATCH))
    ]
    items = np.empty((len(rows), world.history_length), np.int32)
    clicks = np.empty(items.shape, np.bool_)
    items[order] = np.concatenate([part.items for part in parts])
    clicks[order] = np.concatenate([part.clicks for part in parts])
    return HistoryWindow(items, clicks)


def _played(
    world: World, users: NDArray[np.int64], steps: NDArray[np.int64], rng: np.random.Generator
) -> HistoryWindow:
    keys = rng.integers(0, 2**63, len(users)).astype(np.uint64)
    simulator = SessionSimulator(
        world,
        len(users),
        FixedSessions(users, keys),
        max_len=int(steps.max()),
        slate_size=min(SLATE_SIZE, world.n_items),
        leave=NeverLeave(),
    )
    simulator.reset(np.arange(len(users)))
    observer = StateObserver(world)
    units = _unit_rows(world.embeddings[: world.n_items]).T
    logs = np.log1p(world.data.train.exposures(len(world.data.items))[: world.n_items])
    popularity = ((logs - logs.mean()) / max(float(logs.std()), 1e-6)).astype(np.float32)
    taste = rng.uniform(0.0, _TASTE, (len(users), 1)).astype(np.float32)
    slant = rng.uniform(-_POPULARITY, _POPULARITY, (len(users), 1)).astype(np.float32)
    ended = simulator.history()
    for step in range(int(steps.max())):
        pool = rng.choice(world.n_items, min(int(rng.choice(_POOLS)), world.n_items), replace=False)
        scores = taste * (_unit_rows(observer.observe(simulator)) @ units[:, pool]) + slant * popularity[pool]
        simulator.step(pool[top_k(scores, simulator.slate_size)])
        now = steps == step + 1
        if now.any():
            window = simulator.history(np.flatnonzero(now))
            ended.items[now], ended.clicks[now] = window.items, window.clicks
    return ended


def _unit_rows(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: FloatArray = vectors / np.maximum(norms, np.float32(1e-6))
    return units
