"""``kuaifair train`` and ``tune``: agents that learn."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hrl_policies.cli import (
    INTERRUPTED,
    AllowPartial,
    Clip,
    DataColumns,
    DataDir,
    DataSource,
    Env,
    EnvKwargs,
    EpisodesPerUser,
    Feedback,
    ItemsData,
    ItemTerm,
    Leave,
    MaxLen,
    NUsers,
    OptionalEnv,
    OwnData,
    PositiveFeedback,
    Progress,
    TestData,
    Users,
    data_settings,
    env_kwargs,
    leave_option,
    open_world,
    register_own_data,
    user_ids,
)
from hrl_policies.cli.runs import show_results
from kuaifair_env.registration import session_config
from kuaifair_env.response.fitting import ResponseKind
from kuaifair_env.simulator import InitialHistory, Repeats

if TYPE_CHECKING:
    from hrl_policies.study import RunResult
    from hrl_policies.study.tuning import Confirmation, TuningResult
    from kuaifair_env.settings import WorldSettings

_SHOWN_TRIALS = 5


def train(
    context: typer.Context,
    method: Annotated[
        str | None, typer.Option("--method", "-m", help="Name of a method; see `kuaifair methods`.")
    ] = None,
    env: OptionalEnv = None,
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 11,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps over all sessions, instead of the method's own.")
    ] = None,
    n_envs: Annotated[int | None, typer.Option(min=1, help="Concurrent training sessions.")] = None,
    randomisation: Annotated[
        str,
        typer.Option(
            help="How far training users deviate: 'auto', 'none', or scales such as '{offset: 1, own_vector: 0.3}'."
        ),
    ] = "auto",
    max_len: MaxLen = 30,
    slate_size: Annotated[int | None, typer.Option(min=1, help="Items per slate (default 10; 5 in replays).")] = None,
    leave: Leave = "temper",
    initial_history: Annotated[InitialHistory, typer.Option(help="Start from the log or cold.")] = "log",
    repeats: Annotated[
        Repeats | None,
        typer.Option(help="May an item be shown twice in a session? (default allow; in replays it may not)"),
    ] = None,
    source: DataSource = "auto",
    allow_partial: AllowPartial = False,
    positive: PositiveFeedback = None,
    feedback: Feedback = "click",
    clip: Clip = None,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    response: Annotated[ResponseKind, typer.Option(help="Model of users.")] = "auto",
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
    users: Users = None,
    n_users: NUsers = None,
    episodes_per_user: EpisodesPerUser = None,
    purifier: Annotated[
        Path | None, typer.Option(help="Purify the observed states: a file that `kuaifair pretrain` wrote.")
    ] = None,
    item_term: ItemTerm = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder to write.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with an interrupted run: its folder, which ends in .partial.")
    ] = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Train a method in the training world, evaluate it in the test world, and write a run folder.

    Ctrl-C stops cleanly and keeps what was learned; --resume goes on. Methods that learn on purified states (dsrm-hrl)
    pretrain their purifier on first use, unless --purifier names one.

    Example: kuaifair train --method a2c --env KuaiFair-Toy-v0 --seed 11

    Example: kuaifair train --method a2c --env MyShop-v0 --data log.csv --columns user=customer,item=sku
    """
    from hrl_policies import study, zoo
    from hrl_policies.common.yaml_files import parse_yaml
    from hrl_policies.study.loading import open_worlds
    from hrl_policies.study.store import PARTIAL
    from hrl_policies.worlds import cached_purifier
    from kuaifair_env.files import claimed

    command = str(context.obj)
    if resume is not None:
        if any(value is not None for value in (method, env, output, purifier, settings_file)):
            raise ValueError(
                "--resume takes method, environment, purifier, settings and output from the run; leave them out"
            )
        study.single_threaded()
        with claimed(resume.parent / resume.name.removesuffix(PARTIAL)):
            resumed = study.resume(resume, data_dir=data_dir, progress=progress)
        _report_run(resumed, command)
        return
    if method is None or env is None:
        raise ValueError("give --method and --env (see `kuaifair methods` and `kuaifair envs`), or --resume")
    positive = register_own_data(env, data, test_data, items_data, columns, positive)
    mode = zoo.method(method).purifier
    sessions, world_settings = env_kwargs(env_settings)
    given = {"slate_size": slate_size, "repeats": repeats}
    sessions = {name: value for name, value in given.items() if value is not None} | sessions
    planned: dict[str, Any] = {
        "seed": seed,
        "session": session_config(
            env,
            {
                "max_len": max_len,
                "leave": leave_option(leave),
                "initial_history": initial_history,
                **sessions,
            },
        ),
        "total_steps": steps,
        "n_envs": n_envs,
        "randomisation": parse_yaml(randomisation, "--randomisation"),
        "overrides": zoo.parse_overrides(settings or []),
        "world_settings": {
            **_world_settings(data_settings(source, allow_partial, positive, feedback, clip), response, taste),
            **world_settings,
        },
        "users": user_ids(users),
        "n_users": n_users,
        "episodes_per_user": episodes_per_user or 1,
        "item_term": item_term or "",
        "settings": None if settings_file is None else zoo.read_settings(settings_file, env),
    }
    worlds = None
    if mode and purifier is None:
        worlds = open_worlds(env, planned["world_settings"], planned["item_term"], data_dir)
        study.single_threaded()
        purifier = cached_purifier(worlds.train, mode, progress=progress)
    identity = None if purifier is None else study.PurifierIdentity.of_file(purifier)
    config = study.plan_run(method, env, purifier=identity, **planned)
    study.single_threaded()
    folder = output or Path("runs") / study.run_folder(config)
    with claimed(folder):
        result = study.train(config, worlds, purifier=purifier, output=folder, data_dir=data_dir, progress=progress)
    _report_run(result, command)


def tune(
    method: Annotated[str, typer.Argument(help="Name of a method; see `kuaifair methods`.")],
    env: Env,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, the shipped settings' included.")] = 20,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of each trial, instead of the method's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search and of training; results need others.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Training seeds of each trial; scores are means.")] = 1,
    confirm: Annotated[
        int,
        typer.Option(
            min=0,
            help="Then train the best trial's settings and the shipped ones with so many other seeds, for all the "
            "method's steps; confirmed.yml gets what wins.",
        ),
    ] = 0,
    max_len: MaxLen = 30,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the search; the same one goes on.")
    ] = None,
    source: DataSource = "auto",
    allow_partial: AllowPartial = False,
    positive: PositiveFeedback = None,
    feedback: Feedback = "click",
    clip: Clip = None,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Search the hyperparameters of a method on validation users of the training world, never in the test world.

    Every method gets the same: its trials, the steps of each, and R_cum of the same users as the criterion. Ctrl-C
    keeps the finished trials; the same command goes on, and so does one with more trials. OUTPUT/best.yml is for
    `kuaifair train --settings`.

    Example: kuaifair tune a2c --env KuaiFair-Toy-v0 --trials 20 --steps 100000
    """
    from hrl_policies import study
    from hrl_policies.study.trials import import_optuna
    from hrl_policies.study.tuning import TuningPlan
    from hrl_policies.study.tuning import confirm as confirm_search
    from hrl_policies.study.tuning import tune as search

    positive = register_own_data(env, data, test_data, items_data, columns, positive)
    sessions, world_settings = env_kwargs(env_settings)
    settings = cast("WorldSettings", data_settings(source, allow_partial, positive, feedback, clip) | world_settings)
    plan = TuningPlan(
        method,
        env,
        seed=seed,
        runs=runs,
        total_steps=steps,
        session=session_config(env, {"max_len": max_len, **sessions}),
        world_settings=settings,
    )
    import_optuna()
    study.single_threaded()
    world = open_world(env, "train", settings, data_dir)
    place = re.sub(r"[^A-Za-z0-9.]+", "-", env).strip("-")
    folder = output or Path("tuning") / place / f"{method}-len{max_len}-seed{seed}"
    try:
        result = search(plan, world, trials, folder, progress=progress)
        confirmation = confirm_search(result, world, confirm, progress=progress) if confirm else None
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; what is finished is in {folder}. The same command goes on.")
        raise typer.Exit(INTERRUPTED) from None
    typer.echo("\n".join(_search_lines(result)))
    if confirm:
        typer.echo("\n".join(_confirmation_lines(confirmation)))


def _world_settings(settings: WorldSettings, response: ResponseKind, taste: str | None) -> WorldSettings:
    settings["response"] = response
    if taste in ("measured", "strong"):
        settings["taste"] = "strong" if taste == "strong" else "measured"
    elif taste is not None:
        try:
            settings["taste"] = float(taste)
        except ValueError:
            raise ValueError(f"--taste is 'measured', 'strong' or a number, got {taste!r}") from None
    return settings


def _report_run(result: RunResult, command: str) -> None:
    from hrl_policies.study.store import machine

    if result.evaluation is None:
        typer.echo(f"Interrupted after {result.steps_done:,} of {result.config.total_steps:,} steps.")
        typer.echo(f"Go on with: kuaifair train --resume {shlex.quote(str(result.folder))}")
        raise typer.Exit(INTERRUPTED)
    show_results(result.config, result.evaluation, command)
    if result.steps_done:
        typer.echo(f"Trained {result.steps_done:,} steps in {result.training_seconds:.0f} s ({machine()}).")
    typer.echo(f"Run folder: {result.folder}")


def _search_lines(result: TuningResult) -> list[str]:
    from hrl_policies.study.tuning import BEST, TRIALS

    scored = [trial for trial in result.trials if trial.score is not None]
    best = sorted(scored, key=lambda trial: -(trial.score or 0.0))[:_SHOWN_TRIALS]
    shipped = result.trials[0]
    lines = [f"{'trial':>5} {'R_cum':>8}  settings"]
    for trial in best if shipped in best else [*best, shipped]:
        values = " ".join(f"{name}={_short(value)}" for name, value in trial.values.items())
        note = "  (shipped)" if trial is shipped else ""
        lines.append(f"{trial.number:>5} {trial.score:>8.3f}  {values}{note}")
    failed = len(result.trials) - len(scored)
    return [
        *lines,
        f"{len(result.trials)} trials, {failed} without a score; R_cum of {result.validation_users} validation users "
        "of the training world. The best of many noisy scores is too high; --confirm tries it again with other seeds.",
        f"kuaifair train --method {result.plan.method} --env {result.plan.world} --settings {result.folder / BEST}",
        f"All trials: {result.folder / TRIALS}",
    ]


def _confirmation_lines(confirmation: Confirmation | None) -> list[str]:
    if confirmation is None:
        return ["No trial beat the shipped settings; there is nothing to confirm."]
    shipped, found = confirmation.scores("start"), confirmation.scores("found")
    seeds = [run.seed for run in confirmation.runs if run.side == "start"]
    kept = "what was found" if confirmation.kept == "found" else "the shipped settings"
    return [
        f"{'seed':>5} {'shipped':>8} {'found':>8}",
        *(f"{seed:>5} {a:>8.3f} {b:>8.3f}" for seed, a, b in zip(seeds, shipped, found, strict=True)),
        f"{'mean':>5} {sum(shipped) / len(shipped):>8.3f} {sum(found) / len(found):>8.3f}",
        f"{confirmation.runs[0].steps:,} steps each. confirmed.yml holds {kept}.",
    ]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")
