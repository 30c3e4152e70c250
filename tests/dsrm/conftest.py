"""Purifiers that are pretrained once a run."""

from __future__ import annotations

import pytest
from purifiers import learning_config, quick_config
from small_worlds import taste_worlds

from dsrm.pretraining import pretrain
from dsrm.purifier import BELIEF_MODES, MODES, Mode, StatePurifier

SEEDS = (0, 1, 2)


@pytest.fixture(scope="session")
def purifiers() -> dict[Mode, StatePurifier]:
    """One purifier of single states of each mode; they have learned next to nothing."""
    train, _ = taste_worlds()
    return {mode: pretrain(train, quick_config(mode)) for mode in MODES if mode not in BELIEF_MODES}


@pytest.fixture(scope="session")
def trained_purifiers() -> dict[Mode, list[StatePurifier]]:
    """Purifiers of several seeds that have learned; for slow tests."""
    train, _ = taste_worlds()
    modes: tuple[Mode, ...] = ("profile", "unbiased", "paper")
    return {mode: [pretrain(train, learning_config(mode, seed)) for seed in SEEDS] for mode in modes}
