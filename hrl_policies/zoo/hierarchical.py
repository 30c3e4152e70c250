"""The paper's method and its ablations: one algorithm, told apart by settings, purifier and nothing else."""

from __future__ import annotations

from typing import Any

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm

_PAPER = "Lu et al., Fairness begins with state, arXiv:2603.03820, 2026"
_WINDOW = (
    "observed states, windows and rewards of the training world, the training log's click scorer, "
    "popularity groups"
)


def build_hierarchical(context: BuildContext) -> Any:
    """Builds HierarchicalPPO; ``use_scorer`` says whether its accuracy term starts from the greedy controls' scores."""
    from hrl_policies.hierarchical import HierarchicalPPO

    settings = dict(context.hyperparameters)
    if settings.pop("use_scorer", False):
        settings["scorer"] = context.worlds.scorer
    return sb3_algorithm(HierarchicalPPO, context, settings)


def _register(name: str, title: str, reference: str, purifier: str, window: bool = True) -> None:
    register_method(
        name,
        title=title,
        family="hierarchical",
        reference=reference,
        kind="online",
        action_mode="slate",
        sees=_WINDOW if window else "observed states and rewards of the training world, popularity groups",
        observation_mode="history" if window else "state",
        purifier=purifier,
    )(build_hierarchical)


_register("dsrm-hrl", "DSRM-HRL", f"{_PAPER}; with quotas and session memory", "profile")
_register("hrl", "HRL", f"{_PAPER}, without purification", "")
_register("hrl+tce", "HRL + T-CE", f"{_PAPER}, on states denoised by T-CE", "tce")
_register("hrl+rce", "HRL + R-CE", f"{_PAPER}, on states denoised by R-CE", "rce")
_register("hrl+bod", "HRL + BOD", f"{_PAPER}, on states denoised by BOD", "bod")
_register("dsrm-hrl-constant", "DSRM-HRL, constant z", "a manager that always asks for half", "profile")
_register(
    "dsrm-hrl-no-memory", "DSRM-HRL, no memory", "a worker that cannot count clicks in the window", "profile"
)
_register("dsrm-hrl-query", "DSRM-HRL, free query", "a worker that may move away from the state", "profile")
_register("flat", "FLAT", f"{_PAPER}: one PPO on purified states, one global omega", "profile")
_register("flat+fair", "FLAT + fairness", "FLAT rewarded with r + lambda Fair", "profile")
_register(
    "dsrm-hrl-literal",
    "DSRM-HRL, literal",
    f"{_PAPER}, equations 4 to 6 to the letter",
    "profile",
    window=False,
)


@register_method(
    "a2c+fair",
    title="A2C + fairness",
    family="on-policy",
    reference="A2C rewarded with r + lambda Fair, as the manager of HRL is",
    kind="online",
    action_mode="embedding",
    sees="observed states and rewards of the training world, popularity groups",
)
def build_fair_a2c(context: BuildContext) -> Any:
    """Builds A2C over sessions whose reward holds the fairness term; ``fair_coef`` is ``lambda``."""
    from dataclasses import replace

    from stable_baselines3 import A2C

    from hrl_policies.hierarchical.fair_sessions import FairSessions

    settings = dict(context.hyperparameters)
    assert context.env is not None
    env = FairSessions(context.env, float(settings.pop("fair_coef")))
    return sb3_algorithm(A2C, replace(context, env=env), settings)
