"""The labelled rows that a response model is fitted and evaluated on: negatives, and the role of each row."""

from __future__ import annotations

from dataclasses import dataclass
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
        chosen = np.sort(rng.choice(len(users), split.max_rows, replace=False))
        users, items, clicks, positions = users[chosen], items[chosen], clicks[chosen], positions[chosen]
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
    clicked_rows = np.flatnonzero(log.clicks)
    pairs, first = np.unique(
        log.users[clicked_rows].astype(np.int64) * n_items + log.items[clicked_rows], return_index=True
    )
    if not len(pairs):
        raise DataError("a log of positives only needs at least one positive")
    users, items = np.divmod(pairs, n_items)
    weights = np.bincount(items, minlength=n_items).astype(np.float64)
    weights[weights > 0] **= sampling.popularity_power
    n_draws = round(len(pairs) * sampling.per_positive)
    drawn_users = users[rng.integers(0, len(users), n_draws)]
    ladder = np.cumsum(weights)
    drawn_items = np.searchsorted(ladder, rng.random(n_draws) * ladder[-1], side="right")
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
        "repeated_positives_dropped": len(clicked_rows) - len(pairs),
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
        np.concatenate([clicked_rows[first], np.full(len(drawn_users), -1)])[order],
        notes,
    )


def rate_correction(notes: dict[str, Any]) -> float:
    """Returns what to add to a fitted intercept so that its rate becomes the declared one, 0 if none is declared."""
    declared, sampled = notes.get("declared_rate"), notes.get("sampled_rate")
    if declared is None or sampled is None:
        return 0.0
    return float(np.log(declared / (1 - declared)) - np.log(sampled / (1 - sampled)))
