"""Discrete SAC is right where the answer is known, and SAC4IR debiases clicks by exposure."""

from __future__ import annotations

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from helpers import small_world
from hierarchical import PARITY, K, differing, weights
from purifiers import WindowPurifier
from stable_baselines3.common.callbacks import CallbackList, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecMonitor

from dsrm import VecDSRM
from hrl_policies.common.item_agent import ItemNet
from hrl_policies.common.slates import SlateReplaySamples
from hrl_policies.controls import RandomSlates
from hrl_policies.hrl_ppo.rewards import FairSessions
from hrl_policies.sac4ir import SAC4IR, DiscreteSAC, SoftItemPolicy, policy_gradient, soft_values
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

N = 50
EVEN = small_world(0.8)


def sessions(n: int = 8, seed: int = 0, world=PARITY, **settings) -> KuaiFairVecEnv:
    given = {"action_mode": "slate", "slate_size": K} | settings
    return KuaiFairVecEnv(world, SessionConfig(**given), n, seed=seed)


def agent(env=None, cls=SAC4IR, **settings):
    given = {
        "learning_starts": 64,
        "batch_size": 32,
        "buffer_size": 4_000,
        "learning_rate": 3e-3,
        "tau": 0.02,
        "policy_kwargs": {"net_arch": [32]},
        "seed": 0,
    } | settings
    return cls("SoftItemPolicy", sessions() if env is None else env, device="cpu", **given)


# The mathematics ------------------------------------------------------------------------------------------------


def test_the_gradient_in_closed_form_is_that_of_automatic_differentiation():
    torch.manual_seed(0)
    logits = torch.randn(7, 30, requires_grad=True)
    values, alpha = torch.randn(7, 30), torch.tensor(0.3)
    logs = logits.log_softmax(dim=1)
    expected = -soft_values(logs, values, alpha).mean()
    expected.backward()
    gradient, loss = policy_gradient(logs.detach(), values, alpha)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(loss, expected.detach())


def test_the_soft_value_of_the_boltzmann_policy_is_the_log_sum():
    """``max_pi E[Q] + alpha H = alpha log sum exp(Q / alpha)``."""
    values, alpha = torch.randn(5, 20), torch.tensor(0.7)
    logs = (values / alpha).log_softmax(dim=1)
    torch.testing.assert_close(soft_values(logs, values, alpha), alpha * (values / alpha).logsumexp(dim=1))


class KnownMDP(gym.Env):
    """Three states that are seen as unit vectors, two actions; action 1 in state 2 may end the episode."""

    REWARDS = np.array([[0.0, 0.3], [0.5, -0.2], [0.1, 1.0]])
    CHANCES = np.array(
        [
            [[0.6, 0.4, 0.0], [0.0, 0.2, 0.8]],
            [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]],
            [[0.3, 0.3, 0.4], [0.2, 0.8, 0.0]],
        ]
    )
    ENDS = np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 0.5]])
    observation_space = spaces.Box(0.0, 1.0, (3,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(3))
        return self._seen(), {}

    def step(self, action):
        reward, over = self.REWARDS[self.state, action], self.ENDS[self.state, action]
        over = bool(self.np_random.random() < over)
        self.state = int(self.np_random.choice(3, p=self.CHANCES[self.state, action]))
        return self._seen(), float(reward), over, False, {}

    def _seen(self):
        return np.eye(3, dtype=np.float32)[self.state]

    @classmethod
    def soft_q(cls, gamma: float, alpha: float) -> np.ndarray:
        """Soft value iteration."""
        q = np.zeros((3, 2))
        for _ in range(500):
            v = alpha * np.logaddexp.reduce(q / alpha, axis=1)
            q = cls.REWARDS + gamma * (1 - cls.ENDS) * (cls.CHANCES @ v)
        return q


@pytest.mark.slow
def test_q_and_policy_are_those_of_soft_value_iteration():
    """Episodes are cut off every 7 steps, which must not count as an end."""
    gamma, alpha = 0.8, 0.5
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(KnownMDP(), 7), 8, seed=0)
    model = agent(
        env, DiscreteSAC, ent_coef=alpha, gamma=gamma, learning_starts=4_000, buffer_size=4_000, tau=0.05,
        batch_size=256, learning_rate=lambda left: 1e-2 * left + 1e-4,
    )  # fmt: skip
    model.learn(12_000)
    expected = KnownMDP.soft_q(gamma, alpha)
    states = torch.eye(3)
    with torch.no_grad():
        for critic in model.policy.critics:
            np.testing.assert_allclose(critic(states, model.policy.embeddings), expected, atol=0.06)
        chances = model.policy.actor(states, model.policy.embeddings).softmax(dim=1)
    boltzmann = torch.from_numpy(expected / alpha).softmax(dim=1)
    np.testing.assert_allclose(chances, boltzmann, atol=0.03)
    # Taking time limits for ends, or never ending, would be far off.
    assert abs(expected - KnownMDP.REWARDS).max() > 0.5


@pytest.mark.parametrize(("ratio", "rises"), [(0.99, True), (0.05, False)])
def test_alpha_rises_while_entropy_is_short_and_falls_while_it_is_not(ratio, rises):
    """The released code of SAC4IR has it the other way round."""
    model = agent(target_entropy_ratio=ratio, ent_coef="auto_0.5")
    peaked = torch.tensor(0.5 * math.log(N))
    for _ in range(5):
        model._update_ent_coef(peaked)
    assert (model.log_ent_coef.item() > math.log(0.5)) == rises


def test_alpha_stays_within_its_bounds():
    model = agent(ent_coef="auto_7.3", learning_rate=0.1)
    for entropy, bound in ((0.0, 2.0), (100.0, -10.0)):
        for _ in range(1_000):
            model._update_ent_coef(torch.tensor(entropy))
            if model.log_ent_coef.item() == bound:
                break
        assert model.log_ent_coef.item() == bound


@pytest.mark.parametrize("head", ["embedding", "linear"])
def test_scores_of_some_items_are_those_among_all(head):
    torch.manual_seed(0)
    net = ItemNet(8, (16, 12), N, 5, head)
    torch.nn.init.normal_(net.bias if head == "embedding" else net.rows.bias)
    states, units = torch.randn(9, 8), torch.randn(N, 5)
    items = torch.randint(N, (9, K))
    torch.testing.assert_close(
        net.score_items(states, units, items), net(states, units).gather(1, items), rtol=1e-5, atol=1e-5
    )


# Slates ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("head", "steps"), [("embedding", 6_000), ("linear", 3_000)])
def test_what_pays_is_learnt_and_random_slates_are_left_behind(head, steps):
    """The best slates of the world, and no others, hold odd items alone; random ones earn half of that."""
    model = agent(
        sessions(16), popularity_power=0.0, target_entropy_ratio=0.3, gamma=0.5, batch_size=64,
        policy_kwargs={"net_arch": [32], "head": head},
    )  # fmt: skip
    model.learn(steps)
    evaluated = evaluate(model, sessions(40, seed=1), PARITY.user_ids)
    chance = evaluate(RandomSlates(), sessions(40, seed=1), PARITY.user_ids)
    assert evaluated.engagement.reward_per_step > 0.9
    assert evaluated.engagement.cumulative_reward > chance.engagement.cumulative_reward + 3
    shown, _ = model.predict(sessions(20, seed=3).reset())
    assert (shown % 2 == 1).mean() > 0.7, "what it draws is good too"


def test_slots_are_credited_one_by_one():
    """An item that always shares its slate with clicked ones is known to be bad all the same."""
    model = agent(popularity_power=0.0)
    batch = samples(items=[[1, 2, 3, 4, 5, 6]], feedback=[[1, 0, 1, 0, 1, 0]])
    torch.testing.assert_close(model._slot_rewards(batch), batch.feedback)


def samples(items, feedback, extra: float = 0.0) -> SlateReplaySamples:
    items, feedback = torch.tensor(items), torch.tensor(feedback, dtype=torch.float32)
    states, none = torch.zeros(len(items), 8), torch.zeros(len(items), 1)
    rewards = feedback.mean(dim=1, keepdim=True) + extra
    return SlateReplaySamples(states, items, states, none, rewards, items, feedback, {})


@pytest.mark.parametrize("power", [0.25, 1.0])
def test_clicks_are_debiased_by_the_training_log_s_exposure(power):
    model = agent(popularity_power=power)
    items = [[0, 1, 2, 3, 4, 5], [10, 20, 30, 40, 48, 49]]
    feedback = [[1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]
    found = model._slot_rewards(samples(items, feedback, extra=-0.25))
    shown = np.bincount(PARITY.data.train.items, minlength=N)[np.array(items)]
    expected = shown**-power
    expected /= expected.mean()
    np.testing.assert_allclose(found, np.array(feedback) * expected - 0.25, rtol=1e-4, atol=1e-6)


def test_debiased_clicks_lead_away_from_popular_items():
    """All items are clicked alike, so plain clicks are indifferent and debiased ones want what was rarely shown."""
    exposures = np.bincount(EVEN.data.train.items, minlength=N)
    model = agent(sessions(16, world=EVEN), popularity_power=1.0, target_entropy_ratio=0.5, gamma=0.0, batch_size=64)
    model.learn(2_000)
    slates, _ = model.predict(sessions(40, seed=2, world=EVEN).reset(), deterministic=True)
    assert exposures[slates].mean() < 0.5 * exposures.mean()


def test_the_group_s_version_has_plain_clicks():
    model = agent(mode="kuaisim", popularity_power=0.0)
    batch = samples([[0, 1, 2, 3, 4, 5]], [[1, 0, 1, 1, 0, 0]])
    torch.testing.assert_close(model._slot_rewards(batch), batch.feedback)


def test_what_wrappers_add_to_the_reward_is_every_slot_s():
    model = agent(FairSessions(sessions(), 0.5), popularity_power=0.0).learn(200)
    batch = model.replay_buffer.sample(200)
    share = torch.from_numpy(PARITY.groups.popular)[batch.items].float().mean(dim=1, keepdim=True)
    expected = batch.feedback - 0.5 * (2 * share - 1).abs()
    torch.testing.assert_close(model._slot_rewards(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["vec", "single", "item", "purified", "history"])
def test_it_learns_in_every_form_of_the_environment(form):
    env = {
        "vec": lambda: sessions(),
        "single": lambda: KuaiFairEnv(PARITY, SessionConfig(action_mode="slate", slate_size=K)),
        "item": lambda: sessions(action_mode="item", slate_size=1),
        "purified": lambda: VecDSRM(sessions(), WindowPurifier()),
        "history": lambda: sessions(observation_mode="history"),
    }[form]()
    model = agent(env, batch_size=16)
    before = weights(model)
    model.learn(160)
    changed = differing(before, weights(model))
    assert {"actor.bias", "critics.0.bias", "critics.1.bias"} <= set(changed)
    assert "embeddings" not in changed and model.policy.head == "embedding"
    slates, _ = model.predict(model.env.reset())
    assert slates.shape == ((8,) if form == "item" else (1, K) if form == "single" else (8, K))


def test_no_item_is_shown_twice_in_a_slate():
    model = agent(ent_coef=1e-4).learn(400)
    items = model.replay_buffer.sample(400).items.sort(dim=1).values
    assert (items[:, 1:] > items[:, :-1]).all()


@pytest.mark.parametrize("form", ["vec", "single"])
def test_items_that_may_not_be_repeated_are_masked(form):
    """30 steps of one item out of 50: an agent that forgets the masks is refused by the environment."""
    settings = {"slate_size": 1, "repeats": "forbid", "leave": "never"}
    config = SessionConfig(action_mode="slate", **settings)
    env = sessions(**settings) if form == "vec" else KuaiFairEnv(PARITY, config)
    model = agent(env, ent_coef=1e-3, batch_size=16, learning_starts=32).learn(100)
    for deterministic in (True, False):
        evaluated = evaluate(model, sessions(20, **settings), PARITY.user_ids, deterministic=deterministic)
        assert (evaluated.sessions.coverage == 30 / 50).all()
    with pytest.raises(ValueError, match="3 observations for an agent bound to 20 sessions"):
        model.predict(np.zeros((3, 8), np.float32))
    seen = sessions(3, **settings).reset()
    only = np.zeros((3, N), np.bool_)
    only[:, 7] = True
    assert model.predict(seen, action_masks=only)[0].tolist() == [[7]] * 3
    with pytest.raises(ValueError, match="fewer than 1 items are allowed"):
        model.predict(seen, action_masks=np.zeros((3, N), np.bool_))
    with pytest.raises(ValueError, match="action masks hold 50 items"):
        model.predict(seen, action_masks=np.zeros((3, 7), np.bool_))


# Stable-Baselines3 ----------------------------------------------------------------------------------------------


def test_a_loaded_agent_is_the_saved_one_bit_by_bit(tmp_path):
    model = agent(popularity_power=0.5).learn(300)
    model.save(tmp_path / "model.zip")
    seen = sessions(12, seed=5).reset()
    expected, _ = model.predict(seen, deterministic=True)
    for env in (None, sessions()):
        loaded = SAC4IR.load(tmp_path / "model.zip", env=env, device="cpu")
        assert not differing(weights(model), weights(loaded))
        assert torch.equal(model.log_ent_coef, loaded.log_ent_coef) and loaded.log_ent_coef != 0
        assert torch.equal(model.weights, loaded.weights)
        np.testing.assert_array_equal(loaded.predict(seen, deterministic=True)[0], expected)
        assert loaded.num_timesteps == 304 and loaded._n_updates == model._n_updates
    loaded.replay_buffer = model.replay_buffer
    for each in (model, loaded):
        torch.manual_seed(3)
        each.set_logger(model.logger)
        each.train(3, 32)
    assert not differing(weights(model), weights(loaded)), "optimisers go on as they were"
    assert torch.equal(model.log_ent_coef, loaded.log_ent_coef)


def test_a_policy_alone_can_be_saved_and_loaded(tmp_path):
    model = agent().learn(200)
    model.policy.save(tmp_path / "policy.pt")
    loaded = SoftItemPolicy.load(tmp_path / "policy.pt", device="cpu")
    seen = sessions(12, seed=5).reset()
    np.testing.assert_array_equal(
        loaded.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
    )


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    same = [weights(agent(sessions(seed=seed), seed=seed).learn(200)) for seed in (1, 1, 2)]
    assert not differing(same[0], same[1])
    assert differing(same[0], same[2])


def test_callbacks_and_progress_bar_work(tmp_path):
    model = agent(VecMonitor(sessions()))
    evaluated = EvalCallback(VecMonitor(sessions(4, seed=9)), eval_freq=8, n_eval_episodes=4, verbose=0)
    kept = CheckpointCallback(8, str(tmp_path), name_prefix="sac")
    model.learn(256, CallbackList([evaluated, kept]), progress_bar=True)
    assert {path.name for path in tmp_path.iterdir()} == {f"sac_{steps}_steps.zip" for steps in (64, 128, 192, 256)}
    assert model.logger.name_to_value.keys() >= {"train/entropy", "train/ent_coef", "train/critic_loss"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "native"}, "mode must be one of"),
        ({"popularity_power": -1.0}, "popularity_power must not be negative"),
        ({"mode": "kuaisim", "popularity_power": 0.5}, "0 in mode='kuaisim'"),
        ({"target_entropy_ratio": 1.5}, r"target_entropy_ratio must lie in \(0, 1\]"),
        ({"huber_delta": 0.0}, "huber_delta must be positive"),
        ({"ent_coef": "learn"}, "ent_coef must be 'auto'"),
        ({"ent_coef": 0.0}, "ent_coef must be 'auto'"),
        ({"ent_coef": "auto_-1"}, "ent_coef must be 'auto'"),
        ({"batch_size": 0}, "batch_size and buffer_size must be at least 1"),
        ({"policy_kwargs": {"head": "attention"}}, "head must be one of"),
        ({"policy_kwargs": {"net_arch": []}}, "net_arch must name"),
    ],
)
def test_unknown_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent(**settings)


def test_environments_that_do_not_fit_are_refused():
    cart_pole = make_vec_env("CartPole-v1", 2)
    with pytest.raises(TypeError, match="use DiscreteSAC elsewhere"):
        agent(cart_pole)
    with pytest.raises(ValueError, match="needs item embeddings"):
        agent(cart_pole, DiscreteSAC, policy_kwargs={"head": "embedding"})
    with pytest.raises(ValueError, match="evaluate it with action_mode='slate'"):
        agent().bind(sessions(action_mode="embedding").batch)
    with pytest.raises(ValueError, match="need a state"):
        agent(make_vec_env("FrozenLake-v1", 2), DiscreteSAC)


def test_exposure_is_read_by_item_id():
    """A world over the same log whose candidates come in another order has the same weight for the same id."""
    data, order = PARITY.data, np.r_[np.arange(N)[::-1]]
    turned = replace(
        PARITY,
        data=data.arranged(order),
        embeddings=PARITY.embeddings[order],
        response=PARITY.response.rearranged(order),
        groups=replace(PARITY.groups, popular=PARITY.groups.popular[order]),
    )
    by_id = []
    for world in (PARITY, turned):
        model = agent(sessions(world=world), popularity_power=1.0)
        by_id.append(dict(zip(world.item_ids.tolist(), model.weights.tolist(), strict=True)))
    assert by_id[0] == by_id[1]
