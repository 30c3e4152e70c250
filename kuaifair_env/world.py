"""The world that sessions run in: users, items, embeddings, popularity groups and the response model of one split."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.catalogue import Catalogue
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.own import MIN_TEST_EXPOSURES
from kuaifair_env.data.popularity import POPULAR_SHARE, PopularityGroups, PopularitySource, groups_of
from kuaifair_env.data.schema import BoolArray, FloatArray, IdArray, IntArray, InteractionLog, Split
from kuaifair_env.embeddings import item_embeddings, unit_rows
from kuaifair_env.errors import DataError
from kuaifair_env.fingerprint import STORED, WorldFingerprint, embedding_probes, response_probes, spread
from kuaifair_env.pooling import ClickPool
from kuaifair_env.randomisation import WorldRandomisation
from kuaifair_env.response.base import PADDING, HistoryWindow, ResponseModel
from kuaifair_env.response.logged import LoggedResponse, UserItems
from kuaifair_env.splits import held_out_users
from kuaifair_env.tolerance import tolerated_shares

HISTORY_LENGTH = 50


class LeftOutWarning(UserWarning):
    """Items or users of a data set are in neither of its worlds."""


class StateEncoder(Protocol):
    """Makes observed states out of windows where the mean of the clicked embeddings is not enough."""

    @property
    def bound(self) -> float:
        """Largest absolute value of a state's component."""
        ...

    def encode(self, window: HistoryWindow) -> FloatArray:
        """Returns the observed states ``s~`` of windows, ``float32 (B, d)``, each from its own window alone."""
        ...


class WorldEncoder(Protocol):
    """Gives a world its item embeddings and, maybe, its states (``dsrm.encoder.Encoder``)."""

    def encoded(self, world: World) -> World:
        """Returns the same world with this encoder's embeddings and states."""
        ...


@dataclass(frozen=True, repr=False)
class World:
    """Users, items and their response: everything that sessions of one split need.

    Items ``0 .. n_items - 1`` of every table are the candidates, what an agent may show; items behind them occur
    in histories only.

    Attributes:
        split: ``"train"`` or ``"test"``.
        data: The data set, arranged so that the candidates come first.
        n_items: Number of candidates ``N``.
        groups: Popularity groups of the candidates, from training exposures.
        embeddings: ``float32 (M, d)``, agent-side item embeddings ``e_i`` of all ``M`` items, from the training log.
        response: What users do; fitted on this split's log alone.
        users: ``int64 (U,)``, increasing user rows whose sessions may start here.
        initial_history: The last ``H`` training-log exposures of every user of the data set.
        true_preference: ``float32 (M, m)`` and ``float32 (users, m)`` taste vectors of items and users where the
            truth is known (twins), for measuring recovery; agents never see them.
        item_term: ``float32 (M,)``, estimated log-odds of a click on every item under random exposure, if agents are
            given one (see ``dsrm.item_term``); the embeddings then hold it as their last coordinate.
        encoder: Makes the observed states; None takes the mean embedding of the clicked items.
        randomisation: How what users do in sessions departs from ``response``, in training worlds alone (see
            :func:`kuaifair_env.randomised_worlds.randomised`); None for not at all.
    """

    split: Split
    data: InteractionData
    n_items: int
    groups: PopularityGroups
    embeddings: FloatArray
    response: ResponseModel
    users: NDArray[np.int64]
    initial_history: HistoryWindow
    true_preference: tuple[FloatArray, FloatArray] | None = None
    item_term: FloatArray | None = None
    encoder: StateEncoder | None = None
    randomisation: WorldRandomisation | None = None

    def __post_init__(self) -> None:
        items = len(self.data.items)
        if not 1 <= self.n_items <= items:
            raise DataError(f"a world needs 1..{items} candidates, got {self.n_items}")
        if len(self.groups.popular) != self.n_items:
            raise DataError(
                f"popularity groups cover {len(self.groups.popular)} items, not the {self.n_items} candidates"
            )
        if len(self.embeddings) != items or self.response.n_items != items:
            raise DataError(
                f"embeddings ({len(self.embeddings)}) and response ({self.response.n_items}) "
                f"must cover all {items} items"
            )
        if self.embeddings.ndim != 2 or not self.dimension or not np.isfinite(self.embeddings).all():
            raise DataError(f"embeddings must be finite and (items, d), got shape {self.embeddings.shape}")
        if self.item_term is not None and self.item_term.shape != (items,):
            raise DataError(f"item_term must be one number for each of {items} items")
        if len(self.users) == 0:
            raise DataError(f"the {self.split} world has no users")
        if (np.diff(self.users) <= 0).any() or self.users[0] < 0 or self.users[-1] >= len(self.data.users):
            raise DataError(f"users must be increasing rows within 0..{len(self.data.users) - 1}")
        if self.response.n_users != len(self.data.users):
            raise DataError(
                f"the response model knows {self.response.n_users} users, not the {len(self.data.users)} of the data"
            )
        if len(self.initial_history.items) != len(self.data.users):
            raise DataError("initial_history needs one row for each user of the data set")
        if self.randomisation is not None and self.split != "train":
            raise DataError(
                "only training worlds are randomised: agents are evaluated among users whose tastes are not invented"
            )

    def __repr__(self) -> str:
        provenance = self.data.provenance
        return (
            f"World({provenance.name!r}, split={self.split!r}, fingerprint {self.fingerprint}:\n"
            f"  {provenance.origin} data, hash {self.data.data_hash}: {provenance.description};\n"
            f"  {len(self.users)} users, {self.n_items} candidates of {len(self.data.items)} items, "
            f"{int(self.groups.popular.sum())} popular, embeddings of {self.dimension}, history of "
            f"{self.history_length}, {type(self.response).__name__})"
        )

    @cached_property
    def fingerprint(self) -> WorldFingerprint:
        """What this world is: results in worlds of other fingerprints cannot be compared."""
        described = self.response.describe()
        parts = {
            "data": self.data.data_hash,
            "click": [self.data.provenance.settings.get("click")]
            + [described.get(name) for name in ("mode", "click_from", "largest")],
            "users": self.data.users.keys[self.users],
            "candidates": (self.data.items.keys[: self.n_items], self.groups.popular),
            "form": [
                self.split,
                self.dimension,
                self.history_length,
                described.get("kind"),
                None if self.encoder is None else type(self.encoder).__name__,
            ]
            + ([] if self.randomisation is None else [self.randomisation.describe()]),
        }
        vectors = [self.embeddings[spread(self.n_items, STORED)]]
        if self.encoder is not None:
            vectors.append(self.encoder.encode(self.initial_history.take(self.users[spread(len(self.users), STORED)])))
        response = response_probes(self.response, self.users, self.n_items, self.initial_history, self.user_candidates)
        return WorldFingerprint.of_parts(parts, response, embedding_probes(*vectors))

    @cached_property
    def catalogue(self) -> Catalogue:
        """The candidates as agents know them, who carry it in the space of their states; the same in both worlds."""
        keys = self.data.items.keys[: self.n_items]
        return Catalogue.of_items(self.data.provenance.name, keys, self.embeddings[: self.n_items])

    @property
    def dimension(self) -> int:
        """Size ``d`` of an item embedding and of the observed state."""
        return int(self.embeddings.shape[1])

    @property
    def item_directions(self) -> FloatArray:
        """``float32 (M, d)``, item embeddings scaled to length 1, without the item term if they hold one."""
        return unit_rows(self.embeddings if self.item_term is None else self.embeddings[:, :-1])

    @cached_property
    def click_pool(self) -> ClickPool:
        """Pools the clicked items of history windows to states."""
        return ClickPool(self.embeddings, self.initial_history)

    @property
    def history_length(self) -> int:
        """Places ``H`` in a history window."""
        return int(self.initial_history.items.shape[1])

    @cached_property
    def user_candidates(self) -> UserItems | None:
        """The candidates that each user may be shown where feedback is looked up in a log, or None: all candidates."""
        return self.response.pairs if isinstance(self.response, LoggedResponse) else None

    @property
    def item_ids(self) -> IdArray:
        """``(N,)``, raw ids of the candidates."""
        return self.data.items.ids[: self.n_items]

    @cached_property
    def user_ids(self) -> IdArray:
        """``(U,)``, raw ids of the users whose sessions may start here."""
        return self.data.users.ids[self.users]

    @property
    def tags(self) -> BoolArray:
        """``bool (N, T)``, categories of the candidates."""
        return self.data.items.tags[: self.n_items]

    @cached_property
    def tolerated_shares(self) -> NDArray[np.float64]:
        """``float64 (users of the data,)``, popular share that each user tolerates; agents never see it."""
        if self.split == "test":
            log, weights = self.data.test, np.ones(self.n_items)
        else:
            log, weights = self.data.train, 1.0 / np.maximum(self.exposures, 1)
        return tolerated_shares(self.response, self.users, self.groups.popular, log, weights)

    @cached_property
    def exposures(self) -> NDArray[np.int64]:
        """``int64 (N,)``, how often each candidate was shown in the training log."""
        return self.data.train.exposures(len(self.data.items))[: self.n_items]

    def user_rows(self, user_ids: Any) -> NDArray[np.int64]:
        """Returns the rows of users given by raw id.

        Raises:
            DataError: If there are no ids, or a user is unknown or has no session in this world.
        """
        ids = np.atleast_1d(np.asarray(user_ids))
        if ids.dtype == object:  # as pandas keeps text
            ids = np.asarray(ids.tolist())
        if ids.size == 0:
            raise DataError("no user ids were given; at least one is needed")
        text = self.user_ids.dtype.kind == "U"
        if ids.dtype.kind not in ("U" if text else "iu"):
            given = ids.ravel().tolist()
            wrong = next((user for user in given if not str(user).isdecimal()), given[0])
            raise DataError(
                f"user ids of {self.data.provenance.name} are {'text' if text else 'integers'}, got {wrong!r}"
            )
        rows = np.minimum(np.searchsorted(self.user_ids, ids), len(self.user_ids) - 1)
        unknown = self.user_ids[rows] != ids
        if unknown.any():
            raise DataError(
                f"user {ids[unknown][0]} has no sessions in the {self.split} world of {self.data.provenance.name}"
            )
        return self.users[rows]

    def describe(self) -> dict[str, Any]:
        """Returns fingerprint, sizes, provenance and the response model's report, JSON-able."""
        return {
            "fingerprint": self.fingerprint.describe(),
            "split": self.split,
            "users": len(self.users),
            "candidates": self.n_items,
            "items": len(self.data.items),
            "dimension": self.dimension,
            "history_length": self.history_length,
            "popular_items": int(self.groups.popular.sum()),
            "popularity_source": self.groups.source,
            "data": self.data.provenance.as_dict() | {"hash": self.data.data_hash},
            "response": self.response.describe(),
        } | ({} if self.randomisation is None else {"randomisation": self.randomisation.describe()})


def initial_history(log: InteractionLog, n_users: int, length: int) -> HistoryWindow:
    """Returns each user's last ``length`` exposures of a log, newest last, padded at the front.

    Args:
        log: Usually the training log.
        n_users: Number of users.
        length: Places ``H``.

    Raises:
        ValueError: If ``length`` is less than 1.
    """
    if length < 1:
        raise ValueError(f"history length must be at least 1, got {length}")
    offsets = log.offsets(n_users)
    return windows_before(log, offsets[1:], np.diff(offsets), length)


def windows_before(log: InteractionLog, ends: IntArray, lengths: IntArray, places: int) -> HistoryWindow:
    """Returns windows of a log that end just before given rows, newest last, padded at the front.

    Args:
        log: The log.
        ends: ``int (n,)``, log row behind the last row of each window.
        lengths: ``int (n,)``, how many rows each window may reach back; what exceeds ``places`` is cut off.
        places: Width ``H`` of the windows.
    """
    steps = np.arange(places) - places
    rows = ends[:, None] + steps
    present = steps >= -lengths[:, None]
    rows = np.where(present, rows, 0)
    items = np.where(present, log.items[rows], PADDING).astype(np.int32)
    return HistoryWindow(items, log.clicks[rows] & present)


def candidate_rows(data: InteractionData, min_exposures: int = MIN_TEST_EXPOSURES) -> NDArray[np.int64]:
    """Returns the items that both worlds recommend, those which the test log covers, and warns of how many it does not.

    Only there does the test world know what users do, and a common candidate set lets an agent with one output
    per item move from the training world to the test world.

    Args:
        data: The data set.
        min_exposures: Test-log exposures that an item needs.

    Raises:
        DataError: If no item has as many.
    """
    covered = covered_items(data, min_exposures)
    left_out = len(data.items) - len(covered)
    if left_out:
        warnings.warn(
            f"{data.provenance.name}: {left_out} of {len(data.items)} items are no candidates: they have fewer than "
            f"{min_exposures} exposures in the test log (candidate_rows(data, n) for build_world, or "
            "min_test_exposures=n in register_world, takes those with n)",
            LeftOutWarning,
            stacklevel=2,
        )
    return covered


def covered_items(data: InteractionData, min_exposures: int) -> NDArray[np.int64]:
    """Returns the items with as many test-log exposures; see :func:`candidate_rows`."""
    exposures = data.test.exposures(len(data.items))
    covered = np.flatnonzero(exposures >= min_exposures)
    if len(covered) == 0:
        enough = int(np.median(exposures[exposures > 0]))
        raise DataError(
            f"no item has {min_exposures} exposures in the test log of {data.provenance.name}; the most shown has "
            f"{exposures.max()}. {int((exposures >= enough).sum())} of {len(exposures)} items have {enough}: "
            f"build_world(..., candidates=candidate_rows(data, {enough})), or register_world(..., "
            f"min_test_exposures={enough})"
        )
    return covered


def _check_response(response: ResponseModel, data: InteractionData, split: Split) -> None:
    """Checks that a response model, as far as it says what it was made from, is that of this data set and split.

    Raises:
        DataError: If it is another world's.
    """
    if (response.n_users, response.n_items) != (len(data.users), len(data.items)):
        raise DataError(
            f"the response model knows {response.n_users} users and {response.n_items} items, not the "
            f"{len(data.users)} users and {len(data.items)} items of the data"
        )
    described = response.describe()
    inner: Any = described
    while isinstance(inner, dict) and not {"data_hash", "provenance"} & set(inner):
        inner = inner.get("base", inner.get("means"))
    described = described if inner is None else inner
    hash_, fitted = described.get("data_hash", data.data_hash), described.get("split", split)
    known = described.get("provenance") or {}
    if hash_ != data.data_hash or known.get("name", data.provenance.name) != data.provenance.name:
        raise DataError(
            f"the response model is another world's: it was made from {described.get('data', known.get('name'))} "
            f"({hash_}), not from {data.provenance.name} ({data.data_hash})"
        )
    if fitted != split:
        raise DataError(f"the response model was fitted on the {fitted} log, and this is the {split} world")


def warn_of_users_left_out(data: InteractionData) -> None:
    """Warns of users who have sessions in neither world, and says why."""
    left_out = len(data.users) - len(np.union1d(*users_of_worlds(data)))
    if left_out:
        warnings.warn(
            f"{data.provenance.name}: {left_out} of {len(data.users)} users have no sessions: they have no row in the "
            "training log and are not held out for the test world",
            LeftOutWarning,
            stacklevel=3,
        )


def users_of_worlds(data: InteractionData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the user rows of the training world, those with training exposures, and of the test world, held out."""
    held_out = held_out_users(data)
    return np.setdiff1d(data.train.user_rows(), held_out), held_out


def build_world(
    data: InteractionData,
    split: Split,
    response: ResponseModel,
    *,
    candidates: IntArray | None = None,
    users: IntArray | None = None,
    embeddings: FloatArray | None = None,
    history_length: int = HISTORY_LENGTH,
    popularity: PopularitySource = "train",
    popularity_share: float = POPULAR_SHARE,
    true_preference: tuple[FloatArray, FloatArray] | None = None,
) -> World:
    """Builds the world of one split from a data set and a response model that was fitted on that split.

    Args:
        data: The data set, items in the order that ``response`` knows.
        split: ``"train"`` or ``"test"``.
        response: What users do; see :func:`kuaifair_env.response.fitting.fit_response`.
        candidates: Item rows that may be recommended; None takes :func:`candidate_rows`, and warns of what that leaves
            out.
        users: User rows whose sessions may start here; None takes :func:`held_out_users` for the test world and
            all others that have training exposures for the training world.
        embeddings: ``float32 (items, d)``, agent-side item embeddings that know nothing of the test log; None takes
            :func:`~kuaifair_env.embeddings.item_embeddings` of the training log with ``d = 64``.
        history_length: Places ``H`` in a history window.
        popularity: Source of the popularity groups: exposures in the training log, or the platform's counts.
        popularity_share: Share of the candidates that are popular.
        true_preference: Taste vectors of items and users where the truth is known.

    Raises:
        DataError: If the parts do not fit each other.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', got {split!r}")
    if candidates is None:
        candidates = candidate_rows(data)
        warn_of_users_left_out(data)
    rows = np.asarray(candidates, np.int64)
    order = np.concatenate([rows, np.setdiff1d(np.arange(len(data.items)), rows)])
    _check_response(response, data, split)
    arranged = data.arranged(rows)
    if users is None:
        users = users_of_worlds(data)[split == "test"]
    if embeddings is None:
        embeddings = item_embeddings(data.train, len(data.users), data.items)
    if true_preference is not None:
        true_preference = (true_preference[0][order], true_preference[1])
    return World(
        split=split,
        data=arranged,
        n_items=len(rows),
        groups=groups_of(arranged, np.arange(len(rows)), popularity_share, popularity),
        embeddings=embeddings[order],
        response=response.rearranged(order),
        users=np.unique(np.asarray(users, np.int64)),
        initial_history=initial_history(arranged.train, len(data.users), history_length),
        true_preference=true_preference,
    )
