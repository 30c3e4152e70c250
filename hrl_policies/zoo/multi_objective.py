"""Methods that learn a whole front of balances between engagement and fairness at once."""

from __future__ import annotations

from typing import Any

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm


@register_method(
    "mofir",
    title="MOFIR",
    family="off-policy",
    reference="Ge et al., Toward Pareto efficient fairness-utility trade-off in recommendation through reinforcement "
    "learning, WSDM 2022",
    kind="online",
    action_mode="embedding",
    sees="observed states, items shown and their clicks in the training world, popularity groups",
)
def build_mofir(context: BuildContext) -> Any:
    """Builds MOFIR; its default preference is chosen in the training world when training ends."""
    from hrl_policies.baselines.mofir import MOFIR

    return sb3_algorithm(MOFIR, context)
