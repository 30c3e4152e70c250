"""Standardisation of conditions and states, with the statistics of the training examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kuaifair_env.artifacts import Tensors
from kuaifair_env.data.schema import FloatArray

_LEAST_DEVIATION = 1e-4


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
        deviation = np.maximum(rows.std(axis=0, dtype=np.float64), _LEAST_DEVIATION).astype(np.float32)
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
