"""The command line: here the options that several commands take, and the codes that the command ends with."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dsrm.item_term import ItemTermMode
from kuaifair_env.data.clicks import FeedbackKind, parse_positive
from kuaifair_env.origins import Source

if TYPE_CHECKING:
    from kuaifair_env.data.schema import Split
    from kuaifair_env.settings import WorldSettings
    from kuaifair_env.world import World

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

Env = Annotated[str, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")]
OptionalEnv = Annotated[str | None, typer.Option("--env", "-e", help="Environment id; see `kuaifair envs`.")]
DataSource = Annotated[Source, typer.Option("--source", help="real forbids the twin, twin forbids real files.")]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder or archive with the official files; else KUAIFAIR_DATA, else the cache.")
]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Take a part of the official files, labelled, as --source real.")
]
PositiveFeedback = Annotated[
    list[str] | None,
    typer.Option(
        "--positive",
        help="What counts as a click: watch_ratio=1.0 (KuaiRec); long_view, or several as is_like=2 (KuaiRand).",
    ),
]
Feedback = Annotated[FeedbackKind, typer.Option(help="KuaiRec: reward the click, or the watch ratio up to --clip.")]
Clip = Annotated[float | None, typer.Option(help="Largest watch ratio as feedback (default 5).")]
OwnData = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Your own log (CSV, TSV, Parquet) as the world --env; one log is split by time. Or a YAML file with more: "
        "test, items, users, columns, split, positives_only, ...",
    ),
]
TestData = Annotated[Path | None, typer.Option("--test-data", help="With --data: the test log.")]
ItemsData = Annotated[Path | None, typer.Option("--items-data", help="With --data: table of items (tags, features).")]
DataColumns = Annotated[
    str | None, typer.Option("--columns", help="With --data: names of columns, as user=uid,item=movieId,time=ts.")
]
ItemTerm = Annotated[
    ItemTermMode | None, typer.Option(help="Give agents, controls and purifiers an estimate of each item's worth.")
]
EnvKwargs = Annotated[
    list[str] | None,
    typer.Option(
        "--env-kwargs",
        help="Any other setting of gym.make as name=value, such as ad_bound=0.2; repeat for several. "
        "`kuaifair envs --settings` lists them.",
    ),
]
Leave = Annotated[
    str,
    typer.Option(help="Leave rule: strict, popular_only, ..., temper:ad_bound=0.2, or {rule: temper, ad_bound: 0.2}."),
]
MaxLen = Annotated[int, typer.Option(min=1, help="Max Len: the patience that a user starts with.")]
Users = Annotated[str | None, typer.Option(help="Raw ids of the held-out users to evaluate on: 3,7,12.")]
NUsers = Annotated[
    int | None, typer.Option(min=1, help="Number of held-out users to evaluate on, without --users (default 1000).")
]
EpisodesPerUser = Annotated[int | None, typer.Option(min=1, help="Sessions of each user (default 1).")]
PurifierFile = Annotated[Path, typer.Option("--output", "-o", help="File to write (.safetensors).")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Load a .zip that Stable-Baselines3's own save wrote, by its own loader. It EXECUTES what is pickled in "
        "the file: whoever wrote it runs code on your machine. Needs --method and --env.",
    ),
]
TrustedMethod = Annotated[
    str | None, typer.Option("--method", "-m", help="With --trust: the method whose algorithm and modes the .zip has.")
]
TrustedPurifier = Annotated[
    Path | None, typer.Option("--purifier", help="With --trust: file of the purifier whose states the agent observes.")
]
Progress = Annotated[
    bool,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress bars, in a terminal.",
        callback=lambda wanted: wanted and sys.stderr.isatty(),
    ),
]


def data_settings(
    source: Source, allow_partial: bool, positive: list[str] | None, feedback: FeedbackKind, clip: float | None
) -> WorldSettings:
    """Returns the settings of a world that say which data it has and what counts as a click in them."""
    settings: WorldSettings = {"source": source}
    if allow_partial:
        settings["allow_partial"] = True
    if positive:
        settings["positive"] = parse_positive(positive)
    if feedback != "click":
        settings["feedback"] = feedback
    if clip is not None:
        settings["clip"] = clip
    return settings


def env_kwargs(pairs: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings that ``--env-kwargs`` gives: those of sessions, and those of the world.

    Raises:
        ValueError: If one is unknown, given twice, or has an option of its own or is the method's.
    """
    from difflib import get_close_matches

    from hrl_policies.common.yaml_files import parse_yaml
    from kuaifair_env.settings import DEFAULTS, SESSION_SETTINGS

    elsewhere = {
        "split": "commands know which world they need",
        "data_dir": "give --data-dir",
        "source": "give --source",
        "encoder": "an encoder is a Python object",
        "action_mode": "it is the method's",
        "observation_mode": "it is the method's",
    }
    settings: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--env-kwargs takes name=value, such as ad_bound=0.2; got {pair!r}")
        if name in elsewhere:
            raise ValueError(f"--env-kwargs does not take {name}: {elsewhere[name]}")
        if name not in DEFAULTS:
            similar = "".join(f"; did you mean {match}?" for match in get_close_matches(name, DEFAULTS, 1))
            raise ValueError(
                f"--env-kwargs: environments have no setting {name!r}{similar} `kuaifair envs --settings` lists them"
            )
        if name in settings:
            raise ValueError(f"--env-kwargs gives {name} twice")
        settings[name] = parse_yaml(value, f"--env-kwargs {pair}")
    sessions = {name: value for name, value in settings.items() if name in SESSION_SETTINGS}
    return sessions, {name: value for name, value in settings.items() if name not in SESSION_SETTINGS}


def world_kwargs(pairs: list[str] | None) -> WorldSettings:
    """Returns the settings that ``--env-kwargs`` gives to a command that plays no sessions.

    Raises:
        ValueError: If one is not a setting of worlds.
    """
    sessions, world = env_kwargs(pairs)
    if sessions:
        raise ValueError(f"--env-kwargs: {', '.join(sessions)} is of sessions, and this command plays none")
    return cast("WorldSettings", world)


def leave_option(text: str) -> Any:
    """Returns the leave rule that ``--leave`` names: a text, or a YAML mapping."""
    from hrl_policies.common.yaml_files import parse_yaml

    return parse_yaml(text, "--leave") if text.lstrip().startswith("{") else text


def register_own_data(
    env: str | None,
    data: Path | None,
    test: Path | None,
    items: Path | None,
    columns: str | None,
    positive: list[str] | None,
    before: Mapping[str, Any] | None = None,
) -> list[str] | None:
    """Registers the world that --data describes, if it is given, and checks that --env names a world.

    Args:
        env: Its id.
        data: The log, or a YAML file.
        test: The test log.
        items: Table of items.
        columns: Names of columns.
        positive: What counts as a click.
        before: How a run read its tables (:class:`~kuaifair_env.data.own.OwnTables`), where nothing else is said.

    Returns:
        What --positive says of other data; with --data it says what a click of the log is.

    Raises:
        DataError: If files are missing or do not hold what they must.
        ValueError: If options do not go together.
    """
    from kuaifair_env.registration import need_environment, register_origin

    if env is None:
        raise ValueError("--data needs a name for its world, such as --env MyShop-v0")
    if data is None:
        if any(value is not None for value in (test, items, columns)):
            raise ValueError("--test-data, --items-data and --columns go with --data, which names the log")
        need_environment(env)
        return positive
    from kuaifair_env.data.own import OwnTables
    from kuaifair_env.origins import OwnOrigin

    content: dict[str, Any] = {**(before or {}), "data": str(data)}
    folder = Path()
    if data.suffix in (".yml", ".yaml"):
        from hrl_policies.common.yaml_files import read_yaml

        content, folder = dict(read_yaml(data)), data.parent
    content |= {name: str(path.resolve()) for name, path in (("test", test), ("items", items)) if path is not None}
    if columns is not None:
        pairs = [part.partition("=") for part in columns.split(",")]
        content["columns"] = {name.strip(): column.strip() for name, _, column in pairs}
    if positive:
        content["positive"] = parse_positive(positive)
    register_origin(OwnOrigin.of_tables(env, OwnTables.from_dict(content).resolved(folder)))
    return None


def open_world(
    env: str, split: Split, settings: WorldSettings, data_dir: Path | None, item_term: ItemTermMode | None = None
) -> World:
    """Makes one world of an environment id, with an item term if one is named."""
    from kuaifair_env.registration import make_world

    settings = {**settings, "split": split}
    if data_dir is not None:
        settings["data_dir"] = data_dir
    world = make_world(env, **settings)
    if item_term is None:
        return world
    from dsrm.item_term import fit_item_term, with_item_term

    return with_item_term(world, fit_item_term(world, item_term))


def user_ids(text: str | None) -> tuple[int | str, ...] | None:
    """Returns the ids that --users lists, as numbers where all are, or None."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    return tuple(map(int, parts)) if all(re.fullmatch("-?[0-9]+", part) for part in parts) else tuple(parts)


@contextmanager
def new_file(path: Path) -> Iterator[None]:
    """Keeps other processes from making the file that the body makes.

    Raises:
        ArtifactError: If it exists, another process makes it, or it cannot be made.
    """
    from kuaifair_env.errors import ArtifactError
    from kuaifair_env.files import claimed

    with claimed(path):
        if os.path.lexists(path):
            raise ArtifactError(f"{path} exists already; choose another file, or remove it")
        yield
