"""The command line: here the options that several commands take, and the codes that the command ends with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsrm.item_term import ItemTermMode
from kuaifair_env.registration import Source

if TYPE_CHECKING:
    from kuaifair_env.data.schema import Split
    from kuaifair_env.registration import WorldSettings
    from kuaifair_env.world import World

SOME_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

Env = Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")]
OptionalEnv = Annotated[str | None, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")]
DataSource = Annotated[Source, typer.Option("--source", help="real forbids the twin, twin forbids real files.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder or archive with the official files; else KUAIFAIR_DATA, else the cache.")
]
ItemTerm = Annotated[
    ItemTermMode | None, typer.Option(help="Give agents, controls and purifiers an estimate of each item's worth.")
]
MaxLen = Annotated[int, typer.Option(min=1, help="Max Len: the patience that a user starts with.")]
Users = Annotated[int | None, typer.Option(min=1, help="Held-out users to evaluate on (default 1000, or all).")]
EpisodesPerUser = Annotated[int | None, typer.Option(min=1, help="Sessions of each user (default 1).")]
PurifierFile = Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]


def open_world(
    env: str, split: Split, source: Source, data_dir: Path | None, item_term: ItemTermMode | None = None
) -> World:
    """Makes one world of an environment id, with an item term if one is named."""
    from kuaifair_env.registration import make_world

    settings: WorldSettings = {"split": split, "source": source}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    world = make_world(env, **settings)
    if item_term is None:
        return world
    from dsrm.item_term import fit_item_term, with_item_term

    return with_item_term(world, fit_item_term(world, item_term))


def need_new_file(path: Path) -> None:
    """Checks that a file may be written.

    Raises:
        ArtifactError: If it exists.
    """
    from kuaifair_env.errors import ArtifactError

    if path.exists():
        raise ArtifactError(f"{path} exists already; choose another file, or remove it")
