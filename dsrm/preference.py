"""What an agent believes about users' clean preferences, given the log before a session and the session's answers.

A user's clean preference ``s*`` is ``(b_u, w_u)``: by how much the user clicks more than predicted, and on items with
such embeddings. A :class:`PreferenceModel` is a distribution of it given an :class:`Evidence`, which holds all that is
known: the observed state ``s~`` of the paper, refined to clicked, skipped and shown items, and what the session's own
answers say. Its mean is the purified state ``s^``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsrm.purifier import STATISTICS, ConditionBuilder
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.files import Tensors, parse_as, take_tensors
from kuaifair_env.pooling import mean_embeddings
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_RIDGE = 100.0
_SHOWN_COUNT = -len(STATISTICS) - 1
_TINY = 1e-6
_OF_LEVEL = ("explained", "unexplained", "widening")
_CLASSES: dict[str, tuple[str, str]] = {
    "closed-form": ("dsrm.preference", "ClosedForm"),
    "gaussian": ("dsrm.preference_mixture", "MixturePreference"),
    "mixture": ("dsrm.preference_mixture", "MixturePreference"),
    "regression": ("dsrm.preference_networks", "RegressionPreference"),
    "diffusion": ("dsrm.preference_networks", "DiffusionPreference"),
}


def context_size(dimension: int) -> int:
    """Returns the size of a log context, ``3 d + 10``, for embeddings of size ``d``."""
    return 3 * dimension + 3 + len(STATISTICS)


class LogContexts:
    """Summarises what the log shows of users before their sessions.

    A summary holds the mean unit embeddings of the clicked, the skipped and the shown items, how many there were of
    each (``log(1 + n)``), and the popularity statistics of :data:`dsrm.purifier.STATISTICS`.

    Args:
        world: Its tables of items are read; both worlds of a pair give the same summaries.
    """

    def __init__(self, world: World) -> None:
        embeddings = world.embeddings if world.item_term is None else world.embeddings[:, :-1]
        self._units = unit_rows(embeddings)
        self._builder = ConditionBuilder.of_world(world)

    @property
    def size(self) -> int:
        """Numbers in a summary."""
        return context_size(self._units.shape[1])

    def summarise(self, window: HistoryWindow) -> FloatArray:
        """Returns ``float32 (B, 3 d + 10)`` for the log windows of ``B`` users."""
        clicked = window.clicks.astype(np.float32)
        shown = (window.items >= 0).astype(np.float32)
        sorts = (clicked, shown - clicked, shown)
        means = [mean_embeddings(self._units, window.items, sort) for sort in sorts]
        counts = np.log1p(np.stack([sort.sum(axis=1) for sort in sorts], axis=1))
        return np.concatenate([*means, counts, self._builder.statistics(window)], axis=1)


@dataclass(frozen=True)
class Evidence:
    """All that is known about the users of ``B`` sessions.

    What the session's answers say is held as the posterior that they give under a normal prior with mean zero, in units
    of the prior's standard deviations; entries are ``b_u`` and then ``w_u``.

    Attributes:
        contexts: ``float32 (B, 3 d + 10)``, see :class:`LogContexts`.
        means: ``float32 (B, d + 1)``, mode of that posterior.
        covariances: ``float32 (B, d + 1, d + 1)``, its covariance.
        scales: ``float32 (d + 1,)``, standard deviations of the prior, in log-odds.
    """

    contexts: Tensor
    means: Tensor
    covariances: Tensor
    scales: Tensor

    @property
    def deviations(self) -> Tensor:
        """``float32 (B, d + 1)``, standard deviations of that posterior, in units of the prior's."""
        return self.covariances.diagonal(dim1=1, dim2=2).sqrt()

    def take(self, rows: Tensor) -> Evidence:
        """Returns the evidence of some of the sessions."""
        return Evidence(self.contexts[rows], self.means[rows], self.covariances[rows], self.scales)


@dataclass(frozen=True)
class LevelPrior:
    """A normal prior of the level ``b_u`` whose mean is linear in the log context, which shows how much a user clicks.

    Attributes:
        coefficients: ``float32 (c + 1,)``, intercept first.
        explained: Standard deviation of the means, in log-odds: by as much the context narrows a wider scale.
        unexplained: Least standard deviation of levels given the context, in log-odds.
        widening: By how much posteriors of levels are wider than they come out, as a share that grows with what answers
            say: evidence is summed up at the mode (Laplace), as if offsets of single items were known there.
    """

    coefficients: FloatArray
    explained: float
    unexplained: float
    widening: float = 0.0

    @classmethod
    def fit(cls, contexts: FloatArray, levels: FloatArray, misjudged: float = 0.0) -> LevelPrior:
        """Fits a ridge regression of levels ``(n,)`` in log-odds on contexts ``(n, c)``.

        Args:
            contexts: Of users.
            levels: Of the same users in the log's model.
            misjudged: Standard deviation of what the log misjudges of single users, in log-odds.
        """
        coefficients = ridge_coefficients(contexts, levels).astype(np.float32)
        means = contexts @ coefficients[1:] + coefficients[0]
        return cls(coefficients, float(means.std()), float(np.hypot((levels - means).std(), misjudged)))

    def deviation(self, scale: float) -> float:
        """Returns the standard deviation in units of a scale of levels."""
        variance = max(scale**2 - self.explained**2, self.unexplained**2)
        return float(variance**0.5 / max(scale, _TINY))

    def widths(self, evidence: Evidence) -> FloatArray:
        """Returns by what standard deviations of levels are multiplied, ``float32 (B,)``: 1 before any answer."""
        said: FloatArray = 1.0 - np.sqrt(evidence.covariances.numpy()[:, 0, 0])
        return 1.0 + np.float32(self.widening) * said

    def widened(self, moments: Moments, evidence: Evidence) -> Moments:
        """Returns moments with wider levels."""
        moments.deviations.numpy()[:, 0] *= self.widths(evidence)
        return moments

    def widened_draws(self, draws: Tensor, means: Tensor, evidence: Evidence) -> Tensor:
        """Returns draws ``(..., B, d + 1)`` whose levels are further from their means ``(B,)``."""
        draws[..., 0] = means + torch.from_numpy(self.widths(evidence)) * (draws[..., 0] - means)
        return draws


def ridge_coefficients(contexts: FloatArray, targets: FloatArray, penalty: float = _RIDGE) -> NDArray[np.float64]:
    """Returns intercept and slopes of a ridge regression on standardised contexts, ``(c + 1,)`` or ``(c + 1, n)``."""
    from sklearn.linear_model import Ridge

    mean, deviation = contexts.mean(axis=0, dtype=np.float64), contexts.std(axis=0, dtype=np.float64)
    deviation = np.where(deviation > _TINY, deviation, 1.0)
    ridge = Ridge(penalty).fit((contexts - mean) / deviation, targets)
    slopes = (ridge.coef_ / deviation).T
    return np.concatenate([[ridge.intercept_ - mean @ slopes], slopes])


def predicted_from(contexts: FloatArray, coefficients: FloatArray) -> FloatArray:
    """Returns what a regression on log contexts predicts, ``float32 (B, n)``: zero for users without a log.

    Args:
        contexts: ``float32 (B, c)``, see :class:`LogContexts`.
        coefficients: ``float32 (c + 1, n)``, intercept first.
    """
    predicted: FloatArray = contexts @ coefficients[1:]
    predicted += coefficients[0]
    predicted *= contexts[:, _SHOWN_COUNT, None] > 0
    return predicted


def level_settings(level: LevelPrior) -> dict[str, float]:
    """Returns what a file holds of a prior of levels besides its coefficients."""
    return {name: getattr(level, name) for name in _OF_LEVEL}


def level_prior(tensors: Tensors, settings: Mapping[str, Any]) -> LevelPrior:
    """Makes a prior of levels from the tensor ``level`` and :func:`level_settings`."""
    take_tensors(tensors, {"level": (None,)})
    return LevelPrior(tensors["level"], *(parse_as(float, settings[name]) for name in _OF_LEVEL))


class Moments(NamedTuple):
    """Means and standard deviations of clean preferences, both ``float32 (B, d + 1)`` in log-odds: ``b_u``, ``w_u``."""

    means: Tensor
    deviations: Tensor


class PreferenceModel(Protocol):
    """A distribution of users' clean preferences given evidence.

    Attributes:
        kind: Name of the sort of model, under which files hold it.
    """

    kind: str

    def moments(self, evidence: Evidence) -> Moments:
        """Returns mean and spread of the clean preference of each session's user."""
        ...

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """Returns draws of the clean preferences, ``float32 (count, B, d + 1)`` in log-odds, the same for a seed."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns what a file holds of the model besides arrays, JSON-able."""
        ...

    def tensors(self) -> Tensors:
        """Returns its arrays by name."""
        ...


class ClosedForm:
    """The posterior under a normal prior with mean zero, the same for everybody: the session's answers alone."""

    kind = "closed-form"

    def moments(self, evidence: Evidence) -> Moments:
        """See :class:`PreferenceModel`."""
        return Moments(evidence.scales * evidence.means, evidence.scales * evidence.deviations)

    def samples(self, evidence: Evidence, count: int, seed: int) -> Tensor:
        """See :class:`PreferenceModel`."""
        return normal_samples(evidence.means, evidence.covariances, count, seed) * evidence.scales

    def settings(self) -> dict[str, Any]:
        """See :class:`PreferenceModel`."""
        return {}

    def tensors(self) -> Tensors:
        """See :class:`PreferenceModel`."""
        return {}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> ClosedForm:
        """Makes the model from what :meth:`tensors` and :meth:`settings` returned."""
        return cls()


def restore_preference(kind: str, tensors: Tensors, settings: Mapping[str, Any]) -> PreferenceModel:
    """Makes a model of some kind from what its ``tensors`` and ``settings`` returned.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in _CLASSES:
        raise ValueError(f"a preference model is one of {', '.join(_CLASSES)}, not {kind!r}")
    module, name = _CLASSES[kind]
    model: PreferenceModel = getattr(import_module(module), name).restore(tensors, settings)
    return model


def normal_samples(means: Tensor, covariances: Tensor, count: int, seed: int) -> Tensor:
    """Returns ``(count, B, n)`` draws of normal distributions with means ``(B, n)`` and covariances ``(B, n, n)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, *means.shape), generator=generator)
    factors = torch.linalg.cholesky(covariances)
    return means + torch.einsum("bij,nbj->nbi", factors, noise)
