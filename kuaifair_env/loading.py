"""Builds worlds: from a user's own data, from the official files, or from the synthetic twins."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env import random_streams
from kuaifair_env.data.popularity import PopularitySource, groups_of
from kuaifair_env.data.schema import IntArray, InteractionData
from kuaifair_env.embeddings import svd_item_embeddings
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.worlds import Split, World, initial_history

HISTORY_LENGTH = 50
EMBEDDING_DIM = 64
_FEWEST_TEST_EXPOSURES = 20
_WANTED_HELD_OUT_USERS = 1000


def candidate_rows(data: InteractionData, fewest_exposures: int = _FEWEST_TEST_EXPOSURES) -> NDArray[np.int64]:
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
        raise DataError(f"no item has {fewest_exposures} exposures in the test log; lower fewest_test_exposures")
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
    embedding_dim: int = EMBEDDING_DIM,
    history_length: int = HISTORY_LENGTH,
    popularity: PopularitySource = "train",
) -> World:
    """Builds the world of one split from a data set and a response model that was fitted on that split.

    Args:
        data: The data set, items in the order that ``response`` knows.
        split: ``"train"`` or ``"test"``.
        response: What users do; see :func:`kuaifair_env.response.fit.fit_responses`.
        candidates: Item rows that may be recommended; None takes :func:`candidate_rows`.
        users: User rows whose sessions may start here; None takes :func:`held_out_users` for the test world and
            all others that have training exposures for the training world.
        embedding_dim: Size ``d`` of the agent-side item embeddings.
        history_length: Places ``H`` in a history window.
        popularity: Source of the popularity groups: exposures in the training log, or the platform's counts.

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
    return World(
        split=split,
        data=arranged,
        n_items=len(rows),
        groups=groups_of(arranged, np.arange(len(rows)), source=popularity),
        embeddings=svd_item_embeddings(arranged.train, len(data.users), len(data.items), embedding_dim),
        response=response.rearranged(order),
        users=np.asarray(users, np.int64),
        initial_history=initial_history(arranged.train, len(data.users), history_length),
    )
