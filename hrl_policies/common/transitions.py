"""Logged transitions: what offline methods learn from, and where it came from; their files are Minari data sets."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gymnasium import Env, spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from kuaifair_env.actions import SlateSpace
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError
from kuaifair_env.files import temporary_beside, whole

if TYPE_CHECKING:
    import torch
    from stable_baselines3.common.buffers import ReplayBuffer


@dataclass(frozen=True)
class LoggedTransitions:
    """``n`` transitions, session after session, in the order in which they happened.

    Within a session the next observation is the observation of the next row, bit for bit; a session ends with the
    row in which ``terminated`` or ``truncated`` is set. Values are bootstrapped where a session was truncated, and are
    not where it terminated.

    Attributes:
        observations: ``float32 (n, d)``.
        actions: ``float32 (n, m)`` for a ``Box``; item ids, ``int64 (n,)`` for ``Discrete`` and ``int64 (n, K)`` for
            slates.
        rewards: ``float32 (n,)``, mean feedback of the slate.
        next_observations: ``float32 (n, d)``.
        terminated: ``bool (n,)``, the session ended here.
        truncated: ``bool (n,)``, the record of the session ended here, but not the session.
        observation_space: Of the observations.
        action_space: Of the actions.
        provenance: Where the transitions came from, JSON-able: ``source`` (``"log"``, ``"env_behaviour"``, ...) and,
            for KuaiFair data, the data set with its hash and origin.
        slot_rewards: ``float32 (n, K)``, feedback on each item of a slate, where actions are item ids; else None.

    Raises:
        DataError: If arrays do not fit each other or their spaces, hold NaN, or sessions are broken.
    """

    observations: FloatArray
    actions: NDArray[Any]
    rewards: FloatArray
    next_observations: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    observation_space: spaces.Box
    action_space: spaces.Space[Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    slot_rewards: FloatArray | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        for name in ("observations", "next_observations", "rewards", "actions"):
            if not np.isfinite(getattr(self, name)).all():
                raise DataError(f"{name} of logged transitions hold NaN or infinity")
        _check_actions(self.actions, self.action_space)
        ends = self.ends
        if not ends[-1]:
            raise DataError("the last transition must end its session: set terminated or truncated")
        within = np.flatnonzero(~ends[:-1])
        axes = tuple(range(1, self.observations.ndim))
        same = (self.next_observations[within] == self.observations[within + 1]).all(axis=axes)
        if not same.all():
            row = int(within[~same][0])
            raise DataError(
                f"transition {row} is followed by another observation than its own next one; end the session there"
            )

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def ends(self) -> BoolArray:
        """``bool (n,)``, last transition of each session."""
        return self.terminated | self.truncated

    @property
    def sessions(self) -> list[slice]:
        """Rows of each session."""
        stops = np.flatnonzero(self.ends) + 1
        return [slice(int(a), int(b)) for a, b in zip(np.r_[0, stops[:-1]], stops, strict=True)]

    @property
    def slots(self) -> int:
        """Items of a logged slate ``K`` (1 for ``Discrete``, and for actions that name no items)."""
        return len(self.action_space.nvec) if isinstance(self.action_space, spaces.MultiDiscrete) else 1

    def to_replay_buffer(self, device: torch.device | str = "auto") -> ReplayBuffer:
        """Returns a full Stable-Baselines3 replay buffer, for its own off-policy algorithms.

        Values are bootstrapped where a session was truncated, and are not where it terminated. Continuous actions are
        scaled to ``[-1, 1]``, as those algorithms store them.

        Args:
            device: Where minibatches are put.

        Raises:
            DataError: If continuous actions have no finite bounds.
        """
        from stable_baselines3.common.buffers import ReplayBuffer

        buffer = ReplayBuffer(len(self), self.observation_space, self.action_space, device, n_envs=1)
        buffer.observations[:, 0] = self.observations
        buffer.next_observations[:, 0] = self.next_observations
        buffer.actions[:, 0] = scaled_actions(self.actions, self.action_space).reshape(len(self), -1)
        buffer.rewards[:, 0] = self.rewards
        buffer.dones[:, 0] = self.ends
        buffer.timeouts[:, 0] = self.truncated
        buffer.pos, buffer.full = 0, True
        return buffer

    def to_minari(self, target: str | Path, env: Env[Any, Any] | None = None) -> None:
        """Writes a Minari data set (HDF5), one episode for each session.

        Feedback on single items goes to ``infos["slot_rewards"]``, provenance into the data set's metadata.

        Args:
            target: A Minari id such as ``"kuaifair/kuairec/log-v0"``, put where Minari keeps its data sets
                (``MINARI_DATASETS_PATH``), or a ``Path``: the folder to make.
            env: An environment of ``gym.make`` that the data set names as its own, for Minari's
                ``recover_environment``; with the same observation and action spaces.

        Raises:
            ArtifactError: If there is a data set of that name already, or the id is not valid.
            DataError: If the environment's spaces are others.
            KuaiFairError: If Minari is not installed.
        """
        minari = _minari()
        spec = None if env is None else _spec_of(env, self)
        buffers = [_episode(minari, self, rows) for rows in self.sessions]
        if isinstance(target, Path):
            _write_folder(self, buffers, target, minari.__version__, spec)
            return
        try:
            with warnings.catch_warnings():
                # Minari asks for an author and a link to code, which a user's own log need not have.
                warnings.simplefilter("ignore", UserWarning)
                dataset = minari.create_dataset_from_buffers(
                    target,
                    buffers,
                    env=spec,
                    action_space=self.action_space,
                    observation_space=self.observation_space,
                    data_format="hdf5",
                )
        except ValueError as error:
            raise ArtifactError(f"Minari refuses the data set {target!r}: {error}") from error
        dataset.storage.update_metadata(_metadata(self))

    @classmethod
    def from_minari(cls, source: str | Path) -> LoggedTransitions:
        """Reads a Minari data set, one that :meth:`to_minari` wrote or any other of vectors and simple actions.

        Args:
            source: The id of a local data set, or a ``Path`` to a folder.

        Returns:
            The transitions; the provenance of data sets from elsewhere holds ``source: "minari"`` and their id. Rewards
            and observations become ``float32``; an episode that neither terminates nor is truncated counts as
            truncated.

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
        with whole(source, "Minari data set", "make it or download it again"):
            columns = [_columns(episode) for episode in dataset.iterate_episodes()]
            stored = json.loads(metadata.get(_PROVENANCE, "null"))
        if not columns:
            raise DataError(f"{source} holds no episodes; offline methods need at least one transition")
        joined = {name: np.concatenate([episode[name] for episode in columns]) for name in columns[0]}
        actions = dataset.action_space
        if metadata.get(_SLATES):
            actions = SlateSpace(int(actions.nvec[0]), len(actions.nvec))
        joined["actions"] = joined["actions"].astype(np.float32 if isinstance(actions, spaces.Box) else np.int64)
        provenance = {"source": "minari", "dataset_id": metadata.get("dataset_id", str(source))}
        return cls(
            **joined,
            observation_space=spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32),
            action_space=actions,
            provenance=provenance if stored is None else stored,
        )


_ARRAYS = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")


def scaled_actions(actions: NDArray[Any], space: spaces.Space[Any]) -> NDArray[Any]:
    """Returns continuous actions scaled from their ``Box`` to ``[-1, 1]``; item ids as they are.

    Raises:
        DataError: If the ``Box`` has no size, or no end.
    """
    if not isinstance(space, spaces.Box):
        return actions
    if not (space.is_bounded() and (space.high > space.low).all()):
        raise DataError(f"actions are scaled to [-1, 1], which needs finite bounds, low below high, not {space}")
    scaled: FloatArray = 2.0 * (actions - space.low) / (space.high - space.low) - 1.0
    return scaled.astype(np.float32)


def _check_shapes(data: LoggedTransitions) -> None:
    n = len(data.rewards)
    if n == 0:
        raise DataError("there are no transitions; offline methods need at least one")
    state, action = data.observation_space.shape, data.action_space.shape
    shapes = dict(zip(_ARRAYS, (state, action, (), state, (), ()), strict=True))
    if data.slot_rewards is not None:
        shapes["slot_rewards"] = (data.slots,)
    for name, shape in shapes.items():
        if getattr(data, name).shape != (n, *(shape or ())):
            raise DataError(f"{name} must have shape {(n, *(shape or ()))}, got {getattr(data, name).shape}")
    for name in ("observations", "next_observations", "rewards"):
        if getattr(data, name).dtype != np.float32:
            raise DataError(f"{name} must be float32, got {getattr(data, name).dtype}")
    if (data.terminated & data.truncated).any():
        raise DataError("a transition is terminated or truncated, not both")


def _check_actions(actions: NDArray[Any], space: spaces.Space[Any]) -> None:
    if isinstance(space, spaces.Box):
        if actions.dtype != np.float32:
            raise DataError(f"continuous actions must be float32, got {actions.dtype}")
        low, high = space.low, space.high
    elif isinstance(space, spaces.Discrete):
        low, high = np.asarray(space.start), np.asarray(space.start + space.n - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = np.zeros(space.shape), space.nvec - 1
    else:
        raise DataError(f"actions of logged transitions are Box, Discrete or MultiDiscrete, not {space}")
    if not isinstance(space, spaces.Box) and actions.dtype != np.int64:
        raise DataError(f"item ids must be int64, got {actions.dtype}")
    outside = ((actions < low) | (actions > high)).reshape(len(actions), -1).any(axis=1)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(f"action {actions[row]} of transition {row} is outside {space}")


_PROVENANCE = "kuaifair_provenance"
_SLATES = "kuaifair_slates"
_SLOT_REWARDS = "slot_rewards"


def _columns(episode: Any) -> dict[str, Any]:
    """Returns the arrays of :class:`LoggedTransitions` of one Minari episode."""
    observations = np.asarray(episode.observations, np.float32)
    terminated, truncated = (
        np.asarray(flags, np.bool_).copy() for flags in (episode.terminations, episode.truncations)
    )
    # Some data sets set both in the last step; the end of the task counts.
    truncated &= ~terminated
    truncated[-1] |= not terminated[-1]
    columns = {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": np.asarray(episode.actions),
        "rewards": np.asarray(episode.rewards, np.float32),
        "terminated": terminated,
        "truncated": truncated,
    }
    slots = (episode.infos or {}).get(_SLOT_REWARDS)
    return columns if slots is None else columns | {"slot_rewards": slots}


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


def _spec_of(env: Env[Any, Any], transitions: LoggedTransitions) -> EnvSpec:
    if env.spec is None:
        raise DataError("the environment has no spec; make it with gym.make")
    spaces_of_env = env.observation_space, env.action_space
    if spaces_of_env != (transitions.observation_space, transitions.action_space):
        raise DataError(
            f"the environment observes {spaces_of_env[0]} and acts in {spaces_of_env[1]}, the transitions in "
            f"{transitions.observation_space} and {transitions.action_space}"
        )
    return env.spec


def _write_folder(
    transitions: LoggedTransitions, buffers: list[Any], target: Path, version: str, spec: EnvSpec | None
) -> None:
    storage = import_module("minari.dataset.minari_storage").MinariStorage
    if target.exists():
        raise ArtifactError(f"{target} exists already; choose another folder, or remove it")
    with temporary_beside(target) as temporary:
        dataset = storage.new(
            temporary,
            observation_space=transitions.observation_space,
            action_space=transitions.action_space,
            env_spec=spec,
            data_format="hdf5",
        )
        identity = {"dataset_id": f"{target.name}-v0", "minari_version": version}
        dataset.update_metadata(identity | _metadata(transitions))
        dataset.update_episodes(buffers)
        os.replace(temporary, target)


def _minari() -> Any:
    try:
        return import_module("minari")
    except ImportError as error:
        raise KuaiFairError("Minari data sets need Minari with HDF5: pip install 'kuaifair[minari]'") from error
