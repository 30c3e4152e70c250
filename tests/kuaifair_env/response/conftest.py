"""Worlds whose click probabilities are known, and small models to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.response import FactorisedResponse


@dataclass(frozen=True)
class KnownWorld:
    """A data set and the probabilities that its clicks were drawn from."""

    data: InteractionData
    probabilities: Any
    tastes: Any


def _known_world(
    taste: float = 1.0,
    n_users: int = 600,
    n_items: int = 150,
    rows_per_user: int = 60,
    rank: int = 2,
    seed: int = 0,
) -> KnownWorld:
    rng = np.random.default_rng(seed)
    p, q = rng.normal(size=(n_users, rank)), rng.normal(size=(n_items, rank))
    personal = taste * (p - p.mean(0)) @ (q - q.mean(0)).T / rank**0.5
    logits = -0.8 + 0.6 * rng.normal(size=(n_users, 1)) + 0.6 * rng.normal(size=(1, n_items)) + personal
    probabilities = 1 / (1 + np.exp(-logits))
    users = np.repeat(np.arange(n_users), rows_per_user)

    def log() -> InteractionLog:
        items = rng.integers(0, n_items, len(users))
        return InteractionLog.sorted(users, items, rng.random(len(users)) < probabilities[users, items])

    tags = np.zeros((n_items, 4), np.bool_)
    tags[np.arange(n_items), (q[:, 0] > 0) * 2 + (q[:, 1] > 0)] = True
    data = InteractionData(
        Users(np.arange(n_users), FeatureTable(rng.normal(size=(n_users, 2)).astype(np.float32), ("a", "b"))),
        Catalogue(np.arange(n_items), FeatureTable.empty(n_items), tags, ("a", "b", "c", "d")),
        log(),
        log(),
        Provenance("known", "own"),
    )
    return KnownWorld(data, probabilities, personal)


@pytest.fixture(scope="session")
def known_world() -> Callable[..., KnownWorld]:
    return _known_world


@pytest.fixture
def small_model() -> FactorisedResponse:
    rng = np.random.default_rng(3)
    return FactorisedResponse(
        -0.5,
        rng.normal(size=30),
        rng.normal(size=20),
        rng.normal(size=(30, 5)) + 1,
        rng.normal(size=(20, 5)) - 2,
        {"a": 1},
    )
