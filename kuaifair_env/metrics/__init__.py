"""Measures of engagement, fairness, exposure and slate quality: pure functions on NumPy arrays."""

from kuaifair_env.metrics.engagement import (
    Engagement,
    engagement,
    expected_length,
    implied_violation_rate,
    length_floor_and_ceiling,
    normalised_length,
)
from kuaifair_env.metrics.exposure import (
    average_popularity,
    coverage,
    gini,
    gini_of_rows,
    normalised_entropy,
    novelty,
    top_share,
)
from kuaifair_env.metrics.fairness import (
    BOUND_TOLERANCE,
    DisparityMode,
    absolute_difference,
    coverage_gap,
    item_exposure_gap,
    popular_share,
    signed_gap,
    slate_absolute_difference,
    slate_disparity,
    user_absolute_difference,
    violates,
)
from kuaifair_env.metrics.slate_statistics import FairnessReport, SlateStatistics, ndcg, top_gains

__all__ = [
    "BOUND_TOLERANCE",
    "DisparityMode",
    "Engagement",
    "FairnessReport",
    "SlateStatistics",
    "absolute_difference",
    "average_popularity",
    "coverage",
    "coverage_gap",
    "engagement",
    "expected_length",
    "gini",
    "gini_of_rows",
    "implied_violation_rate",
    "item_exposure_gap",
    "length_floor_and_ceiling",
    "ndcg",
    "normalised_entropy",
    "normalised_length",
    "novelty",
    "popular_share",
    "signed_gap",
    "slate_absolute_difference",
    "slate_disparity",
    "top_gains",
    "top_share",
    "user_absolute_difference",
    "violates",
]
