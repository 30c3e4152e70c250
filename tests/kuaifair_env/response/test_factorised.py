"""What a factor model of clicks must do at run time."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.response import FactorisedResponse, ResponseModel, load_response


def test_the_logit_is_offset_plus_biases_plus_inner_product():
    rng = np.random.default_rng(0)
    a, b, p, q = (
        rng.normal(size=7),
        rng.normal(size=9),
        rng.normal(size=(7, 3)) + 2,
        rng.normal(size=(9, 3)) - 1,
    )
    model = FactorisedResponse(0.4, a, b, p, q)
    expected = 1 / (1 + np.exp(-(0.4 + a[:, None] + b[None, :] + p @ q.T)))
    users = np.arange(7)
    result = model.expected(users, np.tile(np.arange(9), (7, 1)))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_allclose(model.expected_catalogue(users, 9), expected, atol=1e-6)
    assert isinstance(model, ResponseModel)


def test_the_personal_part_averages_to_nothing_over_items_and_over_users(small_model):
    personal = small_model.personal_logits(np.arange(30), np.tile(np.arange(20), (30, 1)))
    np.testing.assert_allclose(personal.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(personal.mean(1), 0, atol=1e-5)
    assert small_model.user_bias.mean() == pytest.approx(0, abs=1e-6)
    assert small_model.item_bias.mean() == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 12))
def test_a_row_does_not_depend_on_the_other_rows_of_the_batch(seed, batch, slate):
    rng = np.random.default_rng(seed)
    model = FactorisedResponse(
        0.0, rng.normal(size=50), rng.normal(size=60), rng.normal(size=(50, 16)), rng.normal(size=(60, 16))
    )
    users, items = rng.integers(0, 50, batch), rng.integers(0, 60, (batch, slate))
    together = model.expected(users, items)
    for k in range(batch):
        np.testing.assert_array_equal(together[k : k + 1], model.expected(users[k : k + 1], items[k : k + 1]))


def test_the_batch_is_invariant_at_full_size():
    rng = np.random.default_rng(1)
    model = FactorisedResponse(
        -1.0,
        rng.normal(size=900),
        rng.normal(size=800),
        rng.normal(size=(900, 16)),
        rng.normal(size=(800, 16)),
    )
    users, items = rng.integers(0, 900, 256), rng.integers(0, 800, (256, 10))
    together = model.expected(users, items)
    alone = np.concatenate([model.expected(users[k : k + 1], items[k : k + 1]) for k in range(256)])
    np.testing.assert_array_equal(together, alone)
    catalogue = model.expected_catalogue(users, 800)
    np.testing.assert_allclose(np.take_along_axis(catalogue, items, 1), together, atol=1e-6)


def test_rearranged_means_new_item_i_is_old_item_order_i(small_model):
    order = np.random.default_rng(2).permutation(20)
    moved = small_model.rearranged(order)
    users = np.arange(30)
    np.testing.assert_array_equal(
        moved.expected(users, np.tile(np.arange(20), (30, 1))),
        small_model.expected(users, np.tile(order, (30, 1))),
    )
    np.testing.assert_allclose(
        moved.expected_catalogue(users, 5), small_model.expected_catalogue(users, 20)[:, order[:5]]
    )
    assert moved.n_items == 20
    assert small_model.rearranged(order[:4]).n_items == 4


def test_feedback_is_a_coin_with_the_expected_bias(small_model):
    rng = np.random.default_rng(4)
    users, items = rng.integers(0, 30, 20_000), rng.integers(0, 20, (20_000, 3))
    expected = small_model.expected(users, items)
    uniforms = rng.random(expected.shape)
    feedback = small_model.feedback(expected, uniforms)
    np.testing.assert_array_equal(feedback, uniforms < expected)
    assert feedback.dtype == np.float32
    np.testing.assert_array_equal(small_model.clicked(feedback), feedback == 1)
    error = np.sqrt((expected * (1 - expected)).sum()) / expected.size
    assert abs(feedback.mean() - expected.mean()) < 4 * error
    assert not small_model.feedback(np.zeros((1, 1), np.float32), np.zeros((1, 1))).any()


def test_the_spread_of_parts_is_a_two_way_analysis_of_variance(small_model):
    users, items = np.arange(3, 25), np.arange(1, 15)
    table = small_model.logits(users, np.tile(items, (len(users), 1))).astype(np.float64)
    row, column = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    rest = table - row - column + table.mean()
    spread = small_model.parts_spread(users, items)
    assert spread["user"] == pytest.approx(row.std(), rel=1e-4)
    assert spread["item"] == pytest.approx(column.std(), rel=1e-4)
    assert spread["personal"] == pytest.approx(rest.std(), rel=1e-4)
    assert spread["personal_share"] == pytest.approx(rest.var() / table.var(), rel=1e-4)


@pytest.mark.parametrize("size", [50.0, 5000.0])
def test_extreme_logits_give_probabilities_without_warnings(size):
    model = FactorisedResponse(0.0, np.array([-size, size]), np.zeros(2), np.zeros((2, 0)), np.zeros((2, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.expected(np.array([0, 1]), np.array([[0], [1]]))
    assert found[0, 0] < 1e-20
    assert found[1, 0] == 1.0


def test_rows_that_do_not_exist_are_errors(small_model):
    with pytest.raises(IndexError, match="must not be negative"):
        small_model.expected(np.array([0]), np.array([[0, -1]]))
    with pytest.raises(IndexError):
        small_model.expected(np.array([0]), np.array([[20]]))


def test_tables_that_do_not_fit_are_errors():
    with pytest.raises(DataError, match="do not fit biases"):
        FactorisedResponse(0.0, np.zeros(3), np.zeros(2), np.zeros((2, 1)), np.zeros((2, 1)))
    with pytest.raises(DataError, match="rank"):
        FactorisedResponse(0.0, np.zeros(2), np.zeros(2), np.zeros((2, 1)), np.zeros((2, 2)))
    with pytest.raises(DataError, match="item bias holds NaN"):
        FactorisedResponse(0.0, np.zeros(2), np.array([0.0, np.nan]), np.zeros((2, 1)), np.zeros((2, 1)))


def test_a_saved_model_comes_back_equal(small_model, tmp_path):
    path = tmp_path / "folder" / "model.safetensors"
    small_model.save(path)
    back = load_response(path)
    assert isinstance(back, FactorisedResponse)
    users, items = np.arange(30), np.tile(np.arange(20), (30, 1))
    np.testing.assert_array_equal(back.expected(users, items), small_model.expected(users, items))
    assert back.describe() == small_model.describe()
    json.dumps(back.describe(), allow_nan=False)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.safetensors"]


def test_another_kind_is_refused(small_model, tmp_path):
    from kuaifair_env.response import ObservedResponse

    small_model.save(tmp_path / "m")
    with pytest.raises(ArtifactError, match="kind 'factorised', not 'observed'"):
        ObservedResponse.load(tmp_path / "m")
