"""Measures of calibration against their definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from kuaifair_env.errors import DataError
from kuaifair_env.response.calibration import (
    assess,
    auc,
    expected_calibration_error,
    log_loss,
    logit_slopes,
    within_user_auc,
)


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
