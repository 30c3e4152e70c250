"""DSRM-HRL over candidates: it starts at the belief, keeps to the leave rule by construction, and learns from there."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_world
from logged_worlds import logged_pair

from dsrm import VecDSRM
from dsrm.candidates import (
    CANDIDATE_FEATURES,
    CANDIDATES_PER_GROUP,
    COUNT_FEATURES,
    SESSION_FEATURES,
    CandidatePurifier,
)
from dsrm.pretraining import PretrainConfig, pretrain
from dsrm.purifier import load_purifier, save_purifier
from dsrm.tolerance_belief import ToleranceBelief, TolerancePrior
from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.worlds import purified_sessions, training_sessions
from kuaifair_env import ArtifactError, SessionConfig, evaluate, serve
from kuaifair_env.agent_view import sessions_for_agents
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.world import World

K = 4
# Users love every third item, which the log does not tell.
WORLD = small_world(np.tile(np.where(np.arange(50) % 3 == 1, 0.85, 0.1), (40, 1)))
TRAIN = replace(WORLD, split="train")
POPULAR = WORLD.groups.popular
REPEATS = ("allow", "forbid")
SMALL = {"n_steps": 8, "batch_size": 32, "n_epochs": 2, "seed": 0, "device": "cpu"}
PURIFIER = CandidatePurifier.closed_form(TRAIN)


def config(**settings) -> SessionConfig:
    return SessionConfig(**({"max_len": 8, "slate_size": K, "action_mode": "slate"} | settings))


def sessions(n: int = 10, world=WORLD, purifier=PURIFIER, seed: int = 0, **settings) -> VecDSRM:
    return purified_sessions(world, config(**settings), n, seed, purifier)


def agent(n: int = 8, seed: int = 0, hierarchy=None, settings=None, **session) -> HierarchicalPPO:
    env = training_sessions(TRAIN, config(**session), n, seed, purifier=PURIFIER)
    given = SMALL | {"seed": seed} | (settings or {})
    return HierarchicalPPO("RankingPolicy", env, hierarchy=hierarchy, **given)


def belief_quota() -> BeliefQuota:
    return BeliefQuota(PURIFIER.scorer)


# Start ----------------------------------------------------------------------------------------------------------


def played_beside(model: HierarchicalPPO, env: VecDSRM, control: BeliefQuota, n_steps: int) -> None:
    """Plays what the agent shows, and checks at each step that the control would show the same, in the same order."""
    observation = env.reset()
    control.bind(sessions_for_agents(env.unwrapped.batch))
    for _ in range(n_steps):
        slates, _ = model.predict(observation, deterministic=True)
        np.testing.assert_array_equal(slates, control.predict(env.unwrapped.batch.observe(), deterministic=True)[0])
        observation, _, _, _ = env.step(slates)


@pytest.mark.parametrize("repeats", REPEATS)
@pytest.mark.parametrize("leave", ["temper", "strict", "never"])
def test_untrained_it_shows_the_slates_of_belief_quota(repeats, leave):
    played_beside(agent(repeats=repeats, leave=leave), sessions(repeats=repeats, leave=leave), belief_quota(), 20)


@pytest.mark.parametrize("repeats", REPEATS)
def test_untrained_it_shows_the_slates_of_belief_quota_after_a_service(repeats):
    control = belief_quota()
    serve(control, KuaiFairVecEnv(WORLD, config(repeats=repeats), 10, seed=0), sessions=80, evaluate_others=False)
    assert control.belief.steps > 20
    learned = sessions(repeats=repeats, purifier=PURIFIER.with_learned(control.belief, WORLD))
    played_beside(agent(repeats=repeats), learned, control, 12)


def test_while_serving_the_belief_around_an_agent_learns_what_that_of_the_control_does():
    """Without exploration, since their draws differ."""
    model, control = agent(), belief_quota()
    env = sessions()
    played = KuaiFairVecEnv(WORLD, config(), 10, seed=0)
    env.learns = True
    env._observations.running._noise = 0.0
    observation, _ = env.reset(), played.reset()
    control.bind(sessions_for_agents(played.batch))
    control._noise = 0.0
    for _ in range(25):
        slates, _ = model.predict(observation, deterministic=True)
        before = played.batch.simulator.steps.copy(), played.batch.blocks.copy()
        expected, _ = control.predict(played.batch.observe(), deterministic=True)
        np.testing.assert_array_equal(slates, expected)
        observation, _, done, _ = env.step(slates)
        played.step(expected)
        outcome = played.batch.outcome
        live = np.ones(10, np.bool_)
        control._evidence.learn(outcome.items, outcome.clicks, live, done, before[1])
        np.testing.assert_array_equal(env.belief.shared.mean, control.belief.shared.mean)
    assert env.belief.steps == control.belief.steps > 20


# Observations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", REPEATS)
def test_observations_lie_in_their_space_and_name_the_best_items_that_may_be_shown(repeats):
    env = sessions(repeats=repeats, max_len=12)
    observation = env.reset()
    rng = np.random.default_rng(0)
    for _ in range(13):
        for row in range(env.num_envs):
            assert env.observation_space.contains({name: part[row] for name, part in observation.items()})
        candidates, features = observation["candidates"], observation["features"]
        present = candidates >= 0
        masks = env.unwrapped.batch.action_masks()
        for row in range(env.num_envs):
            shown = candidates[row][present[row]]
            assert len(set(shown)) == len(shown) and masks[row][shown].all()
            for group in (POPULAR, ~POPULAR):
                in_group = group[shown]
                assert in_group.sum() == min((masks[row] & group).sum(), CANDIDATES_PER_GROUP)
                logits = features[row][present[row]][in_group][:, 0]
                assert (np.diff(logits) <= 0).all()
        np.testing.assert_array_equal(
            features[..., CANDIDATE_FEATURES.index("popular")][present], POPULAR[candidates[present]]
        )
        slates = np.stack([rng.choice(np.flatnonzero(mask), K, replace=False) for mask in masks])
        observation, _, _, _ = env.step(slates)


def test_features_say_what_a_session_showed():
    env = sessions(leave="never")
    env.reset()
    slates = np.tile(np.arange(K), (env.num_envs, 1))
    clicks = np.zeros((env.num_envs, 50))
    for step in range(3):
        observation, _, _, _ = env.step(slates)
        np.add.at(clicks, (np.arange(env.num_envs)[:, None], slates), env.unwrapped.batch.outcome.clicks)
        state = dict(zip(SESSION_FEATURES, observation["state"].T, strict=True))
        np.testing.assert_allclose(state["clock"], (step + 1) / 8, rtol=1e-6)
        np.testing.assert_allclose(state["click_rate"], clicks.sum(axis=1) / (K * (step + 1)), rtol=1e-5)
        np.testing.assert_allclose(state["last_share"], POPULAR[slates].mean(axis=1), rtol=1e-6)
    features = dict(zip(CANDIDATE_FEATURES, np.moveaxis(observation["features"], 2, 0), strict=True))
    candidates = observation["candidates"]
    of_candidates = np.take_along_axis(clicks, candidates, axis=1)
    np.testing.assert_allclose(np.expm1(features["clicks"]), of_candidates, atol=1e-4)
    np.testing.assert_allclose(np.expm1(features["skips"]), np.isin(candidates, slates) * 3 - of_candidates, atol=1e-4)
    whole = features["prior"] + features["shared"] + features["taste"] + features["offset"]
    level = observation["state"][:, [SESSION_FEATURES.index("level")]]
    np.testing.assert_allclose(features["logit"], whole + level, atol=1e-4)


def test_an_agent_knows_no_single_items_and_acts_with_another_catalogue():
    model = agent()
    names = {name for name, _ in model.policy.named_parameters()} | {name for name, _ in model.policy.named_buffers()}
    assert all(50 not in tensor.shape for tensor in model.policy.state_dict().values()) and names
    other = small_world(np.random.default_rng(3).random((40, 45)), n_items=45, seed=3)
    env = sessions(world=other, purifier=CandidatePurifier.closed_form(replace(other, split="train")))
    slates, _ = model.predict(env.reset(), deterministic=True)
    assert slates.shape == (10, K) and slates.max() < 45


# Slates ---------------------------------------------------------------------------------------------------------


def test_log_probabilities_of_slates_are_exact():
    """Against Plackett and Luce's product within each group, written out, for every count that may be asked for."""
    model = agent(leave="never", hierarchy={"start_temperature": 1.0})
    policy = model.policy
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    observation = sessions(leave="never").reset()
    with torch.no_grad():
        actions = policy.act(observation)
    logits = policy.worker.logits(actions.features, actions.session, actions.present).detach()
    logits = logits / policy.worker.temperature.detach()
    odds = policy.manager.logits(actions.session, actions.numbers, actions.worths, actions.information)
    manager = odds.log_softmax(dim=1).detach()
    popular = POPULAR[observation["candidates"]] & (observation["candidates"] >= 0)
    tail = ~POPULAR[observation["candidates"]] & (observation["candidates"] >= 0)
    for row in range(10):
        asked = int(actions.manager_actions[row, 0])
        assert float(actions.manager_log_probs[row]) == pytest.approx(float(manager[row, asked]), abs=1e-5)
        slots = actions.slots[row].tolist()
        expected = 0.0
        for members, chosen in ((popular[row], slots[:asked]), (tail[row], slots[asked:])):
            left = set(np.flatnonzero(members).tolist())
            for place in chosen:
                weights = {other: float(logits[row, other].exp()) for other in left}
                expected += np.log(weights[place] / sum(weights.values()))
                left.remove(place)
        assert float(actions.worker_log_probs[row].sum()) == pytest.approx(expected, abs=1e-3)


def test_probabilities_of_all_slates_sum_to_one():
    """Three popular candidates and four others: 3 2 1 0 popular items of a slate of two, in any order."""
    policy = agent(slate_size=2, leave="never").policy
    n = 7
    popular = torch.tensor([[True] * 3 + [False] * 4])
    logits = torch.randn(1, n, generator=torch.Generator().manual_seed(1))
    for asked in (0, 1, 2):
        distribution = policy._slate_distribution(logits, popular, torch.tensor([asked]))
        slates = [
            (*first, *second)
            for first in itertools.permutations(range(3), asked)
            for second in itertools.permutations(range(3, n), 2 - asked)
        ]
        total = sum(float(distribution.log_prob(torch.tensor([slate])).detach().exp()) for slate in slates)
        assert total == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("leave", ["temper", "strict"])
@pytest.mark.parametrize("repeats", REPEATS)
def test_slates_keep_to_the_bound_and_never_repeat_where_that_is_forbidden(leave, repeats):
    model = agent(repeats=repeats, leave=leave, max_len=12)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    for deterministic in (True, False):
        env = sessions(repeats=repeats, leave=leave, max_len=12)
        observation = env.reset()
        seen = [set() for _ in range(env.num_envs)]
        for _ in range(16):
            slates, _ = model.predict(observation, deterministic=deterministic)
            for row, slate in enumerate(slates):
                assert len(set(slate)) == K
                assert repeats == "allow" or not seen[row] & set(slate)
                seen[row] |= set(slate)
            # Groups run out of items before sessions end: only then is there no slate inside the bound.
            inside = observation["counts"][:, 2, 0] > 0
            observation, _, done, _ = env.step(slates)
            assert not env.unwrapped.batch.outcome.violation[inside].any()
            for row in np.flatnonzero(done):
                seen[row] = set()


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize(("leave", "spread"), [("personal", 0.3), ("temper", 0.3), ("personal", 10.0)])
def test_numbers_of_popular_items_are_worth_the_log_odds_of_their_best_slates(leave, spread, size):
    """Written out; untrained the manager asks by them, less K log-odds for the risk, and by what an answer is worth.

    Its network reads log-odds below the best per item of a slate, and of those no more than five.
    """
    policy = agent(slate_size=size, leave=leave, hierarchy={"manager_temperature": 0.5}).policy
    env = sessions(slate_size=size, leave=leave)
    observation = env.reset()
    for _ in range(3):
        observation, _, _, _ = env.step(policy.predict(observation)[0])
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.worker.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
        actions = policy.act(observation)
        scores = policy.worker.logits(actions.features, actions.session, actions.present).double().numpy()
        asked = policy.manager.logits(actions.session, actions.numbers, actions.worths, actions.information).numpy()
        _, entropies, _ = policy.evaluate_manager(actions, torch.arange(10))
    for row in range(10):
        popular = POPULAR[observation["candidates"][row]]
        groups = [-np.sort(-scores[row][present]) for present in (popular, ~popular)]
        totals = np.asarray([groups[0][:count].sum() + groups[1][: size - count].sum() for count in range(size + 1)])
        allowed, risks = observation["counts"][row].T[0] > 0.5, observation["counts"][row].T[1]
        below = totals - totals[allowed].max()
        np.testing.assert_allclose(actions.worths[row][allowed], below[allowed], rtol=1e-5, atol=1e-4)
        read = np.column_stack([risks, np.arange(size + 1) / size, np.maximum(below / size, -5.0), allowed])
        np.testing.assert_allclose(actions.numbers[row][allowed], read[allowed], atol=1e-4)
        odds = np.where(allowed, (below - size * risks + actions.information[row].numpy()) / 0.5, -np.inf)
        np.testing.assert_allclose(asked[row][allowed], odds[allowed], atol=1e-3)
        assert (asked[row][~allowed] < -1e20).all()
        chances = np.exp(odds - odds.max()) / np.exp(odds - odds.max()).sum()
        assert float(entropies[row]) == pytest.approx(-np.sum(chances * np.log(np.maximum(chances, 1e-300))), abs=1e-3)
    far = torch.from_numpy(observation["counts"][..., 0] > 0.5) & (actions.worths < -5 * size)
    assert spread < 1 or far.any()
    assert (observation["counts"][..., 1].std() > 0) == (leave == "personal")


def test_networks_read_what_they_rank_beside_its_session():
    """Their first layers are those of networks over both at once, of which the session's part is computed once."""
    policy = agent(leave="personal").policy
    worker, manager = policy.worker, policy.manager
    env = sessions(leave="personal")
    env.reset()
    observation, _, _, _ = env.step(np.tile(np.arange(K), (10, 1)))

    def added(level, first, features):
        session = (actions.session / level.session_scales)[:, None].expand(-1, features.shape[1], -1)
        weights = torch.cat([first.weight, level.of_session.weight], dim=1)
        return level.rest(torch.cat([features, session], dim=2) @ weights.T + first.bias)[..., 0]

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        actions = policy.act(observation)
        of_candidates = added(worker, worker.of_candidate, actions.features / worker.scales)
        of_counts = added(manager, manager.of_count, actions.numbers)
        logits = worker.logits(actions.features, actions.session, actions.present)
        asked = manager.logits(actions.session, actions.numbers, actions.worths, actions.information)
        asked = asked * manager.temperature
    believed = actions.features[..., CANDIDATE_FEATURES.index("logit")]
    worths = actions.worths - manager.price.detach() * torch.from_numpy(observation["counts"][..., 1])
    worths = worths + actions.information
    assert actions.present.all()
    assert (actions.worths > -1e20).all(), "users with bounds of their own allow all numbers"
    torch.testing.assert_close(logits, believed + of_candidates, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(asked, worths + of_counts, atol=1e-4, rtol=1e-4)
    assert min(of_candidates.std(), of_counts.std()) > 0.01


def test_values_may_be_of_any_size():
    """What a whole session returns is more than the one at which layers of tanh end."""
    policy = agent().policy
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(5.0)
        values = policy.act(sessions().reset()).values
    assert values.shape == (10, 3)
    assert (values.abs() > 10.0).all()


def test_both_levels_draw_unless_they_are_told_not_to():
    hierarchy = {"start_temperature": 1.0, "manager_temperature": 2.0}
    policy = agent(leave="never", hierarchy=hierarchy).policy
    observation = sessions(leave="never").reset()
    drawn, sure = [policy.act(observation) for _ in range(12)], policy.act(observation, deterministic=True)
    for name in ("slates", "manager_actions"):
        assert len({getattr(actions, name).numpy().tobytes() for actions in drawn}) > 6
        assert torch.equal(getattr(policy.act(observation, deterministic=True), name), getattr(sure, name))


@pytest.mark.parametrize(("size", "half"), [(3, 1), (6, 3)])
def test_a_constant_manager_asks_for_half_a_slate_where_nothing_is_said(size, half):
    settings = {"slate_size": size, "leave": "never"}
    slates, _ = agent(hierarchy={"manager": "constant"}, **settings).predict(sessions(**settings).reset())
    assert (POPULAR[slates].sum(axis=1) == half).all()


@pytest.mark.parametrize("name", ["start_temperature", "manager_temperature", "interval", "width"])
def test_settings_of_nothing_are_refused(name):
    with pytest.raises(ValueError, match=name):
        agent(hierarchy={name: 0.0 if "temperature" in name else 0})


def test_a_constant_manager_asks_for_the_same_number_where_it_may():
    model = agent(hierarchy={"manager": "constant", "constant": 2}, leave="never")
    slates, _ = model.predict(sessions(leave="never").reset())
    assert (POPULAR[slates].sum(axis=1) == 2).all()
    outside = agent(hierarchy={"manager": "constant", "constant": 4})
    slates, _ = outside.predict(sessions().reset())
    assert (POPULAR[slates].sum(axis=1) == 2).all(), "of four items the bound allows two alone"
    with pytest.raises(ValueError, match="at most the slate size 4"):
        agent(hierarchy={"manager": "constant", "constant": 5})


def test_an_action_holds_for_its_interval():
    model = agent(hierarchy={"interval": 3}, leave="never")
    env, state, counts = sessions(leave="never"), None, []
    observation, starts = env.reset(), np.ones(10, np.bool_)
    for _ in range(7):
        slates, state = model.predict(observation, state, starts)
        counts.append(POPULAR[slates].sum(axis=1))
        observation, _, starts, _ = env.step(slates)
    np.testing.assert_array_equal(counts[:3], np.tile(counts[0], (3, 1)))
    np.testing.assert_array_equal(counts[3:6], np.tile(counts[3], (3, 1)))


# Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", REPEATS)
def test_right_after_a_rollout_all_ratios_are_one(repeats):
    model = agent(repeats=repeats).learn(64)
    _, callback = model._setup_learn(1_000, None, reset_num_timesteps=False)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    for batch in model.rollout_buffer.get(50, np.random.default_rng(0)):
        actions = batch.actions
        logs, _, engagement, _ = model.policy.evaluate_worker(actions)
        np.testing.assert_allclose((logs - actions.worker_log_probs).detach().exp(), 1, atol=1e-4)
        np.testing.assert_allclose(engagement.detach(), actions.values[:, 1], atol=1e-5)
        logs, _, value = model.policy.evaluate_manager(actions, actions.decided)
        np.testing.assert_allclose((logs - actions.manager_log_probs).detach().exp(), 1, atol=1e-4)
        np.testing.assert_allclose(value.detach(), actions.values[:, 0], atol=1e-5)


def test_no_gradient_of_one_level_enters_the_other():
    model = agent().learn(64)
    batch = next(iter(model.rollout_buffer.get(50, np.random.default_rng(0))))
    for update, level, other in (
        (model._update_worker, model.policy.worker, model.policy.manager),
        (model._update_manager, model.policy.manager, model.policy.worker),
    ):
        model.policy.zero_grad(set_to_none=True)
        update(batch, {})
        assert any(parameter.grad is not None for parameter in level.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())


def test_a_loaded_agent_acts_as_the_saved_one_bit_by_bit(tmp_path):
    model = agent(settings={"learning_rate": 0.01}).learn(128)
    model.save(tmp_path / "agent.zip")
    loaded = HierarchicalPPO.load(tmp_path / "agent.zip", device="cpu")
    observation = sessions().reset()
    one, two = (each.predict(observation, deterministic=True)[0] for each in (model, loaded))
    assert one.tobytes() == two.tobytes()
    one, two = (each.policy.act(observation, deterministic=True) for each in (model, loaded))
    assert torch.equal(one.manager_log_probs, two.manager_log_probs) and torch.equal(one.values, two.values)


@pytest.mark.slow
def test_a_service_that_was_stopped_goes_on_with_the_same_numbers(tmp_path):
    whole = serve(agent(n=10), sessions(), sessions=60, evaluate_others=False)

    class StoppedError(Exception):
        pass

    stopped = sessions()
    step_wait, calls = stopped.step_wait, itertools.count()

    def failing():
        if next(calls) == 26:
            raise StoppedError
        return step_wait()

    stopped.step_wait = failing
    with pytest.raises(StoppedError):
        serve(agent(n=10), stopped, sessions=60, evaluate_others=False, folder=tmp_path, checkpoint_every=10)
    again = serve(agent(n=10), sessions(), sessions=60, evaluate_others=False, folder=tmp_path, checkpoint_every=10)
    np.testing.assert_array_equal(again.served.sessions.return_, whole.served.sessions.return_)


def test_an_evaluation_leaves_what_was_learned_and_the_running_sessions_as_they_were():
    model = agent().learn(64)
    before = model.env.belief.shared.mean.clone()
    observation = {name: part.copy() for name, part in model.env._observations.running._shown.items()}
    one = evaluate(model, model.env, episodes_per_user=1)
    two = evaluate(model, model.env, episodes_per_user=1)
    np.testing.assert_array_equal(one.sessions.return_, two.sessions.return_)
    assert torch.equal(before, model.env.belief.shared.mean)
    for name, part in model.env._observations.running._shown.items():
        np.testing.assert_array_equal(part, observation[name])


# Tolerance ------------------------------------------------------------------------------------------------------


def test_a_tolerated_share_follows_from_what_was_punished():
    """A user who tolerates .35 is shown shares of .8 (punished), .5 (not) and .1 (not, since it is .25 away)."""
    belief = ToleranceBelief(
        SessionConfig(leave="personal", action_mode="slate", slate_size=10), 1, TolerancePrior.normal()
    )
    belief.start(np.arange(1), np.asarray([0.5], np.float32))
    assert belief.weights.sum() == pytest.approx(1.0)
    for share in (0.8, 0.5, 0.1):
        belief.observe(np.asarray([share]), np.asarray([abs(share - 0.35) >= 0.3]))
    risks = belief.risks()[0]
    # What is left lies between .2 and .4, so that two to four popular items are safe and eight or more are not.
    assert (risks[2:5] < 0.02).all() and (risks[[0, 8, 9, 10]] > 0.9)[1:].all() and 0.02 < risks[6] < 0.98


def test_a_prior_is_the_distribution_of_training_users_about_their_line():
    prior = TolerancePrior(intercept=0.1, slope=0.5, deviations=(-0.04, 0.0, 0.0, 0.2))
    shares = np.linspace(0.1, 0.9, 81)
    weights = prior.weights(np.asarray([0.4, 0.4, 1.0], np.float32), shares)
    assert weights.sum(axis=1) == pytest.approx([1.0, 1.0, 1.0])
    np.testing.assert_array_equal(weights[0], weights[1])
    for row, mean in ((0, 0.3), (2, 0.6)):
        for deviation, mass in ((-0.04, 0.25), (0.0, 0.5), (0.2, 0.25)):
            near = np.abs(shares - mean - deviation) < 0.015
            assert weights[row, near].sum() == pytest.approx(mass, abs=0.02)
        assert (weights > 0).all()


def test_a_prior_is_fitted_to_what_training_users_tolerate():
    """Half of the users click popular items alone, the others all alike; the line has what the log predicts of them."""
    popular = logged_pair(np.full((40, 50), 0.5)).train.groups.popular
    table = np.where(np.arange(40)[:, None] % 2, np.where(popular, 0.9, 0.0), 0.5)
    world = logged_pair(table).train
    np.testing.assert_array_equal(world.groups.popular, popular)
    purifier = pretrain(world, PretrainConfig(mode="candidates"))
    prior = purifier.tolerance
    tolerated = world.tolerated_shares[world.users]
    assert np.std(prior.deviations) <= tolerated.std() + 1e-6
    shares = np.linspace(0.1, 0.9, 81)
    running = purified_sessions(world, config(leave="personal"), len(world.users), 0, purifier)
    running.reset()
    believed = running._observations.running._tolerance.weights @ shares
    users = running.unwrapped.batch.simulator.users
    # Each share by the line is that of the fit: their mean is that of the users.
    assert believed.mean() == pytest.approx(world.tolerated_shares[users].mean(), abs=0.1)


def test_a_purifier_keeps_its_prior_and_an_older_file_is_refused(tmp_path):
    prior = TolerancePrior(0.1, 0.5, (-0.1, 0.0, 0.3))
    purifier = CandidatePurifier.closed_form(TRAIN)
    purifier.tolerance = prior
    save_purifier(purifier, tmp_path / "candidates.safetensors")
    assert load_purifier(tmp_path / "candidates.safetensors").tolerance == prior
    assert PURIFIER.tolerance == TolerancePrior.normal()
    settings = {name: value for name, value in purifier.settings().items() if name != "tolerance"}
    purifier.settings = lambda: settings
    save_purifier(purifier, tmp_path / "older.safetensors")
    with pytest.raises(ArtifactError, match=r"older.*lacks 'tolerance'"):
        load_purifier(tmp_path / "older.safetensors")


def test_nothing_is_inferred_where_the_bound_is_known():
    belief = ToleranceBelief(SessionConfig(action_mode="slate", slate_size=10), 3, TolerancePrior.normal())
    belief.start(np.arange(3), np.full(3, 0.5, np.float32))
    belief.observe(np.full(3, 0.9), np.ones(3, np.bool_))
    assert not belief.risks().any()
    assert not belief.joint_risks().any()
    assert not belief.slates_left(np.full(3, 9.0), np.full(3, 0.5, np.float32)).any()
    assert COUNT_FEATURES == ("allowed", "risk")
    env = sessions()
    assert not agent().policy.act(env.reset()).information.any()


def test_users_stay_for_the_slates_that_their_temper_allows():
    """A slate of which half is clicked takes 1.5; they leave below 1, and the next slate is not counted."""
    belief = ToleranceBelief(SessionConfig(leave="personal", action_mode="slate"), 3, TolerancePrior.normal())
    left = belief.slates_left(np.asarray([16.0, 4.0, 1.5]), np.full(3, 0.5, np.float32))
    np.testing.assert_allclose(left, [9.0, 1.0, 0.0])
    env = sessions(leave="personal", max_len=8)
    observation = env.reset()
    assert (observation["slates_left"] > 0).all()
    assert (observation["slates_left"] <= 7).all(), "a session ends at Max Len"


def test_what_two_slates_tell_together_is_that_of_tolerances_drawn_from_the_belief():
    config = SessionConfig(leave="personal", action_mode="slate", slate_size=10)
    belief = ToleranceBelief(config, 1, TolerancePrior.normal())
    belief.start(np.arange(1), np.asarray([0.4], np.float32))
    shares = np.linspace(0.1, 0.9, belief.weights.shape[1])
    drawn = np.random.default_rng(0).choice(shares, 20_000, p=belief.weights[0])
    punished = np.abs(np.arange(11) / 10 - drawn[:, None]) >= 0.3 - 1e-9
    joint = punished.T.astype(float) @ punished / len(drawn)
    np.testing.assert_allclose(belief.joint_risks()[0], joint, atol=0.015)
    np.testing.assert_allclose(np.diag(belief.joint_risks()[0]), belief.risks()[0])


def test_an_answer_is_worth_what_the_best_slate_gains_by_it_in_all_slates_that_are_left():
    """Written out: for each number of popular items the users who would be punished, and those who would not."""
    policy, env = agent(leave="personal").policy, sessions(leave="personal")
    observation = env.reset()
    shares = np.linspace(0.1, 0.9, 81)
    for _ in range(3):
        weights = env._observations.running._tolerance.weights
        punished = np.abs(np.arange(K + 1)[:, None] / K - shares) >= 0.3 - 1e-9
        actions = policy.act(observation)
        for row in range(len(weights)):
            worths = actions.worths[row].double().numpy()
            now = (worths - K * punished @ weights[row]).max()
            for number in range(K + 1):
                answers = [weights[row] * (punished[number] == answer) for answer in (False, True)]
                then = sum((worths * chance.sum() - K * punished @ chance).max() for chance in answers)
                gain = float(observation["slates_left"][row, 0]) * (then - now)
                assert float(actions.information[row, number]) == pytest.approx(gain, abs=1e-3)
        assert actions.information.max() > 0.1
        observation, _, _, _ = env.step(policy.predict(observation)[0])


@pytest.mark.slow
def test_looking_ahead_finds_out_who_tolerates_what_most_users_do_not(monkeypatch):
    """Popular items are liked better, half of a slate suits everybody, and two users of five tolerate all ten.

    A slate of ten is not worth its risk for its own clicks alone: an agent that does not look ahead never finds them.
    """
    tolerated = np.where(np.arange(40) % 5 < 2, 0.75, 0.25)
    first = np.arange(60) < 12
    world = logged_pair(
        np.tile(np.where(first, 0.65, 0.4), (40, 1)), rows_per_user=400, shown=np.where(first, 2.0, 1.0)
    ).train
    np.testing.assert_array_equal(world.groups.popular, first)
    monkeypatch.setattr(World, "tolerated_shares", property(lambda _: tolerated))
    purifier = CandidatePurifier.closed_form(world)
    purifier.tolerance = TolerancePrior(0.0, 0.0, tuple(np.sort(tolerated)))
    gains = []
    for seed in range(3):
        env = purified_sessions(world, config(leave="personal", slate_size=10, max_len=20), 40, seed, purifier)
        model = HierarchicalPPO("RankingPolicy", env, n_steps=8, batch_size=32, seed=seed, device="cpu")
        found, without = (
            evaluate(some, env, episodes_per_user=2, seed=seed).sessions for some in (model, _Myopic(model))
        )
        gains.append((found.return_ - without.return_).mean())
    assert min(gains) > 0.1


class _Myopic:
    """An agent that believes each slate to be its session's last."""

    def __init__(self, agent):
        self._agent = agent

    def predict(self, observation, *arguments, **settings):
        last = observation | {"slates_left": np.zeros_like(observation["slates_left"])}
        return self._agent.predict(last, *arguments, **settings)


@pytest.mark.slow
def test_a_manager_learns_what_users_do_not_tolerate():
    """The best items are popular, and users leave early who are shown nothing else."""
    appeal = np.where(POPULAR, 0.7, 0.5)
    world = replace(small_world(np.tile(appeal, (40, 1))), split="train")
    purifier = CandidatePurifier.closed_form(world)
    test = purified_sessions(world, config(leave="personal", max_len=12), 40, 0, purifier)
    before, after = [], []
    for seed in range(2):
        env = purified_sessions(world, config(leave="personal", max_len=12), 32, seed, purifier)
        model = HierarchicalPPO(
            "RankingPolicy", env, n_steps=12, batch_size=192, n_epochs=8, seed=seed, device="cpu",
            manager_learning_rate=0.02, slot_credit=0.0, fair_coef=0.0, target_kl=None,
        )  # fmt: skip
        # It starts where nothing is known of what a punished slate costs.
        torch.nn.init.zeros_(model.policy.manager.price)
        before.append(evaluate(model, test).sessions)
        model.learn(12 * 32 * 12)
        after.append(evaluate(model, test).sessions)
    violations, rewards = (
        [np.mean([getattr(some, name).mean() for some in when]) for when in (before, after)]
        for name in ("violation_rate", "return_")
    )
    # One of fourteen trials over two kernels kept most of its violations (.62); the others ended at .40 at most.
    assert violations[0] > 0.65
    assert violations[1] < 0.5
    assert rewards[1] > rewards[0] + 0.3
