"""Evaluation of a policy: complete sessions of a fixed list of users, with the same random numbers for every policy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kuaifair_env.abandonment import TemperFairness, leave_rule
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.env import KuaiFairEnv
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
from kuaifair_env.simulator import FixedSessions
from kuaifair_env.vector_env import KuaiFairVectorEnv

if TYPE_CHECKING:
    import pandas as pd
    from stable_baselines3.common.vec_env import VecEnv

DEFAULT_SEED = 2603

_INCOMPLETE = (
    "a wrapper of the environment ends or replaces sessions before they are over, or goes on after their end "
    "(TimeLimit does); only complete sessions can be measured, so evaluate without it"
)
# Wrappers that change neither observation, action nor reward.
_UNCHANGING = {"PassiveEnvChecker", "OrderEnforcing", "RecordEpisodeStatistics", "Monitor"}


class Policy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3."""

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Returns actions for a batch of observations, and the next recurrent state."""
        ...


@runtime_checkable
class BindsEnvironment(Protocol):
    """A policy that needs more than observations (users, histories, the truth) and says so."""

    def bind(self, batch: SessionBatch) -> None:
        """Tells the policy which sessions its observations will come from."""
        ...


@dataclass(frozen=True, repr=False)
class EvaluationResult:
    """What a policy did in complete sessions.

    Attributes:
        sessions: One record per session, in the order of the list of sessions.
        engagement: Len, R_each, R_cum.
        fairness: Every exposure measure.
        ndcg: Mean R-NDCG@K by true expected feedback, or None where it was not asked for.
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
        data = self.world["data"]
        figures = ", ".join(f"{name} {value:.4f}" for name, value in self.summary().items() if name != "sessions")
        return (
            f"EvaluationResult({len(self.sessions)} sessions in {data['name']!r}, split={self.world['split']!r}, "
            f"{data['origin']} data {data['hash']}, max_len {self.config['max_len']}, seed {self.seed}:\n  {figures})"
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
        """Returns the headline figures as aligned text."""
        rows = self.summary()
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value:>12.4f}" for name, value in rows.items())


def evaluate(
    policy: Policy,
    env: gym.Env[Any, Any] | KuaiFairVectorEnv | VecEnv,
    users: Any = None,
    episodes_per_user: int = 1,
    *,
    seed: int = DEFAULT_SEED,
    deterministic: bool = True,
    n_envs: int = 256,
    ranking: bool = False,
    progress: bool = False,
) -> EvaluationResult:
    """Plays complete sessions of a fixed list of users and measures them.

    A session's random numbers follow from ``seed``, user and episode alone, so every policy meets the same users and
    the same random numbers, whatever ``n_envs``. Give an environment of its own: its running sessions are replaced.

    Args:
        policy: Anything with Stable-Baselines3's ``predict``; see :class:`BindsEnvironment` for policies that need
            more than observations.
        env: A KuaiFair environment of any form. An SB3 ``VecEnv`` may be wrapped (``VecNormalize``, a purifier). A
            single environment is run as a batch, unless wrappers change what it says, which are then run one
            session at a time.
        users: Raw user ids; None takes all users of the environment's world.
        episodes_per_user: Sessions of each user.
        seed: Seed of the sessions' randomness.
        deterministic: Passed to ``predict``.
        n_envs: Concurrent sessions where the environment leaves it open.
        ranking: Whether to measure R-NDCG@K by the true expected feedback; costs a catalogue of scores each step.
        progress: Whether to show a progress bar.

    Returns:
        Sessions, figures and provenance.

    Raises:
        DataError: If a user is unknown.
        TypeError: If the environment is not a KuaiFair environment.
        ValueError: If there is no session to play, or a wrapper does not play sessions to their end.
    """
    vec_env, batch = _vectorised(env, n_envs)
    world = batch.world
    rows = world.users if users is None else world.user_rows(users)
    sessions = FixedSessions.of_users(rows, episodes_per_user, seed)
    if isinstance(policy, BindsEnvironment):
        policy.bind(batch)
    totals = _Totals(batch, ranking)
    random_sessions = batch.simulator.source
    batch.serve(sessions)
    try:
        with tqdm(total=len(sessions), unit="session", disable=not progress, leave=False) as bar:
            for finished in _play(policy, vec_env, totals, len(sessions), deterministic):
                bar.update(finished)
    finally:
        batch.serve(random_sessions)
    return totals.result(seed)


def _play(policy: Policy, env: VecEnv, totals: _Totals, n_sessions: int, deterministic: bool) -> Iterator[int]:
    """Plays all sessions to their end; yields how many of them each step finished."""
    observation: Any = env.reset()
    state: Any = None
    done = np.ones(env.num_envs, np.bool_)
    remaining = n_sessions
    while remaining:
        before = totals.before_step()
        actions, state = policy.predict(observation, state=state, episode_start=done, deterministic=deterministic)
        observation, _, done, _ = env.step(actions)
        finished = totals.after_step(before, done)
        remaining -= finished
        yield finished


class _Before(NamedTuple):
    """The sessions before a step: which are listed, their users, and the true expected feedback where it is read."""

    listed: BoolArray
    users: NDArray[np.int64]
    truth: FloatArray | None


class _Totals:
    """Adds up what happens in the listed sessions of a batch.

    Args:
        batch: The sessions; those with a number of at least 0 are on the list.
        ranking: Whether to measure R-NDCG@K.
    """

    def __init__(self, batch: SessionBatch, ranking: bool) -> None:
        world = batch.world
        self._batch = batch
        self._ranking = ranking
        self._slates = SlateStatistics(world.groups.popular, world.exposures, len(world.data.users))
        self._records: list[EpisodeRecords] = []
        self._ndcg: list[NDArray[np.float64]] = []
        self._temper_lost, self._steps = 0.0, 0

    def before_step(self) -> _Before:
        """Returns what a step changes and :meth:`after_step` needs.

        Raises:
            ValueError: If no listed session is left although some were not played to their end.
        """
        simulator = self._batch.simulator
        listed = simulator.numbers >= 0
        if not listed.any():
            raise ValueError(_INCOMPLETE)
        truth = simulator.expected_catalogue() if self._ranking else None
        return _Before(listed, simulator.users.copy(), truth)

    def after_step(self, before: _Before, done: BoolArray) -> int:
        """Adds a step and returns how many listed sessions it finished.

        Args:
            before: What :meth:`before_step` returned.
            done: ``bool (B,)``, which sessions the environment's wrappers say are over.

        Raises:
            TypeError: If the wrappers did not step the sessions.
            ValueError: If other sessions are over than the wrappers say.
        """
        outcome, records = self._batch.outcome, self._batch.finished_records
        if outcome is None:
            raise TypeError("the environment's wrappers did not step the sessions beneath them")
        if not np.array_equal(np.flatnonzero(done), self._batch.finished):
            raise ValueError(_INCOMPLETE)
        listed = before.listed
        self._slates.add(outcome.items[listed], before.users[listed], outcome.violation[listed])
        self._temper_lost += float(np.clip(2.0 - outcome.reward[listed], 0.0, 2.0).sum())
        self._steps += int(listed.sum())
        if before.truth is not None:
            gains = np.take_along_axis(before.truth, outcome.items, axis=1)[listed]
            self._ndcg.append(ndcg(gains, top_gains(before.truth[listed], gains.shape[1])))
        if records is None:
            return 0
        records = records.take(records.numbers >= 0)
        self._records.append(records)
        return len(records)

    def result(self, seed: int) -> EvaluationResult:
        """Returns what was added up, sessions in the order of the list."""
        records = EpisodeRecords.concatenated(self._records)
        records = records.take(np.argsort(records.numbers))
        fairness = self._slates.report()
        temper_loss = self._temper_lost / self._steps
        predicted, length_range = _lengths(self._batch.config, temper_loss, fairness.violation_rate, records)
        return EvaluationResult(
            sessions=records,
            engagement=engagement(records.length, records.return_),
            fairness=fairness,
            ndcg=float(np.concatenate(self._ndcg).mean()) if self._ndcg else None,
            world=self._batch.world.describe(),
            config=self._batch.config.describe(),
            seed=seed,
            predicted_length=predicted,
            length_range=length_range,
        )


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


def _vectorised(env: Any, n_envs: int) -> tuple[VecEnv, SessionBatch]:
    """Returns the environment as a ``VecEnv``, and the sessions beneath it."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

    from kuaifair_env.sb3 import KuaiFairVecEnv

    bottom = getattr(env, "unwrapped", env)
    if isinstance(env, VecEnv):
        if not isinstance(bottom, KuaiFairVecEnv):
            raise TypeError(
                f"evaluate() needs a KuaiFairVecEnv beneath the wrappers, got {type(bottom).__name__}; "
                "make one with kuaifair_env.make_sb3(...)"
            )
        bottom.apply_seeds()
        return env, bottom.batch
    if not isinstance(bottom, (KuaiFairEnv, KuaiFairVectorEnv)):
        raise TypeError(f"evaluate() needs a KuaiFair environment, got {type(bottom).__name__}")
    if isinstance(bottom, KuaiFairVectorEnv) and env is not bottom:
        raise TypeError("evaluate() does not see through Gymnasium's vector wrappers; wrap a KuaiFairVecEnv instead")
    if isinstance(bottom, KuaiFairEnv) and changing_wrappers(env):
        # An unseeded environment would draw a seed at its first reset, and random users with it.
        env.reset(seed=0)
        return DummyVecEnv([lambda: env]), bottom.batch
    native = KuaiFairVecEnv(bottom.world, bottom.config, n_envs, seed=0)
    return native, native.batch


def changing_wrappers(env: gym.Env[Any, Any]) -> list[str]:
    """Returns the class names of the wrappers around a single environment that may change what it says or takes."""
    names, layer = [], cast(Any, env)
    while layer is not layer.unwrapped:
        names.append(type(layer).__name__)
        layer = layer.env
    return [name for name in names if name not in _UNCHANGING]
