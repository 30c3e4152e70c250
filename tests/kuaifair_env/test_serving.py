"""Serving: who comes when, what is counted, what agents may see, and that learning pays."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import Stops, small_world
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

import kuaifair_env
from hrl_policies.controls import Oracle, RandomSlates
from kuaifair_env import LearnsWhileServing, ServedStep, SessionConfig, evaluate, serve
from kuaifair_env.agent_view import world_for_agents
from kuaifair_env.checkpoints import NotPlainError, decode, encode
from kuaifair_env.errors import ArtifactError, DataError, HiddenTruthError
from kuaifair_env.files import file_hash, with_checksum
from kuaifair_env.intervals import crossed_mean
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.ranking import top_k
from kuaifair_env.response import FactorisedResponse, SequentialResponse, TransformerShape
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.served_sessions import ServedUsers
from kuaifair_env.serving_results import ServingResult, ServingSummary, session_figures
from kuaifair_env.splits import serving_split
from kuaifair_env.world import World

CONFIG = SessionConfig(max_len=5, slate_size=4, action_mode="slate", leave="popular_only")


class ItemCounts:
    """Shows the items with the best click rate so far, counted over all users; an eighth of the slots at random."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.steps: list[ServedStep] = []

    def bind(self, batch: Any) -> None:
        self._batch = batch
        if not hasattr(self, "clicks"):
            self.clicks = np.full(batch.world.n_items, 1.0)
            self.shown = np.full(batch.world.n_items, 2.0)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        scores = np.tile((self.clicks / self.shown).astype(np.float32), (len(observation), 1))
        if not deterministic:
            scores[self._rng.random(scores.shape) < 0.02] = 2.0
        return top_k(scores, self._batch.simulator.slate_size, self._batch.simulator.allowed), None

    def learn(self, step: ServedStep) -> None:
        self.steps.append(step)
        np.add.at(self.clicks, step.items[step.live], step.clicks[step.live])
        np.add.at(self.shown, step.items[step.live], 1.0)

    def save_served(self, path: Path) -> None:
        state = json.dumps(self._rng.bit_generator.state)
        with path.open("wb") as stream:
            np.savez(stream, clicks=self.clicks, shown=self.shown, state=np.asarray(state))

    def load_served(self, path: Path) -> None:
        with np.load(path) as arrays:
            self.clicks, self.shown = arrays["clicks"], arrays["shown"]
            self._rng.bit_generator.state = json.loads(str(arrays["state"]))


class FirstItems:
    """Shows the same slate to everybody."""

    def predict(self, observation: Any, **_: Any) -> tuple[Any, Any]:
        return np.tile(np.arange(4), (len(observation), 1)), None


def vec_env(world: World, n_envs: int = 8, config: SessionConfig = CONFIG) -> KuaiFairVecEnv:
    return KuaiFairVecEnv(world, config, n_envs, seed=0)


def good_and_bad_items() -> World:
    """Users click every tenth item nearly always, and others hardly ever."""
    appeal = np.where(np.arange(50) % 10 == 3, 0.9, 0.1)
    return small_world(np.broadcast_to(appeal, (40, 50)))


def same_sessions(one: Any, two: Any) -> bool:
    columns, others = one.sessions.columns(), two.sessions.columns()
    return all(np.array_equal(columns[name], others[name]) for name in columns)


def test_all_users_come_once_before_any_comes_again_in_an_order_of_their_own():
    world = small_world()
    source = ServedUsers(world, world.users, 100, order=0, seed=1)
    drawn = [source.next(np.arange(size)) for size in (7, 40, 30, 43)]
    users = np.concatenate([sessions.users for sessions in drawn])
    passes = [users[start : start + 40].tolist() for start in (0, 40, 80)]
    assert all(sorted(one) == world.users.tolist() for one in passes)
    assert passes[0] != passes[1] != passes[2]
    other = ServedUsers(world, world.users, 100, order=1, seed=1).next(np.arange(120))
    assert other.users[:40].tolist() != passes[0]
    keys = dict(zip(users.tolist()[:40], np.concatenate([one.keys for one in drawn]).tolist(), strict=False))
    assert all(keys[user] == key for user, key in zip(other.users[:40].tolist(), other.keys.tolist(), strict=False))


def test_sessions_beyond_the_counted_ones_go_on_with_the_next_users():
    world = small_world()
    sessions = ServedUsers(world, world.users[:3], 4, order=0, seed=0).next(np.arange(6))
    assert sessions.numbers.tolist() == [0, 1, 2, 3, -1, -1]
    assert sorted(sessions.users[3:].tolist()) == [0, 1, 2]
    assert len(set(sessions.keys.tolist())) == 6


def test_sessions_are_counted_in_the_order_in_which_they_start():
    world = small_world()
    result = serve(FirstItems(), vec_env(world), sessions=70, evaluate_others=False)
    expected = ServedUsers(world, world.user_rows(serving_split(world.user_ids)[0]), 70, 0, result.served.seed)
    users = expected.next(np.arange(70)).users
    assert result.served.sessions.numbers.tolist() == list(range(70))
    assert result.served.sessions.user_ids.tolist() == world.data.users.ids[users].tolist()
    settings = result.settings
    assert (settings.learning, settings.users, settings.n_envs, len(result)) == ("frozen", 32, 8, 70)


@pytest.mark.parametrize("policy", [FirstItems(), RandomSlates(seed=3)])
def test_what_learns_nothing_serves_alike_however_many_come_at_a_time(policy):
    world = small_world()
    one, two = (serve(policy, vec_env(world, n_envs), sessions=50, evaluate_others=False) for n_envs in (3, 16))
    assert same_sessions(one.served, two.served)
    assert one.summary() == two.summary()
    other = serve(policy, vec_env(world, 3), sessions=50, order=1, evaluate_others=False)
    assert not same_sessions(one.served, other.served)


def test_first_visits_are_the_sessions_that_evaluation_plays():
    world = small_world()
    env, policy = vec_env(world), FirstItems()
    served = serve(policy, env, world.user_ids, sessions=40, seed=5, evaluate_others=False).served.sessions
    evaluated = evaluate(policy, env, seed=5).sessions
    assert np.array_equal(served.return_[np.argsort(served.user_ids)], evaluated.return_)


def test_an_agent_that_learns_gets_better_and_keeps_what_it_learned():
    lasts = []
    for seed in range(3):
        agent = ItemCounts(seed)
        result = serve(agent, vec_env(good_and_bad_items()), sessions=300)
        assert result.settings.learning == "posterior"
        lasts.append(result.last(40)["r_cum"])
        assert lasts[-1] > result.first(40)["r_cum"] + 0.1
        assert result.after.summary()["r_cum"] > 2 * result.before.summary()["r_cum"]
        assert result.after.sessions.user_ids.tolist() == serving_split(result_users(result))[1].tolist()
    frozen = serve(ItemCounts(), vec_env(good_and_bad_items()), sessions=300, learn=False)
    assert (frozen.settings.learning, frozen.settings.reason) == ("frozen", "asked to learn nothing")
    assert frozen.before is None
    assert min(lasts) > 2 * frozen.last(40)["r_cum"]


def result_users(result: Any) -> Any:
    return np.arange(0, 10 * result.served.world["users"], 10)


def test_steps_say_who_was_shown_what():
    world, agent = good_and_bad_items(), ItemCounts()
    result = serve(agent, vec_env(world), sessions=20, evaluate_others=False)
    served = result.served.sessions
    live = np.concatenate([step.live for step in agent.steps])
    users, done, steps, clicks = (
        np.concatenate([getattr(step, name) for step in agent.steps])[live]
        for name in ("users", "done", "steps", "clicks")
    )
    assert done.sum() == 20
    assert len(users) == served.length.sum()
    assert (steps == 0).sum() == 20
    assert clicks.sum() / 4 == pytest.approx(served.return_.sum())
    for user in np.unique(users):
        own = np.flatnonzero(world.data.users.ids[user] == served.user_ids)
        assert np.sort(steps[users == user]).tolist() == sorted(
            step for session in own for step in range(served.length[session])
        )
    assert not all(step.live.all() for step in agent.steps), "free places go on with others at the end"


def test_four_fifths_of_the_users_are_served_and_the_split_does_not_depend_on_the_world():
    ids = np.arange(0, 1_000, 10)
    served, others = serving_split(ids)
    assert len(served) == 80
    assert sorted([*served, *others]) == ids.tolist()
    assert others[:5].tolist() == PINNED
    assert serving_split(ids)[0].tolist() == served.tolist()
    assert [len(part) for part in serving_split(ids[:1])] == [1, 0]


PINNED = [10, 60, 80, 110, 160]


class Curious(ItemCounts):
    """Asks its sessions for everything that it may not know."""

    asked: ClassVar[int] = 0

    def bind(self, batch: Any) -> None:
        super().bind(batch)
        world = batch.world
        for ask in (
            lambda: world.response.expected(world.users[:2], np.zeros((2, 1), np.int64)),
            lambda: world.response.expected_catalogue(world.users, world.n_items),
            lambda: world.response.table,
            lambda: world.tolerated_shares,
            lambda: world.true_preference[0],
            lambda: world.data.test.clicks,
            lambda: len(world.data.test),
            lambda: batch.simulator.world.response.table,
            lambda: batch.simulator.expected_catalogue(),
            lambda: batch.simulator.source.next(np.arange(2)),
            lambda: batch.simulator.state()["leave"],
            lambda: batch.simulator.step(np.zeros((8, 4), np.int64)),
            lambda: batch.step(np.zeros((8, 4), np.int64)),
            lambda: batch.chosen_sessions(np.arange(1), [{}]),
            lambda: batch.simulator._leave,
            lambda: batch._observer,
        ):
            with pytest.raises(HiddenTruthError, match="agents are not told"):
                ask()
            type(self).asked += 1
        assert str(world.fingerprint) == str(KNOWN.fingerprint)
        assert world.describe() == KNOWN.describe()
        assert batch.batch_size == len(batch.simulator.users) == len(batch.user_ids)


KNOWN = small_world()
KNOWN = replace(KNOWN, true_preference=(np.zeros((50, 2), np.float32), np.zeros((40, 2), np.float32)))


def test_nothing_of_the_world_reaches_an_agent_but_what_it_is_shown():
    env = vec_env(KNOWN)
    serve(Curious(), env, sessions=10)
    assert Curious.asked == 16 * 5, "evaluated before, bound back, served, evaluated after, bound back"
    assert env.world is KNOWN
    assert env.batch.world is KNOWN
    assert env.get_attr("world")[0] is KNOWN


class Peeking(A2C):
    """Asks its environment for what users like when it begins to learn."""

    def _setup_learn(self, *arguments: Any, **named: Any) -> Any:
        env = self.get_env()
        for ask in (
            lambda: env.unwrapped.world.response.expected_catalogue(np.arange(2), 3),
            lambda: env.get_attr("world")[0].data.test.clicks,
            lambda: env.unwrapped.batch.simulator.expected_catalogue(),
            lambda: env.unwrapped.batch.world.tolerated_shares,
            lambda: env.unwrapped.batch.state(),
        ):
            with pytest.raises(HiddenTruthError, match="agents are not told"):
                ask()
        self.peeked = True
        return super()._setup_learn(*arguments, **named)


def test_algorithms_learn_in_a_world_without_its_truth():
    env = vec_env(KNOWN, 8, EMBEDDING)
    model = algorithm(Peeking, vec_env(KNOWN, 8, EMBEDDING), n_steps=4, **SMALL)
    serve(model, env, sessions=20)
    assert model.peeked
    assert env.world is KNOWN


def test_who_is_privileged_sees_the_truth():
    result = serve(Oracle(), vec_env(KNOWN), sessions=40, evaluate_others=False)
    blind = serve(FirstItems(), vec_env(KNOWN), sessions=40, evaluate_others=False)
    assert result.summary()["r_cum"] > blind.summary()["r_cum"]


def test_a_world_for_agents_can_be_used_like_any_other():
    view = world_for_agents(KNOWN)
    again = replace(view, embeddings=2 * view.embeddings)
    assert again.exposures.tolist() == KNOWN.exposures.tolist()
    with pytest.raises(HiddenTruthError):
        again.response.expected(None, None)


def test_curves_and_means_are_those_of_the_records():
    result = serve(ItemCounts(), vec_env(good_and_bad_items()), sessions=100, evaluate_others=False)
    records, curve = result.served.sessions, result.curve(4)
    assert curve["sessions"].tolist() == [25, 50, 75, 100]
    assert curve["r_cum"] == pytest.approx([records.return_[part : part + 25].mean() for part in (0, 25, 50, 75)])
    whole = session_figures(records)
    summary = result.served.summary()
    assert {name: whole[name] for name in whole} == pytest.approx({name: summary[name] for name in whole})
    assert result.first(30) == session_figures(records.take(np.arange(30)))
    assert result.last(30) == session_figures(records.take(np.arange(70, 100)))
    assert len(result.curve(1_000)["len"]) == 100


def test_the_result_says_where_it_comes_from():
    result = serve(ItemCounts(), vec_env(KNOWN), sessions=10, order=3)
    assert result.served.world["fingerprint"]["id"] == KNOWN.fingerprint.describe()["id"]
    assert result.served.config["max_len"] == 5
    for text in (repr(result), result.table()):
        assert "ItemCounts: posterior; 10 sessions of 32 users in order 3, 8 at a time" in text
    assert "last_r_cum" in result.table()


def test_services_in_several_orders_are_summed_up_with_a_students_interval():
    results = [
        serve(FirstItems(), vec_env(KNOWN), sessions=20, order=order, evaluate_others=False) for order in range(5)
    ]
    summary = ServingSummary.of(results)
    values = np.asarray([result.summary()["r_cum"] for result in results])
    assert summary.means["r_cum"] == pytest.approx(values.mean())
    assert summary.intervals["r_cum"].half_width == pytest.approx(2.776445 * values.std(ddof=1) / np.sqrt(5))
    assert (summary.runs, summary.orders, summary.seeds) == (5, 5, 1)
    assert "5 services: 5 orders, 1 seeds" in summary.table()
    with pytest.raises(ValueError, match="same order and seed"):
        ServingSummary.of([results[0], results[0]])
    other = serve(FirstItems(), vec_env(KNOWN), sessions=30, order=9, evaluate_others=False)
    with pytest.raises(ValueError, match="differ in sessions"):
        ServingSummary.of([results[0], other])


def test_the_interval_over_orders_and_seeds_is_that_of_two_crossed_factors():
    rng = np.random.default_rng(0)
    result = serve(FirstItems(), vec_env(KNOWN), sessions=5, evaluate_others=False)
    table = rng.normal(size=(3, 1)) + rng.normal(size=5) + rng.normal(size=(3, 5))
    services = [_Fixed(result, order, seed, table[seed, order]) for order in range(5) for seed in range(3)]
    rng.shuffle(services)
    summary = ServingSummary.of(services)  # type: ignore[arg-type]
    assert summary.intervals["r_cum"].half_width == pytest.approx(crossed_mean(table).half_width())
    assert (summary.runs, summary.orders, summary.seeds) == (15, 5, 3)


def test_services_that_are_not_crossed_are_independent_by_orders_or_by_seeds():
    result = serve(FirstItems(), vec_env(KNOWN), sessions=5, evaluate_others=False)
    values = np.random.default_rng(1).normal(size=6)

    def half_width(keys):
        services = [_Fixed(result, order, seed, value) for (order, seed), value in zip(keys, values, strict=True)]
        return ServingSummary.of(services).intervals["r_cum"].half_width  # type: ignore[arg-type]

    of_pairs = values.reshape(3, 2).mean(axis=1)
    assert half_width([(n, n) for n in range(6)]) == pytest.approx(crossed_mean(values[None]).half_width())
    for keys in ([(n // 2, n) for n in range(6)], [(n, n // 2) for n in range(6)]):
        assert half_width(keys) == pytest.approx(crossed_mean(of_pairs[None]).half_width())
    with pytest.raises(ValueError, match="every seed in every order"):
        half_width([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 2)])


@pytest.mark.parametrize("name", ["ad", "first_violation_rate"])
@pytest.mark.parametrize("values", [[0.01, 0.0, 0.02, 0.0, 0.12], [0.99, 1.0, 0.97, 1.0, 0.9]])
def test_intervals_of_rates_stay_inside_zero_and_one(name, values):
    """Student's would reach below 0 and above 1."""
    result = serve(FirstItems(), vec_env(KNOWN), sessions=5, evaluate_others=False)
    services = [_Fixed(result, order, 0, value, name) for order, value in enumerate(values)]
    interval = ServingSummary.of(services).intervals[name]  # type: ignore[arg-type]
    assert 0.0 <= interval.low < np.mean(values) < interval.high <= 1.0


def test_what_is_the_same_in_all_services_has_no_interval():
    """Such as an agent before it serves, who is the same in every order: that says nothing of other orders."""
    result = serve(FirstItems(), vec_env(KNOWN), sessions=5, evaluate_others=False)
    for figure, value in (("before_r_cum", 4.2), ("violation_rate", 0.0), ("ad", 0.1 + 0.2)):
        services = [_Fixed(result, order, 0, value, figure) for order in range(3)]
        summary = ServingSummary.of(services)  # type: ignore[arg-type]
        assert summary.means[figure] == pytest.approx(value)
        assert not summary.intervals


class _Fixed:
    """A service of which only one figure is known."""

    def __init__(self, like: Any, order: int, seed: int, value: float, figure: str = "r_cum") -> None:
        self.settings = replace(like.settings, order=order, agent_seed=seed)
        self._figures = {figure: value}

    def summary(self) -> dict[str, float]:
        return self._figures


def test_the_environment_goes_on_where_it_was():
    env, again = vec_env(KNOWN), vec_env(KNOWN)
    actions = np.tile(np.arange(4), (8, 1))
    for one in (env, again):
        one.reset()
        one.step(actions)
    serve(ItemCounts(), env, sessions=10)
    for _ in range(6):
        assert np.array_equal(env.step(actions)[0], again.step(actions)[0])


@pytest.mark.parametrize("settings", [{"sessions": 0}, {"order": -1}])
def test_numbers_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="at least"):
        serve(FirstItems(), vec_env(KNOWN), **settings)


def test_unknown_users_and_other_environments_are_refused():
    with pytest.raises(DataError, match="user 7 has no sessions"):
        serve(FirstItems(), vec_env(KNOWN), [7])
    with pytest.raises(TypeError, match="KuaiFair environment"):
        serve(FirstItems(), None)  # type: ignore[arg-type]


def test_single_environments_are_run_as_one_batch():
    env = kuaifair_env.KuaiFairEnv(KNOWN, CONFIG)
    result = serve(FirstItems(), env, sessions=20, n_envs=5, evaluate_others=False)
    assert result.settings.n_envs == 5
    assert isinstance(ItemCounts(), LearnsWhileServing)
    assert not isinstance(FirstItems(), LearnsWhileServing)


EMBEDDING = replace(CONFIG, action_mode="embedding")
SMALL = {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", "seed": 3}
SMALL_LSTM = SMALL | {"policy_kwargs": {"net_arch": [16], "lstm_hidden_size": 8}}
OFF_POLICY = SMALL | {"buffer_size": 200, "batch_size": 16, "learning_starts": 40, "train_freq": 2}


def algorithm(kind: Any, env: Any, **settings: Any) -> Any:
    # Stable-Baselines3 writes into its policy_kwargs.
    return kind("MlpLstmPolicy" if kind is RecurrentPPO else "MlpPolicy", env, **deepcopy(settings))


AGENTS = {
    "posterior": (lambda env: ItemCounts(7), CONFIG),
    "frozen": (lambda env: RandomSlates(seed=2), CONFIG),
    "a2c": (lambda env: algorithm(A2C, env, n_steps=4, learning_rate=0.01, **SMALL), EMBEDDING),
    "ppo": (lambda env: algorithm(PPO, env, n_steps=4, batch_size=16, n_epochs=2, **SMALL), EMBEDDING),
    "recurrent-ppo": (
        lambda env: algorithm(RecurrentPPO, env, n_steps=4, batch_size=16, n_epochs=2, **SMALL_LSTM),
        EMBEDDING,
    ),
    "sac": (lambda env: algorithm(SAC, env, **OFF_POLICY), EMBEDDING),
    "td3": (
        lambda env: algorithm(TD3, env, action_noise=NormalActionNoise(np.zeros(8), np.full(8, 0.3)), **OFF_POLICY),
        EMBEDDING,
    ),
}


def trained_agent(kind: str, world: World) -> tuple[Any, Any]:
    """An agent of this kind, trained a little where it can be, and the settings of its sessions."""
    make, config = AGENTS[kind]
    agent = make(vec_env(world, 8, config))
    if isinstance(agent, BaseAlgorithm):
        agent.learn(80)
    return agent, config


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(AGENTS))
def test_a_service_that_was_stopped_goes_on_to_the_same_numbers(kind, tmp_path):
    world = small_world()
    whole_agent, config = trained_agent(kind, world)
    whole = serve(whole_agent, vec_env(world, 8, config), sessions=90)
    options: dict[str, Any] = {"sessions": 90, "folder": tmp_path, "checkpoint_every": 20}
    with pytest.raises(KeyboardInterrupt):
        serve(trained_agent(kind, world)[0], Stops(vec_env(world, 8, config), 30), **options)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1
    agent = trained_agent(kind, world)[0]
    result = serve(agent, vec_env(world, 8, config), **options)
    assert same_sessions(result.served, whole.served)
    assert result.served.summary() == whole.served.summary()
    assert same_sessions(result.after, whole.after)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["result.json", "sessions.npz"]
    if isinstance(agent, BaseAlgorithm):
        for one, two in zip(agent.policy.parameters(), whole_agent.policy.parameters(), strict=True):
            assert torch.equal(one, two)
        assert agent.num_timesteps == whole_agent.num_timesteps > 80
        assert result.settings.learning == "gradient"


@pytest.mark.parametrize(
    "settings",
    [
        {"repeats": "forbid"},
        {"leave": "personal"},
        {"leave": "category"},
        {"leave": "strict", "slate_size": 2},
        {"session_clock": True},
    ],
)
def test_sessions_of_every_kind_go_on_after_a_stop(settings, tmp_path):
    world, config = small_world(), replace(CONFIG, **settings)
    whole = serve(ItemCounts(), vec_env(world, 8, config), sessions=60, evaluate_others=False)
    options: dict[str, Any] = {"sessions": 60, "folder": tmp_path, "checkpoint_every": 8, "evaluate_others": False}
    with pytest.raises(KeyboardInterrupt):
        serve(ItemCounts(), Stops(vec_env(world, 8, config), 13), **options)
    assert list(tmp_path.glob("checkpoint-*"))
    assert same_sessions(serve(ItemCounts(), vec_env(world, 8, config), **options).served, whole.served)


def tastes_of_two_dimensions() -> FactorisedResponse:
    rng = np.random.default_rng(0)
    vectors, items = rng.standard_normal((40, 2)), rng.standard_normal((50, 2))
    return FactorisedResponse(0.0, np.zeros(40), np.zeros(50), vectors, items)


def clicks_that_depend_on_what_was_shown() -> SequentialResponse:
    rng = np.random.default_rng(1)
    shape = TransformerShape(dimension=8, heads=2, layers=1, hidden=16, length=12)
    codes = [rng.normal(size=(n, shape.dimension)).astype(np.float32) for n in (50, 40)]
    weights = {name: rng.normal(0, 0.6, size).astype(np.float32) for name, size in shape.weight_shapes().items()}
    return SequentialResponse(tastes_of_two_dimensions(), shape, *codes, weights, {})


@pytest.mark.parametrize(
    ("response", "settings"), [(tastes_of_two_dimensions, {"drift": 2}), (clicks_that_depend_on_what_was_shown, {})]
)
def test_users_who_change_within_a_session_go_on_after_a_stop(response, settings, tmp_path):
    """Drifted tastes, and what was shown so far, belong to the running sessions."""
    world, config = replace(small_world(0.5), response=response()), replace(CONFIG, **settings)
    whole = serve(ItemCounts(), vec_env(world, 8, config), sessions=60, evaluate_others=False)
    still = serve(ItemCounts(), vec_env(replace(world, response=tastes_of_two_dimensions())), sessions=60)
    assert not same_sessions(whole.served, still.served)
    options: dict[str, Any] = {"sessions": 60, "folder": tmp_path, "checkpoint_every": 8, "evaluate_others": False}
    with pytest.raises(KeyboardInterrupt):
        serve(ItemCounts(), Stops(vec_env(world, 8, config), 13), **options)
    assert list(tmp_path.glob("checkpoint-*"))
    assert same_sessions(serve(ItemCounts(), vec_env(world, 8, config), **options).served, whole.served)


def test_a_service_in_a_randomised_training_world_says_which_block_sessions_are_of_and_goes_on_after_a_stop(tmp_path):
    scales = Randomisation(min_block=10, max_block=20)
    world = randomised(replace(small_world(), split="train"), scales)
    whole_agent, agent = ItemCounts(), ItemCounts()
    whole = serve(whole_agent, vec_env(world, 8), sessions=60, evaluate_others=False)
    options: dict[str, Any] = {"sessions": 60, "folder": tmp_path, "checkpoint_every": 8, "evaluate_others": False}
    with pytest.raises(KeyboardInterrupt):
        serve(ItemCounts(), Stops(vec_env(world, 8), 20), **options)
    assert same_sessions(serve(agent, vec_env(world, 8), **options).served, whole.served)
    blocks = np.stack([step.blocks for step in whole_agent.steps])
    assert blocks.min() == 0 and 3 <= blocks.max() <= 7
    later = np.diff(blocks, axis=0)
    assert (later >= 0).all() and not later[~np.stack([step.done for step in whole_agent.steps])[:-1]].any()
    np.testing.assert_array_equal(np.stack([step.blocks for step in agent.steps]), blocks[-len(agent.steps) :])


def test_a_service_may_be_shorter_than_there_are_places():
    agent = ItemCounts()
    result = serve(agent, vec_env(KNOWN, 8), sessions=3, evaluate_others=False)
    assert len(result) == 3
    assert all(step.live.sum() <= 3 for step in agent.steps)


def test_a_finished_service_is_read_again(tmp_path):
    world = small_world()
    results = [serve(ItemCounts(), vec_env(world), sessions=20, folder=tmp_path) for _ in range(2)]
    assert repr(results[0]) == repr(results[1])
    assert results[0].summary() == results[1].summary()
    assert same_sessions(results[0].before, results[1].before)
    assert results[1].served.fairness == results[0].served.fairness
    with pytest.raises(ArtifactError, match="another run: order was 0 there and is 1 here"):
        serve(ItemCounts(), vec_env(world), sessions=20, order=1, folder=tmp_path)
    sessions = (tmp_path / "sessions.npz").read_bytes()
    (tmp_path / "sessions.npz").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"sessions\.npz was altered"):
        ServingResult.load(tmp_path)
    content = (tmp_path / "result.json").read_text()
    (tmp_path / "result.json").write_text(content.replace('"order": 0', '"order": 1'))
    with pytest.raises(ArtifactError, match=r"result\.json was altered"):
        ServingResult.load(tmp_path)
    with np.load(io.BytesIO(sessions)) as stored:
        arrays = dict(stored)
    for column, values in (("length", np.zeros(0, np.int64)), ("return_", np.full(20, np.nan))):
        np.savez(tmp_path / "sessions.npz", **arrays | {f"served.{column}": values})
        forged = json.loads(content) | {"sessions": file_hash(tmp_path / "sessions.npz")}
        del forged["sha256"]
        (tmp_path / "result.json").write_text(json.dumps(with_checksum(forged)))
        with pytest.raises(ArtifactError, match="not a whole result"):
            ServingResult.load(tmp_path)
    for junk in (b"\xff\xfe\x00", b"[]", b"{}"):
        (tmp_path / "result.json").write_bytes(junk)
        with pytest.raises(ArtifactError, match="not a whole result"):
            ServingResult.load(tmp_path)
    with pytest.raises(ArtifactError, match=r"result\.json cannot be read: No such file"):
        ServingResult.load(tmp_path / "elsewhere")


def test_checkpoints_of_other_services_and_damaged_ones_are_refused(tmp_path):
    world = small_world()
    options: dict[str, Any] = {"sessions": 90, "folder": tmp_path, "checkpoint_every": 20}
    with pytest.raises(KeyboardInterrupt):
        serve(ItemCounts(), Stops(vec_env(world), 30), **options)
    with pytest.raises(ArtifactError, match="seed was 2603 there and is 5 here"):
        serve(ItemCounts(), vec_env(world), seed=5, **options)
    state = next(tmp_path.glob("checkpoint-*/state.json"))
    header = json.loads(state.read_text())
    entries = header["state"]["dict"]
    more = header["state"] | {"dict": entries | {"finished": entries["finished"] + 1}}
    state.write_text(json.dumps(header | {"state": more}))
    with pytest.raises(ArtifactError, match=r"state\.json was altered"):
        serve(ItemCounts(), vec_env(world), **options)
    misfits = [{}, [], {"dict": {}}, {"tensor": "state"}, {"array": "nowhere"}, {"generator": {"dict": {}}}]
    misfits += [{"dict": entries | {name: {"list": []}}} for name in entries if name not in ("agent", "wrappers")]
    for misfit in misfits:
        state.write_text(json.dumps(with_checksum(header | {"state": misfit})))
        with pytest.raises(ArtifactError, match=r"checkpoint-\d+ is not a whole checkpoint"):
            serve(ItemCounts(), vec_env(world), **options)
    next(tmp_path.glob("checkpoint-*/arrays.npz")).write_bytes(b"nothing")
    state.write_text(json.dumps(header))
    with pytest.raises(ArtifactError, match=r"arrays\.npz was altered"):
        serve(ItemCounts(), vec_env(world), **options)
    for junk in (b"\xff\xfe\x00", b"[]", json.dumps(header | {"files": []}).encode()):
        state.write_bytes(junk)
        with pytest.raises(ArtifactError, match="not a whole checkpoint"):
            serve(ItemCounts(), vec_env(world), **options)


def test_an_algorithm_learns_as_in_its_own_learn_and_gets_its_environment_back():
    world = small_world()
    env, own = vec_env(world, 8, EMBEDDING), vec_env(world, 8, EMBEDDING)
    model = algorithm(A2C, own, n_steps=4, **SMALL).learn(64)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    result = serve(model, env, sessions=40, evaluate_others=False)
    assert (result.settings.learning, result.settings.agent, result.settings.agent_seed) == ("gradient", "A2C", 3)
    steps = model.num_timesteps - 64
    assert result.served.sessions.length.sum() <= steps <= 48 * CONFIG.max_len
    assert any(not torch.equal(one, two) for one, two in zip(before, model.policy.parameters(), strict=True))
    assert model.get_env() is own
    model.learn(64, reset_num_timesteps=False)
    again = serve(model, env, sessions=40, learn=False, evaluate_others=False)
    assert again.settings.learning == "frozen"
    with pytest.raises(ValueError, match="learns from 8 sessions at a time, and here are 5"):
        serve(model, vec_env(world, 5, EMBEDDING), sessions=10)


def test_states_are_kept_as_they_are():
    arrays: dict[str, Any] = {}
    rng, other = np.random.default_rng(1), np.random.Generator(np.random.MT19937(2))
    value = {"a": (1, 2.5, None, "x"), "b": [np.arange(3), np.float32(2)], "c": rng, "d": other, "e": torch.ones(2)}
    node = json.loads(json.dumps(encode(value, arrays, "state")))
    expected = rng.random(), other.random()
    back = decode(node, arrays)
    assert back["a"] == value["a"]
    assert back["b"][0].tolist() == [0, 1, 2]
    assert (back["b"][1], back["b"][1].dtype) == (2, np.float32)
    assert (back["c"].random(), back["d"].random()) == expected
    assert torch.equal(back["e"], value["e"])
    held = torch.zeros(2)
    decode(node, arrays, {"e": held, "c": rng})
    assert torch.equal(held, torch.ones(2)), "tensors that others hold are set in place"
    assert rng.random() == expected[0]
    for strange in (object(), np.asarray([None]), {1: 2}):
        with pytest.raises(NotPlainError):
            encode(strange, {}, "state")
