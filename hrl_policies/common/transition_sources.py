"""Transitions out of the training log: consecutive exposures of a user as slates, in sessions of a declared length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped

from hrl_policies.common.transitions import LoggedTransitions
from kuaifair_env.data.schema import BoolArray, FloatArray, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.spaces import (
    ActionMode,
    StateObserver,
    action_decoder,
    embedding_sums,
    observed_states,
    reached_observations,
)
from kuaifair_env.world import World, windows_before

if TYPE_CHECKING:
    from dsrm.purifier import StatePurifier


SessionEnd = Literal["truncated", "terminated"]
ActionItems = Literal["clicked", "shown"]

_AT_ONCE = 8_192


@dataclass(frozen=True)
class LogReading:
    """How a log is read as transitions.

    Attributes:
        slate_size: Consecutive exposures of a user that count as one slate ``K``; 1 takes single exposures.
        session_length: Slates after which a user's record is cut into the next session ``L``.
        session_end: What such a cut is. ``"truncated"``: the user goes on, values are bootstrapped (nothing in the
            log says that a user left). ``"terminated"``: nothing is earned afterwards, which gives values a horizon.
        action_items: Whose mean embedding is the action of a slate, scaled to length 1, where actions are embeddings:
            ``"clicked"`` (those shown, if none was clicked) or ``"shown"``. Clicks are feedback, so ``"clicked"``
            makes the action depend on the reward it earned: it says what the slate should have been.
        max_transitions: Take whole sessions at random until there are this many transitions; None takes all.
        seed: Of that choice.

    Raises:
        ValueError: If a setting is not valid.
    """

    slate_size: int = 10
    session_length: int = 30
    session_end: SessionEnd = "truncated"
    action_items: ActionItems = "clicked"
    max_transitions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, kinds in (
            ("session_end", self.session_end, SessionEnd),
            ("action_items", self.action_items, ActionItems),
        ):
            if value not in get_args(kinds):
                raise ValueError(f"{name} must be one of {get_args(kinds)}, got {value!r}")
        if min(self.slate_size, self.session_length) < 1:
            raise ValueError(
                f"slate_size and session_length must be at least 1, got {self.slate_size}, {self.session_length}"
            )
        if self.max_transitions is not None and self.max_transitions < self.session_length:
            raise ValueError(
                f"max_transitions must hold at least one session of {self.session_length}, got {self.max_transitions}"
            )


def log_transitions(
    world: World,
    action_mode: ActionMode = "embedding",
    reading: LogReading | None = None,
    purifier: StatePurifier | None = None,
) -> LoggedTransitions:
    """Reads the training log of the training world's users as transitions.

    A user's exposures, oldest first, are cut into slates of ``K``, and slates into sessions of ``L``; what is left
    over at the end is dropped. The observation is the state that the environment would show after the same
    exposures, from the window of the last ``H``; the reward is the slate's mean click. Where actions are item ids, a
    slate that holds an item which is no candidate, or one item twice, is no action and is dropped: its exposures
    stay in the windows, and the session is cut there. Embedding actions may point at any logged item.

    Args:
        world: The training world.
        action_mode: ``"embedding"``, ``"slate"`` or ``"item"``, as the environment's.
        reading: How to read the log.
        purifier: What purifies the observed states, if the agent observes purified ones.

    Raises:
        DataError: If this is a test world, the log lists positive feedback only, or no slate is left.
        ValueError: If the action mode is unknown, or does not fit the slate size.
    """
    settings = LogReading() if reading is None else reading
    _need_training_log(world)
    slates = _cut(world, settings, named=action_mode != "embedding")
    if not len(slates.starts):
        raise DataError(
            f"no user of the training world has a whole slate of {settings.slate_size} candidates in the log"
        )
    log = world.data.train
    rows = slates.starts[:, None] + np.arange(settings.slate_size)
    clicks = log.clicks[rows]
    space = action_decoder(action_mode, world.embeddings[: world.n_items], settings.slate_size).space
    observations, following, observation_space = _states(world, slates, settings.slate_size, purifier)
    return LoggedTransitions(
        observations=observations,
        actions=_actions(world, log.items[rows], clicks, action_mode, settings.action_items),
        rewards=clicks.mean(axis=1, dtype=np.float64).astype(np.float32),
        next_observations=following,
        terminated=slates.terminated,
        truncated=slates.truncated,
        observation_space=observation_space,
        action_space=space,
        provenance={
            "source": "log",
            "split": world.split,
            "data": world.describe()["data"],
            "reading": {name: getattr(settings, name) for name in LogReading.__dataclass_fields__},
            "action_mode": action_mode,
            "purifier": None if purifier is None else purifier.describe(),
            "dropped_slates": slates.dropped,
        },
        slot_rewards=None if action_mode == "embedding" else clicks.astype(np.float32),
    )


@dataclass(frozen=True)
class _Slates:
    """Slates by the log row that they start at, in its order; ``dropped`` counts those that are no actions."""

    starts: NDArray[np.int64]
    users: NDArray[np.int64]
    terminated: BoolArray
    truncated: BoolArray
    dropped: int


def _need_training_log(world: World) -> None:
    if world.split != "train":
        raise DataError(f"offline methods learn in the training world, got the {world.split} world")
    if world.data.train.positives_only:
        raise DataError(
            f"the training log of {world.data.provenance.name} lists positive feedback only: every reward would be 1 "
            "and what was shown is unknown. Learn from transitions collected in the training world instead "
            "(data.source=env_behaviour)"
        )


def _cut(world: World, reading: LogReading, named: bool) -> _Slates:
    """Cuts the log of the world's users into slates and sessions."""
    log, size, length = world.data.train, reading.slate_size, reading.session_length
    offsets = log.offsets(len(world.data.users))
    counts = (np.diff(offsets)[world.users]) // size
    users = np.repeat(world.users.astype(np.int64), counts)
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[users] + place * size
    last = (place % length == length - 1) | (place == np.repeat(counts, counts) - 1)
    session = np.cumsum(np.r_[0, last[:-1]]) if len(last) else np.zeros(0, np.int64)
    valid = _valid(log, starts, size, world.n_items) if named else np.ones(len(starts), np.bool_)
    kept = valid
    if reading.max_transitions is not None:
        kept = valid & _chosen(session, valid, reading.max_transitions, reading.seed)
    natural = last[kept]
    starts, users, session = starts[kept], users[kept], session[kept]
    # A slate whose successor was dropped ends the record of its session: what follows it was not kept.
    followed = np.zeros(len(starts), np.bool_)
    followed[:-1] = (np.diff(starts) == size) & (np.diff(session) == 0)
    terminated = natural & (reading.session_end == "terminated")
    return _Slates(starts, users, terminated, ~followed & ~terminated, int((~valid).sum()))


def _valid(log: InteractionLog, starts: NDArray[np.int64], size: int, n_items: int) -> BoolArray:
    items = np.sort(log.items[starts[:, None] + np.arange(size)], axis=1)
    valid: BoolArray = (items[:, -1] < n_items) & (items[:, 1:] != items[:, :-1]).all(axis=1)
    return valid


def _chosen(session: NDArray[np.int64], kept: BoolArray, limit: int, seed: int) -> BoolArray:
    """Marks the slates of whole sessions, drawn at random, that together have at most ``limit`` kept slates."""
    sizes = np.bincount(session, weights=kept).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    chosen = np.zeros(len(sizes), np.bool_)
    chosen[order[np.cumsum(sizes[order]) <= limit]] = True
    return chosen[session]


def _states(
    world: World, slates: _Slates, size: int, purifier: StatePurifier | None
) -> tuple[FloatArray, FloatArray, spaces.Box]:
    """Returns the states before and after each slate, and their space."""
    space = StateObserver(world).space if purifier is None else purifier.bind(world)
    assert isinstance(space, spaces.Box)
    log = world.data.train
    first = log.offsets(len(world.data.users))[slates.users]
    places = world.history_length
    both = np.concatenate([slates.starts, slates.starts + size])
    available = both - np.concatenate([first, first])
    # Where a user's log ends another's begins: the same row, but not the same window.
    keys = both + np.concatenate([slates.users, slates.users])
    _, found, back = np.unique(keys, return_index=True, return_inverse=True)
    states = np.empty((len(found), *space.shape), np.float32)
    for begin in range(0, len(found), _AT_ONCE):
        part = found[begin : begin + _AT_ONCE]
        window = windows_before(log, both[part], available[part], places)
        observed = observed_states(world, window)
        states[begin : begin + _AT_ONCE] = observed if purifier is None else purifier.purify(observed, window)
    before, after = np.split(back.reshape(-1), 2)
    return states[before], states[after], space


def _actions(
    world: World, items: NDArray[np.int32], clicks: BoolArray, mode: ActionMode, whose: ActionItems
) -> NDArray[Any]:
    if mode == "embedding":
        return slate_embeddings(world.embeddings, items, clicks, whose)
    named = items.astype(np.int64)
    return named[:, 0] if mode == "item" else named


def slate_embeddings(
    embeddings: FloatArray, items: NDArray[Any], clicks: BoolArray, whose: ActionItems = "clicked"
) -> FloatArray:
    """Returns slates as embedding actions: the mean embedding of their items, scaled to length 1.

    Args:
        embeddings: ``float32 (M, d)``.
        items: ``(n, K)`` item rows.
        clicks: ``bool (n, K)``.
        whose: See :class:`LogReading`.

    Returns:
        ``float32 (n, d)``; zero where all items are zero vectors.
    """
    weights = np.ones(items.shape, np.float32)
    if whose == "clicked":
        clicked = clicks.any(axis=1)
        weights[clicked] = clicks[clicked]
    actions = np.empty((len(items), embeddings.shape[1]), np.float32)
    for begin in range(0, len(items), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        actions[part] = embedding_sums(embeddings, items[part], weights[part])
    norms = np.linalg.norm(actions, axis=1, keepdims=True)
    scaled: FloatArray = np.divide(actions, norms, out=np.zeros_like(actions), where=norms > 0)
    return scaled.clip(-1.0, 1.0)


class BehaviourPolicy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns actions for a batch of observations, and the next ``state``."""
        ...


class NoisyState:
    """Shows what is near the observed state, with noise: a behaviour of mixed quality for embedding actions.

    The action is ``s~ / |s~| + scale * g / sqrt(d)`` with standard normal ``g``, scaled to length 1.

    Args:
        scale: Length of the noise beside the state's 1.
        seed: Seed of the noise.
    """

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        if scale < 0:
            raise ValueError(f"scale is not negative, got {scale}")
        self._scale = scale
        self._rng = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[FloatArray, Any]:
        """Returns ``float32 (B, d)`` actions; ``deterministic`` leaves the noise out."""
        states = np.asarray(observation, np.float32)
        direction = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-6)
        if not deterministic:
            noise = self._rng.standard_normal(states.shape) / np.sqrt(states.shape[-1])
            direction = direction + self._scale * noise
        length = np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-6)
        return np.clip(direction / length, -1.0, 1.0).astype(np.float32), state


def collect_transitions(
    policy: BehaviourPolicy,
    env: VecEnv,
    steps: int,
    seed: int = 0,
    *,
    deterministic: bool = False,
    behaviour: Mapping[str, Any] | None = None,
) -> LoggedTransitions:
    """Lets a policy play in the training world and keeps what happened.

    Sessions that still run at the end are truncated. KuaiFair's own ``VecEnv`` gives each item's feedback
    (``slot_rewards``) too, where actions are item ids. Other environments (control tasks) are taken as they are.

    Args:
        policy: Who acts.
        env: Sessions of the training world, purified or not; they are reset.
        steps: Transitions at least; the number is rounded up to a whole step of all sessions.
        seed: Seed of the sessions, and of what the policy draws from torch.
        deterministic: Passed to ``predict``.
        behaviour: What to say of the policy in the provenance, JSON-able; its class is always said.

    Raises:
        DataError: If the environment plays the test world.
        ValueError: If ``steps`` is less than 1, observations are not a ``Box``, or ``VecNormalize`` changes them.
    """
    world = world_beneath(env)
    if world is not None and world.split != "train":
        raise DataError(f"transitions are collected in the training world, got the {world.split} world")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not isinstance(env.observation_space, spaces.Box):
        raise ValueError(
            f"offline methods observe a Box (observation_mode='state'), not {env.observation_space}"
        )
    if is_vecenv_wrapped(env, VecNormalize):
        raise ValueError("logged transitions are not normalised; collect without VecNormalize")
    rounds = -(-steps // env.num_envs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        played = _play(policy, env, rounds, seed, deterministic)
    return LoggedTransitions(
        **played,
        observation_space=env.observation_space,
        action_space=env.action_space,
        provenance={
            "source": "env_behaviour",
            "behaviour": {"policy": type(policy).__name__, **(behaviour or {})},
            "deterministic": deterministic,
            "seed": seed,
            "num_envs": env.num_envs,
            **({} if world is None else {"split": world.split, "data": world.describe()["data"]}),
        },
    )


def _play(
    policy: BehaviourPolicy, env: VecEnv, rounds: int, seed: int, deterministic: bool
) -> dict[str, Any]:
    """Plays and returns the arrays of :class:`LoggedTransitions`, session after session."""
    bottom = env.unwrapped
    batch = bottom.batch if isinstance(bottom, KuaiFairVecEnv) else None
    named = batch is not None and batch.config.action_mode != "embedding"
    bind = getattr(policy, "bind", None)
    if batch is not None and bind is not None:
        bind(batch)
    continuous = isinstance(env.action_space, spaces.Box)
    parts: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    env.seed(seed)
    observation: Any = env.reset()
    state, starts = None, np.ones(env.num_envs, np.bool_)
    for _ in range(rounds):
        actions, state = policy.predict(observation, state, starts, deterministic)
        following, rewards, done, infos = env.step(actions)
        cut = np.asarray([bool(info.get("TimeLimit.truncated", False)) for info in infos]) & done
        row = {
            "observations": observation,
            "actions": np.array(actions, np.float32 if continuous else np.int64),
            "rewards": rewards,
            "next_observations": reached_observations(following, infos, done),
            "terminated": done & ~cut,
            "truncated": cut,
        }
        for name, values in row.items():
            parts[name].append(values)
        if named and batch is not None and batch.outcome is not None:
            parts["slot_rewards"].append(batch.outcome.feedback)
        observation, starts = following, done
    parts["truncated"][-1] |= ~parts["terminated"][-1]
    return {name: _in_sessions(values, _DTYPES.get(name)) for name, values in parts.items() if values}


_COLUMNS = (
    "observations", "actions", "rewards", "next_observations", "terminated", "truncated", "slot_rewards",
)  # fmt: skip
_DTYPES = dict.fromkeys(("observations", "rewards", "next_observations", "slot_rewards"), np.float32)


def _in_sessions(parts: list[Any], dtype: Any) -> Any:
    """Turns rounds of ``(B, ...)`` into ``(B * rounds, ...)``, each row of the batch in one piece."""
    stacked = np.stack(parts, axis=1)
    return np.ascontiguousarray(stacked.reshape(-1, *stacked.shape[2:]), dtype or stacked.dtype)
