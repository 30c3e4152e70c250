"""When a twin's users watch, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.synthetic.config import Layout, QuantileDistribution, TwinConfig, numbers
from kuaifair_env.synthetic.truth import TwinWorld, distribution_by_rank, stream

DAY_MS = 86_400_000
HOUR_MS = 3_600_000

# Shares of views by hour of the day (Beijing time), partial KuaiRand-Pure, 25 April to 8 May.
_HOURS = numbers(
    "41 24 16 10 8 9 16 25 32 39 45 51 58 57 52 51 55 59 57 53 56 58 64 63"  # in thousandths
)


@dataclass(frozen=True)
class Calendar:
    """The period of a log.

    Attributes:
        start_ms: First midnight (Beijing time) in milliseconds since 1970, UTC.
        days: Relative number of rows on each day.
    """

    start_ms: int
    days: tuple[float, ...]

    def draw(
        self, rng: np.random.Generator, users: NDArray[np.int32], missing: float = 0.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws a time for each row.

        Args:
            rng: Source of randomness.
            users: ``(R,)`` user rows, non-decreasing.
            missing: Share of rows without time; they come last, right after the latest time of the log.

        Returns:
            Times in milliseconds, increasing within a user, and the order in which the rows come at these
            times.
        """
        rows = len(users)
        offsets = _drawn(rng, self.days, rows) * DAY_MS
        offsets += _drawn(rng, _HOURS, rows) * HOUR_MS
        offsets += (rng.random(rows, np.float32) * HOUR_MS).astype(np.int64)
        if missing:
            known, unknown = np.split(rng.permutation(rows), [rows - min(round(missing * rows), rows - 1)])
            offsets[unknown] = offsets[known].max() + 1
        order = np.argsort((users.astype(np.int64) << 36) + offsets, kind="stable")
        times: NDArray[np.int64] = self.start_ms + offsets[order]
        return times, order


# 2020-07-05 to 2020-09-05; 2022-04-09 to 2022-05-08 with the published rows per day; the random log from
# 04-22 on.
KUAIREC_CALENDAR = Calendar(1_593_878_400_000, (1.0,) * 63)
KUAIRAND_STANDARD = Calendar(
    1_649_433_600_000,
    numbers(
        "52736 227808 278835 166076 94711 71252 58892 60904 44023 24560 20443 20851 20021 22283 26645 18240 "
        "14911 14530 14328 13972 15839 21204 20790 19554 18943 17600 13390 13834 13687 15747"
    ),
)
KUAIRAND_RANDOM = Calendar(1_650_556_800_000, (1.0,) * 17)


def calendars(layout: Layout) -> tuple[Calendar, Calendar]:
    """Returns the periods of the training and the test log."""
    if layout == "kuairec":
        return KUAIREC_CALENDAR, KUAIREC_CALENDAR
    return KUAIRAND_STANDARD, KUAIRAND_RANDOM


def _drawn(rng: np.random.Generator, shares: tuple[float, ...], rows: int) -> NDArray[np.int64]:
    edges = np.cumsum(np.asarray(shares, np.float64))
    table = np.searchsorted(edges / edges[-1], (np.arange(4096) + 0.5) / 4096, side="right")
    drawn: NDArray[np.int64] = table[rng.integers(0, 4096, rows, np.uint16)]
    return drawn


_BLOCK = 1_000_000

POSITIVE_WATCH_RATIO = 2.0
"""A KuaiRec view is positive from this watch ratio on (the "like" of the data set's own papers)."""

# Watch ratios below 2: in the big matrix (published quartiles and shares from .8, 1 and 2 on) and in the
# small one (partial KuaiRec, sample of cells), as quantiles of the views below 2.
_BODY_LOGGED = QuantileDistribution(
    (0.01, 0.05, 0.13, 0.2697, 0.5394, 0.5895, 0.7141, 0.8091, 0.93, 0.999),
    (0.01, 0.06, 0.15, 0.314825, 0.723471, 0.80, 1.0, 1.177644, 1.55, 1.99),
)
_BODY_PANEL = QuantileDistribution(
    (0.0003, 0.0104, 0.0524, 0.1048, 0.262, 0.3, 0.524, 0.5511, 0.7088, 0.786, 0.9434, 0.999),
    (0.005, 0.0176, 0.0974, 0.1833, 0.4676, 0.53, 0.7692, 0.80, 1.0, 1.1206, 1.5882, 1.99),
)
# Watch ratios from 2 on, partial KuaiRec, big matrix.
_TAIL = QuantileDistribution(
    (0.0005, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.999999),
    (2.0, 2.241, 2.627, 3.49, 5.273, 7.60, 18.9, 570.0),
    "log",
)
# Shares of the variance of watching scores below 2 that come from item, user and taste (partial KuaiRec).
_BODY_SHARES = (0.42, 0.05, 0.05)

# KuaiRand-Pure: a click is 7 s of play or the whole video, a long view 18 s or the whole video.
_CLICK_MS, LONG_VIEW_MS = 7_000, 18_000
_LONG_GIVEN_CLICK = {True: 0.719, False: 0.4806}
_ZERO_PLAY = 0.17  # of the exposures that are no click
_SKIPPED_MS = QuantileDistribution(
    (0.0005, 0.05, 0.25, 0.50, 0.75, 0.95, 0.9995), (60, 863, 1379, 2133, 3647, 6069, 6990), "log"
)
# Play ratio of long views, by duration: shorter videos are watched to their end and again.
_LONG_RATIO = QuantileDistribution(
    (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 0.9999),
    (0.45, 0.6, 0.9, 1.0, 1.05, 1.15, 1.35, 2.2, 24.0),
    "log",
)
_LONG_MS_DISTRIBUTION = QuantileDistribution(
    (0.001, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99),
    (18_500, 22_000, 27_000, 42_000, 75_000, 145_000, 240_000, 330_000, 600_000),
    "log",
)


def watch_ratios(
    rng: np.random.Generator,
    world: TwinWorld,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    clicks: NDArray[np.bool_],
    durations_ms: NDArray[np.int64],
    logged: bool,
) -> NDArray[np.float32]:
    """Draws KuaiRec watch ratios (play time over duration): from 2 on for clicks, below 2 for all others.

    Play times are whole milliseconds: ``ratio * duration`` gives them back.

    Args:
        rng: Source of randomness.
        world: The hidden causes; how long a user watches depends on item, user and taste.
        users: ``(R,)`` user rows.
        items: ``(R,)`` item rows.
        clicks: ``(R,)`` clicks.
        durations_ms: ``(N,)`` durations of the videos, positive.
        logged: Whether this is the platform's log rather than the panel's.

    Returns:
        ``float32 (R,)``.
    """
    truth = world.truth
    by_item, by_user, by_taste = _BODY_SHARES
    distribution = _BODY_LOGGED if logged else _BODY_PANEL
    by_items, by_users = np.sqrt(by_item) * world.quality_scores, np.sqrt(by_user) * world.inclination_scores
    noise = np.sqrt(1.0 - sum(_BODY_SHARES))
    shown = (
        by_items[items[::7]] + by_users[users[::7]]
    )  # the platform shows better videos, more to some users
    centre, spread = float(shown.mean()), float(np.sqrt(shown.var() + by_taste + noise**2))
    ratios = np.empty(len(users), np.float32)
    for start in range(0, len(users), _BLOCK):
        part = slice(start, start + _BLOCK)
        u, i, positive = users[part], items[part], clicks[part]
        scores = noise * rng.standard_normal(len(u)) + by_items[i] + by_users[u]
        scores += np.sqrt(by_taste) * np.einsum("rd,rd->r", truth.user_vectors[u], truth.item_vectors[i])
        scores = (scores - centre) / spread
        durations = durations_ms[i]
        play = np.minimum(np.floor(distribution.at(scores) * durations), POSITIVE_WATCH_RATIO * durations - 1)
        tail = _TAIL.at(rng.standard_normal(int(positive.sum())))
        play[positive] = np.ceil(tail * durations[positive])
        ratios[part] = play / durations
    return ratios


def play_times(
    rng: np.random.Generator, clicks: NDArray[np.bool_], durations: NDArray[np.int64], logged: bool
) -> NDArray[np.int64]:
    """Draws KuaiRand play times: 7 s or the whole video for clicks, less for all others.

    Args:
        rng: Source of randomness.
        clicks: ``(R,)`` clicks.
        durations: ``(R,)`` durations in milliseconds, 0 where unknown.
        logged: Whether this is the platform's log rather than the random one.

    Returns:
        ``int64 (R,)`` milliseconds.
    """
    rows = len(clicks)
    known = np.where(durations > 0, durations, np.iinfo(np.int32).max)
    whole, long_from = np.minimum(known, _CLICK_MS), np.minimum(known, LONG_VIEW_MS)
    play = np.minimum(_SKIPPED_MS.at(rng.standard_normal(rows)), whole - 1)
    play[rng.random(rows) < _ZERO_PLAY] = 0.0
    is_long = rng.random(rows) < _LONG_GIVEN_CLICK[logged]
    glimpse = whole + rng.random(rows) * (long_from - whole)
    finished = np.maximum(
        np.minimum(
            _LONG_MS_DISTRIBUTION.at(rng.standard_normal(rows)),
            known * _LONG_RATIO.at(rng.standard_normal(rows)),
        ),
        long_from,
    )
    drawn = np.where(clicks, np.where(is_long, finished, glimpse), play)
    return np.asarray(np.floor(drawn), np.int64)


Rows = NDArray[np.int64]
Pairs = tuple[NDArray[np.int32], NDArray[np.int32]]

_TASTE_STEPS = 64
_TASTE_LIMIT = 12
_BLOCK_CELLS = 4_000_000


@dataclass(frozen=True)
class TrainDraw:
    """A training log and the level of the feed that was solved for it.

    Attributes:
        log: The log.
        feed_lift: Logits that the logged feed adds to every exposure: what personalisation, quality and
            conformity leave unexplained of the logged click rate.
    """

    log: InteractionLog
    feed_lift: float


def draw_train(config: TwinConfig, world: TwinWorld, durations_ms: Rows, calendar: Calendar) -> TrainDraw:
    """Draws the log of a platform that shows what is popular and what it believes a user likes.

    Items are drawn without replacement with probability proportional to exposure propensity times
    ``exp(personalisation * taste)``; clicks follow preference, conformity and the feed.

    Args:
        config: Sizes and strengths.
        world: The hidden causes.
        durations_ms: ``(N,)`` video durations.
        calendar: When the log was taken.
    """
    rng = stream(config, 2)
    blocked = None
    available = np.full(config.n_users, config.n_items)
    if config.layout == "kuairec":  # the panel's own cells are the test
        blocked = (_mask(world.panel_users, config.n_users), _mask(world.panel_items, config.n_items))
        available[world.panel_users] -= config.n_panel_items
    counts = _counts(config.train_activity, world.activity_scores, config.train_rows, available)
    users, items = _exposures(
        rng, world, np.exp(world.exposure_logs), config.personalisation, counts, blocked
    )
    times, order = calendar.draw(rng, users)
    users, items = users[order], items[order]
    logits = _logits(world, users, items, conformity=1.0)
    logits += world.feed_items[items] + world.feed_users[users]
    lift = _solve_lift(logits, config.logged_click_rate)
    clicks = rng.random(len(users)) < expit(logits + lift)
    ratios = _watched(config, rng, world, users, items, clicks, durations_ms, logged=True)
    return TrainDraw(InteractionLog(users, items, clicks, times, ratios), lift)


def draw_test(
    config: TwinConfig, world: TwinWorld, durations_ms: Rows, calendar: Calendar, conformity: float = 0.0
) -> InteractionLog:
    """Draws the log of unbiased exposure: a panel that sees everything, or uniformly random items.

    Args:
        config: Sizes and strengths.
        world: The hidden causes.
        durations_ms: ``(N,)`` video durations.
        calendar: When the log was taken.
        conformity: Share of conformity in the clicks; 0 is true preference.
    """
    rng = stream(config, 3)
    users, items = (
        _full_panel(rng, config, world) if config.test_activity is None else _random_pairs(rng, config, world)
    )
    times, order = calendar.draw(rng, users, config.missing_time_share)
    users, items = users[order], items[order]
    clicks = rng.random(len(users)) < expit(_logits(world, users, items, conformity))
    ratios = _watched(config, rng, world, users, items, clicks, durations_ms, logged=False)
    return InteractionLog(users, items, clicks, times, ratios)


def _watched(
    config: TwinConfig,
    rng: np.random.Generator,
    world: TwinWorld,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    clicks: NDArray[np.bool_],
    durations_ms: Rows,
    logged: bool,
) -> NDArray[np.float32] | None:
    """Watch ratios where the real data set has them for every row."""
    if config.layout != "kuairec":
        return None
    return watch_ratios(rng, world, users, items, clicks, durations_ms, logged)


def _full_panel(rng: np.random.Generator, config: TwinConfig, world: TwinWorld) -> Pairs:
    """The whole panel matrix but for a few cells, each user's items in random order."""
    cells = config.n_panel_users * config.n_panel_items
    kept = np.ones(cells, np.bool_)
    kept[rng.permutation(cells)[: cells - config.test_rows]] = False
    users = np.repeat(world.panel_users.astype(np.int32), config.n_panel_items)
    items = np.tile(world.panel_items.astype(np.int32), config.n_panel_users)
    return users[kept], items[kept]


def _random_pairs(rng: np.random.Generator, config: TwinConfig, world: TwinWorld) -> Pairs:
    assert config.test_activity is not None
    scores = rng.standard_normal(config.n_panel_users)
    available = np.full(config.n_panel_users, config.n_panel_items)
    counts = np.zeros(config.n_users, np.int64)
    counts[world.panel_users] = _counts(config.test_activity, scores, config.test_rows, available)
    weights = np.zeros(config.n_items)
    uneven = config.test_exposure_log_sd * rng.standard_normal(config.n_panel_items)
    weights[world.panel_items] = np.exp(uneven)
    return _exposures(rng, world, weights, 0.0, counts, None)


def _mask(rows: Rows, size: int) -> NDArray[np.bool_]:
    mask = np.zeros(size, np.bool_)
    mask[rows] = True
    return mask


def _counts(
    distribution: QuantileDistribution, scores: NDArray[np.float64], total: int, available: Rows
) -> Rows:
    """Returns rows per user that follow a distribution, keep within what is available and add up to ``total``."""
    wanted = distribution_by_rank(distribution, scores)
    most = np.minimum(available, np.maximum(1, np.floor(0.98 * available))).astype(np.int64)
    if total > most.sum():
        most = available
    low, high = 0.0, 4.0 * max(1.0, total / wanted.sum()) * float(available.max())
    for _ in range(200):
        factor = (low + high) / 2
        low, high = (factor, high) if np.minimum(wanted * factor, most).sum() < total else (low, factor)
    exact = np.minimum(wanted * high, most)
    counts: Rows = np.asarray(np.floor(exact), np.int64)
    while (missing := total - int(counts.sum())) > 0:
        room = np.where(counts < most, exact - counts, -np.inf)
        richest = np.argsort(-room, kind="stable")[:missing]
        counts[richest[counts[richest] < most[richest]]] += 1
    return counts


def _exposures(
    rng: np.random.Generator,
    world: TwinWorld,
    weights: NDArray[np.float64],
    personalisation: float,
    counts: Rows,
    blocked: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None,
) -> Pairs:
    """Draws ``counts[u]`` distinct items for each user, with probability proportional to weights.

    The items with the smallest ``Exponential / weight`` are a draw without replacement (Efraimidis and
    Spirakis, Information Processing Letters 97, 2006). Users are taken in the order of their counts, so that
    the users of a block need about the same number of smallest keys.

    Returns:
        User and item rows, sorted by user, each user's items in random order.
    """
    n_items = len(weights)
    with np.errstate(divide="ignore"):
        inverse = (1.0 / weights).astype(np.float32)
    steps = np.arange(-_TASTE_LIMIT * _TASTE_STEPS, _TASTE_LIMIT * _TASTE_STEPS + 1) / _TASTE_STEPS
    discount = np.exp(-personalisation * steps).astype(np.float32)
    order = np.argsort(-counts, kind="stable")
    order = order[: int((counts > 0).sum())]
    block = max(1, _BLOCK_CELLS // n_items)
    found: list[NDArray[np.int64]] = []
    for start in range(0, len(order), block):
        users = order[start : start + block]
        keys = rng.standard_exponential((len(users), n_items), np.float32)
        keys *= inverse
        if personalisation:
            keys *= discount[_taste_steps(world, users)]
        if blocked is not None:
            keys[np.ix_(blocked[0][users], blocked[1])] = np.inf
        found.append(_smallest(keys, users, counts[users]))
    packed = np.concatenate(found)
    packed.sort()
    return (packed >> 32).astype(np.int32), (packed & 0xFFFFFFFF).astype(np.int32)


def _taste_steps(world: TwinWorld, users: Rows) -> NDArray[np.int32]:
    """Returns the taste of users for every item as whole steps, exactly the same on every platform."""
    taste = world.truth.user_vectors[users] @ world.truth.item_vectors.T  # exact: see twin_truth
    taste *= _TASTE_STEPS
    np.rint(taste, out=taste)
    np.clip(taste, -_TASTE_LIMIT * _TASTE_STEPS, _TASTE_LIMIT * _TASTE_STEPS, out=taste)
    taste += _TASTE_LIMIT * _TASTE_STEPS
    return taste.astype(np.int32)


def _smallest(keys: NDArray[np.float32], users: Rows, counts: Rows) -> NDArray[np.int64]:
    """Returns (user, item) packed into one number for the ``counts`` smallest keys of each row."""
    most = int(counts.max())
    rows = np.arange(len(users))[:, None]
    if most < keys.shape[1]:
        nearest = np.argpartition(keys, most - 1, axis=1)[:, :most]
        ranking = np.argsort(keys[rows, nearest], axis=1, kind="stable")
        nearest = nearest[rows, ranking]
    else:
        nearest = np.argsort(keys, axis=1, kind="stable")
    taken = np.arange(most) < counts[:, None]
    return ((users[:, None] << 32) | nearest)[taken]


def _logits(
    world: TwinWorld, users: NDArray[np.int32], items: NDArray[np.int32], conformity: float
) -> NDArray[np.float64]:
    """Returns ``float64 (R,)`` click logits; double precision makes clicks the same on every platform."""
    truth = world.truth
    logits = np.empty(len(users))
    for start in range(0, len(users), _BLOCK_CELLS // 4):
        part = slice(start, start + _BLOCK_CELLS // 4)
        u, i = users[part], items[part]
        taste = np.einsum("rd,rd->r", truth.user_vectors[u], truth.item_vectors[i])
        logits[part] = truth.taste_strength * taste.astype(np.float64)
        logits[part] += truth.item_effects[i].astype(np.float64) + truth.user_effects[u]
        if conformity:
            logits[part] += conformity * truth.herding[u].astype(np.float64) * truth.popularity[i]
    return logits


def _solve_lift(logits: NDArray[np.float64], rate: float) -> float:
    """Returns the shift, to three decimals, that brings the mean click probability to ``rate``."""
    sample = logits[:: max(1, len(logits) // 500_000)]
    low, high = -12.0, 12.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expit(sample + middle).mean() < rate else (low, middle)
    return round(low, 3)
