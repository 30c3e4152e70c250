"""``kuaifair show``: one session of a run, as a page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hrl_policies.cli import DataColumns, DataDir, ItemsData, OwnData, TestData, user_ids
from hrl_policies.cli.agents import open_run

if TYPE_CHECKING:
    from hrl_policies.study import StoredRun


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


def _played(run: StoredRun) -> tuple[object, ...]:
    """Returns what two runs must share for their sessions to be of the same user under the same rules."""
    config, session = run.config, run.config.session
    return config.world, config.world_settings, config.item_term, session.max_len, session.leave, session.repeats
