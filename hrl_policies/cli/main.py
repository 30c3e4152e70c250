"""The ``kuaifair`` command: its groups, and how it ends."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hrl_policies.cli.agents import evaluate, train, tune
from hrl_policies.cli.data import data_app
from hrl_policies.cli.methods import envs, methods
from hrl_policies.cli.options import BAD_INPUT, INTERRUPTED, Progress
from hrl_policies.cli.purifiers import encode, pretrain, probe
from hrl_policies.cli.study import study_app
from kuaifair_env.errors import KuaiFairError

TRACEBACK_VARIABLE = "KUAIFAIR_TRACEBACK"

app = typer.Typer(
    help="Fair interactive recommendation: environments, agents and the controls they have to beat.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, pretrain, probe, encode, methods, tune, envs):
    app.command()(command)
app.add_typer(data_app, name="data")
app.add_typer(study_app, name="study")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; bad input gives a message and exit code 2, never a traceback.

    Args:
        arguments: What follows ``kuaifair``; None takes the command line. Set the environment variable
            ``KUAIFAIR_TRACEBACK`` to see where an error comes from.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        app(args=words, prog_name="kuaifair", obj=f"kuaifair {shlex.join(words)}")
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
def _version(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
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
