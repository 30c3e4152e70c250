"""Feeds mutated inputs to the readers, the command line and the downloader, and looks for what nobody may meet.

    python benchmarks/fuzz.py logs --minutes 20 --folder fuzzing     # or artifacts, settings, command, downloads
    python benchmarks/fuzz.py logs --replay fuzzing/logs/failures/*.bin
    python benchmarks/fuzz.py table --folder fuzzing

Inputs are bytes that decide how a small valid file is changed, so that checksums and headers can be right while what
they cover is wrong. A failure is an error of another type than the library's own, a message of several lines, an exit
code other than 0, 1 and 2, more than 5 s of processor time or 512 MB; each is kept once, with its traceback, and the
search goes on. With atheris (``pip install atheris``; Linux, no dependency of this project) branches that are reached
guide the search; without, bytes are random.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    import atheris
except ImportError:
    atheris = None
if atheris is not None:  # before the library is imported, and for good: some of it is imported on first use
    atheris.instrument_imports(include=["kuaifair_env", "dsrm", "hrl_policies"]).__enter__()

from fuzz_inputs import Draws
from fuzz_targets import ALLOWED, LISTS, ROOT, TARGETS

SECONDS, MEGABYTES = 5.0, 512
MAX_INPUT, FIRST = 2_048, 50


@dataclass
class Search:
    """A target under its contract.

    Attributes:
        name: Of the target.
        folder: Where statistics and failures go.
        executions: Inputs so far.
        failures: Places that failed, and how often.
    """

    name: str
    folder: Path
    executions: int = 0
    refused: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self._written = time.monotonic()
        (self.folder / "failures").mkdir(parents=True, exist_ok=True)
        self._prepared = tempfile.TemporaryDirectory(prefix="kuaifair-fuzz-")
        self._target = TARGETS[self.name](Path(self._prepared.name))

    def __call__(self, data: bytes) -> None:
        """Tries an input."""
        error = self.try_input(data)
        self.executions += 1
        if error is not None:
            self._keep(error, data)
        if time.monotonic() - self._written > 5.0:
            self.write()

    def try_input(self, data: bytes) -> BaseException | None:
        """Returns what is wrong with what came of an input, None if nothing is."""
        before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scratch = Path(tempfile.mkdtemp(prefix="kuaifair-fuzz-"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._target(Draws(data), scratch)
        except ALLOWED[self.name] as error:
            self.refused += 1
            if "\n" in str(error).strip() and not isinstance(error, LISTS):
                return error
        except Exception as error:
            return error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if self.executions < FIRST:
            return None  # modules are imported on first use
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        if grown > MEGABYTES or time.process_time() - before > SECONDS:
            return RuntimeError(f"{time.process_time() - before:.1f} s of processor time, {grown:.0f} MB")
        return None

    def _keep(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if str(ROOT) in frame.filename and "fuzz.py" not in frame.filename] or frames
        place = f"{Path(ours[-1].filename).stem}-{ours[-1].lineno}" if ours else "cost"
        key = f"{type(error).__name__}-{place}" + (
            f"-{re.sub('[^a-z]+', '-', str(error).lower())[:24]}" if not ours else ""
        )
        self.failures[key] = self.failures.get(key, 0) + 1
        if self.failures[key] == 1:
            (self.folder / "failures" / f"{key}.bin").write_bytes(data)
            (self.folder / "failures" / f"{key}.txt").write_text("".join(traceback.format_exception(error)), "utf-8")
            print(f"failure {key}: {str(error)[:300]}", flush=True)

    def write(self) -> None:
        """Writes statistics."""
        self._written = time.monotonic()
        content = {
            "executions": self.executions,
            "refused": self.refused,
            "seconds": round(time.monotonic() - self._start),
            "guided": atheris is not None,
            "failures": self.failures,
        }
        (self.folder / "statistics.json").write_text(json.dumps(content, indent=1), "utf-8")


def search(target: Search, seconds: float) -> None:
    """Tries inputs for some time; with atheris this does not return."""
    rng = random.Random(0)
    if atheris is None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            target(rng.randbytes(rng.randrange(8, MAX_INPUT)))
        target.write()
        return
    corpus = target.folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number in range(64):
        (corpus / f"seed-{number}").write_bytes(rng.randbytes(8 << number % 8))
    options = (
        f"-max_total_time={seconds:.0f}",
        f"-max_len={MAX_INPUT}",
        "-timeout=120",
        "-rss_limit_mb=6000",
        "-len_control=0",
    )
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={target.folder}/", str(corpus)], target)
    atheris.Fuzz()


def table(folder: Path) -> str:
    """Returns the statistics of all targets as Markdown."""
    lines = ["| target | minutes | inputs | of them refused | places that failed |", "|---|---:|---:|---:|---:|"]
    for name in TARGETS:
        path = folder / name / "statistics.json"
        if path.exists():
            numbers = json.loads(path.read_text("utf-8"))
            counts = f"{numbers['executions']:,} | {numbers['refused']:,} | {len(numbers['failures'])}"
            lines.append(f"| {name} | {numbers['seconds'] / 60:.0f} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "table"])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--folder", type=Path, default=Path("fuzzing"), help="statistics, failures and corpus")
    parser.add_argument("--replay", type=Path, nargs="+", help="try these inputs alone")
    arguments = parser.parse_args()
    if arguments.target == "table":
        print(table(arguments.folder))
        return
    target = Search(arguments.target, arguments.folder / arguments.target)
    if arguments.replay is None:
        search(target, 60.0 * arguments.minutes)
    for path in arguments.replay or ():
        error = target.try_input(path.read_bytes())
        print(f"{path}: {'fine' if error is None else ''.join(traceback.format_exception(error))}")


if __name__ == "__main__":
    main()
