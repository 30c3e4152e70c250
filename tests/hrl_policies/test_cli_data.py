from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import official_files as official
import pytest
from typer.testing import CliRunner

from hrl_policies.cli.data import data_app

run = partial(CliRunner().invoke, data_app)


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)


def test_check_reports_what_an_archive_holds(tmp_path: Path) -> None:
    official.write_kuairec(tmp_path / "made")
    archive = official.pack_zip(tmp_path / "made", tmp_path / "KuaiRec.zip")
    result = run(["check", str(archive)])
    assert result.exit_code == 0, result.output
    words = [" ".join(line.replace("│", " ").split()) for line in result.stdout.splitlines()]
    for expected in (
        "train rows read 203",
        "train exact duplicates dropped 3",
        "test rows without time 4",
        "items captions with line breaks 2",
        f"file KuaiRec.zip SHA-256 {hashlib.sha256(archive.read_bytes()).hexdigest()[:16]}...",
    ):
        assert expected in words
    assert "partial" in result.stdout


def test_check_recognises_kuairand(tmp_path: Path) -> None:
    official.write_kuairand(tmp_path / "made")
    result = run(["check", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert "KuaiRand-Pure" in result.stdout


def test_check_names_file_line_and_column_without_a_traceback(tmp_path: Path) -> None:
    official.write_kuairec(tmp_path)
    path = tmp_path / "small_matrix.csv"
    lines = path.read_text().splitlines()
    lines[4] = "oops" + lines[4]
    path.write_text("\n".join(lines) + "\n")
    result = run(["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "small_matrix.csv, line 5, column 'user_id'" in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("arguments", [["check", "nowhere"], ["check", "."], ["fetch", "movielens"]])
def test_bad_input_ends_with_a_message(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert isinstance(result.exception, SystemExit)


def test_fetch_then_info_then_check(tmp_path: Path) -> None:
    official.write_kuairand(tmp_path / "made")
    served = tmp_path / "served"
    served.mkdir()
    official.pack_tar(tmp_path / "made", served / "KuaiRand-Pure.tar.gz")
    digest = hashlib.sha256((served / "KuaiRand-Pure.tar.gz").read_bytes()).hexdigest()
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        good = run(["fetch", "kuairand", "--base-url", url, "--sha256", digest, "--no-progress"])
        bad = run(["fetch", "kuairand", "--folder", str(tmp_path / "b"), "--base-url", url, "--retries", "0"])
        server.shutdown()
    assert good.exit_code == 0, good.output
    assert "CC BY-SA 4.0" in good.stdout
    assert digest in good.stdout
    assert bad.exit_code == 2
    assert "not the expected archive" in bad.stderr
    assert list((tmp_path / "b").iterdir()) == []
    found = tmp_path / "cache" / "downloads" / "KuaiRand-Pure.tar.gz"
    told = run(["info"])
    assert told.exit_code == 0
    assert str(found) in told.stdout.replace("\n", "") or found.name in told.stdout
    assert "kuaifair data fetch kuairec" in told.stdout
    assert run(["check", str(found)]).exit_code == 0


def test_info_lists_what_the_cache_holds(tmp_path: Path) -> None:
    from kuaifair_env.data import load_kuairand

    official.write_kuairand(tmp_path / "made")
    data = load_kuairand(tmp_path / "made")
    result = run(["info", "--data-dir", str(tmp_path / "made")])
    assert result.exit_code == 0
    assert data.data_hash in result.stdout
    assert "partial" in result.stdout


def test_importing_the_commands_is_light() -> None:
    code = (
        "import sys, hrl_policies.cli.data; "
        "print([name for name in ('torch', 'pandas', 'stable_baselines3', 'pooch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
