"""Purifiers that a diffusion model has to beat: none, reweighting, one linear direction, noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from dsrm.denoiser import Denoiser, DenoiserConfig, Standardiser
from dsrm.diffusion import NoiseSchedule, row_keys, row_normals
from dsrm.purifier import Binding, WorldKey, state_space
from dsrm.windows import DEFAULT_CLIP_QUANTILE, DEFAULT_EXPONENT
from kuaifair_env.data.schema import FloatArray
from kuaifair_env.files import Tensors
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.world import World

_NOISE_REACH = 6.0


def raw_bound(world: World) -> float:
    """Returns a bound of an observed state's components: the largest norm of an embedding, or the encoder's."""
    if world.encoder is not None:
        return world.encoder.bound
    return float(max(np.linalg.norm(world.embeddings, axis=1).max(), 1e-6)) * 1.001


class IdentityPurifier:
    """Leaves states as they are; whatever it seems to gain is randomness."""

    kind = "identity"

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`; fits any world."""
        return state_space(raw_bound(world), world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return states

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {"kind": self.kind}

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        return {}, {}

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> IdentityPurifier:
        """Restores what :meth:`parts` returned."""
        return cls()


class IPSPurifier:
    """The inverse-propensity mean of the clicked items: rare items count more, nothing is learned.

    Args:
        exponent: See :func:`~dsrm.windows.propensity_weights`.
        clip_quantile: See :func:`~dsrm.windows.propensity_weights`.
    """

    kind = "ips"

    def __init__(
        self, exponent: float = DEFAULT_EXPONENT, clip_quantile: float = DEFAULT_CLIP_QUANTILE
    ) -> None:
        self._settings = {"exponent": exponent, "clip_quantile": clip_quantile}
        self._binding = Binding(None, exponent, clip_quantile)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`; fits any world."""
        self._binding.bind(world)
        return state_space(raw_bound(world), world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return self._binding.builder.ips_state(window)

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {"kind": self.kind} | self._settings

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        return {}, dict(self._settings)

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> IPSPurifier:
        """Restores what :meth:`parts` returned."""
        return cls(float(settings["exponent"]), float(settings["clip_quantile"]))


class NoisePurifier:
    """Adds Gaussian noise of the size by which a purifier moves states: what it gains is regularisation.

    Args:
        scale: Root mean square of the noise in each component.
        seed: Seed; the noise of a state follows from the seed and the state's bytes.

    Raises:
        ValueError: If the scale is negative or not finite.
    """

    kind = "noise"

    def __init__(self, scale: float, seed: int = 0) -> None:
        if not np.isfinite(scale) or scale < 0:
            raise ValueError(f"the scale of the noise must be a number of at least 0, got {scale}")
        self._scale = float(scale)
        self._seed = int(seed)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`; fits any world."""
        return state_space(raw_bound(world) + _NOISE_REACH * self._scale, world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        noise = row_normals(row_keys(states, self._seed), states.shape[1])
        np.clip(noise, -_NOISE_REACH, _NOISE_REACH, out=noise)
        return states + np.float32(self._scale) * noise

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {"kind": self.kind, "scale": self._scale, "seed": self._seed}

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        return {}, {"scale": self._scale, "seed": self._seed}

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> NoisePurifier:
        """Restores what :meth:`parts` returned."""
        return cls(float(settings["scale"]), int(settings["seed"]))


class LinearDebiasPurifier:
    """Takes out of states the one direction from which popularity can best be read linearly.

    ``s^ = s~ - u u^T (s~ - m)`` with ``u`` the unit vector along the ridge regression of the mean log-popularity of a
    window's clicks on its state, and ``m`` the mean state. States without clicks stay zero.

    Args:
        key: The world that it was fitted on.
        direction: ``float32 (d,)``, ``u``.
        mean: ``float32 (d,)``, ``m``.
        report: What the fit says of itself, JSON-able.
    """

    kind = "linear_debias"

    def __init__(
        self, key: WorldKey, direction: FloatArray, mean: FloatArray, report: Mapping[str, Any]
    ) -> None:
        self._binding = Binding(key)
        self._key = key
        self._direction = np.asarray(direction, np.float32)
        self._mean = np.asarray(mean, np.float32)
        self._report = dict(report)

    @classmethod
    def fit(
        cls, key: WorldKey, states: FloatArray, popularity: NDArray[Any], ridge: float = 1.0
    ) -> LinearDebiasPurifier:
        """Finds the direction.

        Args:
            key: The world that the states come from.
            states: ``float32 (n, d)``, observed states of training windows.
            popularity: ``(n,)``, mean log-popularity of each window's clicks.
            ridge: Strength of the penalty, in units of the states' mean variance times ``n``.
        """
        mean = states.mean(axis=0, dtype=np.float64)
        centred = states - mean
        wanted = np.asarray(popularity, np.float64) - np.mean(popularity)
        gram = centred.T @ centred
        gram += ridge * 1e-3 * np.trace(gram) / len(gram) * np.eye(len(gram))
        slope = np.linalg.solve(gram, centred.T @ wanted)
        explained = 1.0 - float(((wanted - centred @ slope) ** 2).sum() / max((wanted**2).sum(), 1e-12))
        direction = slope / max(float(np.linalg.norm(slope)), 1e-12)
        report = {"examples": len(states), "popularity_r2": explained}
        return cls(key, direction.astype(np.float32), mean.astype(np.float32), report)

    def bind(self, world: World) -> spaces.Box:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        self._binding.bind(world)
        # Removing a direction leaves the norm of s~ - m as it is or smaller, so components grow by |m| at most twice.
        return state_space(raw_bound(world) + 2.0 * float(np.linalg.norm(self._mean)), world.dimension)

    def purify(self, states: FloatArray, window: HistoryWindow) -> FloatArray:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        lengths = np.einsum("nd,d->n", states - self._mean, self._direction)
        lengths *= states.any(axis=1)
        purified: FloatArray = states - lengths[:, None] * self._direction
        return purified

    def describe(self) -> dict[str, Any]:
        """See :class:`~dsrm.purifier.StatePurifier`."""
        return {"kind": self.kind, "report": self._report, "world": self._key.as_dict()}

    def parts(self) -> tuple[Tensors, dict[str, Any]]:
        """Returns what a file holds: tensors, settings."""
        tensors: Tensors = {"direction": self._direction, "mean": self._mean}
        return tensors, {"world": self._key.as_dict(), "report": self._report}

    @classmethod
    def from_parts(cls, tensors: Tensors, settings: Mapping[str, Any]) -> LinearDebiasPurifier:
        """Restores what :meth:`parts` returned."""
        key = WorldKey.from_dict(settings["world"])
        return cls(key, tensors["direction"], tensors["mean"], settings["report"])


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
