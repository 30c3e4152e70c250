"""Agent-side item embeddings: one direction for every item, from the training log, its features and its id."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import seeding
from kuaifair_env.data.cache import cache_dir
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import BoolArray, Catalogue, FloatArray, IdArray, InteractionLog
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import Family, open_artifact, save_artifact, take_tensors
from kuaifair_env.progress import announce, announce_rebuilt

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

EMBEDDING_DIM = 64
MAX_DIMENSION = 4_096
"""Memory grows with its square; what a dimension exceeds the rank of the click matrix by holds ids alone."""

EMBEDDINGS = Family("kuaifair-embeddings", 1, "table of item embeddings", "it has to be made anew")

_KIND = "items"
_VERSION = 3
_DECIMALS = 5
_MIN_DISTANCE = 0.02
"""Between two unit embeddings; their cosine is then at most 1 - 2e-4."""
_ID_WEIGHT = 0.05
_ATTEMPTS = 50
_MAX_ITEMS = {1: 2, 2: 314}
"""How many directions are so far apart in one and two dimensions."""

_TRIVIAL = 0.999
_TINY = 1e-6
_SPARE_FACTORS = 8
_PRIOR_CLICKS = 5.0
_MAX_CLICKS = 50.0
_RIDGE = 500.0
_MAX_DEVIATIONS = 5.0
_ITEMS_AT_ONCE = 65_536

Matrix = NDArray[np.float64]
Floats = TypeVar("Floats", bound=np.floating[Any])


def item_embeddings(
    log: InteractionLog, n_users: int, items: Catalogue, dimension: int = EMBEDDING_DIM, seed: int = 0
) -> FloatArray:
    """Embeds items by who clicked them, and by features, tags and co-exposure as far as few clicked them.

    An item with ``n`` clicks is the mean of two vectors, with weights ``n`` and 5:

    - a truncated SVD of the degree-normalised click matrix. With ``C`` the binary click matrix, factors of
      ``D_u^-1/2 C D_i^-1/2`` are scaled by their singular values, and items to length 1. The first factor, and any
      other whose singular value is 1 up to rounding, only says how often an item was clicked or to which island it
      belongs, and is dropped.
    - what a ridge regression of these vectors predicts from the item's features, its tags, and its co-exposure: the
      mean factors of users to whom it was shown and who did not click. Nothing but this is known of an item without
      clicks.

    A small direction that follows from the item's id keeps apart what is known to be alike. See :func:`separated` for
    what holds of the result.

    Args:
        log: The training log.
        n_users: Number of users.
        items: The items, with their features and tags.
        dimension: Size ``d`` of an embedding; what it exceeds the rank of the click matrix by holds ids alone.
        seed: Seed of the randomised SVD.

    Returns:
        ``float32 (M, d)`` of length ``sqrt(d)``, so that components are of order one.

    Raises:
        DataError: If the log has no clicks, or the dimension is below 1, above :data:`MAX_DIMENSION`, or too small to
            tell the items apart.
    """
    if not log.clicks.any():
        raise DataError("the training log has no clicks; embeddings need positive feedback")
    need_dimension(dimension)
    factors = _click_factors(log, n_users, len(items), dimension, seed)
    vectors = _predicted(_design(log, items, factors), factors)
    trust = (factors.clicks / (factors.clicks + _PRIOR_CLICKS))[:, None]
    vectors *= 1.0 - trust
    vectors += trust * factors.items
    vectors += _ID_WEIGHT * _id_directions(items.ids, dimension)
    return separated(vectors, items.ids)


def need_dimension(dimension: int) -> None:
    """Checks the size of an embedding.

    Raises:
        DataError: If it is below 1 or above :data:`MAX_DIMENSION`.
    """
    if not 1 <= dimension <= MAX_DIMENSION:
        raise DataError(
            f"embeddings have at least 1 dimension and at most {MAX_DIMENSION:,}, got {dimension}: embedding_dim in "
            "gym.make and make_world, dimension in item_embeddings"
        )


def separated(vectors: NDArray[np.floating[Any]], item_ids: IdArray) -> FloatArray:
    """Returns the directions of items as embeddings of one length, of which each ranks its own item first.

    An inner product with an item's own embedding, at whatever length, is largest for the item itself: all embeddings
    have length ``sqrt(d)``, and no cosine of two exceeds ``1 - 1e-4``. Where two directions are closer, both are turned
    towards directions that follow from the items' ids; zero vectors get such a direction. Rounded to five decimals, on
    which machines agree.

    Args:
        vectors: ``(M, d)``.
        item_ids: ``(M,)``, raw ids.

    Returns:
        ``float32 (M, d)``.

    Raises:
        DataError: If that many directions do not fit into ``d`` dimensions.
    """
    n_items, dimension = vectors.shape
    units = unit_rows(vectors.astype(np.float64))
    silent = np.linalg.norm(units, axis=1) < 0.5
    units[silent] = _id_directions(item_ids[silent], dimension)
    attempts = _ATTEMPTS if n_items <= _MAX_ITEMS.get(dimension, n_items) else 0
    for attempt in range(attempts):
        close = rows_with_neighbours(units, _MIN_DISTANCE)
        if len(close) == 0:
            return np.asarray(np.round(units * np.sqrt(dimension), _DECIMALS), np.float32)
        turned = units[close] + _ID_WEIGHT * _id_directions(item_ids[close], dimension, attempt + 1)
        units[close] = unit_rows(turned)
    raise DataError(
        f"embeddings of dimension {dimension} cannot tell {n_items} items apart; {2 * dimension + 6} are enough: "
        f"embedding_dim={2 * dimension + 6} in gym.make and make_world, dimension in item_embeddings"
    )


def rows_with_neighbours(vectors: Matrix, distance: float) -> NDArray[np.int64]:
    """Returns the increasing rows of the vectors that have another one within a distance, inclusive."""
    from scipy.spatial import KDTree

    distances, _ = KDTree(vectors).query(vectors, k=2, distance_upper_bound=np.nextafter(distance, np.inf))
    return np.flatnonzero(np.isfinite(np.asarray(distances)[:, 1]))


def unit_rows(vectors: NDArray[Floats]) -> NDArray[Floats]:
    """Returns the rows of a matrix scaled to length 1; zero rows stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-9), vectors.dtype)


def cached_embeddings(data: InteractionData, dimension: int, folder: str | Path | None = None) -> FloatArray:
    """Returns :func:`item_embeddings` of a data set's training log from a cache folder, or from the default one.

    What the cache holds is compared with its checksum; a damaged file is made again, which one line on stderr says.
    """
    identity = {"data": data.data_hash, "contents": data.contents_hash, "dimension": dimension, "version": _VERSION}
    name = f"{data.data_hash}-{data.contents_hash}-embeddings{dimension}-v{_VERSION}.safetensors"
    path = cache_dir(folder) / "embeddings" / name
    if path.exists():
        try:
            with open_artifact(path, _KIND, EMBEDDINGS) as (_, tensors, settings):
                if settings != identity:
                    raise ValueError("its items are others")
                return take_tensors(tensors, {"embeddings": (len(data.items), dimension)})["embeddings"]
        except ArtifactError as error:
            announce_rebuilt(error)
    announce(f"embedding the {len(data.items):,} items of {data.provenance.name}")
    embeddings = item_embeddings(data.train, len(data.users), data.items, dimension)
    save_artifact(path, _KIND, {"embeddings": embeddings}, identity, EMBEDDINGS)
    return embeddings


class _ClickFactors(NamedTuple):
    """Unit factors of users ``(U, d)`` and items ``(M, d)``, zero without clicks, and the items' users who clicked."""

    users: Matrix
    items: Matrix
    clicks: NDArray[np.int64]


def _click_factors(log: InteractionLog, n_users: int, n_items: int, dimension: int, seed: int) -> _ClickFactors:
    """Factorises the degree-normalised click matrix; columns beyond its rank are zero."""
    from sklearn.utils.extmath import randomized_svd

    matrix = _pairs(log, log.clicks, (n_users, n_items))
    user_degrees, item_degrees = np.diff(matrix.indptr), np.bincount(matrix.indices, minlength=n_items)
    matrix.data = 1.0 / np.sqrt(np.repeat(user_degrees, user_degrees) * item_degrees[matrix.indices])
    n_factors = min(dimension + _SPARE_FACTORS, n_users, n_items)
    left, values, right = randomized_svd(matrix, n_factors, n_iter=5, random_state=seed)
    first = max(1, int((values > _TRIVIAL).sum()))
    kept = slice(first, min(first + dimension, int((values > _TINY).sum())))
    users, items = np.zeros((n_users, dimension)), np.zeros((n_items, dimension))
    rank = len(values[kept])
    users[:, :rank] = left[:, kept]
    items[:, :rank] = right[kept].T * values[kept]
    return _ClickFactors(unit_rows(users), unit_rows(items), item_degrees)


def _design(log: InteractionLog, items: Catalogue, factors: _ClickFactors) -> Matrix:
    """Returns what is known of items besides their clicks: a one, features and tags, and co-exposure."""
    described = items.features.values.shape[1] + items.tags.shape[1]
    design = np.ones((len(items), 1 + described + factors.users.shape[1]))
    columns = design[:, 1 : 1 + described]
    columns[:] = np.concatenate([items.features.values, items.tags], axis=1)
    _standardise(columns, factors.clicks)
    shown = design[:, 1 + described :]
    np.multiply(_co_exposure(log, factors.users, len(items)), np.sqrt(factors.users.shape[1]), out=shown)
    return design


def _standardise(columns: Matrix, clicks: NDArray[np.int64]) -> None:
    """Turns columns into standard deviations around their mean over clicks, in place; rare values are cut."""
    columns -= np.average(columns, axis=0, weights=clicks)
    columns /= np.maximum(columns.std(axis=0), _TINY)
    np.clip(columns, -_MAX_DEVIATIONS, _MAX_DEVIATIONS, out=columns)


def _co_exposure(log: InteractionLog, user_factors: Matrix, n_items: int) -> Matrix:
    """Returns the direction of the factors of users who were shown an item and did not click it, ``(M, d)``.

    Clicks are left out, so that the vector means the same for items with clicks, on which the regression is fitted, and
    without.
    """
    shown = _pairs(log, ~log.clicks, (len(user_factors), n_items))
    weights = 1.0 / np.sqrt(np.maximum(np.diff(shown.indptr), 1))
    # What rounding leaves where these users have no factors is no direction.
    return unit_rows(np.round(shown.T @ (user_factors * weights[:, None]), _DECIMALS))


def _pairs(log: InteractionLog, which: BoolArray, shape: tuple[int, int]) -> csr_matrix:
    """Returns a matrix with 1 for the pairs of user and item in the chosen rows of a log."""
    from scipy.sparse import csr_matrix

    rows = (log.users[which], log.items[which])
    pairs = csr_matrix((np.ones(len(rows[0])), rows), shape=shape)  # adds up repeated pairs
    pairs.data[:] = 1.0
    return pairs


def _predicted(design: Matrix, factors: _ClickFactors) -> Matrix:
    """Predicts item factors by a ridge regression, weighted by clicks; none is longer than 1."""
    products = _RIDGE * np.eye(design.shape[1])
    targets = np.zeros((design.shape[1], factors.items.shape[1]))
    for begin in range(0, len(design), _ITEMS_AT_ONCE):
        rows = slice(begin, begin + _ITEMS_AT_ONCE)
        weighted = design[rows] * np.minimum(factors.clicks[rows], _MAX_CLICKS)[:, None]
        products += weighted.T @ design[rows]
        targets += weighted.T @ factors.items[rows]
    predicted = design @ np.linalg.solve(products, targets)
    predicted /= np.maximum(np.linalg.norm(predicted, axis=1, keepdims=True), 1.0)
    return np.asarray(predicted)


def _id_directions(item_ids: IdArray, dimension: int, stream: int = 0) -> Matrix:
    """Returns pseudo-random unit vectors that follow from raw ids, ``(n, d)``."""
    keys = seeding.derive(seeding.id_keys(item_ids).astype(np.uint64), stream)
    return unit_rows(2.0 * seeding.uniforms(keys[:, None], np.arange(dimension, dtype=np.uint64)) - 1.0)
