"""Every measure of engagement, fairness, exposure and slate quality; each formula is written down here once.

All are pure functions on NumPy arrays, with two accumulators for streams of slates; nothing here imports more
than NumPy. :mod:`disparity` is what users react to inside a session, the other modules evaluate sessions
afterwards.
"""

from kuaifair_env.metrics.engagement import (
    Engagement,
    constant_session_length,
    engagement,
    expected_length,
    implied_violation_rate,
    length_floor_and_ceiling,
    normalised_length,
    violation_probability,
)
from kuaifair_env.metrics.exposure import (
    average_popularity,
    coverage,
    equal_exposures,
    gini,
    gini_of_rows,
    long_tail_count,
    long_tail_share,
    normalised_entropy,
    novelty,
    top_share,
)
from kuaifair_env.metrics.fairness import (
    BOUND_TOLERANCE,
    DisparityMode,
    absolute_difference,
    coverage_gap,
    disparate_treatment_ratio,
    item_exposure_gap,
    popular_share,
    share_gap,
    signed_gap,
    slate_absolute_difference,
    slate_disparity,
    user_absolute_difference,
    violates,
    violation_rate,
)
from kuaifair_env.metrics.ranking import hit, intra_list_distance, ndcg, reciprocal_rank, top_gains
from kuaifair_env.metrics.slate_statistics import ExposureCounter, FairnessReport, SlateStatistics

__all__ = [
    "BOUND_TOLERANCE",
    "DisparityMode",
    "Engagement",
    "ExposureCounter",
    "FairnessReport",
    "SlateStatistics",
    "absolute_difference",
    "average_popularity",
    "constant_session_length",
    "coverage",
    "coverage_gap",
    "disparate_treatment_ratio",
    "engagement",
    "equal_exposures",
    "expected_length",
    "gini",
    "gini_of_rows",
    "hit",
    "implied_violation_rate",
    "intra_list_distance",
    "item_exposure_gap",
    "length_floor_and_ceiling",
    "long_tail_count",
    "long_tail_share",
    "ndcg",
    "normalised_entropy",
    "normalised_length",
    "novelty",
    "popular_share",
    "reciprocal_rank",
    "share_gap",
    "signed_gap",
    "slate_absolute_difference",
    "slate_disparity",
    "top_gains",
    "top_share",
    "user_absolute_difference",
    "violates",
    "violation_probability",
    "violation_rate",
]
