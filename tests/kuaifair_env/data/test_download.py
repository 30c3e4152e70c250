from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official_files as official
import pytest

from kuaifair_env.data import fetch, find_source, read_kuairand
from kuaifair_env.data.sources import KUAIRAND
from kuaifair_env.errors import DataError

ARCHIVE = "KuaiRand-Pure.tar.gz"


class Server(ThreadingHTTPServer):
    """Serves one archive, well or badly, and counts the requests."""

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = content
        self.plan: list[str] = []
        self.requests = 0
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
        if manner == "wrong":
            content = b"<html>please log in</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if manner == "truncated":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif manner == "slow":
            for begin in range(0, len(content), 4096):
                self.wfile.write(content[begin : begin + 4096])
                self.server.released.wait(0.001)
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
    monkeypatch.setattr("pooch.core.time.sleep", lambda _: None)  # the wait between two attempts
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
        ("wrong", "not the expected archive"),
        ("gone", "404"),
        ("overloaded", "503"),
        ("stuck", "could not be downloaded"),
    ],
)
def test_a_bad_download_leaves_nothing(server: Server, tmp_path: Path, manner: str, words: str) -> None:
    folder = tmp_path / "data"
    server.plan = [manner]
    with pytest.raises(DataError, match=words) as caught:
        get(server, folder, timeout=0.1)
    assert ARCHIVE in str(caught.value)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("manner", ["truncated", "overloaded", "stuck", "wrong"])
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
    with pytest.raises(DataError, match="64 hexadecimal"):
        fetch("kuairand", tmp_path, sha256="abc")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        fetch("kuairand", tmp_path / "file", retries=0, progress=False)
