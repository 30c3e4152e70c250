"""Models of clicks for doubly robust estimates: fitted on other users' random rows, or a world's own truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import FloatArray, IntArray, InteractionLog
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import DataError
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import sigmoid
from kuaifair_env.splits import user_folds
from kuaifair_env.world import World

FOLDS = 5
_PRIOR_ROWS = 20.0


class ClickModel(Protocol):
    """Predicts clicks on items that are shown at the start of a session."""

    def predict(self, users: IntArray, items: IntArray) -> FloatArray:
        """Returns ``(B, n)``, click probabilities of ``items (B, n)`` for the user rows ``users (B,)``."""
        ...


@dataclass(frozen=True)
class WorldClicks:
    """What the users of a world do at the start of a session: the truth where it is known, else a simulator's model.

    Attributes:
        world: The world.
    """

    world: World

    def predict(self, users: IntArray, items: IntArray) -> FloatArray:
        """See :class:`ClickModel`."""
        world = self.world
        history = world.initial_history.take(users) if world.response.uses_history else None
        return world.response.expected(users, items, history)


@dataclass(frozen=True)
class CrossFittedClicks:
    """A logistic model of clicks on random rows; each user's is fitted without that user's fold of users.

    The log-odds are linear in the item's smoothed log-odds of a click in the random rows of other folds, the same in
    the training log, the user's in the training log, and the cosine of the user's observed state with the item.

    Attributes:
        folds: ``int64 (users,)``, the fold of every user of the data set.
        items: ``float32 (F, N)``, log-odds of a click on each candidate, without what depends on the user.
        users: ``float32 (F, users)``, what the user adds.
        states: ``float32 (users, d)``, observed states scaled to length 1.
        directions: ``float32 (N, d)``, item embeddings scaled to length 1.
        similarity: ``float32 (F,)``, log-odds per unit of the cosine.
    """

    folds: NDArray[np.int64]
    items: FloatArray
    users: FloatArray
    states: FloatArray
    directions: FloatArray
    similarity: FloatArray

    @classmethod
    def fit(cls, world: World, folds: int = FOLDS) -> CrossFittedClicks:
        """Fits the model to the test log of a world, whose items must have been chosen at random.

        Args:
            world: The world; neither its response model nor the agent's training is read.
            folds: Number of folds of users.

        Raises:
            DataError: If all rows are clicks or none is.
        """
        from sklearn.linear_model import LogisticRegression

        data, n_items = world.data, world.n_items
        n_users = len(data.users)
        log = data.test.take(data.test.items < n_items)
        if not len(log) or log.clicks.all() or not log.clicks.any():
            raise DataError("a model of clicks needs random rows with and without a click")
        of_user = user_folds(data, folds)
        states = unit_rows(observed_states(world, world.initial_history))
        directions = unit_rows(world.embeddings[:n_items])
        trained = _log_odds(*_counts(data.train, data.train.items, len(data.items)))[:n_items]
        activity = _log_odds(*_counts(data.train, data.train.users, n_users))
        cosine = np.einsum("rd,rd->r", states[log.users], directions[log.items])
        items, users = np.empty((folds, n_items), np.float32), np.empty((folds, n_users), np.float32)
        similarity = np.empty(folds, np.float32)
        for fold in range(folds):
            others = of_user[log.users] != fold
            rows = log.take(others)
            clicks, shown = _counts(rows, rows.items, n_items)
            # A row's own click must not be among what explains it.
            own = _log_odds(clicks[rows.items] - rows.clicks, shown[rows.items] - 1, rows.clicks.mean())
            features = np.column_stack([own, trained[rows.items], activity[rows.users], cosine[others]])
            model = LogisticRegression(C=1e3, max_iter=200).fit(features, rows.clicks)
            weights = model.coef_[0]
            items[fold] = model.intercept_[0] + weights[0] * _log_odds(clicks, shown) + weights[1] * trained
            users[fold] = weights[2] * activity
            similarity[fold] = weights[3]
        return cls(of_user, items, users, states, directions, similarity)

    def predict(self, users: IntArray, items: IntArray) -> FloatArray:
        """See :class:`ClickModel`."""
        fold = self.folds[users]
        cosine = np.einsum("bd,bnd->bn", self.states[users], self.directions[items])
        logits = self.items[fold[:, None], items] + self.users[fold, users][:, None]
        return sigmoid(logits + self.similarity[fold][:, None] * cosine)


def _counts(log: InteractionLog, of: IntArray, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns clicks and rows of each user or item, ``float64 (size,)``."""
    clicks = np.asarray(np.bincount(of, log.clicks, size), np.float64)
    return clicks, np.bincount(of, minlength=size).astype(np.float64)


def _log_odds(clicks: NDArray[np.float64], rows: NDArray[np.float64], mean: float | None = None) -> NDArray[np.float64]:
    """Returns log-odds of a click, shrunken towards the mean rate of all."""
    rate = clicks.sum() / max(rows.sum(), 1.0) if mean is None else mean
    rates = (clicks + _PRIOR_ROWS * rate) / (rows + _PRIOR_ROWS)
    rates = np.clip(rates, 1e-6, 1.0 - 1e-6)
    return np.asarray(np.log(rates / (1.0 - rates)))
