"""``kuaifair study``: plan, run and resume a study; tables, figures and a report of what it left."""

from __future__ import annotations

import secrets
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from hrl_policies.cli import FAILED, INTERRUPTED, DataDir

if TYPE_CHECKING:
    from hrl_policies.study.config import RunConfig
    from hrl_policies.study.engines import Engine
    from hrl_policies.study.spec import StudySpec
    from hrl_policies.study.store import StoredRun
    from hrl_policies.worlds import WorldPair


# Typer takes a list of enum values, but no list of literals.
class TableForm(str, Enum):
    """Forms of a table."""

    text = "text"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


class FigureForm(str, Enum):
    """Formats of a figure."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


_MANY_RUNS = 500

study_app = typer.Typer(
    help="Plan, run and resume studies: methods x worlds x horizons x seeds, from one YAML file.", no_args_is_help=True
)

_Plan = Annotated[str, typer.Argument(help="File of a study, or the name of a shipped one, such as paper.")]
_Quick = Annotated[bool, typer.Option("--quick", help="The quick form of a shipped study.")]
_Study = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a study.")]
_Store = Annotated[Path, typer.Argument(help="Folder of run folders, as a study or `kuaifair train` writes them.")]
_EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="local: processes of this machine; ray: a cluster (extra 'ray')."),
]
_Workers = Annotated[int | None, typer.Option(min=1, help="Runs at once; by default as many as there are cores.")]
_Address = Annotated[
    str | None, typer.Option(help="Of a running Ray cluster, such as auto; by default one is started here.")
]
_Retry = Annotated[bool, typer.Option("--retry-failed", help="Try again the runs that failed.")]
_Worlds = Annotated[
    bool,
    typer.Option("--worlds", help="Make the runs' worlds again, for what needs the data (Table 1; Figs. 2 and 4)."),
]


@study_app.command()
def plan(plan: _Plan, quick: _Quick = False, workers: _Workers = None, data_dir: DataDir = None) -> None:
    """Check a study, and say what it would run, about how long it would take and how much it would write."""
    from hrl_policies.study.engines import LocalEngine

    spec, runs = _read_plan(plan, quick, data_dir)
    typer.echo("\n".join(_plan_lines(spec, runs) + _estimate_lines(runs, LocalEngine(workers).workers)))
    _warn(spec, data_dir)


@study_app.command()
def run(
    plan: _Plan,
    quick: _Quick = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the study; studies/NAME by default.")
    ] = None,
    engine: _EngineName = "local",
    workers: _Workers = None,
    address: _Address = None,
    data_dir: DataDir = None,
    retry_failed: _Retry = False,
) -> None:
    """Run a study; what its folder holds already is not run again.

    Example: kuaifair study run paper --quick
    """
    spec, runs = _read_plan(plan, quick, data_dir)
    command = f"kuaifair study run {shlex.quote(plan)}{' --quick' if quick else ''}"
    store = output or Path("studies") / spec.name
    _run_all(spec, runs, store, _make_engine(engine, workers, address), command, data_dir, retry_failed)


@study_app.command()
def resume(
    store: _Study,
    engine: _EngineName = "local",
    workers: _Workers = None,
    address: _Address = None,
    data_dir: DataDir = None,
    retry_failed: _Retry = False,
) -> None:
    """Go on with a study that was stopped, however it was stopped."""
    spec, runs, command = _read_store(store, data_dir)
    _run_all(spec, runs, store, _make_engine(engine, workers, address), command, data_dir, retry_failed)


@study_app.command()
def status(store: _Study) -> None:
    """Say which runs of a study are done, which failed and why, and which are missing."""
    from hrl_policies.study.config import run_folder
    from hrl_policies.study.store import read_failure, reason_of, state_of

    spec, runs, _ = _read_store(store, None)
    states = {run: state_of(store / run) for run in (str(run_folder(planned)) for planned in runs)}
    count = Counter(states.values())
    typer.echo(
        f"{spec.name}: {count['done']} of {len(runs)} runs done, {count['failed']} failed, {count['missing']} missing"
    )
    for name, state in states.items():
        if state == "failed":
            typer.echo(f"failed: {name}: {reason_of(read_failure(store / name))}")
    if count["missing"] or count["failed"]:
        retry = " --retry-failed" if count["failed"] else ""
        typer.echo(f"Go on with: kuaifair study resume {shlex.quote(str(store))}{retry}")


@study_app.command()
def tables(
    context: typer.Context,
    store: _Store,
    formats: Annotated[
        list[TableForm] | None,
        typer.Option("--format", help="Write files in this form; repeat for several. Without, print to the terminal."),
    ] = None,
    compare: Annotated[
        Literal["paper"] | None, typer.Option(help="Show the paper's figures beside ours; they are from another world.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Method that others are compared with (default dsrm-hrl, if it was run).")
    ] = None,
    average: Annotated[
        Literal["mean", "iqm"], typer.Option(help="Over training seeds: mean, or interquartile mean.")
    ] = "mean",
    worlds: _Worlds = False,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/tables).")
    ] = None,
) -> None:
    """Print or write the paper's Tables 1 to 4, differences with Holm's correction, and scores over all worlds.

    Example: kuaifair study tables runs --format latex --compare paper --base dsrm-hrl
    """
    from hrl_policies.study.outputs import study_tables, write_tables

    if output is not None and not formats:
        raise ValueError("--output takes files, and --format says which: text, markdown, latex or csv")
    runs = _finished_runs(store)
    study = study_tables(
        runs,
        compare=compare == "paper",
        base=base,
        average=average,
        worlds=_worlds_of(runs, worlds, data_dir),
        command=str(context.obj),
    )
    if not formats:
        for table in study.values():
            table.show(Console(soft_wrap=True, highlight=False))
        return
    for path in write_tables(output or store / "tables", study, [form.value for form in formats]):
        typer.echo(f"Written: {path}")


@study_app.command()
def figures(
    store: _Store,
    formats: Annotated[
        list[FigureForm] | None,
        typer.Option("--format", help="Format of the files; repeat for several (default png and svg)."),
    ] = None,
    worlds: _Worlds = False,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the files (default STORE/figures).")
    ] = None,
) -> None:
    """Draw the paper's Figs. 3 and 7, the Pareto frontier, performance profiles and bars; with --worlds Figs. 2 and 4.

    Example: kuaifair study figures runs --format pdf
    """
    from hrl_policies.study.outputs import draw_study

    runs = _finished_runs(store)
    pairs = _worlds_of(runs, worlds, data_dir)
    folder, chosen = output or store / "figures", formats or [FigureForm.png, FigureForm.svg]
    for path in draw_study(folder, runs, [form.value for form in chosen], worlds=pairs):
        typer.echo(f"Written: {path}")


@study_app.command()
def report(
    context: typer.Context,
    store: _Store,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading; the store's name by default.")] = None,
) -> None:
    """Write the runs of a store as one HTML file that needs no network: tables, figures, learning curves, provenance.

    Pictures (.svg, .png) in the store and its folder `figures` go into it; NAME.caption.txt beside one is its caption.

    Example: kuaifair study report runs --output report.html
    """
    from hrl_policies.study.outputs import study_tables
    from hrl_policies.study.report import stored_figures, write_report
    from hrl_policies.study.store import all_runs, failed_runs

    runs, failures = all_runs(store), failed_runs(store)
    if not runs and not failures:
        raise ValueError(f"{store} holds no runs; `kuaifair train --output {store}/NAME` or a study writes some")
    finished = [run for run in runs if run.complete]
    command = str(context.obj)
    further = study_tables(finished, command=command).values() if finished else ()
    written = write_report(
        output,
        runs,
        title=title or f"KuaiFair study: {store.resolve().name}",
        command=command,
        figures=stored_figures(store),
        further=list(further),
        failures=failures,
    )
    typer.echo(
        f"Report: {written} ({len(finished)} finished, {len(runs) - len(finished)} interrupted, "
        f"{len(failures)} failed runs)"
    )


@study_app.command()
def verify(
    store: _Store,
    sample: Annotated[int, typer.Option(min=1, help="How many runs to make again, drawn at random.")] = 3,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the draw; by default another each time.")] = None,
    data_dir: DataDir = None,
    submission: Annotated[
        Path | None, typer.Option(help="A file of `study submit`: check first that it is what the store holds.")
    ] = None,
) -> None:
    """Make some runs of a store again, and say whether they come out.

    With the same versions on the same platform they have to agree to the byte. With others R_cum has to lie in the 95 %
    interval of one more training seed, or of paired sessions where the store has fewer than three seeds.

    Example: kuaifair study verify studies/paper --sample 3
    """
    from hrl_policies.study import single_threaded
    from hrl_policies.study.serving import SUMMARY
    from hrl_policies.study.submission import check_submission, read_submission
    from hrl_policies.study.verification import verify_runs

    if submission is not None:
        check_submission(read_submission(submission), store)
        typer.echo(f"{submission} is what {store} holds")
    if (store / SUMMARY).exists():
        typer.echo(f"To make a service again, run the command in {store / SUMMARY}")
        return
    runs = _finished_runs(store)
    single_threaded()
    number = secrets.randbelow(2**31) if seed is None else seed
    typer.echo(f"{min(sample, len(runs))} of {len(runs)} runs, drawn with --seed {number}")
    differ = 0
    for verification in verify_runs(runs, sample, number, data_dir):
        typer.echo(str(verification))
        differ += not verification.agrees
    if differ:
        raise typer.Exit(FAILED)


@study_app.command()
def submit(
    store: _Store,
    methods: Annotated[list[str], typer.Option("--method", help="Method to submit; repeat for several.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    link: Annotated[str, typer.Option(help="https address of the code and of this folder.")] = "",
) -> None:
    """Write the results of methods as one file for the leaderboard: of a study's folder, or of a service's.

    Example: kuaifair study submit studies/mine --method my-method --method quota-greedy --output my-method.json
    """
    from hrl_policies.study.submission import submission_of, write_submission

    submission = submission_of(store, methods, link)
    write_submission(output, submission)
    typer.echo(f"Written: {output} ({len(submission.results)} results)")


def _read_plan(plan: str, quick: bool, data_dir: Path | None) -> tuple[StudySpec, list[RunConfig]]:
    from hrl_policies.study.checks import check_study
    from hrl_policies.study.spec import max_runs, read_study

    spec, problems = read_study(plan, quick)
    if max_runs(spec) > _MANY_RUNS:
        typer.echo(f"checking the settings of up to {max_runs(spec):,} runs", err=True)
    return spec, check_study(spec, problems, data_dir=data_dir, where=plan)


def _read_store(store: Path, data_dir: Path | None) -> tuple[StudySpec, list[RunConfig], str]:
    """Returns a stored study, its runs and the command that made it."""
    from hrl_policies.study.checks import check_study
    from hrl_policies.study.spec import STUDY, parse_study, read_study_file

    content, command = read_study_file(store)
    spec, problems = parse_study(content)
    return spec, check_study(spec, problems, data_dir=data_dir, where=str(store / STUDY)), command


def _make_engine(name: str, workers: int | None, address: str | None) -> Engine:
    from hrl_policies.study.engines import LocalEngine, RayEngine

    if name == "ray":
        return RayEngine(address, workers)
    if address is not None:
        raise ValueError("--address is that of a Ray cluster; it needs --engine ray")
    return LocalEngine(workers)


def _run_all(
    spec: StudySpec,
    runs: Sequence[RunConfig],
    store: Path,
    engine: Engine,
    command: str,
    data_dir: str | Path | None,
    retry_failed: bool,
) -> None:
    from hrl_policies.study.outputs import write_outputs
    from hrl_policies.study.progress import progress_for
    from hrl_policies.study.runs import run_study
    from hrl_policies.study.spec import write_study
    from hrl_policies.study.tables import result_tables

    _warn(spec, data_dir)
    command = write_study(store, spec, command)
    try:
        with progress_for(Console(), engine.workers) as progress:
            result = run_study(
                runs,
                store,
                engine=engine,
                callback=progress,
                data_dir=data_dir or spec.data_dir,
                retry_failed=retry_failed,
            )
    except KeyboardInterrupt:
        typer.echo(f"Interrupted. Go on with: kuaifair study resume {shlex.quote(str(store))}")
        raise typer.Exit(INTERRUPTED) from None
    files = write_outputs(store, result.records, result.reasons, command)
    if result.records:
        for table in result_tables(result.records, command):
            table.show(Console())
    for path in files:
        typer.echo(f"Written: {path}")
    for name, reason in result.reasons.items():
        typer.echo(f"failed: {name}: {reason}")
    if result.failures:
        again = f"kuaifair study resume {shlex.quote(str(store))} --retry-failed"
        typer.echo(f"Tracebacks are in NAME.failed; try again with: {again}")
        raise typer.Exit(FAILED)


def _plan_lines(spec: StudySpec, runs: Sequence[RunConfig]) -> list[str]:
    from hrl_policies.study.labels import Variant
    from kuaifair_env.abandonment import leave_rule, rule_text
    from kuaifair_env.batch import SessionConfig

    rows: defaultdict[Variant, list[RunConfig]] = defaultdict(list)
    for planned in runs:
        rows[Variant.of_config(planned)].append(planned)
    sizes = sorted({planned.session.items_per_slate for planned in runs})
    lines = [
        f"{spec.name}: {len(runs)} runs",
        f"worlds: {', '.join(spec.worlds)}",
        f"Max Len: {', '.join(map(str, spec.max_lens))}; slates of {' or '.join(map(str, sizes))}; "
        f"leave rule {rule_text(leave_rule(SessionConfig.of_settings(spec.session.given()).leave))}",
        f"evaluated on up to {runs[0].user_count:,} users, {spec.episodes_per_user} session(s) each",
    ]
    for variant, group in rows.items():
        config = group[0]
        seeds = ", ".join(str(seed) for seed in dict.fromkeys(planned.seed for planned in group))
        steps = f"{config.total_steps:,} steps" if config.total_steps else "does not train"
        lines.append(f"- {variant.title}: {len(group)} runs, seeds {seeds}, {steps}")
    return lines


def _estimate_lines(runs: Sequence[RunConfig], workers: int) -> list[str]:
    from hrl_policies.study.progress import FACTOR, available_memory, duration, estimate_study, size

    estimate = estimate_study(runs)
    low, high = (estimate.wall_seconds(workers) * factor for factor in (1 / FACTOR, FACTOR))
    lines = [
        f"Estimate, not a promise: {duration(low)} to {duration(high)} with {workers} worker(s) that have a core "
        f"each, and {size(estimate.bytes)} of disk; making the worlds, once, is not counted."
    ]
    at_once, left = min(workers, len(runs)), available_memory()
    needed = at_once * estimate.memory
    lines.append(
        f"Memory: about {size(estimate.memory)} for each of {at_once} worker(s), with the largest replay buffer and a "
        f"world of the size of KuaiRand-Pure's{'' if left is None else f'; {size(left)} are left here'}."
    )
    if left is not None and needed > left:
        lines.append(f"That is not enough for {size(needed)}: take fewer workers, or a smaller buffer_size.")
    if estimate.guessed:
        lines.append(f"Never measured, taken for the median of their kind: {', '.join(estimate.guessed)}.")
    return lines


def _warn(spec: StudySpec, data_dir: str | Path | None) -> None:
    from hrl_policies.study.checks import study_warnings

    for warning in study_warnings(spec, data_dir=data_dir):
        typer.secho(f"warning: {warning}", fg="yellow")


def _finished_runs(store: Path) -> list[StoredRun]:
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
