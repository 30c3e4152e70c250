"""Artifacts: what is loaded is what was saved, or there is an error that names the file."""

from __future__ import annotations

import errno
import gzip
import multiprocessing
import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from damage import (
    contents,
    same,
    try_damaged_bytes,
    try_foreign_files,
    try_wrong_settings,
    try_wrong_tensors,
    with_bits_flipped,
)

from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import (
    RESPONSES,
    Family,
    check_files,
    locked_folder,
    open_artifact,
    save_artifact,
    temporary_beside,
    whole,
    write_checksums,
    write_text_atomically,
)
from kuaifair_env.response import (
    FactorisedResponse,
    LoggedResponse,
    ObservedResponse,
    SequentialResponse,
    load_response,
)
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.response.logged import UserItems
from kuaifair_env.response.transformer import TransformerShape
from kuaifair_env.synthetic.truth import SCORE_GRID, ClickChoice, TwinTruth

CAKES = Family("kuaifair-cake", 2, "cake", "bake it again")


def table(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factorised():
    return FactorisedResponse(-0.5, table(6), table(5), table(6, 2), table(5, 2), {"rows": 3})


def twin(choice=False):
    chosen = ClickChoice(table(5), np.zeros(len(SCORE_GRID), np.float32), table(5), table(6), 0.5, 0.1)
    truth = TwinTruth(table(6, 2), table(5, 2), table(5), table(6), table(6), table(5), 1.5, chosen if choice else None)
    return TwinResponse(truth, 0.25, {"name": "tiny"})


def sequential():
    shape = TransformerShape(dimension=8, heads=1, layers=1, hidden=4, length=4)
    weights = {name: table(*size) for name, size in shape.weight_shapes().items()}
    return SequentialResponse(factorised(), shape, table(5, 8), table(6, 8), weights, {"note": 1})


def graded(inner):
    return GradedResponse(inner, 5.0, 1.0, np.asarray([1.0], np.float32), np.ones((2, 4), np.float32), {"rows": 3})


def observed():
    places = np.asarray([0, 1, -1], np.int32)
    return ObservedResponse(np.ones((2, 2), np.float32), places, places, "watch_ratio", 1.0, {"rows": 4})


def logged():
    return LoggedResponse(UserItems(np.asarray([0, 2, 3]), np.asarray([0, 3, 1])), table(3), 4, 0.5, {"rows": 3})


RESPONSE_MODELS = {
    "factorised": factorised,
    "twin": twin,
    "twin with a choice": lambda: twin(choice=True),
    "sequential": sequential,
    "graded around factors": lambda: graded(factorised()),
    "graded around a twin": lambda: graded(twin()),
    "observed": observed,
    "logged": logged,
}


@pytest.fixture(params=RESPONSE_MODELS)
def response_file(request, tmp_path):
    path = tmp_path / "model.safetensors"
    RESPONSE_MODELS[request.param]().save(path)
    return path


def test_every_length_of_a_file_counts(tmp_path):
    """Files that end early: an error that names the file and says what to do, or what was saved."""
    path = tmp_path / "cake.safetensors"
    tensors = {"layers": table(2), "candles": np.asarray([7])}
    save_artifact(path, "sponge", tensors, {"eggs": 3, "icing": {"sugar": 0.5}}, CAKES)
    whole = path.read_bytes()
    changed = [whole[:size] for size in range(0, len(whole), 5)]
    refused = 0
    for content in changed:
        path.write_bytes(content)
        try:
            with open_artifact(path, "sponge", CAKES) as (_, loaded, settings):
                assert settings == {"eggs": 3, "icing": {"sugar": 0.5}}
                assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)
        except ArtifactError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.95 * len(changed)


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "cake.safetensors"
    save_artifact(path, "sponge", {}, {}, CAKES)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(ArtifactError, match=r"cake\.safetensors cannot be read: Permission denied"):
        open_artifact(path, family=CAKES).__enter__()


def test_any_bit_that_changed_in_an_artifact_is_noticed_or_changes_nothing(tmp_path):
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    tensors = {"weight": rng.normal(size=(8, 16)).astype(np.float32), "items": np.arange(7), "empty": np.zeros((0, 2))}
    save_artifact(path, "some kind", tensors, {"level": 0.1, "names": ["a", "b"], "none": None}, CAKES)
    saved = contents(path, CAKES)
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    start, end = 8 * (8 + header), 8 * path.stat().st_size
    noticed = []
    for bit in with_bits_flipped(path, [*range(start), *rng.choice(np.arange(start, end), 1_000, replace=False)]):
        with suppress(ArtifactError):
            assert same(contents(path, CAKES), saved), f"bit {bit} changed what was read"
            continue
        noticed.append(bit)
    assert len(noticed) > 0.99 * (start + 1_000)
    assert same(contents(path, CAKES), saved)


def test_any_bit_that_changed_in_a_folder_with_checksums_is_noticed(tmp_path):
    for name in ("model.zip", "result.json"):
        (tmp_path / name).write_bytes(name.encode())
    write_checksums(tmp_path)
    check_files(tmp_path, None, "")
    for path in tmp_path.iterdir():
        for _ in with_bits_flipped(path, range(8 * path.stat().st_size)):
            with pytest.raises(ArtifactError, match=str(tmp_path)):
                check_files(tmp_path, None, "")
    check_files(tmp_path, None, "")
    (tmp_path / "added").write_bytes(b"")
    with pytest.raises(ArtifactError, match="added was altered"):
        check_files(tmp_path, ["added"], "")
    (tmp_path / "model.zip").unlink()
    with pytest.raises(ArtifactError, match=r"model\.zip is missing"):
        check_files(tmp_path, [], "")


def test_errors_of_who_reads_name_the_file_and_what_to_do(tmp_path):
    path = tmp_path / "cake.safetensors"
    save_artifact(path, "sponge", {}, {"eggs": "three"}, CAKES)
    with (
        pytest.raises(
            ArtifactError, match=r"cake\.safetensors is not a whole cake \(it lacks 'sugar'\); bake it again"
        ),
        open_artifact(path, family=CAKES) as (_, _, settings),
    ):
        settings["sugar"]


def test_what_json_does_not_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        save_artifact(tmp_path / "cake", "sponge", {}, {"eggs": float("nan")}, CAKES)
    assert list(tmp_path.iterdir()) == []


def test_damaged_responses_are_refused(response_file):
    try_damaged_bytes(response_file, RESPONSES, load_response, 20)
    try_foreign_files(response_file, RESPONSES, load_response)


def test_responses_of_other_content_are_refused(response_file):
    try_wrong_settings(response_file, RESPONSES, load_response, ["choice"])
    try_wrong_tensors(response_file, RESPONSES, load_response)


def test_a_folder_is_locked_for_others_until_its_holder_is_done(tmp_path):
    busy = pytest.raises(ArtifactError, match=r"another process works on the search in .*new; wait for it")
    with locked_folder(tmp_path / "new", "search"), busy, locked_folder(tmp_path / "new", "search"):
        pass
    with locked_folder(tmp_path / "new", "search"):
        pass


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_others_write_stays(tmp_path):
    def write_and_wait(moments):
        with temporary_beside(tmp_path / "a[1].txt") as temporary:
            temporary.mkdir()
            (temporary / "part").write_text("half")
            moments.send(temporary.name)
            moments.recv()

    here, there = multiprocessing.Pipe()
    writers = [multiprocessing.get_context("fork").Process(target=write_and_wait, args=(there,)) for _ in range(2)]
    names = []
    for writer in writers:
        writer.start()
        names.append(here.recv())
    writers[0].kill()
    writers[0].join()
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    write_text_atomically(tmp_path / "a[1].txt", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].txt", names[1]}
    here.send("go on")
    writers[1].join()
    assert {path.name for path in tmp_path.iterdir()} == {"a[1].txt"}


def test_an_error_of_the_system_names_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*page\.html'$"):
        write_text_atomically(tmp_path / "page.html", "text")
    assert not list(tmp_path.iterdir())


def test_text_is_compressed_by_its_name_and_to_the_same_bytes(tmp_path):
    text = "user,clicks\nä,1\n" * 100
    for name in ("a.csv.gz", "b.csv.gz", "c.csv"):
        write_text_atomically(tmp_path / name, text)
    assert gzip.decompress((tmp_path / "a.csv.gz").read_bytes()).decode("utf-8") == text
    assert (tmp_path / "a.csv.gz").read_bytes() == (tmp_path / "b.csv.gz").read_bytes()
    assert (tmp_path / "c.csv").read_bytes() == text.encode("utf-8")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ArtifactError, match=r"pipe is not a file, and no array"),
        whole(tmp_path / "pipe", "array", "x"),
    ):
        pytest.fail("nobody writes to it")


@pytest.mark.parametrize(
    "header", [b"{'descr': (", b"{'descr': '<f4', 'fortran_order': False, 'shape': 5", b"(", b"\x00"]
)
def test_an_array_whose_header_is_damaged_is_no_whole_file(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ArtifactError, match=r"a\.npy is not a whole array"), whole(path, "array", "make it again"):
        np.load(path, allow_pickle=False)
