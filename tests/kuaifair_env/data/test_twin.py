"""What a twin promises: a truth that its logs follow, known sizes, and the same twin everywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from scipy.stats import chisquare, kstest, norm
from twin_files import play_times

from kuaifair_env.synthetic.config import KUAIRAND, KUAIREC, TOY, QuantileDistribution, twin_config
from kuaifair_env.synthetic.truth import build_world, distribution_by_rank
from kuaifair_env.synthetic.twin import calendars, draw_test, draw_train, generate_twin, load_twin

# ---------------------------------------------------------------- the same twin everywhere


@pytest.mark.parametrize(("name", "digest"), [("toy", "3898c94677a8917b"), ("panel", "4a78e6989c414e34")])
def test_a_configuration_gives_the_same_twin_on_every_platform(request, name, digest):
    """Made on Linux with OpenBLAS; choices rest on exact arithmetic, so this must hold elsewhere too."""
    assert request.getfixturevalue(name).data.data_hash == digest


def test_parts_of_a_twin_do_not_depend_on_each_other(toy):
    """A stronger taste or a longer test log leaves tags, tables and sizes alone."""
    other = generate_twin(replace(TOY, taste_strength=2.0, test_rows=20_000))
    assert np.array_equal(other.world.tags, toy.world.tags)
    assert np.array_equal(other.data.users.features.values, toy.data.users.features.values)
    assert np.array_equal(other.data.items.shown, toy.data.items.shown)


def test_seeds_give_different_twins(toy):
    other = generate_twin(twin_config("Toy", seed=1))
    assert other.data.data_hash != toy.data.data_hash
    assert other.data.provenance.settings["seed"] == 1


def test_taste_is_exact_in_single_precision(toy):
    """Inner products lie on a grid and are sums without rounding, so no library can add them up differently."""
    truth = toy.truth
    users, items = np.arange(50), np.tile(np.arange(TOY.n_items), (50, 1))
    exact = truth.user_vectors[users].astype(np.float64) @ truth.item_vectors.astype(np.float64).T
    assert np.array_equal(truth.taste(users, items).astype(np.float64), exact)
    assert np.array_equal((truth.user_vectors[users] @ truth.item_vectors.T).astype(np.float64), exact)
    reversed_order = truth.user_vectors[users][:, ::-1] @ truth.item_vectors[:, ::-1].T
    assert np.array_equal(reversed_order.astype(np.float64), exact)
    for vectors in (truth.user_vectors, truth.item_vectors):
        assert np.array_equal(vectors * 128, np.rint(vectors * 128))


# ---------------------------------------------------------------- truth


def test_taste_is_standardised_and_free_of_main_effects(toy):
    taste = toy.truth.user_vectors @ toy.truth.item_vectors.T
    assert taste.std() == pytest.approx(1.0, abs=0.02)
    assert np.abs(taste.mean(0)).max() < 0.02
    assert np.abs(taste.mean(1)).max() < 0.02


def test_click_probability_is_the_logistic_of_its_parts(toy):
    truth = toy.truth
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, TOY.n_users, 40), rng.integers(0, TOY.n_items, (40, 7))
    for conformity in (0.0, 0.5, 1.0):
        chance = truth.click_probability(users, items, conformity)
        assert chance.dtype == np.float32
        assert chance.shape == (40, 7)
        for row, column in ((0, 0), (13, 6), (39, 3)):
            user, item = users[row], items[row, column]
            logit = (
                truth.item_effects[item]
                + truth.user_effects[user]
                + truth.taste_strength * sum(truth.user_vectors[user] * truth.item_vectors[item])
                + conformity * truth.herding[user] * truth.popularity[item]
            )
            assert chance[row, column] == pytest.approx(1 / (1 + np.exp(-float(logit))), abs=1e-6)


def test_true_preference_gives_taste_in_logits(toy):
    item_vectors, user_vectors = toy.truth.true_preference
    users, items = np.arange(30), np.tile(np.arange(20), (30, 1))
    logits = user_vectors[users] @ item_vectors[:20].T
    assert np.allclose(logits, TOY.taste_strength * toy.truth.taste(users, items), atol=1e-5)


def test_conformity_favours_what_is_popular_and_never_the_reverse(toy):
    truth = toy.truth
    assert (truth.herding >= 0).all()
    assert truth.herding.mean() == pytest.approx(TOY.conformity, rel=0.2)
    order = np.argsort(toy.world.exposure_logs)
    assert (np.diff(truth.popularity[order]) >= 0).all()
    users = np.arange(TOY.n_users)
    least, most = np.tile(order[:50], (len(users), 1)), np.tile(order[-50:], (len(users), 1))
    change = [
        (truth.click_probability(users, items, 1.0) - truth.click_probability(users, items, 0.0)).mean()
        for items in (least, most)
    ]
    assert change[0] < -0.005
    assert change[1] > 0.005


def test_users_have_few_interests_tied_to_tags():
    """With taste that follows tags alone, a user's taste varies between tags and hardly within."""
    world = build_world(replace(TOY, tag_taste_share=1.0, tags_per_item=(1.0,), untagged_share=0.0))
    taste = world.truth.user_vectors @ world.truth.item_vectors.T
    centred = taste - taste.mean(1, keepdims=True)
    within = np.zeros(len(taste))
    for tag in np.unique(world.first_tags):
        mine = world.first_tags == tag
        within += taste[:, mine].var(1) * mine.mean()
    assert (within / (centred**2).mean(1)).mean() < 0.02


# ---------------------------------------------------------------- logs


def test_logs_have_the_sizes_asked_for_and_distinct_pairs(toy, panel):
    for twin in (toy, panel):
        for log, rows in ((twin.data.train, twin.config.train_rows), (twin.data.test, twin.config.test_rows)):
            assert len(log) == rows
            pairs = log.users.astype(np.int64) * twin.config.n_items + log.items
            assert len(np.unique(pairs)) == rows
            same_user = np.diff(log.users) == 0
            assert (np.diff(log.times)[same_user] >= 0).all()


def test_the_panel_is_seen_in_the_test_log_only(panel):
    train, test, world = panel.data.train, panel.data.test, panel.world
    assert set(np.unique(test.users)) == set(world.panel_users)
    assert set(np.unique(test.items)) == set(world.panel_items)
    leaked = np.isin(train.users, world.panel_users) & np.isin(train.items, world.panel_items)
    assert not leaked.any()
    per_user = np.bincount(test.users)[world.panel_users]
    assert per_user.min() > 0.95 * panel.config.n_panel_items


def test_rows_without_time_come_last_at_the_latest_time(panel):
    times = panel.data.test.times
    assert np.count_nonzero(times == times.max()) == round(panel.config.missing_time_share * panel.config.test_rows)


def test_test_clicks_follow_true_preference_without_conformity(toy, panel):
    """Calibration in ten groups of equal size: the chi-square statistic of binomial groups."""
    for twin in (toy, panel):
        log = twin.data.test
        chance = twin.truth.click_probability(log.users, log.items[:, None])[:, 0]
        groups = np.array_split(np.argsort(chance, kind="stable"), 10)
        distance = sum(
            (log.clicks[rows].sum() - chance[rows].sum()) ** 2 / (chance[rows] * (1 - chance[rows])).sum()
            for rows in groups
        )
        assert distance < 29.6  # 99.9 % point of chi-square with 10 degrees of freedom


def test_conformity_can_be_put_back_into_the_test_log(toy):
    world, calendar = toy.world, calendars("kuairand")[1]
    durations = toy.tables.durations_ms
    plain = draw_test(TOY, world, durations, calendar)
    assert np.array_equal(plain.clicks, toy.data.test.clicks)
    herded = draw_test(
        replace(TOY, conformity=1.0), build_world(replace(TOY, conformity=1.0)), durations, calendar, 1.0
    )
    assert np.array_equal(herded.items, plain.items)
    popular = world.truth.popularity > 1
    gain = [log.clicks[popular[log.items]].mean() for log in (plain, herded)]
    assert gain[1] > gain[0] + 0.05


def test_random_exposure_is_uniform_where_it_is_asked_to_be():
    config = replace(TOY, test_exposure_log_sd=0.0)
    log = generate_twin(config).data.test
    counts = log.exposures(config.n_items)
    # Draws are without replacement, so counts vary less than multinomial ones.
    share = np.bincount(log.users, minlength=config.n_users) / config.n_items
    assert chisquare(counts).pvalue > 0.01
    assert counts.var() == pytest.approx((share * (1 - share)).sum(), rel=0.2)


def test_exposure_without_replacement_follows_its_weights(toy):
    """One row per user and no personalisation: shares of exposure are shares of propensity."""
    config = replace(TOY, n_users=40_000, n_panel_users=400, train_rows=40_000, personalisation=0.0)
    config = replace(config, train_activity=QuantileDistribution((0.1, 0.9), (1.0, 1.0)))
    world = build_world(config)
    log = draw_train(config, world, toy.tables.durations_ms, calendars("kuairand")[0])[0]
    weights = np.exp(world.exposure_logs)
    expected = 40_000 * weights / weights.sum()
    common = expected > 20
    observed = log.exposures(config.n_items)
    rest = [observed[~common].sum()], [expected[~common].sum()]
    found = chisquare(np.r_[observed[common], rest[0]], np.r_[expected[common], rest[1]])
    assert found.pvalue > 0.001


def test_the_platform_shows_what_users_like_and_clicks_show_it(toy):
    train, truth = toy.data.train, toy.truth
    shown = truth.taste(train.users, train.items[:, None])
    assert shown.mean() > 0.4
    assert train.clicks.mean() == pytest.approx(TOY.logged_click_rate, abs=0.015)
    logits = logit(truth.click_probability(train.users, train.items[:, None], 1.0)[:, 0].astype(np.float64))
    logits += toy.world.feed_items[train.items] + toy.world.feed_users[train.users]
    chance = expit(logits + toy.data.report["feed_lift"])
    spread = np.sqrt((chance * (1 - chance)).sum())
    assert abs(train.clicks.sum() - chance.sum()) < 3.3 * spread


def test_watch_ratios_of_a_panel_agree_with_clicks(panel):
    for log in (panel.data.train, panel.data.test):
        assert np.array_equal(log.watch_ratios >= 2.0, log.clicks)
        assert (log.watch_ratios >= 0).all()


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([0, 5_000, 6_999, 7_000, 12_000, 18_000, 90_000])),
        min_size=1,
    )
)
def test_play_times_agree_with_clicks_and_long_views(rows):
    """KuaiRand: a click is 7 s of play or the whole video, a long view 18 s or the whole video."""
    kinds, durations = (np.array(column) for column in zip(*rows, strict=True))
    whole = (durations > 0) & (durations <= 7_000)
    clicks, long_views = kinds > 0, (kinds == 2) | ((kinds == 1) & whole)
    play = play_times(np.random.default_rng(0), clicks, long_views, durations)
    for limit, behaviour in ((7_000, clicks), (18_000, long_views)):
        needed = np.where(durations > 0, np.minimum(durations, limit), limit)
        assert np.array_equal(play >= needed, behaviour)
    assert (play >= 0).all()


# ---------------------------------------------------------------- what others may see


def test_the_data_says_that_it_is_a_twin_and_how_it_was_made(toy):
    provenance = toy.data.provenance
    assert provenance.origin == "twin"
    assert "twin" in provenance.name
    told = json.loads(json.dumps(provenance.as_dict()))["settings"]
    assert told["taste_strength"] == TOY.taste_strength
    assert told["item_rates"]["values"] == list(TOY.item_rates.values)


def test_tables_say_something_of_items_but_not_the_truth(toy):
    data = toy.data
    exposures = data.train.exposures(TOY.n_items)
    assert np.corrcoef(np.log(data.items.shown), np.log1p(exposures))[0, 1] > 0.7
    tagged = data.items.tags.any(1)
    assert tagged.mean() > 0.95
    first = toy.world.first_tags
    names = np.array([int(name) for name in data.items.tag_names])
    assert all(data.items.tags[row, names == first[row]].all() for row in np.flatnonzero(tagged))
    recovered = np.linalg.lstsq(
        np.c_[data.items.features.values, np.ones(TOY.n_items)], toy.truth.item_effects, rcond=None
    )[0]
    fitted = np.c_[data.items.features.values, np.ones(TOY.n_items)] @ recovered
    assert np.corrcoef(fitted, toy.truth.item_effects)[0, 1] < 0.8


def test_a_twin_comes_from_the_cache_the_second_time(tmp_path, toy, monkeypatch):
    first = load_twin(TOY, tmp_path)
    assert first.data.data_hash == toy.data.data_hash
    monkeypatch.setattr("kuaifair_env.synthetic.twin._draw_data", lambda *_: pytest.fail("generated again"))
    second = load_twin(TOY, tmp_path)
    assert second.data.data_hash == toy.data.data_hash
    assert np.array_equal(second.data.train.times, toy.data.train.times)
    assert np.array_equal(second.truth.item_effects, toy.truth.item_effects)
    assert second.data.provenance == toy.data.provenance


def test_another_configuration_is_another_cache_entry(tmp_path):
    one, other = load_twin(TOY, tmp_path), load_twin(replace(TOY, conformity=0.3), tmp_path)
    assert one.data.data_hash != other.data.data_hash


# ---------------------------------------------------------------- distributions and configurations


def test_a_distribution_gives_back_its_quantiles():
    distribution = QuantileDistribution((0.1, 0.5, 0.9), (1.0, 10.0, 1000.0), "log")
    drawn = distribution.at(norm.ppf((np.arange(10_001) + 0.5) / 10_001))
    assert np.quantile(drawn, [0.1, 0.5, 0.9]) == pytest.approx([1.0, 10.0, 1000.0], rel=1e-2)
    normal = QuantileDistribution((0.001, 0.999), (norm.ppf(0.001), norm.ppf(0.999)))
    scores = np.random.default_rng(0).standard_normal(5000)
    assert kstest(distribution_by_rank(normal, scores), "norm").pvalue > 0.9
    assert (np.diff(distribution_by_rank(normal, scores)[np.argsort(scores)]) >= 0).all()


@pytest.mark.parametrize(
    ("levels", "values", "scale", "message"),
    [
        ((0.5,), (1.0,), "linear", "two levels"),
        ((0.5, 0.4), (1.0, 2.0), "linear", "increase"),
        ((0.0, 0.4), (1.0, 2.0), "linear", "increase"),
        ((0.1, 0.4), (2.0, 1.0), "linear", "decrease"),
        ((0.1, 0.4), (0.0, 1.0), "log", "log scale"),
        ((0.1, 0.4), (0.1, 1.0), "logit", "logit scale"),
    ],
)
def test_a_bad_distribution_is_refused(levels, values, scale, message):
    with pytest.raises(ValueError, match=message):
        QuantileDistribution(levels, values, scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "netflix"}, "layout"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"n_items": 1, "n_panel_items": 1}, "two items"),
        ({"n_panel_users": 401}, "n_panel_users"),
        ({"train_rows": 400 * 600 + 1}, "train_rows"),
        ({"test_rows": 0}, "test_rows"),
        ({"taste_strength": float("nan")}, "taste_strength"),
        ({"conformity": -0.1}, "conformity"),
        ({"tag_taste_share": 1.1}, "tag_taste_share"),
        ({"quality_exposure_correlation": 1.5}, "quality_exposure_correlation"),
        ({"logged_click_rate": 1.0}, "logged_click_rate"),
        ({"taste_dimensions": 0}, "taste_dimensions"),
        ({"test_activity": None}, "test_activity"),
    ],
)
def test_a_bad_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


def test_presets_by_name():
    assert twin_config("kuairec") == KUAIREC
    assert twin_config("KuaiRand", seed=3) == replace(KUAIRAND, seed=3)
    assert twin_config("toy", taste_strength="strong").taste_strength > 2 * TOY.taste_strength
    assert twin_config("toy", taste_strength=0.3, conformity=0.0) == replace(TOY, taste_strength=0.3, conformity=0.0)
    with pytest.raises(ValueError, match="KuaiRec, KuaiRand, Toy"):
        twin_config("MovieLens")
    with pytest.raises(ValueError, match="measured, strong"):
        twin_config("Toy", taste_strength="weak")


@settings(max_examples=8)
@given(
    seed=st.integers(0, 10_000),
    n_users=st.integers(1, 40),
    n_items=st.integers(2, 40),
    density=st.floats(0.01, 1.0),
    taste=st.floats(0.0, 3.0),
)
def test_any_small_world_can_be_drawn(seed, n_users, n_items, density, taste):
    cells = n_users * n_items
    rows = max(1, int(density * cells))
    config = replace(
        TOY,
        seed=seed,
        n_users=n_users,
        n_items=n_items,
        n_panel_users=n_users,
        n_panel_items=n_items,
        train_rows=rows,
        test_rows=rows,
        taste_strength=taste,
    )
    twin = generate_twin(config)
    assert len(twin.data.train) == len(twin.data.test) == rows
    assert np.isfinite(twin.truth.click_probability(np.arange(n_users), np.zeros((n_users, 1), int))).all()
