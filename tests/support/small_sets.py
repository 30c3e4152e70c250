"""Small data sets for the cache, importable by the processes that a test starts."""

from __future__ import annotations

from typing import Any

import numpy as np

from kuaifair_env.data import (
    Catalogue,
    FeatureTable,
    InteractionData,
    InteractionLog,
    Provenance,
    Users,
    cached,
)


def make_data(seed: int = 0, rows: int = 300, rich: bool = True) -> InteractionData:
    rng = np.random.default_rng(seed)
    n_users, n_items = 9, 14

    def log(part: int) -> InteractionLog:
        ratios = rng.random(rows).astype(np.float32) if rich else None
        clicks = np.ones(rows, bool) if part else rng.random(rows) < 0.4
        times = rng.integers(0, 10**12, rows)
        return InteractionLog.sorted(
            rng.integers(0, n_users, rows), rng.integers(0, n_items, rows), clicks, times, ratios, bool(part)
        )

    features = FeatureTable(rng.normal(size=(n_items, 2)).astype(np.float32), ("a", "b=ü"))
    items = Catalogue(
        np.arange(n_items) * 7 - 3,
        features if rich else FeatureTable.empty(n_items),
        rng.random((n_items, 3)) < 0.5 if rich else np.zeros((n_items, 0), bool),
        ("0", "1", "9") if rich else (),
        rng.random(n_items) if rich else None,
    )
    users = Users(np.arange(n_users) + 10**12, FeatureTable.empty(n_users))
    provenance = Provenance("Test Set", "own", "for tests", {"f.csv": "00"}, {"seed": seed})
    return InteractionData(users, items, log(1), log(0), provenance, {"train": {"rows": rows}})


def build_in_a_process(folder: str, barrier: Any) -> str:
    barrier.wait(60)
    hashes = {cached({"name": "Test Set"}, lambda: make_data(5, rows=20_000), folder).data_hash for _ in range(3)}
    assert len(hashes) == 1
    return hashes.pop()
