"""GuardCallback: an agent ends with what it learned only where that is shown to be better than where it started."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import small_world
from logged_worlds import logged_pair
from small_worlds import interrupted_pair, small_pair
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file

from dsrm.candidates import CandidatePurifier
from dsrm.purifier import load_purifier, save_purifier
from hrl_policies import GuardCallback
from hrl_policies.guard import START, guard_of_run, validation_sessions
from hrl_policies.hrl_ppo import HierarchicalPPO
from hrl_policies.study import evaluate_run, load_policy, load_run, plan_run, resume, train
from hrl_policies.study.config import PurifierIdentity
from hrl_policies.worlds import purified_sessions, training_sessions
from kuaifair_env import ArtifactError, SessionConfig, evaluate, serve
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.sb3 import KuaiFairVecEnv

# Users love every third item, which the log does not tell.
TABLE = np.tile(np.where(np.arange(50) % 3 == 1, 0.85, 0.1), (40, 1))
TRAIN = replace(small_world(TABLE), split="train")
SLATES = SessionConfig(max_len=8, slate_size=4, action_mode="slate")
QUERIES = SessionConfig(max_len=10, slate_size=6)
PURIFIER = CandidatePurifier.closed_form(TRAIN)
# Here the log tells it, so that nothing is to be gained over the belief.
KNOWN = logged_pair(TABLE).train
OF_KNOWN = CandidatePurifier.closed_form(KNOWN)
SMALL = {"n_steps": 8, "batch_size": 32, "n_epochs": 2, "device": "cpu"}


class Ungrateful(HierarchicalPPO):
    """Earns the less the more users like."""

    def _level_rewards(self, reward, fair, cost):
        return -super()._level_rewards(reward, fair, cost)


class StopAfter(BaseCallback):
    """Ends training after so many steps of all sessions."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self._last = calls

    def _on_step(self) -> bool:
        return self.n_calls < self._last


def ranking(seed=0, kind=HierarchicalPPO, env=None, **settings) -> HierarchicalPPO:
    env = training_sessions(TRAIN, SLATES, 8, seed, purifier=PURIFIER) if env is None else env
    return kind("RankingPolicy", env, seed=seed, slot_credit=0.0, **SMALL, **settings)


def guard(**settings) -> GuardCallback:
    sessions = validation_sessions(TRAIN, SLATES, 99, purifier=PURIFIER)
    return GuardCallback(sessions, **({"sessions_per_unit": 4, "n_eval_episodes": 2} | settings))


def parameters(model) -> dict[str, torch.Tensor]:
    """Returns all that is restored, flat: networks and what both optimisers remember."""
    tensors = {}
    for part, state in model.get_parameters().items():
        if part == "policy":
            tensors |= {f"{part}.{name}": value.clone() for name, value in state.items()}
            continue
        for number, memory in state["state"].items():
            tensors |= {f"{part}.{number}.{name}": torch.as_tensor(value).clone() for name, value in memory.items()}
    return tensors


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize(("harm", "seeds"), [("reversed rewards", 2), ("huge steps", 1)])
def test_an_agent_that_was_harmed_ends_as_it_started_bit_by_bit(harm, seeds):
    kind, rate = (Ungrateful, 0.01) if harm == "reversed rewards" else (HierarchicalPPO, 1.0)
    last = []
    for seed in range(seeds):
        env = training_sessions(KNOWN, SLATES, 8, seed, purifier=OF_KNOWN, randomisation=None)
        model = ranking(seed, kind, env, learning_rate=rate, target_kl=None, hierarchy={"start_temperature": 2.0})
        start = parameters(model)
        validation = validation_sessions(KNOWN, SLATES, 99, purifier=OF_KNOWN, randomisation=None)
        callback = GuardCallback(validation, sessions_per_unit=4, n_eval_episodes=2)
        model.learn(1024, callback=callback)
        assert callback.kept == START
        assert [evaluation.timesteps for evaluation in callback.evaluations] == [512, 1024]
        # Optimisers too: at the start they remember nothing.
        assert same(parameters(model), start)
        last.append(callback.evaluations[-1].difference)
    if harm == "reversed rewards":
        assert np.mean(last) < -0.05


@pytest.mark.slow
def test_an_agent_that_gained_keeps_its_gain():
    measured, elsewhere = [], []
    for seed in range(3):
        train_env = KuaiFairVecEnv(replace(small_world(TABLE), split="train"), QUERIES, 8, seed)
        model = A2C("MlpPolicy", train_env, seed=seed, device="cpu", learning_rate=0.01)
        other = KuaiFairVecEnv(small_world(TABLE), QUERIES, 40, 1)
        before = evaluate(model, other, seed=5).engagement.cumulative_reward
        callback = GuardCallback(KuaiFairVecEnv(train_env.world, QUERIES, 40, 2), n_evaluations=3, n_eval_episodes=3)
        model.learn(4_000, callback=callback)
        best = max(callback.evaluations, key=lambda evaluation: evaluation.difference)
        assert callback.kept == best.timesteps and best.low > 0
        measured.append(best.difference)
        elsewhere.append(evaluate(model, other, seed=5).engagement.cumulative_reward - before)
        # The kept agent has in the same sessions what the guard says that it gains there.
        now = evaluate(model, callback.eval_envs[0], episodes_per_user=3, seed=callback.seed)
        gained = now.engagement.cumulative_reward - callback.describe()["start_r_cum"]
        assert gained == pytest.approx(best.difference)
    assert np.mean(elsewhere) > 0.5 * np.mean(measured) > 0.1, (measured, elsewhere)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_gain_that_is_a_loss_among_other_users_is_not_kept(seed):
    train_env = KuaiFairVecEnv(replace(small_world(TABLE), split="train"), QUERIES, 8, seed)
    model = A2C("MlpPolicy", train_env, seed=seed, device="cpu", learning_rate=0.01)
    start = parameters(model)
    same_users, others = (KuaiFairVecEnv(small_world(table), QUERIES, 40, 2) for table in (TABLE, 0.9 - TABLE))
    gained = GuardCallback(same_users, n_evaluations=3, n_eval_episodes=3)
    both = GuardCallback(same_users, other_eval_envs=[others], n_evaluations=3, n_eval_episodes=3)
    model.learn(4_000, callback=[gained, both])
    assert gained.kept != START
    assert both.kept == START and max(evaluation.difference for evaluation in both.evaluations) < 0
    assert both.describe()["start_r_cum"] == gained.describe()["start_r_cum"]
    assert same(parameters(model), start)


def test_an_agent_that_did_not_move_has_no_difference_and_stays():
    model, callback = ranking(learning_rate=0.0), guard()
    model.learn(128, callback=callback)
    assert callback.kept == START
    assert all(evaluation[1:] == (0.0, 0.0, 0.0) for evaluation in callback.evaluations)


@pytest.mark.slow
def test_the_guard_leaves_training_as_it_was():
    plain = ranking().learn(128)
    guarded, callback, held = ranking(), guard(), {}
    callback._decide = lambda: held.update(parameters(guarded))
    guarded.learn(128, callback=callback)
    assert same(held, parameters(plain))


def test_the_best_evaluation_counts_and_not_the_last():
    model, callback = ranking(), guard(n_evaluations=3)
    gains, seen = iter([0.0, 1.0, -1.0, -1.0]), []

    def units():
        seen.append(parameters(model))
        return [np.full(10, next(gains)) + 0.1 * np.arange(10) * (len(seen) > 1)]

    callback._all_units = units
    model.learn(192, callback=callback)
    steps = [evaluation.timesteps for evaluation in callback.evaluations]
    assert steps == [64, 128, 192] and callback.kept == 64
    assert same(parameters(model), seen[1])
    assert not same(seen[1], seen[3])


def test_validation_meets_other_deviations_than_training_and_many_of_them():
    scales = Randomisation(offset=0.5, min_block=64, max_block=5_000)
    training = training_sessions(TRAIN, SLATES, 8, 0, randomisation=scales).unwrapped
    validation = validation_sessions(TRAIN, SLATES, 99, randomisation=scales).unwrapped
    ours, theirs = (env.world.randomisation for env in (validation, training))
    assert ours.seed != theirs.seed
    assert theirs.scales == scales and ours.scales == replace(scales, min_block=1, max_block=1)
    validation.reset()
    assert len(set(validation.batch.blocks.tolist())) == 128
    assert validation_sessions(TRAIN, SLATES, 99, randomisation=None).unwrapped.world is TRAIN


def test_small_trainings_have_small_guards():
    def sessions(steps):
        made = guard_of_run({}, TRAIN, SLATES, randomisation="auto", purifier=PURIFIER, seed=11, total_steps=steps)
        return [len(made.eval_envs), made.n_users * made.n_eval_episodes]

    assert sessions(100) == [2, 32], "users who deviate as in training, and users who do not"
    assert sessions(10**6) == [2, 200], "each of 40 users as often as comes closest to 384 / 2 sessions"
    with pytest.raises(ArtifactError, match=r"guard: n_session is unknown; there are level, n_evaluations, n_sessions"):
        guard_of_run({"n_session": 3}, TRAIN, SLATES, randomisation=None, purifier=PURIFIER, seed=11, total_steps=100)


@pytest.mark.slow
def test_training_that_stops_early_decides_nothing_and_goes_on_from_a_file(tmp_path):
    model, callback = ranking(), guard(n_evaluations=4)
    model.learn(256, callback=[StopAfter(16), callback])
    assert callback.kept is None and len(callback.evaluations) == 1
    model.save(tmp_path / "model.zip")
    callback.save(tmp_path / "guard.zip")
    read = guard(n_evaluations=4)
    read.load(tmp_path / "guard.zip")
    ends = []
    for each in (callback, read):
        again = ranking()
        again.set_parameters(str(tmp_path / "model.zip"), device="cpu")
        again.num_timesteps = model.num_timesteps
        again.learn(128, callback=each, reset_num_timesteps=False)
        ends.append((parameters(again), each.describe()))
    assert ends[0][1] == ends[1][1]
    assert same(ends[0][0], ends[1][0])
    assert [evaluation["timesteps"] for evaluation in ends[0][1]["evaluations"]] == [64, 128, 192, 256]

    for name, content in (("damaged", b"no zip"), ("empty", b"")):
        (tmp_path / f"{name}.zip").write_bytes(content)
        with pytest.raises(ArtifactError, match=f"{name}.zip is not a whole state of a guard"):
            guard().load(tmp_path / f"{name}.zip")
    with pytest.raises(ArtifactError, match="cannot be read"):
        guard().load(tmp_path / "none.zip")


# Runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def purifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("purifier") / "candidates.safetensors"
    save_purifier(CandidatePurifier.closed_form(small_pair().train), path)
    return path


def run_of(purifier, **overrides):
    return plan_run(
        "dsrm-hrl",
        "small",
        session=SLATES,
        total_steps=256,
        n_envs=8,
        overrides={"n_steps": 8, "batch_size": 32, "n_epochs": 1, **overrides},
        purifier=PurifierIdentity.of_file(purifier),
    )


FILES = ("model.zip", "result.json", "sessions.csv", "learning_curve.csv")


def contents(folder) -> dict[str, bytes]:
    """Returns files of a run; of the model its parameters, since a zip file has the time in it."""
    found = {name: (folder / name).read_bytes() for name in FILES[1:]}
    _, states, _ = load_from_zip_file(folder / FILES[0], load_data=False)
    return found | {name: value.numpy().tobytes() for name, value in states["policy"].items()}


@pytest.mark.slow
def test_a_run_of_the_method_says_which_parameters_it_kept(tmp_path, purifier):
    config = run_of(purifier, learning_rate=1.0)
    train(config, small_pair(), purifier=purifier, output=tmp_path / "run")
    stored = load_run(tmp_path / "run")
    assert stored.result["guard"]["kept"] == START
    assert [row["timesteps"] for row in stored.result["guard"]["evaluations"]] == [128, 256]
    assert stored.timing["guard_cpu_seconds"] > 0
    assert "guard: kept start" in (tmp_path / "run/log.txt").read_text()
    # It is the untrained agent over the purifier as pretrained, also while it serves.
    assert not (tmp_path / "run/belief.safetensors").exists()
    policy = load_policy(stored, small_pair())
    assert evaluate_run(config, policy, small_pair(), load_purifier(purifier)).summary() == stored.summary
    env = purified_sessions(small_pair().train, config.session, 8, 0, load_purifier(purifier))
    served = serve(policy, env, sessions=20, evaluate_others=False)
    assert served.settings.learning == "posterior"
    train(run_of(purifier, guard=None), small_pair(), purifier=purifier, output=tmp_path / "unguarded")
    assert "guard" not in load_run(tmp_path / "unguarded").result
    assert (tmp_path / "unguarded/belief.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_ends_in_the_same_bytes_each_time(tmp_path, purifier):
    config = run_of(purifier)
    pair = interrupted_pair(at=40)
    stopped = train(config, pair, purifier=purifier, output=tmp_path / "one")
    assert not stopped.complete and 0 < stopped.steps_done < 256
    before = guard()
    before.load(tmp_path / "one.partial/guard.zip")
    shutil.copytree(tmp_path / "one.partial", tmp_path / "two.partial")
    ends = []
    for name in ("one", "two"):
        resume(tmp_path / f"{name}.partial", small_pair())
        ends.append(contents(tmp_path / name))
        assert not (tmp_path / name / "guard.zip").exists()
    assert ends[0] == ends[1]
    assert json.loads(ends[0]["result.json"])["guard"]["start_r_cum"] == before.describe()["start_r_cum"]
