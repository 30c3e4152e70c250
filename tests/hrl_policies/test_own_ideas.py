"""Each baseline in a world in which its own idea must win: a bad row of a study is then the method's, and not ours."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TableResponse, small_world
from logged_worlds import logged_pair
from small_worlds import ENDS, front_pair
from stable_baselines3 import TD3
from stable_baselines3.common.logger import configure

from hrl_policies.bcq import BCQ
from hrl_policies.common.transition_sources import NoisyState, collect_transitions
from hrl_policies.controls import RandomSlates
from hrl_policies.dnair import DNaIR, ItemTables
from hrl_policies.dorl import DORL
from hrl_policies.mofir import MOFIR
from hrl_policies.preference_front import preference_front, preference_grid
from hrl_policies.sac4ir import SAC4IR
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import FeatureTable
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

torch.set_num_threads(1)
pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)
SMALL = {"net_arch": [32, 32]}
QUERIES = SessionConfig(leave="never", max_len=10, slate_size=6)
SLATES = replace(QUERIES, action_mode="slate")


def reward(agent, world, session=SLATES, deterministic=True) -> float:
    """Mean click of a slate."""
    env = KuaiFairVecEnv(world, session, 24, seed=1)
    return evaluate(agent, env, deterministic=deterministic).engagement.reward_per_step


def test_bcq_stays_with_an_expert_whom_td3_leaves_for_what_it_knows_nothing_of():
    """Users like one of five kinds of items, which the expert knows.

    Nearly all that it shows is clicked, so that the log says nothing of other queries: critics without a constraint
    are free to think well of them.
    """
    likes = np.arange(60)[:, None] % 5 == np.arange(50) % 5
    pair = logged_pair(np.where(likes, 0.9, 0.1), rows_per_user=200)
    for seed in SEEDS:
        env = KuaiFairVecEnv(pair.train, QUERIES, 20, seed=seed)
        log = collect_transitions(NoisyState(0.3, seed), env, 2_000, seed)
        imitator = BCQ(
            "BCQPolicy",
            None,
            log,
            gamma=0.9,
            policy_kwargs=SMALL | {"action_net_arch": [32, 32], "samples": 20},
            seed=seed,
            device="cpu",
        ).learn(300, log_interval=None)
        free = TD3("MlpPolicy", env, gamma=0.9, learning_rate=1e-3, policy_kwargs=SMALL, seed=seed, device="cpu")
        free.replay_buffer = log.to_replay_buffer("cpu")
        free.set_logger(configure(None, []))
        free.train(300, 100)
        shown = float(log.rewards.mean())
        imitated, left = (reward(agent, pair.train, QUERIES) for agent in (imitator, free))
        assert shown > 0.7
        assert imitated > shown - 0.05
        assert left < imitated - 0.15


class FadingInterest(TableResponse):
    """Interest in an item is gone as long as the window of the last slates holds it."""

    uses_history = True

    def expected(self, users, items, history=None):
        seen = (items[:, :, None] == history.items[:, None, :]).any(axis=2)
        return np.where(seen, np.float32(0.05), super().expected(users, items))


def test_sac4ir_keeps_up_with_interests_that_drift_from_what_was_shown():
    """25 of 50 items are liked, each until it was shown; a policy with little entropy has its favourites."""
    table = np.tile(np.where(np.arange(50) % 2, 0.9, 0.0), (40, 1))
    world = replace(small_world(table, history_length=12), response=FadingInterest(table))
    by_chance = reward(RandomSlates(), world)
    for seed in SEEDS:
        earned = {}
        for ent_coef in ("auto_0.1", 0.001):
            agent = SAC4IR(
                "SoftItemPolicy",
                KuaiFairVecEnv(world, SLATES, 16, seed=seed),
                popularity_power=0.0,
                ent_coef=ent_coef,
                target_entropy_ratio=0.85,
                gamma=0.0,
                learning_starts=320,
                batch_size=64,
                learning_rate=3e-3,
                tau=0.02,
                policy_kwargs={"net_arch": [32], "head": "linear"},
                seed=seed,
                device="cpu",
            ).learn(3_200)
            earned[ent_coef] = reward(agent, world, deterministic=False)
        assert earned["auto_0.1"] > by_chance + 0.08
        assert earned["auto_0.1"] > earned[0.001] + 0.08


def test_dorl_keeps_to_what_its_log_supports():
    """Clicks rise with an item's value, as far as the log goes: of the last ten items, far beyond, it shows none.

    A model of the log thinks them the best, and is least sure of them; in truth nobody likes them.
    """
    value = np.r_[np.repeat(np.linspace(0.0, 1.0, 5), 8), np.full(10, 20.0)].astype(np.float32)
    logged = value <= 1.0
    table = np.tile(np.where(logged, 0.05 + 0.55 * value, 0.05), (40, 1))
    rng = np.random.default_rng(0)
    embeddings = 2.0 * np.eye(8)[np.unique(value, return_inverse=True)[1]] + 0.3 * rng.normal(size=(50, 8))
    embeddings *= 8**0.5 / np.linalg.norm(embeddings, axis=1, keepdims=True)
    world = logged_pair(table, shown=logged, rows_per_user=100, embeddings=embeddings.astype(np.float32)).train
    features = FeatureTable(value[:, None], ("value",))
    world = replace(world, data=replace(world.data, items=replace(world.data.items, features=features)))
    model = {"members": 3, "batch_size": 128, "max_epochs": 10, "learning_rate": 3e-3, "patience": 3, "hidden": 32}
    for seed in SEEDS:
        earned = {}
        for weight in (1.5, 0.0):
            agent = DORL(
                "MlpPolicy",
                KuaiFairVecEnv(world, QUERIES, 16, seed=seed),
                uncertainty_weight=weight,
                entropy_weight=0.0,
                world_model=model,
                learning_rate=3e-3,
                gamma=0.0,
                policy_kwargs={"log_std_init": -1.0},
                seed=seed,
                device="cpu",
            ).learn(4_000)
            earned[weight] = reward(agent, world, QUERIES)
        assert earned[1.5] > 0.4
        assert earned[1.5] > earned[0.0] + 0.2


def test_dnair_shows_novel_items_where_they_are_liked_as_much():
    """Everything is clicked in 8 cases of 10; what is shown differs in novelty alone."""
    world = small_world(0.8)
    novelty = ItemTables.of_world(world).novelty
    best = np.sort(novelty)[-6:].mean()
    seen = KuaiFairVecEnv(world, replace(SLATES, observation_mode="history"), 40, seed=2).reset()
    for seed in SEEDS:
        shown = {}
        for weight in (0.0, 2.0):
            agent = DNaIR(
                "QItemPolicy",
                KuaiFairVecEnv(world, replace(SLATES, observation_mode="history"), 16, seed=seed),
                candidates=0,
                novelty_coef=weight,
                gamma=0.0,
                explore=0.5,
                learning_starts=64,
                batch_size=64,
                learning_rate=1e-2,
                tau=0.02,
                policy_kwargs={"net_arch": [32]},
                seed=seed,
                device="cpu",
            ).learn(4_000)
            shown[weight] = novelty[agent.predict(seen, deterministic=True)[0]].mean()
        assert shown[2.0] > 0.85 * best
        assert shown[2.0] > shown[0.0] + 0.2 * best


def test_one_mofir_serves_both_ends_of_a_front():
    """Popular items are clicked most, good ones of the long tail next: a preference says which to show.

    About one in ten trainings stays with the tail, near which sessions begin, so that two of three have to do it.
    """
    pair, reached = front_pair(), 0
    for seed in SEEDS:
        agent = MOFIR(
            "PreferencePolicy",
            KuaiFairVecEnv(pair.train, QUERIES, 16, seed=seed),
            preference=(0.5, 0.5),
            learning_starts=500,
            learning_rate=1e-3,
            epsilon=(1.0, 0.0),
            exploration_noise=2.0,
            gradient_steps=2,
            batch_size=128,
            buffer_size=20_000,
            policy_kwargs={"net_arch": [64, 64]},
            seed=seed,
            device="cpu",
        ).learn(6_000)
        front = preference_front(agent, KuaiFairVecEnv(pair.train, QUERIES, 24, seed=1), preference_grid(3))
        clicked, fair = ((point.clicks, point.tail_share) for point in (front[0], front[-1]))
        reached += clicked == pytest.approx(ENDS[0], abs=0.06) and fair[1] > 0.95 and fair[0] > 0.4
    assert reached >= 2
