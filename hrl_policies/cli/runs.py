"""What is done with agents that have learned: ``kuaifair evaluate``, ``ope`` and ``show``."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hrl_policies.cli import (
    FAILED,
    DataColumns,
    DataDir,
    EnvKwargs,
    EpisodesPerUser,
    ItemsData,
    NUsers,
    OptionalEnv,
    OwnData,
    Progress,
    TestData,
    Trust,
    TrustedMethod,
    TrustedPurifier,
    Users,
    env_kwargs,
    register_own_data,
    user_ids,
)
from kuaifair_env.registration import session_config

if TYPE_CHECKING:
    from hrl_policies.study import RunConfig, StoredRun
    from hrl_policies.worlds import WorldPair
    from kuaifair_env.evaluation import EvaluationResult


def evaluate(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A finished run folder, or with --trust a .zip.")],
    users: Users = None,
    n_users: NUsers = None,
    episodes_per_user: EpisodesPerUser = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the sessions' randomness, instead of the run's.")
    ] = None,
    ranking: Annotated[bool, typer.Option(help="Measure R-NDCG by true expected feedback too.")] = False,
    trust: Trust = False,
    method: TrustedMethod = None,
    env: OptionalEnv = None,
    env_settings: EnvKwargs = None,
    purifier: TrustedPurifier = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Evaluate the model of a run again, and say whether the stored result comes out.

    With --users, --n-users, --episodes-per-user or --seed it is evaluated on other sessions instead. A run on your own
    data finds them where they were; if they have moved, say where with --data.

    Example: kuaifair evaluate runs/a2c-11 --n-users 200

    Example: kuaifair evaluate agent.zip --trust --method ppo --env KuaiFair-Toy-v0 --env-kwargs max_len=20
    """
    from hrl_policies import study
    from hrl_policies.study.loading import load_trusted, read_purifier, worlds_of

    options = {"episodes_per_user": episodes_per_user, "evaluation_seed": seed}
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if users is not None or n_users is not None:
        changes |= {"users": user_ids(users), "n_users": n_users}
    tables = (data, test_data, items_data, columns)
    measured: dict[str, Any] = {"ranking": ranking, "progress": progress}
    if trust:
        config = replace(planned(method, env, tables, {}, {}, env_settings, purifier), **changes)
        study.single_threaded()
        worlds, states = worlds_of(config, None, data_dir), read_purifier(config, purifier)[0]
        policy = load_trusted(run, config, worlds, states)
        typer.echo(study.evaluate_run(config, policy, worlds, states, **measured).table())
        return
    if any(value is not None for value in (method, env, env_settings, purifier)):
        raise ValueError("--method, --env, --env-kwargs and --purifier go with --trust; a run folder says what it is")
    stored, worlds = open_run(run, *tables, data_dir)
    config = replace(stored.config, **changes)
    result = study.evaluate_run(
        config, study.load_policy(stored, worlds), worlds, study.purifier_of(stored), **measured
    )
    show_results(config, result, str(context.obj))
    if changes:
        return
    now = result.summary()
    different = [name for name, value in stored.summary.items() if name in now and now[name] != value]
    for name in different:
        typer.echo(f"{name}: stored {stored.summary[name]!r}, now {float(now[name])!r}")
    if different:
        raise typer.Exit(FAILED)
    typer.echo("Reproduces result.json exactly.")


def ope(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    estimator: Annotated[
        list[str] | None,
        typer.Option("--estimator", help="rejection, ips, snips or dr; repeat for several (default all)."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Slates that a random policy draws for each user.")] = 1,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Have the agent draw its actions rather than take the likeliest.")
    ] = False,
    rate_factor: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Share of the log's rows that is left where rows of users without a click are missing (.815 in "
            "partial KuaiRand-Pure).",
        ),
    ] = 1.0,
    users: Users = None,
    n_users: Annotated[
        int | None, typer.Option(min=1, help="Number of held-out users, without --users (default all).")
    ] = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    progress: Progress = True,
) -> None:
    """Estimate the click rate of an agent's first slate from the random log, without a simulator.

    The test log must show items chosen at random, as KuaiRand's random log, twins' test logs and random exposures of
    your own do; a log split by time does not. Estimates are of the mean click rate of the items in the first slate, of
    users who weigh as in the log, with 95 % intervals over users.

    Example: kuaifair ope runs/quota-greedy --estimator snips
    """
    from hrl_policies import study
    from hrl_policies.ope import ESTIMATORS, SupportWarning, evaluate_on_random_log
    from hrl_policies.study.serving import sessions_like_its_own

    chosen = [name for name in ESTIMATORS if name in (estimator or ESTIMATORS)]
    unknown = sorted(set(estimator or ()) - set(ESTIMATORS))
    if unknown:
        raise ValueError(f"--estimator is one of {', '.join(ESTIMATORS)}, got {', '.join(unknown)}")
    stored, worlds = open_run(run, data, test_data, items_data, columns, data_dir)
    policy = study.load_policy(stored, worlds)
    env = sessions_like_its_own(policy, stored.config, worlds, study.purifier_of(stored), 256)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", SupportWarning)
        result = evaluate_on_random_log(
            policy,
            env,
            user_ids(users),
            n_users=n_users,
            estimators=chosen,
            samples=samples,
            deterministic=not stochastic,
            rate_factor=rate_factor,
            progress=progress,
        )
    provenance = worlds.test.data.provenance
    typer.echo(f"{stored.config.method} on the random log of {provenance.name} ({provenance.origin} data)")
    typer.echo(result.table())
    for warning in warned:
        if issubclass(warning.category, SupportWarning):
            typer.echo(f"warning: {warning.message}", err=True)


def show(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    user: Annotated[
        str | None, typer.Option(help="Raw id of the user; the first that the run was evaluated on if not given.")
    ] = None,
    beside: Annotated[
        Path | None, typer.Option(help="Another run of the same world, for the same user and seed, side by side.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the session's randomness, instead of the run's.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="HTML file to write; session-USER.html if not given.")
    ] = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
) -> None:
    """Replay one session as an HTML page: slates, clicks, temper, and a belief about the user, step by step."""
    from hrl_policies.study.session_page import observe_run, write_session_page
    from kuaifair_env.evaluation import users_to_evaluate

    stored, worlds = open_run(run, data, test_data, items_data, columns, data_dir)
    runs = [stored]
    if beside is not None:
        other, _ = open_run(beside, data, test_data, items_data, columns, data_dir)
        if _played(other) != _played(stored):
            raise ValueError(
                f"{beside} and {run} differ in world, Max Len, leave rule or repeats; show runs of the same"
            )
        runs.append(other)
    config = stored.config
    row = (
        users_to_evaluate(worlds.test, config.users, config.n_users)[0]
        if user is None
        else worlds.test.user_rows(user_ids(user))[0]
    )
    user_id = worlds.test.data.users.ids[row]
    number = config.evaluation_seed if seed is None else seed
    sessions = [observe_run(one, worlds, user_id, number) for one in runs]
    path = output or Path(f"session-{re.sub(r'[^0-9A-Za-z_-]+', '_', str(user_id))}.html")
    origin = str(stored.provenance["test"]["data"]["origin"])
    write_session_page(path, sessions, seed=number, origin=origin, command=str(context.obj))
    typer.echo(f"Session of user {user_id}: {path}")


def open_run(
    folder: Path,
    data: Path | None,
    test_data: Path | None,
    items_data: Path | None,
    columns: str | None,
    data_dir: Path | None,
) -> tuple[StoredRun, WorldPair]:
    """Reads a finished run and makes its worlds; arguments are the options of these names.

    A folder may also be the name of an agent that comes with the package.

    Raises:
        ArtifactError: If it is no run, or its data are gone.
        ValueError: If it was interrupted.
    """
    from hrl_policies import study
    from hrl_policies.pretrained import pretrained_folder
    from hrl_policies.study.loading import register_data_of, worlds_of

    stored = study.load_run(pretrained_folder(folder))
    if not stored.complete:
        raise ValueError(f"{folder} was interrupted; go on with: kuaifair train --resume {folder}")
    study.single_threaded()
    if data is not None:
        before = stored.provenance["test"]["data"].get("settings", {}).get("tables")
        register_own_data(stored.config.world, data, test_data, items_data, columns, None, before)
    register_data_of(stored)
    return stored, worlds_of(stored.config, None, data_dir)


def planned(
    method: str | None,
    env: str | None,
    tables: tuple[Path | None, Path | None, Path | None, str | None],
    sessions: dict[str, Any],
    world: dict[str, Any],
    env_settings: list[str] | None,
    purifier: Path | None,
) -> RunConfig:
    """Returns the configuration of an agent without a run folder: a control, or a file that is trusted.

    Args:
        method: Its method.
        env: Environment id.
        tables: Own data: --data, --test-data, --items-data and --columns.
        sessions: Settings of sessions.
        world: Settings of worlds.
        env_settings: More of both, as ``--env-kwargs`` gives them.
        purifier: File of its purifier.

    Raises:
        ValueError: If the method or the id is missing, or a setting is not valid.
    """
    from hrl_policies.study import PurifierIdentity, plan_run

    if method is None or env is None:
        raise ValueError("--trust needs --method and --env: a .zip says neither by what nor for what it was trained")
    register_own_data(env, *tables, None)
    more_of_sessions, more_of_world = env_kwargs(env_settings)
    return plan_run(
        method,
        env,
        session=session_config(env, sessions | more_of_sessions),
        world_settings=world | more_of_world,
        purifier=None if purifier is None else PurifierIdentity.of_file(purifier),
    )


def show_results(config: RunConfig, evaluation: EvaluationResult, command: str) -> None:
    """Prints the tables of one run."""
    from hrl_policies.study import RunRecord, result_tables

    for table in result_tables([RunRecord.of_evaluation(config, evaluation)], command):
        table.show(Console())


def _played(run: StoredRun) -> tuple[object, ...]:
    """Returns what two runs must share for their sessions to be of the same user under the same rules."""
    config, session = run.config, run.config.session
    return config.world, config.world_settings, config.item_term, session.max_len, session.leave, session.repeats
