"""The twins that come with the library: their figures, each with its source.

The figures are published statistics of KuaiRec (Gao et al., CIKM 2022) and KuaiRand-Pure (Gao et al., CIKM
2022), or were measured on partial copies of them; the comments say which. The twin is synthetic: it shares
marginals with those data sets and nothing else. Figures without a source (taste, conformity, personalisation,
slopes, spreads, correlations, gaps, decay) are no measurements: they were set so that the twin's logs show the
published marginals, which the test of the marginals checks line by line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kuaifair_env.data.twin_config import QuantileLaw, TasteStrength, TwinConfig, numbers

# Items per tag 0..30, item_categories.csv.
_KUAIREC_TAGS = numbers(
    "24 463 216 104 164 964 912 503 1112 696 170 2027 534 245 63 374 214 350 131 686 265 29 20 39 12 468 490 "
    "31 1360 5 22"
)

# show_user_num, video_features_statistic_pure.csv.
_SHOWN = QuantileLaw(
    (0.001, 0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99, 0.995, 0.999, 0.9999),
    (198, 459, 761, 1_817, 3_922, 9_378, 31_958, 85_202, 116_374, 222_492, 375_364),
    "log",
)

KUAIREC = TwinConfig(
    name="KuaiRec",
    layout="kuairec",
    seed=0,
    n_users=7_176,
    n_items=10_728,
    n_panel_users=1_411,
    n_panel_items=3_327,
    train_rows=11_564_987,  # 12,530,806 rows less 965,819 exact duplicates
    test_rows=4_676_570,
    taste_strength=0.75,
    conformity=0.25,
    conformity_shape=2.0,
    personalisation=0.5,
    exposure_log_sd=(0.6, 1.6),
    panel_log_gap=4.3,
    quality_exposure_correlation=0.35,
    activity_taste_correlation=0.1,
    panel_activity_shift=2.0,
    feed_slopes=(0.65, 0.4),
    feed_sds=(0.65, 0.45),
    logged_click_rate=0.073,  # 915,673 of 12,530,806 views have watch_ratio >= 2
    # positive = watch_ratio >= 2, whole small matrix
    item_rates=QuantileLaw(
        (0.002, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.9997),
        (0.0001, 0.0003, 0.0014, 0.0057, 0.0184, 0.0312, 0.0546, 0.0967, 0.1247, 0.2521, 0.725),
        "logit",
    ),
    user_rates=QuantileLaw(
        (0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99, 0.9995),
        (0.0036, 0.0057, 0.0132, 0.0286, 0.0669, 0.1377, 0.2018, 0.2985),
        "logit",
    ),
    train_activity=QuantileLaw(
        (0.001, 0.05, 0.25, 0.50, 0.75, 0.95, 0.999), (100, 300, 883, 1846.5, 2461, 3400, 7000), "log"
    ),
    test_activity=None,
    test_exposure_log_sd=0.0,
    # level and spread as in KuaiRand's table, the only published one
    shown=_SHOWN,
    shown_noise=0.3,
    durations=QuantileLaw(
        (0.001, 0.05, 0.25, 0.50, 0.75, 0.95, 0.999), (3.0, 5.3, 7.434, 9.636, 12.179, 58.0, 315.0), "log"
    ),
    tag_frequencies=_KUAIREC_TAGS,
    tags_per_item=(0.836, 0.146, 0.017, 0.001),
    missing_time_share=181_992 / 4_676_570,
    tag_quality_share=0.12,
    taste_dimensions=8,
    taste_decay=0.3,
    tag_taste_share=0.05,
)
"""Full size of KuaiRec: 7,176 x 10,728 in training, a fully observed panel of 1,411 x 3,327 as the test."""

# Items per tag by falling frequency, video_features_basic_pure.csv.
_KUAIRAND_TAGS = numbers(
    "1446 732 675 606 489 428 428 419 400 383 296 254 245 220 206 181 177 177 145 144 136 102 102 99 89 82 75 "
    "58 46 43 41 41 40 37 35 33 33 33 31 16 11 10 5 4 3"
)

KUAIRAND = TwinConfig(
    name="KuaiRand",
    layout="kuairand",
    seed=0,
    n_users=27_285,
    n_items=7_583,
    n_panel_users=27_285,
    n_panel_items=7_583,
    train_rows=1_436_609,
    test_rows=1_186_059,
    taste_strength=0.6,
    conformity=0.17,
    conformity_shape=2.0,
    personalisation=1.0,
    exposure_log_sd=(1.66, 1.66),
    panel_log_gap=0.0,
    quality_exposure_correlation=0.36,
    activity_taste_correlation=-0.3,
    panel_activity_shift=0.0,
    feed_slopes=(0.6, 0.75),
    feed_sds=(0.75, 0.45),
    logged_click_rate=0.4597,
    # Beta(3.74, 13.5), the random-exposure law of items among users who clicked at all, times .815
    item_rates=QuantileLaw(
        (0.001, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999),
        (0.0195, 0.0384, 0.0643, 0.0820, 0.1182, 0.1678, 0.2259, 0.2839, 0.3204, 0.3905, 0.4683),
        "logit",
    ),
    # Beta(1.3, 6.08): those of its users who click at least once look like the published ones
    user_rates=QuantileLaw(
        (0.001, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999),
        (0.0009, 0.0053, 0.0188, 0.0331, 0.0732, 0.1466, 0.2503, 0.3632, 0.4355, 0.5712, 0.7089),
        "logit",
    ),
    train_activity=QuantileLaw(
        (0.0005, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 0.9999),
        (1, 2, 8, 18, 39, 72, 115, 234, 910),
        "log",
    ),
    # partial KuaiRand-Pure, rows per user with a random click: 8, 11, 19, 41, 87, 250
    test_activity=QuantileLaw(
        (0.001, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 0.9999), (2, 5, 8, 11, 19, 41, 87, 250, 1084), "log"
    ),
    test_exposure_log_sd=0.12,
    shown=_SHOWN,
    shown_noise=0.45,
    durations=QuantileLaw(
        (0.0005, 0.05, 0.25, 0.50, 0.75, 0.95, 0.9999), (5.0, 10.7, 31.9, 81.2, 148.2, 303.5, 1177.7), "log"
    ),
    tag_frequencies=_KUAIRAND_TAGS,
    tags_per_item=(0.764, 0.232, 0.004),
    untagged_share=0.013,
    tag_quality_share=0.05,
)
"""Full size of KuaiRand-Pure: 1.44 M logged rows in training, 1.19 M random exposures as the test."""

TOY = replace(
    KUAIRAND,
    name="Toy",
    n_users=400,
    n_items=600,
    n_panel_users=400,
    n_panel_items=600,
    train_rows=16_000,
    test_rows=36_000,
    exposure_log_sd=(2.4, 2.4),  # so few items soon run out for a user, which evens exposure out
    tag_frequencies=(30, 20, 15, 10, 8, 6, 5, 4, 3, 2),
)
"""A few hundred users and items with the laws of KuaiRand, for tests and first contact."""

STRENGTHS: Mapping[str, Mapping[str, float]] = {
    "KuaiRec": {"measured": KUAIREC.taste_strength, "strong": 1.5},
    "KuaiRand": {"measured": KUAIRAND.taste_strength, "strong": 1.5},
    "Toy": {"measured": TOY.taste_strength, "strong": 1.5},
}
"""Taste in logits for each preset: the level that was measured, and a stronger one beside it."""

PRESETS: Mapping[str, TwinConfig] = {"KuaiRec": KUAIREC, "KuaiRand": KUAIRAND, "Toy": TOY}


def twin_config(
    name: str,
    seed: int = 0,
    taste_strength: TasteStrength | float = "measured",
    conformity: float | None = None,
) -> TwinConfig:
    """Returns a preset with a seed and strengths of one's own.

    Args:
        name: ``"KuaiRec"``, ``"KuaiRand"`` or ``"Toy"``, in any case.
        seed: Seed of everything.
        taste_strength: ``"measured"`` (as weak as in the real data), ``"strong"``, or the standard deviation
            of taste in logits.
        conformity: Mean conformity in logits per standard deviation of log popularity; None keeps the
            preset's.

    Raises:
        ValueError: For an unknown name or strength, or a value out of range.
    """
    known = {preset.lower(): preset for preset in PRESETS}
    if name.lower() not in known:
        raise ValueError(f"twin {name!r} is unknown; take one of {', '.join(PRESETS)}")
    preset = PRESETS[known[name.lower()]]
    if isinstance(taste_strength, str):
        levels = STRENGTHS[preset.name]
        if taste_strength not in levels:
            raise ValueError(
                f"taste_strength is a number or one of {', '.join(levels)}, got {taste_strength!r}"
            )
        taste_strength = levels[taste_strength]
    return replace(
        preset,
        seed=seed,
        taste_strength=float(taste_strength),
        conformity=preset.conformity if conformity is None else float(conformity),
    )
