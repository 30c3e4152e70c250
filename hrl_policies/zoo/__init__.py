"""The zoo: methods by name, with the hyperparameters they are trained with."""

from hrl_policies.zoo import methods as _methods
from hrl_policies.zoo.registry import (
    METHODS,
    BuildContext,
    MethodSpec,
    all_methods,
    controls,
    learners,
    load_settings,
    method,
    register_method,
    sb3_algorithm,
    worlds_with_settings,
)
from hrl_policies.zoo.search import SearchSpace, search_space
from hrl_policies.zoo.settings import MethodSettings, overridden, parse_overrides, read_settings

# Importing the table registers its methods.
del _methods

__all__ = [
    "METHODS",
    "BuildContext",
    "MethodSettings",
    "MethodSpec",
    "SearchSpace",
    "all_methods",
    "controls",
    "learners",
    "load_settings",
    "method",
    "overridden",
    "parse_overrides",
    "read_settings",
    "register_method",
    "sb3_algorithm",
    "search_space",
    "worlds_with_settings",
]
