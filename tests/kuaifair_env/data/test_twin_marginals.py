"""The twins beside the published statistics of the real data sets.

Rows marked (partial) are compared with figures measured on the partial real data by the very functions used here, all
others with published ones. The tolerances are the largest distances at which the twin still counts as a fit. Run with
``-s`` to see the tables.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logit
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import roc_auc_score
from twin_files import play_times
from twin_measures import (
    TWICE,
    Row,
    gini,
    held_out_gain,
    history_taste,
    quantile_rows,
    rates,
    smoothed,
    table,
    taste_spectrum,
    top_share,
    true_spread,
    within_user_auc,
)

from kuaifair_env.data.clicks import kuairec_clicks
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.synthetic.choices import behaviours, chosen_truth
from kuaifair_env.synthetic.config import KUAIRAND, KUAIREC, twin_config
from kuaifair_env.synthetic.truth import TwinWorld, build_world
from kuaifair_env.synthetic.twin import Twin, generate_twin

APRIL_25 = 1_650_816_000_000  # midnight in Beijing


def check(title: str, rows: list[Row]) -> None:
    text = table(title, rows)
    print(f"\n{text}")
    assert all(row.fits for row in rows), text


def expected_rates(world: TwinWorld, users):
    """Mean click probabilities of some users, and of all items among them, under uniformly random exposure."""
    chance = TwinResponse(world.truth).expected_catalogue(users, world.truth.n_items)
    return chance.mean(1), chance.mean(0)


# ---------------------------------------------------------------- quick: the truth alone, at full size, and the Toy


def test_kuairand_truth_has_the_published_distributions_of_click_rates():
    world = build_world(KUAIRAND)
    by_user, by_item = expected_rates(world, np.arange(0, KUAIRAND.n_users, 20))
    levels = (0.05, 0.25, 0.50, 0.75, 0.95)
    rows = [
        Row("random-exposure click rate", 0.1762, float(by_item.mean()), 0.006),
        Row("standard deviation of item click rates, .815 x .096", 0.078, float(by_item.std()), 0.005),
        # Beta(3.74, 13.5) at the level of the whole random log
        *quantile_rows("item click rate", levels, (0.064, 0.118, 0.168, 0.226, 0.320), by_item, absolute=0.012),
        # Beta(1.3, 6.08): see twin_presets
        *quantile_rows("user click rate", levels, (0.019, 0.073, 0.147, 0.250, 0.436), by_user, absolute=0.02),
    ]
    check("KuaiRand twin, truth", rows)


@pytest.mark.slow
def test_kuairec_truth_has_the_published_rate_at_every_watch_ratio_and_room_for_the_papers_rewards():
    world = build_world(KUAIREC)
    users = world.panel_users[::3]
    published = {0.5: 0.73, 0.8: 0.4744, 1.0: 0.3240, 2.0: 0.0464}
    rows, rewards = [], {}
    for threshold, rate in published.items():
        config = replace(KUAIREC, clicks=kuairec_clicks({"watch_ratio": threshold}))
        truth = chosen_truth(config, world, np.zeros(KUAIREC.n_items, np.int64))
        chances = truth.click_probability(users, np.tile(world.panel_items, (len(users), 1)))
        rows.append(Row(f"small matrix, watch ratio from {threshold:g}", rate, float(chances.mean()), 0.012))
        rewards[threshold] = chances.mean(), np.sort(chances, axis=1)[:, -10:].mean()
    check("KuaiRec twin, truth", rows)
    least, most = 0.577, 0.917  # R_each of the paper's methods for KuaiRec
    random, best = rewards[KUAIREC.clicks.threshold]
    assert random < least and most < best
    assert rewards[0.5][0] > least and rewards[2.0][1] < most, "neither .5 nor 2 would leave that room"


def test_kuairec_truth_has_the_published_distributions_of_positive_rates():
    world = build_world(KUAIREC)
    by_user, by_item = expected_rates(world, np.arange(0, KUAIREC.n_users, 5))
    levels = (0.05, 0.25, 0.50, 0.75, 0.95, 0.99)
    rows = [
        Row("positive rate of the small matrix", 0.0463, float(by_item.mean()), 0.003),
        *quantile_rows(
            "item positive rate",
            levels,
            (0.0014, 0.0184, 0.0312, 0.0546, 0.1247, 0.2521),
            by_item,
            0.12,
            0.002,
        ),
        *quantile_rows(
            "user positive rate",
            levels,
            (0.0057, 0.0132, 0.0286, 0.0669, 0.1377, 0.2018),
            by_user,
            0.12,
            0.002,
        ),
    ]
    check("KuaiRec twin, truth", rows)


def test_the_toy_is_a_small_kuairand(toy):
    data = toy.data
    exposures = data.train.exposures(len(data.items))
    item_rate, shown = rates(data.test.items, data.test.clicks, len(data.items))
    rows = [
        Row("exposure Gini", 0.729, gini(exposures), 0.08),
        Row("share of exposure of the top 20 %", 0.765, top_share(exposures, 0.2), 0.08),
        Row("logged click rate", 0.4597, float(data.train.clicks.mean()), 0.015),
        Row("random-exposure click rate", 0.1762, float(data.test.clicks.mean()), 0.025),
        Row("standard deviation of item click rates", 0.078, true_spread(item_rate, shown), 0.012),
        Row("Spearman: exposures, random click rate", 0.317, spearmanr(exposures, item_rate)[0], 0.15),
        Row("Spearman: shown, exposures", 0.850, spearmanr(data.items.shown, exposures)[0], 0.1),
    ]
    check("Toy twin beside KuaiRand-Pure", rows)


# ---------------------------------------------------------------- KuaiRand at full size


@pytest.fixture(scope="module")
def kuairand() -> Twin:
    return generate_twin(KUAIRAND)


def late_part(twin: Twin) -> InteractionLog:
    """The days of which the published item statistics are: 25 April to 8 May."""
    return twin.data.train.take(twin.data.train.times >= APRIL_25)


@pytest.mark.slow
def test_kuairand_exposure_and_activity(kuairand):
    data = kuairand.data
    exposures = data.train.exposures(len(data.items))
    late = late_part(kuairand).exposures(len(data.items))
    per_user = np.bincount(data.train.users, minlength=len(data.users))
    random_exposures = data.test.exposures(len(data.items))
    rows = [
        Row("standard rows", 1_436_609, len(data.train), 0),
        Row("random rows", 1_186_059, len(data.test), 0),
        Row("exposure Gini", 0.729, gini(exposures), 0.02),
        Row("share of exposure of the top 20 %", 0.765, top_share(exposures, 0.2), 0.02),
        Row("share of the top 1 %, 14 days", 0.194, top_share(late, 0.01), 0.04),
        Row("share of the top 10 %, 14 days", 0.643, top_share(late, 0.1), 0.08),
        *quantile_rows(
            "exposures of shown items, 14 days (partial)",
            (0.5, 0.75, 0.9, 0.99),
            (10, 31, 88, 399),
            late[late > 0],
            0.2,
        ),
        Row("Gini of random exposure", 0.0808, gini(random_exposures), 0.005),
        *quantile_rows(
            "standard rows per user",
            (0.1, 0.25, 0.5, 0.75, 0.9, 0.99),
            (8, 18, 39, 72, 115, 234),
            per_user,
            0.05,
        ),
        Row("largest number of rows of a user", 910, per_user.max(), 90),
        Row("mean random rows per user", 1_186_059 / 27_285, len(data.test) / len(data.users), 0.01),
    ]
    check("KuaiRand twin: exposure and activity", rows)


@pytest.mark.slow
def test_kuairand_feedback_and_its_tie_to_popularity(kuairand):
    data, late = kuairand.data, late_part(kuairand)
    size = len(data.items)
    quality, _ = rates(data.test.items, data.test.clicks, size)
    logged, shown = rates(late.items, late.clicks, size)
    user_logged, user_rows = rates(late.users, late.clicks, len(data.users))
    user_random, user_shown = rates(data.test.users, data.test.clicks, len(data.users))
    often, some = shown >= 30, shown >= 10
    videos = kuairand.tables.videos

    def tie(values):
        return spearmanr(quality, values)[0]

    rows = [
        Row("logged click rate", 0.4597, float(data.train.clicks.mean()), 0.003),
        Row("random-exposure click rate", 0.1762, float(data.test.clicks.mean()), 0.004),
        Row(
            "random item click rate: true standard deviation",
            0.078,
            true_spread(quality, data.test.exposures(size)),
            0.005,
        ),
        *quantile_rows(
            "random item click rate",
            (0.05, 0.25, 0.50, 0.75, 0.95),
            (0.062, 0.113, 0.165, 0.226, 0.333),  # published for users with a click, times .815
            quality,
            absolute=0.012,
        ),
        Row(
            "random user click rate, users with a click: true spread (partial)",
            0.113,
            true_spread(user_random[user_random > 0], user_shown[user_random > 0]),
            0.015,
        ),
        Row(
            "logged item click rate, 30 rows or more: spread",
            0.176,
            float(logged[often].std()),
            0.02,
        ),
        *quantile_rows(
            "logged item click rate, 30 rows or more",
            (0.05, 0.25, 0.50, 0.75, 0.95),
            (0.139, 0.322, 0.465, 0.580, 0.709),
            logged[often],
            absolute=0.06,
        ),
        Row(
            "logged user click rate, 10 rows or more: spread",
            0.223,
            float(user_logged[user_rows >= 10].std()),
            0.02,
        ),
        Row(
            "logged user click rate, 10 rows or more: median",
            0.429,
            float(np.median(user_logged[user_rows >= 10])),
            0.04,
        ),
        Row("Pearson: logged, random item click rate", 0.358, pearsonr(logged[often], quality[often])[0], 0.07),
        Row(
            "Spearman: logged, random item click rate",
            0.348,
            spearmanr(logged[often], quality[often])[0],
            0.07,
        ),
        Row("Spearman: exposures, logged click rate", 0.169, spearmanr(shown[some], logged[some])[0], 0.06),
        Row("Spearman: 14-day exposures, random click rate", 0.317, tie(shown), 0.04),
        Row("Spearman: show_user_num, random click rate", 0.318, tie(videos["show_user_num"]), 0.06),
        Row("Spearman: play_user_num, random click rate", 0.333, tie(videos["play_user_num"]), 0.06),
        Row(
            "Spearman: valid_play_user_num, random click rate",
            0.390,
            tie(videos["valid_play_user_num"]),
            0.06,
        ),
        Row(
            "Spearman: long_time_play_user_num, random click rate",
            0.391,
            tie(videos["long_time_play_user_num"]),
            0.06,
        ),
        Row("Spearman: like_user_num, random click rate", 0.110, tie(videos["like_user_num"]), 0.06),
        Row("same videos: logged click rate", 0.389, float(logged[shown > 0].mean()), 0.03),
        Row("same videos: random click rate", 0.193, float(quality[shown > 0].mean()), 0.02),
    ]
    check("KuaiRand twin: feedback", rows)


@pytest.mark.slow
def test_kuairand_feed_lifts_every_kind_of_item_about_alike(kuairand):
    """In the real logs the feed adds .9 (rare items) to 1.2 logits (popular ones) to an item's random click rate."""
    data = kuairand.data
    size = len(data.items)
    exposures = data.train.exposures(size)
    clicks = data.train.click_counts(size)
    quality, _ = rates(data.test.items, data.test.clicks, size)
    tenths = np.array_split(np.argsort(exposures, kind="stable"), 10)
    published = (0.911, 0.911, 1.067, 1.087, 1.263, 1.206, 1.276, 1.309, 1.263, 1.165)
    rows = [
        Row(
            f"logged over random click rate in logits, tenth {number + 1} by exposure (partial)",
            target,
            float(logit(clicks[items].sum() / exposures[items].sum()) - logit(quality[items].mean())),
            0.35,
        )
        for number, (target, items) in enumerate(zip(published, tenths, strict=True))
    ]
    check("KuaiRand twin: lift of the feed", rows)


@pytest.mark.slow
def test_kuairand_taste_is_as_weak_as_in_the_real_logs(kuairand):
    """As in the partial file: only users with a random click, about as many rows."""
    data = kuairand.data
    n_users, n_items = len(data.users), len(data.items)
    clicked = np.flatnonzero(np.bincount(data.test.users, data.test.clicks, n_users))
    kept = np.zeros(n_users, np.bool_)
    kept[np.random.default_rng(1).permutation(clicked)[:12_870]] = True
    test = data.test.take(kept[data.test.users])
    found = history_taste(data.train, test, n_users, n_items)
    in_sample = within_user_auc(test.users, smoothed(test.items, test.clicks, n_items)[test.items], test.clicks)
    logged, rows_logged = rates(data.train.users, data.train.clicks, n_users)
    random, rows_random = rates(data.test.users, data.test.clicks, n_users)
    both = (rows_logged >= 20) & (rows_random >= 30) & (random > 0)
    rows = [
        Row("within-user AUC of item quality, in sample", 0.689, in_sample, 0.012),
        Row("within-user AUC of item quality, held out (partial)", 0.651, found.quality_auc, 0.015),
        Row("what logged history adds to it (partial)", 0.0204, found.history_auc - found.quality_auc, 0.006),
        Row("logits per standard deviation of likeness (partial)", 0.298, found.slope, 0.04),
        Row(
            "Pearson of users: logged, random click rate (partial)",
            0.679,
            pearsonr(logged[both], random[both])[0],
            0.05,
        ),
        Row(
            "Spearman: users' rows, logged click rate (partial)",
            -0.249,
            spearmanr(rows_logged[both], logged[both])[0],
            0.1,
        ),
    ]
    check("KuaiRand twin: taste and users", rows)


@pytest.mark.slow
def test_kuairand_tables_and_watching(kuairand):
    data, videos = kuairand.data, kuairand.tables.videos
    counts = data.items.tags.sum(1)
    sizes = np.sort(data.items.tags.sum(0))[::-1]
    durations = kuairand.tables.durations_ms
    rows = [
        Row(f"share of items with {number} tags", share, float((counts == number).mean()), 0.015)
        for number, share in enumerate((0.013, 0.751, 0.232))
    ]
    rows += [
        Row(f"items of the {place + 1}. largest tag", size, int(sizes[place]), 0.12 * size)
        for place, size in enumerate((1446, 732, 675, 606, 489))
    ]
    levels = (0.05, 0.25, 0.50, 0.75, 0.95)
    rows += quantile_rows("show_user_num", levels, (761, 1817, 3922, 9378, 31958), videos["show_user_num"], 0.03)
    rows += quantile_rows("play_user_num", levels, (367, 938, 2291, 6367, 26091), videos["play_user_num"], 0.12)
    rows += quantile_rows(
        "duration in s", levels, (10.7, 31.9, 81.2, 148.2, 303.5), durations[durations > 0] / 1000, 0.05
    )
    full = (data.users.features.values[:, data.users.features.names.index("user_active_degree=full_active")]).mean()
    rows += [
        Row("Gini of show_user_num", 0.632, gini(videos["show_user_num"]), 0.02),
        Row(
            "Spearman: show_user_num, exposures (partial)",
            0.850,
            spearmanr(videos["show_user_num"], data.train.exposures(len(data.items)))[0],
            0.04,
        ),
        Row("share of full_active users", 0.658, float(full), 0.005),
    ]
    for name, log, (long_views, complete, play) in (
        ("standard", data.train, (0.3318, 0.1432, 21.5)),  # the play time: partial
        ("random", data.test, (0.0850, 0.0332, 6.5)),
    ):
        length = durations[log.items]
        logged = name == "standard"
        long = behaviours(kuairand.config, log.items, log.clicks, durations, logged, ["long_view"])["long_view"]
        times = play_times(np.random.default_rng(0), log.clicks, long, length)
        known = length > 0
        long_enough = times >= np.where(known, np.minimum(length, 18_000), 18_000)
        rows += [
            Row(f"{name}: share of long views", long_views, float((log.clicks & long_enough).mean()), 0.01),
            Row(
                f"{name}: share of plays of 95 % or more",
                complete,
                float((times[known] >= 0.95 * length[known]).mean()),
                0.015,
            ),
            Row(f"{name}: mean play time in s", play, float(times.mean()) / 1000, 2.0),
        ]
    check("KuaiRand twin: tables and watching", rows)


# ---------------------------------------------------------------- KuaiRec at full size


@pytest.fixture(scope="module")
def kuairec() -> Twin:
    return generate_twin(replace(KUAIREC, clicks=TWICE))


def small_matrix(twin: Twin):
    world, test = twin.world, twin.data.test.take(twin.data.test.clicks)
    matrix = np.zeros((len(world.panel_users), len(world.panel_items)), np.bool_)
    matrix[np.searchsorted(world.panel_users, test.users), np.searchsorted(world.panel_items, test.items)] = True
    return matrix


@pytest.mark.slow
def test_kuairec_positives_of_the_small_matrix(kuairec):
    matrix = small_matrix(kuairec)
    by_item, by_user = matrix.mean(0), matrix.mean(1)
    tags = kuairec.world.first_tags[kuairec.world.panel_items]
    mean_of_tag = (np.bincount(tags, by_item) / np.maximum(np.bincount(tags), 1))[tags]
    some = np.random.default_rng(0).random(matrix.shape) < 0.1
    spectrum = taste_spectrum(matrix)
    additive, with_taste = held_out_gain(matrix)
    levels = (0.05, 0.25, 0.50, 0.75, 0.95, 0.99)
    rows = [
        Row("share of positives", 0.0463, float(matrix.mean()), 0.002),
        *quantile_rows(
            "item positive rate",
            levels,
            (0.0014, 0.0184, 0.0312, 0.0546, 0.1247, 0.2521),
            by_item,
            0.1,
            0.0015,
        ),
        Row("Gini of item positives", 0.497, gini(by_item), 0.03),
        Row("share of positives of the top 20 % of items", 0.538, top_share(by_item, 0.2), 0.03),
        Row("items without a positive", 51, int((by_item == 0).sum()), 60),
        *quantile_rows(
            "user positive rate",
            levels,
            (0.0057, 0.0132, 0.0286, 0.0669, 0.1377, 0.2018),
            by_user,
            0.1,
            0.0015,
        ),
        Row("Gini of user positives", 0.500, gini(by_user), 0.03),
        Row(
            "AUC of the item mean",
            0.759,
            roc_auc_score(matrix[some], np.broadcast_to(by_item, matrix.shape)[some]),
            0.015,
        ),
        Row(
            "AUC of the user mean",
            0.762,
            roc_auc_score(matrix[some], np.broadcast_to(by_user[:, None], matrix.shape)[some]),
            0.015,
        ),
        Row("variance of item rates by first tag", 0.052, float(mean_of_tag.var() / by_item.var()), 0.04),
        Row("largest residual singular value over the edge (partial)", 2.134, float(spectrum[0]), 0.25),
        Row("second (partial)", 1.675, float(spectrum[1]), 0.25),
        Row("third (partial)", 1.560, float(spectrum[2]), 0.35),
        Row("singular values above the edge, published and partial: 6, 10", 8, int((spectrum > 1).sum()), 2),
        Row("what taste adds to held-out AUC (partial)", 0.0071, with_taste - additive, 0.005),
        Row("held-out AUC of user and item effects (partial)", 0.850, additive, 0.035),
    ]
    check("KuaiRec twin: small matrix", rows)


@pytest.mark.slow
def test_kuairec_big_matrix_mixes_exposure_and_quality(kuairec):
    data, world, matrix = kuairec.data, kuairec.world, small_matrix(kuairec)
    positives = data.train.click_counts(len(data.items))
    per_user = np.bincount(data.train.users[data.train.clicks], minlength=len(data.users))
    views = np.bincount(data.train.users, minlength=len(data.users)) * 12_530_806 / 11_564_987
    repeats = 915_673 / 846_254  # published counts keep exact duplicates, the twin's log has none
    inside = np.zeros(len(data.items), np.bool_)
    inside[world.panel_items] = True
    rows = [
        Row("rows without exact duplicates", 11_564_987, len(data.train), 0),
        Row("share of positives", 0.0731, float(data.train.clicks.mean()), 0.001),
        *quantile_rows("views per user", (0.25, 0.5, 0.75), (883, 1846.5, 2461), views, 0.03),
        *quantile_rows(
            "positives per item",
            (0.25, 0.5, 0.75, 0.9, 0.95, 0.99),
            (3, 13, 99, 250, 382, 834),
            positives * repeats,
            0.15,
            2,
        ),
        Row("Gini of positives per item", 0.753, gini(positives), 0.02),
        Row("share of positives of the top 1 % of items", 0.139, top_share(positives, 0.01), 0.03),
        Row("share of positives of the top 10 % of items", 0.568, top_share(positives, 0.1), 0.03),
        Row("share of positives of the top 20 % of items", 0.784, top_share(positives, 0.2), 0.03),
        *quantile_rows(
            "positives per user",
            (0.25, 0.5, 0.75, 0.9, 0.99),
            (45, 95, 175, 276, 521),
            per_user * repeats,
            0.12,
        ),
        Row("Gini of positives per user", 0.446, gini(per_user), 0.03),
        Row(
            "share of positives of small-matrix items (partial)",
            0.777,
            positives[inside].sum() / positives.sum(),
            0.03,
        ),
        Row(
            "Spearman of items: big positives, small rate",
            0.761,
            spearmanr(positives[inside], matrix.mean(0))[0],
            0.05,
        ),
        Row(
            "Spearman of users: big positives, small rate",
            0.461,
            spearmanr(per_user[world.panel_users], matrix.mean(1))[0],
            0.07,
        ),
    ]
    check("KuaiRec twin: big matrix", rows)


@pytest.mark.slow
def test_kuairec_watch_ratios_and_tables(kuairec):
    data, tables = kuairec.data, kuairec.tables
    rows = []
    for name, log, quartiles, shares in (
        ("big", data.train, (0.314825, 0.723471, 1.177644), (0.4535, 0.3382, 0.0731)),
        ("small", data.test, (0.467577, 0.769167, 1.120590), (0.4744, 0.3240, 0.0464)),
    ):
        ratios = log.watch_ratios
        rows += quantile_rows(f"{name}: watch ratio", (0.25, 0.5, 0.75), quartiles, ratios, 0.08)
        rows += [
            Row(
                f"{name}: share of watch ratios from {limit:g} on",
                share,
                float((ratios >= limit).mean()),
                0.02,
            )
            for limit, share in zip((0.8, 1.0, 2.0), shares, strict=True)
        ]
        tail = ratios[ratios >= 2]
        rows += quantile_rows(
            f"{name}: watch ratio from 2 on", (0.25, 0.5, 0.75, 0.95), (2.241, 2.627, 3.490, 7.60), tail, 0.05
        )
    logs = np.log1p(np.minimum(data.test.watch_ratios, 5))
    for side, size, share, panel in (
        (data.test.items, len(data.items), 0.36, kuairec.world.panel_items),
        (data.test.users, len(data.users), 0.05, kuairec.world.panel_users),
    ):
        means = rates(side, logs, size)[0][panel]
        rows.append(
            Row(
                f"share of log1p variance by {'item' if share > 0.1 else 'user'}",
                share,
                float(means.var() / logs.var()),
                0.03,
            )
        )
    rows.append(Row("mean of log1p", 0.5833, float(logs.mean()), 0.03))
    tags = kuairec.world.tags.sum(1)
    rows += [
        Row(f"share of items with {number} tags", share, float((tags == number).mean()), 0.012)
        for number, share in ((1, 0.836), (2, 0.146), (3, 0.017))
    ]
    sizes = kuairec.world.tags.sum(0)
    rows += [
        Row(f"items of tag {tag}", size, int(sizes[tag]), 0.15 * size)
        for tag, size in ((11, 2027), (28, 1360), (8, 1112))
    ]
    seconds = tables.durations_ms / 1000
    rows += quantile_rows("duration in s", (0.25, 0.5, 0.75), (7.434, 9.636, 12.179), seconds, 0.03)
    check("KuaiRec twin: watching and tables", rows)


# ---------------------------------------------------------------- the stronger setting


@pytest.mark.slow
def test_strong_taste_is_the_same_world_with_more_to_gain_from_knowing_a_user():
    measured, strong = (build_world(twin_config("KuaiRand", taste_strength=level)) for level in ("measured", "strong"))
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, KUAIRAND.n_users, 1500))
    items = rng.integers(0, KUAIRAND.n_items, (len(users), 100))
    gains = []
    for world in (measured, strong):
        chance = world.truth.click_probability(users, items)
        clicks = rng.random(chance.shape) < chance
        who = np.repeat(np.arange(len(users)), 100)
        quality = within_user_auc(who, world.truth.item_effects[items].ravel(), clicks.ravel())
        gains.append(within_user_auc(who, chance.ravel(), clicks.ravel()) - quality)
    assert gains[0] < 0.08
    assert gains[1] > 0.12
    for one, other in zip(expected_rates(measured, users), expected_rates(strong, users), strict=True):
        assert one.mean() == pytest.approx(other.mean(), abs=0.012)
        assert one.std() == pytest.approx(other.std(), abs=0.02)
