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

_MIN_DEVIATION = 1e-4


@dataclass(frozen=True)
class Standardiser:
    """Takes vectors to mean 0 and variance 1, and back.

    Attributes:
        mean: ``float32 (n,)``.
        deviation: ``float32 (n,)``, positive.
    """

    mean: FloatArray
    deviation: FloatArray

    @classmethod
    def fit(cls, rows: FloatArray) -> Standardiser:
        """Returns the standardiser of ``float32 (B, n)`` training rows."""
        mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = np.maximum(rows.std(axis=0, dtype=np.float64), _MIN_DEVIATION).astype(np.float32)
        return cls(mean, deviation)

    def to(self, rows: FloatArray) -> FloatArray:
        """Returns standardised rows."""
        moved: FloatArray = (rows - self.mean) / self.deviation
        return moved

    def back(self, rows: FloatArray) -> FloatArray:
        """Undoes :meth:`to`."""
        moved: FloatArray = rows * self.deviation + self.mean
        return moved

    def tensors(self, name: str) -> Tensors:
        """Returns both vectors under ``name.mean`` and ``name.deviation``."""
        return {f"{name}.mean": self.mean, f"{name}.deviation": self.deviation}

    @classmethod
    def from_tensors(cls, tensors: Tensors, name: str) -> Standardiser:
        """Restores what :meth:`tensors` returned."""
        return cls(tensors[f"{name}.mean"], tensors[f"{name}.deviation"])


Prediction = Literal["epsilon", "sample", "velocity"]

_TIME_FREQUENCIES = 16
_TIME_SIZE = 64
_LONGEST_PERIOD = 10_000.0


@dataclass(frozen=True)
class DenoiserConfig:
    """Shape of a denoiser.

    Attributes:
        state_size: Size ``d`` of a state.
        condition_size: Size of a condition.
        prediction: What the net predicts: the noise ``epsilon`` (paper), the clean state ``sample``, or ``velocity``
            (Salimans and Ho, ICLR 2022).
        width: Width of the residual blocks.
        blocks: How many.
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
        self.enter = nn.Linear(config.state_size, width)
        self.blocks = nn.ModuleList(_Block(width, width + _TIME_SIZE) for _ in range(config.blocks))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.state_size))

    def embed(self, condition: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Projects conditions once for a whole reverse pass.

        Args:
            condition: ``(B, c)``, standardised.
            dropped: ``bool (B,)``, rows that get the learnt null condition instead.
        """
        embedded: Tensor = self.condition(condition)
        if dropped is None:
            return embedded
        return torch.where(dropped[:, None], self.null_condition, embedded)

    def forward(self, noisy: Tensor, level: Tensor, embedded: Tensor) -> Tensor:
        """Returns what the net predicts, ``(B, d)``.

        Args:
            noisy: ``(B, d)``, states at their noise level.
            level: ``int64 (B,)``, levels from 1 to ``K``.
            embedded: ``(B, width)``, from :meth:`embed`.
        """
        features = torch.cat([embedded, self.time(self.level_features[level])], dim=1)
        hidden = self.enter(noisy) + embedded
        for block in self.blocks:
            hidden = block(hidden, features)
        predicted: Tensor = self.leave(hidden)
        return predicted

    def clean(self, noisy: Tensor, level: Tensor, predicted: Tensor) -> Tensor:
        """Returns the clean state that a prediction implies, ``(B, d)``."""
        if self.config.prediction == "sample":
            return predicted
        kept = self.alphas_bar[level][:, None]
        if self.config.prediction == "velocity":
            return kept.sqrt() * noisy - (1.0 - kept).sqrt() * predicted
        return (noisy - (1.0 - kept).sqrt() * predicted) / kept.sqrt()

    def wanted(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Returns what the net should predict for a clean state and its noise, ``(B, d)``."""
        if self.config.prediction == "sample":
            return clean
        if self.config.prediction == "epsilon":
            return noise
        kept = self.alphas_bar[level][:, None]
        return kept.sqrt() * noise - (1.0 - kept).sqrt() * clean


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
        denoiser: The net.
        clean: ``(B, d)``, targets ``s^(0)``, standardised.
        condition: ``(B, c)``, standardised.
        noise: ``(B, d)``, standard normal.
        level: ``int64 (B,)``, noise levels.
        dropped: ``bool (B,)``, rows whose condition is dropped.
    """
    kept = denoiser.alphas_bar[level][:, None]
    noisy = kept.sqrt() * clean + (1.0 - kept).sqrt() * noise
    predicted = denoiser(noisy, level, denoiser.embed(condition, dropped))
    return nn.functional.mse_loss(predicted, denoiser.wanted(clean, noise, level))


class _Block(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(features, 2 * width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.film(features).chunk(2, dim=1)
        moved = self.norm(hidden) * (1.0 + scale) + shift
        changed: Tensor = self.linear(nn.functional.silu(moved))
        return hidden + changed


def _sinusoids(levels: int) -> Tensor:
    """Returns sines and cosines of the levels ``0 .. K``, ``(K + 1, 32)`` (Vaswani et al., NeurIPS 2017)."""
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) * torch.arange(_TIME_FREQUENCIES) / _TIME_FREQUENCIES)
    # Levels are spread over a fixed range, so that few and many levels look alike.
    angles = torch.arange(levels + 1)[:, None] / levels * 1000.0 * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
