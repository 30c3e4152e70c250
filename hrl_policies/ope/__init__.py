"""Evaluation without a simulator: what a policy is worth, from answers that were logged.

* :func:`evaluate_on_random_log`: the click rate of a policy's first slate, from a log whose items were chosen at random
  (rejection, inverse propensities, self-normalised ones, doubly robust).
* :func:`fitted_q_evaluation`: R_cum of a policy, from whole sessions of another one.

See docs/how-to/without-a-simulator.md for what these identify, and what they do not.
"""

from hrl_policies.ope.clicks import ClickModel, CrossFittedClicks, WorldClicks
from hrl_policies.ope.estimators import (
    ESTIMATORS,
    OffPolicyResult,
    RandomLog,
    SupportWarning,
    estimate_click_rate,
    evaluate_on_random_log,
)
from hrl_policies.ope.fqe import FittedQResult, LoggedSessions, fitted_q_evaluation, log_sessions
from hrl_policies.ope.slates import SampledSlates, SlateDistribution, SlateMarginals, first_slates

__all__ = [
    "ESTIMATORS",
    "ClickModel",
    "CrossFittedClicks",
    "FittedQResult",
    "LoggedSessions",
    "OffPolicyResult",
    "RandomLog",
    "SampledSlates",
    "SlateDistribution",
    "SlateMarginals",
    "SupportWarning",
    "WorldClicks",
    "estimate_click_rate",
    "evaluate_on_random_log",
    "first_slates",
    "fitted_q_evaluation",
    "log_sessions",
]
