"""Fitted Q evaluation: R_cum of a policy from whole sessions of another one, with the sessions' leaving in it.

``Q(s, A)`` is what a session earns from the slate ``A`` on, the policy choosing all later slates. It solves ``Q(s, A)
= E[r + Q(s', pi(s'))]``, without the second term after the last slate; :func:`fitted_q_evaluation` regresses the
right side on state and slate over logged steps, again and again until both sides agree (Le, Voloshin and Yue, ICML
2019). ``Q`` is a polynomial of second degree in nine numbers (:data:`FEATURES`), between 0 and what the longest
logged session could have earned. Temper is hidden, but the sums of rewards and violations of a session tell it.

The policy is asked for its slate at every logged step, whose session the behaviour policy goes on with. What nine
numbers and a polynomial do not tell is a bias, which no interval shows.

Intervals: cluster bootstrap over users, every draw solved anew (Hao et al., ICML 2021).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from hrl_policies.ope.clicks import ClickModel, CrossFittedClicks
from hrl_policies.ope.estimators import SupportWarning
from kuaifair_env.adapters import Actor, check_agent, inference_mode, played, playing_sessions_of
from kuaifair_env.batch import SessionBatch
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.evaluation import DEFAULT_SEED, binding, users_to_evaluate
from kuaifair_env.intervals import Interval
from kuaifair_env.simulator import FixedSessions

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.vector import VectorEnv
    from stable_baselines3.common.vec_env import VecEnv

    from kuaifair_env.adapters import Policy

FEATURES = (
    *("steps", "rewards", "violations", "surprise"),
    *("activity", "predicted_clicks", "similarity", "popular_share", "repeated_share"),
)
"""Of the session: slates before, their rewards, their violations, and rewards less what a model predicted; of the user:
clicks that the model predicts on the average candidate. Of the slate: clicks that the model predicts, similarity to the
observed state, share of popular items, share of items that the session has shown."""

_SLATE_FEATURES = slice(5, 8)
_MAX_OUTSIDE = 0.05
_TOLERANCE = 1e-4
_SESSIONS_AHEAD = 4
_AVERAGE_ITEMS = 200


@dataclass(frozen=True)
class LoggedSessions:
    """Steps of whole sessions of a behaviour policy, and what another policy would have shown at each.

    Attributes:
        users: ``int64 (T,)``, user rows.
        sessions: ``int64 (T,)``, number of the session, its steps one after the other.
        features: ``float32 (T, F)``, of the state and the slate that was shown.
        target_features: ``float32 (T, F)``, of the state and the slate that the policy to evaluate would have shown.
        rewards: ``float64 (T,)``.
    """

    users: NDArray[np.int64]
    sessions: NDArray[np.int64]
    features: FloatArray
    target_features: FloatArray
    rewards: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def first(self) -> BoolArray:
        """``bool (T,)``, which steps begin a session."""
        return np.concatenate([[True], np.diff(self.sessions) > 0])

    @property
    def last(self) -> BoolArray:
        """``bool (T,)``, which steps end a session."""
        return np.concatenate([np.diff(self.sessions) > 0, [True]])

    @property
    def mean_return(self) -> float:
        """R_cum of the behaviour policy."""
        return float(self.rewards.sum() / np.count_nonzero(self.first))


@dataclass(frozen=True)
class FittedQResult:
    """R_cum of a policy by fitted Q evaluation.

    Attributes:
        interval: The estimate with its 95 % interval over users.
        behaviour: R_cum of the logged sessions.
        users: Number of users.
        sessions: Number of sessions.
        steps: Number of steps.
        outside: Share of the policy's slates whose features lie outside those of the slates that were shown.
    """

    interval: Interval
    behaviour: float
    users: int
    sessions: int
    steps: int
    outside: float

    def table(self) -> str:
        """Returns the estimate as text under what it rests on."""
        interval = self.interval
        return "\n".join(
            [
                f"R_cum by fitted Q evaluation, from {self.steps:,} steps of {self.sessions:,} sessions of "
                f"{self.users:,} users",
                f"slates unlike those that were shown: {self.outside:.1%}; R_cum that was logged: {self.behaviour:.4f}",
                f"{'estimator':<10} {'estimate':>9}  95 % interval over users",
                f"{'fqe':<10} {interval.estimate:>9.4f}  [{interval.low:.4f}, {interval.high:.4f}]",
            ]
        )


def log_sessions(
    behaviour: Policy,
    target: Policy,
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
    users: Any = None,
    episodes_per_user: int = 1,
    *,
    n_users: int | None = None,
    model: ClickModel | None = None,
    deterministic: bool = True,
    seed: int = DEFAULT_SEED,
    n_envs: int = 256,
    progress: bool = False,
) -> LoggedSessions:
    """Has a behaviour policy play whole sessions, and notes what another would have shown at each step.

    Args:
        behaviour: Chooses the slates; it should vary them.
        target: The policy to evaluate, in the same sessions: with the same observations and the same form of action.
        env: Sessions of one batch, as :func:`kuaifair_env.evaluate` takes them.
        users: Raw ids of the users; None takes all, or ``n_users`` of them.
        episodes_per_user: Sessions of each user.
        n_users: Number of users, chosen by a hash of their ids.
        model: Model of clicks, for features; None fits :class:`CrossFittedClicks` to the test log.
        deterministic: Passed to ``predict`` of the target.
        seed: Seed of the sessions.
        n_envs: Concurrent sessions where the environment leaves it open.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If the environment plays several batches of sessions.
        ValueError: If an agent was trained on other observations or actions.
    """
    played_env = played(env, n_envs)
    actors = [Actor(behaviour, False), Actor(target, deterministic)]
    agents = [getattr(policy, "__self__", policy) for policy in (behaviour, target)]
    for agent in agents:
        check_agent(agent, played_env)
    world = played_env.world
    sessions = FixedSessions.of_users(users_to_evaluate(world, users, n_users), episodes_per_user, seed)
    recorder = _Recorder(CrossFittedClicks.fit(world) if model is None else model, len(played_env.over))
    with (
        playing_sessions_of(played_env, sessions) as batches,
        inference_mode(agents[0]),
        inference_mode(agents[1]),
        binding(behaviour, actors[0], batches, played_env.own_batch) as behaviour_reads_masks,
        binding(target, actors[1], batches, played_env.own_batch) as target_reads_masks,
        tqdm(total=len(sessions), unit="session", disable=not progress, leave=False) as bar,
    ):
        if len(batches) > 1:
            raise TypeError("sessions are logged in one batch; give kuaifair_env.make_sb3(...)")
        batch, finished = batches[0], 0
        observation, starts = played_env.reset(), np.ones(len(played_env.over), np.bool_)
        while finished < len(sessions):
            masks = played_env.action_masks() if behaviour_reads_masks or target_reads_masks else None
            shown = actors[0].act(observation, starts, masks if behaviour_reads_masks else None)
            other = actors[1].act(observation, starts, masks if target_reads_masks else None)
            over = played_env.over.copy()
            recorder.before(batch, shown, other)
            observation, done, starts = played_env.step(shown)
            ended = recorder.after(batch, done, over)
            finished += ended
            bar.update(ended)
    return recorder.log()


class _Recorder:
    """Collects the steps of a batch of sessions.

    Args:
        model: Model of clicks.
        batch_size: Number of concurrent sessions.
    """

    def __init__(self, model: ClickModel, batch_size: int) -> None:
        self._model = model
        # Steps, rewards, violations and surprise of the running sessions.
        self._session = np.zeros((batch_size, 4))
        self._steps: list[tuple[NDArray[Any], ...]] = []

    def before(self, batch: SessionBatch, shown: NDArray[Any], other: NDArray[Any]) -> None:
        """Notes the state and both policies' actions."""
        simulator = batch.simulator
        self._users, self._numbers = simulator.users.copy(), simulator.numbers.copy()
        slates = [batch.decoder.decode(actions, simulator.allowed) for actions in (shown, other)]
        self._features, self._target_features = (self._of_slate(batch, items) for items in slates)

    def after(self, batch: SessionBatch, done: BoolArray, over: BoolArray) -> int:
        """Notes what the step gave; returns how many of the listed sessions it ended."""
        outcome = batch.outcome
        assert outcome is not None
        listed = (self._numbers >= 0) & ~over
        columns = (self._users, self._numbers, self._features, self._target_features, outcome.reward)
        self._steps.append(tuple(column[listed] for column in columns))
        predicted = self._features[:, FEATURES.index("predicted_clicks")]
        change = [np.ones(len(done)), outcome.reward, outcome.violation, outcome.mean_feedback - predicted]
        self._session += np.column_stack(change)
        self._session[done] = 0.0
        return int(np.count_nonzero(done & listed))

    def log(self) -> LoggedSessions:
        """Returns all steps, session by session."""
        users, numbers, features, target_features, rewards = (
            np.concatenate(column) for column in zip(*self._steps, strict=True)
        )
        order = np.argsort(numbers, kind="stable")
        return LoggedSessions(
            users[order], numbers[order], features[order], target_features[order], rewards[order].astype(np.float64)
        )

    def _of_slate(self, batch: SessionBatch, items: NDArray[np.int64]) -> FloatArray:
        world, simulator = batch.world, batch.simulator
        users, rows = simulator.users, np.arange(len(items))[:, None]
        spread = np.linspace(0, world.n_items - 1, min(world.n_items, _AVERAGE_ITEMS)).astype(np.int64)
        activity = self._model.predict(users, np.broadcast_to(spread, (len(users), len(spread)))).mean(axis=1)
        predicted = self._model.predict(users, items).mean(axis=1)
        states = unit_rows(simulator.clicked_means())
        similarity = np.einsum("bd,bkd->b", states, world.item_directions[items]) / items.shape[1]
        popular = world.groups.popular[items].mean(axis=1)
        shown = np.zeros((len(items), world.n_items + 1), np.bool_)
        slates = simulator.shown(np.arange(len(items)))
        own = np.arange(slates.shape[1]) >= slates.shape[1] - simulator.steps[:, None]
        shown[rows, np.where(own[..., None], slates, world.n_items).reshape(len(items), -1)] = True
        repeated = shown[rows, items].mean(axis=1)
        columns = [*self._session.T, activity, predicted, similarity, popular, repeated]
        return np.column_stack(columns).astype(np.float32)


def fitted_q_evaluation(
    log: LoggedSessions, *, resamples: int = 50, penalty: float = 1.0, seed: int = 0
) -> FittedQResult:
    """Estimates R_cum of the policy to evaluate; see the module.

    Where both policies are the same the estimate is the mean return that was logged.

    Args:
        log: Sessions of the behaviour policy.
        resamples: Draws of users for the interval, which is that of percentiles.
        penalty: Ridge penalty on standardised terms, beside the number of steps.
        seed: Seed of the draws.

    Raises:
        ValueError: If there are fewer than two users.

    Warns:
        SupportWarning: If many of the policy's slates are unlike those that were shown.
    """
    users, of_user = np.unique(log.users, return_inverse=True)
    if len(users) < 2:
        raise ValueError(f"an interval over users needs at least two, got {len(users)}")
    draws = np.random.default_rng(seed).multinomial(len(users), np.full(len(users), 1.0 / len(users)), resamples)
    problem = _LeastSquares.of(log)
    first = log.first
    estimates = np.empty(resamples + 1)
    for draw, of_users in enumerate([np.ones(len(users)), *draws]):
        weights = of_users[of_user].astype(np.float64)
        estimates[draw] = np.average(problem.solve(log, weights, penalty)[first], weights=weights[first])
    low, high = np.quantile(estimates[1:], [0.025, 0.975])
    slates, targets = log.features[:, _SLATE_FEATURES], log.target_features[:, _SLATE_FEATURES]
    outside = float(((targets < slates.min(axis=0)) | (targets > slates.max(axis=0))).any(axis=1).mean())
    if outside > _MAX_OUTSIDE:
        warnings.warn(
            f"{outside:.1%} of the policy's slates are unlike all that the log shows (clicks predicted, similarity or "
            "popular share outside its range); the estimate extrapolates",
            SupportWarning,
            stacklevel=2,
        )
    return FittedQResult(
        Interval(float(estimates[0]), float(low), float(high), 0.95),
        log.mean_return,
        len(users),
        int(np.count_nonzero(first)),
        len(log),
        outside,
    )


@dataclass(frozen=True)
class _LeastSquares:
    """Regression on a polynomial of second degree in the features, standardised by the logged ones.

    Attributes:
        logged: ``float64 (T, P)``, terms of the logged steps, 1 first.
        target: ``float64 (T, P)``, terms with the policy's slates.
    """

    logged: NDArray[np.float64]
    target: NDArray[np.float64]

    @classmethod
    def of(cls, log: LoggedSessions) -> _LeastSquares:
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        scaler, terms, again = StandardScaler(), PolynomialFeatures(2, include_bias=False), StandardScaler()
        scaled = scaler.fit_transform(log.features.astype(np.float64))
        logged = again.fit_transform(terms.fit_transform(scaled))
        target = again.transform(terms.transform(scaler.transform(log.target_features.astype(np.float64))))
        ones = np.ones((len(log), 1))
        return cls(np.hstack([ones, logged]), np.hstack([ones, target]))

    def solve(self, log: LoggedSessions, weights: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        """Returns ``float64 (T,)``, ``Q(s, pi(s))`` where steps have weights."""
        penalties = np.full(self.logged.shape[1], penalty)
        penalties[0] = 0.0
        weighted = self.logged * weights[:, None]
        inverse = np.linalg.inv(weighted.T @ self.logged + np.diag(penalties))
        rewards = inverse @ (weighted.T @ log.rewards)
        starts = np.flatnonzero(log.first)
        longest = int(np.diff(np.append(starts, len(log))).max())
        largest = longest * float(log.rewards.max())
        follows = np.flatnonzero(~log.last)
        onward, next_terms = inverse @ weighted[follows].T, self.target[follows + 1]
        coefficients = rewards
        for _ in range(_SESSIONS_AHEAD * longest):
            before = coefficients
            coefficients = rewards + onward @ np.clip(next_terms @ coefficients, 0.0, largest)
            if np.abs(coefficients - before).max() < _TOLERANCE:
                break
        return np.clip(self.target @ coefficients, 0.0, largest)
