"""DSRM: the diffusion model that purifies observed states (paper 4.2), and its student for one fast evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from dsrm.diffusion import (
    Denoiser,
    DenoiserConfig,
    NoiseSchedule,
    Sampler,
    SamplerConfig,
    ScheduleKind,
    posterior_spread,
)
from dsrm.purifier import WorldKey, WorldPurifier, load_purifier, save_purifier, state_space
from kuaifair_env.checks import need_number, need_whole
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Tensors, parse_as, take_tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.response.training import Trainer, cosine_decay, load_network, network_tensors
from kuaifair_env.world import World

Conditioning = Literal["rich", "state"]
Output = Literal["state", "state+spread"]

SPREAD_SAMPLES = 8
_MIN_DEVIATION = 1e-4
_MAX_SPREAD = 10.0
_STUDENT_CLIP, _CONDITION_CLIP = 5.0, 5.0
_CLIP = 6.0
_MIN_SPREAD = 1e-3
_MAX_LOG_SPREAD = 5.0
_SPREAD_WEIGHT = 0.1
_VALIDATION_SHARE = 10
_SPREAD_SHARE = 4
"""A batch has a spread for every fourth state."""
_NAMES = tuple(f"student.{name}.{layer}" for layer in range(3) for name in ("weight", "bias"))


@dataclass(frozen=True)
class Standardiser:
    """Takes vectors to mean 0 and variance 1, and back; ``mean`` and ``deviation`` are ``float32 (n,)``."""

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

    def clipped(self, rows: FloatArray) -> FloatArray:
        """Returns standardised rows, at most six standard deviations from the mean."""
        standardised = self.transform(rows)
        np.maximum(standardised, -_CLIP, out=standardised)
        return np.minimum(standardised, _CLIP, out=standardised)

    def inverse_transform(self, rows: FloatArray) -> FloatArray:
        """Undoes :meth:`transform`."""
        return rows * self.deviation + self.mean


@dataclass(frozen=True)
class TrainedDenoiser:
    """A trained network, and how the conditions that it reads and the states that it gives are standardised."""

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
        """Fills a network of the same shape with what :meth:`tensors` returned."""
        load_network(network, tensors)
        config, names = network.config, ("mean", "deviation")
        take_tensors(tensors, {f"condition.{name}": (config.condition_size,) for name in names})
        take_tensors(tensors, {f"state.{name}": (config.state_size,) for name in names})
        return cls(
            network.eval(),
            Standardiser(tensors["condition.mean"], tensors["condition.deviation"]),
            Standardiser(tensors["state.mean"], tensors["state.deviation"]),
        )


@dataclass(frozen=True)
class DSRMConfig:
    """What a trained DSRM is.

    Attributes:
        mode: How its targets were made: ``"profile"``, ``"paper"``, ``"unbiased"`` or ``"paired"``.
        schedule: Kind of noise schedule.
        levels: Noise levels ``K``.
        denoiser: Shape of the network.
        conditioning: ``"rich"`` (:class:`~dsrm.ConditionBuilder`) or, as in the paper, the observed
            ``"state"`` alone.
        sampler: How states are drawn; None evaluates the student once.
        output: ``"state"``, or ``"state+spread"`` to append the posterior's spread as one more component.
    """

    mode: str
    schedule: ScheduleKind
    levels: int
    denoiser: DenoiserConfig
    conditioning: Conditioning = "rich"
    sampler: SamplerConfig | None = None
    output: Output = "state"

    def __post_init__(self) -> None:
        if self.output not in get_args(Output):
            raise ValueError(f"output must be one of {get_args(Output)}, got {self.output!r}")
        need_whole(1, levels=self.levels)


class DenoiserPurifier(WorldPurifier):
    """Base class of purifiers that a trained network makes; input and output are clipped to what it was trained on.

    Args:
        config: What it is.
        key: The world that it was trained on.
        denoiser: The trained network and its standardisation.
        report: Training losses and provenance, JSON-able.
        clip: States are clipped to this many standard deviations of the training states.
    """

    def __init__(
        self, config: Any, key: WorldKey, denoiser: TrainedDenoiser, report: Mapping[str, Any], clip: float
    ) -> None:
        super().__init__(key, report)
        self.key: WorldKey = key
        self.config = config
        self._denoiser = denoiser
        self._low = denoiser.state.mean - clip * denoiser.state.deviation
        self._high = denoiser.state.mean + clip * denoiser.state.deviation
        self._condition_low = denoiser.condition.mean - _CONDITION_CLIP * denoiser.condition.deviation
        self._condition_high = denoiser.condition.mean + _CONDITION_CLIP * denoiser.condition.deviation

    def rich_conditions(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions of states and windows, ``float32 (B, c)``, not standardised.

        They are clipped to what training knew: of a session longer than any there a network would make anything.
        """
        return np.clip(self.builder.build(states, window), self._condition_low, self._condition_high)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        super().bind(world)
        return state_space(float(np.maximum(np.abs(self._low), np.abs(self._high)).max()), world.dimension)

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return self._denoiser.tensors()


class DSRM(DenoiserPurifier):
    """A conditional diffusion model over clean states, with a distilled student for use inside environments.

    Made by :func:`dsrm.pretrain`; reads only the observed state and the window behind it.

    Args:
        config: What it is.
        key: The world that it was trained on.
        denoiser: The trained network and its standardisation.
        student: The distilled student, or None.
        report: Training losses and provenance, JSON-able.

    Raises:
        ValueError: If there is neither a student nor a sampler, or the sampler does not fit the noise schedule.
    """

    kind = "diffusion"

    def __init__(
        self,
        config: DSRMConfig,
        key: WorldKey,
        denoiser: TrainedDenoiser,
        student: Student | None,
        report: Mapping[str, Any],
    ) -> None:
        clip = _STUDENT_CLIP if config.sampler is None else config.sampler.clip
        super().__init__(config, key, denoiser, report, clip)
        self._student = student
        self._sampler: Sampler | None = None
        self._spread_sampler: Sampler | None = None
        self._raw_student: Student | None = None
        if config.sampler is not None:
            self._sampler = self._make_sampler(config.sampler)
            if config.output == "state+spread":
                self._spread_sampler = self._posterior_sampler(SPREAD_SAMPLES)
        elif student is not None:
            self._raw_student = student.folded(denoiser.condition, denoiser.state)
        else:
            raise ValueError("a DSRM without a student needs a sampler")

    def with_sampler(self, sampler: SamplerConfig | None) -> DSRM:
        """Returns the same model with another sampler; None takes the student."""
        return self._with(replace(self.config, sampler=sampler))

    def with_output(self, output: Output) -> DSRM:
        """Returns the same model with or without the spread as one more component."""
        return self._with(replace(self.config, output=output))

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        space = super().bind(world)
        if self.config.output == "state":
            return space
        return state_space(max(float(space.high.max()), _MAX_SPREAD), world.dimension + 1)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`; with ``output="state+spread"`` one more component."""
        conditions = self.conditions(states, window)
        if self._raw_student is not None:
            purified, spread = self._raw_student(conditions)
        else:
            assert self._sampler is not None
            drawn = self._sampler.sample(*self._standardise(conditions, states)).numpy()
            purified, spread = self._denoiser.state.inverse_transform(drawn), None
        purified = np.clip(purified, self._low, self._high)
        if self.config.output == "state":
            return purified
        if self._spread_sampler is not None:
            spread = posterior_spread(self._spread_sampler.samples(*self._standardise(conditions, states)).numpy())
        assert spread is not None
        return np.concatenate([purified, np.minimum(spread, _MAX_SPREAD)[:, None]], axis=1)

    def conditions(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions of states and windows, ``float32 (B, c)``, not standardised."""
        return states if self.config.conditioning == "state" else self.rich_conditions(states, window)

    def posterior(self, states: FloatArray, window: HistoryWindow, samples: int = SPREAD_SAMPLES) -> FloatArray:
        """Returns plausible clean states, ``float32 (samples, B, d)``, drawn by the diffusion model from noise.

        Args:
            states: ``float32 (B, d)``, observed states ``s~``.
            window: The windows behind them.
            samples: Number of draws.

        Raises:
            ValueError: If the noisiest level keeps much of the state, as that of the ``paper`` mode does.
        """
        conditions = self.conditions(states, window)
        drawn = self._posterior_sampler(samples).samples(*self._standardise(conditions, states)).numpy()
        return self._denoiser.state.inverse_transform(drawn)

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

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return super().tensors() | ({} if self._student is None else self._student.tensors())

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> DSRM:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        config = parse_as(DSRMConfig, settings["config"])
        network = Denoiser(config.denoiser, NoiseSchedule.make(config.schedule, config.levels))
        denoiser = TrainedDenoiser.restore(network, tensors)
        key = parse_as(WorldKey, settings["world"])
        return cls(config, key, denoiser, Student.restore(tensors), parse_as(dict[str, Any], settings["report"]))

    def _with(self, config: DSRMConfig) -> DSRM:
        other = DSRM(config, self.key, self._denoiser, self._student, self.report)
        other._builder, other._ids = self._builder, self._ids
        return other

    def _posterior_sampler(self, samples: int) -> Sampler:
        return self._make_sampler(SamplerConfig.posterior(self.config.levels, samples))

    def _make_sampler(self, config: SamplerConfig) -> Sampler:
        schedule = NoiseSchedule.make(self.config.schedule, self.config.levels)
        return Sampler(self._denoiser.network, schedule, config)

    def _standardise(self, conditions: FloatArray, states: FloatArray) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(self._denoiser.condition.transform(conditions)),
            torch.from_numpy(self._denoiser.state.transform(states)),
        )


@dataclass(frozen=True)
class DistillationConfig:
    """How a student is trained.

    Attributes:
        conditions: Number of conditions that the teacher is asked for; a tenth of them is not trained on.
        width: Width of its two hidden layers.
        steps: Optimizer steps.
        batch_size: Conditions of a step.
        learning_rate: First learning rate of Adam; it falls to zero along a cosine.
    """

    conditions: int = 30_000
    width: int = 256
    steps: int = 3_000
    batch_size: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        need_whole(2, conditions=self.conditions)
        need_whole(1, width=self.width, steps=self.steps)
        need_whole(_SPREAD_SHARE, batch_size=self.batch_size)
        need_number("(0, inf)", learning_rate=self.learning_rate)


def perceptron_outputs(weights: Sequence[FloatArray], inputs: FloatArray) -> FloatArray:
    """Returns the outputs of a multilayer perceptron with rectified linear units, ``float32 (B, n)``.

    Args:
        weights: Weight ``(inputs, outputs)`` and bias of each layer, ``float32``.
        inputs: ``float32 (B, c)``.
    """
    *hidden, (last, last_bias) = zip(weights[::2], weights[1::2], strict=True)
    output = inputs
    for weight, bias in hidden:
        output = output @ weight
        output += bias
        np.maximum(output, 0.0, out=output)
    output = output @ last
    output += last_bias
    return output


class Student:
    """A multilayer perceptron in numpy: ``c -> (s^, spread)`` with rectified linear units.

    Rows of a batch do not influence each other beyond the rounding of the matrix product (about 1e-6).

    Args:
        weights: Weight and bias of each of three layers, ``float32``; the last layer has ``d + 1`` outputs.

    Raises:
        ValueError: If there are more or fewer weights, or a bias does not fit its weight.
    """

    def __init__(self, weights: list[FloatArray]) -> None:
        if len(weights) != len(_NAMES):
            raise ValueError(f"a student has {len(_NAMES)} weights, got {len(weights)}")
        if any(bias.shape != weight.shape[1:] for weight, bias in zip(weights[::2], weights[1::2], strict=True)):
            raise ValueError("the biases of a student are as long as its weights are wide")
        self._weights = [np.ascontiguousarray(weight, np.float32) for weight in weights]

    def __call__(self, condition: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Returns states ``float32 (B, d)`` and spreads ``(B,)`` for conditions ``float32 (B, c)``."""
        output = perceptron_outputs(self._weights, condition)
        spread: FloatArray = np.exp(np.minimum(output[:, -1], _MAX_LOG_SPREAD))
        return output[:, :-1], spread

    def folded(self, condition: Standardiser, state: Standardiser) -> Student:
        """Returns the same student for conditions and states that are not standardised."""
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
        """Returns the student whose :meth:`tensors` are among the given ones, None where there are none of them."""
        return cls([tensors[name] for name in _NAMES]) if any(name in tensors for name in _NAMES) else None


def distil(
    conditions: FloatArray,
    states: FloatArray,
    spreads: FloatArray,
    config: DistillationConfig,
    seed: int,
    progress: bool = False,
) -> tuple[Student, float]:
    """Trains a student to give the states and spreads of a teacher.

    Args:
        conditions: ``float32 (n, c)``, standardised conditions to learn from.
        states: ``float32 (n, d)``, what the teacher makes of them.
        spreads: ``float32 (m,)``, the teacher's spreads for the first ``m <= n`` of them.
        config: How to train.
        seed: Seed of weights and batches.
        progress: Whether to show a progress bar.

    Returns:
        The student, and the mean cosine between its states and the teacher's on the last tenth of the conditions,
        which it was not trained on.
    """
    from tqdm import tqdm

    inputs, targets = torch.from_numpy(conditions), torch.from_numpy(states)
    log_spreads = torch.from_numpy(spreads).clamp(min=_MIN_SPREAD).log()
    validation_rows = max(len(conditions) // _VALIDATION_SHARE, 1)
    generator = torch.Generator().manual_seed(seed)
    width = config.width
    layers = [nn.Linear(conditions.shape[1], width), nn.Linear(width, width), nn.Linear(width, states.shape[1] + 1)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        # The spread starts at its mean, from which it differs little.
        layers[-1].weight[-1] = 0.0
        layers[-1].bias[-1] = log_spreads.mean()
    network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def batches(_: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in tqdm(range(config.steps), desc="distil the student", disable=not progress):
            yield (
                torch.randint(len(inputs) - validation_rows, (config.batch_size,), generator=generator),
                torch.randint(len(log_spreads), (config.batch_size // _SPREAD_SHARE,), generator=generator),
            )

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        rows, spread_rows = batch
        state_loss = nn.functional.mse_loss(network(inputs[rows])[:, :-1], targets[rows])
        spread_loss = nn.functional.mse_loss(network(inputs[spread_rows])[:, -1], log_spreads[spread_rows])
        return state_loss + _SPREAD_WEIGHT * spread_loss

    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    trainer = Trainer(network, optimizer, schedule=cosine_decay(config.steps))
    trainer.fit(batches, loss, rounds=1)
    student = Student(
        [array for layer in layers for array in (layer.weight.detach().numpy().T, layer.bias.detach().numpy())]
    )
    student_states, _ = student(conditions[-validation_rows:])
    cosines = np.einsum("nd,nd->n", unit_rows(student_states), unit_rows(states[-validation_rows:]))
    return student, float(cosines.mean())
