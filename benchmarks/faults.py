"""Harms commands at their writes, gives them again, and compares their files with those of commands left in peace.

    python benchmarks/faults.py --results docs/results

Each command runs in a fork of this process, on files of its own. There every opening of a file for writing, write,
making of a folder, renaming and removal is an event. Of the events of one kind and one ending that come from one place
in the code, the first and the last are chosen. At each the process gets SIGKILL: after it, for a write or a renaming
before it too, and for a write also when half of its bytes have reached the file; or the disk is full from a write on.
Then the command is given again.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import http.server
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hrl_policies.study.store import machine
from kuaifair_env.data.published import DATASETS
from kuaifair_env.files import write_text_atomically

WORLD = "KuaiFair-Toy-v0"
KILLS = ("before", "half", "after")
FULL = "full"
# What comes before the other events is what came after the ones before them.
_HARMS = {"write": (*KILLS, FULL), "replace": ("before", "after"), "rename": ("before", "after")}
_PACKAGES = ("kuaifair_env", "dsrm", "hrl_policies")
# Where everything is written: the place of an event is in who calls these.
_WRITERS = ("kuaifair_env/files.py", "hrl_policies/study/records.py")
_NAMED = r"No space left on device: '.+'$|: cannot be written: No space left on device$"
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.tmp")
_INTERRUPTED_STEP = 6
_SESSIONS = ("--env", WORLD, "--max-len", "10", "--no-progress")
_TRAIN = ("train", "--method", "a2c", *_SESSIONS, "--steps", "128", "--n-users", "10", "--output", "run")
_PURIFIER = ("--no-progress", "--output", "purifier.safetensors")
_PLAN = f"""name: tiny
methods: [random, {{name: a2c, steps: 64}}]
worlds: [{WORLD}]
max_lens: [10]
seeds: [11]
n_users: 10
"""


@dataclass(frozen=True)
class Command:
    """A command, tiny.

    Attributes:
        arguments: What follows ``kuaifair``.
        after: Commands before it, left in peace, whose files it finds.
        interrupted: Whether Ctrl-C comes in its training.
        cold: Whether the cache is empty.
    """

    arguments: tuple[str, ...]
    after: tuple[Command, ...] = ()
    interrupted: bool = False
    cold: bool = False


_STOPPED = Command(_TRAIN, interrupted=True)
COMMANDS = {
    "train, stopped by Ctrl-C": _STOPPED,
    "train --resume": Command(("train", "--resume", "run.partial", "--no-progress"), after=(_STOPPED,)),
    "tune": Command(("tune", "a2c", *_SESSIONS, "--steps", "64", "--trials", "2", "--output", "search")),
    "serve": Command(
        ("serve", "run", "--sessions", "30", "--orders", "1", "--n-envs", "8", "--no-progress", "--output", "served"),
        after=(Command(_TRAIN),),
    ),
    "pretrain": Command(
        ("pretrain", "--env", WORLD, "--mode", "regression", "--rounds", "2", "--examples", "100", *_PURIFIER)
    ),
    "train": Command(_TRAIN, cold=True),
    "study run": Command(("study", "run", "tiny.yml", "--workers", "1", "--output", "store")),
    "data fetch": Command(("data", "fetch", "kuairand", "--no-checksum", "--no-progress", "--folder", "archives")),
}

_EXPLAINED = """An event is an opening of a file for writing, a write, a new folder, a renaming or a removal, in the
smallest form of a command. Of the events of one kind, one ending and one place in the code the first and the last are
chosen; of these every n-th is tried where a number is given. A kill comes after an event, before a write or a
renaming, and halfway through a write. Then the command is given again: the same bytes, or a line that says that the
work is done or which folder to resume, and nothing else left behind. [study_kills.md](study_kills.md): a study on two
processes."""

Place = tuple[str, str, int]
"""An event: its kind, the name of its file, and how many of this kind and file came before it."""


@dataclass
class Events:
    """The events of a process below a folder, at one of which harm is done.

    Attributes:
        root: The folder.
        place: Where harm is done.
        harm: ``before``, ``half`` and ``after`` kill the process; ``full`` lets no write succeed from there on.
        seen: Each event, with where it comes from.
    """

    root: Path
    place: Place | None = None
    harm: str = ""
    seen: dict[Place, tuple[str, ...]] = field(default_factory=dict)
    _full: bool = False
    _count: Counter[tuple[str, str]] = field(default_factory=Counter)

    def install(self) -> None:
        """Puts itself between this process and its files."""
        opened, self._sendfile = io.open, shutil._USE_CP_SENDFILE  # type: ignore[attr-defined]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]

        def open_file(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self._inside(file):
                return opened(file, mode, *arguments, **options)
            return _Watched(
                self.happen("open", file, lambda: opened(file, mode, *arguments, **options)), self, Path(file)
            )

        # NumPy would write past the stream.
        np.lib.format.write_array.__globals__["isfileobj"] = lambda stream: False
        builtins.open = io.open = open_file  # type: ignore[assignment]
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, partial(self._in_system, name, getattr(os, name)))

    def happen(self, kind: str, path: Any, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Lets an event happen, with the harm that belongs to it."""
        name = _TEMPORARY.sub("", os.path.relpath(path, self.root))
        place = (kind, name, self._count[kind, name])
        self._count[kind, name] += 1
        if not self.place:
            self.seen[place] = (kind, Path(name).suffix, _caller())
        if place == self.place and self.harm in ("before", "half"):
            try:
                if half is not None and self.harm == "half":
                    half()
            finally:
                # Also where the write fails: matplotlib asks a file by one whether it takes bytes.
                os.kill(os.getpid(), signal.SIGKILL)
        self._full |= place == self.place and self.harm == FULL
        if self._full and kind == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            return act()
        finally:
            if place == self.place and self.harm == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    def _in_system(self, kind: str, act: Callable[..., Any], path: Any, *arguments: Any, **options: Any) -> Any:
        # Within a folder that is removed, names are relative to a descriptor.
        where = self.root / "removed" if options.get("dir_fd") is not None else path
        if not self._inside(where):
            return act(path, *arguments, **options)
        return self.happen(kind, where, lambda: act(path, *arguments, **options))

    def _inside(self, path: Any) -> bool:
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.root)


class _Watched:
    """A file whose writes are events."""

    def __init__(self, stream: Any, events: Events, path: Path) -> None:
        self._stream, self._events, self._path = stream, events, path

    @property
    def __class__(self) -> Any:
        """The class of the stream, for who asks what this is."""
        return type(self._stream)

    def write(self, content: Any) -> Any:
        def half() -> None:
            self._stream.write(content[: len(content) // 2])
            self._stream.flush()

        def whole() -> Any:
            count = self._stream.write(content)
            if self._events.harm == "after":
                self._stream.flush()
            return count

        return self._events.happen("write", self._path, whole, half)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _caller() -> str:
    """Returns the line of the library that asks for a write."""
    frame, line = sys._getframe(1), ""
    while frame.f_back is not None:
        frame = frame.f_back
        name = frame.f_code.co_filename
        if any(f"/{package}/" in name for package in _PACKAGES):
            line = line or f"{name}:{frame.f_lineno}"
            if not name.endswith(_WRITERS):
                return f"{name}:{frame.f_lineno}"
    return line


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code (negative for a signal), what it printed, and its events."""

    code: int
    text: str
    events: dict[Place, tuple[str, ...]]


def run(command: Command, folder: Path, place: Place | None = None, harm: str = "", peaceful: bool = False) -> Ended:
    """Runs a command in a fork of this process.

    Args:
        command: The command.
        folder: Its current folder, which holds its cache too.
        place: Where harm is done.
        harm: Which.
        peaceful: Whether Ctrl-C is left out.
    """
    with tempfile.TemporaryDirectory() as notes:
        child = os.fork()
        if child == 0:
            _run_here(command, folder, Events(folder, place, harm), Path(notes), command.interrupted and not peaceful)
        _, status = os.waitpid(child, 0)
        text = (Path(notes) / "text").read_text(encoding="utf-8")
        record = Path(notes) / "events.json"
        content = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {"events": [], "modules": []}
    _import(content["modules"])
    return Ended(
        os.waitstatus_to_exitcode(status), text, {tuple(key): tuple(value) for key, value in content["events"]}
    )


def _run_here(command: Command, folder: Path, events: Events, notes: Path, interrupted: bool) -> None:
    code = 70
    try:
        os.chdir(folder)
        os.environ |= {"KUAIFAIR_CACHE": str(folder / "cache"), "KUAIFAIR_QUIET": "1"}
        sys.stdout = sys.stderr = (notes / "text").open("w", encoding="utf-8")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _make_smaller(interrupted)
        from hrl_policies.cli.main import main

        events.install()
        try:
            main(command.arguments)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        sys.stdout.flush()
        content = {"events": list(events.seen.items()), "modules": sorted(sys.modules)}
        os.write(os.open(notes / "events.json", os.O_CREAT | os.O_WRONLY), json.dumps(content).encode())
    finally:
        os._exit(code)


def _make_smaller(interrupted: bool) -> None:
    """Makes what a command does smaller than its options can."""
    from hrl_policies.study import engines, outputs
    from kuaifair_env.sb3 import KuaiFairVecEnv

    # Runs of a study in its own process: there every write of a run is an event.
    engines.LocalEngine = lambda count: engines.InProcessEngine()  # type: ignore[assignment, misc, return-value]
    # All figures are written by one function; two are enough.
    outputs._draw_group = lambda folder, group, ending: [  # type: ignore[assignment]
        outputs.draw_results(path := folder / f"results{ending}", [run.record for run in group.runs]) or path
    ]
    if interrupted:
        step, count = KuaiFairVecEnv.step_wait, iter(range(10**9))

        def step_then_stop(env: KuaiFairVecEnv) -> Any:
            if next(count) == _INTERRUPTED_STEP:
                signal.raise_signal(signal.SIGINT)
            return step(env)

        KuaiFairVecEnv.step_wait = step_then_stop  # type: ignore[method-assign]


def _import(modules: Sequence[str]) -> None:
    """Imports what a fork has imported, so that the next ones need not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            if name not in sys.modules and not name.startswith("__"):
                with suppress(Exception):
                    importlib.import_module(name)


def files_of(folder: Path) -> dict[str, Any]:
    """Returns what a command determines of the files of a folder, by name.

    Left out: times, logs, and whatever holds them (a table, the report, checksums of these), the journal of a search,
    which keeps trials that were cut off, pickled settings of models, and locks.
    """
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        content: Any = path.read_bytes()
        if path.name in ("timing.json", "log.txt", "report.html", "trials.jsonl") or "table_4" in path.name:
            content = b""
        elif path.name == ".lock":
            continue
        elif path.name == "model.zip":
            with zipfile.ZipFile(path) as archive:
                content = {name: archive.read(name) for name in archive.namelist() if name.endswith(".pth")}
        elif path.name == "SHA256SUMS":
            content = [line for line in content.split(b"\n") if not re.search(rb"timing.json|log.txt|model.zip", line)]
        elif path.name == "trials.csv":
            content = re.sub(rb",[\d.]+,\n", b",\n", content)
        elif path.suffixes[-2:] == [".gz", ".json"]:
            content = re.sub(rb'"(url|date)": "[^"]*"', b"", content)
        found[name] = content
    return found


@dataclass
class Outcome:
    """What came of the harms to a command.

    Attributes:
        events: Its writes, renamings, ....
        chosen: Of these, the first and the last of each kind, ending and place in the code.
        tried: Of these, those at which harm was done.
        harms: How many of each kind were done.
        refusals: After how many the same command was refused in a line.
        faults: What is not as promised.
    """

    events: int
    chosen: int
    tried: int
    harms: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    faults: list[str] = field(default_factory=list)


def chosen(events: Mapping[Place, tuple[str, ...]]) -> list[Place]:
    """Returns the first and the last event of each kind, ending and place in the code."""
    groups: dict[tuple[str, ...], list[Place]] = {}
    for place, site in events.items():
        groups.setdefault(site, []).append(place)
    return list(dict.fromkeys(place for group in groups.values() for place in (group[0], group[-1])))


def harm_command(command: Command, start: Path, harms: Sequence[str], most: int | None = None) -> Outcome:
    """Does every harm at every chosen event of a command, and compares what the command gives afterwards.

    Args:
        command: The command.
        start: Folder with the files that it finds; scratch folders are made beside it.
        harms: Of :data:`KILLS` and :data:`FULL`.
        most: About how many events, at least one of each kind; None takes all that are chosen.
    """
    peaceful = _copied(start, "peaceful")
    ended = run(command, peaceful)
    _need_end(ended)
    expected = [files_of(peaceful)]
    if command.interrupted:
        # Killed before anything was kept, the command trains anew, and to the end.
        undisturbed = _copied(start, "undisturbed")
        run(command, undisturbed, peaceful=True)
        expected.append(files_of(undisturbed))
    places = chosen(ended.events)
    tried = places if most is None else _some(places, most)
    outcome = Outcome(len(ended.events), len(places), len(tried))
    for place in tried:
        for harm in harms:
            if harm in _HARMS.get(place[0], ("after",)):
                outcome.harms[harm] += 1
                _harm_once(command, start, place, harm, expected, outcome)
    return outcome


def _some(places: Sequence[Place], most: int) -> list[Place]:
    kinds: dict[str, list[Place]] = {}
    for place in places:
        kinds.setdefault(place[0], []).append(place)
    step = max(len(places) // most, 1)
    return [place for group in kinds.values() for place in group[::step]]


def _need_end(ended: Ended) -> None:
    if ended.code not in (0, 130):
        raise RuntimeError(f"a command that nobody harmed ended with {ended.code}:\n{ended.text}")


def _harm_once(
    command: Command, start: Path, place: Place, harm: str, expected: list[dict[str, Any]], outcome: Outcome
) -> None:
    folder = _copied(start, "harmed")
    harmed = run(command, folder, place, harm)
    where = f"{' '.join(command.arguments[:2])}, {harm} {' '.join(map(str, place))}"

    def fault(text: str) -> None:
        outcome.faults.append(f"{where}: {text}")
        print(f"  {where}: {text}", flush=True)

    if harm == FULL:
        lines = harmed.text.rstrip("\n").split("\n")
        if harmed.code != 1 or not re.search(_NAMED, lines[-1]) or "Traceback" in harmed.text:
            fault(f"ended with {harmed.code}: {harmed.text[-300:]!r}")
        left = [path.name for path in folder.rglob("*.tmp")]
        if left:
            fault(f"left {left}")
    elif harmed.code != -signal.SIGKILL:
        fault(f"was not killed but ended with {harmed.code}: {harmed.text[-300:]!r}")
    again = run(command, folder, peaceful=True)
    if (again.code == 1 and "holds an interrupted run" in again.text) or "exists already" in again.text:
        outcome.refusals += 1
    elif again.code != 0:
        fault(f"then ended with {again.code}: {again.text[-300:]!r}")
    files = files_of(folder)
    if files not in expected:
        other = min(expected, key=lambda others: len(_different(files, others)))
        fault(f"other files: {', '.join(_different(files, other))}")
    shutil.rmtree(folder)


def _different(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *two} if one.get(name) != two.get(name))


def _copied(start: Path, name: str) -> Path:
    folder = start.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    # With their times: official files are known by them.
    return Path(shutil.copytree(start, folder))


@contextmanager
def mirror() -> Iterator[str]:
    """Serves an archive with empty files of KuaiRand-Pure's names; gives its address."""
    facts, stream = DATASETS["kuairand"], io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name in facts.files:
            archive.addfile(tarfile.TarInfo(f"KuaiRand-Pure/data/{name}"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(stream.getvalue())))
            self.end_headers()
            self.wfile.write(stream.getvalue())

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def prepared(name: str, scratch: Path, address: str) -> tuple[Command, Path]:
    """Returns a command and a folder with the files that it finds."""
    command, start = COMMANDS[name], scratch / "start"
    shutil.rmtree(start, ignore_errors=True)
    start.mkdir()
    (start / "tiny.yml").write_text(_PLAN, encoding="utf-8")
    if name == "data fetch":
        return Command((*command.arguments, "--base-url", address)), start
    if not command.cold:
        warm = Command(("train", "--method", "random", *_SESSIONS, "--n-users", "10", "--output", "first"))
        _need_end(run(warm, start))
        shutil.rmtree(start / "first")
    for earlier in command.after:
        _need_end(run(earlier, start))
    return command, start


def row(name: str, outcome: Outcome) -> str:
    """Returns a line of the table."""
    harms = outcome.harms
    verdict = "the same bytes" if not outcome.faults else f"{len(outcome.faults)} FAULTS"
    kills = sum(harms[kind] for kind in KILLS)
    counts = (outcome.events, outcome.chosen, outcome.tried, kills, harms[FULL], outcome.refusals)
    return f"| `{name}` | {' | '.join(map(str, counts))} | {verdict} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", action="append", choices=COMMANDS, help="all by default")
    parser.add_argument(
        "--most", type=int, help="about how many events of each command, instead of all that are chosen"
    )
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    rows, faults = [], []
    with tempfile.TemporaryDirectory(prefix="kuaifair faults ä ") as scratch, mirror() as address:
        for name in arguments.command or COMMANDS:
            command, start = prepared(name, Path(scratch).resolve(), address)
            outcome = harm_command(command, start, (*KILLS, FULL), arguments.most)
            rows.append(row(name, outcome))
            faults += outcome.faults
            print(rows[-1], flush=True)
    most = "" if arguments.most is None else f" --most {arguments.most}"
    text = "\n".join(
        [
            "### Commands harmed at their writes, and given again",
            "",
            "| command | events | chosen | tried | kills | full disks | then refused in a line | else |",
            "|---|---:|---:|---:|---:|---:|---:|---|",
            *rows,
            "",
            *(f"- {fault}" for fault in faults),
            *([""] if faults else []),
            _EXPLAINED,
            "",
            f"Made by: `python benchmarks/faults.py{most} --results RESULTS` ({machine()}).",
        ]
    )
    print(text)
    if arguments.results:
        write_text_atomically(arguments.results / "faults.md", text + "\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
