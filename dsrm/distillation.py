"""Distillation of a diffusion model into a small student that purifies by one evaluation, in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dsrm.denoiser import Standardiser
from dsrm.windows import unit_rows
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors
from kuaifair_env.response.training import Trainer, cosine_decay

_MIN_SPREAD = 1e-3
_MAX_LOG_SPREAD = 5.0
_SPREAD_WEIGHT = 0.1
_VALIDATION_SHARE = 10
_NAMES = tuple(f"student.{name}.{layer}" for layer in range(3) for name in ("weight", "bias"))


@dataclass(frozen=True)
class DistillationConfig:
    """How a student is trained.

    Attributes:
        conditions: Number of conditions that the teacher is asked for.
        width: Width of its two hidden layers.
        steps: Optimizer steps.
        batch_size: Conditions of a step.
        learning_rate: First learning rate of Adam; it falls to zero along a cosine.
    """

    conditions: int = 30_000
    width: int = 256
    steps: int = 5_000
    batch_size: int = 512
    learning_rate: float = 1e-3


class Teacher(Protocol):
    """Gives the states that a student learns."""

    def __call__(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Returns states ``(B, d)`` for standardised conditions, and spreads ``(n,)`` for the first ``n <= B``."""
        ...


class Student:
    """A multilayer perceptron in numpy: ``c -> (s^, spread)`` with rectified linear units.

    Rows of a batch do not influence each other beyond the rounding of the matrix product (about 1e-6).

    Args:
        weights: Weight and bias of each of three layers, ``float32``; the last layer has ``d + 1`` outputs.

    Raises:
        ValueError: If there are more or fewer weights.
    """

    def __init__(self, weights: list[FloatArray]) -> None:
        if len(weights) != len(_NAMES):
            raise ValueError(f"a student has {len(_NAMES)} weights, got {len(weights)}")
        self._weights = [np.ascontiguousarray(weight, np.float32) for weight in weights]

    def __call__(self, condition: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns states ``float32 (B, d)`` and spreads ``(B,)`` for conditions ``float32 (B, c)``."""
        first, first_bias, second, second_bias, third, third_bias = self._weights
        hidden: FloatArray = condition @ first
        hidden += first_bias
        np.maximum(hidden, 0.0, out=hidden)
        hidden = hidden @ second
        hidden += second_bias
        np.maximum(hidden, 0.0, out=hidden)
        output: FloatArray = hidden @ third
        output += third_bias
        spread: FloatArray = np.exp(np.minimum(output[:, -1], _MAX_LOG_SPREAD))
        return output[:, :-1], spread

    def folded(self, condition: Standardiser, state: Standardiser) -> Student:
        """Returns the same student for conditions and states that are not standardised.

        Args:
            condition: Standardisation of conditions.
            state: Standardisation of states.
        """
        first, first_bias, second, second_bias, third, third_bias = self._weights
        first = first / condition.deviation[:, None]
        third, third_bias = third.copy(), third_bias.copy()
        third[:, :-1] *= state.deviation
        third_bias[:-1] = third_bias[:-1] * state.deviation + state.mean
        return Student([first, first_bias - condition.mean @ first, second, second_bias, third, third_bias])

    def tensors(self) -> Tensors:
        """Returns the weights by name."""
        return dict(zip(_NAMES, self._weights, strict=True))

    @classmethod
    def restore(cls, tensors: Tensors) -> Student | None:
        """Returns the student whose :meth:`tensors` are among the given ones, None where there are none of them.

        Raises:
            KeyError: If only some are there.
        """
        return cls([tensors[name] for name in _NAMES]) if any(name in tensors for name in _NAMES) else None


def distil(
    teacher: Teacher, conditions: FloatArray, config: DistillationConfig, seed: int
) -> tuple[Student, float]:
    """Trains a student to give the states and spreads of a teacher.

    Args:
        teacher: The model with its sampler.
        conditions: ``float32 (n, c)``, standardised conditions to learn from.
        config: How to train.
        seed: Seed of weights and batches.

    Returns:
        The student, and the mean cosine between its states and the teacher's on the last tenth of the conditions,
        which it was not trained on.
    """
    inputs = torch.from_numpy(conditions)
    states, spreads = teacher(inputs)
    log_spreads = spreads.clamp(min=_MIN_SPREAD).log()
    validation_rows = max(len(conditions) // _VALIDATION_SHARE, 1)
    generator = torch.Generator().manual_seed(seed)
    network = _student_network(conditions.shape[1], states.shape[1] + 1, config.width, generator)

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(config.steps):
            yield (
                torch.randint(len(inputs) - validation_rows, (config.batch_size,), generator=generator),
                torch.randint(len(log_spreads), (config.batch_size // 4,), generator=generator),
            )

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, spread_rows = batch
        state_loss = nn.functional.mse_loss(network(inputs[rows])[:, :-1], states[rows])
        spread_loss = nn.functional.mse_loss(network(inputs[spread_rows])[:, -1], log_spreads[spread_rows])
        return state_loss + _SPREAD_WEIGHT * spread_loss

    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    trainer = Trainer(network, optimizer, schedule=cosine_decay(config.steps))
    student = _as_student(trainer.fit(batches, loss, rounds=1))
    student_states, _ = student(conditions[-validation_rows:])
    teacher_states = states[-validation_rows:].numpy()
    cosines = np.einsum("nd,nd->n", unit_rows(student_states), unit_rows(teacher_states))
    return student, float(cosines.mean())


def _student_network(inputs: int, outputs: int, width: int, generator: torch.Generator) -> nn.Sequential:
    network = nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)
    return network


def _as_student(network: nn.Sequential) -> Student:
    weights: list[FloatArray] = []
    for layer in network:
        if isinstance(layer, nn.Linear):
            weights += [layer.weight.detach().numpy().T, layer.bias.detach().numpy()]
    return Student(weights)
