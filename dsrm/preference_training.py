"""Fits preference models in the training world: the diffusion posterior and the controls that it has to beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dsrm.baselines import regression_network
from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule, ScheduleKind
from dsrm.model import DistillationConfig
from dsrm.own_level import OwnScales
from dsrm.preference import PreferenceModel
from dsrm.preference_mixture import MixturePreference, TastePrior
from dsrm.preference_networks import DiffusionPreference, RegressionPreference, distil_preference
from dsrm.preference_sessions import PreferenceSessions, whitened
from dsrm.training import TrainingConfig, regression_objective, top_heavy_objective, train_denoiser
from kuaifair_env.checks import need_whole

PreferenceKind = Literal["diffusion", "gaussian", "mixture", "regression"]

_PARTS = (2, 4, 8)
_MAX_POPULATION, _HELD_OUT = 20_000, 8_000
_DISTILLATION_STREAM, _HELD_OUT_STREAM, _POPULATION_STREAM = 21, 22, 23


@dataclass(frozen=True)
class PreferenceConfig:
    """How a preference model is fitted.

    Attributes:
        kind: Which model.
        seed: Seed of weights, sessions and batches.
        schedule: Kind of the diffusion model's noise schedule.
        levels: Its noise levels ``K``.
        width: Width of networks.
        blocks: Number of their residual blocks.
        training: Rounds, batches, optimizer of networks.
        student: Training of the diffusion model's student.
    """

    kind: PreferenceKind
    seed: int
    schedule: ScheduleKind
    levels: int
    width: int
    blocks: int
    training: TrainingConfig
    student: DistillationConfig

    def __post_init__(self) -> None:
        need_whole(0, seed=self.seed)
        need_whole(1, levels=self.levels, width=self.width, blocks=self.blocks)


@dataclass(frozen=True)
class FittedPreference:
    """A fitted model, a report, and the scales that the own level has before anything is known of the items."""

    model: PreferenceModel
    scales: OwnScales
    report: dict[str, Any]


def fit_preference(
    source: PreferenceSessions,
    config: PreferenceConfig,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> FittedPreference:
    """Fits a preference model to sessions in which clean preferences are known.

    Args:
        source: The sessions.
        config: Which model, and how.
        checkpoint: See :func:`dsrm.pretrain`; networks alone are checkpointed.
        progress: Whether to show progress bars.

    Raises:
        ArtifactError: If the checkpoint is damaged or of another training.
    """
    if config.kind == "gaussian" or config.kind == "mixture":
        model, report = _fit_mixture(source, config)
    elif config.kind == "regression":
        model, report = _train_regression(source, config, checkpoint, progress)
    else:
        model, report = _train_diffusion(source, config, checkpoint, progress)
    return FittedPreference(model, source.scales, {"taste": source.taste, **report})


def _fit_mixture(source: PreferenceSessions, config: PreferenceConfig) -> tuple[PreferenceModel, dict[str, Any]]:
    """Fits normal distributions, as many as held-out users ask for; one for ``gaussian``."""
    users, held_out = source.split()
    rng = np.random.default_rng([config.seed, _POPULATION_STREAM])
    tastes = source.tastes(rng.choice(users, min(config.training.examples, _MAX_POPULATION)), rng)
    others = source.tastes(rng.choice(held_out, min(config.training.examples, _HELD_OUT)), rng)
    slopes = source.predicted_tastes()
    sizes = (1,) if config.kind == "gaussian" else _PARTS
    fitted = [TastePrior.fit(slopes, source.size, tastes, size, config.seed) for size in sizes]
    densities = [taste.log_density(others) for taste in fitted]
    report = {"log_density": {str(size): round(density, 3) for size, density in zip(sizes, densities, strict=True)}}
    return MixturePreference(source.level, fitted[int(np.argmax(densities))]), report


def _train_regression(
    source: PreferenceSessions, config: PreferenceConfig, checkpoint: str | Path | None, progress: bool
) -> tuple[PreferenceModel, dict[str, Any]]:
    shape = _shape(source, config, "sample")
    trained, report = train_denoiser(
        lambda: regression_network(shape),
        regression_objective,
        source,
        config.training,
        seed=config.seed,
        label="regression of preferences",
        checkpoint=checkpoint,
        progress=progress,
    )
    without_spread = RegressionPreference(trained, source.level, np.ones(shape.state_size, np.float32))
    rng = np.random.default_rng([config.seed, _HELD_OUT_STREAM])
    unexplained = []
    for batch in source.known(rng.choice(source.split()[1], min(config.training.examples, _HELD_OUT)), rng):
        levelled = source.level.applied(batch.evidence)
        means = without_spread.moments(batch.evidence).means
        unexplained.append(whitened(levelled, batch.preferences) - whitened(levelled, means))
    return RegressionPreference(trained, source.level, torch.cat(unexplained).std(dim=0).numpy()), report


def _train_diffusion(
    source: PreferenceSessions, config: PreferenceConfig, checkpoint: str | Path | None, progress: bool
) -> tuple[PreferenceModel, dict[str, Any]]:
    schedule = NoiseSchedule.make(config.schedule, config.levels)
    shape = _shape(source, config, "velocity")
    trained, report = train_denoiser(
        lambda: Denoiser(shape, schedule),
        top_heavy_objective,
        source,
        config.training,
        seed=config.seed,
        label="belief",
        checkpoint=checkpoint,
        progress=progress,
    )
    rng = np.random.default_rng([config.seed, _DISTILLATION_STREAM])
    sessions = source.known(rng.choice(source.split()[0], config.student.conditions), rng)
    teacher = DiffusionPreference(trained, schedule, source.level, None)
    student, error = distil_preference(teacher, sessions, config.student, config.seed, progress)
    return DiffusionPreference(trained, schedule, source.level, student), report | {"distillation": asdict(error)}


def _shape(
    source: PreferenceSessions, config: PreferenceConfig, prediction: Literal["sample", "velocity"]
) -> DenoiserConfig:
    dimension = source.dimension
    inputs = 2 * (dimension + 1) + 2
    return DenoiserConfig(dimension + 1, inputs, prediction, config.width, config.blocks)
