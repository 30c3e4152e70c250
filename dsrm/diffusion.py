"""The diffusion model: forward process (paper eq. 2), denoiser and its loss (eq. 7), reverse process (eq. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kuaifair_env import seeding
from kuaifair_env.checks import need_number, need_seed, need_whole
from kuaifair_env.data.schema import FloatArray

ScheduleKind = Literal["linear", "cosine", "vp"]
Prediction = Literal["epsilon", "sample", "velocity"]
SamplerKind = Literal["ddpm", "ddim", "dpm++"]
Start = Literal["zero", "noise", "state"]
Spacing = Literal["level", "log-snr"]

_LINEAR_BETAS = (1e-4, 0.02)
_VP_BETAS = (0.1, 10.0)
_COSINE_OFFSET = 0.008
_MAX_BETA = 0.999
_TIME_FREQUENCIES = 16
_TIME_SIZE = 64
_MAX_PERIOD = 10_000.0
_STREAMS_PER_SAMPLE = 10_000
_POSTERIOR_STEPS = 16
_MAX_SIGNAL = 0.01
"""Largest ``abar`` of a level whose states pass for noise."""
_MIN_HALF_LOG_SNR = -3.0
"""What is noisier says next to nothing of the clean state: one step crosses it."""


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of a clean state is left at each noise level ``k = 0 .. K``, in double precision.

    At level ``k`` a state is ``sqrt(abar_k) s + sqrt(1 - abar_k) eps`` (eq. 2); level 0 is the clean state.

    Attributes:
        kind: ``"linear"`` (betas from 1e-4 to .02; ``abar_K`` depends on ``K``: .82 for 20 levels, .006 for 500),
            ``"cosine"`` (Nichol and Dhariwal, ICML 2021) or ``"vp"`` (the variance-preserving process of Song et al.,
            ICLR 2021, beta from .1 to 10). ``abar_K`` of the last two does not depend on ``K``.
        alphas_bar: ``float64 (K + 1,)``, ``abar_k``; 1 at level 0, decreasing.
    """

    kind: ScheduleKind
    alphas_bar: NDArray[np.float64]

    @classmethod
    def make(cls, kind: ScheduleKind, levels: int) -> NoiseSchedule:
        """Makes a schedule of a kind with ``K`` noise levels.

        Raises:
            ValueError: If the kind is unknown or the number of levels is not a whole number of at least 1.
        """
        need_whole(1, levels=levels)
        if kind == "linear":
            betas = np.linspace(*_LINEAR_BETAS, levels)
        elif kind == "cosine":
            time = np.arange(levels + 1) / levels
            alphas_bar = np.cos((time + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET) * np.pi / 2) ** 2
            betas = np.minimum(1.0 - alphas_bar[1:] / alphas_bar[:-1], _MAX_BETA)
        elif kind == "vp":
            time = np.arange(levels + 1) / levels
            low, high = _VP_BETAS
            alphas_bar = np.exp(-(low * time + 0.5 * (high - low) * time**2))
            betas = 1.0 - alphas_bar[1:] / alphas_bar[:-1]
        else:
            raise ValueError(f"schedule must be one of {get_args(ScheduleKind)}, got {kind!r}")
        return cls(kind, np.concatenate([[1.0], np.cumprod(1.0 - betas)]))

    @property
    def levels(self) -> int:
        """Number of noise levels ``K``."""
        return len(self.alphas_bar) - 1

    def posterior_variance(self, high: int, low: int) -> float:
        """Returns the variance of a state at level ``low``, given it at ``high`` and clean (``beta~`` of eq. 3)."""
        noisier, cleaner = self.alphas_bar[high], self.alphas_bar[low]
        return float((1.0 - cleaner) / (1.0 - noisier) * (1.0 - noisier / cleaner))

    def steps(self, start: int, count: int, spacing: Spacing = "level") -> NDArray[np.int64]:
        """Returns the levels that a solver visits in ``count`` steps from level ``start`` down to 0, inclusive.

        The steps are even in the level, or in the logarithm of the ratio of signal to noise, which spends them where
        clean states take shape.

        Raises:
            ValueError: If the start is no level, or there are more steps than levels.
        """
        if not 1 <= start <= self.levels:
            raise ValueError(f"a solver starts at a level from 1 to {self.levels}, got {start}")
        if not 1 <= count <= start:
            raise ValueError(f"from level {start} there are 1 to {start} steps, got {count}")
        if spacing == "level":
            return np.round(np.linspace(start, 0, count + 1)).astype(np.int64)
        signal = self.alphas_bar[start:0:-1]
        half_log_snr = 0.5 * np.log(signal / (1.0 - signal))
        even = np.linspace(max(half_log_snr[0], _MIN_HALF_LOG_SNR), half_log_snr[-1], count)
        levels = np.round(np.interp(even, half_log_snr, np.arange(start, 0, -1)))
        levels[0] = start
        # Where levels lie wide apart the nearest ones coincide: each step moves down, and leaves room for the rest.
        number = np.arange(count)
        levels = np.minimum.accumulate(np.maximum(levels, count - number) + number) - number
        return np.append(levels, 0).astype(np.int64)

    def need_noise(self, level: int) -> None:
        """Checks that states at a level are as good as noise, so that a sampler may start there without a state.

        Raises:
            ValueError: If the level keeps more than 1 % of the clean state's variance.
        """
        signal = self.alphas_bar[level]
        if signal > _MAX_SIGNAL:
            raise ValueError(
                f"a sampler can start at noise only where nothing else is left, but level {level} of a {self.kind} "
                f"schedule of {self.levels} levels keeps {100 * signal:.0f} % of the state's variance; take "
                "schedule='cosine' or 'vp' (or 500 levels of 'linear') and the last level, or start='state'"
            )


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a denoiser.

    Attributes:
        state_size: Size ``d`` of a state.
        condition_size: Size of a condition.
        prediction: What the network predicts: the noise ``epsilon`` (paper), the clean state ``sample``, or
            ``velocity`` (Salimans and Ho, ICLR 2022).
        width: Width of the residual blocks.
        blocks: Number of residual blocks.
    """

    state_size: int
    condition_size: int
    prediction: Prediction = "velocity"
    width: int = 256
    blocks: int = 3

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction must be one of {get_args(Prediction)}, got {self.prediction!r}")
        need_whole(1, state_size=self.state_size, condition_size=self.condition_size)
        need_whole(1, width=self.width, blocks=self.blocks)


class Denoiser(nn.Module):
    """A residual MLP on the noisy state, with feature-wise scale and shift from noise level and condition."""

    level_features: Tensor
    alphas_bar: Tensor

    def __init__(self, config: DenoiserConfig, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("level_features", level_sinusoids(schedule.levels), persistent=False)
        alphas_bar = torch.tensor(schedule.alphas_bar, dtype=torch.float32)
        self.register_buffer("alphas_bar", alphas_bar, persistent=False)
        width = config.width
        self.time = nn.Sequential(nn.Linear(2 * _TIME_FREQUENCIES, _TIME_SIZE), nn.SiLU())
        self.condition = nn.Sequential(nn.Linear(config.condition_size, width), nn.SiLU())
        self.null_condition = nn.Parameter(torch.zeros(width))
        self.input = nn.Linear(config.state_size, width)
        self.blocks = nn.ModuleList(_Block(width, width + _TIME_SIZE) for _ in range(config.blocks))
        self.output = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.state_size))

    def embed(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Projects ``(B, c)`` standardised conditions to ``(B, width)``, once for a whole reverse process.

        Rows that are ``dropped``, ``bool (B,)``, get the learnt null condition instead.
        """
        embedded: Tensor = self.condition(condition)
        if dropped is None:
            return embedded
        return torch.where(dropped[:, None], self.null_condition, embedded)

    def forward(self, noisy: Tensor, level: Tensor, embedded: Tensor) -> Tensor:
        """Returns what the network predicts, ``(B, d)``, for states at levels from 1 to ``K`` (see :meth:`embed`)."""
        features = torch.cat([embedded, self.time(self.level_features[level])], dim=1)
        hidden = self.input(noisy) + embedded
        for block in self.blocks:
            hidden = block(hidden, features)
        predicted: Tensor = self.output(hidden)
        return predicted

    def clean(self, noisy: Tensor, level: Tensor, predicted: Tensor) -> Tensor:
        """Returns the clean state that a prediction implies, ``(B, d)``."""
        if self.config.prediction == "sample":
            return predicted
        alpha_bar = self.alphas_bar[level][:, None]
        if self.config.prediction == "velocity":
            return alpha_bar.sqrt() * noisy - (1.0 - alpha_bar).sqrt() * predicted
        return (noisy - (1.0 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()

    def target(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Returns what the network should predict for a clean state and its noise, ``(B, d)``."""
        if self.config.prediction == "sample":
            return clean
        if self.config.prediction == "epsilon":
            return noise
        alpha_bar = self.alphas_bar[level][:, None]
        return alpha_bar.sqrt() * noise - (1.0 - alpha_bar).sqrt() * clean


def denoising_loss(
    denoiser: Denoiser, clean: Tensor, condition: Tensor, noise: Tensor, level: Tensor, dropped: Tensor | None = None
) -> Tensor:
    """Returns the mean squared error of the prediction at given levels (eq. 7 where ``epsilon`` is predicted).

    Clean states ``(B, d)``, the targets ``s^(0)``, and conditions ``(B, c)`` are standardised, as the noise is;
    ``dropped`` are the rows whose condition is dropped, ``bool (B,)``.
    """
    alpha_bar = denoiser.alphas_bar[level][:, None]
    noisy = alpha_bar.sqrt() * clean + (1.0 - alpha_bar).sqrt() * noise
    predicted = denoiser(noisy, level, denoiser.embed(condition, dropped))
    return nn.functional.mse_loss(predicted, denoiser.target(clean, noise, level))


class _Block(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(features, 2 * width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.film(features).chunk(2, dim=1)
        modulated = self.norm(hidden) * (1.0 + scale) + shift
        change: Tensor = self.linear(nn.functional.silu(modulated))
        return hidden + change


def level_sinusoids(levels: int) -> Tensor:
    """Returns sines and cosines of the levels ``0 .. K``, ``(K + 1, 32)`` (Vaswani et al., NeurIPS 2017)."""
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(_TIME_FREQUENCIES) / _TIME_FREQUENCIES)
    # Levels are spread over a fixed range, so that few and many levels look alike.
    angles = torch.arange(levels + 1)[:, None] / levels * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


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
        spacing: Levels that are visited: evenly spaced in ``"level"``, or in ``"log-snr"``, the logarithm of the ratio
            of signal to noise.
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
    spacing: Spacing = "level"
    samples: int = 1
    clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplerKind):
            raise ValueError(f"sampler must be one of {get_args(SamplerKind)}, got {self.kind!r}")
        if self.start not in get_args(Start):
            raise ValueError(f"start must be one of {get_args(Start)}, got {self.start!r}")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"spacing must be one of {get_args(Spacing)}, got {self.spacing!r}")
        need_whole(1, steps=self.steps, samples=self.samples)
        need_seed(self.seed)
        if self.level is not None:
            need_whole(1, level=self.level)
        need_number("[0, 1]", eta=self.eta)
        need_number("[0, inf)", guidance=self.guidance)
        need_number("(0, inf)", clip=self.clip)

    @classmethod
    def posterior(cls, levels: int, samples: int) -> SamplerConfig:
        """Returns how samples of the posterior of the clean state are drawn: second-order steps from noise.

        With an exact denoiser their spread is within 2 % of the posterior's, where the least noisy level is finer than
        the posterior. Ancestral steps draw too narrowly (Bao et al., "Analytic-DPM", ICLR 2022): 15 to 35 % with ten.
        """
        return cls("dpm++", min(_POSTERIOR_STEPS, levels), start="noise", spacing="log-snr", samples=samples)

    @property
    def random(self) -> bool:
        """Whether any random number is drawn."""
        return self.start != "zero" or self.kind == "ddpm" or (self.kind == "ddim" and self.eta > 0.0)


class Sampler:
    """Draws clean states by the reverse process (paper eq. 3).

    Raises:
        ValueError: If the schedule has fewer levels than ``config`` asks for, or the sampler starts at noise, but from
            a level that keeps much of the state.
    """

    def __init__(self, denoiser: Denoiser, schedule: NoiseSchedule, config: SamplerConfig) -> None:
        self.config = config
        self._denoiser = denoiser
        self._schedule = schedule
        start = schedule.levels if config.level is None else config.level
        self._levels = schedule.steps(start, config.steps, config.spacing)
        if config.start != "state":
            schedule.need_noise(start)
        eta = 1.0 if config.kind == "ddpm" else config.eta
        if config.kind == "dpm++":
            self._steps = _solver_steps(schedule, self._levels.tolist())
        else:
            pairs = zip(self._levels[:-1].tolist(), self._levels[1:].tolist(), strict=True)
            self._steps = [_implicit_step(schedule, high, low, eta) for high, low in pairs]

    @torch.inference_mode()
    def sample(self, condition: Tensor, observed: Tensor) -> Tensor:
        """Returns clean states ``(B, d)``, the mean of ``config.samples`` samples, for conditions ``(B, c)``.

        The ``observed`` states, ``(B, d)``, determine the noise of their rows, and ``start="state"`` starts from them.
        All are standardised.
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
        keys = seeding.row_keys(observed.numpy(), self.config.seed) if self.config.random else None
        return torch.stack(
            [self._draw(embedded, null, observed, keys, number * _STREAMS_PER_SAMPLE) for number in range(count)]
        )

    def _draw(
        self, embedded: Tensor, null: Tensor | None, observed: Tensor, keys: seeding.Keys | None, stream: int
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
    """Returns the root mean square deviation of ``(samples, B, d)`` samples over their components, ``float32 (B,)``."""
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
    return torch.from_numpy(seeding.row_normals(keys, size, stream))
