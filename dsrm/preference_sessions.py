"""Sessions of users whose clean preferences are known by construction, from which preference models learn.

A user's click on item ``i`` has the log-odds ``prior_ui + b_u + w_u . e_i + delta_ui`` that beliefs assume. Tastes are
those that the training world's users have beyond the click scorer, at sizes that the log cannot show:

- the log's model shrinks tastes and mistakes users for others: tastes are scaled up, in part replaced by normal noise,
  and mostly they are another user's than the one whose log is seen;
- as far as the items are not known yet, what the log misjudges about them for everybody looks like a taste too. From
  session to session that share is anything from none (while serving) to all (frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor

from dsrm.click_scorer import ClickScorer
from dsrm.own_level import OwnLevel, OwnScales
from dsrm.preference import Evidence, LevelPrior, LogContexts, Moments, ridge_coefficients
from dsrm.preference_mixture import MixturePreference, TastePrior
from dsrm.shared_level import SharedScales
from dsrm.targets import Examples
from kuaifair_env.data.schema import FloatArray, IntArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.observations import observed_states
from kuaifair_env.randomised_worlds import estimated_randomisation
from kuaifair_env.ranking import top_k
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.splits import early_stopping_split
from kuaifair_env.world import World

_MAX_USERS, _MAX_ITEMS, _USERS_AT_ONCE = 6_000, 1_500, 500
_RIDGE, _MIN_PROBABILITY, _MIN_TASTE = 1.0, 1e-4, 1e-3
_SESSIONS, _MOMENTS, _POOL_SIZE = 128, 16, 512
_SLATE_SIZE, _MAX_STEPS = 10, 30
_EMPTY_LOG_SHARE, _UNSEEN_SHARE = 0.05, 0.5
_TRUE_SHARE = 0.125
"""Share of the taste beyond the click scorer that the log's model predicts and that users have, as measured in a twin
that no result is reported of."""
_MEAN_ROOT = 2.0 / 3.0
"""Mean of the square root of a uniform number, by which noise shrinks tastes."""
_SHARED_LEVEL = SharedScales().intercept
_FROZEN_SHARE, _SERVING_SHARE = 0.3, 0.4
_SCALE_ERROR = 0.2
_CHOICE_STREAM = 5
_POPULATION, _POPULATION_STREAM = 20_000, 23
_WIDENED_ON, _WIDENED_ON_EACH, _LEVEL_STREAM, _MAX_WIDENING = 8_192, 64, 24, 2.0


@dataclass(frozen=True)
class LoggedPreferences:
    """Preferences that the training world's users have beyond the click scorer and what all users share.

    Attributes:
        users: ``int64 (U,)``, increasing user rows.
        levels: ``float32 (U,)``, ``b_u``.
        tastes: ``float32 (U, d)``, ``w_u``.
    """

    users: NDArray[np.int64]
    levels: FloatArray
    tastes: FloatArray

    @classmethod
    def of_world(cls, world: World, scorer: ClickScorer) -> LoggedPreferences:
        """Projects what a response model says about users on the embeddings of the items, by ridge regression.

        Args:
            world: The training world, or a test world whose truth is to be compared with; its response is read.
            scorer: The click model.
        """
        rng = np.random.default_rng([0, _CHOICE_STREAM])  # chooses users and items where there are many
        users = np.sort(rng.permutation(world.users)[:_MAX_USERS])
        items = rng.permutation(world.n_items)[:_MAX_ITEMS]
        surprises = np.concatenate(
            [
                _log_odds_beyond(world, scorer, users[first : first + _USERS_AT_ONCE], items)
                for first in range(0, len(users), _USERS_AT_ONCE)
            ]
        )
        surprises -= surprises.mean(axis=0)
        columns = item_columns(world)[items].astype(np.float64)
        precision = columns.T @ columns + _RIDGE * np.eye(columns.shape[1])
        preferences = np.linalg.solve(precision, columns.T @ surprises.T).T.astype(np.float32)
        return cls(users, preferences[:, 0], preferences[:, 1:])


def item_columns(world: World) -> FloatArray:
    """Returns ``float32 (N, d + 1)``: ones and unit embeddings of the candidates."""
    embeddings = world.embeddings[: world.n_items]
    units = unit_rows(embeddings if world.item_term is None else embeddings[:, :-1])
    return np.concatenate([np.ones((len(units), 1), np.float32), units], axis=1)


def _log_odds_beyond(world: World, scorer: ClickScorer, users: IntArray, items: IntArray) -> NDArray[np.float64]:
    """Returns by how much the response's log-odds exceed the click scorer's, ``(users, items)``."""
    window = world.initial_history.take(users)
    shown = np.broadcast_to(items, (len(users), len(items)))
    probability = np.clip(world.response.expected(users, shown, window), _MIN_PROBABILITY, 1 - _MIN_PROBABILITY)
    prior = scorer.score(observed_states(world, window))[:, items]
    return np.asarray(np.log(probability / (1.0 - probability)), np.float64) - prior


@dataclass(frozen=True)
class KnownPreferences:
    """Evidence about sessions' users, and the clean preferences ``(b_u, w_u)``, ``float32 (n, d + 1)`` in log-odds."""

    evidence: Evidence
    preferences: Tensor


class PreferenceSessions:
    """Draws sessions of any length under a mixture of policies: an :class:`~dsrm.targets.ExampleSource`.

    Slates rank a pool of candidates by the prior, by the belief, by noise, or by mixtures of them; every other batch
    shows no item twice.

    Args:
        world: The training world.
        scorer: The click model.

    Attributes:
        users: ``int64``, increasing rows of the users whose logs and tastes are known.
        scales: Of the own level before anything is known of the items.
        taste: Root mean square of the components of ``w_u`` in the log's model.

    Raises:
        ValueError: If the world is not a training world.
    """

    def __init__(self, world: World, scorer: ClickScorer) -> None:
        if world.split != "train":
            raise ValueError("preference models learn in the training world; the test world stays unseen")
        self._world, self._scorer = world, scorer
        self._misjudged = estimated_randomisation(world)
        self._logged = LoggedPreferences.of_world(world, scorer)
        self._contexts = LogContexts(world)
        self._columns = torch.from_numpy(item_columns(world))
        self._offset_deviations = self._misjudged.offset_deviations(world.exposures)
        self.taste = max(float(np.sqrt((self._logged.tastes**2).mean())), _MIN_TASTE)
        self.users = self._logged.users
        self.scales = self._scales(self.size, 1.0)

    @property
    def dimension(self) -> int:
        """Size ``d`` of the items' embeddings."""
        return self._columns.shape[1] - 1

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """See :class:`~dsrm.targets.ExampleSource`."""
        return early_stopping_split(self._world.data, self.users)

    def draw(self, users: IntArray, rng: np.random.Generator) -> Examples:
        """See :class:`~dsrm.targets.ExampleSource`; targets are tastes, whitened by the fitted normal."""
        batches = self.known(users, rng)
        evidence = [self.normal.normal(batch.evidence) for batch in batches]
        conditions = [features_of(some) for some in evidence]
        targets = [
            whitened(some, batch.preferences)[:, 1:].numpy() for some, batch in zip(evidence, batches, strict=True)
        ]
        return Examples(np.concatenate(conditions)[: len(users)], np.concatenate(targets)[: len(users)])

    def known(self, users: IntArray, rng: np.random.Generator) -> list[KnownPreferences]:
        """Draws at least as many examples as ``users (n,)``, several from each session, in batches."""
        per_batch = _SESSIONS * _MOMENTS
        batches = -(-len(users) // per_batch)
        played = np.resize(np.asarray(users), batches * _SESSIONS).reshape(batches, _SESSIONS)
        return [self._play(batch, number % 2 == 0, rng) for number, batch in enumerate(played)]

    def tastes(self, users: IntArray, rng: np.random.Generator) -> FloatArray:
        """Draws users' own tastes, ``float32 (n, d)`` of ``users (n,)``, in units of their size."""
        rows = np.searchsorted(self._logged.users, users)
        noise_share = rng.random((len(rows), 1))
        noise = rng.standard_normal((len(rows), self.dimension))
        tastes = self._logged.tastes[rows] / self.taste
        return np.asarray(np.sqrt(1.0 - noise_share) * tastes + np.sqrt(noise_share) * noise, np.float32)

    @property
    def size(self) -> float:
        """Root mean square of the components of tastes over all sessions, in log-odds."""
        largest = max(self._misjudged.own_vector, self.taste)
        # Sizes are log-uniform between these two.
        spread = 2.0 * np.log(largest / self.taste)
        return float(np.sqrt((largest**2 - self.taste**2) / spread)) if spread > 0 else largest

    @cached_property
    def level(self) -> LevelPrior:
        """What users' logs say about their levels, fitted to the users not kept for validation, widened on those."""
        users, others = self.split()
        levels = self._logged.levels[np.searchsorted(self.users, users)]
        level = LevelPrior.fit(self._summaries(users), levels, self._misjudged.own_level)
        rng = np.random.default_rng([0, _LEVEL_STREAM])
        batches = self.known(rng.choice(others, min(_WIDENED_ON, _WIDENED_ON_EACH * len(others))), rng)
        return replace(level, widening=fitted_widening(MixturePreference(level, self._taste_prior(1)), batches))

    @cached_property
    def normal(self) -> MixturePreference:
        """The fitted normal prior of levels and tastes."""
        return self.fitted_prior(1)

    def fitted_prior(self, parts: int, seed: int = 0) -> MixturePreference:
        """Fits a prior of levels and tastes, a mixture of so many normals, to the users not kept for validation."""
        return MixturePreference(self.level, self._taste_prior(parts, seed))

    def _taste_prior(self, parts: int, seed: int = 0) -> TastePrior:
        rng = np.random.default_rng([seed, _POPULATION_STREAM])
        tastes = self.tastes(rng.choice(self.split()[0], _POPULATION), rng)
        return TastePrior.fit(self._predicted_tastes(), self.size, tastes, parts, seed)

    def _predicted_tastes(self) -> FloatArray:
        """Returns ``float32 (c + 1, d)``, a regression of tastes in log-odds on log contexts; intercept first."""
        users, _ = self.split()
        tastes = self._logged.tastes[np.searchsorted(self.users, users)]
        return (_TRUE_SHARE * ridge_coefficients(self._summaries(users), tastes)).astype(np.float32)

    def _scales(self, taste: float, unknown: float) -> OwnScales:
        """Returns scales of the own level where a share of what the log misjudges about the items is not known."""
        misjudged = self._misjudged
        of_offsets = float(np.sqrt((self._offset_deviations**2).mean()))
        level = float(np.sqrt((self._logged.levels**2).mean()))
        return OwnScales(
            intercept=float(np.sqrt(level**2 + misjudged.own_level**2 + (unknown * _SHARED_LEVEL) ** 2)),
            taste=float(np.hypot(taste, unknown * misjudged.vector)),
            offset=float(np.hypot(misjudged.noise, unknown * of_offsets)),
        )

    def _summaries(self, users: IntArray) -> FloatArray:
        return self._contexts.summarise(self._world.initial_history.take(users))

    def _draw(self, n_sessions: int, rng: np.random.Generator) -> _Conditions:
        """Draws how large tastes are, how much of the items is unknown, and by how much each session differs."""
        kind = rng.random()
        unknown = 1.0 if kind < _FROZEN_SHARE else 0.0 if kind < _FROZEN_SHARE + _SERVING_SHARE else float(rng.random())
        taste = self.taste * (max(self._misjudged.own_vector, self.taste) / self.taste) ** float(rng.random())
        errors = np.exp(_SCALE_ERROR * rng.standard_normal((2, n_sessions, 1)))
        return _Conditions(taste, unknown, self._scales(taste, unknown), *errors.astype(np.float32))

    def _windows(self, users: IntArray, rng: np.random.Generator) -> HistoryWindow:
        """Returns what the log shows of users; of some, nothing."""
        window = self._world.initial_history.take(users)
        empty = rng.random((len(users), 1)) < _EMPTY_LOG_SHARE
        return HistoryWindow(np.where(empty, PADDING, window.items).astype(np.int32), window.clicks & ~empty)

    def _play(self, users: IntArray, repeats: bool, rng: np.random.Generator) -> KnownPreferences:
        drawn, window = self._draw(len(users), rng), self._windows(users, rng)
        preferences = torch.from_numpy(self._preferences(users, drawn, rng))
        pool = np.sort(rng.permutation(self._world.n_items)[:_POOL_SIZE])
        prior = self._scorer.score(observed_states(self._world, window))[:, pool]
        columns = self._columns[torch.from_numpy(pool)]
        deviations = np.hypot(self._misjudged.noise, drawn.unknown * self._offset_deviations[pool])
        offsets = drawn.offset_errors * rng.standard_normal(prior.shape, np.float32) * deviations.astype(np.float32)
        truth = torch.from_numpy(prior + offsets) + preferences @ columns.T
        moments = set(rng.choice(_MAX_STEPS + 1, _MOMENTS, replace=False).tolist())
        if rng.random() < _UNSEEN_SHARE:  # before anything was shown
            moments = {*sorted(moments)[1:], 0}
        own, slate_size = OwnLevel(columns, len(users), drawn.scales), min(_SLATE_SIZE, len(pool))
        policy = _Policy(len(users), rng)
        found: list[Evidence] = []
        contexts = torch.from_numpy(self._contexts.summarise(window))
        shown = np.zeros(prior.shape, np.bool_)
        for step in range(max(moments) + 1):
            if step in moments:
                found.append(Evidence(contexts, own.means.clone(), own.covariances.clone(), own.widths))
            scores = policy.scores(prior, own.logits().numpy() if step else np.zeros_like(prior), rng)
            slate = top_k(scores if repeats else np.where(shown, np.float32(-np.inf), scores), slate_size)
            np.put_along_axis(shown, slate, True, axis=1)
            items = torch.from_numpy(np.asarray(slate, np.int64))
            clicks = torch.from_numpy(rng.random(items.shape, np.float32)) < torch.sigmoid(truth.gather(1, items))
            own.observe(torch.arange(len(users)), items, clicks, torch.from_numpy(prior))
            own.update(torch.from_numpy(prior))
        evidence = Evidence(
            torch.cat([some.contexts for some in found]),
            torch.cat([some.means for some in found]),
            torch.cat([some.covariances for some in found]),
            own.widths,
        )
        return KnownPreferences(evidence, preferences.repeat(len(found), 1))

    def _preferences(self, users: IntArray, drawn: _Conditions, rng: np.random.Generator) -> FloatArray:
        """Draws what is to be inferred, ``float32 (n, d + 1)`` in log-odds."""
        logged, misjudged = self._logged, self._misjudged
        rows = np.searchsorted(logged.users, users)
        own = rng.random(len(rows)) < min(1.0, _TRUE_SHARE * self.taste / (_MEAN_ROOT * drawn.taste))
        tastes = drawn.taste * self.tastes(np.where(own, users, rng.choice(logged.users, len(rows))), rng)
        tastes += drawn.unknown * misjudged.vector * rng.standard_normal(tastes.shape)
        spread = np.hypot(misjudged.own_level, drawn.unknown * _SHARED_LEVEL)
        levels = logged.levels[rows] + spread * rng.standard_normal(len(rows))
        return np.concatenate([levels[:, None], drawn.taste_errors * tastes], axis=1).astype(np.float32)


def fitted_widening(normal: MixturePreference, sessions: Sequence[KnownPreferences]) -> float:
    """Returns the widening of levels (:attr:`dsrm.preference.LevelPrior.widening`) under which misses are likeliest.

    Args:
        normal: A fitted normal prior without any.
        sessions: Of users whom it was not fitted to.
    """
    misses, said = [], []
    for batch in sessions:
        means, deviations = normal.moments(batch.evidence)
        misses.append(((batch.preferences - means) / deviations)[:, 0].numpy())
        said.append(1.0 - batch.evidence.deviations[:, 0].numpy())
    squares, shares = np.concatenate(misses).astype(np.float64) ** 2, np.concatenate(said).astype(np.float64)

    def loss(widening: float) -> float:
        widths = 1.0 + widening * shares
        return float((np.log(widths) + squares / (2.0 * widths**2)).mean())

    return float(minimize_scalar(loss, bounds=(0.0, _MAX_WIDENING), method="bounded").x)


@dataclass(frozen=True)
class _Conditions:
    """Of a batch of sessions: size of tastes, unknown share of the items, scales, and by what they err in a session.

    Attributes:
        taste: Root mean square of the components of tastes, in log-odds.
        unknown: Share of what the log misjudges about the items that is not known yet.
        scales: Of the own level.
        taste_errors: ``float32 (n, 1)``, by how much tastes of a session are larger.
        offset_errors: ``float32 (n, 1)``, by how much its offsets are.
    """

    taste: float
    unknown: float
    scales: OwnScales
    taste_errors: FloatArray
    offset_errors: FloatArray


class _Policy:
    """Which slates each session is shown: weights of prior, belief and noise."""

    def __init__(self, n_sessions: int, rng: np.random.Generator) -> None:
        kinds = rng.integers(4, size=(n_sessions, 1))
        self._prior = (kinds > 0).astype(np.float32)
        self._belief = (kinds > 1).astype(np.float32)
        self._noise = np.where(kinds == 3, 1.0, 0.1).astype(np.float32)

    def scores(self, prior: FloatArray, own: FloatArray, rng: np.random.Generator) -> FloatArray:
        noise = rng.standard_normal(prior.shape, np.float32)
        return np.asarray(self._prior * prior + self._belief * own + self._noise * noise, np.float32)


def features_of(evidence: Evidence) -> FloatArray:
    """Returns what networks read of evidence, ``float32 (B, 2 d + 4)``: a posterior and the scales of its prior.

    They are its means, the logarithms of its standard deviations, and the logarithms of the scales. The log context is
    left to the fitted normal: networks that read all of it learn by heart what the log's model says of its users, and
    are worse for users that they have not seen.
    """
    return joined_features(Moments(evidence.means, evidence.deviations), evidence.scales)


def joined_features(posterior: Moments, scales: Tensor) -> FloatArray:
    """Returns the features of a posterior's mode and standard deviations, ``(B, d + 1)``, under a prior's scales."""
    means, deviations = posterior.means.numpy(), posterior.deviations.numpy()
    n_rows, size = means.shape
    features = np.empty((n_rows, 2 * size + 2), np.float32)
    features[:, :size] = means
    np.log(deviations, out=features[:, size:-2])
    features[:, -2:] = np.log(scales[:2].numpy())
    return features


def whitened(evidence: Evidence, preferences: Tensor) -> Tensor:
    """Returns by how much preferences differ from a posterior's mean, in units in which it is standard normal.

    Args:
        evidence: Of ``B`` sessions.
        preferences: ``float32 (B, d + 1)`` in log-odds.
    """
    factors = torch.linalg.cholesky(evidence.covariances)
    differences = preferences / evidence.scales - evidence.means
    solved: Tensor = torch.linalg.solve_triangular(factors, differences[..., None], upper=False)
    return solved[..., 0]


def unwhitened(evidence: Evidence, whitened_preferences: Tensor) -> Tensor:
    """Undoes :func:`whitened`, also for ``(n, B, d + 1)`` draws."""
    factors = torch.linalg.cholesky(evidence.covariances)
    moved = torch.einsum("bij,...bj->...bi", factors, whitened_preferences)
    return (evidence.means + moved) * evidence.scales
