"""Domain randomisation: a training world whose users also have tastes of their own that no log explains.

An agent that learns in a world fitted on its own inputs finds that its inputs are never wrong, and learns to trust them
more than feedback; users of other worlds differ. Deviations in the training world teach it to listen to the session.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kuaifair_env import seeding
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.response.base import History, ResponseModel, SessionMemory, session_memory
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.world import World

_MIN_PROBABILITY = 1e-6


class VariedResponse:
    """Another model's click log-odds plus a deviation for each pair of user and item, fixed for good.

    For training only: nothing is evaluated with it.

    Args:
        base: The model.
        deviation: Standard deviation of the differences, in log-odds (they are logistic).
        seed: Seed of the differences.

    Raises:
        ValueError: If the deviation is not positive.
    """

    def __init__(self, base: ResponseModel, deviation: float, seed: int = 0) -> None:
        if not deviation > 0:
            raise ValueError(f"the deviation must be positive, got {deviation}")
        self._base = base
        self._deviation = deviation
        self._seed = seed
        self._key = seeding.stream_key(seed)
        self._scale = deviation * np.sqrt(3.0) / np.pi
        self.n_users, self.n_items = base.n_users, base.n_items
        self.uses_history = base.uses_history

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._varied(users, np.asarray(items), self._base.expected(users, items, history))

    def session_memory(self, batch_size: int) -> SessionMemory | None:
        """See :func:`kuaifair_env.response.base.session_memory`."""
        return session_memory(self._base, batch_size)

    def feedback(self, expected: FloatArray, uniforms: Any) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._base.feedback(expected, uniforms)

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._base.clicked(feedback)

    def rearranged(self, items: IntArray) -> VariedResponse:
        """See :class:`~kuaifair_env.response.base.ResponseModel`; deviations are drawn anew."""
        return VariedResponse(self._base.rearranged(items), self._deviation, self._seed)

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        items = np.arange(n_items)[None, :]
        return self._varied(users, items, self._base.expected_catalogue(users, n_items, history))

    def save(self, path: str | Path) -> None:
        """Refuses to save; the base model is what can be saved.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a varied response model is not saved; save the model that it is based on")

    def describe(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return {
            "kind": "varied",
            "deviation": self._deviation,
            "seed": self._seed,
            "base": self._base.describe(),
        }

    def _varied(self, users: IntArray, items: IntArray, expected: FloatArray) -> FloatArray:
        keys = seeding.derive(np.full(len(users), self._key, np.uint64), np.asarray(users))
        draws = np.clip(
            seeding.uniforms(keys[:, None], items.astype(np.uint64)), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY
        )
        probabilities = np.clip(expected, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY).astype(np.float64)
        odds = probabilities / (1 - probabilities) * (draws / (1 - draws)) ** self._scale
        return np.asarray(odds / (1 + odds), np.float32)


def varied(world: World, deviation: float, seed: int = 0) -> World:
    """Returns a training world whose users also have tastes of their own; the same world for a deviation of 0.

    For ``deviation`` and ``seed`` see :class:`VariedResponse`.

    Raises:
        ValueError: If it is the test world.
    """
    if not deviation:
        return world
    if world.split != "train":
        raise ValueError("only training worlds are varied: evaluation is among users whose tastes are not invented")
    response = world.response
    if isinstance(response, GradedResponse):  # its means are shares, which have log-odds
        return replace(world, response=response.over(VariedResponse(response.inner, deviation, seed)))
    return replace(world, response=VariedResponse(response, deviation, seed))
