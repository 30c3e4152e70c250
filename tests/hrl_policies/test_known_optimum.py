"""HierarchicalPPO in a world of 50 items whose best policy is known: both levels find it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import small_world

from hrl_policies.controls import Oracle
from hrl_policies.hrl_ppo import HierarchicalPPO
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate
from kuaifair_env.metrics import expected_length
from kuaifair_env.sb3 import KuaiFairVecEnv

K = 10
SESSION = SessionConfig(action_mode="slate", slate_size=K, observation_mode="history")
SEEDS = (11, 15, 19)
STEPS = 20_480


def world():
    """Six popular items are liked in 9 cases of 10, five others in 6; the bound allows 4 to 6 popular items."""
    bare = small_world()
    popular, tail = np.flatnonzero(bare.groups.popular), np.flatnonzero(~bare.groups.popular)
    liked = np.where(bare.groups.popular, 0.2, 0.1)
    liked[popular[2:8]], liked[tail[::8]] = 0.9, 0.6
    # One direction for each item, so that nothing but learning stands between the agent and the best slate.
    return replace(small_world(np.broadcast_to(liked, (40, 50))), embeddings=np.eye(50, dtype=np.float32)), liked


WORLD, LIKED = world()


def best_click_rate(counts) -> float:
    """The best mean click rate of a slate with one of these numbers of popular items, by trying them all."""
    popular = WORLD.groups.popular
    heads, tails = (np.sort(LIKED[group])[::-1] for group in (popular, ~popular))
    return max((heads[:count].sum() + tails[: K - count].sum()) / K for count in counts)


def r_cum(policy) -> float:
    return evaluate(policy, KuaiFairVecEnv(WORLD, SESSION, 40, seed=0), episodes_per_user=10).summary()["r_cum"]


def trained(seed: int, **hierarchy) -> HierarchicalPPO:
    env = KuaiFairVecEnv(replace(WORLD, split="train"), SESSION, 32, seed=seed)
    forms = {
        "weights": "quota",
        "worker": "query",
        "reach": 10.0,
        "memory": False,
        "candidates": 0,
    } | hierarchy
    agent = HierarchicalPPO(
        "HierarchicalPolicy",
        env,
        hierarchy=forms,
        seed=seed,
        device="cpu",
        click_scorer=None,
        manager_ent_coef=0.01,
        learning_rate=3e-3,
        # A manager as fast as the worker settles before it knows what the worker can do, and what its choice is worth
        # now drowns in what the rest of the session brings.
        manager_learning_rate=1e-3,
        manager_gamma=0.8,
        n_steps=16,
        batch_size=256,
        target_kl=None,
    )
    return agent.learn(STEPS)


def test_the_oracle_earns_what_the_best_slate_gives():
    rate = best_click_rate((4, 5, 6))
    assert rate == pytest.approx(0.78)
    assert r_cum(Oracle()) == pytest.approx(rate * float(expected_length(30.0, rate, 0.0)), rel=0.02)


@pytest.mark.slow
def test_both_levels_together_reach_98_percent_of_the_optimal_return_with_every_seed():
    best = r_cum(Oracle())
    # Half of each group, the manager's obvious choice, is not enough.
    assert best_click_rate((5,)) * float(expected_length(30.0, best_click_rate((5,)), 0.0)) < 0.96 * best
    reached = {seed: r_cum(trained(seed)) / best for seed in SEEDS}
    assert min(reached.values()) > 0.98, reached


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, 5])
def test_with_the_manager_frozen_the_worker_alone_reaches_its_own_optimum(count):
    rate = best_click_rate((count,))
    own = rate * float(expected_length(30.0, rate, 0.0))
    assert r_cum(trained(11, manager="constant", constant=float(count))) > 0.98 * own
