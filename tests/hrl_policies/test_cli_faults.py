"""The command line: mistakes, damage, interruptions and what else goes wrong are explained without a traceback."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import official_files as official
import pytest
from small_worlds import interrupted_pair, small_pair
from stable_baselines3 import A2C
from studies import ENV, TRAIN

import hrl_policies.study.engines as engines
import hrl_policies.study.loading as loading
import hrl_policies.study.outputs as outputs
import kuaifair_env.registration as registration
from dsrm.baselines import NoisePurifier
from dsrm.purifier import save_purifier
from hrl_policies.cli.main import main
from hrl_policies.study import load_run
from kuaifair_env.files import claimed

QUICK = ["--rounds", "1", "--examples", "500", "--no-progress"]


MISTAKES = [
    [],
    ["--help"],
    ["train", "--help"],
    ["fly"],
    ["train", "--fly"],
    ["train", "--max-len", "many"],
    ["train", "-m", "a3c", "-e", "KuaiFair-Toy-v0"],
    ["train", "-m", "a2c", "-e", "KuaiFair-Nowhere-v0"],
    ["pretrain", "-e", "KuaiFair-Nowhere-v0", "-o", "never-written"],
    ["tune", "a3c", "-e", "KuaiFair-Toy-v0"],
    ["study", "run", "nowhere.yml"],
    ["data", "fetch", "movielens"],
]


@pytest.mark.slow
def test_help_and_mistakes_import_nothing_heavy():
    """How long people wait for help or for an error is a matter of imports."""
    code = f"""
import sys
from hrl_policies.cli.main import main
for arguments in {MISTAKES}:
    try:
        main(arguments)
    except SystemExit:
        pass
    for name in ("torch", "stable_baselines3", "sklearn", "pandas", "matplotlib", "scipy.stats"):
        assert name not in sys.modules, (arguments, name)
"""
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.usefixtures("small_worlds")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "-m", "a3c", "-e", "KuaiFair-Toy-v0"], "no method is called 'a3c'"),
        (["train", "-m", "a2c"], "--method and --env"),
        (["train", "--resume", "x", "-m", "a2c"], "leave them out"),
        (["train", "--resume", "nowhere.partial"], "no run folder nowhere.partial"),
        ([*TRAIN, "--leave", "never-ever"], "no leave rule is called 'never-ever'"),
        ([*TRAIN, "--set", "gamma"], "name=value"),
        ([*TRAIN, "--set", "gama=1"], "A2C has no hyperparameter gama"),
        ([*TRAIN, "--set", "gamma=0.9", "--set", "gamma=0.8"], "gamma is given twice"),
        ([*TRAIN, "--set", "learning_rate=1e300"], "learning_rate must be a number from 0 to"),
        ([*TRAIN, "--set", "n_steps=1" + "0" * 30], "a number is too large"),
        ([*TRAIN, "--max-len", "1" + "0" * 30], "a number is too large"),
        ([*TRAIN, "--episodes-per-user", "10001"], "episodes_per_user must be at most 10,000"),
        ([*TRAIN, "--n-envs", "1" + "0" * 12], "sessions at once"),
        ([*TRAIN, "--slate-size", "51"], "slate_size"),
        ([*TRAIN, "--slate-size", "3", "--leave", "temper:window=1"], "too small to measure"),
        ([*TRAIN, "--taste", "sweet"], "--taste is"),
        ([*TRAIN, "--repeats", "forbid"], "repeats='forbid' needs"),
        (["evaluate", "nowhere"], "no run folder nowhere"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--max-len", "many"], "--max-len"),
        (["fly"], "No such command 'fly'"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(kuaifair, arguments, words):
    code, out, err = kuaifair(*arguments)
    assert code == (1 if words.startswith("no run folder") else 2)
    assert words in err
    assert "Traceback" not in out + err


@dataclass(frozen=True)
class Touches:
    """Makes a file when it is unpickled."""

    path: str

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("command", ["evaluate", "ope", "show", "train --resume", "serve"])
def test_a_model_file_of_a_stranger_is_refused_and_not_unpickled(kuaifair, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Touches(str(tmp_path / "executed")), protocol=2)  # torch warns of later ones
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as archive:
        archive.writestr("policy.pth", content)
        archive.writestr("data", json.dumps({"policy": {":serialized:": base64.b64encode(content).decode()}}))
    code, _, err = kuaifair(*command.split(), "agent.zip")
    assert code == 1 and "agent.zip" in err and "--trust" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "executed").exists()
    if command in ("evaluate", "serve"):
        monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
        code, _, err = kuaifair(command, "agent.zip", "--trust", "--method", "a2c", *ENV)
        assert code == 1 and "agent.zip does not hold a2c" in err and len(err.splitlines()) == 1
        assert (tmp_path / "executed").exists()


def test_tracebacks_are_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("KUAIFAIR_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no method"):
        main(["train", "-m", "a3c", "-e", "KuaiFair-Toy-v0"])


def test_an_unknown_environment_is_explained(kuaifair):
    code, _, err = kuaifair("train", "-m", "random", "-e", "KuaiFair-Nowhere-v0", "-o", "never-written")
    assert code == 2 and "no environment is called 'KuaiFair-Nowhere-v0'; there are" in err


@pytest.mark.usefixtures("small_worlds")
def test_names_of_any_language_go_into_pipes_that_know_ascii_alone_and_clocks_may_go_back(tmp_path, monkeypatch):
    seconds = iter(range(10**9, 0, -3_600))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    monkeypatch.setattr(time, "time_ns", lambda: next(seconds) * 10**9)
    monkeypatch.setenv("COLUMNS", "20")
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    for command in ([*TRAIN, "-o", "ein Lauf für 2"], ["evaluate", "ein Lauf für 2"]):
        with pytest.raises(SystemExit) as ended:
            main([word for word in command if word != "--no-progress"])
        assert not ended.value.code
    out, err = ("" if stream.flush() else stream.buffer.getvalue().decode() for stream in streams.values())
    assert "Run folder: ein Lauf für 2" in out and "f\\xfcr" in out and "Reproduces result.json exactly." in out
    assert all(sign.isprintable() or sign == "\n" for sign in out + err)
    timing = load_run(tmp_path / "ein Lauf für 2").timing
    assert min(timing["training_seconds"], timing["evaluation_seconds"]) >= 0.0


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds")
@pytest.mark.parametrize(
    ("arguments", "same", "timed"),
    [
        (["tune", "a2c", *ENV, "--steps", "64", "--trials", "2", "--no-progress"], "best.yml", "trials.csv"),
        (["serve", "session-quota", *ENV, "--sessions", "30", "--orders", "1", "--n-envs", "8"], "curve.csv", None),
        (["study", "run", "../plan.yml"], "*/*/sessions.csv", "*/*/timing.json"),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_a_clock_that_goes_back_changes_no_result_and_no_duration(
    kuaifair, tmp_path, monkeypatch, arguments, same, timed
):
    monkeypatch.setattr(registration, "make_world", lambda *rest, **others: small_pair().train)
    monkeypatch.setattr(engines, "LocalEngine", lambda count: engines.InProcessEngine())
    monkeypatch.setattr(outputs, "draw_study", lambda *rest: [])
    (tmp_path / "plan.yml").write_text(
        "name: plan\nmethods: [{name: a2c, steps: 64}]\nworlds: [KuaiFair-Toy-v0]\nmax_lens: [9]\nseeds: [1]\n"
    )
    seconds = iter(range(10**9, 0, -3_600))
    folders = [tmp_path / "forwards", tmp_path / "backwards"]
    for folder in folders:
        if folder.name == "backwards":
            monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
            monkeypatch.setattr(time, "time_ns", lambda: next(seconds) * 10**9)
        folder.mkdir()
        monkeypatch.chdir(folder)
        code, _, err = kuaifair(*arguments, "--output", ".")
        assert code == 0, err
    contents = [[path.read_bytes() for path in sorted(folder.glob(same))] for folder in folders]
    assert contents[0] == contents[1] != []
    for path in [] if timed is None else folders[1].glob(timed):
        text = path.read_text()
        rows = [json.loads(text)] if path.suffix == ".json" else csv.DictReader(io.StringIO(text))
        durations = [float(value) for row in rows for name, value in row.items() if name.endswith("seconds")]
        assert durations and min(durations) >= 0.0


@pytest.mark.parametrize("variable", ["KUAIFAIR_CACHE", "HOME"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "fetch", "kuairand", "--retries", "0"),
        ("train", "-m", "random", "-e", "KuaiFair-Toy-v0"),
        ("pretrain", "-e", "KuaiFair-Toy-v0", "-m", "ips", "-o", "p.safetensors"),
        ("demo", "--no-progress"),
    ],
    ids=lambda words: words[0],
)
def test_a_cache_that_cannot_be_written_is_named_in_one_line(kuaifair, tmp_path, monkeypatch, arguments, variable):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("KUAIFAIR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    # A command of its own has no worlds in memory, which tests before this one may have left there.
    monkeypatch.setattr(registration, "_cached_world", registration._cached_world.__wrapped__)
    code, _, err = kuaifair(*arguments)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ") and str(tmp_path / "file") in line
    assert line.endswith("; set KUAIFAIR_CACHE to a folder that can be written"), line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nobody can write to Linux's /proc, root included")
@pytest.mark.parametrize(
    "arguments",
    [
        ("demo",),
        TRAIN,
        (*TRAIN, "-o", "run"),
        ("pretrain", *ENV, "-m", "ips", "-o", "purifier.safetensors"),
        ("encode", *ENV, "-o", "encoder.safetensors"),
        ("probe", "purifier.safetensors", *ENV, "-o", "probes"),
        ("tune", "a2c", *ENV, "--trials", "1"),
        ("serve", "random", *ENV),
        ("study", "run", "PLAN"),
    ],
    ids=lambda words: words[0] if words[-1] != "run" else "train --output",
)
def test_a_folder_that_cannot_be_written_is_named_before_any_work(
    kuaifair, small_worlds, tmp_path, monkeypatch, arguments
):
    (tmp_path / "plan.yml").write_text(
        "name: plan\nmethods: [random]\nworlds: [KuaiFair-Toy-v0]\nmax_lens: [9]\nseeds: [1]\n"
    )
    save_purifier(NoisePurifier(0.25), tmp_path / "purifier.safetensors")
    monkeypatch.setattr(registration, "make_world", lambda *rest, **others: small_pair().train)

    def work(*rest, **others):
        raise AssertionError("the work has begun")

    for place in (
        "hrl_policies.cli.demo.load_worlds",
        "hrl_policies.study.runner._finish",
        "dsrm.pretraining.pretrain",
        "dsrm.encoder.pretrain_encoder",
        "dsrm.probe_data.probe_set",
        "kuaifair_env.serving._sessions_of",
    ):
        monkeypatch.setattr(place, work)
    monkeypatch.chdir("/proc")
    given = [str(tmp_path / "plan.yml") if word == "PLAN" else word for word in arguments]
    code, _, err = kuaifair(*given)
    assert code == 1, err
    assert re.fullmatch(r"error: \S+ cannot be written: .*; choose another output folder\n", err), err


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds")
@pytest.mark.parametrize(
    ("number", "ctrl_c"),
    [
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGTERM, signal.default_int_handler),
        (signal.SIGTERM, signal.SIG_IGN),  # as in the background of a shell script
    ],
)
def test_interrupted_training_can_be_resumed(kuaifair, tmp_path, monkeypatch, request, number, ctrl_c):
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, ctrl_c)))

    def worlds(env_id, *rest):
        pair = interrupted_pair(at=10, number=number)
        return type(pair)(env_id, pair.train, pair.test)

    monkeypatch.setattr(loading, "load_worlds", worlds)
    code, out, _ = kuaifair(*TRAIN, "-o", "run", "--set", "n_steps=4")
    assert code == 130 and "after 80 of 256 steps" in out and "--resume run.partial" in out
    code, _, err = kuaifair("evaluate", "run.partial")
    assert code == 2 and "was interrupted" in err
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    code, out, err = kuaifair("train", "--resume", "run.partial", "--no-progress")
    assert code == 0, err
    assert load_run(tmp_path / "run").result["resumed_at"] == 80


@pytest.mark.usefixtures("small_worlds")
def test_training_for_which_memory_does_not_suffice_is_kept(kuaifair, tmp_path, monkeypatch):
    shortage = MemoryError("Unable to allocate 9 TiB")
    monkeypatch.setattr(
        loading, "load_worlds", lambda env_id, *rest: replace(interrupted_pair(10, shortage), name=env_id)
    )
    code, _, err = kuaifair(*TRAIN, "-o", "run", "--set", "n_steps=4")
    assert code == 1
    assert err == (
        "error: not enough memory: Unable to allocate 9 TiB; run.partial keeps the 72 steps that were trained: "
        "kuaifair train --resume goes on\n"
    )
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    code, _, err = kuaifair("train", "--resume", "run.partial", "--no-progress")
    assert code == 0, err
    assert load_run(tmp_path / "run").result["resumed_at"] == 72 and not (tmp_path / "run.partial").exists()


@pytest.mark.usefixtures("small_worlds")
@pytest.mark.parametrize("noticed", [True, False], ids=["in training", "at its end"])
def test_a_training_that_diverges_is_one_line_and_leaves_no_run(kuaifair, tmp_path, monkeypatch, noticed):
    def learn(model, steps, **rest):
        model.num_timesteps = steps
        model.policy.log_std.data.fill_(float("nan"))
        return model

    if not noticed:
        monkeypatch.setattr(A2C, "learn", learn)
    settings = ["--set", "learning_rate=9.9", "--set", "max_grad_norm=1e30", "--steps", "2048"]
    code, _, err = kuaifair(*TRAIN, *settings, "-o", "run")
    assert code == 1 and err.startswith("error: the training of a2c diverged after ") and len(err.splitlines()) == 1
    assert err.endswith(" holds NaN or infinity; a smaller learning_rate may help\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_worlds")
def test_memory_that_torch_cannot_have_ends_like_any_other_lack_of_memory(kuaifair, tmp_path, monkeypatch):
    code, _, err = kuaifair(*TRAIN, "-o", "run", "--set", "policy_kwargs.net_arch=[100000000000]")
    assert code == 1 and err.startswith("error: not enough memory: ") and len(err.splitlines()) == 1
    shortage = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    monkeypatch.setattr(
        loading, "load_worlds", lambda env_id, *rest: replace(interrupted_pair(10, shortage), name=env_id)
    )
    code, _, err = kuaifair(*TRAIN, "-o", "run", "--set", "n_steps=4")
    assert code == 1 and "run.partial keeps the 72 steps" in err and (tmp_path / "run.partial").is_dir()


@pytest.mark.usefixtures("small_worlds")
def test_a_training_outlives_a_lack_of_memory_in_its_evaluation(kuaifair, tmp_path, monkeypatch):
    def short(*rest, **others):
        raise MemoryError("Unable to allocate 9 TiB")

    with monkeypatch.context() as patched:
        patched.setattr("hrl_policies.study.runner.evaluate", short)
        code, _, err = kuaifair(*TRAIN, "-o", "run")
    assert code == 1 and "run.partial keeps the 256 steps that were trained" in err
    assert kuaifair("train", "--resume", "run.partial", "--no-progress")[0] == 0
    assert load_run(tmp_path / "run").result["steps_done"] == 256


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "arguments", [("pretrain", "-e", "KuaiFair-Toy-v0", "-o", "p.safetensors"), ("data", "fetch", "kuairand")]
)
def test_a_command_that_is_stopped_says_how_to_go_on(kuaifair, monkeypatch, arguments, number):
    handlers = signal.getsignal(signal.SIGTERM)

    def stopped(*rest, **options):
        os.kill(os.getpid(), number)

    monkeypatch.setattr("hrl_policies.cli.purifiers.open_world", stopped)
    monkeypatch.setattr("kuaifair_env.data.official.fetch", stopped)
    code, _, err = kuaifair(*arguments)
    assert code == 130
    assert err == "Interrupted. The same command goes on from what is written, or begins anew.\n"
    assert signal.getsignal(signal.SIGTERM) is handlers


def test_an_unknown_method_is_explained(kuaifair):
    code, _, err = kuaifair("methods", "a3c")
    assert code == 2 and "no method is called 'a3c'; there are a2c" in err


@pytest.mark.usefixtures("small_worlds", "worlds_of_taste")
@pytest.mark.parametrize(
    "arguments",
    [
        (*TRAIN, "-o", "made"),
        ("train", "--resume", "made.partial"),
        ("pretrain", *ENV, "-o", "made"),
        ("encode", *ENV, "-o", "made"),
    ],
    ids=["train", "train --resume", "pretrain", "encode"],
)
def test_what_another_process_makes_is_not_made_at_the_same_time(kuaifair, tmp_path, arguments):
    with claimed(tmp_path / "made"):
        code, _, err = kuaifair(*arguments)
        assert code == 1
        assert err == "error: another process makes made; wait for it, or choose another output\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_worlds")
def test_outputs_take_the_place_of_nothing_that_they_are_not(kuaifair, tmp_path):
    assert kuaifair("train", "-m", "random", *ENV, "-o", "run")[0] == 0
    run = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "nowhere").symlink_to(tmp_path / "never-made")
    os.mkfifo(tmp_path / "pipe")
    for arguments, words in (
        (["serve", "random", *ENV, "--sessions", "8", "--orders", "1", "-o", "run"], "run exists already and holds no"),
        ([*TRAIN, "-o", "nowhere"], "nowhere exists already"),
        ([*TRAIN, "-o", "nowhere/run"], "nowhere/run cannot be written: Not a directory"),
        (["pretrain", *ENV, "-m", "ips", "-o", "nowhere"], "nowhere exists already"),
        (["show", "run", "-o", "pipe"], "pipe is no file"),
    ):
        code, _, err = kuaifair(*arguments)
        assert code == 1 and err.startswith(f"error: {words}") and len(err.splitlines()) == 1, err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == run
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "nowhere").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nowhere", "pipe", "run"]


@pytest.mark.usefixtures("worlds_of_taste")
def test_what_a_kill_left_beside_a_purifier_goes_with_the_next_call_and_what_others_put_there_stays(kuaifair, tmp_path):
    save_purifier(NoisePurifier(0.25), tmp_path / "made.safetensors")
    (tmp_path / "download").touch()
    for name, stays in (("made.safetensors", False), ("download", True)):
        (tmp_path / f"{name}.partial").touch()
        code, _, err = kuaifair("pretrain", *ENV, "--output", name, *QUICK)
        assert code == 1 and f"{name} exists already" in err
        assert (tmp_path / f"{name}.partial").exists() == stays


@pytest.mark.usefixtures("worlds_of_taste")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", *ENV, "--mode", "magic", "-o", "x"], "magic"),
        (["pretrain", *ENV, "--like", "a", "-o", "x"], "--like is for --mode noise"),
        (["pretrain", *ENV, "--mode", "ips"], "--output"),
        (["pretrain", *ENV, "--mode", "ips", "-o", "there"], "exists already"),
        (["encode", *ENV, "-o", "there"], "exists already"),
        (["probe", "there", *ENV], "safetensors"),
        (["probe", "nowhere", *ENV], "nowhere"),
        (["probe", *ENV], "purifiers"),
        (["pretrain", *ENV, "--item-term", "magic", "-o", "x"], "magic"),
    ],
)
def test_bad_input_around_purifiers_is_explained_without_a_traceback(kuaifair, tmp_path, arguments, words):
    (tmp_path / "there").write_text("something else")
    code, out, err = kuaifair(*arguments)
    assert code == (1 if words in ("exists already", "safetensors", "nowhere") else 2)
    assert words in (out + err).replace("PURIFIERS", "purifiers")
    assert "Traceback" not in out + err
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("worlds_of_taste", "small_worlds")
@pytest.mark.parametrize("damage", ["one bit", "half", "nothing in it", "a folder"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("probe", "FILE", *ENV),
        ("pretrain", *ENV, "--mode", "noise", "--like", "FILE", "-o", "x"),
        (*TRAIN, "--purifier", "FILE"),
    ],
    ids=["probe", "pretrain", "train"],
)
def test_a_damaged_purifier_is_one_sentence(kuaifair, tmp_path, monkeypatch, arguments, damage):
    monkeypatch.setenv("COLUMNS", "300")
    path = tmp_path / "noise.safetensors"
    save_purifier(NoisePurifier(0.25), path)
    content = path.read_bytes()
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"one bit": content.replace(b"0.25", b"0.35"), "half": content[:200]}.get(damage, b""))
    code, _, err = kuaifair(*("noise.safetensors" if argument == "FILE" else argument for argument in arguments))
    (sentence,) = err.splitlines()
    assert code == 1 and sentence.startswith("error: ") and "noise.safetensors" in sentence


@pytest.mark.usefixtures("own_cache")
def test_check_names_file_line_and_column_without_a_traceback(kuaifair, tmp_path):
    official.write_kuairec(tmp_path)
    path = tmp_path / "small_matrix.csv"
    lines = path.read_text().splitlines()
    lines[4] = "oops" + lines[4]
    path.write_text("\n".join(lines) + "\n")
    code, out, err = kuaifair("data", "check", tmp_path)
    assert code == 1 and "small_matrix.csv, line 5, column 'user_id'" in err
    assert "Traceback" not in out + err


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "nowhere"], "error: "),
        (["check", "."], "error: "),
        (["fetch", "movielens"], "'movielens' is not one of 'kuairec', 'kuairand'"),
    ],
)
def test_bad_input_around_data_ends_with_a_message(kuaifair, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = kuaifair("data", *arguments)
    assert code == (1 if message == "error: " else 2) and message in err


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("fault", ["a closed port", "no network"])
def test_a_server_that_cannot_be_reached_is_one_line_and_leaves_nothing(kuaifair, tmp_path, monkeypatch, fault):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    if fault == "no network":

        def unknown(*rest, **others):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        address = "mirror.invalid"
    fetch = ["data", "fetch", "kuairand", "--retries", "0", "--no-progress", "--folder", tmp_path / "made"]
    code, _, err = kuaifair(*fetch, "--base-url", f"http://{address}")
    assert code == 1 and len(err.splitlines()) == 1
    assert err.startswith(f"error: http://{address}/KuaiRand-Pure.tar.gz: could not be downloaded in 1 attempt(s): ")
    assert list((tmp_path / "made").iterdir()) == []
