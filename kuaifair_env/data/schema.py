"""What a data set is, whatever it came from: frozen tables of users, items and logs.

Users and items are addressed by *rows* (0-based positions in ``users.ids`` and ``items.ids``) everywhere
inside the library; raw ids appear at the borders only. Every table is keyed by raw id, never by file order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from kuaifair_env.data.frames import LogColumns

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.integer[Any]]

Split = Literal["train", "test"]
Origin = Literal["real", "partial", "twin", "own"]


@dataclass(frozen=True)
class Provenance:
    """Where data came from; it travels with every result.

    Attributes:
        name: Short name of the data set, such as ``"KuaiRand-Pure"``.
        origin: ``"real"`` (official files), ``"partial"`` (a part of them), ``"twin"``, ``"own"``.
        description: One line for people.
        files: File name -> SHA-256 of its bytes.
        settings: What else determines the data (seed, sizes, thresholds), JSON-able.
    """

    name: str
    origin: Origin
    description: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns a JSON-able copy."""
        return {
            "name": self.name,
            "origin": self.origin,
            "description": self.description,
            "files": dict(self.files),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class FeatureTable:
    """Numeric description of users or items, ready for a model.

    Attributes:
        values: ``float32 (rows, columns)``; numbers standardised, categories one-hot, no NaN.
        names: Column names; one-hot columns are called ``"feature=value"``.
    """

    values: FloatArray
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape[1] != len(self.names):
            raise DataError(f"feature values of shape {self.values.shape} do not fit {len(self.names)} names")
        if not np.isfinite(self.values).all():
            column = self.names[int(np.argwhere(~np.isfinite(self.values))[0, 1])]
            raise DataError("NaN or infinite feature; fill or drop it first", column=column)

    @classmethod
    def empty(cls, rows: int) -> FeatureTable:
        """Returns a table without columns."""
        return cls(np.zeros((rows, 0), np.float32), ())

    def take(self, rows: IntArray) -> FeatureTable:
        """Returns the given rows."""
        return FeatureTable(self.values[rows], self.names)


@dataclass(frozen=True)
class Users:
    """The users of a data set.

    Attributes:
        ids: ``int64 (U,)``, strictly increasing raw ids.
        features: One row per user.
    """

    ids: NDArray[np.int64]
    features: FeatureTable

    def __post_init__(self) -> None:
        _check_ids(self.ids, "user", len(self.features.values))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Catalogue:
    """The items of a data set.

    Attributes:
        ids: ``int64 (N,)``, distinct raw ids. Readers sort them, :meth:`InteractionData.arranged` reorders.
        features: One row per item; must not be derived from the test log.
        tags: ``bool (N, T)`` membership in content categories; ``T`` may be 0.
        tag_names: Names of the ``T`` categories.
        shown: ``float64 (N,)`` platform-wide exposure counts (``show_user_num``), or None.
    """

    ids: NDArray[np.int64]
    features: FeatureTable
    tags: BoolArray
    tag_names: tuple[str, ...] = ()
    shown: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or len(np.unique(self.ids)) != len(self.ids):
            raise DataError("item ids must be a vector of distinct integers")
        rows = len(self.ids)
        if len(self.features.values) != rows or self.tags.shape != (rows, len(self.tag_names)):
            raise DataError(f"features and tags must have one row for each of the {rows} items")
        if self.shown is not None and self.shown.shape != (rows,):
            raise DataError(f"shown must have one count for each of the {rows} items")

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: IntArray) -> Catalogue:
        """Returns the given rows, in the given order."""
        return Catalogue(
            self.ids[rows],
            self.features.take(rows),
            self.tags[rows],
            self.tag_names,
            None if self.shown is None else self.shown[rows],
        )


@dataclass(frozen=True)
class InteractionLog:
    """Exposures of items to users with the users' feedback, one row per exposure.

    Rows are sorted by user, then time; rows of equal time keep the order of their source.

    Attributes:
        users: ``int32 (R,)`` user rows, non-decreasing.
        items: ``int32 (R,)`` item rows.
        clicks: ``bool (R,)`` positive feedback.
        times: ``int64 (R,)``, non-decreasing within a user, any unit; the position if the source has no time.
        watch_ratios: ``float32 (R,)`` play time over duration, or None.
        positives_only: True when the source lists positive feedback only, so that exposure is unknown.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    clicks: BoolArray
    times: NDArray[np.int64]
    watch_ratios: FloatArray | None = None
    positives_only: bool = False

    def __post_init__(self) -> None:
        columns: list[NDArray[Any]] = [self.users, self.items, self.clicks, self.times]
        columns += [] if self.watch_ratios is None else [self.watch_ratios]
        if len({len(column) for column in columns}) != 1:
            raise DataError(f"log columns differ in length: {[len(column) for column in columns]}")
        if len(self.users) and (np.diff(self.users) < 0).any():
            raise DataError("log rows must be sorted by user, then time; see InteractionLog.sorted")

    @classmethod
    def sorted(
        cls,
        users: IntArray,
        items: IntArray,
        clicks: NDArray[Any],
        times: IntArray | None = None,
        watch_ratios: NDArray[Any] | None = None,
        positives_only: bool = False,
    ) -> InteractionLog:
        """Builds a log from columns in any order.

        Args:
            users: User rows.
            items: Item rows.
            clicks: Positive feedback, 0 or 1.
            times: Time of each exposure; None takes the order of the rows.
            watch_ratios: Optional watch ratios.
            positives_only: See the class.
        """
        moments = np.arange(len(users), dtype=np.int64) if times is None else np.asarray(times, np.int64)
        order = np.lexsort((moments, users))
        return cls(
            np.asarray(users, np.int32)[order],
            np.asarray(items, np.int32)[order],
            np.asarray(clicks, np.bool_)[order],
            moments[order],
            None if watch_ratios is None else np.asarray(watch_ratios, np.float32)[order],
            positives_only,
        )

    def __len__(self) -> int:
        return len(self.users)

    def offsets(self, n_users: int) -> NDArray[np.int64]:
        """Returns ``int64 (n_users + 1,)``: user ``u``'s rows are ``offsets[u]:offsets[u + 1]``."""
        return np.searchsorted(self.users, np.arange(n_users + 1)).astype(np.int64)

    def exposures(self, n_items: int) -> NDArray[np.int64]:
        """Returns ``int64 (n_items,)``, how often each item was shown."""
        return np.bincount(self.items, minlength=n_items).astype(np.int64)

    def click_counts(self, n_items: int) -> NDArray[np.int64]:
        """Returns ``int64 (n_items,)``, how often each item was clicked."""
        return np.bincount(self.items[self.clicks], minlength=n_items).astype(np.int64)

    def take(self, rows: IntArray | BoolArray) -> InteractionLog:
        """Returns a part of the log; ``rows`` is a mask or increasing positions."""
        return replace(
            self,
            users=self.users[rows],
            items=self.items[rows],
            clicks=self.clicks[rows],
            times=self.times[rows],
            watch_ratios=None if self.watch_ratios is None else self.watch_ratios[rows],
        )


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
            for column, kind in columns:
                digest.update(np.ascontiguousarray(column, kind).tobytes())
        return digest.hexdigest()[:16]

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
        """Turns a user's own DataFrames into a data set; see :func:`kuaifair_env.data.frames.from_frames`."""
        from kuaifair_env.data.frames import from_frames

        return from_frames(
            train,
            test,
            items,
            users,
            name=name,
            columns=columns,
            positive_watch_ratio=positive_watch_ratio,
            drop_duplicates=drop_duplicates,
            positives_only=positives_only,
            provenance=provenance,
        )

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


def _check_ids(ids: NDArray[np.int64], what: str, rows: int) -> None:
    if ids.ndim != 1 or (np.diff(ids) <= 0).any():
        raise DataError(f"{what} ids must be a strictly increasing vector of integers")
    if len(ids) != rows:
        raise DataError(f"{what} features have {rows} rows for {len(ids)} ids")


def _check_rows(rows: IntArray, size: int, what: str) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= size:
        raise DataError(f"{what} row {low if low < 0 else high} is outside 0..{size - 1}")
