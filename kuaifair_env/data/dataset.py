"""A data set: users, items, a training log, a test log and their provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import Catalogue, IntArray, InteractionLog, NegativeSampling, Provenance, Users
from kuaifair_env.errors import DataError
from kuaifair_env.files import file_hash

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kuaifair_env.data.frames import PositivesOnly
    from kuaifair_env.data.tables import LogColumns, SplitRule, Table


class FrameSettings(TypedDict, total=False):
    """Settings of reading one's own tables, besides the names of columns; see :meth:`InteractionData.from_frames`."""

    name: str
    positive: Mapping[str, float] | None
    drop_duplicates: bool | None
    positives_only: PositivesOnly | bool
    negatives_per_positive: float | None
    negatives_seed: int
    provenance: Provenance | None


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
        negatives: How non-clicks are drawn for logs that list clicks only.
    """

    users: Users
    items: Catalogue
    train: InteractionLog
    test: InteractionLog
    provenance: Provenance
    report: Mapping[str, Any] = field(default_factory=dict)
    negatives: NegativeSampling = field(default_factory=NegativeSampling)

    def __post_init__(self) -> None:
        for name, log in (("train", self.train), ("test", self.test)):
            if not len(log):
                raise DataError(f"the {name} log is empty")
            _check_rows(log.users, len(self.users), f"{name} log, user")
            _check_rows(log.items, len(self.items), f"{name} log, item")

    def __repr__(self) -> str:
        return (
            f"InteractionData({len(self.users)} users, {len(self.items)} items, {len(self.train)} training rows, "
            f"{len(self.test)} test rows, {self.provenance.origin} data {self.data_hash})"
        )

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 (first 16 hex digits) of ids and both logs: equal data, equal hash, on every platform.

        Computed once; the cache stores it (:mod:`kuaifair_env.data.cache`).
        """
        digest = hashlib.sha256()
        for log in (self.train, self.test):
            columns: tuple[tuple[NDArray[Any], str], ...] = (
                (self.users.keys[log.users], "<i8"),
                (self.items.keys[log.items], "<i8"),
                (log.clicks, "|b1"),
            )
            if log.feedback is not None:
                columns += ((log.feedback, "<f4"),)
            for column, kind in columns:
                digest.update(np.ascontiguousarray(column, kind).tobytes())
            if log.positives_only:
                digest.update(repr(astuple(self.negatives)).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def contents_hash(self) -> str:
        """Hash (8 hex digits) of what ``data_hash`` leaves out: the order of tables, features, tags, watch ratios."""
        digest = hashlib.sha256()
        for column in (
            self.users.ids,
            self.items.ids,
            self.users.features.values,
            self.items.features.values,
            self.items.tags,
            self.train.watch_ratios,
            self.test.watch_ratios,
            *(log.feedback for log in (self.train, self.test) if log.feedback is not None),
        ):
            array = np.zeros(0, np.bool_) if column is None else np.ascontiguousarray(column)
            digest.update(f"{array.shape} {array.dtype.str} ".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:8]

    def identity(self, log: InteractionLog) -> dict[str, str]:
        """Returns name, origin, hash and split, which reports of what was fitted on (a part of) a log record."""
        return {
            "data": self.provenance.name,
            "origin": self.provenance.origin,
            "data_hash": self.data_hash,
            "split": "test" if log is self.test else "train",
        }

    @classmethod
    def from_frames(
        cls,
        train: Table,
        test: Table,
        items: Table | None = None,
        users: Table | None = None,
        *,
        name: str = "own logs",
        columns: LogColumns | Mapping[str, str] | None = None,
        positive: Mapping[str, float] | None = None,
        drop_duplicates: bool | None = None,
        positives_only: PositivesOnly | bool = False,
        negatives_per_positive: float | None = None,
        negatives_seed: int = 0,
        provenance: Provenance | None = None,
    ) -> InteractionData:
        """Turns tables, as DataFrames or CSV, TSV or Parquet files, into a data set; frames are not changed.

        A log has one row per exposure: a user, an item, and whether the user clicked. Rows may be in any order;
        they are sorted by user and time, and by their order in the table where there is no time. Ids are integers or
        text and are kept as they are. The ``report`` of the result counts what was dropped and reordered.

        Args:
            train: The log that agents and the training world learn from.
            test: The log that the test world is fitted on.
            items: One row per item: id, and optionally tags, shown counts and any features; None takes the items
                of both logs. Feature columns must not be derived from ``test``.
            users: One row per user: id and any features; None takes the users of both logs. Users without history
                are fine.
            name: Short name for reports.
            columns: Names of the columns, when they are not ``user_id, item_id, click, time, watch_ratio``: as
                ``LogColumns``, or by its fields (``{"user": "customer"}``).
            positive: A column and the value from which a row is a click, such as ``{"rating": 4.0}`` or
                ``{"watch_ratio": 2.0}``, instead of a column of 0 and 1.
            drop_duplicates: Whether rows that equal an earlier row (user, item, time, click, watch ratio) are
                dropped. None drops them from a log with time, where they are logging errors, and keeps them in a
                log without, where they are repeated exposures.
            positives_only: Which logs list clicks only (plays, purchases), so that exposure is unknown and non-clicks
                are drawn: ``"train"`` (or True), ``"test"`` or ``"both"``. A column of clicks is then not needed.
            negatives_per_positive: Non-clicks drawn for each click of such a log when a world is fitted; see
                :class:`~kuaifair_env.data.schema.NegativeSampling`. Must be given where the test log lists clicks
                only; 4 by default for the training log alone. The provenance records it.
            negatives_seed: Seed of those draws.
            provenance: Where the data come from; None says that they are your own.

        Returns:
            The data set, with users and items sorted by id.

        Raises:
            DataError: For an empty log, missing columns or ids, ids of different kinds, feedback that is not 0 or 1, a
                log without a click or a non-click, times that cannot be compared, ids of a log that are not in
                ``items`` or ``users``, repeated ids there, fewer than two items, or a test log whose rows are in the
                training log.
        """
        from kuaifair_env.data.frames import FrameReading, read_frames  # needs pandas

        reading = FrameReading.of(
            columns, positive, drop_duplicates, positives_only, negatives_per_positive, negatives_seed
        )
        logs = {"train": train, "test": test}
        return cls(*read_frames(logs, items, users, reading, name=name, provenance=provenance))

    @classmethod
    def from_log(
        cls,
        log: Table,
        items: Table | None = None,
        users: Table | None = None,
        *,
        split: SplitRule = "time",
        test_share: float = 0.2,
        columns: LogColumns | Mapping[str, str] | None = None,
        **settings: Unpack[FrameSettings],
    ) -> InteractionData:
        """Turns one log into a data set: its latest rows, or the latest of each user, become the test log.

        Args:
            log: The log.
            items: See :meth:`from_frames`.
            users: See :meth:`from_frames`.
            split: ``"time"`` or ``"user"``; see :func:`~kuaifair_env.data.tables.split_log`, which also says what such
                a test log cannot tell.
            test_share: Share of the rows that the test log gets.
            columns: See :meth:`from_frames`.
            **settings: See :meth:`from_frames`.

        Raises:
            DataError: See :meth:`from_frames`; or if the log cannot be split.
            ValueError: If the rule or the share is not valid.
        """
        from kuaifair_env.data.tables import split_log

        train, test = split_log(log, split, test_share, columns)
        data = cls.from_frames(train, test, items, users, columns=columns, **settings)
        made = f"{data.provenance.description}; one log, split by {split}"
        of_log = {Path(log).name: file_hash(Path(log))} if isinstance(log, (str, Path)) else {}
        origin = replace(
            data.provenance,
            description=made,
            files={**data.provenance.files, **of_log},
            settings={**data.provenance.settings, "split": split, "test_share": test_share},
        )
        return replace(data, provenance=origin)

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
        arranged = replace(
            self,
            items=self.items.take(order),
            train=replace(self.train, items=position[self.train.items]),
            test=replace(self.test, items=position[self.test.items]),
        )
        if "data_hash" in self.__dict__:  # the order of the tables is no part of it
            arranged.__dict__["data_hash"] = self.data_hash
        return arranged


def _check_rows(rows: IntArray, size: int, what: str) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        raise DataError(f"{what} row {low if low < 0 else high} is outside 0..{size - 1}")
