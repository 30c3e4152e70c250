"""Fits against worlds whose probabilities are known.

Measures of calibration against their definitions and scikit-learn.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response import (
    FactorisedConfig,
    FactorisedResponse,
    NegativeSampling,
    ObservedResponse,
    ResponseConfig,
    SplitConfig,
    fit_factorised,
    fit_response,
)
from kuaifair_env.response.calibration import (
    assess,
    auc,
    expected_calibration_error,
    log_loss,
    logit_slopes,
    within_user_auc,
)
from kuaifair_env.response.factorised_fit import FactorModel
from kuaifair_env.response.fitting import earlier_and_later
from kuaifair_env.response.inputs import response_inputs

QUICK = FactorisedConfig(
    rank=6,
    map_precision=0.1,
    factor_precision=3.0,
    split=SplitConfig(stop=0.1, calibrate=0.1, report=0.1),
)


BRIEF = replace(QUICK, max_epochs=2)
"""For tests of everything but how well a model fits."""


@pytest.fixture(scope="module")
def tasteful(known_world):
    world = known_world(taste=1.0, n_users=500, rows_per_user=120)
    return world, fit_factorised(
        world.data.test,
        world.data,
        context_log=world.data.train,
        config=QUICK,
        seed=0,
    )


@pytest.fixture(scope="module")
def fresh(tasteful):
    """Pairs that no log chose: every user with every item, and one draw of clicks."""
    world, model = tasteful
    users, items = np.arange(model.n_users), np.tile(np.arange(model.n_items), (model.n_users, 1))
    clicks = np.random.default_rng(9).random(world.probabilities.shape) < world.probabilities
    return model.expected(users, items), clicks


def test_the_fit_ranks_nearly_as_well_as_the_truth(tasteful, fresh):
    world, _ = tasteful
    expected, clicks = fresh
    bayes = roc_auc_score(clicks.ravel(), world.probabilities.ravel())
    assert roc_auc_score(clicks.ravel(), expected.ravel()) > bayes - 0.03
    users = np.repeat(np.arange(len(clicks)), clicks.shape[1])
    within, best = (
        within_user_auc(users, clicks.ravel(), scores.ravel()).mean for scores in (expected, world.probabilities)
    )
    assert within > best - 0.03


def test_the_fit_is_calibrated_where_nothing_was_logged(fresh):
    expected, clicks = fresh
    assert expected_calibration_error(clicks.ravel(), expected.ravel()) < 0.02
    assert expected.mean() == pytest.approx(clicks.mean(), abs=0.02)


def test_personal_taste_is_found_with_its_true_strength(tasteful):
    world, model = tasteful
    users, items = np.arange(model.n_users), np.tile(np.arange(model.n_items), (model.n_users, 1))
    taste = model.personal_logits(users, items)
    assert np.corrcoef(taste.ravel(), world.tastes.ravel())[0, 1] > 0.8
    # Regressing the truth on the estimate: slope 1 says that the estimate is neither too bold nor too timid.
    slope = (taste * world.tastes).sum() / (taste**2).sum()
    assert slope == pytest.approx(1.0, abs=0.15)
    described = model.describe()["slopes"]["personal"]
    assert abs(described["slope"] - 1) < 4 * described["error"] + 0.05


def test_default_settings_find_taste_in_a_small_log_too(known_world):
    world = known_world(taste=1.0, n_users=400, rows_per_user=60)
    model = fit_factorised(world.data.test, world.data, context_log=world.data.train)
    users, items = np.arange(model.n_users), np.tile(np.arange(model.n_items), (model.n_users, 1))
    taste = model.personal_logits(users, items)
    assert np.corrcoef(taste.ravel(), world.tastes.ravel())[0, 1] > 0.6
    assert model.describe()["personal"]["gain_over_main_effects"]["interval"][0] > 0.02


def test_a_world_without_taste_is_fitted_as_one(known_world):
    world = known_world(taste=0.0)
    model = fit_factorised(world.data.test, world.data, context_log=world.data.train, config=QUICK, seed=0)
    assert model.parts_spread()["personal"] < 0.25
    low, high = model.describe()["personal"]["gain_over_main_effects"]["interval"]
    assert low < 0.01
    assert high < 0.03


def test_taste_known_from_history_alone_is_lost_when_histories_are_shuffled(known_world):
    world = known_world(taste=1.5, n_users=400, rows_per_user=80)
    data = world.data
    config = FactorisedConfig(rank=6, user_ids=False, map_precision=0.3)
    shuffled = np.random.default_rng(1).permutation(len(data.users))
    log = data.train
    others = InteractionLog.sorted(shuffled[log.users], log.items, log.clicks, log.times)
    own, foreign = (
        fit_factorised(data.test, data, context_log=context, config=config, seed=0) for context in (log, others)
    )
    gains = [model.describe()["personal"]["gain_over_main_effects"]["within_user_auc"] for model in (own, foreign)]
    # Own histories bring 0.14 to 0.17 over seeds, foreign ones 0.01 to 0.03.
    assert gains[0] > 0.08
    assert gains[1] < gains[0] / 3


def test_the_same_seed_gives_the_same_model_and_another_seed_another(known_world):
    data = known_world(n_users=100, rows_per_user=30).data
    first, again, other = (
        fit_factorised(data.test, data, context_log=data.train, config=BRIEF, seed=seed) for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(first.user_factors, again.user_factors)
    assert np.abs(first.user_factors - other.user_factors).max() > 0


def test_fitting_leaves_the_global_generators_alone(known_world):
    import torch

    before = torch.random.get_rng_state().clone()
    data = known_world(n_users=60, rows_per_user=30).data
    fit_factorised(data.test, data, config=BRIEF)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_report_says_what_was_done(tasteful):
    world, model = tasteful
    report = model.describe()
    json.dumps(report, allow_nan=False)
    assert report["kind"] == "factorised"
    assert report["data_hash"] == world.data.data_hash
    assert report["context_rows"] == len(world.data.train)
    counts = report["fitted_on"]
    assert counts["fit"] + counts["stop"] + counts["calibrate"] + counts["report"] == len(world.data.test)
    assert report["held_out"]["rows"] == counts["report"]
    assert report["held_out"]["within_user_auc"] > report["controls"]["item_quality"]["within_user_auc"]


def test_positives_only_reach_the_declared_rate(known_world):
    world = known_world(n_users=200)
    kept = world.data.test.clicks
    only = world.data.test.take(kept)
    log = InteractionLog(only.users, only.items, only.clicks, only.times, positives_only=True)
    config = FactorisedConfig(rank=2, negatives=NegativeSampling(popularity_power=0.0, positive_rate=0.05))
    model = fit_factorised(log, world.data, config=config)
    users, items = np.arange(200), np.tile(np.arange(150), (200, 1))
    assert model.expected(users, items).mean() == pytest.approx(0.05, abs=0.02)
    notes = model.describe()["fitted_on"]
    assert notes["negatives"].startswith("drawn: 4 per positive")
    assert notes["declared_rate"] == 0.05


def test_a_log_cannot_be_its_own_context(known_world):
    data = known_world(n_users=20, rows_per_user=10).data
    with pytest.raises(DataError, match="predict itself"):
        fit_factorised(data.test, data, context_log=data.test)


@pytest.mark.filterwarnings("error")
def test_logs_that_are_read_only_maps_of_files_are_fitted_without_warnings(known_world, tmp_path):
    data = known_world(n_users=60, rows_per_user=30).data
    columns = {}
    for name in ("users", "items", "clicks", "times"):
        np.save(tmp_path / f"{name}.npy", getattr(data.test, name))
        columns[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    model = fit_factorised(InteractionLog(**columns), data, config=BRIEF)
    assert model.n_users == 60


def test_rank_zero_fits_main_effects_alone(known_world):
    data = known_world(n_users=100, rows_per_user=30).data
    model = fit_factorised(data.test, data, config=replace(BRIEF, rank=0))
    assert model.parts_spread()["personal"] == 0.0
    assert model.describe()["personal"]["gain_over_main_effects"]["within_user_auc"] == 0.0


def test_each_world_is_fitted_on_its_own_log(known_world):
    data = known_world(n_users=200, rows_per_user=40).data
    of_train, of_test = (
        fit_response(data, split, config=ResponseConfig(factorised=BRIEF)) for split in ("train", "test")
    )
    test = of_test.describe()
    assert test["context_rows"] == len(data.train)
    assert test["fitted_on"]["logged_rows"] == len(data.test)
    train = of_train.describe()
    assert train["context_rows"] + train["fitted_on"]["logged_rows"] == len(data.train)
    assert isinstance(of_train, FactorisedResponse)
    assert train["seed"] != test["seed"]


def test_a_fully_observed_test_log_is_looked_up(known_world):
    data = known_world(n_users=30, n_items=40).data
    users, items = np.divmod(np.arange(30 * 40), 40)
    clicks = np.random.default_rng(0).random(1200) < 0.3
    full = replace(data, test=InteractionLog.sorted(users, items, clicks))
    model = fit_response(full, "test")
    assert isinstance(model, ObservedResponse)
    np.testing.assert_array_equal(model.expected_catalogue(np.arange(30), 40).ravel(), clicks)
    assert isinstance(fit_response(full, "test", "factorised", config=ResponseConfig(BRIEF)), FactorisedResponse)


def test_the_earlier_part_precedes_the_later_part_for_every_user():
    rng = np.random.default_rng(0)
    log = InteractionLog.sorted(rng.integers(0, 9, 200), rng.integers(0, 5, 200), rng.random(200) < 0.5)
    earlier, later = earlier_and_later(log, 10, 0.3)
    assert len(earlier) + len(later) == 200
    for user in range(9):
        mine = earlier.users == user
        assert mine.sum() == np.floor(0.3 * (log.users == user).sum())
        assert earlier.times[mine].max() < later.times[later.users == user].min()
    assert earlier_and_later(log, 10, 0.0) == (None, log)


def test_unknown_kinds_and_splits_are_named(known_world):
    data = known_world(n_users=20, rows_per_user=10).data
    with pytest.raises(ValueError, match="split must be one of"):
        fit_response(data, "validation")
    with pytest.raises(ValueError, match="kind must be one of"):
        fit_response(data, "test", "magic")
    with pytest.raises(DataError, match="covers"):
        fit_response(data, "test", "observed")


def test_importing_and_simulating_need_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, kuaifair_env.response as r\n"
        "m = r.FactorisedResponse(0.0, np.zeros(2), np.zeros(3), np.ones((2, 1)), np.ones((3, 1)))\n"
        "m.expected(np.array([0]), np.array([[0, 1]]))\n"
        "assert not {'torch', 'sklearn'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=60))
def test_within_user_auc_is_the_row_weighted_mean_of_each_users_auc(rows):
    users, clicks, scores = (np.array(column) for column in zip(*rows, strict=True))
    clicks = clicks.astype(bool)
    expected = {
        u: (roc_auc_score(clicks[users == u], scores[users == u]), (users == u).sum())
        for u in np.unique(users)
        if 0 < clicks[users == u].sum() < (users == u).sum()
    }
    if not expected:
        with pytest.raises(DataError, match="no user has both"):
            within_user_auc(users, clicks, scores)
        return
    found = within_user_auc(users, clicks, scores)
    assert found.users.tolist() == list(expected)
    np.testing.assert_allclose(found.values, [value for value, _ in expected.values()])
    values, weights = zip(*expected.values(), strict=True)
    assert found.mean == pytest.approx(np.average(values, weights=weights))


def test_auc_and_log_loss_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    clicks, p = rng.random(500) < 0.3, np.round(rng.random(500), 2)
    assert auc(clicks, p) == pytest.approx(roc_auc_score(clicks, p))
    p = np.clip(p, 0.01, 0.99)
    assert log_loss(clicks, p) == pytest.approx(sklearn_log_loss(clicks, p))


def test_expected_calibration_error_follows_its_definition():
    rng = np.random.default_rng(1)
    p = np.r_[rng.random(300), 0.0, 1.0]
    clicks = rng.random(302) < p**2
    expected = 0.0
    for k in range(15):
        inside = (p >= k / 15) & ((p < (k + 1) / 15) | (k == 14))
        if inside.any():
            expected += inside.mean() * abs(clicks[inside].mean() - p[inside].mean())
    assert expected_calibration_error(clicks, p) == pytest.approx(expected)


def test_true_probabilities_are_calibrated_and_shrunken_ones_are_not():
    rng = np.random.default_rng(2)
    p = rng.random(100_000)
    clicks = rng.random(100_000) < p
    assert expected_calibration_error(clicks, p) < 0.01
    assert expected_calibration_error(clicks, 0.5 + 0.5 * (p - 0.5)) > 0.1


def test_slopes_are_those_of_a_logistic_regression():
    rng = np.random.default_rng(3)
    parts = rng.normal(size=(4000, 2))
    clicks = rng.random(4000) < 1 / (1 + np.exp(-(0.3 + parts @ [1.0, 0.4])))
    reference = LogisticRegression(C=1e8, tol=1e-8, max_iter=1000).fit(parts, clicks)
    slopes = logit_slopes(clicks, parts)
    np.testing.assert_allclose(slopes.values, reference.coef_[0], rtol=1e-3)
    assert slopes.offset == pytest.approx(reference.intercept_[0], rel=1e-2)
    assert abs(slopes.values[0] - 1) < 3 * slopes.errors[0]
    assert abs(slopes.values[1] - 0.4) < 3 * slopes.errors[1]


def test_the_prior_pulls_slopes_to_one_where_rows_are_few():
    rng = np.random.default_rng(4)
    parts = rng.normal(size=(30, 1))
    clicks = rng.random(30) < 0.5
    free, held = logit_slopes(clicks, parts), logit_slopes(clicks, parts, prior_scale=0.05)
    assert abs(held.values[0] - 1) < 0.2 < abs(free.values[0] - 1)


def test_a_part_that_never_varies_keeps_slope_one():
    rng = np.random.default_rng(5)
    parts = np.column_stack([rng.normal(size=500), np.zeros(500)])
    slopes = logit_slopes(rng.random(500) < 0.4, parts)
    assert slopes.values[1] == pytest.approx(1.0)
    assert slopes.errors[1] == 0.0 < slopes.errors[0]


def test_separable_rows_do_not_break_the_regression():
    parts = np.r_[-np.ones(50), np.ones(50)][:, None]
    slopes = logit_slopes(parts[:, 0] > 0, parts, prior_scale=0.5)
    assert np.isfinite(slopes.values).all()
    assert slopes.values[0] > 1


def test_the_paired_interval_sees_a_small_true_gain():
    rng = np.random.default_rng(6)
    users = np.repeat(np.arange(800), 20)
    logit = rng.normal(size=len(users))
    clicks = rng.random(len(users)) < 1 / (1 + np.exp(-logit))
    good = within_user_auc(users, clicks, logit)
    noisy = within_user_auc(users, clicks, logit + 0.3 * rng.normal(size=len(users)))
    gain, (low, high) = good.gain_over(noisy)
    assert gain == pytest.approx(good.mean - noisy.mean)
    assert 0 < low < gain < high
    wide = good.interval()
    assert wide[0] < good.mean < wide[1]
    assert high - low < wide[1] - wide[0]


def test_assess_is_json_able_and_names_every_measure():
    import json

    rng = np.random.default_rng(7)
    report = assess(rng.integers(0, 9, 300), rng.random(300) < 0.5, rng.random(300))
    json.dumps(report, allow_nan=False)
    assert {"auc", "within_user_auc", "log_loss", "expected_calibration_error", "logged_rate"} <= set(report)


def test_one_kind_of_label_is_an_error():
    with pytest.raises(DataError, match="clicks and rows without"):
        auc(np.ones(5, bool), np.arange(5.0))
    with pytest.raises(DataError, match="clicks and rows without"):
        logit_slopes(np.zeros(5, bool), np.ones((5, 1)))


@pytest.mark.parametrize("user_ids", [True, False])
def test_the_gradient_is_that_of_the_penalised_loss(known_world, user_ids):
    data = known_world(n_users=12, n_items=9, rows_per_user=8).data
    config = FactorisedConfig(rank=2, user_ids=user_ids)
    inputs = response_inputs(data, None, config.inputs, 0)
    model = FactorModel(inputs, config, len(data.test), 0.3, 0)
    x, y = torch.tensor(inputs.users.values).double(), torch.tensor(inputs.items.values).double()
    log, clicks = data.test, torch.tensor(data.test.clicks).double()
    p = {
        name: torch.tensor(values, dtype=torch.float64, requires_grad=True) for name, values in model.parameters.items()
    }
    users, items = p["users"] + x @ p["user_map"], p["items"] + y @ p["item_map"]
    u, i = users[log.users], items[log.items]
    logits = p["offset"] + u[:, -1] + i[:, -1] + (u[:, :-1] * i[:, :-1]).sum(1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, clicks)
    maps = config.map_precision * len(log) ** 0.5
    for name, factors, bias in (
        ("users", config.factor_precision, config.bias_precision),
        ("items", config.factor_precision, config.bias_precision),
        ("user_map", maps, config.line_precision),
        ("item_map", maps, config.line_precision),
    ):
        squares = p[name].square()
        loss = loss + 0.5 * (factors * squares[:, :-1].sum() + bias * squares[:, -1].sum()) / len(log)
    loss.backward()
    gradient = model.gradient(log.users, log.items, log.clicks)
    assert set(p) - set(gradient) == (set() if user_ids else {"users"})
    for name, part in gradient.items():
        assert part == pytest.approx(p[name].grad.numpy(), abs=1e-6), name
