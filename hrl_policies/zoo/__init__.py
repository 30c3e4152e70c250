"""The zoo: methods by name, with the hyperparameters they are trained with."""

from hrl_policies.zoo import discrete as _discrete
from hrl_policies.zoo import hierarchical as _hierarchical
from hrl_policies.zoo.methods import (
    METHODS,
    BuildContext,
    MethodSpec,
    controls,
    learners,
    method,
    register_method,
)
from hrl_policies.zoo.settings import MethodSettings, load_settings, overridden, parse_overrides

# Importing the modules registers their methods.
del _discrete, _hierarchical

__all__ = [
    "METHODS",
    "BuildContext",
    "MethodSettings",
    "MethodSpec",
    "controls",
    "learners",
    "load_settings",
    "method",
    "overridden",
    "parse_overrides",
    "register_method",
]
