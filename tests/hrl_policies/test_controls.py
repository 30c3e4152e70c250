"""Controls do exactly what their names say, in worlds where the right answer is known."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from helpers import small_world

from hrl_policies.common.click_scorer import ClickScorer
from hrl_policies.controls import (
    GreedyCTR,
    Oracle,
    QualityOracle,
    QuotaGreedy,
    RandomSlates,
    fair_counts,
    item_quality,
)
from kuaifair_env import KuaiFairEnv, SessionConfig, evaluate
from kuaifair_env.abandonment import TemperFairness
from kuaifair_env.batch import SessionBatch
from kuaifair_env.sb3 import KuaiFairVecEnv


def run(policy, world, **settings):
    batch_size = settings.pop("batch_size", 40)
    episodes = settings.pop("episodes", 20)
    config = SessionConfig(action_mode="slate", **settings)
    return evaluate(policy, KuaiFairVecEnv(world, config, batch_size, seed=0), episodes_per_user=episodes)


@pytest.fixture(scope="module")
def world():
    return small_world(np.random.default_rng(1).beta(1.5, 2.5, (40, 50)))


@pytest.fixture(scope="module")
def scorer(world):
    return ClickScorer.fit(world)


def every_control(world, scorer):
    popular = world.groups.popular
    return {
        "random": RandomSlates(),
        "pop": RandomSlates(popular),
        "tail": RandomSlates(~popular),
        "greedy": GreedyCTR(scorer),
        "quota": QuotaGreedy(scorer),
        "quality": QualityOracle(world),
        "oracle": Oracle(),
    }


def test_popular_shares(world, scorer):
    share = {
        name: run(policy, world).fairness.signed_gap / 2 + 0.5
        for name, policy in every_control(world, scorer).items()
    }
    assert share["pop"] == 1.0
    assert share["tail"] == 0.0
    assert share["quota"] == 0.5
    assert share["random"] == pytest.approx(0.2, abs=0.01)
    for name in ("quality", "oracle"):
        assert 0.4 <= share[name] <= 0.6


def test_who_breaks_the_bound(world, scorer):
    rate = {
        name: run(policy, world).fairness.violation_rate
        for name, policy in every_control(world, scorer).items()
    }
    assert rate["pop"] == rate["tail"] == 1.0
    assert rate["quota"] == rate["quality"] == rate["oracle"] == 0.0
    # 10 of 50 items without replacement, 10 of them popular: within the bound are 4, 5 and 6.
    from scipy.stats import hypergeom

    assert rate["random"] == pytest.approx(1 - hypergeom(50, 10, 10).pmf([4, 5, 6]).sum(), abs=0.01)


@pytest.mark.parametrize("name", ["random", "pop", "quota"])
@pytest.mark.parametrize("max_len", [20, 30, 50])
def test_length_formula_within_two_percent(world, scorer, name, max_len):
    result = run(every_control(world, scorer)[name], world, max_len=max_len)
    assert result.engagement.length == pytest.approx(result.predicted_length, rel=0.02)


def test_random_slates_are_uniform_over_items_and_distinct(world):
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate", slate_size=7), 400, seed=0)
    env.reset()
    policy = RandomSlates(seed=5)
    policy.bind(env.batch)
    slates = np.concatenate([policy.predict(np.zeros((400, 8)))[0] for _ in range(50)])
    assert (np.diff(np.sort(slates, axis=1), axis=1) > 0).all()
    counts = np.bincount(slates.ravel(), minlength=50)
    expected = slates.size / 50
    # Each count is binomial-like with variance below expected * (1 - 7/50): five standard deviations.
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert not np.array_equal(slates[:400], slates[400:800]), (
        "sessions without numbers draw anew at each call"
    )


@pytest.mark.parametrize("name", ["random", "pop", "tail", "greedy", "quota", "quality", "oracle"])
def test_results_do_not_depend_on_the_batch_size(world, scorer, name):
    policies = [every_control(world, scorer)[name] for _ in range(2)]
    one, many = (
        run(policy, world, batch_size=b, episodes=2) for policy, b in zip(policies, (7, 64), strict=True)
    )
    for column, values in one.sessions.columns().items():
        np.testing.assert_array_equal(values, many.sessions.columns()[column], err_msg=column)


def test_seeds_of_random_slates_matter_and_repeat(world):
    first, again, other = (run(RandomSlates(seed=seed), world, episodes=2).sessions for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.return_, again.return_)
    assert (first.return_ != other.return_).any()


def test_greedy_shows_the_best_scores(world, scorer):
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"), 16, seed=0)
    states = env.reset()
    policy = GreedyCTR(scorer)
    policy.bind(env.batch)
    slates, _ = policy.predict(states)
    scores = scorer.score(states)
    np.testing.assert_allclose(
        np.take_along_axis(scores, slates, 1), np.sort(scores, axis=1)[:, ::-1][:, :10]
    )


def test_quota_is_the_best_half_and_half_slate(world, scorer):
    env = KuaiFairVecEnv(world, SessionConfig(action_mode="slate"), 16, seed=0)
    states = env.reset()
    policy = QuotaGreedy(scorer)
    policy.bind(env.batch)
    slates, _ = policy.predict(states)
    scores, popular = scorer.score(states), world.groups.popular
    for row in range(16):
        wanted = np.concatenate([np.sort(scores[row, group])[::-1][:5] for group in (popular, ~popular)])
        np.testing.assert_allclose(np.sort(scores[row, slates[row]]), np.sort(wanted))


@pytest.mark.parametrize("slate_size", [4, 5, 6, 7, 10, 20])
def test_quota_never_breaks_the_bound_at_any_slate_size(world, scorer, slate_size):
    assert run(QuotaGreedy(scorer), world, slate_size=slate_size, episodes=2).fairness.violation_rate == 0.0


def test_quota_and_oracle_keep_a_window_of_single_items_fair(world, scorer):
    for policy in (QuotaGreedy(scorer), Oracle()):
        result = run(policy, world, slate_size=1, leave=TemperFairness(), episodes=2)
        assert result.fairness.violation_rate == 0.0
        assert result.engagement.length > 10


def expected_reward(world, policy, config):
    """True expected feedback on the first slate of every user, one row per user."""
    env = KuaiFairVecEnv(world, config, 40, seed=0)
    states = env.reset()
    if hasattr(policy, "bind"):
        policy.bind(env.batch)
    slates, _ = policy.predict(states)
    users = env.batch.simulator.users
    return users, np.take_along_axis(world.response.table[users], slates, axis=1).mean(axis=1)


def test_oracles_take_the_best_slate_that_trying_all_finds():
    world = small_world(np.random.default_rng(4).random((40, 10)), n_items=10, dimension=1)
    config = SessionConfig(action_mode="slate", slate_size=4, max_len=20)
    fair, popular, table = fair_counts("temper", 4), world.groups.popular, world.response.table
    slates = [list(s) for s in combinations(range(10), 4) if fair[popular[list(s)].sum()]]
    users, personal = expected_reward(world, Oracle(), config)
    best = np.asarray([max(table[user, slate].mean() for slate in slates) for user in users])
    np.testing.assert_allclose(personal, best, rtol=1e-5)
    quality = table[world.users].mean(axis=0)
    best_for_all = max(slates, key=lambda slate: quality[slate].sum())
    users, impersonal = expected_reward(world, QualityOracle(world), config)
    np.testing.assert_allclose(impersonal, table[users][:, best_for_all].mean(axis=1), rtol=1e-5)


def test_more_knowledge_never_hurts(world, scorer):
    config = SessionConfig(action_mode="slate")
    reward = {
        name: expected_reward(world, policy, config)[1]
        for name, policy in every_control(world, scorer).items()
    }
    assert (reward["oracle"] >= reward["quality"] - 1e-6).all()
    assert (reward["oracle"] >= reward["quota"] - 1e-6).all()
    assert reward["quality"].mean() > reward["quota"].mean()
    assert reward["oracle"].mean() > reward["quality"].mean() + 0.1


def test_without_taste_the_oracle_gains_nothing_over_item_quality():
    quality = np.random.default_rng(0).permutation(np.linspace(0.05, 0.9, 50))
    world = small_world(np.tile(quality, (40, 1)))
    config = SessionConfig(action_mode="slate")
    one, other = (expected_reward(world, policy, config)[1] for policy in (Oracle(), QualityOracle(world)))
    np.testing.assert_allclose(one, other, rtol=1e-6)
    np.testing.assert_allclose(item_quality(world), quality, rtol=1e-5)


@pytest.mark.parametrize("name", ["random", "pop", "tail", "greedy", "quota", "quality", "oracle"])
def test_items_are_shown_once_where_repeats_are_forbidden(name):
    world = small_world(np.random.default_rng(1).random((40, 150)), n_items=150, dimension=8)
    policy = every_control(world, ClickScorer.fit(world))[name]
    config = SessionConfig(action_mode="slate", repeats="forbid", slate_size=5, max_len=20)
    env = KuaiFairVecEnv(world, config, 16, seed=0)
    # The environment refuses repeated items, so complete sessions are the proof.
    assert len(evaluate(policy, env).sessions) == 40


@pytest.mark.parametrize("mode", ["state", "history"])
def test_controls_run_in_single_environments_and_with_every_observation(world, scorer, mode):
    env = KuaiFairEnv(world, SessionConfig(action_mode="slate", observation_mode=mode))
    policy = QuotaGreedy(scorer)
    assert len(evaluate(policy, env, users=world.user_ids[:5]).sessions) == 5
    observation, _ = env.reset(seed=1)
    policy.bind(env.batch)
    slate, _ = policy.predict(observation)
    assert slate.shape == (10,)
    assert env.step(slate)[4]["popular_share"] == 0.5


def test_only_oracles_are_privileged(world, scorer):
    privileged = {name for name, policy in every_control(world, scorer).items() if policy.privileged}
    assert privileged == {"quality", "oracle"}


def test_misuse_is_explained(world, scorer):
    with pytest.raises(ValueError, match="bind"):
        RandomSlates().predict(np.zeros((2, 8)))
    with pytest.raises(ValueError, match="action_mode='slate'"):
        Oracle().bind(SessionBatch(world, SessionConfig(), 2))
    batch = SessionBatch(world, SessionConfig(action_mode="slate"), 2)
    policy = Oracle()
    policy.bind(batch)
    with pytest.raises(ValueError, match="bound to 2 sessions"):
        policy.predict(np.zeros((3, 8)))
    other = ClickScorer.fit(replace(small_world(candidates=30)))
    with pytest.raises(ValueError, match="30 candidates"):
        GreedyCTR(other).bind(batch)
