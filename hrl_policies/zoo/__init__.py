"""The zoo: methods by name, with the hyperparameters they are trained with."""

from hrl_policies.zoo import discrete as _discrete
from hrl_policies.zoo import hierarchical as _hierarchical
from hrl_policies.zoo import model_based as _model_based
from hrl_policies.zoo import multi_objective as _multi_objective
from hrl_policies.zoo import offline as _offline
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

# Importing the modules registers their methods.
del _discrete, _hierarchical, _model_based, _multi_objective, _offline

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
