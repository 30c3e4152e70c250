"""The tables of a data set, whatever it comes from: users, items, logs, and where they come from.

Users and items are addressed by *rows* (0-based positions in ``users.ids`` and ``items.ids``) everywhere
inside the library; raw ids, which are integers or text, appear at the borders only. Every table is keyed by raw id,
never by file order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.errors import DataError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.integer[Any]]
IdArray = NDArray[Any]
"""Raw ids: ``int64``, or text of fixed width (``<U...``)."""

Split = Literal["train", "test"]
Origin = Literal["real", "partial", "twin", "own"]


@dataclass(frozen=True)
class Provenance:
    """The origin of a data set, which every result records.

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
        return asdict(self)


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
        ids: ``(U,)``, strictly increasing raw ids.
        features: One row per user.
    """

    ids: IdArray
    features: FeatureTable

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype.kind not in "iU" or (self.ids[1:] <= self.ids[:-1]).any():
            raise DataError("user ids must be a strictly increasing vector of integers or text")
        if len(self.ids) != len(self.features.values):
            raise DataError(f"user features have {len(self.features.values)} rows for {len(self.ids)} ids")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """``int64 (U,)``, the ids as integers; see :func:`~kuaifair_env.seeding.id_keys`."""
        return _distinct_keys(self.ids, "users")


@dataclass(frozen=True)
class Catalogue:
    """The items of a data set.

    Attributes:
        ids: ``(N,)``, distinct raw ids. Readers sort them, a world puts its candidates first.
        features: One row per item; must not be derived from the test log.
        tags: ``bool (N, T)`` membership in content categories; ``T`` may be 0.
        tag_names: Names of the ``T`` categories.
        shown: ``float64 (N,)`` platform-wide exposure counts (``show_user_num``), or None.
    """

    ids: IdArray
    features: FeatureTable
    tags: BoolArray
    tag_names: tuple[str, ...] = ()
    shown: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype.kind not in "iU" or len(np.unique(self.ids)) != len(self.ids):
            raise DataError("item ids must be a vector of distinct integers or text")
        rows = len(self.ids)
        if len(self.features.values) != rows or self.tags.shape != (rows, len(self.tag_names)):
            raise DataError(f"features and tags must have one row for each of the {rows} items")
        if self.shown is not None and self.shown.shape != (rows,):
            raise DataError(f"shown must have one count for each of the {rows} items")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        """``int64 (N,)``, the ids as integers; see :func:`~kuaifair_env.seeding.id_keys`."""
        return _distinct_keys(self.ids, "items")

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
        feedback: ``float32 (R,)`` what each row is worth where that is more than whether it was clicked, or None.
    """

    users: NDArray[np.int32]
    items: NDArray[np.int32]
    clicks: BoolArray
    times: NDArray[np.int64]
    watch_ratios: FloatArray | None = None
    positives_only: bool = False
    feedback: FloatArray | None = None

    def __post_init__(self) -> None:
        columns: list[NDArray[Any]] = [self.users, self.items, self.clicks, self.times]
        columns += [column for column in (self.watch_ratios, self.feedback) if column is not None]
        if len({len(column) for column in columns}) != 1:
            raise DataError(f"log columns differ in length: {[len(column) for column in columns]}")
        if (self.users[1:] < self.users[:-1]).any():
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
        """Builds a log from the class's columns with rows in any order, which is that of time without ``times``."""
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

    def user_rows(self) -> NDArray[np.int64]:
        """Returns the increasing rows of the users who are in the log."""
        # Rows are sorted by user, so that a search beats np.unique.
        return np.flatnonzero(np.diff(self.offsets(int(self.users[-1]) + 1))) if len(self) else np.zeros(0, np.int64)

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
            feedback=None if self.feedback is None else self.feedback[rows],
        )


@dataclass(frozen=True)
class NegativeSampling:
    """Settings of drawing non-clicks for a log that lists positives only.

    Repeats of a pair count once. For each positive of a user, ``per_positive`` items are drawn from the log's items
    with weight ``positives ** popularity_power``; draws that are positives of that user are dropped. Power 0 takes
    everything unseen as equally likely exposed, so that the model's item quality is the popularity of positives;
    power 1 takes exposure as proportional to positives, so that all items are equally good. Neither is known to be
    true; 0.5 lies between. The level of the click rate is not in such a log at all: ``positive_rate`` declares it
    (the intercept is shifted by prior correction, King and Zeng, "Logistic Regression in Rare Events Data", 2001,
    eq. 7), and None leaves the rate that the sampling happens to give.

    Attributes:
        per_positive: Negatives drawn for each positive.
        popularity_power: Exponent of the weights.
        positive_rate: Share of positives among exposures, if known from elsewhere.
        seed: Seed of the draws, beside that of a fit.
    """

    per_positive: float = 4.0
    popularity_power: float = 0.5
    positive_rate: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.per_positive < float("inf"):
            raise ValueError(f"negatives_per_positive must be finite and above 0, got {self.per_positive}")
        if not 0 <= self.popularity_power <= 1:
            raise ValueError(f"popularity_power must lie in [0, 1], got {self.popularity_power}")
        if self.positive_rate is not None and not 0 < self.positive_rate < 1:
            raise ValueError(f"positive_rate must lie between 0 and 1, got {self.positive_rate}")


def raw_id(value: Any) -> int | str:
    """Returns an entry of raw ids as a plain Python value."""
    return str(value) if isinstance(value, str) else int(value)


def count_distinct(keys: NDArray[np.int64]) -> int:
    """Returns how many different integers there are, ``keys`` being ``(R,)``.

    They are sorted: ``np.unique`` hashes, and takes some seventy times as long for the pairs of a large log.
    """
    ordered = np.sort(keys)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + (len(ordered) > 0)


def among(keys: NDArray[np.int64], pool: NDArray[np.int64]) -> BoolArray:
    """Marks which of ``keys``, ``(R,)``, occur in a sorted ``pool``, ``(P,)``, whose repeats do no harm.

    ``np.isin`` would hash the whole pool at every call.
    """
    if not len(pool):
        return np.zeros(len(keys), np.bool_)
    places = np.minimum(np.searchsorted(pool, keys), len(pool) - 1)
    return np.asarray(pool[places] == keys)


def _distinct_keys(ids: IdArray, what: str) -> NDArray[np.int64]:
    keys = seeding.id_keys(ids)
    if len(np.unique(keys)) < len(keys):
        raise DataError(f"two of the {what} have ids with the same hash; rename one of them")
    return keys
