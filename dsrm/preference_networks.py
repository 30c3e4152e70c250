"""Preference models that are trained networks: the diffusion posterior (DSRM, mode ``belief``), and regression.

Both see the same evidence and learn by how much a clean taste differs from what a fitted normal prior says
(``gaussian``), in coordinates in which that posterior is standard normal: where tastes are normal there is nothing to
learn. What they have learned counts as far as it holds for users that they were not trained on. The level stays
normal: it is one number, whose prior the log shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsrm.baselines import regress, regression_network
from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule, Sampler, SamplerConfig, ScheduleKind
from dsrm.model import TrainedDenoiser
from dsrm.preference import Evidence, Moments, normal_samples
from dsrm.preference_mixture import MixturePreference
from dsrm.preference_sessions import features_of, unwhitened
from dsrm.preference_student import Student
from kuaifair_env import seeding
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, parse_as, take_tensors

_TEACHER_SAMPLES = 16
_LEVEL_STREAM = 1_000_000


class _ScheduleSettings(NamedTuple):
    kind: ScheduleKind
    levels: int


def fitted_reliance(means: Tensor, tastes: Tensor) -> float:
    """Returns how far predicted means are to be relied on: their share, in [0, 1], that predicts best in least squares.

    Args:
        means: ``float32 (n, d)``, whitened, as a network predicts them for users it was not trained on.
        tastes: ``float32 (n, d)``, of these users.
    """
    product, square = float((means * tastes).sum()), float((means * means).sum())
    return min(max(product / square, 0.0), 1.0) if square > 0 else 0.0


class DiffusionPreference:
    """A diffusion model of users' clean preferences given evidence, with a student for its mean and spread.

    Args:
        denoiser: Trained on whitened preferences.
        schedule: Noise levels.
        prior: The fitted normal that it starts from.
        reliance: How far its mean is relied on, in [0, 1].
        student: Gives mean and spread in one evaluation; None evaluates the diffusion model itself.
    """

    kind = "diffusion"

    def __init__(
        self,
        denoiser: TrainedDenoiser,
        schedule: NoiseSchedule,
        prior: MixturePreference,
        reliance: float = 1.0,
        student: Student | None = None,
    ) -> None:
        self.denoiser, self._schedule, self.prior, self.reliance = denoiser, schedule, prior, reliance
        self.student = student

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        student = self.student
        moments = self.own_moments(evidence) if student is None else student.moments(self.prior, evidence)
        return self.prior.level.widened(moments, evidence)

    def own_moments(self, evidence: Evidence, samples: int = _TEACHER_SAMPLES) -> Moments:
        """Returns mean and spread as the diffusion model itself gives them; the spread of tastes is that of draws.

        Levels are as wide as they come out, before :meth:`~dsrm.preference.LevelPrior.widened`.
        """
        deviations = self.samples(evidence, samples, 0).std(dim=0)
        deviations[:, 0] = evidence.scales[0] * self.prior.normal(evidence).deviations[:, 0]
        return Moments(self.own_means(evidence), deviations)

    def own_means(self, evidence: Evidence) -> Tensor:
        """Returns the mean as the diffusion model itself gives it, ``float32 (B, d + 1)`` in log-odds."""
        normal = self.prior.normal(evidence)
        return unwhitened(normal, _with_levels(self.reliance * self.whitened_means(normal)))

    def whitened_means(self, normal: Evidence) -> Tensor:
        """Returns by how much means of tastes differ from the fitted normal's, whitened, ``float32 (B, d)``.

        It is one evaluation at the noisiest level, where nothing of the noisy preference is left.

        Args:
            normal: What the fitted normal says.
        """
        return self._draws(normal, SamplerConfig(steps=1), normal.means[:, 1:])[0]

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`; draws of a row follow from seed and evidence alone."""
        return self.drawn(evidence, replace(SamplerConfig.posterior(self._schedule.levels, count), seed=seed))

    def drawn(self, evidence: Evidence, config: SamplerConfig) -> Tensor:
        """Returns draws of the clean preferences by some sampler, ``float32 (samples, B, d + 1)`` in log-odds."""
        normal = self.prior.normal(evidence)
        # Noise follows from bits that do not depend on what else is in the batch, and differ before anything was shown.
        known = evidence.means[:, 1:] + evidence.contexts[:, : evidence.means.shape[1] - 1]
        draws, means = self._draws(normal, config, known), self.whitened_means(normal)
        keys = seeding.row_keys(known.numpy(), config.seed)
        levels = torch.stack(
            [torch.from_numpy(seeding.row_normals(keys, 1, _LEVEL_STREAM + number)) for number in range(len(draws))]
        )[..., 0]
        preferences = unwhitened(normal, _with_levels(draws - means + self.reliance * means, levels))
        return self.prior.level.widened_draws(preferences, normal.scales[0] * normal.means[:, 0], evidence)

    def _draws(self, normal: Evidence, config: SamplerConfig, observed: Tensor) -> Tensor:
        sampler = Sampler(self.denoiser.network, self._schedule, config)
        draws = sampler.samples(_conditions(normal, self.denoiser), observed)
        return _restored(draws, self.denoiser)

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        schedule = _ScheduleSettings(self._schedule.kind, self._schedule.levels)
        denoiser = asdict(self.denoiser.network.config)
        own = {"denoiser": denoiser, "schedule": list(schedule), "reliance": self.reliance}
        return own | self.prior.settings()

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        of_student = {} if self.student is None else self.student.tensors()
        return self.denoiser.tensors() | of_student | self.prior.tensors()

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> DiffusionPreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        of_schedule = parse_as(_ScheduleSettings, settings["schedule"])
        schedule = NoiseSchedule.make(of_schedule.kind, of_schedule.levels)
        network = Denoiser(parse_as(DenoiserConfig, settings["denoiser"]), schedule)
        denoiser = TrainedDenoiser.restore(network, tensors)
        prior, reliance = MixturePreference.restore(tensors, settings), parse_as(float, settings["reliance"])
        return cls(denoiser, schedule, prior, reliance, Student.restore(tensors))


class RegressionPreference:
    """The mean of clean preferences by least squares, with the fitted normal's spread times a factor.

    Args:
        denoiser: A network of the diffusion model's own architecture with a single noise level.
        prior: The fitted normal that it starts from.
        reliance: How far its mean is relied on, in [0, 1].
        spread: ``float32 (d,)``, standard deviations of what it leaves unexplained of whitened tastes.
    """

    kind = "regression"

    def __init__(
        self, denoiser: TrainedDenoiser, prior: MixturePreference, reliance: float, spread: FloatArray
    ) -> None:
        self._denoiser, self._prior, self._reliance = denoiser, prior, reliance
        self._spread = torch.from_numpy(np.concatenate([np.ones(1), spread]).astype(np.float32))

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        normal = self._prior.normal(evidence)
        deviations = (self._factors(normal) ** 2).sum(-1).sqrt()
        moments = Moments(self._mean(normal), evidence.scales * deviations)
        return self._prior.level.widened(moments, evidence)

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        normal = self._prior.normal(evidence)
        factors = self._factors(normal)
        noise = normal_samples(torch.zeros_like(evidence.means), factors @ factors.mT, count, seed)
        means = self._mean(normal)
        return self._prior.level.widened_draws(means + noise * evidence.scales, means[:, 0], evidence)

    def whitened_means(self, normal: Evidence) -> Tensor:
        """See :meth:`DiffusionPreference.whitened_means`."""
        predicted = regress(self._denoiser.network, _conditions(normal, self._denoiser))
        return _restored(predicted, self._denoiser)

    def _factors(self, normal: Evidence) -> Tensor:
        factors: Tensor = torch.linalg.cholesky(normal.covariances)
        return factors * self._spread

    @torch.no_grad()
    def _mean(self, normal: Evidence) -> Tensor:
        return unwhitened(normal, _with_levels(self._reliance * self.whitened_means(normal)))

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        denoiser = asdict(self._denoiser.network.config)
        return {"denoiser": denoiser, "reliance": self._reliance, **self._prior.settings()}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return self._denoiser.tensors() | {"spread": self._spread[1:].numpy()} | self._prior.tensors()

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> RegressionPreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        shape = parse_as(DenoiserConfig, settings["denoiser"])
        take_tensors(tensors, {"spread": (shape.state_size,)})
        denoiser = TrainedDenoiser.restore(regression_network(shape), tensors)
        prior, reliance = MixturePreference.restore(tensors, settings), parse_as(float, settings["reliance"])
        return cls(denoiser, prior, reliance, tensors["spread"])


def _with_levels(tastes: Tensor, levels: Tensor | None = None) -> Tensor:
    """Returns whitened preferences of whitened tastes ``(..., d)`` and levels ``(...)``, which are 0 if None."""
    first = torch.zeros(tastes.shape[:-1]) if levels is None else levels
    return torch.cat([first[..., None], tastes], dim=-1)


def _conditions(normal: Evidence, denoiser: TrainedDenoiser) -> Tensor:
    return torch.from_numpy(denoiser.condition.clipped(features_of(normal)))


def _restored(states: Tensor, denoiser: TrainedDenoiser) -> Tensor:
    standardiser = denoiser.state
    return states * torch.from_numpy(standardiser.deviation) + torch.from_numpy(standardiser.mean)
