"""Logged transitions as Minari data sets (HDF5), and back, exactly."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from hrl_policies.baselines.transitions import LoggedTransitions
from kuaifair_env.actions import SlateSpace
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError

_PROVENANCE = "kuaifair_provenance"
_SLATES = "kuaifair_slates"
_SLOT_REWARDS = "slot_rewards"


def write_minari(transitions: LoggedTransitions, target: str | Path) -> None:
    """Writes transitions as a Minari data set, one episode a session.

    Feedback on single items goes to ``infos["slot_rewards"]``, provenance into the data set's metadata.

    Args:
        transitions: What to write.
        target: A Minari id such as ``"kuaifair/kuairec/log-v0"``, put where Minari keeps its data sets
            (``MINARI_DATASETS_PATH``), or a ``Path``: the folder to make.

    Raises:
        ArtifactError: If there is a data set of that name already, or the id is not valid.
        KuaiFairError: If Minari is not installed.
    """
    minari = _minari()
    buffers = [_episode(minari, transitions, rows) for rows in transitions.sessions]
    if isinstance(target, Path):
        _write_folder(transitions, buffers, target, minari.__version__)
        return
    try:
        with warnings.catch_warnings():
            # Minari asks for an author and a link to code, which a user's own log need not have.
            warnings.simplefilter("ignore", UserWarning)
            dataset = minari.create_dataset_from_buffers(
                target,
                buffers,
                action_space=transitions.action_space,
                observation_space=transitions.observation_space,
                data_format="hdf5",
            )
    except ValueError as error:
        raise ArtifactError(f"Minari refuses the data set {target!r}: {error}") from error
    dataset.storage.update_metadata(_metadata(transitions))


def read_minari(source: str | Path) -> LoggedTransitions:
    """Reads a Minari data set, one that :func:`write_minari` wrote or any other of vectors and simple actions.

    Args:
        source: The id of a local data set, or a ``Path`` to a folder.

    Returns:
        The transitions; of data sets from elsewhere the provenance says ``source: "minari"`` and their id. Rewards
        and observations become ``float32``. An episode that neither terminates nor is truncated counts as truncated.

    Raises:
        ArtifactError: If there is no such data set, or it is damaged.
        DataError: If it is empty, its observations are not vectors, or its actions not ``Box``, ``Discrete`` or
            ``MultiDiscrete``.
        KuaiFairError: If Minari is not installed.
    """
    minari = _minari()
    try:
        dataset = minari.MinariDataset(source) if isinstance(source, Path) else minari.load_dataset(source)
    except (ValueError, OSError, KeyError) as error:
        raise ArtifactError(f"there is no Minari data set {source}: {error}") from error
    metadata = dataset.storage.metadata
    space = dataset.observation_space
    if not isinstance(space, spaces.Box):
        raise DataError(f"{source}: offline methods learn from vectors, but observations are {space}")
    try:
        episodes = list(dataset.iterate_episodes())
    except (ValueError, OSError, KeyError) as error:
        raise ArtifactError(
            f"the episodes of the Minari data set {source} cannot be read: {error}"
        ) from error
    if not episodes:
        raise DataError(f"{source} holds no episodes; offline methods need at least one transition")
    columns = [_columns(episode) for episode in episodes]
    joined = {name: np.concatenate([one[name] for one in columns]) for name in columns[0]}
    actions = dataset.action_space
    if metadata.get(_SLATES):
        actions = SlateSpace(int(actions.nvec[0]), len(actions.nvec))
    joined["actions"] = joined["actions"].astype(np.float32 if isinstance(actions, spaces.Box) else np.int64)
    stored = metadata.get(_PROVENANCE)
    provenance = {"source": "minari", "dataset_id": metadata.get("dataset_id", str(source))}
    return LoggedTransitions(
        **joined,
        observation_space=spaces.Box(
            space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32
        ),
        action_space=actions,
        provenance=provenance if stored is None else json.loads(stored),
    )


def _columns(episode: Any) -> dict[str, Any]:
    observations = np.asarray(episode.observations, np.float32)
    terminated, truncated = (
        np.asarray(flags, np.bool_).copy() for flags in (episode.terminations, episode.truncations)
    )
    # Some data sets set both in the last step; the end of the task counts.
    truncated &= ~terminated
    truncated[-1] |= not terminated[-1]
    found = {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": np.asarray(episode.actions),
        "rewards": np.asarray(episode.rewards, np.float32),
        "terminated": terminated,
        "truncated": truncated,
    }
    slots = (episode.infos or {}).get(_SLOT_REWARDS)
    return found if slots is None else found | {"slot_rewards": slots}


def _episode(minari: Any, transitions: LoggedTransitions, rows: slice) -> Any:
    last = transitions.next_observations[rows.stop - 1 : rows.stop]
    slots = transitions.slot_rewards
    return minari.data_collector.EpisodeBuffer(
        observations=np.concatenate([transitions.observations[rows], last]),
        actions=transitions.actions[rows],
        rewards=transitions.rewards[rows],
        terminations=transitions.terminated[rows],
        truncations=transitions.truncated[rows],
        infos=None if slots is None else {_SLOT_REWARDS: slots[rows]},
    )


def _metadata(transitions: LoggedTransitions) -> dict[str, Any]:
    return {
        _PROVENANCE: json.dumps(dict(transitions.provenance), sort_keys=True),
        _SLATES: isinstance(transitions.action_space, SlateSpace),
    }


def _write_folder(transitions: LoggedTransitions, buffers: list[Any], target: Path, version: str) -> None:
    storage = import_module("minari.dataset.minari_storage").MinariStorage
    if target.exists():
        raise ArtifactError(f"{target} exists already; choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        made = storage.new(
            temporary,
            observation_space=transitions.observation_space,
            action_space=transitions.action_space,
            data_format="hdf5",
        )
        named = {"dataset_id": f"{target.name}-v0", "minari_version": version}
        made.update_metadata(named | _metadata(transitions))
        made.update_episodes(buffers)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _minari() -> Any:
    try:
        return import_module("minari")
    except ImportError as error:
        raise KuaiFairError(
            "Minari data sets need Minari with HDF5: pip install 'kuaifair[minari]'"
        ) from error
