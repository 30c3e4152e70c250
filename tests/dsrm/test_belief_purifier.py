"""Beliefs as states of agents: entry by entry, in every form of the environment, while training, serving and saved."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as check_gymnasium
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from helpers import Stops, small_world
from logged_worlds import logged_pair
from sb3_contrib import RecurrentPPO
from small_worlds import taste_worlds
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.env_checker import check_env as check_sb3
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from dsrm.baselines import IdentityPurifier
from dsrm.belief import Belief, BeliefItems, BeliefScales
from dsrm.belief_purifier import LOG_DEVIATIONS, LOG_ODDS, BeliefPurifier
from dsrm.item_term import explained_share, fit_item_term
from dsrm.own_level import OwnLevel, OwnScales
from dsrm.pretraining import PretrainConfig, pretrain
from dsrm.purifier import load_purifier, save_purifier
from dsrm.session_evidence import SessionEvidence
from dsrm.shared_level import SharedScales
from dsrm.wrappers import DSRMObservationWrapper, DSRMVectorWrapper, VecDSRM
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.popularity import log_popularity
from kuaifair_env.data.schema import FeatureTable
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError, MismatchError
from kuaifair_env.evaluation import evaluate
from kuaifair_env.observations import observed_states, state_of
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.registration import make_world
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.serving import serve
from kuaifair_env.vector_env import KuaiFairVectorEnv

TRAIN, TEST = taste_worlds()
D = TRAIN.dimension
CONFIG = SessionConfig(max_len=4, slate_size=4)
CLOSE = 0.03
"""Log-odds that warm steps may leave between a posterior and its mode."""


@lru_cache(maxsize=1)
def purifier() -> BeliefPurifier:
    return BeliefPurifier.closed_form(TRAIN)


def vec(rows: int = 3, seed: int = 3, world: Any = TEST, config: SessionConfig = CONFIG, **settings: Any) -> VecDSRM:
    return VecDSRM(KuaiFairVecEnv(world, config, rows, seed=seed), purifier(), **settings)


def single(config: SessionConfig = CONFIG, **settings: Any) -> DSRMObservationWrapper:
    return DSRMObservationWrapper(KuaiFairEnv(TEST, config), purifier(), **settings)


def actions(rows: int, steps: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-1, 1, (steps, rows, D)).astype(np.float32)


def entries_by_hand(
    belief: Belief, user: int, slates: list[tuple[np.ndarray, np.ndarray]], kept: float = 1.0
) -> np.ndarray:
    """Every entry of a state, in double precision, from all that one session showed."""
    items = BeliefItems.of_world(TEST)
    features = torch.from_numpy(np.column_stack([np.ones(len(items.ids)), items.embeddings]))
    own = OwnLevel(features, 1, belief.own_scales, kept)
    state = observed_states(TEST, TEST.initial_history.take(np.asarray([user])))
    prior = torch.from_numpy(purifier().scorer.score(state)).double()
    for shown, clicks in slates:
        own.observe(torch.tensor([0]), torch.from_numpy(shown[None]), torch.from_numpy(clicks[None]), prior)
    own.converge(prior + belief.shared.mean)
    means = (own.widths * own.means)[0].numpy()
    deviations = (own.widths * own.covariances.diagonal(dim1=1, dim2=2).sqrt())[0].numpy()
    coefficient = purifier().scorer.report.coefficients["similarity"]
    shared = belief.shared.coefficients.numpy()
    return np.concatenate(
        [
            coefficient * unit_rows(state)[0] + means[1:],
            means[:1],
            np.log(deviations[1:]),
            np.log(deviations[:1]),
            shared[1 : D + 1],
            shared[:1],
            [len(slates) / CONFIG.max_len],
        ]
    )


def world_of_tastes() -> Any:
    """Users of the test world whose tastes are vectors that may drift."""
    rng = np.random.default_rng(0)
    n_users, n_items = len(TEST.data.users), TEST.n_items
    vectors = rng.normal(size=(n_users, 2)), rng.normal(size=(n_items, 2))
    return replace(TEST, response=FactorisedResponse(0.0, np.zeros(n_users), np.zeros(n_items), *vectors))


@pytest.mark.parametrize("drift", [None, 2.0])
def test_every_entry_is_what_a_posterior_in_double_precision_says_last_states_too(drift):
    world, kept = (TEST, 1.0) if drift is None else (world_of_tastes(), 0.5)
    env, plan = vec(world=world, config=replace(CONFIG, drift=drift)), actions(3, 12)
    batch = env.unwrapped.batch
    states, seen, ended = env.reset(), [[], [], []], 0
    for choice in plan:
        users = batch.simulator.users.copy()
        for row in range(3):
            np.testing.assert_allclose(
                states[row], entries_by_hand(env.belief, users[row], seen[row], kept), atol=CLOSE
            )
        states, _, done, infos = env.step(choice)
        for row in range(3):
            seen[row].append((batch.outcome.items[row], batch.outcome.clicks[row]))
            if done[row]:
                ended += 1
                last = infos[row]["terminal_observation"]
                np.testing.assert_allclose(last, entries_by_hand(env.belief, users[row], seen[row], kept), atol=CLOSE)
                seen[row] = []
    assert ended >= 3


def test_the_space_holds_what_is_documented_and_clips_what_goes_beyond():
    space = vec().observation_space
    assert space.shape == (2 * (D + 1) + (D + 1) + 1,)
    bounds = [(-LOG_ODDS, LOG_ODDS)] * (D + 1) + [LOG_DEVIATIONS] * (D + 1)
    bounds += [(-LOG_ODDS, LOG_ODDS)] * (D + 1) + [(0.0, 1.0)]
    np.testing.assert_array_equal(np.stack([space.low, space.high], axis=1), np.asarray(bounds, np.float32))
    known = BeliefScales(own=OwnScales(intercept=0.0, taste=0.0))
    nothing_to_learn = BeliefPurifier.closed_form(TRAIN, known)
    state = VecDSRM(KuaiFairVecEnv(TEST, CONFIG, 2, seed=0), nothing_to_learn).reset()
    np.testing.assert_array_equal(state[:, D + 1 : 2 * D + 2], LOG_DEVIATIONS[0])
    assert space.contains(state[0])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_forms_show_the_states_of_the_native_one(mode):
    rows, steps = 3, 12
    plan, native = actions(rows, steps), vec(rows)
    env = DSRMVectorWrapper(KuaiFairVectorEnv(TEST, CONFIG, rows, mode), purifier())
    states, expected = env.reset(seed=3)[0], native.reset()
    np.testing.assert_array_equal(states, expected)
    ended, waiting = 0, np.zeros(rows, np.bool_)
    for choice in plan:
        if mode is AutoresetMode.NEXT_STEP and waiting.any():
            # The native form is a step ahead where a session ended; rows are compared until then.
            return
        before = native.step(choice)
        states, _, terminated, truncated, info = env.step(choice)
        done = terminated | truncated
        np.testing.assert_array_equal(done, before[2])
        reached = before[0].copy()
        for row in np.flatnonzero(done):
            ended += 1
            reached[row] = before[3][row]["terminal_observation"]
        if mode is AutoresetMode.SAME_STEP:
            np.testing.assert_allclose(states, before[0], atol=1e-6)
            for row in np.flatnonzero(done):
                np.testing.assert_allclose(info["final_obs"][row], reached[row], atol=1e-6)
        else:
            np.testing.assert_allclose(states, reached, atol=1e-6)
        if mode is AutoresetMode.DISABLED and done.any():
            np.testing.assert_allclose(env.reset(options={"reset_mask": done})[0], before[0], atol=1e-6)
        waiting = done
    assert ended >= rows


def test_after_its_end_a_row_starts_anew_in_the_step_that_replaces_the_session():
    env, lone = DSRMVectorWrapper(KuaiFairVectorEnv(TEST, CONFIG, 2), purifier()), single()
    env.reset(seed=3)
    lone.reset(seed=3)
    over, replaced = False, 0
    for choice in actions(2, 16):
        states, _, terminated, truncated, _ = env.step(choice)
        if over:
            state, over = lone.reset()[0], False
            assert state[-1] == 0.0
            replaced += 1
        else:
            state, *_ = lone.step(choice[0])
            over = bool(terminated[0] or truncated[0])
        np.testing.assert_allclose(states[0], state, atol=CLOSE)
    assert replaced >= 2


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("mode", ["state", "history"])
def test_the_checkers_of_both_libraries_pass(mode, learns):
    config = replace(CONFIG, observation_mode=mode, session_clock=True)
    check_gymnasium(single(config, learns=learns), skip_render_check=True)
    check_sb3(single(config, learns=learns))
    space = state_of(single(config).observation_space)
    assert isinstance(space, spaces.Box) and space.shape == (3 * D + 4,)


def test_what_all_users_share_is_learned_as_a_belief_that_is_fed_by_hand():
    plan = actions(8, 60)
    env, raw = vec(8, learns=True), KuaiFairVecEnv(TEST, CONFIG, 8, seed=3)
    belief = Belief(BeliefItems.of_world(TEST))
    evidence = SessionEvidence(belief, purifier().scorer, raw.batch)
    env.reset()
    raw.reset()
    everybody, one_block = np.ones(8, np.bool_), np.zeros(8, np.int64)
    for choice in plan:
        states = env.step(choice)[0]
        evidence.begin()
        evidence.beliefs.update(converged=evidence.take())
        done = raw.step(choice)[2]
        evidence.learn(raw.batch.outcome.items, raw.batch.outcome.clicks, everybody, done, one_block)
    assert env.belief.sessions == belief.sessions > 20
    np.testing.assert_allclose(env.belief.shared.mean, belief.shared.mean, atol=CLOSE)
    assert np.abs(states[:, 2 * D + 2 : 3 * D + 3]).max() > 0.05
    np.testing.assert_array_equal(states[0, 3 * D + 2], env.belief.shared.coefficients[0])
    assert vec(8).belief.sessions == 0


def test_states_hold_the_moments_of_preference_models_that_read_the_log(purifiers, tmp_path):
    given = purifiers["gaussian"]
    assert isinstance(given, BeliefPurifier)
    save_purifier(given, tmp_path / "belief.safetensors")
    env = VecDSRM(KuaiFairVecEnv(TEST, CONFIG, 4, seed=3), tmp_path / "belief.safetensors")
    raw = KuaiFairVecEnv(TEST, CONFIG, 4, seed=3)
    evidence = SessionEvidence(given.belief(TEST), given.scorer, raw.batch, given.preference)
    states, ended = env.reset(), 0
    raw.reset()
    for choice in actions(4, 12):
        evidence.begin()
        means, deviations = (array.numpy() for array in evidence.beliefs.update(converged=evidence.take()))
        predicted = given.scorer.report.coefficients["similarity"] * unit_rows(evidence.states)
        np.testing.assert_allclose(states[:, :D], predicted + means[:, 1:], atol=CLOSE)
        np.testing.assert_allclose(states[:, D], means[:, 0], atol=CLOSE)
        np.testing.assert_allclose(states[:, D + 1 : 2 * D + 1], np.log(deviations[:, 1:]), atol=2 * CLOSE)
        np.testing.assert_allclose(states[:, 2 * D + 1], np.log(deviations[:, 0]), atol=2 * CLOSE)
        states = env.step(choice)[0]
        ended += raw.step(choice)[2].sum()
    assert ended >= 4


def test_in_a_randomised_world_the_shared_level_starts_anew_with_each_block():
    world = randomised(TRAIN, Randomisation(min_block=20, max_block=20), 0)
    env = vec(8, world=world, learns=True)
    env.reset()
    blocks = set()
    for choice in actions(8, 60):
        before, block = env.belief.shared, env.belief.block
        env.step(choice)
        assert before is env.belief.shared
        if env.belief.block != block:
            assert not env.belief.shared.weights.any()
        blocks.add(env.belief.block)
    assert len(blocks) >= 3
    # What holds for one block alone is not handed on; scales are.
    learned = env.learned().belief(TEST)
    assert not learned.shared.weights.any() and not learned.shared.mean.any()
    assert learned.scales == env.belief.scales != BeliefScales()


SMALL = {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", "seed": 3}
OFF_POLICY = SMALL | {"buffer_size": 400, "batch_size": 16, "learning_starts": 40, "train_freq": 4}
AGENTS = {
    "a2c": lambda env: A2C("MlpPolicy", env, n_steps=4, **deepcopy(SMALL)),
    "ppo": lambda env: PPO("MlpPolicy", env, n_steps=8, batch_size=32, n_epochs=2, **deepcopy(SMALL)),
    "td3": lambda env: TD3("MlpPolicy", env, **deepcopy(OFF_POLICY)),
    "sac": lambda env: SAC("MlpPolicy", env, **deepcopy(OFF_POLICY)),
    "recurrent-ppo": lambda env: RecurrentPPO(
        "MlpLstmPolicy", env, n_steps=8, batch_size=32, n_epochs=2, **deepcopy(SMALL)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGENTS)
def test_agents_train_on_beliefs_and_do_the_same_when_both_are_loaded(kind, tmp_path):
    agent = AGENTS[kind](VecMonitor(vec(8, world=TRAIN, learns=True)))
    agent.learn(320)
    learning = agent.get_env().venv
    assert learning.belief.sessions > 20
    agent.save(tmp_path / "agent")
    learning.save(tmp_path / "belief.safetensors")
    sessions = KuaiFairVecEnv(TEST, CONFIG, 5, seed=0)
    result = evaluate(agent, VecDSRM(sessions, learning.learned()), n_users=20)
    loaded = VecDSRM.load(tmp_path / "belief.safetensors", sessions)
    np.testing.assert_array_equal(loaded.belief.shared.mean, learning.belief.shared.mean)
    again = evaluate(type(agent).load(tmp_path / "agent", device="cpu"), loaded, n_users=20)
    np.testing.assert_array_equal(again.frame(), result.frame())
    with pytest.raises(ValueError, match=r"'purified by belief \w+'.*'observed'"):
        evaluate(agent, KuaiFairVecEnv(TEST, CONFIG, 5, seed=0))


def test_an_evaluation_changes_nothing_and_is_the_same_in_every_form():
    plan, env, twin = actions(4, 10), vec(4, learns=True), vec(4, learns=True)
    env.reset()
    twin.reset()
    for step, choice in enumerate(plan):
        np.testing.assert_array_equal(env.step(choice)[0], twin.step(choice)[0])
        if step == 5:
            before = {name: array.copy() for name, array in env.belief.tensors().items()}
            evaluate(lambda seen: np.tanh(seen[:, :D]), env, n_users=9)
            for name, array in env.belief.tensors().items():
                np.testing.assert_array_equal(array, before[name])
            assert env.learns
    forms = [
        vec(3),
        VecNormalize(vec(3), training=False, norm_obs=False, norm_reward=False),
        single(),
        DummyVecEnv([single] * 2),
        SyncVectorEnv([single] * 2),
        *(DSRMVectorWrapper(KuaiFairVectorEnv(TEST, CONFIG, 3, mode), purifier()) for mode in AutoresetMode),
    ]
    results = [evaluate(lambda seen: np.round(np.tanh(seen[:, :D]), 1), env, n_users=20) for env in forms]
    for result in results[1:]:
        # How close warm steps come to the modes depends on who else is in the batch.
        np.testing.assert_allclose(result.sessions.return_.mean(), results[0].sessions.return_.mean(), atol=0.05)
        assert np.mean(result.sessions.return_ == results[0].sessions.return_) > 0.5


def test_purifiers_are_saved_with_and_without_what_they_learned(tmp_path):
    env = vec(8, learns=True)
    env.reset()
    for choice in actions(8, 30):
        env.step(choice)
    for kind, given in (("plain", purifier()), ("learned", env.learned())):
        path = tmp_path / f"{kind}.safetensors"
        save_purifier(given, path)
        read = load_purifier(path)
        assert read.describe() == purifier().describe()
        expected, belief = given.belief(TEST), read.belief(TEST)
        assert belief.scales == expected.scales and belief.sessions == expected.sessions
        for name, array in expected.tensors().items():
            np.testing.assert_array_equal(belief.tensors()[name], array)
        states = [VecDSRM(KuaiFairVecEnv(TEST, CONFIG, 4, seed=1), which).reset() for which in (given, path)]
        np.testing.assert_array_equal(*states)
    assert env.belief.sessions > 0 and not purifier().belief(TEST).sessions


def test_every_form_is_saved_and_loaded_alike(tmp_path):
    path = tmp_path / "belief.safetensors"
    vector = DSRMVectorWrapper(KuaiFairVectorEnv(TEST, CONFIG, 3), purifier(), learns=True)
    for env, inner in ((single(learns=True), KuaiFairEnv(TEST, CONFIG)), (vector, KuaiFairVectorEnv(TEST, CONFIG, 3))):
        env.reset(seed=1)
        for _ in range(15):
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            if np.ndim(terminated) == 0 and (terminated or truncated):
                env.reset()
        env.save(path)
        again = type(env).load(path, inner, learns=True)
        assert again.learns and again.belief.sessions == env.belief.sessions > 0
        np.testing.assert_array_equal(again.belief.shared.coefficients, env.belief.shared.coefficients)
    with pytest.raises(ValueError, match="learns=True is for beliefs"):
        VecDSRM(KuaiFairVecEnv(TEST, CONFIG, 2), IdentityPurifier(), learns=True)


def test_an_item_term_is_no_part_of_the_users_vector():
    pair = WorldPair("taste", TRAIN, TEST).given_mode("log")
    given = BeliefPurifier.closed_form(pair.train, scorer=pair.scorer)
    env = VecDSRM(KuaiFairVecEnv(pair.test, CONFIG, 2, seed=0), given)
    assert env.reset().shape == (2, 3 * D + 4) and pair.test.dimension == D + 1
    states = env.step(np.ones((2, D + 1), np.float32))[0]
    assert env.observation_space.contains(states[0])


def test_a_damaged_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "belief.safetensors"
    save_purifier(purifier(), path)
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    with pytest.raises(ArtifactError, match=r"belief\.safetensors"):
        load_purifier(path)


def test_a_specification_makes_the_environment_again(tmp_path):
    path = tmp_path / "belief.safetensors"
    save_purifier(BeliefPurifier.closed_form(make_world("KuaiFair-Toy-v0")), path)
    env = DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0", max_len=3), path, learns=True)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.learns and again.observation_space == env.observation_space
    np.testing.assert_array_equal(again.reset(seed=4)[0], env.reset(seed=4)[0])
    slate = env.action_space.sample()
    np.testing.assert_array_equal(again.step(slate)[0], env.step(slate)[0])


def test_what_a_belief_cannot_purify_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"make_sb3\(\.\.\.\), or wrap each single environment"):
        VecDSRM(DummyVecEnv([lambda: KuaiFairEnv(TEST, CONFIG)]), purifier())
    with pytest.raises(MismatchError, match="pretrain one for this environment"):
        VecDSRM(KuaiFairVecEnv(small_world(), CONFIG, 2), purifier())
    with pytest.raises(TypeError, match=r"VecNormalize beneath VecDSRM.*put it on top"):
        VecDSRM(VecNormalize(KuaiFairVecEnv(TEST, CONFIG, 2)), purifier())
    with pytest.raises(TypeError, match="use one purifier alone"):
        VecDSRM(vec(), purifier())
    with pytest.raises(TypeError, match="follows sessions from their start"):
        purifier().purify(np.zeros((1, D), np.float32), TEST.initial_history.take([0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a2c", "function"])
def test_a_belief_learns_while_serving_and_goes_on_after_a_stop(kind, tmp_path):
    def agent() -> Any:
        if kind == "function":
            return lambda seen: np.tanh(seen[:, :D] + seen[:, 2 * D + 2 : 3 * D + 2])
        return AGENTS["a2c"](vec(8, world=TRAIN))

    whole_env, env = vec(8), vec(8)
    whole = serve(agent(), whole_env, sessions=90)
    assert whole.settings.learning == ("posterior" if kind == "function" else "gradient and posterior")
    assert whole_env.belief.sessions == 90 and not whole_env.learns
    options: dict[str, Any] = {"sessions": 90, "folder": tmp_path, "checkpoint_every": 20}
    with pytest.raises(KeyboardInterrupt):
        serve(agent(), Stops(vec(8), 20), **options)
    assert list(tmp_path.glob("checkpoint-*"))
    result = serve(agent(), env, **options)
    for column, expected in whole.served.sessions.as_dict().items():
        np.testing.assert_array_equal(result.served.sessions.as_dict()[column], expected)
    for name, expected in whole_env.belief.tensors().items():
        np.testing.assert_array_equal(env.belief.tensors()[name], expected)
    assert result.after is not None and whole.after is not None
    np.testing.assert_array_equal(result.after.frame(), whole.after.frame())
    frozen = vec(8)
    assert serve(agent(), frozen, sessions=20, learn=False).settings.learning == "frozen"
    assert frozen.belief.sessions == 0


def test_another_belief_at_the_start_is_another_service(tmp_path):
    def policy(seen: Any) -> Any:
        return np.tanh(seen[:, :D])

    serve(policy, vec(8), sessions=20, folder=tmp_path)
    other = BeliefPurifier.closed_form(TRAIN, BeliefScales(shared=SharedScales(offset=0.2)))
    with pytest.raises(ArtifactError, match="agent_hash"):
        serve(policy, VecDSRM(KuaiFairVecEnv(TEST, CONFIG, 8, seed=0), other), sessions=20, folder=tmp_path)


def test_beliefs_judge_items_by_their_features_too():
    world = taste_worlds()[0]
    of_log, of_features = (
        pretrain(world, PretrainConfig(mode="closed_form", item_quality=quality)).scorer
        for quality in ("log", "features")
    )
    np.testing.assert_array_equal(of_log.directions, of_features.directions)
    term = fit_item_term(world, "features").of(world.data)[: world.n_items]
    # Popularity keeps its part, and the estimate takes the place of the click rate.
    coefficients = of_log.report.coefficients
    popularity = log_popularity(world.exposures)[: world.n_items]
    popularity = (popularity - popularity.mean()) / popularity.std()
    rest = of_features.item_scores - coefficients["popularity"] * popularity
    assert np.corrcoef(rest, np.sign(coefficients["click_rate"]) * term)[0, 1] > 0.99
    with pytest.raises(ValueError, match="item_quality is for beliefs"):
        PretrainConfig(mode="profile", item_quality="features")


@pytest.mark.slow
def test_candidates_judge_items_by_features_that_explain_the_log():
    appeal = np.random.default_rng(0).uniform(0.05, 0.95, 250)
    world = logged_pair(np.tile(appeal, (40, 1)), rows_per_user=200).train
    log, items = world.data.train, world.data.items
    shown, clicked = (np.bincount(log.items, weights, len(items)) for weights in (None, log.clicks))
    rates = (clicked + 1.0) / (shown + 2.0)
    noise = np.random.default_rng(0).normal(size=len(items))
    # Features are noise, or each item's own click rate.
    for values, explains in ((noise, False), (rates, True)):
        table = FeatureTable(np.column_stack([values] * 2).astype(np.float32), ("one", "again"))
        told = replace(world, data=replace(world.data, items=replace(items, features=table)))
        assert explained_share(told) > 0.5 if explains else explained_share(told) < 0.1
        report = pretrain(told, PretrainConfig(mode="candidates")).report
        assert report["item_quality"] == ("features" if explains else "log")
