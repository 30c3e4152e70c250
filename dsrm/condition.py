"""The rich condition: what a purifier may know of a window beyond the observed state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.worlds import StateEncoder, World

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
        logs = np.log1p(exposures)
        popularity = (logs - logs.mean()) / max(float(logs.std()), 1e-6)
        least = exposures[: world.n_items][world.groups.popular].min()
        popular = exposures >= least
        popular[: world.n_items] = world.groups.popular
        weights = propensity_weights(exposures, exponent, clip_quantile)
        return cls(world.embeddings, weights, np.asarray(popularity, np.float32), popular, world.encoder)

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
        weights: FloatArray = window.clicks * self.weights.take(window.items)
        sums: FloatArray = np.matmul(weights[:, None, :], self.embeddings.take(window.items, axis=0))[:, 0]
        return sums, weights.sum(axis=1)

    def ips_state(self, window: HistoryWindow) -> FloatArray:
        """Returns the self-normalised inverse-propensity mean of the clicked items' embeddings, ``float32 (B, d)``."""
        sums, mass = self.pooled(window)
        sums /= np.maximum(mass, 1e-6)[:, None]
        return sums

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
