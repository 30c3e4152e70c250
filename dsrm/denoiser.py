"""The forward process (paper eq. 2), the conditional denoiser ``eps_theta(s^(k), k, c)`` and its loss (eq. 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors
from kuaifair_env.response.training import load_network, network_tensors

ScheduleKind = Literal["linear", "cosine", "vp"]
Prediction = Literal["epsilon", "sample", "velocity"]

_LINEAR_BETAS = (1e-4, 0.02)
_VP_BETAS = (0.1, 10.0)
_COSINE_OFFSET = 0.008
_MAX_BETA = 0.999
_MIN_DEVIATION = 1e-4
_TIME_FREQUENCIES = 16
_TIME_SIZE = 64
_MAX_PERIOD = 10_000.0


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
            ValueError: If the kind is unknown or there is no level.
        """
        if levels < 1:
            raise ValueError(f"a schedule needs at least 1 level, got {levels}")
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
        """Returns the variance of a state at level ``low``, given it at level ``high`` and clean (``beta~`` of eq. 3).

        Args:
            high: The noisier level.
            low: The cleaner level, ``0 <= low < high``.
        """
        noisier, cleaner = self.alphas_bar[high], self.alphas_bar[low]
        return float((1.0 - cleaner) / (1.0 - noisier) * (1.0 - noisier / cleaner))

    def steps(self, start: int, count: int) -> NDArray[np.int64]:
        """Returns the levels that a solver visits from level ``start`` down to 0, evenly spread.

        Args:
            start: First level.
            count: Number of steps.

        Returns:
            ``int64 (count + 1,)``, decreasing.

        Raises:
            ValueError: If the start is no level, or there are more steps than levels.
        """
        if not 1 <= start <= self.levels:
            raise ValueError(f"a solver starts at a level from 1 to {self.levels}, got {start}")
        if not 1 <= count <= start:
            raise ValueError(f"from level {start} there are 1 to {start} steps, got {count}")
        return np.round(np.linspace(start, 0, count + 1)).astype(np.int64)


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
        if min(self.state_size, self.condition_size, self.width, self.blocks) < 1:
            raise ValueError("sizes of a denoiser must be at least 1")


class Denoiser(nn.Module):
    """A residual MLP on the noisy state, with feature-wise scale and shift from noise level and condition.

    Args:
        config: Its shape.
        schedule: Noise levels that it is trained on.
    """

    level_features: Tensor
    alphas_bar: Tensor

    def __init__(self, config: DenoiserConfig, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("level_features", _sinusoids(schedule.levels), persistent=False)
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
        """Projects conditions, once for a whole reverse process.

        Args:
            condition: ``(B, c)``, standardised.
            dropped: ``bool (B,)``, rows that get the learnt null condition instead.

        Returns:
            ``(B, width)``.
        """
        embedded: Tensor = self.condition(condition)
        if dropped is None:
            return embedded
        return torch.where(dropped[:, None], self.null_condition, embedded)

    def forward(self, noisy: Tensor, level: Tensor, embedded: Tensor) -> Tensor:
        """Returns what the network predicts, ``(B, d)``.

        Args:
            noisy: ``(B, d)``, states at their noise level.
            level: ``int64 (B,)``, levels from 1 to ``K``.
            embedded: ``(B, width)``, from :meth:`embed`.
        """
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
    denoiser: Denoiser,
    clean: Tensor,
    condition: Tensor,
    noise: Tensor,
    level: Tensor,
    dropped: Tensor | None = None,
) -> Tensor:
    """Returns the mean squared error of the prediction at given levels (eq. 7 where ``epsilon`` is predicted).

    Args:
        denoiser: The network.
        clean: ``(B, d)``, targets ``s^(0)``, standardised.
        condition: ``(B, c)``, standardised.
        noise: ``(B, d)``, standard normal.
        level: ``int64 (B,)``, noise levels.
        dropped: ``bool (B,)``, rows whose condition is dropped.
    """
    alpha_bar = denoiser.alphas_bar[level][:, None]
    noisy = alpha_bar.sqrt() * clean + (1.0 - alpha_bar).sqrt() * noise
    predicted = denoiser(noisy, level, denoiser.embed(condition, dropped))
    return nn.functional.mse_loss(predicted, denoiser.target(clean, noise, level))


@dataclass(frozen=True)
class Standardiser:
    """Takes vectors to mean 0 and variance 1, and back.

    Attributes:
        mean: ``float32 (n,)``.
        deviation: ``float32 (n,)``, standard deviations, positive.
    """

    mean: FloatArray
    deviation: FloatArray

    @classmethod
    def fit(cls, rows: FloatArray) -> Standardiser:
        """Returns the standardiser of ``float32 (B, n)`` training rows."""
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = np.maximum(rows.std(axis=0, dtype=np.float64), _MIN_DEVIATION).astype(np.float32)
        return cls(mean, deviation)

    def transform(self, rows: FloatArray) -> FloatArray:
        """Returns standardised rows."""
        return (rows - self.mean) / self.deviation

    def inverse_transform(self, rows: FloatArray) -> FloatArray:
        """Undoes :meth:`transform`."""
        return rows * self.deviation + self.mean

    def interval(self, deviations: float) -> tuple[FloatArray, FloatArray]:
        """Returns the bounds that lie a number of standard deviations below and above the mean, ``(n,)`` each."""
        return self.mean - deviations * self.deviation, self.mean + deviations * self.deviation


@dataclass(frozen=True)
class TrainedDenoiser:
    """A trained network, and how what it reads and what it gives were standardised.

    Attributes:
        network: The network.
        condition: Standardisation of conditions.
        state: Standardisation of states.
    """

    network: Denoiser
    condition: Standardiser
    state: Standardiser

    def tensors(self) -> Tensors:
        """Returns all arrays by name; :meth:`restore` takes them back."""
        tensors = network_tensors(self.network)
        for name, standardiser in (("condition", self.condition), ("state", self.state)):
            tensors |= {f"{name}.mean": standardiser.mean, f"{name}.deviation": standardiser.deviation}
        return tensors

    @classmethod
    def restore(cls, network: Denoiser, tensors: Tensors) -> TrainedDenoiser:
        """Fills a network of the same shape with what :meth:`tensors` returned.

        Raises:
            KeyError: If an array is missing.
            RuntimeError: If an array has another shape.
        """
        load_network(network, tensors)
        return cls(
            network.eval(),
            Standardiser(tensors["condition.mean"], tensors["condition.deviation"]),
            Standardiser(tensors["state.mean"], tensors["state.deviation"]),
        )


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


def _sinusoids(levels: int) -> Tensor:
    """Returns sines and cosines of the levels ``0 .. K``, ``(K + 1, 32)`` (Vaswani et al., NeurIPS 2017)."""
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * torch.arange(_TIME_FREQUENCIES) / _TIME_FREQUENCIES)
    # Levels are spread over a fixed range, so that few and many levels look alike.
    angles = torch.arange(levels + 1)[:, None] / levels * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
