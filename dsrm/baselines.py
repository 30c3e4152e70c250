"""Purifiers that a diffusion model has to beat: none, reweighting, noise, one linear direction, regression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule
from dsrm.model import DenoiserPurifier, TrainedDenoiser
from dsrm.purifier import BasePurifier, WorldKey, WorldPurifier, observed_bound, state_space
from kuaifair_env import seeding
from kuaifair_env.checks import need_number, need_seed
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors, parse_as, take_tensors
from kuaifair_env.observations import StateObserver
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_NOISE_CLIP = 6.0
_RIDGE = 1e-3
_REGRESSION_CLIP = 5.0


class IdentityPurifier(BasePurifier):
    """Leaves states as they are; whatever it seems to gain is chance."""

    kind = "identity"

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`; fits any world. The states stay observed ones."""
        return StateObserver(world).space

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return states


class IPSPurifier(WorldPurifier):
    """Takes the inverse-propensity mean of the clicked items: rare items count more, nothing is learned."""

    kind = "ips"

    def __init__(self) -> None:
        super().__init__(None, {})

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return self.builder.ips_state(window)

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {}


class NoisePurifier(BasePurifier):
    """Adds Gaussian noise of the size by which a purifier moves states: what it gains is regularisation.

    Args:
        scale: Root mean square of the noise in each component.
        seed: Seed; the noise of a state follows from the seed and the state's bytes.

    Raises:
        ValueError: If the scale is negative or not finite, or the seed not a whole number.
    """

    kind = "noise"

    def __init__(self, scale: float, seed: int = 0) -> None:
        need_number("[0, inf)", scale=scale)
        need_seed(seed)
        self._scale = float(scale)
        self._seed = int(seed)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`; fits any world."""
        return state_space(observed_bound(world) + _NOISE_CLIP * self._scale, world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        noise = seeding.row_normals(seeding.row_keys(states, self._seed), states.shape[1])
        np.clip(noise, -_NOISE_CLIP, _NOISE_CLIP, out=noise)
        return states + np.float32(self._scale) * noise

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {"scale": self._scale, "seed": self._seed}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> NoisePurifier:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return cls(parse_as(float, settings["scale"]), parse_as(int, settings["seed"]))


class LinearDebiasPurifier(WorldPurifier):
    """Takes out of states the one direction from which popularity can best be read linearly.

    ``s^ = s~ - u u^T (s~ - m)`` with ``u`` the unit vector along the ridge regression of the mean log-popularity of a
    window's clicks on its state, and ``m`` the mean state. States without clicks stay zero.

    Args:
        key: The world that it was fitted on.
        direction: ``float32 (d,)``, ``u``.
        mean: ``float32 (d,)``, ``m``.
        report: Number of examples and quality of the fit, JSON-able.
    """

    kind = "linear_debias"

    def __init__(self, key: WorldKey, direction: FloatArray, mean: FloatArray, report: Mapping[str, Any]) -> None:
        super().__init__(key, report)
        self.key: WorldKey = key
        self._direction = np.asarray(direction, np.float32)
        self._mean = np.asarray(mean, np.float32)

    @classmethod
    def fit(cls, key: WorldKey, states: FloatArray, popularity: NDArray[Any]) -> LinearDebiasPurifier:
        """Finds the direction from ``(n, d)`` observed states and the mean log-popularity ``(n,)`` of their clicks."""
        from sklearn.linear_model import Ridge

        mean = states.mean(axis=0, dtype=np.float64)
        centred = states - mean
        # The penalty is a thousandth of the sum of squares of an average component.
        ridge = Ridge(_RIDGE * (centred**2).sum() / centred.shape[1])
        ridge.fit(centred, np.asarray(popularity, np.float64))
        direction = ridge.coef_ / max(float(np.linalg.norm(ridge.coef_)), 1e-12)
        report = {"examples": len(states), "popularity_r2": float(ridge.score(centred, popularity))}
        return cls(key, direction, mean, report)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        super().bind(world)
        # |s~ - m| does not grow when a direction is taken out, so |s^| <= |s~| + 2 |m|.
        bound = observed_bound(world) + 2.0 * float(np.linalg.norm(self._mean))
        return state_space(bound, world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        lengths = np.einsum("nd,d->n", states - self._mean, self._direction)
        lengths *= states.any(axis=1)
        return np.asarray(states - lengths[:, None] * self._direction)

    def settings(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {"report": self.report, "world": asdict(self.key)}

    def tensors(self) -> Tensors:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        return {"direction": self._direction, "mean": self._mean}

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> LinearDebiasPurifier:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        key = parse_as(WorldKey, settings["world"])
        take_tensors(tensors, dict.fromkeys(("direction", "mean"), (key.dimension,)))
        return cls(key, tensors["direction"], tensors["mean"], parse_as(dict[str, Any], settings["report"]))


@dataclass(frozen=True)
class RegressionConfig:
    """What a regression purifier is: how its targets were made, and the shape of the network."""

    target: str
    denoiser: DenoiserConfig


def regression_network(config: DenoiserConfig) -> Denoiser:
    """Returns a network of the diffusion model's own architecture and size, with a single level."""
    return Denoiser(config, NoiseSchedule.make("cosine", 1))


def regress(network: Denoiser, condition: torch.Tensor) -> torch.Tensor:
    """Returns the network's states for standardised conditions, ``(B, d)``; there is no noisy state."""
    noisy = torch.zeros(len(condition), network.config.state_size)
    level = torch.ones(len(condition), dtype=torch.int64)
    states: torch.Tensor = network(noisy, level, network.embed(condition))
    return states


class RegressionPurifier(DenoiserPurifier):
    """Predicts the clean state from the condition by least squares, with a trained :func:`regression_network`.

    For the arguments see :class:`~dsrm.model.DenoiserPurifier`.
    """

    kind = "regression"

    def __init__(
        self, config: RegressionConfig, key: WorldKey, denoiser: TrainedDenoiser, report: Mapping[str, Any]
    ) -> None:
        super().__init__(config, key, denoiser, report, _REGRESSION_CLIP)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        conditions = self._denoiser.condition.transform(self.rich_conditions(states, window))
        with torch.inference_mode():
            predicted = regress(self._denoiser.network, torch.from_numpy(conditions)).numpy()
        return np.clip(self._denoiser.state.inverse_transform(predicted), self._low, self._high)

    @classmethod
    def restore(cls, tensors: Tensors, settings: Mapping[str, Any]) -> RegressionPurifier:
        """See :class:`~dsrm.purifier.BasePurifier`."""
        config = parse_as(RegressionConfig, settings["config"])
        denoiser = TrainedDenoiser.restore(regression_network(config.denoiser), tensors)
        key = parse_as(WorldKey, settings["world"])
        return cls(config, key, denoiser, parse_as(dict[str, Any], settings["report"]))
