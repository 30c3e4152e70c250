"""The page of preferences.py: tables of means, differences with Holm's correction, coverage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from preference_tasks import (
    CANDIDATES,
    CLOSED,
    FIRST_ROWS,
    FROZEN,
    FURTHER_USERS,
    MODELS,
    NONE,
    REAL,
    SERVED,
    SERVED_SESSIONS,
    SHARED,
    STAGES,
    TRUTH,
    WIDE,
    split_name,
)
from worlds import cell

from hrl_policies.study.statistics import holm
from hrl_policies.worlds import WorldPair
from kuaifair_env.intervals import Estimate, crossed_difference, interval_of, rate_interval

METRICS = {"log loss": -1, "AUC": 1}
"""Measures, and the sign of what is better."""
BASES = ("gaussian", "regression", CLOSED)
METHOD = "diffusion"
SIGNIFICANCE = 0.05
ROW_ORDER = (NONE, WIDE, CLOSED, *MODELS, TRUTH)

Results = Mapping[str, NDArray[Any]]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measurements:
    """What was measured of each user.

    Attributes:
        fixed: Of predictions without a training seed.
        seeds: Of the models of each training seed.
    """

    fixed: Results
    seeds: Mapping[int, Results]

    @property
    def tasks(self) -> list[str]:
        """Names of all tasks."""
        return [key.removesuffix("|users") for key in self.fixed if key.endswith("|users")]

    def in_regime(self, regime: str) -> list[str]:
        """Returns the names of the tasks of a regime."""
        return [task for task in self.tasks if split_name(task)[0] == regime]

    def table(self, task: str, model: str, metric: str) -> Values | None:
        """Returns ``(S, U)`` values of users, whose mean weights users by their rows; None if there are none."""
        key = f"{task}|{model}|{metric}"
        rows = [results[key] for results in (self.fixed, *self.seeds.values()) if key in results]
        if not rows:
            return None
        values = np.stack(rows).astype(np.float64)
        both = np.isfinite(values[0])  # users with a click and a skip
        weights = self.fixed[f"{task}|rows"][both].astype(np.float64)
        return np.asarray(values[:, both] * weights / weights.mean())

    def coverage(self, sessions: str, model: str) -> Values:
        """Returns ``(S, 3)``: coverage of ``b``, of components of ``w``, of log-odds."""
        key = f"coverage|{sessions}|{model}"
        return np.stack([results[key] for results in self.seeds.values() if key in results])

    @property
    def coverage_sessions(self) -> list[str]:
        """Names of the sessions in which coverage was measured."""
        keys = [key.split("|") for key in next(iter(self.seeds.values())) if key.startswith("coverage|")]
        return list(dict.fromkeys(sessions for _, sessions, _ in keys))


@dataclass(frozen=True)
class Difference:
    """The diffusion model minus another, in thousandths; ``adjusted`` is Holm's p-value."""

    task: str
    metric: str
    base: str
    estimate: Estimate
    adjusted: float

    @property
    def verdict(self) -> str:
        """``ahead``, ``behind``, or nothing."""
        if self.adjusted > SIGNIFICANCE:
            return ""
        return "ahead" if self.estimate.value * METRICS[self.metric] > 0 else "behind"


def differences(measurements: Measurements) -> list[Difference]:
    """Returns all differences of the page; p-values are adjusted for all of them together."""
    found = []
    for base in BASES:
        for task in measurements.tasks:
            for metric in METRICS:
                tables = [measurements.table(task, model, metric) for model in (METHOD, base)]
                first, second = (1000.0 * table for table in tables if table is not None)
                found.append((task, metric, base, crossed_difference(first, second)))
    adjusted = holm(np.asarray([estimate.p_value() for *_, estimate in found])).tolist()
    return [Difference(*each, p) for each, p in zip(found, adjusted, strict=True)]


def page_of(pair: WorldPair, fixed: Results, seeds: Mapping[int, Results], command: str) -> str:
    """Returns the page of a world, or of a final check that holds nothing but real rows."""
    measurements = Measurements(fixed, seeds)
    all_differences = differences(measurements)
    regimes = list(dict.fromkeys(split_name(task)[0] for task in measurements.tasks))
    lines = [f"# Preference models: {pair.name}", "", *_summary(all_differences, regimes), ""]
    for regime in regimes:
        lines += [f"## {regime[0].upper()}{regime[1:]}", ""]
        for metric, title in (("log loss", "Log loss, in nats"), ("AUC", "Within-user AUC")):
            lines += [f"### {title}", "", *_means(measurements, regime, metric), ""]
        for base in BASES:
            of_base = [one for one in all_differences if one.base == base and split_name(one.task)[0] == regime]
            lines += [
                f"### Diffusion minus {base}, in thousandths",
                "",
                *_difference_table(of_base, all_differences),
                "",
            ]
    if any(key.startswith("coverage|") for key in next(iter(seeds.values()))):
        lines += ["## Coverage of 80 % intervals", "", *_coverage_table(measurements), ""]
    return "\n".join([*lines, "## Notes", "", *_notes(pair, measurements, all_differences, regimes, command)])


def table_of_numbers(fixed: Results, seeds: Mapping[int, Results]) -> str:
    """Returns all means as CSV: one row per seed, task, model and measure."""
    lines = ["seed,regime,policy,shows,model,measure,value"]
    for seed, results in [("", fixed), *((str(seed), results) for seed, results in seeds.items())]:
        alone = Measurements({**fixed, **results} if seed else fixed, {})
        for key in results:
            sessions, *rest = key.split("|")
            if len(rest) == 2 and sessions != "coverage":
                model, metric = rest
                table = alone.table(sessions, model, metric)
                assert table is not None
                regime, policy, shows = split_name(sessions)
                lines.append(f'{seed},{regime},{policy},{shows},"{model}",{metric},{table.mean():.6f}')
            elif sessions == "coverage":
                name, model = rest
                place = ",".join(map(str, split_name(name))) if ", " in name else f"{name},,"
                measures = zip(("b", "w", "log-odds"), results[key], strict=True)
                lines += [f'{seed},{place},"{model}",coverage of {what},{value:.6f}' for what, value in measures]
    return "\n".join(lines) + "\n"


def _summary(all_differences: Sequence[Difference], regimes: Sequence[str]) -> list[str]:
    """Returns in how many comparisons the diffusion model is ahead and behind."""
    lines = ["| sessions | " + " | ".join(f"against {base}, {metric}" for base in BASES for metric in METRICS) + " |"]
    lines.append("|---|" + "---:|" * (len(BASES) * len(METRICS)))
    for regime in regimes:
        cells = []
        for base in BASES:
            for metric in METRICS:
                verdicts = [
                    one.verdict
                    for one in all_differences
                    if (split_name(one.task)[0], one.base, one.metric) == (regime, base, metric)
                ]
                cells.append(f"{verdicts.count('ahead')} / {verdicts.count('behind')} of {len(verdicts)}")
        lines.append(f"| {regime} | " + " | ".join(cells) + " |")
    return [
        "In how many comparisons the diffusion model (DSRM, mode `belief`) is ahead / behind, after Holm's correction:",
        "",
        *lines,
    ]


def _means(measurements: Measurements, regime: str, metric: str) -> list[str]:
    """Returns means over seeds and users of all models."""
    tasks = measurements.in_regime(regime)
    titles = [_title(task) for task in tasks]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(tasks)]
    for model in ROW_ORDER:
        tables = [measurements.table(task, model, metric) for task in tasks]
        if any(table is not None for table in tables):
            cells = ["" if table is None else f"{table.mean():.4f}" for table in tables]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _difference_table(differences: Sequence[Difference], family: Sequence[Difference]) -> list[str]:
    """Returns differences with intervals, adjusted p-values, and what could have been detected where nothing was."""
    remaining = sum(one.adjusted > SIGNIFICANCE for one in family)
    lines = [
        "| | " + " | ".join(f"{metric} | p, Holm | detectable | " for metric in METRICS) + "|",
        "|---|" + "---:|---:|---:|---|" * len(METRICS),
    ]
    for task in dict.fromkeys(one.task for one in differences):
        cells = []
        for metric in METRICS:
            (one,) = (each for each in differences if (each.task, each.metric) == (task, metric))
            detectable = "" if one.verdict else f"{one.estimate.detectable(SIGNIFICANCE / remaining):.2f}"
            interval = cell(interval_of(one.estimate), sign=True)
            cells += [interval, f"{one.adjusted:.4f}", detectable, one.verdict]
        lines.append(f"| {_title(task)} | {' | '.join(cells)} |")
    return lines


def _coverage_table(measurements: Measurements) -> list[str]:
    sessions = measurements.coverage_sessions
    titles = [name if ", " not in name else f"test world, {_title(name)}" for name in sessions]
    lines = [f"| b / w / log-odds | {' | '.join(titles)} |", "|---|" + "---:|" * len(sessions)]
    for model in (CLOSED, *MODELS):
        tables = [measurements.coverage(name, model) for name in sessions]
        cells = [" / ".join(f"{mean:.3f}" for mean in table.mean(axis=0)) for table in tables]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    if len(measurements.seeds) > 1:
        of_held_out = measurements.coverage(sessions[0], METHOD)
        intervals = ", ".join(cell(rate_interval(column[:, None]), decimals=3) for column in of_held_out.T)
        lines += ["", f"Diffusion, {sessions[0]}, with 95 % intervals over seeds: {intervals}."]
    return lines


def _title(task: str) -> str:
    _, policy, shows = split_name(task)
    return f"{policy}, {shows}" if shows else policy


def _notes(
    pair: WorldPair,
    measurements: Measurements,
    all_differences: Sequence[Difference],
    regimes: Sequence[str],
    command: str,
) -> list[str]:
    data, fixed = pair.test.data, measurements.fixed
    users = len(fixed[f"{measurements.tasks[0]}|users"])
    lines = []
    if FROZEN in regimes:
        lines += [
            f"- {users} users of the test world, one session each: slates of 10, nobody leaves. Columns: who chose the "
            f"slates, and shows so far. What is predicted are {CANDIDATES} random candidates of each session; log "
            "loss and AUC are expectations under the world's own probabilities.",
            f"- *{FROZEN}*: what all users share is at its prior, own scales are those of the training. *{SERVED}*: "
            f"BeliefQuota has served {SERVED_SESSIONS:,} sessions of other users of the test world, and own scales are "
            "those that it re-estimated. Nothing that was served depends on the models compared.",
            f"- *{NONE}*: click scorer and shared part, with the prior's spread. *{WIDE}*: where BeliefQuota starts.",
        ]
    if REAL in regimes:
        counts = ", ".join(
            f"{len(fixed[f'{task}|users']):,} users and {fixed[f'{task}|rows'].sum():,} rows from row {shows}"
            for task in measurements.in_regime(REAL)
            for shows in [split_name(task)[2]]
        )
        lines += [
            f"- Real random rows: after so many of a user's own random rows the next are predicted, up to the next of "
            f"{', '.join(map(str, STAGES[1:]))}: {counts}. No response model stands in between; the prior is the click "
            f"scorer. *{SHARED}*: what all users share is learned from everybody's first {FIRST_ROWS} rows, and own "
            "scales are re-estimated from the same. Users count by their rows.",
        ]
        if FROZEN not in regimes:
            lines.append(
                f"- Users: those with at least 16 random rows among {FURTHER_USERS:,} who are not held out, chosen by "
                "a hash of their ids. Nothing was chosen by these rows."
            )
    fitted = [seed for seed, results in measurements.seeds.items() if any("|mixture|" in key for key in results)]
    mixtures = "" if len(fitted) == len(measurements.seeds) else f" (mixture: {', '.join(map(str, fitted))})"
    return [
        *lines,
        "- Predictive probabilities: MacKay's formula on mean and variance of the log-odds; correlations are those of "
        "the closed form, spreads those of each model.",
        f"- Training seeds of the models: {', '.join(map(str, measurements.seeds))}{mixtures}. Models of a seed learn "
        "from the same sessions. Intervals and p-values: seeds and users crossed (Student), users paired.",
        f"- p, Holm: adjusted for the {len(all_differences)} comparisons of this page. Detectable: the true difference "
        "that would have been shown with probability .8, given the spread of these runs.",
        *(
            [
                "- Coverage: 80 % intervals from 64 draws. Held-out users: sessions drawn as in training, of users "
                "kept out of it, where truth is known by construction. Test world: against the regression of the "
                f"world's log-odds beyond scorer and shared mean, {SERVED}, which holds what is wrong with both.",
            ]
            if FROZEN in regimes
            else []
        ),
        f"- Data: {data.provenance.name} ({data.provenance.origin}), hash {data.data_hash}; fingerprint of the test "
        f"world {pair.test.fingerprint}.",
        f"- Made by: {command}.",
    ]
