"""The labelled rows that a response model is fitted and evaluated on: negatives, and the role of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response.config import NegativeSampling, SplitConfig

_ROLES = ("fit", "stop", "calibrate", "report")


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

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: NDArray[np.int64]) -> LabelledRows:
        """Returns some of the rows."""
        return LabelledRows(
            self.users[rows],
            self.items[rows],
            self.clicks[rows],
            self.positions[rows],
            self.roles[rows],
            self.notes,
        )

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
    if log.positives_only:
        rows = _with_negatives(log, known, n_items, negatives, rng)
    else:
        rows = LabelledRows(
            log.users.astype(np.int64),
            log.items.astype(np.int64),
            log.clicks,
            np.arange(len(log)),
            np.zeros(len(log), np.int8),
            {"negatives": "logged non-clicks"},
        )
    if split.max_rows is not None and len(rows) > split.max_rows:
        rows = rows.take(np.sort(rng.choice(len(rows), split.max_rows, replace=False)))
    edges = np.cumsum([1 - split.stop - split.calibrate - split.report, split.stop, split.calibrate])
    roles = np.searchsorted(edges, rng.random(len(rows)), side="right").astype(np.int8)
    notes = {"logged_rows": len(log), **rows.notes, "rows_used": len(rows)}
    rows = replace(rows, roles=roles, notes=notes)
    for role in _ROLES:
        labels = rows.clicks[rows.where(role)]
        if not labels.any() or labels.all():
            raise DataError(
                f"the log is too small to fit and evaluate a response model: of {len(rows)} rows, the {len(labels)} "
                f"with role '{role}' hold {int(labels.sum())} clicks; some hundred rows of both kinds are needed"
            )
    return rows


def _with_negatives(
    log: InteractionLog,
    known: InteractionLog | None,
    n_items: int,
    sampling: NegativeSampling,
    rng: np.random.Generator,
) -> LabelledRows:
    """Returns the distinct positives of a log with drawn negatives, sorted by user; all roles are 0."""
    clicked_rows = np.flatnonzero(log.clicks)
    pairs, first = np.unique(
        log.users[clicked_rows].astype(np.int64) * n_items + log.items[clicked_rows], return_index=True
    )
    if not len(pairs):
        raise DataError("a log of positives only needs at least one positive")
    drawn = _drawn_pairs(pairs, n_items, sampling, rng)
    is_positive = np.isin(drawn, pairs)
    if known is not None:
        known_pairs = known.users[known.clicks].astype(np.int64) * n_items + known.items[known.clicks]
        is_positive |= np.isin(drawn, known_pairs)
    negatives = drawn[~is_positive]
    users, items = np.divmod(np.concatenate([pairs, negatives]), n_items)
    rows = LabelledRows(
        users,
        items,
        np.arange(len(users)) < len(pairs),
        np.concatenate([clicked_rows[first], np.full(len(negatives), -1)]),
        np.zeros(len(users), np.int8),
        {
            "negatives": (
                f"drawn: {sampling.per_positive:g} per positive, items weighted by positives ** "
                f"{sampling.popularity_power:g}, the user's own positives excluded"
            ),
            "positives_used": len(pairs),
            "repeated_positives_dropped": len(clicked_rows) - len(pairs),
            "negatives_drawn": len(negatives),
            "negatives_dropped_as_positive": int(is_positive.sum()),
            "sampled_rate": len(pairs) / len(users),
            "declared_rate": sampling.positive_rate,
        },
    )
    return rows.take(np.argsort(users, kind="stable"))


def _drawn_pairs(
    positives: NDArray[np.int64], n_items: int, sampling: NegativeSampling, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draws ``user * n_items + item``: users by their positives, items by a power of theirs."""
    users, items = np.divmod(positives, n_items)
    weights = np.bincount(items, minlength=n_items).astype(np.float64)
    weights[weights > 0] **= sampling.popularity_power
    n_draws = round(len(positives) * sampling.per_positive)
    drawn_users = users[rng.integers(0, len(users), n_draws)]
    cumulated = np.cumsum(weights)
    drawn_items = np.searchsorted(cumulated, rng.random(n_draws) * cumulated[-1], side="right")
    return np.asarray(drawn_users * n_items + drawn_items, np.int64)


def rate_correction(notes: dict[str, Any]) -> float:
    """Returns what to add to a fitted intercept so that its rate becomes the declared one, 0 if none is declared."""
    declared, sampled = notes.get("declared_rate"), notes.get("sampled_rate")
    if declared is None or sampled is None:
        return 0.0
    return float(np.log(declared / (1 - declared)) - np.log(sampled / (1 - sampled)))
