"""Performance profiles: how large a share of runs scores above each threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.statistics import Interval, stratified_interval


@dataclass(frozen=True)
class Profile:
    """A performance profile with its pointwise band.

    Attributes:
        thresholds: ``(n,)`` scores, increasing.
        share: ``(n,)`` share of runs, over seeds and tasks, whose score is above each threshold.
        low: ``(n,)`` lower end of the band.
        high: ``(n,)`` upper end.
        level: Pointwise coverage of the band.
    """

    thresholds: NDArray[np.float64]
    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    level: float


def performance_profile(
    scores: NDArray[Any],
    thresholds: NDArray[Any],
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Profile:
    """Returns the profile of a method, with a stratified bootstrap band (Agarwal et al., NeurIPS 2021).

    Args:
        scores: ``(S, T)`` normalised scores of S training seeds on T tasks (world and horizon).
        thresholds: ``(n,)`` increasing.
        level: Coverage at each threshold.
        resamples: How many resamples of the seeds within each task.
        seed: Seed of the resampling.

    Raises:
        ValueError: Thresholds that do not increase, fewer than two seeds, or scores that are not finite.
    """
    at = np.asarray(thresholds, np.float64)
    if at.ndim != 1 or not len(at) or not np.isfinite(at).all() or (np.diff(at) <= 0).any():
        raise ValueError("thresholds must be one increasing list of finite numbers")

    def above(threshold: float) -> Interval:
        return stratified_interval(
            scores,
            lambda values: np.asarray((values > threshold).mean(axis=-1)),
            level=level,
            resamples=resamples,
            seed=seed,
        )

    found = [above(float(threshold)) for threshold in at]
    share, low, high = (
        np.asarray([getattr(one, name) for one in found]) for name in ("estimate", "low", "high")
    )
    return Profile(at, share, low, high, level)
