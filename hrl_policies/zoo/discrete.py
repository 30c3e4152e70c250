"""Fairness-aware baselines that rank items directly: SAC4IR and DNaIR, as adapted here and as in KuaiSim."""

from __future__ import annotations

from typing import Any

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm

_SAC4IR = "Shi et al., Maximum entropy policy for long-term fairness, IEEE TSC 17(3), 2024"
_DNAIR = "Shi et al., Relieving popularity bias in interactive recommendation, ACM TOIS 42(2), 2023"
_STATES = "observed states, items shown and their feedback in the training world"


def build_sac4ir(context: BuildContext) -> Any:
    """Builds SAC4IR."""
    from hrl_policies.baselines.sac4ir import SAC4IR

    return sb3_algorithm(SAC4IR, context)


register_method(
    "sac4ir",
    title="SAC4IR",
    family="fairness",
    reference=f"{_SAC4IR}; clicks debiased by exposure",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, exposure in the training log",
)(build_sac4ir)
register_method(
    "sac4ir-kuaisim",
    title="SAC4IR (KuaiSim)",
    family="fairness",
    reference=f"{_SAC4IR}; its group's version for KuaiSim",
    kind="online",
    action_mode="slate",
    sees=_STATES,
)(build_sac4ir)


def build_dnair(context: BuildContext) -> Any:
    """Builds DNaIR."""
    from hrl_policies.baselines.dnair import DNaIR

    return sb3_algorithm(DNaIR, context)


register_method(
    "dnair",
    title="DNaIR",
    family="fairness",
    reference=f"{_DNAIR}; online, one network for all users",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, windows, exposure, quality and item-CF similarity in the training log",
    observation_mode="history",
)(build_dnair)
register_method(
    "dnair-kuaisim",
    title="DNaIR (KuaiSim)",
    family="fairness",
    reference=f"{_DNAIR}; its group's version for KuaiSim",
    kind="online",
    action_mode="slate",
    sees=f"{_STATES}, exposure and quality in the training log",
)(build_dnair)
