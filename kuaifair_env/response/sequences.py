"""Histories for fitting: the part of a user's log that stands before each row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, InteractionLog
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.response.config import HistorySource


@dataclass(frozen=True)
class Stream:
    """Context rows and log rows of all users in one line: users in order, for each the context first.

    Attributes:
        users: ``int64 (S,)``.
        items: ``int32 (S,)``.
        clicks: ``bool (S,)``.
        starts: ``int64 (S,)``, where the row's user begins.
        places: ``int64 (R,)``, where each row of the log stands in the line.
        ends: ``int64 (R,)``, up to where (exclusive) each row of the log sees the line.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int32]
    clicks: BoolArray
    starts: NDArray[np.int64]
    places: NDArray[np.int64]
    ends: NDArray[np.int64]


def history_stream(
    log: InteractionLog, context: InteractionLog | None, n_users: int, source: HistorySource
) -> Stream:
    """Joins context and log into one line per user.

    Args:
        log: Rows to be predicted.
        context: What the users saw before.
        n_users: Number of users.
        source: ``"log"``: a row sees the context and all earlier rows of the log. ``"context"``: it sees the context
            alone, for a log whose order is not known.
    """
    logs = [log] if context is None else [context, log]
    users = np.concatenate([part.users for part in logs]).astype(np.int64)
    order = np.argsort(users, kind="stable")
    before = 0 if context is None else len(context)
    places = np.empty(len(users), np.int64)
    places[order] = np.arange(len(users))
    users = users[order]
    offsets = np.searchsorted(users, np.arange(n_users + 1))
    log_places = places[before:]
    context_rows = np.zeros(n_users, np.int64)
    if context is not None:
        context_rows = np.diff(context.offsets(n_users))
    ends = log_places if source == "log" else offsets[log.users] + context_rows[log.users]
    return Stream(
        users,
        np.concatenate([part.items for part in logs])[order].astype(np.int32),
        np.concatenate([part.clicks for part in logs])[order],
        offsets[users].astype(np.int64),
        log_places,
        ends.astype(np.int64),
    )


def windows(stream: Stream, rows: NDArray[np.int64], length: int) -> HistoryWindow:
    """Returns the last ``length`` items before each of some rows of the log, as a simulator would hand them over.

    Args:
        stream: See :func:`history_stream`.
        rows: Positions in the log.
        length: Places ``H``.
    """
    starts = stream.starts[stream.places[rows]]
    places = stream.ends[rows][:, None] - length + np.arange(length)
    present = places >= starts[:, None]
    places = np.where(present, places, 0)
    items = np.where(present, stream.items[places], PADDING).astype(np.int32)
    return HistoryWindow(items, stream.clicks[places] & present)


@dataclass(frozen=True)
class Chunks:
    """Pieces of history, each read once by the network, and the rows that are predicted from its states.

    Attributes:
        history: ``(C, H)``.
        rows: ``int64 (T,)``, positions in the list of rows, sorted by chunk.
        places: ``int64 (T,)``, how many places of the chunk are read before the row (0..H).
        offsets: ``int64 (C + 1,)``: chunk ``c`` predicts ``rows[offsets[c]:offsets[c + 1]]``.
    """

    history: HistoryWindow
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    offsets: NDArray[np.int64]


def history_chunks(stream: Stream, rows: NDArray[np.int64], length: int) -> Chunks:
    """Cuts histories so that many rows share one pass of the network.

    A chunk predicts the rows whose histories end in its newer half (or
    anywhere, where it begins with the user's first item), so that each row sees at least ``length / 2`` items if the
    user has as many, and at most ``length``.

    Args:
        stream: See :func:`history_stream`.
        rows: Positions in the log of the rows to be predicted.
        length: Places ``H``.
    """
    ends = stream.ends[rows]
    places = stream.places[rows]
    starts = stream.starts[places]
    stride = max(length // 2, 1)
    seen = ends - starts
    # Chunk 0 of a user covers histories of 0..H items, chunk k those of H + (k - 1) stride + 1 .. H + k stride.
    number = np.maximum(-(-(seen - length) // stride), 0)
    key = starts * (seen.max(initial=0) // stride + 2) + number
    order = np.argsort(key, kind="stable")
    _, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    lead = order[first]
    chunk_ends = starts[lead] + length + number[lead] * stride
    chunk_starts = chunk_ends - length
    history = _front_filled(stream, chunk_starts, starts[lead], length)
    chunk_of = np.repeat(np.arange(len(lead)), counts)
    return Chunks(
        history,
        order.astype(np.int64),
        ends[order] - chunk_starts[chunk_of],
        np.r_[0, np.cumsum(counts)].astype(np.int64),
    )


def _front_filled(
    stream: Stream, chunk_starts: NDArray[np.int64], user_starts: NDArray[np.int64], length: int
) -> HistoryWindow:
    places = chunk_starts[:, None] + np.arange(length)
    inside = places < len(stream.items)
    places = np.where(inside, places, 0)
    present = inside & (stream.starts[places] == user_starts[:, None])
    items = np.where(present, stream.items[places], PADDING).astype(np.int32)
    return HistoryWindow(items, stream.clicks[places] & present)
