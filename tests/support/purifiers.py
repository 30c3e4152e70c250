"""Purifiers whose states are known, and settings with which purifiers are pretrained in little time."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from dsrm.model import DistillationConfig
from dsrm.pretraining import PretrainConfig
from dsrm.purifier import Mode, state_space
from dsrm.targets import WindowSettings
from dsrm.training import TrainingConfig
from kuaifair_env.errors import MismatchError


class WindowPurifier:
    """A nonlinear function of state and window that no other window gives; it counts the rows it purifies."""

    def __init__(self, dimension: int | None = None) -> None:
        self.dimension = dimension
        self.rows = 0

    def bind(self, world: Any) -> spaces.Box:
        if self.dimension is not None and world.dimension != self.dimension:
            raise MismatchError(f"made for {self.dimension} dimensions, not {world.dimension}")
        return state_space(2.0, world.dimension + 1)

    def purify(self, states: Any, window: Any) -> Any:
        self.rows += len(states)
        places = np.arange(1, window.items.shape[1] + 1)
        mark = ((window.items + 2 * window.clicks) * places).sum(axis=1) % 997 / 997
        return np.concatenate([np.tanh(states), mark[:, None]], axis=1).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"kind": "window"}


def quick_config(mode: Mode = "profile", **settings: Any) -> PretrainConfig:
    """A purifier that works but has learned next to nothing, in a tenth of a second."""
    quick: dict[str, Any] = {
        "training": TrainingConfig(rounds=3, examples=400, batch_size=64, validation_examples=100),
        "width": 16,
        "blocks": 1,
        "distillation": DistillationConfig(conditions=500, width=16, steps=20),
        "student": DistillationConfig(conditions=500, width=16, steps=20),
        "windows": WindowSettings(policy_share=0.1),
        "denoiser_steps": 10,
    }
    return PretrainConfig(mode, **(quick | settings))


def learning_config(mode: Mode, seed: int) -> PretrainConfig:
    """A purifier that has learned tastes in the worlds of ``taste_worlds``, in two seconds."""
    return PretrainConfig(
        mode,
        seed=seed,
        training=TrainingConfig(
            rounds=4,
            examples=3_000,
            batch_size=128,
            learning_rate=3e-3,
            ema_decay=0.99,
            validation_examples=600,
        ),
        width=48,
        blocks=1,
        calibration_share=0.45,
        exclude_share=0.0,
        windows=WindowSettings(policy_share=0.0),
        distillation=DistillationConfig(conditions=1_000, width=64, steps=300, batch_size=128),
    )
