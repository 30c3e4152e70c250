"""Seeds and random numbers of sessions: a seed names a stream, a stream has sessions, a session has uniforms.

The draws of a session are a pure function of (session key, step, slot), so they are the same in a batch of one and of
a thousand, on any platform, in any order. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), evaluated on a counter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

# Arrays, since a small ufunc takes twice as long with a scalar.
_SUB_STREAM = np.asarray(0xD1B54A32D192ED03, np.uint64)
_GOLDEN = np.asarray(0x9E3779B97F4A7C15, np.uint64)
_MIX_1 = np.asarray(0xBF58476D1CE4E5B9, np.uint64)
_MIX_2 = np.asarray(0x94D049BB133111EB, np.uint64)
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_11, _ONE = (np.asarray(n, np.uint64) for n in (30, 27, 31, 11, 1))
_TO_UNIT = np.asarray(2.0**-53)
_STEPS_AT_ONCE = 8
_HALF_STEP = np.asarray(2.0**-54)


@lru_cache(maxsize=4096)  # a batch of sessions names the same streams as the last one
def stream_key(seed: int) -> np.uint64:
    """Returns the 64-bit key of the stream that a seed names."""
    return np.uint64(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])


def stream_keys(seed: int, count: int) -> Keys:
    """Returns the keys of seeds ``seed, seed + 1, ...``, as Gymnasium seeds the rows of a vector environment."""
    return np.asarray([stream_key(seed + row) for row in range(count)], np.uint64)


def mix(keys: Keys, counters: NDArray[np.uint64]) -> Keys:
    """Returns pseudo-random 64-bit words for (key, counter), broadcast against each other."""
    return _mixed(keys + (counters + _ONE) * _GOLDEN)


def _mixed(word: Keys) -> Keys:
    """Returns the finaliser of words, in place."""
    word ^= word >> _SHIFT_30
    word *= _MIX_1
    word ^= word >> _SHIFT_27
    word *= _MIX_2
    word ^= word >> _SHIFT_31
    return word


def derive(keys: Keys, number: int | NDArray[Any]) -> Keys:
    """Returns the keys of the ``number``-th sub-stream of each stream, unrelated to the stream's own draws."""
    return mix(keys ^ _SUB_STREAM, np.atleast_1d(np.asarray(number, np.uint64)))


def id_keys(ids: NDArray[Any]) -> NDArray[np.int64]:
    """Returns an integer for each raw id, ``int64``: the id itself, or a hash of an id that is text.

    The same id has the same key in every data set, whatever other ids there are.
    """
    if ids.dtype.kind != "U":
        return ids.astype(np.int64)
    width = max(ids.dtype.itemsize // 4, 1)
    letters = np.ascontiguousarray(ids, f"<U{width}").view("<u4").reshape(len(ids), width).astype(np.uint64)
    places = np.arange(width, dtype=np.uint64)
    words = np.where(letters > 0, mix(letters, places), np.uint64(0))
    return np.asarray(mix(np.bitwise_xor.reduce(words, axis=1), np.zeros(1, np.uint64)).view(np.int64))


def uniforms(keys: Keys, counters: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Returns uniforms in [0, 1) with 53 random bits for (key, counter), broadcast against each other."""
    return _units(mix(keys, counters))


def _units(words: Keys) -> NDArray[np.float64]:
    """Returns the upper 53 bits of words as numbers in [0, 1); overwrites the words."""
    words >>= _SHIFT_11
    draws: NDArray[np.float64] = words.astype(np.float64)
    draws *= _TO_UNIT
    return draws


class SessionDraws:
    """The uniforms behind the responses of ``B`` sessions, drawn for a few steps of all at a time.

    Draw 0 of a session's stream picks the user; ``K`` for each step follow.

    Args:
        batch_size: Number of sessions ``B``.
        slate_size: Draws of a step, ``K``.
    """

    def __init__(self, batch_size: int, slate_size: int) -> None:
        self._keys = np.zeros(batch_size, np.uint64)
        self._slate_size = slate_size
        # What mix() adds to the keys for draws 1, 2, ... of a session.
        increments = np.arange(2, _STEPS_AT_ONCE * slate_size + 2, dtype=np.uint64) * _GOLDEN
        self._increments = increments.reshape(_STEPS_AT_ONCE, 1, slate_size)
        self._ahead = np.zeros((_STEPS_AT_ONCE, batch_size, slate_size))
        self._next = _STEPS_AT_ONCE

    def start(self, rows: NDArray[Any], keys: Keys) -> None:
        """Starts sessions of the given keys in the given rows."""
        self._keys[rows] = keys
        if self._next < _STEPS_AT_ONCE:
            words = keys[:, None] + self._increments[: _STEPS_AT_ONCE - self._next]
            self._ahead[self._next :, rows] = _units(_mixed(words))

    def of_step(self, steps: NDArray[np.int64]) -> NDArray[np.float64]:
        """Returns ``float64 (B, K)`` for one more step of all sessions, of which each took ``steps (B,)`` before."""
        if self._next == _STEPS_AT_ONCE:
            keys = self._keys + (steps * self._slate_size).astype(np.uint64) * _GOLDEN
            self._ahead = _units(_mixed(keys[:, None] + self._increments))
            self._next = 0
        self._next += 1
        draws: NDArray[np.float64] = self._ahead[self._next - 1]
        return draws


def row_keys(rows: NDArray[np.float32], seed: int) -> Keys:
    """Returns the keys ``(B,)`` of the random streams of ``float32 (B, n)`` rows, from a seed and the rows' bytes."""
    # Adding zero turns -0.0 into 0.0, which compares equal but has other bytes.
    words = (np.ascontiguousarray(rows, np.float32) + np.float32(0.0)).view(np.uint32).astype(np.uint64)
    places = np.arange(words.shape[1], dtype=np.uint64)
    folded = np.bitwise_xor.reduce(mix(words, places), axis=1)
    return derive(folded, 0) ^ stream_key(seed)


def normals(keys: Keys, counters: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Returns standard normal draws for (key, counter), float32, broadcast against each other."""
    from scipy.special import ndtri

    return np.asarray(ndtri(uniforms(keys, counters) + _HALF_STEP), np.float32)


def row_normals(keys: Keys, size: int, stream: int | NDArray[Any] = 0) -> NDArray[np.float32]:
    """Returns ``float32 (B, size)`` standard normal draws from one of the streams of each of ``B`` rows.

    Args:
        keys: ``uint64 (B,)``.
        size: Draws of each row.
        stream: Number of the stream, the same for all rows or ``int (B,)``.
    """
    return normals(derive(keys, stream)[:, None], np.arange(size, dtype=np.uint64))
