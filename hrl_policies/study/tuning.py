"""Tuning: the same number of trials and the same criterion for every method, without the test world.

The criterion is R_cum of validation users: a fifth of the users of the training world, chosen by a hash of their ids,
who are kept out of training and then meet the agent in the training world. Neither the test world's response nor its
users are ever made. The first trial is that of the settings which the method has; the rest are proposed by Optuna's
TPE sampler. All trials train for the same steps with the same seeds, and none is cut short.

A folder holds ``trials.jsonl`` (Optuna's journal, with which the same call goes on), ``trials.csv`` and ``best.yml``,
the best settings in the zoo's form; for methods that learn on purified states also the purifier, pretrained without the
validation users.

The best of many noisy scores is too high, and trials are often shorter than training. So :func:`confirm` trains the
settings of the best trial and those that the search started from again, as long as the method trains and with seeds
that no trial had, on the same validation users. What wins on average is written to ``confirmed.yml``. Numbers found on
a scale are rounded to two digits first, for a search does not know more.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from tqdm import tqdm

from hrl_policies.study.config import PurifierIdentity, plan_run
from hrl_policies.study.records import write_table
from hrl_policies.study.runner import train
from hrl_policies.study.trials import Proposal, TrialJournal, TrialRecord
from hrl_policies.worlds import WorldPair, cached_purifier
from hrl_policies.zoo import MethodSettings, learners, load_settings, method, overridden
from hrl_policies.zoo.settings import Interval, setting
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError, TrainingError
from kuaifair_env.files import (
    LOCK,
    fits_checksum,
    locked_folder,
    parse_as,
    whole,
    with_checksum,
    write_text_atomically,
)
from kuaifair_env.splits import evaluation_users
from kuaifair_env.world import World

JOURNAL, TRIALS, BEST = "trials.jsonl", "trials.csv", "best.yml"
CONFIRMATION, CONFIRMED = "confirmation.csv", "confirmed.yml"
CRITERION = "r_cum"
Side = Literal["start", "found"]

_VALIDATION_SHARE = 5
_MIN_USERS = 10


@dataclass(frozen=True)
class TuningPlan:
    """What determines the trials of a search.

    Attributes:
        method: Name in the zoo.
        world: Environment id, or how a study calls a world of its own.
        seed: Seed of the sampler, and the first training seed; studies use others.
        runs: Training seeds of each trial, ``seed, seed + 1, ...``; its score is their mean.
        total_steps: Training steps of each; None takes the method's own.
        session: How sessions run.
        world_settings: What else the world was made with.
        n_users: Most validation users to evaluate on.
        episodes_per_user: Sessions of each.
    """

    method: str
    world: str
    seed: int = 0
    runs: int = 1
    total_steps: int | None = None
    session: SessionConfig = field(default_factory=SessionConfig)
    world_settings: Mapping[str, Any] = field(default_factory=dict)
    n_users: int = 500
    episodes_per_user: int = 10

    def __post_init__(self) -> None:
        if not method(self.method).learns:
            raise ValueError(f"{self.method} is a control and has nothing to tune; there are {tunable()}")
        if not load_settings(self.method).search:
            raise ValueError(
                f"the settings of {self.method} say nothing about where to search; there are {tunable()}. "
                f"Add a search section to its settings (hrl_policies.zoo.settings says how)"
            )
        if self.seed < 0 or self.runs < 1:
            raise ValueError(f"seed is not negative and runs at least 1, got {self.seed} and {self.runs}")

    @cached_property
    def settings(self) -> MethodSettings:
        """The settings that the search starts from."""
        return load_settings(self.method, self.world)


@dataclass(frozen=True)
class TuningResult:
    """What a search gave: its trials (the first is that of the shipped settings), and the folder where they are kept.

    ``validation_users`` is the number of users that each trial was evaluated on.
    """

    plan: TuningPlan
    trials: list[TrialRecord]
    folder: Path
    validation_users: int

    @property
    def best(self) -> TrialRecord:
        """The trial of the highest score, the earliest of equals."""
        scored = [(trial.score, -trial.number, trial) for trial in self.trials if trial.score is not None]
        return max(scored, key=lambda entry: entry[:2])[2]

    @property
    def best_settings(self) -> MethodSettings:
        """The settings of the best trial, with the steps that it trained for."""
        settings = self.plan.settings
        return replace(
            settings,
            total_steps=self.plan.total_steps or settings.total_steps,
            hyperparameters=overridden(settings.hyperparameters, self.best.values),
        )


def tunable() -> list[str]:
    """Returns the names of the methods whose settings say where to search."""
    return [name for name in learners() if load_settings(name).search]


def validation_pair(world: World, name: str) -> WorldPair:
    """Divides the users of a training world: four fifths to learn from, a fifth to evaluate on, in the same world.

    Raises:
        DataError: If it is not one, or has too few users.
    """
    if world.split != "train":
        raise DataError(f"methods are tuned in the training world, got the {world.split} world")
    if len(world.users) < _MIN_USERS:
        raise DataError(f"tuning needs at least {_MIN_USERS} users in the training world, got {len(world.users)}")
    validation = world.user_rows(evaluation_users(world.user_ids, len(world.users) // _VALIDATION_SHARE))
    others = np.setdiff1d(world.users, validation)
    return WorldPair(name, replace(world, users=others), replace(world, split="test", users=validation))


def tune(plan: TuningPlan, world: World, trials: int, output: str | Path, *, progress: bool = False) -> TuningResult:
    """Searches until a folder holds so many trials; the same call goes on where an earlier one stopped.

    Same plan, same trials: interrupted or not. A trial whose values the method refuses, or that diverges, counts, and
    says why; the first one must work.

    Args:
        plan: What to search.
        world: The training world.
        trials: How many there shall be in all.
        output: The folder.
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If the folder holds something else, or another search, or another process searches there.
        DataError: If the world is not a training world, or has too few users.
        KuaiFairError: If Optuna is not installed.
        ValueError: If a setting is not valid.
        KeyboardInterrupt: If interrupted; the same call goes on.
    """
    if trials < 1:
        raise ValueError(f"need at least 1 trial, got {trials}")
    folder = Path(output)
    if folder.exists() and not (folder / JOURNAL).exists() and (not folder.is_dir() or _holds_files(folder)):
        raise ArtifactError(f"{folder} exists already and holds no search; choose another output folder")
    pair = validation_pair(world, plan.world)
    with locked_folder(folder, "search"):
        return _search(plan, world, pair, trials, folder, progress)


def _holds_files(folder: Path) -> bool:
    """Says whether there is anything in a folder but a lock, which a search that never began may have left."""
    return any(path.name != LOCK for path in folder.iterdir())


def _search(plan: TuningPlan, world: World, pair: WorldPair, trials: int, folder: Path, progress: bool) -> TuningResult:
    settings = plan.settings
    first = {name: setting(settings.hyperparameters, name) for name in settings.search}
    journal = TrialJournal(folder / JOURNAL, _identity(plan, world), settings.search, first, plan.seed)
    purifier = search_purifier(plan, pair, folder, progress)
    users = min(plan.n_users, len(pair.test.users))
    result = TuningResult(plan, journal.finished(), folder, users)
    with tqdm(total=trials, unit="trial", desc=f"tuning {plan.method}", disable=not progress, leave=False) as bar:
        bar.update(min(len(result.trials), trials))
        while len(result.trials) < trials:
            _try(plan, pair, purifier, journal, progress)
            result = TuningResult(plan, journal.finished(), folder, users)
            _write(result, world)
            bar.set_postfix_str(f"best {result.best.score:.3f}")
            bar.update()
    _write(result, world)
    return result


def _try(plan: TuningPlan, pair: WorldPair, purifier: Path | None, journal: TrialJournal, progress: bool) -> None:
    proposal = journal.propose()
    start, score, problem = time.perf_counter(), None, ""
    try:
        score = _score(plan, pair, purifier, proposal, progress)
    except ValueError as error:
        # The method refuses these values, or diverges. Errors of data and files, and any in the first trial, are no
        # fault of the values.
        if proposal.number == 0 or (isinstance(error, KuaiFairError) and not isinstance(error, TrainingError)):
            raise
        problem = str(error)
    journal.record(proposal, score, time.perf_counter() - start, problem)


def _score(plan: TuningPlan, pair: WorldPair, purifier: Path | None, proposal: Proposal, progress: bool) -> float:
    seeds = range(plan.seed, plan.seed + plan.runs)
    return float(np.mean([train_and_score(plan, pair, purifier, proposal.values, seed, progress) for seed in seeds]))


def train_and_score(
    plan: TuningPlan,
    pair: WorldPair,
    purifier: Path | None,
    values: Mapping[str, Any],
    seed: int,
    progress: bool = False,
) -> float:
    """Trains once with values by (dotted) name, and returns R_cum of the validation users; without a guard."""
    unguarded = {"guard": None} if "guard" in load_settings(plan.method, plan.world).hyperparameters else {}
    config = plan_run(
        plan.method,
        plan.world,
        seed=seed,
        session=plan.session,
        total_steps=plan.total_steps,
        overrides={**values, **unguarded},
        world_settings=plan.world_settings,
        n_users=plan.n_users,
        episodes_per_user=plan.episodes_per_user,
        purifier=None if purifier is None else PurifierIdentity.of_file(purifier),
    )
    result = train(config, pair, purifier=purifier, progress=progress)
    if result.evaluation is None:
        raise KeyboardInterrupt
    return float(result.evaluation.summary()[CRITERION])


def search_purifier(plan: TuningPlan, pair: WorldPair, folder: Path, progress: bool = False) -> Path | None:
    """Returns the file of the purifier that is part of the method, pretrained without the validation users."""
    mode = method(plan.method).purifier
    return cached_purifier(pair.train, mode, folder=folder, progress=progress) if mode else None


def _identity(plan: TuningPlan, world: World) -> dict[str, Any]:
    """Returns all that scores depend on, JSON-able."""
    settings = plan.settings
    return {
        "method": plan.method,
        "world": plan.world,
        "world_settings": dict(plan.world_settings),
        "data": world.data.data_hash,
        "seed": plan.seed,
        "runs": plan.runs,
        "session": plan.session.describe(),
        "n_users": plan.n_users,
        "episodes_per_user": plan.episodes_per_user,
        "settings": settings.as_dict() | {"total_steps": plan.total_steps or settings.total_steps},
    }


def _write(result: TuningResult, world: World) -> None:
    rows: list[dict[str, Any]] = []
    for trial in result.trials:
        values = {
            name: json.dumps(value) if isinstance(value, (list, dict)) else value
            for name, value in trial.values.items()
        }
        outcome = {CRITERION: "" if trial.score is None else trial.score, "seconds": round(trial.seconds, 1)}
        rows.append({"number": trial.number, **values, **outcome, "error": trial.error})
    write_table(result.folder / TRIALS, rows)
    comment = "The best of many noisy scores is too high: evaluate these settings anew, with other seeds."
    _write_settings(result, BEST, result.best_settings, world, [comment])


def _write_settings(
    result: TuningResult, name: str, settings: MethodSettings, world: World, comments: Sequence[str]
) -> None:
    plan, best, first = result.plan, result.best, result.trials[0]
    provenance = world.data.provenance
    lines = [
        f"Best of {len(result.trials)} trials of {plan.method} in the training world of {plan.world} "
        f"({provenance.name}, {provenance.origin} data), seed {plan.seed}, {plan.runs} run(s) each,",
        f"of {result.best_settings.total_steps:,} steps; Max Len {plan.session.max_len}, "
        f"{plan.session.items_per_slate} items per slate.",
        f"R_cum of {result.validation_users} validation users: {best.score:.3f} in trial {best.number}, "
        f"{first.score:.3f} with the settings that the search started from.",
        *comments,
    ]
    content = json.loads(json.dumps(settings.as_dict()))
    text = "".join(f"# {line}\n" for line in lines) + yaml.safe_dump(content, sort_keys=False)
    write_text_atomically(result.folder / name, text)


@dataclass(frozen=True)
class ConfirmationRun:
    """One training of a confirmation.

    Attributes:
        side: ``"start"``, the settings that the search started from, or ``"found"``, those of its best trial.
        values: What was searched, by (dotted) name.
        steps: Training steps.
        seed: Training seed.
        score: R_cum of the validation users; None before the run was made.
        seconds: Wall time.
    """

    side: Side
    values: Mapping[str, Any]
    steps: int
    seed: int
    score: float | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def identity(self) -> tuple[str, int, int]:
        """What its score depends on, besides the search."""
        return json.dumps(self.values, sort_keys=True), self.steps, self.seed


@dataclass(frozen=True)
class Confirmation:
    """A search whose best trial was tried again, with the runs of both sides and their scores."""

    search: TuningResult
    runs: Sequence[ConfirmationRun]

    def scores(self, side: Side) -> list[float]:
        """Returns the scores of one side, by seed."""
        return [run.score for run in self.runs if run.side == side and run.score is not None]

    @property
    def kept(self) -> Side:
        """The side of the higher mean; what the search started from, if they are equal."""
        return "found" if np.mean(self.scores("found")) > np.mean(self.scores("start")) else "start"

    @property
    def settings(self) -> MethodSettings:
        """The settings of that side."""
        settings = self.search.plan.settings
        values = next(run.values for run in self.runs if run.side == self.kept)
        return replace(settings, hyperparameters=overridden(settings.hyperparameters, values))


def confirmation_runs(search: TuningResult, seeds: int) -> list[ConfirmationRun]:
    """Returns the runs of a confirmation with so many seeds for each side; none if no trial beat the first."""
    if seeds < 1:
        raise ValueError(f"a confirmation needs at least 1 seed, got {seeds}")
    plan, best = search.plan, search.best
    if best.number == 0:
        return []
    space = plan.settings.search
    sides: dict[Side, Mapping[str, Any]] = {
        "start": search.trials[0].values,
        "found": {
            name: float(f"{value:.2g}") if isinstance(space[name], Interval) else value
            for name, value in best.values.items()
        },
    }
    fresh = range(plan.seed + plan.runs, plan.seed + plan.runs + seeds)
    steps = plan.settings.total_steps
    return [ConfirmationRun(side, values, steps, seed) for seed in fresh for side, values in sides.items()]


def confirm(search: TuningResult, world: World, seeds: int = 3, *, progress: bool = False) -> Confirmation | None:
    """Makes the runs that the folder of a search lacks, and writes which settings won.

    Args:
        search: The search.
        world: Its training world.
        seeds: Training seeds for each side; the same call goes on where an earlier one stopped.
        progress: Whether to show progress bars.

    Returns:
        The comparison; None if the settings that the search started from were never beaten.

    Raises:
        ArtifactError: If the folder holds a damaged table of runs, or another process works there.
        KeyboardInterrupt: If interrupted; finished runs are kept.
        ValueError: If there are no seeds, or a run diverges.
    """
    runs = confirmation_runs(search, seeds)
    if not runs:
        return None
    pair = validation_pair(world, search.plan.world)
    with locked_folder(search.folder, "search"):
        purifier = search_purifier(search.plan, pair, search.folder, progress)
        finished = _read_confirmation(search.folder)
        for place, run in enumerate(runs):
            runs[place] = finished.get(run.identity) or confirmation_run(search, run, pair, purifier, progress)
            _write_confirmation(search, [run for run in runs if run.score is not None])
    result = Confirmation(search, runs)
    _write_settings(search, CONFIRMED, result.settings, world, _confirmation_comment(result))
    return result


def confirmation_run(
    search: TuningResult, run: ConfirmationRun, pair: WorldPair, purifier: Path | None, progress: bool = False
) -> ConfirmationRun:
    """Returns a run with its score."""
    start = time.perf_counter()
    plan = replace(search.plan, total_steps=run.steps)
    score = train_and_score(plan, pair, purifier, run.values, run.seed, progress)
    return replace(run, score=score, seconds=time.perf_counter() - start)


def _write_confirmation(search: TuningResult, runs: Sequence[ConfirmationRun]) -> None:
    rows = [
        {
            "settings": run.side,
            "values": json.dumps(run.values),
            "steps": run.steps,
            "seed": run.seed,
            CRITERION: run.score,
            "seconds": round(run.seconds, 1),
        }
        for run in runs
    ]
    # The checksum is of cells as they are read: texts.
    sealed = [with_checksum({name: str(value) for name, value in row.items()}) | row for row in rows]
    write_table(search.folder / CONFIRMATION, sealed)


def _read_confirmation(folder: Path) -> dict[tuple[str, int, int], ConfirmationRun]:
    path = folder / CONFIRMATION
    if not path.exists():
        return {}
    with (
        whole(path, "table of runs", "remove it, and its runs are made again"),
        path.open(encoding="utf-8", newline="") as stream,
    ):
        rows = list(csv.DictReader(stream))
        if not all(fits_checksum(row) for row in rows):
            raise ValueError("its checksums do not fit")
        runs = [
            ConfirmationRun(
                side="found" if row["settings"] == "found" else "start",
                values=parse_as(dict[str, Any], json.loads(row["values"])),
                steps=int(row["steps"]),
                seed=int(row["seed"]),
                score=float(row[CRITERION]),
                seconds=float(row["seconds"]),
            )
            for row in rows
        ]
        return {run.identity: run for run in runs}


def _confirmation_comment(result: Confirmation) -> list[str]:
    means = {side: float(np.mean(result.scores(side))) for side in ("start", "found")}
    each = ", ".join(
        f"{found - start:+.3f}" for start, found in zip(result.scores("start"), result.scores("found"), strict=True)
    )
    winner = f"trial {result.search.best.number}" if result.kept == "found" else "the settings it started from"
    return [
        f"Confirmed with {len(result.scores('found'))} other seed(s) and {result.runs[0].steps:,} steps: R_cum "
        f"{means['found']:.3f} with trial {result.search.best.number}, {means['start']:.3f} with the settings that the",
        f"search started from (differences {each}). These are those of {winner}.",
    ]
