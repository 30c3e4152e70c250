"""Structured randomisation of training worlds: how users differ from the world's response model, in log-odds.

An agent that learns in a world fitted on the log that its own inputs come from finds that its inputs are never wrong,
and learns to trust them more than feedback. So training users also have deviations of their own:

- (a) shared by all users: an offset of each item, larger where the training log shows it seldom, and a vector in the
  space of the item embeddings. The log misjudges items.
- (b) of the session: a level and a vector. The log misjudges tastes.
- (c) independent noise of each pair of user and item.

What is shared is drawn anew for each block of sessions, by default for each session: an agent that remembers no other
session cannot tell longer blocks apart, and learns what the last one had in common. Drawn once it would be learned by
heart. Longer blocks are for agents that learn something of all users while they train. Sessions are counted in the
order of starting, and each keeps the block that it started in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.response.base import History, ResponseModel
from kuaifair_env.response.graded import GradedResponse

_MIN_PROBABILITY = 1e-6
_OFFSET_FLOOR, _OFFSET_RARE, _OFFSET_EXPOSURES = 0.35, 0.6, 50.0
_OFFSETS, _SHARED_VECTOR, _OWN_LEVEL, _OWN_VECTOR = range(4)
_BLOCK_LENGTHS, _BLOCKS, _SESSIONS, _PAIRS = range(4)
_BLOCKS_AT_ONCE = 64


@dataclass(frozen=True)
class Randomisation:
    """How large the deviations of training users are: standard deviations in log-odds, and lengths of blocks.

    The defaults are wide. The log cannot show how wrong it is, since it agrees with itself: halves of it disagree by
    far less than the log and unbiased feedback do.

    Attributes:
        offset: Of shared item offsets, times ``.35 + .6 / (1 + n / 50)`` for an item with ``n`` training exposures.
        vector: Of each coordinate of the shared vector, over item embeddings of length 1.
        own_level: Of a session's level.
        own_vector: Of each coordinate of a session's vector.
        noise: Of each pair of user and item.
        min_block: Fewest sessions with the same shared deviations.
        max_block: Most of them; the length of each block is drawn log-uniformly.

    Raises:
        ValueError: If a standard deviation is negative or infinite, or the lengths are not ``1 <= min <= max``.
    """

    offset: float = 1.0
    vector: float = 1.0
    own_level: float = 0.5
    own_vector: float = 0.5
    noise: float = 0.5
    min_block: int = 1
    max_block: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int if "block" in field.name else (int, float)):
                raise ValueError(f"randomisation.{field.name} must be a number, got {value!r}")
            if not 0 <= value < float("inf"):
                raise ValueError(f"randomisation.{field.name} must be finite and not negative, got {value!r}")
        if not 1 <= self.min_block <= self.max_block:
            raise ValueError(
                f"randomisation needs 1 <= min_block <= max_block, got {self.min_block} and {self.max_block}"
            )

    def scaled(self, share: float) -> Randomisation:
        """Returns deviations of a share of these standard deviations, in blocks of the same lengths."""
        deviations = {name: share * value for name, value in asdict(self).items() if "block" not in name}
        return replace(self, **deviations)

    def offset_deviations(self, exposures: IntArray) -> FloatArray:
        """Returns ``float32 (N,)``, the standard deviation of each item's shared offset, from training exposures."""
        return (self.offset * offset_shape(exposures)).astype(np.float32)


RandomisationLike: TypeAlias = Randomisation | Literal["auto"] | None
"""How training worlds are randomised: with given scales, ``"auto"`` with scales from data, or not at all."""


def offset_shape(exposures: IntArray) -> NDArray[np.float64]:
    """Returns ``.35 + .6 / (1 + n / 50)``, ``(N,)``: how much the log misjudges items with ``n`` exposures."""
    return _OFFSET_FLOOR + _OFFSET_RARE / (1.0 + np.asarray(exposures) / _OFFSET_EXPOSURES)


def randomisation_setting(value: Any) -> RandomisationLike:
    """Returns how to randomise, from a setting: ``"auto"``, ``"none"`` or None, or scales by name.

    Raises:
        ValueError: If it is something else.
    """
    if value is None or value == "none":
        return None
    if value == "auto":
        return "auto"
    if isinstance(value, Randomisation):
        return value
    names = [field.name for field in fields(Randomisation)]
    if not isinstance(value, Mapping):
        raise ValueError(f"randomisation must be auto, none, or numbers by name ({', '.join(names)}), got {value!r}")
    unknown = [str(name) for name in value if name not in names]
    if unknown:
        raise ValueError(f"randomisation has no {', '.join(unknown)}; it has {', '.join(names)}")
    return Randomisation(**value)


def describe_setting(randomisation: RandomisationLike) -> Any:
    """Returns a setting as :func:`randomisation_setting` reads it, JSON-able."""
    return asdict(randomisation) if isinstance(randomisation, Randomisation) else randomisation


@dataclass(frozen=True)
class WorldRandomisation:
    """The randomisation of one training world.

    Attributes:
        scales: How large the deviations are.
        seed: Seed of the deviations and of the lengths of the blocks.
    """

    scales: Randomisation
    seed: int = 0

    def describe(self) -> dict[str, Any]:
        """Returns everything, JSON-able."""
        return {**asdict(self.scales), "seed": self.seed}


class SessionBlocks:
    """Which sessions have the same shared deviations: blocks whose lengths are log-uniform, from a seed.

    Args:
        randomisation: Bounds of the lengths, and the seed.
    """

    def __init__(self, randomisation: WorldRandomisation) -> None:
        scales = randomisation.scales
        self._key = seeding.derive(np.asarray([seeding.stream_key(randomisation.seed)], np.uint64), _BLOCK_LENGTHS)
        self._min, self._ratio = scales.min_block, (scales.max_block + 1) / scales.min_block
        self._ends = np.zeros(0, np.int64)

    def of_sessions(self, numbers: IntArray) -> NDArray[np.int64]:
        """Returns the blocks of sessions, both ``int64 (n,)``, from 0 on."""
        while not len(self._ends) or self._ends[-1] <= numbers.max(initial=0):
            places = np.arange(len(self._ends), len(self._ends) + _BLOCKS_AT_ONCE, dtype=np.uint64)
            lengths = (self._min * self._ratio ** seeding.uniforms(self._key, places)).astype(np.int64)
            last = self._ends[-1] if len(self._ends) else 0
            self._ends = np.concatenate([self._ends, last + np.cumsum(lengths)])
        return np.searchsorted(self._ends, numbers, side="right")


class SessionRandomisation:
    """The deviations of ``B`` running sessions.

    Draws follow from the seed and the block (a), the session's key (b), or user and item (c), and from nothing else.

    Args:
        randomisation: Of the training world.
        directions: ``float32 (N, d)``, embeddings of the candidates, of length 1.
        exposures: ``int (N,)``, how often the training log shows each candidate.
        batch_size: Number of sessions ``B``.

    Attributes:
        blocks: ``int64 (B,)``, the block in which each session started.
    """

    def __init__(
        self, randomisation: WorldRandomisation, directions: FloatArray, exposures: IntArray, batch_size: int
    ) -> None:
        self._scales = randomisation.scales
        self._directions = directions.view()
        self._deviations = self._scales.offset_deviations(exposures)
        for array in (self._directions, self._deviations):
            array.setflags(write=False)  # checkpoints hold what can change
        self._key = np.uint64(seeding.stream_key(randomisation.seed))
        self._session_blocks = SessionBlocks(randomisation)
        self.blocks = np.zeros(batch_size, np.int64)
        self._levels = np.zeros(batch_size, np.float32)
        self._vectors = np.zeros((batch_size, self._directions.shape[1]), np.float32)
        self._offset_keys, self._pair_keys = np.zeros((2, batch_size), np.uint64)

    def reset(self, rows: IntArray, users: IntArray, keys: seeding.Keys, numbers: IntArray) -> None:
        """Starts sessions in the given rows.

        Args:
            rows: ``int (n,)``.
            users: ``int (n,)``, user rows.
            keys: ``uint64 (n,)``, stream keys of the sessions.
            numbers: ``int (n,)``, how many sessions started before each.
        """
        self.blocks[rows] = self._session_blocks.of_sessions(numbers)
        shared = seeding.derive(self._stream(_BLOCKS), self.blocks[rows])
        own = seeding.derive(keys ^ self._stream(_SESSIONS), 0)
        self._offset_keys[rows] = seeding.derive(shared, _OFFSETS)
        self._pair_keys[rows] = seeding.derive(self._stream(_PAIRS), users)
        self._levels[rows] = self._scales.own_level * seeding.row_normals(own, 1, _OWN_LEVEL)[:, 0]
        dimension = self._vectors.shape[1]
        vectors = np.float32(self._scales.vector) * seeding.row_normals(shared, dimension, _SHARED_VECTOR)
        vectors += np.float32(self._scales.own_vector) * seeding.row_normals(own, dimension, _OWN_VECTOR)
        self._vectors[rows] = vectors

    def response(self, base: ResponseModel) -> ResponseModel:
        """Returns what the users of all sessions do, given a model of what they do without deviations.

        The model is asked for all ``B`` sessions, in order.
        """
        if isinstance(base, GradedResponse):  # its means are shares, which have log-odds
            return base.over(RandomisedResponse(base.inner, self))
        return RandomisedResponse(base, self)

    def of_items(self, items: IntArray) -> FloatArray:
        """Returns the deviations of ``items (B, K)``, ``float32 (B, K)`` in log-odds."""
        total = np.matmul(self._directions[items], self._vectors[:, :, None])[..., 0]
        return self._with_draws_of_items(total, items)

    def of_catalogue(self, n_items: int) -> FloatArray:
        """Returns the deviations of items ``0 .. n_items - 1``, ``float32 (B, n_items)`` in log-odds."""
        total = self._vectors @ self._directions[:n_items].T
        return self._with_draws_of_items(total, np.arange(n_items)[None, :])

    def _with_draws_of_items(self, total: FloatArray, items: IntArray) -> FloatArray:
        total += self._levels[:, None]
        counters = items.astype(np.uint64)
        if self._scales.offset:
            total += self._deviations[items] * seeding.normals(self._offset_keys[:, None], counters)
        if self._scales.noise:
            total += np.float32(self._scales.noise) * seeding.normals(self._pair_keys[:, None], counters)
        return total

    def _stream(self, number: int) -> seeding.Keys:
        return seeding.derive(np.full(1, self._key), number)


class RandomisedResponse:
    """A response model whose users deviate from another's as running sessions say.

    Args:
        base: The other model.
        sessions: The deviations of the sessions whose users it is asked for, all of them in order.
    """

    def __init__(self, base: ResponseModel, sessions: SessionRandomisation) -> None:
        self._base, self._sessions = base, sessions
        self.n_users, self.n_items = base.n_users, base.n_items
        self.uses_history = base.uses_history

    def expected(self, users: IntArray, items: IntArray, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return _deviating(self._base.expected(users, items, history), self._sessions.of_items(items))

    def expected_catalogue(self, users: IntArray, n_items: int, history: History | None = None) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return _deviating(self._base.expected_catalogue(users, n_items, history), self._sessions.of_catalogue(n_items))

    def feedback(self, expected: FloatArray, uniforms: NDArray[np.float64]) -> FloatArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._base.feedback(expected, uniforms)

    def clicked(self, feedback: FloatArray) -> BoolArray:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return self._base.clicked(feedback)

    def rearranged(self, items: IntArray) -> RandomisedResponse:
        """Refuses: running sessions have one catalogue.

        Raises:
            ValueError: Always.
        """
        raise ValueError("what users of running sessions do cannot be rearranged; rearrange the world's own model")

    def save(self, path: str | Path) -> None:
        """Refuses to save; the base model is what can be saved.

        Raises:
            ValueError: Always.
        """
        raise ValueError("what users of running sessions do is not saved; save the world's own model")

    def describe(self) -> dict[str, Any]:
        """See :class:`~kuaifair_env.response.base.ResponseModel`."""
        return {"kind": "randomised", "base": self._base.describe()}


def _deviating(expected: FloatArray, deviations: FloatArray) -> FloatArray:
    """Returns probabilities moved by deviations in log-odds."""
    probabilities = np.clip(expected, _MIN_PROBABILITY, 1 - _MIN_PROBABILITY).astype(np.float64)
    odds_against = (1 - probabilities) / probabilities * np.exp(-deviations, dtype=np.float64)
    return np.asarray(1 / (1 + odds_against), np.float32)
