"""Methods that learn in a model of the training log instead of the training world."""

from __future__ import annotations

from typing import Any

from hrl_policies.zoo.methods import BuildContext, register_method, sb3_algorithm


@register_method(
    "dorl",
    title="DORL",
    family="model-based",
    reference="Gao et al., Alleviating Matthew effect of offline reinforcement learning in interactive recommendation, "
    "SIGIR 2023",
    kind="offline",
    action_mode="embedding",
    sees="training log, user and item features, observed states, the leave rule; no response of either world",
)
def build_dorl(context: BuildContext) -> Any:
    """Builds DORL; it takes users, items and settings from the training sessions and never plays them."""
    from hrl_policies.baselines.dorl import DORL

    return sb3_algorithm(DORL, context)
