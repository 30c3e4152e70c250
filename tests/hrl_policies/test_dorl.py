"""DORL: its world model, its entropy table, its learned sessions, and that it asks nobody but the log."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import product

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logged_worlds import SilentResponse, logged_data, logged_pair
from purifiers import WindowPurifier
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from dsrm import DSRMObservationWrapper, VecDSRM
from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.common.yaml_files import validated
from hrl_policies.controls import RandomSlates
from hrl_policies.dorl import DORL, FeatureEntropy, PessimisticRewards, item_levels, learned_sessions, pessimistic
from hrl_policies.study import PurifierIdentity, load_policy, load_run, plan_run, resume, train
from hrl_policies.world_model import (
    MAX_VARIANCE,
    LearnedResponse,
    Prediction,
    WorldModel,
    WorldModelSettings,
    WorldModelSizes,
    fit_world_model,
)
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import FeatureTable, InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.evaluation import evaluate
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.sb3 import KuaiFairVecEnv

K = 6
# Odd items are clicked in 9 cases of 10, even ones in 1, by everybody.
TABLE = np.tile(0.1 + 0.8 * (np.arange(50) % 2), (40, 1))
SMALL = {"members": 3, "batch_size": 64, "max_epochs": 20}
ROUGH = SMALL | {"max_epochs": 2}
NEVER = SessionConfig(slate_size=K, leave="never", max_len=10)


def parity(response=None, **settings):
    return logged_pair(TABLE, response=response, **settings)


def sessions(pair, n=8, config=NEVER, seed=0):
    return KuaiFairVecEnv(pair.train, config, n, seed=seed)


def agent(env, **changes) -> DORL:
    given = {"seed": 0, "device": "cpu", "world_model": ROUGH, "policy_kwargs": {"log_std_init": -1.0}}
    return DORL("MlpPolicy", env, **{**given, "n_steps": 8} | changes)


def fitted(world, seed=0, **changes):
    chosen = WorldModelSettings(**{**SMALL, **changes})
    model = WorldModel(WorldModelSizes.of(world), chosen, seed)
    report = fit_world_model(model, world, chosen, seed)
    return LearnedResponse(model, world), report


def everything(response, world):
    users = np.arange(len(world.data.users))
    return response.predict(users, np.tile(np.arange(world.n_items), (len(users), 1)))


# World model ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_world_model_finds_the_click_probabilities_behind_a_log():
    """A user's level and two kinds of items, which users like in opposite ways: 4 probabilities for 60 x 30 pairs."""
    liked = (np.arange(60)[:, None] + np.arange(30)) % 2
    table = np.where(liked, 0.8, 0.2)
    world = logged_pair(table, rows_per_user=100).train
    response, report = fitted(world, batch_size=128, learning_rate=3e-3, patience=3)
    found = everything(response, world).mean[world.users]
    assert np.abs(found - table[world.users]).mean() < 0.1
    assert np.corrcoef(found.ravel(), table[world.users].ravel())[0, 1] > 0.95
    assert report["held_out_mean"] == pytest.approx(report["held_out_click_rate"], abs=0.05)
    assert report["held_out_auc"] > 0.75
    # The variance of a coin of .8 or .2 is .16; the largest of three estimates lies above it.
    assert 0.1 < everything(response, world).variance[world.users].mean() < 0.3


@pytest.mark.slow
def test_variance_is_larger_where_the_log_shows_nothing():
    """Clicks are nearly certain; the last ten items were never shown, so that anything may be true of them."""
    table = np.tile(np.where(np.arange(40) % 2, 0.98, 0.02), (60, 1))
    shown = np.arange(40) < 30
    world = logged_pair(table, shown=shown, rows_per_user=100, embeddings=np.eye(40, 8, dtype=np.float32)).train
    response, _ = fitted(world, batch_size=128, learning_rate=3e-3)
    variance = everything(response, world).variance[world.users]
    assert variance[:, ~shown].mean() > 1.3 * variance[:, shown].mean()
    assert (variance <= MAX_VARIANCE).all()


def test_features_and_tags_say_something_of_items_that_were_never_shown():
    rng = np.random.default_rng(0)
    value = rng.choice([-1.0, 1.0], size=60).astype(np.float32)
    table = np.tile(np.where(value > 0, 0.9, 0.1), (60, 1))
    shown = np.arange(60) < 50
    world = logged_pair(table, shown=shown, rows_per_user=100, embeddings=np.eye(60, 8, dtype=np.float32)).train
    described = replace(world.data.items, features=FeatureTable(value[:, None], ("value",)))
    world = replace(world, data=replace(world.data, items=described))
    found = everything(fitted(world, batch_size=128, learning_rate=3e-3)[0], world).mean[world.users]
    assert found[:, ~shown & (value > 0)].min() > found[:, ~shown & (value < 0)].max() + 0.3


def test_a_log_of_positives_needs_drawn_negatives_and_draws_pairs_it_does_not_hold():
    table = np.tile(np.where(np.arange(40) < 20, 0.9, 0.1), (30, 1))
    world = logged_pair(table, positives_only=True).train
    response, report = fitted(world, max_epochs=8)
    assert report["drawn_negatives"] > report["held_out_exposures"]
    found = everything(response, world).mean[world.users]
    assert found[:, :20].mean() > found[:, 20:].mean() + 0.1
    with pytest.raises(DataError, match="one kind of feedback"):
        fitted(world, negatives=0)
    assert fitted(parity().train, max_epochs=1)[1]["drawn_negatives"] == 0


@pytest.mark.slow
def test_drawn_negatives_lower_what_is_predicted_of_exposures():
    reports = [fitted(parity().train, negatives=negatives, max_epochs=6)[1] for negatives in (0, 5)]
    gaps = [abs(report["held_out_mean"] - report["held_out_click_rate"]) for report in reports]
    assert gaps[0] < 0.1 < gaps[1]


def test_the_world_model_is_a_response_model_and_prefers_no_form_of_the_question():
    world = parity().train
    response, _ = fitted(world, max_epochs=2)
    assert isinstance(response, ResponseModel)
    users, items = np.asarray([3, 30, 3]), np.asarray([[1, 7], [2, 2], [49, 0]])
    told = response.expected(users, items)
    assert told.shape == (3, 2) and told.dtype == np.float32 and ((told >= 0) & (told <= 1)).all()
    assert response.latest is not None and response.latest.mean is told
    catalogue = response.expected_catalogue(users, 50)
    np.testing.assert_allclose(np.take_along_axis(catalogue, items, 1), told, atol=1e-6)
    turned = response.rearranged(np.arange(50)[::-1])
    np.testing.assert_allclose(turned.expected(users, 49 - items), told, atol=1e-6)


def test_tables_give_what_the_members_would_have_given():
    world = parity(n_tags=3).train
    model = WorldModel(WorldModelSizes.of(world), WorldModelSettings(members=3, hidden=4), 1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    users, items = np.asarray([0, 5]), np.asarray([[4, 9], [9, 1]])
    found = LearnedResponse(model, world).predict(users, items)
    tags = torch.from_numpy(world.data.items.tags.astype(np.float32))
    for b, k in product(range(2), range(2)):
        user, item = int(users[b]), int(items[b, k])
        means, variances = [], []
        for m in range(3):
            own, other = model.users.ids[m, user], model.items.ids[m, item]
            described = tags[item] @ model.items.columns[m]
            mean = (own * other).sum() + (own * described).sum() + (other * described).sum()
            mean = mean + model.users.id_line[m, user, 0] + model.items.id_line[m, item, 0]
            mean = mean + (tags[item] @ model.items.column_line[m])[0]
            first = torch.cat([own, torch.zeros(8)]) @ model.users.layer[m]
            first = first + torch.cat([other, described]) @ model.items.layer[m] + model.first_bias[m, 0]
            second = torch.relu(torch.relu(first) @ model.second[m] + model.second_bias[m, 0])
            out = second @ model.last[m] + model.last_bias[m, 0]
            means.append(float((mean + out[0]).detach()))
            low, high = np.log(1e-3), np.log(MAX_VARIANCE)
            variances.append(float(np.exp(low + (high - low) / (1 + np.exp(-float(out[1].detach()))))))
        assert found.mean[b, k] == pytest.approx(np.clip(np.mean(means), 0, 1), abs=1e-5)
        assert found.variance[b, k] == pytest.approx(max(variances), rel=1e-4)


def test_a_log_that_is_too_small_is_refused():
    world = parity(rows_per_user=60).train
    first = np.flatnonzero(world.data.train.users == world.users[0])[:10]
    world = replace(world, data=replace(world.data, train=world.data.train.take(first)))
    with pytest.raises(DataError, match="at least 20 training-log rows of users with sessions, got 10"):
        fitted(world)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"members": 0}, "members must be greater than 0"),
        ({"held_out": 1.0}, "held_out must be less than 1"),
        ({"negatives": -1.0}, "negatives must be greater than or equal to 0"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
        ({"max_rows": 3}, "max_rows must be greater than or equal to 20"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        validated(WorldModelSettings, changes, "world_model")


# Entropy --------------------------------------------------------------------------------------------------------


def brute_entropies(log, members):
    """``{sorted tuple: normalised entropy}`` by the definition, with dictionaries."""
    tags = [np.flatnonzero(row).tolist() for row in members]
    followers = defaultdict(Counter)
    for user in np.unique(log.users):
        shown = log.items[log.users == user].tolist()
        for length in (1, 2):
            for end in range(length, len(shown)):
                for context in product(*(tags[item] for item in shown[end - length : end])):
                    for tag in tags[shown[end]]:
                        followers[tuple(sorted(context))][tag] += 1
    found = {}
    for context, counts in followers.items():
        shares = np.asarray(list(counts.values())) / sum(counts.values())
        found[context] = -(shares * np.log(shares)).sum() / np.log(len(shares)) if len(shares) > 1 else 0.0
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 40))
def test_entropies_are_those_of_a_count_by_hand(seed, n_levels, rows):
    rng = np.random.default_rng(seed)
    members = rng.random((7, n_levels)) < 0.4
    members[np.arange(7), rng.integers(n_levels, size=7)] = True
    log = InteractionLog.sorted(rng.integers(3, size=rows), rng.integers(7, size=rows), rng.random(rows) < 0.5)
    entropy = FeatureEntropy.of_log(log, members)
    known = brute_entropies(log, members)
    for level in range(n_levels):
        assert entropy.singles[level] == pytest.approx(known.get((level,), 1.0), abs=1e-6)
        for other in range(n_levels):
            context = tuple(sorted((level, other)))
            assert entropy.pairs[level, other] == pytest.approx(known.get(context, 1.0), abs=1e-6)
    previous, slates = rng.integers(-1, 7, size=4), rng.integers(7, size=(4, 3))
    found = entropy.of_slates(previous, slates)
    tags = [np.flatnonzero(row).tolist() for row in members]
    for b, k in product(range(4), range(3)):
        now, before = int(slates[b, k]), int(slates[b, k - 1] if k else previous[b])
        one = np.mean([known.get((tag,), 1.0) for tag in tags[now]])
        two = 1.0
        if before >= 0:
            pairs = product(tags[before], tags[now])
            two = np.mean([known.get(tuple(sorted(pair)), 1.0) for pair in pairs])
        assert found[b, k] == pytest.approx(one + two, abs=1e-5)


def test_a_log_is_counted_alike_in_blocks(monkeypatch):
    data = logged_data(TABLE, n_tags=5)
    levels = data.items.tags
    whole = FeatureEntropy.of_log(data.train, levels)
    monkeypatch.setattr("hrl_policies.dorl._ROWS_AT_ONCE", 37)
    parts = FeatureEntropy.of_log(data.train, levels)
    np.testing.assert_array_equal(whole.pairs, parts.pairs)
    np.testing.assert_array_equal(whole.singles, parts.singles)


def test_items_without_tags_are_counted_by_popularity_and_duration():
    world = parity(shown=1 / np.arange(1, 51)).train
    levels = item_levels(world)
    assert levels.shape == (50, 10)
    np.testing.assert_array_equal(levels.sum(1), 1)
    order = np.argsort(world.data.train.exposures(50), kind="stable")
    assert (np.diff(levels[order].argmax(1)) >= 0).all()
    seconds = FeatureTable(np.linspace(-1, 1, 50, dtype=np.float32)[:, None], ("log1p(video_duration)",))
    timed = replace(world, data=replace(world.data, items=replace(world.data.items, features=seconds)))
    assert 10 < item_levels(timed).shape[1] <= 40


def test_an_item_without_a_tag_among_tagged_ones_has_a_level_of_its_own():
    world = parity(n_tags=3).train
    tags = world.data.items.tags.copy()
    tags[7] = False
    world = replace(world, data=replace(world.data, items=replace(world.data.items, tags=tags)))
    members = item_levels(world)
    assert members.shape == (50, 4)
    assert np.flatnonzero(members[:, 3]).tolist() == [7]


# Learned sessions -----------------------------------------------------------------------------------------------


def test_the_reward_is_the_published_one_and_never_negative():
    mean = np.asarray([[0.5, 0.0], [1.0, 0.2]], np.float32)
    variance = np.asarray([[0.1, 1.0], [0.2, 0.3]], np.float32)
    bonus = np.asarray([[2.0, 0.0], [0.5, 1.0]], np.float32)
    found = pessimistic(Prediction(mean, variance), bonus, 0.4, 0.05)
    expected = (mean - 0.4 * variance + 0.05 * bonus + 0.4).mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert pessimistic(Prediction(mean, variance), 0 * bonus, 0.4, 0.0)[0] == pytest.approx(0.43)
    worst = Prediction(np.zeros((1, 2), np.float32), np.full((1, 2), MAX_VARIANCE, np.float32))
    assert pessimistic(worst, np.zeros((1, 2), np.float32), 0.4, 5.0)[0] == pytest.approx(0.0, abs=1e-7)


def learned(pair, config, exits="configured", env=None, **weights):
    response, _ = fitted(pair.train, max_epochs=3)
    entropy = FeatureEntropy.of_log(pair.train.data.train, item_levels(pair.train))
    given = {"uncertainty_weight": 0.3, "entropy_weight": 0.7} | weights
    env = sessions(pair, config=config) if env is None else env
    return learned_sessions(env, response, entropy, exits=exits, seed=4, **given), response, entropy


def test_learned_sessions_reward_what_the_model_says_of_users_and_items_at_hand():
    pair = parity(SilentResponse(TABLE), n_tags=4)
    env, response, entropy = learned(pair, SessionConfig(slate_size=K, max_len=6))
    assert env.observation_space == sessions(pair).observation_space
    assert env.action_space == sessions(pair).action_space
    env.reset()
    batch, rng = env.unwrapped.batch, np.random.default_rng(0)
    ended = 0
    for _ in range(12):
        users, previous = batch.simulator.users.copy(), batch.simulator.history(length=1).items[:, 0]
        _, reward, done, infos = env.step(rng.normal(size=(8, 8)).astype(np.float32))
        items = batch.outcome.items
        said = response.predict(users, items)
        expected = said.mean - 0.3 * said.variance + 0.7 * entropy.of_slates(previous, items) + 0.3
        np.testing.assert_allclose(reward, expected.mean(1), rtol=1e-5)
        for row in np.flatnonzero(done):
            ended += 1
            session = infos[row]["session"]
            assert 0 <= session["r_each"] <= 1 and session["user_id"] in pair.train.user_ids
    assert ended


def test_sessions_end_by_the_configured_rule_or_at_the_cap():
    pair = parity()
    config = SessionConfig(slate_size=K, max_len=12)
    lengths = {}
    for exits in ("configured", "none"):
        env, _, _ = learned(pair, config, exits)
        env.reset()
        found = []
        for _ in range(30):
            _, _, _, infos = env.step(np.ones((8, 8), np.float32))
            found += [info["session"]["len"] for info in infos if "session" in info]
        lengths[exits] = found
    assert set(lengths["none"]) == {12}
    assert max(lengths["configured"]) < 12


def test_rewards_of_a_true_world_are_refused():
    pair = parity()
    entropy = FeatureEntropy.of_log(pair.train.data.train, item_levels(pair.train))
    with pytest.raises(TypeError, match="learned response, got TableResponse"):
        PessimisticRewards(sessions(pair), entropy, 0.1, 0.1)


# The algorithm --------------------------------------------------------------------------------------------------


class Unplayed(KuaiFairVecEnv):
    """Sessions that must not be played."""

    def reset(self):
        raise AssertionError("the sessions were reset")

    def step_async(self, actions):
        raise AssertionError("the sessions were stepped")


def test_dorl_never_asks_the_response_model_and_never_plays_the_sessions_it_is_given():
    env = Unplayed(parity(SilentResponse(TABLE)).train, NEVER, 8, seed=0)
    model = agent(env).learn(256)
    assert model.num_timesteps == 256
    assert model.get_env() is env
    model.learn(128, reset_num_timesteps=False)
    assert model.num_timesteps == 384


@pytest.mark.slow
def test_dorl_finds_the_best_slates_of_a_world_it_was_never_in():
    pair = parity(SilentResponse(TABLE))
    model = agent(sessions(pair, 16), learning_rate=3e-3, n_steps=16, world_model=SMALL).learn(24_000)
    evaluated = parity().train
    found = evaluate(model, KuaiFairVecEnv(evaluated, NEVER, 24, seed=1)).engagement.reward_per_step
    slates = replace(NEVER, action_mode="slate")
    randomness = evaluate(RandomSlates(seed=0), KuaiFairVecEnv(evaluated, slates, 24, seed=1))
    assert randomness.engagement.reward_per_step < 0.55
    # All clicks of the best slates have probability .9; .85 leaves one even item in every third slate.
    assert found > 0.85


@pytest.mark.slow
def test_a_large_entropy_weight_spreads_what_is_shown():
    """Tag 0 is followed by tag 0 only, the others by anything: entropy asks for the others, clicks for tag 0."""
    rng = np.random.default_rng(0)
    table = np.tile(np.where(np.arange(40) % 4 == 0, 0.9, 0.3), (40, 1))
    world = logged_pair(table, n_tags=4).train
    users = np.repeat(np.arange(40), 60)
    starts = rng.random(40) < 0.5
    items = np.where(np.repeat(starts, 60), 4 * rng.integers(10, size=2400), rng.integers(40, size=2400))
    free = ~np.repeat(starts, 60) & (items % 4 == 0)
    items[free] += rng.integers(1, 4, size=int(free.sum()))
    log = InteractionLog.sorted(users, items, rng.random(2400) < table[users, items])
    world = replace(world, data=replace(world.data, train=log))
    shares = {}
    for weight in (0.0, 5.0):
        env = KuaiFairVecEnv(world, NEVER, 16, seed=0)
        model = agent(env, learning_rate=3e-3, n_steps=16, entropy_weight=weight, world_model=SMALL).learn(16_000)
        evaluated = KuaiFairVecEnv(world, NEVER, 24, seed=1)
        observation, shown = evaluated.reset(), []
        for _ in range(10):
            observation, *_ = evaluated.step(model.predict(observation, deterministic=True)[0])
            shown.append(evaluated.batch.outcome.items % 4 == 0)
        shares[weight] = np.mean(shown)
    assert shares[0.0] > 0.5 > 0.2 > shares[5.0]


def test_saving_keeps_policy_and_world_model(tmp_path):
    env = sessions(parity(SilentResponse(TABLE)))
    model = agent(env).learn(256)
    model.save(tmp_path / "model.zip")
    alone = DORL.load(tmp_path / "model.zip", device="cpu")
    seen = sessions(parity()).reset()
    np.testing.assert_array_equal(
        alone.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
    )
    assert alone.world_model_report == model.world_model_report
    for name, tensor in model.world_model.state_dict().items():
        assert torch.equal(tensor, alone.world_model.state_dict()[name]), name
    with pytest.raises(ValueError, match="no environment"):
        alone.learn(64)
    again = DORL.load(tmp_path / "model.zip", env=env, device="cpu")
    for each in (model, again):
        each.set_random_seed(3)
        each.learn(128, reset_num_timesteps=False)
    for one, other in zip(model.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_same_seed_gives_the_same_agent_and_another_does_not():
    agents = [agent(sessions(parity()), seed=seed).learn(128) for seed in (1, 1, 2)]
    for module in ("policy", "world_model"):
        states = [list(getattr(each, module).state_dict().values()) for each in agents]
        assert all(torch.equal(*pair) for pair in zip(states[0], states[1], strict=True))
        assert not all(torch.equal(*pair) for pair in zip(states[0], states[2], strict=True))


class Seen(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.widths: set[int] = set()
        self.purified = 0

    def _on_step(self) -> bool:
        self.widths.add(self.locals["new_obs"].shape[1])
        return True


def test_states_are_purified_as_in_the_sessions_given():
    pair = parity(SilentResponse(TABLE))
    purifier = WindowPurifier()
    seen = Seen()
    model = agent(VecMonitor(VecDSRM(sessions(pair), purifier))).learn(128, seen)
    assert seen.widths == {9} and purifier.rows >= 128
    evaluated = VecDSRM(KuaiFairVecEnv(parity().train, NEVER, 8, seed=1), purifier)
    assert len(evaluate(model, evaluated).sessions) == 24


def test_a_single_environment_of_gymnasium_will_do():
    model = agent(KuaiFairEnv(parity(SilentResponse(TABLE)).train, NEVER)).learn(32)
    assert model.num_timesteps == 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pair: VecNormalize(sessions(pair)), "cannot repeat VecNormalize"),
        (
            lambda pair: DummyVecEnv([lambda: DSRMObservationWrapper(KuaiFairEnv(pair.train), WindowPurifier())]),
            "cannot repeat DSRMObservationWrapper",
        ),
        (
            lambda pair: DummyVecEnv(
                [lambda: gym.wrappers.TransformReward(KuaiFairEnv(pair.train), lambda reward: 2 * reward)]
            ),
            "cannot repeat TransformReward",
        ),
        (lambda pair: gym.make("Pendulum-v1"), "needs KuaiFair sessions"),
    ],
    ids=["normalised", "purified one by one", "other rewards", "foreign"],
)
def test_environments_that_cannot_be_modelled_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        agent(make(parity()))


def test_the_test_world_is_never_learned_in():
    with pytest.raises(DataError, match="got the test world"):
        agent(KuaiFairVecEnv(parity().test, NEVER, 2, seed=0)).learn(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": "true"}, "exits must be one of"),
        ({"entropy_weight": -1.0}, "must not be negative, got 0.01 and -1.0"),
        ({"world_model": {"members": 0}}, "world_model: members must be greater than 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        agent(sessions(parity()), **changes)


# Runs -----------------------------------------------------------------------------------------------------------


def plan(**settings):
    changes = {"n_steps": 8, "world_model.batch_size": 64, "world_model.max_epochs": 2}
    given = {"total_steps": 512, "n_envs": 8, "session": SessionConfig(slate_size=K)} | settings
    return plan_run("dorl", "logged", overrides=changes | settings.pop("overrides", {}), **given)


def test_a_run_is_trained_without_the_training_world_and_judged_in_the_test_world(tmp_path):
    pair = parity()
    silent = replace(pair, train=replace(pair.train, response=SilentResponse(TABLE)))
    silent.train.__dict__["fingerprint"] = pair.train.fingerprint  # which asks users as well
    result = train(plan(), silent, output=tmp_path / "run")
    assert result.steps_done == 512 and result.curve
    np.testing.assert_array_equal(result.evaluation.sessions.user_ids, pair.test.user_ids)
    policy = load_policy(load_run(tmp_path / "run"), silent)
    assert bool(policy.world_model.fitted)
    seen = sessions(pair).reset()
    np.testing.assert_array_equal(
        policy.predict(seen, deterministic=True)[0], result.policy.predict(seen, deterministic=True)[0]
    )


def test_a_run_on_purified_states_is_judged_on_purified_states(tmp_path):
    save_purifier(IPSPurifier(), tmp_path / "p.safetensors")
    identity = PurifierIdentity.of_file(tmp_path / "p.safetensors")
    result = train(plan(purifier=identity), parity(), purifier=tmp_path / "p.safetensors")
    assert result.complete and isinstance(result.policy.get_env(), VecDSRM)


def test_a_resumed_run_goes_on_in_the_same_world_model(tmp_path, monkeypatch):
    from hrl_policies.study import training

    pair = parity()
    original = training.SessionCurveCallback._on_step

    def stop(monitor):
        monitor.stop_requested = monitor.num_timesteps >= 128
        return original(monitor)

    monkeypatch.setattr(training.SessionCurveCallback, "_on_step", stop)
    stopped = train(plan(), pair, output=tmp_path / "run")
    assert stopped.evaluation is None
    monkeypatch.setattr(training.SessionCurveCallback, "_on_step", original)
    monkeypatch.setattr("hrl_policies.dorl.fit_world_model", lambda *given: pytest.fail("it was fitted again"))
    result = resume(tmp_path / "run.partial", pair)
    assert result.complete and result.steps_done >= 512
    for name, tensor in stopped.policy.world_model.state_dict().items():
        assert torch.equal(tensor, result.policy.world_model.state_dict()[name]), name
