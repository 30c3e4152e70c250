"""Kills a study at random moments, resumes it, and compares its files with those of a study that was left in peace.

    python benchmarks/study_kills.py --results docs/results

A kill is SIGKILL: of the study's process alone every other time, whose workers must then end by themselves, and of all
its processes at once the other times. Moments are drawn over the whole study: a number of finished runs, then up to a
second more.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrl_policies.study.store import machine
from kuaifair_env.files import write_text_atomically

WORLD = "KuaiFair-Toy-v0"
COMPARED = ("result.json", "sessions.csv", "learning_curve.csv", "config.json", "provenance.json")
PLAN = """name: study-kills
methods:
  {controls}
  - {{name: a2c, steps: 128, set: {{n_steps: 2}}}}
worlds: [{world}]
max_lens: [{max_lens}]
seeds: [{seeds}]
control_seeds: [{control_seeds}]
n_users: 10
"""
_PATIENCE = 600.0


@dataclass(frozen=True)
class Report:
    """What came of it.

    Attributes:
        runs: Runs of the study.
        kills: Times that it was killed before it was done.
        moments: Finished runs at each kill.
        different: Files that are not the same, or not on both sides.
        leftovers: Temporary files in the store.
    """

    runs: int
    kills: int
    moments: tuple[int, ...]
    different: tuple[str, ...]
    leftovers: tuple[str, ...]


def write_plan(
    folder: Path, learners: int, seeds: int, max_lens: tuple[int, ...], controls: tuple[str, ...] = ("controls",)
) -> Path:
    """Writes a study of A2C with ``learners`` seeds and of controls with ``seeds`` seeds, for each horizon."""
    path = folder / "study_kills.yml"
    path.write_text(
        PLAN.format(
            world=WORLD,
            controls="\n  ".join(f"- {name}" for name in controls),
            max_lens=", ".join(map(str, max_lens)),
            seeds=", ".join(map(str, range(learners))),
            control_seeds=", ".join(map(str, range(seeds))),
        )
    )
    return path


def compare(plan: Path, folder: Path, kills: int, rng: np.random.Generator, workers: int) -> Report:
    """Runs the study twice, in peace and under kills, and compares everything that its runs determine."""
    peaceful, killed = folder / "peaceful", folder / "killed"
    finished(started(plan, peaceful, workers))
    runs = count_done(peaceful)
    moments = []
    # Drawn without the last runs: a study must still be at work when its time has come.
    for number, moment in enumerate(sorted(rng.integers(0, max(runs - 4, 1), kills))):
        process = started(plan, killed, workers)
        at = kill_after(process, killed, int(moment), float(rng.random()), everything=number % 2 == 1)
        if at is not None:
            moments.append(at)
            print(f"kill {len(moments)} at {at} of {runs} runs", flush=True)
    finished(resumed(killed, workers))
    one, two = files_of(peaceful), files_of(killed)
    different = sorted(name for name in {*one, *two} if one.get(name) != two.get(name))
    leftovers = sorted(str(path) for path in killed.rglob("*") if path.name.endswith((".tmp", ".partial")))
    return Report(runs, len(moments), tuple(moments), tuple(different), tuple(leftovers))


def started(plan: Path, store: Path, workers: int) -> subprocess.Popen[bytes]:
    """Starts the study, or goes on with it once it has a folder."""
    if (store / "study.json").exists():
        return resumed(store, workers)
    return kuaifair("run", str(plan), "--output", str(store), "--workers", str(workers))


def resumed(store: Path, workers: int) -> subprocess.Popen[bytes]:
    """Goes on with the study."""
    return kuaifair("resume", str(store), "--workers", str(workers))


def kuaifair(*arguments: str) -> subprocess.Popen[bytes]:
    """Starts ``kuaifair study`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "hrl_policies.cli", "study", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[bytes]) -> None:
    """Waits for a study to end well.

    Raises:
        RuntimeError: If it ends otherwise.
    """
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the study ended with {process.returncode}:\n{errors.decode()}")


def kill_after(
    process: subprocess.Popen[bytes], store: Path, runs: int, seconds: float, everything: bool
) -> int | None:
    """Kills a study some time after it has a number of finished runs; returns how many it had, None if it was done."""
    deadline = time.monotonic() + _PATIENCE
    while count_done(store) < runs and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)
    alive = process.poll() is None
    if alive and everything:
        os.killpg(process.pid, signal.SIGKILL)
    elif alive:
        os.kill(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    if not alive and process.returncode:
        raise RuntimeError(f"the study ended with {process.returncode}:\n{errors.decode()}")
    return count_done(store) if alive else None


def count_done(store: Path) -> int:
    """Returns the number of finished runs."""
    # No search of folders, which come and go while the study runs.
    return sum(not path.parent.name.startswith(".") for path in store.glob("*/*/result.json"))


def files_of(store: Path) -> dict[str, bytes]:
    """Returns tables, records and whatever a run determines, by name; not timings, logs and models' archives."""
    names = {"tables.md", "runs.csv", *COMPARED}
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kuaifair-kills-") as scratch:
        folder = Path(scratch)
        plan = write_plan(folder, learners=60, seeds=5, max_lens=(30, 50))
        rng = np.random.default_rng(arguments.seed)
        report = compare(plan, folder, arguments.kills, rng, arguments.workers)
    moments = ", ".join(map(str, report.moments))
    verdict = "the same bytes" if not report.different else f"DIFFERENT: {', '.join(report.different)}"
    text = "\n".join(
        [
            f"### A study of {report.runs} runs, killed {report.kills} times and resumed",
            "",
            f"- {WORLD}, tiny runs: A2C over 128 steps with 60 seeds, all controls with 5 seeds, Max Len 30 and 50, 10 "
            f"users; {arguments.workers} workers.",
            f"- SIGKILL when so many runs were finished: {moments}; every other time of all processes at once, else of "
            "the study's own process alone.",
            "- Tables, records, and each run's result, sessions, learning curve, configuration and provenance, beside "
            f"those of a study that nobody killed: {verdict}.",
            f"- Temporary files left behind: {len(report.leftovers)}.",
            "",
            f"Made by: `python benchmarks/study_kills.py --kills {arguments.kills} --seed {arguments.seed} --workers "
            f"{arguments.workers} --results RESULTS` ({machine()}).",
        ]
    )
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "study_kills.md", text + "\n")
    sys.exit(1 if report.different or report.leftovers else 0)


if __name__ == "__main__":
    main()
