"""Normal noise that depends on a row's own bytes alone, so that purifying stays a function of the row."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from kuaifair_env import random_streams
from kuaifair_env.data.schema import FloatArray

_HALF_STEP = 2.0**-54


def row_keys(rows: FloatArray, seed: int) -> random_streams.Keys:
    """Returns one stream key for each row, from a seed and the row's bytes.

    Args:
        rows: ``float32 (B, n)``.
        seed: Seed.

    Returns:
        ``uint64 (B,)``.
    """
    # Adding zero turns -0.0 into 0.0, which compares equal but has other bytes.
    words = (np.ascontiguousarray(rows, np.float32) + np.float32(0.0)).view(np.uint32).astype(np.uint64)
    places = np.arange(words.shape[1], dtype=np.uint64)
    folded = np.bitwise_xor.reduce(random_streams.mix(words, places), axis=1)
    return random_streams.derive(folded, 0) ^ random_streams.stream_key(seed)


def row_normals(keys: random_streams.Keys, size: int, number: int = 0) -> FloatArray:
    """Returns standard normal draws.

    Args:
        keys: ``uint64 (B,)``, from :func:`row_keys`.
        size: Draws for each row.
        number: Which of the row's sub-streams to draw from.

    Returns:
        ``float32 (B, size)``.
    """
    streams = random_streams.derive(keys, number)
    uniforms = random_streams.uniforms(streams[:, None], np.arange(size, dtype=np.uint64))
    return np.asarray(ndtri(uniforms + _HALF_STEP), np.float32)
