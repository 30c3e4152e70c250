"""Windows unlike those of training: states stay finite and within their space, and spreads make sense."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from purifiers import quick_config
from small_worlds import taste_worlds

from dsrm.model import DSRM
from dsrm.pretraining import pretrain
from dsrm.purifier import BELIEF_MODES, MODES, Mode, StatePurifier
from dsrm.targets import WindowSettings
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.world import World

WITHOUT_EMBEDDING = 20
HISTORY = 30
ALIKE = WindowSettings(min_length=8, max_length=8, policy_share=0.0)
"""Windows of training have one length: sessions are soon longer, and how full a window is never varied."""


@cache
def world(dimension: int) -> World:
    """Returns a world with embeddings of some size, whose first items have none."""
    train, _ = taste_worlds()
    embeddings = item_embeddings(train.data.train, len(train.data.users), train.data.items, dimension)
    embeddings[:WITHOUT_EMBEDDING] = 0.0
    return replace(train, embeddings=embeddings)


@cache
def purifier(mode: Mode, dimension: int) -> StatePurifier:
    return pretrain(world(dimension), quick_config(mode, windows=ALIKE))


def check(mode: Mode, dimension: int, window: HistoryWindow, samples: int = 0) -> None:
    """Checks that states are finite and within their space, and that posteriors are neither points nor boundless."""
    made = purifier(mode, dimension)
    states = observed_states(world(dimension), window)
    space = made.bind(world(dimension))
    purified = made.purify(states, window)
    assert purified.shape == (len(states), dimension)
    assert np.isfinite(purified).all()
    assert all(space.contains(row) for row in purified)
    if not isinstance(made, DSRM) or mode == "paper":
        return
    spread = made.with_output("state+spread").purify(states, window)[:, -1]
    if samples:
        # As the spread of the student, in deviations of the clean states of training.
        deviation = np.maximum(made.tensors()["state.deviation"], 1e-3)
        sampled = made.posterior(states, window, samples).std(axis=0, ddof=1) / deviation
        spread = np.concatenate([spread, np.sqrt((sampled**2).mean(axis=1))])
    assert np.isfinite(spread).all()
    assert ((spread > 0.1) & (spread < 3.0)).all()


@st.composite
def windows(draw: Any) -> HistoryWindow:
    """Draws windows of any length, of which nothing, some or all was clicked, perhaps items without embedding alone."""
    rows = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    items = rng.integers(draw(st.sampled_from([1, WITHOUT_EMBEDDING, 120])), size=(rows, HISTORY)).astype(np.int32)
    shown = draw(st.lists(st.sampled_from([0, 1, 5, HISTORY]), min_size=rows, max_size=rows))
    items[np.arange(HISTORY) < HISTORY - np.asarray(shown)[:, None]] = PADDING
    rate = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return HistoryWindow(items, (rng.random(items.shape) < rate) & (items != PADDING))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in BELIEF_MODES])
@given(window=windows())
@settings(max_examples=12, deadline=None)
def test_any_window_gives_a_finite_state_and_a_sensible_spread(mode, window):
    check(mode, 8, window)


@pytest.mark.parametrize("mode", ["profile", "paper", "regression"])
@pytest.mark.parametrize("dimension", [8, 64, 256])
def test_states_of_any_size_are_purified(mode, dimension):
    rng = np.random.default_rng(0)
    items = rng.integers(120, size=(6, HISTORY)).astype(np.int32)
    items[0, :-1] = items[1] = PADDING
    items[2] = 3
    clicks = rng.random(items.shape) < 0.3
    clicks[3], clicks[4] = False, True
    check(mode, dimension, HistoryWindow(items, clicks & (items != PADDING)), samples=8)
