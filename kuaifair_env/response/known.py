"""Responses that need no fit: a matrix of observed feedback, and the truth of a twin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, parse_as, take_tensors, with_prefix, without_prefix
from kuaifair_env.response.base import BernoulliFeedback, History, StoredResponse, sigmoid

if TYPE_CHECKING:
    from kuaifair_env.synthetic.truth import ClickChoice, TwinTruth

_OUTSIDE = -1

Mode = Literal["click", "watch_ratio"]


@dataclass(frozen=True)
class Block:
    """The users and items of a log, and how much of their block it covers.

    Attributes:
        users: ``int64``, increasing user rows.
        items: ``int64``, increasing item rows.
        coverage: Distinct pairs in the log over all cells of the block.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    coverage: float


def observed_block(log: InteractionLog) -> Block:
    """Returns the block of users and items that a log spans."""
    users, items = np.flatnonzero(np.bincount(log.users)), np.flatnonzero(np.bincount(log.items))
    # Sorting finds distinct pairs many times faster than the hash table of np.unique.
    pairs = np.sort(log.users.astype(np.int64) * (items[-1] + 1) + log.items)
    distinct = 1 + np.count_nonzero(np.diff(pairs))
    return Block(users, items, float(distinct / (len(users) * len(items))))


class ObservedResponse(StoredResponse):
    """Feedback from a matrix of observed cells; the same pair always answers the same.

    ``mode="click"``: feedback 0 or 1; a 1 is a click. ``mode="watch_ratio"``: feedback is the log's graded feedback
    where it has one, else the watch ratio, clipped at ``clip`` (the reward of Gao et al., CIRS, TOIS 2023, and
    EasyRL4Rec); it counts as a click in the history where it is at least ``threshold``.

    A missing cell takes the mean of its item's observed cells: in click mode this is a probability, and the session's
    uniform decides (the only cells that are not deterministic); in watch-ratio mode it is the feedback itself.

    Build one with :meth:`from_log`.

    Args:
        matrix: ``(users of the block, items of the block)``: uint8 (click mode without missing cells, 0 or 1),
            float16 or float32.
        user_places: ``int32 (U,)``, row in the matrix of each user, -1 outside the block.
        item_places: ``int32 (N,)``, column of each item, -1 outside.
        mode: See above.
        threshold: Watch ratio from which feedback is a click (watch-ratio mode).
        report: What was counted while building, JSON-able.
    """

    kind = "observed"
    uses_history = False

    def __init__(
        self,
        matrix: NDArray[Any],
        user_places: NDArray[np.int32],
        item_places: NDArray[np.int32],
        mode: Mode,
        threshold: float,
        report: dict[str, Any] | None = None,
    ) -> None:
        if mode not in ("click", "watch_ratio"):
            raise ValueError(f"mode is 'click' or 'watch_ratio', got {mode!r}")
        if matrix.ndim != 2 or user_places.max(initial=-1) >= len(matrix):
            raise DataError("user places must point into the matrix")
        if item_places.max(initial=-1) >= matrix.shape[1]:
            raise DataError("item places must point into the matrix")
        self._matrix = matrix
        self._user_places, self._item_places = user_places, item_places
        self._mode: Mode = mode
        self._threshold = float(threshold)
        self._report = dict(report or {})
        self.n_users, self.n_items = len(user_places), len(item_places)

    @classmethod
    def from_log(
        cls,
        log: InteractionLog,
        data: InteractionData,
        *,
        mode: Mode = "click",
        threshold: float | None = None,
        clip: float = 5.0,
        minimum_coverage: float = 0.95,
    ) -> ObservedResponse:
        """Builds the matrix of a log that covers (nearly) all pairs of its users and items.

        A pair that occurs more than once keeps its last row (in time).

        Args:
            log: The log, such as KuaiRec's small matrix.
            data: Says how many users and items there are.
            mode: ``"click"`` or ``"watch_ratio"``.
            threshold: Watch ratio that makes a click. In click mode None takes the log's own clicks; in watch-ratio
                mode None means 1 (watched to the end).
            clip: Largest watch ratio (watch-ratio mode).
            minimum_coverage: Share of the block's cells that must be observed.

        Raises:
            DataError: If the log covers too little, or lacks the watch ratios that are asked for.
        """
        block = observed_block(log)
        if block.coverage < minimum_coverage:
            raise DataError(
                f"the log covers {block.coverage:.1%} of the {len(block.users)} x {len(block.items)} pairs of its "
                f"users and items; an observed response needs {minimum_coverage:.0%}. Take response='factorised'"
            )
        if log.positives_only:
            raise DataError("a log of positives only does not say which pairs were observed")
        values = _cell_values(log, mode, threshold, clip)
        user_places, item_places = (
            _places(block.users, len(data.users)),
            _places(block.items, len(data.items)),
        )
        matrix, missing = _fill(values, user_places[log.users], item_places[log.items], block)
        report = {
            "fitted_on": {"logged_rows": len(log)},
            "block_users": len(block.users),
            "block_items": len(block.items),
            "coverage": block.coverage,
            "missing_cells": missing,
            "missing_rule": "mean of the item's observed cells",
            "repeated_rows_dropped": len(log) - (matrix.size - missing),
            "click_threshold": threshold,
            "clip": clip if mode == "watch_ratio" else None,
            "mean_feedback": float(matrix.mean(dtype=np.float64)),
            **data.identity(log),
        }
        compact = matrix.astype(np.uint8) if mode == "click" and not missing else matrix.astype(np.float16)
        return cls(compact, user_places, item_places, mode, 1.0 if threshold is None else threshold, report)

    @property
    def users(self) -> NDArray[np.int64]:
        """User rows of the block, increasing."""
        return np.flatnonzero(self._user_places != _OUTSIDE)

    @property
    def items(self) -> NDArray[np.int64]:
        """Item rows of the block, increasing."""
        return np.flatnonzero(self._item_places != _OUTSIDE)

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns the cells of users and items of the block, ``float32 (B, K)``; ``history`` is not read.

        Raises:
            DataError: If a user or an item is outside the block.
        """
        rows, columns = self._user_places[users], self._item_places[items]
        if rows.min(initial=0) < 0:
            raise DataError(f"user row {np.asarray(users)[rows < 0][0]} is outside the observed block")
        if columns.min(initial=0) < 0:
            raise DataError(f"item row {np.asarray(items)[columns < 0][0]} is outside the observed block")
        return self._matrix[rows[:, None], columns].astype(np.float32)

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Returns the cells themselves; a missing cell's probability (click mode) meets its uniform."""
        if self._mode == "watch_ratio":
            return expected
        return (uniforms < expected).astype(np.float32)

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Says where feedback is a click: 1 in click mode, a watch ratio of at least ``threshold`` otherwise."""
        limit = np.float16(self._threshold) if self._mode == "watch_ratio" else 0.5
        return feedback >= limit

    def rearranged(self, items: IntArray) -> ObservedResponse:
        """Returns the same model for the catalogue ``old_items[items]``; the matrix is shared, not copied."""
        return ObservedResponse(
            self._matrix,
            self._user_places,
            self._item_places[items],
            self._mode,
            self._threshold,
            self._report,
        )

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns the cells of items ``0 .. n_items - 1``, ``float32 (B, n_items)``.

        Raises:
            DataError: If one of these users or items is outside the block.
        """
        return self.expected(users, np.arange(n_items)[None, :])

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"matrix": self._matrix, "user_places": self._user_places, "item_places": self._item_places}

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"mode": self._mode, "threshold": self._threshold, "report": self._report}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> ObservedResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        take_tensors(tensors, {"matrix": (None, None), "user_places": (None,), "item_places": (None,)})
        threshold, report = parse_as(float, settings["threshold"]), parse_as(dict[str, Any], settings["report"])
        matrix, users, items = (tensors[name] for name in ("matrix", "user_places", "item_places"))
        return cls(matrix, users, items, settings["mode"], threshold, report)

    def describe(self) -> dict[str, Any]:
        """Returns kind, mode, sizes and what was counted, JSON-able."""
        return {
            "kind": self.kind,
            "mode": self._mode,
            "click_from": 1.0 if self._mode == "click" else self._threshold,
            "users": self.n_users,
            "items": self.n_items,
            "bytes": int(self._matrix.nbytes),
            **self._report,
        }


def _cell_values(log: InteractionLog, mode: Mode, threshold: float | None, clip: float) -> FloatArray:
    if mode == "click" and threshold is None:
        return log.clicks.astype(np.float32)
    if mode == "watch_ratio" and log.feedback is not None:
        return np.minimum(log.feedback, np.float32(clip))
    if log.watch_ratios is None:
        raise DataError("the log holds no watch ratios; use mode='click' without a threshold")
    if np.isnan(log.watch_ratios).any():
        raise DataError(f"{int(np.isnan(log.watch_ratios).sum())} watch ratios are NaN; drop these rows first")
    if mode == "click":
        return (log.watch_ratios >= np.float32(threshold)).astype(np.float32)
    if not clip > 0:
        raise ValueError(f"clip must be above 0, got {clip}")
    return np.minimum(log.watch_ratios, np.float32(clip))


def _places(rows: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    places = np.full(size, _OUTSIDE, np.int32)
    places[rows] = np.arange(len(rows), dtype=np.int32)
    return places


def _fill(
    values: FloatArray, rows: NDArray[np.int32], columns: NDArray[np.int32], block: Block
) -> tuple[FloatArray, int]:
    matrix = np.full((len(block.users), len(block.items)), np.nan, np.float32)
    matrix[rows, columns] = values
    missing = np.isnan(matrix)
    count = int(missing.sum())
    if count:
        means = np.nanmean(matrix, axis=0)
        matrix[missing] = np.broadcast_to(means, matrix.shape)[missing]
    return matrix, count


_TRUTH = ("user_vectors", "item_vectors", "item_effects", "user_effects", "herding", "popularity")
_CHOICE = ("given_click", "otherwise", "item_scores", "user_scores")
_CHOICE_PREFIX = "choice."
_CHOICE_WEIGHTS = ("taste_weight", "herding_weight")


class TwinResponse(BernoulliFeedback, StoredResponse):
    """Clicks by the true distribution of a twin; the history does not matter.

    Where feedback is graded, this is expected feedback over the largest that there can be, for
    :class:`~kuaifair_env.response.graded.GradedResponse`.

    Args:
        truth: The distribution.
        conformity: Share of conformity in the clicks: 0 is true preference (the twin's test world), 1 what people do
            in the training world.
        provenance: What the truth belongs to, JSON-able, such as ``twin.data.provenance.as_dict()``.
    """

    kind = "twin"
    uses_history = False

    def __init__(self, truth: TwinTruth, conformity: float = 0.0, provenance: Mapping[str, Any] | None = None) -> None:
        if not np.isfinite(conformity):
            raise ValueError(f"conformity must be a finite number, got {conformity}")
        self.truth = truth
        self.conformity = float(conformity)
        self.provenance = dict(provenance or {})
        self.n_users, self.n_items = truth.n_users, truth.n_items

    @cached_property
    def _users(self) -> FloatArray:
        """User sides of one inner product that holds taste, both effects and conformity."""
        truth = self.truth
        columns = (np.ones(self.n_users), truth.user_effects, self.conformity * truth.herding)
        parts = [truth.user_vectors * truth.taste_strength, *(column[:, None] for column in columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    @cached_property
    def _items(self) -> FloatArray:
        truth = self.truth
        columns = (truth.item_effects, np.ones(self.n_items), truth.popularity)
        parts = [truth.item_vectors, *(column[:, None] for column in columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    @cached_property
    def _watching_users(self) -> FloatArray:
        """User sides of one inner product that is the watching score, with :attr:`_items`."""
        truth, choice = self.truth, cast("ClickChoice", self.truth.choice)
        columns = (np.ones(self.n_users), choice.user_scores, self.conformity * choice.herding_weight * truth.herding)
        parts = [truth.user_vectors * choice.taste_weight, *(column[:, None] for column in columns)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    @cached_property
    def _watching_items(self) -> FloatArray:
        items = self._items.copy()
        items[:, -3] = cast("ClickChoice", self.truth.choice).item_scores
        return items

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns ``float32 (B, K)`` click probabilities for ``users (B,)`` and ``items (B, K)``."""
        own_click = sigmoid(np.einsum("bd,bkd->bk", self._users[users], self._items[items]))
        if self.truth.choice is None:
            return own_click
        scores = np.einsum("bd,bkd->bk", self._watching_users[users], self._watching_items[items])
        return self.truth.choice.expected(own_click, items, scores)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns ``float32 (B, n_items)`` click probabilities of items ``0 .. n_items - 1``."""
        own_click = sigmoid(self._users[users] @ self._items[:n_items].T)
        if self.truth.choice is None:
            return own_click
        scores = self._watching_users[users] @ self._watching_items[:n_items].T
        return self.truth.choice.expected(own_click, np.arange(n_items), scores)

    def tastes(self, users: IntArray) -> FloatArray:
        """Returns ``float32 (B, m)``; see :class:`~kuaifair_env.response.base.TasteResponse`."""
        return self.truth.user_vectors[users]

    def with_tastes(self, users: IntArray, tastes: FloatArray) -> TwinResponse:
        """See :class:`~kuaifair_env.response.base.TasteResponse`."""
        return TwinResponse(self.truth.with_tastes(users, tastes), self.conformity, self.provenance)

    def rearranged(self, items: IntArray) -> TwinResponse:
        """Returns the same users for the catalogue ``old_items[items]``."""
        return TwinResponse(self.truth.rearranged(items), self.conformity, self.provenance)

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        own: Tensors = {name: getattr(self.truth, name) for name in _TRUTH}
        choice = {} if self.truth.choice is None else {name: getattr(self.truth.choice, name) for name in _CHOICE}
        return own | with_prefix(choice, _CHOICE_PREFIX)

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        choice = self.truth.choice
        return {
            "choice": None if choice is None else {name: getattr(choice, name) for name in _CHOICE_WEIGHTS},
            "taste_strength": self.truth.taste_strength,
            "conformity": self.conformity,
            "provenance": self.provenance,
        }

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> TwinResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        from kuaifair_env.synthetic.truth import SCORE_GRID, ClickChoice, TwinTruth  # needs scipy

        users, dimensions = take_tensors(tensors, {"user_vectors": (None, None)})["user_vectors"].shape
        (items,) = take_tensors(tensors, {"item_effects": (None,)})["item_effects"].shape
        take_tensors(tensors, {"item_vectors": (items, dimensions), "popularity": (items,)})
        take_tensors(tensors, dict.fromkeys(("user_effects", "herding"), (users,)))
        choice = None
        if settings["choice"] is not None:
            tables: Any = without_prefix(tensors, _CHOICE_PREFIX)
            take_tensors(tables, {"given_click": (items,), "item_scores": (items,), "user_scores": (users,)})
            take_tensors(tables, {"otherwise": SCORE_GRID.shape})
            choice = ClickChoice(**(tables | parse_as(dict[str, float], settings["choice"])))
        strength, conformity = (parse_as(float, settings[name]) for name in ("taste_strength", "conformity"))
        truth = TwinTruth(**{name: tensors[name] for name in _TRUTH}, taste_strength=strength, choice=choice)
        return cls(truth, conformity, parse_as(dict[str, Any], settings["provenance"]))

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and strengths, JSON-able."""
        return {
            "kind": self.kind,
            "users": self.n_users,
            "items": self.n_items,
            "taste_strength": self.truth.taste_strength,
            "conformity": self.conformity,
            "fitted": False,
            "provenance": self.provenance,
        }
