"""Actors and critics of directions: what they are by hand, and that plain TD3 and DDPG learn with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_worlds import ENDS, front_pair
from stable_baselines3 import DDPG, TD3
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.utils import set_random_seed

from hrl_policies.unit_norm import QueryNoise, UnitNormPolicy, begins_with_query, directions
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate
from kuaifair_env.observations import StateSpace
from kuaifair_env.sb3 import KuaiFairVecEnv

D = 64
NEVER = SessionConfig(slate_size=6, leave="never", max_len=10)


def policy() -> UnitNormPolicy:
    torch.manual_seed(0)
    return UnitNormPolicy(spaces.Box(-5, 5, (10,)), spaces.Box(-1, 1, (D,)), lambda _: 1e-3, net_arch=[32])


def test_actions_have_length_one_and_their_gradient_does_not_vanish():
    made, states = policy(), torch.randn(20, 10)
    for scale in (1.0, 100.0):
        with torch.no_grad():
            made.actor.mu[-1].weight.mul_(scale)
        actions = made.actor(states)
        torch.testing.assert_close(actions.norm(dim=1), torch.ones(20))
        # A tanh of outputs a hundred times as large has hardly a gradient left; a direction has that of its angle.
        (gradient,) = torch.autograd.grad(actions[:, 0].sum(), made.actor.mu[-1].weight)
        assert scale * gradient.norm() > 0.5


def test_critics_see_directions_with_components_of_order_one():
    made, states, actions = policy(), torch.randn(20, 10), 0.1 * torch.randn(20, D)
    assert float(directions(actions).square().mean()) == pytest.approx(1.0)
    plain = ContinuousCritic(**made._update_features_extractor(made.critic_kwargs, None))
    plain.load_state_dict(made.critic.state_dict())
    scaled = D**0.5 * actions / actions.norm(dim=1, keepdim=True)
    for value, expected in zip(made.critic(states, actions), plain(states, scaled), strict=True):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(made.critic.q1_forward(states, 3.0 * actions), plain.q1_forward(states, scaled))


def query_policy(clock: int = 0) -> UnitNormPolicy:
    torch.manual_seed(0)
    space = StateSpace(-8.0, 8.0, (D + clock,))
    return UnitNormPolicy(space, spaces.Box(-1, 1, (D,)), lambda _: 1e-3, net_arch=[32])


@pytest.mark.parametrize("clock", [0, 1])
def test_where_the_state_is_a_query_the_actor_begins_at_it(clock):
    made, states = query_policy(clock), 3.0 * torch.randn(20, D + clock)
    actions = made.actor(states).detach()
    torch.testing.assert_close(actions.norm(dim=1), torch.ones(20))
    assert float(torch.cosine_similarity(actions, states[:, :D]).min()) > 0.9
    # Nobody has clicked yet: there is no direction to begin at, and still a query.
    torch.testing.assert_close(made.actor(torch.zeros(1, D + clock)).norm(), torch.tensor(1.0))


def test_other_vectors_are_no_query():
    for space in (spaces.Box(-8.0, 8.0, (D,)), StateSpace(-8.0, 8.0, (D + 2,))):
        assert not begins_with_query(space, D)


def test_critics_see_what_state_and_action_have_in_common():
    """With all weights on the products a critic is the cosine of state and action, whatever the lengths of both."""
    made, states, actions = query_policy(1), torch.randn(20, D + 1), torch.randn(20, D)
    for network in made.critic.q_networks:
        first, last = network[0], network[-1]
        with torch.no_grad():
            for layer in (first, last):
                layer.weight.zero_()
                layer.bias.zero_()
            first.weight[0, D + 1 : 2 * D + 1] = 1.0 / D
            first.bias[0], last.weight[0, 0], last.bias[0] = 1.0, 1.0, -1.0
    cosines = torch.cosine_similarity(states[:, :D], actions)[:, None]
    for value in made.critic(5.0 * states, 3.0 * actions):
        torch.testing.assert_close(value, cosines, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(made.critic.q1_forward(states, actions), cosines, atol=1e-5, rtol=1e-4)


def test_noise_has_no_mean_and_every_length_up_to_the_largest():
    set_random_seed(0)
    draws = np.stack([QueryNoise(D, 1.5)() for _ in range(2_000)])
    lengths = np.linalg.norm(draws, axis=1)
    assert np.abs(draws.mean(axis=0)).max() < 0.02
    np.testing.assert_allclose(np.quantile(lengths, [0.1, 0.5, 0.9]), [0.15, 0.75, 1.35], atol=0.1)
    with pytest.raises(ValueError, match="must not be negative"):
        QueryNoise(D, -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [TD3, DDPG])
def test_they_learn_within_stable_baselines3_what_pays(algorithm, tmp_path):
    """The best slates hold popular items alone, which are clicked in 9 cases of 10; random ones earn .42."""
    pair, noise = front_pair(), NormalActionNoise(np.zeros(8), np.full(8, 0.2))
    for seed in (0, 1):
        agent = algorithm(
            UnitNormPolicy,
            KuaiFairVecEnv(pair.train, NEVER, 16, seed=seed),
            learning_starts=320,
            gamma=0.5,
            batch_size=64,
            action_noise=noise,
            policy_kwargs={"net_arch": [32, 32]},
            seed=seed,
            device="cpu",
        ).learn(3_200)
        found = evaluate(agent, KuaiFairVecEnv(pair.test, NEVER, 16, seed=1)).engagement.reward_per_step
        assert found > ENDS[0][0] - 0.1, seed
    agent.save(tmp_path / "agent")
    again, seen = algorithm.load(tmp_path / "agent", device="cpu"), agent.get_env().reset()
    np.testing.assert_array_equal(again.predict(seen)[0], agent.predict(seen)[0])
