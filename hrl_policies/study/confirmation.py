"""Confirmation of a search: what it found against what it started from, with new seeds and all training steps.

The best of many noisy scores is too high, and trials are often shorter than training. So the settings of the best trial
and those that the search started from train again, as long as the method trains and with seeds that no trial had, and
meet the same validation users. What wins on average is written to ``confirmed.yml``. Numbers found on a scale are
rounded to two digits first, for a search does not know more.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hrl_policies.study.store import write_table
from hrl_policies.study.tuning import (
    CRITERION,
    TuningResult,
    search_purifier,
    train_and_score,
    validation_pair,
    write_settings,
)
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import MethodSettings, overridden
from hrl_policies.zoo.search import Interval
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import atomic_path
from kuaifair_env.world import World

CONFIRMATION, CONFIRMED = "confirmation.csv", "confirmed.yml"
Side = Literal["start", "found"]


@dataclass(frozen=True)
class ConfirmationRun:
    """One training.

    Attributes:
        side: ``"start"``, the settings that the search started from, or ``"found"``, those of its best trial.
        values: What was searched, by (dotted) name.
        steps: Training steps.
        seed: Training seed.
        score: R_cum of the validation users; None before it was made.
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
    """What came of it.

    Attributes:
        search: The search.
        runs: All runs, with their scores.
    """

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


def planned_runs(search: TuningResult, seeds: int) -> list[ConfirmationRun]:
    """Returns the runs of a confirmation, none of them made; nothing if no trial beat the first.

    Args:
        search: The search.
        seeds: Training seeds for each side.

    Raises:
        ValueError: If there are no seeds.
    """
    if seeds < 1:
        raise ValueError(f"a confirmation needs at least 1 seed, got {seeds}")
    plan, best = search.plan, search.best
    if best.number == 0:
        return []
    sides: dict[Side, Mapping[str, Any]] = {
        "start": search.trials[0].values,
        "found": {name: _rounded(plan.settings, name, value) for name, value in best.values.items()},
    }
    fresh = range(plan.seed + plan.runs, plan.seed + plan.runs + seeds)
    steps = plan.settings.total_steps
    return [ConfirmationRun(side, values, steps, seed) for seed in fresh for side, values in sides.items()]


def confirm(
    search: TuningResult, world: World, seeds: int = 3, *, progress: bool = False
) -> Confirmation | None:
    """Makes the runs that the folder of a search lacks, and writes which settings won.

    Args:
        search: The search.
        world: Its training world.
        seeds: Training seeds for each side; the same call goes on where an earlier one stopped.
        progress: Whether to show progress bars.

    Returns:
        The comparison; None if the settings that the search started from were never beaten.

    Raises:
        ArtifactError: If the folder holds a damaged table of runs.
        KeyboardInterrupt: If interrupted; finished runs are kept.
        ValueError: If there are no seeds, or a run diverges.
    """
    runs = planned_runs(search, seeds)
    if not runs:
        return None
    pair = validation_pair(world, search.plan.world)
    purifier = search_purifier(search.plan, pair, search.folder, progress)
    made = _read(search.folder)
    for place, run in enumerate(runs):
        runs[place] = made.get(run.identity) or confirmation_run(search, run, pair, purifier, progress)
        write_confirmation(search, [run for run in runs if run.score is not None])
    result = Confirmation(search, runs)
    write_settings(search, CONFIRMED, result.settings, world, _verdict(result))
    return result


def confirmation_run(
    search: TuningResult, run: ConfirmationRun, pair: WorldPair, purifier: Path | None, progress: bool = False
) -> ConfirmationRun:
    """Returns a run with its score."""
    start = time.perf_counter()
    plan = replace(search.plan, total_steps=run.steps)
    score = train_and_score(plan, pair, purifier, run.values, run.seed, progress)
    return replace(run, score=score, seconds=time.perf_counter() - start)


def write_confirmation(search: TuningResult, runs: Sequence[ConfirmationRun]) -> None:
    """Writes the table of the runs that were made."""
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
    with atomic_path(search.folder / CONFIRMATION) as temporary:
        write_table(temporary, rows)


def _read(folder: Path) -> dict[tuple[str, int, int], ConfirmationRun]:
    path = folder / CONFIRMATION
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            runs = [
                ConfirmationRun(
                    "found" if row["settings"] == "found" else "start",
                    json.loads(row["values"]),
                    int(row["steps"]),
                    int(row["seed"]),
                    float(row[CRITERION]),
                    float(row["seconds"]),
                )
                for row in csv.DictReader(stream)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}; remove it, and its runs are made again") from error
    return {run.identity: run for run in runs}


def _rounded(settings: MethodSettings, name: str, value: Any) -> Any:
    return float(f"{value:.2g}") if isinstance(settings.search[name], Interval) else value


def _verdict(result: Confirmation) -> list[str]:
    means = {side: float(np.mean(result.scores(side))) for side in ("start", "found")}
    each = ", ".join(
        f"{found - start:+.3f}"
        for start, found in zip(result.scores("start"), result.scores("found"), strict=True)
    )
    winner = (
        f"trial {result.search.best.number}" if result.kept == "found" else "the settings it started from"
    )
    return [
        f"Confirmed with {len(result.scores('found'))} other seed(s) and {result.runs[0].steps:,} steps: R_cum "
        f"{means['found']:.3f} with trial {result.search.best.number}, {means['start']:.3f} with the settings that the",
        f"search started from (differences {each}). These are those of {winner}.",
    ]
