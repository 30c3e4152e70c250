"""DSRM: the diffusion model that purifies observed states (paper 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from dsrm.condition import DEFAULT_CLIP_QUANTILE, DEFAULT_EXPONENT
from dsrm.denoiser import Denoiser, DenoiserConfig, TrainedDenoiser
from dsrm.diffusion import NoiseSchedule, Sampler, SamplerConfig, ScheduleKind, posterior_spread
from dsrm.distillation import Student
from dsrm.purifier import BasePurifier, Binding, WorldKey, load_purifier, save_purifier, state_space
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import Tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

Conditioning = Literal["rich", "state"]
Output = Literal["state", "state+spread"]

SPREAD_SAMPLES = 8
_MAX_SPREAD = 10.0
_STUDENT_CLIP = 5.0


@dataclass(frozen=True)
class DSRMConfig:
    """What a trained DSRM is.

    Attributes:
        mode: How its targets were made: ``"profile"``, ``"paper"``, ``"unbiased"`` or ``"paired"``.
        schedule: Kind of noise schedule.
        levels: Noise levels ``K``.
        denoiser: Shape of the network.
        conditioning: ``"rich"`` (:class:`~dsrm.condition.ConditionBuilder`) or, as in the paper, the observed
            ``"state"`` alone.
        exponent: Of the inverse-propensity weights in the condition.
        clip_quantile: Where those weights are cut off.
        sampler: How states are drawn; None evaluates the student once.
        output: ``"state"``, or ``"state+spread"`` to append the posterior's spread as one more component.
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

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DSRMConfig:
        """Restores what ``dataclasses.asdict`` returned."""
        sampler = content["sampler"]
        return cls(
            **{
                **content,
                "denoiser": DenoiserConfig(**content["denoiser"]),
                "sampler": None if sampler is None else SamplerConfig(**sampler),
            }
        )


class DSRM(BasePurifier):
    """A conditional diffusion model over clean states, with a distilled student for use inside environments.

    Made by :func:`dsrm.pretrain`; reads only the observed state and the window behind it.

    Args:
        config: What it is.
        key: The world that it was trained on.
        denoiser: The trained network and its standardisation.
        student: The distilled student, or None.
        report: Training losses and provenance, JSON-able.

    Raises:
        ValueError: If there is neither a student nor a sampler.
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
        self.config = config
        self.key = key
        self.report = dict(report)
        self._denoiser = denoiser
        self._student = student
        self._binding = Binding(key, config.exponent, config.clip_quantile)
        self._sampler: Sampler | None = None
        self._raw_student: Student | None = None
        clip = _STUDENT_CLIP
        if config.sampler is not None:
            self._sampler = self._make_sampler(config.sampler)
            clip = config.sampler.clip
        elif student is not None:
            self._raw_student = student.folded(denoiser.condition, denoiser.state)
        else:
            raise ValueError("a DSRM without a student needs a sampler")
        self._low, self._high = denoiser.state.interval(clip)

    def with_sampler(self, sampler: SamplerConfig | None) -> DSRM:
        """Returns the same model with another sampler; None takes the student."""
        return self._with(replace(self.config, sampler=sampler))

    def with_output(self, output: Output) -> DSRM:
        """Returns the same model with or without the spread as one more component."""
        return self._with(replace(self.config, output=output))

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self._binding.bind(world)
        bound = float(np.maximum(np.abs(self._low), np.abs(self._high)).max())
        if self.config.output == "state+spread":
            return state_space(max(bound, _MAX_SPREAD), world.dimension + 1)
        return state_space(bound, world.dimension)

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
        if spread is None:
            spread = posterior_spread(self._draw_posterior(conditions, states, SPREAD_SAMPLES))
        return np.concatenate([purified, np.minimum(spread, _MAX_SPREAD)[:, None]], axis=1)

    def conditions(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """Returns the conditions of states and windows, ``float32 (B, c)``, not standardised."""
        return states if self.config.conditioning == "state" else self._binding.builder.build(states, window)

    def posterior(
        self, states: FloatArray, window: HistoryWindow, samples: int = SPREAD_SAMPLES
    ) -> FloatArray:
        """Returns plausible clean states, drawn by the diffusion model from noise.

        Args:
            states: ``float32 (B, d)``, observed states ``s~``.
            window: The windows behind them.
            samples: Number of draws.

        Returns:
            ``float32 (samples, B, d)``.
        """
        drawn = self._draw_posterior(self.conditions(states, window), states, samples)
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

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {"config": asdict(self.config), "world": self.key.as_dict(), "report": self.report}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return self._denoiser.tensors() | ({} if self._student is None else self._student.tensors())

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> DSRM:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        config = DSRMConfig.from_dict(settings["config"])
        network = Denoiser(config.denoiser, NoiseSchedule.make(config.schedule, config.levels))
        denoiser = TrainedDenoiser.restore(network, tensors)
        key = WorldKey.from_dict(settings["world"])
        return cls(config, key, denoiser, Student.restore(tensors), settings["report"])

    def _with(self, config: DSRMConfig) -> DSRM:
        other = DSRM(config, self.key, self._denoiser, self._student, self.report)
        other._binding = self._binding
        return other

    def _draw_posterior(self, conditions: FloatArray, states: FloatArray, samples: int) -> FloatArray:
        """Returns samples from noise, ``float32 (samples, B, d)``, standardised."""
        sampler = self._make_sampler(SamplerConfig.posterior(self.config.levels, samples))
        drawn: FloatArray = sampler.samples(*self._standardise(conditions, states)).numpy()
        return drawn

    def _make_sampler(self, config: SamplerConfig) -> Sampler:
        schedule = NoiseSchedule.make(self.config.schedule, self.config.levels)
        return Sampler(self._denoiser.network, schedule, config)

    def _standardise(self, conditions: FloatArray, states: FloatArray) -> tuple[Tensor, Tensor]:
        return (
            torch.from_numpy(self._denoiser.condition.transform(conditions)),
            torch.from_numpy(self._denoiser.state.transform(states)),
        )
