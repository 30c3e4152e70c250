"""Agents, method zoo, studies and the command line, on top of the environments and purifiers.

Importing this package imports neither torch nor Stable-Baselines3; its parts do so when they need them:

* :func:`make_training_env` and :func:`make_evaluation_env` make the sessions of a method;
* :class:`FairnessCallback` evaluates any agent of Stable-Baselines3 while it trains, and keeps the best;
* :mod:`hrl_policies.hrl_ppo` is the paper's agent; bcq, mofir, dorl, dnair and sac4ir are its baselines;
* :mod:`hrl_policies.controls` learn nothing, and :mod:`hrl_policies.common` is what several agents share;
* :mod:`hrl_policies.zoo` names every method, with its source and its hyperparameters;
* :mod:`hrl_policies.study` trains, evaluates, stores and tabulates;
* :mod:`hrl_policies.cli.main` is the ``kuaifair`` command.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hrl_policies.fairness_callback import FairnessCallback
    from hrl_policies.zoo.registry import make_evaluation_env, make_training_env

__all__ = ["FairnessCallback", "make_evaluation_env", "make_training_env"]


def __getattr__(name: str) -> Any:
    if name == "FairnessCallback":
        return import_module("hrl_policies.fairness_callback").FairnessCallback
    if name in __all__:
        return getattr(import_module("hrl_policies.zoo.registry"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
