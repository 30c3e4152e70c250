"""Item embeddings for agents: a truncated SVD of the training log's clicks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from kuaifair_env.data.cache import cache_dir, rows_hash
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.files import atomic_path

EMBEDDING_DIM = 64

_VERSION = 1
_TRIVIAL = 0.999
_SPARE_FACTORS = 8


def svd_item_embeddings(
    log: InteractionLog, n_users: int, n_items: int, dimension: int = EMBEDDING_DIM, seed: int = 0
) -> FloatArray:
    """Embeds items by a truncated SVD of the degree-normalised click matrix.

    With ``C`` the binary click matrix, factors of ``D_u^-1/2 C D_i^-1/2`` are scaled by their singular values;
    the first factor, and any other whose singular value is 1 up to rounding, only says how often an item was
    clicked or to which island it belongs, and is dropped. Rows have norm ``sqrt(dimension)``, so that components
    are of order one, and items that nobody clicked are zero.

    Args:
        log: The training log.
        n_users: Number of users.
        n_items: Number of items.
        dimension: Size ``d`` of an embedding.
        seed: Seed of the randomised SVD.

    Returns:
        ``float32 (n_items, dimension)``.

    Raises:
        DataError: If the dimension is below 1, the log has no clicks, or too few users or items for that many factors.
    """
    from scipy import sparse
    from sklearn.utils.extmath import randomized_svd

    if not log.clicks.any():
        raise DataError("the training log has no clicks; embeddings need positive feedback")
    if dimension < 1:
        raise DataError(f"embeddings need a dimension of at least 1, got {dimension}")
    wanted = dimension + _SPARE_FACTORS
    if min(n_users, n_items) <= wanted:
        raise DataError(
            f"{n_users} users and {n_items} items give fewer than the {wanted} factors that embeddings of "
            f"dimension {dimension} need; use embedding_dim={max(min(n_users, n_items) - _SPARE_FACTORS - 1, 1)}"
        )
    cells = np.unique(log.users[log.clicks].astype(np.int64) * n_items + log.items[log.clicks])
    rows, columns = np.divmod(cells, n_items)
    user_degrees = np.bincount(rows, minlength=n_users)
    item_degrees = np.bincount(columns, minlength=n_items)
    weights = 1.0 / np.sqrt(user_degrees[rows] * item_degrees[columns])
    matrix = sparse.csr_matrix((weights, (rows, columns)), shape=(n_users, n_items))
    _, values, factors = randomized_svd(matrix, wanted, n_iter=5, random_state=seed)
    first = max(1, int((values > _TRIVIAL).sum()))
    kept = slice(first, first + dimension)
    embeddings = factors[kept].T * values[kept]
    if embeddings.shape[1] < dimension:
        raise DataError(
            f"the click matrix falls into {first} unconnected parts, which leaves {embeddings.shape[1]} useful "
            f"factors; use embedding_dim={embeddings.shape[1]} or a denser log"
        )
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
    clicked = item_degrees[:, None] > 0
    scaled = np.divide(embeddings, norms, out=np.zeros_like(embeddings), where=clicked & (norms > 0))
    return np.asarray(scaled * np.sqrt(dimension), np.float32)


def cached_embeddings(data: InteractionData, dimension: int, folder: str | Path | None = None) -> FloatArray:
    """Returns :func:`svd_item_embeddings` of a data set's training log from the cache.

    Args:
        data: The data set.
        dimension: Size ``d`` of an embedding.
        folder: The cache folder; None takes the default one.
    """
    name = f"{data.data_hash}-{rows_hash(data)}-svd{dimension}-v{_VERSION}.npy"
    path = cache_dir(folder) / "embeddings" / name
    if path.exists():
        try:
            embeddings = np.load(path, allow_pickle=False)
            if embeddings.dtype == np.float32 and embeddings.shape == (len(data.items), dimension):
                return np.asarray(embeddings)
        except (OSError, ValueError, EOFError):
            pass
        warnings.warn(f"{path} is damaged; it is made again", stacklevel=2)
    embeddings = svd_item_embeddings(data.train, len(data.users), len(data.items), dimension)
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, embeddings, allow_pickle=False)
    return embeddings
