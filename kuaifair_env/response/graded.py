"""Responses with graded feedback: watch ratios, or weights of several kinds of feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.files import Tensors, parse_as, take_tensors, with_prefix, without_prefix
from kuaifair_env.response.base import (
    History,
    ResponseModel,
    SessionMemory,
    StoredResponse,
    response_with_tastes,
    session_memory,
)
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.known import TwinResponse

_INNER = "inner."
_INNER_CLASSES: dict[str, type[FactorisedResponse | TwinResponse]] = {
    response_class.kind: response_class for response_class in (FactorisedResponse, TwinResponse)
}
_BINS, _LEVELS = 16, 256
_MAX_ROWS = 500_000
_BLOCK = 1 << 16
_ANY_FEEDBACK = 1e-6


class GradedResponse(StoredResponse):
    """Feedback between 0 and a largest value, whose mean another model gives.

    Around its mean, feedback is spread as in a log: rows are grouped by expected feedback, and a session's uniform
    picks from the quantiles of a group, scaled to the mean of the pair.

    Make one with :meth:`around`.

    Args:
        inner: Expected feedback as a share of the largest.
        largest: Largest feedback.
        click_from: Feedback from which a row is a click.
        edges: ``float32 (G - 1,)``, expected feedback between the ``G`` groups.
        quantiles: ``float32 (G, L)``, quantiles of each group's feedback.
        report: What the model was made from, JSON-able; None leaves that to ``inner``.
    """

    kind = "graded"

    def __init__(
        self,
        inner: ResponseModel,
        largest: float,
        click_from: float,
        edges: FloatArray,
        quantiles: FloatArray,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        self.inner = inner
        self.largest, self.click_from = float(largest), float(click_from)
        self._edges, self._quantiles = edges, quantiles
        self._means = quantiles.mean(axis=1)
        self._report = dict(report or {})
        self.n_users, self.n_items = inner.n_users, inner.n_items
        self.uses_history = inner.uses_history

    @classmethod
    def around(
        cls, inner: ResponseModel, log: InteractionLog, largest: float, report: Mapping[str, Any] | None = None
    ) -> GradedResponse:
        """Spreads feedback around a model's means as a log does.

        Args:
            inner: Expected feedback of a row as a share of ``largest``; must not read the history.
            log: A log with graded feedback.
            largest: Largest feedback.
            report: See the class.

        Raises:
            DataError: If the model reads the history.
        """
        if inner.uses_history:
            raise DataError("graded feedback needs response='factorised', 'observed' or 'auto'")
        values = _graded(log)
        rows = np.arange(0, len(log), -(-len(log) // _MAX_ROWS))
        expected = np.concatenate(
            [
                inner.expected(log.users[part], log.items[part][:, None])[:, 0]
                for part in np.split(rows, range(_BLOCK, len(rows), _BLOCK))
            ]
        )
        edges = np.quantile(expected, np.arange(1, _BINS) / _BINS).astype(np.float32) * np.float32(largest)
        group = np.searchsorted(edges, expected * np.float32(largest))
        levels = (np.arange(_LEVELS) + 0.5) / _LEVELS
        everything = np.quantile(values[rows], levels)
        quantiles = np.empty((_BINS, _LEVELS), np.float32)
        for number in range(_BINS):
            own = values[rows[group == number]]
            quantiles[number] = np.quantile(own, levels) if own.any() else everything
        return cls(inner, largest, click_from(log), edges, quantiles, report)

    def over(self, inner: ResponseModel) -> GradedResponse:
        """Returns the same spread around the means of another model."""
        return GradedResponse(inner, self.largest, self.click_from, self._edges, self._quantiles, self._report)

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """Returns expected feedback, ``float32 (B, K)``."""
        return self.inner.expected(users, items, history) * np.float32(self.largest)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """Returns expected feedback on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        return self.inner.expected_catalogue(users, n_items, history) * np.float32(self.largest)

    def session_memory(self, batch_size: int) -> SessionMemory | None:
        """See :func:`kuaifair_env.response.base.session_memory`."""
        return session_memory(self.inner, batch_size)

    def tastes(self, users: IntArray) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.TasteResponse`."""
        return response_with_tastes(self.inner).tastes(users)

    def with_tastes(self, users: IntArray, tastes: FloatArray) -> GradedResponse:
        """See :class:`~kuaifair_env.response.base.TasteResponse`."""
        return self.over(response_with_tastes(self.inner).with_tastes(users, tastes))

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """Returns the quantiles that the uniforms pick, scaled to the means, ``float32 (B, K)``."""
        group = np.searchsorted(self._edges, expected)
        drawn = self._quantiles[group, (uniforms * self._quantiles.shape[1]).astype(np.int64)]
        scaled: FloatArray = drawn * (expected / self._means[group])
        return np.minimum(scaled, np.float32(self.largest))

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """Returns where feedback is large enough for a click, ``bool (B, K)``."""
        return feedback >= np.float32(self.click_from)

    def rearranged(self, items: IntArray) -> GradedResponse:
        """Returns the same model for the catalogue ``old_items[items]``."""
        return self.over(self.inner.rearranged(items))

    def tensors(self) -> Tensors:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        own: Tensors = {"edges": self._edges, "quantiles": self._quantiles}
        return own | with_prefix(self._stored_inner.tensors(), _INNER)

    def settings(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        inner = self._stored_inner
        return {
            "largest": self.largest,
            "click_from": self.click_from,
            "report": self._report,
            "inner": {"kind": inner.kind, "settings": inner.settings()},
        }

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> GradedResponse:
        """See :class:`~kuaifair_env.response.base.StoredResponse`."""
        take_tensors(tensors, {"edges": (None,), "quantiles": (None, None)})
        edges, quantiles = tensors["edges"], tensors["quantiles"]
        if len(edges) + 1 != len(quantiles):
            raise ValueError(f"{len(quantiles)} groups need one edge less, got {len(edges)}")
        largest, click_from = (parse_as(float, settings[name]) for name in ("largest", "click_from"))
        report = parse_as(dict[str, Any], settings["report"])
        inner_class = _INNER_CLASSES[settings["inner"]["kind"]]
        inner = inner_class.restore(without_prefix(tensors, _INNER), settings["inner"]["settings"])
        return cls(inner, largest, click_from, edges, quantiles, report)

    @property
    def _stored_inner(self) -> FactorisedResponse | TwinResponse:
        """The model of the means; others than these cannot be saved."""
        if not isinstance(self.inner, FactorisedResponse | TwinResponse):
            raise ValueError(f"a graded response around a {type(self.inner).__name__} cannot be saved")
        return self.inner

    def describe(self) -> dict[str, Any]:
        """Returns kind, bounds, and the report on the means, JSON-able."""
        return {
            "kind": self.kind,
            "largest": self.largest,
            "click_from": self.click_from,
            "users": self.n_users,
            "items": self.n_items,
            "means": self.inner.describe(),
            **self._report,
        }


def rounded_log(log: InteractionLog, largest: float, seed: int) -> InteractionLog:
    """Returns a log of clicks whose chances are the graded feedback as a share of the largest.

    Fitted to it, a click model estimates expected feedback without bias, whatever the distribution of feedback.
    """
    draws = np.random.default_rng((seed, 0x6A0D)).random(len(log))
    return replace(log, clicks=draws * largest < _graded(log), feedback=None)


def _graded(log: InteractionLog) -> FloatArray:
    if log.feedback is None:
        raise DataError("the log has no graded feedback")
    return log.feedback


def click_from(log: InteractionLog) -> float:
    """Returns the graded feedback from which a row is a click.

    That is any feedback at all, unless there is some without a click, as with watch ratios.
    """
    feedback, clicks = _graded(log), log.clicks
    return float(feedback[clicks].min()) if (feedback[~clicks] > 0).any() and clicks.any() else _ANY_FEEDBACK
