"""HierarchicalPPO's policy: the slates that it shows, and what the manager's actions make of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_world
from hierarchical import (
    COMBINATIONS,
    IDS,
    PARITY,
    POPULAR,
    K,
    agent,
    batches,
    differing,
    observations,
    roll,
    sessions,
    shown,
    trained,
    weights,
)
from purifiers import WindowPurifier

from dsrm import VecDSRM
from dsrm.click_scorer import ClickScorer
from hrl_policies.hrl_ppo import QuotaSlateDistribution
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate


@pytest.mark.parametrize("mode", ["state", "history"])
def test_one_observation_is_a_batch_of_one(mode):
    model = agent({"weights": "quota"}, env=sessions(observation_mode=mode)).learn(64)
    seen = observations(observation_mode=mode)
    batch, _ = model.predict(seen, deterministic=True)
    for row in range(12):
        one = {name: part[row] for name, part in seen.items()} if mode == "history" else seen[row]
        slate, _ = model.predict(one, deterministic=True)
        np.testing.assert_array_equal(slate, batch[row])
    draws = [model.predict(seen)[0] for _ in range(5)]
    assert any((draw != batch).any() for draw in draws)


def test_purified_states_may_be_larger_than_the_embeddings():
    model = agent(env=VecDSRM(sessions(), WindowPurifier())).learn(64)
    assert (model.policy.state_size, model.policy.dimension) == (9, 8)
    result = evaluate(model, VecDSRM(sessions(16, seed=1), WindowPurifier()), PARITY.user_ids[:10])
    assert len(result.sessions) == 10


@pytest.mark.parametrize("deterministic", [True, False])
def test_slates_hold_exactly_the_manager_s_number_of_popular_items(deterministic):
    model = trained({"weights": "quota"}, learning_rate=1e-2)
    found = model.policy.act(observations(200), deterministic)
    popular = POPULAR[found.slates.numpy()].sum(axis=1)
    np.testing.assert_array_equal(popular, found.manager_actions[:, 0])
    assert deterministic or len(set(popular)) == K + 1
    roll(model)
    counts = model.rollout_buffer.manager_actions().numpy().reshape(8, 8)
    np.testing.assert_array_equal(POPULAR[shown(model)].sum(axis=2), counts)


def test_a_group_that_is_too_small_is_never_asked_for_more():
    """Three popular items: no slate of six holds four of them."""
    few = np.zeros(50, np.bool_)
    few[[3, 20, 41]] = True
    world = replace(PARITY, groups=replace(PARITY.groups, popular=few))
    model = trained({"weights": "quota"}, env=sessions(world=world))
    found = model.policy.act(sessions(300, seed=4, world=world).reset())
    popular = few[found.slates.numpy()].sum(axis=1)
    assert set(popular) == {0, 1, 2, 3}
    np.testing.assert_array_equal(popular, found.manager_actions[:, 0])


@pytest.mark.parametrize("hierarchy", COMBINATIONS, ids=IDS)
def test_items_never_come_again_where_that_is_forbidden(hierarchy):
    """Eight slates of six of fifty items: each group runs out before the session ends."""
    model = agent(hierarchy, env=sessions(repeats="forbid", leave="never", max_len=8), n_steps=16)
    roll(model)
    for batch in batches(model, 100):
        logs, _, _, _ = model.policy.evaluate_worker(batch.actions)
        np.testing.assert_allclose((logs - batch.actions.worker_log_probs).detach().exp(), 1, atol=1e-5)
    result = evaluate(model, sessions(10, repeats="forbid", leave="never", max_len=8), episodes_per_user=1)
    assert (result.sessions.length == 8).all()


def test_action_masks_that_do_not_fit_are_refused():
    env = sessions(3, repeats="forbid", max_len=8)
    model = agent({}, env=env, n_steps=16)
    seen = env.reset()
    only = np.zeros((3, 50), np.bool_)
    only[:, :K] = True
    for masks in (only, np.tile(only, (1, K))):
        slates, _ = model.predict(seen, deterministic=True, action_masks=masks)
        assert (np.sort(slates) == np.arange(K)).all()
    with pytest.raises(ValueError, match=f"fewer than {K} items are allowed"):
        model.predict(seen, action_masks=np.zeros((3, 50), np.bool_))
    with pytest.raises(ValueError, match="action masks hold 50 items"):
        model.predict(seen, action_masks=np.ones((3, 60), np.bool_))


def test_a_constant_manager_never_changes():
    model = agent({"manager": "constant", "constant": 0.8})
    before = weights(model, "manager")
    model.learn(256)
    assert not differing(before, weights(model, "manager"))
    assert not model.policy.manager_optimizer.state_dict()["state"]
    assert (model.rollout_buffer.manager_actions() == torch.tensor(0.8)).all()
    assert (model.policy.act(observations(), True).manager_actions == torch.tensor(0.8)).all()


@pytest.mark.parametrize("form", ["simplex", "paper"])
def test_a_flat_agent_weighs_the_same_for_everybody(form):
    """What two items differ by in popularity costs the same in every state, and the price is learned."""
    model = agent({"manager": "flat", "weights": form}, learning_rate=1e-2)
    policy = model.policy

    def prices():
        zero = torch.zeros(5, 2)
        popularity = torch.tensor([[0.0, 1.0]]).expand(5, -1)
        anything = torch.randn(5, policy.hierarchy.action_size)
        logits = policy.worker.logits(zero, anything, popularity, popularity > 0)
        return ((logits[:, 0] - logits[:, 1]) * policy.worker.temperature).detach()

    start = prices()
    # Two items of unequal popularity lie 1 apart in it, and sqrt(2) standard deviations.
    expected = 0.5 if form == "simplex" else 0.45 * np.sqrt(2)
    np.testing.assert_allclose(start, expected, rtol=1e-5)
    before = weights(model, "manager")
    model.learn(256)
    assert (prices() == prices()[0]).all()
    assert (policy.worker.global_action.detach() != 0).all()
    assert not differing(before, weights(model, "manager"))
    assert policy.worker.global_action.numel() == policy.hierarchy.action_size


@pytest.mark.parametrize("manager", ["constant", "learned"])
def test_an_untrained_agent_ranks_by_equation_6(manager):
    """``Psi = w_acc z(cos(s, e)) - w_fair z(log pop)`` over the catalogue, by numpy in float64."""
    model = agent({"manager": manager, "constant": -0.4, "candidates": 0})
    seen = observations(30)
    found = model.policy.act(seen, deterministic=True)
    x = found.manager_actions[:, 0].detach().numpy().astype(np.float64)
    if manager == "constant":
        np.testing.assert_allclose(x, -0.4, rtol=1e-6)
    states = seen["state"].astype(np.float64)
    vectors = PARITY.embeddings.astype(np.float64)
    cosine = (states @ vectors.T) / np.linalg.norm(states, axis=1)[:, None] / np.linalg.norm(vectors, axis=1)
    similarity = (cosine - cosine.mean(axis=1, keepdims=True)) / cosine.std(axis=1, ddof=1, keepdims=True)
    logs = np.log1p(PARITY.data.train.exposures(50))
    popularity = (logs - logs.mean()) / logs.std()
    fairness = 1 / (1 + np.exp(-x))[:, None]
    psi = (1 - fairness) * similarity - fairness * popularity
    np.testing.assert_array_equal(found.slates, np.argsort(-psi, axis=1)[:, :K])
    # The first slot's probability is the softmax at the starting temperature.
    chances = np.exp(psi / 0.1 - (psi / 0.1).max(axis=1, keepdims=True))
    first = np.take_along_axis(chances, found.slates[:, :1].numpy(), axis=1)[:, 0] / chances.sum(axis=1)
    np.testing.assert_allclose(found.worker_log_probs[:, 0].detach(), np.log(first), atol=1e-3)


def test_an_untrained_agent_with_a_scorer_ranks_groups_as_the_scorer_does():
    """With a quota the price of popularity is the same within a group: only the scorer's order is left."""
    world = small_world()
    scorer = ClickScorer.fit(world)
    model = agent(
        {"manager": "constant", "weights": "quota", "constant": 3.0},
        env=sessions(world=world),
        click_scorer=scorer,
    )
    seen = observations(30, world=world)
    slates, _ = model.predict(seen, deterministic=True)
    popular = world.groups.popular
    for slate, scores in zip(slates, scorer.score(seen["state"]), strict=True):
        order = np.argsort(-scores)
        assert slate.tolist() == [*order[popular[order]][:3], *order[~popular[order]][:3]]


def test_an_action_holds_for_its_interval_within_a_session():
    model = trained({"interval": 4}, n_steps=30)
    rollout = roll(model)
    actions = rollout.manager_actions().numpy().reshape(30, 8)
    left = np.zeros(8, int)
    for step in range(30):
        np.testing.assert_array_equal(rollout.decided[step], left == 0)
        if step:
            held = ~rollout.decided[step]
            np.testing.assert_array_equal(actions[step][held], actions[step - 1][held])
            assert (actions[step][~held] != actions[step - 1][~held]).all()
        left = np.where(left == 0, 4, left) - 1
        left[rollout.dones[step]] = 0
    assert rollout.dones[:-1].any()


def test_predictions_carry_the_manager_s_action_and_renew_it_in_new_sessions():
    model = trained({"interval": 4})
    seen, state = observations(3), None
    starts = np.ones(3, np.bool_)
    held = []
    for step in range(8):
        if step == 2:
            starts = np.array([False, True, False])
        slates, state = model.predict(seen, state, starts, deterministic=False)
        assert slates.shape == (3, K)
        held.append(state[0][:, 0])
        starts = np.zeros(3, np.bool_)
    held = np.stack(held)
    renewed = np.ones((8, 3), np.bool_)
    renewed[1:] = held[1:] != held[:-1]
    expected = np.zeros((8, 3), np.bool_)
    expected[[0, 4]] = True
    expected[:, 1] = np.isin(np.arange(8), [0, 2, 6])
    np.testing.assert_array_equal(renewed, expected)


def test_evaluation_does_not_depend_on_the_batch_where_actions_hold():
    model = trained({"interval": 4, "weights": "quota"}, steps=256, manager_learning_rate=0.05)
    results = [evaluate(model, sessions(n), PARITY.user_ids[:12]) for n in (3, 40)]
    np.testing.assert_array_equal(results[0].sessions.return_, results[1].sessions.return_)


def test_slates_stay_on_the_device_of_their_scores():
    """Torch's meta device refuses to mix with the CPU, as a GPU does."""
    scores = torch.randn(4, 20, device="meta")
    popular = torch.zeros(4, 20, dtype=torch.bool, device="meta")
    distribution = QuotaSlateDistribution(scores, popular, torch.zeros(4, dtype=torch.int64, device="meta"), 5)
    slates = distribution.sample()
    assert slates.device == distribution.slot_log_probs(slates).device == distribution.entropy().device == scores.device


def test_both_levels_read_the_session_clock_and_items_are_compared_without_it():
    model = agent({"manager": "learned", "weights": "quota", "memory": True}, env=sessions(session_clock=True)).learn(
        64
    )
    env = KuaiFairEnv(
        PARITY, SessionConfig(action_mode="slate", slate_size=K, observation_mode="history", session_clock=True)
    )
    assert len(evaluate(model, env, users=PARITY.user_ids[:5]).sessions) == 5
    early = {name: part[None] for name, part in env.reset(seed=1)[0].items()}
    late = {**early, "state": early["state"] + np.eye(early["state"].shape[1], dtype=np.float32)[-1]}
    now, later = (model.policy.act(observation, deterministic=True) for observation in (early, late))
    assert not torch.equal(now.values, later.values)
    assert torch.equal(now.scale, later.scale)
