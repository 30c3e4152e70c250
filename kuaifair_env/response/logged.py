"""Feedback that was logged: what users answered when a platform showed them items at random, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, parse_as, take_tensors
from kuaifair_env.response.base import History, StoredResponse
from kuaifair_env.response.graded import click_from

_CLICK = 0.5


@dataclass(frozen=True)
class UserItems:
    """Some items of each user, held sparsely.

    Attributes:
        offsets: ``int64 (U + 1,)``; the items of user ``u`` are ``items[offsets[u]:offsets[u + 1]]``.
        items: ``int32 (P,)``, item rows, increasing within a user.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """``int64 (U,)``, how many items each user has."""
        return np.diff(self.offsets)

    def places(self, users: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns, for all items of ``users (B,)`` in turn, the row in ``users`` and the place of the item."""
        counts = self.counts[users]
        rows = np.repeat(np.arange(len(users)), counts)
        first = np.repeat(self.offsets[users] - (np.cumsum(counts) - counts), counts)
        return rows, first + np.arange(len(rows))

    def mask(self, users: IntArray, n_items: int) -> BoolArray:
        """Returns ``bool (B, n_items)``, which items ``users (B,)`` have."""
        mask = np.zeros((len(users), n_items), np.bool_)
        rows, places = self.places(users)
        mask[rows, self.items[places]] = True
        return mask

    def spread(self, users: IntArray, count: int) -> NDArray[np.int32]:
        """Returns ``int32 (B, count)``, items spread evenly over those of each of ``users (B,)``, who have some."""
        steps = np.arange(count) * self.counts[users][:, None] // count
        return self.items[self.offsets[users][:, None] + steps]


class LoggedResponse(StoredResponse):
    """Feedback looked up in a log; pairs of user and item that the log does not hold have none.

    What the log says is what happens: nothing is modelled, and nothing depends on the session. Of a pair that was
    logged more than once the last row counts (in time), as in
    :class:`~kuaifair_env.response.known.ObservedResponse`.

    Build one with :meth:`from_log`.

    Args:
        pairs: The items that each user's log holds.
        feedback: ``float32 (P,)``, feedback of each pair.
        n_items: Number of items.
        click_from: Feedback from which a pair is a click.
        report: What was counted while building, JSON-able.
    """

    kind = "logged"
    uses_history = False

    def __init__(
        self,
        pairs: UserItems,
        feedback: FloatArray,
        n_items: int,
        click_from: float,
        report: dict[str, Any] | None = None,
    ) -> None:
        if len(pairs.items) != len(feedback) or pairs.offsets[-1] != len(feedback):
            raise DataError(f"{len(pairs.items)} pairs need as many values of feedback, got {len(feedback)}")
        if not len(feedback) or pairs.items.min() < 0 or pairs.items.max() >= n_items:
            raise DataError(f"a logged response needs pairs of users and items, with items within 0..{n_items - 1}")
        self.pairs = pairs
        self._feedback = feedback
        self._click_from = float(click_from)
        self._report = dict(report or {})
        self.n_users, self.n_items = len(pairs.offsets) - 1, n_items

    @classmethod
    def from_log(cls, log: InteractionLog, data: InteractionData, items: IntArray | None = None) -> LoggedResponse:
        """Takes the feedback of a log.

        Args:
            log: The log, such as a test log of random exposures.
            data: Says how many users and items there are.
            items: Item rows whose feedback is kept; None keeps all.

        Raises:
            DataError: If the log lists positives only, or holds none of the items.
        """
        if log.positives_only:
            raise DataError("a log of positives only does not say what else was shown, and so answers for no item")
        n_items = len(data.items)
        kept = np.ones(n_items, np.bool_) if items is None else np.isin(np.arange(n_items), items)
        rows = np.flatnonzero(kept[log.items])
        # A stable sort leaves the rows of a pair in the log's order, which is that of time.
        rows = rows[np.lexsort((log.items[rows], log.users[rows]))]
        users, shown = log.users[rows], log.items[rows]
        last = np.ones(len(rows), np.bool_)
        last[:-1] = (users[1:] != users[:-1]) | (shown[1:] != shown[:-1])
        rows = rows[last]
        feedback = log.clicks[rows].astype(np.float32) if log.feedback is None else log.feedback[rows]
        report = {
            "logged_rows": len(log),
            "rows_of_other_items": len(log) - len(last),
            "repeated_rows_dropped": int(np.count_nonzero(~last)),
            "mean_feedback": float(feedback.mean(dtype=np.float64)) if len(feedback) else None,
            "largest": 1.0 if log.feedback is None else float(log.feedback.max()),
            **data.identity(log),
        }
        offsets = np.searchsorted(log.users[rows], np.arange(len(data.users) + 1)).astype(np.int64)
        limit = _CLICK if log.feedback is None else click_from(log)
        return cls(UserItems(offsets, log.items[rows]), feedback, n_items, limit, report)

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        """One increasing number for each pair."""
        return np.repeat(np.arange(self.n_users), self.pairs.counts) * self.n_items + self.pairs.items

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns ``float32 (B, K)``, the logged feedback of ``users (B,)`` on ``items (B, K)``.

        Raises:
            DataError: If a pair was never logged.
        """
        keys = np.asarray(users, np.int64)[:, None] * self.n_items + items
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        if not np.array_equal(self._keys[places], keys):
            row, slot = np.argwhere(self._keys[places] != keys)[0]
            raise DataError(
                f"item row {np.broadcast_to(items, keys.shape)[row, slot]} was never logged for user row "
                f"{np.asarray(users)[row]}; only what was shown to a user at random has feedback"
            )
        return self._feedback[places]

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Returns what was logged; the uniforms are not read."""
        return expected

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Returns where feedback is large enough for a click, ``bool (B, K)``."""
        return feedback >= np.float32(self._click_from)

    def rearranged(self, items: IntArray) -> LoggedResponse:
        """Returns the same feedback for the catalogue ``old_items[items]``."""
        position = np.empty(self.n_items, np.int32)
        position[items] = np.arange(self.n_items, dtype=np.int32)
        moved = position[self.pairs.items]
        order = np.lexsort((moved, np.repeat(np.arange(self.n_users), self.pairs.counts)))
        pairs = UserItems(self.pairs.offsets, moved[order])
        return LoggedResponse(pairs, self._feedback[order], self.n_items, self._click_from, self._report)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns ``float32 (B, n_items)``, the logged feedback of ``users (B,)``; 0 where nothing was logged."""
        catalogue = np.zeros((len(users), self.n_items), np.float32)
        rows, places = self.pairs.places(users)
        catalogue[rows, self.pairs.items[places]] = self._feedback[places]
        return catalogue[:, :n_items]

    def item_means(self, n_items: int) -> FloatArray:
        """Returns ``float32 (n_items,)``, the mean feedback on each item over all users; 0 where nothing was logged."""
        totals = np.bincount(self.pairs.items, self._feedback, self.n_items)
        counts = np.bincount(self.pairs.items, minlength=self.n_items)
        return (totals / np.maximum(counts, 1))[:n_items].astype(np.float32)

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"offsets": self.pairs.offsets, "items": self.pairs.items, "feedback": self._feedback}

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"n_items": self.n_items, "click_from": self._click_from, "report": self._report}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> LoggedResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        take_tensors(tensors, {"offsets": (None,), "items": (None,), "feedback": (None,)})
        n_items, click_from = parse_as(int, settings["n_items"]), parse_as(float, settings["click_from"])
        report = parse_as(dict[str, Any], settings["report"])
        return cls(UserItems(tensors["offsets"], tensors["items"]), tensors["feedback"], n_items, click_from, report)

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and what was counted, JSON-able."""
        return {
            "kind": self.kind,
            "click_from": self._click_from,
            "users": self.n_users,
            "items": self.n_items,
            "pairs": len(self._feedback),
            **self._report,
        }
