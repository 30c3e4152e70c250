"""Fits preference models in the training world: the diffusion posterior and the controls that it has to beat."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsrm.baselines import regression_network
from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule, ScheduleKind
from dsrm.model import DistillationConfig
from dsrm.own_level import OwnScales
from dsrm.preference import PreferenceModel
from dsrm.preference_networks import DiffusionPreference, RegressionPreference, fitted_reliance
from dsrm.preference_sessions import PreferenceSessions, whitened
from dsrm.preference_student import distil_preference
from dsrm.training import TrainingConfig, regression_objective, top_heavy_objective, train_denoiser
from kuaifair_env.checks import need_seed, need_whole

PreferenceKind = Literal["diffusion", "gaussian", "mixture", "regression"]

_PARTS = (2, 4, 8)
_HELD_OUT = 16_000
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
        need_seed(self.seed)
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
    rng = np.random.default_rng([config.seed, _POPULATION_STREAM])
    others = source.tastes(rng.choice(source.split()[1], min(config.training.examples, _HELD_OUT)), rng)
    if config.kind == "gaussian":
        fitted = [source.normal]
    else:
        fitted = [source.fitted_prior(parts, config.seed) for parts in _PARTS]
    densities = [prior.taste.log_density(others) for prior in fitted]
    sizes = [len(prior.taste.weights) for prior in fitted]
    report = {"log_density": {str(size): round(density, 3) for size, density in zip(sizes, densities, strict=True)}}
    return fitted[int(np.argmax(densities))], report


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
    plain = RegressionPreference(trained, source.normal, 1.0, np.ones(shape.state_size, np.float32))
    means, tastes = _held_out(source, config, plain)
    reliance = fitted_reliance(means, tastes)
    spread = (tastes - reliance * means).std(dim=0).numpy()
    return RegressionPreference(trained, source.normal, reliance, spread), report | {"reliance": reliance}


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
    reliance = fitted_reliance(*_held_out(source, config, DiffusionPreference(trained, schedule, source.normal)))
    teacher = DiffusionPreference(trained, schedule, source.normal, reliance)
    rng = np.random.default_rng([config.seed, _DISTILLATION_STREAM])
    sessions = source.known(rng.choice(source.split()[0], config.student.conditions), rng)
    student, error = distil_preference(teacher, sessions, config.student, config.seed, progress)
    model = DiffusionPreference(trained, schedule, source.normal, reliance, student)
    return model, report | {"reliance": reliance, "distillation": asdict(error)}


def _held_out(
    source: PreferenceSessions, config: PreferenceConfig, model: DiffusionPreference | RegressionPreference
) -> tuple[Tensor, Tensor]:
    """Returns predicted means and tastes of users whom networks were not trained on, whitened, ``float32 (n, d)``."""
    rng = np.random.default_rng([config.seed, _HELD_OUT_STREAM])
    means, tastes = [], []
    for batch in source.known(rng.choice(source.split()[1], min(config.training.examples, _HELD_OUT)), rng):
        normal = source.normal.normal(batch.evidence)
        means.append(model.whitened_means(normal).detach())
        tastes.append(whitened(normal, batch.preferences)[:, 1:])
    return torch.cat(means), torch.cat(tastes)


def _shape(
    source: PreferenceSessions, config: PreferenceConfig, prediction: Literal["sample", "velocity"]
) -> DenoiserConfig:
    dimension = source.dimension
    inputs = 2 * (dimension + 1) + 2
    return DenoiserConfig(dimension, inputs, prediction, config.width, config.blocks)
