"""Response models: how users answer slates, by observed or logged feedback, factor models and history-dependent ones.

Fitting needs torch and simulating does not: the fitting functions are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuaifair_env.data.schema import NegativeSampling
from kuaifair_env.lazy_names import lazy_names
from kuaifair_env.response.base import PADDING, HistoryWindow, ResponseModel
from kuaifair_env.response.factorised import FactorisedConfig, FactorisedResponse
from kuaifair_env.response.fitting import (
    ResponseConfig,
    ResponseKind,
    fit_response,
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
    "fit_factorised",
    "fit_response",
    "fit_sequential",
    "load_response",
    "observed_block",
]

_HOMES = {
    "kuaifair_env.response.factorised_fit": ("fit_factorised",),
    "kuaifair_env.response.sequential_fit": ("fit_sequential",),
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)
