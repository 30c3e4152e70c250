"""What users of a twin do besides the twin's own click, as its logs show it and as its truth knows it.

Whatever counts as a click, the views and all that is logged of them are the same. KuaiRec: a view's watch ratio is 2 or
more where the twin's own click says so; otherwise it follows from a watching score of item, user, taste and chance.
KuaiRand: long views, likes and so on follow some of the clicks, on some items more often than on others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtr, ndtri

from kuaifair_env.data.clicks import Behaviour, Clicks, kuairand_clicks, kuairec_clicks
from kuaifair_env.data.schema import BoolArray, FloatArray
from kuaifair_env.synthetic.config import QuantileDistribution, TwinConfig
from kuaifair_env.synthetic.truth import (
    SCORE_GRID,
    ClickChoice,
    Scores,
    TwinTruth,
    TwinWorld,
    shift_to_mean,
    stream,
)

OWN_WATCH_RATIO = 2.0
"""Watch ratio from which a view is the KuaiRec twin's own click."""

_BLOCK = 1_000_000

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
_ITEM_SHARE, _USER_SHARE, _TASTE_SHARE = 0.42, 0.05, 0.05
_CHANCE = math.sqrt(1.0 - _ITEM_SHARE - _USER_SHARE - _TASTE_SHARE)
# A logistic variable has about 1.7 times the deviation of a normal one with the same slope in the middle.
_SCORE_PER_LOGIT = _CHANCE / 1.7


@dataclass(frozen=True)
class _Watching:
    """Watching scores of views below the twin's own click, but for taste and chance.

    Attributes:
        items: ``float64 (N,)`` the items' part.
        users: ``float64 (U,)`` the users' part.
        conformity: Share of the users' conformity in it.
        body: Distribution of watch ratios over the views that the scores belong to.
        centre: Mean of the scores over these views.
        spread: Their standard deviation.
    """

    items: Scores
    users: Scores
    conformity: float
    body: QuantileDistribution
    centre: float
    spread: float

    def standardised(self, scores: Scores) -> Scores:
        """Returns standard normal scores over the views."""
        standard: Scores = (scores - self.centre) / self.spread
        return standard


def _panel_watching(world: TwinWorld) -> _Watching:
    """Watching under random exposure, without conformity, over the cells of the panel that are no own clicks."""
    items = math.sqrt(_ITEM_SHARE) * world.quality_scores
    users = math.sqrt(_USER_SHARE) * world.inclination_scores
    some = world.panel_users[:: max(1, len(world.panel_users) // 100)]
    grid = np.tile(world.panel_items, (len(some), 1))
    weights = 1.0 - world.truth.click_probability(some, grid).astype(np.float64)
    shown = items[grid] + users[some][:, None] + math.sqrt(_TASTE_SHARE) * world.truth.taste(some, grid)
    centre = float(np.average(shown, weights=weights))
    variance = float(np.average((shown - centre) ** 2, weights=weights)) + _CHANCE**2
    return _Watching(items, users, 0.0, _BODY_PANEL, round(centre, 6), round(math.sqrt(variance), 6))


def _logged_watching(world: TwinWorld, shown_users: NDArray[np.int32], shown_items: NDArray[np.int32]) -> _Watching:
    """Watching in the platform's log, which has its conformity and its feed."""
    truth = world.truth
    items = math.sqrt(_ITEM_SHARE) * world.quality_scores + _SCORE_PER_LOGIT * world.feed_items
    users = math.sqrt(_USER_SHARE) * world.inclination_scores + _SCORE_PER_LOGIT * world.feed_users
    u, i = shown_users[::7], shown_items[::7]
    herding = truth.herding[u].astype(np.float64) * truth.popularity[i]
    shown = items[i] + users[u] + _SCORE_PER_LOGIT * herding
    spread = math.sqrt(float(shown.var()) + _TASTE_SHARE + _CHANCE**2)
    return _Watching(items, users, 1.0, _BODY_LOGGED, float(shown.mean()), spread)


def watch_ratios(
    rng: np.random.Generator,
    world: TwinWorld,
    users: NDArray[np.int32],
    items: NDArray[np.int32],
    clicks: BoolArray,
    durations_ms: NDArray[np.int64],
    logged: bool,
) -> FloatArray:
    """Draws KuaiRec watch ratios (play time over duration): from 2 on for the twin's own clicks, below 2 for others.

    Play times are whole milliseconds: ``ratio * duration`` gives them back. ``logged`` says whether this is the
    platform's log rather than the panel's.
    """
    truth = world.truth
    watching = _logged_watching(world, users, items) if logged else _panel_watching(world)
    ratios = np.empty(len(users), np.float32)
    for start in range(0, len(users), _BLOCK):
        part = slice(start, start + _BLOCK)
        u, i, positive = users[part], items[part], clicks[part]
        scores = _CHANCE * rng.standard_normal(len(u)) + watching.items[i] + watching.users[u]
        taste = np.einsum("rd,rd->r", truth.user_vectors[u], truth.item_vectors[i])
        scores += math.sqrt(_TASTE_SHARE) * taste
        if watching.conformity:
            scores += _SCORE_PER_LOGIT * truth.herding[u].astype(np.float64) * truth.popularity[i]
        durations = durations_ms[i]
        body = np.floor(watching.body.at(watching.standardised(scores)) * durations)
        play = np.minimum(body, OWN_WATCH_RATIO * durations - 1)
        tail = _TAIL.at(rng.standard_normal(int(positive.sum())))
        play[positive] = np.ceil(tail * durations[positive])
        ratios[part] = play / durations
    return ratios


# Chance of other feedback given a click, in the standard and in the random log (published rates), and how much it
# differs between items (standard deviation in logits; statistic table: long to valid plays, likes to plays).
_AFTER_CLICK: dict[Behaviour, tuple[float, float, float]] = {
    "long_view": (0.719, 0.4806, 0.55),
    "is_like": (0.040, 0.029, 0.9),
    "is_follow": (0.0031, 0.0013, 0.9),
    "is_comment": (0.0057, 0.0022, 0.9),
    "is_forward": (0.0021, 0.0017, 0.9),
    "is_profile_enter": (0.046, 0.034, 0.9),
}
_WHOLE_MS = 7_000
"""A shorter video that is clicked is played whole, which makes a long view."""


def behaviour_rates(config: TwinConfig, name: Behaviour, durations_ms: NDArray[np.int64], logged: bool) -> Scores:
    """Returns ``float64 (N,)``, how likely a KuaiRand behaviour is on each item, given a click."""
    if name == "is_click":
        return np.ones(config.n_items)
    in_log, at_random, spread = _AFTER_CLICK[name]
    rate = in_log if logged else at_random
    scores = stream(config, 30 + get_args(Behaviour).index(name)).standard_normal(config.n_items)
    logits = logit(rate) + spread * scores
    rates = np.round(expit(logits + shift_to_mean(logits, rate, 8.0, 50)), 8)
    if name == "long_view":
        rates[(durations_ms > 0) & (durations_ms <= _WHOLE_MS)] = 1.0
    return rates


def behaviours(
    config: TwinConfig,
    items: NDArray[np.int32],
    clicks: BoolArray,
    durations_ms: NDArray[np.int64],
    logged: bool,
    names: Iterable[Behaviour] = get_args(Behaviour),
) -> dict[str, BoolArray]:
    """Returns KuaiRand behaviours of a log's views by column, which follow from its clicks.

    Args:
        config: The twin's configuration.
        items: ``(R,)`` item rows.
        clicks: ``(R,)`` the twin's own clicks.
        durations_ms: ``(N,)`` durations, 0 where unknown.
        logged: Whether this is the platform's log rather than the random one.
        names: Which columns.
    """
    columns: dict[str, BoolArray] = {}
    for name in names:
        if name == "is_click":
            columns[name] = clicks
            continue
        rates = behaviour_rates(config, name, durations_ms, logged)
        draws = stream(config, 40 + 20 * logged + get_args(Behaviour).index(name)).random(len(items))
        columns[name] = clicks & (draws < rates[items])
    return columns


def chosen(
    config: TwinConfig,
    items: NDArray[np.int32],
    own_clicks: BoolArray,
    ratios: FloatArray | None,
    durations_ms: NDArray[np.int64],
    logged: bool,
) -> tuple[BoolArray, FloatArray | None]:
    """Returns clicks and, where it is graded, feedback of a log's views, by what counts as a click."""
    if ratios is not None:
        return config.clicks.of_watch_ratios(ratios)
    names = [name for name in get_args(Behaviour) if name in dict(config.clicks.positive)]
    return config.clicks.of_columns(behaviours(config, items, own_clicks, durations_ms, logged, names))


def chosen_truth(config: TwinConfig, world: TwinWorld, durations_ms: NDArray[np.int64]) -> TwinTruth:
    """Returns the truth of what counts as a click; graded feedback is divided by the largest that there can be."""
    if config.clicks in (kuairec_clicks({"watch_ratio": OWN_WATCH_RATIO}), kuairand_clicks()):
        return world.truth
    kuairec = config.layout == "kuairec"
    choice = _kuairec_choice(config, world) if kuairec else _kuairand_choice(config, durations_ms)
    return replace(world.truth, choice=choice)


def _kuairec_choice(config: TwinConfig, world: TwinWorld) -> ClickChoice:
    watching = _panel_watching(world)
    given, otherwise = _watching_feedback(config.clicks, watching)
    return ClickChoice(
        given_click=np.full(config.n_items, given, np.float32),
        otherwise=np.round(otherwise, 8).astype(np.float32),
        item_scores=watching.items.astype(np.float32),
        user_scores=watching.users.astype(np.float32),
        taste_weight=math.sqrt(_TASTE_SHARE),
        herding_weight=_SCORE_PER_LOGIT,
    )


def _watching_feedback(clicks: Clicks, watching: _Watching) -> tuple[float, Scores]:
    """Returns expected feedback given the twin's own click, and without it at each score of the grid."""
    if clicks.graded:
        levels = (np.arange(4000) + 0.5) / 4000
        given = float(np.minimum(_TAIL.at(ndtri(levels)), clicks.largest).mean())
        nodes, weights = np.polynomial.hermite_e.hermegauss(65)
        scores = watching.standardised(SCORE_GRID[:, None] + _CHANCE * nodes)
        otherwise = np.minimum(watching.body.at(scores), clicks.largest) @ (weights / weights.sum())
        return given / clicks.largest, otherwise / clicks.largest
    threshold = clicks.threshold
    if threshold >= OWN_WATCH_RATIO:
        knots = ndtri(np.asarray(_TAIL.levels))
        above = ndtr(-np.interp(math.log(threshold), np.log(_TAIL.values), knots, left=-np.inf, right=np.inf))
        return float(above), np.zeros(len(SCORE_GRID))
    body = watching.body
    least = np.interp(threshold, body.values, ndtri(np.asarray(body.levels)), left=-np.inf, right=np.inf)
    return 1.0, ndtr((watching.standardised(SCORE_GRID) - least) * watching.spread / _CHANCE)


def _kuairand_choice(config: TwinConfig, durations_ms: NDArray[np.int64]) -> ClickChoice:
    positive = dict(config.clicks.positive)
    worth = np.zeros(config.n_items)
    for name in get_args(Behaviour):
        if name in positive:
            worth += positive[name] * behaviour_rates(config, name, durations_ms, logged=False)
    return ClickChoice(
        given_click=(worth / config.clicks.largest).astype(np.float32),
        otherwise=np.zeros(len(SCORE_GRID), np.float32),
        item_scores=np.zeros(config.n_items, np.float32),
        user_scores=np.zeros(config.n_users, np.float32),
    )
