"""Results submitted to the leaderboard: made from run folders or a service, read and checked without them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from hrl_policies.study.labels import Variant, conditions, unusual_session
from hrl_policies.study.records import read_json, write_json
from hrl_policies.study.results import EvaluatedRun, comparisons
from hrl_policies.study.serving import SUMMARY
from hrl_policies.study.statistics import student_interval
from hrl_policies.study.store import SESSION_TABLE, stored_runs
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import Origin
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import file_hash, parse_as, whole
from kuaifair_env.intervals import Interval, rate_interval
from kuaifair_env.serving_results import ServingResult
from kuaifair_env.simulator import Repeats

Figure = Literal["r_cum", "len", "violation_rate"]

Line = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")]
Hash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
_LINK = r"^(https://[a-zA-Z0-9.~:/?#@!$&*+,;=%_-]+)?$"
Link = Annotated[str, StringConstraints(max_length=300, pattern=_LINK)]
Reward = Annotated[float, Field(allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]


class SubmittedResult(BaseModel):
    """One method in one world under one protocol, with a figure for each training seed or order of the users.

    Attributes:
        title: Name of the method in tables.
        world: Environment id, or the name that a study gave to worlds of its own; of a service that of its data.
        data: Name of the data set; ``origin`` says whether it is real, partial, a twin or the author's own.
        fingerprint: That of the test world.
        protocol: ``frozen`` agents learn nothing while they are evaluated, ``serving`` ones may.
        conditions: How sessions and worlds differ from default ones; empty if not at all.
        users: Users evaluated on, or served.
        sessions: Sessions of each seed or order.
        evaluation_hash: Of those users and of the sessions' random numbers: the same for results that may be compared.
        steps: Training steps.
        seeds: Training seeds, one for each figure; a service of a control has None.
        orders: Orders of the users, one for each figure of a service; empty for a study.
        versions: Of Python, platform and packages.
        config_hash: Of the configuration without its seed.
        files_hash: Of the result files, seed by seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: Line
    world: Line
    data: Line
    origin: Origin
    data_hash: Line
    fingerprint: Line
    protocol: Literal["frozen", "serving"]
    max_len: Annotated[int, Field(ge=1)]
    repeats: Repeats
    conditions: Line
    users: Annotated[int, Field(ge=1)]
    sessions: Annotated[int, Field(ge=1)]
    evaluation_hash: Hash
    steps: Annotated[int, Field(ge=0)]
    seeds: Annotated[list[int | None], Field(min_length=1)]
    orders: list[int]
    r_cum: list[Reward]
    len: list[Annotated[Reward, Field(ge=0.0)]]
    violation_rate: list[Rate]
    versions: dict[Line, Line]
    config_hash: Hash
    files_hash: Hash

    @model_validator(mode="after")
    def _one_figure_for_each_seed(self) -> SubmittedResult:
        sizes = {len(self.seeds), *(len(self.figures(name)) for name in ("r_cum", "len", "violation_rate"))}
        orders = self.orders or [0] * len(self.seeds)
        if len(sizes | {len(orders)}) > 1 or len(set(zip(self.seeds, orders, strict=True))) < len(self.seeds):
            raise ValueError(f"{self.title}: give one figure for each seed or order, and none of them twice")
        if self.protocol == "serving" and not self.orders:
            raise ValueError(f"{self.title}: a service has an order of the users for each figure")
        return self

    def figures(self, name: Figure) -> list[float]:
        """Returns a figure of every seed or order."""
        return {"r_cum": self.r_cum, "len": self.len, "violation_rate": self.violation_rate}[name]

    def interval(self, name: Figure) -> Interval | None:
        """Returns the mean over seeds or orders with its 95 % interval; None with one, or where all agree."""
        figures = np.asarray(self.figures(name))
        if len(figures) < 2 or np.ptp(figures) < 1e-9:
            return None
        return rate_interval(figures[:, None]) if name == "violation_rate" else student_interval(figures)


class Submission(BaseModel):
    """A file of the leaderboard: results of one or more methods of a study, or of one service.

    Attributes:
        methods: The methods' names in the zoo, or under which their authors registered them.
        link: Where code and study are; empty if they are nowhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    methods: Annotated[list[Line], Field(min_length=1)]
    link: Link = ""
    results: Annotated[list[SubmittedResult], Field(min_length=1)]


def submission_of(store: str | Path, methods: Sequence[str], link: str = "") -> Submission:
    """Returns the submission of some methods of a study, or of what ``kuaifair serve`` wrote.

    Args:
        store: Folder of run folders, or of a service.
        methods: Names of the methods to submit; a service is of one.
        link: Where code and study are, an https address.

    Raises:
        ArtifactError: If a file is missing or damaged.
        ValueError: If a method was not run, its runs do not belong into one result, or the link is none.
    """
    if not re.fullmatch(_LINK, link):
        raise ValueError(f"a link is an https address without spaces, quotes or brackets, got {link!r}")
    folder = Path(store)
    results = [_of_service(folder)] if (folder / SUMMARY).exists() else _of_study(folder, methods)
    return Submission(methods=list(methods), link=link, results=results)


def write_submission(path: str | Path, submission: Submission) -> None:
    """Writes a submission as JSON."""
    write_json(Path(path), submission.model_dump())


def read_submission(path: str | Path) -> Submission:
    """Reads a submission.

    Raises:
        ArtifactError: If the file is missing, or no submission of this format.
    """
    source = Path(path)
    with whole(source, "submission", "write it with `kuaifair study submit`"):
        return parse_as(Submission, json.loads(source.read_text(encoding="utf-8")))


def check_submission(submission: Submission, store: str | Path) -> None:
    """Checks that a submission is what a study or a service holds.

    Raises:
        ArtifactError: If it is not; the message says where they differ.
    """
    again = submission_of(store, submission.methods, submission.link)
    stored, submitted = (
        {(result.title, result.world, result.max_len, result.repeats, result.conditions): result for result in each}
        for each in (again.results, submission.results)
    )
    for key in dict.fromkeys([*submitted, *stored]):
        name = ", ".join(str(part) for part in key if part != "")
        if key not in stored or key not in submitted:
            raise ArtifactError(f"{name}: {'not in ' + str(store) if key in submitted else 'not submitted'}")
        here, there = stored[key].model_dump(), submitted[key].model_dump()
        differ = [part for part in here if here[part] != there[part]]
        if differ:
            raise ArtifactError(f"{name}: {', '.join(differ)} differ from what {store} holds")


def _of_study(folder: Path, methods: Sequence[str]) -> list[SubmittedResult]:
    runs = stored_runs(folder)
    unknown = set(methods) - {run.config.method for run in runs}
    if unknown:
        known = ", ".join(sorted({run.config.method for run in runs})) or "none"
        raise ValueError(f"{folder} holds no finished runs of {', '.join(sorted(unknown))}; its methods: {known}")
    chosen = [run for run in runs if run.config.method in methods]
    return [
        _of_runs(comparison.by_cell[cell])
        for comparison in comparisons(chosen)
        for cell in sorted(comparison.by_cell, key=lambda cell: (cell[0], cell[1].order))
    ]


def _of_runs(runs: Sequence[EvaluatedRun]) -> SubmittedResult:
    first = runs[0]
    record, config = first.record, first.record.config
    configs = [{name: value for name, value in run.run.config.as_dict().items() if name != "seed"} for run in runs]
    for other, content in zip(runs[1:], configs[1:], strict=True):
        if content != configs[0] or other.run.versions != first.run.versions:
            raise ValueError(
                f"{other.run.folder} and {first.run.folder} differ in more than their seed, or were made with other "
                "versions; they are not one result"
            )
    return SubmittedResult(
        title=Variant.of_config(config).title,
        world=config.world,
        data=record.data,
        origin=record.origin,  # type: ignore[arg-type]
        data_hash=record.data_hash,
        fingerprint=str(record.fingerprint),
        protocol="frozen",
        max_len=config.session.max_len,
        repeats=config.session.repeats,
        conditions=conditions(config),
        users=record.users,
        sessions=record.users * config.episodes_per_user,
        evaluation_hash=_hash([first.users.user_ids.tolist(), config.episodes_per_user, config.evaluation_seed]),
        steps=config.total_steps,
        seeds=[run.seed for run in runs],
        orders=[],
        r_cum=[run.summary["r_cum"] for run in runs],
        len=[run.summary["len"] for run in runs],
        violation_rate=[run.summary["violation_rate"] for run in runs],
        versions=_flat(first.run.versions),
        config_hash=_hash(configs[0]),
        files_hash=_hash_of([run.run.folder / name for run in runs for name in ("result.json", SESSION_TABLE)]),
    )


def _of_service(folder: Path) -> SubmittedResult:
    described = read_json(folder / SUMMARY)
    files = sorted(folder.glob("**/order-*/result.json"))
    results = [ServingResult.load(file.parent) for file in files]
    if not results:
        raise ArtifactError(f"{folder} holds no service in an order of the users; serve again")
    settings, served = results[0].settings, results[0].served
    learning = "" if settings.learning == "frozen" else f", learning: {settings.learning}"
    data, config, summaries = served.world["data"], served.config, [result.summary() for result in results]
    return SubmittedResult(
        title=described["agent"]
        if settings.learning == "frozen"
        else f"{described['agent']}, learning: {settings.learning}",
        world=data["name"],
        data=data["name"],
        origin=data["origin"],
        data_hash=data["hash"],
        fingerprint=served.world["fingerprint"]["id"],
        protocol="serving" if learning else "frozen",
        max_len=config["max_len"],
        repeats=config["repeats"],
        conditions=", ".join(f"{name} {value}" for name, value in unusual_session(SessionConfig(**config)).items()),
        users=settings.users,
        sessions=settings.sessions,
        evaluation_hash=_hash([settings.users_hash, settings.seed, settings.n_envs]),
        steps=0,
        seeds=[result.settings.agent_seed for result in results],
        orders=[result.settings.order for result in results],
        r_cum=[summary["r_cum"] for summary in summaries],
        len=[summary["len"] for summary in summaries],
        violation_rate=[summary["violation_rate"] for summary in summaries],
        versions=_flat(described["versions"]),
        config_hash=_hash([config, settings.agent, settings.learning]),
        files_hash=_hash_of(files),
    )


def _flat(versions: dict[str, Any]) -> dict[str, str]:
    packages = {name: version or "not installed" for name, version in versions["packages"].items()}
    return {"python": versions["python"], "platform": versions["platform"], **packages}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _hash_of(files: Sequence[Path]) -> str:
    return _hash([file_hash(file) for file in files])
