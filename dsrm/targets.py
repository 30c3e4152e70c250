"""Clean-state targets ``s^(0)``: what a purifier learns to recover, and from whom.

The paper sets ``s^(0)`` to the observed state and conditions on it as well (eq. 2 and 7), for which the identity is
optimal. Here the target is something else that the condition does not hold, or nothing is purified.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsrm.windows import LONGEST, SHORTEST, ConditionBuilder, SampledWindows, policy_windows, sample_windows
from kuaifair_env.data.schema import FloatArray, IntArray, InteractionLog
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.spaces import observed_states
from kuaifair_env.world import World

_MIN_POSITIVES = 3
_MAX_INSERTED = 0.5


@dataclass(frozen=True)
class Examples:
    """What a purifier learns from.

    Attributes:
        states: ``float32 (n, d)``, observed states ``s~``.
        conditions: ``float32 (n, c)``, conditions.
        targets: ``float32 (n, d)``, clean states ``s^(0)``.
    """

    states: FloatArray
    conditions: FloatArray
    targets: FloatArray

    def __len__(self) -> int:
        return len(self.states)


class ExampleSource(Protocol):
    """Draws training examples for given users."""

    users: NDArray[np.int64]
    """``int64``, increasing: users who have what the target needs."""

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """Draws one example for each of the given users, who may repeat."""
        ...


@dataclass(frozen=True)
class WindowSettings:
    """Which windows a purifier is trained on.

    Attributes:
        shortest: Least exposures in a logged window.
        longest: Greatest number.
        policy_share: Share of windows that a simulated policy made in the training world.
    """

    shortest: int = SHORTEST
    longest: int = LONGEST
    policy_share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.policy_share <= 1.0:
            raise ValueError(f"policy_share must lie in [0, 1], got {self.policy_share}")


class WindowSource:
    """Draws windows of users: some cut out of the training log, some made by simulated policies.

    Args:
        world: The training world.
        settings: Which windows.
    """

    def __init__(self, world: World, settings: WindowSettings) -> None:
        if world.split != "train":
            raise ValueError("purifiers learn in the training world; the test world stays unseen")
        self._world = world
        self._settings = settings

    def draw(self, users: IntArray, rng: np.random.Generator) -> SampledWindows:
        """Returns one window for each of the given users; windows of a policy have ``ends`` of -1."""
        world, settings = self._world, self._settings
        places = world.history_length
        longest = min(settings.longest, places)
        sampled = sample_windows(
            world.data.train,
            len(world.data.users),
            users,
            rng,
            places=places,
            shortest=min(settings.shortest, longest),
            longest=longest,
        )
        simulated = np.flatnonzero(rng.random(len(users)) < settings.policy_share)
        if len(simulated) == 0:
            return sampled
        made = policy_windows(world, sampled.users[simulated], rng)
        sampled.window.items[simulated], sampled.window.clicks[simulated] = made.items, made.clicks
        sampled.ends[simulated] = -1
        return sampled


class PooledPositives:
    """The inverse-propensity mean of all positives of each user in a log, with or without those of a window.

    Args:
        builder: Embeddings and weights.
        log: The log.
        n_users: Number of users.
        weighted: Whether rare items count more; a log of uniformly random exposures needs no weights.
    """

    def __init__(
        self, builder: ConditionBuilder, log: InteractionLog, n_users: int, weighted: bool = True
    ) -> None:
        from scipy import sparse

        self._builder = builder
        users, items = log.users[log.clicks], log.items[log.clicks]
        weights = builder.weights[items] if weighted else np.ones(len(items), np.float32)
        shape = (n_users, len(builder.weights))
        self._sums = np.asarray(
            sparse.csr_matrix((weights, (users, items)), shape=shape) @ builder.embeddings, np.float32
        )
        self._mass = np.bincount(users, weights, n_users).astype(np.float32)
        self.counts = np.bincount(users, minlength=n_users)

    def of_users(self, users: IntArray) -> FloatArray:
        """Returns the mean over all positives of each user, ``float32 (n, d)``."""
        means = self._sums[users] / np.maximum(self._mass[users], np.float32(1e-6))[:, None]
        return np.asarray(means, np.float32)

    def outside(self, windows: SampledWindows, exclude: NDArray[np.bool_]) -> FloatArray:
        """Returns the same without the window's own positives where ``exclude`` is True and enough are left."""
        sums, mass = self._builder.pooled(windows.window)
        left = self.counts[windows.users] - windows.window.clicks.sum(axis=1)
        drop = exclude & (windows.ends >= 0) & (left >= _MIN_POSITIVES)
        rest = self._sums[windows.users] - np.where(drop[:, None], sums, 0.0)
        weight = self._mass[windows.users] - np.where(drop, mass, 0.0)
        return np.asarray(rest / np.maximum(weight, 1e-6)[:, None], np.float32)


class ProfileTargets:
    """The user's long-run profile: the inverse-propensity mean of all positives of the training log.

    Half of the time the positives of the window itself are left out, so that they cannot be copied.

    Args:
        world: The training world.
        builder: Embeddings, weights and statistics.
        windows: Which windows.
        exclude_share: How often the window's own positives are left out of the target.
    """

    def __init__(
        self,
        world: World,
        builder: ConditionBuilder,
        windows: WindowSettings | None = None,
        exclude_share: float = 0.5,
    ) -> None:
        self._builder = builder
        self._windows = WindowSource(world, WindowSettings() if windows is None else windows)
        self._pool = PooledPositives(builder, world.data.train, len(world.data.users))
        self._exclude_share = exclude_share
        enough = np.flatnonzero(self._pool.counts >= _MIN_POSITIVES)
        self.users = np.intersect1d(world.users, enough)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        windows = self._windows.draw(users, rng)
        targets = self._pool.outside(windows, rng.random(len(windows)) < self._exclude_share)
        states = observed_states(self._builder, windows.window)
        return Examples(states, self._builder.build(states, windows.window), targets)


class LiteralTargets:
    """The paper's own choice, target and condition both the observed state (eq. 2 and 7); its optimum is the identity.

    Args:
        world: The training world.
        builder: Embeddings.
        windows: Which windows.
    """

    def __init__(
        self, world: World, builder: ConditionBuilder, windows: WindowSettings | None = None
    ) -> None:
        self._builder = builder
        self._windows = WindowSource(world, WindowSettings() if windows is None else windows)
        counts = np.bincount(world.data.train.users, minlength=len(world.data.users))
        self.users = np.intersect1d(world.users, np.flatnonzero(counts > 0))

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        states = observed_states(self._builder, self._windows.draw(users, rng).window)
        return Examples(states, states, states)


class UnbiasedTargets:
    """What calibration users like when exposure is random, or fully observed, in the place of their profile.

    The target is the mean embedding of what a user clicked, less that of what the user was shown, plus the mean
    profile of all users. Without the second term it would mostly say which items the test log holds.

    Args:
        world: The training world.
        builder: Embeddings, weights and statistics.
        calibration: User rows whose test log may be read; they must never be evaluated.
        windows: Which windows.
    """

    def __init__(
        self,
        world: World,
        builder: ConditionBuilder,
        calibration: IntArray,
        windows: WindowSettings | None = None,
    ) -> None:
        self._builder = builder
        self._windows = WindowSource(world, WindowSettings() if windows is None else windows)
        n_users = len(world.data.users)
        log = world.data.test.take(np.isin(world.data.test.users, calibration))
        clicked = PooledPositives(builder, log, n_users, weighted=False)
        shown = PooledPositives(
            builder, replace(log, clicks=np.ones(len(log), np.bool_)), n_users, weighted=False
        )
        self.users = np.intersect1d(
            np.intersect1d(calibration, world.users), np.flatnonzero(clicked.counts >= _MIN_POSITIVES)
        )
        profiles = PooledPositives(builder, world.data.train, n_users).of_users(world.users)
        self._targets = np.zeros((n_users, builder.dimension), np.float32)
        self._targets[self.users] = (
            clicked.of_users(self.users) - shown.of_users(self.users) + profiles.mean(axis=0)
        )

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        windows = self._windows.draw(users, rng)
        states = observed_states(self._builder, windows.window)
        return Examples(states, self._builder.build(states, windows.window), self._targets[windows.users])


class MixedTargets:
    """Calibration users' unbiased targets among many profiles.

    Args:
        unbiased: The scarce, clean source.
        profile: The plentiful one.
        profile_share: Share of profiles among the examples.

    Raises:
        ValueError: If the share is not within [0, 1].
    """

    def __init__(self, unbiased: UnbiasedTargets, profile: ProfileTargets, profile_share: float) -> None:
        if not 0.0 <= profile_share <= 1.0:
            raise ValueError(f"profile_share must lie in [0, 1], got {profile_share}")
        self._unbiased = unbiased
        self._profile = profile
        self._share = 1.0 - profile_share
        self.users = profile.users

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`; the share of unbiased examples comes from calibration users whoever was asked."""
        clean = rng.random(len(users)) < self._share
        chosen = rng.choice(self._unbiased.users, int(clean.sum()))
        parts = (self._unbiased.draw(chosen, rng), self._profile.draw(np.asarray(users)[~clean], rng))
        return Examples(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("states", "conditions", "targets")
            )
        )


class PairedTargets:
    """Synthetic corruption: the clean state of a window, and the condition of what popularity made of it.

    A window is corrupted by deleting long-tail positives and putting popular items, drawn in proportion to their
    training exposures, in random places as clicks. It needs no labels and can only undo what it does.

    Args:
        world: The training world.
        builder: Embeddings, weights and statistics.
        windows: Which windows.
    """

    def __init__(
        self, world: World, builder: ConditionBuilder, windows: WindowSettings | None = None
    ) -> None:
        self._builder = builder
        self._windows = WindowSource(world, WindowSettings() if windows is None else windows)
        exposures = world.data.train.exposures(len(world.data.items)) * builder.popular
        self._draw_from = np.cumsum(exposures / exposures.sum())
        clicks = np.bincount(world.data.train.users[world.data.train.clicks], minlength=len(world.data.users))
        self.users = np.intersect1d(world.users, np.flatnonzero(clicks >= _MIN_POSITIVES))

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`ExampleSource`."""
        clean = self._windows.draw(users, rng).window
        corrupted = self._corrupt(clean, rng)
        states = observed_states(self._builder, corrupted)
        return Examples(states, self._builder.build(states, corrupted), self._builder.ips_state(clean))

    def _corrupt(self, window: HistoryWindow, rng: np.random.Generator) -> HistoryWindow:
        shape = window.items.shape
        strength = rng.uniform(0.0, _MAX_INSERTED, (shape[0], 1))
        shown = window.items != PADDING
        tail = window.clicks & ~self._builder.popular.take(window.items)
        clicks = window.clicks & ~(tail & (rng.random(shape) < strength))
        inserted = shown & ~clicks & (rng.random(shape) < strength)
        popular = np.searchsorted(self._draw_from, rng.random(shape)).astype(np.int32)
        popular = np.minimum(popular, len(self._draw_from) - 1)
        return HistoryWindow(np.where(inserted, popular, window.items), clicks | inserted)
