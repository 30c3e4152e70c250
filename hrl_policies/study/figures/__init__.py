"""Figures of a study, after the paper's: they read in print, in grey and for the colour-blind."""

from hrl_policies.study.figures.curves import (
    StepResult,
    draw_diffusion_steps,
    draw_learning_curves,
    draw_profiles,
)
from hrl_policies.study.figures.methods import (
    draw_pareto,
    draw_preference_front,
    draw_purification_gain,
    draw_results,
    pareto_front,
)

__all__ = [
    "StepResult",
    "draw_diffusion_steps",
    "draw_learning_curves",
    "draw_pareto",
    "draw_preference_front",
    "draw_profiles",
    "draw_purification_gain",
    "draw_results",
    "pareto_front",
]
