"""Scores that can be averaged over worlds and horizons: what fairness gained, and what was earned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.results import Comparison, EvaluatedRun, Task, Variant
from hrl_policies.study.statistics import Interval, stratified_interval
from kuaifair_env.metrics import normalised_length


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


Values = NDArray[np.float64]
Score = Callable[[EvaluatedRun, Task], float]

LOW, HIGH = "random", "quota-greedy"
"""Controls whose R_cum counts as 0 and as 1: chance, and the trivially fair control."""


@dataclass(frozen=True)
class Scores:
    """Scores of every method that was run in every task, with as many seeds in each.

    Attributes:
        title: What the score is.
        explanation: What 0 and 1 are.
        by_variant: ``float64 (S, T)`` for S common seeds and T tasks.
    """

    title: str
    explanation: str
    by_variant: Mapping[Variant, Values]


def length_scores(comparison: Comparison) -> Scores | None:
    """Returns where Len lies between floor (0: every slate punished) and ceiling (1: none), at the run's own R_each.

    It isolates what a method gains by fairness from what it gains by clicks.

    Returns:
        The scores, or None where a leave rule has no length formula.
    """
    if any(run.initial_temper is None for run in comparison.runs):
        return None
    return Scores(
        "normalised Len",
        "0: every slate punished, 1: none, at the same R_each",
        _tables(comparison, lambda run, _: normalised_len(run)),
    )


def reward_scores(comparison: Comparison) -> Scores | None:
    """Returns R_cum scaled so that Random earns 0 and QuotaGreedy 1 in each task.

    Returns:
        The scores, or None where one of the two was not run in every task, or did not earn more than the other.
    """
    ends: dict[Task, tuple[float, float]] = {}
    for task in comparison.tasks:
        found = [comparison.by_cell.get((task, Variant(name, "")), ()) for name in (LOW, HIGH)]
        if not all(found):
            return None
        low, high = (float(np.mean([run.record.summary["r_cum"] for run in runs])) for runs in found)
        if not high > low:
            return None
        ends[task] = low, high

    def score(run: EvaluatedRun, task: Task) -> float:
        low, high = ends[task]
        return (run.record.summary["r_cum"] - low) / (high - low)

    return Scores("normalised R_cum", "0: Random, 1: QuotaGreedy", _tables(comparison, score))


def normalised_len(run: EvaluatedRun) -> float:
    """Returns where the Len of a run lies between its floor and its ceiling.

    Raises:
        ValueError: If its leave rule has no length formula.
    """
    if run.initial_temper is None:
        raise ValueError(f"{run.run.folder} was run under a leave rule without a length formula")
    summary = run.record.summary
    return float(normalised_length(summary["len"], run.initial_temper, summary["r_each"]))


def common_seeds(groups: Sequence[Sequence[EvaluatedRun]]) -> list[int]:
    """Returns the training seeds that all groups of runs have, increasing."""
    return sorted(set.intersection(*({run.seed for run in group} for group in groups))) if groups else []


def _tables(comparison: Comparison, score: Score) -> dict[Variant, Values]:
    found = {}
    for variant in comparison.variants:
        groups = [comparison.by_cell.get((task, variant), ()) for task in comparison.tasks]
        seeds = common_seeds(groups)
        if seeds:
            found[variant] = np.asarray(
                [
                    [
                        score(_of_seed(runs, seed), task)
                        for task, runs in zip(comparison.tasks, groups, strict=True)
                    ]
                    for seed in seeds
                ]
            )
    return found


def _of_seed(runs: Sequence[EvaluatedRun], seed: int) -> EvaluatedRun:
    return next(run for run in runs if run.seed == seed)
