"""Finished runs with what each user did, grouped into what may be compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hrl_policies.study import labels as notes_of
from hrl_policies.study.config import RunConfig
from hrl_policies.study.statistics import Interval, bootstrap, ratio_interval
from hrl_policies.study.store import RunRecord, StoredRun
from hrl_policies.study.tables import variant_title
from hrl_policies.zoo import METHODS, method
from kuaifair_env.metrics import signed_gap

Values = NDArray[np.float64]

_RESAMPLES = 2_000


@dataclass(frozen=True)
class UserSums:
    """What each user did in all of their sessions: users are the units that were drawn at random.

    Attributes:
        user_ids: ``int64 (U,)``, increasing raw ids.
        sessions: ``(U,)`` number of sessions.
        steps: ``(U,)`` slates seen.
        reward: ``(U,)`` summed reward.
        popular: ``(U,)`` summed popular share of slates.
        violations: ``(U,)`` slates that the leave rule punished.
    """

    user_ids: NDArray[np.int64]
    sessions: Values
    steps: Values
    reward: Values
    popular: Values
    violations: Values

    @classmethod
    def of_sessions(cls, sessions: Sequence[Mapping[str, float]]) -> UserSums:
        """Adds up the records of sessions, as ``sessions.csv`` holds them."""
        table = {
            name: np.asarray([session[name] for session in sessions], np.float64)
            for name in ("user_id", "len", "r_cum", "popular_share", "violation_rate")
        }
        ids, rows = np.unique(table["user_id"].astype(np.int64), return_inverse=True)

        def added(values: Values) -> Values:
            return np.asarray(np.bincount(rows, weights=values, minlength=len(ids)), np.float64)

        steps = table["len"]
        return cls(
            user_ids=ids,
            sessions=added(np.ones_like(steps)),
            steps=added(steps),
            reward=added(table["r_cum"]),
            popular=added(table["popular_share"] * steps),
            violations=added(table["violation_rate"] * steps),
        )

    def per_session(self, figure: str) -> Values:
        """Returns each user's mean over sessions, ``(U,)``, of ``"len"`` or ``"r_cum"``.

        Raises:
            ValueError: If the figure is another.
        """
        sums = {"len": self.steps, "r_cum": self.reward}
        if figure not in sums:
            raise ValueError(f"users have a {' and a '.join(sums)} of their own, but no {figure!r}")
        return np.asarray(sums[figure] / self.sessions)

    def interval(self, figure: str, resamples: int = _RESAMPLES) -> Interval:
        """Returns a headline figure with its bootstrap interval over users.

        Args:
            figure: ``"len"``, ``"r_each"``, ``"r_cum"``, ``"ad"`` or ``"violation_rate"``.
            resamples: How many resamples.

        Raises:
            ValueError: If the figure is another, or there is one user only.
        """
        ratios = {
            "len": (self.steps, self.sessions),
            "r_each": (self.reward, self.steps),
            "r_cum": (self.reward, self.sessions),
            "violation_rate": (self.violations, self.steps),
        }
        if figure in ratios:
            return ratio_interval(*ratios[figure], resamples=resamples)
        if figure == "ad":
            return folded(bootstrap(_pooled_gap, self.popular, self.steps, resamples=resamples))
        raise ValueError(f"no interval over users is known for {figure!r}; choose {', '.join(ratios)} or ad")


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished run and what its users did.

    Attributes:
        run: The run folder.
        record: Its headline figures and provenance.
        users: What each user did.
    """

    run: StoredRun
    record: RunRecord
    users: UserSums

    @classmethod
    def of_run(cls, run: StoredRun) -> EvaluatedRun:
        """Reads a finished run.

        Raises:
            ArtifactError: If it was interrupted, or its files are damaged.
        """
        return cls(run, RunRecord.of_run(run), UserSums.of_sessions(run.sessions()))

    @property
    def seed(self) -> int:
        """Training seed."""
        return self.record.config.seed

    @property
    def initial_temper(self) -> float | None:
        """Temper at the start of a session where the leave rule has a length formula, else None."""
        if "len_floor" not in self.record.summary:
            return None
        session = self.record.config.session
        return float(session.describe()["leave"].get("initial_temper") or session.max_len)

    @property
    def task(self) -> Task:
        """World and horizon."""
        record = self.record
        return Task(record.config.world, record.config.session.max_len, record.data, record.origin)

    @property
    def variant(self) -> Variant:
        """Method and purifier."""
        config = self.record.config
        return Variant(config.method, self.record.purifier, config.variant)


@dataclass(frozen=True, order=True)
class Task:
    """What methods are compared on.

    Attributes:
        world: Environment id, or a study's own name.
        max_len: Horizon.
        data: Name of the data set.
        origin: What kind of data it is.
    """

    world: str
    max_len: int
    data: str
    origin: str

    @property
    def world_title(self) -> str:
        """How tables call the world."""
        return world_title(self.world, self.origin)


@dataclass(frozen=True)
class Variant:
    """A method on some states, under some settings.

    Attributes:
        method: Name in the zoo.
        purifier: Name of the purifier; empty without one.
        setting: What a study changed, such as ``"n_steps=2"``; empty for the zoo's settings.
    """

    method: str
    purifier: str
    setting: str = ""

    @property
    def title(self) -> str:
        """How tables and figures call it."""
        return variant_title(self.method, self.purifier, self.setting)

    @property
    def as_shipped(self) -> bool:
        """Whether states and settings are the method's own."""
        return self.purifier == method(self.method).purifier and not self.setting

    @property
    def place(self) -> tuple[int, str, str]:
        """Sorts variants in the order of the zoo."""
        return list(METHODS).index(self.method), self.purifier, self.setting


@dataclass(frozen=True)
class Comparison:
    """Runs under the same conditions, worlds and horizons apart: what stands in one table.

    Attributes:
        runs: All of them.
        by_cell: The same by task and variant, one for each seed, seeds increasing.
    """

    runs: tuple[EvaluatedRun, ...]
    by_cell: Mapping[tuple[Task, Variant], tuple[EvaluatedRun, ...]]

    @property
    def tasks(self) -> list[Task]:
        """Worlds and horizons, sorted."""
        return sorted({run.task for run in self.runs})

    @property
    def variants(self) -> list[Variant]:
        """Methods in the order of the zoo."""
        return sorted({run.variant for run in self.runs}, key=lambda one: one.place)

    @property
    def conditions(self) -> str:
        """How the runs differ from default sessions in default worlds, for titles; empty if not at all."""
        config = self.runs[0].record.config
        usual = _session(RunConfig("random", config.world))
        parts = [
            f"{name} {notes_of.leave_rule(value) if name == 'leave' else value}"
            for name, value in _session(config).items()
            if value != usual[name]
        ]
        parts += [
            f"{name} {value}" for name, value in sorted(config.world_settings.items()) if value != "auto"
        ]
        parts += [f"item term '{config.item_term}'"] if config.item_term else []
        return ", ".join(parts)

    def heading(self, max_len: int) -> str:
        """Returns the horizon, and below it what else is not as usual, for figures."""
        return "\n".join([f"Max Len {max_len}", *([self.conditions] if self.conditions else [])])

    @property
    def provenance(self) -> str:
        """Data behind each world, in one line."""
        lines = {run.task.world_title: notes_of.data(run.record) for run in self.runs}
        return " ".join(f"{world}: {line}" for world, line in sorted(lines.items()))

    def find(self, method_name: str) -> Variant:
        """Returns the variant of a method on its own states.

        Raises:
            ValueError: If it was not run.
        """
        for variant in self.variants:
            if variant.method == method_name and variant.as_shipped:
                return variant
        held = sorted({one.method for one in self.variants if one.as_shipped})
        raise ValueError(f"there is no run of {method_name!r} to compare with; there are {', '.join(held)}")


def world_title(world: str, origin: str) -> str:
    """Returns how tables and figures call a world: its id in short, with the kind of data behind it."""
    short = re.sub(r"^KuaiFair-|-v\d+$", "", world)
    return f"{short} ({origin})"


def folded(signed: Interval) -> Interval:
    """Returns the interval of a size, such as AD, from that of the signed quantity.

    Resampling the size itself would be biased near 0, where every resample lies on the same side.
    """
    ends = abs(signed.low), abs(signed.high)
    low = 0.0 if signed.low <= 0.0 <= signed.high else min(ends)
    return Interval(abs(signed.estimate), low, max(ends), signed.level)


def comparisons(runs: Sequence[StoredRun]) -> list[Comparison]:
    """Groups finished runs into what may stand in one table; interrupted runs are left out.

    Raises:
        ArtifactError: If the files of a run are damaged.
        ValueError: If no run is finished, or runs under one set of conditions cannot be compared: evaluated on other
            users or randomness, on other data under the same name, or twice with one seed.
    """
    evaluated = [EvaluatedRun.of_run(run) for run in runs if run.complete]
    if not evaluated:
        raise ValueError("there are no finished runs")
    groups: dict[str, list[EvaluatedRun]] = {}
    for one in evaluated:
        groups.setdefault(_conditions(one), []).append(one)
    return [_comparison(group) for group in groups.values()]


def _comparison(runs: Sequence[EvaluatedRun]) -> Comparison:
    cells: dict[tuple[Task, Variant], list[EvaluatedRun]] = {}
    for run in runs:
        cells.setdefault((run.task, run.variant), []).append(run)
    for (task, variant), found in cells.items():
        if len({run.seed for run in found}) != len(found):
            raise ValueError(
                f"{variant.title} was run more than once with the same seed in {task.world}, Max Len {task.max_len}, "
                f"under the same conditions: {', '.join(str(run.run.folder) for run in found)}"
            )
    for task in {run.task for run in runs}:
        _check_alike([run for run in runs if run.task == task])
    ordered = {cell: tuple(sorted(found, key=lambda one: one.seed)) for cell, found in cells.items()}
    return Comparison(tuple(runs), ordered)


def _check_alike(runs: Sequence[EvaluatedRun]) -> None:
    first = runs[0]
    for other in runs[1:]:
        config, reference = other.record.config, first.record.config
        for what, same in (
            ("data", other.record.data_hash == first.record.data_hash),
            ("response model", other.record.response == first.record.response),
            ("users", np.array_equal(other.users.user_ids, first.users.user_ids)),
            ("randomness", config.evaluation_seed == reference.evaluation_seed),
            ("sessions of each user", config.episodes_per_user == reference.episodes_per_user),
        ):
            if not same:
                raise ValueError(
                    f"{other.run.folder} and {first.run.folder} were evaluated on different {what}; "
                    "they do not belong into one table"
                )


def _conditions(run: EvaluatedRun) -> str:
    config = run.record.config
    return repr((config.item_term, sorted(_session(config).items()), sorted(config.world_settings.items())))


def _session(config: RunConfig) -> dict[str, Any]:
    """Returns what sessions were like, apart from the horizon and from how a method acts and observes."""
    session = config.session.describe()
    return {
        name: value
        for name, value in session.items()
        if name not in ("action_mode", "observation_mode", "max_len")
    }


def _pooled_gap(popular: Values, steps: Values) -> Values:
    return signed_gap(popular.sum(axis=-1) / steps.sum(axis=-1))
