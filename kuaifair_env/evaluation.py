"""Evaluation of a policy: complete sessions of a fixed list of users, with the same random numbers for every policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from tqdm import tqdm

from kuaifair_env.abandonment import TemperFairness, leave_rule
from kuaifair_env.adapters import (
    Actor,
    BindsEnvironment,
    PlayedEnv,
    Policy,
    check_agent,
    inference_mode,
    played,
    playing_sessions_of,
)
from kuaifair_env.agent_view import sessions_for_agents
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.metrics import (
    Engagement,
    FairnessReport,
    SlateStatistics,
    engagement,
    expected_length,
    length_floor_and_ceiling,
    ndcg,
    top_gains,
)
from kuaifair_env.simulator import FixedSessions, Outcome, SessionSimulator
from kuaifair_env.splits import evaluation_users
from kuaifair_env.world import World

if TYPE_CHECKING:
    import pandas as pd
    from stable_baselines3.common.vec_env import VecEnv

DEFAULT_SEED = 2603

_INCOMPLETE = (
    "a wrapper of the environment ends or replaces sessions before they are over, or goes on after their end "
    "(TimeLimit does); only complete sessions can be measured, so evaluate without it"
)


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What a policy did in complete sessions.

    Attributes:
        sessions: One record per session, in the order of the list of sessions.
        engagement: Len, R_each, R_cum.
        fairness: Every exposure measure.
        ndcg: Mean R-NDCG@K by true expected feedback among the items that may be shown, over slates that can have any;
            None where it was not asked for.
        world: What the sessions ran in, JSON-able.
        config: How they ran, JSON-able.
        seed: Seed of the sessions' randomness.
        predicted_length: Len by the length formula (see ``kuaifair_env.metrics.engagement``) at the measured loss of
            temper and violation rate, a check of the simulation; None where the formula does not hold: for other leave
            rules than ``TemperFairness``, for penalties above 1, and where the cap ended sessions.
        length_range: Floor and ceiling of Len at the same loss, if every slate violated the bound and if none did.
    """

    sessions: EpisodeRecords
    engagement: Engagement
    fairness: FairnessReport
    ndcg: float | None
    world: dict[str, Any]
    config: dict[str, Any]
    seed: int
    predicted_length: float | None
    length_range: tuple[float, float] | None

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.summary().items() if name != "sessions")
        told = "\n  ".join(self._provenance())
        return f"EvaluationResult({told}\n  {figures})"

    def _provenance(self) -> tuple[str, str]:
        """Returns in which world the sessions ran, and how many and how."""
        data, config = self.world["data"], self.config
        users = len(np.unique(self.sessions.user_ids))
        return (
            f"world: {data['name']!r}, split={self.world['split']!r}, {data['origin']} data {data['hash']}, "
            f"fingerprint {self.world['fingerprint']['id']}",
            f"{len(self.sessions)} sessions of {users} users, max_len {config['max_len']}, slates of "
            f"{config['slate_size']}, seed {self.seed}",
        )

    def summary(self) -> dict[str, float]:
        """Returns the headline figures by name: the paper's four, the violation rate, and what checks them."""
        figures = {
            "len": self.engagement.length,
            "r_each": self.engagement.reward_per_step,
            "r_cum": self.engagement.cumulative_reward,
            "ad": self.fairness.absolute_difference,
            "violation_rate": self.fairness.violation_rate,
            "signed_gap": self.fairness.signed_gap,
            "slate_ad": self.fairness.slate_absolute_difference,
            "item_exposure_gap": self.fairness.item_exposure_gap,
            "gini": self.fairness.gini,
            "coverage": self.fairness.coverage,
            "entropy": self.fairness.entropy,
            "sessions": float(len(self.sessions)),
        }
        if self.predicted_length is not None and self.length_range is not None:
            floor, ceiling = self.length_range
            figures |= {"len_predicted": self.predicted_length, "len_floor": floor, "len_ceiling": ceiling}
        return figures if self.ndcg is None else figures | {"ndcg": self.ndcg}

    def frame(self) -> pd.DataFrame:
        """Returns the per-session records as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.sessions.columns())

    def table(self) -> str:
        """Returns world, sessions and headline figures as text, the figures aligned."""
        rows = self.summary()
        width = max(map(len, rows))
        return "\n".join([*self._provenance(), *(f"{name:<{width}}  {value:>12.4f}" for name, value in rows.items())])


def evaluate(
    policy: Policy | Callable[..., Any],
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
    users: Any = None,
    episodes_per_user: int = 1,
    *,
    n_users: int | None = None,
    seed: int = DEFAULT_SEED,
    deterministic: bool = True,
    n_envs: int = 256,
    ranking: bool = False,
    progress: bool = False,
) -> EvaluationResult:
    """Plays complete sessions of a fixed list of users and measures them.

    A session's random numbers follow from ``seed``, user and episode alone, so every policy meets the same users and
    the same random numbers, whatever ``n_envs`` and whatever the form of the environment. Environment and policy are
    left as they were, also in the middle of training: their sessions go on afterwards, running statistics
    (``VecNormalize``, Gymnasium's ``NormalizeObservation``) are frozen meanwhile, and monitors write nothing.

    Args:
        policy: Anything with Stable-Baselines3's ``predict`` (with ``action_masks``, such as ``MaskablePPO``, it gets
            them), or a function from a batch of observations to actions; see
            :class:`~kuaifair_env.adapters.BindsEnvironment` for policies that need more than observations.
        env: KuaiFair sessions in any form: ``gym.make``, ``gym.make_vec``, ``make_sb3``, ``make_vec_env``,
            ``DummyVecEnv``, with any wrappers that play every session to its end (``VecNormalize``, a purifier,
            Gymnasium's vector wrappers). Where no wrapper changes what it says it is run as one batch.
        users: Raw ids of the users; None takes all users of the environment's world, or ``n_users`` of them.
        episodes_per_user: Sessions of each user.
        n_users: Number of users, chosen by a hash of their ids: a larger number only adds users.
        seed: Seed of the sessions' randomness.
        deterministic: Passed to ``predict``.
        n_envs: Concurrent sessions where the environment leaves it open.
        ranking: Whether to measure R-NDCG@K by the true expected feedback, among the items that may be shown; costs a
            catalogue of scores each step.
        progress: Whether to show a progress bar.

    Returns:
        Sessions, figures and provenance.

    Raises:
        DataError: If a user is unknown.
        TypeError: If the environment is not a KuaiFair environment in this process, the policy cannot act in its form,
            or it is no policy.
        ValueError: If there is no session to play, a wrapper does not play sessions to their end, or the agent was
            trained on other observations or actions (to have it act on them nevertheless, give a function).
    """
    played_env = played(env, n_envs)
    agent = getattr(policy, "__self__", policy)
    check_agent(agent, played_env)
    actor = Actor(policy, deterministic)
    world, own_batch = played_env.world, played_env.own_batch
    sessions = FixedSessions.of_users(users_to_evaluate(world, users, n_users), episodes_per_user, seed)
    with (
        playing_sessions_of(played_env, sessions) as batches,
        inference_mode(agent),
        binding(policy, actor, batches, own_batch) as reads_masks,
        tqdm(total=len(sessions), unit="session", disable=not progress, leave=False) as bar,
    ):
        totals = SessionTotals(batches, ranking)
        for finished in _play(actor, played_env, totals, len(sessions), reads_masks):
            bar.update(finished)
        return totals.result(seed)


def users_to_evaluate(world: World, users: Any = None, n_users: int | None = None) -> NDArray[np.int64]:
    """Returns the rows of the users to evaluate on, wherever users are named: ``evaluate``, commands, studies.

    Args:
        world: Whose users they are.
        users: Raw ids, each once; sessions come in their order.
        n_users: A number of users instead; see :func:`~kuaifair_env.splits.evaluation_users`. Neither takes all.

    Raises:
        DataError: If a user is unknown.
        ValueError: If both are given, one user twice, or a number where ids belong.
    """
    if users is None:
        return world.users if n_users is None else world.user_rows(evaluation_users(world.user_ids, n_users))
    if n_users is not None:
        raise ValueError("give users (a list of raw ids) or n_users (a number of them), not both")
    if np.ndim(users) == 0:
        raise ValueError(f"users takes a list of raw user ids, got {users!r}; for a number of users give n_users")
    rows = world.user_rows(users)
    ids, counts = np.unique(np.asarray(users), return_counts=True)
    if len(ids) < len(rows):
        raise ValueError(f"user {ids[counts > 1][0]} is named twice; name each once (evaluate takes episodes_per_user)")
    return rows


@contextmanager
def binding(policy: Any, actor: Actor, batches: Sequence[SessionBatch], own_batch: SessionBatch) -> Iterator[bool]:
    """Binds a policy that must know its sessions, and yields whether it has to be given masks.

    Args:
        policy: The policy; unless it is privileged it is shown the sessions without the truth of their world.
        actor: The same.
        batches: The sessions that it acts in.
        own_batch: Sessions that it is bound to afterwards.

    Raises:
        TypeError: If it must know them, and they are not one batch.
    """
    if not isinstance(policy, BindsEnvironment):
        yield actor.takes_masks
        return
    if len(batches) > 1:
        if not actor.takes_masks:
            raise TypeError(
                f"{type(policy).__name__} must know its sessions, and there are {len(batches)} environments of one "
                "session each; give it one of kuaifair_env.make_sb3(...)"
            )
        yield True
        return
    policy.bind(shown_to(policy, batches[0]))
    try:
        yield actor.takes_masks and batches[0].simulator.allowed is not None
    finally:
        policy.bind(shown_to(policy, own_batch))


def shown_to(policy: Any, batch: SessionBatch) -> SessionBatch:
    """Returns sessions as a policy may see them: with the truth of their world if it says ``privileged = True``."""
    return batch if getattr(policy, "privileged", False) else sessions_for_agents(batch)


def _play(actor: Actor, env: PlayedEnv, totals: SessionTotals, n_sessions: int, reads_masks: bool) -> Iterator[int]:
    """Plays all sessions to their end; yields how many of them each step finished."""
    observation = env.reset()
    starts = np.ones(len(env.over), np.bool_)
    remaining = n_sessions
    while remaining:
        before = totals.before_step(env.over)
        actions = actor.act(observation, starts, env.action_masks() if reads_masks else None)
        observation, done, starts = env.step(actions)
        finished = totals.after_step(before, done)
        remaining -= finished
        yield finished


class _Before(NamedTuple):
    """The sessions before a step: their users, which are measured, and the true expected feedback where it is read.

    ``over`` are those that the step replaces, and ``outcomes`` the last ones of each batch.
    """

    over: BoolArray
    listed: BoolArray
    users: NDArray[np.int64]
    truth: FloatArray | None
    outcomes: list[Outcome | None]


class SessionTotals:
    """Adds up what happens in the listed sessions of one or several batches.

    Args:
        batches: The sessions; those with a number of at least 0 are on the list.
        ranking: Whether to measure R-NDCG@K.
    """

    def __init__(self, batches: Sequence[SessionBatch], ranking: bool) -> None:
        world = batches[0].world
        self._batches = batches
        self._rows = np.cumsum([0, *(batch.batch_size for batch in batches)])
        self._ranking = ranking
        self._slates = SlateStatistics(world.groups.popular, world.exposures, len(world.data.users))
        self._records: list[EpisodeRecords] = []
        self._ndcg: list[NDArray[np.float64]] = []
        self._temper_lost, self._steps = 0.0, 0

    def before_step(self, over: BoolArray) -> _Before:
        """Returns what a step changes and :meth:`after_step` needs.

        Args:
            over: ``bool (B,)``, sessions that ended and that the step replaces.

        Raises:
            ValueError: If no listed session is left although some were not played to their end.
        """
        simulators = [batch.simulator for batch in self._batches]
        listed = np.concatenate([simulator.numbers >= 0 for simulator in simulators])
        if not listed.any():
            raise ValueError(_INCOMPLETE)
        truth = np.concatenate([_true_gains(simulator) for simulator in simulators]) if self._ranking else None
        users = np.concatenate([simulator.users for simulator in simulators])
        return _Before(over.copy(), listed & ~over, users, truth, [batch.outcome for batch in self._batches])

    def after_step(self, before: _Before, done: BoolArray) -> int:
        """Adds a step and returns how many listed sessions it finished.

        Args:
            before: What :meth:`before_step` returned.
            done: ``bool (B,)``, which sessions the environment's wrappers say are over.

        Raises:
            TypeError: If the wrappers did not step the sessions.
            ValueError: If other sessions are over than the wrappers say.
        """
        ended = np.zeros(len(done), np.bool_)
        outcomes: list[Outcome] = []
        finished = 0
        for batch, first, end, earlier in zip(self._batches, self._rows, self._rows[1:], before.outcomes, strict=False):
            outcome, records = batch.outcome, batch.finished_records
            if outcome is None or (outcome is earlier and not before.over[first:end].all()):
                raise TypeError("the environment's wrappers did not step the sessions beneath them")
            outcomes.append(outcome)
            if records is None or outcome is earlier:
                continue
            ended[first + batch.finished] = True
            records = records.take(records.numbers >= 0)
            self._records.append(records)
            finished += len(records)
        if not np.array_equal(done, ended):
            raise ValueError(_INCOMPLETE)
        listed, items = before.listed, np.concatenate([outcome.items for outcome in outcomes])
        violation, mean = (
            np.concatenate([getattr(outcome, name) for outcome in outcomes])[listed]
            for name in ("violation", "mean_feedback")
        )
        self._slates.add(items[listed], before.users[listed], violation)
        self._temper_lost += float(np.clip(2.0 - mean, 0.0, 2.0).sum())
        self._steps += int(listed.sum())
        if before.truth is not None:
            gains = np.take_along_axis(before.truth, items, axis=1)[listed]
            best = top_gains(before.truth[listed], gains.shape[1])
            possible = best[:, 0] > 0  # where nothing can be gained any more there is nothing to rank
            self._ndcg.append(ndcg(gains[possible], best[possible]))
        return finished

    def state(self) -> dict[str, Any]:
        """Returns what was added up, as numbers and arrays by name; ranking quality is not kept."""
        records = [EpisodeRecords.concatenated(self._records).as_dict()] if self._records else []
        return {
            "slates": self._slates.state(),
            "records": records,
            "temper_lost": self._temper_lost,
            "steps": self._steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes what :meth:`state` returned in place of what was added up."""
        self._slates.restore(state["slates"])
        self._records = [EpisodeRecords(**records) for records in state["records"]]
        self._temper_lost, self._steps = state["temper_lost"], state["steps"]

    def result(self, seed: int) -> EvaluationResult:
        """Returns what was added up, sessions in the order of the list."""
        records = EpisodeRecords.concatenated(self._records)
        records = records.take(np.argsort(records.numbers))
        fairness = self._slates.report()
        temper_loss = self._temper_lost / self._steps
        predicted, length_range = _lengths(self._batches[0].config, temper_loss, fairness.violation_rate, records)
        return EvaluationResult(
            sessions=records,
            engagement=engagement(records.length, records.return_),
            fairness=fairness,
            ndcg=float(np.concatenate(self._ndcg).mean()) if self._ndcg else None,
            world=self._batches[0].world.describe(),
            config=self._batches[0].config.describe(),
            seed=seed,
            predicted_length=predicted,
            length_range=length_range,
        )


def _true_gains(simulator: SessionSimulator) -> FloatArray:
    """Returns ``float32 (B, N)``, the true expected feedback on what may be shown now, 0 on what may not."""
    gains = simulator.expected_catalogue()
    return gains if simulator.allowed is None else gains * simulator.allowed


def _lengths(
    config: SessionConfig, temper_loss: float, violation_rate: float, sessions: EpisodeRecords
) -> tuple[float, tuple[float, float]] | tuple[None, None]:
    """Returns Len by the formula, and its range, where it holds; ``temper_loss`` is that of a step without penalty."""
    rule = leave_rule(config.leave)
    if not isinstance(rule, TemperFairness) or rule.unfair_penalty > 1.0 or not sessions.left.all():
        return None, None
    temper = float(config.max_len if rule.initial_temper is None else rule.initial_temper)
    reward, penalty = 2.0 - temper_loss, rule.unfair_penalty
    floor, ceiling = length_floor_and_ceiling(
        temper, reward, penalty=penalty, grace_steps=rule.grace_for(config.items_per_slate)
    )
    longest = min(float(ceiling), float(config.max_len))
    predicted = float(expected_length(temper, reward, violation_rate, penalty=penalty))
    return predicted, (min(float(floor), predicted, longest), longest)
