"""DNaIR: targets by hand, candidates and generator as described, and worlds whose best slates are known are learnt."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_data, small_world
from hierarchical import PARITY, K, differing, sessions, weights
from purifiers import WindowPurifier
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from dsrm import VecDSRM
from hrl_policies.controls import RandomSlates
from hrl_policies.dnair import DNaIR, ItemTables, QItemPolicy, SimilarItems, mixed
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.evaluation import evaluate

N = 50
EVEN = small_world(0.8)
KUAISIM = {"mode": "kuaisim", "candidates": 0, "explore": 0.01}


def agent(env=None, **settings) -> DNaIR:
    given = {
        "learning_starts": 64,
        "batch_size": 32,
        "buffer_size": 4_000,
        "learning_rate": 3e-3,
        "tau": 0.02,
        "candidates": 20,
        "policy_kwargs": {"net_arch": [32]},
        "seed": 0,
    } | settings
    return DNaIR("QItemPolicy", sessions() if env is None else env, device="cpu", **given)


def values(net, states, policy):
    with torch.no_grad():
        return net(states, policy.embeddings).numpy()


# Targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acc", ["env", "itemcf"])
def test_a_slot_s_target_is_its_own_gain_and_the_next_slate_s_mean_value(acc):
    model = agent(acc=acc, novelty_coef=0.3, gamma=0.8, learning_rate=1e-2).learn(800)
    policy, batch = model.policy, model.replay_buffer.sample(300)
    assert 0 < batch.dones.mean() < 1
    online = values(policy.q_net, batch.next_observations, policy)
    target = values(policy.target_net, batch.next_observations, policy)
    assert abs(online - target).max() > 1e-3
    near = batch.extras["next_candidates"].numpy()
    novelty = ItemTables.of_world(PARITY).novelty
    gained = batch.feedback.numpy() if acc == "env" else batch.extras["accuracy"].numpy()
    expected = np.empty((300, K))
    for row in range(300):
        slate = near[row][np.argsort(-online[row, near[row]], kind="stable")[:K]]
        following = target[row, slate].mean() * (1 - batch.dones[row].item())
        expected[row] = gained[row] + 0.3 * novelty[batch.items[row]] + 0.8 * following
    np.testing.assert_allclose(model._targets(batch), expected, rtol=1e-4, atol=1e-5)


def test_with_one_item_a_step_it_is_double_dqn():
    env = sessions(action_mode="item", slate_size=1, observation_mode="state")
    model = agent(env, candidates=0, novelty_coef=0.0, gamma=0.8).learn(300)
    policy, batch = model.policy, model.replay_buffer.sample(100)
    online = values(policy.q_net, batch.next_observations, policy)
    target = values(policy.target_net, batch.next_observations, policy)
    following = target[np.arange(100), online.argmax(axis=1)][:, None]
    expected = batch.rewards.numpy() + 0.8 * (1 - batch.dones.numpy()) * following
    np.testing.assert_allclose(model._targets(batch), expected, rtol=1e-4, atol=1e-5)


def test_the_group_s_version_values_whole_slates():
    model = agent(novelty_coef=0.3, gamma=0.8, **KUAISIM).learn(300)
    policy, batch = model.policy, model.replay_buffer.sample(100)
    target = values(policy.target_net, batch.next_observations, policy)
    following = np.sort(target, axis=1)[:, -K:].sum(axis=1, keepdims=True)
    novelty = ItemTables.of_world(PARITY).novelty[batch.items].mean(axis=1, keepdims=True)
    expected = batch.rewards.numpy() + 0.3 * novelty + 0.8 * (1 - batch.dones.numpy()) * following
    np.testing.assert_allclose(model._targets(batch), expected, rtol=1e-4, atol=1e-5)
    assert not batch.extras


def test_similarity_is_that_of_the_window_before_the_slate_and_candidates_that_after():
    model = agent(acc="itemcf", learning_starts=10_000)
    env, similar, before = model.env, model.policy.similar, {}
    model.learn(8)
    for _ in range(40):
        before = {name: part.copy() for name, part in model._last_obs.items()}
        model.learn(8, reset_num_timesteps=False)
        columns, place = model.replay_buffer.columns, model.replay_buffer.pos - 1
        shown = torch.from_numpy(columns["items"][place]).long()
        expected = similar.scores(before).gather(1, shown)
        np.testing.assert_allclose(columns["accuracy"][place], expected, rtol=1e-6)
        running = ~env.unwrapped.batch.outcome.done
        near = similar.best(model._last_obs, 20).numpy()
        np.testing.assert_array_equal(columns["next_candidates"][place][running], near[running])
    assert (columns["accuracy"][:place] > 0).any()


# Slates ---------------------------------------------------------------------------------------------------------


def test_slots_take_the_first_item_not_yet_shown():
    best, random = torch.tensor([[1, 2, 3]]), torch.tensor([[2, 1, 9]])
    for explore, expected in (
        ([0, 0, 0], [1, 2, 3]),
        ([1, 1, 1], [2, 1, 9]),
        ([1, 0, 0], [2, 1, 3]),
        ([0, 1, 0], [1, 2, 3]),
        ([0, 0, 1], [1, 2, 9]),
        ([1, 1, 0], [2, 1, 3]),
    ):
        assert mixed(best, random, torch.tensor([explore]).bool()).tolist() == [expected]


def test_no_mixture_ever_holds_an_item_twice():
    torch.manual_seed(0)
    for explore in itertools.product([False, True], repeat=5):
        best, random = (torch.rand(40, 8).topk(5, dim=1).indices for _ in range(2))
        slates = mixed(best, random, torch.tensor(explore).expand(40, 5)).sort(dim=1).values
        assert (slates[:, 1:] > slates[:, :-1]).all() and (slates >= 0).all()


def test_one_slot_in_twenty_is_random_in_training_and_none_in_evaluation():
    """Candidates are the 8 most similar items, so that a random item is hardly ever one that a greedy slot shows."""
    model = agent(candidates=8, explore=0.2)
    seen = sessions(400, seed=3).reset()
    near = model.policy.near(seen).numpy()
    greedy, _ = model.predict(seen, deterministic=True)
    assert all(set(slate) <= set(row) for slate, row in zip(greedy.tolist(), near.tolist(), strict=True))
    drawn, _ = model.predict(seen)
    outside = np.array([len(set(slate) - set(row)) for slate, row in zip(drawn.tolist(), near.tolist(), strict=True)])
    # A random item lies outside the candidates in 42 cases of 50, of those left a little more.
    assert outside.mean() / K == pytest.approx(0.2 * 42 / 47, abs=0.03)
    assert (drawn != greedy).any(axis=1).mean() > 0.5
    still = agent(candidates=8, explore=0.0)
    np.testing.assert_array_equal(still.predict(seen)[0], still.predict(seen, deterministic=True)[0])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"candidates": N}, {"candidates": 0}, KUAISIM], ids=["near", "all", "kuaisim"])
def test_what_pays_is_learnt_and_random_slates_are_left_behind(settings):
    """The best slates of the world, and no others, hold odd items alone; random ones earn half of that."""
    model = agent(sessions(16), novelty_coef=0.0, gamma=0.5, batch_size=64, **{"explore": 0.2} | settings)
    model.learn(2_500)
    evaluated = evaluate(model, sessions(40, seed=1), PARITY.user_ids)
    chance = evaluate(RandomSlates(), sessions(40, seed=1), PARITY.user_ids)
    assert evaluated.engagement.reward_per_step > 0.9
    assert evaluated.engagement.cumulative_reward > chance.engagement.cumulative_reward + 3


@pytest.mark.slow
def test_where_all_items_are_liked_alike_the_novel_ones_are_shown():
    """The best slate holds the items of the largest novelty."""
    model = agent(
        sessions(16, world=EVEN), candidates=0, novelty_coef=2.0, gamma=0.0, batch_size=64, explore=0.5,
        learning_rate=1e-2,
    )  # fmt: skip
    model.learn(6_000)
    novelty = ItemTables.of_world(EVEN).novelty
    slates, _ = model.predict(sessions(40, seed=2, world=EVEN).reset(), deterministic=True)
    best = np.sort(novelty)[-K:].mean()
    assert novelty[slates].mean() > 0.9 * best > 1.3 * novelty.mean()


@pytest.mark.parametrize("form", ["vec", "single"])
@pytest.mark.parametrize("candidates", [5, 0])
def test_items_that_may_not_be_repeated_are_masked(form, candidates):
    """30 steps of one item out of 50: an agent that forgets the masks is refused by the environment."""
    settings = {"slate_size": 1, "repeats": "forbid", "leave": "never"}
    config = SessionConfig(action_mode="slate", observation_mode="history", **settings)
    env = sessions(**settings) if form == "vec" else KuaiFairEnv(PARITY, config)
    model = agent(env, candidates=candidates, batch_size=16, learning_starts=32).learn(100)
    for deterministic in (True, False):
        evaluated = evaluate(model, sessions(20, **settings), PARITY.user_ids, deterministic=deterministic)
        assert (evaluated.sessions.coverage == 30 / 50).all()


@pytest.mark.parametrize("settings", [{}, KUAISIM], ids=["native", "kuaisim"])
def test_it_learns_on_purified_states(settings):
    model = agent(VecDSRM(sessions(), WindowPurifier()), **settings).learn(160)
    assert model.policy.state_size == 9 and model._n_updates > 0
    result = evaluate(model, VecDSRM(sessions(16, seed=1), WindowPurifier()), PARITY.user_ids[:10])
    assert len(result.sessions) == 10


# Stable-Baselines3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, KUAISIM], ids=["native", "kuaisim"])
def test_a_loaded_agent_is_the_saved_one_bit_by_bit(tmp_path, settings):
    model = agent(**settings).learn(300)
    model.save(tmp_path / "model.zip")
    seen = sessions(12, seed=5).reset()
    expected, _ = model.predict(seen, deterministic=True)
    for env in (None, sessions()):
        loaded = DNaIR.load(tmp_path / "model.zip", env=env, device="cpu")
        assert not differing(weights(model), weights(loaded))
        assert torch.equal(model.novelty, loaded.novelty) and loaded.novelty.any()
        np.testing.assert_array_equal(loaded.predict(seen, deterministic=True)[0], expected)
        assert loaded.num_timesteps == 304 and loaded._n_updates == model._n_updates
    loaded.replay_buffer = model.replay_buffer
    for each in (model, loaded):
        torch.manual_seed(3)
        each.set_logger(model.logger)
        each.train(3, 32)
    assert not differing(weights(model), weights(loaded)), "the optimiser goes on as it was"
    model.policy.save(tmp_path / "policy.pt")
    alone = QItemPolicy.load(tmp_path / "policy.pt", device="cpu")
    np.testing.assert_array_equal(
        alone.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
    )


def test_one_observation_is_a_batch_of_one():
    model, seen = agent().learn(160), sessions(12, seed=5).reset()
    batch, _ = model.predict(seen, deterministic=True)
    for row in range(12):
        one = {name: part[row] for name, part in seen.items()}
        np.testing.assert_array_equal(model.predict(one, deterministic=True)[0], batch[row])


def test_callbacks_and_progress_bar_work(tmp_path):
    model = agent(VecMonitor(sessions()))
    model.learn(256, CheckpointCallback(16, str(tmp_path), name_prefix="q"), progress_bar=True)
    assert {path.name for path in tmp_path.iterdir()} == {"q_128_steps.zip", "q_256_steps.zip"}
    assert model.logger.name_to_value.keys() >= {"train/loss", "train/q_mean"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "paper"}, "mode must be one of"),
        ({"acc": "clicks"}, "acc must be one of"),
        ({"novelty_coef": -0.1}, "novelty_coef must not be negative"),
        ({"explore": 1.5}, "explore is a probability"),
        ({"candidates": 3}, "fill a slate of 6, got 3"),
        ({"candidates": 0, "acc": "itemcf"}, "acc='itemcf' measures similarity"),
        ({"mode": "kuaisim"}, r"mode='kuaisim' has candidates=0 and acc='env'"),
        ({"policy_kwargs": {"explore": 0.1}}, "explore: give them to DNaIR itself"),
        ({"huber_delta": -1.0}, "huber_delta must be positive"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent(**settings)


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="observation_mode='history', or set candidates=0"):
        agent(sessions(observation_mode="state"))
    with pytest.raises(ValueError, match="this agent names items"):
        agent(sessions(action_mode="embedding"))
    with pytest.raises(TypeError, match="reads items off a KuaiFair environment"):
        agent(make_vec_env("CartPole-v1", 2), candidates=0)


def test_scaled_rewards_are_refused_because_feedback_on_items_is_not_scaled():
    def learn(**scales):
        env = VecNormalize(sessions(observation_mode="state"), norm_obs=False, **scales)
        return agent(env, candidates=0).learn(128)

    with pytest.raises(ValueError, match=r"DNaIR learns from the feedback .* norm_reward=False"):
        learn()
    assert learn(norm_reward=False).num_timesteps == 128


# What the training log says of items, against counting by hand ---------------------------------------------------

WORLD = small_world(candidates=40)
LOG = WORLD.data.train


def cosine(world) -> np.ndarray:
    """``|U_i & U_j| / sqrt(|U_i| |U_j|)`` by sets of users."""
    log = world.data.train
    fans = [set(log.users[(log.items == item) & log.clicks].tolist()) for item in range(len(world.data.items))]
    return np.array([[len(a & b) / max(np.sqrt(len(a) * len(b)), 1e-9) for b in fans[: world.n_items]] for a in fans])


def test_counts_quality_and_popularity_are_those_of_the_training_log():
    tables = ItemTables.of_world(WORLD)
    shown = np.array([(LOG.items == item).sum() for item in range(N)])
    clicked = np.array([((LOG.items == item) & LOG.clicks).sum() for item in range(N)])
    np.testing.assert_array_equal(tables.exposures, shown)
    np.testing.assert_array_equal(tables.clicks, clicked)
    np.testing.assert_allclose(tables.quality, (clicked + 1) / (shown + 2), rtol=1e-6)
    np.testing.assert_allclose(tables.popularity, (shown - shown.min()) / (shown.max() - shown.min()), rtol=1e-6)
    raw = tables.quality / np.log10(tables.popularity + 1.1)
    np.testing.assert_allclose(tables.novelty, raw / raw.max(), rtol=1e-6)
    assert tables.novelty.max() == 1.0 and tables.novelty.min() > 0.0


def test_neighbours_are_the_most_similar_candidates_by_users_in_common():
    tables, expected = ItemTables.of_world(WORLD, 7), cosine(WORLD)
    assert tables.neighbours.shape == tables.similarities.shape == (N, 7)
    assert tables.neighbours.max() < 40, "items that may not be shown are no candidates"
    for item in range(N):
        others = expected[item].copy()
        if item < 40:
            others[item] = -1
        best = np.sort(others)[::-1][:7]
        np.testing.assert_allclose(tables.similarities[item], best, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(others[tables.neighbours[item]], best, rtol=1e-5, atol=1e-7)


def test_the_test_log_says_nothing():
    data = WORLD.data
    other = InteractionLog.sorted(data.test.users, (data.test.items + 1) % N, ~data.test.clicks)
    changed = replace(WORLD, data=replace(data, test=other))
    before, after = ItemTables.of_world(WORLD), ItemTables.of_world(changed)
    for name in ("exposures", "clicks", "neighbours", "similarities"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


def test_many_items_are_counted_as_few_are(monkeypatch):
    whole = ItemTables.of_world(WORLD, 7)
    monkeypatch.setattr("hrl_policies.dnair._ITEMS_AT_ONCE", 9)
    np.testing.assert_array_equal(ItemTables.of_world(WORLD, 7).neighbours, whole.neighbours)


def test_few_candidates_and_no_neighbours_will_do():
    assert ItemTables.of_world(small_world(candidates=5), 50).neighbours.shape == (N, 4)
    none = ItemTables.of_world(WORLD, 0)
    assert none.neighbours.shape == (N, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        ItemTables.of_world(WORLD, -1)


def observed(rows: list[list[tuple[int, int]]], length: int = 20) -> dict[str, np.ndarray]:
    """Windows of (item, click), newest last."""
    items = np.zeros((len(rows), length), np.int64)
    clicks = np.zeros((len(rows), length), np.int8)
    for row, window in enumerate(rows):
        for place, (item, click) in enumerate(reversed(window)):
            items[row, -1 - place], clicks[row, -1 - place] = item + 1, click
    return {"history_items": items, "history_clicks": clicks}


def similar(world=WORLD, neighbours: int = 39) -> SimilarItems:
    found = SimilarItems(world.n_items, N, neighbours)
    found.fill(ItemTables.of_world(world, neighbours))
    return found


def test_similarity_sums_over_the_last_ten_clicks_newest_first():
    rng = np.random.default_rng(0)
    rows = [[(int(rng.integers(N)), int(rng.integers(2))) for _ in range(size)] for size in (0, 3, 20, 20)]
    rows[3] = [(item, 1) for item, _ in rows[3]]
    sims = cosine(WORLD)
    sims[np.arange(40), np.arange(40)] = 0.0
    expected = np.zeros((4, 40))
    for row, window in enumerate(rows):
        liked = [item for item, click in reversed(window) if click][:10]
        for place, item in enumerate(liked):
            expected[row] += 0.9**place * sims[item]
    np.testing.assert_allclose(similar().scores(observed(rows)), expected, rtol=1e-4, atol=1e-6)
    assert not expected[0].any() and expected[3].any()


def test_who_liked_nothing_is_shown_what_is_good():
    found = similar().best(observed([[(3, 0), (4, 0)], []]), 6)
    good = np.sort(ItemTables.of_world(WORLD).quality[:40])[::-1][:6]
    quality = ItemTables.of_world(WORLD).quality[found]
    np.testing.assert_allclose(quality, np.tile(good, (2, 1)))


def test_what_may_not_be_shown_comes_last():
    allowed = torch.zeros(1, 40, dtype=torch.bool)
    allowed[0, 30:] = True
    found = similar().best(observed([[(1, 1)]]), 12, allowed)[0].tolist()
    assert set(found[:10]) == set(range(30, 40)) and len(set(found)) == 12


def test_a_click_counts_once_a_user():
    data = small_data()
    doubled = InteractionLog.sorted(*(np.tile(column, 2) for column in (LOG.users, LOG.items, LOG.clicks)))
    twice = replace(WORLD, data=replace(data, train=doubled))
    before, after = ItemTables.of_world(WORLD, 5), ItemTables.of_world(twice, 5)
    np.testing.assert_allclose(before.similarities, after.similarities, rtol=1e-6)
    np.testing.assert_array_equal(2 * before.exposures, after.exposures)
