"""Where logged transitions come from: the training log, or a policy that plays in the training world.

A log is read as sessions: consecutive exposures of a user are slates, and a declared number of slates is a session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped

from dsrm.purifier import StatePurifier, history_length_of, purified_space
from hrl_policies.common.transitions import LoggedTransitions
from kuaifair_env.actions import ActionMode, action_decoder
from kuaifair_env.adapters import Actor, BindsEnvironment, Policy
from kuaifair_env.data.schema import BoolArray, FloatArray, InteractionLog
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import DataError
from kuaifair_env.observations import StateObserver, StateSpace, extended_space, observed_states, reached_observations
from kuaifair_env.pooling import embedding_sums
from kuaifair_env.sb3 import KuaiFairVecEnv, world_beneath
from kuaifair_env.world import World, windows_before

SessionEnd = Literal["truncated", "terminated"]
ActionItems = Literal["clicked", "shown"]

_AT_ONCE = 8_192


class LogReading(BaseModel):
    """How a log is read as transitions.

    Attributes:
        slate_size: Consecutive exposures of a user that count as one slate ``K``; 1 takes single exposures.
        session_length: Slates after which a user's record is cut into the next session ``L``.
        session_end: What such a cut is. ``"truncated"``: the user goes on, and values are bootstrapped (nothing in the
            log says that a user left). ``"terminated"``: nothing is earned afterwards, which gives values a horizon.
        action_items: Where actions are embeddings, the items whose mean embedding, scaled to length 1, is the action of
            a slate: ``"clicked"`` (those shown, if none was clicked) or ``"shown"``. With ``"clicked"`` the action
            depends on the reward that it earned: it is what the slate should have been.
        max_transitions: Whole sessions are drawn at random until there are at most this many transitions; None takes
            all.
        seed: Seed of that draw.
        session_clock: Whether states end with the session clock, as in sessions that have one: slates before this one
            since the cut, by ``L``.

    Raises:
        ValueError: If a setting is not valid.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    slate_size: PositiveInt = 10
    session_length: PositiveInt = 30
    session_end: SessionEnd = "truncated"
    action_items: ActionItems = "clicked"
    max_transitions: int | None = None
    seed: int = 0
    session_clock: bool = False

    @model_validator(mode="after")
    def _need_session(self) -> LogReading:
        if self.max_transitions is not None and self.max_transitions < self.session_length:
            raise ValueError(
                f"max_transitions must hold at least one session of {self.session_length}, got {self.max_transitions}"
            )
        return self


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
    _check_training_log(world)
    slates = _cut(world, settings, as_item_ids=action_mode != "embedding")
    if not len(slates.starts):
        raise DataError(
            f"no user of the training world has a whole slate of {settings.slate_size} candidates in the log"
        )
    log = world.data.train
    rows = slates.starts[:, None] + np.arange(settings.slate_size)
    clicks = log.clicks[rows]
    space = action_decoder(action_mode, world.embeddings[: world.n_items], settings.slate_size).space
    observations, following, observation_space = _states(world, slates, settings.slate_size, purifier)
    if settings.session_clock:
        observation_space = extended_space(observation_space, np.zeros(1, np.float32), np.ones(1, np.float32))
        observations = _clocked(observations, slates.steps / settings.session_length)
        following = _clocked(following, (slates.steps + 1) / settings.session_length)
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
            "reading": settings.model_dump(),
            "action_mode": action_mode,
            "purifier": None if purifier is None else purifier.describe(),
            "dropped_slates": slates.dropped,
        },
        slot_rewards=None if action_mode == "embedding" else clicks.astype(np.float32),
    )


@dataclass(frozen=True)
class _Slates:
    """Slates by the log row that they start at, in its order; ``dropped`` counts those that are no actions.

    ``steps`` counts the slates of the session before each, those that are no actions too.
    """

    starts: NDArray[np.int64]
    users: NDArray[np.int64]
    steps: NDArray[np.int64]
    terminated: BoolArray
    truncated: BoolArray
    dropped: int


def _check_training_log(world: World) -> None:
    if world.split != "train":
        raise DataError(f"offline methods learn in the training world, got the {world.split} world")
    if world.data.train.positives_only:
        raise DataError(
            f"the training log of {world.data.provenance.name} lists positive feedback only: every reward would be 1 "
            "and what was shown is unknown. Learn from transitions collected in the training world instead "
            "(data.source=env_behaviour)"
        )


def _cut(world: World, reading: LogReading, as_item_ids: bool) -> _Slates:
    """Cuts the log of the world's users into slates and sessions; as item ids, slates must be valid actions."""
    log, size, length = world.data.train, reading.slate_size, reading.session_length
    offsets = log.offsets(len(world.data.users))
    counts = (np.diff(offsets)[world.users]) // size
    users = np.repeat(world.users.astype(np.int64), counts)
    slate_of_user = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[users] + slate_of_user * size
    last = (slate_of_user % length == length - 1) | (slate_of_user == np.repeat(counts, counts) - 1)
    session = np.cumsum(np.r_[0, last[:-1]]) if len(last) else np.zeros(0, np.int64)
    valid = _valid(log, starts, size, world.n_items) if as_item_ids else np.ones(len(starts), np.bool_)
    selected = valid
    if reading.max_transitions is not None:
        selected = valid & _in_drawn_sessions(session, valid, reading.max_transitions, reading.seed)
    steps = (slate_of_user % length)[selected]
    starts, users, session, last = starts[selected], users[selected], session[selected], last[selected]
    # A slate whose successor was dropped ends the record of its session.
    followed = np.zeros(len(starts), np.bool_)
    followed[:-1] = (np.diff(starts) == size) & (np.diff(session) == 0)
    terminated = last & (reading.session_end == "terminated")
    return _Slates(starts, users, steps, terminated, ~followed & ~terminated, int((~valid).sum()))


def _clocked(states: FloatArray, clock: NDArray[np.float64]) -> FloatArray:
    """Returns states ``(n, d)`` with a clock ``(n,)`` as one more component."""
    return np.concatenate([states, clock[:, None].astype(np.float32)], axis=1)


def _valid(log: InteractionLog, starts: NDArray[np.int64], size: int, n_items: int) -> BoolArray:
    """Marks the slates that hold candidates only, and none twice."""
    items = np.sort(log.items[starts[:, None] + np.arange(size)], axis=1)
    valid: BoolArray = (items[:, -1] < n_items) & (items[:, 1:] != items[:, :-1]).all(axis=1)
    return valid


def _in_drawn_sessions(session: NDArray[np.int64], valid: BoolArray, limit: int, seed: int) -> BoolArray:
    """Marks the slates of sessions, drawn at random, that together have at most ``limit`` valid slates."""
    sizes = np.bincount(session, weights=valid).astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(sizes))
    drawn = np.zeros(len(sizes), np.bool_)
    drawn[order[np.cumsum(sizes[order]) <= limit]] = True
    return drawn[session]


def _states(
    world: World, slates: _Slates, size: int, purifier: StatePurifier | None
) -> tuple[FloatArray, FloatArray, StateSpace]:
    """Returns the states before and after each slate, and their space."""
    space = StateObserver(world).space if purifier is None else purified_space(purifier, world)
    log = world.data.train
    first = log.offsets(len(world.data.users))[slates.users]
    places = world.history_length
    # A purifier that takes whole sessions gets the log context of one that begins here.
    purified_places = places if purifier is None else history_length_of(purifier, world) or places
    ends = np.concatenate([slates.starts, slates.starts + size])
    available = ends - np.concatenate([first, first])
    # The log row behind one user's last is the next user's first, with another window: keys tell them apart.
    keys = ends + np.concatenate([slates.users, slates.users])
    _, distinct, inverse = np.unique(keys, return_index=True, return_inverse=True)
    states = np.empty((len(distinct), *space.shape), np.float32)
    for begin in range(0, len(distinct), _AT_ONCE):
        part = distinct[begin : begin + _AT_ONCE]
        window = windows_before(log, ends[part], available[part], max(places, purified_places))
        purified = observed_states(world, window.last(places))
        if purifier is not None:
            purified = purifier.purify(purified, window.last(purified_places))
        states[begin : begin + _AT_ONCE] = purified
    before, after = np.split(inverse.reshape(-1), 2)
    return states[before], states[after], space


def _actions(
    world: World, items: NDArray[np.int32], clicks: BoolArray, mode: ActionMode, action_items: ActionItems
) -> NDArray[Any]:
    if mode == "embedding":
        return slate_embeddings(world.embeddings, items, clicks, action_items)
    item_ids = items.astype(np.int64)
    return item_ids[:, 0] if mode == "item" else item_ids


def slate_embeddings(
    embeddings: FloatArray, items: NDArray[Any], clicks: BoolArray, action_items: ActionItems = "clicked"
) -> FloatArray:
    """Returns slates as embedding actions: the mean embedding of their items, scaled to length 1.

    Args:
        embeddings: ``float32 (M, d)``.
        items: ``(n, K)`` item rows.
        clicks: ``bool (n, K)``.
        action_items: See :class:`LogReading`.

    Returns:
        ``float32 (n, d)``; zero where all items are zero vectors.
    """
    weights = np.ones(items.shape, np.float32)
    if action_items == "clicked":
        clicked = clicks.any(axis=1)
        weights[clicked] = clicks[clicked]
    actions = np.empty((len(items), embeddings.shape[1]), np.float32)
    for begin in range(0, len(items), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        actions[part] = embedding_sums(embeddings, items[part], weights[part])
    return unit_rows(actions).clip(-1.0, 1.0)


class NoisyState:
    """Asks for items near the observed state, with noise: a behaviour policy of mixed quality for embedding actions.

    The action is ``s~ / |s~| + scale * g / sqrt(d)`` with standard normal ``g``, scaled to length 1.

    Args:
        scale: Length of the noise; the state's direction has length 1.
        seed: Seed of the noise.
        dimension: Size ``d`` of actions: what states hold after as many components is ignored. None takes all.
    """

    def __init__(self, scale: float = 1.0, seed: int = 0, dimension: int | None = None) -> None:
        if scale < 0:
            raise ValueError(f"scale must not be negative, got {scale}")
        self._scale = scale
        self._dimension = dimension
        self._rng = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[FloatArray, Any]:
        """Returns ``float32 (B, d)`` actions; ``deterministic`` leaves the noise out."""
        states = np.asarray(observation, np.float32)[..., : self._dimension]
        direction = states / np.maximum(np.linalg.norm(states, axis=-1, keepdims=True), 1e-6)
        if not deterministic:
            noise = self._rng.standard_normal(states.shape) / np.sqrt(states.shape[-1])
            direction = direction + self._scale * noise
        length = np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-6)
        return np.clip(direction / length, -1.0, 1.0).astype(np.float32), state


def collect_transitions(
    policy: Policy, env: VecEnv, steps: int, seed: int = 0, *, behaviour: Mapping[str, Any] | None = None
) -> LoggedTransitions:
    """Lets a policy play in the training world and returns the transitions.

    Sessions that still run at the end are truncated. KuaiFair's own ``VecEnv`` gives the feedback on each item
    (``slot_rewards``) too, where actions are item ids. Other environments (control tasks) will do as well.

    Args:
        policy: The behaviour policy.
        env: Sessions of the training world, purified or not; they are reset.
        steps: Transitions at least; the number is rounded up to a whole step of all sessions.
        seed: Seed of the sessions, and of what the policy draws from torch.
        behaviour: Description of the policy for the provenance, JSON-able, beside the name of its class.

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
        raise ValueError(f"offline methods observe a Box (observation_mode='state'), not {env.observation_space}")
    if is_vecenv_wrapped(env, VecNormalize):
        raise ValueError("logged transitions are not normalised; collect without VecNormalize")
    rounds = -(-steps // env.num_envs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        played = _play(policy, env, rounds, seed)
    return LoggedTransitions(
        **played,
        observation_space=env.observation_space,
        action_space=env.action_space,
        provenance={
            "source": "env_behaviour",
            "behaviour": {"policy": type(policy).__name__, **(behaviour or {})},
            "seed": seed,
            "n_envs": env.num_envs,
            **({} if world is None else {"split": world.split, "data": world.describe()["data"]}),
        },
    )


def _play(policy: Policy, env: VecEnv, rounds: int, seed: int) -> dict[str, Any]:
    """Plays and returns the arrays of :class:`LoggedTransitions`, session after session."""
    bottom = env.unwrapped
    batch = bottom.batch if isinstance(bottom, KuaiFairVecEnv) else None
    slot_rewards = batch is not None and batch.config.action_mode != "embedding"
    actor = Actor(policy, deterministic=False)
    reads_masks = actor.takes_masks and world_beneath(env) is not None
    if batch is not None and isinstance(policy, BindsEnvironment):
        policy.bind(batch)
        reads_masks = False
    continuous = isinstance(env.action_space, spaces.Box)
    rows: list[dict[str, Any]] = []
    env.seed(seed)
    observation: Any = env.reset()
    starts = np.ones(env.num_envs, np.bool_)
    for _ in range(rounds):
        actions = actor.act(observation, starts, np.stack(env.env_method("action_masks")) if reads_masks else None)
        following, rewards, done, infos = env.step(actions)
        cut = np.asarray([bool(info.get("TimeLimit.truncated", False)) for info in infos]) & done
        row = {
            "observations": np.asarray(observation, np.float32),
            "actions": np.array(actions, np.float32 if continuous else np.int64),
            "rewards": np.asarray(rewards, np.float32),
            "next_observations": np.asarray(reached_observations(following, infos, done), np.float32),
            "terminated": done & ~cut,
            "truncated": cut,
        }
        if slot_rewards and batch is not None and batch.outcome is not None:
            row["slot_rewards"] = batch.outcome.feedback
        rows.append(row)
        observation, starts = following, done
    rows[-1]["truncated"] |= ~rows[-1]["terminated"]
    return {name: _in_sessions([row[name] for row in rows]) for name in rows[0]}


def _in_sessions(rounds: list[Any]) -> Any:
    """Turns rounds of ``(B, ...)`` into ``(B * rounds, ...)``, session after session."""
    stacked = np.stack(rounds, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
