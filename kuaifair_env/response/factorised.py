"""A logistic factor model of clicks: two tables of vectors whose inner product is the logit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import FloatArray, IntArray, NegativeSampling
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, parse_as, take_tensors
from kuaifair_env.response.base import BernoulliFeedback, History, StoredResponse, sigmoid_of_negated
from kuaifair_env.response.inputs import InputConfig
from kuaifair_env.response.rows import SplitConfig

_SAFE_LOGIT = 80.0
_ROWS_AT_ONCE = 65_536
_ZERO = np.asarray(0)


@dataclass(frozen=True)
class FactorisedConfig:
    """Settings of :func:`fit_factorised`; the defaults were chosen on held-out rows of KuaiRand-Pure.

    Precisions are those of normal priors around 0, in units of one row's log-likelihood: but for ``map_precision``
    they mean the same whatever the number of rows.

    Attributes:
        rank: Number of factors ``f``; 0 fits main effects alone.
        user_ids: Whether each user has an own bias ``b_u`` and factor ``p_u`` beside what the inputs say.
        inputs: How the context log is condensed.
        split: Which rows are held out for what.
        negatives: Used for logs of positives only; None takes what the data set declares.
        bias_precision: Prior precision of ``b_u`` and ``b_i``.
        factor_precision: Of ``p_u`` and ``q_i``.
        line_precision: Of ``w`` and ``v``.
        map_precision: Of ``P`` and ``Q``, times the square root of the number of fitted rows: with a product of two
            maps it is a nuclear-norm penalty, whose best weight grows as the noise does (Koltchinskii, Lounici and
            Tsybakov, "Nuclear-norm penalization and optimal rates", Annals of Statistics 2011).
        slope_prior: Standard deviation of the prior around 1 of the calibrating slopes.
        learning_rate: Of Adam, for factors, maps and lines, at a batch of 256 rows; it grows with the square root of
            the batch size. A pass over the rows has 24 batches, whatever the number of rows.
        bias_learning_rate: Of Adam, for the biases.
        max_epochs: Passes at most; the learning rates fall to 0 over them.
        patience: Passes without a better held-out log loss before the end.
    """

    rank: int = 16
    user_ids: bool = True
    inputs: InputConfig = field(default_factory=InputConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    negatives: NegativeSampling | None = None
    bias_precision: float = 3.0
    factor_precision: float = 60.0
    line_precision: float = 50.0
    map_precision: float = 6.5
    slope_prior: float = 0.5
    learning_rate: float = 1e-3
    bias_learning_rate: float = 2e-2
    max_epochs: int = 12
    patience: int = 3


class FactorisedResponse(BernoulliFeedback, StoredResponse):
    """Click probability ``sigmoid(mu + a_u + b_i + <p_u, q_i>)``.

    ``a_u``, ``b_i``, ``p_u`` and ``q_i`` are effective: whatever a fit takes from ids and features (``p_u + P x_u``,
    ``b_i + v y_i``, ...) is summed beforehand, see :func:`kuaifair_env.response.factorised_fit.fit_factorised`.
    Factors are kept centred over users and over items (their means go to the biases, which leaves every logit as
    it was), so that ``<p_u, q_i>`` is *personal*: it averages to 0 over all items for each user, and over all users
    for each item.

    Args:
        offset: ``mu``.
        user_bias: ``(U,)``, ``a_u``.
        item_bias: ``(N,)``, ``b_i``.
        user_factors: ``(U, f)``, ``p_u``; ``f`` may be 0.
        item_factors: ``(N, f)``, ``q_i``.
        report: Fit report and provenance, JSON-able; comes back from :meth:`describe`.

    Raises:
        DataError: If shapes do not fit or a number is NaN or infinite.
    """

    kind = "factorised"
    uses_history = False

    def __init__(
        self,
        offset: float,
        user_bias: NDArray[Any],
        item_bias: NDArray[Any],
        user_factors: NDArray[Any],
        item_factors: NDArray[Any],
        report: Mapping[str, Any] | None = None,
    ) -> None:
        users, items = len(user_bias), len(item_bias)
        if np.ndim(user_factors) != 2 or np.ndim(item_factors) != 2:
            raise DataError("user and item factors must be matrices, one row each")
        if user_factors.shape[0] != users or item_factors.shape[0] != items:
            raise DataError(
                f"factors of {user_factors.shape[0]} users and {item_factors.shape[0]} items do not fit biases of "
                f"{users} users and {items} items"
            )
        if user_factors.shape[1] != item_factors.shape[1]:
            raise DataError(f"user factors have rank {user_factors.shape[1]}, item factors {item_factors.shape[1]}")
        tables: dict[str, Any] = {
            "offset": offset,
            "user bias": user_bias,
            "item bias": item_bias,
            "user factors": user_factors,
            "item factors": item_factors,
        }
        for what, values in tables.items():
            if not np.isfinite(values).all():
                raise DataError(f"the {what} holds NaN or infinity")
        p_mean: NDArray[np.float64] = user_factors.mean(axis=0, dtype=np.float64)
        q_mean: NDArray[np.float64] = item_factors.mean(axis=0, dtype=np.float64)
        a = np.asarray(user_bias, np.float64) + _products(user_factors, q_mean)
        b = np.asarray(item_bias, np.float64) + _products(item_factors, p_mean) - p_mean @ q_mean
        self._offset = float(offset + a.mean() + b.mean())
        # One row holds all that a pair needs, with the sign turned so that exp() needs no negation:
        # user (-p, -a - mu, -1), item (q, 1, b).
        self._users = _table(user_factors, p_mean, a - a.mean() + self._offset, 1.0)
        np.negative(self._users, out=self._users)
        self._items = _table(item_factors, q_mean, 1.0, b - b.mean())
        self._report = dict(report or {})
        self._finish()

    def _finish(self, item_length: float | None = None) -> None:
        """Sets what follows from the tables.

        Args:
            item_length: Length of the longest item row; None computes it.
        """
        self.n_users, self.n_items = len(self._users), len(self._items)
        self._item_length = _largest_length(self._items) if item_length is None else item_length
        self._bounded = _largest_length(self._users) * self._item_length < _SAFE_LOGIT

    @property
    def offset(self) -> float:
        """``mu``, the mean logit over all users and items."""
        return self._offset

    @property
    def user_bias(self) -> FloatArray:
        """``float32 (U,)``, ``a_u``; mean 0."""
        return -self._users[:, -2] - np.float32(self._offset)

    @property
    def item_bias(self) -> FloatArray:
        """``float32 (N,)``, ``b_i``: item quality in logits; mean 0 over the catalogue of the fit."""
        return self._items[:, -1].copy()

    @property
    def user_factors(self) -> FloatArray:
        """``float32 (U, f)``, ``p_u``; mean 0."""
        return -self._users[:, :-2]

    @property
    def item_factors(self) -> FloatArray:
        """``float32 (N, f)``, ``q_i``; mean 0 over the catalogue of the fit."""
        return self._items[:, :-2].copy()

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns click probabilities, ``float32 (B, K)``; ``history`` is not read.

        A row's result does not depend on the other rows: each is its own matrix-vector product.

        Raises:
            IndexError: If a row is negative (such as padding) or too large.
        """
        if np.count_nonzero(items < _ZERO) or np.count_nonzero(users < _ZERO):
            raise IndexError("user and item rows must not be negative; padding has no expected feedback")
        return sigmoid_of_negated(self._negated_logits(users, items), self._bounded)

    def logits(self, users: IntArray, items: IntArray) -> FloatArray:
        """Returns the logits of :meth:`expected`, ``float32 (B, K)``."""
        negated = self._negated_logits(users, items)
        return np.negative(negated, out=negated)

    def personal_logits(self, users: IntArray, items: IntArray) -> FloatArray:
        """Returns the personal part ``<p_u, q_i>`` of the logits, ``float32 (B, K)``."""
        p, q = self._users[users, :-2], self._items[items, :-2]
        personal: FloatArray = -np.matmul(q, p[:, :, None])[..., 0]
        return personal

    def _negated_logits(self, users: IntArray, items: IntArray) -> FloatArray:
        of_items: FloatArray = self._items.take(items, axis=0)
        of_users: FloatArray = self._users.take(users, axis=0)
        negated: FloatArray = np.matmul(of_items, of_users[:, :, None])[..., 0]
        return negated

    def tastes(self, users: IntArray) -> FloatArray:
        """Returns ``float32 (B, f)``, ``p_u``; see :class:`~kuaifair_env.response.base.TasteResponse`."""
        factors: FloatArray = -self._users[users, :-2]
        return factors

    def with_tastes(self, users: IntArray, tastes: FloatArray) -> FactorisedResponse:
        """See :class:`~kuaifair_env.response.base.TasteResponse`."""
        table = self._users[users]
        table[:, :-2] = -tastes
        return self._of_tables(self._offset, table, self._items, self._report, self._item_length)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns click probabilities on items ``0 .. n_items - 1``, ``float32 (B, n_items)``: one matrix product."""
        return sigmoid_of_negated(self._users[users] @ self._items[:n_items].T, self._bounded)

    def logits_catalogue(self, users: IntArray, n_items: int) -> FloatArray:
        """Returns the logits of :meth:`expected_catalogue`, ``float32 (B, n_items)``."""
        negated: FloatArray = self._users[users] @ self._items[:n_items].T
        return np.negative(negated, out=negated)

    def rearranged(self, items: IntArray) -> FactorisedResponse:
        """Returns the same model for the catalogue ``old_items[items]``; see ``InteractionData.arranged``."""
        items_table = np.ascontiguousarray(self._items[items])
        return self._of_tables(self._offset, self._users, items_table, self._report)

    def parts_spread(self, users: IntArray | None = None, items: IntArray | None = None) -> dict[str, float]:
        """Returns the standard deviations of the logit's parts over a block of users and items.

        Over the block, the logit is split into row means, column means and the rest (two-way analysis of variance).

        Args:
            users: User rows; None takes all.
            items: Item rows; None takes all.

        Returns:
            ``user``, ``item`` and ``personal`` standard deviations and ``personal_share``, the personal part's share
            of the logit's variance.
        """
        u = (self._users if users is None else self._users[users]).astype(np.float64)
        i = (self._items if items is None else self._items[items]).astype(np.float64)
        p, q = u[:, :-2], i[:, :-2]
        user = u[:, -2] + p @ q.mean(axis=0)
        item = i[:, -1] - q @ p.mean(axis=0)
        p, q = p - p.mean(axis=0), q - q.mean(axis=0)
        # The variance of <p_u, q_i> over a block of centred factors is the trace of Cov(p) Cov(q).
        personal = float(np.sum((p.T @ p) * (q.T @ q))) / (len(p) * len(q))
        total = float(user.var() + item.var() + personal)
        return {
            "user": float(user.std()),
            "item": float(item.std()),
            "personal": personal**0.5,
            "personal_share": personal / total if total else 0.0,
        }

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"users": self._users, "items": self._items}

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        return {"offset": self._offset, "report": self._report}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> FactorisedResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        users = take_tensors(tensors, {"users": (None, None)})["users"]
        items = take_tensors(tensors, {"items": (None, users.shape[1])})["items"]
        offset = parse_as(float, settings["offset"])
        return cls._of_tables(offset, users, items, parse_as(dict[str, Any], settings["report"]))

    @classmethod
    def _of_tables(
        cls,
        offset: float,
        users: FloatArray,
        items: FloatArray,
        report: Mapping[str, Any],
        item_length: float | None = None,
    ) -> FactorisedResponse:
        model = cls.__new__(cls)
        model._offset, model._users, model._items, model._report = offset, users, items, dict(report)
        model._finish(item_length)
        return model

    def describe(self) -> dict[str, Any]:
        """Returns kind, sizes and the fit report, JSON-able."""
        return {
            "kind": self.kind,
            "users": self.n_users,
            "items": self.n_items,
            "factors": self._users.shape[1] - 2,
            **self._report,
        }


def _table(
    factors: NDArray[Any],
    mean: NDArray[np.float64],
    next_to_last: NDArray[np.float64] | float,
    last: NDArray[np.float64] | float,
) -> FloatArray:
    """Returns centred factors and two more columns, ``float32 (n, f + 2)``, without a copy of all in float64."""
    table = np.empty((len(factors), factors.shape[1] + 2), np.float32)
    for begin in range(0, len(factors), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        table[rows, :-2] = factors[rows] - mean
    table[:, -2] = next_to_last
    table[:, -1] = last
    return table


def _largest_length(table: FloatArray) -> float:
    """Returns the length of the longest row."""
    blocks = (table[begin : begin + _ROWS_AT_ONCE] for begin in range(0, len(table), _ROWS_AT_ONCE))
    return max(float(np.sqrt(np.square(block).sum(axis=1)).max()) for block in blocks)


def _products(factors: NDArray[Any], vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns ``factors @ vector`` in float64."""
    blocks = range(0, len(factors), _ROWS_AT_ONCE)
    return np.concatenate([factors[begin : begin + _ROWS_AT_ONCE].astype(np.float64) @ vector for begin in blocks])
