"""What a service gave: sessions in the order of starting, curves over them, and several services taken together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kuaifair_env.batch import EpisodeRecords
from kuaifair_env.checkpoints import check_identity
from kuaifair_env.errors import ArtifactError
from kuaifair_env.evaluation import EvaluationResult
from kuaifair_env.files import (
    atomic_path,
    file_hash,
    fits_checksum,
    parse_as,
    whole,
    with_checksum,
    write_text_atomically,
)
from kuaifair_env.intervals import Interval, crossed_mean, interval_of, rate_interval
from kuaifair_env.metrics import Engagement, FairnessReport, engagement

Learning = Literal["posterior", "gradient", "gradient and posterior", "frozen"]
"""How an agent learns while it serves: a posterior (its own, or the belief of a wrapper), gradient steps of its
algorithm, both, or not at all."""

FIRST_AND_LAST = 1_000
_CURVE_POINTS, _MIN_PART = 40, 50
_FORMAT, _VERSION = "kuaifair-serving", 2
_RESULT, _SESSIONS = "result.json", "sessions.npz"
_RATES = ("ad", "violation_rate")
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ServingSettings:
    """What a service was.

    Attributes:
        world: Fingerprint of the world.
        config: How sessions ran, JSON-able.
        agent: Name of the agent's class, or of the function.
        agent_seed: The agent's own seed, where it has one.
        agent_hash: Hash of the networks with which it began.
        learning: How it learned.
        reason: Why it learned nothing; empty where it did.
        users: Number of users to serve.
        users_hash: Hash of their ids.
        sessions: Number of sessions that were counted.
        order: Which order the users came in.
        seed: Seed of the sessions' randomness.
        n_envs: Concurrent sessions.
    """

    world: str
    config: dict[str, Any]
    agent: str
    agent_seed: int | None
    agent_hash: str
    learning: Learning
    reason: str
    users: int
    users_hash: str
    sessions: int
    order: int
    seed: int
    n_envs: int


@dataclass(frozen=True, repr=False)
class ServingResult:
    """What an agent did while it served.

    Attributes:
        settings: What the service was.
        served: The counted sessions, in the order in which they started, with figures over all and provenance.
        before: The agent evaluated on other users before it served; None where it learns nothing or nobody is left.
        after: The same afterwards.
    """

    settings: ServingSettings
    served: EvaluationResult
    before: EvaluationResult | None
    after: EvaluationResult | None

    def __repr__(self) -> str:
        return f"ServingResult(\n  {self._provenance()}\n  served: {self.served!r})"

    def __len__(self) -> int:
        return len(self.served.sessions)

    def first(self, sessions: int = FIRST_AND_LAST) -> dict[str, float]:
        """Returns the figures of the sessions that started first (of all, if there are fewer)."""
        return session_figures(self.served.sessions.take(np.arange(min(sessions, len(self)))))

    def last(self, sessions: int = FIRST_AND_LAST) -> dict[str, float]:
        """Returns the figures of the sessions that started last (of all, if there are fewer)."""
        return session_figures(self.served.sessions.take(np.arange(max(len(self) - sessions, 0), len(self))))

    def curve(self, points: int | None = None) -> dict[str, NDArray[np.float64]]:
        """Returns figures over sessions served, column by column.

        Args:
            points: Into how many parts of equal size the sessions are divided, at most one for each session; None takes
                40, or fewer, so that each has 50 sessions.

        Returns:
            ``sessions``, the number of the last session of each part, and every figure of :func:`session_figures` over
            the part; ``float64 (points,)`` each.
        """
        count = min(_CURVE_POINTS, max(len(self) // _MIN_PART, 1)) if points is None else min(points, len(self))
        parts = np.array_split(np.arange(len(self)), count)
        rows = [session_figures(self.served.sessions.take(part)) for part in parts]
        columns = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
        return {"sessions": np.asarray([part[-1] + 1.0 for part in parts]), **columns}

    def summary(self) -> dict[str, float]:
        """Returns figures by name: over all sessions, the first and last 1,000, and the users evaluated besides."""
        parts = {"": session_figures(self.served.sessions), "first_": self.first(), "last_": self.last()}
        for name, evaluation in (("before_", self.before), ("after_", self.after)):
            if evaluation is not None:
                parts[name] = session_figures(evaluation.sessions)
        return {prefix + name: value for prefix, figures in parts.items() for name, value in figures.items()}

    def table(self) -> str:
        """Returns provenance and figures as text, the figures aligned."""
        return f"{self._provenance()}\n{figures_table(self.summary())}"

    def save(self, folder: str | Path) -> None:
        """Writes ``sessions.npz``, the records of all sessions, and then ``result.json``, all else."""
        arrays: dict[str, Any] = {}
        described: dict[str, Any] = {}
        for name, evaluation in (("served", self.served), ("before", self.before), ("after", self.after)):
            if evaluation is not None:
                arrays |= {f"{name}.{column}": array for column, array in evaluation.sessions.as_dict().items()}
                described[name] = _description(evaluation)
        path = Path(folder)
        with atomic_path(path / _SESSIONS) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **arrays)
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": asdict(self.settings),
            "summary": self.summary(),
            "evaluations": described,
            "sessions": file_hash(path / _SESSIONS),
        }
        write_text_atomically(path / _RESULT, json.dumps(with_checksum(content), indent=1))

    @classmethod
    def load(cls, folder: str | Path) -> ServingResult:
        """Reads what :meth:`save` wrote.

        Raises:
            ArtifactError: If it is missing or damaged, or of another version.
        """
        path = Path(folder)
        with whole(path, "result of a service", "remove it and serve again"):
            content = json.loads((path / _RESULT).read_text(encoding="utf-8"))
            if (content["format"], content["version"]) != (_FORMAT, _VERSION):
                raise ArtifactError(f"{path / _RESULT} is no result that this version reads; serve again")
            if not fits_checksum(content):
                raise ArtifactError(f"{path / _RESULT} was altered after it was written; serve again")
            if file_hash(path / _SESSIONS) != content["sessions"]:
                raise ArtifactError(f"{path / _SESSIONS} was altered after it was written; serve again")
            with np.load(path / _SESSIONS, allow_pickle=False) as stored:
                arrays = dict(stored)
            evaluations = {
                name: _evaluation(described, _records(arrays, f"{name}."))
                for name, described in content["evaluations"].items()
            }
            settings = parse_as(ServingSettings, content["settings"])
            result = cls(settings, evaluations["served"], evaluations.get("before"), evaluations.get("after"))
            result.summary()  # columns that do not fit each other have no figures
            return result

    def _provenance(self) -> str:
        settings = self.settings
        reason = f" ({settings.reason})" if settings.reason else ""
        seed = "" if settings.agent_seed is None else f", seed {settings.agent_seed}"
        return (
            f"{settings.agent}{seed}: {settings.learning}{reason}; {len(self)} sessions of {settings.users} users in "
            f"order {settings.order}, {settings.n_envs} at a time"
        )


def stored_result(folder: str | Path, settings: ServingSettings) -> ServingResult | None:
    """Returns the result that a service has left in a folder, or None if it is not finished.

    Raises:
        ArtifactError: If it is another service's, or damaged.
    """
    if not (Path(folder) / _RESULT).exists():
        return None
    result = ServingResult.load(folder)
    check_identity(Path(folder) / _RESULT, asdict(result.settings), json.loads(json.dumps(asdict(settings))))
    return result


def _description(evaluation: EvaluationResult) -> dict[str, Any]:
    """Returns an evaluation without its sessions, JSON-able."""
    names = [field.name for field in fields(evaluation) if field.name != "sessions"]
    return {name: _plain(getattr(evaluation, name)) for name in names}


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _evaluation(described: dict[str, Any], sessions: EpisodeRecords) -> EvaluationResult:
    bounds = described["length_range"]
    return EvaluationResult(
        **described
        | {
            "sessions": sessions,
            "engagement": Engagement(**described["engagement"]),
            "fairness": FairnessReport(**described["fairness"]),
            "length_range": None if bounds is None else tuple(bounds),
        }
    )


def _records(arrays: dict[str, NDArray[Any]], prefix: str) -> EpisodeRecords:
    return EpisodeRecords(
        **{name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    )


@dataclass(frozen=True)
class ServingSummary:
    """Several services of one method in one world, over orders of the users and seeds of the agent.

    Attributes:
        means: Mean of every figure of :meth:`ServingResult.summary`.
        intervals: Their 95 % intervals, those of AD and violation rate inside [0, 1]; a figure that is the
            same in all services has none.
        runs: Number of services.
        orders: Number of different orders.
        seeds: Number of different seeds of the agent.
    """

    means: Mapping[str, float]
    intervals: Mapping[str, Interval]
    runs: int
    orders: int
    seeds: int

    @classmethod
    def of(cls, results: Sequence[ServingResult]) -> ServingSummary:
        """Returns the summary of services of one method, each in another order or with another seed of the agent.

        The interval is Student's for other orders, and other seeds where these vary. Where every seed served in every
        order, it is that of :func:`kuaifair_env.intervals.crossed_mean`; where each order has seeds of its own, or each
        seed orders, that over the means of the orders, or of the seeds. It assumes that orders (and seeds) are drawn
        independently and that their means are about normal. World, users and the random numbers of sessions are the
        same in all runs, so it says nothing of other users or other worlds.

        Raises:
            ValueError: If there are no services, two that cannot be compared, or seeds and orders that are neither
                crossed nor nested.
        """
        if not results:
            raise ValueError("there are no services to sum up")
        keys = [(result.settings.order, result.settings.agent_seed) for result in results]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two services have the same order and seed; got {sorted(keys, key=str)}")
        _check_alike(results)
        rows = [result.summary() for result in results]
        names = [name for name in rows[0] if all(name in row for row in rows)]
        orders, seeds = ([key[part] for key in keys] for part in (0, 1))
        tables = {name: _units(np.asarray([row[name] for row in rows]), seeds, orders) for name in names}
        return cls(
            means={name: float(table.mean()) for name, table in tables.items()},
            intervals={name: _interval(name, table) for name, table in tables.items() if np.ptp(table) > _ROUNDING},
            runs=len(results),
            orders=len(set(orders)),
            seeds=len(set(seeds)),
        )

    def table(self) -> str:
        """Returns the figures with their intervals as text."""
        return (
            f"{self.runs} services: {self.orders} orders, {self.seeds} seeds; 95 % intervals\n"
            f"{figures_table(self.means, self.intervals)}"
        )


def session_figures(sessions: EpisodeRecords) -> dict[str, float]:
    """Returns R_cum, Len, R_each, AD and violation rate of sessions, all slates weighted alike in the last two."""
    steps = sessions.length
    gap = 2.0 * float((sessions.popular_share * steps).sum() / steps.sum()) - 1.0
    measured = engagement(steps, sessions.return_)
    return {
        "r_cum": measured.cumulative_reward,
        "len": measured.length,
        "r_each": measured.reward_per_step,
        "ad": abs(gap),
        "violation_rate": float((sessions.violation_rate * steps).sum() / steps.sum()),
    }


def figures_table(figures: Mapping[str, float], intervals: Mapping[str, Interval] | None = None) -> str:
    """Returns figures as aligned lines of text, with their intervals where these are known."""
    width = max(map(len, figures))
    ends = {name: f"  [{interval.low:.4f}, {interval.high:.4f}]" for name, interval in (intervals or {}).items()}
    return "\n".join(f"{name:<{width}}  {value:>12.4f}{ends.get(name, '')}" for name, value in figures.items())


def _check_alike(results: Sequence[ServingResult]) -> None:
    first = asdict(results[0].settings)
    for result in results[1:]:
        for name, value in asdict(result.settings).items():
            if name not in ("order", "agent_seed", "agent_hash") and value != first[name]:
                raise ValueError(
                    f"services that differ in {name} cannot be taken together: {first[name]!r} and {value!r}"
                )


def _interval(name: str, table: NDArray[np.float64]) -> Interval:
    """Returns the 95 % interval of a mean of services: Wilson's of a rate, Student's of anything else."""
    return rate_interval(table) if name.endswith(_RATES) else interval_of(crossed_mean(table))


def _units(values: NDArray[np.float64], seeds: Sequence[Any], orders: Sequence[Any]) -> NDArray[np.float64]:
    """Returns a table of services by seed and order, or one row of what is independent where these are not crossed.

    Orders of which each has seeds of its own are independent by their means, and so are seeds with orders of their own.

    Raises:
        ValueError: If some seeds share an order and others do not.
    """
    first_seeds, first_orders = list(dict.fromkeys(seeds)), list(dict.fromkeys(orders))
    if len(values) == len(first_seeds) * len(first_orders):
        by_key = dict(zip(zip(seeds, orders, strict=True), values, strict=True))
        return np.asarray([[by_key[seed, order] for order in first_orders] for seed in first_seeds])
    for inner, outer, levels in ((seeds, orders, first_orders), (orders, seeds, first_seeds)):
        if len(set(inner)) == len(values) and len(levels) > 1:
            return np.asarray([[values[[key == level for key in outer]].mean() for level in levels]])
    raise ValueError(
        f"{len(values)} services of {len(first_seeds)} seeds in {len(first_orders)} orders: either serve every seed in "
        "every order, or give each service an order, or a seed, of its own"
    )
