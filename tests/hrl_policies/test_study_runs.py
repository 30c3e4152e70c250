"""Whole studies: the same bytes from every engine, failures beside results, nothing done is lost, and progress."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import module_of
from joblib import cpu_count
from rich.console import Console
from small_worlds import small_pair
from studies import Dies, Raises, RecordingCallback, Unloadable, Writes, killing_pair, raising_pair, study

import hrl_policies.study.outputs as outputs
import hrl_policies.study.progress as estimate
import hrl_policies.study.runs
from hrl_policies.study import load_run, stored_records
from hrl_policies.study.checks import check_study
from hrl_policies.study.engines import THREAD_VARIABLES, InProcessEngine, LocalEngine, RayEngine
from hrl_policies.study.outputs import write_outputs
from hrl_policies.study.progress import (
    LiveProgress,
    PlainProgress,
    StudyProgress,
    duration,
    estimate_study,
    progress_for,
    size,
    work_of,
)
from hrl_policies.study.runs import FailedRunsError, run_study
from hrl_policies.study.spec import parse_study, planned_runs, read_study_file, write_study
from hrl_policies.study.store import state_of
from hrl_policies.study.tables import result_tables
from hrl_policies.zoo import METHODS
from kuaifair_env.errors import ArtifactError
from kuaifair_env.files import locked_folder, write_checksums

COMMAND = "kuaifair study run small.yml"


def run(spec, store, engine=None, worlds=None, **settings):
    """Runs a study; returns its result and what a callback saw."""
    worlds = {"small": small_pair()} if worlds is None else worlds
    callback = RecordingCallback()
    runs = check_study(spec, worlds=worlds)
    return run_study(runs, store, worlds, engine=engine, callback=callback, **settings), callback


def files_of(store):
    """Everything that runs determine, by name: not how long they took, nor on what machine."""
    names = ("result.json", "sessions.csv", "learning_curve.csv", "config.json", "provenance.json")
    return {str(path.relative_to(store)): path.read_bytes() for name in names for path in store.rglob(name)}


def page_of(result):
    """The tables of a study's runs."""
    return "\n".join(table.markdown() for table in result_tables(result.records, COMMAND))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study, which no test changes."""
    store = tmp_path_factory.mktemp("finished")
    return store, *run(study(), store)


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def troubled(tmp_path):
    """Three worlds alike: one as it should be, one that raises, one that kills the first process that evaluates."""
    return {
        "small": small_pair(),
        "raising": raising_pair("raising"),
        "killing": killing_pair("killing", tmp_path / "killing", 1),
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The study in worlds without trouble, in this process: what every engine must give."""
    store = tmp_path_factory.mktemp("plain")
    worlds = {name: small_pair(name=name) for name in ("small", "killing")}
    result, _ = run(study(worlds=list(worlds)), store, worlds=worlds)
    return files_of(store), page_of(result)


def test_a_study_leaves_runs_logs_and_records(finished):
    store, result, callback = finished
    names = [f"small/a2c-n_steps=2-len10-k10-seed{seed}" for seed in (3, 4)]
    names += ["small/random-len10-k10-seed3", "small/quota-greedy-len10-k10-seed3"]
    assert callback.started == names and callback.errors == dict.fromkeys(names, "")
    assert list(callback.work) == names and callback.before == (0, 0) and min(callback.work.values()) > 0
    assert not result.failures and [record.config.seed for record in result.records] == [3, 4, 3, 3]
    assert result.raise_for_failures() is result
    assert sorted(path.name for path in store.iterdir()) == [".lock", "small"]
    assert "| A2C (n_steps=2) |" in page_of(result)
    log = (store / names[0] / "log.txt").read_text()
    assert log.startswith("run: a2c (n_steps=2) in small, Max Len 10, seed 3, 128 steps in 64 sessions\n")
    assert "torch" in log and "finished:" in log
    methods = [record.config.method for record in stored_records(store)]
    assert sorted(methods) == ["a2c", "a2c", "quota-greedy", "random"]


@pytest.mark.slow
def test_what_is_made_of_a_studys_runs_is_the_same_every_time(copied, finished, monkeypatch):
    _, result, _ = finished
    paths = write_outputs(copied, result.records, result.reasons, COMMAND)
    names = ("figures", "report.html", "runs.csv", "small", "tables", "tables.md")
    assert {path.name for path in copied.iterdir()} == {*names, ".lock"}
    assert all(path.stat().st_size for path in paths)
    table, rows = (copied / "tables.md").read_bytes(), (copied / "runs.csv").read_bytes()
    assert f"Made by: {COMMAND}" in table.decode()
    assert len(rows.splitlines()) == 5 and b",n_steps=2," in rows.splitlines()[1]
    monkeypatch.setattr(outputs, "draw_study", lambda *rest: [])  # test_figures draws twice
    write_outputs(copied, result.records, result.reasons, COMMAND)
    assert (copied / "tables.md").read_bytes() == table and (copied / "runs.csv").read_bytes() == rows


def test_a_second_call_runs_nothing_and_changes_nothing(copied, finished):
    before = files_of(copied)
    result, callback = run(study(), copied)
    assert callback.started == [] and callback.before == (4, 0)
    assert files_of(copied) == before and page_of(result) == page_of(finished[1])


def test_a_run_that_raises_is_recorded_and_the_others_go_on(tmp_path):
    worlds = {"raising": raising_pair("raising"), "small": small_pair()}
    spec = study(worlds=["raising", "small"])
    result, callback = run(spec, tmp_path, worlds=worlds)
    assert len(result.records) == 4 and {record.config.world for record in result.records} == {"small"}
    assert len(result.failures) == 4 and sum(bool(error) for error in callback.errors.values()) == 4
    failed = tmp_path / "raising/random-len10-k10-seed3.failed"
    assert "RuntimeError: the users went home" in (failed / "traceback.txt").read_text()
    assert json.loads((failed / "config.json").read_text())["method"] == "random"
    assert result.reasons["raising/random-len10-k10-seed3"] == "RuntimeError: the users went home"
    write_outputs(tmp_path, [], result.reasons, COMMAND)
    page = (tmp_path / "tables.md").read_text()
    assert "### 4 runs failed and are not in these tables" in page
    assert "- raising/random-len10-k10-seed3: RuntimeError: the users went home" in page
    with pytest.raises(FailedRunsError, match=r"4 runs failed; the first is raising/(.|\n)*users went home"):
        result.raise_for_failures()

    again, callback = run(spec, tmp_path, worlds=worlds)
    assert callback.started == [] and callback.before == (4, 4) and len(again.failures) == 4
    mended = worlds | {"raising": small_pair(name="raising")}
    healed, callback = run(spec, tmp_path, worlds=mended, retry_failed=True)
    assert len(callback.started) == 4 and not healed.failures and len(healed.records) == 8
    assert not list(tmp_path.rglob("*.failed"))


def test_leftovers_of_killed_runs_are_removed_and_strangers_stay(tmp_path):
    (tmp_path / "small/.random-len10-k10-seed3.00ff00ff.tmp").mkdir(parents=True)
    (tmp_path / "small/.random-len10-k10-seed3.failed.00ff00ff.tmp").mkdir(parents=True)
    (tmp_path / "small/.somebody-else.00ff00ff.tmp").mkdir(parents=True)
    run(study(methods=["random"]), tmp_path)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == [".somebody-else.00ff00ff.tmp"]
    # Killed between the end of a run and the removal of its earlier state.
    (tmp_path / "small/random-len10-k10-seed3.partial").mkdir()
    run(study(methods=["random"]), tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_store_belongs_to_one_study_and_to_one_process_at_a_time(copied):
    spec = study()
    assert write_study(copied, spec, COMMAND) == COMMAND
    assert write_study(copied, spec.model_copy(update={"data_dir": "elsewhere"}), "another") == COMMAND
    with pytest.raises(ArtifactError, match=r"holds another study \(n_users, seeds differ\)"):
        write_study(copied, study(seeds=[5], n_users=7), COMMAND)
    content, command = read_study_file(copied)
    assert parse_study(content) == (spec, []) and command == COMMAND
    with locked_folder(copied, "study"), pytest.raises(ArtifactError, match="another process works on the study"):
        run(spec, copied)
    with pytest.raises(ArtifactError, match="is not the folder of a study"):
        read_study_file(copied / "small")
    for number, words in ((3, "was altered after it was written"), (2, "reads format 3: run the study again")):
        (copied / "study.json").write_text(json.dumps({"format": number, "command": COMMAND, "study": content}))
        with pytest.raises(ArtifactError, match=words):
            write_study(copied, spec, COMMAND)


def test_a_changed_run_is_an_error_and_not_a_result(copied):
    path = copied / "small/random-len10-k10-seed3/config.json"
    path.write_text(path.read_text().replace('"n_users": 15', '"n_users": 14'))
    with pytest.raises(ArtifactError, match=r"config\.json was altered after it was written"):
        run(study(), copied)
    write_checksums(path.parent)
    with pytest.raises(ArtifactError, match=r"holds a run with another configuration \(n_users differ\)"):
        run(study(), copied)


def test_runs_of_another_version_are_refused(copied):
    path = copied / "small/random-len10-k10-seed3/result.json"
    path.write_text(path.read_text().replace('"format": 4', '"format": 1'))
    with pytest.raises(ArtifactError, match="has run format 1; this version reads format 4: train it again"):
        run(study(), copied)


def test_swept_parameters_make_rows_and_swept_sessions_make_tables(tmp_path):
    sweep = {"gamma": [0.5, 0.9], "leave": ["temper", "never"]}
    result, _ = run(study(sweep=sweep, seeds=[3]), tmp_path)
    assert len(result.records) == 2 * (2 + 2)
    page = page_of(result)
    assert page.count("### small, Max Len 10") == 2
    for row in ("| A2C (n_steps=2, gamma=0.5) |", "| A2C (n_steps=2, gamma=0.9) |", "| Random |"):
        assert page.count(row) == 2


def test_purifiers_are_pretrained_once_and_kept_with_the_study(monkeypatch, tmp_path):
    made = []
    original = hrl_policies.study.runs.cached_purifier

    def counted(world, mode, *rest, **named):
        made.append(mode)
        return original(world, mode, *rest, folder=tmp_path / "cache", **named)

    monkeypatch.setattr(hrl_policies.study.runs, "cached_purifier", counted)
    spec = study(methods=["random", "quota-greedy"], purifiers=["none", "ips", "identity"], max_lens=[10, 12])
    result, callback = run(spec, tmp_path / "store")
    assert sorted(made) == ["identity", "ips"] and len(result.records) == 3 * 2 * 2
    assert callback.started[:2] == ["purifier 'ips' of small", "purifier 'identity' of small"]
    kept = sorted(path.name for path in (tmp_path / "store/purifiers").iterdir())
    assert kept == ["small-identity.safetensors", "small-ips.safetensors"]
    stored = load_run(tmp_path / "store/small/random+ips-len12-k10-seed3")
    assert (stored.folder / "purifier.safetensors").read_bytes() == (
        tmp_path / "store/purifiers/small-ips.safetensors"
    ).read_bytes()
    before = files_of(tmp_path / "store")
    _, callback = run(spec, tmp_path / "store")
    assert callback.started == [] and files_of(tmp_path / "store") == before


def test_a_purifier_that_cannot_be_made_fails_the_runs_that_need_it_alone(monkeypatch, tmp_path):
    def broken(*rest, **named):
        raise MemoryError("too many windows")

    monkeypatch.setattr(hrl_policies.study.runs, "cached_purifier", broken)
    result, _ = run(study(methods=["random", "quota-greedy"], purifiers=["none", "ips"]), tmp_path)
    assert len(result.records) == 2 and len(result.failures) == 2
    assert all("+ips-" in name and "too many windows" in text for name, text in result.failures.items())


@pytest.mark.slow
def test_a_pool_gives_the_same_bytes_whatever_becomes_of_its_processes(tmp_path, plain):
    worlds = troubled(tmp_path)
    store = tmp_path / "store"
    result, _ = run(study(worlds=list(worlds)), store, LocalEngine(2), worlds)
    check_troubled_study(result, store, plain)
    assert (tmp_path / "killing").read_text().startswith("x")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of several processes on this machine, which find the modules of these tests."""
    ray = pytest.importorskip("ray")
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(folders))
        # By default its processes wait for all others, such as tests that run beside: minutes for what takes seconds.
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield ray
        ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_bytes_whatever_becomes_of_its_processes(tmp_path, plain, cluster):
    worlds = troubled(tmp_path)
    store = tmp_path / "store"
    result, callback = run(study(worlds=list(worlds)), store, RayEngine(), worlds)
    check_troubled_study(result, store, plain)
    assert (tmp_path / "killing").read_text().startswith("x") and len(callback.errors) == 12
    assert cluster.is_initialized(), "a cluster that was there before the study outlives it"


@pytest.mark.slow
def test_ray_tells_which_tasks_killed_their_processes_and_does_the_others(tmp_path, cluster):
    folder = str(tmp_path)
    tasks = [Dies("always", folder, 99), Dies("twice", folder, 2), Raises("raises"), Writes("last", folder)]
    with RayEngine().open(None) as pool:
        errors = {result.task: result.error for result in pool.run(tasks, lambda name: None)}
    assert errors["twice"] == errors["last"] == ""
    assert "the run's Ray task failed, after 3 tries" in errors["always"]
    assert "LookupError: raises found nothing" in errors["raises"]
    assert (tmp_path / "twice").read_text() == "survived"
    process, *threads = (tmp_path / "last").read_text().split()
    assert int(process) != os.getpid() and threads == ["1", "1"]


def check_troubled_study(result, store, plain):
    """Checks the study in all three worlds against the one in the two of them where runs can be finished."""
    assert {record.config.world for record in result.records} == {"small", "killing"}
    assert len(result.records) == 8 and len(result.failures) == 4
    assert all("the users went home" in text for text in result.failures.values())
    files = {name: content for name, content in files_of(store).items() if not name.startswith("raising/")}
    assert (files, page_of(result)) == plain
    assert not list(store.rglob("*.tmp"))


def benchmark(name):
    return module_of(Path(__file__).parents[2] / "benchmarks" / f"{name}.py")


@pytest.mark.slow
def test_a_study_killed_at_random_moments_and_resumed_gives_the_same_bytes(tmp_path):
    kills = benchmark("study_kills")
    plan = kills.write_plan(tmp_path, 2, 1, (10,), ("random", "session-quota", "belief-quota-features", "oracle"))
    report = kills.compare(plan, tmp_path, kills=2, rng=np.random.default_rng(0), workers=1)
    assert report.runs == 2 + 4 and report.kills == 2
    assert report.different == () and report.leftovers == ()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("data fetch", 4), ("train, stopped by Ctrl-C", 2)])
def test_a_command_harmed_at_its_writes_and_given_again_leaves_the_same_files(tmp_path, name, most):
    faults = benchmark("faults")
    with faults.mirror() as address:
        command, start = faults.prepared(name, tmp_path, address)
        outcome = faults.harm_command(command, start, (*faults.KILLS, faults.FULL), most)
    assert outcome.faults == []
    assert sum(outcome.harms.values()) > most and outcome.harms["before"]


def test_worlds_of_ones_own_may_have_an_item_term(tmp_path):
    pair = small_pair()
    result, _ = run(study(item_term="log", methods=["quota-greedy"]), tmp_path, worlds={"small": pair})
    (record,) = result.records
    assert record.config.item_term == "log" and pair.item_term is None
    assert state_of(tmp_path / "small/quota-greedy-item-log-len10-k10-seed3") == "done"


# ---------------------------------------------------------------- engines


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


@pytest.mark.slow
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


# ---------------------------------------------------------------- progress and estimates

FAILURE = "Traceback (most recent call last):\nRuntimeError: no users\n"


def test_time_left_follows_from_work_done_and_from_the_number_of_workers():
    progress = StudyProgress(workers=2)
    progress.on_study_start({"short": 1.0, "long": 3.0, "longer": 6.0, "broken": 2.0}, done=5, failed=1)
    assert progress.seconds_left is None
    assert progress.summary() == "5 of 10 runs done, 1 failed, 4 left"
    progress.on_task_start("worlds")
    progress.on_task_end("worlds", 1_000.0, "")
    assert progress.seconds_left is None, "worlds are no runs"
    progress.on_task_start("short")
    progress.on_task_end("short", 10.0, "")
    # 10 s for each unit of work, 11 units left, two at a time.
    assert progress.seconds_left == pytest.approx(55.0)
    progress.on_task_end("broken", 500.0, FAILURE)
    assert progress.seconds_left == pytest.approx(45.0)
    progress.on_task_end("longer", 30.0, "")
    # 40 s for 7 units, 3 units left in one run, which two workers cannot share.
    assert progress.seconds_left == pytest.approx(3 * 40 / 7)
    assert progress.summary() == "7 of 10 runs done, 2 failed, 1 left, about 17 s"
    progress.on_task_end("long", 1.0, "")
    assert progress.summary() == "8 of 10 runs done, 2 failed" and not progress.running


def test_controls_that_take_seconds_to_load_say_nothing_of_trainings():
    progress = StudyProgress(workers=1)
    progress.on_study_start({"control": 0.01, "first": 50.0, "second": 50.0}, 0, 0)
    progress.on_task_end("control", 30.0, "")
    assert progress.summary() == "1 of 3 runs done, 2 left"
    progress.on_task_end("first", 100.0, "")
    assert progress.seconds_left == pytest.approx(50.0 * 130.0 / 50.01)


def test_without_a_terminal_every_run_is_a_plain_line():
    out = io.StringIO()
    with progress_for(Console(file=out, width=40), 1) as progress:
        assert isinstance(progress, PlainProgress)
        progress.on_study_start({"a/run[0]": 1.0, "b": 1.0}, 0, 0)
        progress.on_task_start("a/run[0]")
        progress.on_task_end("a/run[0]", 90.0, "")
        progress.on_task_end("b", 3.0, FAILURE)
    assert out.getvalue().splitlines() == [
        "0 of 2 runs done, 2 left",
        "a/run[0]: done in 1.5 min (1 of 2 runs done, 1 left, about 1.5 min)",
        "b: FAILED after 3 s: RuntimeError: no users (1 of 2 runs done, 1 failed)",
    ]


def test_in_a_terminal_running_and_failed_runs_are_shown_in_place():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with progress_for(console, 1) as progress:
        assert isinstance(progress, LiveProgress)
        progress.on_study_start({"one[0]": 1.0, "two": 1.0, "three": 1.0}, 0, 0)
        progress.on_task_end("two", 1.0, FAILURE)
        progress.on_task_start("one[0]")
        plain = Console(file=io.StringIO(), width=100)
        plain.print(progress.render())
        shown = plain.file.getvalue()
    assert "0 of 3 runs done, 1 failed, 2 left" in shown
    assert "running  one[0]" in shown and "failed   two" in shown and "RuntimeError: no users" in shown
    assert "runs done" in out.getvalue()


def test_work_grows_with_steps_users_and_candidates():
    def work(**settings):
        return work_of(planned_runs(study(worlds=["KuaiFair-Toy-v0"], **settings))[0])

    def trained(steps, **settings):
        return work(methods=[{"name": "a2c", "steps": steps}], **settings)

    assert trained(2_000) - trained(1_000) == pytest.approx(trained(3_000) - trained(2_000))
    assert trained(2_000) > trained(1_000) > trained(1)
    controls = [work(methods=["quota-greedy"], n_users=users) for users in (100, 200, 300)]
    assert controls[2] - controls[1] == pytest.approx(controls[1] - controls[0]) and controls[1] > controls[0]
    large = {"worlds": ["KuaiFair-KuaiRandTwin-v0"]}
    small = planned_runs(study(methods=["quota-greedy"]))[0]
    assert work_of(planned_runs(study(methods=["quota-greedy"], **large))[0]) > work_of(small)


def test_an_estimate_adds_up_and_says_what_was_guessed(monkeypatch):
    monkeypatch.setattr(estimate, "calibration_seconds", lambda: 0.5)
    runs = planned_runs(study(methods=["a2c", "random"]))
    found = estimate_study(runs)
    assert found.seconds == pytest.approx(0.5 * sum(work_of(run) for run in runs))
    assert found.longest == pytest.approx(0.5 * max(work_of(run) for run in runs))
    assert found.wall_seconds(1) == pytest.approx(found.seconds)
    assert found.wall_seconds(1_000) == pytest.approx(found.longest)
    assert found.guessed == () and found.bytes > 0
    known = dict(estimate._costs()["methods"])
    cheap = known.pop("a2c")
    monkeypatch.setattr(estimate, "_costs", lambda: {"methods": known, "purifiers": {}})
    guess = estimate_study(runs)
    assert guess.guessed == ("a2c",)
    # A method of one's own counts as one in the middle: bcq takes a hundred times as long as that.
    steps = sorted(cost["step"] for cost in known.values() if cost["step"])
    assert cheap["step"] < estimate._cost_of("a2c")["step"] < steps[-1] / 10


def test_a_purifier_is_counted_once_for_each_world(monkeypatch):
    monkeypatch.setattr(estimate, "calibration_seconds", lambda: 1.0)
    purified = estimate_study(planned_runs(study(methods=["random"], purifiers=["tce"], max_lens=[10, 20])))
    plain = estimate_study(planned_runs(study(methods=["random"], max_lens=[10, 20])))
    pretraining = estimate._costs()["purifiers"]["tce"]["work"]
    assert purified.seconds - plain.seconds == pytest.approx(pretraining)


def test_the_table_of_costs_holds_methods_of_the_zoo_with_positive_costs():
    costs = estimate._costs()
    measured = set(costs["methods"])
    assert {"a2c", "td3", "dsrm-hrl", "random", "oracle"} <= measured <= set(METHODS)
    for name, cost in costs["methods"].items():
        assert set(cost) == {"start", "step", "step_item", "session", "session_item", "bytes"}
        assert min(cost.values()) >= 0 and cost["session"] + cost["session_item"] > 0, name
        assert (cost["step"] + cost["step_item"] > 0) == METHODS[name].learns == (cost["bytes"] > 0)
    assert json.dumps(costs)


def test_the_unit_is_small_and_positive():
    assert 1e-5 < estimate.calibration_seconds() < 1.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (90, "1.5 min"), (3_000, "50 min"), (7_200, "2.0 h"), (200_000, "2.3 days")],
)
def test_durations_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_sizes_as_people_say_them():
    assert [size(count) for count in (512, 3 * 2**20, 5 * 2**30)] == ["0 KiB", "3.0 MiB", "5.0 GiB"]
