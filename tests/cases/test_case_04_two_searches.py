"""Two processes on the folder of one search."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest


def start(folder, trials):
    command = [sys.executable, "-m", "hrl_policies.cli", "tune", "a2c", "--env", "KuaiFair-Toy-v0"]
    options = ["--trials", str(trials), "--steps", "2000", "--output", str(folder), "--no-progress"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_trials(folder, process, count):
    """Waits until a search has so many trials, or ends."""
    table = folder / "trials.csv"
    while process.poll() is None and not (table.exists() and len(table.read_text().splitlines()) > count):
        time.sleep(0.05)


@pytest.mark.slow
def test_case_04_a_second_search_in_a_folder_is_refused_and_leaves_the_first_alone(tmp_path):
    folder = tmp_path / "search"
    first = start(folder, 10_000)
    try:
        wait_for_trials(folder, first, 1)
        second = start(folder, 1)
        told, _ = second.communicate()
        done = len((folder / "trials.csv").read_text().splitlines())
        wait_for_trials(folder, first, done + 1)
        assert first.poll() is None, first.communicate()[0]
        first.send_signal(signal.SIGINT)
        output, _ = first.communicate()
        assert first.returncode == 130, output
        assert "Traceback" not in output
    finally:
        first.kill()
    assert second.returncode == 1 and "another process" in told
