"""The zoo: methods by name, with the hyperparameters they are trained with."""

# Importing the table of methods registers them.
from hrl_policies.zoo.methods import sb3_algorithm
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
    worlds_with_settings,
)
from hrl_policies.zoo.settings import (
    MethodSettings,
    SearchSpace,
    check_hyperparameters,
    overridden,
    parse_overrides,
    read_settings,
    search_space,
)

__all__ = [
    "METHODS",
    "BuildContext",
    "MethodSettings",
    "MethodSpec",
    "SearchSpace",
    "all_methods",
    "check_hyperparameters",
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
