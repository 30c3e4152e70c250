"""Conditions ``c_t`` of the denoiser: what it reads beside the noisy state (paper eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.spaces import embedding_sums, mean_embeddings
from kuaifair_env.world import World

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
"""The statistics of a window that a condition holds, in this order."""


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
        weights: FloatArray = window.clicks * self.weights.take(window.items)
        return weights
