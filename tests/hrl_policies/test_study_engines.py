"""Engines: every task is done, whatever becomes of the others or of the processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from studies_for_tests import Dies, Raises, Writes, leaves_at_once

import hrl_policies.study.engines as local
from hrl_policies.study.engines import Ended, InsideEngine, LocalEngine, RayEngine, Setting, Started


def events_of(engine, tasks):
    with engine.open(Setting()) as pool:
        return list(pool.run(tasks))


def endings(events):
    return {event.task: event.error for event in events if isinstance(event, Ended)}


def test_inside_does_one_task_after_the_other(tmp_path):
    tasks = [Writes("one", str(tmp_path)), Raises("two"), Writes("three", str(tmp_path))]
    events = events_of(InsideEngine(), tasks)
    assert [(type(event), event.task) for event in events] == [
        (kind, name) for name in ("one", "two", "three") for kind in (Started, Ended)
    ]
    assert "LookupError: two found nothing" in endings(events)["two"]
    assert (tmp_path / "three").read_text().split()[0] == str(os.getpid())


@pytest.mark.slow
def test_a_pool_outlives_tasks_that_raise_and_processes_that_die(tmp_path):
    folder = str(tmp_path)
    tasks = [
        Writes("one", folder),
        Raises("raises"),
        Dies("killed once", folder, 1),
        Dies("killed always", folder, 99),
        *(Writes(f"more {number}", folder) for number in range(4)),
    ]
    before = dict(os.environ)
    events = events_of(LocalEngine(2), tasks)
    assert dict(os.environ) == before
    failed = {name: error for name, error in endings(events).items() if error}
    assert set(endings(events)) == {task.name for task in tasks}
    assert set(failed) == {"raises", "killed always"}
    assert "LookupError: raises found nothing" in failed["raises"]
    assert "ended by signal SIGKILL, 2 times" in failed["killed always"]
    assert (tmp_path / "killed once").read_text() == "survived"
    workers = {(tmp_path / f"more {number}").read_text() for number in range(4)}
    assert all(worker.split()[1] == "1" for worker in workers), "one numerical thread each"
    assert str(os.getpid()) not in {worker.split()[0] for worker in workers}
    started = [event.task for event in events if isinstance(event, Started)]
    assert started.count("killed once") == started.count("killed always") == 2


def test_workers_that_cannot_start_are_reported_and_not_started_for_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(local, "_main", leaves_at_once)
    with pytest.raises(RuntimeError, match=r"do not start: 3 in a row ended by exit code 7.*__main__"):
        events_of(LocalEngine(1), [Writes("one", str(tmp_path))])


def test_the_number_of_workers_is_that_of_the_cores_unless_given():
    assert LocalEngine().workers == local.cores() >= 1
    assert LocalEngine(3).workers == 3
    with pytest.raises(ValueError, match="need at least 1 worker, got 0"):
        LocalEngine(0)


ORPHANS = """
import sys
from studies_for_tests import Writes
from hrl_policies.study.engines import LocalEngine, Setting

if __name__ == "__main__":
    with LocalEngine(1).open(Setting()) as pool:
        for event in pool.run([Writes("pid", sys.argv[1])]):
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
    assert process.stdout.readline() == b"ready\n"
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
