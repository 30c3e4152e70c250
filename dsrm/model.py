"""DSRM: the diffusion model that purifies observed states (paper 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from dsrm.denoiser import Denoiser, DenoiserConfig, Standardiser
from dsrm.diffusion import NoiseSchedule, Sampler, SamplerConfig, ScheduleKind
from dsrm.purifier import Binding, WorldKey, load_purifier, save_purifier, state_space
from dsrm.windows import DEFAULT_CLIP_QUANTILE, DEFAULT_EXPONENT
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_MIN_SPREAD = 1e-3
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
    spreads = spreads.clamp(min=_MIN_SPREAD).log()
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


Conditioning = Literal["rich", "state"]
Output = Literal["state", "state+spread"]

SPREAD_SAMPLES = 8
_MAX_SPREAD = 10.0


@dataclass(frozen=True)
class DSRMConfig:
    """What a trained DSRM is.

    Attributes:
        mode: How its targets were made: ``"profile"``, ``"paper"``, ``"unbiased"`` or ``"paired"``.
        schedule: Kind of noise schedule.
        levels: Noise levels ``K``.
        denoiser: Shape of the net.
        conditioning: ``"rich"`` or, as in the paper, the observed ``"state"`` alone.
        exponent: Of the inverse-propensity weights in the condition.
        clip_quantile: Where those weights are cut off.
        sampler: How states are drawn; None asks the one-evaluation student.
        output: ``"state"``, or ``"state+spread"`` to append the posterior's spread as a further component.
    """

    mode: str
    schedule: ScheduleKind
    levels: int
    denoiser: DenoiserConfig
    conditioning: Conditioning = "rich"
    exponent: float = DEFAULT_EXPONENT
    clip_quantile: float = DEFAULT_CLIP_QUANTILE
    sampler: SamplerConfig | None = None
    output: Output = "state"

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {self.output!r}")

    def as_dict(self) -> dict[str, Any]:
        """Returns a JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DSRMConfig:
        """Restores what :meth:`as_dict` returned."""
        sampler = content["sampler"]
        return cls(
            **{
                **content,
                "denoiser": DenoiserConfig(**content["denoiser"]),
                "sampler": None if sampler is None else SamplerConfig(**sampler),
            }
        )


class DSRM:
    """A conditional diffusion model over clean states, with a distilled student for use inside environments.

    Made by :func:`dsrm.pretrain`; reads only the observed state and the window behind it.

    Args:
        config: What it is.
        key: The world that it was trained on.
        denoiser: The trained net (moving average of its weights).
        condition: Standardisation of conditions.
        state: Standardisation of states.
        student: The distillate.
        report: Training curve, probe results and provenance, JSON-able.
    """

    kind = "diffusion"

    def __init__(
        self,
        config: DSRMConfig,
        key: WorldKey,
        denoiser: Denoiser,
        condition: Standardiser,
        state: Standardiser,
        student: Student | None,
        report: Mapping[str, Any],
    ) -> None:
        if student is None and config.sampler is None:
            raise ValueError("a DSRM without a student needs a sampler")
        self.config = config
        self.key = key
        self.report = dict(report)
        self.schedule = NoiseSchedule.make(config.schedule, config.levels)
        self._denoiser = denoiser.eval()
        self._condition = condition
        self._state = state
        self._student = student
        self._binding = Binding(key, config.exponent, config.clip_quantile)
        self._folded = (
            None
            if student is None
            else student.folded((condition.mean, condition.deviation), (state.mean, state.deviation))
        )
        self._sampler = None if config.sampler is None else Sampler(denoiser, self.schedule, config.sampler)
        reach = 5.0 if config.sampler is None else config.sampler.clip
        self._low = state.mean - reach * state.deviation
        self._high = state.mean + reach * state.deviation

    def with_sampler(self, sampler: SamplerConfig | None) -> DSRM:
        """Returns the same model with another sampler; None takes the student."""
        return self._with(replace(self.config, sampler=sampler))

    def with_output(self, output: Output) -> DSRM:
        """Returns the same model with or without the spread as a further component."""
        return self._with(replace(self.config, output=output))

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self._binding.bind(world)
        bound = float(max(np.abs(self._low).max(), np.abs(self._high).max()))
        if self.config.output == "state+spread":
            return state_space(max(bound, _MAX_SPREAD), world.dimension + 1)
        return state_space(bound, world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`; with ``output="state+spread"`` one more component."""
        conditions = self.conditions(states, window)
        if self.config.output == "state":
            return self._states(conditions, states)
        purified, spread = self._states_and_spread(conditions, states)
        return np.concatenate([purified, np.minimum(spread, _MAX_SPREAD)[:, None]], axis=1)

    def conditions(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions of states and windows, as they are (not standardised)."""
        return states if self.config.conditioning == "state" else self._binding.builder.build(states, window)

    def posterior(
        self, states: FloatArray, window: HistoryWindow, samples: int = SPREAD_SAMPLES
    ) -> FloatArray:
        """Returns ``float32 (samples, B, d)``, plausible clean states, drawn by the diffusion model from noise."""
        drawn = self._drawn(self.conditions(states, window), states, samples)
        return np.stack([self._state.back(sample) for sample in drawn])

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {
            "kind": self.kind,
            "config": self.config.as_dict(),
            "world": self.key.as_dict(),
            "report": self.report,
        }

    def save(self, path: str | Path) -> None:
        """Writes the model to one safetensors file, atomically."""
        save_purifier(self, path)

    @classmethod
    def load(cls, path: str | Path) -> DSRM:
        """Reads a model; nothing in the file is executed.

        Raises:
            ArtifactError: If the file is missing, damaged or foreign, or holds another kind of purifier.
        """
        purifier = load_purifier(path)
        if not isinstance(purifier, DSRM):
            raise ArtifactError(
                f"{path} holds a purifier of kind '{purifier.describe()['kind']}', not a diffusion model; "
                "use dsrm.load_purifier"
            )
        return purifier

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        tensors: Tensors = {
            f"net.{name}": value.numpy() for name, value in self._denoiser.state_dict().items()
        }
        tensors |= self._condition.tensors("condition") | self._state.tensors("state")
        if self._student is not None:
            tensors |= self._student.tensors()
        return tensors, {
            "config": self.config.as_dict(),
            "world": self.key.as_dict(),
            "report": self.report,
            "student": self._student is not None,
        }

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> DSRM:
        """Restores what :meth:`parts` returned."""
        config = DSRMConfig.from_dict(settings["config"])
        denoiser = Denoiser(config.denoiser, NoiseSchedule.make(config.schedule, config.levels))
        weights = {
            name.removeprefix("net."): torch.from_numpy(value)
            for name, value in tensors.items()
            if name.startswith("net.")
        }
        denoiser.load_state_dict(weights)
        return cls(
            config,
            WorldKey.from_dict(settings["world"]),
            denoiser,
            Standardiser.from_tensors(tensors, "condition"),
            Standardiser.from_tensors(tensors, "state"),
            Student.from_tensors(tensors) if settings["student"] else None,
            settings["report"],
        )

    def _with(self, config: DSRMConfig) -> DSRM:
        other = DSRM(
            config, self.key, self._denoiser, self._condition, self._state, self._student, self.report
        )
        other._binding = self._binding
        return other

    def _states(self, conditions: FloatArray, states: FloatArray) -> FloatArray:
        if self._sampler is None:
            assert self._folded is not None
            purified, _ = self._folded(conditions)
        else:
            purified = self._state.back(self._sampler.sample(*self._standardised(conditions, states)).numpy())
        return np.clip(purified, self._low, self._high)

    def _states_and_spread(self, conditions: FloatArray, states: FloatArray) -> tuple[FloatArray, FloatArray]:
        if self._sampler is None:
            assert self._folded is not None
            purified, spread = self._folded(conditions)
            return np.clip(purified, self._low, self._high), spread
        drawn = self._drawn(conditions, states, SPREAD_SAMPLES)
        return self._states(conditions, states), root_mean_square_spread(drawn)

    def _drawn(self, conditions: FloatArray, states: FloatArray, samples: int) -> FloatArray:
        """Returns samples from noise, ``float32 (samples, B, d)``, standardised."""
        config = SamplerConfig(steps=min(10, self.config.levels), eta=1.0, start="noise", samples=samples)
        sampler = Sampler(self._denoiser, self.schedule, config)
        drawn: FloatArray = sampler.samples(*self._standardised(conditions, states)).numpy()
        return drawn

    def _standardised(self, conditions: FloatArray, states: FloatArray) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(self._condition.to(conditions)), torch.from_numpy(self._state.to(states))


def root_mean_square_spread(drawn: FloatArray) -> FloatArray:
    """Returns the root mean square over components of the samples' standard deviation, ``float32 (B,)``.

    Args:
        drawn: ``float32 (samples, B, d)``.
    """
    spread: FloatArray = np.sqrt(drawn.var(axis=0, ddof=1).mean(axis=1))
    return spread
