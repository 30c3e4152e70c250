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

from dsrm.preference import Evidence, LevelPrior, Moments, level_prior, level_settings
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, parse_as, take_tensors

_MIN_VARIANCE = 0.01
_MAX_ROUNDS, _ENOUGH = 100, 1e-3


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

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        weights, means, covariances = self.parts(evidence)
        mean = (weights[..., None] * means).sum(1)
        variances = covariances.diagonal(dim1=2, dim2=3) + (means - mean[:, None]) ** 2
        return Moments(evidence.scales * mean, evidence.scales * (weights[..., None] * variances).sum(1).sqrt())

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

    def parts(self, evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the posterior's weights ``(B, k)``, means ``(B, k, n)`` and covariances ``(B, k, n, n)``.

        They are in units of the evidence's scales.
        """
        prior_means, prior_covariances = self._prior(evidence)
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

    def _prior(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Returns means ``(B, k, n)`` and covariances ``(k, n, n)`` before the session, in units of the scales."""
        k, d = self._means.shape
        scale = evidence.scales[1]
        # As scales are wider than tastes the rest is what the log misjudges about the items, for everybody.
        share = min(1.0, (self.taste.size / float(scale)) ** 2)
        predicted = evidence.contexts @ self._slopes[1:] + self._slopes[0]
        level, deviation = self.level.of(evidence)
        means = torch.empty(len(predicted), k, d + 1)
        means[..., 0] = level[:, None]
        means[..., 1:] = (predicted / scale)[:, None] + share**0.5 * self._means
        covariances = torch.zeros(k, d + 1, d + 1)
        covariances[:, 0, 0] = deviation**2
        covariances[:, 1:, 1:] = share * self._covariances + (1.0 - share) * torch.eye(d)
        return means, covariances

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
