"""Noise schedules of the forward process (paper eq. 2), as tables of double precision."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

from kuaifair_env import seeding
from kuaifair_env.data.schema import FloatArray

ScheduleKind = Literal["linear", "cosine", "vp"]

LINEAR_RANGE = (1e-4, 0.02)
VP_RANGE = (0.1, 10.0)
_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a state is left at each noise level ``k = 0 .. K``.

    At level ``k`` a state is ``sqrt(abar_k) s + sqrt(1 - abar_k) eps`` (eq. 2); level 0 is the clean state.

    Attributes:
        kind: ``"linear"`` (betas from 1e-4 to .02; what is left at level ``K`` depends on ``K``: .82 for 20, .006 for
            500), ``"cosine"`` (Nichol and Dhariwal, ICML 2021) or ``"vp"`` (the variance-preserving process of Song et
            al., ICLR 2021, beta from .1 to 10); what the last two leave at level ``K`` does not depend on ``K``.
        alphas_bar: ``float64 (K + 1,)``, ``abar_k``; 1 at level 0, decreasing.
    """

    kind: ScheduleKind
    alphas_bar: NDArray[np.float64]

    @classmethod
    def make(cls, kind: ScheduleKind, levels: int) -> NoiseSchedule:
        """Makes a schedule.

        Args:
            kind: See the class.
            levels: Number of noise levels ``K``.

        Raises:
            ValueError: If the kind is unknown or there is no level.
        """
        if levels < 1:
            raise ValueError(f"a schedule needs at least 1 level, got {levels}")
        if kind == "linear":
            betas = np.linspace(*LINEAR_RANGE, levels)
        elif kind == "cosine":
            time = np.arange(levels + 1) / levels
            left = np.cos((time + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * np.pi / 2) ** 2
            betas = np.minimum(1.0 - left[1:] / left[:-1], _LARGEST_BETA)
        elif kind == "vp":
            time = np.arange(levels + 1) / levels
            low, high = VP_RANGE
            left = np.exp(-(low * time + 0.5 * (high - low) * time**2))
            betas = 1.0 - left[1:] / left[:-1]
        else:
            raise ValueError(f"schedule must be one of {get_args(ScheduleKind)}, got {kind!r}")
        return cls(kind, np.concatenate([[1.0], np.cumprod(1.0 - betas)]))

    @property
    def levels(self) -> int:
        """Number of noise levels ``K``."""
        return len(self.alphas_bar) - 1

    @property
    def betas(self) -> NDArray[np.float64]:
        """``float64 (K,)``, share of variance that each level replaces by noise."""
        return np.asarray(1.0 - self.alphas_bar[1:] / self.alphas_bar[:-1])

    def posterior_variance(self, high: int, low: int) -> float:
        """Returns the variance of a state at level ``low``, given it at level ``high`` and clean (``beta~`` of eq. 3).

        Args:
            high: The noisier level.
            low: The cleaner level, ``0 <= low < high``.
        """
        above, below = self.alphas_bar[high], self.alphas_bar[low]
        return float((1.0 - below) / (1.0 - above) * (1.0 - above / below))

    def steps(self, start: int, count: int) -> NDArray[np.int64]:
        """Returns the levels that a solver of ``count`` steps visits from level ``start`` down to 0, evenly spread.

        Raises:
            ValueError: If the start is no level, or there are more steps than levels.
        """
        if not 1 <= start <= self.levels:
            raise ValueError(f"a solver starts at a level from 1 to {self.levels}, got {start}")
        if not 1 <= count <= start:
            raise ValueError(f"from level {start} there are 1 to {start} steps, got {count}")
        return np.round(np.linspace(start, 0, count + 1)).astype(np.int64)


_HALF_STEP = 2.0**-54


def row_keys(rows: FloatArray, seed: int) -> seeding.Keys:
    """Returns one stream key for each row, from a seed and the row's bytes.

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


def row_normals(keys: seeding.Keys, size: int, number: int = 0) -> FloatArray:
    """Returns standard normal draws.

    Args:
        keys: ``uint64 (B,)``, from :func:`row_keys`.
        size: Draws for each row.
        number: Which of the row's sub-streams to draw from.

    Returns:
        ``float32 (B, size)``.
    """
    streams = seeding.derive(keys, number)
    uniforms = seeding.uniforms(streams[:, None], np.arange(size, dtype=np.uint64))
    return np.asarray(ndtri(uniforms + _HALF_STEP), np.float32)


SamplerKind = Literal["ddpm", "ddim", "dpm++"]
Start = Literal["zero", "noise", "state"]

_DRAWS_PER_SAMPLE = 10_000


class CleanStateNet(Protocol):
    """What a sampler needs of a denoiser."""

    def embed(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Projects conditions."""
        ...

    def __call__(self, noisy: Tensor, level: Tensor, embedded: Tensor) -> Tensor:
        """Predicts."""
        ...

    def clean(self, noisy: Tensor, level: Tensor, predicted: Tensor) -> Tensor:
        """Turns a prediction into a clean state."""
        ...


@dataclass(frozen=True)
class SamplerConfig:
    """How a purified state is drawn.

    Attributes:
        kind: ``"ddpm"`` (eq. 3), ``"ddim"`` (Song, Meng and Ermon, ICLR 2021) or ``"dpm++"`` (second-order multistep
            DPM-Solver++, Lu et al., 2022).
        steps: Evaluations of the denoiser.
        eta: DDIM only: 0 is deterministic, 1 is ancestral sampling.
        start: ``"zero"`` (the mean of the noise; with ``eta`` 0 no random number is drawn), ``"noise"``, or
            ``"state"``: the observed state, noised to the level at which the solver starts.
        level: Noise level at which the solver starts; None is the noisiest.
        guidance: ``w`` of classifier-free guidance, ``(1 + w) eps_c - w eps_null`` (Ho and Salimans, 2022).
        samples: Average so many samples.
        clip: Clean states are kept within so many standard deviations.
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

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn at all."""
        return self.start != "zero" or self.kind == "ddpm" or (self.kind == "ddim" and self.eta > 0.0)


class Sampler:
    """A reverse process with everything that does not depend on the states computed in advance.

    Args:
        denoiser: The net.
        schedule: Its noise levels.
        config: How to sample.

    Raises:
        ValueError: If there are not that many levels.
    """

    def __init__(self, denoiser: CleanStateNet, schedule: NoiseSchedule, config: SamplerConfig) -> None:
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
        """Returns clean states; the mean of several where the configuration says so.

        Args:
            condition: ``float32 (B, c)``, standardised.
            observed: ``float32 (B, d)``, observed states, standardised; the start of ``start="state"``, and what the
                noise of a row follows from.

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
            [self._one(embedded, null, observed, keys, number * _DRAWS_PER_SAMPLE) for number in range(count)]
        )

    def _one(
        self,
        embedded: Tensor,
        null: Tensor | None,
        observed: Tensor,
        keys: seeding.Keys | None,
        draw: int,
    ) -> Tensor:
        state = self._started(observed, keys, draw)
        previous: Tensor | None = None
        for number, step in enumerate(self._steps):
            level = torch.full((len(state),), step.level)
            clean = self._denoiser.clean(state, level, self._denoiser(state, level, embedded))
            if null is not None:
                unguided = self._denoiser.clean(state, level, self._denoiser(state, level, null))
                clean = (1.0 + self.config.guidance) * clean - self.config.guidance * unguided
            clean = clean.clamp(-self.config.clip, self.config.clip)
            mixed = clean
            if previous is not None and step.extrapolation:
                mixed = (1.0 + step.extrapolation) * clean - step.extrapolation * previous
            state = step.of_clean * mixed + step.of_noisy * state
            if step.deviation:
                assert keys is not None
                state = state + step.deviation * _normals(keys, state.shape[1], draw + number + 1)
            previous = clean
        return state

    def _started(self, observed: Tensor, keys: seeding.Keys | None, draw: int) -> Tensor:
        if keys is None or self.config.start == "zero":
            return torch.zeros_like(observed)
        noise = _normals(keys, observed.shape[1], draw)
        if self.config.start == "noise":
            return noise
        kept = float(self._schedule.alphas_bar[self._levels[0]])
        return float(np.sqrt(kept)) * observed + float(np.sqrt(1.0 - kept)) * noise


@dataclass(frozen=True)
class Step:
    """One step of a solver: ``of_clean * clean + of_noisy * noisy + deviation * normal``.

    Attributes:
        level: The level that the denoiser is asked at.
        of_clean: Weight of the clean estimate.
        of_noisy: Weight of the present state.
        deviation: Standard deviation of fresh noise.
        extrapolation: How far the clean estimate is carried on from the previous one (second order).
    """

    level: int
    of_clean: float
    of_noisy: float
    deviation: float = 0.0
    extrapolation: float = 0.0


def _implicit_step(schedule: NoiseSchedule, high: int, low: int, eta: float) -> Step:
    """DDIM (eq. 12 of its paper); with ``eta`` 1 this is the ancestral step of eq. 3."""
    above, below = schedule.alphas_bar[high], schedule.alphas_bar[low]
    deviation = eta * np.sqrt(schedule.posterior_variance(high, low))
    of_noisy = np.sqrt(max(1.0 - below - deviation**2, 0.0) / (1.0 - above))
    of_clean = np.sqrt(below) - of_noisy * np.sqrt(above)
    return Step(high, float(of_clean), float(of_noisy), float(deviation))


def _solver_steps(schedule: NoiseSchedule, levels: list[int]) -> list[Step]:
    """DPM-Solver++(2M); the first step, which has no predecessor, and the last, to level 0, are of first order."""
    left = schedule.alphas_bar
    half_log_ratios = [0.5 * np.log(left[level] / max(1.0 - left[level], 1e-300)) for level in levels]
    steps = []
    for place, (high, low) in enumerate(pairwise(levels)):
        if low == 0:
            steps.append(Step(high, 1.0, 0.0))
            continue
        shrink = np.sqrt((1.0 - left[low]) / (1.0 - left[high]))
        ratio = np.sqrt(left[high] / left[low]) * shrink
        extrapolation = 0.0
        if place:
            width = half_log_ratios[place + 1] - half_log_ratios[place]
            extrapolation = 0.5 * width / (half_log_ratios[place] - half_log_ratios[place - 1])
        of_clean = np.sqrt(left[low]) * (1.0 - ratio)
        steps.append(Step(high, float(of_clean), float(shrink), extrapolation=float(extrapolation)))
    return steps


def _normals(keys: seeding.Keys, size: int, number: int) -> Tensor:
    normals: FloatArray = row_normals(keys, size, number)
    return torch.from_numpy(normals)
