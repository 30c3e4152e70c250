"""A world model as a response model, so that the library's own sessions can be played in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrl_policies.baselines.world_model import Side, WorldModel
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.bernoulli import BernoulliFeedback
from kuaifair_env.worlds import World


class Prediction(NamedTuple):
    """What a world model says of pairs.

    Attributes:
        mean: ``float32 (B, K)``, ensemble mean of the click, within 0..1.
        variance: ``float32 (B, K)``, the largest variance that a member gives.
    """

    mean: FloatArray
    variance: FloatArray


class LearnedResponse(BernoulliFeedback):
    """Clicks with the probability that an ensemble predicts; the world's own response model is never asked.

    Args:
        model: The ensemble, fitted.
        world: The world whose users, items, features and tags it was fitted on.

    Attributes:
        latest: What the last call of :meth:`expected` found, so that a reward made of it costs no second prediction;
            None before the first.
    """

    uses_history = False

    def __init__(self, model: WorldModel, world: World) -> None:
        self._model = model
        self._users, self._items = model.tables(world)
        self.n_users, self.n_items = self._users.line.shape[1], self._items.line.shape[1]
        self.latest: Prediction | None = None

    def predict(self, users: IntArray, items: IntArray) -> Prediction:
        """Returns the prediction for users ``(B,)`` with items ``(B, K)``."""
        return self._predicted(users, self._items.rows(_rows(items)))

    def expected(self, users: IntArray, items: IntArray, history: HistoryWindow | None = None) -> FloatArray:
        """Returns the predicted means, ``float32 (B, K)``; ``history`` is not read."""
        self.latest = self.predict(users, items)
        return self.latest.mean

    def expected_catalogue(
        self, users: IntArray, n_items: int, history: HistoryWindow | None = None
    ) -> FloatArray:
        """Returns the predicted means on items ``0 .. n_items - 1``, ``float32 (B, n_items)``."""
        side = Side(*(part[:, None, :n_items] for part in self._items))
        return np.concatenate([self._predicted(users[row : row + 1], side).mean for row in range(len(users))])

    def rearranged(self, items: IntArray) -> LearnedResponse:
        """Returns the same model for the catalogue ``old_items[items]``."""
        twin = object.__new__(LearnedResponse)
        twin._model, twin._users, twin.latest = self._model, self._users, None
        twin._items = self._items.rows(_rows(items))
        twin.n_users, twin.n_items = self.n_users, len(items)
        return twin

    def save(self, path: str | Path) -> None:
        """Refuses: an ensemble is saved with the agent that fitted it.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a learned response is saved with its agent; call DORL.save")

    def describe(self) -> dict[str, Any]:
        """Returns kind and sizes, JSON-able."""
        return {
            "kind": "learned",
            "users": self.n_users,
            "items": self.n_items,
            "members": self._model.members,
        }

    def _predicted(self, users: IntArray, items: Side) -> Prediction:
        user = self._users.rows(_rows(users)).spread()
        with torch.inference_mode():
            mean, log_variance = self._model.combined(user, items)
            return Prediction(
                mean.mean(0).clamp(0.0, 1.0).numpy(), log_variance.amax(0).exp().numpy().astype(np.float32)
            )


def _rows(rows: IntArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, np.int64))
