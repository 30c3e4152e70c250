"""HierarchicalPPO: it trains as an algorithm of Stable-Baselines3, and its two levels share nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hierarchical import (
    COMBINATIONS,
    IDS,
    PARITY,
    POPULAR,
    K,
    Listener,
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

from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.hrl_ppo.rewards import COST, ENGAGEMENT, MANAGER
from kuaifair_env import KuaiFairEnv
from kuaifair_env.abandonment import TemperFairness
from kuaifair_env.batch import SessionConfig


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
