"""Tastes that drift within a session, whatever is shown: what was learned of a user early on is worth less and less."""

from __future__ import annotations

import numpy as np

from kuaifair_env import seeding
from kuaifair_env.data.schema import IntArray
from kuaifair_env.response.base import ResponseModel, response_with_tastes
from kuaifair_env.world import World

_USERS_AT_ONCE = 65_536


class TasteDrift:
    """The current tastes of ``B`` sessions, each an autoregressive process.

    After each slate ``w' = a w + sqrt(1 - a^2) sigma xi`` with ``xi`` standard normal and ``sigma`` the root mean
    square of the world's users in each coordinate, so that tastes stay as spread as they were. ``a = .5^(1 / slates)``:
    after so many slates a taste correlates by .5 with that at the start. The draws follow from the session's key and
    the step.

    Args:
        world: Users, items and their response.
        batch_size: Number of sessions ``B``.
        slates: Slates after which the correlation is .5.

    Raises:
        DataError: If the world's response model has no vectors of taste.
    """

    def __init__(self, world: World, batch_size: int, slates: float) -> None:
        self._start = response_with_tastes(world.response)
        kept = 0.5 ** (1.0 / slates)
        self._kept = np.float32(kept)
        squares = [
            np.square(self._start.tastes(world.users[begin : begin + _USERS_AT_ONCE]).astype(np.float64)).sum(axis=0)
            for begin in range(0, len(world.users), _USERS_AT_ONCE)
        ]
        mean_square = np.sum(squares, axis=0) / len(world.users)
        self._moved = (np.sqrt(1.0 - kept**2) * np.sqrt(mean_square)).astype(np.float32)
        self.tastes = np.zeros((batch_size, len(self._moved)), np.float32)
        self._keys = np.zeros(batch_size, np.uint64)

    def reset(self, rows: IntArray, users: IntArray, keys: seeding.Keys) -> None:
        """Starts new sessions in the given rows, of the given user rows and stream keys."""
        self.tastes[rows] = self._start.tastes(users)
        self._keys[rows] = keys

    def response(self, users: IntArray) -> ResponseModel:
        """Returns what the current ``users (B,)`` of all sessions do now, as a model of users ``0 .. B - 1``."""
        return self._start.with_tastes(users, self.tastes)

    def step(self, steps: IntArray) -> None:
        """Moves all tastes on after the slates that are number ``steps (B,)`` of their sessions."""
        draws = seeding.row_normals(self._keys, self.tastes.shape[1], steps)
        self.tastes = self._kept * self.tastes + self._moved * draws
