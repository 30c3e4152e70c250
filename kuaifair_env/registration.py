"""The registered environment ids, and how worlds and environments are made from an id."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from kuaifair_env.batch import SessionConfig
from kuaifair_env.checks import need_whole
from kuaifair_env.data.dataset import FrameSettings, InteractionData
from kuaifair_env.data.own import MIN_TEST_EXPOSURES, OwnTables
from kuaifair_env.data.schema import Split
from kuaifair_env.embeddings import cached_embeddings, need_dimension
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.origins import DataSource, OfficialOrigin, Origin, OwnOrigin, Source, TwinOrigin
from kuaifair_env.replay import REPLAY_SESSIONS, REPLAY_SLATE_SIZE, build_replay_world
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.fitting import ResponseKind, cached_response
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.settings import DEFAULTS, SESSION_SETTINGS, Settings, WorldSettings, lists_settings
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import (
    World,
    build_world,
    candidate_rows,
    covered_items,
    warn_of_users_left_out,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kuaifair_env.data.popularity import PopularitySource
    from kuaifair_env.data.tables import LogColumns, SplitRule, Table
    from kuaifair_env.sb3 import InfoLevel, KuaiFairVecEnv

ENVIRONMENTS: dict[str, Origin] = {
    "KuaiFair-KuaiRec-v0": OfficialOrigin(
        "KuaiRec", "kuairec", "KuaiRec from the official files, else its twin with a warning"
    ),
    "KuaiFair-KuaiRand-v0": OfficialOrigin(
        "KuaiRand", "kuairand", "KuaiRand-Pure from the official files, else its twin with a warning"
    ),
    "KuaiFair-KuaiRand1K-v0": OfficialOrigin(
        None, "kuairand-1k", "KuaiRand-1K from the official files; it has no twin", min_test_exposures=3
    ),
    "KuaiFair-KuaiRand27K-v0": OfficialOrigin(
        None, "kuairand-27k", "KuaiRand-27K from the official files; it has no twin"
    ),
    "KuaiFair-KuaiRandReplay-v0": OfficialOrigin(
        None,
        "kuairand",
        "KuaiRand-Pure's random log replayed: its users' own candidates and answers; no twin",
        replay=True,
    ),
    "KuaiFair-KuaiRecTwin-v0": TwinOrigin("KuaiRec", "synthetic twin of KuaiRec, full size"),
    "KuaiFair-KuaiRandTwin-v0": TwinOrigin("KuaiRand", "synthetic twin of KuaiRand-Pure, full size"),
    "KuaiFair-Toy-v0": TwinOrigin("Toy", "synthetic twin of a few hundred users and items"),
}
"""The environment ids of this library, and those that :func:`register_world` added in this process."""

_OF_THE_LIBRARY = tuple(ENVIRONMENTS)

# Those that are not settings of the data behind a world.
_WORLD_DEFAULTS = {
    name: DEFAULTS[name]
    for name in (
        "split",
        "response",
        "embedding_dim",
        "history_length",
        "popularity",
        "popularity_share",
        "min_candidates",
    )
}

# What other functions of this library or of Gymnasium take, and what to use instead.
_INSTEAD = {
    "render_mode": "render a single environment: gym.make(id, render_mode=...)",
    "max_episode_steps": "use max_len instead, the largest number of steps in a session",
    "num_envs": "make_sb3 calls the number of sessions n_envs, as Stable-Baselines3 does",
    "n_envs": "gym.make_vec calls the number of sessions num_envs, as Gymnasium does",
}


@lists_settings("world")
def make_world(env_id: str, **settings: Unpack[WorldSettings]) -> World:
    """Makes the world of an id, from the cache where possible.

    Args:
        env_id: A registered id.
        **settings: Settings of a world; see below.

    Returns:
        The world; equal settings return the same object while it is among the last few that were made.

    Raises:
        DataError: If ``data_dir`` or ``KUAIFAIR_DATA`` names a place without the files, if they are broken, or if real
            files are demanded and others are found.
        ValueError: If the id or a setting is unknown, or does not fit the id.
    """
    need_environment(env_id)
    unknown = set(settings) - set(WorldSettings.__annotations__)
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; a world takes {sorted(WorldSettings.__annotations__)}")
    if settings.get("source", "auto") not in get_args(Source):
        raise ValueError(f"source must be one of {get_args(Source)}, got {settings['source']!r}")
    if settings.get("split", "train") not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {settings['split']!r}")
    source = ENVIRONMENTS[env_id].source(env_id, settings)
    true_users = (settings.get("split"), settings.get("response", "auto")) == ("test", "auto")
    if "conformity" in settings and not true_users:
        raise ValueError(
            "'conformity' is that of a twin's true users, whom only split='test' with response='auto' has; drop it"
        )
    # In the order of the defaults, so that equal settings meet the same entry of the cache.
    chosen = _WORLD_DEFAULTS | {name: value for name, value in settings.items() if name in _WORLD_DEFAULTS}
    replayed = ENVIRONMENTS[env_id].replay and chosen["split"] == "test"
    least = chosen.pop("min_candidates")
    chosen["min_candidates"] = (REPLAY_SLATE_SIZE if least is None else least) if replayed else None
    sizes = ("embedding_dim", "history_length", "min_candidates")
    need_whole(1, **{name: chosen[name] for name in sizes if chosen[name] is not None})
    need_dimension(chosen["embedding_dim"])
    world = _cached_world(source, **chosen)
    encoder = settings.get("encoder")
    return world if encoder is None else encoder.encoded(world)


def need_environment(env_id: str) -> None:
    """Checks that an environment id is one of this library, or was registered in this process.

    Raises:
        ValueError: If it is not.
    """
    if env_id not in ENVIRONMENTS:
        raise ValueError(
            f"no environment is called {env_id!r}; there are {', '.join(ENVIRONMENTS)}, and "
            "kuaifair_env.register_world (--data on the command line) makes one of your own data"
        )


@lists_settings("world", "sessions", "leave rule")
def make_env(env_id: str, render_mode: str | None = None, **settings: Unpack[Settings]) -> KuaiFairEnv:
    """Makes the single environment of an id; the entry point behind ``gym.make``."""
    world, config = world_and_config(env_id, settings)
    return KuaiFairEnv(world, config, render_mode)


@lists_settings("world", "sessions", "leave rule")
def make_vector_env(
    env_id: str,
    num_envs: int = 1,
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    **settings: Unpack[Settings],
) -> KuaiFairVectorEnv:
    """Makes the batched environment of an id; the entry point behind ``gym.make_vec``."""
    world, config = world_and_config(env_id, settings)
    return KuaiFairVectorEnv(world, config, num_envs, autoreset_mode)


@lists_settings("world", "sessions", "leave rule")
def make_sb3(
    env_id: str,
    n_envs: int = 64,
    seed: int | None = None,
    info_level: InfoLevel = "episode",
    **settings: Unpack[Settings],
) -> KuaiFairVecEnv:
    """Makes the native Stable-Baselines3 environment of an id: the fastest way to train an SB3 agent.

    Args:
        env_id: A registered id.
        n_envs: Concurrent sessions.
        seed: Seed of the sessions.
        info_level: See :class:`~kuaifair_env.sb3.KuaiFairVecEnv`.
        **settings: See below.
    """
    from kuaifair_env.sb3 import KuaiFairVecEnv

    world, config = world_and_config(env_id, settings)
    return KuaiFairVecEnv(world, config, n_envs, seed, info_level)


def register_ids() -> None:
    """Registers every id with Gymnasium, once."""
    for env_id in ENVIRONMENTS:
        _register_id(env_id)


def register_world(
    env_id: str,
    data: InteractionData | Table | tuple[Table, Table],
    test: Table | None = None,
    items: Table | None = None,
    users: Table | None = None,
    *,
    columns: LogColumns | Mapping[str, str] | None = None,
    split: SplitRule = "time",
    test_share: float = 0.2,
    min_test_exposures: int = MIN_TEST_EXPOSURES,
    replay: bool = False,
    **settings: Unpack[FrameSettings],
) -> None:
    """Registers an environment id of one's own data, for ``gym.make`` and wherever else ids are taken.

    Nothing is fitted now: that happens when the first world of the id is made. Files are read then too; now their
    headers are checked. Frames are read at once.
    The id is known in this process; studies tell their workers, and runs remember the files. Registering the same again
    changes nothing.

    Args:
        env_id: The id, such as ``"MyShop-v0"``.
        data: A data set, the training log (a DataFrame, or a CSV, TSV or Parquet file), a pair of training and test
            log, or, without ``test``, one log that is split.
        test: The test log.
        items: Table of items; see :meth:`~kuaifair_env.data.dataset.InteractionData.from_frames`.
        users: Table of users.
        columns: Names of columns that are not the usual ones, as ``LogColumns`` or by its fields (``{"user": "uid"}``).
        split: How one log is split, by ``"time"`` or by ``"user"``.
        test_share: Share of one log that the test log gets.
        min_test_exposures: Test-log exposures that an item needs to be a candidate.
        replay: Whether the test world replays the test log, whose items must have been chosen at random: a user's
            candidates are the items of the user's rows there, and feedback is what was logged (see
            :func:`~kuaifair_env.replay.build_replay_world`). Slates then hold 5 items, and none comes twice.
        **settings: See :meth:`~kuaifair_env.data.dataset.InteractionData.from_frames`.

    Raises:
        DataError: If files are missing or lack columns, or frames hold what they must not.
        ValueError: If the id belongs to this library or to other data, or settings do not go together.
    """
    if isinstance(data, tuple):
        if test is not None or len(data) != 2:
            raise ValueError("give a pair of training and test log, or data and test, not both")
        data, test = data
    if isinstance(data, InteractionData):
        if any(table is not None for table in (test, items, users, columns)) or settings:
            raise ValueError("a data set is complete: leave out tables, columns and settings of reading them")
        tables: InteractionData | OwnTables = data
    elif all(table is None or isinstance(table, (str, Path)) for table in (data, test, items, users)):
        named = {} if columns is None else dict(columns) if isinstance(columns, Mapping) else _renamed(columns)
        files = {"data": data, "test": test, "items": items, "users": users}
        paths = {name: str(path) for name, path in files.items() if path is not None}
        how: dict[str, Any] = {"split": split, "test_share": test_share}
        of_worlds = {"min_test_exposures": min_test_exposures, "replay": replay}
        tables = OwnTables.from_dict({**paths, "columns": named, **how, **of_worlds, **settings}).resolved()
    else:
        settings = {"name": env_id, **settings}
        if test is None:
            how = {"split": split, "test_share": test_share}
            tables = InteractionData.from_log(data, items, users, columns=columns, **how, **settings)
        else:
            tables = InteractionData.from_frames(data, test, items, users, columns=columns, **settings)
    register_origin(OwnOrigin(env_id, tables, min_test_exposures, replay))


def register_origin(origin: OwnOrigin) -> None:
    """Registers an id of one's own data; see :func:`register_world`."""
    env_id = origin.name
    before = ENVIRONMENTS.get(env_id)
    if env_id in _OF_THE_LIBRARY or (before is None and env_id in gym.registry):
        raise ValueError(f"{env_id!r} is an environment already; choose another name, such as MyShop-v0")
    if isinstance(before, OwnOrigin):
        if not before.same_as(origin):
            raise ValueError(
                f"{env_id!r} is registered with other data ({before.description}); give other data another name, or "
                "the next version"
            )
        return
    _register_id(env_id)
    ENVIRONMENTS[env_id] = origin


def own_origins() -> tuple[OwnOrigin, ...]:
    """Returns what was registered in this process, for workers to register too."""
    return tuple(origin for origin in ENVIRONMENTS.values() if isinstance(origin, OwnOrigin))


def _renamed(columns: LogColumns) -> dict[str, str]:
    usual = type(columns)()
    names = {column.name: getattr(columns, column.name) for column in fields(columns)}
    return {name: value for name, value in names.items() if value != getattr(usual, name)}


def _register_id(env_id: str) -> None:
    if env_id not in gym.registry:
        gym.register(
            env_id,
            entry_point="kuaifair_env.registration:make_env",
            vector_entry_point="kuaifair_env.registration:make_vector_env",
            kwargs={"env_id": env_id},
        )


def world_and_config(env_id: str, settings: Any) -> tuple[World, SessionConfig]:
    """Makes the world and the session configuration that an environment's settings describe.

    Raises:
        ValueError: If a setting is unknown.
    """
    names, unknown = set(SESSION_SETTINGS), set(settings) - set(DEFAULTS)
    for name in sorted(unknown & set(_INSTEAD)):
        raise ValueError(f"{name!r} is no setting here; {_INSTEAD[name]}")
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}{_similar(unknown)}; {env_id} takes {sorted(DEFAULTS)}")
    config = session_config(env_id, {name: value for name, value in settings.items() if name in names})
    of_world = {name: value for name, value in settings.items() if name not in names}
    if replays(env_id) and of_world.get("min_candidates") is None:
        of_world["min_candidates"] = max(REPLAY_SLATE_SIZE, config.items_per_slate)
    return make_world(env_id, **of_world), config


def replays(env_id: str) -> bool:
    """Returns whether the test world of an id replays a log; False for ids that nobody registered."""
    return env_id in ENVIRONMENTS and ENVIRONMENTS[env_id].replay


def session_config(env_id: str, settings: Mapping[str, Any]) -> SessionConfig:
    """Returns how sessions of an id run.

    Args:
        env_id: A registered id, or the name of other worlds.
        settings: See :meth:`~kuaifair_env.batch.SessionConfig.of_settings`; what is not there is as usual in the id.

    Raises:
        ValueError: See there.
    """
    usual = REPLAY_SESSIONS if replays(env_id) else {}
    if settings.get("action_mode") == "item":
        usual = {name: value for name, value in usual.items() if name != "slate_size"}
    given = {name: value for name, value in settings.items() if value is not None or name not in usual}
    return SessionConfig.of_settings({**usual, **given})


def _similar(unknown: Iterable[str]) -> str:
    """Returns a question after the settings that unknown names are most like, or nothing."""
    matches = [match for name in sorted(unknown) for match in get_close_matches(name, DEFAULTS, 1)]
    return f" (did you mean {', '.join(matches)}?)" if matches else ""


@lru_cache(maxsize=8)
def _cached_world(
    source: DataSource,
    split: Split,
    response: ResponseKind,
    embedding_dim: int,
    history_length: int,
    popularity: PopularitySource,
    popularity_share: float,
    min_candidates: int | None,
) -> World:
    found = source.load()
    data, truth = found.data, found.truth
    if found.canonical:
        candidates = covered_items(data, found.min_test_exposures)
    else:
        candidates = candidate_rows(data, found.min_test_exposures)
        warn_of_users_left_out(data)
    sizes: dict[str, Any] = {
        "history_length": history_length,
        "popularity": popularity,
        "popularity_share": popularity_share,
    }
    if min_candidates is not None:
        return build_replay_world(
            data,
            candidates=candidates,
            min_candidates=min_candidates,
            embeddings=cached_embeddings(data, embedding_dim),
            **sizes,
        )
    preference = None
    model: ResponseModel
    if split == "test" and truth is not None and response == "auto":
        model = GradedResponse.around(truth, data.test, found.largest) if found.graded else truth
        preference = truth.truth.true_preference
        embeddings = cached_embeddings(data, embedding_dim)
    else:
        with ThreadPoolExecutor(1) as beside:  # both take seconds where neither is cached
            embedded = beside.submit(cached_embeddings, data, embedding_dim)
            model = cached_response(data, split, response)
        embeddings = embedded.result()
    return build_world(
        data,
        split,
        model,
        candidates=candidates,
        embeddings=embeddings,
        true_preference=preference,
        **sizes,
    )
