"""Pretraining of purifiers: one call for every mode (paper 4.4, stage I)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from dsrm.baselines import (
    IdentityPurifier,
    IPSPurifier,
    LinearDebiasPurifier,
    NoisePurifier,
    RegressionConfig,
    RegressionPurifier,
    regression_network,
)
from dsrm.belief import BeliefScales
from dsrm.belief_purifier import BeliefPurifier
from dsrm.candidates import CandidatePurifier
from dsrm.click_denoisers import ClickDenoiser, ClickModelConfig
from dsrm.click_scorer import ClickScorer
from dsrm.click_vector_purifier import ClickVectorPurifier
from dsrm.click_vectors import CDAEConfig, DiffRecConfig
from dsrm.diffusion import (
    Denoiser,
    DenoiserConfig,
    NoiseSchedule,
    Prediction,
    Sampler,
    SamplerConfig,
    ScheduleKind,
    posterior_spread,
)
from dsrm.item_term import explained_share, fit_item_term
from dsrm.model import DSRM, SPREAD_SAMPLES, DistillationConfig, DSRMConfig, TrainedDenoiser, distil
from dsrm.preference_sessions import PreferenceSessions
from dsrm.preference_student import STUDENT
from dsrm.preference_training import PreferenceConfig, PreferenceKind, fit_preference
from dsrm.purifier import (
    BELIEF_MODES,
    MODES,
    ConditionBuilder,
    ItemQuality,
    Mode,
    StatePurifier,
    Target,
    WorldKey,
    condition_size,
    pretraining_checkpoint,
    save_purifier,
)
from dsrm.shared_level import SharedScales
from dsrm.targets import (
    ExampleSource,
    LiteralTargets,
    MixedTargets,
    PairedTargets,
    ProfileTargets,
    UnbiasedTargets,
    WindowSettings,
    WindowSource,
    logged_users,
)
from dsrm.tolerance_belief import TolerancePrior
from dsrm.training import (
    Objective,
    TrainingConfig,
    denoising_objective,
    regression_objective,
    top_heavy_objective,
    train_denoiser,
)
from kuaifair_env.checks import need_number, need_seed, need_whole
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.splits import CALIBRATION_SHARE, calibration_users
from kuaifair_env.world import World

_ENOUGH_EXPLAINED = 1.0 / 3.0
_TRUST_IN_LOG = 0.25
"""Of a column of :attr:`dsrm.belief.BeliefItems.log`, in log-odds; chosen by services of KuaiRand twin, seed 1."""
_RICH_MODES = ("belief", "profile", "unbiased", "paired")
"""Diffusion models on rich conditions, whose states are drawn from noise."""
_PREFERENCES: dict[str, PreferenceKind] = {
    "belief": "diffusion",
    "gaussian": "gaussian",
    "mixture": "mixture",
    "belief_regression": "regression",
}
_LEVELS, _LITERAL_LEVELS = 100, 20
_EXAMPLES_PER_USER = 60
"""Examples of a round where a user has one clean state: more of few users are learned by heart within the round."""
_SPREAD_CONDITIONS, _SPREAD_BATCH = 5_000, 250
_DEBIAS_WINDOWS = 40_000
_NOISE_WINDOWS = 4_096
_NOISE_SCALE = 0.1
_DISTILLATION_STREAM = 1_000_003


@dataclass(frozen=True)
class PretrainConfig:
    """How a purifier is made; the defaults are those of the method.

    ``PretrainConfig(mode="paper")`` is the paper's own model as its equations have it: the observed state is both
    target and condition (eq. 2 and 7), the network predicts the noise on a linear schedule, at uniformly drawn levels,
    and states are drawn by ancestral steps from the noised observed state (eq. 3), without a student. Its optimum is
    the identity. The schedule and the prediction of this mode can be changed, as can those of the others.

    Attributes:
        mode: ``"belief"``, a posterior over the user's clean preference by diffusion, or one of its controls:
            ``"closed_form"``, ``"candidates"``, ``"gaussian"``, ``"mixture"``, ``"belief_regression"``. Of purifiers of
            single states ``"profile"``, ``"paper"``, ``"unbiased"``, ``"paired"``, or a control: ``"regression"``,
            ``"linear_debias"``, ``"ips"``, ``"identity"``, ``"noise"``, or a denoiser of the related work: ``"tce"``,
            ``"rce"``, ``"bod"``, ``"cdae"``, ``"diffrec"``.
        target: Whose target the regression control learns.
        seed: Seed of weights, examples and batches.
        schedule: Kind of noise schedule; None is ``"cosine"``, and ``"linear"`` in ``paper`` mode.
        levels: Noise levels ``K``; None is 100, and 20 in ``paper`` mode. The least noisy of few levels is too noisy
            for samples of a narrow posterior.
        prediction: What the denoiser predicts; None is the velocity, and the noise in ``paper`` mode. A network that
            predicts the clean state gives as good a mean, but a posterior that is far too narrow.
        width: Width of the network; None is 256, and 192 for beliefs.
        blocks: Number of its residual blocks; None is 3, and 2 for beliefs.
        training: Rounds, batches, optimizer; None is the default, with three rounds for beliefs.
        distillation: Training of the student of a purifier of single states.
        student: Training of the student of a posterior over preferences.
        windows: Which windows to learn from.
        exclude_share: How often a window's own positives are left out of a profile.
        calibration_share: Share of the test log's users who are calibration users (``unbiased`` only).
        denoiser_steps: Optimizer steps of the click models of the related work; CDAE and DiffRec may stop earlier.
        item_quality: From what beliefs estimate items before a session: ``"log"``, click rates in the training log, or
            ``"features"``, an estimate that item features help (:func:`dsrm.fit_item_term`), for a log that is wrong
            about items it has seldom shown. None is ``"log"`` for states; for candidates it is ``"features"`` where
            these explain at least a third of what the training log says of items they have not seen
            (:func:`dsrm.item_term.explained_share`).
    """

    mode: Mode = "profile"
    target: Target = "profile"
    seed: int = 0
    schedule: ScheduleKind | None = None
    levels: int | None = None
    prediction: Prediction | None = None
    width: int | None = None
    blocks: int | None = None
    training: TrainingConfig | None = None
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    student: DistillationConfig = STUDENT
    windows: WindowSettings = field(default_factory=WindowSettings)
    exclude_share: float = 0.5
    calibration_share: float = CALIBRATION_SHARE
    denoiser_steps: int = 1_500
    item_quality: ItemQuality | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.target not in get_args(Target):
            raise ValueError(f"target must be one of {get_args(Target)}, got {self.target!r}")
        if self.schedule not in (None, *get_args(ScheduleKind)):
            raise ValueError(f"schedule must be one of {get_args(ScheduleKind)} or None, got {self.schedule!r}")
        if self.prediction not in (None, *get_args(Prediction)):
            raise ValueError(f"prediction must be one of {get_args(Prediction)} or None, got {self.prediction!r}")
        if self.item_quality not in (None, *get_args(ItemQuality)):
            raise ValueError(f"item_quality must be one of {get_args(ItemQuality)} or None, got {self.item_quality!r}")
        if self.item_quality == "features" and self.mode not in BELIEF_MODES:
            raise ValueError(f"item_quality is for beliefs ({', '.join(BELIEF_MODES)}); {self.mode} estimates no items")
        need_seed(self.seed)
        for name in ("width", "blocks"):
            if getattr(self, name) is not None:
                need_whole(1, **{name: getattr(self, name)})
        need_whole(1, denoiser_steps=self.denoiser_steps)
        if self.levels is not None:
            need_whole(1, levels=self.levels)
        need_number("[0, 1]", exclude_share=self.exclude_share)
        need_number("(0, 1)", calibration_share=self.calibration_share)
        if self.mode in _RICH_MODES:
            schedule = self.noise_schedule()
            schedule.need_noise(schedule.levels)

    @property
    def network_width(self) -> int:
        """Width of the network."""
        return self.width or (192 if self.mode in BELIEF_MODES else 256)

    @property
    def network_blocks(self) -> int:
        """Number of the network's residual blocks."""
        return self.blocks or (2 if self.mode in BELIEF_MODES else 3)

    @property
    def rounds_and_batches(self) -> TrainingConfig:
        """How the network is trained."""
        return self.training or (TrainingConfig(rounds=3) if self.mode in BELIEF_MODES else TrainingConfig())

    def noise_schedule(self) -> NoiseSchedule:
        """Returns the noise schedule of a diffusion model with these settings."""
        if self.mode == "paper":
            return NoiseSchedule.make(self.schedule or "linear", self.levels or _LITERAL_LEVELS)
        return NoiseSchedule.make(self.schedule or "cosine", self.levels or _LEVELS)

    @property
    def learned_target(self) -> str:
        """What the purifier learns to recover: the mode, or the regression control's target."""
        return self.target if self.mode == "regression" else self.mode


def pretrain(
    world: World, config: PretrainConfig | None = None, *, checkpoint: str | Path | None = None, progress: bool = False
) -> StatePurifier:
    """Makes a purifier from the training world's log.

    Training users only; a tenth of them is kept aside for early stopping, and the weights of the best round are kept
    (``best_round`` of the report). Where a user has one clean state (profiles and unbiased targets) a round has at most
    60 examples a user. The test log is read in ``unbiased`` mode alone, and then of declared calibration users alone.

    Args:
        world: The training world.
        config: What to make; None makes the method's purifier.
        checkpoint: File to which training is written after each round and from which it goes on after a kill; remove
            it when the purifier is saved. None writes nothing.
        progress: Whether to show a progress bar.

    Returns:
        The purifier; see :func:`dsrm.save_purifier`.

    Raises:
        ValueError: If the world is not a training world, or a setting is not valid.
        ArtifactError: If the checkpoint is damaged or of another training.
    """
    config = PretrainConfig() if config is None else config
    if world.split != "train":
        raise ValueError("purifiers are pretrained in the training world; the test world stays unseen")
    if config.mode in BELIEF_MODES:
        return _fit_belief(world, config, checkpoint, progress)
    if config.mode == "identity":
        return IdentityPurifier()
    if config.mode == "ips":
        return IPSPurifier()
    if config.mode == "noise":
        return NoisePurifier(_NOISE_SCALE, config.seed)
    if config.mode == "tce" or config.mode == "rce" or config.mode == "bod":
        click_model = ClickModelConfig(config.mode, steps=config.denoiser_steps, seed=config.seed)
        return ClickDenoiser.fit(world, click_model, progress)
    if config.mode == "cdae":
        return ClickVectorPurifier.fit(world, CDAEConfig(steps=config.denoiser_steps, seed=config.seed), progress)
    if config.mode == "diffrec":
        return ClickVectorPurifier.fit(world, DiffRecConfig(steps=config.denoiser_steps, seed=config.seed), progress)
    if config.mode == "linear_debias":
        return _fit_linear_debias(world, config)
    if config.mode == "regression":
        return _train_regression(world, config, checkpoint, progress)
    return _train_dsrm(world, config, checkpoint, progress)


def pretrain_file(path: str | Path, world: World, config: PretrainConfig, *, progress: bool = False) -> StatePurifier:
    """Pretrains a purifier and saves it; a call that was killed at any moment goes on from ``PATH.partial``.

    Arguments and errors are those of :func:`pretrain`.
    """
    checkpoint = pretraining_checkpoint(path)
    purifier = pretrain(world, config, checkpoint=checkpoint, progress=progress)
    save_purifier(purifier, path)
    checkpoint.unlink(missing_ok=True)
    return purifier


def fitted_scorer(world: World, item_quality: ItemQuality) -> ClickScorer:
    """Fits the click scorer of beliefs in the training world; see :class:`PretrainConfig`."""
    scorer = ClickScorer.fit(world)
    if item_quality == "log":
        return scorer
    return scorer.with_click_rates(world, fit_item_term(world, "features").of(world.data))


def _item_quality(world: World, mode: Mode) -> ItemQuality:
    return "features" if mode == "candidates" and explained_share(world) >= _ENOUGH_EXPLAINED else "log"


def _fit_belief(world: World, config: PretrainConfig, checkpoint: str | Path | None, progress: bool) -> BeliefPurifier:
    """Fits the distribution of users' clean preferences, given all that is known of them."""
    item_quality = config.item_quality or _item_quality(world, config.mode)
    scorer = fitted_scorer(world, item_quality)
    provenance = {
        "mode": config.mode,
        "item_quality": item_quality,
        "seed": config.seed,
        "data": world.data.provenance.as_dict(),
        "test_log": "unread",
    }
    key = WorldKey.of_world(world)
    if config.mode == "closed_form":
        return BeliefPurifier(scorer, None, BeliefScales(), key, provenance)
    sessions = PreferenceSessions(world, scorer)
    if config.mode == "candidates":
        tolerance = TolerancePrior.fit(world, scorer)
        scales = replace(BeliefScales.of_users(sessions.scales), shared=SharedScales(log=_TRUST_IN_LOG))
        return CandidatePurifier(scorer, None, scales, key, provenance, tolerance=tolerance)
    schedule = config.noise_schedule()
    fitted = fit_preference(
        sessions,
        PreferenceConfig(
            _PREFERENCES[config.mode],
            config.seed,
            schedule.kind,
            schedule.levels,
            config.network_width,
            config.network_blocks,
            config.rounds_and_batches,
            config.student,
        ),
        checkpoint=checkpoint,
        progress=progress,
    )
    return BeliefPurifier(scorer, fitted.model, BeliefScales.of_users(fitted.scales), key, provenance | fitted.report)


def noise_like(purifier: StatePurifier, world: World, seed: int = 0) -> NoisePurifier:
    """Returns the noise control of a purifier: noise of the size by which it moves observed states.

    The states are those of ``seed``'s windows of the training world.
    """
    purifier.bind(world)
    window = _draw_windows(world, WindowSettings(), _NOISE_WINDOWS, seed)
    states = observed_states(world, window)
    shifts = purifier.purify(states, window)[:, : world.dimension] - states
    return NoisePurifier(float(np.sqrt(np.mean(shifts.astype(np.float64) ** 2))), seed)


def example_source(world: World, config: PretrainConfig) -> ExampleSource:
    """Returns where the training examples of a mode come from."""
    if config.learned_target == "paper":
        return LiteralTargets(world, config.windows)
    if config.learned_target == "paired":
        return PairedTargets(world, config.windows)
    profile = ProfileTargets(world, config.windows, config.exclude_share)
    if config.learned_target == "profile":
        return profile
    calibration = calibration_users(world.data, config.calibration_share)
    return MixedTargets(UnbiasedTargets(world, config.windows, calibration), profile)


def _train_dsrm(world: World, config: PretrainConfig, checkpoint: str | Path | None, progress: bool) -> DSRM:
    """Trains a diffusion model: on rich conditions and with a student, or the paper's literal one."""
    literal = config.mode == "paper"
    size = world.dimension
    schedule = config.noise_schedule()
    prediction = config.prediction or ("epsilon" if literal else "velocity")
    shape = DenoiserConfig(
        size, size if literal else condition_size(size), prediction, config.network_width, config.network_blocks
    )
    objective = denoising_objective if literal else top_heavy_objective
    source = example_source(world, config)
    trained, report = _train(world, source, config, lambda: Denoiser(shape, schedule), objective, checkpoint, progress)
    student = None
    if not literal:
        rng = np.random.default_rng([config.seed, _DISTILLATION_STREAM])
        examples = source.draw(rng.choice(source.users, config.distillation.conditions), rng)
        conditions = trained.condition.transform(examples.conditions)
        states, spreads = _teach(trained, schedule, conditions, progress)
        student, cosine = distil(conditions, states, spreads, config.distillation, config.seed, progress)
        report["student_cosine"] = round(cosine, 5)
    model = DSRMConfig(
        mode=config.mode,
        schedule=schedule.kind,
        levels=schedule.levels,
        denoiser=shape,
        conditioning="state" if literal else "rich",
        sampler=SamplerConfig(kind="ddpm", steps=schedule.levels, start="state") if literal else None,
    )
    return DSRM(model, WorldKey.of_world(world), trained, student, report)


def _train_regression(
    world: World, config: PretrainConfig, checkpoint: str | Path | None, progress: bool
) -> RegressionPurifier:
    shape = DenoiserConfig(
        world.dimension, condition_size(world.dimension), "sample", config.network_width, config.network_blocks
    )
    source = example_source(world, config)
    trained, report = _train(
        world, source, config, lambda: regression_network(shape), regression_objective, checkpoint, progress
    )
    regression = RegressionConfig(config.target, shape)
    return RegressionPurifier(regression, WorldKey.of_world(world), trained, report)


def _draw_windows(world: World, settings: WindowSettings, count: int, seed: int) -> HistoryWindow:
    rng = np.random.default_rng(seed)
    return WindowSource(world, settings).draw(rng.choice(logged_users(world), count), rng)[0]


def _fit_linear_debias(world: World, config: PretrainConfig) -> LinearDebiasPurifier:
    window = _draw_windows(world, config.windows, _DEBIAS_WINDOWS, config.seed)
    window = window.take(np.flatnonzero(window.clicks.any(axis=1)))
    popularity = ConditionBuilder.of_world(world).statistics(window)[:, 0]
    return LinearDebiasPurifier.fit(WorldKey.of_world(world), observed_states(world, window), popularity)


def _train(
    world: World,
    source: ExampleSource,
    config: PretrainConfig,
    make_network: Callable[[], Denoiser],
    objective: Objective,
    checkpoint: str | Path | None,
    progress: bool,
) -> tuple[TrainedDenoiser, dict[str, Any]]:
    """Trains a network on the users of a source, and reports what was read."""
    training = config.rounds_and_batches
    if config.learned_target in ("profile", "unbiased"):
        examples = min(training.examples, _EXAMPLES_PER_USER * len(source.users))
        training = replace(training, examples=examples)
    trained, report = train_denoiser(
        make_network,
        objective,
        source,
        training,
        seed=config.seed,
        label=config.mode,
        checkpoint=checkpoint,
        progress=progress,
    )
    provenance = {
        "mode": config.mode,
        "target": config.learned_target,
        "seed": config.seed,
        "data": world.data.provenance.as_dict(),
        "test_log": _test_log_read(world, config),
    }
    return trained, provenance | report


def _test_log_read(world: World, config: PretrainConfig) -> str:
    if config.learned_target != "unbiased":
        return "unread"
    users = calibration_users(world.data, config.calibration_share)
    rows = int(np.isin(world.data.test.users, users).sum())
    return f"{rows:,} rows of {len(users):,} calibration users, who are never evaluated"


def _teach(
    denoiser: TrainedDenoiser, schedule: NoiseSchedule, conditions: FloatArray, progress: bool
) -> tuple[FloatArray, FloatArray]:
    """Returns the posterior mean of standardised conditions, and the posterior's spread of the first ones.

    One evaluation at the noisiest level, where nothing of the noisy state is left, is the posterior mean; more
    deterministic steps move on towards a mode.
    """
    from tqdm import tqdm

    network, size = denoiser.network, denoiser.network.config.state_size
    condition = torch.from_numpy(conditions)
    mean = Sampler(network, schedule, SamplerConfig(steps=1))
    posterior = Sampler(network, schedule, SamplerConfig.posterior(schedule.levels, SPREAD_SAMPLES))
    # The first part of a condition is the observed state, to which the noise of a row belongs.
    states = mean.sample(condition, condition[:, :size])
    few = torch.split(condition[:_SPREAD_CONDITIONS], _SPREAD_BATCH)
    spreads = [
        posterior_spread(posterior.samples(rows, rows[:, :size]).numpy())
        for rows in tqdm(few, desc="sample the posterior", disable=not progress)
    ]
    return states.numpy(), np.concatenate(spreads)
