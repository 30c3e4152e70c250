"""The rows that a fit sees, drawn negatives, and the history before each row.

What the inputs of a response model say, computed by hand.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.errors import DataError
from kuaifair_env.response import InputConfig, NegativeSampling, SplitConfig
from kuaifair_env.response.inputs import response_inputs
from kuaifair_env.response.rows import history_chunks, history_stream, labelled_rows, rate_correction


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
    first, again, other = (labelled_rows(log, 40, SplitConfig(), NegativeSampling(), seed).roles for seed in (1, 1, 2))
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
    expected = positives.astype(float) ** power
    expected = expected / expected.sum() * (1 - positives / positives.sum())
    found = np.bincount(rows.items[~rows.clicks], minlength=8)
    assert stats.chisquare(found, expected / expected.sum() * found.sum()).pvalue > 1e-3


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


def short_log(rng, users, rows):
    return InteractionLog.sorted(rng.integers(0, users, rows), rng.integers(0, 99, rows), rng.random(rows) < 0.5)


def seen_before(log, context, row, source):
    """What the row's user saw before it, oldest first."""
    user = log.users[row]
    seen = [(i, c) for u, i, c in zip(context.users, context.items, context.clicks, strict=True) if u == user]
    if source == "log":
        earlier = np.arange(len(log)) < row
        seen += list(
            zip(
                log.items[earlier & (log.users == user)],
                log.clicks[earlier & (log.users == user)],
                strict=True,
            )
        )
    return seen


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 5), st.sampled_from(["log", "context"]))
def test_each_row_is_predicted_once_from_a_suffix_of_what_was_seen(seed, min_seen, stride, source):
    length = min_seen + stride
    rng = np.random.default_rng(seed)
    log, context = short_log(rng, 4, 60), short_log(rng, 4, 25)
    rows = np.sort(rng.choice(60, 40, replace=False))
    chunks = history_chunks(history_stream(log, context, 5, source), rows, length, min_seen)
    assert sorted(chunks.rows.tolist()) == list(range(40))
    for chunk in range(len(chunks.offsets) - 1):
        for k in range(chunks.offsets[chunk], chunks.offsets[chunk + 1]):
            seen = seen_before(log, context, rows[chunks.rows[k]], source)
            place = chunks.places[k]
            read = list(zip(chunks.history.items[chunk, :place], chunks.history.clicks[chunk, :place], strict=True))
            assert read == seen[len(seen) - place :]
            assert place <= length
            assert place >= min(len(seen), min_seen)


def test_chunks_share_passes():
    rng = np.random.default_rng(0)
    log = short_log(rng, 3, 300)
    chunks = history_chunks(history_stream(log, None, 3, "log"), np.arange(300), 50, 25)
    assert len(chunks.offsets) - 1 <= 3 * 4


def test_without_context_the_first_row_sees_nothing():
    log = InteractionLog.sorted(np.array([0, 1]), np.array([5, 6]), np.array([1, 0]))
    stream = history_stream(log, None, 2, "log")
    np.testing.assert_array_equal(history_chunks(stream, np.arange(2), 3, 1).places, [0, 0])
    with pytest.raises(IndexError):
        history_chunks(stream, np.array([2]), 3, 1)


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


def test_factors_do_not_have_the_signs_that_a_linear_algebra_library_happens_to_give_them():
    data = tiny()
    first, other = (response_inputs(data, data.train, InputConfig(history_factors=3), seed) for seed in (0, 4))
    np.testing.assert_allclose(first.users.values, other.users.values, atol=1e-4)
    np.testing.assert_allclose(first.items.values, other.items.values, atol=1e-4)


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
