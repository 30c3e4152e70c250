"""A callback that evaluates any agent of Stable-Baselines3 while it trains, fairness included, and keeps the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, EventCallback

from hrl_policies.study.records import read_table, write_table
from kuaifair_env.adapters import check_agent, played
from kuaifair_env.errors import ArtifactError
from kuaifair_env.evaluation import DEFAULT_SEED, EvaluationResult, evaluate
from kuaifair_env.files import atomic_path

LOGGED = ("len", "r_each", "r_cum", "ad", "violation_rate", "coverage")
"""Figures that go to the logger, as ``eval/len`` and so on; see :meth:`EvaluationResult.summary`."""

LARGER_IS_BETTER = ("r_cum", "len", "r_each", "coverage", "entropy")
SMALLER_IS_BETTER = ("violation_rate", "ad", "slate_ad", "item_exposure_gap", "gini")
"""Figures by which the best model can be chosen."""

BEST_MODEL = "best_model.zip"
EVALUATIONS = "evaluations.csv"


class FairnessCallback(EventCallback):
    """Evaluates an agent in complete sessions of the same users every so often, logs the figures, and keeps the best.

    As Stable-Baselines3's ``EvalCallback``, with the figures of :func:`kuaifair_env.evaluate`. Every evaluation plays
    the same users with the same random numbers, and leaves training as it was: an agent learns the same with the
    callback as without. Choose models in a training world, or on users of it that are held out
    (:func:`kuaifair_env.held_out_users`), never in the world in which results are reported.

    Training that goes on (``reset_num_timesteps=False``) with the same folder goes on with its evaluations: a new
    callback knows the best model of before and when to evaluate next. Training from the start begins them anew.

    Args:
        eval_env: KuaiFair sessions, in any form that ``evaluate`` takes.
        score: The figure by which the best model is chosen, one of :data:`LARGER_IS_BETTER` or
            :data:`SMALLER_IS_BETTER`.
        callback_on_new_best: Called when there is a new best model.
        callback_after_eval: Called after every evaluation.
        eval_freq: Calls of the callback between evaluations, each a step of all training sessions.
        n_users: Number of users to evaluate on, chosen by a hash of their ids; None takes all.
        users: Raw ids of the users instead.
        n_eval_episodes: Sessions of each user.
        best_model_save_path: Folder for ``best_model.zip`` and ``evaluations.csv``, a row for each evaluation; None
            keeps neither.
        deterministic: Passed to ``predict``.
        seed: Seed of the evaluated sessions' randomness.
        verbose: 1 prints every evaluation.

    Attributes:
        evaluations: Steps and figures of every evaluation, ``timesteps`` first.
        best_score: The best score so far; None before the first evaluation.
        last_result: What the last evaluation gave.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        eval_env: Any,
        *,
        score: str = "r_cum",
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        eval_freq: int = 1_000,
        n_users: int | None = 100,
        users: Any = None,
        n_eval_episodes: int = 1,
        best_model_save_path: str | Path | None = None,
        deterministic: bool = True,
        seed: int = DEFAULT_SEED,
        verbose: int = 1,
    ) -> None:
        super().__init__(callback_after_eval, verbose=verbose)
        if score not in LARGER_IS_BETTER + SMALLER_IS_BETTER:
            raise ValueError(f"score must be one of {LARGER_IS_BETTER + SMALLER_IS_BETTER}, got {score!r}")
        if eval_freq < 1 or n_eval_episodes < 1:
            raise ValueError(f"eval_freq and n_eval_episodes must be at least 1, got {eval_freq} and {n_eval_episodes}")
        self.eval_env = eval_env
        self.score = score
        self.callback_on_new_best = callback_on_new_best
        self.eval_freq = eval_freq
        self.n_users = n_users if users is None else None
        self.users = users
        self.n_eval_episodes = n_eval_episodes
        self.folder = None if best_model_save_path is None else Path(best_model_save_path)
        self.deterministic = deterministic
        self.seed = seed
        self.evaluations: list[dict[str, float]] = []
        self.last_result: EvaluationResult | None = None

    @property
    def best_score(self) -> float | None:
        """The best score so far; None before the first evaluation."""
        scores = [row[self.score] for row in self.evaluations]
        if not scores:
            return None
        return max(scores) if self.score in LARGER_IS_BETTER else min(scores)

    @property
    def best_mean_reward(self) -> float:
        """The best score, more being better, as Stable-Baselines3's callbacks that stop training read it."""
        if self.best_score is None:
            return -math.inf
        return self.best_score if self.score in LARGER_IS_BETTER else -self.best_score

    def _init_callback(self) -> None:
        super()._init_callback()
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.init_callback(self.model)
        # Fails before the training where the agent cannot act in these sessions.
        check_agent(self.model, played(self.eval_env, 1))

    def _on_training_start(self) -> None:
        self._started_at, self._started_calls = self.num_timesteps, self.n_calls
        if not self.num_timesteps:
            self.evaluations = []
        elif not self.evaluations and self.folder is not None and (self.folder / EVALUATIONS).exists():
            self.evaluations = read_table(self.folder / EVALUATIONS, columns=("timesteps", self.score))
            if not (self.folder / BEST_MODEL).exists():
                raise ArtifactError(f"{self.folder} holds {EVALUATIONS} but no {BEST_MODEL}; give another folder")
        # Training may go on from a checkpoint that is older than the last evaluation.
        before = [row["timesteps"] for row in self.evaluations if row["timesteps"] <= self.num_timesteps]
        self._last_at = max(before, default=0)

    def _on_step(self) -> bool:
        steps_per_call = (self.num_timesteps - self._started_at) / (self.n_calls - self._started_calls)
        if self.num_timesteps - self._last_at < self.eval_freq * steps_per_call:
            return True
        self._last_at = self.num_timesteps
        best, figures = self.best_score, self._evaluate()
        self.evaluations.append({"timesteps": self.num_timesteps, **figures})
        goes_on = True
        if best is None or self._is_better(figures[self.score], best):
            if self.verbose:
                print(f"New best {self.score}: {figures[self.score]:.4f}")
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_path(self.folder / BEST_MODEL) as path:
                    self.model.save(path)
            if self.callback_on_new_best is not None:
                goes_on = self.callback_on_new_best.on_step()
        if self.folder is not None:
            write_table(self.folder / EVALUATIONS, self.evaluations)
        return goes_on and self._on_event()

    def _is_better(self, score: float, best: float) -> bool:
        return score > best if self.score in LARGER_IS_BETTER else score < best

    def _evaluate(self) -> dict[str, float]:
        """Evaluates the agent as it is, logs the figures and returns them."""
        self.last_result = evaluate(
            self.model,
            self.eval_env,
            self.users,
            self.n_eval_episodes,
            n_users=self.n_users,
            seed=self.seed,
            deterministic=self.deterministic,
        )
        figures = self.last_result.summary()
        for name in LOGGED:
            self.logger.record(f"eval/{name}", figures[name])
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.verbose:
            print(f"Steps {self.num_timesteps:,}: " + ", ".join(f"{name} {figures[name]:.4f}" for name in LOGGED))
        return {name: float(figures[name]) for name in (*LARGER_IS_BETTER, *SMALLER_IS_BETTER)}

    def update_child_locals(self, locals_: dict[str, Any]) -> None:
        """Hands the training's variables on to the callbacks that this one calls."""
        super().update_child_locals(locals_)
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.update_locals(locals_)
