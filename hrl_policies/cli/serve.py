"""``kuaifair serve``: an agent meets the users of a test world and may learn from what it sees."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hrl_policies.cli import (
    INTERRUPTED,
    AllowPartial,
    DataColumns,
    DataDir,
    EnvKwargs,
    ItemsData,
    OptionalEnv,
    OwnData,
    Progress,
    TestData,
    Trust,
    TrustedMethod,
    TrustedPurifier,
    leave_option,
    user_ids,
)
from hrl_policies.cli.runs import open_run, planned
from kuaifair_env.origins import Source
from kuaifair_env.simulator import Repeats

if TYPE_CHECKING:
    from hrl_policies.study import RunConfig, StoredRun
    from hrl_policies.study.serving import Build
    from hrl_policies.worlds import WorldPair
    from kuaifair_env.serving_results import ServingResult, ServingSummary

_FIGURES = {"r_cum": "R_cum", "len": "Len", "r_each": "R_each", "ad": "AD", "violation_rate": "violation rate"}
_COLUMNS = {
    "first_": "first {count:,}",
    "last_": "last {count:,}",
    "": "all",
    "before_": "others, before",
    "after_": "others, after",
}


def serve(
    context: typer.Context,
    agents: Annotated[
        list[str],
        typer.Argument(
            help="A finished run folder (or several that differ in their seed), the name of a control, or with --trust "
            "a .zip."
        ),
    ],
    sessions: Annotated[
        int, typer.Option(min=1, max=100_000_000, help="Sessions that are served in each order.")
    ] = 20_000,
    orders: Annotated[int, typer.Option(min=1, max=10_000, help="In how many orders of the users.")] = 5,
    order: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    frozen: Annotated[bool, typer.Option("--frozen", help="Act, but learn nothing.")] = False,
    fixed_weights: Annotated[
        bool, typer.Option("--fixed-weights", help="Keep an agent's networks; only a belief that it sees learns.")
    ] = False,
    trust: Trust = False,
    method_name: TrustedMethod = None,
    purifier: TrustedPurifier = None,
    users: Annotated[
        str | None, typer.Option(help="Raw ids of the users to serve, 3,7,12, instead of 80 % of the test world's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sessions' randomness.")] = None,
    n_envs: Annotated[int, typer.Option(min=1, help="Concurrent sessions.")] = 64,
    env: OptionalEnv = None,
    max_len: Annotated[int | None, typer.Option(min=1, help="Max Len (default 30).")] = None,
    leave: Annotated[str | None, typer.Option(help="Leave rule, as for `kuaifair train` (default temper).")] = None,
    repeats: Annotated[Repeats | None, typer.Option(help="May an item be shown twice in a session?")] = None,
    source: Annotated[Source | None, typer.Option(help="real forbids the twin, twin forbids real files.")] = None,
    allow_partial: AllowPartial = False,
    env_settings: EnvKwargs = None,
    data: OwnData = None,
    test_data: TestData = None,
    items_data: ItemsData = None,
    columns: DataColumns = None,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", "--out", help="Folder to write; the same one goes on.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Let an agent serve the users of a test world, all once before any comes again, and learn from what it sees.

    A control of the zoo needs --env; a run folder says where it was trained. Each order of the users starts from the
    same agent; intervals are over orders, and over seeds where several runs are given. Ctrl-C, or a kill, loses no more
    than what was served since the last checkpoint: the same command goes on, to the same numbers.

    Example: kuaifair serve session-quota --env KuaiFair-Toy-v0 --sessions 2000

    Example: kuaifair serve runs/a2c-11 runs/a2c-12 runs/a2c-13
    """
    from hrl_policies.study import run_folder, single_threaded
    from hrl_policies.study.serving import (
        ServingPlan,
        need_control,
        need_service_folder,
        serve_in_orders,
        write_serving,
    )
    from hrl_policies.zoo import method
    from kuaifair_env.evaluation import DEFAULT_SEED

    command = str(context.obj)
    single_threaded()
    given = {"max_len": max_len, "leave": None if leave is None else leave_option(leave), "repeats": repeats}
    world = {"source": source, "allow_partial": allow_partial or None}
    tables = (data, test_data, items_data, columns)
    if not trust and (method_name is not None or purifier is not None):
        raise ValueError("--method and --purifier go with --trust, which loads a .zip")
    if not trust and all(Path(agent).is_dir() or Path(agent).suffix == ".zip" for agent in agents):
        if env is not None or env_settings or _given(given | world):
            raise ValueError(
                "a run folder says in which environment it was trained: leave those options out; a .zip needs --trust"
            )
        opened = [open_run(Path(agent), *tables, data_dir) for agent in agents]
        configs, builds = _of_runs(opened, n_envs)
    elif len(agents) > 1:
        raise ValueError(
            f"give one control, one .zip, or run folders that differ in their seed; got {', '.join(agents)}"
        )
    elif env is None and not trust:
        raise ValueError(f"{agents[0]} is no run folder; a control of that name needs --env (see `kuaifair envs`)")
    else:
        if env is not None and not trust:
            need_control(agents[0], env)
        file = Path(agents[0]) if trust else None
        acts_as = method_name if trust else agents[0]
        configs = [planned(acts_as, env, tables, _given(given), _given(world), env_settings, purifier)]
        builds = [_of_plan(configs[0], file, purifier, data_dir, n_envs)]
    plan = ServingPlan(
        orders=tuple(range(order, order + orders)),
        sessions=sessions,
        users=user_ids(users),
        seed=DEFAULT_SEED if seed is None else seed,
        n_envs=n_envs,
        learn=not frozen,
        gradients=not fixed_weights,
    )
    name = run_folder(configs[0])
    how = "-frozen" if frozen else "-fixed-weights" if fixed_weights else ""
    folder = output or Path("serving") / name.with_name(name.name + how)
    results: list[ServingResult] = []
    if len(configs) > 1 and not any(folder.glob("seed-*")):
        need_service_folder(folder)
    try:
        for config, build in zip(configs, builds, strict=True):
            place = folder / f"seed-{config.seed}" if len(configs) > 1 else folder
            results += serve_in_orders(build, plan, place, progress=progress)
    except KeyboardInterrupt:
        typer.echo(f"Interrupted; what was served is in {folder}. Go on with: {command}")
        raise typer.Exit(INTERRUPTED) from None
    title = method(configs[0].method).title
    _show(results, write_serving(folder, title, results, command), title)
    typer.echo(f"Results, curve and picture: {folder}")


def _of_runs(opened: list[tuple[StoredRun, WorldPair]], n_envs: int) -> tuple[list[RunConfig], list[Build]]:
    from hrl_policies.study.serving import same_but_for_seeds, trained_agent

    configs = [run.config for run, _ in opened]
    same_but_for_seeds(configs)
    return configs, [trained_agent(run, worlds, n_envs) for run, worlds in opened]


def _of_plan(config: RunConfig, file: Path | None, purifier: Path | None, data_dir: Path | None, n_envs: int) -> Build:
    """Returns what builds a control, or the agent of a file that is trusted."""
    from hrl_policies.study.loading import read_purifier, worlds_of
    from hrl_policies.study.serving import trusted_agent, untrained_agent

    worlds = worlds_of(config, None, data_dir)
    if file is None:
        return untrained_agent(config, worlds, n_envs)
    return trusted_agent(file, config, worlds, read_purifier(config, purifier)[0], n_envs)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _show(results: list[ServingResult], summary: ServingSummary, title: str) -> None:
    from kuaifair_env.serving_results import FIRST_AND_LAST

    settings, served = results[0].settings, results[0].served
    data = served.world["data"]
    learning = f"{settings.learning} ({settings.reason})" if settings.reason else settings.learning
    of_part = () if settings.sessions > FIRST_AND_LAST else ("first_", "last_")
    columns = {
        prefix: name for prefix, name in _COLUMNS.items() if f"{prefix}r_cum" in summary.means and prefix not in of_part
    }
    intervals = "; 95 % intervals over them" if summary.intervals else ""
    table = Table(
        "",
        *(column.format(count=FIRST_AND_LAST) for column in columns.values()),
        title=f"{title} in {data['name']} ({data['origin']} data), Max Len {served.config['max_len']}",
        caption=f"{settings.sessions:,} sessions of {settings.users:,} users, {settings.n_envs} at a time; learning: "
        f"{learning}. Orders: {summary.orders}, seeds: {summary.seeds}{intervals}.",
    )
    for figure, name in _FIGURES.items():
        table.add_row(name, *(_cell(summary, prefix + figure) for prefix in columns))
    Console().print(table)


def _cell(summary: ServingSummary, name: str) -> str:
    interval = summary.intervals.get(name)
    ends = "" if interval is None else f"\n[{interval.low:.3f}, {interval.high:.3f}]"
    return f"{summary.means[name]:.3f}{ends}"
