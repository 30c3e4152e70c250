"""Off-policy estimates of the click rate of a policy's first slate, from a log of items chosen at random.

The log holds single items, no slates and no leaving. A user ``u`` with ``n_u`` of its ``n`` rows weighs ``n_u / n``,
and the estimand is ``V = sum_u n_u / n sum_i q(i | u) p(u, i)``. Here ``q`` is the policy's probability of finding an
item at a place of the first slate drawn at random, and ``p`` the user's click probability, which is taken not to
depend on the slate's other items. With ``w = q(i | u) / propensity(i)`` for each logged row, and ``c`` its click,

* ``rejection`` accepts rows with probability ``w / max w`` and takes the click rate of those;
* ``ips`` is the mean of ``w c``; ``snips`` is ``sum w c / sum w``;
* ``dr`` is the mean of ``sum_i q(i | u) p^(u, i) + w (c - p^(u, i))`` for a model ``p^`` of clicks.

Where slates are deterministic every weight is 0 or N / K, and ``rejection`` equals ``snips``.

Intervals are over users, whose rows belong together: all four are ratios of sums over users, linearised (delta method),
with Wilson's interval for the effective number of trials and Student's quantile
(:func:`kuaifair_env.intervals.rate_interval`).

Source: Li et al., WSDM 2011 (replay, here rejection); Horvitz and Thompson, 1952; Swaminathan and Joachims, NeurIPS
2015 (self-normalised); Dudik, Langford and Li, ICML 2011 (doubly robust); Kish, 1965 (effective sample size).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hrl_policies.ope.clicks import ClickModel, CrossFittedClicks
from hrl_policies.ope.slates import SlateDistribution, first_slates
from hrl_policies.study.statistics import linearised_ratio
from kuaifair_env.adapters import played
from kuaifair_env.errors import DataError
from kuaifair_env.evaluation import DEFAULT_SEED, users_to_evaluate
from kuaifair_env.intervals import Interval, crossed_mean, interval_of, rate_interval
from kuaifair_env.world import World

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.vector import VectorEnv
    from stable_baselines3.common.vec_env import VecEnv

    from kuaifair_env.adapters import Policy

Estimator = Literal["rejection", "ips", "snips", "dr"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

MIN_EFFECTIVE_ROWS = 50.0
"""Below so many effective rows there is a warning: intervals rest on a normal approximation."""

MAX_UNSUPPORTED = 0.01
"""Above this share of a policy's items that the log never shows there is a warning."""

MAX_UNEVENNESS = 0.5
"""Above this variation of items' exposures, beyond chance, there is a warning: the log hardly shows items uniformly."""


class SupportWarning(UserWarning):
    """The log says little or nothing about what a policy shows."""


@dataclass(frozen=True)
class RandomLog:
    """Rows of a log whose items were chosen at random, whoever the user.

    Attributes:
        users: ``int64 (R,)``, user rows, non-decreasing.
        items: ``int64 (R,)``, candidates.
        clicks: ``bool (R,)``.
        propensities: ``float64 (N,)``, probability with which a row showed each candidate.
        rate_factor: Rows of the log over rows with those that are missing because their users never clicked. Estimates
            and intervals are multiplied by it: weighted clicks of missing rows are 0, and weights have mean 1.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    clicks: NDArray[np.bool_]
    propensities: NDArray[np.float64]
    rate_factor: float = 1.0

    def __post_init__(self) -> None:
        if not len(self.users):
            raise DataError("the random log holds no row of these users on candidates")
        if not 0.0 < self.rate_factor <= 1.0:
            raise ValueError(f"rate_factor must lie in (0, 1], got {self.rate_factor}")
        if (self.propensities[self.items] <= 0).any():
            item = int(self.items[self.propensities[self.items] <= 0][0])
            raise ValueError(f"the log shows item row {item}, whose propensity is 0")

    def __len__(self) -> int:
        return len(self.users)

    @classmethod
    def of_world(
        cls,
        world: World,
        users: NDArray[np.int64] | None = None,
        propensities: NDArray[np.float64] | None = None,
        rate_factor: float = 1.0,
    ) -> RandomLog:
        """Takes the test log's rows of some users on the candidates of a world.

        Args:
            world: A world whose test log shows items at random.
            users: User rows; None takes those whose sessions may start there.
            propensities: ``(N,)``, probabilities of the candidates; None takes all to be equally likely.
            rate_factor: See the class.
        """
        log = world.data.test
        kept = np.isin(log.users, world.users if users is None else users) & (log.items < world.n_items)
        rows = log.take(kept)
        uniform = np.full(world.n_items, 1.0 / world.n_items)
        return cls(
            rows.users.astype(np.int64),
            rows.items.astype(np.int64),
            rows.clicks,
            uniform if propensities is None else np.asarray(propensities, np.float64),
            rate_factor,
        )

    @property
    def unevenness(self) -> float:
        """Coefficient of variation of the items' exposures over propensities, beyond what chance makes of it."""
        shown = np.bincount(self.items, minlength=len(self.propensities))
        expected = len(self) * self.propensities / self.propensities.sum()
        known = expected > 0
        excess = ((shown - expected)[known] ** 2 - expected[known]) / expected[known] ** 2
        return float(np.sqrt(max(excess.mean(), 0.0)))


@dataclass(frozen=True)
class OffPolicyResult:
    """Estimates of one quantity of a policy.

    Attributes:
        quantity: What is estimated.
        estimates: Estimates with their 95 % intervals over users, by estimator.
        users: Users of the log.
        rows: Rows of the log.
        hits: Rows whose item the policy may show.
        hit_users: Users that have any.
        effective_rows: Kish's effective sample size of the weights, ``(sum w)^2 / sum w^2``.
        mean_weight: Mean weight of the rows with its 99 % interval. It is 1 where propensities are right. Below 1 the
            log leaves out what the policy shows, such as items that users have seen before.
        unsupported: Share of the policy's items that no row of the log shows.
        unevenness: See :attr:`RandomLog.unevenness`.
        rate_factor: What the estimates were multiplied by.
    """

    quantity: str
    estimates: dict[Estimator, Interval]
    users: int
    rows: int
    hits: int
    hit_users: int
    effective_rows: float
    mean_weight: Interval
    unsupported: float
    unevenness: float
    rate_factor: float

    def table(self) -> str:
        """Returns the estimates as text, aligned, under what they rest on."""
        lines = [
            self.quantity,
            f"{self.rows:,} random rows of {self.users:,} users; {self.hits:,} show an item of the policy "
            f"({self.hit_users:,} users); effective sample size {self.effective_rows:,.0f}",
            f"mean weight {self.mean_weight.estimate:.3f} [{self.mean_weight.low:.3f}, {self.mean_weight.high:.3f}], 1 "
            "where propensities are right",
            f"items that no row shows: {self.unsupported:.1%} of the policy's; exposures uneven by "
            f"{self.unevenness:.2f}; rates times {self.rate_factor:g}",
            f"{'estimator':<10} {'estimate':>9}  95 % interval over users",
        ]
        for name, interval in self.estimates.items():
            lines.append(f"{name:<10} {interval.estimate:>9.4f}  [{interval.low:.4f}, {interval.high:.4f}]")
        return "\n".join(lines)


def evaluate_on_random_log(
    policy: Policy,
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any] | VecEnv,
    users: Any = None,
    *,
    n_users: int | None = None,
    estimators: Sequence[Estimator] = ESTIMATORS,
    samples: int = 1,
    deterministic: bool = True,
    propensities: NDArray[np.float64] | None = None,
    rate_factor: float = 1.0,
    model: ClickModel | None = None,
    seed: int = DEFAULT_SEED,
    n_envs: int = 256,
    progress: bool = False,
) -> OffPolicyResult:
    """Estimates the click rate of a policy's first slate from the test log, whose items must be chosen at random.

    The policy is shown the start of every user's session. What the world's response model answers to its slates enters
    no estimate.

    Args:
        policy: As :func:`kuaifair_env.evaluate` takes it.
        env: Sessions as the policy observes them, in any form that ``evaluate`` takes.
        users: Raw ids of the users; None takes all users of the environment's world, or ``n_users`` of them. Those
            without a row in the log are left out.
        n_users: Number of users, chosen by a hash of their ids.
        estimators: Which estimators.
        samples: Slates that are drawn for each user.
        deterministic: Passed to ``predict``.
        propensities: See :meth:`RandomLog.of_world`.
        rate_factor: See :class:`RandomLog`.
        model: Model of clicks for ``dr``; None fits :class:`CrossFittedClicks`.
        seed: Seed of the sessions and of ``rejection``.
        n_envs: Concurrent sessions where the environment leaves it open.
        progress: Whether to show a progress bar.

    Raises:
        DataError: If the log has no row of the users, or none shows an item that the policy shows.
        ValueError: If an estimator is unknown, or the agent was trained on other observations or actions.

    Warns:
        SupportWarning: If the log says little of what the policy shows.
    """
    world = played(env, n_envs).world
    rows = users_to_evaluate(world, users, n_users)
    log = RandomLog.of_world(world, rows, propensities, rate_factor)
    slates = first_slates(
        policy,
        env,
        np.unique(log.users),
        samples=samples,
        deterministic=deterministic,
        seed=seed,
        n_envs=n_envs,
        progress=progress,
    )
    if model is None and "dr" in estimators:
        model = CrossFittedClicks.fit(world)
    return estimate_click_rate(log, slates, estimators, model=model, seed=seed)


def estimate_click_rate(
    log: RandomLog,
    slates: SlateDistribution,
    estimators: Sequence[Estimator] = ESTIMATORS,
    *,
    model: ClickModel | None = None,
    seed: int = DEFAULT_SEED,
) -> OffPolicyResult:
    """Estimates the click rate of first slates; see the module.

    Args:
        log: The log.
        slates: First slates of all users of the log.
        estimators: Which estimators.
        model: Model of clicks; ``dr`` needs one.
        seed: Seed of ``rejection``, which matters where slates are random.

    Raises:
        DataError: If no row of the log shows an item that the policy shows.
        ValueError: If an estimator is unknown, users of the log have no slates, or ``dr`` has no model.

    Warns:
        SupportWarning: If the log says little of what the policy shows.
    """
    unknown = [name for name in estimators if name not in ESTIMATORS]
    if unknown or not estimators:
        raise ValueError(f"estimators are {', '.join(ESTIMATORS)}; got {', '.join(unknown) or 'none'}")
    weighted = _Weighted.of(log, slates)
    if not weighted.weights.any():
        raise DataError(
            f"none of {len(log):,} random rows shows an item that the policy shows its user; nothing can be estimated"
        )
    counts = np.bincount(weighted.places, minlength=len(slates.users)).astype(np.float64)
    shares = slates.item_shares(counts, len(log.propensities))
    never = (np.bincount(log.items, minlength=len(log.propensities)) == 0) | (log.propensities == 0)
    weights = weighted.weights
    result = OffPolicyResult(
        quantity="click rate of the first slate (mean over its items; users weigh as in the log)",
        estimates={name: _estimate(name, weighted, slates, model, seed) for name in estimators},
        users=len(np.unique(log.users)),
        rows=len(log),
        hits=int(np.count_nonzero(weights)),
        hit_users=len(np.unique(log.users[weights > 0])),
        effective_rows=float(weights.sum() ** 2 / (weights**2).sum()),
        mean_weight=interval_of(crossed_mean(weighted.ratio(weights, np.ones(len(log)))[None]), level=0.99),
        unsupported=float(shares[never].sum()),
        unevenness=log.unevenness,
        rate_factor=log.rate_factor,
    )
    _warn_of_support(result)
    return result


@dataclass(frozen=True)
class _Weighted:
    """A log with a policy's weights.

    Attributes:
        log: The log.
        places: ``int64 (R,)``, each row's user in the list of the slates.
        weights: ``float64 (R,)``, the policy's probability over the log's.
    """

    log: RandomLog
    places: NDArray[np.int64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, log: RandomLog, slates: SlateDistribution) -> _Weighted:
        places = np.minimum(np.searchsorted(slates.users, log.users), len(slates.users) - 1)
        if not np.array_equal(slates.users[places], log.users):
            raise ValueError("every user of the log needs first slates, and some have none")
        weights = slates.probabilities(places, log.items) / log.propensities[log.items]
        return cls(log, places, weights)

    def ratio(self, numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns one value for each user of the log, whose mean is the ratio of the sums over rows."""
        present = np.bincount(self.places) > 0
        sums = [np.bincount(self.places, column)[present] for column in (numerators, denominators)]
        return linearised_ratio(*sums)


def _estimate(
    name: Estimator, weighted: _Weighted, slates: SlateDistribution, model: ClickModel | None, seed: int
) -> Interval:
    log, weights = weighted.log, weighted.weights
    clicks, ones = log.clicks.astype(np.float64), np.ones(len(log))
    if name == "rejection":
        accepted = (np.random.default_rng(seed).random(len(log)) * weights.max() < weights).astype(np.float64)
        values = weighted.ratio(accepted * clicks, accepted)
    elif name == "snips":
        values = weighted.ratio(weights * clicks, weights)
    elif name == "ips":
        values = weighted.ratio(weights * clicks, ones)
    else:
        if model is None:
            raise ValueError("the doubly robust estimate needs a model of clicks: give model=, or leave 'dr' out")
        predicted = model.predict(log.users, log.items[:, None])[:, 0]
        values = weighted.ratio(slates.mean(model)[weighted.places] + weights * (clicks - predicted), ones)
    interval, factor = _interval(values, len(np.unique(log.users[weights > 0]))), log.rate_factor
    return Interval(factor * interval.estimate, factor * interval.low, factor * interval.high, interval.level)


def _interval(values: NDArray[np.float64], hit_users: int) -> Interval:
    """Returns the mean of one value for each user with its interval."""
    if 0.0 <= values.mean() <= 1.0:
        return rate_interval(values[None], hit_users)
    # Weighted means that are no rates: far too few rows.
    student = interval_of(crossed_mean(values[None]))
    return Interval(student.estimate, max(student.low, 0.0), min(student.high, 1.0), student.level)


def _warn_of_support(result: OffPolicyResult) -> None:
    if result.unsupported > MAX_UNSUPPORTED:
        warnings.warn(
            f"{result.unsupported:.1%} of what the policy shows is on items that no row of the log shows; estimates "
            "know nothing of these",
            SupportWarning,
            stacklevel=3,
        )
    if not result.mean_weight.low <= 1.0 <= result.mean_weight.high:
        warnings.warn(
            f"weights have mean {result.mean_weight.estimate:.2f} [{result.mean_weight.low:.2f}, "
            f"{result.mean_weight.high:.2f}] and not 1: for what this policy shows the log's propensities are others "
            "(it may leave out items that users have seen); 'ips' is off by as much, 'snips' and 'dr' by less",
            SupportWarning,
            stacklevel=3,
        )
    if result.effective_rows < MIN_EFFECTIVE_ROWS:
        warnings.warn(
            f"the effective sample size is {result.effective_rows:.0f} of {result.rows:,} rows (at least "
            f"{MIN_EFFECTIVE_ROWS:.0f} are needed for intervals that hold); take more users, or larger slates",
            SupportWarning,
            stacklevel=3,
        )
    if result.unevenness > MAX_UNEVENNESS:
        warnings.warn(
            f"the log shows items unevenly (coefficient of variation {result.unevenness:.2f} beyond chance) and does "
            "not look as random as its propensities say; give the true ones, or take another log",
            SupportWarning,
            stacklevel=3,
        )
