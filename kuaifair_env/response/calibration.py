"""Measures of click probabilities on held-out rows: ranking, level, and the slope of each part of the logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, IntArray
from kuaifair_env.errors import DataError

Vector = NDArray[np.floating[Any]]
Interval = tuple[float, float]

_TINY = 1e-7


def auc(clicks: BoolArray, scores: Vector) -> float:
    """Returns the area under the ROC curve: P(a click scores above a non-click), ties counting half.

    Raises:
        DataError: If all rows are clicks or none is.
    """
    from sklearn.metrics import roc_auc_score

    _need_both(clicks)
    return float(roc_auc_score(clicks, scores))


def log_loss(clicks: BoolArray, probabilities: Vector) -> float:
    """Returns the mean negative log-likelihood in nats; probabilities are kept 1e-7 away from 0 and 1."""
    p = np.clip(np.asarray(probabilities, np.float64), _TINY, 1.0 - _TINY)
    return float(-np.where(clicks, np.log(p), np.log1p(-p)).mean())


def expected_calibration_error(clicks: BoolArray, probabilities: Vector, bins: int = 15) -> float:
    """Returns the gap between probability and click rate, averaged over rows in equal-width bins of probability.

    Source: Guo, Pleiss, Sun and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, eq. 3.
    """
    place = np.minimum((np.asarray(probabilities, np.float64) * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, np.asarray(clicks, np.float64) - probabilities, minlength=bins)
    return float(np.abs(gap).sum() / len(place))


@dataclass(frozen=True)
class WithinUserAUC:
    """AUC of each user's own rows, for users with a click and a non-click ("GAUC").

    Attributes:
        users: User rows.
        values: Each user's AUC, ties counting half.
        weights: Each user's number of rows.
    """

    users: NDArray[np.int64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Mean over users, weighted by their rows."""
        return float(np.average(self.values, weights=self.weights))

    def interval(self, resamples: int = 1000) -> Interval:
        """Returns a 95 % percentile bootstrap interval of the mean, resampling users."""
        return _bootstrap(self.values * self.weights, self.weights, resamples)

    def gain_over(self, other: WithinUserAUC) -> tuple[float, Interval]:
        """Returns the difference of two means over the same rows, and its paired bootstrap interval over users."""
        if not np.array_equal(self.users, other.users) or not np.array_equal(self.weights, other.weights):
            raise ValueError("a paired comparison needs the same rows of the same users on both sides")
        totals = (self.values - other.values) * self.weights
        gain = float(totals.sum() / self.weights.sum())
        return gain, _bootstrap(totals, self.weights)


def within_user_auc(users: IntArray, clicks: BoolArray, scores: Vector) -> WithinUserAUC:
    """Computes the AUC within each user's rows, to which user and base rates cannot contribute.

    Args:
        users: ``(R,)`` user rows, in any order.
        clicks: ``(R,)``.
        scores: ``(R,)``, anything increasing in the click probability.

    Raises:
        DataError: If no user has both a click and a non-click.
    """
    order = np.lexsort((scores, users))
    u, s = np.asarray(users)[order], np.asarray(scores)[order]
    y = np.asarray(clicks)[order].astype(np.float64)
    starts_user = np.r_[True, u[1:] != u[:-1]]
    starts_tie = starts_user | np.r_[True, s[1:] != s[:-1]]
    tie = np.cumsum(starts_tie) - 1
    group = np.cumsum(starts_user) - 1
    position = np.arange(len(u)) - np.flatnonzero(starts_user)[group] + 1.0
    rank = (np.bincount(tie, position) / np.bincount(tie))[tie]
    rows, positives = np.bincount(group).astype(np.float64), np.bincount(group, y)
    negatives = rows - positives
    both_labels = (positives > 0) & (negatives > 0)
    if not both_labels.any():
        raise DataError("no user has both a click and a non-click, so there is no within-user AUC")
    above = np.bincount(group, rank * y) - positives * (positives + 1) / 2
    values = above[both_labels] / (positives * negatives)[both_labels]
    return WithinUserAUC(u[starts_user][both_labels].astype(np.int64), values, rows[both_labels])


@dataclass(frozen=True)
class Slopes:
    """Logistic regression of clicks on known logits: where a fit is calibrated, every slope is 1.

    Attributes:
        offset: Constant.
        values: One slope per part of the logit.
        errors: Their standard errors; 0 for a part that is constant, whose slope stays 1.
    """

    offset: float
    values: NDArray[np.float64]
    errors: NDArray[np.float64]

    def describe(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Returns slope and standard error of each part by its name, JSON-able."""
        pairs = zip(self.values.tolist(), self.errors.tolist(), strict=True)
        return {name: {"slope": slope, "error": error} for name, (slope, error) in zip(names, pairs, strict=True)}


def logit_slopes(clicks: BoolArray, parts: Vector, prior_scale: float | None = None) -> Slopes:
    """Fits ``P(click) = sigmoid(offset + sum_j slope_j * parts_j)`` (Platt's scaling, one slope per part).

    Args:
        clicks: ``(R,)``.
        parts: ``(R, parts)``, which add up to the logit.
        prior_scale: Standard deviation of a normal prior around slope 1; None for maximum likelihood.

    Raises:
        DataError: If all rows are clicks or none is.
    """
    _need_both(clicks)
    design = np.column_stack([np.ones(len(parts)), np.asarray(parts, np.float64)])
    centre = np.r_[0.0, np.ones(design.shape[1] - 1)]
    # A constant part (no taste, say) has no slope to find: a faint pull to 1 keeps it there.
    precision = np.diag(centre * (1e-6 + (0.0 if prior_scale is None else prior_scale**-2)))
    weights = centre.copy()
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30, 30)))
        hessian = (design * (p * (1 - p))[:, None]).T @ design + precision
        gradient = design.T @ (p - clicks) + precision @ (weights - centre)
        step = np.linalg.solve(hessian, gradient)
        weights = weights - step * min(1.0, 2.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    errors = np.sqrt(np.diag(np.linalg.inv(hessian)))[1:]
    errors[design[:, 1:].std(axis=0) == 0] = 0.0
    return Slopes(float(weights[0]), weights[1:], errors)


def assess(users: IntArray, clicks: BoolArray, probabilities: Vector) -> dict[str, Any]:
    """Returns every measure of this module for one set of held-out rows, JSON-able."""
    within = within_user_auc(users, clicks, probabilities)
    return {
        "rows": len(clicks),
        "users": len(np.unique(users)),
        "auc": auc(clicks, probabilities),
        "within_user_auc": within.mean,
        "within_user_auc_interval": list(within.interval()),
        "within_user_auc_users": len(within.users),
        "log_loss": log_loss(clicks, probabilities),
        "expected_calibration_error": expected_calibration_error(clicks, probabilities),
        "predicted_rate": float(np.mean(probabilities, dtype=np.float64)),
        "logged_rate": float(np.mean(clicks)),
    }


def _need_both(clicks: BoolArray) -> None:
    if not len(clicks) or np.all(clicks) or not np.any(clicks):
        raise DataError("needs rows with clicks and rows without; got only one kind")


def _bootstrap(totals: NDArray[np.float64], weights: NDArray[np.float64], resamples: int = 1000) -> Interval:
    rng = np.random.default_rng(0)
    means = np.empty(resamples)
    for k in range(resamples):
        drawn = rng.integers(0, len(totals), len(totals))
        means[k] = totals[drawn].sum() / weights[drawn].sum()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
