"""Runs: the same seed gives the same bytes, folders are whole or absent, and what stopped goes on; peak memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import PurePath

import numpy as np
import pytest
from damage import wrong_contents
from small_worlds import interrupted_pair, small_pair

import hrl_policies.study.progress as progress
import hrl_policies.study.training as training
from hrl_policies.study import (
    StudySpec,
    evaluate_run,
    load_policy,
    load_run,
    plan_run,
    planned_runs,
    resume,
    run_folder,
    run_study,
    train,
)
from hrl_policies.study.config import RunConfig
from hrl_policies.study.progress import PeakMemory
from hrl_policies.study.records import read_table
from hrl_policies.study.results import EvaluatedRun
from hrl_policies.study.store import write_partial
from hrl_policies.worlds import WorldPair
from kuaifair_env.abandonment import CategoryBoredom, TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.files import write_checksums
from kuaifair_env.randomisation import Randomisation, SessionBlocks

FILES = {
    "config.json",
    "learning_curve.csv",
    "log.txt",
    "model.zip",
    "provenance.json",
    "result.json",
    "sessions.csv",
    "timing.json",
    "versions.json",
    "SHA256SUMS",
}


def a2c(**settings):
    given = {"total_steps": 640, "n_envs": 8, "seed": 11} | settings
    return plan_run("a2c", "small", overrides={"n_steps": 8}, **given)


def td3(**settings):
    overrides = {"learning_starts": 64, "batch_size": 32, "buffer_size": 2_000, "gradient_steps": 1}
    return plan_run("td3", "small", overrides=overrides, n_envs=8, **({"total_steps": 400} | settings))


def item_agent(name):
    overrides = {"learning_starts": 64, "batch_size": 32, "buffer_size": 2_000, "gradient_steps": 1}
    return plan_run(name, "small", overrides=overrides, n_envs=8, total_steps=400)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run, which tests leave as it was."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(a2c(total_steps=128), small_pair(), output=folder)
    return folder


def test_a_run_folder_holds_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(PeakMemory, "mib", lambda self: 321.5)
    result = train(a2c(), small_pair(), output=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    stored = load_run(tmp_path / "run")
    assert stored.complete and stored.steps_done == result.steps_done >= 640
    assert stored.config.as_dict() == a2c().as_dict()
    assert stored.summary == result.evaluation.summary()
    assert stored.provenance["test"]["data"]["hash"] == small_pair().test.data.data_hash
    assert stored.versions["packages"]["stable-baselines3"]
    assert stored.timing["training_seconds"] > 0 and stored.timing["peak_memory_mib"] == 321.5
    sessions = stored.sessions()
    np.testing.assert_array_equal([s["r_cum"] for s in sessions], result.evaluation.sessions.return_)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_controls_have_no_model_and_no_curve(tmp_path):
    train(plan_run("quota-greedy", "small"), small_pair(), output=tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES - {"model.zip", "learning_curve.csv"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [a2c(), td3()], ids=["a2c", "td3"])
def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path, config):
    for name, plan in (("one", config), ("two", config), ("other", replace(config, seed=15))):
        train(plan, small_pair(), output=tmp_path / name)
    for file in ("learning_curve.csv", "result.json", "sessions.csv", "config.json", "provenance.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert (tmp_path / "one/sessions.csv").read_bytes() != (tmp_path / "other/sessions.csv").read_bytes()


def test_the_curve_counts_every_training_session_once(tmp_path):
    result = train(a2c(total_steps=3_000, randomisation="none"), small_pair(0.5))
    curve = result.curve
    assert [row["steps"] for row in curve] == sorted({row["steps"] for row in curve})
    assert all(row["sessions"] >= 50 for row in curve[:-1])
    # Finished sessions fill the steps taken but for those still running in each of the 8 rows.
    played = sum(row["sessions"] * row["len"] for row in curve)
    assert result.steps_done - 8 * 30 <= played <= result.steps_done
    assert np.average([row["r_each"] for row in curve], weights=[r["sessions"] for r in curve]) == pytest.approx(
        0.5, abs=0.02
    )
    for row in curve:
        assert row["ad"] == abs(row["signed_gap"])
        assert row["r_cum"] == pytest.approx(row["len"] * row["r_each"])


@pytest.mark.parametrize("config", [a2c(), td3(), plan_run("random", "small")], ids=["a2c", "td3", "random"])
def test_a_loaded_policy_reproduces_the_stored_result(tmp_path, config):
    train(config, small_pair(), output=tmp_path / "run")
    stored, pair = load_run(tmp_path / "run"), small_pair()
    again = evaluate_run(stored.config, load_policy(stored, pair), pair)
    assert again.summary() == stored.summary


def test_a_loaded_algorithm_that_goes_on_learning_is_past_its_first_random_steps(tmp_path):
    config = td3()
    train(config, small_pair(), output=tmp_path / "run")
    stored = load_run(tmp_path / "run")
    algorithm = load_policy(stored, small_pair())
    assert algorithm.num_timesteps == stored.steps_done >= algorithm.learning_starts > 0


def test_a_run_of_an_earlier_version_is_refused_with_what_to_do(tmp_path):
    train(plan_run("random", "small"), small_pair(), output=tmp_path / "run")
    path = tmp_path / "run/config.json"
    earlier = {name: value for name, value in json.loads(path.read_text()).items() if name != "randomisation"}
    path.write_text(json.dumps(earlier))
    write_checksums(path.parent)
    with pytest.raises(ArtifactError, match=r"config\.json .*of this version .*randomisation.*; train it again"):
        load_run(tmp_path / "run")


@pytest.mark.slow
def test_agents_learn_what_pays():
    """One item in two is always liked: an agent that learns leaves chance (.5) far behind."""
    from kuaifair_env.embeddings import item_embeddings

    pair = small_pair(np.tile((np.arange(50) % 2).astype(float), (40, 1)))
    # Embeddings that can tell the two kinds of items apart.
    vectors = item_embeddings(pair.train.data.train, 40, pair.train.data.items, 7)
    kind = np.where(np.arange(50) % 2, 3.0, -3.0)[:, None]
    vectors = np.concatenate([vectors, kind], axis=1).astype(np.float32)
    pair = WorldPair("small", replace(pair.train, embeddings=vectors), replace(pair.test, embeddings=vectors))
    settings = {
        "batch_size": 128,
        "n_epochs": 10,
        "n_steps": 16,
        "learning_rate": 0.002,
        "gamma": 0.9,
        "gae_lambda": 0.95,
        "policy_kwargs.log_std_init": -1.0,
    }
    config = plan_run("ppo", "small", total_steps=8_000, n_envs=16, overrides=settings)
    result = train(config, pair)
    assert result.curve[0]["r_each"] < 0.6
    assert result.evaluation.engagement.reward_per_step > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [a2c(), td3(), item_agent("sac4ir"), item_agent("dnair")],
    ids=["a2c", "td3", "sac4ir", "dnair"],
)
def test_ctrl_c_keeps_the_model_and_resume_goes_on(tmp_path, config):
    stopped = train(config, interrupted_pair(at=40), output=tmp_path / "run")
    assert not stopped.complete and stopped.steps_done == 40 * 8
    assert not (tmp_path / "run").exists()
    partial = tmp_path / "run.partial"
    assert load_run(partial).steps_done == 40 * 8
    with pytest.raises(ArtifactError, match="holds an interrupted run; resume it"):
        train(config, small_pair(), output=tmp_path / "run")
    with pytest.raises(ArtifactError, match="resume it"):
        _ = load_run(partial).summary

    done = resume(partial, small_pair())
    assert done.complete and done.steps_done >= config.total_steps
    assert not partial.exists()
    stored = load_run(tmp_path / "run")
    assert stored.result["resumed_at"] == 320
    steps = [row["steps"] for row in stored.curve]
    assert steps == sorted(steps) and steps[-1] <= stored.steps_done
    assert evaluate_run(stored.config, load_policy(stored, small_pair()), small_pair()).summary() == stored.summary


def test_what_a_kill_left_of_a_run_that_was_resumed_to_its_end_goes_with_the_next_call(tmp_path):
    partial = tmp_path / "run.partial"
    train(a2c(), interrupted_pair(at=5), output=tmp_path / "run")
    shutil.copytree(partial, tmp_path / "kept")
    resume(partial, small_pair())
    for present in (True, False):
        if present:
            shutil.copytree(tmp_path / "kept", partial)
        with pytest.raises(ArtifactError, match=r"run exists already: the run is finished, .* nor there"):
            resume(partial, small_pair())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "run"]
    # Two runs that have nothing to do with each other but their names.
    train(a2c(seed=12), interrupted_pair(at=5), output=tmp_path / "other")
    (tmp_path / "other.partial").rename(partial)
    with pytest.raises(ArtifactError, match=r"run exists already, and is not what became of .*: rename or remove one"):
        resume(partial, small_pair())
    assert load_run(partial).config.seed == 12


def test_a_resumed_run_goes_on_in_the_block_that_it_was_in(tmp_path):
    config = replace(a2c(), randomisation=Randomisation(min_block=6, max_block=9))
    stopped = train(config, interrupted_pair(at=40), output=tmp_path / "run")
    before = stopped.policy.get_env().batch.simulator.started
    assert before > 30
    from hrl_policies.study.loading import build_policy

    fresh = build_policy(config, small_pair(), seed_shift=stopped.steps_done)
    training.restore_checkpoint(fresh, tmp_path / "run.partial", stopped.steps_done)
    blocks = SessionBlocks(fresh.get_env().world.randomisation)
    env = fresh.get_env()
    env.reset()
    np.testing.assert_array_equal(env.batch.blocks, blocks.of_sessions(before + np.arange(config.n_envs)))
    done = resume(tmp_path / "run.partial", small_pair())
    assert done.policy.get_env().batch.simulator.started > before
    stored = load_run(tmp_path / "run")
    assert stored.config.as_dict() == config.as_dict()
    assert stored.provenance["randomisation"] == {**asdict(config.randomisation), "seed": config.seed}


def test_a_resumed_model_is_the_one_that_was_stopped(tmp_path):
    stopped = train(td3(), interrupted_pair(at=40), output=tmp_path / "run")
    from hrl_policies.study.loading import build_policy

    fresh = build_policy(td3(), small_pair())
    training.restore_checkpoint(fresh, tmp_path / "run.partial", 320)
    for name, value in stopped.policy.policy.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), fresh.policy.state_dict()[name].numpy(), err_msg=name)
    old, new = stopped.policy.replay_buffer, fresh.replay_buffer
    # Stable-Baselines3 stops before it stores the step that was interrupted.
    assert (old.pos, old.full) == (new.pos, new.full) == (39, False)
    np.testing.assert_array_equal(old.observations[:39], new.observations[:39])
    optimisers = [model.critic.optimizer.state_dict()["state"] for model in (stopped.policy, fresh)]
    np.testing.assert_array_equal(*(state[0]["exp_avg"].numpy() for state in optimisers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sac", "sac4ir"])
def test_sac_keeps_its_entropy_weight(tmp_path, name):
    trained = train(item_agent(name), small_pair(), output=tmp_path / "run")
    loaded = load_policy(load_run(tmp_path / "run"), small_pair())
    assert loaded.log_ent_coef.item() == trained.policy.log_ent_coef.item() != 0.0


def test_ctrl_c_leaves_the_usual_signal_handler_behind(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(a2c(), interrupted_pair(at=5), output=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def die_while_writing(folder):
    def save(model, path):
        (path / "model.zip").write_bytes(b"half a mod")
        os.kill(os.getpid(), signal.SIGKILL)

    training.save_model = save
    train(a2c(total_steps=128), small_pair(), output=folder)


def test_a_kill_in_the_middle_leaves_no_run_folder(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(tmp_path / "run",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArtifactError):
        load_run(tmp_path / "run")
    train(a2c(total_steps=128), small_pair(), output=tmp_path / "run")
    assert load_run(tmp_path / "run").complete


def test_an_interrupted_run_outlives_a_kill_while_a_later_state_takes_its_place(tmp_path, monkeypatch):
    target = tmp_path / "run"
    folder = tmp_path / "run.partial"
    stopped = train(a2c(), interrupted_pair(at=5), output=target)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace_path = os.replace

    def killed(source, goal):
        if goal == folder:
            raise KeyboardInterrupt
        replace_path(source, goal)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        write_partial(folder, lambda path: None, stopped.steps_done + 8)
    assert not folder.exists()
    with pytest.raises(ArtifactError, match="holds an interrupted run; resume it"):
        train(a2c(), small_pair(), output=target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert resume(folder, small_pair()).complete
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(model, path):
        raise OSError("no space left on device")

    monkeypatch.setattr(training, "save_model", fail)
    with pytest.raises(OSError, match="no space"):
        train(a2c(total_steps=128), small_pair(), output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    train(plan_run("random", "small"), small_pair(), output=tmp_path / "run")
    before = (tmp_path / "run/result.json").read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        train(plan_run("oracle", "small"), small_pair(), output=tmp_path / "run")
    assert (tmp_path / "run/result.json").read_bytes() == before


def test_a_run_is_not_judged_in_another_world(finished):
    stored = load_run(finished)
    with pytest.raises(ArtifactError, match=r"another train world, fingerprint .*: data, .* differ"):
        load_policy(stored, small_pair(seed=1))
    with pytest.raises(ValueError, match="wants the worlds 'small'"):
        train(a2c(), small_pair(name="other"))


def test_settings_that_the_method_does_not_take_are_those_of_a_damaged_run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/config.json"
    path.write_text(path.read_text().replace('"n_steps"', '"__class__"'), encoding="utf-8")
    write_checksums(path.parent)
    with pytest.raises(ArtifactError, match=r"config\.json is not a whole configuration .*no hyperparameter __class__"):
        load_policy(load_run(tmp_path / "run"), small_pair())


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "no tensors"])
def test_damaged_models_are_refused_without_running_them(finished, tmp_path, damage):
    shutil.copytree(finished, tmp_path / "run")
    model = tmp_path / "run/model.zip"
    if damage == "missing":
        model.unlink()
    elif damage == "truncated":
        model.write_bytes(model.read_bytes()[:1000])
    elif damage == "no tensors":
        with zipfile.ZipFile(model) as stored:
            members = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(model, "w") as altered:
            for name, content in (members | {"policy.pth": pickle.dumps(PurePath("x"))}).items():
                altered.writestr(name, content)
    else:
        other = train(plan_run("td3", "small", total_steps=64, n_envs=4), small_pair())
        other.policy.save(model)
    for _ in ("altered", "with checksums that fit"):
        with pytest.raises(ArtifactError, match=r"model\.zip") as caught:
            load_policy(load_run(tmp_path / "run"), small_pair())
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
        write_checksums(model.parent)


def test_pickled_settings_in_a_model_file_are_never_read(finished, tmp_path, monkeypatch):
    """A model file from a stranger must not run code: nothing may be unpickled while it is loaded."""
    shutil.copytree(finished, tmp_path / "run")
    import cloudpickle

    def refuse(*arguments, **settings):
        raise AssertionError("a model file was unpickled")

    monkeypatch.setattr(cloudpickle, "loads", refuse)
    load_policy(load_run(tmp_path / "run"), small_pair())


NAMES = ["config.json", "result.json", "provenance.json", "versions.json", "timing.json"]


@pytest.mark.parametrize("name", [*NAMES, "sessions.csv", "learning_curve.csv"])
def test_damaged_files_of_a_run_are_named(finished, name):
    path = finished / name
    content = path.read_bytes()
    cut = content[: content.rfind(b"\n", 0, -1) + 1] + b"7"
    for damage in (b"{", b"\xff\xfe\0", b"[" * 100_000, b"[]", b'"text"', b"a,b\n1\n", cut):
        path.write_bytes(damage)
        for _ in ("altered", "with checksums that fit"):
            with pytest.raises(ArtifactError, match=name):
                EvaluatedRun.of_run(load_run(finished))
            write_checksums(finished)
        path.write_bytes(content)
        write_checksums(finished)
    path.unlink()
    with pytest.raises(ArtifactError, match=name):
        load_run(finished)
    write_checksums(finished)
    if name != "learning_curve.csv":  # which controls do not have
        with pytest.raises(ArtifactError, match=r"result\.json" if name == "result.json" else name):
            EvaluatedRun.of_run(load_run(finished))
    path.write_bytes(content)
    write_checksums(finished)


def test_a_bit_that_changed_anywhere_in_a_run_is_noticed(finished):
    pair = small_pair()
    rng = np.random.default_rng(0)
    for path in sorted(finished.iterdir()):
        content = path.read_bytes()
        for bit in rng.choice(8 * len(content), 15, replace=False):
            altered = bytearray(content)
            altered[bit // 8] ^= 1 << bit % 8
            path.write_bytes(altered)
            with pytest.raises(ArtifactError, match=str(finished)):
                load_run(finished).check()
        path.write_bytes(content)
    # What is read later is checked when it is read.
    for name, read in (
        ("model.zip", lambda run: load_policy(run, pair)),
        ("sessions.csv", lambda run: run.sessions()),
    ):
        run, content = load_run(finished), (finished / name).read_bytes()
        (finished / name).write_bytes(content + b"\n")
        with pytest.raises(ArtifactError, match=rf"{name} was altered after it was written"):
            read(run)
        (finished / name).write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_run_with_other_content_are_refused_or_taken(finished, name):
    path = finished / name
    content = path.read_text()
    for wrong, *_ in wrong_contents(json.loads(content)):
        path.write_text(json.dumps(wrong))
        write_checksums(finished)
        try:
            EvaluatedRun.of_run(load_run(finished))
        except ArtifactError as error:
            assert str(finished) in str(error)
    path.write_text(content)
    write_checksums(finished)


def test_a_table_that_lacks_sessions_is_refused(finished):
    path = finished / "sessions.csv"
    content = path.read_text()
    path.write_text("\n".join(content.splitlines()[:-3]) + "\n")
    write_checksums(finished)
    with pytest.raises(ArtifactError, match=r"sessions\.csv .*it holds \d+ sessions, and \d+ were played"):
        EvaluatedRun.of_run(load_run(finished))
    path.write_text(content)
    write_checksums(finished)


def test_configurations_survive_json():
    for leave in ("temper", "strict", TemperFairness(window=2, grace_steps=1), CategoryBoredom()):
        config = plan_run("td3", "small", session=SessionConfig(leave=leave, max_len=50, slate_size=6), seed=19)
        again = RunConfig.from_dict(json.loads(json.dumps(config.as_dict())))
        assert again.as_dict() == config.as_dict()


def test_worlds_must_fit_each_other():
    pair = small_pair()
    with pytest.raises(DataError, match="a training and a test world"):
        WorldPair("x", pair.test, pair.test)
    with pytest.raises(DataError, match="must not have sessions"):
        WorldPair("x", replace(pair.train, users=np.arange(40)), pair.test)


def study(**settings):
    content = {
        "name": "study",
        "methods": [{"name": "a2c", "steps": 1024}, "random", "quota-greedy"],
        "worlds": ["small"],
        "seeds": (11, 15),
        "max_lens": (20, 30),
    }
    return planned_runs(StudySpec.model_validate(content | settings))


def test_a_study_has_every_run_once_and_controls_with_one_seed():
    runs = study()
    assert len(runs) == 2 * (2 + 1 + 1)
    assert len({run_folder(run) for run in runs}) == len(runs)
    assert {run.session.max_len for run in runs} == {20, 30}


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pair = {"small": small_pair()}
    first = run_study(study()[:3], tmp_path, pair).records
    import hrl_policies.study.runs as runs_module

    runs = []
    monkeypatch.setattr(runs_module, "train", lambda run, *a, **k: (runs.append(run), train(run, *a, **k))[1])
    records = run_study(study(), tmp_path, pair).records
    assert len(runs) == len(study()) - 3
    assert [record.summary for record in records[:3]] == [record.summary for record in first]
    assert len(read_table(tmp_path / run_folder(study()[0]) / "sessions.csv")) == 15


def test_a_study_resumes_an_interrupted_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_study(study()[:1], tmp_path, {"small": interrupted_pair(at=5)})
    (record,) = run_study(study()[:1], tmp_path, {"small": small_pair()}).records
    assert load_run(tmp_path / run_folder(study()[0])).result["resumed_at"] == 5 * 64
    assert record.summary["len"] > 1


def test_a_study_never_takes_a_run_with_other_settings_for_its_own(tmp_path):
    pair = {"small": small_pair()}
    run_study(study()[2:3], tmp_path, pair)
    with pytest.raises(ArtifactError, match="episodes_per_user"):
        run_study(study(episodes_per_user=2)[2:3], tmp_path, pair)


# ---------------------------------------------------------------- peak memory

LARGE = 200 * 2**20


@pytest.fixture
def forgetful():
    """Skips where the system does not let a process forget its earlier peaks (such as in some containers)."""
    allocate(LARGE)
    try:
        progress._RESET.write_text(progress._RESET_PEAK, encoding="ascii")
        held, peak = progress._status("VmRSS"), progress._status("VmHWM")
    except OSError as error:
        pytest.skip(f"this system does not let a process forget its earlier peaks: {error}")
    if held is None or peak is None or peak > held + LARGE // 2:
        pytest.skip("this system does not forget earlier peaks of a process, though it takes the order to")


@pytest.fixture
def remembering(monkeypatch, tmp_path):
    """A system that remembers peaks, and tells nothing but the largest ever: macOS, say."""
    pytest.importorskip("resource")
    monkeypatch.setattr(progress, "_RESET", tmp_path / "no/clear_refs")
    monkeypatch.setattr(progress, "_STATUS", tmp_path / "no/status")


def allocate(size):
    """Touches so many bytes and lets them go."""
    array = np.ones(size, np.uint8)
    del array


def test_a_large_array_shows_while_measured_even_after_it_is_gone(forgetful):
    peak = PeakMemory()
    before = peak.mib()
    allocate(LARGE)
    assert peak.mib() > before + 150


def test_what_was_freed_before_does_not_count(forgetful):
    first = PeakMemory()
    allocate(LARGE)
    grown = first.mib()
    assert PeakMemory().mib() < grown - 150


@pytest.mark.parametrize("container", [None, "max", 1_000_000])
def test_a_replay_buffer_larger_than_what_memory_is_left_is_refused_before_training(tmp_path, monkeypatch, container):
    (tmp_path / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable: {100 if container is None else 10**6} kB\n")
    monkeypatch.setattr(progress, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(progress, "_CONTAINER", tmp_path)
    if container is not None:
        (tmp_path / "memory.max").write_text(f"{container}\n")
        (tmp_path / "memory.current").write_text("900000\n")
    if container == "max":
        assert train(td3(), small_pair()).complete
        return
    with pytest.raises(MemoryError, match=r"^a replay buffer of .* transitions takes .* and (98|100) KiB are left; "):
        train(td3(), small_pair(), output=tmp_path / "run")
    assert not list(tmp_path.glob("*run*"))


def test_elsewhere_a_peak_below_an_earlier_one_is_not_known(remembering):
    allocate(2 * LARGE)
    peak = PeakMemory()
    allocate(LARGE)
    assert peak.mib() is None


def test_elsewhere_a_new_peak_of_the_process_is_that_of_the_run(remembering, monkeypatch):
    peak = PeakMemory()
    new = progress._peak_of_process() + LARGE
    monkeypatch.setattr(progress, "_peak_of_process", lambda: new)
    assert peak.mib() == pytest.approx(new / 2**20, abs=0.1)


def test_elsewhere_it_is_the_largest_that_the_process_ever_held(remembering):
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert progress._peak_of_process() == largest * (1 if sys.platform == "darwin" else 2**10)


@pytest.mark.parametrize(("before", "known"), [(0, True), (LARGE, False)])
def test_a_container_that_forbids_forgetting_tells_what_it_can(monkeypatch, tmp_path, before, known):
    """The status is readable there, so a process without an earlier peak knows its own."""
    status = tmp_path / "status"
    monkeypatch.setattr(progress, "_RESET", tmp_path / "no/clear_refs")
    monkeypatch.setattr(progress, "_STATUS", status)
    held = 300 * 2**20
    status.write_text(f"VmHWM:\t{(held + before) // 1024} kB\nVmRSS:\t{held // 1024} kB\n", encoding="ascii")
    peak = PeakMemory()
    assert peak.mib() == (300.0 if known else None)
    status.write_text(f"VmHWM:\t{(held + 2 * LARGE) // 1024} kB\nVmRSS:\t{held // 1024} kB\n", encoding="ascii")
    assert peak.mib() == 700.0


def test_a_system_that_tells_nothing_gives_none(remembering, monkeypatch):
    monkeypatch.setattr(progress, "_peak_of_process", lambda: None)
    assert PeakMemory().mib() is None
