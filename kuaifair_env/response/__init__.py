"""Response models: how users answer slates, by observed or logged feedback, factor models and history-dependent ones.

Fitting needs torch and simulating does not: the fitting functions are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kuaifair_env.data.schema import NegativeSampling
from kuaifair_env.response.base import PADDING, HistoryWindow, ResponseModel
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.fitting import (
    ResponseConfig,
    ResponseKind,
    WorldResponses,
    fit_response,
    fit_world_responses,
    load_response,
)
from kuaifair_env.response.inputs import InputConfig
from kuaifair_env.response.known import ObservedResponse, observed_block
from kuaifair_env.response.logged import LoggedResponse
from kuaifair_env.response.rows import SplitConfig
from kuaifair_env.response.sequential import SequentialConfig, SequentialResponse
from kuaifair_env.response.transformer import TransformerShape

if TYPE_CHECKING:
    from kuaifair_env.response.factorised_fit import fit_factorised
    from kuaifair_env.response.sequential_fit import fit_sequential

__all__ = [
    "PADDING",
    "FactorisedConfig",
    "FactorisedResponse",
    "HistoryWindow",
    "InputConfig",
    "LoggedResponse",
    "NegativeSampling",
    "ObservedResponse",
    "ResponseConfig",
    "ResponseKind",
    "ResponseModel",
    "SequentialConfig",
    "SequentialResponse",
    "SplitConfig",
    "TransformerShape",
    "WorldResponses",
    "fit_factorised",
    "fit_response",
    "fit_sequential",
    "fit_world_responses",
    "load_response",
    "observed_block",
]

_HOMES = {"fit_factorised": "factorised_fit", "fit_sequential": "sequential_fit"}


def __getattr__(name: str) -> Any:
    """Imports a fitting function from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
