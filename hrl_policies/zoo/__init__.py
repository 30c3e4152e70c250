"""The zoo: methods by name, with the hyperparameters they are trained with."""

from hrl_policies.zoo import builders as _builders
from hrl_policies.zoo.methods import (
    METHODS,
    BuildContext,
    MethodSpec,
    all_methods,
    controls,
    learners,
    method,
    register_method,
)
from hrl_policies.zoo.search import SearchSpace, search_space
from hrl_policies.zoo.settings import (
    MethodSettings,
    load_settings,
    overridden,
    parse_overrides,
    read_settings,
    worlds_with_settings,
)

# Importing the module registers its methods.
del _builders

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
    "search_space",
    "worlds_with_settings",
]
