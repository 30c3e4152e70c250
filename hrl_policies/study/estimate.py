"""How long a study takes and how much it writes: estimates from a small measured table, and no more than that."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from hrl_policies.study.planning import PlannedRun
from hrl_policies.zoo import method
from kuaifair_env import ENVIRONMENTS
from kuaifair_env.data.twin import twin_config

FACTOR = 2.0
"""By how much an estimate may be wrong, either way."""

_COSTS = ("plans", "costs.json")
_PRODUCTS = 200
_REPEATS = 5
_USUAL_LENGTH = 30
_SESSION_BYTES = 130
_OTHER_BYTES = 12_000


@dataclass(frozen=True)
class Estimate:
    """What a study is believed to cost.

    Attributes:
        seconds: With one worker: divide by the number of workers.
        longest: Seconds of its longest run: it takes no less, with however many workers.
        bytes: On disk.
        guessed: Methods that were not measured, for which the dearest of their kind stands in.
    """

    seconds: float
    longest: float
    bytes: int
    guessed: tuple[str, ...]

    def wall_seconds(self, workers: int) -> float:
        """Returns the estimate for a number of workers that do nothing else."""
        return max(self.seconds / workers, self.longest)


def estimate_study(runs: Sequence[PlannedRun]) -> Estimate:
    """Estimates a study, once calibrated on this machine.

    Making worlds is not counted: they are made once, then read from the cache.
    """
    unit = calibration_seconds()
    works = [work_of(run) for run in runs]
    modes = {(run.world, run.purifier): run for run in runs if run.purifier}
    pretraining = sum(_pretraining_work(run) for run in modes.values())
    names = dict.fromkeys(run.entry.name for run in runs)
    return Estimate(
        seconds=unit * (sum(works) + pretraining),
        longest=unit * max(works, default=0.0),
        bytes=sum(_bytes_of(run) for run in runs),
        guessed=tuple(name for name in names if name not in _costs()["methods"]),
    )


def work_of(run: PlannedRun) -> float:
    """Returns how much work a run is, in calibration products."""
    config, cost, items = run.config(), _cost_of(run.entry.name), _candidates(run.world)
    sessions = config.users * config.episodes_per_user * config.session.max_len / _USUAL_LENGTH
    training = (cost["step"] + cost["step_item"] * items) * config.total_steps
    judging = (cost["session"] + cost["session_item"] * items) * sessions
    return float(cost["start"] + training + judging)


def calibration_seconds() -> float:
    """Measures the unit of the table: one product of 64 x 64 by 64 x 4096 numbers, on one thread, at its best."""
    from threadpoolctl import threadpool_limits

    rng = np.random.default_rng(0)
    left = rng.standard_normal((64, 64), np.float32)
    right = rng.standard_normal((64, 4096), np.float32)
    best = np.inf
    with threadpool_limits(limits=1, user_api="blas"):
        for _ in range(_REPEATS):
            start = time.process_time()
            for _ in range(_PRODUCTS):
                left @ right
            best = min(best, (time.process_time() - start) / _PRODUCTS)
    return float(best)


def duration(seconds: float) -> str:
    """Returns a duration as people say it, to two figures at most."""
    for size, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.0f} {name}" if count >= 10 else f"{count:.1f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Returns a number of bytes as people say it."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 2**10:.0f} KiB"


def _bytes_of(run: PlannedRun) -> int:
    config = run.config()
    purifier = _costs()["purifiers"].get(run.purifier, {}).get("bytes", 0)
    sessions = _SESSION_BYTES * config.users * config.episodes_per_user
    return int(_cost_of(run.entry.name)["bytes"] + purifier + sessions + _OTHER_BYTES)


def _pretraining_work(run: PlannedRun) -> float:
    purifiers = _costs()["purifiers"]
    dearest = max(known["work"] for known in purifiers.values())
    return float(purifiers.get(run.purifier, {"work": dearest})["work"])


def _cost_of(name: str) -> dict[str, float]:
    known: dict[str, dict[str, float]] = _costs()["methods"]
    if name in known:
        return known[name]
    alike = [cost for other, cost in known.items() if method(other).learns == method(name).learns]
    return {part: max(cost[part] for cost in alike) for part in alike[0]}


@cache
def _costs() -> dict[str, Any]:
    text = resources.files("hrl_policies.study").joinpath(*_COSTS).read_text("utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def _candidates(world: str) -> int:
    """Returns about how many candidates a world has; worlds of one's own count as the toy world."""
    name = ENVIRONMENTS[world].twin if world in ENVIRONMENTS else "Toy"
    return twin_config(name).n_items
