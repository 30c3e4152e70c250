"""HierarchicalPPO kept in files: what is loaded is what was saved, and training goes on from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hierarchical import (
    PARITY,
    POPULAR,
    Listener,
    agent,
    batches,
    differing,
    observations,
    roll,
    sessions,
    trained,
    weights,
)

from dsrm.click_scorer import ClickScorer
from hrl_policies.hrl_ppo import HierarchicalPolicy, HierarchicalPPO
from hrl_policies.hrl_ppo.rewards import MANAGER


def same_optimiser(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys() and len(one["state"])
    for key, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name]), (key, name)


def test_a_loaded_agent_is_the_saved_one_bit_by_bit(tmp_path):
    model = trained({"memory": True, "weights": "quota"}, constraint="lagrange")
    assert float(model.multiplier) not in (0.0, model.start_multiplier)
    model.save(tmp_path / "model.zip")
    seen = observations()
    expected, _ = model.predict(seen, deterministic=True)
    for env in (None, sessions()):
        loaded = HierarchicalPPO.load(tmp_path / "model.zip", env=env, device="cpu")
        assert not differing(weights(model), weights(loaded))
        assert torch.equal(model.multiplier, loaded.multiplier)
        np.testing.assert_array_equal(loaded.predict(seen, deterministic=True)[0], expected)
        same_optimiser(model.policy.worker_optimizer, loaded.policy.worker_optimizer)
        same_optimiser(model.policy.manager_optimizer, loaded.policy.manager_optimizer)
        assert loaded.num_timesteps == 128 and loaded._n_updates == model._n_updates
        torch.manual_seed(3)
        drawn, _ = loaded.predict(seen)
        torch.manual_seed(3)
        np.testing.assert_array_equal(model.predict(seen)[0], drawn)


def test_what_a_scorer_knows_is_saved_with_the_agent(tmp_path):
    """The item table comes with the file, not from the environment it is loaded with."""
    scorer = ClickScorer.fit(PARITY)
    model = agent(click_scorer=scorer)
    np.testing.assert_allclose(model.policy.table.prior[model.policy.table.place], scorer.item_scores, rtol=1e-6)
    model.save(tmp_path / "model.zip")
    loaded = HierarchicalPPO.load(tmp_path / "model.zip", env=sessions())
    assert not differing(weights(model, "table"), weights(loaded, "table"))


def test_a_policy_alone_can_be_saved_and_loaded(tmp_path):
    model = trained({"weights": "paper", "interval": 4, "width": 16})
    model.policy.save(tmp_path / "policy.pt")
    loaded = HierarchicalPolicy.load(tmp_path / "policy.pt", device="cpu")
    assert not differing(weights(model), dict(loaded.state_dict()))
    assert loaded.hierarchy == model.policy.hierarchy
    seen = observations()
    np.testing.assert_array_equal(
        loaded.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
    )


def test_a_resumed_agent_learns_from_a_rollout_what_the_saved_one_would(tmp_path):
    """Optimisers and multiplier go on: the same minibatches leave the same weights."""
    model = trained(constraint="lagrange")
    model.save(tmp_path / "model.zip")
    loaded = HierarchicalPPO.load(tmp_path / "model.zip", env=sessions(), device="cpu")
    roll(model)
    for one in batches(model, 16):
        for each in (model, loaded):
            each._update_worker(one, {})
            each._update_manager(one, {})
    assert not differing(weights(model), weights(loaded))
    fresh = agent(constraint="lagrange")
    fresh.policy.load_state_dict(HierarchicalPPO.load(tmp_path / "model.zip").policy.state_dict())
    for one in batches(model, 16):
        fresh._update_worker(one, {})
    assert differing(weights(model, "worker"), weights(fresh, "worker")), "optimisers that start anew do not"


@pytest.mark.slow
def test_training_resumed_twice_goes_the_same_way(tmp_path):
    trained().save(tmp_path / "model.zip")
    ends = []
    for _ in range(2):
        loaded = HierarchicalPPO.load(tmp_path / "model.zip", env=sessions(), device="cpu")
        loaded.learn(128, reset_num_timesteps=False)
        assert loaded.num_timesteps == 256
        ends.append(weights(loaded))
    assert not differing(*ends)


def test_a_loaded_agent_goes_on_with_other_users_than_the_first(tmp_path):
    def users_met(model, **settings):
        met = []
        model.learn(64, lambda local, _: met.append(model.env.unwrapped.batch.user_ids.copy()), **settings)
        return np.stack(met)

    model = agent()
    first = users_met(model)
    model.save(tmp_path / "model.zip")
    resumed = [
        users_met(
            HierarchicalPPO.load(tmp_path / "model.zip", env=sessions(), device="cpu"),
            reset_num_timesteps=False,
        )
        for _ in range(2)
    ]
    assert (resumed[0][0] != first[0]).any()
    np.testing.assert_array_equal(*resumed)
    afresh = HierarchicalPPO.load(tmp_path / "model.zip", env=sessions(), device="cpu")
    np.testing.assert_array_equal(users_met(afresh)[0], first[0])


def test_running_sessions_keep_their_popular_share_from_rollout_to_rollout():
    """``ema_group`` over two rollouts of one learn() is what it is over one rollout as long as both."""
    model = agent(fair="ema_group", fair_coef=1.0, n_steps=4)
    listener = Listener()
    rewards = [roll(model, listener).rewards.copy() for _ in range(2)]
    share, decay = np.full(8, 0.5), 0.5**0.2
    for step in range(8):
        played = listener.steps[step]
        share = decay * share + (1 - decay) * POPULAR[played["slates"]].mean(axis=1)
        expected = played["reward"] - np.abs(2 * share - 1)
        np.testing.assert_allclose(rewards[step // 4][step % 4][:, MANAGER], expected, atol=1e-5)
        share[["episode" in info for info in played["infos"]]] = 0.5


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    same = [weights(trained({"memory": True}, seed=seed, env=sessions(seed=seed))) for seed in (1, 1, 2)]
    assert not differing(same[0], same[1])
    assert differing(same[0], same[2])


def test_set_parameters_takes_over_both_levels():
    model, other = trained(seed=1), agent(seed=2)
    other.set_parameters(model.get_parameters())
    assert not differing(weights(model), weights(other))
    same_optimiser(model.policy.manager_optimizer, other.policy.manager_optimizer)
