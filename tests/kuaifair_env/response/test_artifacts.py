"""Files of response models are whole, checked, and never execute anything."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import RESPONSES, load_artifact, save_artifact, take_tensors
from kuaifair_env.response import load_response


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
        ({"kind": "oracle-of-delphi"}, "unknown kind 'oracle-of-delphi'"),
        ({"settings": None}, "lacks kind or settings"),
        ({"kind": "factorised", "settings": {}}, "lacks the t"),
    ],
)
def test_a_header_that_does_not_fit_is_named(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    save_artifact(path, "factorised", {"a": np.zeros(2, np.float32)}, {"offset": 0.0, "report": {}})
    _, tensors, _settings = load_artifact(path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as stream:
        header = json.loads(stream.metadata()["kuaifair"])
    assert header["format"] == RESPONSES.format
    save_file(tensors, path, metadata={"kuaifair": json.dumps(header | change)})
    with pytest.raises(ArtifactError, match=message):
        load_response(path)


def test_a_header_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(2)}, path, metadata={"kuaifair": "{"})
    with pytest.raises(ArtifactError, match="not JSON"):
        load_response(path)


def test_tensors_are_checked_one_by_one():
    good = {"a": np.zeros((2, 3))}
    assert take_tensors("f", good, {"a": (2, None)}) is good
    with pytest.raises(ArtifactError, match="lacks the tensor 'b'"):
        take_tensors("f", good, {"b": (None,)})
    with pytest.raises(ArtifactError, match="has shape"):
        take_tensors("f", good, {"a": (None,)})
    with pytest.raises(ArtifactError, match="NaN"):
        take_tensors("f", {"a": np.array([np.nan])}, {"a": (1,)})


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
