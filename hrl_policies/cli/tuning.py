"""``kuaifair tune``: hyperparameters by the same budget and the same criterion for every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hrl_policies.cli.purifiers import WorldSource

if TYPE_CHECKING:
    from hrl_policies.study.confirmation import Confirmation
    from hrl_policies.study.tuning import TuningResult
    from kuaifair_env.registration import WorldSettings

INTERRUPTED = 130
_SHOWN = 5


def tune(
    method: Annotated[str, typer.Argument(help="Name of a method; see `kuaifair methods`.")],
    env: Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")],
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, the shipped settings' included.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each trial, instead of the method's own.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the search and of training; results need others.")
    ] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Training seeds of each trial; scores are means.")] = 1,
    confirm: Annotated[
        int,
        typer.Option(
            min=0,
            help="Then train the best trial's settings and the shipped ones with so many other seeds, for all the "
            "method's steps; confirmed.yml gets what wins.",
        ),
    ] = 0,
    max_len: Annotated[int, typer.Option(min=1, help="Max Len: the patience that a user starts with.")] = 30,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the search; the same one goes on.")
    ] = None,
    source: Annotated[
        WorldSource, typer.Option(help="real forbids the twin, twin forbids real files.")
    ] = WorldSource.auto,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder or archive with the official files; else KUAIFAIR_DATA, else the cache."),
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")] = True,
) -> None:
    """Search the hyperparameters of a method on validation users of the training world, never in the test world.

    Every method gets the same: its trials, the steps of each, and R_cum of the same users as the criterion. Ctrl-C
    keeps the finished trials; the same command goes on, and so does one with more trials. OUTPUT/best.yml is for
    `kuaifair train --settings`.

    Example: kuaifair tune a2c --env KuaiFair-Toy-v0 --trials 20 --steps 100000
    """
    from hrl_policies.study import single_threaded
    from hrl_policies.study.confirmation import confirm as confirm_search
    from hrl_policies.study.trials import import_optuna
    from hrl_policies.study.tuning import TuningPlan
    from hrl_policies.study.tuning import tune as search
    from kuaifair_env.batch import SessionConfig
    from kuaifair_env.registration import make_world

    single_threaded()
    plan = TuningPlan(
        method,
        env,
        seed=seed,
        runs=runs,
        total_steps=steps,
        session=SessionConfig(max_len=max_len),
        world_settings={"source": source.value},
    )
    # Before the world is made, which may take a while.
    import_optuna()
    world_settings: WorldSettings = {"split": "train", "source": source.value}
    if data_dir is not None:
        world_settings["data_dir"] = data_dir
    world = make_world(env, **world_settings)
    place = re.sub(r"[^A-Za-z0-9.]+", "-", env).strip("-")
    folder = output or Path("tuning") / place / f"{method}-len{max_len}-seed{seed}"
    try:
        result = search(plan, world, trials, folder, progress=progress)
        confirmation = confirm_search(result, world, confirm, progress=progress) if confirm else None
    except KeyboardInterrupt:
        console = Console(soft_wrap=True, highlight=False)
        console.print(
            f"Interrupted; what is finished is in {folder}. The same command goes on.", markup=False
        )
        raise typer.Exit(INTERRUPTED) from None
    _report(result)
    if confirm:
        _report_confirmation(confirmation)


def _report(result: TuningResult) -> None:
    """Prints the best trials, that of the shipped settings, and where to find all."""
    from hrl_policies.study.tuning import BEST, TRIALS

    console = Console(soft_wrap=True, highlight=False)
    scored = [trial for trial in result.trials if trial.score is not None]
    best = sorted(scored, key=lambda trial: -(trial.score or 0.0))[:_SHOWN]
    first = result.trials[0]
    lines = [f"{'trial':>5} {'R_cum':>8}  settings"]
    for trial in best + ([] if first in best else [first]):
        shown = " ".join(f"{name}={_short(value)}" for name, value in trial.values.items())
        note = "  (shipped)" if trial is first else ""
        lines.append(f"{trial.number:>5} {trial.score:>8.3f}  {shown}{note}")
    failed = len(result.trials) - len(scored)
    lines += [
        f"{len(result.trials)} trials, {failed} without a score; R_cum of {result.validation_users} validation users "
        "of the training world. The best of many noisy scores is too high; --confirm tries it again with other seeds.",
        f"kuaifair train --method {result.plan.method} --env {result.plan.world} --settings {result.folder / BEST}",
        f"All trials: {result.folder / TRIALS}",
    ]
    console.print("\n".join(lines), markup=False)


def _report_confirmation(confirmation: Confirmation | None) -> None:
    """Prints both sides, seed by seed, and which won."""
    console = Console(soft_wrap=True, highlight=False)
    if confirmation is None:
        console.print("No trial beat the shipped settings; there is nothing to confirm.")
        return
    start, found = confirmation.scores("start"), confirmation.scores("found")
    seeds = [run.seed for run in confirmation.runs if run.side == "start"]
    lines = [f"{'seed':>5} {'shipped':>8} {'found':>8}"]
    lines += [f"{seed:>5} {a:>8.3f} {b:>8.3f}" for seed, a, b in zip(seeds, start, found, strict=True)]
    lines += [
        f"{'mean':>5} {sum(start) / len(start):>8.3f} {sum(found) / len(found):>8.3f}",
        f"{confirmation.runs[0].steps:,} steps each. confirmed.yml holds "
        f"{'what was found' if confirmation.kept == 'found' else 'the shipped settings'}.",
    ]
    console.print("\n".join(lines), markup=False)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")
