"""Whether stored runs come out again: a sample of them is run anew and compared with what the store holds."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrl_policies.study.loading import register_data_of
from hrl_policies.study.runner import train
from hrl_policies.study.store import PURIFIER, StoredRun, load_run, versions
from kuaifair_env.errors import ArtifactError
from kuaifair_env.intervals import crossed_mean, interval_of

CRITERION = "r_cum"
COMPARED = ("result.json", "sessions.csv", "learning_curve.csv")
"""Files that the same configuration, versions and platform give byte for byte."""

_MIN_SEEDS = 3


@dataclass(frozen=True)
class Verification:
    """A stored run beside the same run made again.

    Attributes:
        name: Folder of the run.
        stored: Its R_cum.
        again: R_cum of the run made again.
        same_bytes: Whether the files of :data:`COMPARED` are the same.
        comparable: Whether they have to be: versions and platform are those of the stored run, which was not resumed.
        low: Lower end of the interval in which ``again`` is expected where bytes may differ.
        high: Its upper end.
        basis: What the interval rests on, in words.
    """

    name: str
    stored: float
    again: float
    same_bytes: bool
    comparable: bool
    low: float
    high: float
    basis: str

    @property
    def agrees(self) -> bool:
        """Whether the run came out: to the byte where it has to, within the interval elsewhere."""
        return self.same_bytes if self.comparable else self.same_bytes or self.low <= self.again <= self.high

    def __str__(self) -> str:
        figures = f"stored R_cum {self.stored:.4f}, again {self.again:.4f}"
        if self.same_bytes:
            return f"agrees to the byte: {self.name} ({figures})"
        if self.comparable:
            return f"DIFFERS: {self.name} ({figures}); same versions and platform have to give the same bytes"
        verdict = "agrees within the interval" if self.agrees else "DIFFERS"
        return f"{verdict}: {self.name} ({figures}; 95 % interval {self.low:.4f} to {self.high:.4f}, {self.basis})"


def verify_runs(
    runs: Sequence[StoredRun], sample: int, seed: int, data_dir: str | Path | None = None
) -> Iterator[Verification]:
    """Makes some runs of a store again, drawn at random, and compares them.

    Args:
        runs: Finished runs of the store, in registered environments or on one's own data in files.
        sample: How many to draw, without replacement.
        seed: Seed of the draw.
        data_dir: Folder with the official files.

    Yields:
        What came out, run by run.

    Raises:
        ArtifactError: If the data of a run are gone or have changed.
        ValueError: If there are no runs, or no sample is asked for.
    """
    if not runs or sample < 1:
        raise ValueError(f"need at least one finished run and a sample of at least 1, got {len(runs)} and {sample}")
    drawn = np.random.default_rng(seed).choice(len(runs), min(sample, len(runs)), replace=False)
    for number in sorted(drawn.tolist()):
        yield _verified(runs[number], runs, data_dir)


def _verified(run: StoredRun, runs: Sequence[StoredRun], data_dir: str | Path | None) -> Verification:
    register_data_of(run)
    with tempfile.TemporaryDirectory(prefix="kuaifair-verify-") as scratch:
        folder = Path(scratch) / "run"
        purifier = run.folder / PURIFIER if run.config.purifier is not None else None
        result = train(run.config, purifier=purifier, output=folder, data_dir=data_dir)
        if not result.complete:
            raise KeyboardInterrupt
        again = load_run(folder)
        if again.provenance["test"]["fingerprint"] != run.provenance["test"]["fingerprint"]:
            raise ArtifactError(
                f"{run.folder} was made in another test world than {run.config.world} is here; point --data-dir at the "
                "same files"
            )
        same = all(_content(folder / name) == _content(run.folder / name) for name in COMPARED)
        low, high, basis = _expected(run, again, runs)
    return Verification(
        name=run.folder.name,
        stored=run.summary[CRITERION],
        again=again.summary[CRITERION],
        same_bytes=same,
        comparable=run.versions == versions() and not run.result.get("resumed_at"),
        low=low,
        high=high,
        basis=basis,
    )


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _expected(run: StoredRun, again: StoredRun, runs: Sequence[StoredRun]) -> tuple[float, float, str]:
    """Returns in which interval R_cum is expected to be, and what it rests on.

    With three training seeds or more it is Student's prediction interval of one more seed. With fewer it is that of the
    stored run by paired sessions, which leaves out how trainings differ.
    """
    seeds = [other.summary[CRITERION] for other in runs if _without_seed(other) == _without_seed(run)]
    if len(seeds) >= _MIN_SEEDS:
        estimate = crossed_mean(np.asarray(seeds)[:, None])
        half = estimate.quantile() * math.sqrt(estimate.variance * (len(seeds) + 1))
        return estimate.value - half, estimate.value + half, f"one more of {len(seeds)} training seeds"
    returns = [np.asarray([session[CRITERION] for session in one.sessions()], np.float64) for one in (run, again)]
    difference = interval_of(crossed_mean((returns[1] - returns[0])[None]))
    stored = run.summary[CRITERION]
    return stored - difference.half_width, stored + difference.half_width, f"{len(returns[0])} paired sessions"


def _without_seed(run: StoredRun) -> dict[str, object]:
    return {name: value for name, value in run.config.as_dict().items() if name != "seed"}
