"""The reverse diffusion process (paper eq. 3): samplers of clean states.

Random samplers draw the noise of a row from a stream that the row's bytes and a seed determine, so that a sample does
not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from dsrm.denoiser import Denoiser, NoiseSchedule
from kuaifair_env import seeding
from kuaifair_env.data.schema import FloatArray

SamplerKind = Literal["ddpm", "ddim", "dpm++"]
Start = Literal["zero", "noise", "state"]

_HALF_STEP = 2.0**-54
_STREAMS_PER_SAMPLE = 10_000
_POSTERIOR_STEPS = 10


def row_keys(rows: FloatArray, seed: int) -> seeding.Keys:
    """Returns the key of each row's random streams, from a seed and the row's bytes.

    Args:
        rows: ``float32 (B, n)``.
        seed: Seed.

    Returns:
        ``uint64 (B,)``.
    """
    # Adding zero turns -0.0 into 0.0, which compares equal but has other bytes.
    words = (np.ascontiguousarray(rows, np.float32) + np.float32(0.0)).view(np.uint32).astype(np.uint64)
    places = np.arange(words.shape[1], dtype=np.uint64)
    folded = np.bitwise_xor.reduce(seeding.mix(words, places), axis=1)
    return seeding.derive(folded, 0) ^ seeding.stream_key(seed)


def row_normals(keys: seeding.Keys, size: int, stream: int = 0) -> FloatArray:
    """Returns standard normal draws.

    Args:
        keys: ``uint64 (B,)``, from :func:`row_keys`.
        size: Draws for each row.
        stream: Which of the row's streams to draw from.

    Returns:
        ``float32 (B, size)``.
    """
    streams = seeding.derive(keys, stream)
    uniforms = seeding.uniforms(streams[:, None], np.arange(size, dtype=np.uint64))
    return np.asarray(ndtri(uniforms + _HALF_STEP), np.float32)


@dataclass(frozen=True)
class SamplerConfig:
    """How a purified state is drawn.

    Attributes:
        kind: ``"ddpm"`` (eq. 3), ``"ddim"`` (Song, Meng and Ermon, ICLR 2021) or ``"dpm++"`` (second-order multistep
            DPM-Solver++, Lu et al., 2022).
        steps: Evaluations of the denoiser.
        eta: DDIM only: 0 is deterministic, 1 is ancestral sampling.
        start: ``"zero"`` (the mean of the noise; with ``eta`` 0 no random number is drawn), ``"noise"``, or
            ``"state"`` (the observed state, noised to the level at which the solver starts).
        level: Noise level at which the solver starts; None is the noisiest.
        guidance: ``w`` of classifier-free guidance, ``(1 + w) eps_c - w eps_null`` (Ho and Salimans, 2022).
        samples: Number of samples that are averaged.
        clip: Clean states are clipped to this many standard deviations.
        seed: Seed of the noise.
    """

    kind: SamplerKind = "ddim"
    steps: int = 5
    eta: float = 0.0
    start: Start = "zero"
    level: int | None = None
    guidance: float = 0.0
    samples: int = 1
    clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise ValueError(f"sampler must be one of {get_args(SamplerKind)}, got {self.kind!r}")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {get_args(Start)}, got {self.start!r}")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.steps < 1 or self.samples < 1 or self.clip <= 0 or self.guidance < 0:
            raise ValueError("steps and samples are at least 1, clip is positive, guidance at least 0")

    @classmethod
    def posterior(cls, levels: int, samples: int) -> SamplerConfig:
        """Returns how samples of the posterior of the clean state are drawn: ancestral steps from noise.

        Args:
            levels: Noise levels ``K`` of the model.
            samples: How many.
        """
        return cls(steps=min(_POSTERIOR_STEPS, levels), eta=1.0, start="noise", samples=samples)

    @property
    def random(self) -> bool:
        """Whether any random number is drawn."""
        return self.start != "zero" or self.kind == "ddpm" or (self.kind == "ddim" and self.eta > 0.0)


class Sampler:
    """Draws clean states by the reverse process (paper eq. 3).

    Args:
        denoiser: The network.
        schedule: Its noise levels.
        config: How to sample.

    Raises:
        ValueError: If the schedule has fewer levels than ``config`` asks for.
    """

    def __init__(self, denoiser: Denoiser, schedule: NoiseSchedule, config: SamplerConfig) -> None:
        self.config = config
        self._denoiser = denoiser
        self._schedule = schedule
        start = schedule.levels if config.level is None else config.level
        self._levels = schedule.steps(start, config.steps)
        eta = 1.0 if config.kind == "ddpm" else config.eta
        if config.kind == "dpm++":
            self._steps = _solver_steps(schedule, self._levels.tolist())
        else:
            pairs = zip(self._levels[:-1].tolist(), self._levels[1:].tolist(), strict=True)
            self._steps = [_implicit_step(schedule, high, low, eta) for high, low in pairs]

    @torch.inference_mode()
    def sample(self, condition: Tensor, observed: Tensor) -> Tensor:
        """Returns clean states, the mean of ``config.samples`` samples.

        Args:
            condition: ``float32 (B, c)``, standardised.
            observed: ``float32 (B, d)``, observed states, standardised; they determine the noise of their rows, and
                ``start="state"`` starts from them.

        Returns:
            ``float32 (B, d)``, standardised.
        """
        return self.samples(condition, observed).mean(dim=0)

    @torch.inference_mode()
    def samples(self, condition: Tensor, observed: Tensor) -> Tensor:
        """Returns all samples, ``float32 (samples, B, d)``; see :meth:`sample`."""
        count = self.config.samples if self.config.random else 1
        embedded = self._denoiser.embed(condition)
        null = None
        if self.config.guidance:
            null = self._denoiser.embed(condition, torch.ones(len(condition), dtype=torch.bool))
        keys = row_keys(observed.numpy(), self.config.seed) if self.config.random else None
        return torch.stack(
            [self._draw(embedded, null, observed, keys, number * _STREAMS_PER_SAMPLE) for number in range(count)]
        )

    def _draw(
        self,
        embedded: Tensor,
        null: Tensor | None,
        observed: Tensor,
        keys: seeding.Keys | None,
        stream: int,
    ) -> Tensor:
        """Returns one sample, ``(B, d)``; ``null`` embeds the null condition where there is guidance."""
        state = self._start(observed, keys, stream)
        previous: Tensor | None = None
        for number, step in enumerate(self._steps):
            clean = self._clean(state, step.level, embedded)
            if null is not None:
                unconditional = self._clean(state, step.level, null)
                clean = (1.0 + self.config.guidance) * clean - self.config.guidance * unconditional
            clean = clean.clamp(-self.config.clip, self.config.clip)
            estimate = clean
            if previous is not None and step.extrapolation:
                estimate = (1.0 + step.extrapolation) * clean - step.extrapolation * previous
            state = step.clean_weight * estimate + step.noisy_weight * state
            if step.deviation:
                assert keys is not None
                state = state + step.deviation * _normals(keys, state.shape[1], stream + number + 1)
            previous = clean
        return state

    def _clean(self, state: Tensor, level: int, embedded: Tensor) -> Tensor:
        levels = torch.full((len(state),), level)
        return self._denoiser.clean(state, levels, self._denoiser(state, levels, embedded))

    def _start(self, observed: Tensor, keys: seeding.Keys | None, stream: int) -> Tensor:
        if keys is None or self.config.start == "zero":
            return torch.zeros_like(observed)
        noise = _normals(keys, observed.shape[1], stream)
        if self.config.start == "noise":
            return noise
        alpha_bar = float(self._schedule.alphas_bar[self._levels[0]])
        return float(np.sqrt(alpha_bar)) * observed + float(np.sqrt(1.0 - alpha_bar)) * noise


def posterior_spread(samples: FloatArray) -> FloatArray:
    """Returns the root mean square over components of the samples' standard deviation, ``float32 (B,)``.

    Args:
        samples: ``float32 (samples, B, d)``.
    """
    return np.asarray(np.sqrt(samples.var(axis=0, ddof=1).mean(axis=1)))


@dataclass(frozen=True)
class _Step:
    """One step of a solver: ``clean_weight * clean + noisy_weight * noisy + deviation * normal``.

    The clean state is estimated at noise level ``level``, and extrapolated from the previous estimate (second order).
    """

    level: int
    clean_weight: float
    noisy_weight: float
    deviation: float = 0.0
    extrapolation: float = 0.0


def _implicit_step(schedule: NoiseSchedule, high: int, low: int, eta: float) -> _Step:
    """DDIM (eq. 12 of its paper); with ``eta`` 1 this is the ancestral step of eq. 3."""
    noisier, cleaner = schedule.alphas_bar[high], schedule.alphas_bar[low]
    deviation = eta * np.sqrt(schedule.posterior_variance(high, low))
    noisy_weight = np.sqrt(max(1.0 - cleaner - deviation**2, 0.0) / (1.0 - noisier))
    clean_weight = np.sqrt(cleaner) - noisy_weight * np.sqrt(noisier)
    return _Step(high, float(clean_weight), float(noisy_weight), float(deviation))


def _solver_steps(schedule: NoiseSchedule, levels: list[int]) -> list[_Step]:
    """DPM-Solver++(2M); the first step, which has no predecessor, and the last, to level 0, are of first order."""
    alphas_bar = schedule.alphas_bar
    half_log_ratios = [0.5 * np.log(alphas_bar[level] / max(1.0 - alphas_bar[level], 1e-300)) for level in levels]
    steps = []
    for number, (high, low) in enumerate(pairwise(levels)):
        if low == 0:
            steps.append(_Step(high, 1.0, 0.0))
            continue
        noisy_weight = np.sqrt((1.0 - alphas_bar[low]) / (1.0 - alphas_bar[high]))
        decay = np.sqrt(alphas_bar[high] / alphas_bar[low]) * noisy_weight
        clean_weight = np.sqrt(alphas_bar[low]) * (1.0 - decay)
        extrapolation = 0.0
        if number:
            width = half_log_ratios[number + 1] - half_log_ratios[number]
            extrapolation = 0.5 * width / (half_log_ratios[number] - half_log_ratios[number - 1])
        steps.append(_Step(high, float(clean_weight), float(noisy_weight), extrapolation=float(extrapolation)))
    return steps


def _normals(keys: seeding.Keys, size: int, stream: int) -> Tensor:
    return torch.from_numpy(row_normals(keys, size, stream))
