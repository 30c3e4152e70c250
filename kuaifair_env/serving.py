"""Serving: an agent meets the users of a world one after the other and may learn from what it sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from tqdm import tqdm

from kuaifair_env.adapters import (
    Actor,
    PlayedEnv,
    PlayedVecEnv,
    Policy,
    check_agent,
    inference_mode,
    played,
    playing_sessions_of,
)
from kuaifair_env.agent_view import played_by_agents
from kuaifair_env.batch import SessionBatch
from kuaifair_env.checkpoints import CheckpointFolder
from kuaifair_env.evaluation import (
    DEFAULT_SEED,
    EvaluationResult,
    binding,
    evaluate,
    shown_to,
    users_to_evaluate,
)
from kuaifair_env.files import locked_folder
from kuaifair_env.served_sessions import ServedStep, ServedUsers, Service
from kuaifair_env.serving_results import Learning, ServingResult, ServingSettings, stored_result
from kuaifair_env.splits import EVALUATION_USERS, evaluation_users, serving_split
from kuaifair_env.world import World

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

SESSIONS = 20_000
CHECKPOINT_EVERY = 1_000


@runtime_checkable
class LearnsWhileServing(Policy, Protocol):
    """A policy that goes on learning from the sessions that it serves.

    :func:`serve` calls ``bind`` once, then ``predict`` (``deterministic=False``, so it may explore) and ``learn`` in
    turn. ``evaluate`` calls ``bind`` and ``predict`` alone, with ``deterministic=True``: what was learned stays, and
    nothing is learned.
    """

    def bind(self, batch: SessionBatch) -> None:
        """Takes the sessions whose observations :meth:`predict` will get; nothing is known of their users yet.

        Unless the policy declares ``privileged = True``, whatever the batch knows of the users' true tastes raises a
        ``HiddenTruthError`` on access (:mod:`kuaifair_env.agent_view`).
        """
        ...

    def learn(self, step: ServedStep) -> None:
        """Takes what the last step showed; sessions that it ended have been replaced in the batch already."""
        ...

    def save_served(self, path: Path) -> None:
        """Writes all that was learned, what is known of the running sessions, and the state of random generators.

        Args:
            path: The file, or folder, to write; it has no ending.
        """
        ...

    def load_served(self, path: Path) -> None:
        """Reads what :meth:`save_served` wrote, after :meth:`bind` on the same sessions."""
        ...


def serve(
    agent: LearnsWhileServing | Policy | Callable[..., Any],
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
    users: Any = None,
    sessions: int = SESSIONS,
    *,
    order: int = 0,
    seed: int = DEFAULT_SEED,
    n_envs: int = 64,
    learn: bool = True,
    evaluate_others: bool = True,
    folder: str | Path | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    progress: bool = False,
) -> ServingResult:
    """Has an agent serve the users of a world, and lets it learn from what it sees.

    Sessions are counted in the order in which they start, and all that are counted are played to their end; meanwhile
    the next users take the free places, uncounted. The other users, whom the service does not meet, tell what was
    learned: the agent is evaluated on them before and after, learning nothing.

    Args:
        agent: What serves. A :class:`LearnsWhileServing` goes on learning, and so does an algorithm of
            Stable-Baselines3, in place, as in its own ``learn``; anything else that ``evaluate`` takes, such as the
            ``predict`` of an algorithm, acts and learns nothing.
        env: KuaiFair sessions as ``evaluate`` takes them, if they can be played as one batch: ``gym.make``,
            ``gym.make_vec``, ``make_sb3``, also within wrappers of Stable-Baselines3 whose running statistics may stay
            as they are (``VecDSRM``). A belief in one of them goes on learning whatever the agent does.
        users: Raw ids of the users to serve; None takes the 80 % of the world's users that a hash of their ids chooses
            (:func:`~kuaifair_env.splits.serving_split`). Of the other 20 % those who are served are not evaluated on.
        sessions: Number of sessions that are counted.
        order: Which order the users come in; different numbers give unrelated orders.
        seed: Seed of the sessions' randomness, which is the same in every order.
        n_envs: Concurrent sessions of Gymnasium's environments; others say themselves how many they have.
        learn: False has an agent that could learn act as it is, and a belief around the sessions stay as it is.
        evaluate_others: Whether to evaluate on the other users, at most 1,000 of them.
        folder: Where checkpoints and then the result are kept. A service that was stopped, or killed, goes on there
            with the same call, given an agent as it was at the start, and ends with the same numbers; one that is
            finished is read again, and the agent stays as it is. Services are told apart by :class:`ServingSettings`:
            of the agent, by class, seed and networks, not by its other settings.
        checkpoint_every: Sessions between checkpoints, which lie between the rollouts of an algorithm.
        progress: Whether to show progress bars.

    Returns:
        Sessions in the order of starting, figures, and provenance.

    Raises:
        ArtifactError: If the folder holds another service, or a damaged one, or another process serves there.
        DataError: If a user is unknown.
        TypeError: If the environment's sessions cannot be played as one batch, or the agent is no policy.
        ValueError: If a number is not valid, or the agent was trained on other observations or actions.
    """
    from kuaifair_env.serving_sb3 import check_n_envs, serve_learning

    if sessions < 1 or order < 0 or checkpoint_every < 1:
        raise ValueError(
            f"need at least 1 session, an order of at least 0, and at least 1 session between checkpoints, got "
            f"{sessions}, {order} and {checkpoint_every}"
        )
    played_env = _one_batch(played(env, n_envs))
    own_batch = played_env.own_batch
    check_agent(getattr(agent, "__self__", agent), played_env)
    served, others = _users(played_env.world, users)
    source = ServedUsers(played_env.world, served, sessions, order, seed)
    kind, reason = _kind(agent, learn)
    settings = _settings(agent, source, played_env, *_learning(kind, reason, played_env, learn))
    if kind == "gradient":
        check_n_envs(cast(Any, agent), own_batch.batch_size)

    def evaluated() -> EvaluationResult | None:
        if not evaluate_others or not len(others):
            return None
        return evaluate(agent, env, others, seed=seed, n_envs=n_envs, progress=progress)

    def served_from(checkpoints: CheckpointFolder | None) -> ServingResult:
        before = None if settings.learning == "frozen" else evaluated()
        with _sessions_of(played_env, source, agent, learn, progress) as service:
            if checkpoints is not None:
                service.keep(checkpoints, checkpoint_every)
            if kind == "gradient":
                serve_learning(cast(Any, agent), service)
            elif kind == "posterior":
                _serve_learning(cast(LearnsWhileServing, agent), service)
            else:
                _serve_frozen(agent, service, own_batch)
            sessions_served = service.totals.result(seed)
        return ServingResult(settings, sessions_served, before, evaluated())

    if folder is None:
        return served_from(None)
    with locked_folder(Path(folder), "service"):
        checkpoints = CheckpointFolder(Path(folder), asdict(settings))
        result = stored_result(folder, settings)
        if result is None:
            result = served_from(checkpoints)
            result.save(folder)
        checkpoints.remove()
    return result


def _settings(agent: Any, source: ServedUsers, env: PlayedVecEnv, learning: Learning, reason: str) -> ServingSettings:
    """Returns what a service of an agent is, by which its checkpoints and its result are told from others'."""
    from kuaifair_env.serving_sb3 import parameters_hash

    policy, batch = getattr(agent, "__self__", agent), env.own_batch
    return ServingSettings(
        world=str(batch.world.fingerprint),
        config=batch.config.describe(),
        agent=getattr(policy, "__name__", type(policy).__name__),
        agent_seed=getattr(policy, "seed", None),
        agent_hash=parameters_hash(policy, [wrapper.belief for wrapper in env.learning_wrappers]),
        learning=learning,
        reason=reason,
        users=len(source.ids),
        users_hash=hashlib.sha256(source.ids.tobytes()).hexdigest()[:16],
        sessions=len(source),
        order=source.order,
        seed=source.seed,
        n_envs=batch.batch_size,
    )


def _one_batch(env: PlayedEnv) -> PlayedVecEnv:
    """Returns an environment that plays all sessions as one batch.

    Raises:
        TypeError: If it is another.
    """
    from kuaifair_env.sb3 import KuaiFairVecEnv

    if not isinstance(env, PlayedVecEnv) or not isinstance(env.layers[-1], KuaiFairVecEnv):
        raise TypeError(
            "serve() plays all sessions as one batch of Stable-Baselines3's form; give it an environment of "
            "kuaifair_env.make_sb3(...) with wrappers around it, or another one without wrappers"
        )
    return env


def _users(world: World, users: Any) -> tuple[NDArray[np.int64], Any]:
    """Returns the rows of the users to serve, and raw ids of those to evaluate on besides."""
    chosen, others = serving_split(world.user_ids)
    rows = users_to_evaluate(world, chosen if users is None else users)
    others = np.setdiff1d(others, world.data.users.ids[rows])
    return rows, evaluation_users(others, EVALUATION_USERS) if len(others) else others


def _learning(kind: Learning, reason: str, env: PlayedVecEnv, learn: bool) -> tuple[Learning, str]:
    """Returns how an agent and the wrappers around its sessions learn, and why not if they do not."""
    if not learn or not env.learning_wrappers:
        return kind, reason
    return ("gradient and posterior" if kind == "gradient" else "posterior"), ""


def _kind(agent: Any, learn: bool) -> tuple[Learning, str]:
    """Returns how an agent learns while it serves, and why not if it does not."""
    from stable_baselines3.common.base_class import BaseAlgorithm

    if not isinstance(agent, (BaseAlgorithm, LearnsWhileServing)):
        return "frozen", "it has nothing to learn with while serving"
    reason = str(getattr(agent, "frozen_while_serving", "")) if learn else "asked to learn nothing"
    if reason:
        return "frozen", reason
    return "gradient" if isinstance(agent, BaseAlgorithm) else "posterior", ""


@contextmanager
def _sessions_of(env: PlayedVecEnv, source: ServedUsers, agent: Any, learn: bool, progress: bool) -> Iterator[Service]:
    """Has an environment play the sessions of a service, hides their truth, and puts everything back afterwards.

    What wrappers learn stays.
    """
    with (
        playing_sessions_of(env, source) as batches,
        tqdm(total=len(source), unit="session", disable=not progress, leave=False) as bar,
    ):
        shown = shown_to(getattr(agent, "__self__", agent), batches[0])
        if shown is not batches[0]:
            bottom = env.layers[-1]
            bottom.play(played_by_agents(batches[0]))
            bottom.world = shown.world
        for wrapper in env.learning_wrappers:
            wrapper.learns = learn
        yield Service(env, batches[0], shown, source, bar)


def _serve_learning(agent: LearnsWhileServing, service: Service) -> None:
    agent.bind(service.shown)
    actor = Actor(agent, deterministic=False)
    _play(actor, service, False, agent.learn, agent.save_served, agent.load_served)


def _serve_frozen(agent: Any, service: Service, own_batch: SessionBatch) -> None:
    def nothing(_: Any) -> None:
        return None

    actor = Actor(agent, deterministic=True)
    with (
        inference_mode(getattr(agent, "__self__", agent)),
        binding(agent, actor, [service.batch], own_batch) as reads_masks,
    ):
        _play(actor, service, reads_masks, nothing, nothing, nothing)


def _play(
    actor: Actor,
    service: Service,
    reads_masks: bool,
    learn: Callable[[ServedStep], None],
    save: Callable[[Path], None],
    load: Callable[[Path], None],
) -> None:
    """Plays all sessions that are counted to their end."""
    env = service.env
    observation, starts = env.reset(), np.ones(service.n_envs, np.bool_)
    loop = service.resume(load)
    if loop is not None:
        observation, starts, actor.state = loop
    while not service.over:
        service.checkpoint(lambda: (observation, starts, actor.state), save)  # noqa: B023 (called at once)
        service.expect_step()
        actions = actor.act(observation, starts, env.action_masks() if reads_masks else None)
        observation, done, starts = env.step(actions)
        learn(service.record_step(done))
