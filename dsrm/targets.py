"""What purifiers learn from: windows of history, and the clean states ``s^(0)`` to recover from them.

The paper sets ``s^(0)`` to the observed state and conditions on it as well (eq. 2 and 7), for which the identity is
optimal (:class:`LiteralTargets`). The other targets hold what the condition does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsrm.purifier import ConditionBuilder
from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.checks import need_number, need_whole
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import FloatArray, IntArray, InteractionLog
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import DataError
from kuaifair_env.observations import StateObserver, observed_states
from kuaifair_env.ranking import top_k
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.simulator import FixedSessions, SessionSimulator
from kuaifair_env.splits import early_stopping_split
from kuaifair_env.world import World, windows_before

_MIN_LENGTH, _MAX_LENGTH = 5, 50
_MAX_STEPS = 12
_SLATE_SIZE = 10
_MAX_BATCH = 512
_MAX_TASTE, _MAX_POPULARITY = 8.0, 1.5
_POOL_SIZES = (32, 128, 512)
_MIN_POSITIVES = 3
_UNBIASED_SHARE = 0.75
_MAX_CORRUPTION = 0.5


@dataclass(frozen=True)
class WindowSettings:
    """Which windows a purifier is trained on.

    Logged windows have from ``min_length`` to ``max_length`` exposures; a ``policy_share`` of all windows is made by
    simulated policies in the training world.
    """

    min_length: int = _MIN_LENGTH
    max_length: int = _MAX_LENGTH
    policy_share: float = 0.5

    def __post_init__(self) -> None:
        need_whole(1, min_length=self.min_length)
        need_whole(self.min_length, max_length=self.max_length)
        need_number("[0, 1]", policy_share=self.policy_share)


class WindowSource:
    """Draws windows of users: some cut out of the training log, some played by simulated policies.

    Raises:
        ValueError: If the world is not a training world.
    """

    def __init__(self, world: World, settings: WindowSettings) -> None:
        if world.split != "train":
            raise ValueError("purifiers learn in the training world; the test world stays unseen")
        self._world = world
        self._settings = settings

    def draw(self, users: IntArray, rng: np.random.Generator) -> tuple[HistoryWindow, NDArray[np.bool_]]:
        """Draws one window for each of ``n`` user rows, which may repeat; also whether it was cut out of the log."""
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
    history_length: int = _MAX_LENGTH,
    min_length: int = _MIN_LENGTH,
    max_length: int = _MAX_LENGTH,
) -> HistoryWindow:
    """Cuts one window of random length at a random place out of the history of each given user.

    Args:
        log: Usually the training log.
        n_users: Number of users of the data set.
        users: ``(n,)`` user rows, which may repeat.
        rng: Source of randomness.
        history_length: Width ``H`` of the windows.
        min_length: Least number of exposures (fewer where the user has fewer).
        max_length: Greatest number, at most ``history_length``.

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
    observer, length = StateObserver(world), world.history_length
    windows = simulator.history(length=length)
    for step in range(1, int(steps.max()) + 1):
        pool_size = min(int(rng.choice(_POOL_SIZES)), world.n_items)
        pool = rng.choice(world.n_items, pool_size, replace=False)
        similarity = unit_rows(observer.observe(simulator)) @ units[:, pool]
        scores = taste_weight * similarity + popularity_weight * popularity[pool]
        simulator.step(pool[top_k(scores, simulator.slate_size)])
        finished = np.flatnonzero(steps == step)
        if len(finished):
            last = simulator.history(finished, length)
            windows.items[finished], windows.clicks[finished] = last.items, last.clicks
    return windows


@dataclass(frozen=True)
class Examples:
    """Conditions, ``float32 (n, c)``, and the clean states ``s^(0)`` that belong to them, ``float32 (n, d)``."""

    conditions: FloatArray
    targets: FloatArray


class ExampleSource(Protocol):
    """Draws training examples for given users."""

    users: NDArray[np.int64]
    """``int64``, increasing: users who have what the target needs."""

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Divides the users into those to learn from and a tenth on whom training is stopped early."""
        ...

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """Draws one example for each of the given users, who may repeat."""
        ...


class _Targets:
    """Base class of targets that come with windows.

    Args:
        world: The training world.
        windows: Which windows.
    """

    users: NDArray[np.int64]

    def __init__(self, world: World, windows: WindowSettings) -> None:
        self._world = world
        self._windows = WindowSource(world, windows)

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`ExampleSource`."""
        return early_stopping_split(self._world.data, self.users)


class _WindowTargets(_Targets):
    """Base class of targets that come with the conditions of windows."""

    def __init__(self, world: World, windows: WindowSettings) -> None:
        super().__init__(world, windows)
        self._builder = ConditionBuilder.of_world(world)

    def _examples(self, window: HistoryWindow, targets: FloatArray) -> Examples:
        return Examples(self._builder.build(observed_states(self._world, window), window), targets)


class ProfileTargets(_WindowTargets):
    """The user's long-run profile: the inverse-propensity mean of all positives of the training log.

    A window's own positives are left out of the target in a share of the examples, so that they cannot be copied.
    """

    def __init__(self, world: World, windows: WindowSettings, exclude_share: float) -> None:
        super().__init__(world, windows)
        builder = self._builder
        self._positives = PooledPositives(builder, world.data.train, len(world.data.users))
        self._exclude_share = exclude_share
        self.users = logged_users(world, _MIN_POSITIVES)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        window, logged = self._windows.draw(users, rng)
        exclude = rng.random(len(users)) < self._exclude_share
        return self._examples(window, self._positives.outside(window, users, exclude & logged))


class LiteralTargets(_Targets):
    """The paper's own choice: target and condition are the observed state (eq. 2, 7); its optimum is the identity."""

    def __init__(self, world: World, windows: WindowSettings) -> None:
        super().__init__(world, windows)
        self.users = logged_users(world)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        window, _ = self._windows.draw(users, rng)
        states = observed_states(self._world, window)
        return Examples(states, states)


class UnbiasedTargets(_WindowTargets):
    """What calibration users like when exposure is random, or fully observed, in place of their profile.

    The target is the mean embedding of what a user clicked, less that of what the user was shown, plus the mean
    profile of all users. Without the second term the target would mostly depend on which items the test log holds.

    Args:
        world: The training world.
        windows: Which windows.
        calibration: User rows whose test log may be read; they must never be evaluated.

    Raises:
        DataError: If fewer than two of them click three times there: one to learn from, one to stop by.
    """

    def __init__(self, world: World, windows: WindowSettings, calibration: IntArray) -> None:
        super().__init__(world, windows)
        builder = self._builder
        n_users = len(world.data.users)
        log = world.data.test.take(np.isin(world.data.test.users, calibration))
        everything = replace(log, clicks=np.ones(len(log), np.bool_))
        clicked = PooledPositives(builder, log, n_users, weighted=False)
        shown = PooledPositives(builder, everything, n_users, weighted=False)
        self.users = np.intersect1d(
            np.intersect1d(calibration, world.users), np.flatnonzero(clicked.counts >= _MIN_POSITIVES)
        )
        if len(self.users) < 2:
            raise DataError(
                f"only {len(self.users)} of {len(calibration)} calibration users click {_MIN_POSITIVES} times in the "
                "test log; unbiased targets need 2: raise calibration_share"
            )
        profiles = PooledPositives(builder, world.data.train, n_users).of_users(world.users)
        self._targets = np.zeros((n_users, builder.dimension), np.float32)
        self._targets[self.users] = clicked.of_users(self.users) - shown.of_users(self.users) + profiles.mean(axis=0)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        window, _ = self._windows.draw(users, rng)
        return self._examples(window, self._targets[users])


class MixedTargets:
    """A mixture of calibration users' unbiased targets, three quarters of the examples, and of all users' profiles."""

    def __init__(self, unbiased: UnbiasedTargets, profile: ProfileTargets) -> None:
        self._unbiased = unbiased
        self._profile = profile
        self.users = np.union1d(unbiased.users, profile.users)

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`ExampleSource`; there are calibration users among both."""
        users, validation_users = self._unbiased.split()
        profiled, validation_profiled = self._profile.split()
        # A user of both belongs where the calibration users' split says.
        return (
            np.union1d(users, np.setdiff1d(profiled, self._unbiased.users)),
            np.union1d(validation_users, np.setdiff1d(validation_profiled, self._unbiased.users)),
        )

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """Draws as many examples as there are given users, of the users among them who have what a target needs."""
        calibration = np.intersect1d(users, self._unbiased.users)
        profiled = np.intersect1d(users, self._profile.users)
        share = 0.0 if len(calibration) == 0 else 1.0 if len(profiled) == 0 else _UNBIASED_SHARE
        n_unbiased = rng.binomial(len(users), share)
        unbiased = self._unbiased.draw(rng.choice(calibration, n_unbiased), rng)
        profile = self._profile.draw(rng.choice(profiled, len(users) - n_unbiased), rng)
        return Examples(
            np.concatenate([unbiased.conditions, profile.conditions]),
            np.concatenate([unbiased.targets, profile.targets]),
        )


class PairedTargets(_WindowTargets):
    """Synthetic corruption: the clean state of a window, and the condition of the same window biased to popular items.

    A window is corrupted by deleting long-tail positives and putting popular items, drawn in proportion to their
    training exposures, in random places as clicks. It needs no labels, but teaches to undo this corruption alone.
    """

    def __init__(self, world: World, windows: WindowSettings) -> None:
        super().__init__(world, windows)
        log = world.data.train
        exposures = log.exposures(len(world.data.items)) * self._builder.popular
        self._share = exposures / exposures.sum()
        self.users = logged_users(world, _MIN_POSITIVES)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        clean, _ = self._windows.draw(users, rng)
        return self._examples(self._corrupt(clean, rng), self._builder.ips_state(clean))

    def _corrupt(self, window: HistoryWindow, rng: np.random.Generator) -> HistoryWindow:
        shape = window.items.shape
        strength = rng.uniform(0.0, _MAX_CORRUPTION, (shape[0], 1))
        shown = window.items != PADDING
        tail = window.clicks & ~self._builder.popular.take(window.items)
        clicks = window.clicks & ~(tail & (rng.random(shape) < strength))
        inserted = shown & ~clicks & (rng.random(shape) < strength)
        popular = rng.choice(len(self._share), shape, p=self._share).astype(np.int32)
        return HistoryWindow(np.where(inserted, popular, window.items), clicks | inserted)


class PooledPositives:
    """The inverse-propensity mean of all positives of each user in a log, with or without those of a window.

    Args:
        builder: Embeddings and weights.
        log: The log.
        n_users: Number of users.
        weighted: Whether rare items count more; a log of uniformly random exposures needs no weights.

    Attributes:
        counts: ``int64 (n_users,)``, positives of each user.
    """

    def __init__(self, builder: ConditionBuilder, log: InteractionLog, n_users: int, weighted: bool = True) -> None:
        from scipy import sparse

        self._builder = builder
        users, items = log.users[log.clicks], log.items[log.clicks]
        weights = builder.weights[items] if weighted else np.ones(len(items), np.float32)
        matrix = sparse.csr_matrix((weights, (users, items)), shape=(n_users, len(builder.weights)))
        self._sums = np.asarray(matrix @ builder.embeddings, np.float32)
        self._weights = np.bincount(users, weights, n_users).astype(np.float32)
        self.counts = np.bincount(users, minlength=n_users)

    def of_users(self, users: IntArray) -> FloatArray:
        """Returns the mean over all positives of each user, ``float32 (n, d)``."""
        return _mean(self._sums[users], self._weights[users])

    def outside(self, window: HistoryWindow, users: IntArray, exclude: NDArray[np.bool_]) -> FloatArray:
        """Returns the same without the positives of ``n`` windows where ``exclude`` and the user has enough others."""
        sums, weights = self._builder.weighted_sums(window)
        others = self.counts[users] - window.clicks.sum(axis=1)
        leave_out = exclude & (others >= _MIN_POSITIVES)
        return _mean(
            self._sums[users] - np.where(leave_out[:, None], sums, 0.0),
            self._weights[users] - np.where(leave_out, weights, 0.0),
        )


def logged_users(world: World, min_clicks: int = 0) -> NDArray[np.int64]:
    """Returns the rows of the world's users in the training log who click at least so often there, increasing."""
    log = world.data.train
    clicks = np.bincount(log.users, log.clicks, len(world.data.users))
    return np.intersect1d(np.intersect1d(world.users, log.users), np.flatnonzero(clicks >= min_clicks))


def _mean(sums: NDArray[np.floating], weights: NDArray[np.floating]) -> FloatArray:
    return np.asarray(sums / np.maximum(weights, 1e-6)[:, None], np.float32)
