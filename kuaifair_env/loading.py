"""Builds worlds: from a user's own data, from the official files, or from the synthetic twins."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import random_streams
from kuaifair_env.data.cache import cache_dir
from kuaifair_env.data.files import atomic_path
from kuaifair_env.data.popularity import PopularitySource, groups_of
from kuaifair_env.data.schema import FloatArray, IntArray, InteractionData, Split
from kuaifair_env.embeddings import svd_item_embeddings
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.fitting import ResponseKind
from kuaifair_env.worlds import World, initial_history

HISTORY_LENGTH = 50
EMBEDDING_DIM = 64
_EMBEDDINGS_VERSION = 1
_FEWEST_TEST_EXPOSURES = 20
_WANTED_HELD_OUT_USERS = 1000


def candidate_rows(
    data: InteractionData, fewest_exposures: int = _FEWEST_TEST_EXPOSURES
) -> NDArray[np.int64]:
    """Returns the items that both worlds recommend: those which the test log covers.

    Only there does the test world know what users do, and a common candidate set lets an agent with one output
    per item move from the training world to the test world.

    Args:
        data: The data set.
        fewest_exposures: Test-log exposures that an item needs.

    Raises:
        DataError: If no item has as many.
    """
    covered = np.flatnonzero(data.test.exposures(len(data.items)) >= fewest_exposures)
    if len(covered) == 0:
        raise DataError(
            f"no item has {fewest_exposures} exposures in the test log; lower fewest_test_exposures"
        )
    return covered


def held_out_users(data: InteractionData) -> NDArray[np.int64]:
    """Returns the users that training worlds never meet, chosen by a hash of their raw id.

    A fifth of the users of the test log; up to half of them where that gives fewer than 1,000.
    """
    tested = np.unique(data.test.users).astype(np.int64)
    count = max(len(tested) // 5, min(_WANTED_HELD_OUT_USERS, len(tested) // 2))
    hashes = random_streams.mix(data.users.ids[tested].astype(np.uint64), np.zeros(1, np.uint64))
    return np.sort(tested[np.argsort(hashes, kind="stable")[:count]])


def build_world(
    data: InteractionData,
    split: Split,
    response: ResponseModel,
    *,
    candidates: IntArray | None = None,
    users: IntArray | None = None,
    embeddings: FloatArray | None = None,
    history_length: int = HISTORY_LENGTH,
    popularity: PopularitySource = "train",
    true_preference: tuple[FloatArray, FloatArray] | None = None,
) -> World:
    """Builds the world of one split from a data set and a response model that was fitted on that split.

    Args:
        data: The data set, items in the order that ``response`` knows.
        split: ``"train"`` or ``"test"``.
        response: What users do; see :func:`kuaifair_env.response.fitting.fit_response`.
        candidates: Item rows that may be recommended; None takes :func:`candidate_rows`.
        users: User rows whose sessions may start here; None takes :func:`held_out_users` for the test world and
            all others that have training exposures for the training world.
        embeddings: ``float32 (items, d)``, agent-side item embeddings that know nothing of the test log; None takes
            :func:`~kuaifair_env.embeddings.svd_item_embeddings` of the training log with ``d = 64``.
        history_length: Places ``H`` in a history window.
        popularity: Source of the popularity groups: exposures in the training log, or the platform's counts.
        true_preference: Taste vectors of items and users where the truth is known.

    Raises:
        DataError: If the parts do not fit each other.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', got {split!r}")
    rows = candidate_rows(data) if candidates is None else np.asarray(candidates, np.int64)
    order = np.concatenate([rows, np.setdiff1d(np.arange(len(data.items)), rows)])
    arranged = data.arranged(rows)
    if users is None:
        held_out = held_out_users(data)
        users = held_out if split == "test" else np.setdiff1d(np.unique(data.train.users), held_out)
    if embeddings is None:
        embeddings = svd_item_embeddings(data.train, len(data.users), len(data.items), EMBEDDING_DIM)
    if true_preference is not None:
        true_preference = (true_preference[0][order], true_preference[1])
    return World(
        split=split,
        data=arranged,
        n_items=len(rows),
        groups=groups_of(arranged, np.arange(len(rows)), source=popularity),
        embeddings=embeddings[order],
        response=response.rearranged(order),
        users=np.unique(np.asarray(users, np.int64)),
        initial_history=initial_history(arranged.train, len(data.users), history_length),
        true_preference=true_preference,
    )


def cached_embeddings(data: InteractionData, dimension: int, folder: str | Path | None = None) -> FloatArray:
    """Returns :func:`~kuaifair_env.embeddings.svd_item_embeddings` of a data set's training log from the cache.

    Args:
        data: The data set.
        dimension: Size ``d`` of an embedding.
        folder: The cache folder; None takes the default one.
    """
    name = f"{data.data_hash}-{_rows_hash(data)}-svd{dimension}-v{_EMBEDDINGS_VERSION}.npy"
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


def _rows_hash(data: InteractionData, contents: bool = False) -> str:
    """Hashes what ``data_hash`` leaves out: which row is whose, and on request features, tags and watch ratios.

    The same logs with the items in another order, or with other features, give other tables.
    """
    columns: list[NDArray[Any] | None] = [data.users.ids, data.items.ids]
    if contents:
        columns += [data.users.features.values, data.items.features.values, data.items.tags]
        columns += [data.train.watch_ratios, data.test.watch_ratios]
    digest = hashlib.sha256()
    for column in columns:
        array = np.zeros(0, np.bool_) if column is None else np.ascontiguousarray(column)
        digest.update(f"{array.shape} {array.dtype.str} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:8]


def cached_response(
    data: InteractionData, split: Split, kind: ResponseKind = "auto", folder: str | Path | None = None
) -> ResponseModel:
    """Returns the response model of a data set's split from the cache, fitting it on first use.

    Args:
        data: The data set.
        split: Whose log to fit: ``"train"`` or ``"test"``.
        kind: ``"auto"`` observes a fully covered test matrix and fits a factor model otherwise.
        folder: The cache folder; None takes the default one.
    """
    if kind not in get_args(ResponseKind):
        raise ValueError(f"response must be one of {get_args(ResponseKind)}, got {kind!r}")
    from kuaifair_env.response import fit_response, load_response, response_version

    contents = f"{data.data_hash}-{_rows_hash(data, contents=True)}"
    name = f"{contents}-{split}-{kind}-v{response_version(kind)}.safetensors"
    path = cache_dir(folder) / "responses" / name
    if path.exists():
        try:
            return load_response(path)
        except ArtifactError as error:
            warnings.warn(f"the response model is fitted again: {error}", stacklevel=2)
    response = fit_response(data, split, kind)
    response.save(path)
    return response
