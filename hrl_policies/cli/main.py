"""The ``kuaifair`` command."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hrl_policies.cli.data import data_app
from hrl_policies.cli.methods import methods
from hrl_policies.cli.purifiers import encode, pretrain, probe
from hrl_policies.cli.study import study_app
from hrl_policies.cli.tuning import tune
from kuaifair_env.errors import KuaiFairError

if TYPE_CHECKING:
    from hrl_policies.study import RunConfig, RunResult, StoredRun
    from kuaifair_env.evaluation import EvaluationResult
    from kuaifair_env.registration import WorldSettings

BAD_INPUT = 2
INTERRUPTED = 130
TRACEBACK_VARIABLE = "KUAIFAIR_TRACEBACK"

app = typer.Typer(
    help="Fair interactive recommendation: environments, agents and the controls they have to beat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")
app.command()(pretrain)
app.command()(probe)
app.command()(encode)
app.command()(methods)
app.command()(tune)


class Source(str, Enum):
    """Where data comes from."""

    auto = "auto"
    real = "real"
    twin = "twin"


class Response(str, Enum):
    """Which model of users stands behind a world."""

    auto = "auto"
    observed = "observed"
    factorised = "factorised"
    sequential = "sequential"


class InitialHistory(str, Enum):
    """What users have seen before a session."""

    log = "log"
    empty = "empty"


class Repeats(str, Enum):
    """Whether an item may be shown twice in a session."""

    allow = "allow"
    forbid = "forbid"


_Method = Annotated[
    str | None, typer.Option("--method", "-m", help="Name of a method; see `kuaifair methods`.")
]
_Env = Annotated[str | None, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")]
_DataDir = Annotated[
    Path | None,
    typer.Option(help="Folder or archive with the official files; else KUAIFAIR_DATA, else the cache."),
]
_Users = Annotated[
    int | None, typer.Option(min=1, help="Held-out users to evaluate on (default 1000, or all).")
]
_Episodes = Annotated[int | None, typer.Option(min=1, help="Sessions of each user (default 1).")]
_Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; bad input gives a message and exit code 2, never a traceback.

    Args:
        arguments: What follows ``kuaifair``; None takes the command line. Set the environment variable
            ``KUAIFAIR_TRACEBACK`` to see where an error comes from.
    """
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        app(args=given, prog_name="kuaifair", obj=f"kuaifair {shlex.join(given)}")
    except (KuaiFairError, ValueError, TypeError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        Console(stderr=True, soft_wrap=True).print(
            f"error: {error}", style="red", markup=False, highlight=False
        )
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(INTERRUPTED)


def _show_version(wanted: bool) -> None:
    if wanted:
        from kuaifair_env import __version__

        typer.echo(f"kuaifair {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Fair interactive recommendation: environments, agents and the controls they have to beat."""


@app.command()
def train(
    context: typer.Context,
    method: _Method = None,
    env: _Env = None,
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 11,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps over all sessions, instead of the method's own.")
    ] = None,
    n_envs: Annotated[int | None, typer.Option(min=1, help="Concurrent training sessions.")] = None,
    max_len: Annotated[int, typer.Option(min=1, help="Max Len: the patience that a user starts with.")] = 30,
    slate_size: Annotated[int, typer.Option(min=1, help="Items per slate.")] = 10,
    leave: Annotated[
        str, typer.Option(help="Leave rule: temper, strict, popular_only, category, ...")
    ] = "temper",
    initial_history: Annotated[
        InitialHistory, typer.Option(help="Start from the log or cold.")
    ] = InitialHistory.log,
    repeats: Annotated[
        Repeats, typer.Option(help="May an item be shown twice in a session?")
    ] = Repeats.allow,
    source: Annotated[
        Source, typer.Option(help="real forbids the twin, twin forbids real files.")
    ] = Source.auto,
    response: Annotated[Response, typer.Option(help="Model of users.")] = Response.auto,
    taste: Annotated[
        str | None, typer.Option(help="Twins: 'measured', 'strong', or a standard deviation in logits.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Hyperparameter as name=value; repeat for several.")
    ] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option("--settings", help="Settings file instead of the shipped one, such as tune's best.yml."),
    ] = None,
    users: _Users = None,
    episodes: _Episodes = None,
    purifier: Annotated[
        Path | None,
        typer.Option(help="Purify the observed states: a file that `kuaifair pretrain` wrote."),
    ] = None,
    item_term: Annotated[
        str | None,
        typer.Option(
            help="Give agents and controls an estimate of each item's worth: log, ips, features or unbiased."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder to write.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run: its folder, which ends in .partial.")
    ] = None,
    data_dir: _DataDir = None,
    progress: _Progress = True,
) -> None:
    """Train a method in the training world, evaluate it in the test world, and write a run folder.

    Ctrl-C stops cleanly and keeps what was learned; --resume goes on. Methods that learn on purified states (dsrm-hrl)
    pretrain their purifier on first use, unless --purifier names one.

    Example: kuaifair train --method a2c --env KuaiFair-Toy-v0 --seed 11
    """
    from hrl_policies import study, zoo
    from hrl_policies.study.runner import open_worlds
    from hrl_policies.zoo import parse_overrides, read_settings
    from kuaifair_env.splits import EVALUATION_USERS

    study.single_threaded()
    if resume is not None:
        if any(given is not None for given in (method, env, output, purifier, settings_file)):
            raise ValueError(
                "--resume takes method, environment, purifier, settings and output from the run; leave them out"
            )
        _report(study.resume(resume, data_dir=data_dir, progress=progress), str(context.obj))
        return
    if method is None or env is None:
        raise ValueError("give --method and --env (see `kuaifair methods` and `kuaifair envs`), or --resume")
    world_settings = dict(_world_settings(source, response, taste))
    worlds = None
    mode = zoo.method(method).purifier
    if mode and purifier is None:
        from hrl_policies.worlds import cached_purifier

        worlds = open_worlds(env, world_settings, item_term or "", data_dir)
        purifier = cached_purifier(worlds.train, mode, progress=progress)
    config = study.plan_run(
        method,
        env,
        seed=seed,
        session=_session(max_len, slate_size, leave, initial_history, repeats),
        total_steps=steps,
        n_envs=n_envs,
        overrides=parse_overrides(settings or []),
        world_settings=world_settings,
        users=EVALUATION_USERS if users is None else users,
        episodes_per_user=1 if episodes is None else episodes,
        purifier=None if purifier is None else study.PurifierIdentity.of_file(purifier),
        item_term=item_term or "",
        settings=None if settings_file is None else read_settings(settings_file, env),
    )
    folder = output or Path("runs") / study.cell_folder(config)
    _report(
        study.train(config, worlds, purifier=purifier, output=folder, data_dir=data_dir, progress=progress),
        str(context.obj),
    )


@app.command()
def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    users: _Users = None,
    episodes: _Episodes = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sessions' randomness, instead of the run's.")
    ] = None,
    ranking: Annotated[bool, typer.Option(help="Measure R-NDCG by true expected feedback too.")] = False,
    data_dir: _DataDir = None,
    progress: _Progress = True,
) -> None:
    """Evaluate the model of a run again, and say whether the stored result comes out.

    With --users, --episodes or --seed it is evaluated on other sessions instead.
    """
    from hrl_policies import study
    from hrl_policies.study.runner import worlds_of

    study.single_threaded()
    stored = study.load_run(run)
    if not stored.complete:
        raise ValueError(f"{run} was interrupted; go on with: kuaifair train --resume {run}")
    worlds = worlds_of(stored.config, None, data_dir)
    given = {"users": users, "episodes_per_user": episodes, "evaluation_seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = replace(stored.config, **changes)
    result = study.evaluate_run(
        config,
        study.load_policy(stored, worlds),
        worlds,
        study.purifying_of(stored),
        ranking=ranking,
        progress=progress,
    )
    _print_table([(config, result)], str(context.obj))
    if not changes:
        _compare(stored, result)


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
    progress: _Progress = True,
) -> None:
    """The main job in miniature: agents and all controls on the toy world, in minutes, without a download."""
    from hrl_policies.cli.demo import run_demo
    from hrl_policies.study import single_threaded

    single_threaded()
    run_demo(Console(), seed=seed, steps=steps, output=output, progress=progress)


@app.command()
def envs() -> None:
    """List the environments."""
    from kuaifair_env import ENVIRONMENTS

    table = Table("id", "what stands behind it")
    for env_id, origin in ENVIRONMENTS.items():
        table.add_row(env_id, origin.description)
    Console().print(table)


def _session(
    max_len: int, slate_size: int, leave: str, initial_history: InitialHistory, repeats: Repeats
) -> Any:
    from kuaifair_env.abandonment import leave_rule
    from kuaifair_env.batch import SessionConfig

    leave_rule(leave)
    return SessionConfig(
        max_len=max_len,
        slate_size=slate_size,
        leave=leave,
        initial_history=initial_history.value,
        repeats=repeats.value,
    )


def _world_settings(source: Source, response: Response, taste: str | None) -> WorldSettings:
    settings: WorldSettings = {"source": source.value, "response": response.value}
    if taste in ("measured", "strong"):
        settings["taste"] = "strong" if taste == "strong" else "measured"
    elif taste is not None:
        try:
            settings["taste"] = float(taste)
        except ValueError:
            raise ValueError(f"--taste is 'measured', 'strong' or a number, got {taste!r}") from None
    return settings


def _report(result: RunResult, command: str) -> None:
    from hrl_policies.study.store import machine

    console = Console()
    if result.evaluation is None:
        console.print(f"Interrupted after {result.steps_done:,} of {result.config.total_steps:,} steps.")
        console.print(f"Go on with: kuaifair train --resume {result.folder}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED)
    _print_table([(result.config, result.evaluation)], command)
    if result.steps_done:
        console.print(
            f"Trained {result.steps_done:,} steps in {result.training_seconds:.0f} s ({machine()})."
        )
    console.print(f"Run folder: {result.folder}", soft_wrap=True)


def _print_table(runs: Sequence[tuple[RunConfig, EvaluationResult]], command: str) -> None:
    from hrl_policies.study import RunRecord, result_tables

    records = [RunRecord.of_evaluation(config, evaluation) for config, evaluation in runs]
    for table in result_tables(records, command):
        table.show(Console())


def _compare(stored: StoredRun, result: EvaluationResult) -> None:
    """Says whether an evaluation reproduces the stored one; exit code 1 if not."""
    now = result.summary()
    different = [name for name, value in stored.summary.items() if name in now and now[name] != value]
    if not different:
        Console().print("Reproduces result.json exactly.")
        return
    for name in different:
        Console().print(f"{name}: stored {stored.summary[name]!r}, now {float(now[name])!r}")
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
