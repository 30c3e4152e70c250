"""The conditional denoiser ``eps_theta(s^(k), k, c)`` and its loss (paper eq. 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from dsrm.diffusion import NoiseSchedule
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors
from kuaifair_env.response.training import load_network, network_tensors

Prediction = Literal["epsilon", "sample", "velocity"]

_MIN_DEVIATION = 1e-4
_TIME_FREQUENCIES = 16
_TIME_SIZE = 64
_MAX_PERIOD = 10_000.0


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
        standardised: FloatArray = (rows - self.mean) / self.deviation
        return standardised

    def inverse_transform(self, rows: FloatArray) -> FloatArray:
        """Undoes :meth:`transform`."""
        original: FloatArray = rows * self.deviation + self.mean
        return original

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
