"""Worlds of real answers only: users are shown what a platform showed them at random, and answer what was logged."""

from __future__ import annotations

from typing import Any

import numpy as np

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.errors import DataError
from kuaifair_env.response.logged import LoggedResponse
from kuaifair_env.world import World, build_world, candidate_rows, users_of_worlds

REPLAY_SLATE_SIZE = 5
"""Items per slate of a replay, and so the candidates that a user needs, where nothing else is said."""

REPLAY_SESSIONS: dict[str, Any] = {"slate_size": REPLAY_SLATE_SIZE, "repeats": "forbid"}
"""Settings of sessions in ids with a replay, where nothing else is said; of their training worlds too."""


def build_replay_world(
    data: InteractionData,
    *,
    candidates: IntArray | None = None,
    users: IntArray | None = None,
    min_candidates: int = REPLAY_SLATE_SIZE,
    embeddings: FloatArray | None = None,
    **settings: Any,
) -> World:
    """Builds the test world in which every answer was logged; no model stands in between.

    A user's candidates are the items of the user's rows in the test log, whose items must have been chosen at random.
    Each is shown at most once in a session, and a session is truncated when the user has fewer left than fill a slate.

    Args:
        data: The data set.
        candidates: Item rows that may be recommended, those of the training world; None takes
            :func:`~kuaifair_env.world.candidate_rows`. Rows of other items are left out, and ``response.describe()``
            of the world says how many (``rows_of_other_items``).
        users: User rows whose sessions may start here; None takes the test world's usual, held-out users.
        min_candidates: Candidates that a user needs; those who have fewer have no sessions. At least the slate size.
        embeddings: See :func:`~kuaifair_env.world.build_world`.
        **settings: Sizes and popularity groups; see there.

    Raises:
        DataError: If no user has enough candidates, or the parts do not fit each other.
    """
    rows = candidate_rows(data) if candidates is None else np.asarray(candidates, np.int64)
    response = LoggedResponse.from_log(data.test, data, rows)
    usual = users_of_worlds(data)[1] if users is None else np.unique(np.asarray(users, np.int64))
    enough = usual[response.pairs.counts[usual] >= min_candidates]
    if not len(enough):
        raise DataError(
            f"none of {len(usual)} users of {data.provenance.name} was shown {min_candidates} of the candidates at "
            f"random; the most that one was shown is {response.pairs.counts[usual].max(initial=0)}"
        )
    return build_world(data, "test", response, candidates=rows, users=enough, embeddings=embeddings, **settings)
