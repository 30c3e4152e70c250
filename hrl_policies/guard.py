"""A callback that keeps what an agent has learned only where it is shown to be better than where the agent started."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import load_from_zip_file, save_to_zip_file
from stable_baselines3.common.vec_env import VecEnv

from dsrm.purifier import StatePurifier
from hrl_policies.common.yaml_files import validated
from hrl_policies.worlds import SEED_LIMIT, purified_sessions
from kuaifair_env.adapters import check_agent, played
from kuaifair_env.batch import SessionConfig
from kuaifair_env.evaluation import DEFAULT_SEED, evaluate
from kuaifair_env.files import atomic_path, whole
from kuaifair_env.intervals import Interval, crossed_mean, interval_of
from kuaifair_env.randomisation import Randomisation, RandomisationLike, WorldRandomisation
from kuaifair_env.randomised_worlds import estimated_randomisation, randomised
from kuaifair_env.sb3_files import check_finite
from kuaifair_env.world import World

START = "start"
_N_ENVS = 128
_SESSIONS_PER_UNIT = 16
_SHARE_OF_TRAINING = 0.25

Parameters = dict[str, Any]


class GuardSettings(BaseModel):
    """How a run of the zoo is guarded; the group ``guard`` of its hyperparameters, None for no guard.

    Attributes:
        n_evaluations: Evaluations after the one at the start, spread evenly over training, the last at its end.
        n_sessions: Validation sessions of each evaluation, at most: all evaluations together play at most about a
            quarter of the slates of training.
        level: Coverage of the interval that a gain has to show, all evaluations together.
        shares: How far users of validation sessions deviate, as shares of what users deviate by in training; a gain has
            to show with each of them, in an equal part of the sessions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    n_evaluations: Annotated[int, Field(ge=1)] = 2
    n_sessions: Annotated[int, Field(ge=2 * _SESSIONS_PER_UNIT)] = 384
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    shares: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1, strict=False)] = (1.0, 0.0)


class Evaluation(NamedTuple):
    """What an agent gains over its starting point, in paired validation sessions.

    Attributes:
        timesteps: Steps of training before.
        difference: Mean of R_cum less that of the starting point, where sessions are of several kinds in those with the
            lowest lower bound.
        low: Lower bound of the difference.
        high: Upper bound.
    """

    timesteps: int
    difference: float
    low: float
    high: float


class GuardCallback(BaseCallback):
    """Keeps the best parameters of training where they are shown to earn more than the starting point, else the start.

    As ``EvalCallback`` with its best model, with a test: before training, at a few points of it, and at its end the
    agent plays the same validation sessions, deterministically. Of all evaluations the one with the largest mean R_cum
    counts. If the lower bound of its paired difference to the starting point is above 0 the agent ends with the
    parameters that it had then, else with those that it started with: networks of all levels and their optimisers, as
    they were at that time. Bounds are Student's over units of sessions, at a level that holds for all evaluations
    together (Bonferroni), so that an agent that learned nothing ends elsewhere than at its start in at most
    ``(1 - level) / 2`` of all trainings.

    With ``other_eval_envs`` a gain has to show in each kind of sessions. What earns more among users who deviate far
    from the log, such as exploration, may earn less among users who do not, and training cannot know which it meets.

    The logger gets ``guard/difference``, ``guard/low``, ``guard/high`` and, at the end, ``guard/kept`` (steps, 0 for
    the start). Evaluations leave training as it was. Training that is stopped before its end decides nothing; it may go
    on (``reset_num_timesteps=False``) with the same callback or, from a checkpoint, with what :meth:`load` read.

    What a wrapper believes about users or items is no parameter, and is evaluated as ``eval_env`` has it.

    Args:
        eval_env: Validation sessions, in any form that ``evaluate`` takes: of the training world, with other seeds than
            the sessions that are played in training. :func:`validation_sessions` makes some.
        other_eval_envs: Validation sessions of other kinds, likewise.
        n_evaluations: See :class:`GuardSettings`.
        n_users: Number of users to evaluate on, chosen by a hash of their ids; None takes all.
        n_eval_episodes: Sessions of each user.
        sessions_per_unit: So many sessions in a row are one unit of the interval: those that share something.
        level: See :class:`GuardSettings`.
        seed: Seed of the evaluated sessions' randomness.
        verbose: 1 prints every evaluation.

    Attributes:
        evaluations: All evaluations after the one at the start.
        kept: ``"start"``, or the steps of training whose parameters the agent ended with; None before it has ended.
        seconds: Processor time of all evaluations.

    Raises:
        ValueError: If a setting is not valid.
    """

    def __init__(
        self,
        eval_env: Any,
        *,
        other_eval_envs: Sequence[Any] = (),
        n_evaluations: int = 2,
        n_users: int | None = None,
        n_eval_episodes: int = 1,
        sessions_per_unit: int = 1,
        level: float = 0.95,
        seed: int = DEFAULT_SEED,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose=verbose)
        if min(n_evaluations, sessions_per_unit, n_eval_episodes) < 1:
            raise ValueError("n_evaluations, n_eval_episodes and sessions_per_unit must be at least 1")
        self.eval_envs = (eval_env, *other_eval_envs)
        self.n_evaluations = n_evaluations
        self.n_users, self.n_eval_episodes = n_users, n_eval_episodes
        self.sessions_per_unit = sessions_per_unit
        self.level = level
        self.seed = seed
        self.evaluations: list[Evaluation] = []
        self.kept: str | int | None = None
        self.seconds = 0.0
        self._began_at = 0
        self._start: Parameters | None = None
        self._start_units: list[NDArray[np.float64]] = []
        self._best: Parameters | None = None

    def describe(self) -> dict[str, Any]:
        """Returns what was evaluated and kept, JSON-able; ``start_r_cum`` is that of the first kind of sessions."""
        return {
            "kept": self.kept,
            "level": self.level,
            "sessions": sum(map(len, self._start_units)) * self.sessions_per_unit,
            "start_r_cum": float(self._start_units[0].mean()),
            "evaluations": [evaluation._asdict() for evaluation in self.evaluations],
        }

    def save(self, path: str | Path) -> None:
        """Writes the state of the guard, for training that goes on: evaluations, parameters of the start and the best.

        Args:
            path: A file whose name ends in ``.zip``.
        """
        parameters = {"start": self._start, "best": self._best}
        kept = math.nan if self.kept is None else 0 if isinstance(self.kept, str) else self.kept
        variables = {
            "units": [torch.from_numpy(units) for units in self._start_units],
            "evaluations": torch.tensor(self.evaluations, dtype=torch.float64),
            "kept": torch.tensor(kept, dtype=torch.float64),
            "began_at": torch.tensor(self._began_at),
        }
        with atomic_path(Path(path)) as temporary:
            save_to_zip_file(temporary, params=parameters, pytorch_variables=variables)

    def load(self, path: str | Path) -> None:
        """Takes the place of the guard that :meth:`save` wrote; nothing in the file can execute code.

        Raises:
            ArtifactError: If the file is missing or damaged.
        """
        with whole(Path(path), "state of a guard", "train again"):
            _, parameters, stored = load_from_zip_file(Path(path), device="cpu", load_data=False)
            check_finite(parameters, path)
            variables: dict[str, Any] = dict(stored or {})
            units, evaluations, kept = (variables[name] for name in ("units", "evaluations", "kept"))
            self._start, self._best = (cast("Parameters | None", parameters[name]) for name in ("start", "best"))
            self._start_units = [each.numpy() for each in units]
            self.evaluations = [Evaluation(int(row[0]), *row[1:]) for row in evaluations.tolist()]
            self.kept = None if math.isnan(kept) else int(kept) or START
            self._began_at = int(variables["began_at"])

    def _init_callback(self) -> None:
        # Fails before the training where the agent cannot act in these sessions.
        for env in self.eval_envs:
            check_agent(self.model, played(env, 1))

    def _on_training_start(self) -> None:
        if self._start is not None and self.num_timesteps and self.kept is None:
            return  # goes on
        self.evaluations, self.kept, self._best, self._began_at = [], None, None, self.num_timesteps
        self._start, self._start_units = deepcopy(self.model.get_parameters()), self._all_units()

    def _on_rollout_start(self) -> None:
        done, steps = len(self.evaluations), self._total_timesteps() - self._began_at
        if done + 1 < self.n_evaluations and self._steps() * self.n_evaluations >= (done + 1) * steps:
            self._evaluate()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.kept is None and self.num_timesteps >= self._total_timesteps():
            self._evaluate()
            self._decide()

    def _steps(self) -> int:
        return self.num_timesteps - self._began_at

    def _total_timesteps(self) -> int:
        return int(self.locals["total_timesteps"])

    def _evaluate(self) -> None:
        """Evaluates the agent as it is, and holds its parameters if it is the best so far."""
        pairs = zip(self._all_units(), self._start_units, strict=True)
        interval = min((self._interval(units - start) for units, start in pairs), key=lambda each: each.low)
        evaluation = Evaluation(self.num_timesteps, interval.estimate, interval.low, interval.high)
        if evaluation.difference > max((earlier.difference for earlier in self.evaluations), default=-math.inf):
            self._best = deepcopy(self.model.get_parameters())
        self.evaluations.append(evaluation)
        for name in ("difference", "low", "high"):
            self.logger.record(f"guard/{name}", getattr(evaluation, name))
        self._dump()
        if self.verbose:
            bounds = f"[{interval.low:.4f}, {interval.high:.4f}]"
            print(f"Steps {self.num_timesteps:,}: {evaluation.difference:+.4f} {bounds} over the start")

    def _decide(self) -> None:
        """Gives the agent the parameters that are kept."""
        best = max(self.evaluations, key=lambda evaluation: evaluation.difference)
        gained = best.low > 0.0
        self.kept = best.timesteps if gained else START
        self.model.set_parameters((self._best if gained else self._start) or {}, device=self.model.device)
        self.logger.record("guard/kept", best.timesteps if gained else 0)
        self._dump()
        if self.verbose:
            print(f"Kept: {self.kept}")

    def _dump(self) -> None:
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _all_units(self) -> list[NDArray[np.float64]]:
        """Returns mean R_cum of each unit of validation sessions, ``(n,)`` for each kind."""
        before = time.process_time()
        units = [self._units(env) for env in self.eval_envs]
        self.seconds += time.process_time() - before
        return units

    def _units(self, env: Any) -> NDArray[np.float64]:
        result = evaluate(self.model, env, episodes_per_user=self.n_eval_episodes, n_users=self.n_users, seed=self.seed)
        returns = np.asarray(result.sessions.return_, np.float64)
        n_units = max(len(returns) // self.sessions_per_unit, 2)
        return np.asarray([unit.mean() for unit in np.array_split(returns, n_units)])

    def _interval(self, differences: NDArray[np.float64]) -> Interval:
        level = 1.0 - (1.0 - self.level) / self.n_evaluations
        return interval_of(crossed_mean(differences[None]), level=level)


def guard_of_run(
    settings: Mapping[str, Any],
    world: World,
    config: SessionConfig,
    *,
    randomisation: RandomisationLike,
    purifier: StatePurifier | None,
    seed: int,
    total_steps: int,
) -> GuardCallback:
    """Returns the guard of a run in the training world.

    Args:
        settings: See :class:`GuardSettings`.
        world: The training world.
        config: How sessions run.
        randomisation: How far users deviate in training.
        purifier: The purifier of observed states, as pretrained.
        seed: The training seed.
        total_steps: Steps of training.

    Raises:
        ArtifactError: If a setting is not valid.
    """
    chosen = validated(GuardSettings, settings, "guard")
    # Sessions shorter than Max Len make evaluations cheaper than planned.
    slates = _SHARE_OF_TRAINING * total_steps / (chosen.n_evaluations + 1)
    validation_seed = SEED_LIMIT - 1 - seed
    kinds = dict.fromkeys(_scaled(world, randomisation, share) for share in chosen.shares)
    n_sessions = int(max(min(slates / config.max_len, chosen.n_sessions) / len(kinds), 2 * _SESSIONS_PER_UNIT))
    n_users = min(n_sessions, len(world.users))
    eval_env, *others = (
        validation_sessions(world, config, validation_seed, randomisation=kind, purifier=purifier) for kind in kinds
    )
    return GuardCallback(
        eval_env,
        other_eval_envs=others,
        n_evaluations=chosen.n_evaluations,
        n_users=n_users,
        n_eval_episodes=round(n_sessions / n_users),
        sessions_per_unit=_SESSIONS_PER_UNIT,
        level=chosen.level,
        seed=validation_seed,
    )


def _scaled(world: World, randomisation: RandomisationLike, share: float) -> Randomisation | None:
    """Returns a share of the deviations of a training world, or None where there are none."""
    if randomisation is None or share == 0.0:
        return None
    return (estimated_randomisation(world) if randomisation == "auto" else randomisation).scaled(share)


def validation_sessions(
    world: World,
    config: SessionConfig,
    seed: int,
    *,
    randomisation: RandomisationLike = "auto",
    purifier: StatePurifier | None = None,
) -> VecEnv:
    """Returns sessions of a training world for validation, in which nothing is learned.

    Users deviate as in :func:`~hrl_policies.worlds.training_sessions`, but what they share is drawn anew for every
    session, so that those of one evaluation hold many draws of it.

    Args:
        world: The training world.
        config: How sessions run.
        seed: Seed of the deviations; not that of training.
        randomisation: How far users deviate.
        purifier: The purifier of their states.
    """
    deviating = randomised(world, randomisation, seed)
    if deviating.randomisation is not None:
        scales = replace(deviating.randomisation.scales, min_block=1, max_block=1)
        deviating = replace(deviating, randomisation=WorldRandomisation(scales, seed))
    return purified_sessions(deviating, config, _N_ENVS, seed, purifier)
