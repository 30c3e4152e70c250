"""Configurations of synthetic twins: sizes, marginal distributions and strengths, and the presets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri

from kuaifair_env.data.clicks import WATCH_RATIO, Clicks, kuairand_clicks, kuairec_clicks

Layout = Literal["kuairec", "kuairand"]
"""``"kuairec"``: the test log is a full matrix of a panel; ``"kuairand"``: uniformly random exposures."""

TasteStrength = Literal["measured", "strong"]
"""``"measured"``: personal taste as weak as in the real data; ``"strong"``: a stronger setting beside it."""


@dataclass(frozen=True)
class QuantileDistribution:
    """A distribution given by some of its quantiles, interpolated between them.

    Attributes:
        levels: Increasing probabilities in (0, 1).
        values: The quantiles.
        scale: Where interpolation is linear: ``"linear"``, ``"log"`` or ``"logit"`` of the value, against the
            standard normal score of the level. Beyond the outermost levels the outermost values hold.
    """

    levels: tuple[float, ...]
    values: tuple[float, ...]
    scale: Literal["linear", "log", "logit"] = "linear"

    def __post_init__(self) -> None:
        if len(self.levels) != len(self.values) or len(self.levels) < 2:
            raise ValueError(f"need at least two levels, one value each: {self.levels}, {self.values}")
        if not (np.diff(self.levels) > 0).all() or not 0.0 < self.levels[0] < self.levels[-1] < 1.0:
            raise ValueError(f"levels must increase within (0, 1), got {self.levels}")
        if not (np.diff(self.values) >= 0).all():
            raise ValueError(f"quantiles must not decrease, got {self.values}")
        low = self.values[0] if self.scale != "linear" else 1.0
        high = self.values[-1] if self.scale == "logit" else 0.0
        if not (low > 0.0 and high < 1.0):
            raise ValueError(f"quantiles {self.values} do not fit the {self.scale} scale")

    def at(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Returns the values at standard normal scores: normal in, this distribution out."""
        knots: NDArray[np.float64] = np.asarray(self.values, np.float64)
        knots = np.log(knots) if self.scale == "log" else logit(knots) if self.scale == "logit" else knots
        drawn: NDArray[np.float64] = np.interp(scores, ndtri(np.asarray(self.levels)), knots)
        return np.exp(drawn) if self.scale == "log" else expit(drawn) if self.scale == "logit" else drawn


@dataclass(frozen=True)
class TwinConfig:
    """Everything that determines a twin; equal configurations give equal twins on every platform.

    Attributes:
        name: ``"KuaiRec"``, ``"KuaiRand"``, ``"Toy"`` or another name.
        layout: What the test log looks like and which official format the twin can be written in.
        seed: Seed of everything.
        clicks: What counts as a click in the logs, and what feedback is worth; the same views whatever it is.
        n_users: Users ``U``.
        n_items: Items ``N``.
        n_panel_users: Users of the test log.
        n_panel_items: Items of the test log.
        train_rows: Rows of the training log, distinct user-item pairs.
        test_rows: Rows of the test log, distinct user-item pairs.
        taste_strength: Standard deviation of personal taste over random pairs, in logits.
        conformity: Mean over users of the logits by which one standard deviation of log popularity raises the
            chance of a click in the training world.
        conformity_shape: Shape of the gamma distribution of conformity over users; the smaller, the more they differ.
        personalisation: How strongly the platform selects by taste: log exposure weight per standard
            deviation.
        exposure_log_sd: Standard deviation of log exposure propensity between items, within and outside the
            panel.
        panel_log_gap: By how much the log propensity of panel items exceeds that of the others.
        quality_exposure_correlation: Correlation of item quality with log exposure propensity.
        activity_taste_correlation: Correlation of a user's activity with the inclination to click.
        panel_activity_shift: By how many standard deviations panel users are less active in the training log.
        feed_slopes: How far quality of items and inclination of users count in the logged feed, where 1 is as
            far as under random exposure.
        feed_sds: Standard deviations, in logits, of what only the logged feed adds to an item (placement,
            cover, audience) and to a user (mood, time, surface): they make logged click rates differ from
            those under random exposure.
        logged_click_rate: Rate of the twin's own click in the training log (KuaiRec: watch ratio of 2 and more;
            KuaiRand: ``is_click``); the level of the feed is solved for it. Everything else that can count as a click
            follows from it, or from its absence (see :mod:`kuaifair_env.synthetic.choices`).
        item_rates: Distribution of rates of that click over items under uniformly random exposure.
        user_rates: Likewise over users.
        train_activity: Distribution of training rows per user, up to a factor that makes them add up to
            ``train_rows``.
        test_activity: Distribution of test rows per user, likewise; None shows every panel user every panel item.
        test_exposure_log_sd: Unevenness of the random exposure: standard deviation of log weights between
            items.
        shown: Distribution of platform-wide exposure counts of items (``show_user_num``).
        shown_noise: Standard deviation of the part of log ``shown`` that does not come from exposure
            propensity, relative to the whole.
        durations: Distribution of video durations in seconds.
        tag_frequencies: Number of items per tag, up to a factor.
        tags_per_item: Shares of items with 1, 2, 3, ... tags.
        tag_quality_share: Share of the variance of quality scores that the first tag explains.
        untagged_share: Share of items that no tag is known of.
        missing_time_share: Share of test rows whose time is unknown.
        taste_dimensions: Dimensions of the latent space in which taste lives.
        taste_decay: Axis ``j`` of that space has standard deviation ``(j + 1) ** -taste_decay``.
        tag_taste_share: Share of the variance of item vectors that their tags explain.
        interests: Shares of users with 1, 2, 3, ... interests.
    """

    name: str
    layout: Layout
    seed: int
    clicks: Clicks
    n_users: int
    n_items: int
    n_panel_users: int
    n_panel_items: int
    train_rows: int
    test_rows: int
    taste_strength: float
    conformity: float
    conformity_shape: float
    personalisation: float
    exposure_log_sd: tuple[float, float]
    panel_log_gap: float
    quality_exposure_correlation: float
    activity_taste_correlation: float
    panel_activity_shift: float
    feed_slopes: tuple[float, float]
    feed_sds: tuple[float, float]
    logged_click_rate: float
    item_rates: QuantileDistribution
    user_rates: QuantileDistribution
    train_activity: QuantileDistribution
    test_activity: QuantileDistribution | None
    test_exposure_log_sd: float
    shown: QuantileDistribution
    shown_noise: float
    durations: QuantileDistribution
    tag_frequencies: tuple[float, ...]
    tags_per_item: tuple[float, ...]
    tag_quality_share: float
    untagged_share: float = 0.0
    missing_time_share: float = 0.0
    taste_dimensions: int = 12
    taste_decay: float = 0.4
    tag_taste_share: float = 0.4
    interests: tuple[float, ...] = (0.35, 0.35, 0.2, 0.1)

    def __post_init__(self) -> None:
        if self.layout not in ("kuairec", "kuairand"):
            raise ValueError(f"layout must be 'kuairec' or 'kuairand', got {self.layout!r}")
        if (self.test_activity is None) != (self.layout == "kuairec"):
            raise ValueError("test_activity is None for the layout 'kuairec' and a distribution for 'kuairand'")
        if (self.clicks.positive[0][0] == WATCH_RATIO) != (self.layout == "kuairec"):
            raise ValueError(f"the layout {self.layout!r} does not log what {dict(self.clicks.positive)} asks for")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")
        self._check_sizes()
        self._check_strengths()

    def _check_sizes(self) -> None:
        if self.n_items < 2:
            raise ValueError(f"a twin needs at least two items, got {self.n_items}")
        for part, whole in (("n_panel_users", "n_users"), ("n_panel_items", "n_items")):
            if not 1 <= getattr(self, part) <= getattr(self, whole):
                raise ValueError(f"{part} must lie in 1..{whole}, got {getattr(self, part)}")
        cells = self.n_panel_users * self.n_panel_items
        held_out = cells if self.layout == "kuairec" else 0
        for rows, most in (("train_rows", self.n_users * self.n_items - held_out), ("test_rows", cells)):
            if not 1 <= getattr(self, rows) <= most:
                raise ValueError(f"{rows} must lie in 1..{most} (distinct pairs), got {getattr(self, rows)}")

    def _check_strengths(self) -> None:
        for name in ("taste_strength", "conformity", "personalisation", "test_exposure_log_sd"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
        shares = (
            "tag_quality_share",
            "tag_taste_share",
            "untagged_share",
            "missing_time_share",
            "shown_noise",
        )
        for name in shares:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        for name in ("quality_exposure_correlation", "activity_taste_correlation"):
            if not -1.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in -1..1, got {getattr(self, name)}")
        if not 0.0 < self.logged_click_rate < 1.0:
            raise ValueError(f"logged_click_rate must lie in (0, 1), got {self.logged_click_rate}")
        if not 1 <= self.taste_dimensions <= 64:
            raise ValueError(f"taste_dimensions must lie in 1..64, got {self.taste_dimensions}")

    def as_dict(self) -> dict[str, Any]:
        """Returns a copy as JSON holds it, with lists for tuples; ``click`` is what counts as one."""
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"click": self.clicks.describe()}))
        del settings["clicks"]
        return settings


def numbers(text: str) -> tuple[float, ...]:
    """Returns the numbers of a text: tables of figures stay legible this way."""
    return tuple(float(number) for number in text.split())


# Items per tag 0..30, item_categories.csv.
_KUAIREC_TAGS = numbers(
    "24 463 216 104 164 964 912 503 1112 696 170 2027 534 245 63 374 214 350 131 686 265 29 20 39 12 468 490 "
    "31 1360 5 22"
)

# show_user_num, video_features_statistic_pure.csv.
_SHOWN = QuantileDistribution(
    (0.001, 0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99, 0.995, 0.999, 0.9999),
    (198, 459, 761, 1_817, 3_922, 9_378, 31_958, 85_202, 116_374, 222_492, 375_364),
    "log",
)

KUAIREC = TwinConfig(
    name="KuaiRec",
    layout="kuairec",
    seed=0,
    clicks=kuairec_clicks(),
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
    item_rates=QuantileDistribution(
        (0.002, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.9997),
        (0.0001, 0.0003, 0.0014, 0.0057, 0.0184, 0.0312, 0.0546, 0.0967, 0.1247, 0.2521, 0.725),
        "logit",
    ),
    user_rates=QuantileDistribution(
        (0.01, 0.05, 0.25, 0.50, 0.75, 0.95, 0.99, 0.9995),
        (0.0036, 0.0057, 0.0132, 0.0286, 0.0669, 0.1377, 0.2018, 0.2985),
        "logit",
    ),
    train_activity=QuantileDistribution(
        (0.001, 0.05, 0.25, 0.50, 0.75, 0.95, 0.999), (100, 300, 883, 1846.5, 2461, 3400, 7000), "log"
    ),
    test_activity=None,
    test_exposure_log_sd=0.0,
    # level and spread as in KuaiRand's table, the only published one
    shown=_SHOWN,
    shown_noise=0.3,
    durations=QuantileDistribution(
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
    clicks=kuairand_clicks(),
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
    # Beta(3.74, 13.5), the random-exposure distribution of items among users who clicked at all, times .815
    item_rates=QuantileDistribution(
        (0.001, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999),
        (0.0195, 0.0384, 0.0643, 0.0820, 0.1182, 0.1678, 0.2259, 0.2839, 0.3204, 0.3905, 0.4683),
        "logit",
    ),
    # Beta(1.3, 6.08): those of its users who click at least once look like the published ones
    user_rates=QuantileDistribution(
        (0.001, 0.01, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999),
        (0.0009, 0.0053, 0.0188, 0.0331, 0.0732, 0.1466, 0.2503, 0.3632, 0.4355, 0.5712, 0.7089),
        "logit",
    ),
    train_activity=QuantileDistribution(
        (0.0005, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 0.9999),
        (1, 2, 8, 18, 39, 72, 115, 234, 910),
        "log",
    ),
    # partial KuaiRand-Pure, rows per user with a random click: 8, 11, 19, 41, 87, 250
    test_activity=QuantileDistribution(
        (0.001, 0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99, 0.9999), (2, 5, 8, 11, 19, 41, 87, 250, 1084), "log"
    ),
    test_exposure_log_sd=0.12,
    shown=_SHOWN,
    shown_noise=0.45,
    durations=QuantileDistribution(
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
"""A few hundred users and items with the distributions of KuaiRand, for tests and first contact."""

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
    clicks: Clicks | None = None,
) -> TwinConfig:
    """Returns a preset with another seed and other strengths.

    Args:
        name: ``"KuaiRec"``, ``"KuaiRand"`` or ``"Toy"``, in any case.
        seed: Seed of everything.
        taste_strength: ``"measured"`` (as weak as in the real data), ``"strong"``, or the standard deviation
            of taste in logits.
        conformity: Mean conformity in logits per standard deviation of log popularity; None keeps the
            preset's.
        clicks: What counts as a click; None keeps the preset's.

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
            raise ValueError(f"taste_strength is a number or one of {', '.join(levels)}, got {taste_strength!r}")
        taste_strength = levels[taste_strength]
    return replace(
        preset,
        seed=seed,
        taste_strength=float(taste_strength),
        conformity=preset.conformity if conformity is None else float(conformity),
        clicks=clicks or preset.clicks,
    )
