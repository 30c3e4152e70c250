"""HierarchicalPPO's settings: defaults, presets, the paper's letter, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import small_world
from hierarchical import PARITY, SMALL, K, agent, batches, differing, roll, sessions, weights
from purifiers import WindowPurifier
from stable_baselines3.common.vec_env import VecMonitor

from dsrm import DSRMObservationWrapper, VecDSRM
from dsrm.click_scorer import ClickScorer
from hrl_policies import make_training_env
from hrl_policies.guard import GuardSettings
from hrl_policies.hrl_ppo import LITERAL, HierarchicalPPO, HierarchySettings, RankingSettings
from hrl_policies.hrl_ppo.rewards import ENGAGEMENT, MANAGER
from hrl_policies.zoo import load_settings
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig


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
        model.learn(25_000, reset_num_timesteps=False)
        changes.append(np.log(price(model) / start))
    # Single seeds fell by 12 % at least, others by a quarter.
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
