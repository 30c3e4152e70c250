"""Methods over seeds against the controls that could refute them: interquartile means, paired differences, headroom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.judged import UserSums
from hrl_policies.study.statistics import Interval, mean_interval, paired_difference, stratified_interval
from hrl_policies.study.store import StoredRun
from hrl_policies.zoo import method

_RESAMPLES = 4_000


def label(run: StoredRun) -> str:
    """Returns how a comparison calls the method of a run: its title, and its purifier where that is not its own."""
    spec = method(run.config.method)
    purifier = "" if run.config.purifier is None else run.config.purifier.name
    name = f"{spec.title} ({run.config.variant})" if run.config.variant else spec.title
    return name if purifier == spec.purifier else f"{name} + {purifier}"


def comparison_table(runs: Sequence[StoredRun], base: str, floor: str, ceiling: str) -> str:
    """Returns a Markdown table over all methods.

    Len and R_cum are interquartile means over training seeds with stratified bootstrap intervals (Agarwal et al.,
    NeurIPS 2021). Differences of R_cum are paired: the same users met the same luck under every method; seeds are
    resampled, then users. The last column says how far a method goes from ``floor`` to ``ceiling``.

    Args:
        runs: Finished runs in one world, with one horizon and one item term.
        base: Label of the method that others are compared with.
        floor: Label of the control to beat.
        ceiling: Label of the bound.

    Raises:
        ValueError: If one of the three was not run.
    """
    grouped: dict[str, list[StoredRun]] = defaultdict(list)
    for run in runs:
        grouped[label(run)].append(run)
    for name in (base, floor, ceiling):
        if name not in grouped:
            raise ValueError(f"there is no run of {name!r} to compare with; there are {sorted(grouped)}")
    earned = {name: _of_users(group, "r_cum") for name, group in grouped.items()}
    stayed = {name: _of_users(group, "len") for name, group in grouped.items()}
    low, high = earned[floor].mean(), earned[ceiling].mean()
    titles = ("method", "seeds", "Len, IQM", "R_cum, IQM", "R_cum of every seed", f"R_cum - {floor}",
              f"R_cum - {base}", f"Len - {floor}", "way to the Oracle")  # fmt: skip
    lines = [_row(titles), _row(["---"] * len(titles))]
    for name in sorted(earned, key=lambda one: float(-earned[one].mean())):
        own = earned[name]
        cells = [
            name,
            str(len(own)),
            _middle(stayed[name]),
            _middle(own),
            " ".join(f"{value:.2f}" for value in own.mean(axis=1)),
            "" if name == floor else _difference(own, earned[floor]),
            "" if name == base else _difference(own, earned[base]),
            "" if name == floor else _difference(stayed[name], stayed[floor]),
            f"{100 * (own.mean() - low) / (high - low):.0f} %",
        ]
        lines.append(_row(cells))
    return "\n".join(lines)


def _of_users(runs: Sequence[StoredRun], figure: str) -> NDArray[np.float64]:
    """Returns ``(S, U)``, one row for each seed in order, one column for each user."""
    ordered = sorted(runs, key=lambda one: one.config.seed)
    return np.stack([UserSums.of_sessions(run.sessions()).per_session(figure) for run in ordered])


def _middle(table: NDArray[np.float64]) -> str:
    if len(table) < 2:
        return f"{table.mean():.2f}"
    return _shown(stratified_interval(table.mean(axis=1)[:, None], resamples=_RESAMPLES))


def _difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> str:
    """Pairs seeds where there are several on both sides; what has one run stands against each seed of the other."""
    seeds = max(len(first), len(second))
    if len(first) != len(second):
        first, second = (
            np.broadcast_to(one, (seeds, one.shape[1])) if len(one) == 1 else one for one in (first, second)
        )
    count = min(len(first), len(second))
    if count < 2:
        return _shown(mean_interval(first[0] - second[0], resamples=_RESAMPLES), sign=True)
    return _shown(paired_difference(first[:count], second[:count], resamples=_RESAMPLES), sign=True)


def _shown(interval: Interval, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{interval.estimate:{plus}.2f} [{interval.low:{plus}.2f}, {interval.high:{plus}.2f}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
