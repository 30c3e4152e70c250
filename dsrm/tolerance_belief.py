"""What popular share each current user tolerates, inferred from what made temper fall (leave rule ``personal``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from dsrm.click_scorer import ClickScorer
from kuaifair_env.abandonment import TemperFairness, leave_rule
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.errors import DataError
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.observations import observed_states
from kuaifair_env.tolerance import LIMITS
from kuaifair_env.world import World

_SHARES = 81
_MISREAD = 1e-3
"""Weight that a share keeps which an observed slate contradicts: shares between those on the grid are never lost."""
_QUANTILES = (np.arange(100) + 0.5) / 100
_TASTE_ITEMS = 1_024
_USERS, _USERS_AT_ONCE = 4_000, 500
_UNKNOWN = 0.02
"""Weight of the uniform distribution in a fitted prior: no share is impossible because no training user has it."""


@dataclass(frozen=True)
class TolerancePrior:
    """How users' tolerated popular shares lie about the popular share of the clicks that are predicted of them.

    A share is ``intercept + slope * predicted`` and a deviation, of any distribution: many users have a log of a few
    clicks and shares near the mean of all, others lie far from it.

    Attributes:
        intercept: Of the line.
        slope: Of the line.
        deviations: Quantiles of deviations from the line, evenly spread.
    """

    intercept: float
    slope: float
    deviations: tuple[float, ...]

    @classmethod
    def normal(cls, deviation: float = 0.12) -> TolerancePrior:
        """Returns a normal prior about the predicted share itself, for worlds that tell nothing."""
        from scipy.special import ndtri

        return cls(0.0, 1.0, tuple((deviation * ndtri(_QUANTILES)).tolist()))

    @classmethod
    def fit(cls, world: World, scorer: ClickScorer) -> TolerancePrior:
        """Fits the prior to users of a training world, whose tolerances follow from the training log.

        Where the log has no click on a candidate the prior is normal.

        Args:
            world: The training world.
            scorer: Predicts clicks at a session's start.
        """
        try:
            tolerated = world.tolerated_shares
        except DataError:
            return cls.normal()
        users = world.users[np.linspace(0, len(world.users) - 1, min(len(world.users), _USERS)).round().astype(int)]
        items = taste_items(world.n_items)
        popular = torch.from_numpy(world.groups.popular[items].astype(np.float32))
        shares = []
        for low in range(0, len(users), _USERS_AT_ONCE):
            states = observed_states(world, world.initial_history.take(users[low : low + _USERS_AT_ONCE]))
            shares.append(popular_share(torch.from_numpy(scorer.score(states)[:, items]), popular).numpy())
        predicted, known = np.concatenate(shares).astype(np.float64), tolerated[users]
        spread = float(predicted.var())
        slope = float(np.cov(predicted, known, ddof=0)[0, 1]) / spread if spread > 0 else 0.0
        intercept = float(known.mean() - slope * predicted.mean())
        deviations = np.quantile(known - intercept - slope * predicted, _QUANTILES)
        return cls(intercept, slope, tuple(deviations.tolist()))

    @cached_property
    def _places(self) -> NDArray[np.float64]:
        return np.asarray(self.deviations)

    def weights(self, predicted: FloatArray, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the weights of shares on an even grid, ``(n, grid)``, given predicted popular shares ``(n,)``.

        Each quantile lies between two shares of the grid, and counts for both by how near they are.
        """
        means = self.intercept + self.slope * predicted.astype(np.float64)
        points = np.clip(means[:, None] + self._places, *LIMITS)
        step = shares[1] - shares[0]
        places = (points - shares[0]) / step
        low = np.clip(places.astype(np.int64), 0, len(shares) - 2)
        above = places - low
        weights = np.full((len(means), len(shares)), _UNKNOWN / len(shares))
        rows = np.broadcast_to(np.arange(len(means))[:, None], low.shape)
        share = (1.0 - _UNKNOWN) / len(self._places)
        np.add.at(weights, (rows, low), share * (1.0 - above))
        np.add.at(weights, (rows, low + 1), share * above)
        return weights


class ToleranceBelief:
    """The posterior of each session's tolerated popular share ``t_u`` on a grid over [.1, .9].

    A slate of popular share ``p`` is punished where ``|p - t_u|`` reaches the bound, and agents see whether it was.
    Under other leave rules, whose bound is known, nothing is inferred and all risks are 0.

    Args:
        config: How sessions run.
        n_sessions: Number of sessions ``B``.
        prior: The distribution of shares at a session's start.

    Attributes:
        weights: ``float64 (B, n)``, posterior weights of the shares on the grid; sum to 1.
    """

    def __init__(self, config: SessionConfig, n_sessions: int, prior: TolerancePrior) -> None:
        rule = leave_rule(config.leave)
        personal = isinstance(rule, TemperFairness) and rule.mode == "personal" and rule.unfair_penalty > 0
        slates = rule.window_for(config.items_per_slate) if isinstance(rule, TemperFairness) else 1
        self._informative = personal and slates == 1
        self._prior = prior
        self._shares = np.linspace(*LIMITS, _SHARES)
        self._bound = rule.ad_bound if isinstance(rule, TemperFairness) else 0.0
        counts = np.arange(config.items_per_slate + 1) / config.items_per_slate
        self._punished = self._punishes(counts).astype(np.float64)
        self.weights = np.full((n_sessions, _SHARES), 1.0 / _SHARES)

    def start(self, rows: NDArray[np.int64], predicted: FloatArray) -> None:
        """Starts new sessions in some rows, ``int64 (n,)``, of users with predicted popular shares ``(n,)``."""
        if self._informative and len(rows):
            self.weights[rows] = self._prior.weights(predicted, self._shares)

    def observe(self, popular_shares: NDArray[np.float64], punished: BoolArray) -> None:
        """Takes the popular shares of the last slates, ``(B,)``, and whether they were punished, ``bool (B,)``."""
        if self._informative:
            fits = self._punishes(popular_shares) == punished[:, None]
            self.weights *= np.where(fits, 1.0, _MISREAD)
            self.weights /= self.weights.sum(axis=1, keepdims=True)

    def risks(self) -> NDArray[np.float64]:
        """Returns ``(B, K + 1)``, by what chance a slate with so many popular items is punished."""
        if not self._informative:
            return np.zeros((len(self.weights), len(self._punished)))
        return self.weights @ self._punished.T

    def joint_risks(self) -> NDArray[np.float64]:
        """Returns ``(B, K + 1, K + 1)``, by what chance slates with either number of popular items are both punished.

        This is what the answer to one slate says of another: given that ``n`` popular items were punished, ``m`` are
        with chance ``joint[n, m] / risk[n]``.
        """
        n_counts = len(self._punished)
        if not self._informative:
            return np.zeros((len(self.weights), n_counts, n_counts))
        both = (self._punished[:, None] * self._punished).reshape(n_counts**2, -1)
        return (self.weights @ both.T).reshape(-1, n_counts, n_counts)

    def slates_left(self, temper: NDArray[np.float64], click_rates: FloatArray) -> NDArray[np.float64]:
        """Returns how many slates users will stay for after the next if none is punished, ``(B,)``.

        It is 0 where the bound is known, since no slate has anything to tell about it.

        Args:
            temper: ``(B,)``, what is left of it; follows from clicks and punishments.
            click_rates: ``(B,)``, share of a slate that is clicked.
        """
        if not self._informative:
            return np.zeros(len(temper))
        left: NDArray[np.float64] = np.maximum((temper - 1.0) / (2.0 - click_rates) - 1.0, 0.0)
        return left

    def _punishes(self, popular_shares: NDArray[np.float64]) -> BoolArray:
        """Says which shares on the grid do not tolerate given popular shares ``(n,)``, ``bool (n, grid)``."""
        return violates(slate_disparity(popular_shares[:, None], "personal", self._shares), self._bound)


def taste_items(n_items: int) -> NDArray[np.int64]:
    """Returns the items over which the popular share of a user's taste is taken: all, or 1,024 spread evenly."""
    return np.linspace(0, n_items - 1, min(n_items, _TASTE_ITEMS)).round().astype(np.int64)


def popular_share(logits: torch.Tensor, popular: torch.Tensor) -> torch.Tensor:
    """Returns the popular share of expected clicks where all items are shown alike, ``float32 (B,)``.

    Args:
        logits: ``float32 (B, n)``, log-odds of clicks.
        popular: ``float32 (n,)``, 1 for popular items.
    """
    chances = torch.sigmoid(logits)
    return (chances @ popular) / chances.sum(dim=1).clamp_min(1e-12)
