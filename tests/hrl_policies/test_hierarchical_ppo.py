"""HierarchicalPPO: it behaves as an algorithm of Stable-Baselines3, and its two levels share nothing."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import small_world
from purifiers import WindowPurifier
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecMonitor

from dsrm import DSRMObservationWrapper, VecDSRM
from dsrm.click_scorer import ClickScorer
from hrl_policies import make_training_env
from hrl_policies.guard import GuardSettings
from hrl_policies.hrl_ppo import (
    LITERAL,
    HierarchicalPolicy,
    HierarchicalPPO,
    HierarchySettings,
    QuotaSlateDistribution,
    RankingSettings,
)
from hrl_policies.hrl_ppo.rewards import COST, ENGAGEMENT, MANAGER
from hrl_policies.zoo import load_settings
from kuaifair_env import KuaiFairEnv
from kuaifair_env.abandonment import TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

K = 6
# Odd items are always clicked, even ones never: rewards and clicks follow from the slate.
PARITY = small_world(np.tile((np.arange(50) % 2).astype(float), (40, 1)))
POPULAR = PARITY.groups.popular
FORMS = ("simplex", "paper", "her4if", "quota")
WORKERS = ("query", "strict", "her4if")
COMBINATIONS = [
    *({"weights": weights, "worker": worker} for weights, worker in itertools.product(FORMS, WORKERS)),
    *({"manager": "flat", "weights": weights} for weights in ("simplex", "paper")),
    {"manager": "constant", "weights": "quota", "constant": 3.0},
    {"memory": True, "weights": "quota", "candidates": 14},
    {"interval": 4},
]
IDS = ["-".join(map(str, combination.values())) for combination in COMBINATIONS]


def sessions(n: int = 8, seed: int = 0, world=PARITY, **settings):
    given = {"action_mode": "slate", "slate_size": K, "observation_mode": "history"} | settings
    return KuaiFairVecEnv(world, SessionConfig(**given), n, seed=seed)


PLAIN = {"weights": "simplex", "worker": "query", "memory": False}
SMALL = {"n_steps": 8, "batch_size": 32, "n_epochs": 2, "seed": 0, "target_kl": None, "device": "cpu"}


def agent(hierarchy=None, env=None, **settings) -> HierarchicalPPO:
    """A small agent whose levels have plain forms, but for what is given."""
    given = {**SMALL, "click_scorer": None, "slot_credit": 0.0, "learning_rate": 3e-4} | settings
    env = sessions() if env is None else env
    return HierarchicalPPO("HierarchicalPolicy", env, hierarchy=PLAIN | (hierarchy or {}), **given)


def trained(hierarchy=None, steps: int = 128, **settings) -> HierarchicalPPO:
    return agent(hierarchy, **settings).learn(steps)


class Listener(BaseCallback):
    """Notes what a rollout's steps said."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict] = []

    def _on_step(self) -> bool:
        self.steps.append(
            {
                "infos": [dict(info) for info in self.locals["infos"]],
                "slates": self.locals["slates"].copy(),
                "reward": self.training_env.unwrapped.batch.outcome.reward.copy(),
            }
        )
        return True


def roll(model: HierarchicalPPO, callback: BaseCallback | None = None):
    """Plays one rollout without learning from it."""
    _, wrapped = model._setup_learn(10_000, callback, reset_num_timesteps=False)
    wrapped.on_training_start({}, {})
    assert model.collect_rollouts(model.env, wrapped, model.rollout_buffer, model.n_steps)
    return model.rollout_buffer


def batches(model: HierarchicalPPO, size: int = 1000):
    return list(model.rollout_buffer.get(size, np.random.default_rng(0)))


def observations(n: int = 12, seed: int = 5, **settings):
    return sessions(n, seed, **settings).reset()


def weights(model, level: str = "policy"):
    module = model.policy if level == "policy" else getattr(model.policy, level)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(before, after):
    return sorted(name for name in before if not torch.equal(before[name], after[name]))


def same_optimiser(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys() and len(one["state"])
    for key, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name]), (key, name)


# Defaults -------------------------------------------------------------------------------------------------------


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


def test_the_defaults_of_the_class_are_the_zoo_s_dsrm_hrl():
    shipped = dict(load_settings("dsrm-hrl").hyperparameters)
    assert RankingSettings(**shipped.pop("hierarchy")) == RankingSettings()
    assert GuardSettings(**shipped.pop("guard")) == GuardSettings()
    taken = defaults(HierarchicalPPO.__init__)
    assert shipped == {name: taken[name] for name in shipped}


def test_the_defaults_of_the_policy_over_windows_are_the_zoo_s_hrl():
    assert HierarchySettings(**load_settings("hrl").hyperparameters["hierarchy"]) == HierarchySettings()
    policy = HierarchicalPPO("HierarchicalPolicy", sessions(), device="cpu").policy
    assert policy.hierarchy == HierarchySettings(weights="quota", worker="strict", memory=True)


def test_the_literal_preset_is_the_zoo_s_paper():
    shipped = load_settings("paper").hyperparameters
    model = HierarchicalPPO("HierarchicalPolicy", sessions(observation_mode="state"), **LITERAL, seed=1, device="cpu")
    assert model.policy.hierarchy == HierarchySettings(**shipped["hierarchy"])
    others = {name: value for name, value in shipped.items() if name not in ("hierarchy", "click_scorer")}
    assert others == {name: getattr(model, name) for name in others}
    assert shipped["click_scorer"] is None and (model.policy.table.prior == 0).all()
    changed = HierarchicalPPO("HierarchicalPolicy", sessions(), **(LITERAL | {"fair_coef": 0.5}), device="cpu")
    assert changed.fair_coef == 0.5


def literal(seed: int, **settings) -> HierarchicalPPO:
    """The paper's letter over one rollout of a world whose popular items are as similar to states as the others."""
    world = small_world(0.5, n_items=400, seed=seed)
    embeddings = np.random.default_rng(seed).normal(size=(400, 8)).astype(np.float32)
    env = sessions(64, seed, replace(world, embeddings=embeddings), slate_size=10, observation_mode="state")
    model = HierarchicalPPO("HierarchicalPolicy", env, **(LITERAL | settings), seed=seed, device="cpu")
    roll(model)
    return model


def level_gradients(model: HierarchicalPPO) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the gradients of the objectives of the manager's actor and of the worker over a rollout."""
    policy, (samples,) = model.policy, batches(model, 10_000)
    manager, _, _ = policy.evaluate_manager(samples.actions, samples.actions.decided)
    worker, _, _, _ = policy.evaluate_worker(samples.actions)
    objectives = (
        (manager, samples.advantages[:, MANAGER], policy.manager.actor.parameters()),
        (worker.sum(1), samples.advantages[:, ENGAGEMENT], [policy.worker.log_temperature]),
    )
    return tuple(
        torch.cat([part.flatten() for part in torch.autograd.grad((log_probs * model._normalized(a)).mean(), list(p))])
        for log_probs, a, p in objectives
    )


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_manager_of_the_paper_s_letter_starts_alive(seed):
    """What it tries shows in slates, and where fairness counts its gradient is towards a lower price of popularity."""
    model = literal(seed, fair_coef=10.0)
    (samples,) = batches(model, 10_000)
    shares = model.policy.table.popular[model.policy.table.place][samples.actions.slates].float().mean(1)
    w_acc, w_fair = torch.nn.functional.softplus(samples.actions.manager_actions).T
    price = w_fair / w_acc
    cheap, dear = shares[price < price.quantile(0.25)].mean(), shares[price > price.quantile(0.75)].mean()
    assert cheap > 2 * dear > 0
    manager, worker = level_gradients(model)
    assert manager.norm() > 0.5 * worker.norm()
    # The last of the actor's parameters is the bias of x_fair: fewer than half of the items shown are popular.
    assert shares.mean() < 0.4 and manager[-1] < 0


@pytest.mark.slow
def test_the_paper_s_letter_learns_what_popularity_should_cost_in_the_toy_s_training_world():
    """Long-tail items fill four fifths of its first slates; it learns to charge less for popular ones."""

    def price(model: HierarchicalPPO) -> float:
        w_acc, w_fair = torch.nn.functional.softplus(model.rollout_buffer.manager_actions()).T
        return float((w_fair / w_acc).mean())

    changes = []
    for seed in range(3):
        env = make_training_env("hrl", "KuaiFair-Toy-v0", n_envs=64, seed=seed)
        model = HierarchicalPPO("HierarchicalPolicy", env, **LITERAL, seed=seed, device="cpu")
        model.learn(64 * model.n_steps)
        start = price(model)
        model.learn(40_000, reset_num_timesteps=False)
        changes.append(np.log(price(model) / start))
    # Single seeds fell by 9 % at least, others by a quarter.
    assert max(changes) < 0
    assert np.mean(changes) < np.log(0.93)


def test_the_click_scorer_is_fitted_to_the_training_log_once(tmp_path, monkeypatch):
    model = HierarchicalPPO("HierarchicalPolicy", sessions(), **SMALL)
    table = model.policy.table
    np.testing.assert_allclose(table.prior[table.place], ClickScorer.fit(PARITY).item_scores, rtol=1e-6)
    model.save(tmp_path / "model.zip")
    monkeypatch.setattr(ClickScorer, "fit", lambda world: pytest.fail("a loaded agent fits nothing"))
    for env in (None, sessions()):
        loaded = HierarchicalPPO.load(tmp_path / "model.zip", env=env, device="cpu")
        assert not differing(weights(model, "table"), weights(loaded, "table"))


def test_an_agent_says_whether_its_states_are_purified(tmp_path, capsys):
    single = DSRMObservationWrapper(
        KuaiFairEnv(PARITY, SessionConfig(action_mode="slate", slate_size=K, observation_mode="history")),
        WindowPurifier(),
    )
    for env, name in (
        (sessions(), "HRL"),
        (VecDSRM(sessions(), WindowPurifier()), "DSRM-HRL"),
        (VecMonitor(VecDSRM(sessions(), WindowPurifier())), "DSRM-HRL"),
        (single, "DSRM-HRL"),
    ):
        model = HierarchicalPPO("HierarchicalPolicy", env, verbose=1, **SMALL)
        assert repr(model).startswith(f"HierarchicalPPO({name}, manager='learned', weights='quota'")
        printed = capsys.readouterr().out
        assert repr(model) in printed and ("not purified" in printed) == (name == "HRL")
    model.save(tmp_path / "model.zip")
    assert HierarchicalPPO.load(tmp_path / "model.zip").method == "DSRM-HRL"


# Stable-Baselines3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hierarchy", COMBINATIONS, ids=IDS)
def test_every_form_trains_both_levels(hierarchy):
    model = agent(hierarchy)
    before = {level: weights(model, level) for level in ("manager", "worker")}
    model.learn(2 * 8 * 8)
    assert model.num_timesteps == 128 and model._n_updates == 4
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())
    learns = model.policy.hierarchy.manager == "learned"
    changed = differing(before["manager"], weights(model, "manager"))
    assert any("actor" in name for name in changed) == any("critic" in name for name in changed) == learns
    changed = differing(before["worker"], weights(model, "worker"))
    assert {"log_temperature", "critic.0.weight"} <= set(changed)
    if model.policy.hierarchy.worker != "strict":
        assert any(name.startswith("query") for name in changed)
    slates, _ = model.predict(observations(), deterministic=True)
    assert slates.shape == (12, K) and all(len(set(slate)) == K for slate in slates.tolist())


@pytest.mark.parametrize("fair", ["slate_ad", "ema_group", "ema_gini", "decile_gini", "policy_entropy"])
def test_every_fairness_form_trains_and_reaches_the_manager_only(fair):
    model = trained(fair=fair, fair_coef=2.0)
    rewards = model.rollout_buffer.rewards
    assert np.isfinite(rewards).all()
    assert (rewards[..., MANAGER] != rewards[..., ENGAGEMENT]).any()
    clicks = rewards[..., ENGAGEMENT] * K
    np.testing.assert_allclose(clicks, clicks.round(), atol=1e-5)


@pytest.mark.parametrize("constraint", ["none", "lagrange"])
@pytest.mark.parametrize("ratio", ["per_slot", "slate", "mean"])
def test_every_ratio_trains_with_and_without_the_constraint(ratio, constraint):
    model = agent(ratio=ratio, constraint=constraint)
    before = weights(model, "worker")
    model.learn(128)
    changed = differing(before, weights(model, "worker"))
    assert "query.4.weight" in changed
    assert ("cost_critic.0.weight" in changed) == (constraint == "lagrange")


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


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    same = [weights(trained({"memory": True}, seed=seed, env=sessions(seed=seed))) for seed in (1, 1, 2)]
    assert not differing(same[0], same[1])
    assert differing(same[0], same[2])


def test_set_parameters_takes_over_both_levels():
    model, other = trained(seed=1), agent(seed=2)
    other.set_parameters(model.get_parameters())
    assert not differing(weights(model), weights(other))
    same_optimiser(model.policy.manager_optimizer, other.policy.manager_optimizer)


def test_callbacks_monitor_and_progress_bar_work(tmp_path):
    model = agent(env=VecMonitor(sessions(), str(tmp_path / "monitor.csv")))
    evaluated = EvalCallback(
        VecMonitor(sessions(4, seed=9)),
        best_model_save_path=str(tmp_path / "best"),
        log_path=str(tmp_path / "log"),
        eval_freq=8,
        n_eval_episodes=6,
        verbose=0,
    )
    kept = CheckpointCallback(8, str(tmp_path / "kept"), name_prefix="hrl")
    model.learn(256, CallbackList([evaluated, kept]), progress_bar=True)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        f"hrl_{steps}_steps.zip" for steps in (128, 192, 256, 64)
    ]
    assert np.load(tmp_path / "log/evaluations.npz")["timesteps"].tolist() == [64, 128, 192, 256]
    best = HierarchicalPPO.load(tmp_path / "best/best_model.zip")
    assert best.predict(observations(), deterministic=True)[0].shape == (12, K)
    episodes = list(model.ep_info_buffer)
    assert episodes and all(0 < episode["l"] <= 30 for episode in episodes)
    assert len((tmp_path / "monitor.csv").read_text().splitlines()) - 2 >= len(episodes)


def test_callbacks_end_training():
    model = agent(env=VecMonitor(sessions()))
    evaluate = EvalCallback(
        VecMonitor(sessions(4, seed=9)),
        StopTrainingOnRewardThreshold(-1.0, verbose=0),
        eval_freq=4,
        n_eval_episodes=2,
        verbose=0,
    )
    model.learn(100_000, evaluate)
    assert model.num_timesteps == 4 * 8
    model.learn(100_000, StopTrainingOnMaxEpisodes(2), reset_num_timesteps=False)
    assert model.num_timesteps < 2_000


class Record(KVWriter):
    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def write(self, key_values, key_excluded, step=0):
        for name, value in key_values.items():
            if "tensorboard" not in (key_excluded[name] or ()):
                self.values.setdefault(name, []).append(value)

    def close(self) -> None:
        pass


LEVEL_SCALARS = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance")


@pytest.mark.parametrize(
    ("hierarchy", "own"),
    [
        (
            {"weights": "paper"},
            ["omega_acc_mean", "omega_acc_std", "omega_fair_mean", "omega_fair_std"],
        ),
        ({"weights": "quota", "memory": True}, ["popular_count_mean", "memory_click", "memory_skip"]),
    ],
    ids=["paper", "quota"],
)
def test_both_levels_tell_tensorboard_how_they_fare(hierarchy, own):
    model, record = agent(hierarchy, constraint="lagrange", env=VecMonitor(sessions())), Record()
    model.set_logger(Logger(None, [record]))
    model.learn(4 * 64)
    wanted = {f"train/{level}_{name}" for level in ("worker", "manager") for name in LEVEL_SCALARS}
    wanted |= {f"train/{name}" for name in (*own, "violation_rate", "lagrange_multiplier", "temperature")}
    wanted |= {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps"}
    assert wanted <= set(record.values)
    for name in wanted:
        assert len(record.values[name]) >= 2 and np.isfinite(record.values[name]).all(), name
    violations = model.rollout_buffer.rewards[..., COST].mean()
    assert model.logger.name_to_value["train/violation_rate"] == pytest.approx(violations)


def test_a_single_environment_of_gymnasium_will_do():
    config = SessionConfig(action_mode="slate", slate_size=K)
    model = agent(env=KuaiFairEnv(PARITY, config), n_steps=40).learn(40)
    single = KuaiFairEnv(PARITY, config)
    seen, _ = single.reset(seed=3)
    slate, state = model.predict(seen, deterministic=True)
    assert slate.shape == (K,) and state is None
    single.step(slate)


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


def test_learning_rates_of_both_levels_follow_schedules_of_their_own():
    model = agent(learning_rate=1e-3, manager_learning_rate=LinearSchedule(1e-2, 0.0, 1.0))
    for optimiser, rate in ((model.policy.worker_optimizer, 1e-3), (model.policy.manager_optimizer, 1e-2)):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(rate)
    model.learn(4 * 64, StopAfter(2))
    assert model.policy.worker_optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.policy.manager_optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


class StopAfter(BaseCallback):
    """Ends training after some rollouts were learnt from."""

    def __init__(self, rollouts: int) -> None:
        super().__init__()
        self.rollouts = rollouts

    def _on_step(self) -> bool:
        return self.num_timesteps <= self.rollouts * self.model.n_steps * self.model.n_envs


def test_a_level_that_moved_too_far_stops_alone():
    """The worker's huge steps end its epochs at once; the manager's tiny ones never do."""
    model = agent(learning_rate=0.1, manager_learning_rate=1e-7, target_kl=1e-6, n_epochs=5).learn(64)
    steps = {
        name: int(optimiser.state_dict()["state"][0]["step"])
        for name, optimiser in (
            ("worker", model.policy.worker_optimizer),
            ("manager", model.policy.manager_optimizer),
        )
    }
    assert steps == {"worker": 1, "manager": 10}


# Two levels -----------------------------------------------------------------------------------------------------


def test_nothing_trainable_is_shared():
    for hierarchy in COMBINATIONS:
        policy = agent(hierarchy).policy
        levels = {
            name: {id(parameter) for parameter in module.parameters()}
            for name, module in (("manager", policy.manager), ("worker", policy.worker))
        }
        assert not levels["manager"] & levels["worker"]
        assert levels["manager"] | levels["worker"] == {id(p) for p in policy.parameters()}
        for name, optimiser in (("manager", policy.manager_optimizer), ("worker", policy.worker_optimizer)):
            steered = [id(p) for group in optimiser.param_groups for p in group["params"]]
            assert Counter(steered) == Counter(levels[name])


@pytest.mark.parametrize("hierarchy", COMBINATIONS, ids=IDS)
def test_no_gradient_of_one_level_enters_the_other(hierarchy):
    model = trained(hierarchy, constraint="lagrange")
    roll(model)
    batch = batches(model)[0]
    updates = {"worker": model._update_worker, "manager": model._update_manager}
    for level, other in (("worker", "manager"), ("manager", "worker")):
        model.policy.zero_grad(set_to_none=True)
        before = {name: weights(model, name) for name in updates}
        updates[level](batch, {})
        assert not differing(before[other], weights(model, other))
        assert differing(before[level], weights(model, level))
        assert all(parameter.grad is None for parameter in getattr(model.policy, other).parameters())
        assert any(parameter.grad is not None for parameter in getattr(model.policy, level).parameters())
    assert not differing(weights(agent(hierarchy), "table"), weights(model, "table"))


@pytest.mark.parametrize("hierarchy", COMBINATIONS, ids=IDS)
def test_right_after_a_rollout_all_ratios_are_one(hierarchy):
    model = trained(hierarchy)
    rollout = roll(model)
    for batch in batches(model, 100):
        actions = batch.actions
        logs, _, values, cost = model.policy.evaluate_worker(actions)
        np.testing.assert_allclose((logs - actions.worker_log_probs).detach().exp(), 1, atol=1e-5)
        assert logs.shape == (len(actions.slots), K) and (logs < 1e-6).all()
        if model.policy.manager_learns:
            rows = actions.decided
            found, _, _ = model.policy.evaluate_manager(actions, rows)
            np.testing.assert_allclose((found - actions.manager_log_probs[rows]).detach().exp(), 1, atol=1e-5)
        np.testing.assert_allclose(batch.advantages.isfinite(), True)
    stored = batch.returns - batch.advantages
    np.testing.assert_allclose(values.detach(), stored[:, ENGAGEMENT], atol=1e-4)
    np.testing.assert_allclose(cost.detach(), stored[:, COST], atol=1e-4)
    found = model.policy.manager.value(actions.manager_features).detach()
    np.testing.assert_allclose(found, stored[:, MANAGER], atol=1e-4)
    assert rollout.full


def shown(model):
    """The slates of the last rollout, as the environment's items, ``(T, B, K)``."""
    rollout, table = model.rollout_buffer, model.policy.table
    actions = rollout._flat_actions
    places = actions.candidates.gather(1, actions.slots)
    return table.order[places].numpy().reshape(rollout.buffer_size, rollout.n_envs, -1)


@pytest.mark.parametrize("credit", [0.0, 1.0])
@pytest.mark.parametrize("manager", ["learned", "flat"])
def test_each_level_earns_its_own_reward(manager, credit):
    model = agent({"manager": manager}, fair_coef=0.7, slot_credit=credit, n_steps=40)
    listener = Listener()
    rollout = roll(model, listener)
    slates = shown(model)
    np.testing.assert_array_equal(slates, [step["slates"] for step in listener.steps])
    clicks = slates % 2
    share = POPULAR[slates].mean(axis=2)
    disparity = np.abs(2 * share - 1)
    engagement = clicks.mean(axis=2)
    shaped = engagement - 0.7 * disparity
    own = shaped if manager == "flat" else engagement
    np.testing.assert_allclose(rollout.rewards[..., MANAGER], shaped, atol=1e-6)
    np.testing.assert_allclose(rollout.rewards[..., ENGAGEMENT], own, atol=1e-6)
    np.testing.assert_array_equal(rollout.rewards[..., COST], disparity >= 0.3)
    assert rollout.dones.any()
    if credit:
        np.testing.assert_allclose(rollout.slot_credit, clicks - engagement[..., None], atol=1e-6)
    else:
        assert rollout.slot_credit.size == 0


def test_only_sessions_that_were_cut_off_go_on_with_a_value():
    """With patience for ever the cap ends sessions; with the default users leave."""
    for leave, cut in ((TemperFairness(initial_temper=1e6), True), (TemperFairness(), False)):
        model = trained(env=sessions(leave=leave, max_len=5), n_steps=12)
        listener = Listener()
        rollout = roll(model, listener)
        assert rollout.dones.any()
        for step, row in np.argwhere(rollout.dones):
            info = listener.steps[step]["infos"][row]
            assert info["TimeLimit.truncated"] == cut
            last = {name: part[None] for name, part in info["terminal_observation"].items()}
            # The slate of the last step is in the window of what it led to.
            np.testing.assert_array_equal(last["history_items"][0, -K:], listener.steps[step]["slates"][row] + 1)
            expected = model.policy.predict_values(last).detach().numpy()[0] if cut else np.zeros(3)
            np.testing.assert_allclose(rollout.final_values[step, row], expected, rtol=1e-4, atol=1e-5)
        assert (rollout.final_values[~rollout.dones] == 0).all()


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


def test_the_multiplier_rises_while_every_slate_violates_and_falls_to_nothing_when_none_does():
    settings = {
        "constraint": "lagrange",
        "multiplier_rate": 0.4,
        "start_multiplier": 0.1,
        "cost_limit": 0.05,
    }
    ends = {}
    for count in (0, 3, 6):
        model = agent({"manager": "constant", "weights": "quota", "constant": float(count)}, **settings)
        path = []
        for _ in range(3):
            model.learn(64 * 2 if count == 3 else 64, reset_num_timesteps=False)
            path.append(float(model.multiplier))
        ends[count] = path
    np.testing.assert_allclose(ends[0], 0.1 + 0.4 * 0.95 * np.arange(1, 4), rtol=1e-5)
    np.testing.assert_allclose(ends[6], ends[0], rtol=1e-6)
    # Two rollouts of -.05 * .4 each.
    np.testing.assert_allclose(ends[3], [0.06, 0.02, 0.0], atol=1e-6)


@pytest.mark.slow
def test_the_constraint_keeps_the_worker_from_violating():
    """Odd items pay, yet slates beyond the bound cost: with a heavy price the worker shows balanced slates."""
    popular = np.arange(50) % 2 == 1
    world = replace(PARITY, groups=replace(PARITY.groups, popular=popular))
    rates = {}
    for constraint in ("none", "lagrange"):
        model = agent(
            {"manager": "constant", "constant": 0.0, "worker": "her4if", "start_temperature": 1.0},
            env=sessions(16, world=world, leave=TemperFairness(unfair_penalty=0.0)),
            constraint=constraint,
            start_multiplier=100.0,
            n_steps=16,
            batch_size=64,
            n_epochs=2,
            learning_rate=2e-2,
            gamma=0.0,
        )
        model.learn(256 * 16)
        rates[constraint] = model.logger.name_to_value["train/violation_rate"]
    assert rates["lagrange"] < rates["none"] - 0.2


# Decisions that hold for several steps --------------------------------------------------------------------------


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
    results = [evaluate(model, sessions(n), PARITY.user_ids) for n in (3, 40)]
    np.testing.assert_array_equal(results[0].sessions.return_, results[1].sessions.return_)


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": "token"}, "ratio must be one of"),
        ({"constraint": "pid"}, "constraint must be one of"),
        ({"fair": "fairest"}, "fair must be one of"),
        ({"hierarchy": {"weights": "softmax"}}, "hierarchy: weights must be 'simplex'"),
        ({"hierarchy": {"temprature": 1}}, "hierarchy: temprature is unknown; there are candidates"),
        ({"click_scorer": "log"}, "click_scorer must be a ClickScorer, 'fit' or None, got 'log'"),
        ({"slot_credit": 1.0, "ratio": "slate"}, "slot_credit needs ratio='per_slot'"),
        ({"n_epochs": 0}, "at least 1"),
        ({"policy_kwargs": {"use_sde": True}}, "state-dependent exploration"),
    ],
)
def test_unknown_names_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent(**settings)


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="action_mode='slate'"):
        agent(env=sessions(action_mode="embedding"))
    with pytest.raises(ValueError, match="action_mode='slate'"):
        agent(env=sessions(action_mode="item", slate_size=1))
    with pytest.raises(ValueError, match="observation_mode='history'"):
        agent({"memory": True}, env=sessions(observation_mode="state"))
    with pytest.raises(TypeError, match="has no world"):
        agent(env=gym.make("CartPole-v1"))


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
