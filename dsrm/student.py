"""A one-evaluation distillate of a diffusion model: the purified state and how uncertain it is, in microseconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kuaifair_env.artifacts import Tensors
from kuaifair_env.data.schema import FloatArray

_LEAST_SPREAD = 1e-3
_SPREAD_WEIGHT = 0.1
_NAMES = tuple(f"student.{part}.{layer}" for layer in range(3) for part in ("weight", "bias"))


class Teacher(Protocol):
    """Gives the states that a student learns."""

    def __call__(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(B, d)`` states for standardised conditions, and spreads ``(n,)`` for the first ``n <= B``."""
        ...


@dataclass(frozen=True)
class DistillationConfig:
    """How a student is trained.

    Attributes:
        width: Width of its two hidden layers.
        steps: Optimiser steps.
        batch_size: Conditions of a step.
        learning_rate: First learning rate; it falls to zero along a cosine.
    """

    width: int = 256
    steps: int = 5_000
    batch_size: int = 512
    learning_rate: float = 1e-3


class Student:
    """A multilayer perceptron in numpy: ``c -> (s^, spread)`` with rectified linear units.

    Rows of a batch do not influence each other beyond the rounding of the matrix product (about 1e-6).

    Args:
        weights: Three matrices and three vectors, ``float32``; the last layer has ``d + 1`` outputs.
    """

    def __init__(self, weights: list[FloatArray]) -> None:
        if len(weights) != len(_NAMES):
            raise ValueError(f"a student has {len(_NAMES)} weights, got {len(weights)}")
        self._weights = [np.ascontiguousarray(weight, np.float32) for weight in weights]

    @property
    def state_size(self) -> int:
        """Size ``d`` of a state."""
        return len(self._weights[-1]) - 1

    def __call__(self, condition: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns states ``float32 (B, d)`` and spreads ``(B,)`` for standardised conditions ``(B, c)``."""
        first, first_bias, second, second_bias, third, third_bias = self._weights
        hidden: FloatArray = condition @ first
        hidden += first_bias
        np.maximum(hidden, 0.0, out=hidden)
        hidden = hidden @ second
        hidden += second_bias
        np.maximum(hidden, 0.0, out=hidden)
        out: FloatArray = hidden @ third
        out += third_bias
        spread: FloatArray = np.exp(np.minimum(out[:, -1], 5.0))
        return out[:, :-1], spread

    def folded(
        self, condition: tuple[FloatArray, FloatArray], state: tuple[FloatArray, FloatArray]
    ) -> Student:
        """Returns the same student for raw conditions and raw states, with the standardisation in its weights.

        Args:
            condition: Mean and standard deviation of conditions, ``(c,)`` each.
            state: Mean and standard deviation of states, ``(d,)`` each.
        """
        first, first_bias, second, second_bias, third, third_bias = self._weights
        entered = first / condition[1][:, None]
        left, left_bias = third.copy(), third_bias.copy()
        left[:, :-1] *= state[1]
        left_bias[:-1] = third_bias[:-1] * state[1] + state[0]
        return Student([entered, first_bias - condition[0] @ entered, second, second_bias, left, left_bias])

    def tensors(self) -> Tensors:
        """Returns the weights by name."""
        return dict(zip(_NAMES, self._weights, strict=True))

    @classmethod
    def from_tensors(cls, tensors: Tensors) -> Student:
        """Restores what :meth:`tensors` returned.

        Raises:
            KeyError: If one is missing.
        """
        return cls([tensors[name] for name in _NAMES])


def distil(
    teacher: Teacher, conditions: FloatArray, config: DistillationConfig, seed: int
) -> tuple[Student, float]:
    """Trains a student on a teacher's answers.

    Args:
        teacher: The model with its sampler.
        conditions: ``float32 (n, c)``, standardised conditions to ask about.
        config: How to train.
        seed: Seed of weights and batches.

    Returns:
        The student, and the mean cosine between its states and the teacher's on the last tenth of the conditions,
        which it was not trained on.
    """
    states, spreads = teacher(torch.from_numpy(conditions))
    inputs, held = torch.from_numpy(conditions), max(len(conditions) // 10, 1)
    generator = torch.Generator().manual_seed(seed)
    net = _net(conditions.shape[1], states.shape[1] + 1, config.width, generator)
    spreads = spreads.clamp(min=_LEAST_SPREAD).log()
    optimiser = torch.optim.Adam(net.parameters(), config.learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    for _ in range(config.steps):
        rows = torch.randint(len(inputs) - held, (config.batch_size,), generator=generator)
        known = torch.randint(len(spreads), (config.batch_size // 4,), generator=generator)
        loss = nn.functional.mse_loss(net(inputs[rows])[:, :-1], states[rows])
        loss = loss + _SPREAD_WEIGHT * nn.functional.mse_loss(net(inputs[known])[:, -1], spreads[known])
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        decay.step()
    student = Student(_weights(net))
    ours, _ = student(conditions[-held:])
    return student, _mean_cosine(ours, states[-held:].numpy())


def _net(inputs: int, outputs: int, width: int, generator: torch.Generator) -> nn.Sequential:
    net = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return net


def _weights(net: nn.Sequential) -> list[FloatArray]:
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    found: list[FloatArray] = []
    for layer in layers:
        found += [layer.weight.detach().numpy().T, layer.bias.detach().numpy()]
    return found


def _mean_cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float((np.einsum("nd,nd->n", a, b) / np.maximum(norms, 1e-9)).mean())
