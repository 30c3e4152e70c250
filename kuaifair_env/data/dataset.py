"""A data set: users, items, a training log, a test log and their provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import Catalogue, IntArray, InteractionLog, Provenance, Users
from kuaifair_env.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from kuaifair_env.data.frames import LogColumns


@dataclass(frozen=True)
class InteractionData:
    """A data set: users, items, a training log and a test log that share no row.

    Attributes:
        users: Who.
        items: What.
        train: The log that agents, encoders and popularity come from.
        test: The log that the test world is fitted on; agents never see it.
        provenance: Where it all came from.
        report: What the reader saw and did (rows read, duplicates dropped, ...), JSON-able.
    """

    users: Users
    items: Catalogue
    train: InteractionLog
    test: InteractionLog
    provenance: Provenance
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, log in (("train", self.train), ("test", self.test)):
            if not len(log):
                raise DataError(f"the {name} log is empty")
            _check_rows(log.users, len(self.users), f"{name} log, user")
            _check_rows(log.items, len(self.items), f"{name} log, item")

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 (first 16 hex digits) of ids and both logs: equal data, equal hash, on every platform.

        Computed once; the cache stores it (:mod:`kuaifair_env.data.cache`).
        """
        digest = hashlib.sha256()
        for log in (self.train, self.test):
            columns: tuple[tuple[NDArray[Any], str], ...] = (
                (self.users.ids[log.users], "<i8"),
                (self.items.ids[log.items], "<i8"),
                (log.clicks, "|b1"),
            )
            if log.feedback is not None:
                columns += ((log.feedback, "<f4"),)
            for column, kind in columns:
                digest.update(np.ascontiguousarray(column, kind).tobytes())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """Returns name, origin and hash, which reports of what was made from the data record."""
        return {"data": self.provenance.name, "origin": self.provenance.origin, "data_hash": self.data_hash}

    @classmethod
    def from_frames(
        cls,
        train: pd.DataFrame,
        test: pd.DataFrame,
        items: pd.DataFrame | None = None,
        users: pd.DataFrame | None = None,
        *,
        name: str = "own logs",
        columns: LogColumns | None = None,
        positive_watch_ratio: float | None = None,
        drop_duplicates: bool | None = None,
        positives_only: bool = False,
        provenance: Provenance | None = None,
    ) -> InteractionData:
        """Turns DataFrames into a data set; the frames are not changed.

        A log has one row per exposure: a user, an item, and whether the user clicked. Rows may be in any order;
        they are sorted by user and time, and by their order in the frame where there is no time. Ids may be any
        integers. The ``report`` of the result counts what was dropped and reordered.

        Args:
            train: The log that agents and the training world learn from.
            test: The log that the test world is fitted on.
            items: One row per item: id, and optionally tags, shown counts and any features; None takes the items
                of both logs. Feature columns must not be derived from ``test``.
            users: One row per user: id and any features; None takes the users of both logs. Users without history
                are fine.
            name: Short name for reports.
            columns: Names of the columns, when they are not ``user_id, item_id, click, time, watch_ratio``.
            positive_watch_ratio: Take ``watch_ratio >= positive_watch_ratio`` as the click instead of a column.
            drop_duplicates: Whether rows that equal an earlier row (user, item, time, click, watch ratio) are
                dropped. None drops them from a log with time, where they are logging errors, and keeps them in a
                log without, where they are repeated exposures.
            positives_only: The training log lists clicks only, so exposure is unknown.
            provenance: Where the data come from; None says that they are your own.

        Returns:
            The data set, with users and items sorted by id.

        Raises:
            DataError: For an empty log, missing columns or ids, ids that are not integers, feedback that is not 0
                or 1, ids of a log that are not in ``items`` or ``users``, repeated ids there, fewer than two
                items, or a test log whose rows are in the training log.
        """
        from kuaifair_env.data.frames import LogColumns, read_frames  # needs pandas

        fields = read_frames(
            {"train": train, "test": test},
            items,
            users,
            name=name,
            columns=columns or LogColumns(),
            positive_watch_ratio=positive_watch_ratio,
            drop_duplicates=drop_duplicates,
            positives_only=positives_only,
            provenance=provenance,
        )
        return cls(*fields)

    def arranged(self, first: IntArray) -> InteractionData:
        """Returns the same data with the given item rows first, all others behind them.

        A world uses this so that its candidates are items ``0 .. len(first) - 1`` in every table.

        Args:
            first: Distinct item rows.
        """
        rest = np.setdiff1d(np.arange(len(self.items)), first)
        order = np.concatenate([first, rest])
        if len(order) != len(self.items):
            raise DataError("candidate rows must be distinct and within the catalogue")
        position = np.empty(len(order), np.int32)
        position[order] = np.arange(len(order), dtype=np.int32)
        return replace(
            self,
            items=self.items.take(order),
            train=replace(self.train, items=position[self.train.items]),
            test=replace(self.test, items=position[self.test.items]),
        )


def _check_rows(rows: IntArray, size: int, what: str) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        raise DataError(f"{what} row {low if low < 0 else high} is outside 0..{size - 1}")
