from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import official_files as official
import pytest
from small_sets import build_in_a_process, make_data

import kuaifair_env.data.download as downloads
from kuaifair_env.data import (
    InteractionData,
    cache_dir,
    cached,
    fetch,
    find_source,
    load_data,
    read_kuairand,
    save_data,
)
from kuaifair_env.data.cache import MANIFEST, cache_entries, cached_entries, entry_folder, remove_entries
from kuaifair_env.data.published import KUAIRAND
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import with_checksum


def assert_same(one: InteractionData, two: InteractionData) -> None:
    for left, right in ((one.train, two.train), (one.test, two.test)):
        for name in ("users", "items", "clicks", "times", "watch_ratios"):
            first, second = getattr(left, name), getattr(right, name)
            assert (first is None) == (second is None)
            if first is not None:
                np.testing.assert_array_equal(first, second)
                assert first.dtype == second.dtype
        assert left.positives_only == right.positives_only
    for name in ("ids", "tags", "shown"):
        np.testing.assert_array_equal(getattr(one.items, name), getattr(two.items, name))
    np.testing.assert_array_equal(one.items.features.values, two.items.features.values)
    np.testing.assert_array_equal(one.users.ids, two.users.ids)
    assert one.items.features.names == two.items.features.names
    assert one.items.tag_names == two.items.tag_names
    assert one.provenance == two.provenance
    assert one.report == two.report
    assert one.data_hash == two.data_hash


@pytest.mark.parametrize("rich", [True, False])
def test_what_is_saved_comes_back(tmp_path: Path, rich: bool) -> None:
    data = make_data(rich=rich)
    assert_same(load_data(save_data(data, tmp_path / "set")), data)


def test_the_stored_hash_is_the_hash_of_the_data(tmp_path: Path) -> None:
    loaded = load_data(save_data(make_data(), tmp_path / "set"))
    stored = loaded.__dict__.pop("data_hash")
    assert loaded.data_hash == stored
    assert make_data(1).data_hash != stored


def test_arrays_are_read_only(tmp_path: Path) -> None:
    loaded = load_data(save_data(make_data(), tmp_path / "set"))
    with pytest.raises(ValueError, match="read-only"):
        loaded.train.items[0] = 1
    assert type(loaded.train.items) is np.ndarray


def test_nothing_but_the_data_set_is_left_behind(tmp_path: Path) -> None:
    save_data(make_data(), tmp_path / "set")
    save_data(make_data(1), tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert_same(load_data(tmp_path / "set"), make_data(1))


def test_a_crash_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("kuaifair_env.data.cache.np.save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_data(make_data(), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_of_another_machine_left_is_removed_after_a_day(tmp_path: Path) -> None:
    old, young = tmp_path / ".set.00000000-1-0000000a.tmp", tmp_path / ".set.00000000-1-0000000b.tmp"
    for folder in (old, young):
        folder.mkdir()
        (folder / "part.npy").write_bytes(b"x")
    os.utime(old, (0, 0))
    save_data(make_data(), tmp_path / "set")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "set"]


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="left alone"):
        save_data(make_data(), tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"
    with pytest.raises(ArtifactError, match=f"{MANIFEST} is missing"):
        load_data(tmp_path / "thesis")


def damage(folder: Path, how: str) -> None:
    array, manifest = folder / "train.items.npy", folder / MANIFEST
    content = json.loads(manifest.read_text())
    if how == "flip":
        raw = bytearray(array.read_bytes())
        raw[-1] ^= 1
        array.write_bytes(bytes(raw))
    elif how == "truncate":
        array.write_bytes(array.read_bytes()[:-7])
    elif how == "remove":
        array.unlink()
    elif how == "pickle":
        np.save(array, np.array([{"a": 1}], object), allow_pickle=True)
    elif how == "swap":
        array.write_bytes((folder / "test.items.npy").read_bytes())
    elif how == "half manifest":
        manifest.write_text(manifest.read_text()[:100])
    elif how == "nested manifest":
        manifest.write_text("[" * 100_000)
    else:
        changes = {
            "version": {"version": 999},
            "format": {"format": "x"},
            "hash": {"data_hash": "0" * 16},
            "no checksum": {"sha256": None},
        }
        manifest.write_text(
            json.dumps(content | changes[how] if how in changes else with_checksum(content | MISFITS[how]))
        )


MISFITS: dict[str, dict[str, object]] = {
    "no arrays": {"arrays": {}},
    "list of arrays": {"arrays": []},
    "names that are none": {"feature_names": None},
    "text for a number": {"negatives": {"per_positive": "many"}},
    "no provenance": {"provenance": []},
}
"""Manifests with a checksum that is right, but of other content than data sets have."""

DAMAGES = [
    *("flip", "truncate", "remove", "pickle", "swap", "half manifest", "nested manifest"),
    *("version", "format", "hash", "no checksum", *MISFITS),
]


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_noticed(tmp_path: Path, how: str) -> None:
    folder = save_data(make_data(), tmp_path / "set")
    damage(folder, how)
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        load_data(folder)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_entry_is_rebuilt_and_said_to_be(tmp_path: Path, how: str, rebuilt: Callable[[], list[str]]) -> None:
    key = {"name": "Test Set", "seed": 0}
    cached(key, make_data, tmp_path)
    damage(entry_folder(key, tmp_path), how)
    assert_same(cached(key, make_data, tmp_path), make_data())
    (line,) = rebuilt()
    assert str(tmp_path) in line
    assert_same(cached(key, lambda: pytest.fail("built again"), tmp_path), make_data())
    assert not rebuilt()


def test_rows_take_little_space_and_come_back_as_they_were(tmp_path: Path) -> None:
    data = make_data(rows=20_000)
    folder = save_data(data, tmp_path / "set")
    assert (folder / "train.users.npy").stat().st_size < 8 * len(data.users) + 200
    assert (folder / "train.items.npy").stat().st_size < 2 * len(data.train) + 200
    loaded = load_data(folder)
    assert loaded.train.users.dtype == loaded.train.items.dtype == np.int32
    assert_same(loaded, data)


def test_what_the_cache_holds_is_listed_and_deleted(tmp_path: Path) -> None:
    cached({"name": "a"}, make_data, tmp_path)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "KuaiRec.zip").write_bytes(b"12345")
    (tmp_path / "notes.txt").write_text("mine")
    entries = cache_entries(tmp_path)
    assert [entry.kind for entry in entries] == ["data", "downloads"]
    assert entries[1].size == 5 and entries[0].size > 100
    remove_entries(cache_entries(tmp_path, ["data"]))
    assert [entry.kind for entry in cache_entries(tmp_path)] == ["downloads"]
    remove_entries(entries)
    assert cache_entries(tmp_path) == [] and (tmp_path / "notes.txt").exists()


def test_a_data_set_is_built_once_per_key(tmp_path: Path) -> None:
    built: list[int] = []

    def build(seed: int) -> InteractionData:
        built.append(seed)
        return make_data(seed)

    for seed in (0, 1, 0, 1, 0):
        data = cached({"name": "Test Set", "seed": seed}, lambda seed=seed: build(seed), tmp_path)
        assert_same(data, make_data(seed))
    assert built == [0, 1]
    assert len(cached_entries(tmp_path)) == 2


def test_a_failed_build_leaves_no_entry(tmp_path: Path) -> None:
    def build() -> InteractionData:
        raise DataError("bad file")

    with pytest.raises(DataError, match="bad file"):
        cached({"name": "x"}, build, tmp_path)
    assert cached_entries(tmp_path) == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_keys_and_reports_must_be_json() -> None:
    with pytest.raises(DataError, match="not JSON-able"):
        entry_folder({"name": "x", "y": np.array([1])})
    with pytest.raises(DataError, match="not JSON-able"):
        entry_folder({"name": "x", "y": float("nan")})


def test_the_cache_is_where_it_is_told_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path / "env"))
    assert cache_dir() == tmp_path / "env"
    assert cache_dir(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.delenv("KUAIFAIR_CACHE")
    assert cache_dir().name == "kuaifair"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows cannot rename a folder with open files")
def test_processes_that_build_at_the_same_time_do_not_harm_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        barrier = manager.Barrier(3)
        hashes = pool.starmap_async(build_in_a_process, [(str(tmp_path), barrier)] * 3).get(timeout=120)
    assert set(hashes) == {make_data(5, rows=20_000).data_hash}
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert_same(load_data(cached_entries(tmp_path)[0]), make_data(5, rows=20_000))


ARCHIVE = "KuaiRand-Pure.tar.gz"


class Server(ThreadingHTTPServer):
    """Serves one archive, well or badly, and counts the requests."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan: list[str] = []
        self.requests = 0
        self.ranges = False
        self.began: list[int] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        manner = self.server.plan.pop(0) if self.server.plan else "good"
        self.server.requests += 1
        content = self.server.content
        if self.path != f"/files/{ARCHIVE}" or manner == "gone":
            self.send_error(404)
            return
        if manner == "overloaded":
            self.send_error(503)
            return
        if manner == "circle":
            self.server.plan.insert(0, "circle")  # before the answer, which the next request may follow at once
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if manner.startswith("to "):
            self.send_response(302)
            self.send_header("Location", manner.removeprefix("to "))
            self.send_header("Content-Length", "9" * 20)
            self.end_headers()
            with suppress(OSError):
                while not self.server.released.is_set():
                    self.wfile.write(bytes(1 << 16))
            return
        if manner.startswith("status "):
            self.wfile.write(manner.removeprefix("status ").encode() + b"\r\n\r\n")
            return
        if manner == "wrong":
            content = b"<html>please log in</html>"
        begin = 0
        if self.server.ranges and "Range" in self.headers:
            begin = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            content = content[begin:]
        else:
            self.send_response(200)
        self.server.began.append(begin)
        if manner in ("br", "gzip"):
            self.send_header("Content-Encoding", manner)
        if manner == "longer":
            self.send_header("Content-Length", str(len(content) + 10))
        elif manner != "endless":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if manner == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif manner == "slow":
            for begin in range(0, len(content), 4096):
                self.wfile.write(content[begin : begin + 4096])
                self.server.released.wait(0.001)
        elif manner == "drip":
            for byte in content[:300]:
                self.wfile.write(bytes([byte]))
                self.server.released.wait(0.01)
        elif manner == "endless":
            with suppress(OSError):
                while not self.server.released.is_set():
                    self.wfile.write(bytes(1 << 16))
        elif manner == "stuck":
            self.wfile.write(content[:1000])
            self.wfile.flush()
            self.server.released.wait(3)
        else:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    official.write_kuairand(tmp_path / "made")
    archive = official.pack_tar(tmp_path / "made", tmp_path / "made.tar.gz")
    served = Server(archive.read_bytes())
    monkeypatch.setattr(downloads, "_PAUSE", 0.0)
    yield served
    served.released.set()
    served.shutdown()
    served.server_close()


def get(server: Server, folder: Path, **options: object) -> Path:
    options = {
        "sha256": hashlib.sha256(server.content).hexdigest(),
        "retries": 0,
        "progress": False,
        **options,
    }
    return fetch("kuairand", folder, base_url=server.url, announce=lambda _: None, **options)  # type: ignore[arg-type]


def test_a_good_archive_arrives_with_a_note(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "data")
    assert path == tmp_path / "data" / ARCHIVE
    assert path.read_bytes() == server.content
    note = json.loads((tmp_path / "data" / f"{ARCHIVE}.json").read_text())
    assert note["sha256"] == hashlib.sha256(server.content).hexdigest()
    assert note["size"] == len(server.content)
    assert note["url"] == f"{server.url}/{ARCHIVE}"
    assert sorted(p.name for p in path.parent.iterdir()) == [ARCHIVE, f"{ARCHIVE}.json"]
    assert len(read_kuairand(path).train) == 180


def test_the_default_folder_is_where_readers_look(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
    path = get(server, None)  # type: ignore[arg-type]
    assert find_source("kuairand") == path


def test_a_whole_archive_is_not_downloaded_twice(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    get(server, tmp_path)
    assert server.requests == 1
    (tmp_path / ARCHIVE).write_bytes(server.content[:-5])
    get(server, tmp_path)
    assert server.requests == 2
    assert (tmp_path / ARCHIVE).read_bytes() == server.content


@pytest.mark.parametrize(
    ("manner", "words"),
    [
        ("truncated", "could not be downloaded"),
        ("longer", "could not be downloaded"),
        ("drip", "bytes came in"),
        ("endless", "sends more than 1,000,000 bytes"),
        ("circle", "could not be downloaded in 1 attempt.*infinite loop"),
        ("br", "encoded as 'br', which was not asked for"),
        ("gzip", "encoded as 'gzip', which was not asked for"),
        ("wrong", "not the expected archive"),
        ("gone", "404"),
        ("to /files/elsewhere", "404"),
        ("to http://[", "could not be downloaded in 1 attempt"),
        ("to ftp://a/b", "an address begins with http"),
        ("to file:///etc/passwd", "could not be downloaded in 1 attempt"),
        ("status HTTP/1.1 \x1b[2J", "1 attempt"),
        ("status HTTP/1.1 " + 3_000 * "x", "1 attempt"),
        ("status HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + 99 * "f", "1 attempt"),
        ("overloaded", "503"),
        ("stuck", "could not be downloaded"),
    ],
)
def test_a_bad_download_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manner: str, words: str
) -> None:
    folder = tmp_path / "data"
    server.plan = [manner]
    monkeypatch.setattr(downloads, "MAX_SIZE", 1_000_000)
    with pytest.raises(DataError, match=words) as caught:
        get(server, folder, timeout=0.1)
    assert caught.value.file is not None and ARCHIVE in caught.value.file
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "url",
    ["ftp://a", "http://", "http://[::1", "http://a:b", "http://a:99999", "http://a\n", "http://a b", "http://é", ""],
)
def test_what_is_no_address_is_refused_before_anything_is_asked(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="an address begins with http:// or https://") as caught:
        downloads.download(url, tmp_path / "a")
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_an_attempt_goes_on_where_the_one_before_stopped(server: Server, tmp_path: Path) -> None:
    server.plan, server.ranges = ["truncated", "stuck"], True
    path = get(server, tmp_path, retries=2, timeout=0.1)
    assert path.read_bytes() == server.content
    first, second, third = server.began
    assert first == 0 and second == len(server.content) // 2 and third == second + 1_000


def test_a_size_that_is_known_before_is_held_against_what_the_server_announces(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"it has {len(server.content):,} bytes, not 47,432,272"):
        fetch("kuairand", tmp_path, base_url=server.url, retries=0, progress=False, announce=lambda _: None)
    assert list(tmp_path.iterdir()) == [tmp_path / "made", tmp_path / "made.tar.gz"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_download_that_is_stopped_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def stop(*_: object) -> Iterator[bytes]:
        yield b"some"
        raise error

    monkeypatch.setattr(downloads, "_blocks", stop)
    folder = tmp_path / "data"
    with pytest.raises((DataError, KeyboardInterrupt)):
        get(server, folder)
    assert list(folder.iterdir()) == []


def test_other_addresses_than_those_of_the_web_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="begins with http"):
        fetch("kuairand", tmp_path, base_url="file:///etc", announce=lambda _: None)


@pytest.mark.parametrize("manner", ["truncated", "overloaded", "stuck", "drip"])
def test_a_failed_attempt_is_tried_again(server: Server, tmp_path: Path, manner: str) -> None:
    server.plan = [manner]
    path = get(server, tmp_path / "data", retries=1, timeout=0.1)
    assert path.read_bytes() == server.content
    assert server.requests == 2
    assert len(list(path.parent.iterdir())) == 2


def test_a_slow_server_is_waited_for_as_long_as_it_sends(server: Server, tmp_path: Path) -> None:
    server.plan = ["slow"]
    assert get(server, tmp_path, timeout=0.1).read_bytes() == server.content


def test_a_bad_download_does_not_harm_the_archive_that_was_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / ARCHIVE).write_bytes(b"an older version")
    server.plan = ["truncated"]
    with pytest.raises(DataError):
        get(server, tmp_path)
    assert (tmp_path / ARCHIVE).read_bytes() == b"an older version"


def test_the_publishers_checksum_is_the_default(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the expected archive"):
        get(server, tmp_path / "data", sha256=None)
    assert list((tmp_path / "data").iterdir()) == []


def test_without_a_checksum_the_files_are_still_checked(server: Server, tmp_path: Path) -> None:
    path = get(server, tmp_path / "data", sha256=None, check_sum=False)
    note = json.loads((tmp_path / "data" / f"{ARCHIVE}.json").read_text())
    assert note["checked_against"] == "nothing but its files"
    path.unlink()
    server.content = official.pack_tar(tmp_path / "data", tmp_path / "other.tar.gz").read_bytes()
    with pytest.raises(DataError, match=r"missing: log_random"):
        get(server, tmp_path / "data", sha256=None, check_sum=False)
    server.content = b"not an archive"
    with pytest.raises(DataError, match="not a whole archive"):
        get(server, tmp_path / "data", sha256=None, check_sum=False)
    assert not path.exists()


def test_licence_and_citation_are_shown(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    digest = hashlib.sha256(server.content).hexdigest()
    fetch("kuairand", tmp_path, base_url=server.url, sha256=digest, progress=False, announce=said.append)
    text = "\n".join(said)
    assert "CC BY-SA 4.0" in text
    assert KUAIRAND.citation in text
    assert digest in text


def test_the_progress_bar_goes_to_stderr(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(server, tmp_path, progress=True)
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert "%" not in shown.out


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown data set"):
        fetch("netflix", tmp_path)
    with pytest.raises(ValueError, match="64 hexadecimal"):
        fetch("kuairand", tmp_path, sha256="abc")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        fetch("kuairand", tmp_path / "file", retries=0, progress=False)
