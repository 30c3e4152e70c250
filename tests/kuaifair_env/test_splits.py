"""Splits depend on raw user ids alone, and say nothing about each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import small_data

from kuaifair_env import splits
from kuaifair_env.splits import (
    calibration_users,
    chosen_users,
    early_stopping_split,
    evaluation_users,
    held_out_users,
    user_folds,
)

SALTS = (splits.HELD_OUT, splits.FOLDS, splits.EVALUATION, splits.CALIBRATION, splits.EARLY_STOPPING)


def test_held_out_users_do_not_depend_on_the_order_or_the_rest_of_the_data():
    data = small_data(n_users=60)
    chosen = data.users.ids[held_out_users(data)]
    assert len(chosen) == 30
    half = data.test.take(np.isin(data.users.ids[data.test.users], chosen[:20]))
    again = held_out_users(replace(data, test=half))
    assert np.isin(data.users.ids[again], chosen[:20]).all()


def test_the_users_of_every_split_are_pinned():
    ids = np.arange(0, 1000, 10)
    chosen = {salt: ids[chosen_users(ids, 3, salt)].tolist() for salt in SALTS}
    assert chosen == PINNED


PINNED = {0: [120, 320, 710], 1: [100, 180, 320], 2: [280, 350, 410], 5: [270, 660, 750], 7: [140, 350, 610]}


def test_splits_are_independent_of_each_other():
    ids = np.arange(20_000)
    chosen = [set(chosen_users(ids, 2_000, salt).tolist()) for salt in SALTS]
    for first in range(len(SALTS)):
        for second in range(first):
            assert len(chosen[first] & chosen[second]) == pytest.approx(200, abs=60)


def test_calibration_users_are_never_held_out():
    data = small_data(n_users=60)
    calibration = calibration_users(data, 0.2)
    assert len(calibration) == 12
    assert not np.intersect1d(calibration, held_out_users(data)).size
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            calibration_users(data, share)
    with pytest.raises(ValueError, match="no calibration user"):
        calibration_users(data, 0.001)


def test_evaluation_users_are_all_or_a_growing_list():
    ids = np.arange(0, 150, 10)
    np.testing.assert_array_equal(evaluation_users(ids), ids)
    few = evaluation_users(ids, 6)
    assert len(few) == 6
    assert np.isin(few, evaluation_users(ids, 9)).all(), "more users only add to the list"
    with pytest.raises(ValueError, match="at least 1 user"):
        evaluation_users(ids, 0)


def test_a_tenth_of_the_users_stops_training_early_and_folds_are_of_one_size():
    data = small_data(n_users=400)
    learning, stopping = early_stopping_split(data, np.arange(400))
    np.testing.assert_array_equal(np.sort(np.concatenate([learning, stopping])), np.arange(400))
    assert 20 < len(stopping) < 60
    for few in (2, 11):
        assert all(len(part) for part in early_stopping_split(data, np.arange(few)))
    assert 150 < np.count_nonzero(user_folds(data, 2)) < 250
