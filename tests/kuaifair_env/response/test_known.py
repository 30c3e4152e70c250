"""Responses that need no fit: observed matrices, and the truth of a twin.

Files of response models are whole, checked, and never execute anything.
"""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from kuaifair_env.data.dataset import InteractionData
from kuaifair_env.data.schema import Catalogue, FeatureTable, InteractionLog, Provenance, Users
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import RESPONSES, save_artifact, take_tensors, with_checksum
from kuaifair_env.response import ObservedResponse, ResponseModel, load_response, observed_block
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.synthetic.config import TOY
from kuaifair_env.synthetic.twin import generate_twin

USERS, ITEMS = np.array([2, 5, 6, 9]), np.array([1, 3, 4, 8, 11])


def data_of(log: InteractionLog) -> InteractionData:
    return InteractionData(
        Users(np.arange(10), FeatureTable.empty(10)),
        Catalogue(np.arange(12), FeatureTable.empty(12), np.zeros((12, 0), bool)),
        log,
        log,
        Provenance("block", "own"),
    )


def block(seed=0, drop=(), positives_only=False):
    """A log over all pairs of USERS and ITEMS but those dropped, rows in random order, and its matrix."""
    rng = np.random.default_rng(seed)
    ratios = rng.gamma(1.0, 1.0, (4, 5)).astype(np.float32)
    ratios[0, 0] = 30.0
    kept = [(u, i) for u in range(4) for i in range(5) if (u, i) not in drop]
    u, i = np.array(kept)[rng.permutation(len(kept))].T
    log = InteractionLog.sorted(USERS[u], ITEMS[i], ratios[u, i] >= 2, None, ratios[u, i], positives_only)
    return log, ratios


def everything(model):
    return model.expected(USERS, np.tile(ITEMS, (4, 1)))


def test_clicks_of_the_log_are_looked_up():
    log, ratios = block()
    model = ObservedResponse.from_log(log, data_of(log))
    np.testing.assert_array_equal(everything(model), ratios >= 2)
    assert isinstance(model, ResponseModel)
    assert (model.n_users, model.n_items) == (10, 12)
    assert model.users.tolist() == USERS.tolist()
    assert model.items.tolist() == ITEMS.tolist()
    described = model.describe()
    assert described["bytes"] == 20  # one byte a cell
    assert described["coverage"] == 1.0
    assert described["missing_cells"] == 0
    json.dumps(described, allow_nan=False)


def test_a_threshold_makes_clicks_of_watch_ratios():
    log, ratios = block()
    model = ObservedResponse.from_log(log, data_of(log), threshold=0.5)
    np.testing.assert_array_equal(everything(model), ratios >= 0.5)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_observed_feedback_does_not_depend_on_chance(uniform):
    log, ratios = block()
    for mode, wanted in (("click", ratios >= 2), ("watch_ratio", np.minimum(ratios, 5).astype(np.float16))):
        model = ObservedResponse.from_log(log, data_of(log), mode=mode)
        expected = everything(model)
        feedback = model.feedback(expected, np.full(expected.shape, uniform))
        np.testing.assert_array_equal(feedback, wanted)
        assert feedback.dtype == np.float32


def test_watch_ratios_are_clipped_and_count_as_clicks_from_the_threshold():
    log, ratios = block()
    model = ObservedResponse.from_log(log, data_of(log), mode="watch_ratio", threshold=1.5, clip=4.0)
    expected = everything(model)
    np.testing.assert_allclose(expected, np.minimum(ratios, 4), rtol=1e-3)
    np.testing.assert_array_equal(model.clicked(expected), ratios >= 1.5)
    assert expected.max() == 4.0


def test_a_missing_cell_takes_the_mean_of_its_item():
    log, ratios = block(drop=[(1, 2)])
    data = data_of(log)
    model = ObservedResponse.from_log(log, data, mode="watch_ratio", minimum_coverage=0.9)
    wanted = np.delete(np.minimum(ratios[:, 2], 5), 1).mean()
    assert everything(model)[1, 2] == pytest.approx(wanted, rel=1e-3)
    assert model.describe()["missing_cells"] == 1
    clicks = ObservedResponse.from_log(log, data, minimum_coverage=0.9)
    expected = everything(clicks)
    share = np.delete(ratios[:, 2] >= 2, 1).mean()
    assert expected[1, 2] == pytest.approx(share, rel=1e-3)
    uniforms = np.random.default_rng(1).random((5000, 4, 5))
    drawn = clicks.feedback(expected, uniforms)[:, 1, 2]
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    assert abs(drawn.mean() - share) < 0.03


def test_the_last_of_repeated_pairs_counts():
    log, _ = block()
    users, items = np.r_[log.users, USERS[0]], np.r_[log.items, ITEMS[1]]
    times = np.r_[log.times, log.times.max() + 1]
    first = log.clicks[(log.users == USERS[0]) & (log.items == ITEMS[1])][0]
    longer = InteractionLog.sorted(users, items, np.r_[log.clicks, ~first], times)
    model = ObservedResponse.from_log(longer, data_of(longer))
    assert everything(model)[0, 1] == float(~first)
    assert model.describe()["repeated_rows_dropped"] == 1


def test_outside_the_block_is_an_error_that_names_the_row():
    log, _ = block()
    model = ObservedResponse.from_log(log, data_of(log))
    with pytest.raises(DataError, match="user row 3 is outside"):
        model.expected(np.array([2, 3]), np.tile(ITEMS, (2, 1)))
    with pytest.raises(DataError, match="item row 7 is outside"):
        model.expected(np.array([2]), np.array([[1, 7]]))
    with pytest.raises(DataError, match="item row 0 is outside"):
        model.expected_catalogue(np.array([2]), 12)


def test_candidates_first_makes_the_catalogue_the_block():
    log, ratios = block()
    data = data_of(log)
    order = np.r_[ITEMS, np.setdiff1d(np.arange(12), ITEMS)]
    model = ObservedResponse.from_log(log, data).rearranged(order)
    np.testing.assert_array_equal(model.expected_catalogue(USERS, 5), ratios >= 2)
    again = ObservedResponse.from_log(data.arranged(ITEMS).test, data.arranged(ITEMS))
    np.testing.assert_array_equal(again.expected_catalogue(USERS, 5), ratios >= 2)


@pytest.mark.parametrize("mode", ["click", "watch_ratio"])
def test_a_saved_matrix_comes_back_equal(mode, tmp_path):
    log, _ = block(drop=[(0, 1)])
    model = ObservedResponse.from_log(log, data_of(log), mode=mode, threshold=0.7, minimum_coverage=0.9)
    model.save(tmp_path / "matrix")
    back = load_response(tmp_path / "matrix")
    np.testing.assert_array_equal(everything(back), everything(model))
    np.testing.assert_array_equal(back.clicked(everything(back)), model.clicked(everything(model)))
    assert back.describe() == model.describe()


def test_a_matrix_whose_places_do_not_fit_is_refused(tmp_path):
    from kuaifair_env.files import save_artifact

    tensors = {"matrix": np.zeros((2, 2), np.uint8), "user_places": np.array([0, 5], np.int32)}
    tensors["item_places"] = np.array([0, 1], np.int32)
    save_artifact(tmp_path / "m", "observed", tensors, {"mode": "click", "threshold": 1.0, "report": {}})
    with pytest.raises(ArtifactError, match="user places"):
        load_response(tmp_path / "m")


def test_logs_that_are_no_matrix_are_refused():
    log, _ = block(drop=[(0, 0), (1, 1), (2, 2)])
    assert observed_block(log).coverage == pytest.approx(17 / 20)
    with pytest.raises(DataError, match=r"covers 85.0% of the 4 x 5 pairs .* needs 95%"):
        ObservedResponse.from_log(log, data_of(log))
    positives, _ = block(positives_only=True)
    with pytest.raises(DataError, match="positives only"):
        ObservedResponse.from_log(positives, data_of(positives))
    full, _ = block()
    bare = InteractionLog(full.users, full.items, full.clicks, full.times)
    with pytest.raises(DataError, match="no watch ratios"):
        ObservedResponse.from_log(bare, data_of(bare), mode="watch_ratio")
    hole = InteractionLog(full.users, full.items, full.clicks, full.times, np.where(full.items == 1, np.nan, 1.0))
    with pytest.raises(DataError, match="4 watch ratios are NaN"):
        ObservedResponse.from_log(hole, data_of(hole), threshold=2.0)


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
    assert np.allclose(TwinResponse(twin.truth).expected(*pairs), twin.truth.click_probability(*pairs), atol=1e-6)


def test_realised_clicks_come_at_their_probability(twin, pairs):
    model = TwinResponse(twin.truth)
    expected = model.expected(*pairs)
    rng = np.random.default_rng(1)
    clicks = np.mean([model.clicked(model.feedback(expected, rng.random(expected.shape))) for _ in range(400)], axis=0)
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
    assert np.array_equal(moved.truth.true_preference[0], twin.truth.true_preference[0][order])


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


@pytest.fixture
def saved(tmp_path, small_model):
    path = tmp_path / "model.safetensors"
    small_model.save(path)
    return path


def test_every_truncation_is_noticed(saved):
    content = saved.read_bytes()
    for size in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(ArtifactError, match="cut short"):
            load_response(saved)


def test_a_flipped_bit_in_a_table_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_response(saved)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="but not a response model"):
        load_response(path)
    path.write_bytes(pickle.dumps({"weight": 1}))
    with pytest.raises(ArtifactError, match="something else"):
        load_response(path)
    with pytest.raises(ArtifactError, match="not a file"):
        load_response(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="not a file"):
        load_response(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"version": RESPONSES.version + 1},
            f"version {RESPONSES.version + 1}, this release reads version {RESPONSES.version}",
        ),
        ({"format": "kuaifair-encoder"}, "not a response model"),
        ({"kind": "oracle-of-delphi"}, "the kind 'oracle-of-delphi' is unknown"),
        ({"settings": None}, "lacks kind or settings"),
        ({"kind": "factorised", "settings": {}}, "lacks the t"),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    save_artifact(path, "factorised", {"a": np.zeros(2, np.float32)}, {"offset": 0.0, "report": {}})
    with safe_open(path, framework="numpy") as stream:
        header = json.loads(stream.metadata()["kuaifair"])
        tensors = {"a": stream.get_tensor("a")}
    assert header["format"] == RESPONSES.format
    header = {name: value for name, value in (header | change).items() if name != "sha256"}
    save_file(tensors, path, metadata={"kuaifair": json.dumps(with_checksum(header, tensors))})
    with pytest.raises(ArtifactError, match=message):
        load_response(path)


def test_a_header_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2)}, path, metadata={"kuaifair": "{"})
    with pytest.raises(ArtifactError, match="not JSON"):
        load_response(path)


def test_tensors_are_checked_one_by_one():
    good = {"a": np.zeros((2, 3))}
    assert take_tensors(good, {"a": (2, None)}) is good
    with pytest.raises(ValueError, match="lacks the tensor 'b'"):
        take_tensors(good, {"b": (None,)})
    with pytest.raises(ValueError, match="has shape"):
        take_tensors(good, {"a": (None,)})


def test_a_failed_save_leaves_the_old_file_and_nothing_else(saved, small_model, monkeypatch):
    before = saved.read_bytes()

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        small_model.rearranged(np.arange(5)).save(saved)
    assert saved.read_bytes() == before
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_a_folder_is_no_file_name(tmp_path, small_model):
    with pytest.raises(ArtifactError, match="is a folder"):
        small_model.save(tmp_path)


def test_numbers_that_json_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(tmp_path / "x", "factorised", {}, {"loss": float("nan")})
    assert not list(tmp_path.iterdir())
