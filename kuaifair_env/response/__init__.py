"""What users do with a slate: observed matrices, factor models and history-dependent models, fitted to logs.

Importing this package does not import torch; fitting does.
"""

from kuaifair_env.response.base import PADDING, HistoryWindow, ResponseModel
from kuaifair_env.response.factorised import FactorisedResponse
from kuaifair_env.response.factorised_fit import FactorisedConfig, fit_factorised
from kuaifair_env.response.fitting import (
    ResponseConfig,
    ResponseKind,
    WorldResponses,
    fit_response,
    fit_world_responses,
    load_response,
    response_version,
)
from kuaifair_env.response.inputs import InputConfig, NegativeSampling, SplitConfig
from kuaifair_env.response.observed import ObservedResponse, observed_block
from kuaifair_env.response.sequential import SequentialResponse, TransformerShape
from kuaifair_env.response.sequential_fit import SequentialConfig, fit_sequential

__all__ = [
    "PADDING",
    "FactorisedConfig",
    "FactorisedResponse",
    "HistoryWindow",
    "InputConfig",
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
    "response_version",
]
