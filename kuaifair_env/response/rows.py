"""The rows that a response model is fitted and evaluated on: negatives, roles, and the history before each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, InteractionLog, NegativeSampling, among
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import PADDING, HistoryWindow

_ROLES = ("fit", "stop", "calibrate", "report")

HistorySource = Literal["log", "context"]


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the rows by role; the rest is fitted on.

    Attributes:
        stop: Rows that decide when to stop.
        calibrate: Rows that set the final offset and slopes.
        report: Rows that every reported figure comes from; nothing else touches them.
        max_rows: At most so many rows are used, drawn uniformly (a fit gains little from more); None takes all.
    """

    stop: float = 0.05
    calibrate: float = 0.05
    report: float = 0.10
    max_rows: int | None = 2_000_000

    def __post_init__(self) -> None:
        shares = (self.stop, self.calibrate, self.report)
        if min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"shares of rows must be above 0 and sum to less than 1, got {shares}")


@dataclass(frozen=True)
class LabelledRows:
    """Rows with both labels, and the role of each.

    Attributes:
        users: ``int64 (R,)``.
        items: ``int64 (R,)``.
        clicks: ``bool (R,)``.
        positions: ``int64 (R,)``, each row's position in its log; -1 for drawn negatives.
        roles: ``int8 (R,)``, 0 fit, 1 stop, 2 calibrate, 3 report.
        notes: What was drawn and dropped, JSON-able.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: BoolArray
    positions: NDArray[np.int64]
    roles: NDArray[np.int8]
    notes: dict[str, Any]

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: NDArray[np.int64]) -> LabelledRows:
        """Returns some of the rows."""
        columns = ("users", "items", "clicks", "positions", "roles")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def where(self, role: str) -> NDArray[np.int64]:
        """Returns the positions of the rows with a role: ``fit``, ``stop``, ``calibrate`` or ``report``."""
        return np.flatnonzero(self.roles == _ROLES.index(role))


def labelled_rows(
    log: InteractionLog,
    n_items: int,
    split: SplitConfig,
    negatives: NegativeSampling,
    seed: int,
    known: InteractionLog | None = None,
    what: str = "log",
) -> LabelledRows:
    """Returns the rows of a log with both labels and random roles, the same for every model of one seed.

    Args:
        log: Exposures with clicks; a log of positives only gets drawn negatives.
        n_items: Size of the catalogue.
        split: Shares of the roles.
        negatives: Used when ``log.positives_only``.
        seed: Seed of roles and draws.
        known: Another log whose clicks are not drawn as negatives either.
        what: What messages call the log.

    Raises:
        DataError: If a role would lack clicks or non-clicks.
    """
    rng = np.random.default_rng((seed, 0x5EED))
    if log.positives_only:
        draws = np.random.default_rng((seed, negatives.seed, 0x5EED))
        rows = _with_negatives(log, known, n_items, negatives, draws)
    else:
        rows = LabelledRows(
            log.users.astype(np.int64),
            log.items.astype(np.int64),
            log.clicks,
            np.arange(len(log)),
            np.zeros(len(log), np.int8),
            {"negatives": "logged non-clicks"},
        )
    if split.max_rows is not None and len(rows) > split.max_rows:
        rows = rows.take(np.sort(rng.choice(len(rows), split.max_rows, replace=False)))
    edges = np.cumsum([1 - split.stop - split.calibrate - split.report, split.stop, split.calibrate])
    roles = np.searchsorted(edges, rng.random(len(rows)), side="right").astype(np.int8)
    notes = {"logged_rows": len(log), **rows.notes, "rows_used": len(rows)}
    rows = replace(rows, roles=roles, notes=notes)
    for role in _ROLES:
        labels = rows.clicks[rows.where(role)]
        if not labels.any() or labels.all():
            raise DataError(
                f"the {what} is too small to fit and evaluate a response model: of {len(rows)} rows, the {len(labels)} "
                f"with role '{role}' hold {int(labels.sum())} clicks; some hundred rows of both kinds are needed"
            )
    return rows


def _with_negatives(
    log: InteractionLog,
    known: InteractionLog | None,
    n_items: int,
    sampling: NegativeSampling,
    rng: np.random.Generator,
) -> LabelledRows:
    """Returns the distinct positives of a log with drawn negatives, sorted by user; all roles are 0."""
    clicked_rows = np.flatnonzero(log.clicks)
    pairs, first = np.unique(
        log.users[clicked_rows].astype(np.int64) * n_items + log.items[clicked_rows], return_index=True
    )
    if not len(pairs):
        raise DataError("a log of positives only needs at least one positive")
    drawn = _drawn_pairs(pairs, n_items, sampling, rng)
    is_positive = among(drawn, pairs)
    if known is not None:
        known_pairs = known.users[known.clicks].astype(np.int64) * n_items + known.items[known.clicks]
        is_positive |= among(drawn, np.sort(known_pairs))
    negatives = drawn[~is_positive]
    users, items = np.divmod(np.concatenate([pairs, negatives]), n_items)
    rows = LabelledRows(
        users,
        items,
        np.arange(len(users)) < len(pairs),
        np.concatenate([clicked_rows[first], np.full(len(negatives), -1)]),
        np.zeros(len(users), np.int8),
        {
            "negatives": (
                f"drawn: {sampling.per_positive:g} per positive, items weighted by positives ** "
                f"{sampling.popularity_power:g}, the user's own positives excluded"
            ),
            "positives_used": len(pairs),
            "repeated_positives_dropped": len(clicked_rows) - len(pairs),
            "negatives_drawn": len(negatives),
            "negatives_dropped_as_positive": int(is_positive.sum()),
            "sampled_rate": len(pairs) / len(users),
            "declared_rate": sampling.positive_rate,
        },
    )
    return rows.take(np.argsort(users, kind="stable"))


def _drawn_pairs(
    positives: NDArray[np.int64], n_items: int, sampling: NegativeSampling, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draws ``user * n_items + item``: users by their positives, items by a power of theirs."""
    users, items = np.divmod(positives, n_items)
    weights = np.bincount(items, minlength=n_items).astype(np.float64)
    weights[weights > 0] **= sampling.popularity_power
    n_draws = round(len(positives) * sampling.per_positive)
    drawn_users = users[rng.integers(0, len(users), n_draws)]
    cumulated = np.cumsum(weights)
    drawn_items = np.searchsorted(cumulated, rng.random(n_draws) * cumulated[-1], side="right")
    return np.asarray(drawn_users * n_items + drawn_items, np.int64)


def rate_correction(notes: dict[str, Any]) -> float:
    """Returns what to add to a fitted intercept so that its rate becomes the declared one, 0 if none is declared."""
    declared, sampled = notes.get("declared_rate"), notes.get("sampled_rate")
    if declared is None or sampled is None:
        return 0.0
    return float(np.log(declared / (1 - declared)) - np.log(sampled / (1 - sampled)))


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


def history_stream(log: InteractionLog, context: InteractionLog | None, n_users: int, source: HistorySource) -> Stream:
    """Joins the context, what the users saw before, and the log into one line per user.

    With source ``"log"`` a row of the log sees the context and all earlier rows of the log; with ``"context"`` it sees
    the context alone, for a log whose order is not known.
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


@dataclass(frozen=True)
class Chunks:
    """Pieces of history, each read once by the network, and the rows that are predicted from its states.

    Attributes:
        history: ``(C, length)``.
        rows: ``int64 (T,)``, positions in the list of rows, sorted by chunk.
        places: ``int64 (T,)``, how many places of the chunk are read before the row (0..length).
        offsets: ``int64 (C + 1,)``: chunk ``c`` predicts ``rows[offsets[c]:offsets[c + 1]]``.
    """

    history: HistoryWindow
    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    offsets: NDArray[np.int64]


def history_chunks(stream: Stream, rows: NDArray[np.int64], length: int, min_seen: int) -> Chunks:
    """Cuts histories into pieces of ``length`` places, so that many rows share one pass of the network.

    Each row (given by its position in the log) sees at least ``min_seen < length`` items if the user has as many, and
    at most ``length``: a chunk predicts the rows whose histories end behind its first ``min_seen`` places, or anywhere
    if it begins with the user's first item.
    """
    ends = stream.ends[rows]
    places = stream.places[rows]
    starts = stream.starts[places]
    stride = length - min_seen
    seen = ends - starts
    # Chunk 0 of a user covers histories of 0..length items, chunk k the next stride ones after those of chunk k - 1.
    number = np.maximum(-(-(seen - length) // stride), 0)
    key = starts * (seen.max(initial=0) // stride + 2) + number
    order = np.argsort(key, kind="stable")
    _, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    lead = order[first]
    chunk_ends = starts[lead] + length + number[lead] * stride
    chunk_starts = chunk_ends - length
    shown = chunk_starts[:, None] + np.arange(length)
    inside = shown < len(stream.items)
    shown = np.where(inside, shown, 0)
    present = inside & (stream.starts[shown] == starts[lead][:, None])
    history = HistoryWindow(
        np.where(present, stream.items[shown], PADDING).astype(np.int32), stream.clicks[shown] & present
    )
    chunk_of = np.repeat(np.arange(len(lead)), counts)
    return Chunks(
        history,
        order.astype(np.int64),
        ends[order] - chunk_starts[chunk_of],
        np.r_[0, np.cumsum(counts)].astype(np.int64),
    )
