"""Agents learn in the training world and are evaluated on logged answers, each user among the own candidates."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from helpers import TableResponse
from logged_worlds import logged_data
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C

from hrl_policies.controls import Oracle
from hrl_policies.study import check_study, plan_run, run_study, runner, train
from hrl_policies.study.spec import StudyError, parse_study, planned_runs
from hrl_policies.worlds import WorldPair
from hrl_policies.zoo import controls
from kuaifair_env import SessionConfig, build_world, evaluate
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.fair_counts import fair_counts
from kuaifair_env.replay import build_replay_world
from kuaifair_env.sb3 import KuaiFairVecEnv

N_USERS, N_ITEMS, TESTED = 60, 40, 24
SESSIONS = {"slate_size": 5, "max_len": 4, "leave": "never", "repeats": "forbid"}


@pytest.fixture(scope="module")
def pair():
    """Users like the items of one half or of the other; the first 24 were shown 8 to 31 items at random."""
    rng = np.random.default_rng(0)
    table = np.where((np.arange(N_USERS)[:, None] + np.arange(N_ITEMS)) % 2, 0.8, 0.1)
    shown = [rng.choice(N_ITEMS, 8 + user, replace=False) for user in range(TESTED)]
    users = np.repeat(np.arange(TESTED), [len(items) for items in shown])
    items = np.concatenate(shown)
    log = InteractionLog.sorted(users, items, rng.random(len(users)) < table[users, items])
    data = replace(logged_data(table, n_tags=3), test=log)
    embeddings = item_embeddings(data.train, N_USERS, data.items, 8)
    everything = {"candidates": np.arange(N_ITEMS), "embeddings": embeddings}
    training = np.arange(TESTED, N_USERS)
    return WorldPair(
        "replay",
        build_world(data, "train", TableResponse(table), users=training, **everything),
        build_replay_world(data, users=np.arange(TESTED), **everything),
    )


def logged_clicks(pair):
    """The clicks among each user's random exposures, and how many of them sessions of four slates of five can show."""
    log = pair.test.data.test
    clicks, shown = (np.bincount(log.users, weights, TESTED) for weights in (log.clicks, None))
    return clicks, 5 * np.minimum(shown // 5, 4)


def check_sessions(pair, result):
    _, shown = logged_clicks(pair)
    order = np.argsort(result.sessions.user_ids)
    assert len(result.sessions) == TESTED
    np.testing.assert_array_equal(5 * result.sessions.length[order], shown)
    return 5 * result.sessions.return_[order]


def trained_and_evaluated(algorithm, pair, steps=64, **settings):
    config = SessionConfig(**SESSIONS, **settings)
    agent = algorithm("MlpPolicy", KuaiFairVecEnv(pair.train, config, 4, seed=0), n_steps=8, seed=0, device="cpu")
    agent.learn(steps)
    return evaluate(agent, KuaiFairVecEnv(pair.test, config, 8, seed=0), ranking=True)


def test_a2c_with_queries_moves_to_the_replay(pair):
    check_sessions(pair, trained_and_evaluated(A2C, pair))


def test_maskable_ppo_gets_a_mask_for_each_slot_and_slates_are_filled_within_it(pair):
    settings = {"action_mode": "slate", "duplicates": "replace"}
    check_sessions(pair, trained_and_evaluated(MaskablePPO, pair, **settings))
    env = KuaiFairVecEnv(pair.test, SessionConfig(**SESSIONS, **settings), 2, seed=0)
    env.reset()
    masks = np.stack(env.env_method("action_masks"))
    np.testing.assert_array_equal(masks, np.tile(env.batch.action_masks(), 5))


def test_without_replacement_slates_of_maskable_ppo_are_refused_with_the_reason(pair):
    with pytest.raises(ValueError, match="holds an item twice; duplicates='replace' fills it up"):
        trained_and_evaluated(MaskablePPO, pair, action_mode="slate")


def test_maskable_ppo_shows_single_items(pair):
    config = SessionConfig(**{**SESSIONS, "slate_size": 1, "max_len": 30}, action_mode="item")
    agent = MaskablePPO("MlpPolicy", KuaiFairVecEnv(pair.train, config, 4, seed=0), n_steps=8, seed=0, device="cpu")
    agent.learn(32)
    result = evaluate(agent, KuaiFairVecEnv(pair.test, config, 8, seed=0))
    order = np.argsort(result.sessions.user_ids)
    np.testing.assert_array_equal(result.sessions.length[order], np.minimum(8 + np.arange(TESTED), 30))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [("a2c", {"n_steps": 8}), ("sac4ir", {"learning_starts": 8}), ("dnair", {"learning_starts": 8})],
)
def test_methods_of_the_zoo_move_to_the_replay(pair, name, overrides):
    run = plan_run(
        name, "replay", session=SessionConfig(**SESSIONS), total_steps=64, n_envs=4, overrides=overrides, seed=1
    )
    check_sessions(pair, train(run, pair).evaluation)


def test_methods_that_do_not_look_at_masks_say_so(pair):
    with pytest.raises(ValueError, match="bcq-discrete needs repeats='allow'"):
        plan_run("bcq-discrete", "replay", session=SessionConfig(**SESSIONS))


@pytest.mark.parametrize("leave", ["never", "temper"])
def test_every_control_of_the_zoo_plays_the_replay_and_the_oracle_is_the_best_of_them(pair, leave):
    session = SessionConfig(**{**SESSIONS, "leave": leave})
    results = {name: train(plan_run(name, "replay", session=session), pair).evaluation for name in controls()}
    if leave == "temper":
        assert results["oracle"].fairness.violation_rate < results["random"].fairness.violation_rate
        return
    clicks, shown = logged_clicks(pair)
    best = np.minimum(clicks, shown)
    gained = {name: check_sessions(pair, result) for name, result in results.items()}
    np.testing.assert_allclose(gained["oracle"], best, rtol=1e-9)
    for name, clicks_of_users in gained.items():
        assert (clicks_of_users <= best + 1e-9).all(), name
    assert gained["greedy-ctr"].mean() > gained["random"].mean()


def test_each_slate_of_the_oracle_is_the_best_fair_one_that_is_left(pair):
    env = KuaiFairVecEnv(pair.test, SessionConfig(**{**SESSIONS, "leave": "temper"}, action_mode="slate"), 8, seed=0)
    fair, popular, oracle = fair_counts("temper", 5), pair.test.groups.popular, Oracle()
    states = env.reset()
    oracle.bind(env.batch)
    for _ in range(6):
        truth, masks = env.batch.simulator.expected_catalogue(), env.batch.action_masks()
        slates, _ = oracle.predict(states)
        for gains, mask, slate in zip(truth, masks, slates, strict=True):
            # Of the items of a group only the five that are liked best matter.
            own = [np.flatnonzero(mask & group) for group in (popular, ~popular)]
            items = [int(item) for of_group in own for item in of_group[np.argsort(-gains[of_group])][:5]]
            totals = [
                (fair[popular[list(chosen)].sum()], gains[list(chosen)].sum()) for chosen in combinations(items, 5)
            ]
            assert (fair[popular[slate].sum()], gains[slate].sum()) == max(totals)
        states, *_ = env.step(slates)


def test_studies_run_in_replays_and_say_what_does_not_fit(pair, tmp_path):
    content = {
        "name": "replay",
        "worlds": ["replay"],
        "methods": ["random", "oracle"],
        "max_lens": [4],
        "session": {"slate_size": 5, "leave": "never", "repeats": "forbid"},
    }
    spec, problems = parse_study(content)
    runs = check_study(spec, problems, worlds={"replay": pair})
    records = run_study(runs, tmp_path / "store", {"replay": pair}).records
    assert {record.response for record in records} == {"logged"}
    spec, problems = parse_study({**content, "session": {"repeats": "allow"}})
    with pytest.raises(StudyError, match=r"users of replay answer what was logged, .* it needs 'repeats: forbid'"):
        check_study(spec, problems, worlds={"replay": pair})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"repeats": "allow"}, "repeats='forbid'"), ({"slate_size": 9}, "slates of 9"), ({"drift": 15}, "tastes")],
)
def test_sessions_that_the_replay_refuses_are_refused_before_any_training(pair, monkeypatch, settings, message):
    monkeypatch.setattr(runner, "build_policy", lambda *arguments: pytest.fail("it trains"))
    config = plan_run("a2c", "replay", seed=1, session=SessionConfig(**SESSIONS | settings), total_steps=64)
    with pytest.raises(ValueError, match=message):
        train(config, pair)


def test_ids_with_a_replay_have_their_own_slates():
    env_id = "KuaiFair-KuaiRandReplay-v0"
    content = {"name": "replay", "worlds": [env_id, "KuaiFair-Toy-v0"], "methods": ["random"], "max_lens": [4]}
    spec, problems = parse_study(content)
    assert not problems
    sessions = {run.world: run.session for run in planned_runs(spec)}
    assert (sessions[env_id].slate_size, sessions[env_id].repeats) == (5, "forbid")
    assert (sessions["KuaiFair-Toy-v0"].slate_size, sessions["KuaiFair-Toy-v0"].repeats) == (10, "allow")
