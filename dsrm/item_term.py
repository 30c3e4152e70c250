"""The item term ``q_i``: the estimated log-odds of a click on an item under uniformly random exposure.

A biased log hides the worth of items as it hides the taste of users. The item term is offered to every agent and every
control alike, as one more coordinate of the item embeddings; a comparison in which only one side has it is void.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.embeddings import separated, unit_rows
from kuaifair_env.errors import MismatchError
from kuaifair_env.files import Family, Tensors, open_artifact, parse_as, save_artifact, take_tensors
from kuaifair_env.pooling import embedding_sums
from kuaifair_env.splits import calibration_users, held_out_users
from kuaifair_env.world import World

Vector = NDArray[np.float64]

ItemTermMode = Literal["log", "ips", "features", "unbiased"]
ITEM_TERM_MODES: tuple[ItemTermMode, ...] = get_args(ItemTermMode)
ITEM_TERMS = Family("kuaifair-item-term", 2, "item term", "fit it again (dsrm.fit_item_term)")

_PRIOR_ROWS = 20.0
_USER_PRIOR_ROWS = 10.0
_FOLDS = 5
_PRIORS = (10.0, 20.0, 50.0, 100.0, 200.0, 500.0)
_MAX_WEIGHT = 500.0
_MAX_COSINE = 0.9
_SEED = 0


@dataclass(frozen=True)
class ItemTerm:
    """Estimated log-odds of a click on every item under random exposure.

    Attributes:
        mode: ``"log"`` (click rate of the training log), ``"ips"`` (corrected for who saw the item), ``"features"``
            (predicted from item features as well), or ``"unbiased"`` (calibrated on the random exposures of declared
            calibration users).
        item_ids: ``int64 (M,)``, the items' keys: raw ids, or hashes of text.
        values: ``float32 (M,)``, log-odds.
        similarity: Log-odds per unit of ``cos(s~, e_i)`` on the calibration users' random exposures, or None where
            none were read.
        provenance: Data, users and rows that were read, JSON-able.
    """

    mode: ItemTermMode
    item_ids: NDArray[np.int64]
    values: FloatArray
    similarity: float | None
    provenance: Mapping[str, Any]

    def of(self, data: InteractionData) -> FloatArray:
        """Returns the values in the item order of a data set, ``float32 (M,)``.

        Raises:
            MismatchError: If the data set has other items, or is not the one that the term was fitted on.
        """
        data_hash = self.provenance["data_hash"]
        if data_hash != data.data_hash:
            raise MismatchError(f"the item term was fitted on data {data_hash}, this is {data.data_hash}")
        order = np.argsort(self.item_ids)
        rows = order[np.minimum(np.searchsorted(self.item_ids, data.items.keys, sorter=order), len(order) - 1)]
        if len(rows) != len(order) or not np.array_equal(self.item_ids[rows], data.items.keys):
            raise MismatchError("the item term was fitted on another catalogue")
        return self.values[rows]

    def save(self, path: str | Path) -> None:
        """Writes the term to one safetensors file, atomically."""
        settings = {"similarity": self.similarity, "provenance": dict(self.provenance)}
        tensors: Tensors = {"item_ids": self.item_ids, "values": self.values}
        save_artifact(path, self.mode, tensors, settings, ITEM_TERMS)

    @classmethod
    def load(cls, path: str | Path) -> ItemTerm:
        """Reads a term.

        Raises:
            ArtifactError: If the file is missing, damaged or foreign.
        """
        with open_artifact(path, family=ITEM_TERMS) as (mode, tensors, settings):
            (items,) = take_tensors(tensors, {"item_ids": (None,)})["item_ids"].shape
            values = take_tensors(tensors, {"values": (items,)})["values"]
            similarity, provenance = settings["similarity"], parse_as(dict[str, Any], settings["provenance"])
            parse_as(str, provenance["data_hash"])
            slope = None if similarity is None else parse_as(float, similarity)
            return cls(item_term_mode(mode), tensors["item_ids"], values, slope, provenance)


def item_term_mode(name: str) -> ItemTermMode:
    """Returns the mode of a name.

    Raises:
        ValueError: If there is none.
    """
    for mode in ITEM_TERM_MODES:
        if mode == name:
            return mode
    raise ValueError(f"an item term is one of {ITEM_TERM_MODES}, got {name!r}")


def fit_item_term(world: World, mode: ItemTermMode) -> ItemTerm:
    """Estimates the item term.

    Users of the test world take no part. Settings (trees, shrinkage) are fixed or chosen by cross-validation over
    calibration users.

    Args:
        world: Either world of a pair; its data and embeddings are read.
        mode: See :class:`ItemTerm`.

    Raises:
        ValueError: If the mode is unknown, or nobody can calibrate.
    """
    item_term_mode(mode)
    data = world.data
    provenance: dict[str, Any] = {
        "data": data.provenance.name,
        "origin": data.provenance.origin,
        "data_hash": data.data_hash,
        "mode": mode,
        "test_log": "unread",
    }
    training = data.train.take(~np.isin(data.train.users, held_out_users(data)))
    shown, clicked = _counts(training, len(data.items))
    log_odds = smoothed_logits(shown, clicked)
    corrected = user_corrected_logits(training, len(data.users), len(data.items))
    features = _feature_columns(data, shown)
    similarity = None
    if mode == "log":
        values = log_odds
    elif mode == "ips":
        values = corrected
    elif mode == "features":
        values = boosted_logits(features, corrected, shown)
    else:
        users = calibration_users(data)
        log = data.test.take(np.isin(data.test.users, users))
        features = np.column_stack([features, log_odds, corrected])
        losses = prior_losses(features, log)
        prior = min(losses, key=losses.__getitem__)
        (rates,) = shrunk_rates(features, log, [prior])
        values = _logits(rates)
        similarity = similarity_slope(world, features, log, prior)
        provenance |= {
            "test_log": f"{len(log):,} rows of {len(users):,} calibration users, who are never evaluated",
            "prior_rows": prior,
            "log_loss_by_prior": {str(rows): round(loss, 6) for rows, loss in losses.items()},
        }
    return ItemTerm(mode, data.items.keys.copy(), values.astype(np.float32), similarity, provenance)


def with_item_term(world: World, term: ItemTerm) -> World:
    """Returns a world whose item embeddings have the item term as one more coordinate.

    The coordinate is standardised over the candidates, of the order of the others, which are scaled down in turn:
    vectors keep one length, without which items of a large term would outrank every other item. An agent that acts in
    embedding space then has a weight for it, the observed state holds its mean over the clicked items, and purifiers,
    scorers and policies find it where they find everything else about items. ``world.item_term`` has the log-odds
    themselves.

    Args:
        world: The world; its embeddings must not hold a term yet.
        term: See :func:`fit_item_term`.

    Raises:
        MismatchError: If the term was fitted on other data, or the world has a term.
    """
    if world.item_term is not None:
        raise MismatchError("the world has an item term already")
    values = term.of(world.data)
    candidates = values[: world.n_items]
    standardised = (values - candidates.mean()) / max(float(candidates.std()), 1e-6)
    length = np.sqrt(world.dimension + 1.0)
    column = np.clip(standardised, -_MAX_COSINE * length, _MAX_COSINE * length)
    others = unit_rows(world.embeddings) * np.sqrt(length**2 - column**2)[:, None]
    embeddings = separated(np.column_stack([others, column]), world.data.items.ids)
    return replace(world, embeddings=embeddings, item_term=values)


def without_item_term(world: World) -> World:
    """Returns a world as it was before :func:`with_item_term`, up to rounding."""
    return replace(world, embeddings=separated(world.embeddings[:, :-1], world.data.items.ids), item_term=None)


def smoothed_logits(shown: Vector, clicked: Vector) -> Vector:
    """Returns the log-odds of click rates, smoothed by 20 rows at the overall rate."""
    rate = clicked.sum() / max(shown.sum(), 1.0)
    return _logits((clicked + _PRIOR_ROWS * rate) / (shown + _PRIOR_ROWS))


def user_corrected_logits(log: InteractionLog, n_users: int, n_items: int) -> Vector:
    """Returns click log-odds corrected for who saw the item: clicks over what these users click on average.

    Rows count inversely to their user's number of exposures, so that an item's raters are users and not their rows
    (self-normalised inverse propensity of the user's activity).
    """
    shown = np.bincount(log.users, minlength=n_users)
    overall = float(log.clicks.mean())
    clicked = np.bincount(log.users, log.clicks, n_users)
    habit = (clicked + _USER_PRIOR_ROWS * overall) / (shown + _USER_PRIOR_ROWS)
    weight = 1.0 / np.maximum(shown, 1)[log.users]
    weight /= weight.mean()
    observed = np.bincount(log.items, weight * log.clicks, n_items) + _PRIOR_ROWS * overall
    expected = np.bincount(log.items, weight * habit[log.users], n_items) + _PRIOR_ROWS * overall
    return _logits(np.clip(overall * observed / expected, 0.0, 1.0))


def boosted_logits(features: NDArray[np.float64], logits: Vector, shown: Vector) -> Vector:
    """Predicts log-odds from features, each item by trees that have not seen it, and shrinks towards its own value.

    ``logits`` are the log-odds from the log, unreliable where an item was hardly ``shown``.
    """
    predicted = _cross_predicted(features, logits, shown)
    trust = shown / (shown + 5 * _PRIOR_ROWS)
    return trust * logits + (1.0 - trust) * predicted


def explained_share(world: World) -> float:
    """Returns which share of the variance of items' log-odds in the training log their features explain.

    Items are predicted by trees that have not seen them, and count by their exposures.

    Args:
        world: Either world of a pair; users of the test world take no part.
    """
    features, logits, shown = _of_training_log(world)
    weights = np.minimum(shown, _MAX_WEIGHT)
    unexplained = np.average((logits - _cross_predicted(features, logits, shown)) ** 2, weights=weights)
    return float(1.0 - unexplained / np.average((logits - np.average(logits, weights=weights)) ** 2, weights=weights))


def _cross_predicted(features: NDArray[np.float64], logits: Vector, shown: Vector) -> Vector:
    fold = np.random.default_rng(_SEED).permutation(len(logits)) % _FOLDS
    predicted = np.empty(len(logits))
    for number in range(_FOLDS):
        outside = fold == number
        inside = ~outside & (shown > 0)
        weights = np.minimum(shown[inside], _MAX_WEIGHT)
        model = _trees().fit(features[inside], logits[inside], sample_weight=weights)
        predicted[outside] = model.predict(features[outside])
    return predicted


def _of_training_log(world: World) -> tuple[NDArray[np.float64], Vector, Vector]:
    """Returns item features, log-odds corrected for who saw the item, and exposures, all items of the data."""
    data = world.data
    training = data.train.take(~np.isin(data.train.users, held_out_users(data)))
    shown, _ = _counts(training, len(data.items))
    corrected = user_corrected_logits(training, len(data.users), len(data.items))
    return _feature_columns(data, shown), corrected, shown


def _feature_columns(data: InteractionData, shown: Vector) -> NDArray[np.float64]:
    columns = [data.items.features.values, data.items.tags, np.log1p(shown)[:, None]]
    return np.concatenate([np.asarray(column, np.float64) for column in columns], axis=1)


def shrunk_rates(features: NDArray[np.float64], log: InteractionLog, priors: Sequence[float]) -> list[Vector]:
    """Returns click rates of items from unbiased rows: their own, shrunk towards what trees predict from features.

    The prediction counts for ``prior`` rows; there are rates for each of the priors.
    """
    shown, clicked = _counts(log, len(features))
    seen = shown > 0
    model = _trees().fit(features[seen], clicked[seen] / shown[seen], sample_weight=shown[seen])
    predicted = np.clip(model.predict(features), 1e-3, 1.0 - 1e-3)
    return [(clicked + prior * predicted) / (shown + prior) for prior in priors]


def prior_losses(features: NDArray[np.float64], log: InteractionLog) -> dict[float, float]:
    """Returns the log-loss of :func:`shrunk_rates` on users who were left out, by prior."""
    fold = _user_parts(log, _FOLDS)
    losses = dict.fromkeys(_PRIORS, 0.0)
    for number in range(_FOLDS):
        outside = log.take(fold == number)
        rates = shrunk_rates(features, log.take(fold != number), _PRIORS)
        for prior, item_rates in zip(_PRIORS, rates, strict=True):
            p = np.clip(item_rates[outside.items], 1e-4, 1.0 - 1e-4)
            log_loss = -np.where(outside.clicks, np.log(p), np.log1p(-p)).sum()
            losses[prior] += float(log_loss) / len(log)
    return losses


def similarity_slope(world: World, features: NDArray[np.float64], log: InteractionLog, prior: float) -> float:
    """Returns the log-odds per unit of ``cos(s~, e_i)`` given the item term, on calibration users' unbiased rows.

    Each half of the users is described by items calibrated on the other half, since an item's term would otherwise hold
    the click that it is to explain.
    """
    from sklearn.linear_model import LogisticRegression

    half = _user_parts(log, 2)
    item = np.empty(len(log))
    for number in range(2):
        (rates,) = shrunk_rates(features, log.take(half != number), [prior])
        item[half == number] = _logits(rates)[log.items[half == number]]
    users, row = np.unique(log.users, return_inverse=True)
    window = world.initial_history.take(users)
    states = embedding_sums(world.embeddings, window.items, window.clicks.astype(np.float32))
    similarity = np.einsum("nd,nd->n", unit_rows(states)[row], unit_rows(world.embeddings)[log.items])
    model = LogisticRegression(C=1e4, max_iter=200).fit(np.column_stack([item, similarity]), log.clicks)
    # In units of the item term's own slope, so that the term enters scores as it is.
    return float(model.coef_[0, 1] / max(model.coef_[0, 0], 1e-6))


def _counts(log: InteractionLog, n_items: int) -> tuple[Vector, Vector]:
    """Returns how often each item was shown and clicked, ``float64 (M,)`` each."""
    return log.exposures(n_items).astype(np.float64), log.click_counts(n_items).astype(np.float64)


def _logits(rates: Vector) -> Vector:
    """Returns log-odds of rates, which are kept away from 0 and 1."""
    clipped = np.clip(rates, 1e-3, 1.0 - 1e-3)
    return np.asarray(np.log(clipped / (1.0 - clipped)))


def _user_parts(log: InteractionLog, parts: int) -> NDArray[np.int64]:
    """Divides the users of a log at random, and returns the part of each row's user."""
    users, row = np.unique(log.users, return_inverse=True)
    return np.asarray((np.random.default_rng(_SEED).permutation(len(users)) % parts)[row])


def _trees() -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return HistGradientBoostingRegressor(
        max_iter=200,
        learning_rate=0.03,
        max_leaf_nodes=8,
        min_samples_leaf=50,
        l2_regularization=5.0,
        random_state=_SEED,
    )
