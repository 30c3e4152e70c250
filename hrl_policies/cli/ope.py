"""``kuaifair ope``: what a run's agent is worth by logged answers alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from hrl_policies.cli import DataColumns, DataDir, ItemsData, OwnData, Progress, TestData, Users, user_ids
from hrl_policies.cli.agents import open_run


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
