"""A world whose front of clicks against long-tail share is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from logged_worlds import logged_pair

from hrl_policies.worlds import WorldPair

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
