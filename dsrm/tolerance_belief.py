"""What popular share each current user tolerates, inferred from what made temper fall (leave rule ``personal``)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.abandonment import TemperFairness, leave_rule
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.metrics import slate_disparity, violates
from kuaifair_env.tolerance import LIMITS

_SHARES = 41
_DEVIATION = 0.12
"""Prior spread of a tolerated share about the popular share of the user's predicted clicks."""
_MISREAD = 1e-3
"""Weight that a share keeps which an observed slate contradicts: shares between those on the grid are never lost."""


class ToleranceBelief:
    """The posterior of each session's tolerated popular share ``t_u`` on a grid over [.1, .9].

    A slate of popular share ``p`` is punished where ``|p - t_u|`` reaches the bound, and agents see whether it was. The
    prior is normal about the popular share of the clicks that a belief predicts at the session's start. Under other
    leave rules, whose bound is known, nothing is inferred and all risks are 0.

    Args:
        config: How sessions run.
        n_sessions: Number of sessions ``B``.

    Attributes:
        weights: ``float64 (B, n)``, posterior weights of the shares on the grid; sum to 1.
    """

    def __init__(self, config: SessionConfig, n_sessions: int) -> None:
        rule = leave_rule(config.leave)
        personal = isinstance(rule, TemperFairness) and rule.mode == "personal" and rule.unfair_penalty > 0
        slates = rule.window_for(config.items_per_slate) if isinstance(rule, TemperFairness) else 1
        self._informative = personal and slates == 1
        self._shares = np.linspace(*LIMITS, _SHARES)
        self._bound = rule.ad_bound if isinstance(rule, TemperFairness) else 0.0
        counts = np.arange(config.items_per_slate + 1) / config.items_per_slate
        self._punished = self._punishes(counts).astype(np.float64)
        self.weights = np.full((n_sessions, _SHARES), 1.0 / _SHARES)

    def start(self, rows: NDArray[np.int64], means: FloatArray) -> None:
        """Starts new sessions in some rows, ``int64 (n,)``, with the prior's means, ``(n,)``."""
        if self._informative and len(rows):
            distances = (self._shares - np.clip(means, *LIMITS)[:, None]) / _DEVIATION
            weights = np.exp(-0.5 * distances**2)
            self.weights[rows] = weights / weights.sum(axis=1, keepdims=True)

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

    def _punishes(self, popular_shares: NDArray[np.float64]) -> BoolArray:
        """Says which shares on the grid do not tolerate given popular shares ``(n,)``, ``bool (n, grid)``."""
        return violates(slate_disparity(popular_shares[:, None], "personal", self._shares), self._bound)
