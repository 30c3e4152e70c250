"""Methods find optima that are known: of decision processes, of two kinds of users, and of a world of 50 items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import TableResponse, small_world

from hrl_policies.bcq import BCQ, DiscreteBCQ, DiscreteBCQPolicy
from hrl_policies.common.offline import TensorBatch
from hrl_policies.common.transitions import LoggedTransitions
from hrl_policies.controls import Oracle
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.study import plan_run, train
from hrl_policies.worlds import WorldPair
from kuaifair_env.abandonment import NeverLeave
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.evaluation import evaluate
from kuaifair_env.metrics import expected_length
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import initial_history

torch.set_num_threads(1)
STATES, ACTIONS, DISCOUNT = 6, 4, 0.9


class Process:
    """A random decision process with one ending; action 0 is the best nearly everywhere, but was never tried."""

    def __init__(self) -> None:
        rng = np.random.default_rng(1)
        self.next = rng.integers(STATES, size=(STATES, ACTIONS))
        self.reward = rng.random((STATES, ACTIONS)).astype(np.float32)
        self.ends = rng.random((STATES, ACTIONS)) < 0.15
        self.reward[:, 0] = 3.0
        self.tried = np.ones((STATES, ACTIONS), np.bool_)
        self.tried[:, 0] = False
        self.rng = rng

    def values(self, allowed: np.ndarray) -> np.ndarray:
        """Value iteration over the allowed actions."""
        table = np.zeros((STATES, ACTIONS))
        for _ in range(500):
            best = np.where(allowed, table, -np.inf).max(axis=1)
            table = self.reward + DISCOUNT * ~self.ends * best[self.next]
        return table

    def log(self, sessions: int = 60, length: int = 40) -> LoggedTransitions:
        rows: list[tuple[int, int, float, int, bool, bool]] = []
        for _ in range(sessions):
            state = int(self.rng.integers(STATES))
            for step in range(length):
                action = int(self.rng.choice(np.flatnonzero(self.tried[state])))
                after, over = int(self.next[state, action]), bool(self.ends[state, action])
                rows.append((state, action, self.reward[state, action], after, over, step == length - 1 and not over))
                state = after
                if over:
                    break
        states, actions, rewards, after, over, cut = (np.asarray(column) for column in zip(*rows, strict=True))
        one_hot = np.eye(STATES, dtype=np.float32)
        return LoggedTransitions(
            one_hot[states],
            actions,
            rewards.astype(np.float32),
            one_hot[after],
            over,
            cut,
            spaces.Box(0, 1, (STATES,)),
            spaces.Discrete(ACTIONS),
        )


LENGTH = 10


def moved(position: np.ndarray, action: np.ndarray) -> np.ndarray:
    return np.clip(position + action, -2, 2).astype(np.float32)


def random_walks(sessions: int = 200) -> LoggedTransitions:
    """Walks on [-2, 2] by uniformly random steps; a position ``x`` earns ``-x^2``, a step nothing by itself."""
    rng = np.random.default_rng(0)
    position = np.empty((LENGTH + 1, sessions, 1), np.float32)
    position[0] = rng.uniform(-2, 2, (sessions, 1))
    actions = rng.uniform(-1, 1, (LENGTH, sessions, 1)).astype(np.float32)
    for step in range(LENGTH):
        position[step + 1] = moved(position[step], actions[step])
    before, after, actions = (part.swapaxes(0, 1).reshape(-1, 1) for part in (position[:-1], position[1:], actions))
    last = np.tile(np.arange(LENGTH) == LENGTH - 1, sessions)
    return LoggedTransitions(
        before,
        actions,
        -(before[:, 0] ** 2),
        after,
        np.zeros(len(last), np.bool_),
        last,
        spaces.Box(-2, 2, (1,)),
        spaces.Box(-1, 1, (1,)),
    )


def mean_return(act) -> float:
    """Mean return of ten steps from evenly spaced positions."""
    position, total = np.linspace(-2, 2, 41, dtype=np.float32)[:, None], 0.0
    for _ in range(LENGTH):
        position = moved(position, act(position))
        total -= float(np.mean(position**2))
    return total


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_bcq_learns_from_random_walks_to_go_where_it_pays(seed):
    """What a step is worth shows one step later, so that values must be bootstrapped; imitation would stand still."""
    model = BCQ(
        "BCQPolicy",
        None,
        random_walks(),
        gamma=0.8,
        tau=0.02,
        batch_size=64,
        policy_kwargs={"net_arch": [32, 32], "action_net_arch": [32, 32], "perturbation": 0.2, "samples": 20},
        seed=seed,
        device="cpu",
    ).learn(500, log_interval=None)
    optimum, still = mean_return(lambda position: -position.clip(-1, 1)), mean_return(np.zeros_like)
    assert optimum > -0.2 and still < -13
    assert mean_return(lambda position: model.predict(position, deterministic=True)[0]) > -3


@pytest.mark.slow
def test_discrete_bcq_finds_the_optimum_of_what_was_tried():
    process = Process()
    log = process.log()
    model = DiscreteBCQ(
        "DiscreteBCQPolicy",
        None,
        log,
        learning_rate=3e-3,
        tau=0.02,
        gamma=DISCOUNT,
        policy_kwargs={"net_arch": [32]},
        seed=0,
        device="cpu",
    ).learn(2_500, log_interval=None)
    table = process.values(process.tried)
    states = np.eye(STATES, dtype=np.float32)
    chosen, _ = model.predict(states, deterministic=True)
    best = np.where(process.tried, table, -np.inf)
    np.testing.assert_array_equal(chosen, best.argmax(axis=1))
    assert (process.values(np.ones_like(process.tried)).argmax(axis=1) != chosen).any()
    with torch.no_grad():
        found = model.policy.values(torch.from_numpy(states), model.policy.embeddings).numpy()
    np.testing.assert_allclose(found[process.tried], table[process.tried], atol=0.15)


def policy(items: int, slots: int, threshold: float = 0.3, **settings) -> DiscreteBCQPolicy:
    torch.manual_seed(0)
    space = spaces.Discrete(items) if slots == 1 else spaces.MultiDiscrete([items] * slots)
    return DiscreteBCQPolicy(
        spaces.Box(-1, 1, (3,)), space, lambda _: 1e-3, net_arch=[8], threshold=threshold, **settings
    )


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("slots", [1, 3])
def test_an_item_is_allowed_where_the_log_makes_it_likely_enough(threshold, slots):
    logits = torch.randn(40, 7, generator=torch.Generator().manual_seed(1))
    allowed = policy(7, slots, threshold).likely(logits, slots).numpy()
    chance = torch.softmax(logits, dim=1).numpy()
    likely = chance >= threshold * chance.max(axis=1, keepdims=True) * (1 - 1e-6)
    rank = (-chance).argsort(axis=1).argsort(axis=1)
    np.testing.assert_array_equal(allowed, likely | (rank < slots))
    if slots == 1:
        np.testing.assert_array_equal(allowed, likely)


def test_slates_are_the_best_of_the_allowed_items():
    made = policy(9, 3)
    states = torch.randn(20, 3)
    slates, _ = made.predict(states.numpy(), deterministic=True)
    with torch.no_grad():
        allowed = made.likely(made.behaviour(states, made.embeddings), 3).numpy()
        values = made.values(states, made.embeddings).numpy()
    expected = np.argsort(-np.where(allowed, values, -np.inf), axis=1, kind="stable")[:, :3]
    np.testing.assert_array_equal(slates, expected)


def test_masked_items_are_never_shown():
    masks = np.zeros((20, 9), np.bool_)
    masks[:, [1, 4, 8]] = True
    slates, _ = policy(9, 3).predict(np.zeros((20, 3), np.float32), action_masks=masks)
    assert (np.sort(slates, axis=1) == [1, 4, 8]).all()


def test_targets_choose_with_one_network_and_value_with_the_other():
    rng = np.random.default_rng(0)
    n, items, slots = 12, 6, 2
    chain = rng.random((n + 1, 3)).astype(np.float32)
    data = LoggedTransitions(
        chain[:-1],
        np.stack([rng.permutation(items)[:slots] for _ in range(n)]),
        np.zeros(n, np.float32),
        chain[1:],
        np.arange(n) == n - 1,
        np.zeros(n, np.bool_),
        spaces.Box(0, 1, (3,)),
        spaces.MultiDiscrete([items] * slots),
        slot_rewards=rng.random((n, slots)).astype(np.float32),
    )
    model = DiscreteBCQ("MlpPolicy", None, data, policy_kwargs={"net_arch": [8]}, gamma=0.8, seed=0, device="cpu")
    own = model.policy
    with torch.no_grad():
        for parameter in own.values.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    batch = TensorBatch(*model._tensors)
    found, count = model._targets(batch)
    with torch.no_grad():
        after = torch.from_numpy(chain[1:])
        allowed = own.likely(own.behaviour(after, own.embeddings), slots).numpy()
        online, target = (net(after, own.embeddings).numpy() for net in (own.values, own.values_target))
    for row in range(n):
        shown = np.argsort(-np.where(allowed[row], online[row], -np.inf))[:slots]
        # No value is above what a session of the best logged slots would sum up to.
        value = np.clip(target[row, shown].mean(), 0.0, data.slot_rewards.max() / (1.0 - 0.8))
        later = 0.8 * value * (row < n - 1)
        np.testing.assert_allclose(found[row], data.slot_rewards[row] + later, rtol=1e-5)
    assert count == pytest.approx(allowed.sum(axis=1).mean())


def test_heads_over_embeddings_score_by_inner_product():
    made = policy(5, 1, dimension=4, head="embedding")
    made.embeddings.copy_(torch.randn(5, 4))
    states = torch.randn(6, 3)
    with torch.no_grad():
        made.values.bias.copy_(torch.arange(5.0))
        query = made.values.query(made.values.hidden(states))
        expected = query @ made.embeddings.T + torch.arange(5.0)
        torch.testing.assert_close(made.values(states, made.embeddings), expected)


def test_actions_and_embeddings_that_do_not_fit_are_refused():
    data = Process().log(2)
    with pytest.raises(ValueError, match="item_embeddings has 3 rows for 4 items"):
        DiscreteBCQ("MlpPolicy", None, data, item_embeddings=np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match="threshold lies in"):
        DiscreteBCQ("MlpPolicy", None, data, policy_kwargs={"threshold": 1.5})
    box = replace(data, actions=np.zeros((len(data), 1), np.float32), action_space=spaces.Box(-1, 1, (1,)))
    with pytest.raises(ValueError, match="DiscreteBCQ acts in a Discrete or MultiDiscrete, the transitions in"):
        DiscreteBCQ("MlpPolicy", None, box)
    pairs = np.stack([data.actions, (data.actions + 1) % ACTIONS], axis=1)
    uneven = replace(data, actions=pairs, action_space=spaces.MultiDiscrete([ACTIONS, ACTIONS + 1]))
    with pytest.raises(ValueError, match="this agent names items"):
        DiscreteBCQ("MlpPolicy", None, uneven)
    slates = replace(data, actions=pairs, action_space=spaces.MultiDiscrete([ACTIONS] * 2))
    with pytest.raises(ValueError, match="need slot_rewards"):
        DiscreteBCQ("MlpPolicy", None, slates)
    model = DiscreteBCQ("MlpPolicy", None, data)
    with pytest.raises(ValueError, match="over 9 items, the algorithm over 4"):
        model.set_transitions(replace(data, action_space=spaces.Discrete(9)))


def two_kinds(seed: int = 0) -> WorldPair:
    """Users click 9 of 10 items of their own kind and 1 of 10 others; the log shows items at random."""
    rng = np.random.default_rng(seed)
    n_users, n_items, rows = 80, 50, 200
    likes = np.arange(n_users)[:, None] % 2 == np.arange(n_items) % 2
    table = np.where(likes, 0.9, 0.1)
    users = np.repeat(np.arange(n_users), rows)
    items = rng.integers(n_items, size=len(users))
    base = small_world(table, n_users=n_users, n_items=n_items)
    log = InteractionLog.sorted(users, items, rng.random(len(users)) < table[users, items])
    data = replace(base.data, train=log)
    world = replace(
        base,
        data=data,
        groups=popularity_groups(log.exposures(n_items), data.items.ids),
        embeddings=item_embeddings(log, n_users, data.items, 8),
        initial_history=initial_history(log, n_users, 20),
        response=TableResponse(table),
    )
    return WorldPair(
        "two kinds",
        replace(world, split="train", users=np.arange(20, 80)),
        replace(world, users=np.arange(20)),
    )


# Continuous BCQ as its article has it.
AUTHORS = {
    "learning_rate": 0.001,
    "gamma": 0.99,
    "minimum_weight": 0.75,
    "policy_kwargs.perturbation": 0.05,
    "data.session_end": "truncated",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "steps"),
    [
        ("bcq", AUTHORS | {"data.action_items": "clicked"}, 300),
        ("bcq", AUTHORS | {"data.action_items": "shown"}, 600),
        ("bcq-discrete", {"learning_rate": 0.002, "policy_kwargs.threshold": 0.1, "gamma": 0.9}, 1_000),
        ("bcq-discrete", {"learning_rate": 0.002, "data.source": "env_behaviour", "gamma": 0.9}, 1_000),
    ],
    ids=["clicked", "shown", "discrete", "discrete-behaviour"],
)
def test_users_of_two_kinds_get_what_they_like_though_the_log_showed_items_at_random(name, overrides, steps):
    """The optimum is .9, and what was logged earned .5."""
    pair = two_kinds()
    session = SessionConfig(leave=NeverLeave(), max_len=10)
    small = {"policy_kwargs.net_arch": [32, 32], "data.transitions": 10_000}
    if name == "bcq":
        small["policy_kwargs.action_net_arch"] = [32, 32]
    config = plan_run(name, "two kinds", session=session, total_steps=steps, n_envs=4, overrides=small | overrides)
    result = train(config, pair)
    logged = result.policy.transitions.rewards.mean()
    assert logged == pytest.approx(0.5, abs=0.02)
    assert result.evaluation.summary()["r_each"] > 0.85


# ---------------------------------------------------------------- both levels of HierarchicalPPO in a world of 50 items

SLATE_SIZE = 10
SESSION = SessionConfig(action_mode="slate", slate_size=SLATE_SIZE, observation_mode="history")
SEEDS = (11, 15, 19)
STEPS = 14_336


def best_slate_world():
    """Six popular items are liked in 9 cases of 10, five others in 6; the bound allows 4 to 6 popular items."""
    bare = small_world()
    popular, tail = np.flatnonzero(bare.groups.popular), np.flatnonzero(~bare.groups.popular)
    liked = np.where(bare.groups.popular, 0.2, 0.1)
    liked[popular[2:8]], liked[tail[::8]] = 0.9, 0.6
    # One direction for each item, so that nothing but learning stands between the agent and the best slate.
    return replace(small_world(np.broadcast_to(liked, (40, 50))), embeddings=np.eye(50, dtype=np.float32)), liked


WORLD, LIKED = best_slate_world()


def best_click_rate(counts) -> float:
    """The best mean click rate of a slate with one of these numbers of popular items, by trying them all."""
    popular = WORLD.groups.popular
    heads, tails = (np.sort(LIKED[group])[::-1] for group in (popular, ~popular))
    return max((heads[:count].sum() + tails[: SLATE_SIZE - count].sum()) / SLATE_SIZE for count in counts)


def r_cum(agent) -> float:
    return evaluate(agent, KuaiFairVecEnv(WORLD, SESSION, 40, seed=0), episodes_per_user=10).summary()["r_cum"]


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
        n_epochs=4,
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
