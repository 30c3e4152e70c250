"""Figures of a study, after the paper's: they read in print, in grey and for the colour-blind."""

from hrl_policies.study.figures.curves import draw_learning_curves
from hrl_policies.study.figures.gain import draw_purification_gain
from hrl_policies.study.figures.pareto import draw_pareto, pareto_front
from hrl_policies.study.figures.profiles import draw_profiles
from hrl_policies.study.figures.results import draw_results
from hrl_policies.study.figures.steps import StepResult, draw_diffusion_steps, read_step_results

__all__ = [
    "StepResult",
    "draw_diffusion_steps",
    "draw_learning_curves",
    "draw_pareto",
    "draw_profiles",
    "draw_purification_gain",
    "draw_results",
    "pareto_front",
    "read_step_results",
]
