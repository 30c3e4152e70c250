"""Purifiers that are pretrained once a run."""

from __future__ import annotations

import pytest
from purifiers import learning_config, quick_config
from small_worlds import taste_worlds

from dsrm.pretraining import pretrain
from dsrm.purifier import Mode, StatePurifier

SEEDS = (0, 1, 2)


class Pretrained(dict[Mode, StatePurifier]):
    """Purifiers by mode, each of which is made when it is first asked for."""

    def __missing__(self, mode: Mode) -> StatePurifier:
        self[mode] = pretrain(taste_worlds()[0], quick_config(mode))
        return self[mode]


@pytest.fixture(scope="session")
def purifiers() -> dict[Mode, StatePurifier]:
    """One purifier of each mode; they have learned next to nothing, and nobody changes them."""
    return Pretrained()


@pytest.fixture(scope="session")
def trained_purifiers() -> dict[Mode, list[StatePurifier]]:
    """Purifiers of several seeds that have learned; for slow tests."""
    train, _ = taste_worlds()
    modes: tuple[Mode, ...] = ("profile", "unbiased", "paper")
    return {mode: [pretrain(train, learning_config(mode, seed)) for seed in SEEDS] for mode in modes}
