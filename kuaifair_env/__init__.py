"""Gymnasium environments for fair interactive recommendation.

Importing this package registers the ids of :data:`kuaifair_env.registration.ENVIRONMENTS` and nothing else: torch,
Stable-Baselines3 and pandas are imported when something needs them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kuaifair_env.abandonment import CategoryBoredom, LeaveRule, NeverLeave, TemperFairness
from kuaifair_env.batch import EpisodeRecords, SessionBatch, SessionConfig
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError, MismatchError
from kuaifair_env.evaluation import EvaluationResult, evaluate
from kuaifair_env.origins import IncompleteDataWarning, TwinFallbackWarning
from kuaifair_env.registration import (
    ENVIRONMENTS,
    make_env,
    make_sb3,
    make_vector_env,
    make_world,
    register_ids,
    register_world,
)
from kuaifair_env.served_sessions import ServedStep
from kuaifair_env.serving import LearnsWhileServing, serve
from kuaifair_env.serving_results import ServingResult, ServingSummary
from kuaifair_env.splits import held_out_users
from kuaifair_env.vector_env import KuaiFairVectorEnv
from kuaifair_env.world import LeftOutWarning, World, build_world, candidate_rows

if TYPE_CHECKING:
    from kuaifair_env.sb3 import KuaiFairVecEnv

try:
    __version__ = version("kuaifair")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "ENVIRONMENTS",
    "ArtifactError",
    "CategoryBoredom",
    "DataError",
    "EpisodeRecords",
    "EvaluationResult",
    "IncompleteDataWarning",
    "InteractionData",
    "InteractionLog",
    "KuaiFairEnv",
    "KuaiFairError",
    "KuaiFairVecEnv",
    "KuaiFairVectorEnv",
    "LearnsWhileServing",
    "LeaveRule",
    "LeftOutWarning",
    "MismatchError",
    "NeverLeave",
    "ServedStep",
    "ServingResult",
    "ServingSummary",
    "SessionBatch",
    "SessionConfig",
    "TemperFairness",
    "TwinFallbackWarning",
    "World",
    "build_world",
    "candidate_rows",
    "evaluate",
    "held_out_users",
    "make_env",
    "make_sb3",
    "make_vector_env",
    "make_world",
    "register_world",
    "serve",
]


def __getattr__(name: str) -> Any:
    """Imports the Stable-Baselines3 form on first use."""
    if name == "KuaiFairVecEnv":
        return import_module("kuaifair_env.sb3").KuaiFairVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_ids()
