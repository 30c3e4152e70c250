"""Windows of history that purifiers learn from, and the conditions ``c_t`` of the denoiser, computed from windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.simulator import FixedSessions, SessionSimulator
from kuaifair_env.spaces import embedding_sums, mean_embeddings, observed_states, top_k, unit_rows
from kuaifair_env.world import World, windows_before

MIN_LENGTH, MAX_LENGTH = 5, 50
DEFAULT_EXPONENT, DEFAULT_CLIP_QUANTILE = 0.5, 0.95

_MAX_STEPS = 12
_SLATE_SIZE = 10
_MAX_BATCH = 512
_MAX_TASTE, _MAX_POPULARITY = 8.0, 1.5
_POOL_SIZES = (32, 128, 512)

STATISTICS = (
    "clicked_popularity_mean",
    "clicked_popularity_spread",
    "clicked_popular_share",
    "shown_popularity_mean",
    "shown_popular_share",
    "window_length",
    "mean_feedback",
)
"""The statistics of a window that a condition holds, in this order."""


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

    def draw(self, users: IntArray, rng: np.random.Generator) -> tuple[HistoryWindow, NDArray[np.bool_]]:
        """Draws one window for each of the given users.

        Args:
            users: ``int (n,)``, user rows, which may repeat.
            rng: Source of randomness.

        Returns:
            The windows, newest item last, and whether each was cut out of the log, ``bool (n,)``.
        """
        world, settings = self._world, self._settings
        max_length = min(settings.max_length, world.history_length)
        window = sample_windows(
            world.data.train,
            len(world.data.users),
            users,
            rng,
            history_length=world.history_length,
            min_length=min(settings.min_length, max_length),
            max_length=max_length,
        )
        simulated = rng.random(len(users)) < settings.policy_share
        if simulated.any():
            played = policy_windows(world, users[simulated], rng)
            window.items[simulated], window.clicks[simulated] = played.items, played.clicks
        return window, ~simulated


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
    return HistoryWindow.concatenate(windows).take(np.argsort(order))


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
        clip_quantile: ``w_max`` is this quantile of the weights of *exposed* items.

    Returns:
        ``float32 (M,)``.

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


def condition_size(dimension: int) -> int:
    """Returns the size of a condition, ``2 d + 7``, for states of size ``d``."""
    return 2 * dimension + len(STATISTICS)


@dataclass(frozen=True)
class ConditionBuilder:
    """Computes conditions ``c_t`` from observed states and windows.

    A condition holds the observed state ``s~_t``, the inverse-propensity mean of the window's clicked items (the same
    mean with rare items counting more), and seven statistics of the window: mean and standard deviation of the
    log-popularity of the clicked items, share of popular items among them, mean log-popularity and popular share of
    the shown items, share of places filled, and click rate.

    Attributes:
        embeddings: ``float32 (M, d)``, agent-side item embeddings.
        weights: ``float32 (M,)``, inverse-propensity weights.
        popularity: ``float32 (M,)``, standardised ``log(1 + exposures)`` of the training log.
        popular: ``bool (M,)``, whether an item is popular. Items that are no candidates count as popular from the
            least exposed popular candidate on.
    """

    embeddings: FloatArray
    weights: FloatArray
    popularity: FloatArray
    popular: BoolArray

    @classmethod
    def of_world(
        cls,
        world: World,
        exponent: float = DEFAULT_EXPONENT,
        clip_quantile: float = DEFAULT_CLIP_QUANTILE,
    ) -> ConditionBuilder:
        """Builds the tables from a world's embeddings, popularity groups and training log.

        Args:
            world: Either world of a pair; both give the same tables.
            exponent: See :func:`propensity_weights`.
            clip_quantile: See :func:`propensity_weights`.
        """
        exposures = world.data.train.exposures(len(world.data.items))
        min_exposures = exposures[: world.n_items][world.groups.popular].min()
        popular = exposures >= min_exposures
        popular[: world.n_items] = world.groups.popular
        weights = propensity_weights(exposures, exponent, clip_quantile)
        return cls(world.embeddings, weights, log_popularity(exposures).astype(np.float32), popular)

    @property
    def dimension(self) -> int:
        """Size ``d`` of the observed state."""
        return int(self.embeddings.shape[1])

    def weighted_sums(self, window: HistoryWindow) -> tuple[FloatArray, FloatArray]:
        """Returns sums over the clicked items: of weighted embeddings, ``float32 (B, d)``, and of weights, ``(B,)``."""
        weights = self._click_weights(window)
        return embedding_sums(self.embeddings, window.items, weights), weights.sum(axis=1)

    def ips_state(self, window: HistoryWindow) -> FloatArray:
        """Returns the self-normalised inverse-propensity mean of the clicked items' embeddings, ``float32 (B, d)``."""
        return mean_embeddings(self.embeddings, window.items, self._click_weights(window))

    def statistics(self, window: HistoryWindow) -> FloatArray:
        """Returns :data:`STATISTICS`, ``float32 (B, 7)``; zero where nothing was shown or clicked."""
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

    def _click_weights(self, window: HistoryWindow) -> FloatArray:
        return window.clicks * self.weights.take(window.items)
