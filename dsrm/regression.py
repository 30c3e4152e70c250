"""Plain regression to the same target: the control that a diffusion model has to beat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from dsrm.binding import Binding, WorldKey
from dsrm.condition import DEFAULT_CLIP_QUANTILE, DEFAULT_EXPONENT
from dsrm.denoiser import Denoiser, DenoiserConfig
from dsrm.purifier import state_space
from dsrm.schedule import NoiseSchedule
from dsrm.standardise import Standardiser
from kuaifair_env.artifacts import Tensors
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.worlds import World

_REACH = 5.0


@dataclass(frozen=True)
class RegressionConfig:
    """What a regression purifier is.

    Attributes:
        target: How its targets were made.
        denoiser: Shape of the net: that of the diffusion model, which is asked at one level with no noisy state.
        exponent: Of the inverse-propensity weights in the condition.
        clip_quantile: Where those weights are cut off.
    """

    target: str
    denoiser: DenoiserConfig
    exponent: float = DEFAULT_EXPONENT
    clip_quantile: float = DEFAULT_CLIP_QUANTILE


def regression_net(config: DenoiserConfig) -> Denoiser:
    """Returns a net of the diffusion model's own architecture and size, with a single level."""
    return Denoiser(config, NoiseSchedule.make("cosine", 1))


def answers(net: Denoiser, condition: torch.Tensor) -> torch.Tensor:
    """Returns the net's answers to standardised conditions, ``(B, d)``."""
    nothing = torch.zeros(len(condition), net.config.state_size)
    level = torch.ones(len(condition), dtype=torch.int64)
    answered: torch.Tensor = net(nothing, level, net.embed(condition))
    return answered


class RegressionPurifier:
    """Predicts the clean state from the condition by least squares.

    Args:
        config: What it is.
        key: The world that it was trained on.
        net: From :func:`regression_net`, trained.
        condition: Standardisation of conditions.
        state: Standardisation of states.
        report: Training curve and provenance, JSON-able.
    """

    kind = "regression"

    def __init__(
        self,
        config: RegressionConfig,
        key: WorldKey,
        net: Denoiser,
        condition: Standardiser,
        state: Standardiser,
        report: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.key = key
        self.report = dict(report)
        self._net = net.eval()
        self._condition = condition
        self._state = state
        self._binding = Binding(key, config.exponent, config.clip_quantile)
        self._low = state.mean - _REACH * state.deviation
        self._high = state.mean + _REACH * state.deviation

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self._binding.bind(world)
        return state_space(float(max(np.abs(self._low).max(), np.abs(self._high).max())), world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        conditions = self._condition.to(self._binding.builder.build(states, window))
        with torch.inference_mode():
            answered = answers(self._net, torch.from_numpy(conditions)).numpy()
        return np.clip(self._state.back(answered), self._low, self._high)

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {
            "kind": self.kind,
            "config": asdict(self.config),
            "world": self.key.as_dict(),
            "report": self.report,
        }

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        tensors: Tensors = {f"net.{name}": value.numpy() for name, value in self._net.state_dict().items()}
        tensors |= self._condition.tensors("condition") | self._state.tensors("state")
        described = self.describe()
        return tensors, {name: described[name] for name in ("config", "world", "report")}

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> RegressionPurifier:
        """Restores what :meth:`parts` returned."""
        content = settings["config"]
        config = RegressionConfig(**{**content, "denoiser": DenoiserConfig(**content["denoiser"])})
        net = regression_net(config.denoiser)
        weights = {
            name.removeprefix("net."): torch.from_numpy(value)
            for name, value in tensors.items()
            if name.startswith("net.")
        }
        net.load_state_dict(weights)
        return cls(
            config,
            WorldKey.from_dict(settings["world"]),
            net,
            Standardiser.from_tensors(tensors, "condition"),
            Standardiser.from_tensors(tensors, "state"),
            settings["report"],
        )
