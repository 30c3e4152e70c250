"""A logistic click model from the training log: past click rate, popularity and the observed state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog, among
from kuaifair_env.embeddings import item_embeddings, unit_rows
from kuaifair_env.errors import DataError
from kuaifair_env.pooling import mean_embeddings
from kuaifair_env.splits import held_out_users, user_folds
from kuaifair_env.world import World, windows_before

DEFAULT_SAMPLE = 200_000
FEATURES = ("click_rate", "popularity", "similarity")

_FOLDS = 2
_PRIOR_EXPOSURES = 20.0
_ROWS_AT_ONCE = 1_000
_NEGATIVE_DRAWS = 20
_DRAWN_NEGATIVES = "one uniformly drawn candidate for each positive, never clicked by the user"


@dataclass(frozen=True)
class ScorerReport:
    """How a scorer was fitted, and how well it ranks exposures of held-out users.

    Attributes:
        rows: Exposures that the coefficients were fitted on.
        held_out_rows: Exposures of held-out users that the two AUCs were measured on.
        auc: Area under the ROC curve over those exposures.
        within_user_auc: Mean AUC within each held-out user, which does not depend on how much users click.
        intercept: Log-odds at average features.
        coefficients: Log-odds per unit of each of ``FEATURES``.
        negatives: ``"exposures without a click"``, or how they were drawn where the log has none.
    """

    rows: int
    held_out_rows: int
    auc: float | None
    within_user_auc: float | None
    intercept: float
    coefficients: dict[str, float]
    negatives: str


@dataclass(frozen=True)
class ClickScorer:
    """A logistic model of clicks with three inputs, all of them from the training log.

    The log-odds of a click on item ``i`` in state ``s~`` are linear in

    * ``click_rate``: the item's smoothed log-odds of a click in the log,
    * ``popularity``: its log exposure count, standardised over the items,
    * ``similarity``: ``cos(s~, e_i)``, zero for an empty state.

    The greedy controls rank by it. It reads neither the response model nor the test log.

    Attributes:
        item_scores: ``float32 (N,)``, the part of the log-odds that does not depend on the state.
        directions: ``float32 (d, N)``, unit item embeddings times the coefficient of the similarity.
        report: How it was fitted.
    """

    item_scores: FloatArray
    directions: FloatArray
    report: ScorerReport = field(compare=False)

    @property
    def n_items(self) -> int:
        """Number of candidates ``N``."""
        return len(self.item_scores)

    def score(self, states: FloatArray) -> FloatArray:
        """Returns the log-odds of a click on every candidate.

        Args:
            states: ``float32 (B, d)``, observed states ``s~``.

        Returns:
            ``float32 (B, N)``.

        Raises:
            ValueError: If the states have another dimension than the embeddings.
        """
        states = np.asarray(states, np.float32)
        if states.ndim != 2 or states.shape[1] != len(self.directions):
            raise ValueError(f"states must be (B, {len(self.directions)}), got {states.shape}")
        scores: FloatArray = unit_rows(states) @ self.directions
        scores += self.item_scores
        return scores

    @classmethod
    def fit(cls, world: World, *, sample: int = DEFAULT_SAMPLE, seed: int = 0) -> ClickScorer:
        """Fits the model to the training log of a world.

        The coefficients come from exposures of users who are not held out, and the state of an exposure from the
        history window before it. An item's click rate and embedding would already hold the click that they are to
        explain, so users are split in two halves and each half is described by the other's. The fitted model then
        takes click rates of all users who are not held out, and the world's embeddings.

        A log of positives only has no click rate and no real negatives: each positive is then paired with one
        candidate, drawn uniformly, that the user never clicked, and ``click_rate`` is left out. Scores of such a
        log rank what users choose, not what they like when shown.

        Args:
            world: Its candidates, embeddings and training log are read; its response and test log are not.
            sample: Largest number of exposures to fit on.
            seed: Seed of the sampling.

        Raises:
            DataError: If the log has no clicks, or nothing but clicks without being marked as positives only.
            ValueError: If ``sample`` is less than 100.
        """
        if world.item_term is not None:
            raise DataError("a world with an item term is scored by ClickScorer.of_item_term")
        if sample < 100:
            raise ValueError(f"a sample of {sample} exposures is too small; give at least 100")
        log = world.data.train
        learning = _learning_users(world)
        if not learning[log.users].any():
            raise DataError("every user of the training log is held out; the click scorer has nobody to learn from")
        rng = np.random.default_rng(seed)
        train = _sampled(log, np.flatnonzero(learning[log.users]), sample, rng)
        held_out = _sampled(log, np.flatnonzero(~learning[log.users]), sample // 2, rng)
        fitted = _cross_fitted_examples(world, train, learning, rng)
        intercept, coefficients = _logistic(fitted, not log.positives_only)
        check = _examples(log, held_out, _items_described_by(learning, world), world, rng)
        auc, within = _ranking_quality(check, intercept + check.features @ coefficients)
        final = _item_table(log, learning, world, world.embeddings)
        return cls(
            item_scores=np.asarray(intercept + final.fixed[: world.n_items] @ coefficients[:2], np.float32),
            directions=np.ascontiguousarray((final.units[: world.n_items] * np.float32(coefficients[2])).T),
            report=ScorerReport(
                rows=len(fitted.clicks),
                held_out_rows=len(check.clicks),
                auc=auc,
                within_user_auc=within,
                intercept=float(intercept),
                coefficients={name: float(value) for name, value in zip(FEATURES, coefficients, strict=True)},
                negatives=_DRAWN_NEGATIVES if log.positives_only else "exposures without a click",
            ),
        )

    @classmethod
    def of_item_term(cls, world: World, fitted: ClickScorer, similarity: float | None) -> ClickScorer:
        """Returns a scorer that takes the world's item term for the quality of items.

        Where the term was calibrated on unbiased feedback the log-odds are the term plus ``similarity * cos(s~, e_i)``,
        both as calibrated. Otherwise the term takes the place of the log's click rate in the fitted model, on the
        click rate's scale; popularity and similarity keep their coefficients.

        Args:
            world: A world with an item term, which its embeddings hold as their last coordinate.
            fitted: The scorer of the same world without the term.
            similarity: Calibrated log-odds per unit of similarity, or None.
        """
        assert world.item_term is not None
        units = unit_rows(world.embeddings[: world.n_items])
        if similarity is None:
            items = fitted.with_click_rates(world, world.item_term).item_scores
            similarity = fitted.report.coefficients["similarity"]
        else:
            items = world.item_term[: world.n_items]
        directions = np.ascontiguousarray((units * np.float32(similarity)).T)
        return cls(np.asarray(items, np.float32), directions, fitted.report)

    def with_click_rates(self, world: World, rates: FloatArray) -> ClickScorer:
        """Returns this scorer with other estimates in the place of the log's click rates, on their scale.

        Args:
            world: The world that the scorer was fitted in.
            rates: ``float32 (M,)``, log-odds of a click, such as :attr:`dsrm.item_term.ItemTerm.values`.
        """
        embeddings = world.embeddings if world.item_term is None else world.embeddings[:, :-1]
        table = _item_table(world.data.train, _learning_users(world), world, embeddings).fixed[: world.n_items]
        rate, popularity = table.T
        given = rates[: world.n_items].astype(np.float64)
        scaled = rate.mean() + (given - given.mean()) * rate.std() / max(float(given.std()), 1e-6)
        coefficients = self.report.coefficients
        items = self.report.intercept + coefficients["click_rate"] * scaled + coefficients["popularity"] * popularity
        return replace(self, item_scores=np.asarray(items, np.float32))


def states_before(
    log: InteractionLog, rows: NDArray[np.int64], embeddings: FloatArray, history_length: int
) -> FloatArray:
    """Returns the observed state just before each of some exposures.

    The mean embedding of the clicked items among the user's ``history_length`` exposures before the row, as
    :func:`kuaifair_env.observations.observed_states` computes it in a session.

    Args:
        log: The log.
        rows: ``int64 (n,)`` positions in the log.
        embeddings: ``float32 (M, d)``.
        history_length: Places ``H``.

    Returns:
        ``float32 (n, d)``; zero where nothing was clicked before.
    """
    lengths = rows - np.searchsorted(log.users, log.users[rows])
    states = np.empty((len(rows), embeddings.shape[1]), np.float32)
    for low in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(low, low + _ROWS_AT_ONCE)
        window = windows_before(log, rows[part], lengths[part], history_length)
        states[part] = mean_embeddings(embeddings, window.items, window.clicks.astype(np.float32))
    return states


def _learning_users(world: World) -> BoolArray:
    return ~np.isin(np.arange(len(world.data.users)), held_out_users(world.data))


@dataclass(frozen=True)
class _ItemTable:
    """Every item by the log of some users: ``fixed (M, 2)`` click rate and popularity, ``units (M, d)``."""

    fixed: NDArray[np.float64]
    units: FloatArray
    embeddings: FloatArray


@dataclass(frozen=True)
class _Examples:
    features: NDArray[np.float64]
    clicks: BoolArray
    users: IntArray


def _cross_fitted_examples(
    world: World, rows: NDArray[np.int64], users: BoolArray, rng: np.random.Generator
) -> _Examples:
    """Returns the examples of some log rows, each half of the users with items as the other half describes them."""
    log = world.data.train
    folds = user_folds(world.data, _FOLDS)
    halves = []
    for fold in range(_FOLDS):
        own = rows[folds[log.users[rows]] == fold]
        halves.append(_examples(log, own, _items_described_by(users & (folds != fold), world), world, rng))
    joined = _Examples(
        np.concatenate([half.features for half in halves]),
        np.concatenate([half.clicks for half in halves]),
        np.concatenate([half.users for half in halves]),
    )
    if joined.clicks.all() or not joined.clicks.any():
        raise DataError(
            "the training log needs exposures with and without a click; set positives_only=True for a log of positives"
        )
    return joined


def _items_described_by(users: BoolArray, world: World) -> _ItemTable:
    """Describes every item by the log rows of some users alone, embeddings included."""
    log = world.data.train
    part = log.take(users[log.users])
    if not part.clicks.any():
        raise DataError(
            "too few users with clicks in the training log to describe items by others than the user who is "
            "predicted; the click scorer needs clicks of at least a handful of users"
        )
    embeddings = item_embeddings(part, len(users), world.data.items, world.dimension)
    return _item_table(log, users, world, embeddings)


def _item_table(log: InteractionLog, users: BoolArray, world: World, embeddings: FloatArray) -> _ItemTable:
    """Describes every item by the log rows of some users and by the given embeddings."""
    items = len(world.data.items)
    part = log.take(users[log.users])
    shown = part.exposures(items).astype(np.float64)
    overall = part.clicks.mean() if len(part) else 0.5
    rate = (part.click_counts(items) + _PRIOR_EXPOSURES * overall) / (shown + _PRIOR_EXPOSURES)
    # A log of positives only has rate 1 throughout; its log-odds are left out of the model and need only be finite.
    rate = np.clip(rate, 1e-6, 1 - 1e-6)
    fixed = np.column_stack([np.log(rate / (1 - rate)), log_popularity(shown)])
    return _ItemTable(fixed, unit_rows(embeddings), embeddings)


def _examples(
    log: InteractionLog, rows: NDArray[np.int64], table: _ItemTable, world: World, rng: np.random.Generator
) -> _Examples:
    """Returns features and clicks of some log rows; for positives only, with one drawn negative for each."""
    units = unit_rows(states_before(log, rows, table.embeddings, world.history_length))
    users, items, clicks = log.users[rows], log.items[rows], log.clicks[rows]
    if log.positives_only:
        drawn, valid = _draw_negatives(log, users, world, rng)
        users = np.concatenate([users, users[valid]])
        units = np.concatenate([units, units[valid]])
        items = np.concatenate([items, drawn[valid]])
        clicks = np.concatenate([clicks, np.zeros(int(valid.sum()), np.bool_)])
    similarity = np.einsum("nd,nd->n", units, table.units[items])
    return _Examples(np.column_stack([table.fixed[items], similarity]), clicks, users)


def _draw_negatives(
    log: InteractionLog, users: IntArray, world: World, rng: np.random.Generator
) -> tuple[NDArray[np.int64], BoolArray]:
    """Draws for each user one candidate that the user never clicked, and marks where one was drawn in time."""
    width = len(world.data.items)
    clicked = np.sort(log.users[log.clicks].astype(np.int64) * width + log.items[log.clicks])
    drawn = np.zeros(len(users), np.int64)
    missing = np.arange(len(users))
    for _ in range(_NEGATIVE_DRAWS):
        drawn[missing] = rng.integers(world.n_items, size=len(missing))
        missing = missing[among(users[missing].astype(np.int64) * width + drawn[missing], clicked)]
        if not len(missing):
            break
    valid = np.ones(len(users), np.bool_)
    valid[missing] = False
    return drawn, valid


def _logistic(examples: _Examples, with_rate: bool) -> tuple[float, NDArray[np.float64]]:
    """Returns intercept and coefficients of the logistic regression; without rate its coefficient is 0."""
    from sklearn.linear_model import LogisticRegression

    used = slice(0 if with_rate else 1, None)
    model = LogisticRegression(C=1e4, max_iter=200).fit(examples.features[:, used], examples.clicks)
    coefficients = np.zeros(len(FEATURES))
    coefficients[used] = model.coef_[0]
    return float(model.intercept_[0]), coefficients


def _ranking_quality(examples: _Examples, scores: NDArray[np.float64]) -> tuple[float | None, float | None]:
    """Returns AUC and mean within-user AUC; None where all rows are clicks or none is."""
    from kuaifair_env.response.calibration import auc, within_user_auc

    try:
        within = within_user_auc(examples.users, examples.clicks, scores).mean
    except DataError:
        return None, None
    return auc(examples.clicks, scores), within


def _sampled(log: InteractionLog, rows: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    if log.positives_only:
        rows = rows[log.clicks[rows]]
    return rows if len(rows) <= size else np.sort(rng.choice(rows, size, replace=False))
