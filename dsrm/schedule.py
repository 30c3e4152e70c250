"""Noise schedules of the forward process (paper eq. 2), as tables of double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

ScheduleKind = Literal["linear", "cosine", "vp"]

LINEAR_RANGE = (1e-4, 0.02)
VP_RANGE = (0.1, 10.0)
_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a state is left at each noise level ``k = 0 .. K``.

    At level ``k`` a state is ``sqrt(abar_k) s + sqrt(1 - abar_k) eps`` (eq. 2); level 0 is the clean state.

    Attributes:
        kind: ``"linear"`` (betas from 1e-4 to .02; what is left at level ``K`` depends on ``K``: .82 for 20, .006 for
            500), ``"cosine"`` (Nichol and Dhariwal, ICML 2021) or ``"vp"`` (the variance-preserving process of Song et
            al., ICLR 2021, beta from .1 to 10); what the last two leave at level ``K`` does not depend on ``K``.
        alphas_bar: ``float64 (K + 1,)``, ``abar_k``; 1 at level 0, decreasing.
    """

    kind: ScheduleKind
    alphas_bar: NDArray[np.float64]

    @classmethod
    def make(cls, kind: ScheduleKind, levels: int) -> NoiseSchedule:
        """Makes a schedule.

        Args:
            kind: See the class.
            levels: Number of noise levels ``K``.

        Raises:
            ValueError: If the kind is unknown or there is no level.
        """
        if levels < 1:
            raise ValueError(f"a schedule needs at least 1 level, got {levels}")
        if kind == "linear":
            betas = np.linspace(*LINEAR_RANGE, levels)
        elif kind == "cosine":
            time = np.arange(levels + 1) / levels
            left = np.cos((time + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * np.pi / 2) ** 2
            betas = np.minimum(1.0 - left[1:] / left[:-1], _LARGEST_BETA)
        elif kind == "vp":
            time = np.arange(levels + 1) / levels
            low, high = VP_RANGE
            left = np.exp(-(low * time + 0.5 * (high - low) * time**2))
            betas = 1.0 - left[1:] / left[:-1]
        else:
            raise ValueError(f"schedule must be one of {get_args(ScheduleKind)}, got {kind!r}")
        return cls(kind, np.concatenate([[1.0], np.cumprod(1.0 - betas)]))

    @property
    def levels(self) -> int:
        """Number of noise levels ``K``."""
        return len(self.alphas_bar) - 1

    @property
    def betas(self) -> NDArray[np.float64]:
        """``float64 (K,)``, share of variance that each level replaces by noise."""
        return np.asarray(1.0 - self.alphas_bar[1:] / self.alphas_bar[:-1])

    def posterior_variance(self, high: int, low: int) -> float:
        """Returns the variance of a state at level ``low``, given it at level ``high`` and clean (``beta~`` of eq. 3).

        Args:
            high: The noisier level.
            low: The cleaner level, ``0 <= low < high``.
        """
        above, below = self.alphas_bar[high], self.alphas_bar[low]
        return float((1.0 - below) / (1.0 - above) * (1.0 - above / below))

    def steps(self, start: int, count: int) -> NDArray[np.int64]:
        """Returns the levels that a solver of ``count`` steps visits from level ``start`` down to 0, evenly spread.

        Raises:
            ValueError: If the start is no level, or there are more steps than levels.
        """
        if not 1 <= start <= self.levels:
            raise ValueError(f"a solver starts at a level from 1 to {self.levels}, got {start}")
        if not 1 <= count <= start:
            raise ValueError(f"from level {start} there are 1 to {start} steps, got {count}")
        return np.round(np.linspace(start, 0, count + 1)).astype(np.int64)
