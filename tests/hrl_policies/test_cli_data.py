"""``kuaifair data``: download, check and look at data sets."""

from __future__ import annotations

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import official_files as official
import pytest

from kuaifair_env.data import load_kuairand


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)


def test_check_reports_what_an_archive_holds(kuaifair, tmp_path):
    official.write_kuairec(tmp_path / "made")
    archive = official.pack_zip(tmp_path / "made", tmp_path / "KuaiRec.zip")
    code, out, err = kuaifair("data", "check", archive)
    assert code == 0, err
    words = [" ".join(line.replace("│", " ").split()) for line in out.splitlines()]
    for expected in (
        "train rows read 203",
        "train exact duplicates dropped 3",
        "test rows without time 4",
        "items captions with line breaks 2",
        f"file KuaiRec.zip SHA-256 {hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}...",
    ):
        assert expected in words
    assert "partial" in out


def test_check_recognises_kuairand(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    code, out, err = kuaifair("data", "check", tmp_path / "made")
    assert code == 0, err
    assert "KuaiRand-Pure" in out


def test_check_names_file_line_and_column_without_a_traceback(kuaifair, tmp_path):
    official.write_kuairec(tmp_path)
    path = tmp_path / "small_matrix.csv"
    lines = path.read_text().splitlines()
    lines[4] = "oops" + lines[4]
    path.write_text("\n".join(lines) + "\n")
    code, out, err = kuaifair("data", "check", tmp_path)
    assert code == 2 and "small_matrix.csv, line 5, column 'user_id'" in err
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "error: "),
        (["check", "."], "error: "),
        (["fetch", "movielens"], "'movielens' is not one of 'kuairec', 'kuairand'"),
    ],
)
def test_bad_input_ends_with_a_message(kuaifair, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = kuaifair("data", *arguments)
    assert code == 2 and message in err


def test_fetch_then_info_then_check(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    served = tmp_path / "served"
    served.mkdir()
    official.pack_tar(tmp_path / "made", served / "KuaiRand-Pure.tar.gz")
    digest = hashlib.sha256((served / "KuaiRand-Pure.tar.gz").read_bytes()).hexdigest()
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fetch = ["data", "fetch", "kuairand", "--base-url", f"http://127.0.0.1:{server.server_address[1]}"]
        code, out, err = kuaifair(*fetch, "--sha256", digest, "--no-progress")
        assert code == 0, err
        assert "CC BY-SA 4.0" in out and digest in out
        code, _, err = kuaifair(*fetch, "--folder", tmp_path / "b", "--retries", "0")
        assert code == 2 and "not the expected archive" in err
        server.shutdown()
    assert list((tmp_path / "b").iterdir()) == []
    archive = tmp_path / "cache" / "downloads" / "KuaiRand-Pure.tar.gz"
    code, out, _ = kuaifair("data", "info")
    assert code == 0 and archive.name in out and "kuaifair data fetch kuairec" in out
    assert kuaifair("data", "check", archive)[0] == 0


def test_info_lists_what_the_cache_holds(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    data = load_kuairand(tmp_path / "made")
    code, out, err = kuaifair("data", "info", "--data-dir", tmp_path / "made")
    assert code == 0, err
    assert data.data_hash in out and "partial" in out
