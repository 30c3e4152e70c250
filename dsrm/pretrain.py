"""Pretraining of purifiers: one call for every mode (paper 4.4, stage I)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from dsrm.baselines import (
    IdentityPurifier,
    IPSPurifier,
    LinearDebiasPurifier,
    NoisePurifier,
    RegressionConfig,
    RegressionPurifier,
    regression_net,
)
from dsrm.click_denoisers import ClickDenoiser
from dsrm.click_model import ClickModelConfig
from dsrm.denoiser import Denoiser, DenoiserConfig, Prediction
from dsrm.diffusion import NoiseSchedule, Sampler, SamplerConfig, ScheduleKind
from dsrm.model import DSRM, SPREAD_SAMPLES, DistillationConfig, DSRMConfig, distil, root_mean_square_spread
from dsrm.purifier import StatePurifier, WorldKey
from dsrm.targets import (
    ExampleSource,
    LiteralTargets,
    MixedTargets,
    PairedTargets,
    ProfileTargets,
    UnbiasedTargets,
    WindowSettings,
    WindowSource,
)
from dsrm.training import (
    Trainer,
    TrainingConfig,
    denoising_objective,
    regression_objective,
    top_heavy_objective,
)
from dsrm.windows import DEFAULT_CLIP_QUANTILE, DEFAULT_EXPONENT, ConditionBuilder
from kuaifair_env.spaces import observed_states
from kuaifair_env.splits import CALIBRATION_SHARE, calibration_users, early_stopping_split
from kuaifair_env.world import World

Mode = Literal[
    "profile",
    "paper",
    "unbiased",
    "paired",
    "regression",
    "linear_debias",
    "ips",
    "identity",
    "noise",
    "tce",
    "rce",
    "bod",
]
Target = Literal["profile", "unbiased", "paired"]

MODES: tuple[Mode, ...] = get_args(Mode)

_DISTILLATION_CONDITIONS = 30_000
_SPREAD_CONDITIONS = 5_000
_DEBIAS_WINDOWS = 40_000


@dataclass(frozen=True)
class PretrainConfig:
    """How a purifier is made.

    Attributes:
        mode: ``"profile"`` (default), ``"paper"`` (literal; measures as the identity), ``"unbiased"``, ``"paired"``, or
            a control: ``"regression"``, ``"linear_debias"``, ``"ips"``, ``"identity"``, ``"noise"``, or a heuristic
            denoiser: ``"tce"``, ``"rce"``, ``"bod"``.
        target: Whose target the regression control learns.
        seed: Seed of everything.
        schedule: Kind of noise schedule; None is cosine, and linear in ``paper`` mode.
        levels: Noise levels ``K``.
        prediction: What the denoiser predicts; None is the velocity, and the noise in ``paper`` mode. A net that
            predicts the clean state answers as well in one evaluation, but its posterior is far too narrow (spread a
            third of the error, against two thirds; docs/results/purification.md).
        width: Width of the net.
        blocks: Its residual blocks.
        training: Batches, rounds, optimiser.
        distillation: The student's training.
        windows: Which windows to learn from.
        exponent: Of inverse-propensity weights.
        clip_quantile: Where those weights are cut off.
        exclude_share: How often a window's own positives are left out of a profile.
        calibration_share: Share of the test log's users who are calibration users (``unbiased`` only).
        profile_share: Share of profiles mixed into unbiased examples.
        noise_scale: Root mean square of the noise control.
        denoiser_steps: Optimiser steps of the heuristic denoisers' click model.
    """

    mode: Mode = "profile"
    target: Target = "profile"
    seed: int = 0
    schedule: ScheduleKind | None = None
    levels: int = 20
    prediction: Prediction | None = None
    width: int = 256
    blocks: int = 3
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    windows: WindowSettings = field(default_factory=WindowSettings)
    exponent: float = DEFAULT_EXPONENT
    clip_quantile: float = DEFAULT_CLIP_QUANTILE
    exclude_share: float = 0.5
    calibration_share: float = CALIBRATION_SHARE
    profile_share: float = 0.25
    noise_scale: float = 0.1
    denoiser_steps: int = 1_500

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {get_args(Target)}, got {self.target!r}")


def pretrain(
    world: World,
    config: PretrainConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> StatePurifier:
    """Makes a purifier from the training world's log.

    Training users only; a tenth of them is kept aside for early stopping. The test log is read in ``unbiased`` mode
    alone, and then of declared calibration users alone.

    Args:
        world: The training world.
        config: What to make.
        checkpoint: File to which training is written after each round and from which it goes on after a kill; it is
            removed at the end. None keeps nothing.
        progress: Whether to show a progress bar.

    Returns:
        The purifier; see :func:`dsrm.save_purifier`.

    Raises:
        ValueError: If the world is not a training world, or a setting is not valid.
        ArtifactError: If the checkpoint is damaged or of another training.
    """
    chosen = PretrainConfig() if config is None else config
    if world.split != "train":
        raise ValueError("purifiers are pretrained in the training world; the test world stays unseen")
    if chosen.mode == "identity":
        return IdentityPurifier()
    if chosen.mode == "ips":
        return IPSPurifier(chosen.exponent, chosen.clip_quantile)
    if chosen.mode == "noise":
        return NoisePurifier(chosen.noise_scale, chosen.seed)
    if chosen.mode == "tce" or chosen.mode == "rce" or chosen.mode == "bod":
        click = ClickModelConfig(chosen.mode, steps=chosen.denoiser_steps, seed=chosen.seed)
        return ClickDenoiser.fit(world, click, progress)
    builder = ConditionBuilder.of_world(world, chosen.exponent, chosen.clip_quantile)
    if chosen.mode == "linear_debias":
        return _linear_debias(world, builder, chosen)
    source = example_source(world, builder, chosen)
    if chosen.mode == "regression":
        return _regression(world, source, chosen, checkpoint, progress)
    return _diffusion(world, builder, source, chosen, checkpoint, progress)


def noise_like(purifier: StatePurifier, world: World, seed: int = 0) -> NoisePurifier:
    """Returns the noise control of a purifier: noise of the size by which it moves observed states.

    Args:
        purifier: The purifier.
        world: The training world.
        seed: Seed of windows and noise.
    """
    purifier.bind(world)
    builder = ConditionBuilder.of_world(world)
    rng = np.random.default_rng(seed)
    users = rng.choice(_logged_users(world), 4096)
    window = WindowSource(world, WindowSettings()).draw(users, rng).window
    states = observed_states(builder, window)
    moved = purifier.purify(states, window)[:, : world.dimension] - states
    return NoisePurifier(float(np.sqrt(np.mean(moved.astype(np.float64) ** 2))), seed)


def example_source(world: World, builder: ConditionBuilder, config: PretrainConfig) -> ExampleSource:
    """Returns where training examples of a mode come from."""
    kind = config.target if config.mode == "regression" else config.mode
    if kind == "paper":
        return LiteralTargets(world, builder, config.windows)
    if kind == "paired":
        return PairedTargets(world, builder, config.windows)
    profile = ProfileTargets(world, builder, config.windows, config.exclude_share)
    if kind == "profile":
        return profile
    calibration = calibration_users(world.data, config.calibration_share)
    return MixedTargets(
        UnbiasedTargets(world, builder, calibration, config.windows), profile, config.profile_share
    )


def _diffusion(
    world: World,
    builder: ConditionBuilder,
    source: ExampleSource,
    config: PretrainConfig,
    checkpoint: str | Path | None,
    progress: bool,
) -> DSRM:
    literal = config.mode == "paper"
    schedule_kind = config.schedule or ("linear" if literal else "cosine")
    schedule = NoiseSchedule.make(schedule_kind, config.levels)
    size = builder.dimension
    shape = DenoiserConfig(
        size,
        size if literal else builder.size,
        config.prediction or ("epsilon" if literal else "velocity"),
        config.width,
        config.blocks,
    )
    trained = _trainer(world, source, config, checkpoint).run(
        lambda: Denoiser(shape, schedule),
        denoising_objective if literal else top_heavy_objective,
        progress,
    )
    model_config = DSRMConfig(
        mode=config.mode,
        schedule=schedule_kind,
        levels=config.levels,
        denoiser=shape,
        conditioning="state" if literal else "rich",
        exponent=config.exponent,
        clip_quantile=config.clip_quantile,
        sampler=SamplerConfig(kind="ddpm", steps=config.levels, start="state") if literal else None,
    )
    report = _report(world, source, config) | trained.report
    student = None
    if not literal:
        conditions = trained.condition.to(_conditions(source, config))
        # One evaluation at the noisiest level, where nothing of the noisy state is left, is the posterior mean; more
        # deterministic steps move on towards a mode, which decides worse (docs/results/purification.md).
        answer = Sampler(trained.net, schedule, SamplerConfig(steps=1))
        spread = Sampler(
            trained.net,
            schedule,
            SamplerConfig(steps=min(10, config.levels), eta=1.0, start="noise", samples=SPREAD_SAMPLES),
        )

        def teacher(condition: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keyed = condition[:, :size]
            few = slice(None, _SPREAD_CONDITIONS)
            drawn = spread.samples(condition[few], keyed[few]).numpy()
            return answer.sample(condition, keyed), torch.from_numpy(root_mean_square_spread(drawn))

        student, cosine = distil(teacher, conditions, config.distillation, config.seed)
        report["student_cosine"] = round(cosine, 5)
    return DSRM(
        model_config,
        WorldKey.of_world(world),
        trained.net,
        trained.condition,
        trained.state,
        student,
        report,
    )


def _regression(
    world: World,
    source: ExampleSource,
    config: PretrainConfig,
    checkpoint: str | Path | None,
    progress: bool,
) -> RegressionPurifier:
    size = ConditionBuilder.of_world(world).size
    shape = DenoiserConfig(world.dimension, size, "sample", config.width, config.blocks)
    trained = _trainer(world, source, config, checkpoint).run(
        lambda: regression_net(shape), regression_objective, progress
    )
    return RegressionPurifier(
        RegressionConfig(config.target, shape, config.exponent, config.clip_quantile),
        WorldKey.of_world(world),
        trained.net,
        trained.condition,
        trained.state,
        _report(world, source, config) | trained.report,
    )


def _linear_debias(world: World, builder: ConditionBuilder, config: PretrainConfig) -> LinearDebiasPurifier:
    rng = np.random.default_rng(config.seed)
    users = rng.choice(_logged_users(world), _DEBIAS_WINDOWS)
    window = WindowSource(world, config.windows).draw(users, rng).window
    window = window.take(np.flatnonzero(window.clicks.any(axis=1)))
    return LinearDebiasPurifier.fit(
        WorldKey.of_world(world), observed_states(builder, window), builder.statistics(window)[:, 0]
    )


def _trainer(
    world: World, source: ExampleSource, config: PretrainConfig, checkpoint: str | Path | None
) -> Trainer:
    fitted, held = early_stopping_split(world.data, source.users)
    return Trainer(source, fitted, held, config.training, config.seed, checkpoint, config.mode)


def _conditions(source: ExampleSource, config: PretrainConfig) -> NDArray[np.float32]:
    rng = np.random.default_rng([config.seed, 1_000_003])
    return source.draw(rng.choice(source.users, _DISTILLATION_CONDITIONS), rng).conditions


def _logged_users(world: World) -> NDArray[np.int64]:
    counts = np.bincount(world.data.train.users, minlength=len(world.data.users))
    return np.intersect1d(world.users, np.flatnonzero(counts))


def _report(world: World, source: ExampleSource, config: PretrainConfig) -> dict[str, Any]:
    fitted, held = early_stopping_split(world.data, source.users)
    report: dict[str, Any] = {
        "mode": config.mode,
        "target": config.target if config.mode == "regression" else config.mode,
        "seed": config.seed,
        "data": world.data.provenance.as_dict(),
        "training_users": len(fitted),
        "validation_users": len(held),
        "test_log": "unread",
    }
    if "unbiased" in (config.mode, report["target"]):
        users = calibration_users(world.data, config.calibration_share)
        rows = int(np.isin(world.data.test.users, users).sum())
        report["test_log"] = f"{rows:,} rows of {len(users):,} calibration users, who are never evaluated"
    return report
