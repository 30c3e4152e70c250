"""What the inputs of a response model say, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.response import InputConfig
from kuaifair_env.response.inputs import response_inputs


def tiny():
    rng = np.random.default_rng(0)
    users, items = np.repeat(np.arange(6), 12), rng.integers(0, 9, 72)
    log = InteractionLog.sorted(users, items, rng.random(72) < 0.4)
    tags = np.zeros((9, 3), bool)
    tags[np.arange(9), np.arange(9) % 3] = True
    tags[0, 1] = True
    features = FeatureTable(rng.normal(3, 2, (6, 2)).astype(np.float32), ("a", "b"))
    items_table = Catalogue(np.arange(9), FeatureTable.empty(9), tags, ("x", "y", "z"))
    return InteractionData(Users(np.arange(6), features), items_table, log, log, Provenance("tiny", "own"))


def column(table, name):
    return table.values[:, table.names.index(name)]


def standard(values):
    return (values - values.mean()) / values.std()


def test_pooled_tags_are_shrunken_means_over_the_context():
    data, config = tiny(), InputConfig(history_factors=0, user_pseudo_count=10.0)
    inputs = response_inputs(data, data.train, config, 0)
    shares = data.items.tags / data.items.tags.sum(1, keepdims=True)
    log = data.train
    clicked, shown = np.zeros((6, 3)), np.zeros((6, 3))
    for user, item, click in zip(log.users, log.items, log.clicks, strict=True):
        shown[user] += shares[item]
        clicked[user] += shares[item] * click
    n_clicks = np.bincount(log.users, log.clicks, minlength=6)
    for tag in range(3):
        np.testing.assert_allclose(
            column(inputs.users, f"clicked tag {tag}"), standard(clicked[:, tag] / (n_clicks + 10)), atol=1e-5
        )
        np.testing.assert_allclose(
            column(inputs.users, f"shown tag {tag}"), standard(shown[:, tag] / (12 + 10)), atol=1e-5
        )


def test_item_rates_are_shrunken_logits():
    data, config = tiny(), InputConfig(item_pseudo_count=7.0)
    inputs = response_inputs(data, data.train, config, 0)
    rate = data.train.clicks.mean()
    smoothed = (data.train.click_counts(9) + 7 * rate) / (data.train.exposures(9) + 7)
    expected = standard(np.log(smoothed / (1 - smoothed)))
    np.testing.assert_allclose(column(inputs.items, "context rate 0"), expected, atol=1e-4)


def test_without_context_there_are_features_and_tags_only():
    data = tiny()
    inputs = response_inputs(data, None, InputConfig(), 0)
    assert inputs.users.names == ("feature 0", "feature 1")
    assert all(name.startswith("tag") for name in inputs.items.names)
    assert inputs.context_rows == 0


def test_columns_are_standardised_and_constants_are_left_out():
    data = tiny()
    inputs = response_inputs(data, data.train, InputConfig(history_factors=3), 0)
    for table in (inputs.users, inputs.items):
        np.testing.assert_allclose(table.values.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(table.values.std(0), 1, atol=1e-4)
    assert not any(name == "context rate 1" for name in inputs.users.names), "all users have 12 exposures"


def test_the_same_seed_gives_the_same_inputs():
    data = tiny()
    first, again = (response_inputs(data, data.train, InputConfig(history_factors=3), 5) for _ in range(2))
    np.testing.assert_array_equal(first.users.values, again.users.values)


def test_the_test_log_is_never_read():
    data = tiny()
    changed = InteractionData(data.users, data.items, data.train, data.train.take(np.arange(40)), data.provenance)
    first, other = (response_inputs(d, d.train, InputConfig(history_factors=3), 5) for d in (data, changed))
    np.testing.assert_array_equal(first.users.values, other.users.values)
    np.testing.assert_array_equal(first.items.values, other.items.values)


@pytest.mark.parametrize("rank", [1, 2, 50])
def test_ranks_beyond_the_data_are_cut(rank):
    data = tiny()
    inputs = response_inputs(data, data.train, InputConfig(history_factors=rank), 0)
    factors = sum(name.startswith("factor") for name in inputs.items.names)
    assert factors == min(rank, 4)


def test_a_log_of_positives_only_gives_finite_inputs():
    data = tiny()
    log = data.train
    only = InteractionLog(log.users, log.items, np.ones(len(log), bool), log.times, positives_only=True)
    inputs = response_inputs(data, only, InputConfig(history_factors=3), 0)
    assert np.isfinite(inputs.users.values).all()
    assert np.isfinite(inputs.items.values).all()
