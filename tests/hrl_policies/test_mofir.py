"""MOFIR: one agent for every preference, its targets, its default preference and its front."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from purifiers import WindowPurifier
from small_worlds import ENDS, KIND, front_pair
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.vec_env import VecMonitor, VecNormalize

from dsrm import VecDSRM
from hrl_policies.controls import RandomSlates
from hrl_policies.mofir import MOFIR, as_preferences
from hrl_policies.preference_front import FixedPreference, FrontPoint, hypervolume, preference_front, preference_grid
from hrl_policies.study import load_policy, load_run, plan_run, resume, train
from hrl_policies.study.figures import draw_preference_front, pareto_front
from kuaifair_env import KuaiFairEnv
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

K = 6
PAIR = front_pair()
NEVER = SessionConfig(slate_size=K, leave="never", max_len=10)


def sessions(n=8, config=NEVER, seed=0, world=PAIR.train):
    return KuaiFairVecEnv(world, config, n, seed=seed)


def agent(env=None, **changes) -> MOFIR:
    given = {
        "seed": 0,
        "device": "cpu",
        "learning_starts": 64,
        "batch_size": 32,
        "buffer_size": 4096,
        "validation_users": 8,
        "grid_size": 3,
        "policy_kwargs": {"net_arch": [32, 32]},
    }
    return MOFIR("PreferencePolicy", sessions() if env is None else env, **{**given, **changes})


@pytest.fixture(scope="module")
def learnt() -> MOFIR:
    model = agent(
        sessions(16),
        learning_starts=500,
        batch_size=128,
        buffer_size=20_000,
        learning_rate=1e-3,
        gradient_steps=2,
        epsilon=(1.0, 0.0),  # half of the catalogue lies far from where sessions begin
        exploration_noise=2.0,
        policy_kwargs={"net_arch": [64, 64]},
    )
    return model.learn(6_000)


@pytest.fixture(scope="module")
def brief() -> MOFIR:
    return agent().learn(160)


def randomness():
    slates = replace(NEVER, action_mode="slate")
    return evaluate(RandomSlates(seed=0), sessions(24, slates, 1))


# Learning -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_preferences_reach_the_ends_of_a_known_front_and_beat_random_slates_on_its_area(learnt):
    front = preference_front(learnt, sessions(24, seed=1))
    clicks, tail = ([getattr(point, name) for point in front] for name in ("clicks", "tail_share"))
    assert (clicks[0], tail[0]) == pytest.approx(ENDS[0], abs=0.03)
    assert tail[-1] == 1.0 and clicks[0] > clicks[-1]
    area = hypervolume(list(zip(clicks, tail, strict=True)))
    random = randomness()
    by_chance = hypervolume([(random.engagement.reward_per_step, (1 - random.fairness.signed_gap) / 2)])
    # Random slates hold a fifth of popular items and click .42; both ends of the front alone dominate .6.
    assert by_chance == pytest.approx(0.42 * 0.8, abs=0.03)
    assert area > 0.5
    # The best slates of any mix lie on the line between the ends: nothing lies above it.
    for point in front:
        assert point.clicks <= 0.9 - 0.3 * point.tail_share + 0.04


@pytest.mark.slow
def test_balanced_preferences_show_good_items_of_the_long_tail(learnt):
    """Half for half, .6 clicks and all of the tail are worth .8, and popular items alone .45."""
    env = sessions(24, seed=1)
    policy, observation = FixedPreference(learnt, (0.5, 0.5)), env.reset()
    for _ in range(4):
        observation, *_ = env.step(policy.predict(observation, deterministic=True)[0])
    assert (KIND[env.batch.outcome.items] == 1).mean() > 0.9


@pytest.mark.slow
def test_the_default_preference_is_the_best_of_the_training_world(learnt):
    front = preference_front(learnt, sessions(24, seed=1), preference_grid(3), users=PAIR.train.user_ids)
    best = max(front, key=lambda point: point.cumulative_reward)
    assert learnt.preference == pytest.approx(best.preference)
    assert learnt.preference == (1.0, 0.0), "nobody leaves here, so clicks are all that counts"
    seen = sessions(4, seed=3).reset()
    np.testing.assert_array_equal(learnt.predict(seen)[0], learnt.predict(seen, preference=(2, 0))[0])


def test_the_default_preference_is_chosen_among_users_of_the_training_world_alone():
    world = PAIR.train
    asked = set()

    class Noting(type(world.response)):
        def expected(self, users, items, history=None):
            asked.update(users.tolist())
            return super().expected(users, items, history)

    watched = replace(world, response=Noting(world.response.table))
    model = agent(sessions(world=watched)).learn(128)
    asked.clear()
    model.choose_preference()
    assert len(asked) == 8 and asked <= set(world.users.tolist())


def test_a_preference_given_at_the_start_stays():
    model = agent(preference=(3, 1)).learn(128)
    assert model.preference == (0.75, 0.25)


# Updates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("twin", [False, True])
def test_targets_are_those_of_a_computation_by_hand(twin):
    model = agent(twin=twin, gamma=0.7).learn(160)
    batch = model.replay_buffer.sample(5)
    done = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0]])
    batch = batch._replace(dones=done)
    preferences = torch.cat([batch.extras["preference"], torch.tensor([[0.3, 0.7]]).expand(5, 2)])
    found = model.targets(batch, preferences)
    assert found.shape == (10, 2)
    popular = PAIR.train.groups.popular
    for row in range(10):
        of = row % 5
        items = batch.items[of].tolist()
        reward = [float(batch.feedback[of].mean()), sum(not popular[item] for item in items) / K]
        w = preferences[row]
        with torch.no_grad():
            after = batch.next_observations[of : of + 1]
            action = model.actor_target(after, w[None])
            # The state lies among the items' embeddings, so that critics see how far it is a query's.
            product = 8**0.5 * action * 8**0.5 * after / after.norm()
            values = [
                network(torch.cat([after, product, 8**0.5 * action, w[None]], dim=1))[0]
                for network in model.critic_target.networks
            ]
        assert len(values) == 1 + twin
        value = min(values, key=lambda one: float(one @ w))
        expected = torch.tensor(reward) + 0.7 * (1.0 - done[of, 0]) * value
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_stored_rewards_are_clicks_and_long_tail_share_of_what_was_shown():
    model = agent().learn(160)
    buffer = model.replay_buffer
    steps = buffer.pos
    np.testing.assert_allclose(buffer.columns["feedback"][:steps].mean(-1), buffer.rewards[:steps], rtol=1e-6)
    preferences = buffer.columns["preference"][:steps]
    np.testing.assert_allclose(preferences.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(buffer.actions[:steps], axis=-1), 1.0, rtol=1e-5)
    # A session keeps its preference to the end and the next one draws another.
    changed = (preferences[1:] != preferences[:-1]).any(-1)
    np.testing.assert_array_equal(changed, buffer.dones[: steps - 1].astype(bool))
    assert changed.any()


def test_preferences_are_uniform_on_the_simplex():
    drawn = agent()._session_preferences(20_000)[:, 0]
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)


def test_an_update_judges_every_transition_by_its_own_preference_and_by_a_random_one(monkeypatch):
    model = agent().learn(160)
    seen = []
    original = model.targets
    monkeypatch.setattr(model, "targets", lambda batch, w: seen.append((batch, w)) or original(batch, w))
    model.train(1, 16)
    ((batch, preferences),) = seen
    assert preferences.shape == (32, 2)
    torch.testing.assert_close(preferences[:16], batch.extras["preference"])
    assert not torch.isclose(preferences[16:], preferences[:16]).all(1).any()


def test_the_scalar_loss_grows_with_training():
    model = agent(scalar_weight=2.0).learn(160)
    batch = model.replay_buffer.sample(16)
    preferences = batch.extras["preference"]

    def loss():
        state = {name: value.clone() for name, value in model.critic.state_dict().items()}
        found = model._update_critics(batch, preferences)
        model.critic.load_state_dict(state)
        return found

    with torch.no_grad():
        gaps = model.critic(batch.observations, batch.actions, preferences)[0]
        gaps = gaps - model.targets(batch, preferences)
    plain, scalar = float(gaps.square().sum(1).mean()), float((gaps * preferences).sum(1).square().mean())
    for left, weight in ((1.0, 0.0), (0.5, 1.0), (0.0, 2.0)):
        model._current_progress_remaining = left
        assert loss() == pytest.approx(plain + weight * scalar, rel=1e-4)


def test_learning_rates_of_actor_and_critic_are_their_own():
    model = agent(learning_rate=3e-4, critic_learning_rate=2e-3).learn(160)
    rates = [module.optimizer.param_groups[0]["lr"] for module in (model.actor, model.critic)]
    assert rates == pytest.approx([3e-4, 2e-3])


# Stable-Baselines3 ----------------------------------------------------------------------------------------------


def test_saving_keeps_networks_optimisers_and_the_default_preference(brief, tmp_path):
    brief.save(tmp_path / "model.zip")
    alone = MOFIR.load(tmp_path / "model.zip", device="cpu")
    assert alone.preference == brief.preference
    seen = sessions(12, seed=5).reset()
    for preference in (None, (0.2, 0.8), np.random.default_rng(0).dirichlet((1, 1), 12)):
        np.testing.assert_array_equal(
            alone.predict(seen, preference=preference)[0], brief.predict(seen, preference=preference)[0]
        )
    again = MOFIR.load(tmp_path / "model.zip", env=sessions(16), device="cpu")
    state, other = brief.critic.optimizer.state_dict()["state"], again.critic.optimizer.state_dict()["state"]
    assert all(torch.equal(state[key]["exp_avg"], other[key]["exp_avg"]) for key in state)
    again.learn(1024, reset_num_timesteps=False)
    assert again.num_timesteps == brief.num_timesteps + 1024


def test_a_model_that_was_saved_and_trains_on_draws_other_preferences_than_at_its_start(tmp_path):
    model = agent(sessions(8, seed=3)).learn(256)
    model.save(tmp_path / "model.zip")
    first, again, twice = agent(), *(MOFIR.load(tmp_path / "model.zip", env=sessions()) for _ in range(2))
    drawn = [one._session_preferences(100) for one in (first, again, twice)]
    assert not np.isin(drawn[1], drawn[0]).any()
    np.testing.assert_array_equal(drawn[1], drawn[2])


def test_the_same_seed_gives_the_same_weights_and_another_does_not():
    states = [list(agent(sessions(seed=3), seed=seed).learn(256).policy.state_dict().values()) for seed in (1, 1, 2)]
    assert all(torch.equal(*pair) for pair in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(states[0], states[2], strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: sessions(config=replace(NEVER, observation_mode="history")),
        lambda: VecMonitor(sessions()),
        lambda: VecDSRM(sessions(), WindowPurifier()),
        lambda: KuaiFairEnv(PAIR.train, NEVER),
    ],
    ids=["history", "monitor", "purified", "single"],
)
def test_every_form_of_sessions_will_do(make, tmp_path):
    model = agent(make(), learning_starts=16).learn(64, CheckpointCallback(32, str(tmp_path)))
    env = make()
    observation = env.reset()
    if isinstance(observation, tuple):
        action, _ = model.predict(observation[0], preference=(1, 1))
        assert action.shape == (8,)
        env.step(action)
    else:
        env.step(model.predict(observation)[0])


def test_single_observations_and_batches_are_answered_alike(brief):
    seen = sessions(5, seed=7).reset()
    weights = np.asarray([[1, 0], [0, 1], [1, 1], [3, 1], [1, 3]], float)
    batch, _ = brief.predict(seen, preference=weights)
    for row in range(5):
        alone, _ = brief.predict(seen[row], preference=weights[row])
        np.testing.assert_allclose(alone, batch[row], atol=1e-6)
    with pytest.raises(ValueError, match="5 observations need as many preferences or one, got 2"):
        brief.predict(seen, preference=weights[:2])


@pytest.mark.parametrize("preference", [(1,), (1, 2, 3), (0, 0), (-1, 2), (np.nan, 1), 0.5])
def test_what_is_no_preference_is_refused(preference):
    with pytest.raises(ValueError, match="preference"):
        as_preferences(preference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": (0.2, 1.5)}, "epsilon"),
        ({"exploration_noise": -1.0}, "must not be negative"),
        ({"grid_size": 1}, "2 preferences"),
        ({"preference": (0, 0)}, "not all 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        agent(**changes)


def test_sessions_that_cannot_be_repeated_are_refused():
    with pytest.raises(TypeError, match=r"MOFIR .* cannot repeat VecNormalize"):
        agent(VecNormalize(sessions()))


# Fronts ---------------------------------------------------------------------------------------------------------

_points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8)


@given(_points)
def test_the_area_is_that_of_the_cells_that_are_dominated(points):
    cells = sum(any(x < a and y < b for a, b in points) for x, y in itertools.product(range(8), range(8)))
    assert hypervolume(points) == cells
    kept = [points[row] for row in pareto_front(points)]
    assert hypervolume(kept) == cells


def test_an_area_counts_from_its_reference():
    assert hypervolume([(0.9, 0.0), (0.6, 1.0)]) == pytest.approx(0.6)
    assert hypervolume([(2, 3), (3, 2)], (1, 1)) == pytest.approx(3)
    assert hypervolume([(0.5, 0.5)], (1, 0)) == 0.0


def test_a_grid_goes_from_clicks_alone_to_fairness_alone():
    assert preference_grid(5) == [(1.0, 0.0), (0.75, 0.25), (0.5, 0.5), (0.25, 0.75), (0.0, 1.0)]
    with pytest.raises(ValueError, match="at least 2"):
        preference_grid(1)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_front_is_drawn_the_same_every_time(brief, tmp_path, ending):
    front = preference_front(brief, sessions(24, seed=1), [(1, 0), (0.5, 0.5)])
    for name in ("a", "b"):
        draw_preference_front(tmp_path / f"{name}.{ending}", front, [("Random", 0.42, 0.8)], title="small world")
    drawn = (tmp_path / f"a.{ending}").read_bytes()
    assert drawn == (tmp_path / f"b.{ending}").read_bytes()
    assert drawn.startswith(b"\x89PNG") if ending == "png" else b"<svg" in drawn


def test_drawings_that_make_no_sense_are_refused(brief, tmp_path):
    with pytest.raises(ValueError, match="no preferences to draw"):
        draw_preference_front(tmp_path / "a.png", [])
    point = FrontPoint((1.0, 0.0), 0.5, 0.5, 5.0, randomness())
    with pytest.raises(ValueError, match="a figure ends in"):
        draw_preference_front(tmp_path / "a.jpg", [point])


# Runs -----------------------------------------------------------------------------------------------------------


def plan(**settings):
    changes = {
        "learning_starts": 64,
        "batch_size": 32,
        "validation_users": 8,
        "grid_size": 3,
        "policy_kwargs.net_arch": [16],
    }
    given = {"total_steps": 512, "n_envs": 8, "session": SessionConfig(slate_size=K)} | settings
    return plan_run("mofir", "logged", overrides=changes, **given)


def test_a_run_keeps_its_default_preference(tmp_path):
    result = train(plan(), PAIR, output=tmp_path / "run")
    np.testing.assert_array_equal(result.evaluation.sessions.user_ids, PAIR.test.user_ids)
    restored = load_policy(load_run(tmp_path / "run"), PAIR)
    assert restored.preference == result.policy.preference
    seen = sessions(9, seed=2).reset()
    np.testing.assert_array_equal(restored.predict(seen)[0], result.policy.predict(seen)[0])


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_preferences(tmp_path, monkeypatch):
    from hrl_policies.study import training

    original = training.SessionCurveCallback._on_step

    def stop(monitor):
        monitor.stop_requested = monitor.num_timesteps >= 256
        return original(monitor)

    monkeypatch.setattr(training.SessionCurveCallback, "_on_step", stop)
    assert train(plan(), PAIR, output=tmp_path / "run").evaluation is None
    monkeypatch.setattr(training.SessionCurveCallback, "_on_step", original)
    result = resume(tmp_path / "run.partial", PAIR)
    assert result.complete and result.steps_done >= 512
    preferences = result.policy.replay_buffer.columns["preference"]
    assert (preferences[: result.policy.replay_buffer.pos].sum(-1) > 0.99).all()
