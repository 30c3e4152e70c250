"""Environments and policies of every form, as evaluation plays them."""

from __future__ import annotations

import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from numpy.typing import NDArray

from kuaifair_env.batch import SessionBatch
from kuaifair_env.catalogue import check_catalogues
from kuaifair_env.data.schema import BoolArray
from kuaifair_env.simulator import SessionSource
from kuaifair_env.world import World

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

# What changes neither observation, action nor reward.
_UNCHANGING = {
    *("PassiveEnvChecker", "OrderEnforcing", "RecordEpisodeStatistics", "Monitor", "VecMonitor"),
    *("DummyVecEnv", "SyncVectorEnv"),
}
# Flags of wrappers that keep running statistics, or learn: those of Stable-Baselines3, of Gymnasium, and of dsrm.
_UPDATING = ("training", "_update_running_mean", "learns")
# What wrappers keep state in, besides arrays and containers.
_STATEFUL = {"StackedObservations", "RunningMeanStd", "BeliefObservations", "CandidateObservations"}


class Policy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns actions for a batch of observations, and the next recurrent state."""
        ...


@runtime_checkable
class BindsEnvironment(Protocol):
    """A policy that needs more than observations (users, histories) and says so.

    Evaluation and serving show it the sessions without the truth of their world (:mod:`kuaifair_env.agent_view`),
    unless it declares ``privileged = True``.
    """

    def bind(self, batch: SessionBatch) -> None:
        """Tells the policy which sessions its observations will come from."""
        ...


class LearningWrapper(Protocol):
    """A wrapper that learns of all users from the sessions that it shows agents: ``dsrm.VecDSRM`` with a belief.

    Attributes:
        belief: What it has learned; None in wrappers of the class that learn nothing.
        learns: Whether it goes on learning.
    """

    belief: Any
    learns: bool

    def served_state(self) -> dict[str, Any]:
        """Returns all that is known, of all users and of running sessions, as arrays and numbers."""
        ...

    def restore_served(self, state: dict[str, Any]) -> None:
        """Takes what :meth:`served_state` returned."""
        ...


class Actor:
    """A policy of any form, one batch of observations after another; remembers the recurrent state.

    Args:
        policy: An object with Stable-Baselines3's ``predict`` (sb3-contrib's takes ``action_masks`` too), or a function
            of observations that returns actions. It is given those of ``state``, ``episode_start``, ``deterministic``
            and ``action_masks`` that it has parameters for.
        deterministic: Passed on.

    Attributes:
        takes_masks: Whether the policy has a parameter ``action_masks``.
        state: The recurrent state.

    Raises:
        TypeError: If the policy is neither.
    """

    def __init__(self, policy: Any, deterministic: bool) -> None:
        self._function = getattr(policy, "predict", policy)
        if not callable(self._function):
            raise TypeError(
                f"a policy has predict(observation, ...) or is a function of observations, got {type(policy).__name__}"
            )
        parameters = _parameters(self._function)
        self._named = parameters & {"state", "episode_start", "deterministic"}
        self.takes_masks = "action_masks" in parameters
        self._deterministic = deterministic
        self.state: Any = None

    def act(self, observation: Any, starts: BoolArray, masks: BoolArray | None = None) -> NDArray[Any]:
        """Returns an action for each of ``B`` observations.

        Args:
            observation: ``(B, ...)``, or a dict of such arrays.
            starts: ``bool (B,)``, which observations are the first of their session.
            masks: ``bool (B, ...)``, what may be done now; only for policies that take masks.

        Raises:
            ValueError: If there are not ``B`` actions.
        """
        known = {"state": self.state, "episode_start": starts, "deterministic": self._deterministic}
        arguments = {name: value for name, value in known.items() if name in self._named}
        if masks is not None:
            arguments["action_masks"] = masks
        answer = self._function(observation, **arguments)
        actions, self.state = answer if isinstance(answer, tuple) else (answer, None)
        actions = np.asarray(actions)
        if actions.ndim == 0 or len(actions) != len(starts):
            raise ValueError(f"the policy gave actions of shape {actions.shape} for {len(starts)} observations")
        return actions


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Returns the names of what a function takes by name; those of ``predict`` for functions that take anything."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return set()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {*parameters, "state", "episode_start", "deterministic"}
    return {name for name, parameter in parameters.items() if parameter.kind is not parameter.POSITIONAL_ONLY}


@contextmanager
def inference_mode(policy: Any) -> Iterator[None]:
    """Turns dropout and the like off in a policy's networks, and back on where it was on."""
    torch = sys.modules.get("torch")
    owners = (policy, getattr(policy, "policy", None)) if torch is not None else ()
    modules = [part for owner in owners if isinstance(owner, cast(Any, torch).nn.Module) for part in owner.modules()]
    flags = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, flag in zip(modules, flags, strict=True):
            module.training = flag


class Step(NamedTuple):
    """What a step of all sessions gave.

    Attributes:
        observation: The next observations.
        done: ``bool (B,)``, which sessions the step ended.
        starts: ``bool (B,)``, which observations are the first of a session.
    """

    observation: Any
    done: BoolArray
    starts: BoolArray


class PlayedEnv(Protocol):
    """An environment of any form as evaluation plays it.

    Attributes:
        observation_space: Space of one session's observation.
        action_space: Space of one session's action.
        layers: The environment, its wrappers, and what they are around.
        over: ``bool (B,)``, sessions that ended and that the next step replaces; their action is ignored.
    """

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    layers: list[Any]
    over: BoolArray

    @property
    def world(self) -> World:
        """The world of the sessions."""
        return self.own_batch.world

    @property
    def learning_wrappers(self) -> list[LearningWrapper]:
        """The wrappers around the sessions that may learn while they are served."""
        return [layer for layer in self.layers if vars(layer).get("belief") is not None]

    @property
    def own_batch(self) -> SessionBatch:
        """The environment's own sessions, or the first of them where there are several batches."""
        batch: SessionBatch = next(layer for layer in self.layers if _holds_sessions(layer)).batch
        return batch

    def reset(self) -> Any:
        """Starts sessions and returns their observations."""
        ...

    def step(self, actions: NDArray[Any]) -> Step:
        """Shows slates."""
        ...

    def action_masks(self) -> BoolArray:
        """Returns what may be done now in each session, as sb3-contrib's ``MaskablePPO`` reads it."""
        ...


class PlayedVecEnv(PlayedEnv):
    """A ``VecEnv`` of Stable-Baselines3; see :class:`PlayedEnv`.

    Attributes:
        vec_env: The environment.
    """

    def __init__(self, env: VecEnv) -> None:
        self.vec_env = env
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.layers = layers_of(env)
        self.over = np.zeros(env.num_envs, np.bool_)

    def reset(self) -> Any:
        """See :class:`PlayedEnv`."""
        self.vec_env.unwrapped._reset_seeds()
        self.vec_env.unwrapped._reset_options()
        return self.vec_env.reset()

    def step(self, actions: NDArray[Any]) -> Step:
        """See :class:`PlayedEnv`."""
        observation, _, done, _ = self.vec_env.step(actions)
        return Step(observation, done, done)

    def action_masks(self) -> BoolArray:
        """See :class:`PlayedEnv`."""
        return np.stack(self.vec_env.env_method("action_masks"))


class _PlayedVectorEnv(PlayedEnv):
    """A vector environment of Gymnasium in any autoreset mode; see :class:`PlayedEnv`."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self._env = env
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self.layers = layers_of(env)
        self._mode = AutoresetMode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.over = np.zeros(env.num_envs, np.bool_)

    def reset(self) -> Any:
        return self._env.reset()[0]

    def step(self, actions: NDArray[Any]) -> Step:
        observation, _, terminated, truncated, _ = self._env.step(actions)
        done = np.asarray(terminated | truncated)
        starts = self.over if self._mode is AutoresetMode.NEXT_STEP else done
        if self._mode is AutoresetMode.NEXT_STEP:
            self.over = done
        elif self._mode is AutoresetMode.DISABLED and done.any():
            observation = self._env.reset(options={"reset_mask": done})[0]
        return Step(observation, done, starts)

    def action_masks(self) -> BoolArray:
        return np.stack(cast(Any, self._env.unwrapped).call("action_masks"))


def played(env: Any, n_envs: int) -> PlayedEnv:
    """Returns an environment of any form as evaluation plays it.

    Args:
        env: The environment.
        n_envs: Concurrent sessions where the environment is single, or nothing around it changes what it says: it is
            then run as one batch.

    Raises:
        TypeError: If there are no KuaiFair sessions beneath, or they are in other processes.
        ValueError: If they are of several worlds or settings.
    """
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

    from kuaifair_env.sb3 import KuaiFairVecEnv

    layers = layers_of(env)
    _check_sessions(layers)
    bottom = layers[-1]
    if not isinstance(bottom, KuaiFairVecEnv) and not any(_changes(layer) for layer in layers):
        return PlayedVecEnv(KuaiFairVecEnv(bottom.world, bottom.config, n_envs, seed=0))
    if isinstance(env, VecEnv):
        return PlayedVecEnv(env)
    return _PlayedVectorEnv(env) if isinstance(env, VectorEnv) else PlayedVecEnv(DummyVecEnv([lambda: env]))


def layers_of(env: Any) -> list[Any]:
    """Returns an environment, and everything that it wraps or holds, from the outside in."""
    attributes = getattr(env, "__dict__", {})
    beneath = attributes.get("venv", attributes.get("env"))
    inside = attributes.get("envs", []) if beneath is None else [beneath]
    return [env, *(layer for part in inside for layer in layers_of(part))]


def changing_wrappers(env: gym.Env[Any, Any]) -> list[str]:
    """Returns the class names of the wrappers around a single environment that may change what it says or takes."""
    return [type(layer).__name__ for layer in layers_of(env) if _changes(layer)]


@contextmanager
def playing_sessions_of(env: PlayedEnv, source: SessionSource) -> Iterator[list[SessionBatch]]:
    """Has an environment play sessions from a source, with running statistics frozen, and then go on where it was.

    Args:
        env: The environment. Afterwards it and all wrappers are as they were, in the middle of their own sessions.
        source: Where its sessions come from.

    Yields:
        The batches that play them, in the order of the environment's rows.
    """
    rewinds = [_rewind(vars(layer)) for layer in env.layers]
    batches = []
    try:
        for layer in env.layers:
            attributes = vars(layer)
            for flag in _UPDATING:
                if isinstance(attributes.get(flag), bool):
                    setattr(layer, flag, False)
            if "results_writer" in attributes:
                layer.results_writer = None
            if _holds_sessions(layer):
                batch = SessionBatch(layer.world, layer.config, layer.batch.batch_size)
                batch.take_sessions_from(source)
                layer.play(batch)
                batches.append(batch)
        yield batches
    finally:
        for rewind in rewinds:
            rewind()


def check_agent(agent: Any, env: PlayedEnv) -> None:
    """Checks that an agent which says what it was trained on is given the like.

    Args:
        agent: Any policy; those with neither spaces nor an environment of their own pass.
        env: What it is to act in.

    Raises:
        MismatchError: If it was trained on other items.
        ValueError: If observations or actions are others, or only the agent's are normalised.
    """
    check_catalogues(getattr(agent, "observation_space", None), env.observation_space)
    for what in ("observation_space", "action_space"):
        own, given = getattr(agent, what, None), getattr(env, what)
        if isinstance(own, spaces.Space) and own != given:
            raise ValueError(
                f"the agent's {what.replace('_', ' ')} is {own}, but this environment has {given}; give it an "
                "environment like the one that it was trained in (with the same settings, purifier and wrappers)"
            )
    training = getattr(agent, "get_vec_normalize_env", lambda: None)()
    if training is not None and training.norm_obs and not any(vars(layer).get("norm_obs") for layer in env.layers):
        raise ValueError(
            "the agent was trained on normalised observations, and these are not; wrap the environment in VecNormalize "
            "with the statistics of training (obs_rms)"
        )


def _holds_sessions(layer: Any) -> bool:
    return isinstance(getattr(layer, "__dict__", {}).get("batch"), SessionBatch)


def _changes(layer: Any) -> bool:
    """Says whether a layer may change what the sessions beneath say or take."""
    return not (_holds_sessions(layer) or type(layer).__name__ in _UNCHANGING)


def _check_sessions(layers: Sequence[Any]) -> None:
    from stable_baselines3.common.vec_env import SubprocVecEnv

    sessions = [layer for layer in layers if _holds_sessions(layer)]
    if any(isinstance(layer, (SubprocVecEnv, AsyncVectorEnv)) for layer in layers):
        raise TypeError(
            "sessions in other processes cannot be given the list of users; evaluate in DummyVecEnv, SyncVectorEnv or "
            "kuaifair_env.make_sb3(...) instead, the figures are the same"
        )
    if not sessions:
        raise TypeError(
            f"evaluate() needs a KuaiFair environment, got {type(layers[-1]).__name__}; make one with gym.make(...), "
            "gym.make_vec(...) or kuaifair_env.make_sb3(...)"
        )
    first = sessions[0]
    for other in sessions[1:]:
        same_world = other.world is first.world or not other.world.fingerprint.differences(first.world.fingerprint)
        if not same_world or other.config != first.config:
            raise ValueError("the environments play sessions of different worlds or settings; evaluate them one by one")


def _rewind(value: Any) -> Callable[[], Any]:
    """Returns a function that puts an array or container back into its present state, and returns it."""
    if isinstance(value, np.ndarray) and value.flags.writeable:
        saved = value.copy()

        def rewind() -> Any:
            value[...] = saved
            return value

    elif isinstance(value, dict):
        entries = {name: _rewind(entry) for name, entry in value.items()}

        def rewind() -> Any:
            value.clear()
            value.update({name: rewind_entry() for name, rewind_entry in entries.items()})
            return value

    elif isinstance(value, (list, deque)):
        items = [_rewind(item) for item in value]

        def rewind() -> Any:
            value.clear()
            value.extend(rewind_item() for rewind_item in items)
            return value

    else:
        attributes = _rewind(vars(value)) if type(value).__name__ in _STATEFUL else None

        def rewind() -> Any:
            if attributes is not None:
                attributes()
            return value

    return rewind
