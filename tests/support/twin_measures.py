"""What the marginals of a twin are measured with, and the table that shows twin beside published."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sparse
from scipy.sparse.linalg import svds
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from kuaifair_env.data.clicks import kuairec_clicks
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.synthetic.config import KUAIREC

TWICE = kuairec_clicks({"watch_ratio": 2.0})
"""The click that the published marginals of KuaiRec are about."""

PANEL = replace(
    KUAIREC,
    name="Panel",
    clicks=TWICE,
    n_users=300,
    n_items=500,
    n_panel_users=60,
    n_panel_items=150,
    train_rows=30_000,
    test_rows=8_900,
)
"""A small twin of KuaiRec's layout."""


@dataclass(frozen=True)
class Row:
    """One line of the table: the published (or partial data's) value, the twin's, and how far off it may be."""

    what: str
    published: float
    twin: float
    tolerance: float

    @property
    def fits(self) -> bool:
        return bool(abs(self.twin - self.published) <= self.tolerance)


def table(title: str, rows: list[Row]) -> str:
    """Lines the rows up."""
    width = max(len(row.what) for row in rows)
    lines = [title, f"{'':{width}}  published       twin  tolerance"]
    lines += [
        f"{row.what:{width}}  {row.published:9.4g}  {row.twin:9.4g}  {row.tolerance:9.3g}"
        + ("" if row.fits else "  <- off")
        for row in rows
    ]
    return "\n".join(lines)


def quantile_rows(what: str, levels, published, values, relative=0.0, absolute=0.0) -> list[Row]:
    """Compares quantiles."""
    found = np.quantile(values, levels)
    return [
        Row(f"{what}, {100 * level:g} %", target, float(twin), absolute + relative * target)
        for level, target, twin in zip(levels, published, found, strict=True)
    ]


def gini(values) -> float:
    ordered = np.sort(np.asarray(values, float))
    places = 2 * np.arange(1, len(ordered) + 1) - len(ordered) - 1
    return float(places @ ordered / (len(ordered) * ordered.sum()))


def top_share(values, share: float) -> float:
    ordered = np.sort(np.asarray(values, float))[::-1]
    return float(ordered[: round(share * len(ordered))].sum() / ordered.sum())


def rates(rows, clicks, size):
    """Click rate and count of each row number; the rate of nothing is NaN."""
    counts = np.bincount(rows, minlength=size)
    with np.errstate(invalid="ignore"):
        return np.bincount(rows, clicks, size) / counts, counts


def true_spread(rate, count) -> float:
    """Standard deviation of rates without their binomial noise."""
    seen = count > 1
    clicks, shown = (rate * count)[seen], count[seen]
    return float(np.sqrt(np.mean(clicks * (clicks - 1) / (shown * (shown - 1))) - np.mean(rate[seen]) ** 2))


def within_user_auc(users, scores, clicks) -> float:
    """Share of (click, non-click) pairs of the same user that the scores rank rightly; ties count half."""
    order = np.lexsort((scores, users))
    users, scores, clicks = users[order], scores[order], clicks[order].astype(float)
    starts = np.r_[True, users[1:] != users[:-1]]
    ties = np.cumsum(starts | np.r_[True, scores[1:] != scores[:-1]]) - 1
    place = np.arange(len(users)) - np.flatnonzero(starts)[np.cumsum(starts) - 1]
    rank = (np.bincount(ties, place) / np.bincount(ties))[ties]
    who = np.cumsum(starts) - 1
    positives = np.bincount(who, clicks)
    pairs = positives * (np.bincount(who) - positives)
    wins = np.bincount(who, rank * clicks) - positives * (positives - 1) / 2
    return float(wins[pairs > 0].sum() / pairs.sum())


def smoothed(rows, clicks, size, weight=15.0):
    return (np.bincount(rows, clicks, size) + clicks.mean() * weight) / (np.bincount(rows, minlength=size) + weight)


@dataclass(frozen=True)
class HistoryTaste:
    """What logged history tells of taste under random exposure, all on held-out random rows."""

    quality_auc: float
    history_auc: float
    slope: float


def history_taste(train: InteractionLog, test: InteractionLog, n_users: int, n_items: int) -> HistoryTaste:
    """Adds to item quality the likeness of an item to a user's logged exposures (16 singular vectors)."""
    held_out = np.random.default_rng(0).random(len(test)) < 0.2
    fit = ~held_out
    quality = smoothed(test.items[fit], test.clicks[fit], n_items)
    user_rate = smoothed(test.users[fit], test.clicks[fit], n_users, 3.0)
    matrix = sparse.csr_matrix((np.ones(len(train)), (train.users, train.items)), (n_users, n_items))
    matrix = matrix @ sparse.diags(1 / np.sqrt(np.bincount(train.items, minlength=n_items) + 5.0))
    items = svds(matrix, 16, random_state=0)[2].T
    users = matrix @ items
    users /= np.linalg.norm(users, axis=1, keepdims=True) + 1e-9
    items = items / (np.linalg.norm(items, axis=1, keepdims=True) + 1e-9)
    items -= items.mean(0)
    likeness = np.einsum("rd,rd->r", users[test.users], items[test.items])
    inputs = np.c_[logit(quality[test.items]), logit(user_rate[test.users]), likeness / likeness.std()]
    model = LogisticRegression(C=1e3).fit(inputs[fit], test.clicks[fit])
    scores, clicks, who = inputs[held_out] @ model.coef_[0], test.clicks[held_out], test.users[held_out]
    return HistoryTaste(
        within_user_auc(who, quality[test.items[held_out]], clicks),
        within_user_auc(who, scores, clicks),
        float(model.coef_[0][2]),
    )


def additive_fit(matrix, seen=None, steps=25):
    """Click probabilities of a logit-additive user + item model of a full matrix, fitted on the seen cells."""
    seen = np.ones(matrix.shape) if seen is None else seen.astype(float)
    users = np.zeros((len(matrix), 1))
    items = logit(np.clip((matrix * seen).sum(0, keepdims=True) / seen.sum(0, keepdims=True), 1e-3, 0.99))
    for _ in range(steps):
        for side, axis in ((users, 1), (items, 0)):
            chance = expit(users + items)
            gap = ((matrix - chance) * seen).sum(axis, keepdims=True)
            side += np.clip(gap / ((chance * (1 - chance) * seen).sum(axis, keepdims=True) + 1e-3), -1, 1)
    return expit(users + items)


def taste_spectrum(matrix):
    """Singular values of the additive fit's Pearson residuals over the Marchenko-Pastur edge.

    Items with fewer than 20 positives are left out.
    """
    matrix = matrix[:, matrix.sum(0) >= 20].astype(np.float64)
    chance = additive_fit(matrix)
    residuals = (matrix - chance) / np.sqrt(chance * (1 - chance) + 1e-9)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(residuals @ residuals.T)[::-1], 0))
    return values / np.sqrt(matrix.shape).sum()


def held_out_gain(matrix, rank=10):
    """AUC on 20 % held-out cells of the additive fit, and of the fit with its residuals' best rank-10 part."""
    matrix = matrix[:, matrix.sum(0) >= 20].astype(np.float64)
    held_out = np.random.default_rng(0).random(matrix.shape) < 0.2
    chance = additive_fit(matrix, ~held_out)
    spread = np.sqrt(chance * (1 - chance))
    residuals = np.where(held_out, 0.0, (matrix - chance) / spread)
    vectors = np.linalg.eigh(residuals @ residuals.T)[1][:, -rank:]
    better = chance + spread * (vectors @ (vectors.T @ residuals))
    return tuple(float(roc_auc_score(matrix[held_out], scores[held_out])) for scores in (chance, better))
