"""The ``kuaifair`` command: its groups, how it ends, the lists of what there is, and ``kuaifair data``."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup
from typer.main import get_command

from hrl_policies.cli import BAD_INPUT, FAILED, INTERRUPTED, OptionalEnv, Progress
from hrl_policies.cli.agents import train, tune
from hrl_policies.cli.purifiers import encode, pretrain, probe
from hrl_policies.cli.runs import evaluate, ope, show
from hrl_policies.cli.serve import serve
from hrl_policies.cli.study import study_app
from kuaifair_env.data.cache import CacheKind
from kuaifair_env.data.published import DatasetName
from kuaifair_env.errors import (
    ArtifactError,
    DataError,
    KuaiFairError,
    SettingsError,
    TrainingError,
    lack_of_memory,
)

if TYPE_CHECKING:
    from hrl_policies.zoo import MethodSpec
    from kuaifair_env.data.dataset import InteractionData

TRACEBACK_VARIABLE = "KUAIFAIR_TRACEBACK"

_UNWRITABLE = (errno.EACCES, errno.ENOTDIR, errno.EPERM, errno.EROFS)
# What Python, NumPy and torch say of counts that are beyond them.
_OVERFLOWS = ("Maximum allowed", "array is too big", "too large to convert", "Overflow when unpacking")
_WIDTH = 118
_COLUMNS = ("name", "title", "kind", "acts by", "purifier")
_NAMES = ("name", "title", "family", "reference", "kind", "action_mode", "observation_mode", "purifier", "sees")


class _Commands(TyperGroup):
    """The commands; where Ctrl-C stops one that says nothing of its own, one line says how to go on."""

    def invoke(self, context: Any) -> Any:
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            typer.echo("Interrupted. The same command goes on from what is written, or begins anew.", err=True)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    help="Fair interactive recommendation: environments, agents and the controls they have to beat.",
    epilog="Exit codes: 0 done; 1 a file, a download, data or a run failed; 2 the command line or a file of settings "
    "is wrong; 130 interrupted, by Ctrl-C or SIGTERM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, ope, show, serve, pretrain, probe, encode, tune):
    app.command()(command)
data_app = typer.Typer(help="Download, check, look at and delete data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; a failure gives a message and the exit code that the help names, never a traceback.

    Args:
        arguments: What follows ``kuaifair``; None takes the command line. Set the environment variable
            ``KUAIFAIR_TRACEBACK`` to see where an error comes from.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _interrupted_by_sigterm():
            _command()(args=words, prog_name="kuaifair", obj=f"kuaifair {shlex.join(words)}")
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"error: {_message(error)}", style="red", markup=False, highlight=False
        )
        sys.exit(_exit_code(error))


@lru_cache(maxsize=1)
def _command() -> Any:
    """Returns what Typer makes of the groups above; programs that call :func:`main` often wait for it once."""
    command = get_command(app)
    _join_lines(command)
    return command


def _join_lines(command: Any) -> None:
    """Lets paragraphs of help flow, which Typer breaks where docstrings do."""
    if command.help:
        command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
    for part in getattr(command, "commands", {}).values():
        _join_lines(part)


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM, which schedulers and containers send, end a command as Ctrl-C does: what is done is kept."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        (handler if callable(handler) else signal.default_int_handler)(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _message(error: Exception) -> str:
    """Returns what an error says; one that nobody raised on purpose also has its name."""
    shortage = lack_of_memory(error)
    if shortage is not None:
        return f"not enough memory: {str(shortage) or 'some of it could not be had'}"
    if _too_large(error):
        return f"a number is too large for this machine: {error}"
    if isinstance(error, (KuaiFairError, ValueError, TypeError, OSError)):
        return f"{error}{_remedy(error)}"
    return f"{type(error).__name__}: {error}; {TRACEBACK_VARIABLE}=1 shows where, for a report"


def _too_large(error: Exception) -> bool:
    """Says whether an error is of NumPy or torch over a count or a seed that no machine can have."""
    return isinstance(error, (OverflowError, RuntimeError, ValueError)) and any(
        words in str(error) for words in _OVERFLOWS
    )


def _remedy(error: Exception) -> str:
    """Returns what to do where the folder of the cache cannot be written; it is empty for all else."""
    from kuaifair_env.data.cache import CACHE_VARIABLE, cache_dir

    cause = error if isinstance(error, OSError) else error.__cause__
    if not isinstance(cause, OSError) or cause.errno not in _UNWRITABLE or cause.filename is None:
        return ""
    place, cache = Path(os.fsdecode(cause.filename)), cache_dir()
    # What is missing is made from the top.
    of_cache = place.is_relative_to(cache) or (cache.is_relative_to(place) and place.is_absolute())
    return f"; set {CACHE_VARIABLE} to a folder that can be written" if of_cache else ""


def _exit_code(error: Exception) -> int:
    """Returns 2 for what the command line or a file of settings says, 1 for files, data, downloads and faults."""
    if isinstance(error, ArtifactError):
        return BAD_INPUT if isinstance(error, SettingsError) else FAILED
    if isinstance(error, TrainingError) or (isinstance(error, DataError) and error.file is not None):
        return FAILED
    return BAD_INPUT if isinstance(error, (KuaiFairError, ValueError, TypeError)) or _too_large(error) else FAILED


def _show_version(wanted: bool) -> None:
    if wanted:
        from kuaifair_env import __version__

        typer.echo(f"kuaifair {__version__}")
        raise typer.Exit


@app.callback()
def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fair interactive recommendation: environments, agents and the controls they have to beat."""


@app.command()
def demo(
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 11,
    steps: Annotated[
        int | None, typer.Option(min=64, help="Training steps for each agent, instead of the demo's own.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for runs and figure; without, only the figure is kept."),
    ] = None,
    progress: Progress = True,
) -> None:
    """The main job in miniature: agents and controls on the toy world, in two minutes, without a download."""
    from hrl_policies.cli.demo import run_demo
    from hrl_policies.study import single_threaded

    single_threaded()
    run_demo(Console(), seed=seed, steps=steps, output=output, progress=progress)


@app.command()
def envs(
    settings: Annotated[bool, typer.Option("--settings", help="List the settings of gym.make instead.")] = False,
) -> None:
    """List the environments, or all their settings."""
    if settings:
        _show_settings()
        return
    from kuaifair_env import ENVIRONMENTS

    table = Table("id", "what stands behind it")
    for env_id, origin in ENVIRONMENTS.items():
        table.add_row(env_id, origin.description)
    Console().print(table)


def _show_settings() -> None:
    from kuaifair_env.settings import SETTINGS

    table = Table("setting", "of", "values", "default", "meaning")
    for setting in SETTINGS:
        table.add_row(setting.name, setting.part, setting.values, repr(setting.default), setting.meaning)
    Console(markup=False).print(table)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Show all of one method.")] = None,
    env: OptionalEnv = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods by family: what they are, how they act, where they come from and what they may see.

    With a name, all of one method; with --env its settings there, if they differ.

    Example: kuaifair methods a2c --env KuaiFair-Toy-v0
    """
    from hrl_policies.zoo import all_methods, method
    from kuaifair_env.registration import need_environment

    if env is not None:
        need_environment(env)
    if as_json:
        described = [_described(spec, env or "") for spec in ([method(name)] if name else all_methods().values())]
        typer.echo(json.dumps(described[0] if name else described, indent=1))
        return
    lines = _listing(all_methods().values()) if name is None else _page(method(name), env or "")
    typer.echo("\n".join(lines))


def _listing(specs: Iterable[MethodSpec]) -> list[str]:
    families: defaultdict[str, list[tuple[MethodSpec, tuple[str, ...]]]] = defaultdict(list)
    for spec in specs:
        kind = f"{spec.kind}, privileged" if spec.privileged else spec.kind
        families[spec.family].append(
            (spec, (f"  {spec.name}", spec.title, kind, spec.action_mode, spec.purifier or "-"))
        )
    rows = [_COLUMNS, *(cells for members in families.values() for _, cells in members)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(_COLUMNS, widths)]
    for family, members in families.items():
        lines += ["", family]
        for spec, cells in members:
            lines.append(_aligned(cells, widths))
            lines += _wrapped("      from: ", spec.reference) + _wrapped("      sees: ", spec.sees)
    return [*lines, "", "privileged: knows the test world's truth. All of one method: kuaifair methods NAME"]


def _page(spec: MethodSpec, env: str) -> list[str]:
    """Returns all of one method, with its settings in an environment (empty for those of all without their own)."""
    described = _described(spec, env)
    facts = {name.replace("_", " "): str(described[name]) for name in _NAMES if described[name]}
    if spec.privileged:
        facts["privileged"] = "knows the test world's truth"
    if not spec.learns:
        return _block(facts)
    settings = described["settings"]
    search = settings.pop("search")
    own = described["worlds_with_settings"]
    lines = _block(facts)
    for title, group in (
        (
            f"trained with, in {env}" if env in own else "trained with",
            {key: value for key, value in settings.items() if not isinstance(value, Mapping)},
        ),
        ("hyperparameters", dict(_flat(settings["hyperparameters"]))),
        ("search space", {key: _space(line) for key, line in search.items()}),
    ):
        lines += ["", title, *(_block(group) if group else ["  none: kuaifair tune cannot search"])]
    if own:
        lines += ["", f"Settings of their own (--env shows them): {', '.join(own)}"]
    return lines


def _described(spec: MethodSpec, env: str) -> dict[str, Any]:
    from hrl_policies.zoo import load_settings, worlds_with_settings

    described = {name: getattr(spec, name) for name in _NAMES} | {"privileged": spec.privileged}
    if not spec.learns:
        return described
    return described | {
        "settings": load_settings(spec.name, env).as_dict(),
        "worlds_with_settings": worlds_with_settings(spec.name),
    }


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _block(facts: Mapping[str, Any]) -> list[str]:
    width = max(len(name) for name in facts)
    return [line for name, value in facts.items() for line in _wrapped(f"  {name:<{width}}  ", str(value))]


def _flat(group: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields nested settings under dotted names, as ``--set`` takes them."""
    for name, value in group.items():
        yield from _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]


def _space(line: Mapping[str, Any]) -> str:
    kind, values = next(iter(line.items()))
    if kind == "choice":
        return "one of " + ", ".join(str(value) for value in values)
    low, high = values
    return f"{low} to {high}, {'whole numbers' if kind == 'integer' else kind}"


@data_app.command()
def fetch(
    name: Annotated[DatasetName, typer.Argument(help="Data set.")],
    folder: Annotated[Path | None, typer.Option(help="Where the archive goes; the cache by default.")] = None,
    base_url: Annotated[str | None, typer.Option(help="A mirror's folder instead of the publisher's.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected SHA-256, instead of the publisher's MD5.")] = None,
    check_sum: Annotated[
        bool, typer.Option("--checksum/--no-checksum", help="Whether the checksum must be the known one.")
    ] = True,
    retries: Annotated[int, typer.Option(min=0, help="How often a failed download is tried again.")] = 3,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds without an answer that count as failed.")] = 60.0,
    progress: Progress = True,
) -> None:
    """Download an official archive, show its licence, and check it."""
    from kuaifair_env.data.official import fetch as download

    download(
        name,
        folder,
        base_url=base_url,
        sha256=sha256,
        check_sum=check_sum,
        retries=retries,
        timeout=timeout,
        progress=progress,
        announce=typer.echo,
    )


@data_app.command()
def check(
    path: Annotated[Path, typer.Argument(help="An official archive, or the folder that it unpacks to.")],
    name: Annotated[DatasetName | None, typer.Option(help="Which it is, when the path does not tell.")] = None,
) -> None:
    """Read an archive or folder as training would, and report what is in it."""
    from kuaifair_env.data.kuairand import read_kuairand
    from kuaifair_env.data.kuairec import read_kuairec
    from kuaifair_env.data.sources import recognise

    facts = recognise(path, name)
    with Console(stderr=True).status(f"reading {escape(str(path))}"):
        data = read_kuairec(path) if facts.name == "kuairec" else read_kuairand(path, version=facts.name)
    Console().print(_report_table(data))


@data_app.command()
def info(data_dir: Annotated[Path | None, typer.Option(help="A folder to look in.")] = None) -> None:
    """Say which data sets are found where, what the cache holds, and the licences."""
    from kuaifair_env.data.cache import cache_dir
    from kuaifair_env.data.published import DATASETS
    from kuaifair_env.data.sources import find_source
    from kuaifair_env.errors import DataError

    sources = Table("data set", "found", "licence", title="official data")
    for facts in DATASETS.values():
        try:
            path = find_source(facts.name, data_dir)
            found = f"not found; kuaifair data fetch {facts.name}" if path is None else str(path)
        except DataError as error:
            found = str(error)
        sources.add_row(facts.title, escape(found), facts.licence)
    entries = _cache_table()
    console = Console()
    console.print(sources)
    console.print(f"cache: {escape(str(cache_dir()))}", soft_wrap=True)
    if entries.row_count:
        console.print(entries)
    for facts in DATASETS.values():
        console.print(f"cite {facts.title}: {facts.citation}", soft_wrap=True)


@data_app.command()
def clean(
    only: Annotated[
        CacheKind | None, typer.Option(help="Delete this kind alone; all but downloads by default.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """List what the cache holds and delete it; everything is made again when it is needed."""
    from kuaifair_env.data.cache import cache_dir, cache_entries, remove_entries

    entries = cache_entries(kinds=["data", "responses", "embeddings", "purifiers"] if only is None else [only])
    if not entries:
        typer.echo(f"nothing to delete in {cache_dir()}")
        return
    table = Table("kind", "entry", "MB", title=escape(str(cache_dir())))
    table.columns[2].justify = "right"
    for entry in entries:
        table.add_row(entry.kind, escape(entry.path.name), f"{entry.size / 1e6:,.1f}")
    Console().print(table)
    total = f"{sum(entry.size for entry in entries) / 1e6:,.1f} MB"
    if not yes:
        typer.confirm(f"Delete {len(entries)} entries, {total}?", abort=True)
    remove_entries(entries)
    typer.echo(f"deleted {len(entries)} entries, {total}")


def _cache_table() -> Table:
    from kuaifair_env.data.cache import cached_entries, read_manifest
    from kuaifair_env.files import folder_size

    table = Table("entry", "data set", "origin", "hash", "MB", title="cached data sets")
    for entry in cached_entries():
        manifest = read_manifest(entry)
        provenance = manifest["provenance"]
        size = f"{folder_size(entry) / 1e6:,.1f}"
        cells = (entry.name, provenance["name"], provenance["origin"], manifest["data_hash"], size)
        table.add_row(*(escape(str(cell)) for cell in cells))
    return table


def _report_table(data: InteractionData) -> Table:
    table = Table("part", "what", "count", title=escape(f"{data.provenance.name} ({data.provenance.origin})"))
    table.columns[2].justify = "right"
    for name, count in _flat(data.report):
        part, _, what = name.rpartition(".")
        text = f"{count:,}" if isinstance(count, int) else escape(str(count))
        table.add_row(part or "data", what.replace("_", " "), text)
    for which, log in (("train", data.train), ("test", data.test)):
        table.add_row(which, "click rate", f"{log.clicks.mean():.4f}")
    for file, digest in data.provenance.files.items():
        table.add_row("file", escape(file), f"SHA-256 {digest[:16]}...")
    table.add_row("data", "hash", data.data_hash)
    table.caption = escape(data.provenance.description)
    return table
