"""What a world is, in a few numbers that machines agree on: which results may be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import FloatArray
from kuaifair_env.response.base import HistoryWindow, ResponseModel
from kuaifair_env.response.logged import UserItems

TOLERANCE = 1e-3
"""How far two probes of the same world may lie apart: linear algebra libraries round differently."""

_DECIMALS = 5
_NUMBERS_AT_ONCE = 100_000
_PROBED = 64
STORED = 16
"""How many items and users have probes of their own."""


@dataclass(frozen=True)
class WorldFingerprint:
    """What a world is: exact parts, and probes of what is computed in floating point.

    Hashes of rounded numbers would now and then differ between machines that disagree in the last digit, so fitted
    quantities are compared as numbers, within :data:`TOLERANCE`.

    Attributes:
        parts: Hash of each exact part: ``data`` (ids and both logs), ``click`` (what counts as one), ``users``,
            ``candidates`` (with their popularity groups) and ``form`` (split, sizes, kind of response and of states).
        response: Probes of what users do, each divided by the largest feedback where it exceeds 1: mean and standard
            deviation of expected feedback over 64 users and 64 items, mean realised feedback at a fixed random number,
            and expected feedback of 16 single pairs.
        embeddings: Probes of what agents see: weighted sums of the components of 16 items and, with an encoder of
            states, of the first observed states of 16 users.
    """

    parts: Mapping[str, str]
    response: tuple[float, ...]
    embeddings: tuple[float, ...]

    @classmethod
    def of_parts(
        cls, parts: Mapping[str, Any], response: tuple[float, ...], embeddings: tuple[float, ...]
    ) -> WorldFingerprint:
        """Hashes the exact parts: arrays, tuples of arrays, or JSON-able.

        The others are made by :func:`response_probes` and :func:`embedding_probes`.
        """
        return cls({name: _hash(part) for name, part in parts.items()}, response, embeddings)

    @classmethod
    def of_description(cls, described: Mapping[str, Any]) -> WorldFingerprint:
        """Returns the fingerprint that :meth:`describe` wrote."""
        return cls(described["parts"], tuple(described["response"]), tuple(described["embeddings"]))

    def describe(self) -> dict[str, Any]:
        """Returns everything, JSON-able; ``id`` is the short form."""
        return {"id": str(self), **asdict(self), "response": list(self.response), "embeddings": list(self.embeddings)}

    def differences(self, other: WorldFingerprint) -> list[str]:
        """Returns which parts differ from another world's; none if it is the same world."""
        exact = [name for name, digest in self.parts.items() if other.parts.get(name) != digest]
        probes = ("response", "embeddings")
        return exact + [name for name in probes if not _close(getattr(self, name), getattr(other, name))]

    @cached_property
    def short(self) -> str:
        """A hash of the exact parts, and mean expected feedback in thousandths, for people."""
        return f"{_hash(sorted(self.parts.items()))}-{round(1000 * self.response[0]):03d}"

    def __str__(self) -> str:
        return self.short


def _hash(part: Any) -> str:
    digest = hashlib.sha256()
    for text in _json_pieces(part):
        digest.update(text.encode())
    return digest.hexdigest()[:10]


def _json_pieces(part: Any) -> Iterator[str]:
    """Yields the JSON of a part piece by piece: that of millions of ids never lies in memory as a whole."""
    if isinstance(part, np.ndarray):
        for begin in range(0, max(len(part), 1), _NUMBERS_AT_ONCE):
            piece = json.dumps(part[begin : begin + _NUMBERS_AT_ONCE].tolist())
            yield ", " + piece[1:-1] if begin else piece[:-1]
        yield "]"
    elif isinstance(part, tuple):
        for place, inner in enumerate(part):
            yield ", " if place else "["
            yield from _json_pieces(inner)
        yield "]"
    else:
        yield json.dumps(part, sort_keys=True)


def _close(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return len(first) == len(second) and bool(np.allclose(first, second, rtol=0.0, atol=TOLERANCE))


def spread(size: int, count: int) -> NDArray[np.int64]:
    """Returns ``count`` rows spread evenly over ``size``."""
    return np.arange(count) * size // count


def _rounded(values: Any) -> tuple[float, ...]:
    return tuple(np.round(np.asarray(values, np.float64), _DECIMALS).tolist())


def response_probes(
    response: ResponseModel,
    users: NDArray[np.int64],
    n_items: int,
    histories: HistoryWindow,
    candidates: UserItems | None = None,
) -> tuple[float, ...]:
    """Returns the probes of a response model; see :class:`WorldFingerprint`.

    Args:
        response: What users do.
        users: ``int64 (U,)``, user rows.
        n_items: Number of candidates.
        histories: Windows of all users of the data set, from which sessions start.
        candidates: What each user may be shown, and is probed with; None takes items spread over all candidates.
    """
    probed = users[spread(len(users), _PROBED)]
    if candidates is None:
        items = np.tile(spread(n_items, _PROBED), (_PROBED, 1))
    else:
        items = candidates.spread(probed, _PROBED).astype(np.int64)
    expected = response.expected(probed, items, histories.take(probed))
    # Multiples of the golden section, which fill the unit interval evenly on every machine alike.
    uniforms = np.modf(np.arange(expected.size) * 0.6180339887498949)[0].reshape(expected.shape)
    realised = response.feedback(expected, uniforms)
    pairs = expected[np.arange(STORED) * 4, np.arange(STORED) * 7 % _PROBED]
    scale = max(1.0, float(response.describe().get("largest", 1.0)))
    mean, deviation = expected.mean(dtype=np.float64), expected.std(dtype=np.float64)
    return _rounded(np.r_[mean, deviation, realised.mean(dtype=np.float64), pairs] / scale)


def embedding_probes(*vectors: FloatArray) -> tuple[float, ...]:
    """Returns the probes of item embeddings and observed states, each ``float32 (n, d)``."""
    return _rounded(
        np.concatenate([rows @ (np.cos(np.arange(rows.shape[1])) / np.sqrt(rows.shape[1])) for rows in vectors])
    )
