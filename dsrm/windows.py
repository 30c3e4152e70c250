"""History windows that purifiers are trained and probed on: cut out of a log, or played by simulated policies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import FixedSessions, SessionSimulator
from kuaifair_env.spaces import observed_states, top_k
from kuaifair_env.world import World, windows_before

MIN_LENGTH, MAX_LENGTH = 5, 50

_MAX_STEPS = 12
_SLATE_SIZE = 10
_MAX_BATCH = 512
_MAX_TASTE, _MAX_POPULARITY = 8.0, 1.5
_POOL_SIZES = (32, 128, 512)


@dataclass(frozen=True)
class WindowSettings:
    """Which windows a purifier is trained on.

    Attributes:
        min_length: Least exposures in a logged window.
        max_length: Most exposures in a logged window.
        policy_share: Share of windows that a simulated policy made in the training world.
    """

    min_length: int = MIN_LENGTH
    max_length: int = MAX_LENGTH
    policy_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.policy_share <= 1.0:
            raise ValueError(f"policy_share must lie in [0, 1], got {self.policy_share}")


@dataclass(frozen=True)
class SampledWindows:
    """Windows of users.

    Attributes:
        window: The ``n`` windows, newest item last.
        users: ``int64 (n,)``, user rows.
        logged: ``bool (n,)``, whether a window was cut out of the log.
    """

    window: HistoryWindow
    users: NDArray[np.int64]
    logged: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.users)


class WindowSource:
    """Draws windows of users: some cut out of the training log, some played by simulated policies.

    Args:
        world: The training world.
        settings: Lengths and shares.

    Raises:
        ValueError: If the world is not a training world.
    """

    def __init__(self, world: World, settings: WindowSettings) -> None:
        if world.split != "train":
            raise ValueError("purifiers learn in the training world; the test world stays unseen")
        self._world = world
        self._settings = settings

    def draw(self, users: IntArray, rng: np.random.Generator) -> SampledWindows:
        """Returns one window for each of the given user rows, which may repeat."""
        world, settings = self._world, self._settings
        rows = np.asarray(users, np.int64)
        max_length = min(settings.max_length, world.history_length)
        window = sample_windows(
            world.data.train,
            len(world.data.users),
            rows,
            rng,
            history_length=world.history_length,
            min_length=min(settings.min_length, max_length),
            max_length=max_length,
        )
        simulated = rng.random(len(rows)) < settings.policy_share
        if simulated.any():
            played = policy_windows(world, rows[simulated], rng)
            window.items[simulated], window.clicks[simulated] = played.items, played.clicks
        return SampledWindows(window, rows, ~simulated)


def sample_windows(
    log: InteractionLog,
    n_users: int,
    users: IntArray,
    rng: np.random.Generator,
    *,
    history_length: int = MAX_LENGTH,
    min_length: int = MIN_LENGTH,
    max_length: int = MAX_LENGTH,
) -> HistoryWindow:
    """Cuts one window of random length at a random place out of the history of each given user.

    Args:
        log: Usually the training log.
        n_users: Number of users of the data set.
        users: ``(n,)`` user rows, repeated for several windows of one user; each must have logged exposures.
        rng: Source of randomness.
        history_length: Width ``H`` of the windows.
        min_length: Least number of exposures (fewer where the user has fewer).
        max_length: Greatest number, at most ``history_length``.

    Returns:
        ``n`` windows.

    Raises:
        ValueError: If the lengths are out of order, or a user has no exposures.
    """
    if not 1 <= min_length <= max_length <= history_length:
        raise ValueError(
            f"need 1 <= min_length <= max_length <= history_length, got {min_length}, {max_length}, {history_length}"
        )
    rows = np.asarray(users, np.int64)
    offsets = log.offsets(n_users)
    first, last = offsets[rows], offsets[rows + 1]
    if (first == last).any():
        raise ValueError(f"user row {rows[first == last][0]} has no exposures to cut a window from")
    available = last - first
    lengths = np.minimum(rng.integers(min_length, max_length + 1, len(rows)), available)
    ends = first + lengths + (rng.random(len(rows)) * (available - lengths + 1)).astype(np.int64)
    return windows_before(log, ends, lengths, history_length)


def policy_windows(world: World, users: IntArray, rng: np.random.Generator) -> HistoryWindow:
    """Plays one short session of each given user and returns where its window ended.

    Each session is served by another policy, so that training meets the whole range: slates are the top items by
    ``a cos(s~, e_i) + b popularity_i`` with ``a`` from 0 to 8 and ``b`` from -1.5 to 1.5 drawn for the session, among
    32, 128 or 512 random candidates drawn for the step (from nearly random to nearly greedy), for 1 to 12 steps after
    the logged history. Feedback comes from the given world.

    Args:
        world: The training world to learn from; the test world to probe what was learned.
        users: ``(n,)`` user rows; they may repeat.
        rng: Source of randomness.

    Returns:
        ``n`` windows.
    """
    rows = np.asarray(users, np.int64)
    steps = rng.integers(1, _MAX_STEPS + 1, len(rows))
    # Sessions of equal length share a batch, so that none runs longer than it must.
    order = np.argsort(steps, kind="stable")
    batches = np.array_split(order, max(1, len(order) // _MAX_BATCH))
    windows = [_play_sessions(world, rows[batch], steps[batch], rng) for batch in batches]
    items = np.empty((len(rows), world.history_length), np.int32)
    clicks = np.empty(items.shape, np.bool_)
    items[order] = np.concatenate([window.items for window in windows])
    clicks[order] = np.concatenate([window.clicks for window in windows])
    return HistoryWindow(items, clicks)


def _play_sessions(
    world: World, users: NDArray[np.int64], steps: NDArray[np.int64], rng: np.random.Generator
) -> HistoryWindow:
    """Plays one session of each user, all at once, and returns the windows after each user's number of steps."""
    keys = rng.integers(0, 2**63, len(users)).astype(np.uint64)
    simulator = SessionSimulator(
        world,
        len(users),
        FixedSessions(users, keys),
        max_len=int(steps.max()),
        slate_size=min(_SLATE_SIZE, world.n_items),
        leave=NeverLeave(),
    )
    simulator.reset(np.arange(len(users)))
    units = unit_rows(world.embeddings[: world.n_items]).T
    popularity = log_popularity(world.exposures).astype(np.float32)
    taste_weight = rng.uniform(0.0, _MAX_TASTE, (len(users), 1)).astype(np.float32)
    popularity_weight = rng.uniform(-_MAX_POPULARITY, _MAX_POPULARITY, (len(users), 1)).astype(np.float32)
    windows = simulator.history()
    for step in range(1, int(steps.max()) + 1):
        pool_size = min(int(rng.choice(_POOL_SIZES)), world.n_items)
        pool = rng.choice(world.n_items, pool_size, replace=False)
        similarity = unit_rows(observed_states(world, simulator.history())) @ units[:, pool]
        scores = taste_weight * similarity + popularity_weight * popularity[pool]
        simulator.step(pool[top_k(scores, simulator.slate_size)])
        finished = np.flatnonzero(steps == step)
        if len(finished):
            last = simulator.history(finished)
            windows.items[finished], windows.clicks[finished] = last.items, last.clicks
    return windows


def unit_rows(vectors: FloatArray) -> FloatArray:
    """Returns vectors of length 1; zero vectors stay zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: FloatArray = vectors / np.maximum(norms, np.float32(1e-9))
    return units
