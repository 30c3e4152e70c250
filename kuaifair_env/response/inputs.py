"""What a response model may know of users and items: their features, and what a context log says about them.

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
from kuaifair_env.data.schema import BoolArray, FeatureTable, FloatArray, InteractionLog
from kuaifair_env.errors import DataError

if TYPE_CHECKING:
    import scipy.sparse as sp


_ROLES = ("fit", "stop", "calibrate", "report")


@dataclass(frozen=True)
class SplitConfig:
    """Shares of the rows by role; the rest is fitted on.

    Attributes:
        stop: Rows that decide when to stop.
        calibrate: Rows that set the final offset and slopes.
        report: Rows that every reported figure comes from; nothing else touches them.
        max_rows: At most so many rows are used, drawn uniformly (a fit gains little from more); None takes all.
    """

    stop: float = 0.05
    calibrate: float = 0.05
    report: float = 0.10
    max_rows: int | None = 2_000_000

    def __post_init__(self) -> None:
        shares = (self.stop, self.calibrate, self.report)
        if min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"shares of rows must be above 0 and sum to less than 1, got {shares}")


@dataclass(frozen=True)
class NegativeSampling:
    """How non-clicks are drawn for a log that lists positives only.

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
    """

    per_positive: float = 4.0
    popularity_power: float = 0.5
    positive_rate: float | None = None

    def __post_init__(self) -> None:
        if not self.per_positive > 0 or not 0 <= self.popularity_power <= 1:
            raise ValueError("per_positive must be above 0 and popularity_power within 0..1")
        if self.positive_rate is not None and not 0 < self.positive_rate < 1:
            raise ValueError(f"positive_rate must lie between 0 and 1, got {self.positive_rate}")


@dataclass(frozen=True)
class LabelledRows:
    """Rows with both labels, and the role of each.

    Attributes:
        users: ``int64 (R,)``.
        items: ``int64 (R,)``.
        clicks: ``bool (R,)``.
        positions: ``int64 (R,)``, each row's position in its log; -1 for drawn negatives.
        roles: ``int8 (R,)``, 0 fit, 1 stop, 2 calibrate, 3 report.
        notes: What was drawn and dropped, JSON-able.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: BoolArray
    positions: NDArray[np.int64]
    roles: NDArray[np.int8]
    notes: dict[str, Any]

    def where(self, role: str) -> NDArray[np.int64]:
        """Returns the positions of the rows with a role: ``fit``, ``stop``, ``calibrate`` or ``report``."""
        return np.flatnonzero(self.roles == _ROLES.index(role))


def labelled_rows(
    log: InteractionLog,
    n_items: int,
    split: SplitConfig,
    negatives: NegativeSampling,
    seed: int,
    known: InteractionLog | None = None,
) -> LabelledRows:
    """Returns the rows of a log with both labels and random roles, the same for every model of one seed.

    Args:
        log: Exposures with clicks; a log of positives only gets drawn negatives.
        n_items: Size of the catalogue.
        split: Shares of the roles.
        negatives: Used when ``log.positives_only``.
        seed: Seed of roles and draws.
        known: Another log whose clicks are not drawn as negatives either.

    Raises:
        DataError: If a role would lack clicks or non-clicks.
    """
    rng = np.random.default_rng((seed, 0x5EED))
    users, items = log.users.astype(np.int64), log.items.astype(np.int64)
    clicks, positions = log.clicks, np.arange(len(log))
    notes: dict[str, Any] = {"logged_rows": len(log), "negatives": "logged non-clicks"}
    if log.positives_only:
        users, items, clicks, positions, drawn = _with_negatives(log, known, n_items, negatives, rng)
        notes |= drawn
    if split.max_rows is not None and len(users) > split.max_rows:
        kept = np.sort(rng.choice(len(users), split.max_rows, replace=False))
        users, items, clicks, positions = users[kept], items[kept], clicks[kept], positions[kept]
    edges = np.cumsum([1 - split.stop - split.calibrate - split.report, split.stop, split.calibrate])
    roles = np.searchsorted(edges, rng.random(len(users)), side="right").astype(np.int8)
    rows = LabelledRows(users, items, clicks, positions, roles, notes | {"rows_used": len(users)})
    for role in _ROLES:
        labels = clicks[rows.where(role)]
        if not labels.any() or labels.all():
            raise DataError(
                f"the log is too small to fit and evaluate a response model: of {len(users)} rows, the {len(labels)} "
                f"with role '{role}' hold {int(labels.sum())} clicks; some hundred rows of both kinds are needed"
            )
    return rows


def _with_negatives(
    log: InteractionLog,
    known: InteractionLog | None,
    n_items: int,
    sampling: NegativeSampling,
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64], BoolArray, NDArray[np.int64], dict[str, Any]]:
    kept = np.flatnonzero(log.clicks)
    pairs, first = np.unique(log.users[kept].astype(np.int64) * n_items + log.items[kept], return_index=True)
    if not len(pairs):
        raise DataError("a log of positives only needs at least one positive")
    users, items = np.divmod(pairs, n_items)
    weights = np.bincount(items, minlength=n_items).astype(np.float64)
    weights[weights > 0] **= sampling.popularity_power
    asked = round(len(pairs) * sampling.per_positive)
    drawn_users = users[rng.integers(0, len(users), asked)]
    ladder = np.cumsum(weights)
    drawn_items = np.searchsorted(ladder, rng.random(asked) * ladder[-1], side="right")
    drawn = drawn_users * n_items + drawn_items
    clash = np.isin(drawn, pairs)
    if known is not None:
        clash |= np.isin(
            drawn, known.users[known.clicks].astype(np.int64) * n_items + known.items[known.clicks]
        )
    drawn_users, drawn_items = drawn_users[~clash], drawn_items[~clash]
    notes = {
        "negatives": (
            f"drawn: {sampling.per_positive:g} per positive, items weighted by positives ** "
            f"{sampling.popularity_power:g}, the user's own positives excluded"
        ),
        "positives_used": len(pairs),
        "repeated_positives_dropped": len(kept) - len(pairs),
        "negatives_drawn": len(drawn_users),
        "negatives_dropped_as_positive": int(clash.sum()),
        "sampled_rate": len(pairs) / (len(pairs) + len(drawn_users)),
        "declared_rate": sampling.positive_rate,
    }
    order = np.argsort(np.concatenate([users, drawn_users]), kind="stable")
    return (
        np.concatenate([users, drawn_users])[order],
        np.concatenate([items, drawn_items])[order],
        np.concatenate([np.ones(len(users), np.bool_), np.zeros(len(drawn_users), np.bool_)])[order],
        np.concatenate([kept[first], np.full(len(drawn_users), -1)])[order],
        notes,
    )


def rate_correction(notes: dict[str, Any]) -> float:
    """Returns what to add to a fitted intercept so that its rate becomes the declared one, 0 if none is declared."""
    declared, sampled = notes.get("declared_rate"), notes.get("sampled_rate")
    if declared is None or sampled is None:
        return 0.0
    return float(np.log(declared / (1 - declared)) - np.log(sampled / (1 - sampled)))


_CONSTANT = 1e-6


@dataclass(frozen=True)
class InputConfig:
    """How much a context log is condensed, and how strongly small counts are shrunk.

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

    Args:
        data: Users, items, features, tags.
        context: A log that the model is not fitted on, or None.
        config: Ranks and pseudo-counts.
        seed: Seed of the SVD.
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

    def by_user(weights: NDArray[Any]) -> sp.csr_matrix[np.float32]:
        return sp.csr_matrix((weights, (log.users, log.items)), shape=(n_users, n_items))

    of_clicks, of_exposures, of_surprise = by_user(clicks), by_user(np.ones_like(clicks)), by_user(surprise)
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


def _smoothed_logit(
    clicks: NDArray[Any], shown: NDArray[Any], rate: float, pseudo: float
) -> NDArray[np.float64]:
    smoothed = np.clip((clicks + pseudo * rate) / (shown + pseudo), 1e-4, 1 - 1e-4)
    return np.log(smoothed / (1.0 - smoothed))


def _item_factors(clicks: sp.csr_matrix[np.float32], rank: int, seed: int) -> FloatArray:
    """Right singular vectors, times their values, of the click matrix with degrees damped; the first is dropped.

    The first singular vector of a non-negative matrix is popularity, which the rates already hold.
    """
    import scipy.sparse as sp
    from scipy.sparse.linalg import svds

    n_users, n_items = clicks.shape
    rank = min(rank, min(n_users, n_items) - 2)
    if rank < 1 or clicks.sum() == 0:
        return np.zeros((n_items, 0), np.float32)
    binary = clicks.copy()
    binary.data = (binary.data > 0).astype(np.float64)
    damp_u = 1.0 / np.sqrt(np.asarray(binary.sum(1)).ravel() + 5.0)
    damp_i = 1.0 / np.sqrt(np.asarray(binary.sum(0)).ravel() + 5.0)
    damped = sp.diags(damp_u) @ binary @ sp.diags(damp_i)
    start = np.random.default_rng(seed).normal(size=min(damped.shape))
    _, values, right = svds(damped, k=rank + 1, v0=start)
    order = np.argsort(-values)[1:]
    factors = right[order].T * values[order] * damp_i[:, None]
    spread = factors.std(axis=0)
    return np.asarray(factors / np.where(spread > 0, spread, 1.0), np.float32)


def _standardised(parts: list[tuple[NDArray[Any], str]]) -> FeatureTable:
    blocks, names = [], []
    for values, prefix in parts:
        centred = values - values.mean(axis=0, keepdims=True, dtype=np.float64)
        spread = centred.std(axis=0)
        kept = spread > _CONSTANT
        blocks.append((centred[:, kept] / spread[kept]).astype(np.float32))
        names += [f"{prefix or 'feature '}{column}" for column in np.flatnonzero(kept)]
    return FeatureTable(np.concatenate(blocks, axis=1), tuple(names))
