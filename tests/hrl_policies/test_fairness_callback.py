"""FairnessCallback measures any agent while it trains, disturbs nothing, and keeps the model with the best score."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import small_world
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnNoModelImprovement
from stable_baselines3.common.logger import KVWriter, Logger

from hrl_policies import FairnessCallback
from hrl_policies.fairness_callback import LOGGED, SMALLER_IS_BETTER
from hrl_policies.hrl_ppo import HierarchicalPPO
from kuaifair_env import ArtifactError, KuaiFairEnv, MismatchError, SessionConfig, evaluate
from kuaifair_env.sb3 import KuaiFairVecEnv

WORLD = small_world(seed=1)
EMBEDDING = SessionConfig(max_len=10, slate_size=6)
WINDOWS = SessionConfig(max_len=10, slate_size=6, action_mode="slate", observation_mode="history")


def sessions(config=EMBEDDING, n: int = 4, world=WORLD):
    return KuaiFairVecEnv(world, config, n, seed=3)


def a2c(**settings) -> A2C:
    return A2C("MlpPolicy", sessions(), seed=5, device="cpu", learning_rate=0.01, **settings)


def watched(**settings) -> FairnessCallback:
    given = {"eval_freq": 20, "n_users": 20, "verbose": 0} | settings
    return FairnessCallback(sessions(n=8), **given)


class Record(KVWriter):
    def __init__(self) -> None:
        self.values = {}

    def write(self, key_values, key_excluded, step=0):
        for name, value in key_values.items():
            self.values.setdefault(name, []).append((step, value))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["a2c", "hierarchical", "single environment"])
def test_every_agent_s_figures_are_those_of_evaluate_and_reach_the_logger(kind):
    env = sessions(WINDOWS if kind == "hierarchical" else EMBEDDING)
    if kind == "hierarchical":
        model = HierarchicalPPO("HierarchicalPolicy", env, n_steps=8, batch_size=16, seed=0, device="cpu")
    else:
        model = A2C("MlpPolicy", env, seed=0, device="cpu")
    eval_env = KuaiFairEnv(WORLD, EMBEDDING) if kind == "single environment" else sessions(env.config, 8)
    callback, record = FairnessCallback(eval_env, eval_freq=16, n_users=20, verbose=0), Record()
    model.set_logger(Logger(None, [record]))
    model.learn(64, callback=callback)
    assert [row["timesteps"] for row in callback.evaluations] == [64]
    # The last evaluation came before the update that ended training.
    figures = callback.last_result.summary()
    for name in LOGGED:
        assert record.values[f"eval/{name}"] == [(64, figures[name])]
    assert len(callback.last_result.sessions) == 20


def test_an_agent_learns_the_same_with_the_callback_as_without():
    plain, watched_model = a2c().learn(160), a2c().learn(160, callback=watched())
    ours, theirs = watched_model.policy.state_dict(), plain.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["r_cum", "violation_rate"])
def test_the_best_model_is_the_one_with_the_best_score(score, tmp_path):
    callback = watched(score=score, best_model_save_path=tmp_path)
    a2c().learn(480, callback=callback)
    scores = [row[score] for row in callback.evaluations]
    assert len(scores) == 6 and len(set(scores)) > 1
    best = min(scores) if score in SMALLER_IS_BETTER else max(scores)
    assert callback.best_score == best
    assert callback.best_mean_reward == (-best if score in SMALLER_IS_BETTER else best)
    model = A2C.load(tmp_path / "best_model.zip", device="cpu")
    assert evaluate(model, sessions(n=8), n_users=20).summary()[score] == best
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["best_model.zip", "evaluations.csv"]


@pytest.mark.slow
def test_training_that_goes_on_evaluates_as_training_in_one_piece(tmp_path):
    whole = watched(best_model_save_path=tmp_path / "whole")
    a2c().learn(640, callback=whole)
    model = a2c()
    # 280 steps are three evaluations and a half, and the rest comes with a new callback.
    model.learn(280, callback=watched(best_model_save_path=tmp_path / "parts"))
    model.save(tmp_path / "model.zip")
    again = A2C.load(tmp_path / "model.zip", env=sessions(), device="cpu")
    later = watched(best_model_save_path=tmp_path / "parts")
    again.learn(360, callback=later, reset_num_timesteps=False)
    assert [row["timesteps"] for row in later.evaluations] == [row["timesteps"] for row in whole.evaluations]
    assert later.evaluations[:3] == whole.evaluations[:3]
    assert later.best_score == max(row["r_cum"] for row in later.evaluations)
    best = A2C.load(tmp_path / "parts/best_model.zip", device="cpu")
    assert evaluate(best, sessions(n=8), n_users=20).summary()["r_cum"] == later.best_score
    # Training from the start begins the evaluations anew.
    a2c().learn(80, callback=watched(best_model_save_path=tmp_path / "parts"))
    assert len((tmp_path / "parts/evaluations.csv").read_text().splitlines()) == 2
    (tmp_path / "parts/best_model.zip").unlink()
    with pytest.raises(ArtifactError, match=r"no best_model\.zip"):
        again.learn(80, callback=watched(best_model_save_path=tmp_path / "parts"), reset_num_timesteps=False)


class Count(BaseCallback):
    def __init__(self) -> None:
        super().__init__()
        self.steps = []

    def _on_step(self) -> bool:
        self.steps.append(self.num_timesteps)
        return True


@pytest.mark.slow
def test_other_callbacks_are_called_as_by_eval_callback():
    new_best, after = Count(), Count()
    callback = watched(callback_on_new_best=new_best, callback_after_eval=after)
    a2c().learn(400, callback=callback)
    assert after.steps == [row["timesteps"] for row in callback.evaluations] == [80, 160, 240, 320, 400]
    bests = np.maximum.accumulate([row["r_cum"] for row in callback.evaluations])
    assert len(new_best.steps) == len(set(bests))
    # The score of an agent that does not learn never improves.
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=2)
    model = A2C("MlpPolicy", sessions(), seed=5, device="cpu", learning_rate=0.0)
    callback = watched(callback_after_eval=stop)
    model.learn(4_000, callback=callback)
    assert len(callback.evaluations) == 4


def test_what_cannot_be_evaluated_fails_before_training():
    with pytest.raises(ValueError, match="score must be one of"):
        watched(score="reward")
    with pytest.raises(ValueError, match="eval_freq"):
        watched(eval_freq=0)
    model = a2c()
    with pytest.raises(MismatchError, match=r"trained on 50 items .* has 40 items"):
        model.learn(80, callback=FairnessCallback(sessions(world=small_world(n_items=40))))
    assert model.num_timesteps == 0
