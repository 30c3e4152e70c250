"""A student of the diffusion posterior: mean and spread in one evaluation of a small network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsrm.model import DistillationConfig, Standardiser, perceptron_outputs
from dsrm.preference import Evidence, Moments
from dsrm.preference_mixture import MixturePreference
from dsrm.preference_sessions import KnownPreferences, joined_features
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, take_tensors, with_prefix, without_prefix
from kuaifair_env.response.training import Trainer, cosine_decay, load_network, network_tensors

_MAX_SHIFT, _MAX_LOG_RATIO = 5.0, 2.0
_GRADIENT_STEPS = 2
_VALIDATION_SHARE = 10
_BATCHES_PER_SPREAD, _SPREAD_SHARE = 6, 4
_TINY = 1e-6
_PREFIX, _OF_CONDITION = "student.", ("mean", "deviation")

STUDENT = DistillationConfig(conditions=24_000, width=192, steps=3_000, batch_size=512, learning_rate=1e-3)
"""How a student is trained. The teacher is asked for its spread in a sixth of the conditions."""


class Teacher(Protocol):
    """What a student learns from.

    Attributes:
        prior: The fitted normal that it starts from.
    """

    prior: MixturePreference

    def own_means(self, evidence: Evidence) -> Tensor:
        """Returns means, ``float32 (B, d + 1)`` in log-odds."""
        ...

    def own_moments(self, evidence: Evidence) -> Moments:
        """Returns means and spread in log-odds."""
        ...


class Student:
    """A small network that gives mean and spread of a diffusion posterior in one evaluation.

    It says by how much means differ from the fitted normal's, and deviations from the closed form's, entry by entry, in
    the closed form's standard deviations. So it inverts no matrix.

    Args:
        network: ``(B, 2 d + 4) -> (B, 2 (d + 1))``: shifts of the means, and logarithms of ratios of deviations.
        condition: How features are standardised.
    """

    def __init__(self, network: nn.Sequential, condition: Standardiser) -> None:
        self._network = network.eval()
        self._condition = condition
        layers = [layer for layer in network if isinstance(layer, nn.Linear)]
        arrays = ((layer.weight.detach().numpy().T.copy(), layer.bias.detach().numpy().copy()) for layer in layers)
        self._weights = list(chain.from_iterable(arrays))
        self._bounds = np.repeat(np.array([_MAX_SHIFT, _MAX_LOG_RATIO], np.float32), layers[-1].out_features // 2)

    def moments(self, prior: MixturePreference, evidence: Evidence) -> Moments:
        """Returns mean and spread in log-odds.

        Args:
            prior: The teacher's.
            evidence: Of ``B`` sessions.
        """
        start = _start(prior, evidence)
        features = self._condition.clipped(joined_features(start, evidence.scales))
        outputs = perceptron_outputs(self._weights, features)
        np.minimum(np.maximum(outputs, -self._bounds, out=outputs), self._bounds, out=outputs)
        scales, size = evidence.scales.numpy(), len(evidence.scales)
        units = start.deviations.numpy() * scales
        means, deviations = outputs[:, :size], outputs[:, size:]
        means *= units
        means += start.means.numpy() * scales
        np.exp(deviations, out=deviations)
        deviations *= units
        return Moments(torch.from_numpy(means), torch.from_numpy(deviations))

    def tensors(self) -> Tensors:
        """Returns weights and standardisation by name."""
        condition = {name: getattr(self._condition, name) for name in _OF_CONDITION}
        return with_prefix(network_tensors(self._network) | condition, _PREFIX)

    @classmethod
    def restore(cls, tensors: Tensors) -> Student | None:
        """Returns the student whose :meth:`tensors` are among the given ones, None where there are none of them."""
        own = without_prefix(tensors, _PREFIX)
        if not own:
            return None
        take_tensors(own, {"network.0.weight": (None, None), "network.4.bias": (None,)})
        width, inputs = own["network.0.weight"].shape
        take_tensors(own, dict.fromkeys(_OF_CONDITION, (inputs,)))
        condition = Standardiser(*(own.pop(name) for name in _OF_CONDITION))
        network = student_network(inputs, width, len(own["network.4.bias"]))
        load_network(network, own)
        return cls(network, condition)


def _start(prior: MixturePreference, evidence: Evidence) -> Moments:
    """Returns the fitted normal's means and the closed form's deviations, in units of the scales."""
    return Moments(prior.means(evidence, _GRADIENT_STEPS), evidence.deviations)


def student_network(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Returns a network with two hidden layers that begins as the fitted normal."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)


@dataclass(frozen=True)
class DistillationError:
    """How far a student is from its teacher, on sessions that it was not trained on.

    Attributes:
        means: Root mean square difference of the means, in the teacher's standard deviations.
        normal: The same of the fitted normal that it starts from.
        deviations: Median of the ratio of standard deviations, student to teacher.
    """

    means: float
    normal: float
    deviations: float


@dataclass(frozen=True)
class _Lessons:
    """What a teacher says: of features ``(n, c)`` shifts ``(n, d + 1)`` and ratios of variances, NaN if not asked."""

    features: FloatArray
    shifts: Tensor
    variances: Tensor


def distil_preference(
    teacher: Teacher,
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
    lessons = _asked(teacher, sessions, progress)
    condition = Standardiser.fit(lessons.features)
    features = torch.from_numpy(condition.clipped(lessons.features))
    size = lessons.shifts.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = student_network(features.shape[1], config.width, 2 * size)
    known = len(features) - len(features) // _VALIDATION_SHARE
    _train(network, features[:known], lessons, config, seed, progress)
    network.eval()
    shifts, variances = lessons.shifts[known:], lessons.variances[known:]
    with torch.inference_mode():
        moved, log_ratios = network(features[known:]).chunk(2, dim=1)
        deviations = torch.where(variances.isfinite(), variances.sqrt(), log_ratios.exp())
        errors = [float((miss / deviations).square().mean().sqrt()) for miss in (moved - shifts, shifts)]
        ratio = float((log_ratios.exp() / variances.sqrt()).nanmedian())
    return Student(network, condition), DistillationError(*(round(number, 4) for number in (*errors, ratio)))


def _asked(teacher: Teacher, sessions: Sequence[KnownPreferences], progress: bool) -> _Lessons:
    from tqdm import tqdm

    features, shifts, variances = [], [], []
    for number, batch in enumerate(tqdm(sessions, "ask the teacher", disable=not progress)):
        evidence = batch.evidence
        start = _start(teacher.prior, evidence)
        deviations = evidence.scales * start.deviations
        features.append(joined_features(start, evidence.scales))
        shifts.append((teacher.own_means(evidence) - evidence.scales * start.means) / deviations)
        # Draws cost as much as a hundred means.
        if (number + 1 - len(sessions)) % _BATCHES_PER_SPREAD == 0:
            variances.append((teacher.own_moments(evidence).deviations / deviations) ** 2)
        else:
            variances.append(torch.full_like(deviations, torch.nan))
    return _Lessons(np.concatenate(features), torch.cat(shifts), torch.cat(variances))


def _train(
    network: nn.Sequential, features: Tensor, lessons: _Lessons, config: DistillationConfig, seed: int, progress: bool
) -> None:
    from tqdm import tqdm

    known = len(features)
    shifts, variances = lessons.shifts[:known], lessons.variances[:known]
    spread_rows = torch.nonzero(variances[:, 0].isfinite())[:, 0]
    generator = torch.Generator().manual_seed(seed)
    unit = shifts.square().mean().sqrt().clamp_min(_TINY)

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in tqdm(range(config.steps), "distil", disable=not progress):
            rows = torch.randint(known, (config.batch_size,), generator=generator)
            of_spread = torch.randint(len(spread_rows), (config.batch_size // _SPREAD_SHARE,), generator=generator)
            yield rows, spread_rows[of_spread]

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, of_spread = batch
        moved = network(features[rows])[:, : shifts.shape[1]]
        log_ratios = network(features[of_spread])[:, shifts.shape[1] :]
        # A normal likelihood, whose optimum is the mean of noisy variances.
        spread_loss = (log_ratios + variances[of_spread] * (-2.0 * log_ratios).exp() / 2.0).mean()
        total: Tensor = (((moved - shifts[rows]) / unit) ** 2).mean() + spread_loss
        return total

    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    Trainer(network, optimizer, schedule=cosine_decay(config.steps)).fit(batches, loss, rounds=1)
