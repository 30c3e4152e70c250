"""Preference models that are trained networks: the diffusion posterior (DSRM, mode ``belief``), and regression.

Both see the same evidence and learn by how much a clean preference differs from the closed form, in coordinates in
which the closed form's posterior is standard normal, the user's level taken from the log. Where preferences are normal
there is nothing to learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dsrm.baselines import regress, regression_network
from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule, Sampler, SamplerConfig, ScheduleKind
from dsrm.model import DistillationConfig, Standardiser, TrainedDenoiser
from dsrm.preference import Evidence, LevelPrior, Moments, level_prior, level_settings, normal_samples
from dsrm.preference_sessions import KnownPreferences, features_of, joined_features, unwhitened
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, parse_as, take_tensors, with_prefix, without_prefix
from kuaifair_env.response.training import Trainer, cosine_decay, load_network, network_tensors

_CLIP = 6.0
_MAX_SHIFT, _MAX_LOG_RATIO = 5.0, 2.0
_TEACHER_SAMPLES, _SPREAD_SHARE = 16, 4
_VALIDATION_SHARE = 10


STUDENT = DistillationConfig(conditions=16_000, width=192, steps=3_000, batch_size=512, learning_rate=1e-3)
"""How a student is trained. The teacher is asked for its spread in a quarter of the conditions."""


class _ScheduleSettings(NamedTuple):
    kind: ScheduleKind
    levels: int


class DiffusionPreference:
    """A diffusion model of users' clean preferences given evidence, with a student for its mean and spread.

    Args:
        denoiser: Trained on whitened preferences.
        schedule: Noise levels.
        level: Of the closed form that it starts from.
        student: Gives mean and spread in one evaluation; None evaluates the diffusion model itself.
    """

    kind = "diffusion"

    def __init__(
        self, denoiser: TrainedDenoiser, schedule: NoiseSchedule, level: LevelPrior, student: Student | None
    ) -> None:
        self.denoiser, self._schedule, self.level, self.student = denoiser, schedule, level, student

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        if self.student is None:
            return self.own_moments(evidence)
        return self.student.moments(*self.level.marginals(evidence), evidence.scales)

    def own_moments(self, evidence: Evidence, samples: int = _TEACHER_SAMPLES) -> Moments:
        """Returns mean and spread as the diffusion model itself gives them; the spread is that of some draws."""
        return Moments(self.own_means(evidence), self.samples(evidence, samples, 0).std(dim=0))

    def own_means(self, evidence: Evidence) -> Tensor:
        """Returns the mean as the diffusion model itself gives it, ``float32 (B, d + 1)`` in log-odds.

        It is one evaluation at the noisiest level, where nothing of the noisy preference is left.
        """
        return self.drawn(evidence, SamplerConfig(steps=1))[0]

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`; draws of a row follow from seed and evidence alone."""
        return self.drawn(evidence, replace(SamplerConfig.posterior(self._schedule.levels, count), seed=seed))

    def drawn(self, evidence: Evidence, config: SamplerConfig) -> Tensor:
        """Returns draws of the clean preferences by some sampler, ``float32 (samples, B, d + 1)`` in log-odds."""
        levelled = self.level.applied(evidence)
        sampler = Sampler(self.denoiser.network, self._schedule, config)
        draws = sampler.samples(_standardised(features_of(levelled), self.denoiser.condition), levelled.means)
        return unwhitened(levelled, _restored(draws, self.denoiser.state))

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        schedule = _ScheduleSettings(self._schedule.kind, self._schedule.levels)
        return {
            "denoiser": asdict(self.denoiser.network.config),
            "schedule": list(schedule),
            **level_settings(self.level),
        }

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        of_student = {} if self.student is None else self.student.tensors()
        return self.denoiser.tensors() | of_student | {"level": self.level.coefficients}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> DiffusionPreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        of_schedule = parse_as(_ScheduleSettings, settings["schedule"])
        schedule = NoiseSchedule.make(of_schedule.kind, of_schedule.levels)
        network = Denoiser(parse_as(DenoiserConfig, settings["denoiser"]), schedule)
        denoiser = TrainedDenoiser.restore(network, tensors)
        return cls(denoiser, schedule, level_prior(tensors, settings), Student.restore(tensors, denoiser.condition))


class RegressionPreference:
    """The mean of clean preferences by least squares, with the closed form's spread times a factor.

    Args:
        denoiser: A network of the diffusion model's own architecture with a single noise level.
        level: Of the closed form that it starts from.
        spread: ``float32 (d + 1,)``, standard deviations of what it leaves unexplained of whitened preferences.
    """

    kind = "regression"

    def __init__(self, denoiser: TrainedDenoiser, level: LevelPrior, spread: FloatArray) -> None:
        self._denoiser, self._level = denoiser, level
        self._spread = torch.from_numpy(np.asarray(spread, np.float32))

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        levelled = self._level.applied(evidence)
        deviations = (self._factors(levelled) ** 2).sum(-1).sqrt()
        return Moments(self._mean(levelled), evidence.scales * deviations)

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        levelled = self._level.applied(evidence)
        factors = self._factors(levelled)
        noise = normal_samples(torch.zeros_like(evidence.means), factors @ factors.mT, count, seed)
        return self._mean(levelled) + noise * evidence.scales

    def _factors(self, levelled: Evidence) -> Tensor:
        factors: Tensor = torch.linalg.cholesky(levelled.covariances)
        return factors * self._spread

    @torch.no_grad()
    def _mean(self, levelled: Evidence) -> Tensor:
        conditions = _standardised(features_of(levelled), self._denoiser.condition)
        return unwhitened(levelled, _restored(regress(self._denoiser.network, conditions), self._denoiser.state))

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return {"denoiser": asdict(self._denoiser.network.config), **level_settings(self._level)}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._denoiser.tensors() | {"spread": self._spread.numpy(), "level": self._level.coefficients}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> RegressionPreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        shape = parse_as(DenoiserConfig, settings["denoiser"])
        take_tensors(tensors, {"spread": (shape.state_size,)})
        denoiser = TrainedDenoiser.restore(regression_network(shape), tensors)
        return cls(denoiser, level_prior(tensors, settings), tensors["spread"])


class Student:
    """A small network that gives mean and spread of a diffusion posterior in one evaluation.

    It says by how much they differ from the closed form's, in the closed form's standard deviations, entry by entry.

    Args:
        network: ``(B, c) -> (B, 2 (d + 1))``: shifts of the means, and logarithms of ratios of deviations.
        condition: How features are standardised.
    """

    def __init__(self, network: nn.Sequential, condition: Standardiser) -> None:
        self._network = network.eval()
        self._condition = condition

    @torch.no_grad()
    def moments(self, means: Tensor, deviations: Tensor, scales: Tensor) -> Moments:
        """Returns mean and spread in log-odds.

        Args:
            means: ``float32 (B, d + 1)``, mode of the closed form with the teacher's prior of levels.
            deviations: ``float32 (B, d + 1)``, its standard deviations; both in units of the scales.
            scales: ``float32 (d + 1,)``, of the prior, in log-odds.
        """
        features = _standardised(joined_features(means, deviations, scales), self._condition)
        shifts, log_ratios = self._network(features).chunk(2, dim=1)
        deviations = scales * deviations
        means = scales * means + deviations * shifts.clamp(-_MAX_SHIFT, _MAX_SHIFT)
        return Moments(means, deviations * log_ratios.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp())

    def tensors(self) -> Tensors:
        """Returns the weights by name; standardisation is that of the teacher."""
        return with_prefix(network_tensors(self._network), "student.")

    @classmethod
    def restore(cls, tensors: Tensors, condition: Standardiser) -> Student | None:
        """Returns the student whose :meth:`tensors` are among the given ones, None where there are none of them."""
        own = without_prefix(tensors, "student.")
        if not own:
            return None
        take_tensors(own, {"network.0.weight": (None, len(condition.mean)), "network.4.bias": (None,)})
        width, inputs = own["network.0.weight"].shape
        network = student_network(inputs, width, len(own["network.4.bias"]))
        load_network(network, own)
        return cls(network, condition)


def student_network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Returns a network with two hidden layers that begins as the closed form."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


@dataclass(frozen=True)
class DistillationError:
    """How far a student is from its teacher, on sessions that it was not trained on.

    Attributes:
        means: Root mean square difference of the means, in the teacher's standard deviations.
        deviations: Median of the ratio of standard deviations, student to teacher.
    """

    means: float
    deviations: float


def distil_preference(
    teacher: DiffusionPreference,
    sessions: Sequence[KnownPreferences],
    config: DistillationConfig,
    seed: int,
    progress: bool = False,
) -> tuple[Student, DistillationError]:
    """Trains a student to give a diffusion posterior's mean and spread.

    Args:
        teacher: The diffusion model.
        sessions: Batches of evidence to learn from; the last tenth is kept to measure the error.
        config: How to train.
        seed: Seed of weights and batches.
        progress: Whether to show a progress bar.
    """
    from tqdm import tqdm

    condition = teacher.denoiser.condition
    inputs, shifts, variances = [], [], []
    for number, batch in enumerate(tqdm(sessions, "ask the teacher", disable=not progress)):
        evidence = teacher.level.applied(batch.evidence)
        closed = evidence.scales * evidence.deviations
        inputs.append(_standardised(features_of(evidence), condition))
        shifts.append((teacher.own_means(batch.evidence) - evidence.scales * evidence.means) / closed)
        # Draws cost as much as a hundred means.
        if (number + 1 - len(sessions)) % _SPREAD_SHARE == 0:
            variances.append((teacher.own_moments(batch.evidence).deviations / closed) ** 2)
        else:
            variances.append(torch.full_like(closed, torch.nan))
    features, shift, variance = torch.cat(inputs), torch.cat(shifts), torch.cat(variances)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = student_network(features.shape[1], config.width, 2 * shift.shape[1])
    generator = torch.Generator().manual_seed(seed)
    known = len(features) - len(features) // _VALIDATION_SHARE
    spread_rows = torch.nonzero(variance[:known, 0].isfinite())[:, 0]

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in tqdm(range(config.steps), "distil", disable=not progress):
            rows = torch.randint(known, (config.batch_size,), generator=generator)
            of_spread = torch.randint(len(spread_rows), (config.batch_size // _SPREAD_SHARE,), generator=generator)
            yield rows, spread_rows[of_spread]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, of_spread = batch
        moved = network(features[rows])[:, : shift.shape[1]]
        log_ratios = network(features[of_spread])[:, shift.shape[1] :]
        # A normal likelihood, whose optimum is the mean of noisy variances.
        spread_loss = (log_ratios + variance[of_spread] * (-2.0 * log_ratios).exp() / 2.0).mean()
        total: Tensor = ((moved - shift[rows]) ** 2).mean() + spread_loss
        return total

    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    Trainer(network, optimizer, schedule=cosine_decay(config.steps)).fit(batches, loss, rounds=1)
    network.eval()
    with torch.inference_mode():
        moved, log_ratios = network(features[known:]).chunk(2, dim=1)
        deviations = torch.where(variance[known:].isfinite(), variance[known:].sqrt(), log_ratios.exp())
        far = ((moved - shift[known:]) / deviations).square().mean().sqrt()
        ratio = (log_ratios.exp() / variance[known:].sqrt()).nanmedian()
    return Student(network, condition), DistillationError(round(float(far), 4), round(float(ratio), 4))


def _standardised(features: Tensor, standardiser: Standardiser) -> Tensor:
    mean, deviation = torch.from_numpy(standardiser.mean), torch.from_numpy(standardiser.deviation)
    return ((features - mean) / deviation).clamp_(-_CLIP, _CLIP)


def _restored(states: Tensor, standardiser: Standardiser) -> Tensor:
    return states * torch.from_numpy(standardiser.deviation) + torch.from_numpy(standardiser.mean)
