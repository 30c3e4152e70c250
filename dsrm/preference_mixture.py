"""Preference models in closed form with a fitted prior that depends on the log: a normal distribution, or a mixture.

In units of the prior's scales a clean preference given the log context ``c`` is ``sum_k p_k N(W_k [1, c], S_k)``. What
a session's answers say is normal, so that the posterior is a mixture of normals too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrm.model import Standardiser
from dsrm.preference import Evidence, Moments
from kuaifair_env.files import Tensors, take_tensors

_CLIP = 5.0
_RIDGE, _MIN_VARIANCE = 50.0, 0.01
_MAX_ROUNDS, _ENOUGH = 25, 1e-2

Array = NDArray[np.float64]


@dataclass(frozen=True)
class FittedMixture:
    """A mixture of ``k`` normal distributions whose means are linear in standardised contexts.

    Attributes:
        weights: ``float64 (k,)``, sum 1.
        coefficients: ``float64 (k, c + 1, d + 1)``, ``W_k``.
        covariances: ``float64 (k, d + 1, d + 1)``, ``S_k``.
        context: How contexts are standardised.
    """

    weights: Array
    coefficients: Array
    covariances: Array
    context: Standardiser

    @classmethod
    def fit(cls, contexts: NDArray[np.float32], preferences: NDArray[np.float32], k: int, seed: int) -> FittedMixture:
        """Fits a mixture by expectation maximisation.

        Args:
            contexts: ``float32 (n, c)``.
            preferences: ``float32 (n, d + 1)``, in units of the prior's standard deviations.
            k: Number of parts; 1 is a linear regression.
            seed: Seed of the parts that it begins with, which are clusters of what a linear regression leaves.
        """
        from sklearn.cluster import KMeans

        context = Standardiser.fit(contexts)
        design = _design(contexts, context)
        targets = np.asarray(preferences, np.float64)
        mixture = cls._of_memberships(design, targets, np.ones((len(targets), 1)), context)
        if k == 1:
            return mixture
        left = targets - design @ mixture.coefficients[0]
        memberships = np.eye(k)[KMeans(k, n_init=1, random_state=seed).fit_predict(left)]
        before = -np.inf
        for _ in range(_MAX_ROUNDS):
            mixture = cls._of_memberships(design, targets, memberships, context)
            densities = mixture._log_densities(design, targets)
            total = np.logaddexp.reduce(densities, axis=1)
            memberships = np.exp(densities - total[:, None])
            if total.mean() - before < _ENOUGH:
                break
            before = total.mean()
        return mixture

    @classmethod
    def _of_memberships(cls, design: Array, targets: Array, memberships: Array, context: Standardiser) -> FittedMixture:
        coefficients, covariances = [], []
        ridge = _RIDGE * np.eye(design.shape[1])
        for share in memberships.T:
            weighted = design * share[:, None]
            solved = np.linalg.solve(weighted.T @ design + ridge, weighted.T @ targets)
            left = targets - design @ solved
            covariance = (left * share[:, None]).T @ left / share.sum()
            coefficients.append(solved)
            covariances.append(covariance + _MIN_VARIANCE * np.eye(len(covariance)))
        return cls(memberships.mean(axis=0), np.stack(coefficients), np.stack(covariances), context)

    def _log_densities(self, design: Array, targets: Array) -> Array:
        """Returns ``(n, k)``, log of weight times density."""
        columns = []
        for weight, solved, covariance in zip(self.weights, self.coefficients, self.covariances, strict=True):
            factor = np.linalg.cholesky(covariance)
            standard = np.linalg.solve(factor, (targets - design @ solved).T)
            columns.append(np.log(weight) - (standard**2).sum(axis=0) / 2 - np.log(factor.diagonal()).sum())
        return np.stack(columns, axis=1)

    def log_likelihood(self, contexts: NDArray[np.float32], preferences: NDArray[np.float32]) -> float:
        """Returns the mean log density of preferences, up to a constant that depends on their size alone."""
        densities = self._log_densities(_design(contexts, self.context), np.asarray(preferences, np.float64))
        return float(np.logaddexp.reduce(densities, axis=1).mean())


class MixturePreference:
    """The posterior under a fitted mixture; with one part ``gaussian``, the fitted normal prior.

    Args:
        fitted: The prior.
    """

    def __init__(self, fitted: FittedMixture) -> None:
        self.fitted = fitted
        self.kind = "gaussian" if len(fitted.weights) == 1 else "mixture"
        self._log_weights = torch.from_numpy(np.log(fitted.weights)).float()
        self._coefficients = torch.from_numpy(fitted.coefficients).float()
        inverses = np.linalg.inv(fitted.covariances)
        self._precisions = torch.from_numpy(inverses).float()
        self._log_determinants = torch.from_numpy(np.linalg.slogdet(fitted.covariances)[1]).float()

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
        """Returns the posterior's weights ``(B, k)``, means ``(B, k, n)`` and covariances ``(B, k, n, n)``."""
        design = torch.from_numpy(_design(evidence.contexts.numpy(), self.fitted.context)).float()
        prior_means = torch.einsum("bc,kcn->bkn", design, self._coefficients)
        # What the answers say alone: the closed form without its prior.
        inverses = torch.linalg.inv(evidence.covariances)
        shifts = (inverses @ evidence.means[..., None])[..., 0]
        likelihood = inverses - torch.eye(inverses.shape[1])
        precisions = likelihood[:, None] + self._precisions
        covariances = torch.linalg.inv(precisions)
        pulls = (self._precisions @ prior_means[..., None])[..., 0] + shifts[:, None]
        means = (covariances @ pulls[..., None])[..., 0]
        prior_fit = (prior_means * (self._precisions @ prior_means[..., None])[..., 0]).sum(-1)
        fit = (means * pulls).sum(-1) - prior_fit - torch.logdet(precisions) - self._log_determinants
        return torch.softmax(self._log_weights + fit / 2, dim=1), means, (covariances + covariances.mT) / 2

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        return {}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.preference.PreferenceModel`."""
        fitted = self.fitted
        arrays = {"weights": fitted.weights, "coefficients": fitted.coefficients, "covariances": fitted.covariances}
        return arrays | {"context.mean": fitted.context.mean, "context.deviation": fitted.context.deviation}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> MixturePreference:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        take_tensors(tensors, {"weights": (None,), "coefficients": (None, None, None)})
        parts, inputs, outputs = tensors["coefficients"].shape
        shapes = {"weights": (parts,), "covariances": (parts, outputs, outputs)}
        shapes |= dict.fromkeys(("context.mean", "context.deviation"), (inputs - 1,))
        take_tensors(tensors, shapes)
        context = Standardiser(tensors["context.mean"], tensors["context.deviation"])
        return cls(FittedMixture(tensors["weights"], tensors["coefficients"], tensors["covariances"], context))


def _design(contexts: NDArray[np.float32], context: Standardiser) -> Array:
    standard = np.clip(context.transform(contexts), -_CLIP, _CLIP)
    return np.concatenate([np.ones((len(standard), 1)), standard], axis=1)
