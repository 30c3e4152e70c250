"""The truth of a twin as a response model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kuaifair_env.errors import ArtifactError
from kuaifair_env.response.base import ResponseModel
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.synthetic.twin import TOY, generate_twin


@pytest.fixture(scope="module")
def twin():
    return generate_twin(TOY)


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return rng.integers(0, TOY.n_users, 64), rng.integers(0, TOY.n_items, (64, 10))


@pytest.mark.parametrize("conformity", [0.0, 0.5, 1.0])
def test_expected_feedback_is_the_true_click_probability(twin, pairs, conformity):
    model = TwinResponse(twin.truth, conformity)
    assert isinstance(model, ResponseModel)
    assert not model.uses_history
    expected = model.expected(*pairs)
    assert expected.dtype == np.float32
    assert np.allclose(expected, twin.truth.click_probability(*pairs, conformity), atol=1e-6)
    catalogue = model.expected_catalogue(pairs[0], TOY.n_items)
    assert np.allclose(np.take_along_axis(catalogue, pairs[1], axis=1), expected, atol=1e-6)
    assert model.expected_catalogue(pairs[0], 7).shape == (64, 7)


def test_conformity_is_off_by_default(twin, pairs):
    assert np.allclose(
        TwinResponse(twin.truth).expected(*pairs), twin.truth.click_probability(*pairs), atol=1e-6
    )


def test_realised_clicks_come_at_their_probability(twin, pairs):
    model = TwinResponse(twin.truth)
    expected = model.expected(*pairs)
    rng = np.random.default_rng(1)
    clicks = np.mean(
        [model.clicked(model.feedback(expected, rng.random(expected.shape))) for _ in range(400)], axis=0
    )
    spread = np.sqrt(expected * (1 - expected) / 400)
    assert np.abs((clicks - expected) / spread).max() < 5


def test_rearranged_items_keep_their_probabilities(twin, pairs):
    users, items = pairs
    model = TwinResponse(twin.truth, 0.7)
    order = np.random.default_rng(2).permutation(TOY.n_items)
    place = np.argsort(order)
    moved = model.rearranged(order)
    assert np.array_equal(moved.expected(users, place[items]), model.expected(users, items))
    assert moved.describe() == model.describe()
    assert np.array_equal(moved.true_preference.items, twin.truth.true_preference.items[order])


def test_a_saved_model_is_the_same_model(twin, pairs, tmp_path):
    model = TwinResponse(twin.truth, 0.3, twin.data.provenance.as_dict())
    model.save(tmp_path / "truth.safetensors")
    loaded = TwinResponse.load(tmp_path / "truth.safetensors")
    assert np.array_equal(loaded.expected(*pairs), model.expected(*pairs))
    assert loaded.describe() == model.describe()
    assert json.loads(json.dumps(loaded.describe()))["provenance"]["origin"] == "twin"


def test_damaged_and_foreign_files_are_refused(twin, tmp_path):
    path = tmp_path / "truth.safetensors"
    TwinResponse(twin.truth).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError):
        TwinResponse.load(path)
    path.write_bytes(whole[:-4] + b"\x00\x00\x80\x7f")
    with pytest.raises(ArtifactError):
        TwinResponse.load(path)
    with pytest.raises(ArtifactError):
        TwinResponse.load(tmp_path / "nothing.safetensors")


def test_conformity_must_be_a_number(twin):
    with pytest.raises(ValueError, match="conformity"):
        TwinResponse(twin.truth, float("nan"))
