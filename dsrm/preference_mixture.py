"""Preference models in closed form with a fitted prior that reads the log: a normal distribution, or a mixture.

The level has a normal prior whose mean the log shows (:class:`~dsrm.preference.LevelPrior`). A taste is what the log
predicts plus a draw of a mixture of normals, plus, as far as the items are not known yet, normal noise. What a
session's answers say is normal, so that the posterior is a mixture of normals too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsrm.preference import Evidence, LevelPrior, Moments, level_prior, level_settings, predicted_from
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, parse_as, take_tensors

_MIN_VARIANCE = 0.01
_MAX_ROUNDS, _ENOUGH = 100, 1e-3
_SMALLEST = 1e-12


@dataclass(frozen=True)
class TastePrior:
    """What tastes are before a session, in log-odds: what the log predicts, and a mixture of normals about it.

    Attributes:
        slopes: ``float32 (c + 1, d)``, predicted taste; intercept first.
        size: Typical root mean square of the components of tastes, in log-odds.
        weights: ``float32 (k,)`` of the parts, sum 1.
        means: ``float32 (k, d)``, in units of ``size``.
        covariances: ``float32 (k, d, d)``, in units of its square.
    """

    slopes: FloatArray
    size: float
    weights: FloatArray
    means: FloatArray
    covariances: FloatArray

    @classmethod
    def fit(cls, slopes: FloatArray, size: float, tastes: FloatArray, parts: int, seed: int) -> TastePrior:
        """Fits the mixture to ``float32 (n, d)`` tastes in units of ``size``, by expectation maximisation."""
        mixture = _mixture(parts, seed).fit(tastes.astype(np.float64))
        arrays = (mixture.weights_, mixture.means_, mixture.covariances_)
        return cls(slopes, size, *(array.astype(np.float32) for array in arrays))

    def log_density(self, tastes: FloatArray) -> float:
        """Returns the mean log density of ``(n, d)`` tastes in units of ``size``."""
        from scipy.stats import multivariate_normal

        parts = zip(self.weights, self.means, self.covariances, strict=True)
        densities = [np.log(weight) + multivariate_normal(mean, cov).logpdf(tastes) for weight, mean, cov in parts]
        return float(np.logaddexp.reduce(densities, axis=0).mean())


def _mixture(parts: int, seed: int) -> Any:
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(parts, reg_covar=_MIN_VARIANCE, max_iter=_MAX_ROUNDS, tol=_ENOUGH, random_state=seed)


class MixturePreference:
    """The posterior under a fitted prior: ``gaussian`` where it has one part, else ``mixture``.

    Args:
        level: The prior of levels.
        taste: The prior of tastes.
    """

    def __init__(self, level: LevelPrior, taste: TastePrior) -> None:
        self.level, self.taste = level, taste
        self.kind = "gaussian" if len(taste.weights) == 1 else "mixture"
        self._slopes, self._log_weights, self._means, self._covariances = (
            torch.from_numpy(array) for array in (taste.slopes, np.log(taste.weights), taste.means, taste.covariances)
        )
        self._change: tuple[tuple[float, float], Tensor] | None = None

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        normal = self.normal(evidence)
        return Moments(evidence.scales * normal.means, evidence.scales * normal.deviations)

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        weights, means, covariances = self.parts(evidence)
        generator = torch.Generator().manual_seed(seed)
        parts = torch.multinomial(weights, count, replacement=True, generator=generator)
        rows = torch.arange(len(weights))[:, None]
        factors = torch.linalg.cholesky(covariances)[rows, parts]
        noise = torch.randn((*parts.shape, means.shape[2]), generator=generator)
        drawn = means[rows, parts] + (factors @ noise[..., None])[..., 0]
        samples: Tensor = drawn.transpose(0, 1) * evidence.scales
        return samples

    def normal(self, evidence: Evidence) -> Evidence:
        """Returns evidence that holds mean and covariance of this posterior in the place of the closed form's."""
        if self.kind == "gaussian":
            change = self._prior_change(evidence)
            covariances = torch.linalg.solve(
                torch.eye(len(change)) + evidence.covariances @ change, evidence.covariances
            )
            means = evidence.means + _times(covariances, self._pull(evidence, change))
            return Evidence(evidence.contexts, means, (covariances + covariances.mT) / 2, evidence.scales)
        weights, means, covariances = self.parts(evidence)
        mean = (weights[..., None] * means).sum(1)
        around = means - mean[:, None]
        spread = covariances + around[..., :, None] * around[..., None, :]
        return Evidence(evidence.contexts, mean, (weights[..., None, None] * spread).sum(1), evidence.scales)

    def means(self, evidence: Evidence, steps: int) -> Tensor:
        """Returns the means of :meth:`normal` where there is one part, ``float32 (B, d + 1)``, by conjugate gradients.

        No matrix is inverted for a session: a step multiplies each covariance once. In the worlds of this library two
        steps leave less than .005 standard deviations.
        """
        # The means move by C y where (I + M C) y is the pull: symmetric in the scalar product of the covariance C.
        change = self._prior_change(evidence)
        residual = self._pull(evidence, change)
        direction, carried = residual, _times(evidence.covariances, residual)
        along, size = carried, (residual * carried).sum(1, keepdim=True)
        means = evidence.means
        for step in range(steps):
            applied = torch.addmm(direction, along, change)
            moved = _times(evidence.covariances, applied)
            length = size / (direction * moved).sum(1, keepdim=True).clamp_min_(_SMALLEST)
            means = torch.addcmul(means, length, along)
            if step + 1 < steps:
                residual, carried = residual - length * applied, carried - length * moved
                before, size = size, (residual * carried).sum(1, keepdim=True)
                ratio = size / before.clamp_min(_SMALLEST)
                direction, along = torch.addcmul(residual, ratio, direction), torch.addcmul(carried, ratio, along)
        return means

    def _prior_change(self, evidence: Evidence) -> Tensor:
        """Returns the precision of the one part's prior minus that of the closed form's, ``(d + 1, d + 1)``."""
        scales = (float(evidence.scales[0]), float(evidence.scales[1]))
        if self._change is None or self._change[0] != scales:
            precision = torch.linalg.inv(self._prior_covariances(*scales)[0])
            self._change = scales, precision - torch.eye(len(precision))
        return self._change[1]

    def _pull(self, evidence: Evidence, change: Tensor) -> Tensor:
        """Returns what, times the posterior's covariance, moves the closed form's means, ``(B, d + 1)``."""
        prior_means = self._prior_means(evidence)[:, 0]
        return prior_means + (prior_means - evidence.means) @ change

    def parts(self, evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the posterior's weights ``(B, k)``, means ``(B, k, n)`` and covariances ``(B, k, n, n)``.

        They are in units of the evidence's scales.
        """
        prior_means = self._prior_means(evidence)
        prior_covariances = self._prior_covariances(float(evidence.scales[0]), float(evidence.scales[1]))
        prior_precisions = torch.linalg.inv(prior_covariances)
        # What the answers say alone: the closed form without its prior.
        inverses = torch.linalg.inv(evidence.covariances)
        shifts = (inverses @ evidence.means[..., None])[..., 0]
        precisions = (inverses - torch.eye(inverses.shape[1]))[:, None] + prior_precisions
        covariances = torch.linalg.inv(precisions)
        prior_pulls = (prior_precisions @ prior_means[..., None])[..., 0]
        pulls = prior_pulls + shifts[:, None]
        means = (covariances @ pulls[..., None])[..., 0]
        fit = (means * pulls).sum(-1) - (prior_means * prior_pulls).sum(-1)
        fit = fit - torch.logdet(precisions) - torch.logdet(prior_covariances)
        return torch.softmax(self._log_weights + fit / 2, dim=1), means, (covariances + covariances.mT) / 2

    def _prior_means(self, evidence: Evidence) -> Tensor:
        """Returns the means before the session, ``(B, k, n)``, in units of the scales."""
        scale = float(evidence.scales[1])
        levels = self.level.means(evidence)[:, None].expand(-1, len(self._means))
        predicted = predicted_from(evidence.contexts, self._slopes) / scale
        tastes = predicted[:, None] + self._share(scale) ** 0.5 * self._means
        return torch.cat([levels[..., None], tastes], dim=2)

    def _prior_covariances(self, level: float, taste: float) -> Tensor:
        """Returns the covariances before the session, ``(k, n, n)``, in units of the scales of levels and tastes."""
        k, d = self._means.shape
        share = self._share(taste)
        covariances = torch.zeros(k, d + 1, d + 1)
        covariances[:, 0, 0] = self.level.deviation(level) ** 2
        covariances[:, 1:, 1:] = share * self._covariances + (1.0 - share) * torch.eye(d)
        return covariances

    def _share(self, scale: float) -> float:
        # As scales are wider than tastes the rest is what the log misjudges about the items, for everybody.
        return min(1.0, (self.taste.size / scale) ** 2)

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return {"size": self.taste.size, **level_settings(self.level)}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        names = ("slopes", "weights", "means", "covariances")
        return {name: getattr(self.taste, name) for name in names} | {"level": self.level.coefficients}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> MixturePreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        take_tensors(tensors, {"means": (None, None)})
        k, d = tensors["means"].shape
        shapes: dict[str, tuple[int | None, ...]] = {"slopes": (None, d), "weights": (k,), "covariances": (k, d, d)}
        take_tensors(tensors, shapes)
        arrays = (tensors[name] for name in ("weights", "means", "covariances"))
        taste = TastePrior(tensors["slopes"], parse_as(float, settings["size"]), *arrays)
        return cls(level_prior(tensors, settings), taste)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.bmm(matrices, vectors[..., None])[..., 0]
