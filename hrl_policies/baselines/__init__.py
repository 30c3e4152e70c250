"""What trained methods are measured against: controls that learn nothing, and the click model they rank by.

Learnt baselines need torch and are imported from modules of their own: :mod:`hrl_policies.baselines.sac4ir`,
:mod:`hrl_policies.baselines.dnair`.
"""

from hrl_policies.baselines.controls import (
    Control,
    GreedyCTR,
    Oracle,
    QualityOracle,
    QuotaGreedy,
    RandomSlates,
    SessionQuota,
    item_quality,
)
from hrl_policies.baselines.scoring import ClickScorer, ScorerReport
from hrl_policies.baselines.slates import FairCounts, best_slates, fair_counts, nearest_to_half

__all__ = [
    "ClickScorer",
    "Control",
    "FairCounts",
    "GreedyCTR",
    "Oracle",
    "QualityOracle",
    "QuotaGreedy",
    "RandomSlates",
    "ScorerReport",
    "SessionQuota",
    "best_slates",
    "fair_counts",
    "item_quality",
    "nearest_to_half",
]
