"""Inputs of response models: features of users and items, and what a context log says about them.

The context log is one that the model is *not* fitted on (the training log for a test world, the earlier part of
the training log for a training world). Item factors here are the response model's own: a truncated SVD of the
context log with the model's seed and rank. Agents' embeddings are never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FeatureTable, FloatArray, InteractionLog

if TYPE_CHECKING:
    import scipy.sparse as sp


_CONSTANT = 1e-6
_POWER_ITERATIONS = 7


@dataclass(frozen=True)
class InputConfig:
    """Settings of the inputs: rank of the context log's SVD, and pseudo-counts that shrink small counts.

    Attributes:
        history_factors: Rank of the SVD whose item factors are pooled over a user's history; 0 leaves them out.
        item_pseudo_count: Exposures at the mean rate that are added to an item's click rate.
        user_pseudo_count: The same for a user's click rate and pooled history.
        tag_pseudo_count: The same for a user's clicks within one tag.
    """

    history_factors: int = 32
    item_pseudo_count: float = 20.0
    user_pseudo_count: float = 10.0
    tag_pseudo_count: float = 5.0


@dataclass(frozen=True)
class ResponseInputs:
    """Standardised inputs ``x_u`` and ``y_i`` of a response model.

    Attributes:
        users: One row per user.
        items: One row per item.
        context_rows: Rows of the context log, 0 without one.
    """

    users: FeatureTable
    items: FeatureTable
    context_rows: int


def response_inputs(
    data: InteractionData, context: InteractionLog | None, config: InputConfig, seed: int
) -> ResponseInputs:
    """Builds the inputs of all users and items of a data set.

    Users: their features; click rate, number of exposures; the mean SVD factor of what they clicked, of what they
    were shown, and of clicks beyond what the item's and their own rate predict; the same three per tag.
    Items: their features and tags; click rate, number of exposures, and SVD factor in the context log.

    ``context`` is a log that the model is not fitted on, or None; ``seed`` is that of the SVD.
    """
    tags = data.items.tags.astype(np.float32)
    user_parts = [(data.users.features.values, "")]
    item_parts = [(data.items.features.values, ""), (tags, "tag ")]
    if context is not None and len(context):
        of_users, of_items = _context_parts(context, tags, len(data.users), len(data.items), config, seed)
        user_parts += of_users
        item_parts += of_items
    return ResponseInputs(
        _standardised(user_parts),
        _standardised(item_parts),
        0 if context is None else len(context),
    )


def _context_parts(
    log: InteractionLog, tags: FloatArray, n_users: int, n_items: int, config: InputConfig, seed: int
) -> tuple[list[tuple[NDArray[Any], str]], list[tuple[NDArray[Any], str]]]:
    import scipy.sparse as sp

    clicks = log.clicks.astype(np.float32)
    rate = float(np.clip(clicks.mean(), 1e-4, 1 - 1e-4))
    shown_u, shown_i = np.bincount(log.users, minlength=n_users), log.exposures(n_items)
    clicked_u = np.bincount(log.users, clicks, minlength=n_users)
    logit_u = _smoothed_logit(clicked_u, shown_u, rate, config.user_pseudo_count)
    logit_i = _smoothed_logit(log.click_counts(n_items), shown_i, rate, config.item_pseudo_count)
    expected = 1.0 / (1.0 + np.exp(np.log(1 / rate - 1) - logit_u[log.users] - logit_i[log.items]))
    surprise = (clicks - expected).astype(np.float32)

    starts = log.offsets(n_users).astype(np.int32)
    of_exposures, of_surprise = (
        sp.csr_matrix((weights, log.items, starts), shape=(n_users, n_items))
        for weights in (np.ones_like(clicks), surprise)
    )
    clicked = log.take(log.clicks)
    of_clicks = sp.csr_matrix(
        (np.ones(len(clicked), np.float32), clicked.items, clicked.offsets(n_users).astype(np.int32)),
        shape=(n_users, n_items),
    )
    of_clicks.sum_duplicates()
    per_exposure = (shown_u + config.user_pseudo_count)[:, None]
    per_click = (clicked_u + config.user_pseudo_count)[:, None]
    users: list[tuple[NDArray[Any], str]] = [(np.column_stack([logit_u, np.log1p(shown_u)]), "context rate ")]
    items: list[tuple[NDArray[Any], str]] = [(np.column_stack([logit_i, np.log1p(shown_i)]), "context rate ")]
    factors = _item_factors(of_clicks, config.history_factors, seed)
    if factors.shape[1]:
        users += [
            (of_clicks @ factors / per_click, "clicked factor "),
            (of_exposures @ factors / per_exposure, "shown factor "),
            (of_surprise @ factors / per_exposure, "surprising factor "),
        ]
        items.append((factors, "factor "))
    if tags.shape[1]:
        shares = tags / np.maximum(tags.sum(1, keepdims=True), 1.0)
        shown = of_exposures @ shares
        users += [
            (of_clicks @ shares / per_click, "clicked tag "),
            (shown / per_exposure, "shown tag "),
            (of_surprise @ shares / (shown + config.tag_pseudo_count), "surprising tag "),
        ]
    return users, items


def _smoothed_logit(clicks: NDArray[Any], shown: NDArray[Any], rate: float, pseudo: float) -> NDArray[np.float64]:
    smoothed = np.clip((clicks + pseudo * rate) / (shown + pseudo), 1e-4, 1 - 1e-4)
    return np.log(smoothed / (1.0 - smoothed))


def _item_factors(clicks: sp.csr_matrix[np.float32], rank: int, seed: int) -> FloatArray:
    """Right singular vectors, times their values, of the click matrix with degrees damped; the first is dropped.

    The first singular vector of a non-negative matrix is popularity, which the rates already hold.
    """
    import scipy.sparse as sp
    from sklearn.utils.extmath import randomized_svd

    n_users, n_items = clicks.shape
    rank = min(rank, min(n_users, n_items) - 2)
    if rank < 1 or clicks.sum() == 0:
        return np.zeros((n_items, 0), np.float32)
    binary = clicks.astype(np.float64)
    binary.data[:] = 1.0
    damp_u = 1.0 / np.sqrt(np.asarray(binary.sum(1)).ravel() + 5.0)
    damp_i = 1.0 / np.sqrt(np.asarray(binary.sum(0)).ravel() + 5.0)
    damped = sp.diags(damp_u) @ binary @ sp.diags(damp_i)
    _, values, right = randomized_svd(damped, rank + 1, n_iter=_POWER_ITERATIONS, random_state=seed)
    factors = right[1:].T * values[1:] * damp_i[:, None]
    # Their signs are the linear algebra library's choice: the largest component of each is made positive.
    factors *= np.sign(factors[np.abs(factors).argmax(axis=0), np.arange(factors.shape[1])])
    spread = factors.std(axis=0)
    return np.asarray(factors / np.where(spread > 0, spread, 1.0), np.float32)


def _standardised(parts: list[tuple[NDArray[Any], str]]) -> FeatureTable:
    blocks, names = [], []
    for values, prefix in parts:
        centred = values - values.mean(axis=0, keepdims=True, dtype=np.float64)
        spread = centred.std(axis=0)
        varies = spread > _CONSTANT
        blocks.append((centred[:, varies] / spread[varies]).astype(np.float32))
        names += [f"{prefix or 'feature '}{column}" for column in np.flatnonzero(varies)]
    return FeatureTable(np.concatenate(blocks, axis=1), tuple(names))
