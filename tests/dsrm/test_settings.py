"""Numerical settings of every configuration: what is no number, or not one that makes sense, is refused by name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any, get_type_hints

import pytest

import dsrm
from dsrm.click_denoisers import ClickModelConfig
from dsrm.diffusion import DenoiserConfig
from dsrm.model import DistillationConfig, DSRMConfig
from dsrm.preference_training import PreferenceConfig
from dsrm.pretraining import PretrainConfig
from dsrm.targets import WindowSettings
from dsrm.training import TrainingConfig

REQUIRED: dict[type, dict[str, Any]] = {
    ClickModelConfig: {"loss": "tce"},
    DenoiserConfig: {"state_size": 3, "condition_size": 3},
    PreferenceConfig: {
        "kind": "diffusion",
        "seed": 0,
        "schedule": "cosine",
        "levels": 5,
        "width": 4,
        "blocks": 1,
        "training": TrainingConfig(),
        "student": DistillationConfig(),
    },
    DSRMConfig: {"mode": "profile", "schedule": "cosine", "levels": 5, "denoiser": DenoiserConfig(3, 3)},
}
OPTIONAL_WHOLE = int | None


def configurations() -> list[type]:
    """Returns every dataclass of settings in the package."""
    modules = [importlib.import_module(f"dsrm.{module.name}") for module in pkgutil.iter_modules(dsrm.__path__)]
    classes = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    ours = [cls for cls in classes if dataclasses.is_dataclass(cls) and cls.__module__.startswith("dsrm")]
    return sorted((cls for cls in ours if cls.__name__.endswith(("Config", "Settings", "Scales"))), key=str)


def numerical() -> list[tuple[type, str, Any]]:
    """Returns every numerical setting: its class, its name and its type."""
    return [
        (cls, name, kind)
        for cls in configurations()
        for name, kind in get_type_hints(cls).items()
        if kind in (int, float, OPTIONAL_WHOLE)
    ]


@pytest.mark.parametrize(("cls", "name", "kind"), numerical())
def test_a_number_that_makes_no_sense_is_refused_by_name(cls, name, kind):
    senseless = [float("nan"), float("inf"), -float("inf"), -1, True, "1", [1]]
    if kind is not float:
        senseless += [2.0, 2.5]
    for number in senseless:
        with pytest.raises(ValueError, match=rf"\b{name} must be a (whole )?number"):
            cls(**REQUIRED.get(cls, {}) | {name: number})


@pytest.mark.parametrize("cls", sorted({cls for cls, name, _ in numerical() if name == "seed"}, key=str))
def test_a_seed_that_no_library_takes_is_refused_before_the_work(cls):
    assert cls(**REQUIRED.get(cls, {}) | {"seed": 2**32 - 1}).seed == 2**32 - 1
    with pytest.raises(ValueError, match="seed must be at most 4294967295"):
        cls(**REQUIRED.get(cls, {}) | {"seed": 2**32})


def test_all_configurations_are_tried():
    assert {"SamplerConfig", "TrainingConfig", "PretrainConfig", "OwnScales"} <= {
        cls.__name__ for cls in configurations()
    }
    assert len(numerical()) > 40


@pytest.mark.parametrize(("cls", "settings"), [
    (PretrainConfig, {"exclude_share": 1.1}),
    (PretrainConfig, {"calibration_share": 0.0}),
    (WindowSettings, {"min_length": 10, "max_length": 9}),
    (DistillationConfig, {"conditions": 1}),
    (DistillationConfig, {"batch_size": 3}),
])  # fmt: skip
def test_a_number_beyond_its_range_is_refused_by_name(cls, settings):
    with pytest.raises(ValueError, match=f"{list(settings)[-1]} must be"):
        cls(**settings)


def test_unknown_schedules_and_predictions_are_refused_before_training():
    for name in ("schedule", "prediction"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            PretrainConfig(**{name: "magic"})
