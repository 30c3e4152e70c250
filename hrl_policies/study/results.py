"""Finished runs with what each user did, grouped into what may be compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study.labels import (
    RunRecord,
    Task,
    Variant,
    conditions,
    data_note,
    evaluation_note,
    session_conditions,
)
from hrl_policies.study.records import TRAIN_AGAIN
from hrl_policies.study.statistics import linearised_ratio
from hrl_policies.study.store import SESSION_TABLE, StoredRun
from kuaifair_env.abandonment import TemperFairness, leave_rule
from kuaifair_env.data.schema import IdArray
from kuaifair_env.files import whole
from kuaifair_env.fingerprint import WorldFingerprint
from kuaifair_env.intervals import Interval, crossed_mean, interval_of, rate_interval
from kuaifair_env.metrics import length_floor_and_ceiling, signed_gap

Values = NDArray[np.float64]

_ROUNDING = 1e-12


@dataclass(frozen=True)
class UserSums:
    """What each user did in all of their sessions: users are the units that were drawn at random.

    Attributes:
        user_ids: ``(U,)``, increasing raw ids.
        sessions: ``(U,)`` number of sessions; ``steps`` counts the slates seen.
        reward: ``(U,)`` summed reward.
        popular: ``(U,)`` summed popular share of slates.
        violations: ``(U,)`` slates that the leave rule punished.
    """

    user_ids: IdArray
    sessions: Values
    steps: Values
    reward: Values
    popular: Values
    violations: Values

    @classmethod
    def of_sessions(cls, sessions: Sequence[Mapping[str, Any]]) -> UserSums:
        """Adds up the records of sessions, as ``sessions.csv`` holds them."""
        table = {
            name: np.asarray([session[name] for session in sessions], np.float64)
            for name in ("len", "r_cum", "popular_share", "violation_rate")
        }
        ids, rows = np.unique([session["user_id"] for session in sessions], return_inverse=True)

        steps = table["len"]
        popular, violations = table["popular_share"] * steps, table["violation_rate"] * steps
        columns = (np.ones_like(steps), steps, table["r_cum"], popular, violations)
        return cls(ids, *(np.bincount(rows, column, len(ids)).astype(np.float64) for column in columns))

    def per_session(self, figure: str) -> Values:
        """Returns each user's mean over sessions, ``(U,)``, of ``"len"`` or ``"r_cum"``.

        Raises:
            ValueError: If the figure is another.
        """
        sums = {"len": self.steps, "r_cum": self.reward}
        if figure not in sums:
            raise ValueError(f"users have a {' and a '.join(sums)} of their own, but no {figure!r}")
        return np.asarray(sums[figure] / self.sessions)

    def values(self, figure: str) -> Values:
        """Returns one value for each user, ``(U,)``, whose mean is a headline figure (see ``linearised_ratio``).

        Args:
            figure: ``"len"``, ``"r_each"``, ``"r_cum"``, ``"violation_rate"`` or ``"ad"``.

        Raises:
            ValueError: If the figure is another.
        """
        if figure == "ad":
            gaps = signed_gap(linearised_ratio(self.popular, self.steps))
            return np.asarray(gaps * np.copysign(1.0, gaps.mean()))
        sums = {
            "len": (self.steps, self.sessions),
            "r_each": (self.reward, self.steps),
            "r_cum": (self.reward, self.sessions),
            "violation_rate": (self.violations, self.steps),
        }
        if figure not in sums:
            raise ValueError(f"no interval over users is known for {figure!r}; choose {', '.join(sums)} or ad")
        return linearised_ratio(*sums[figure])

    def is_rate(self, figure: str) -> bool:
        """Returns whether a figure cannot leave [0, 1]; R_each can where rewards are sums or watch ratios."""
        if figure == "r_each":
            return bool(((self.reward >= 0.0) & (self.reward <= self.steps)).all())
        return figure in ("violation_rate", "ad")


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run: its folder, its headline figures and provenance, and what each user did."""

    run: StoredRun
    record: RunRecord
    users: UserSums

    @classmethod
    def of_run(cls, run: StoredRun) -> EvaluatedRun:
        """Reads a finished run.

        Raises:
            ArtifactError: If it was interrupted, or its files are damaged.
        """
        record, sessions = RunRecord.of_run(run), run.sessions()
        played = record.users * record.config.episodes_per_user
        with whole(run.folder / SESSION_TABLE, "table of sessions", TRAIN_AGAIN):
            if len(sessions) != played:
                raise ValueError(f"it holds {len(sessions)} sessions, and {played} were played")
            return cls(run, record, UserSums.of_sessions(sessions))

    @property
    def seed(self) -> int:
        """Training seed."""
        return self.record.config.seed

    @property
    def summary(self) -> Mapping[str, float]:
        """Headline figures by name."""
        return self.record.summary

    @property
    def task(self) -> Task:
        """World and horizon."""
        return Task.of_record(self.record)

    @property
    def variant(self) -> Variant:
        """Method, purifier and setting."""
        return Variant.of_config(self.record.config)

    def length_bounds(self, reward: float) -> tuple[float, float]:
        """Returns floor and ceiling of Len at a mean reward, where the summary has them."""
        session = self.record.config.session
        slate_size, rule = session.items_per_slate, leave_rule(session.leave)
        assert isinstance(rule, TemperFairness)
        temper = float(rule.initial_temper or session.max_len)
        feedback = reward / slate_size if session.reward == "sum" else reward
        floor, ceiling = length_floor_and_ceiling(
            temper,
            min(max(feedback, 0.0), 2.0),
            penalty=rule.unfair_penalty,
            grace_steps=rule.grace_for(slate_size),
        )
        return min(float(floor), session.max_len), min(float(ceiling), session.max_len)


@dataclass(frozen=True)
class Comparison:
    """Runs under the same conditions, worlds, horizons and repeats apart: what stands in one table.

    ``by_cell`` has them by task and variant, one for each seed, seeds increasing.
    """

    runs: tuple[EvaluatedRun, ...]
    by_cell: Mapping[tuple[Task, Variant], tuple[EvaluatedRun, ...]]

    @property
    def tasks(self) -> list[Task]:
        """Worlds, horizons and repeats, sorted."""
        return sorted({run.task for run in self.runs})

    def tasks_at(self, max_len: int) -> list[Task]:
        """Returns the tasks at one horizon, sorted."""
        return [task for task in self.tasks if task.max_len == max_len]

    @property
    def variants(self) -> list[Variant]:
        """Methods in the order of the zoo."""
        return sorted({run.variant for run in self.runs}, key=lambda variant: variant.order)

    def cell(self, task: Task, variant: Variant) -> tuple[EvaluatedRun, ...]:
        """Returns the runs of a method on a task, one for each seed; none if it was not run there."""
        return self.by_cell.get((task, variant), ())

    @property
    def conditions(self) -> str:
        """How the runs differ from default sessions in default worlds, for titles; empty if not at all."""
        return conditions(self.runs[0].record.config)

    def titled(self, title: str) -> str:
        """Returns the title of a table with the conditions behind it."""
        return f"{title}, {self.conditions}" if self.conditions else title

    @property
    def provenance(self) -> str:
        """Data behind each world, in one line."""
        lines = {run.task.world_title: data_note(run.record) for run in self.runs}
        return " ".join(f"{world}: {line}" for world, line in sorted(lines.items()))

    def shipped(self, method_name: str) -> Variant | None:
        """Returns the variant of a method on its own states with its own settings, or None if it was not run."""
        return next((one for one in self.variants if one.method == method_name and one.as_shipped), None)

    def find(self, method_name: str) -> Variant:
        """Returns the variant of a method on its own states with its own settings.

        Raises:
            ValueError: If it was not run.
        """
        variant = self.shipped(method_name)
        if variant is None:
            names = sorted({one.method for one in self.variants if one.as_shipped})
            raise ValueError(f"there is no run of {method_name!r} to compare with; there are {', '.join(names)}")
        return variant


def figure_interval(runs: Sequence[EvaluatedRun], figure: str) -> Interval:
    """Returns the mean of a headline figure over training seeds and users, with its 95 % interval.

    The interval is for other seeds and other users, of one run for other users alone: Student's with the variance of
    :func:`kuaifair_env.intervals.crossed_mean`, and for rates :func:`rate_interval`, which stays inside [0, 1]. AD of
    one run has the interval that follows from that of the popular items' share of exposure.

    Args:
        runs: One method's, one for each seed, on the same users.
        figure: See :meth:`UserSums.values`.
    """
    table = np.stack([run.users.values(figure) for run in runs])
    if figure == "ad" and len(runs) == 1 and np.ptp(table) > _ROUNDING:
        shares = rate_interval(linearised_ratio(runs[0].users.popular, runs[0].users.steps)[None])
        estimate, low, high = signed_gap(np.asarray((shares.estimate, shares.low, shares.high))).tolist()
        return folded(Interval(estimate, low, high, shares.level))
    if all(run.users.is_rate(figure) for run in runs):
        return rate_interval(table)
    return interval_of(crossed_mean(table))


def folded(signed: Interval) -> Interval:
    """Returns the interval of a size, such as AD, from that of the signed quantity.

    An interval of the size itself would be biased near 0, where every user pulls it to the same side.
    """
    ends = abs(signed.low), abs(signed.high)
    low = 0.0 if signed.low <= 0.0 <= signed.high else min(ends)
    return Interval(abs(signed.estimate), low, max(ends), signed.level)


def comparisons(runs: Sequence[StoredRun]) -> list[Comparison]:
    """Groups finished runs into what may stand in one table; interrupted runs are left out.

    Raises:
        ArtifactError: If the files of a run are damaged.
        ValueError: If no run is finished, or runs under one set of conditions cannot be compared: evaluated on other
            users or randomness, in worlds of one name and other fingerprints, or twice with one seed.
    """
    evaluated = [EvaluatedRun.of_run(run) for run in runs if run.complete]
    if not evaluated:
        raise ValueError("there are no finished runs")
    groups: defaultdict[str, list[EvaluatedRun]] = defaultdict(list)
    for run in evaluated:
        config = run.record.config
        session, settings = session_conditions(config.session), sorted(config.world_settings.items())
        groups[repr((config.item_term, sorted(session.items()), settings))].append(run)
    return [_comparison(group) for group in groups.values()]


def world_notes(runs: Sequence[EvaluatedRun]) -> list[str]:
    """Returns what the data of each world are and how runs in it were evaluated, each line once."""
    several = len({run.task.world for run in runs}) > 1
    return list(
        dict.fromkeys(
            (f"{run.task.world_title}: " if several else "") + note(run.record)
            for run in runs
            for note in (data_note, evaluation_note)
        )
    )


def _comparison(runs: Sequence[EvaluatedRun]) -> Comparison:
    cells: defaultdict[tuple[Task, Variant], list[EvaluatedRun]] = defaultdict(list)
    for run in runs:
        cells[run.task, run.variant].append(run)
    for (task, variant), group in cells.items():
        if len({run.seed for run in group}) != len(group):
            raise ValueError(
                f"{variant.title} was run more than once with the same seed in {task.world}, {task.session_title}, "
                f"under the same conditions: {', '.join(str(run.run.folder) for run in group)}"
            )
    for task in {run.task for run in runs}:
        _check_alike([run for run in runs if run.task == task])
    ordered = {cell: tuple(sorted(group, key=lambda run: run.seed)) for cell, group in cells.items()}
    return Comparison(tuple(runs), ordered)


def _check_alike(runs: Sequence[EvaluatedRun]) -> None:
    """Checks that runs on one task met the same users in the same world with the same random numbers."""
    first = runs[0]
    for other in runs[1:]:
        for split in ("test", "train"):
            now, before = (
                WorldFingerprint.of_description(run.run.provenance[split]["fingerprint"]) for run in (other, first)
            )
            differences = now.differences(before)
            if differences:
                raise ValueError(
                    f"{other.run.folder} and {first.run.folder} were made in different {split} worlds of "
                    f"{first.task.world}, fingerprints {now} and {before}: {', '.join(differences)} differ; they "
                    "cannot be compared"
                )
        config, reference = other.record.config, first.record.config
        for what, same in (
            ("users", np.array_equal(other.users.user_ids, first.users.user_ids)),
            ("randomness", config.evaluation_seed == reference.evaluation_seed),
            ("sessions of each user", config.episodes_per_user == reference.episodes_per_user),
        ):
            if not same:
                raise ValueError(
                    f"{other.run.folder} and {first.run.folder} were evaluated on different {what}; "
                    "they do not belong into one table"
                )
