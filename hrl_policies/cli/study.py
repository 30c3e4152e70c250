"""``kuaifair study report``: a store of runs as one HTML file."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from hrl_policies.study.engines import Engine
    from hrl_policies.study.runs import StudyResult
    from hrl_policies.study.spec import PlannedRun, StudySpec
    from hrl_policies.study.store import StoredRun
    from hrl_policies.worlds import WorldPair


def report(
    context: typer.Context,
    store: Annotated[
        Path, typer.Argument(help="Folder of run folders, as a study or `kuaifair train` writes them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading; the store's name by default.")] = None,
) -> None:
    """Write the runs of a store as one HTML file that needs no network: tables, figures, learning curves, provenance.

    Pictures (.svg, .png) in the store and its folder `figures` go into it; NAME.caption.txt beside one is its caption.

    Example: kuaifair study report runs --output report.html
    """
    from hrl_policies.study.outputs import study_tables
    from hrl_policies.study.report import all_runs, failed_runs, stored_figures, write_report

    runs, failures = all_runs(store), failed_runs(store)
    if not runs and not failures:
        raise ValueError(
            f"{store} holds no runs; `kuaifair train --output {store}/NAME` or a study writes some"
        )
    finished = [run for run in runs if run.complete]
    further = study_tables(finished, command=str(context.obj)) if finished else {}
    written = write_report(
        output,
        runs,
        title=title or f"KuaiFair study: {store.resolve().name}",
        command=str(context.obj),
        figures=stored_figures(store),
        further=list(further.values()),
        failures=failures,
    )
    Console().print(
        f"Report: {written} ({len(finished)} finished, {len(runs) - len(finished)} interrupted, "
        f"{len(failures)} failed runs)",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


class TableChoice(str, Enum):
    """Forms of a table."""

    text = "text"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


class FigureChoice(str, Enum):
    """Formats of a figure."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


class AverageChoice(str, Enum):
    """What stands for several training seeds."""

    mean = "mean"
    iqm = "iqm"


class Other(str, Enum):
    """Whose figures may be shown beside ours."""

    paper = "paper"


_Store = Annotated[Path, typer.Argument(help="Folder of run folders.")]
_Worlds = Annotated[
    bool,
    typer.Option(
        "--worlds", help="Make the runs' worlds again, for what needs the data (Table 1; Figs. 2 and 4)."
    ),
]
_DataDir = Annotated[
    Path | None,
    typer.Option(
        help="With --worlds: folder or archive with the official files; else KUAIFAIR_DATA, else the cache."
    ),
]


def tables(
    context: typer.Context,
    store: _Store,
    forms: Annotated[
        list[TableChoice] | None,
        typer.Option(
            "--format", help="Write files in this form; repeat for several. Without, print to the terminal."
        ),
    ] = None,
    compare: Annotated[
        Other | None, typer.Option(help="Show the paper's figures beside ours; they are from another world.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Method that others are compared with (default dsrm-hrl, if it was run)."),
    ] = None,
    average: Annotated[
        AverageChoice, typer.Option(help="Over training seeds: mean, or interquartile mean.")
    ] = AverageChoice.mean,
    worlds: _Worlds = False,
    data_dir: _DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/tables).")
    ] = None,
) -> None:
    """Print or write the paper's Tables 1 to 4, paired differences with Holm's correction, and scores over all worlds.

    Example: kuaifair study tables runs --format latex --compare paper --base dsrm-hrl
    """
    from hrl_policies.study.outputs import study_tables, write_tables

    if output is not None and not forms:
        raise ValueError("--output takes files, and --format says which: text, markdown, latex or csv")
    runs = _finished(store)
    made = _worlds_of(runs, worlds, data_dir)
    command = str(context.obj or f"kuaifair study tables {store}")
    paper = compare is Other.paper
    console = Console(soft_wrap=True, highlight=False)
    if not forms:
        shown = study_tables(
            runs, compare=paper, base=base, average=average.value, worlds=made, command=command
        )
        for table in shown.values():
            table.show(console)
        return
    written = write_tables(
        output or store / "tables",
        runs,
        [form.value for form in forms],
        compare=paper,
        base=base,
        average=average.value,
        worlds=made,
        command=command,
    )
    _tell(console, written)


def figures(
    store: _Store,
    forms: Annotated[
        list[FigureChoice] | None,
        typer.Option("--format", help="Format of the files; repeat for several (default png and svg)."),
    ] = None,
    worlds: _Worlds = False,
    data_dir: _DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/figures).")
    ] = None,
) -> None:
    """Draw the paper's Figs. 3 and 7, the Pareto frontier, performance profiles and bars; with --worlds Figs. 2 and 4.

    Example: kuaifair study figures runs --format pdf
    """
    from hrl_policies.study.outputs import draw_study

    runs = _finished(store)
    chosen = forms or [FigureChoice.png, FigureChoice.svg]
    written = draw_study(
        output or store / "figures",
        runs,
        [form.value for form in chosen],
        worlds=_worlds_of(runs, worlds, data_dir),
    )
    _tell(Console(soft_wrap=True, highlight=False), written)


def _finished(store: Path) -> list[StoredRun]:
    from hrl_policies.study.store import stored_runs

    runs = stored_runs(store)
    if not runs:
        raise ValueError(f"{store} holds no finished run; a run folder has a result.json")
    return runs


def _worlds_of(runs: list[StoredRun], wanted: bool, data_dir: Path | None) -> list[WorldPair]:
    from hrl_policies.study.outputs import worlds_of_runs

    if not wanted and data_dir is not None:
        raise ValueError("--data-dir goes with --worlds")
    return worlds_of_runs(runs, data_dir) if wanted else []


def _tell(console: Console, written: list[Path]) -> None:
    for path in written:
        console.print(str(path), markup=False)


study_app = typer.Typer(
    help="Studies: methods x worlds x horizons x seeds, from one file.", no_args_is_help=True
)

study_app.command()(tables)
study_app.command()(figures)
study_app.command()(report)

SOME_FAILED = 1
"""Exit code where the study ran to its end but not all of its runs did."""


class EngineName(str, Enum):
    """Where runs are done."""

    local = "local"
    ray = "ray"


_Plan = Annotated[str, typer.Argument(help="A YAML file, or a shipped study: paper.")]
_Quick = Annotated[bool, typer.Option("--quick", help="The small form of a shipped study.")]
_Store_cli_study = Annotated[Path, typer.Argument(help="Folder of a study.")]
_Engine = Annotated[
    EngineName, typer.Option(help="local: processes of this machine; ray: a cluster (extra 'ray').")
]
_Workers = Annotated[
    int | None, typer.Option(min=1, help="Runs at once; by default as many as there are cores.")
]
_Address = Annotated[
    str | None, typer.Option(help="Of a running Ray cluster, such as auto; by default one is started here.")
]
_Retry = Annotated[bool, typer.Option("--retry-failed", help="Try again the runs that failed.")]
_DataDir_cli_study = Annotated[
    Path | None,
    typer.Option(
        help="Folder or archive with the official files; else the study's, KUAIFAIR_DATA, or the cache."
    ),
]


@study_app.command()
def plan(
    plan: _Plan, quick: _Quick = False, workers: _Workers = None, data_dir: _DataDir_cli_study = None
) -> None:
    """Check a study, and say what it would run, about how long it would take and how much it would write."""
    from hrl_policies.study.engines import LocalEngine

    console = Console()
    spec, runs = _checked(plan, quick, data_dir)
    _print_plan(console, spec, runs)
    _print_estimate(console, runs, LocalEngine(workers).workers)
    _warn(console, spec, data_dir)


@study_app.command()
def run(
    plan: _Plan,
    quick: _Quick = False,
    store: Annotated[
        Path | None,
        typer.Option("--store", "--output", "-o", help="Folder of the study; studies/NAME by default."),
    ] = None,
    engine: _Engine = EngineName.local,
    workers: _Workers = None,
    address: _Address = None,
    data_dir: _DataDir_cli_study = None,
    retry_failed: _Retry = False,
) -> None:
    """Run a study; what its folder holds already is not run again.

    Example: kuaifair study run paper --quick
    """
    spec, runs = _checked(plan, quick, data_dir)
    command = f"kuaifair study run {shlex.quote(plan)}{' --quick' if quick else ''}"
    folder = store or Path("studies") / spec.name
    _conduct(runs, folder, _engine(engine, workers, address), command, data_dir, retry_failed)


@study_app.command()
def resume(
    store: _Store_cli_study,
    engine: _Engine = EngineName.local,
    workers: _Workers = None,
    address: _Address = None,
    data_dir: _DataDir_cli_study = None,
    retry_failed: _Retry = False,
) -> None:
    """Go on with a study that was stopped, however it was stopped."""
    from hrl_policies.study.folders import read_study_file

    _, command = read_study_file(store)
    spec, runs = _stored(store, data_dir)
    _conduct(runs, store, _engine(engine, workers, address), command, data_dir or spec.data_dir, retry_failed)


@study_app.command()
def status(store: _Store_cli_study) -> None:
    """Say which runs of a study are done, which failed and why, and which are missing."""
    from hrl_policies.study.folders import read_failure, reason_of, state_of

    console = Console()
    spec, runs = _stored(store, None)
    states = {run: state_of(store / run) for run in (str(one.folder) for one in runs)}
    count = Counter(states.values())
    _say(
        console,
        f"{spec.name}: {count['done']} of {len(runs)} runs done, {count['failed']} failed, {count['missing']} missing",
    )
    for name, state in states.items():
        if state == "failed":
            _say(console, f"failed: {name}: {reason_of(read_failure(store / name))}")
    if count["missing"] or count["failed"]:
        retry = " --retry-failed" if count["failed"] else ""
        _say(console, f"Go on with: kuaifair study resume {store}{retry}")


def _checked(plan: str, quick: bool, data_dir: Path | None) -> tuple[StudySpec, list[PlannedRun]]:
    from hrl_policies.study.checks import check_study
    from hrl_policies.study.spec import read_study

    spec, problems = read_study(plan, quick)
    return spec, check_study(spec, problems, data_dir=data_dir, where=plan)


def _stored(store: Path, data_dir: Path | None) -> tuple[StudySpec, list[PlannedRun]]:
    from hrl_policies.study.checks import check_study
    from hrl_policies.study.folders import STUDY, read_study_file
    from hrl_policies.study.spec import parse_study

    content, _ = read_study_file(store)
    spec, problems = parse_study(content)
    return spec, check_study(spec, problems, data_dir=data_dir, where=str(store / STUDY))


def _engine(name: EngineName, workers: int | None, address: str | None) -> Engine:
    from hrl_policies.study.engines import LocalEngine, RayEngine

    if name is EngineName.ray:
        return RayEngine(address, workers)
    if address is not None:
        raise ValueError("--address is that of a Ray cluster; it needs --engine ray")
    return LocalEngine(workers)


def _conduct(
    runs: Sequence[PlannedRun],
    store: Path,
    engine: Engine,
    command: str,
    data_dir: str | Path | None,
    retry_failed: bool,
) -> None:
    from hrl_policies.study.progress import progress_for
    from hrl_policies.study.runs import conduct

    console = Console()
    _warn(console, runs[0].spec, data_dir)
    try:
        with progress_for(console, engine.workers) as progress:
            result = conduct(
                runs,
                store,
                engine,
                progress,
                command=command,
                data_dir=data_dir,
                retry_failed=retry_failed,
            )
    except KeyboardInterrupt:
        _say(console, f"Interrupted. Go on with: kuaifair study resume {store}")
        raise
    _report(console, result, store, command)


def _report(console: Console, result: StudyResult, store: Path, command: str) -> None:
    from hrl_policies.study.folders import reason_of
    from hrl_policies.study.tables import result_tables

    if result.records:
        for table in result_tables(result.records, command):
            table.show(console)
    for path in result.files:
        _say(console, f"Written: {path}")
    if not result.failures:
        return
    for name, traceback in result.failures.items():
        _say(console, f"failed: {name}: {reason_of(traceback)}")
    _say(
        console,
        f"Tracebacks lie in NAME.failed; try again with: kuaifair study resume {store} --retry-failed",
    )
    raise typer.Exit(SOME_FAILED)


def _print_plan(console: Console, spec: StudySpec, runs: Sequence[PlannedRun]) -> None:
    from hrl_policies.study.tables import variant_title

    _say(console, f"{spec.name}: {len(runs)} runs")
    _say(console, f"worlds: {', '.join(spec.worlds)}")
    _say(
        console,
        f"Max Len: {', '.join(map(str, spec.max_lens))}; slates of {spec.slate_size}; leave rule {spec.leave}",
    )
    _say(console, f"evaluated on {spec.users:,} users, {spec.episodes} session(s) each")
    rows: dict[tuple[str, str, str], list[PlannedRun]] = {}
    for run in runs:
        rows.setdefault((run.entry.name, run.purifier, run.variant), []).append(run)
    for row, group in rows.items():
        config = group[0].config()
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(run.seed for run in group))
        steps = f"{config.total_steps:,} steps" if config.total_steps else "does not train"
        _say(console, f"- {variant_title(*row)}: {len(group)} runs, seeds {seeds}, {steps}")


def _print_estimate(console: Console, runs: Sequence[PlannedRun], workers: int) -> None:
    from hrl_policies.study.progress import FACTOR, duration, estimate_study, size

    estimate = estimate_study(runs)
    low, high = (estimate.wall_seconds(workers) * factor for factor in (1 / FACTOR, FACTOR))
    _say(
        console,
        f"Estimate, not a promise: {duration(low)} to {duration(high)} with {workers} worker(s) that have a core "
        f"each, and {size(estimate.bytes)} of disk; making the worlds, once, is not counted.",
    )
    if estimate.guessed:
        _say(console, f"Never measured, taken for the dearest of their kind: {', '.join(estimate.guessed)}.")


def _warn(console: Console, spec: StudySpec, data_dir: str | Path | None) -> None:
    from hrl_policies.study.checks import study_warnings

    for warning in study_warnings(spec, data_dir=data_dir):
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
