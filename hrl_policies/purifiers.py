"""Purifiers that methods bring along: pretrained on first use, then taken from the cache."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

from kuaifair_env.data.cache import cache_dir
from kuaifair_env.errors import ArtifactError
from kuaifair_env.worlds import World

_VERSION = 2


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
    from dsrm.artifacts import load_purifier, save_purifier
    from dsrm.binding import WorldKey
    from dsrm.pretraining import MODES, PretrainConfig, pretrain

    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    key = hashlib.sha256(json.dumps(WorldKey.of_world(world).as_dict(), sort_keys=True).encode())
    key.update(world.users.tobytes())
    name = f"{mode}-{key.hexdigest()[:16]}-seed{seed}-v{_VERSION}.safetensors"
    path = cache_dir(folder) / "purifiers" / name
    if path.exists():
        try:
            load_purifier(path)
            return path
        except ArtifactError as error:
            warnings.warn(f"the purifier is made again: {error}", stacklevel=2)
            path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    config = PretrainConfig(mode=mode, seed=seed)
    checkpoint = path.with_name(path.name + ".partial")
    save_purifier(pretrain(world, config, checkpoint=checkpoint, progress=progress), path)
    return path
