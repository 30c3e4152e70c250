"""Draws synthetic twins: who is shown what and when, what they click, and the data set that comes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from kuaifair_env.data.cache import cached
from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import InteractionLog, Provenance
from kuaifair_env.progress import announce
from kuaifair_env.synthetic.choices import chosen, chosen_truth, watch_ratios
from kuaifair_env.synthetic.config import Layout, QuantileDistribution, TwinConfig, numbers
from kuaifair_env.synthetic.tables import TwinTables, build_tables, catalogue_of, users_of
from kuaifair_env.synthetic.truth import (
    TwinTruth,
    TwinWorld,
    build_world,
    distribution_by_rank,
    shift_to_mean,
    stream,
)

Rows = NDArray[np.int64]
Pairs = tuple[NDArray[np.int32], NDArray[np.int32]]

_TASTE_STEPS = 64
_TASTE_LIMIT = 12
_BLOCK_CELLS = 4_000_000

DAY_MS = 86_400_000
HOUR_MS = 3_600_000

# Shares of views by hour of the day (Beijing time), partial KuaiRand-Pure, 25 April to 8 May.
_HOURS = numbers(
    "41 24 16 10 8 9 16 25 32 39 45 51 58 57 52 51 55 59 57 53 56 58 64 63"  # in thousandths
)


@dataclass(frozen=True)
class Calendar:
    """The period of a log, and its shares of rows by day.

    Attributes:
        start_ms: First midnight (Beijing time) in milliseconds since 1970, UTC.
        days: Relative number of rows on each day.
    """

    start_ms: int
    days: tuple[float, ...]

    def draw(
        self, rng: np.random.Generator, users: NDArray[np.int32], missing: float = 0.0
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Draws times in milliseconds, increasing within a user, and the order in which the rows come at these times.

        Args:
            rng: Source of randomness.
            users: ``(R,)`` user rows, non-decreasing.
            missing: Share of rows without time; they come last, right after the latest time of the log.
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


def draw_train(
    config: TwinConfig, world: TwinWorld, durations_ms: Rows, calendar: Calendar
) -> tuple[InteractionLog, float]:
    """Draws the log of a platform that shows what is popular and what it believes a user likes.

    Items are drawn without replacement with probability proportional to exposure propensity times
    ``exp(personalisation * taste)``; clicks follow preference, conformity and the feed.

    Returns:
        The log, and the logits that the logged feed adds to every exposure: what personalisation, quality and
        conformity leave unexplained of the logged click rate.
    """
    rng = stream(config, 2)
    blocked = None
    available = np.full(config.n_users, config.n_items)
    if config.layout == "kuairec":  # the panel's own cells are the test
        blocked = (_mask(world.panel_users, config.n_users), _mask(world.panel_items, config.n_items))
        available[world.panel_users] -= config.n_panel_items
    counts = _counts(config.train_activity, world.activity_scores, config.train_rows, available)
    users, items = _exposures(rng, world, np.exp(world.exposure_logs), config.personalisation, counts, blocked)
    times, order = calendar.draw(rng, users)
    users, items = users[order], items[order]
    logits = _logits(world, users, items, conformity=1.0)
    logits += world.feed_items[items] + world.feed_users[users]
    lift = round(shift_to_mean(logits[:: max(1, len(logits) // 500_000)], config.logged_click_rate, 12.0, 40), 3)
    clicks = rng.random(len(users)) < expit(logits + lift)
    ratios = None
    if config.layout == "kuairec":  # the other data set has no watch ratios for every row
        ratios = watch_ratios(rng, world, users, items, clicks, durations_ms, logged=True)
    clicks, feedback = chosen(config, items, clicks, ratios, durations_ms, logged=True)
    return InteractionLog(users, items, clicks, times, ratios, feedback=feedback), lift


def draw_test(
    config: TwinConfig, world: TwinWorld, durations_ms: Rows, calendar: Calendar, conformity: float = 0.0
) -> InteractionLog:
    """Draws the log of unbiased exposure: a panel that sees everything, or uniformly random items.

    ``conformity`` is the share of conformity in the clicks; 0 is true preference.
    """
    rng = stream(config, 3)
    users, items = (
        _full_panel(rng, config, world) if config.test_activity is None else _random_pairs(rng, config, world)
    )
    times, order = calendar.draw(rng, users, config.missing_time_share)
    users, items = users[order], items[order]
    clicks = rng.random(len(users)) < expit(_logits(world, users, items, conformity))
    ratios = None
    if config.layout == "kuairec":
        ratios = watch_ratios(rng, world, users, items, clicks, durations_ms, logged=False)
    clicks, feedback = chosen(config, items, clicks, ratios, durations_ms, logged=False)
    return InteractionLog(users, items, clicks, times, ratios, feedback=feedback)


def _full_panel(rng: np.random.Generator, config: TwinConfig, world: TwinWorld) -> Pairs:
    """The whole panel matrix but for a few cells, each user's items in random order."""
    cells = config.n_panel_users * config.n_panel_items
    in_log = np.ones(cells, np.bool_)
    in_log[rng.permutation(cells)[: cells - config.test_rows]] = False
    users = np.repeat(world.panel_users.astype(np.int32), config.n_panel_items)
    items = np.tile(world.panel_items.astype(np.int32), config.n_panel_users)
    return users[in_log], items[in_log]


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


def _counts(distribution: QuantileDistribution, scores: NDArray[np.float64], total: int, available: Rows) -> Rows:
    """Returns rows per user that follow a distribution, keep within what is available and add up to ``total``."""
    relative = distribution_by_rank(distribution, scores)
    most = np.minimum(available, np.maximum(1, np.floor(0.98 * available))).astype(np.int64)
    if total > most.sum():
        most = available
    low, high = 0.0, 4.0 * max(1.0, total / relative.sum()) * float(available.max())
    for _ in range(200):
        factor = (low + high) / 2
        low, high = (factor, high) if np.minimum(relative * factor, most).sum() < total else (low, factor)
    exact = np.minimum(relative * high, most)
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
    The rows come sorted by user, each user's items in random order.
    """
    n_items = len(weights)
    with np.errstate(divide="ignore"):
        inverse = (1.0 / weights).astype(np.float32)
    steps = np.arange(-_TASTE_LIMIT * _TASTE_STEPS, _TASTE_LIMIT * _TASTE_STEPS + 1) / _TASTE_STEPS
    discount = np.exp(-personalisation * steps).astype(np.float32)
    order = np.argsort(-counts, kind="stable")
    order = order[: int((counts > 0).sum())]
    block = max(1, _BLOCK_CELLS // n_items)
    blocks: list[NDArray[np.int64]] = []
    for start in range(0, len(order), block):
        users = order[start : start + block]
        keys = rng.standard_exponential((len(users), n_items), np.float32)
        keys *= inverse
        if personalisation:
            keys *= discount[_taste_steps(world, users)]
        if blocked is not None:
            keys[np.ix_(blocked[0][users], blocked[1])] = np.inf
        blocks.append(_smallest(keys, users, counts[users]))
    packed = np.concatenate(blocks)
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


VERSION = 3
"""Raised whenever the same configuration would give another twin; part of the cache key."""


@dataclass(frozen=True)
class Twin:
    """A synthetic data set with the truth behind it.

    Attributes:
        config: Its configuration.
        world: The truth of the twin's own click and the hidden causes of the logs.
        data: What an agent, a reader or a response model may see.
    """

    config: TwinConfig
    world: TwinWorld
    data: InteractionData

    @cached_property
    def truth(self) -> TwinTruth:
        """The true distribution of feedback, for test worlds, oracles and measures of recovery."""
        needed = "long_view" in dict(self.config.clicks.positive)
        durations = self.tables.durations_ms if needed else np.zeros(self.config.n_items, np.int64)
        return chosen_truth(self.config, self.world, durations)

    @cached_property
    def tables(self) -> TwinTables:
        """The raw tables of users and items."""
        return build_tables(self.config, self.world)


def generate_twin(config: TwinConfig) -> Twin:
    """Generates a twin from scratch.

    Its training log comes from a platform that favours popular items and what it believes a user likes, clicked with
    conformity; its test log from unbiased exposure, clicked by true preference alone.
    """
    world = build_world(config)
    return Twin(config, world, _draw_data(config, world))


def load_twin(config: TwinConfig, folder: str | Path | None = None) -> Twin:
    """Returns :func:`generate_twin` with logs from a cache folder, or from the default one, stored on first use."""
    world = build_world(config)
    key = {"name": f"{config.name}-twin", "version": VERSION, "config": config.as_dict()}

    def draw() -> InteractionData:
        announce(f"drawing the {config.name} twin, {config.train_rows + config.test_rows:,} rows")
        return _draw_data(config, world)

    return Twin(config, world, cached(key, draw, folder))


def _draw_data(config: TwinConfig, world: TwinWorld) -> InteractionData:
    tables = build_tables(config, world)
    durations = tables.durations_ms
    train_calendar, test_calendar = calendars(config.layout)
    with ThreadPoolExecutor(1) as beside:  # each draws from streams of its own
        drawn = beside.submit(draw_test, config, world, durations, test_calendar)
        train, feed_lift = draw_train(config, world, durations, train_calendar)
    test = drawn.result()
    return InteractionData(
        users=users_of(config, tables),
        items=catalogue_of(config, world, tables),
        train=train,
        test=test,
        provenance=provenance(config),
        report={"feed_lift": feed_lift},
    )


def provenance(config: TwinConfig) -> Provenance:
    """Returns the provenance of a twin."""
    unbiased = "a fully observed panel" if config.layout == "kuairec" else "uniformly random exposures"
    return Provenance(
        name=f"{config.name} twin",
        origin="twin",
        description=f"synthetic twin of {config.name}: biased training log, {unbiased} as the test log",
        settings={"version": VERSION, **config.as_dict()},
    )
