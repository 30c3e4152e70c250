"""Off-policy estimates: closed forms, enumeration, brute force, and what a log can say nothing about."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from helpers import small_world
from small_worlds import small_pair

from hrl_policies.controls import Control, QuotaGreedy, RandomSlates
from hrl_policies.ope import (
    CrossFittedClicks,
    RandomLog,
    SampledSlates,
    SlateMarginals,
    SupportWarning,
    WorldClicks,
    estimate_click_rate,
    evaluate_on_random_log,
    first_slates,
    fitted_q_evaluation,
    log_sessions,
)
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.errors import DataError
from kuaifair_env.replay import build_replay_world
from kuaifair_env.sb3 import KuaiFairVecEnv

SMALL = "ignore:the effective sample size"
CHANCES = np.asarray([[0.2, 0.7, 0.5], [0.9, 0.1, 0.4]])


class TableClicks:
    """A model of clicks from a table."""

    def __init__(self, table):
        self.table = np.asarray(table, np.float32)

    def predict(self, users, items):
        return self.table[users[:, None], items]


def uniform_log(users, items, clicks, n_items, **settings):
    propensities = np.full(n_items, 1.0 / n_items)
    return RandomLog(np.asarray(users), np.asarray(items), np.asarray(clicks, np.bool_), propensities, **settings)


def drawn_log(table, rows_per_user, seed, **settings):
    """Items uniformly at random, clicked with the probabilities of a table."""
    rng = np.random.default_rng(seed)
    n_users, n_items = table.shape
    users = np.repeat(np.arange(n_users), rows_per_user)
    items = rng.integers(n_items, size=len(users))
    return uniform_log(users, items, rng.random(len(users)) < table[users, items], n_items, **settings)


def sessions(world, n_envs=16, **settings):
    return KuaiFairVecEnv(world, SessionConfig(action_mode="slate", slate_size=4, **settings), n_envs, seed=0)


# --- the estimators -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.filterwarnings("ignore:.*no row of the log shows")
@pytest.mark.filterwarnings("ignore:the log shows items unevenly")
@pytest.mark.parametrize("propensities", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.5, 0.3]])
def test_ips_and_dr_are_unbiased_over_all_logs_that_there_can_be(propensities):
    """Two users with one row each: 36 logs, each with its probability. The model of clicks is wrong."""
    propensities = np.asarray(propensities)
    slates = SlateMarginals(np.arange(2), np.asarray([[0.5, 0.1, 0.4], [0.05, 0.9, 0.05]]))
    truth = (slates.table * CHANCES).sum(axis=1).mean()
    model = TableClicks([[0.5, 0.5, 0.1], [0.3, 0.8, 0.4]])
    mean = {"ips": 0.0, "dr": 0.0}
    total = 0.0
    for items in product(range(3), repeat=2):
        for clicks in product((False, True), repeat=2):
            chances = CHANCES[np.arange(2), items]
            probability = np.prod(propensities[list(items)] * np.where(clicks, chances, 1 - chances))
            log = RandomLog(np.arange(2), np.asarray(items), np.asarray(clicks), propensities)
            estimates = estimate_click_rate(log, slates, ("ips", "dr"), model=model).estimates
            total += probability
            for name, interval in estimates.items():
                mean[name] += probability * interval.estimate
    assert total == pytest.approx(1.0)
    assert mean["ips"] == pytest.approx(truth)
    assert mean["dr"] == pytest.approx(truth, abs=1e-6)


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.filterwarnings("ignore:the log shows items unevenly")
def test_self_normalised_estimates_are_what_one_computes_by_hand():
    """User 0 is shown items 0, 1, 1; user 1 item 2. Weights 3/2, 3/4, 3/4 and 3/4."""
    log = uniform_log([0, 0, 0, 1], [0, 1, 1, 2], [1, 0, 1, 1], 3)
    slates = SlateMarginals(np.arange(2), np.asarray([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]))
    estimates = estimate_click_rate(log, slates, ("ips", "snips")).estimates
    assert estimates["ips"].estimate == pytest.approx((1.5 + 0.75 + 0.75) / 4)
    assert estimates["snips"].estimate == pytest.approx((1.5 + 0.75 + 0.75) / (1.5 + 3 * 0.75))


def test_rejection_of_deterministic_slates_is_the_click_rate_of_the_rows_that_match():
    """And so is the self-normalised estimate, whose weights are all equal."""
    rng = np.random.default_rng(0)
    log = drawn_log(rng.random((60, 12)), 30, seed=1)
    slates = SampledSlates(np.arange(60), np.argsort(rng.random((60, 12)), axis=1)[:, None, :4])
    result = estimate_click_rate(log, slates, ("rejection", "snips"))
    match = [item in slates.items[user, 0] for user, item in zip(log.users, log.items, strict=True)]
    assert result.hits == result.effective_rows == sum(match)
    for interval in result.estimates.values():
        assert interval.estimate == pytest.approx(log.clicks[match].mean())


def test_of_slates_at_random_every_estimate_is_the_click_rate_of_the_log():
    rng = np.random.default_rng(0)
    log = drawn_log(rng.random((60, 12)), 30, seed=1)
    result = estimate_click_rate(log, SlateMarginals.uniform(np.arange(60), 12), ("rejection", "ips", "snips"))
    for interval in result.estimates.values():
        assert interval.estimate == pytest.approx(log.clicks.mean())
    assert result.effective_rows == pytest.approx(len(log))


@pytest.mark.filterwarnings(SMALL)
def test_dr_is_exact_where_the_model_knows_every_click():
    rng = np.random.default_rng(2)
    table = (rng.random((20, 12)) < 0.4).astype(float)
    log = drawn_log(table, 5, seed=3)
    slates = SampledSlates(np.arange(20), np.argsort(rng.random((20, 12)), axis=1)[:, None, :3])
    estimate = estimate_click_rate(log, slates, ("dr",), model=TableClicks(table)).estimates["dr"].estimate
    assert estimate == pytest.approx(np.take_along_axis(table, slates.items[:, 0], axis=1).mean())


def test_missing_rows_of_users_who_never_clicked_are_made_up_for_exactly():
    """With the share of rows that is left as factor, IPS is that of the whole log."""
    rng = np.random.default_rng(4)
    table = 0.4 * rng.random((300, 10)) ** 2
    whole = drawn_log(table, 6, seed=5)
    slates = SampledSlates(np.arange(300), np.argsort(rng.random((300, 10)), axis=1)[:, None, :4])
    clicked = np.bincount(whole.users, whole.clicks) > 0
    left = clicked[whole.users]
    assert 0.2 < left.mean() < 0.8
    part = uniform_log(whole.users[left], whole.items[left], whole.clicks[left], 10, rate_factor=float(left.mean()))
    estimators = ("ips", "snips")
    of_whole = estimate_click_rate(whole, slates, estimators).estimates
    of_part = estimate_click_rate(part, slates, estimators).estimates
    assert of_part["ips"].estimate == pytest.approx(of_whole["ips"].estimate)
    assert of_part["snips"].estimate == pytest.approx(of_whole["snips"].estimate, rel=0.1)


def test_intervals_are_over_users():
    """About as wide as by the jackknife of users; rows that are repeated ten times over tell no more than once."""
    rng = np.random.default_rng(6)
    log = drawn_log(rng.random((400, 10)), 8, seed=7)
    slates = SlateMarginals(np.arange(400), rng.dirichlet(np.ones(10), 400))
    interval = estimate_click_rate(log, slates, ("ips",)).estimates["ips"]
    weights = slates.table[log.users, log.items] * 10
    sums = np.bincount(log.users, weights * log.clicks)
    without = (sums.sum() - sums) / (len(log) - 8)
    deviation = np.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    assert interval.half_width == pytest.approx(1.966 * deviation, rel=0.01)
    ten = uniform_log(np.repeat(log.users, 10), np.repeat(log.items, 10), np.repeat(log.clicks, 10), 10)
    assert estimate_click_rate(ten, slates, ("ips",)).estimates["ips"].half_width == pytest.approx(interval.half_width)


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """Users drawn from a population of 2,000, each with a rate of clicks and a number of rows of their own."""
    rng = np.random.default_rng(8)
    level = rng.beta(2, 6, 2_000)
    table = np.clip(level[:, None] * 2 * rng.random((2_000, 100)), 0, 1)
    slates = np.argsort(rng.random((2_000, 100)), axis=1)[:, :10]
    truth = np.take_along_axis(table, slates, axis=1).mean()
    covered: dict[str, list[bool]] = {}
    for _ in range(600):
        users = rng.integers(2_000, size=500)
        places = np.repeat(np.arange(500), 1 + rng.poisson(8, 500))
        items = rng.integers(100, size=len(places))
        log = uniform_log(places, items, rng.random(len(places)) < table[users[places], items], 100)
        chosen = SampledSlates(np.arange(500), slates[users][:, None])
        model = TableClicks(np.broadcast_to(level[users, None] * 1.2, (500, 100)))
        for name, interval in estimate_click_rate(log, chosen, model=model).estimates.items():
            covered.setdefault(name, []).append(interval.low <= truth <= interval.high)
    # The standard error of each rate is .009.
    for name, cases in covered.items():
        assert 0.92 < np.mean(cases) < 0.98, name


# --- slates -------------------------------------------------------------------------------------------------


def test_probabilities_of_sampled_slates_are_counts():
    rng = np.random.default_rng(0)
    slates = SampledSlates(np.arange(5), np.argsort(rng.random((5, 3, 8)), axis=2)[..., :4])
    counts = np.stack([np.bincount(items.ravel(), minlength=9) for items in slates.items]) / 12
    places, items = np.repeat(np.arange(5), 9), np.tile(np.arange(9), 5)
    assert slates.probabilities(places, items) == pytest.approx(counts.ravel())
    exact = SlateMarginals(np.arange(5), counts[:, :8])
    model = TableClicks(rng.random((5, 8)))
    assert slates.mean(model) == pytest.approx(exact.mean(model))
    weights = rng.random(5)
    assert slates.item_shares(weights, 8) == pytest.approx(exact.item_shares(weights, 8))


def test_first_slates_are_those_that_sessions_begin_with():
    pair = small_pair()
    world = pair.test
    users = world.users[::2]
    control = QuotaGreedy(pair.scorer)
    found = first_slates(control, sessions(world, n_envs=3), users)
    env = sessions(world, n_envs=len(users))
    env.set_options([{"user_id": user} for user in world.data.users.ids[users].tolist()])
    observation = env.reset()
    control.bind(env.batch)
    assert np.array_equal(found.items[:, 0], control.predict(observation)[0])
    assert np.array_equal(found.users, users)


def test_random_slates_are_drawn_anew_for_each_sample_whatever_the_batch():
    world = small_pair().test
    few, many = (
        first_slates(RandomSlates(seed=1), sessions(world, n_envs=n_envs), world.users, samples=5) for n_envs in (3, 64)
    )
    assert np.array_equal(few.items, many.items)
    assert few.items.shape == (len(world.users), 5, 4)
    assert (few.items[:, 0] != few.items[:, 1]).any()


# --- from a policy to a result ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the log shows items unevenly")
def test_a_policys_estimates_hold_its_true_click_rate():
    """In a world of known click probabilities; the doubly robust estimate fits its own model."""
    table = np.random.default_rng(0).beta(1, 3, (300, 40))
    world = small_world(table, n_users=300, n_items=40)
    log = drawn_log(table, 80, seed=1)
    test = replace(
        world.data.test,
        users=log.users.astype(np.int32),
        items=log.items.astype(np.int32),
        clicks=log.clicks,
        times=np.arange(len(log)),
    )
    world = replace(world, data=replace(world.data, test=test))
    control = RandomSlates(world.groups.popular)
    result = evaluate_on_random_log(control, sessions(world), samples=3)
    slates = first_slates(control, sessions(world), world.users, samples=3)
    truth = slates.mean(WorldClicks(world)).mean()
    assert result.users == 300
    for interval in result.estimates.values():
        assert interval.low < truth < interval.high
        assert interval.half_width < 0.03
    assert "dr" in result.table()
    lines = result.table().splitlines()[-4:]
    assert len({line.index("[") for line in lines}) == 1


def test_a_users_own_random_rows_do_not_enter_the_model_of_its_clicks():
    """Of one user all clicks are turned round: predictions for the users of that fold stay."""
    pair = small_pair()
    world = pair.test
    before = CrossFittedClicks.fit(world)
    user = int(world.data.test.users[0])
    test = world.data.test
    turned = replace(test, clicks=np.where(test.users == user, ~test.clicks, test.clicks))
    after = CrossFittedClicks.fit(replace(world, data=replace(world.data, test=turned)))
    same_fold = np.flatnonzero(before.folds == before.folds[user])
    others = np.flatnonzero(before.folds != before.folds[user])
    items = np.tile(np.arange(world.n_items), (len(world.data.users), 1))
    one, two = (model.predict(np.arange(len(items)), items) for model in (before, after))
    assert np.array_equal(one[same_fold], two[same_fold])
    assert not np.array_equal(one[others], two[others])


def test_what_the_log_does_not_show_is_warned_of():
    log = uniform_log(np.repeat(np.arange(50), 4), np.tile([0, 1, 2, 3], 50), np.tile([0, 1, 0, 1], 50), 5)
    slates = SampledSlates(np.arange(50), np.tile([3, 4], (50, 1, 1)))
    with pytest.warns(SupportWarning) as warned:
        result = estimate_click_rate(log, slates, ("snips",))
    assert "50.0% of what the policy shows is on items that no row" in str(warned[0].message)
    assert result.unsupported == pytest.approx(0.5)
    # And of a mean weight that is not 1: of five items at 1 in 5 each, one that the policy shows never comes.
    assert any("and not 1" in str(warning.message) for warning in warned)
    assert result.mean_weight.estimate == pytest.approx(0.625)


def test_few_effective_rows_and_uneven_logs_are_warned_of():
    users, items = np.repeat(np.arange(10), 20), np.tile(np.repeat([0, 1], [2, 18]), 10)
    log = uniform_log(users, items, items == 0, 2)
    slates = SampledSlates(np.arange(10), np.zeros((10, 1, 1), np.int64))
    with pytest.warns(SupportWarning) as warned:
        estimate_click_rate(log, slates, ("ips",))
    texts = [str(warning.message) for warning in warned]
    assert any("effective sample size is 20 of 200" in text for text in texts)
    assert any("does not look as random as its propensities say" in text for text in texts)


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.filterwarnings("ignore:.*no row of the log shows")
def test_an_interval_stays_within_0_and_1_where_the_estimate_does_not():
    """One row matches, and counts for ten."""
    log = uniform_log([0, 1], [0, 1], [1, 0], 10)
    interval = estimate_click_rate(log, SampledSlates(np.arange(2), np.zeros((2, 1, 1), np.int64)), ("ips",))
    assert interval.estimates["ips"].estimate == pytest.approx(5.0)
    assert 0.0 <= interval.estimates["ips"].low <= interval.estimates["ips"].high <= 1.0


def test_errors_say_what_is_missing():
    log = uniform_log([0, 0, 1], [0, 1, 2], [1, 0, 1], 4)
    slates = SampledSlates(np.arange(2), np.full((2, 1, 1), 3))
    with pytest.raises(DataError, match="none of 3 random rows shows an item that the policy shows"):
        estimate_click_rate(log, slates, ("ips",))
    with pytest.raises(ValueError, match="estimators are rejection, ips, snips, dr; got dm"):
        estimate_click_rate(log, slates, ("dm",))
    with pytest.raises(ValueError, match="some have none"):
        estimate_click_rate(log, SampledSlates(np.arange(1), np.zeros((1, 1, 1), np.int64)), ("ips",))
    with pytest.raises(ValueError, match="needs a model of clicks"):
        estimate_click_rate(log, SlateMarginals.uniform(np.arange(2), 4), ("dr",))
    with pytest.raises(ValueError, match="sum to 1"):
        SlateMarginals(np.arange(1), np.asarray([[0.5, 0.6]]))
    with pytest.raises(ValueError, match="whose propensity is 0"):
        RandomLog(log.users, log.items, log.clicks, np.asarray([0.0, 0.5, 0.5, 0.0]))
    with pytest.raises(DataError, match="no row of these users"):
        uniform_log([], [], [], 4)


def test_in_a_replay_world_no_first_slate_is_the_policys_own():
    world = small_world()
    replayed = build_replay_world(world.data, candidates=np.arange(50), users=np.arange(40), min_candidates=4)
    env = KuaiFairVecEnv(replayed, SessionConfig(action_mode="slate", slate_size=4, repeats="forbid", max_len=1), 4, 0)
    with pytest.raises(DataError, match="candidates of their own"):
        first_slates(RandomSlates(), env, replayed.users)


# --- whole sessions -----------------------------------------------------------------------------------------


class Mixture(Control):
    """Each slate from one of several controls, drawn at random."""

    def __init__(self, *controls, seed=0):
        super().__init__()
        self._controls = controls
        self._rng = np.random.default_rng(seed)

    def bind(self, batch):
        super().bind(batch)
        for control in self._controls:
            control.bind(batch)

    def slates(self, states, batch):
        slates = np.stack([control.slates(states, batch) for control in self._controls])
        return slates[self._rng.integers(len(slates), size=len(states)), np.arange(len(states))]


def popular_and_tail():
    """A world whose users click on popular items in 8 cases of 10, on others in 2."""
    world = small_world()
    chances = np.where(world.groups.popular, 0.8, 0.2)
    world = small_world(np.tile(chances, (40, 1)))
    return world, RandomSlates(world.groups.popular), RandomSlates(~world.groups.popular)


def test_sessions_are_logged_whole_and_with_the_other_policys_slates():
    world, popular, tail = popular_and_tail()
    env = sessions(world, leave="never", max_len=5)
    log = log_sessions(popular, tail, env, episodes_per_user=3)
    assert len(log) == 40 * 3 * 5
    assert np.count_nonzero(log.first) == np.count_nonzero(log.last) == 120
    assert np.array_equal(log.features[:, 0], np.tile(np.arange(5), 120))
    share = 7
    assert (log.features[:, share] == 1.0).all() and (log.target_features[:, share] == 0.0).all()
    assert log.mean_return == pytest.approx(evaluate(popular, env, episodes_per_user=3).engagement.cumulative_reward)


def test_of_the_policy_that_played_fqe_is_what_was_logged():
    """Residuals of a regression with an intercept add up to 0, so that the values of first steps add up to rewards."""
    world, popular, tail = popular_and_tail()
    log = log_sessions(Mixture(popular, tail), popular, sessions(world), episodes_per_user=3)
    own = replace(log, target_features=log.features)
    assert fitted_q_evaluation(own, resamples=2).interval.estimate == pytest.approx(log.mean_return, rel=1e-3)


@pytest.mark.slow
def test_fqe_finds_what_the_other_policy_would_earn():
    """Nobody leaves, so that R_cum is known: five slates of .8. What was played earns half as much more as .2 does."""
    world, popular, tail = popular_and_tail()
    env = sessions(world, leave="never", max_len=5)
    log = log_sessions(Mixture(popular, tail), popular, env, episodes_per_user=20)
    result = fitted_q_evaluation(log, resamples=50)
    assert log.mean_return == pytest.approx(2.5, abs=0.1)
    assert result.interval.estimate == pytest.approx(4.0, abs=0.15)
    assert result.interval.low < 4.0 < result.interval.high
    assert result.outside < 0.05 and "fqe" in result.table()


def test_slates_that_were_never_shown_are_warned_of():
    world, popular, tail = popular_and_tail()
    log = log_sessions(popular, tail, sessions(world, leave="never", max_len=3))
    with pytest.warns(SupportWarning, match=r"100\.0% of the policy's slates are unlike"):
        assert fitted_q_evaluation(log, resamples=2).outside == 1.0
