"""The registered environment ids, and how worlds and environments are made from an id."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import gymnasium as gym
from gymnasium.vector import AutoresetMode

from kuaifair_env.abandonment import RULE_PARAMETERS
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.clicks import Clicks, FeedbackKind, Positive, kuairand_clicks, kuairec_clicks
from kuaifair_env.data.schema import Split
from kuaifair_env.embeddings import EMBEDDING_DIM, cached_embeddings
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import DataError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.fitting import ResponseKind, cached_response
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import HISTORY_LENGTH, World, WorldEncoder, build_world, candidate_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kuaifair_env.abandonment import LeaveRuleLike
    from kuaifair_env.data.dataset import InteractionData
    from kuaifair_env.data.popularity import PopularitySource
    from kuaifair_env.data.sources import DatasetName
    from kuaifair_env.metrics.fairness import DisparityMode
    from kuaifair_env.sb3 import InfoLevel, KuaiFairVecEnv
    from kuaifair_env.simulator import InitialHistory, Repeats
    from kuaifair_env.spaces import ActionMode, Duplicates, ObservationMode
    from kuaifair_env.synthetic.config import TasteStrength

Source = Literal["auto", "real", "twin"]


class IncompleteDataWarning(UserWarning):
    """Files in the official format are not the whole official ones: a part of them, or a twin that was written."""


class TwinFallbackWarning(UserWarning):
    """A world was asked for by the name of a real data set and made from its synthetic twin."""


@dataclass(frozen=True)
class Origin:
    """The data behind an environment id.

    Attributes:
        twin: Name of the synthetic twin.
        official: Name of the official data set that is used when its files are found, or None.
        description: One line for tables.
    """

    twin: str
    official: DatasetName | None
    description: str


ENVIRONMENTS: dict[str, Origin] = {
    "KuaiFair-KuaiRec-v0": Origin(
        "KuaiRec", "kuairec", "KuaiRec from the official files, else its twin with a warning"
    ),
    "KuaiFair-KuaiRand-v0": Origin(
        "KuaiRand", "kuairand", "KuaiRand-Pure from the official files, else its twin with a warning"
    ),
    "KuaiFair-KuaiRecTwin-v0": Origin("KuaiRec", None, "synthetic twin of KuaiRec, full size"),
    "KuaiFair-KuaiRandTwin-v0": Origin("KuaiRand", None, "synthetic twin of KuaiRand-Pure, full size"),
    "KuaiFair-Toy-v0": Origin("Toy", None, "synthetic twin of a few hundred users and items"),
}


_WORLD_DEFAULTS: dict[str, Any] = {
    "split": "train",
    "response": "auto",
    "taste": "measured",
    "conformity": 0.0,
    "embedding_dim": EMBEDDING_DIM,
    "history_length": HISTORY_LENGTH,
    "popularity": "train",
}


# What other functions of this library or of Gymnasium take, and what to use instead.
_INSTEAD = {
    "render_mode": "render a single environment: gym.make(id, render_mode=...)",
    "max_episode_steps": "use max_len instead, the largest number of steps in a session",
    "num_envs": "make_sb3 calls the number of sessions n_envs, as Stable-Baselines3 does",
    "n_envs": "gym.make_vec calls the number of sessions num_envs, as Gymnasium does",
}

CLICK_SETTINGS = ("positive", "feedback", "clip")
"""Settings of a world that say what counts as a click."""


class WorldSettings(TypedDict, total=False):
    """Settings of a world; see :func:`make_world`."""

    split: Split
    data_dir: str | Path | None
    source: Source
    allow_partial: bool
    positive: Positive | None
    feedback: FeedbackKind
    clip: float | None
    response: ResponseKind
    taste: TasteStrength | float
    conformity: float
    embedding_dim: int
    history_length: int
    popularity: PopularitySource
    encoder: WorldEncoder | None


class Settings(WorldSettings, total=False):
    """Settings that ``gym.make`` takes: those of a world and those of its sessions.

    The latter are the fields of ``SessionConfig`` and the parameters of its leave rule.
    """

    max_len: int
    slate_size: int | None
    action_mode: ActionMode
    observation_mode: ObservationMode
    leave: LeaveRuleLike
    initial_history: InitialHistory
    repeats: Repeats
    duplicates: Duplicates
    ad_bound: float
    unfair_penalty: float
    mode: DisparityMode
    target_share: float
    window: int | None
    grace_steps: int
    initial_temper: float | None
    threshold: int


def make_world(env_id: str, **settings: Unpack[WorldSettings]) -> World:
    """Makes the world of an id, from the cache where possible.

    Args:
        env_id: A registered id.
        **settings: ``split`` (``"train"``, the default, or ``"test"``); ``data_dir`` (folder or archive with the
            official files, which synthetic ids ignore; else ``KUAIFAIR_DATA``, else the cache); ``source``
            (``"real"`` takes the whole official files and nothing else, ``"twin"`` the twin; ``"auto"`` takes the files
            that there are, with a warning if they are not the whole official ones, and the twin with a warning where
            no place was named and the cache has none); ``allow_partial`` (a part of the official files is welcome:
            ``source="real"`` takes it, ``"auto"`` says nothing; worlds and results stay labelled as partial);
            ``positive`` (what counts as a click: ``{"watch_ratio": 1.0}``, the default of KuaiRec, or another
            threshold; for KuaiRand and the toy ``"is_click"``, the default, another logged column, or weights of
            several); ``feedback`` (KuaiRec: ``"watch_ratio"`` rewards the watch ratio itself instead of the click, up
            to ``clip``, 5 by default); ``response`` (``"auto"``, ``"observed"``, ``"factorised"``,
            ``"sequential"``); ``taste`` (twins: ``"measured"``, ``"strong"`` or standard deviation in logits);
            ``conformity`` (twins: share of the training world's conformity that the test world's users have, 0 by
            default); ``embedding_dim``;
            ``history_length``; ``popularity`` (``"train"`` or ``"shown"``); ``encoder`` (a pretrained
            ``dsrm.encoder.Encoder``, in place of the world's own embeddings).

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
    files = _official_files(env_id, settings.get("data_dir"), settings.get("source", "auto"))
    if files is not None and not {"taste", "conformity"}.isdisjoint(settings):
        raise ValueError(f"'taste' and 'conformity' are settings of twins, but {env_id} reads {files}; drop them")
    # In the order of the defaults, so that equal settings meet the same entry of the cache.
    chosen = _WORLD_DEFAULTS | {name: value for name, value in settings.items() if name in _WORLD_DEFAULTS}
    origin, clicks = ENVIRONMENTS[env_id], clicks_of(env_id, settings)
    if origin.official is not None and files is not None:
        allow_partial = settings.get("allow_partial", False)
        _check_provenance(origin.official, files, clicks, settings.get("source", "auto"), allow_partial)
    world = _cached_world(origin.twin if files is None else origin.official, files, clicks, **chosen)
    encoder = settings.get("encoder")
    return world if encoder is None else encoder.encoded(world)


def clicks_of(env_id: str, settings: Mapping[str, Any]) -> Clicks:
    """Returns what counts as a click by an id's settings: ``positive``, ``feedback`` and ``clip``.

    Raises:
        DataError: If they do not fit the id.
    """
    given = {name: settings[name] for name in CLICK_SETTINGS if name in settings}
    return kuairec_clicks(**given) if ENVIRONMENTS[env_id].twin == "KuaiRec" else kuairand_clicks(**given)


def need_environment(env_id: str) -> None:
    """Checks that an environment id is one of this library.

    Raises:
        ValueError: If it is not.
    """
    if env_id not in ENVIRONMENTS:
        raise ValueError(f"no environment is called {env_id!r}; there are {', '.join(ENVIRONMENTS)}")


def make_env(env_id: str, render_mode: str | None = None, **settings: Unpack[Settings]) -> KuaiFairEnv:
    """Makes the single environment of an id; the entry point behind ``gym.make``."""
    world, config = world_and_config(env_id, settings)
    return KuaiFairEnv(world, config, render_mode)


def make_vector_env(
    env_id: str,
    num_envs: int = 1,
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    **settings: Unpack[Settings],
) -> KuaiFairVectorEnv:
    """Makes the batched environment of an id; the entry point behind ``gym.make_vec``."""
    world, config = world_and_config(env_id, settings)
    return KuaiFairVectorEnv(world, config, num_envs, autoreset_mode)


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
        **settings: See :class:`Settings`.
    """
    from kuaifair_env.sb3 import KuaiFairVecEnv

    world, config = world_and_config(env_id, settings)
    return KuaiFairVecEnv(world, config, n_envs, seed, info_level)


def register_ids() -> None:
    """Registers every id with Gymnasium, once."""
    for env_id in ENVIRONMENTS:
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
    names = {field.name for field in fields(SessionConfig)} | set(RULE_PARAMETERS)
    known = names | set(WorldSettings.__annotations__)
    unknown = set(settings) - known
    for name in sorted(unknown & set(_INSTEAD)):
        raise ValueError(f"{name!r} is no setting here; {_INSTEAD[name]}")
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; {env_id} takes {sorted(known)}")
    config = SessionConfig.of_settings({name: value for name, value in settings.items() if name in names})
    world = make_world(env_id, **{name: value for name, value in settings.items() if name not in names})
    return world, config


@lru_cache(maxsize=8)
def _cached_world(
    name: str,
    files: Path | None,
    clicks: Clicks,
    split: Split,
    response: ResponseKind,
    taste: TasteStrength | float,
    conformity: float,
    embedding_dim: int,
    history_length: int,
    popularity: PopularitySource,
) -> World:
    data, truth = _data(name, files, clicks, taste, conformity)
    preference = None
    model: ResponseModel
    if split == "test" and truth is not None and response == "auto":
        model = GradedResponse.around(truth, data.test, clicks.largest) if clicks.graded else truth
        preference = truth.truth.true_preference
    else:
        model = cached_response(data, split, response)
    return build_world(
        data,
        split,
        model,
        candidates=candidate_rows(data),
        embeddings=cached_embeddings(data, embedding_dim),
        history_length=history_length,
        popularity=popularity,
        true_preference=preference,
    )


def _official_files(env_id: str, data_dir: str | Path | None, source: Source) -> Path | None:
    """Returns the official files that an id reads, or None where its twin stands in; looked for at every call."""
    official = ENVIRONMENTS[env_id].official
    if official is None:
        if source == "real":
            raise ValueError(f"{env_id} is synthetic, there are no real files behind it; drop source='real'")
        return None
    if source == "twin":
        return None
    from kuaifair_env.data import find_source

    files = find_source(official, data_dir)
    if files is None and source == "real":
        raise DataError(
            f"{env_id} with source='real' needs the official files, and the cache does not hold them; "
            f"get them with: kuaifair data fetch {official}"
        )
    if files is None:
        _warn_of_twin(env_id, official)
    return files


def _check_provenance(official: str, files: Path, clicks: Clicks, source: Source, allow_partial: bool) -> None:
    """Refuses, or warns of, files that are not the whole official ones."""
    provenance = _official_data(official, files, clicks).provenance
    if provenance.origin == "real" or (provenance.origin == "partial" and allow_partial):
        return
    found = f"this is {provenance.name} ({provenance.origin}: {provenance.description})"
    if source == "real":
        hint = "; allow_partial=True takes a part, labelled as such" if provenance.origin == "partial" else ""
        raise DataError(f"source='real' needs the whole official files of {official}, but {found}{hint}", file=files)
    warnings.warn(f"{files}: {found}, not the whole official files", IncompleteDataWarning, stacklevel=3)


@lru_cache(maxsize=4)
def _official_data(official: str, files: Path, clicks: Clicks) -> InteractionData:
    from kuaifair_env.data import load_kuairand, load_kuairec

    if official == "kuairec":
        return load_kuairec(files, **clicks.describe())
    return load_kuairand(files, positive=dict(clicks.positive))


def _data(
    name: str, files: Path | None, clicks: Clicks, taste: TasteStrength | float, conformity: float
) -> tuple[InteractionData, TwinResponse | None]:
    """Returns the named official data or twin, and the true response of a twin."""
    if files is not None:
        return _official_data(name, files, clicks), None
    from kuaifair_env.synthetic.config import twin_config
    from kuaifair_env.synthetic.twin import load_twin

    twin = load_twin(twin_config(name, taste_strength=taste, clicks=clicks))
    return twin.data, TwinResponse(twin.truth, conformity, twin.data.provenance.as_dict())


def _warn_of_twin(env_id: str, official: str) -> None:
    warnings.warn(
        f"\n{'*' * 88}\n"
        f"*  {env_id}: the official files were not found, so this is the SYNTHETIC TWIN.\n"
        f"*  Do not publish its numbers as results on the real data.\n"
        f"*  Get the files: kuaifair data fetch {official}   |  forbid this: source='real'  |  "
        f"silence it: source='twin'\n"
        f"{'*' * 88}",
        TwinFallbackWarning,
        stacklevel=4,
    )
