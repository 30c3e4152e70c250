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
_TINY, _SMALLEST = 1e-6, 1e-12


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
        # Contiguous as those of a file are, so that a model that is read again gives the same bits.
        return cls(np.ascontiguousarray(slopes), size, *(np.ascontiguousarray(array, np.float32) for array in arrays))

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
        self._log_weights, self._covariances = (
            torch.from_numpy(array) for array in (np.log(taste.weights), taste.covariances)
        )
        self._one_part: _OnePart | None = None

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        normal = self.normal(evidence)
        moments = Moments(evidence.scales * normal.means, evidence.scales * normal.deviations)
        return self.level.widened(moments, evidence)

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
        centres = evidence.scales[0] * (weights * means[..., 0]).sum(dim=1)
        return self.level.widened_draws(samples, centres, evidence)

    def normal(self, evidence: Evidence) -> Evidence:
        """Returns evidence that holds mean and covariance of this posterior in the place of the closed form's."""
        if self.kind == "gaussian":
            prior = self._prior(evidence)
            change = torch.from_numpy(prior.change)
            covariances = torch.linalg.solve(
                torch.eye(len(change)) + evidence.covariances @ change, evidence.covariances
            )
            means = evidence.means + (covariances @ torch.from_numpy(prior.pull(evidence))[..., None])[..., 0]
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
        # Arrays, since at these sizes an operation of torch costs more to call than to carry out.
        # The means move by C y where (I + M C) y is the pull: symmetric in the scalar product of the covariance C.
        prior = self._prior(evidence)
        covariances, means = evidence.covariances.numpy(), evidence.means.numpy()
        residual = direction = prior.pull(evidence)
        carried = along = _times(covariances, residual)
        size = _products(residual, carried)
        for step in range(steps):
            applied = along @ prior.change
            applied += direction
            moved = _times(covariances, applied)
            length = size / _products(direction, moved)
            means = means + length * along
            if step + 1 < steps:
                residual, carried = residual - length * applied, carried - length * moved
                before, size = size, _products(residual, carried)
                ratio = size / before
                direction, along = residual + ratio * direction, carried + ratio * along
        return torch.from_numpy(means)

    def _prior(self, evidence: Evidence) -> _OnePart:
        """Returns what does not depend on the session where there is one part."""
        level, taste = evidence.scales[:2].tolist()
        if self._one_part is None or self._one_part.scales != (level, taste):
            precision = np.linalg.inv(self._prior_covariances(level, taste)[0].numpy())
            coefficients, means = self._prior_mean_terms(level, taste)
            change = precision - np.eye(len(precision), dtype=np.float32)
            self._one_part = _OnePart((level, taste), change, coefficients @ precision, means[0] @ precision)
        return self._one_part

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
        coefficients, means = self._prior_mean_terms(float(evidence.scales[0]), float(evidence.scales[1]))
        return torch.from_numpy(predicted_from(evidence.contexts.numpy(), coefficients)[:, None] + means)

    def _prior_mean_terms(self, level: float, taste: float) -> tuple[FloatArray, FloatArray]:
        """Returns what the means before a session are made of, in units of the scales of levels and tastes.

        They are coefficients ``(c + 1, n)`` of the log context, and means ``(k, n)`` about what these predict.
        """
        of_levels = self.level.coefficients[:, None] / max(level, _TINY)
        of_parts = self._share(taste) ** 0.5 * self.taste.means
        coefficients = np.concatenate([of_levels, self.taste.slopes / taste], axis=1)
        return coefficients, np.pad(of_parts, ((0, 0), (1, 0)))

    def _prior_covariances(self, level: float, taste: float) -> Tensor:
        """Returns the covariances before the session, ``(k, n, n)``, in units of the scales of levels and tastes."""
        k, d = self.taste.means.shape
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


@dataclass(frozen=True)
class _OnePart:
    """What a prior of one part changes in the closed form's posterior, under scales of levels and tastes.

    Attributes:
        scales: Of levels and tastes, in log-odds.
        change: ``float32 (d + 1, d + 1)``, its precision minus that of the closed form's prior.
        pull_of_log: ``float32 (c + 1, d + 1)``, its precision times what the log context predicts; intercept first.
        pull_of_all: ``float32 (d + 1,)``, its precision times its means where the log says nothing.
    """

    scales: tuple[float, float]
    change: FloatArray
    pull_of_log: FloatArray
    pull_of_all: FloatArray

    def pull(self, evidence: Evidence) -> FloatArray:
        """Returns what, times the posterior's covariance, moves the closed form's means, ``float32 (B, d + 1)``."""
        pull = predicted_from(evidence.contexts.numpy(), self.pull_of_log)
        pull += self.pull_of_all
        pull -= evidence.means.numpy() @ self.change
        return pull


def _times(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """Returns products ``(B, n)`` of symmetric matrices ``(B, n, n)`` and vectors ``(B, n)``."""
    products: FloatArray = (vectors[:, None] @ matrices)[:, 0]
    return products


def _products(rows: FloatArray, others: FloatArray) -> FloatArray:
    """Returns scalar products of rows, ``(B, 1)``, at least a tiny number, so that they can be divided by."""
    products: FloatArray = np.maximum((rows[:, None] @ others[..., None])[..., 0], _SMALLEST)
    return products
