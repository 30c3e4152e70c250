"""The hidden causes of a twin's logs: taste, quality, exposure propensity, conformity.

Taste vectors lie on a grid of 1/128, so that every inner product of theirs is exact in ``float32`` and the
same on every platform, whatever the linear algebra library and the order of its sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri

from kuaifair_env.data.schema import BoolArray, FloatArray, IntArray
from kuaifair_env.synthetic.config import QuantileDistribution, TwinConfig

Scores = NDArray[np.float64]

_GRID = 128.0
_LIMIT = 1023.0 / _GRID
_DECIMALS = 10
"""Digits that survive from libm and LAPACK results; the rest may differ between platforms."""


SCORE_GRID = np.linspace(-10.0, 10.0, 2001)
"""Watching scores at which a :class:`ClickChoice` tabulates what follows from them."""


@dataclass(frozen=True)
class ClickChoice:
    """How a twin's expected feedback follows where something else than the twin's own click counts as a click.

    With ``p`` the chance of the twin's own click, expected feedback is
    ``p * given_click[i] + (1 - p) * H(score)``, where ``H`` interpolates ``otherwise`` and the watching score of user
    ``u`` and item ``i`` is ``item_scores[i] + user_scores[u] + taste_weight * taste(u, i) + conformity *
    herding_weight * herding[u] * popularity[i]``.

    Attributes:
        given_click: ``float32 (N,)`` expected feedback of each item, given the twin's own click.
        otherwise: ``float32``, expected feedback without it at the scores of :data:`SCORE_GRID`.
        item_scores: ``float32 (N,)``.
        user_scores: ``float32 (U,)``.
        taste_weight: Watching score per standard deviation of taste.
        herding_weight: Watching score per logit.
    """

    given_click: FloatArray
    otherwise: FloatArray
    item_scores: FloatArray
    user_scores: FloatArray
    taste_weight: float = 0.0
    herding_weight: float = 0.0

    def expected(self, own_click: FloatArray, items: IntArray, scores: FloatArray) -> FloatArray:
        """Returns ``float32 (B, K)``, expected feedback, from chances of the twin's own click and watching scores."""
        otherwise: FloatArray = np.interp(scores, SCORE_GRID, self.otherwise).astype(np.float32)
        return own_click * self.given_click[items] + (1.0 - own_click) * otherwise


@dataclass(frozen=True)
class TwinTruth:
    """The true distribution of feedback of a twin.

    The logit of the twin's own click of user ``u`` on item ``i`` is
    ``item_effects[i] + user_effects[u] + taste_strength * taste(u, i) + conformity * herding[u] *
    popularity[i]``, with ``conformity`` 0 for preference alone and 1 for what people do in the training
    world.

    Attributes:
        user_vectors: ``float32 (U, m)`` taste of users, on a grid.
        item_vectors: ``float32 (N, m)`` places of items in the space of taste, on a grid; over random pairs
            the inner product has mean 0 and standard deviation about 1.
        item_effects: ``float32 (N,)`` item quality in logits.
        user_effects: ``float32 (U,)`` inclination to click in logits.
        herding: ``float32 (U,)`` logits by which each user follows the crowd, at least 0.
        popularity: ``float32 (N,)`` standardised log exposure propensity.
        taste_strength: Logits per standard deviation of taste.
        choice: What expected feedback follows from where it is not the twin's own click.
    """

    user_vectors: FloatArray
    item_vectors: FloatArray
    item_effects: FloatArray
    user_effects: FloatArray
    herding: FloatArray
    popularity: FloatArray
    taste_strength: float
    choice: ClickChoice | None = None

    @property
    def n_users(self) -> int:
        """Number of users ``U``."""
        return len(self.user_effects)

    @property
    def n_items(self) -> int:
        """Number of items ``N``."""
        return len(self.item_effects)

    @cached_property
    def true_preference(self) -> tuple[FloatArray, FloatArray]:
        """``float32 (N, m)`` and ``float32 (U, m)`` vectors of items and users; products are tastes in logits."""
        return self.item_vectors, self.user_vectors * np.float32(self.taste_strength)

    def taste(self, users: IntArray, items: IntArray) -> FloatArray:
        """Returns ``float32 (B, K)``, the standardised taste of ``users (B,)`` for ``items (B, K)``."""
        taste: FloatArray = np.einsum("bd,bkd->bk", self.user_vectors[users], self.item_vectors[items])
        return taste

    def click_probability(self, users: IntArray, items: IntArray, conformity: float = 0.0) -> FloatArray:
        """Returns ``float32 (B, K)``, expected feedback of ``users (B,)`` on each of ``items (B, K)`` shown at random.

        This is the chance of a click unless feedback is graded. ``conformity`` is the share that counts: 0 for true
        preference, 1 as in the training world.
        """
        taste = self.taste(users, items)
        herding: FloatArray = np.float32(conformity) * self.herding[users][:, None] * self.popularity[items]
        logits = np.float32(self.taste_strength) * taste + self.item_effects[items] + self.user_effects[users][:, None]
        own_click: FloatArray = expit(logits + herding)
        if self.choice is None:
            return own_click
        choice = self.choice
        personal = np.float32(choice.taste_weight) * taste + np.float32(choice.herding_weight) * herding
        scores = choice.item_scores[items] + choice.user_scores[users][:, None] + personal
        return choice.expected(own_click, items, scores)

    def with_tastes(self, users: IntArray, tastes: FloatArray) -> TwinTruth:
        """Returns the truth of ``users (B,)`` alone, with other vectors of taste, ``float32 (B, m)``."""
        effects, herding = self.user_effects[users], self.herding[users]
        choice = None if self.choice is None else replace(self.choice, user_scores=self.choice.user_scores[users])
        return replace(self, user_vectors=tastes, user_effects=effects, herding=herding, choice=choice)

    def rearranged(self, items: IntArray) -> TwinTruth:
        """Returns the same truth for the catalogue ``old_items[items]``."""
        vectors, effects, popularity = (
            self.item_vectors[items],
            self.item_effects[items],
            self.popularity[items],
        )
        choice = self.choice
        if choice is not None:
            choice = replace(choice, given_click=choice.given_click[items], item_scores=choice.item_scores[items])
        return replace(self, item_vectors=vectors, item_effects=effects, popularity=popularity, choice=choice)


@dataclass(frozen=True)
class TwinWorld:
    """The truth of a twin and the hidden causes of its logs and tables.

    Attributes:
        truth: The distribution of clicks.
        tags: ``bool (N, T)`` known tags of items; a few items have none.
        first_tags: ``int64 (N,)`` main tag of each item.
        exposure_logs: ``float64 (N,)`` log of the platform's exposure propensity.
        quality_scores: ``float64 (N,)`` standard normal scores of item quality.
        inclination_scores: ``float64 (U,)`` standard normal scores of the inclination to click.
        activity_scores: ``float64 (U,)`` standard normal scores of activity in the training log.
        feed_items: ``float64 (N,)`` logits that only the logged feed adds to an item.
        feed_users: ``float64 (U,)`` logits that only the logged feed adds to a user.
        panel_users: ``int64``, increasing rows of the users of the test log.
        panel_items: ``int64``, increasing rows of the items of the test log.
    """

    truth: TwinTruth
    tags: BoolArray
    first_tags: NDArray[np.int64]
    exposure_logs: Scores
    quality_scores: Scores
    inclination_scores: Scores
    activity_scores: Scores
    feed_items: Scores
    feed_users: Scores
    panel_users: NDArray[np.int64]
    panel_items: NDArray[np.int64]


def stream(config: TwinConfig, number: int) -> np.random.Generator:
    """Returns the generator of one part of a twin, so that parts do not disturb each other."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([config.seed, number])))


def build_world(config: TwinConfig) -> TwinWorld:
    """Draws users, items and their hidden causes, from which the logs follow."""
    rng = stream(config, 1)
    panel_users = np.sort(rng.permutation(config.n_users)[: config.n_panel_users])
    panel_items = np.sort(rng.permutation(config.n_items)[: config.n_panel_items])
    in_panel = np.zeros(config.n_items, np.bool_)
    in_panel[panel_items] = True

    tags, first_tags = _draw_tags(config, rng)
    spread = rng.standard_normal(config.n_items)
    exposure_logs = np.where(
        in_panel,
        config.panel_log_gap + config.exposure_log_sd[0] * spread,
        config.exposure_log_sd[1] * spread,
    )
    popularity = np.clip(_standardised(exposure_logs), -2.5, 2.5)
    quality = _quality_scores(config, rng, first_tags, spread)
    inclination, activity = _user_scores(config, rng, panel_users)
    user_vectors, item_vectors = _draw_taste(config, rng, tags, first_tags)
    item_effects, user_effects = _solve_effects(config, quality, inclination)
    herding = rng.gamma(config.conformity_shape, 1.0 / config.conformity_shape, config.n_users)
    tags[rng.random(config.n_items) < config.untagged_share] = False
    truth = TwinTruth(
        user_vectors=user_vectors,
        item_vectors=item_vectors,
        item_effects=_stable(item_effects),
        user_effects=_stable(user_effects),
        herding=_stable(config.conformity * herding),
        popularity=_stable(popularity),
        taste_strength=config.taste_strength,
    )
    return TwinWorld(
        truth,
        tags,
        first_tags,
        exposure_logs,
        quality,
        inclination,
        activity,
        _feed_effects(rng, item_effects, config.feed_slopes[0], config.feed_sds[0]),
        _feed_effects(rng, user_effects, config.feed_slopes[1], config.feed_sds[1]),
        panel_users,
        panel_items,
    )


def correlated(rng: np.random.Generator, base: Scores, correlation: float) -> Scores:
    """Returns standard normal scores that correlate with standard normal ``base``."""
    return correlation * base + math.sqrt(1.0 - correlation**2) * rng.standard_normal(len(base))


def _feed_effects(rng: np.random.Generator, effects: Scores, slope: float, spread: float) -> Scores:
    """Draws the difference between effects in the logged feed and under random exposure."""
    feed: Scores = (slope - 1.0) * (effects - effects.mean()) + spread * rng.standard_normal(len(effects))
    return feed


def _standardised(values: Scores) -> Scores:
    scores: Scores = (values - values.mean()) / max(float(values.std()), 1e-12)
    return scores


def _stable(values: Scores) -> FloatArray:
    return np.round(values, _DECIMALS).astype(np.float32)


def categories(rng: np.random.Generator, shares: Any, size: int) -> NDArray[np.int64]:
    """Draws ``int64 (size,)``, categories ``0 .. len(shares) - 1`` in proportion to their shares."""
    edges = np.cumsum(np.asarray(shares, np.float64))
    drawn = np.searchsorted(edges, rng.random(size) * edges[-1], side="right")
    return np.asarray(np.minimum(drawn, len(edges) - 1), np.int64)


def _draw_tags(config: TwinConfig, rng: np.random.Generator) -> tuple[BoolArray, NDArray[np.int64]]:
    """Draws distinct tags per item: the ``n`` largest of randomly scaled tag frequencies."""
    counts = np.minimum(categories(rng, config.tags_per_item, config.n_items) + 1, len(config.tag_frequencies))
    keys = rng.standard_exponential((config.n_items, len(config.tag_frequencies)))
    keys /= np.asarray(config.tag_frequencies, np.float64)
    order = np.argsort(keys, axis=1, kind="stable")
    tags = np.zeros(keys.shape, np.bool_)
    np.put_along_axis(tags, order, np.arange(keys.shape[1]) < counts[:, None], axis=1)
    return tags, order[:, 0]


def _quality_scores(
    config: TwinConfig, rng: np.random.Generator, first_tags: NDArray[np.int64], exposure_scores: Scores
) -> Scores:
    """Quality: partly the tag's, partly what the platform noticed, mostly the item's own."""
    by_tag = rng.standard_normal(len(config.tag_frequencies))[first_tags]
    own = correlated(rng, exposure_scores, config.quality_exposure_correlation)
    share = config.tag_quality_share
    return math.sqrt(share) * by_tag + math.sqrt(1.0 - share) * own


def _user_scores(config: TwinConfig, rng: np.random.Generator, panel_users: NDArray[np.int64]) -> tuple[Scores, Scores]:
    inclination = rng.standard_normal(config.n_users)
    activity = correlated(rng, inclination, config.activity_taste_correlation)
    if config.panel_activity_shift:
        activity[panel_users] -= config.panel_activity_shift
        activity = _standardised(activity)
    return inclination, activity


def _draw_taste(
    config: TwinConfig, rng: np.random.Generator, tags: BoolArray, first_tags: NDArray[np.int64]
) -> tuple[FloatArray, FloatArray]:
    """Places items around the points of their tags, and users at mixtures of a few such places."""
    dimensions = config.taste_dimensions
    axes = (1.0 + np.arange(dimensions)) ** -config.taste_decay
    centres = rng.standard_normal((len(config.tag_frequencies), dimensions)) * axes
    common, own = math.sqrt(config.tag_taste_share), math.sqrt(1.0 - config.tag_taste_share)

    items = common * _tag_means(tags, centres)
    items += own * axes * rng.standard_normal((config.n_items, dimensions))

    n_interests = categories(rng, config.interests, config.n_users) + 1
    shape = (config.n_users, len(config.interests))
    liked = categories(rng, np.asarray(config.tag_frequencies) ** 0.75, shape[0] * shape[1]).reshape(shape)
    weights = rng.standard_exponential(shape) * (np.arange(shape[1]) < n_interests[:, None])
    weights /= weights.sum(axis=1, keepdims=True)
    users = np.zeros((config.n_users, dimensions))
    for interest in range(shape[1]):  # a handful
        place = common * centres[liked[:, interest]] + own * axes * rng.standard_normal(users.shape)
        users += weights[:, interest, None] * place
    length = np.sqrt(np.mean(users**2, axis=1, keepdims=True))
    return _on_grid(users / np.maximum(length, 1e-9), items)


def _tag_means(tags: BoolArray, centres: Scores) -> Scores:
    means = np.zeros((len(tags), centres.shape[1]))
    for tag, centre in enumerate(centres):  # some dozens
        means += tags[:, tag, None] * centre
    means /= tags.sum(axis=1, keepdims=True)
    return means


def _on_grid(users: Scores, items: Scores) -> tuple[FloatArray, FloatArray]:
    """Centres both sides, scales their inner products to standard deviation 1, and rounds to the grid."""
    users = users - users.mean(axis=0)
    items = items - items.mean(axis=0)
    second = (users[:, :, None] * users[:, None, :]).mean(axis=0)
    second_items = (items[:, :, None] * items[:, None, :]).mean(axis=0)
    scale = math.sqrt(max(float((second * second_items).sum()), 1e-12)) ** -0.5
    return _rounded(users * scale), _rounded(items * scale)


def _rounded(values: Scores) -> FloatArray:
    snapped = np.rint(np.round(values, _DECIMALS) * _GRID) / _GRID
    return np.clip(snapped, -_LIMIT, _LIMIT).astype(np.float32)


def _solve_effects(config: TwinConfig, quality: Scores, inclination: Scores) -> tuple[Scores, Scores]:
    """Finds item and user effects whose click rates under random exposure follow the configured distributions.

    Alternates: given the distribution of one side's effects, each effect of the other side is the logit at which the
    expected click rate over that side and over taste is the configured one.
    """
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(9)
    taste = (config.taste_strength * nodes, node_weights / node_weights.sum())
    levels = (np.arange(64) + 0.5) / 64
    item_rates = distribution_by_rank(config.item_rates, quality)
    user_rates = distribution_by_rank(config.user_rates, inclination)
    user_logits = logit(user_rates)
    user_rates = expit(user_logits + shift_to_mean(user_logits, float(item_rates.mean()), 8.0, 50))
    items, users = logit(item_rates), np.zeros(len(user_rates))
    for _ in range(6):
        users = _effects_for(user_rates, np.quantile(items, levels), taste)
        items = _effects_for(item_rates, np.quantile(users, levels), taste)
    return items, users


def shift_to_mean(logits: Scores, mean: float, bound: float, halvings: int) -> float:
    """Returns the shift of logits, within ``-bound..bound``, at which their mean probability is ``mean``."""
    low, high = -bound, bound
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(logits + middle).mean() < mean else (low, middle)
    return low


def _effects_for(rates: Scores, others: Scores, taste: tuple[Scores, Scores]) -> Scores:
    """Returns the effects at which the mean click rate against ``others`` and taste is ``rates``."""
    grid = np.linspace(-16.0, 8.0, 481)
    shift, weights = taste
    means = expit(grid[:, None, None] + others[:, None] + shift).mean(axis=1) @ weights
    return np.interp(logit(rates), logit(means), grid)


def ranks_of(scores: Scores) -> Scores:
    """Returns ``float64 (n,)``, the rank of each score as a number in (0, 1); ties by position."""
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores, kind="stable")] = (np.arange(len(scores)) + 0.5) / len(scores)
    return ranks


def distribution_by_rank(distribution: QuantileDistribution, scores: Scores) -> Scores:
    """Returns values that follow a distribution exactly and have the order of the scores."""
    return distribution.at(ndtri(ranks_of(scores)))
