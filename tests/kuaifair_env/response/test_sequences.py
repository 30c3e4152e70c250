"""Histories for fitting against a row-by-row walk through the logs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.response.base import PADDING
from kuaifair_env.response.rows import history_chunks, history_stream, windows


def random_log(rng, users, rows):
    return InteractionLog.sorted(
        rng.integers(0, users, rows), rng.integers(0, 99, rows), rng.random(rows) < 0.5
    )


def seen_before(log, context, row, source):
    """What the row's user saw before it, oldest first."""
    user = log.users[row]
    seen = [(i, c) for u, i, c in zip(context.users, context.items, context.clicks, strict=True) if u == user]
    if source == "log":
        earlier = np.arange(len(log)) < row
        seen += list(
            zip(
                log.items[earlier & (log.users == user)],
                log.clicks[earlier & (log.users == user)],
                strict=True,
            )
        )
    return seen


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from(["log", "context"]))
def test_windows_hold_the_last_items_before_each_row(seed, length, source):
    rng = np.random.default_rng(seed)
    log, context = random_log(rng, 4, 30), random_log(rng, 4, 25)
    window = windows(history_stream(log, context, 5, source), np.arange(30), length)
    for row in range(30):
        seen = seen_before(log, context, row, source)[-length:]
        padded = [(PADDING, False)] * (length - len(seen)) + seen
        assert window.items[row].tolist() == [item for item, _ in padded]
        assert window.clicks[row].tolist() == [click for _, click in padded]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from(["log", "context"]))
def test_each_row_is_predicted_once_from_a_suffix_of_what_was_seen(seed, length, source):
    rng = np.random.default_rng(seed)
    log, context = random_log(rng, 4, 60), random_log(rng, 4, 25)
    rows = np.sort(rng.choice(60, 40, replace=False))
    chunks = history_chunks(history_stream(log, context, 5, source), rows, length)
    assert sorted(chunks.rows.tolist()) == list(range(40))
    for chunk in range(len(chunks.offsets) - 1):
        for k in range(chunks.offsets[chunk], chunks.offsets[chunk + 1]):
            seen = seen_before(log, context, rows[chunks.rows[k]], source)
            place = chunks.places[k]
            read = list(
                zip(chunks.history.items[chunk, :place], chunks.history.clicks[chunk, :place], strict=True)
            )
            assert read == seen[len(seen) - place :]
            assert place <= length
            assert place >= min(len(seen), length - max(length // 2, 1))


def test_chunks_share_passes():
    rng = np.random.default_rng(0)
    log = random_log(rng, 3, 300)
    chunks = history_chunks(history_stream(log, None, 3, "log"), np.arange(300), 50)
    assert len(chunks.offsets) - 1 <= 3 * 4


def test_without_context_the_first_row_sees_nothing():
    log = InteractionLog.sorted(np.array([0, 1]), np.array([5, 6]), np.array([1, 0]))
    window = windows(history_stream(log, None, 2, "log"), np.arange(2), 3)
    assert (window.items == PADDING).all()
    with pytest.raises(IndexError):
        windows(history_stream(log, None, 2, "log"), np.array([2]), 3)
