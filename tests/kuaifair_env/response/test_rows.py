"""Which rows a fit sees, and how negatives are drawn where a log has none."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import DataError
from kuaifair_env.response import NegativeSampling, SplitConfig
from kuaifair_env.response.rows import labelled_rows, rate_correction


def random_log(rows=20_000, users=50, items=40, seed=0, positives_only=False):
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, items + 1)
    clicks = np.ones(rows, bool) if positives_only else rng.random(rows) < 0.3
    return InteractionLog.sorted(
        rng.integers(0, users, rows),
        rng.choice(items, rows, p=weights / weights.sum()),
        clicks,
        positives_only=positives_only,
    )


def test_every_row_has_one_role_and_shares_are_as_asked():
    log = random_log()
    rows = labelled_rows(log, 40, SplitConfig(stop=0.1, calibrate=0.2, report=0.3), NegativeSampling(), 0)
    parts = [rows.where(role) for role in ("fit", "stop", "calibrate", "report")]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(log)))
    np.testing.assert_allclose([len(part) / len(log) for part in parts], [0.4, 0.1, 0.2, 0.3], atol=0.02)
    np.testing.assert_array_equal(rows.users, log.users)
    np.testing.assert_array_equal(rows.items, log.items)
    np.testing.assert_array_equal(rows.clicks, log.clicks)
    np.testing.assert_array_equal(rows.positions, np.arange(len(log)))


def test_roles_depend_on_the_seed_alone():
    log = random_log()
    first, again, other = (
        labelled_rows(log, 40, SplitConfig(), NegativeSampling(), seed).roles for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_more_rows_than_asked_for_are_drawn_from():
    rows = labelled_rows(random_log(), 40, SplitConfig(max_rows=5000), NegativeSampling(), 0)
    assert len(rows.users) == rows.notes["rows_used"] == 5000
    assert rows.notes["logged_rows"] == 20_000


def test_a_drawn_negative_is_never_a_positive_of_its_user():
    log, known = random_log(300, positives_only=True), random_log(200, seed=1, positives_only=True)
    rows = labelled_rows(log, 40, SplitConfig(), NegativeSampling(per_positive=6.0), 0, known)
    positive = set(zip(log.users, log.items, strict=True))
    drawn = set(zip(rows.users[~rows.clicks], rows.items[~rows.clicks], strict=True))
    assert drawn
    assert not drawn & positive
    assert not drawn & set(zip(known.users, known.items, strict=True))
    assert set(zip(rows.users[rows.clicks], rows.items[rows.clicks], strict=True)) == positive
    assert rows.clicks.sum() == len(positive) == rows.notes["positives_used"]
    assert rows.notes["repeated_positives_dropped"] == len(log) - len(positive)
    assert (rows.positions[~rows.clicks] == -1).all()
    asked = round(6 * len(positive))
    assert rows.notes["negatives_drawn"] + rows.notes["negatives_dropped_as_positive"] == asked


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_negatives_follow_the_declared_power_of_popularity(power):
    # Many users with one positive each: next to no draw is lost to a user's own positives, except on the user's item.
    rng = np.random.default_rng(0)
    weights = np.arange(1, 9) / 36
    log = InteractionLog.sorted(
        np.arange(8000), rng.choice(8, 8000, p=weights), np.ones(8000, bool), positives_only=True
    )
    rows = labelled_rows(log, 8, SplitConfig(), NegativeSampling(5.0, power), 0)
    positives = np.bincount(log.items, minlength=8)
    wanted = positives.astype(float) ** power
    wanted = wanted / wanted.sum() * (1 - positives / positives.sum())
    found = np.bincount(rows.items[~rows.clicks], minlength=8)
    assert stats.chisquare(found, wanted / wanted.sum() * found.sum()).pvalue > 1e-3


def test_the_correction_moves_the_sampled_rate_to_the_declared_one():
    log = random_log(3000, positives_only=True)
    rows = labelled_rows(log, 40, SplitConfig(), NegativeSampling(positive_rate=0.07), 0)
    rate = rows.clicks.mean()
    shifted = 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) + rate_correction(rows.notes))))
    assert shifted == pytest.approx(0.07)
    undeclared = labelled_rows(log, 40, SplitConfig(), NegativeSampling(), 0)
    assert rate_correction(undeclared.notes) == 0.0
    assert rate_correction(labelled_rows(random_log(), 40, SplitConfig(), NegativeSampling(), 0).notes) == 0.0


def test_bad_settings_and_small_logs_are_named():
    with pytest.raises(ValueError, match="sum to less than 1"):
        SplitConfig(stop=0.5, calibrate=0.3, report=0.2)
    with pytest.raises(ValueError, match="per_positive"):
        NegativeSampling(per_positive=0.0)
    with pytest.raises(ValueError, match="positive_rate"):
        NegativeSampling(positive_rate=1.0)
    with pytest.raises(DataError, match="too small to fit and evaluate"):
        labelled_rows(random_log(8), 40, SplitConfig(), NegativeSampling(), 0)
