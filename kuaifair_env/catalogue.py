"""Which items a world has, as agents know them: what tells the catalogue they were trained on from any other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import MismatchError

_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Catalogue:
    """What identifies the candidates of a world to an agent, which knows each by its row and its embedding.

    Both worlds of a pair have the same. Equal ids alone do not make equal items: data whose items are numbered anew
    have the ids that they had.

    Attributes:
        data_name: Name of the data set; not compared.
        n_items: Number of candidates ``N``.
        ids: Hash of their raw ids, in the order of rows.
        embeddings: ``d`` numbers that change with any embedding; see :func:`signed_sum`.
    """

    data_name: str
    n_items: int
    ids: str
    embeddings: tuple[float, ...]

    @classmethod
    def of_items(cls, data_name: str, keys: NDArray[np.int64], embeddings: FloatArray) -> Catalogue:
        """Returns the catalogue of candidates with keys ``int64 (N,)`` and embeddings ``float32 (N, d)``."""
        total = signed_sum(keys, embeddings)
        return cls(data_name, len(keys), ids_hash(keys), tuple(float(f"{value:.6g}") for value in total))

    def __str__(self) -> str:
        return f"{self.n_items:,} items of {self.data_name} (ids {self.ids}, embeddings {self.embeddings[0]:+.3f})"

    def difference(self, other: Catalogue) -> str:
        """Returns how another catalogue differs, in words; the empty string if it is the same."""
        if self.n_items != other.n_items:
            return "the number of items differs"
        if self.ids != other.ids:
            return "the item ids, or their order, differ"
        if not same_sums(self.embeddings, other.embeddings):
            return "the item ids are the same, but their embeddings differ: items numbered anew, or embedded anew"
        return ""


def check_catalogues(trained: Any, given: Any) -> None:
    """Checks that an agent acts among the items that it was trained on.

    Args:
        trained: The agent's space of observations.
        given: The environment's. Spaces that do not say of which items their states are pass.

    Raises:
        MismatchError: If the items are others.
    """
    own, there = catalogue_of(trained), catalogue_of(given)
    if own is None or there is None:
        return
    difference = own.difference(there)
    if difference:
        raise MismatchError(
            f"the agent was trained on {own}, but this environment has {there}: {difference}. Use it in worlds of the "
            "data and item embeddings that it was trained with, or train one for these items"
        )


def catalogue_of(space: Any) -> Catalogue | None:
    """Returns the catalogue that a space of observations says its states are made from; None if it says none."""
    states = space.spaces.get("state") if hasattr(space, "spaces") and isinstance(space.spaces, dict) else space
    return getattr(states, "catalogue", None)


def ids_hash(keys: NDArray[np.int64]) -> str:
    """Returns a hash of item keys, which depends on their order."""
    return hashlib.sha256(np.ascontiguousarray(keys, "<i8").tobytes()).hexdigest()[:16]


def signed_sum(keys: NDArray[np.int64], embeddings: FloatArray) -> NDArray[np.float64]:
    """Returns ``d`` numbers that change with any embedding, but not with the order of items, ``float64 (d,)``.

    Args:
        keys: ``int64 (n,)``; signs follow from them.
        embeddings: ``float32 (n, d)``.
    """
    words = seeding.mix(keys.astype(np.uint64), np.zeros(1, np.uint64))
    signs = np.where((words & np.uint64(1)).astype(np.bool_), 1.0, -1.0)
    total: NDArray[np.float64] = signs @ embeddings.astype(np.float64)
    return np.asarray(total / np.sqrt(len(signs)))


def same_sums(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    """Says whether two results of :func:`signed_sum` are those of the same embeddings: libraries round differently."""
    if len(first) != len(second):
        return False
    scale = max(float(np.abs(first).max()), 1.0)
    return bool(np.abs(np.subtract(first, second)).max() <= _TOLERANCE * scale)
