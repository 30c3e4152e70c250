"""Random windows of logged histories: what purifiers are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import FixedSessions, SessionSimulator
from kuaifair_env.spaces import embedding_sums, mean_embeddings, observed_states, top_k
from kuaifair_env.world import StateEncoder, World, windows_before

SHORTEST, LONGEST = 5, 50


@dataclass(frozen=True)
class SampledWindows:
    """Windows cut out of logs.

    Attributes:
        window: The ``n`` windows, newest item last.
        users: ``int64 (n,)``, whose they are.
        ends: ``int64 (n,)``, log row behind the last row of each window.
    """

    window: HistoryWindow
    users: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)


def sample_windows(
    log: InteractionLog,
    n_users: int,
    users: IntArray,
    rng: np.random.Generator,
    *,
    places: int = LONGEST,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
) -> SampledWindows:
    """Cuts one window of random length at a random place out of the history of each given user.

    Args:
        log: Usually the training log.
        n_users: Number of users of the data set.
        users: ``(n,)`` user rows, repeated for several windows of one user; each must have logged exposures.
        rng: Source of randomness.
        places: Width ``H`` of the windows.
        shortest: Least number of exposures (fewer where the user has fewer).
        longest: Greatest number, at most ``places``.

    Raises:
        ValueError: If the lengths are out of order, or a user has no exposures.
    """
    if not 1 <= shortest <= longest <= places:
        raise ValueError(f"need 1 <= shortest <= longest <= places, got {shortest}, {longest}, {places}")
    rows = np.asarray(users, np.int64)
    offsets = log.offsets(n_users)
    first, last = offsets[rows], offsets[rows + 1]
    if (first == last).any():
        raise ValueError(f"user row {rows[first == last][0]} has no exposures to cut a window from")
    available = last - first
    length = np.minimum(rng.integers(shortest, longest + 1, len(rows)), available)
    ends = first + length + (rng.random(len(rows)) * (available - length + 1)).astype(np.int64)
    return SampledWindows(windows_before(log, ends, length, places), rows, ends)


MAX_STEPS = 12
SLATE_SIZE = 10
_BATCH = 512
_TASTE, _POPULARITY = 8.0, 1.5
_POOLS = (32, 128, 512)


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
    steps = rng.integers(1, MAX_STEPS + 1, len(rows))
    # Sessions of equal length share a batch, so that none runs longer than it must.
    order = np.argsort(steps, kind="stable")
    parts = [
        _played(world, rows[part], steps[part], rng)
        for part in np.array_split(order, max(1, len(order) // _BATCH))
    ]
    items = np.empty((len(rows), world.history_length), np.int32)
    clicks = np.empty(items.shape, np.bool_)
    items[order] = np.concatenate([part.items for part in parts])
    clicks[order] = np.concatenate([part.clicks for part in parts])
    return HistoryWindow(items, clicks)


def _played(
    world: World, users: NDArray[np.int64], steps: NDArray[np.int64], rng: np.random.Generator
) -> HistoryWindow:
    keys = rng.integers(0, 2**63, len(users)).astype(np.uint64)
    simulator = SessionSimulator(
        world,
        len(users),
        FixedSessions(users, keys),
        max_len=int(steps.max()),
        slate_size=min(SLATE_SIZE, world.n_items),
        leave=NeverLeave(),
    )
    simulator.reset(np.arange(len(users)))
    units = _unit_rows(world.embeddings[: world.n_items]).T
    popularity = log_popularity(world.exposures).astype(np.float32)
    taste = rng.uniform(0.0, _TASTE, (len(users), 1)).astype(np.float32)
    slant = rng.uniform(-_POPULARITY, _POPULARITY, (len(users), 1)).astype(np.float32)
    ended = simulator.history()
    for step in range(int(steps.max())):
        pool = rng.choice(world.n_items, min(int(rng.choice(_POOLS)), world.n_items), replace=False)
        scores = (
            taste * (_unit_rows(observed_states(world, simulator.history())) @ units[:, pool])
            + slant * popularity[pool]
        )
        simulator.step(pool[top_k(scores, simulator.slate_size)])
        now = steps == step + 1
        if now.any():
            window = simulator.history(np.flatnonzero(now))
            ended.items[now], ended.clicks[now] = window.items, window.clicks
    return ended


def _unit_rows(vectors: FloatArray) -> FloatArray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: FloatArray = vectors / np.maximum(norms, np.float32(1e-6))
    return units


DEFAULT_EXPONENT = 0.5
DEFAULT_CLIP_QUANTILE = 0.95

STATISTICS = (
    "clicked_popularity_mean",
    "clicked_popularity_spread",
    "clicked_popular_share",
    "shown_popularity_mean",
    "shown_popular_share",
    "window_length",
    "mean_feedback",
)


def propensity_weights(
    exposures: NDArray[np.int64],
    exponent: float = DEFAULT_EXPONENT,
    clip_quantile: float = DEFAULT_CLIP_QUANTILE,
) -> FloatArray:
    """Returns inverse-propensity weights of items, ``w_j = min((1 / e_j) ** exponent, w_max)``, with mean 1.

    The propensity ``e_j`` of an item is its share of the training exposures, with one exposure added to each.

    Args:
        exposures: ``int64 (M,)``, exposures in the training log.
        exponent: 0 gives equal weights, 1 undoes exposure altogether.
        clip_quantile: Quantile of the weights of *exposed* items at which they are cut off (``w_max``).

    Raises:
        ValueError: If a setting is out of range.
    """
    if not 0.0 <= exponent <= 1.0 or not 0.0 < clip_quantile <= 1.0:
        raise ValueError(f"need 0 <= exponent <= 1 and 0 < quantile <= 1, got {exponent}, {clip_quantile}")
    propensity = (exposures + 1.0) / (exposures.sum() + len(exposures))
    weights = propensity**-exponent
    exposed = exposures > 0
    if exposed.any():
        weights = np.minimum(weights, np.quantile(weights[exposed], clip_quantile))
    return np.asarray(weights / weights.mean(), np.float32)


@dataclass(frozen=True)
class ConditionBuilder:
    """Computes conditions ``c_t`` from observed states and windows.

    A condition holds the observed state ``s~_t``, the inverse-propensity pool of the window (the same mean with
    rare items counting more), and seven statistics: mean and spread of log-popularity of what was clicked, share
    of popular items in it, mean log-popularity of what was shown and its popular share, how full the window is, and
    the click rate in it.

    Attributes:
        embeddings: ``float32 (M, d)``, agent-side item embeddings.
        weights: ``float32 (M,)``, inverse-propensity weights.
        popularity: ``float32 (M,)``, standardised ``log(1 + exposures)`` of the training log.
        popular: ``bool (M,)``, popularity groups continued to items that are no candidates.
        encoder: The world's state encoder, if it has one.
    """

    embeddings: FloatArray
    weights: FloatArray
    popularity: FloatArray
    popular: BoolArray
    encoder: StateEncoder | None = None

    @classmethod
    def of_world(
        cls,
        world: World,
        exponent: float = DEFAULT_EXPONENT,
        clip_quantile: float = DEFAULT_CLIP_QUANTILE,
    ) -> ConditionBuilder:
        """Builds the tables from a world's embeddings, popularity groups and training log.

        Args:
            world: Either world of a pair: what is read is the same in both.
            exponent: See :func:`propensity_weights`.
            clip_quantile: See :func:`propensity_weights`.
        """
        exposures = world.data.train.exposures(len(world.data.items))
        least = exposures[: world.n_items][world.groups.popular].min()
        popular = exposures >= least
        popular[: world.n_items] = world.groups.popular
        weights = propensity_weights(exposures, exponent, clip_quantile)
        return cls(
            world.embeddings, weights, log_popularity(exposures).astype(np.float32), popular, world.encoder
        )

    @property
    def dimension(self) -> int:
        """Size ``d`` of the observed state."""
        return int(self.embeddings.shape[1])

    @property
    def size(self) -> int:
        """Size of a condition, ``2 d + 7``."""
        return 2 * self.dimension + len(STATISTICS)

    def pooled(self, window: HistoryWindow) -> tuple[FloatArray, FloatArray]:
        """Returns weighted sums of the clicked embeddings, ``float32 (B, d)``, and of the weights, ``(B,)``."""
        weights = self.window_weights(window)
        return embedding_sums(self.embeddings, window.items, weights), weights.sum(axis=1)

    def ips_state(self, window: HistoryWindow) -> FloatArray:
        """Returns the self-normalised inverse-propensity mean of the clicked items' embeddings, ``float32 (B, d)``."""
        return mean_embeddings(self.embeddings, window.items, self.window_weights(window))

    def window_weights(self, window: HistoryWindow) -> FloatArray:
        """Returns the inverse-propensity weights of the clicks of windows, ``float32 (B, H)``; 0 without a click."""
        weights: FloatArray = window.clicks * self.weights.take(window.items)
        return weights

    def statistics(self, window: HistoryWindow) -> FloatArray:
        """Returns ``float32 (B, 7)``, see the class; zero where there is nothing to count."""
        shown = window.items >= 0
        length = np.maximum(shown.sum(axis=1), 1).astype(np.float32)
        clicks = np.maximum(window.clicks.sum(axis=1), 1).astype(np.float32)
        popularity = self.popularity.take(window.items)
        popular = self.popular.take(window.items)
        result = np.empty((len(window.items), len(STATISTICS)), np.float32)
        mean = (popularity * window.clicks).sum(axis=1) / clicks
        square = (popularity * popularity * window.clicks).sum(axis=1) / clicks
        result[:, 0] = mean
        result[:, 1] = np.sqrt(np.maximum(square - mean * mean, 0.0))
        result[:, 2] = (popular & window.clicks).sum(axis=1) / clicks
        result[:, 3] = (popularity * shown).sum(axis=1) / length
        result[:, 4] = (popular & shown).sum(axis=1) / length
        result[:, 5] = shown.mean(axis=1)
        result[:, 6] = window.clicks.sum(axis=1) / length
        return result

    def build(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions.

        Args:
            states: ``float32 (B, d)``, observed states ``s~``.
            window: The windows behind them.

        Returns:
            ``float32 (B, 2 d + 7)``.
        """
        return np.concatenate([states, self.ips_state(window), self.statistics(window)], axis=1)
