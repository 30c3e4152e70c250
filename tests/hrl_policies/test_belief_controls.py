"""Controls that rank by a belief: what they learn, from what, and what they keep."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_world

from dsrm.belief import BeliefScales
from dsrm.click_scorer import ClickScorer
from hrl_policies.belief_controls import BeliefQuota, ItemQuota
from hrl_policies.controls import QuotaGreedy
from kuaifair_env import LearnsWhileServing, ServedStep, SessionConfig, evaluate, serve
from kuaifair_env.agent_view import sessions_for_agents
from kuaifair_env.batch import SessionBatch
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

CONFIG = SessionConfig(max_len=8, slate_size=4, action_mode="slate")


@pytest.fixture(scope="module")
def world() -> World:
    """Users love every third item, which the log does not tell; half of them the other way round in one half of it."""
    appeal = np.where(np.arange(50) % 3 == 1, 0.85, 0.1)
    table = np.tile(appeal, (40, 1))
    table[::2, :25] = appeal[:25][::-1]
    return small_world(table)


@pytest.fixture(scope="module")
def scorer(world: World) -> ClickScorer:
    return ClickScorer.fit(world)


def vec_env(world: World, n_envs: int = 10, config: SessionConfig = CONFIG) -> KuaiFairVecEnv:
    return KuaiFairVecEnv(world, config, n_envs, seed=0)


def mean_return(result: Any) -> float:
    return float(result.sessions.return_.mean())


class Sessions:
    """Sessions in which a control shows what it likes; others may look on."""

    def __init__(self, world: World, n_sessions: int = 6, config: SessionConfig = CONFIG) -> None:
        self.batch = SessionBatch(world, config, n_sessions)
        self.batch.reset(np.arange(n_sessions))
        self.shown = sessions_for_agents(self.batch)

    def step(self, control: BeliefQuota, *others: BeliefQuota, explore: bool = True, learn: bool = True) -> np.ndarray:
        users, steps = self.batch.simulator.users.copy(), self.batch.simulator.steps.copy()
        slates, *other_slates = (
            one.predict(self.batch.observe(), deterministic=not explore)[0] for one in (control, *others)
        )
        for slate in other_slates:
            np.testing.assert_array_equal(slate, slates)
        outcome = self.batch.step(slates)
        live = np.ones(len(slates), np.bool_)
        step = ServedStep(
            users, outcome.items, outcome.clicks, outcome.feedback, steps, outcome.done, live, self.batch.blocks
        )
        for one in (control, *others) if learn else ():
            one.learn(step)
        if len(self.batch.finished):
            self.batch.reset(self.batch.finished)
        return slates


def logits(control: BeliefQuota, batch: SessionBatch) -> torch.Tensor:
    control.predict(batch.observe(), deterministic=True)
    return control._evidence.beliefs.logits(converged=True)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", ["allow", "forbid"])
def test_the_session_is_worth_something_and_serving_more(world, scorer, repeats):
    env = vec_env(world, 40, replace(CONFIG, repeats=repeats))
    greedy, frozen, served, items = [], [], [], []
    for seed in range(2):
        greedy.append(mean_return(evaluate(QuotaGreedy(scorer), env, episodes_per_user=2, seed=seed)))
        frozen.append(mean_return(evaluate(BeliefQuota(scorer), env, episodes_per_user=2, seed=seed)))
        for of_kind, kind in ((served, BeliefQuota), (items, ItemQuota)):
            control = kind(scorer, seed=seed)
            assert isinstance(control, LearnsWhileServing)
            serve(control, env, world.user_ids, 240, seed=seed, evaluate_others=False)
            of_kind.append(mean_return(evaluate(control, env, episodes_per_user=2, seed=seed)))
    if repeats == "allow":  # these embeddings say nothing of items not shown yet
        assert np.mean(frozen) > np.mean(greedy) + 0.1
    assert np.mean(items) > np.mean(greedy) + 0.3
    assert np.mean(served) > np.mean(frozen) + 0.3


def test_evaluation_learns_nothing_that_stays(world, scorer):
    control = BeliefQuota(scorer)
    one, two = (evaluate(control, vec_env(world, n_envs)).sessions for n_envs in (10, 10))
    assert np.array_equal(one.return_, two.return_)
    assert control.belief.sessions == 0
    assert (control.belief.shared.mean == 0).all()
    assert control.belief.scales == BeliefScales()


@pytest.mark.slow
def test_results_do_not_depend_on_how_many_sessions_run_at_a_time(world, scorer):
    means = [mean_return(evaluate(BeliefQuota(scorer), vec_env(world, size), episodes_per_user=3)) for size in (3, 40)]
    assert means[0] == pytest.approx(means[1], abs=0.1)


def test_a_session_taken_up_in_the_middle_is_read_from_its_window(world, scorer):
    sessions = Sessions(world, config=SessionConfig(max_len=30, slate_size=4, action_mode="slate", leave="never"))
    early, late = BeliefQuota(scorer), BeliefQuota(scorer)
    early.bind(sessions.shown)
    for _ in range(12):  # more than the places of the log context
        sessions.step(early, learn=False)
    late.bind(sessions.shown)
    assert torch.allclose(logits(early, sessions.shown), logits(late, sessions.shown), atol=2e-3)


def test_what_was_learned_of_all_users_starts_anew_with_each_block(scorer, world, tmp_path):
    scales = Randomisation(min_block=9, max_block=9)
    sessions = Sessions(randomised(replace(world, split="train"), scales), n_sessions=6)
    control = BeliefQuota(scorer)
    control.bind(sessions.shown)
    shared, blocks = control.belief.shared, sessions.batch.blocks
    while blocks.max() == 0:
        sessions.step(control)
    assert shared.weights.sum() > 0
    sessions.step(control)
    assert (shared.weights == 0).all() and (shared.mean == 0).all(), "the first step of the block is not learned from"
    before = blocks.copy()
    sessions.step(control)
    shown = sessions.batch.outcome.items
    seen = torch.nonzero(shared.weights)[:, 0].tolist()
    assert 0 < (before == 1).sum() < 6 and set(seen) == set(shown[before == 1].ravel().tolist())
    control.save_served(tmp_path / "belief")
    again = BeliefQuota(scorer)
    again.bind(sessions.shown)
    again.load_served(tmp_path / "belief")
    sessions.step(control, again)
    assert torch.equal(again.belief.shared.weights, shared.weights)


def test_another_evaluation_in_between_changes_nothing_that_follows(world, scorer):
    sessions = Sessions(world)
    control = BeliefQuota(scorer)
    control.bind(sessions.shown)
    for _ in range(3):
        sessions.step(control)
    before = logits(control, sessions.shown)
    evaluate(control, vec_env(world))
    control.bind(sessions.shown)
    assert torch.allclose(before, logits(control, sessions.shown), atol=2e-3)


def test_what_the_platform_showed_before_the_session_counts_only_through_the_state(world, scorer):
    window = world.initial_history
    skipped = np.where(window.clicks, window.items, np.roll(window.items, 1, axis=0)).astype(np.int32)
    other = replace(world, initial_history=HistoryWindow(skipped, window.clicks))
    one, two = BeliefQuota(scorer), BeliefQuota(scorer)
    with_skips, without = Sessions(world), Sessions(other)
    for control, sessions in ((one, with_skips), (two, without)):
        control.bind(sessions.shown)
        assert not control._evidence.beliefs.own.variances(torch.zeros(6, 1, dtype=torch.int64)).isnan().any()
    assert torch.equal(logits(one, with_skips.shown), logits(two, without.shown))


def test_a_stopped_service_goes_on_to_the_same_numbers(world, scorer, tmp_path):
    sessions = Sessions(world)
    control = BeliefQuota(scorer, seed=3)
    control.bind(sessions.shown)
    for _ in range(13):
        sessions.step(control)
    control.save_served(tmp_path / "served.safetensors")
    again = BeliefQuota(scorer, seed=8)
    again.bind(sessions.shown)
    again.load_served(tmp_path / "served.safetensors")
    for _ in range(13):
        sessions.step(control, again)
    assert again.belief.scales == control.belief.scales
    assert again.belief.sessions == control.belief.sessions > 0
    assert all(earlier.sessions <= later.sessions for earlier, later in pairwise(again.belief.course))


def test_seeds_explore_differently_and_deterministic_does_not(world, scorer):
    slates = []
    for seed, explore in ((0, True), (1, True), (0, False), (1, False)):
        sessions = Sessions(world)
        control = BeliefQuota(scorer, seed=seed)
        control.bind(sessions.shown)
        slates.append(sessions.step(control, explore=explore))
    assert not np.array_equal(slates[0], slates[1])
    np.testing.assert_array_equal(slates[2], slates[3])


def test_a_belief_about_other_items_is_refused(world, scorer):
    control = BeliefQuota(scorer)
    evaluate(control, vec_env(world))
    with pytest.raises(ValueError, match="other items"):
        evaluate(control, vec_env(small_world(seed=1)))
