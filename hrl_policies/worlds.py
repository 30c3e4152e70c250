"""The two worlds of a study, and sessions in them: agents learn in one and are evaluated in the other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsrm.click_scorer import ClickScorer
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.cache import cache_dir
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.progress import announce_rebuilt
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.registration import make_world
from kuaifair_env.world import World

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

    from dsrm.item_term import ItemTerm
    from dsrm.purifier import StatePurifier
    from kuaifair_env.randomisation import RandomisationLike
    from kuaifair_env.settings import WorldSettings


SEED_LIMIT = 2**31
_SEED_STRIDE = 1_000_003
_VERSION = 5


@dataclass(frozen=True)
class WorldPair:
    """A training world and a test world over the same data set.

    Attributes:
        name: Environment id, or how a study calls worlds of its own.
        train: Where agents learn.
        test: Where they are evaluated.
        item_term: The item term that both worlds hold, if any; see :meth:`given`.
    """

    name: str
    train: World
    test: World
    item_term: ItemTerm | None = None

    def __post_init__(self) -> None:
        if self.train.split != "train" or self.test.split != "test":
            raise DataError(f"need a training and a test world, got '{self.train.split}' and '{self.test.split}'")
        if not np.array_equal(self.train.item_ids, self.test.item_ids):
            raise DataError("both worlds must recommend the same candidates in the same order")
        if np.intersect1d(self.train.users, self.test.users).size:
            raise DataError("users of the test world must not have sessions in the training world")

    @cached_property
    def scorer(self) -> ClickScorer:
        """The click model of the greedy controls, from the training log alone; fitted on first use."""
        if self.item_term is None:
            return ClickScorer.fit(self.train)
        from dsrm.item_term import without_item_term

        fitted = ClickScorer.fit(without_item_term(self.train))
        return ClickScorer.of_item_term(self.train, fitted, self.item_term.similarity)

    def given(self, term: ItemTerm) -> WorldPair:
        """Returns both worlds with an item term, for every agent and every control.

        Raises:
            MismatchError: If it was fitted on other data, or the worlds have one.
        """
        from dsrm.item_term import with_item_term

        return WorldPair(self.name, with_item_term(self.train, term), with_item_term(self.test, term), term)

    def given_mode(self, mode: str) -> WorldPair:
        """Returns both worlds with the item term of a mode, fitted now.

        Raises:
            ValueError: If the mode is unknown.
        """
        from dsrm.item_term import fit_item_term, item_term_mode

        return self.given(fit_item_term(self.train, item_term_mode(mode)))

    def describe(self) -> dict[str, Any]:
        """Returns name and both worlds' descriptions, JSON-able."""
        described = {"name": self.name, "train": self.train.describe(), "test": self.test.describe()}
        return described | ({} if self.item_term is None else {"item_term": dict(self.item_term.provenance)})


def load_worlds(env_id: str, settings: WorldSettings | None = None, data_dir: str | Path | None = None) -> WorldPair:
    """Makes both worlds of a registered id.

    Args:
        env_id: A registered id.
        settings: What :func:`kuaifair_env.make_world` takes, except ``split`` and ``data_dir``.
        data_dir: Folder with the official files.

    Raises:
        DataError: If real files are demanded and missing, or broken.
        ValueError: If the id or a setting is unknown.
    """
    chosen: WorldSettings = {} if settings is None else settings
    if data_dir is not None:
        chosen = {**chosen, "data_dir": data_dir}
    train: WorldSettings = {**chosen, "split": "train"}
    # Conformity is that of the test world's users.
    train.pop("conformity", None)
    test: WorldSettings = {**chosen, "split": "test"}
    return WorldPair(env_id, make_world(env_id, **train), make_world(env_id, **test))


def cached_purifier(
    world: World, mode: str, seed: int = 0, *, folder: str | Path | None = None, progress: bool = False
) -> Path:
    """Returns the file of a purifier of a training world and its users, pretraining it if the cache holds none.

    Args:
        world: The training world, with the users to train on.
        mode: One of ``dsrm.MODES``.
        seed: Seed of its training.
        folder: The cache folder; None takes the default one.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the mode is unknown, or the world is not a training world.
    """
    from dsrm.pretraining import PretrainConfig, pretrain_file
    from dsrm.purifier import MODES, WorldKey, forget_pretraining, load_purifier

    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    key = hashlib.sha256(json.dumps(asdict(WorldKey.of_world(world)), sort_keys=True).encode())
    key.update(world.users.tobytes())
    name = f"{mode}-{key.hexdigest()[:16]}-seed{seed}-v{_VERSION}.safetensors"
    path = cache_dir(folder) / "purifiers" / name
    if path.exists():
        try:
            load_purifier(path)
            forget_pretraining(path)
            return path
        except ArtifactError as error:
            announce_rebuilt(error)
            path.unlink()
    pretrain_file(path, world, PretrainConfig(mode=mode, seed=seed), progress=progress)
    return path


def training_sessions(
    world: World,
    config: SessionConfig,
    n_envs: int,
    seed: int,
    *,
    randomisation: RandomisationLike = "auto",
    purifier: StatePurifier | None = None,
) -> VecEnv:
    """Returns sessions of a training world whose users deviate from its response model.

    Where the purifier is a belief it learns what all users of a block share, as while serving.

    Args:
        world: The training world.
        config: How sessions run.
        n_envs: Concurrent sessions.
        seed: Seed of sessions and deviations.
        randomisation: How far users deviate; see :func:`kuaifair_env.randomised_worlds.randomised`.
        purifier: The purifier of their states.
    """
    from dsrm.wrappers import VecDSRM

    env = purified_sessions(randomised(world, randomisation, seed), config, n_envs, session_seed(seed), purifier)
    if isinstance(env, VecDSRM):
        env.learns = env.belief is not None
    return env


def purified_sessions(
    world: World, config: SessionConfig, n_envs: int, seed: int, purifier: StatePurifier | None
) -> VecEnv:
    """Returns sessions of a world, with purified states if there is a purifier; nothing is learned in them."""
    from dsrm.wrappers import VecDSRM
    from kuaifair_env.sb3 import KuaiFairVecEnv

    env = KuaiFairVecEnv(world, config, n_envs, seed)
    return env if purifier is None else VecDSRM(env, purifier)


def session_seed(seed: int) -> int:
    """Returns the seed of the sessions that belongs to a training seed.

    Row ``i`` of seed ``s`` plays stream ``s + i``, so neighbouring training seeds would meet the same users with the
    same random numbers; the seeds of their sessions are far apart.
    """
    return (seed * _SEED_STRIDE) % SEED_LIMIT
