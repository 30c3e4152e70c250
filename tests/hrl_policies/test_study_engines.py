"""Engines: every task is done, whatever becomes of the others or of the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from joblib import cpu_count
from studies import Dies, Raises, Unloadable, Writes

from hrl_policies.study.engines import THREAD_VARIABLES, InProcessEngine, LocalEngine, RayEngine


def run_tasks(engine, tasks, context=None):
    """Errors by task, and the tasks in the order in which they started."""
    started = []
    with engine.open(context) as pool:
        return {result.task: result.error for result in pool.run(tasks, started.append)}, started


def test_in_process_tasks_run_one_after_the_other(tmp_path):
    tasks = [Writes("one", str(tmp_path)), Raises("two"), Writes("three", str(tmp_path))]
    errors, started = run_tasks(InProcessEngine(), tasks)
    assert started == list(errors) == ["one", "two", "three"]
    assert "LookupError: two found nothing" in errors["two"]
    assert (tmp_path / "three").read_text().split()[0] == str(os.getpid())


@pytest.mark.slow
def test_a_pool_outlives_tasks_that_raise_and_processes_that_die(tmp_path, monkeypatch):
    for variable in THREAD_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    folder = str(tmp_path)
    tasks = [
        Writes("one", folder),
        Raises("raises"),
        Dies("killed once", folder, 1),
        Dies("killed always", folder, 99),
        *(Writes(f"more {number}", folder) for number in range(4)),
    ]
    before = dict(os.environ)
    errors, started = run_tasks(LocalEngine(2), tasks)
    assert dict(os.environ) == before
    failed = {name: error for name, error in errors.items() if error}
    assert set(errors) == {task.name for task in tasks}
    assert set(failed) == {"raises", "killed always"}
    assert "LookupError: raises found nothing" in failed["raises"]
    assert "died 2 times" in failed["killed always"] and "SIGKILL" in failed["killed always"]
    assert (tmp_path / "killed once").read_text() == "survived"
    workers = {(tmp_path / f"more {number}").read_text() for number in range(4)}
    assert all(worker.split()[1:] == ["1", "1"] for worker in workers), "one numerical thread each"
    assert str(os.getpid()) not in {worker.split()[0] for worker in workers}
    assert started.count("killed once") == started.count("killed always") == 2


def test_workers_that_cannot_start_are_reported_and_not_started_for_ever(tmp_path):
    with pytest.raises(RuntimeError, match=r"do not start, 3 in a row; see what they printed.*EXIT\(7\)"):
        run_tasks(LocalEngine(1), [Writes("one", str(tmp_path))], Unloadable())


def test_the_number_of_workers_is_that_of_the_cores_unless_given():
    assert LocalEngine().workers == cpu_count() >= 1
    assert LocalEngine(3).workers == 3
    with pytest.raises(ValueError, match="need at least 1 worker, got 0"):
        LocalEngine(0)


ORPHANS = """
import sys
from studies import Writes
from hrl_policies.study.engines import LocalEngine

with LocalEngine(1).open(None) as pool:
    for result in pool.run([Writes("pid", sys.argv[1])], print):
        pass
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_die_with_a_study_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    support = str(Path(__file__).parents[1] / "support")
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert [process.stdout.readline() for _ in range(2)] == [b"pid\n", b"ready\n"]
    worker = int((tmp_path / "pid").read_text().split()[0])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
    process.stdin.close()
    process.stdout.close()


def is_alive(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_ray_that_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'kuaifair\[ray\]'"):
        RayEngine()
