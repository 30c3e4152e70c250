"""What is fuzzed: readers of logs, artifacts, files of settings, the command line, and the downloader."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import numpy as np
import pandas as pd
import yaml
from fuzz_inputs import Draws, change_file, mutated_array, mutated_bytes, mutated_text, mutated_tree, typed_column
from official_files import pack_tar, pack_zip, write_kuairand, write_kuairec

from hrl_policies.study.spec import StudyError
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError, SettingsError

ROOT = Path(__file__).resolve().parents[1]


def logs(folder: Path) -> Callable[[Draws, Path], None]:
    """Logs of one's own as text and Parquet, the official files, and their archives."""
    from kuaifair_env.data import InteractionData, load_data, read_kuairand, read_kuairec, save_data

    log = pd.DataFrame(
        {
            "user_id": np.repeat([3, 5, 8, 13], 6),
            "item_id": np.tile([1, 2, 4, 7, 11, 16], 4),
            "click": np.tile([0, 1, 0, 0, 1, 1, 0, 1], 3),
            "time": 1_650_000_000 + 86_400 * np.arange(24) % 977_777,
            "watch_ratio": np.linspace(0, 2, 24),
        }
    )
    items = pd.DataFrame({"item_id": [1, 2, 4, 7, 11, 16], "tags": ["[1, 2]", "[]", "[3]", "[1]", "", "[2]"]})
    items = items.assign(shown=[10, 20, 30, 40, 50, 60], kind=list("ababab"))
    users = pd.DataFrame({"user_id": [3, 5, 8, 13], "age": [20.0, 30.0, np.nan, 50.0]})
    write_kuairec(folder / "kuairec"), write_kuairand(folder / "kuairand")
    pack_zip(folder / "kuairec", folder / "kuairec.zip"), pack_tar(folder / "kuairand", folder / "kuairand.tar.gz")
    readers = {"kuairec": read_kuairec, "kuairand": read_kuairand}

    def table(draws: Draws, frame: pd.DataFrame, path: Path) -> Path | None:
        if draws.chance(30):
            with contextlib.suppress(Exception):  # what pandas and pyarrow do not write
                changed = frame.copy()
                for _ in range(1 + draws.below(3)):
                    name = draws.of(list(frame.columns))
                    changed[name] = typed_column(draws, changed[name])
                changed.to_parquet(path.with_suffix(".parquet"), index=False)
                content = path.with_suffix(".parquet").read_bytes()
                path.with_suffix(".parquet").write_bytes(mutated_bytes(draws, content, 3))
                return path.with_suffix(".parquet")
        path = path.with_suffix(draws.of((".csv", ".tsv", ".txt", "")))
        path.write_bytes(
            mutated_bytes(draws, mutated_text(draws, frame.to_csv(index=False)).encode("utf-8", "replace"), 3)
        )
        return path

    def own(draws: Draws, scratch: Path) -> None:
        tables = [table(draws, log, scratch / "log")]
        second = [table(draws, log, scratch / "test")] if draws.chance(30) else []
        more = [
            table(draws, frame, scratch / name) if draws.chance(40) else None
            for name, frame in (("items", items), ("users", users))
        ]
        settings: dict[str, Any] = {"positives_only": "train"} if draws.chance(10) else {}
        settings |= {"positive": {"watch_ratio": 1.0}} if draws.chance(10) else {}
        if second:
            data = InteractionData.from_frames(tables[0], second[0], *more, **settings)
        else:
            data = InteractionData.from_log(tables[0], *more, split=draws.of(("time", "user")), **settings)
        save_data(data, scratch / "data")
        assert load_data(scratch / "data").contents_hash == data.contents_hash, "the data set changed on the disk"

    def official(draws: Draws, scratch: Path) -> None:
        name = draws.of(("kuairec", "kuairand"))
        for path in (folder / name).iterdir():
            os.link(path, scratch / path.name)
        path = scratch / draws.of(sorted(os.listdir(scratch)))
        text = mutated_text(draws, path.read_text("utf-8")).encode("utf-8", "replace")
        path.unlink()
        if not draws.chance(5):
            path.write_bytes(mutated_bytes(draws, text, 2))
        readers[name](scratch)

    def archive(draws: Draws, scratch: Path) -> None:
        path = draws.of((folder / "kuairec.zip", folder / "kuairand.tar.gz"))
        (scratch / path.name).write_bytes(mutated_bytes(draws, path.read_bytes()))
        readers[path.name.partition(".")[0]](scratch / path.name)

    return lambda draws, scratch: draws.of((own, own, own, official, archive))(draws, scratch)


def artifacts(folder: Path) -> Callable[[Draws, Path], None]:
    """Everything that the library writes and reads again, changed under checksums that fit."""
    import optuna
    from purifiers import quick_config
    from small_sets import make_data

    import kuaifair_env
    from dsrm import fit_item_term, pretrain, save_purifier
    from dsrm.belief import BELIEFS, Belief, BeliefItems
    from dsrm.encoder import ENCODERS, Encoder, EncoderConfig, pretrain_encoder
    from dsrm.item_term import ITEM_TERMS, ItemTerm
    from dsrm.purifier import MODES, PURIFIERS, load_purifier
    from hrl_policies import load_worlds, plan_run, train
    from hrl_policies.controls import RandomSlates
    from hrl_policies.study.loading import load_policy
    from hrl_policies.study.store import load_run
    from hrl_policies.study.submission import read_submission
    from hrl_policies.study.trials import TrialJournal
    from hrl_policies.zoo.settings import shipped_settings
    from kuaifair_env.checkpoints import CheckpointFolder, decode
    from kuaifair_env.data import load_data, save_data
    from kuaifair_env.files import RESPONSES, open_artifact, save_artifact, whole, with_checksum
    from kuaifair_env.response.fitting import load_response

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    toy = "KuaiFair-Toy-v0"
    pair = load_worlds(toy)
    world = pair.train
    belief = BeliefItems.of_world(world)
    files: dict[Path, tuple[Any, Callable[[Path], object]]] = {}

    def read_checkpoint(path: Path) -> None:
        found = CheckpointFolder(path, {"a": 1}).read()
        with whole(path, "checkpoint", ""):
            decode(*found[:2]) if found else None

    def add(name: str, save: Callable[[Path], object], family: Any, load: Callable[[Path], object]) -> None:
        save(folder / f"{name}.safetensors")
        files[folder / f"{name}.safetensors"] = family, load

    for mode in MODES:
        purifier = pretrain(world, quick_config(mode))
        add(
            mode,
            lambda path, made=purifier: save_purifier(made, path),
            PURIFIERS,
            lambda path: load_purifier(path).bind(world),
        )
    for kind in ("mean", "transformer"):
        encoder = pretrain_encoder(world, EncoderConfig(kind=kind, dimension=8, steps=4, check_every=2))
        add(f"encoder-{kind}", encoder.save, ENCODERS, Encoder.load)
    add("item-term", fit_item_term(world, "log").save, ITEM_TERMS, ItemTerm.load)
    add("belief", Belief(belief).save, BELIEFS, lambda path: Belief(belief).load(path))
    add("response", world.response.save, RESPONSES, load_response)
    folders = {
        "run": lambda path: (load_run(path).sessions(), load_policy(load_run(path), pair)),
        "control": lambda path: (load_run(path).sessions(), load_policy(load_run(path), pair)),
        "service": lambda path: kuaifair_env.ServingResult.load(path).table(),
        "checkpoint": lambda path: read_checkpoint(path),
        "data": load_data,
    }
    train(plan_run("a2c", toy, total_steps=128, n_users=5), output=folder / "run", worlds=pair)
    train(plan_run("random", toy, n_users=5), output=folder / "control", worlds=pair)
    env = kuaifair_env.make_sb3(toy, n_envs=4, split="test", action_mode="slate")
    kuaifair_env.serve(RandomSlates(), env, sessions=8, folder=folder / "service")
    state = {"rows": (np.arange(3), [1.5, None]), "generator": np.random.default_rng(0), "x": {"y": np.ones((2, 2))}}
    CheckpointFolder(folder / "checkpoint", {"a": 1}).write(1, state, lambda path: path.write_bytes(b"agent"))
    save_data(make_data(), folder / "data")
    settings = shipped_settings("a2c")
    first = {name: settings.hyperparameters[name] for name in settings.search if name in settings.hyperparameters}
    space = {name: settings.search[name] for name in first}

    def journal(path: Path) -> TrialJournal:
        return TrialJournal(path, {"method": "a2c"}, space, first, 0)

    for number in range(3):
        trials = journal(folder / "journal.log")
        trials.record(trials.propose(), None if number == 1 else 0.5, 1.0, "failed" if number == 1 else "")
    submission = json.loads((ROOT / "docs/leaderboard/belief-quota-toy.json").read_text("utf-8"))

    def tensors(draws: Draws, scratch: Path) -> None:
        source = draws.of(sorted(files))
        family, load = files[source]
        path = scratch / source.name
        if draws.chance(15):
            path.write_bytes(mutated_bytes(draws, source.read_bytes()))
        else:
            with open_artifact(source, family=family) as (kind, arrays, written):
                changed = dict(arrays)
                for name in {draws.of(sorted(arrays)) for _ in range(draws.below(3))} if arrays else ():
                    changed[name] = mutated_array(draws, changed[name])
                kind = draws.of((kind,) * 8 + (*MODES, "", "observed"))
                written = mutated_tree(draws, written)
            with contextlib.suppress(ArtifactError, ValueError, TypeError, OverflowError):
                save_artifact(path, kind, changed, written if isinstance(written, dict) else {}, family)
        load(path)

    def of_folder(draws: Draws, scratch: Path) -> None:
        name = draws.of(sorted(folders))
        shutil.copytree(folder / name, scratch / name)
        change_file(
            draws,
            draws.of(sorted(path for path in (scratch / name).rglob("*") if path.is_file() and path.name != ".lock")),
        )
        folders[name](scratch / name)

    def of_journal(draws: Draws, scratch: Path) -> None:
        whole_lines = (folder / "journal.log").read_text("utf-8").splitlines()
        lines = list(whole_lines)
        for _ in range(1 + draws.below(3)):
            place = draws.below(len(lines))
            record = mutated_tree(draws, json.loads(whole_lines[place])) if draws.chance(80) else draws.scalar()
            lines[place] = json.dumps(with_checksum(record)) if isinstance(record, dict) else str(record)
        (scratch / "journal.log").write_bytes(
            mutated_bytes(draws, "\n".join([*lines, ""]).encode("utf-8", "replace"), 2)
        )
        trials = journal(scratch / "journal.log")
        trials.finished(), trials.propose()

    def of_submission(draws: Draws, scratch: Path) -> None:
        (scratch / "a.json").write_text(json.dumps(mutated_tree(draws, submission)), "utf-8")
        for result in read_submission(scratch / "a.json").results:
            result.interval("r_cum")

    return lambda draws, scratch: draws.of((tensors, tensors, of_folder, of_folder, of_journal, of_submission))(
        draws, scratch
    )


def settings(folder: Path) -> Callable[[Draws, Path], None]:
    """Studies, files of hyperparameters, configurations of runs, settings of sessions, and ``name=value``."""
    from hrl_policies import plan_run
    from hrl_policies.cli import env_kwargs, leave_option
    from hrl_policies.cli.study import _plan_lines, _read_plan
    from hrl_policies.study.config import RunConfig
    from hrl_policies.zoo.settings import parse_overrides, read_settings, shipped_settings
    from kuaifair_env.files import whole
    from kuaifair_env.registration import session_config
    from kuaifair_env.settings import DEFAULTS, SESSION_SETTINGS

    toy = "KuaiFair-Toy-v0"
    study = {
        "name": "all",
        "methods": ["a2c", {"name": "td3", "steps": 500, "set": {"gamma": 0.9}}, "hrl+ips", "controls"],
        "worlds": [toy],
        "max_lens": [30],
        "seeds": [0, 1],
        "control_seeds": [0],
        "n_users": 100,
        "episodes_per_user": 2,
        "session": {"repeats": "forbid", "leave": {"rule": "temper", "ad_bound": 0.2}, "slate_size": 5},
        "world_settings": {"response": "factorised", "positive": {"long_view": 1}},
        "sweep": {"gamma": [0.8, 0.9]},
        "purifiers": ["", "ips"],
        "own_data": {"Shop-v0": {"data": "log.csv", "columns": {"user": "uid"}, "split": "user"}},
        "randomisation": {"offset": 0.5},
    }
    shipped = [path.read_text("utf-8") for path in sorted(ROOT.glob("hrl_policies/zoo/hyperparameters/*.yml"))]
    config = json.loads(json.dumps(plan_run("a2c", toy, total_steps=128).as_dict()))
    usual = {name: DEFAULTS[name] for name in SESSION_SETTINGS}

    def written(draws: Draws, content: Any, path: Path) -> Path:
        text = content if isinstance(content, str) else yaml.safe_dump(content, allow_unicode=True)
        path.write_bytes(mutated_bytes(draws, text.encode("utf-8", "replace"), 3))
        return path

    def of_study(draws: Draws, scratch: Path) -> None:
        path = written(draws, mutated_tree(draws, study), scratch / "study.yml")
        _plan_lines(*_read_plan(str(path), False, None))

    def of_method(draws: Draws, scratch: Path) -> None:
        text = draws.of(shipped)
        content = text if draws.chance(20) else mutated_tree(draws, yaml.safe_load(text))
        read_settings(written(draws, content, scratch / "method.yml"), draws.of(("", toy)))

    def of_words(draws: Draws, _: Path) -> None:
        names = (*shipped_settings("a2c").hyperparameters, "policy_kwargs.log_std_init", "gamma.x", ".", "")
        words = [f"{draws.of(names)}={draws.scalar()}" for _ in range(1 + draws.below(3))]
        plan_run("a2c", toy, overrides=parse_overrides(words))

    def of_session(draws: Draws, _: Path) -> None:
        chosen = {draws.of(list(usual)): draws.scalar() for _ in range(1 + draws.below(3))}
        session_config(toy, chosen)
        env_kwargs([f"{name}={value}" for name, value in chosen.items()])
        leave_option(str(draws.scalar()))

    def of_run(draws: Draws, _: Path) -> None:
        with whole("config.json", "configuration", "train it again"):
            RunConfig.from_dict(mutated_tree(draws, config))

    return lambda draws, scratch: draws.of((of_study, of_study, of_method, of_words, of_session, of_run))(
        draws, scratch
    )


def command(folder: Path) -> Callable[[Draws, Path], None]:
    """Argument lists of every command; no world is made, nothing trained, no server asked."""
    import typer

    from hrl_policies.cli import main as cli
    from hrl_policies.cli.main import app
    from hrl_policies.pretrained import pretrained_agents, pretrained_folder

    def refuse(*_: Any, **__: Any) -> Any:
        raise DataError("no worlds, runs and connections here")

    for place in (
        "kuaifair_env.registration._cached_world",
        "hrl_policies.study.runs.run_study",
        "hrl_policies.study.engines.RayEngine",
        "kuaifair_env.data.official.download",
    ):
        module, _, name = place.rpartition(".")
        setattr(__import__(module, fromlist=[name]), name, refuse)
    commands: list[tuple[tuple[str, ...], list[Any]]] = []

    def collect(words: tuple[str, ...], found: Any) -> None:
        commands.append((words, found.params))
        for name, inner in getattr(found, "commands", {}).items():
            collect((*words, name), inner)

    collect((), typer.main.get_command(app))
    agent = pretrained_folder(pretrained_agents()[0])
    (folder / "log.csv").write_text("user_id,item_id,click,time\n1,2,1,5\n1,3,0,6\n2,2,0,7\n", "utf-8")
    (folder / "study.yml").write_text("name: s\nmethods: [a2c]\nworlds: [KuaiFair-Toy-v0]\nseeds: [0]\n", "utf-8")
    shutil.copytree(agent, folder / "store" / "run")
    write_kuairec(folder / "kuairec")
    words = (*pretrained_agents(), "KuaiFair-Toy-v0", "a2c", "dsrm-hrl", "random", "paper", "kuairec", "profile", "3,7")
    words += (
        "gamma=0.5",
        "ad_bound=0.2",
        "user=uid,item=x",
        "strict",
        "{rule: temper}",
        "temper:ad_bound=x",
        "long_view",
    )
    words += tuple(str(folder / name) for name in ("log.csv", "study.yml", "store", "store/run", "kuairec", "", "none"))
    words += (str(agent / "purifier.safetensors"), str(agent / "model.zip"), "a file.json", "out.html")

    def options(parameter: Any) -> list[str]:
        found = get_args(parameter.type_descriptor.annotation)
        return [str(option) for option in found for option in get_args(option) or (option,) if isinstance(option, str)]

    def run(draws: Draws, scratch: Path) -> None:
        chosen, parameters = draws.of(commands)
        arguments = list(chosen)
        for parameter in parameters:
            needed = parameter.required or parameter.param_type_name == "argument"
            if not draws.chance(85 if needed else 12):
                continue
            choices = (*options(parameter), *words, "1", "0")
            option = [draws.of(parameter.opts)] if parameter.param_type_name == "option" else []
            value = draws.of(choices) if draws.chance(80) else draws.scalar()
            arguments += option + ([] if getattr(parameter, "is_flag", False) else [str(value)])
        if draws.chance(10):
            arguments.insert(draws.below(len(arguments) + 1), str(draws.scalar()))
        ended(arguments, scratch)

    def ended(arguments: list[str], scratch: Path) -> None:
        out, errors, before = io.StringIO(), io.StringIO(), os.getcwd()
        os.chdir(scratch)
        code: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
                cli.main([word.encode("utf-8", "replace").decode("utf-8") for word in arguments])
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(before)
        said = re.sub("INFO: Instrumenting.*\n", "", errors.getvalue())
        assert code in (0, 1, 2, None), f"exit code {code} of {arguments}: {said[-500:]}"
        assert "Traceback" not in said and "for a report" not in said, f"{arguments}: {said[-500:]}"
        lines = said.strip().splitlines()
        assert code in (0, None, 2) or len(lines) <= 3, f"several lines, {arguments}: {said[-700:]}"

    return run


def downloads(folder: Path) -> Callable[[Draws, Path], None]:
    """Answers of servers, byte by byte, below Python's own HTTP client."""
    from kuaifair_env.data import download as module

    answers: list[bytes] = []
    clock = [0.0]

    class Connection:
        """A socket that gives an answer in pieces."""

        def __init__(self) -> None:
            self._answer = io.BytesIO(answers.pop(0) if answers else b"")

        def makefile(self, *_: Any, **__: Any) -> io.BufferedReader:
            return io.BufferedReader(self._answer)  # type: ignore[arg-type]

        def sendall(self, data: bytes) -> None:
            clock[0] += 1.0

        def close(self) -> None:
            pass

        settimeout = setsockopt = shutdown = lambda self, *_: None

    def connect(self: Any) -> None:
        self.sock = Connection()

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no other connections here")

    def tick() -> float:
        clock[0] += 0.5
        return clock[0]

    HTTPConnection.connect = HTTPSConnection.connect = connect  # type: ignore[method-assign]
    socket.create_connection = socket.getaddrinfo = offline
    module._PAUSE = 0.0
    module.time = type("Clock", (), {"monotonic": staticmethod(tick), "sleep": staticmethod(lambda _: None)})  # type: ignore[assignment]
    lines = (
        "200 OK",
        "206 Partial Content",
        "301 Moved",
        "302 Found",
        "307 x",
        "404 Not Found",
        "416 x",
        "500 x",
        "204 x",
        "100 Continue",
        "999 x",
        "",
    )
    lengths = (
        "5",
        "0",
        "-1",
        "1e9",
        "99999999999999999999",
        "5, 5",
        "",
        "\u0665",
        "+5",
        "0x5",
        "5\r\nContent-Length: 7",
    )
    headers = {
        "Content-Length": lengths,
        "Content-Range": ("bytes 0-4/5", "bytes 5-9/10", "bytes 5-", "bytes */5", "items 1-2", "bytes 3-4/5", ""),
        "Transfer-Encoding": ("chunked", "gzip, chunked", "identity", "CHUNKED", "x"),
        "Content-Encoding": ("identity", "gzip", "br", "", "Identity"),
        "Location": (
            "/b",
            "http://a/b",
            "//",
            "http://[",
            "file:///etc/passwd",
            "ftp://a/b",
            "https://x:99999/",
            "http://a b/",
            "javascript:1",
            "http://a:b@c/",
            "\x00",
        ),
        "Connection": ("close", "keep-alive"),
    }

    def answer(draws: Draws) -> bytes:
        body = draws.of(
            (
                b"12345",
                b"",
                b"1234567890",
                b"5\r\n12345\r\n0\r\n\r\n",
                b"fffffffff\r\nx",
                b"-5\r\nx\r\n",
                b"5;a=b\r\n12345\r\n",
            )
        )
        head = f"HTTP/1.{draws.below(2)} {draws.of(lines)}\r\n"
        for name in sorted({draws.of(list(headers)) for _ in range(draws.below(4))}):
            head += f"{name}: {draws.of(headers[name])}\r\n"
        head += "X-A: b\r\n" * draws.of((0, 0, 0, 1, 120))
        return mutated_bytes(draws, head.encode("latin-1", "replace") + b"\r\n" + body * draws.of((1, 1, 1, 500)), 3)

    def run(draws: Draws, scratch: Path) -> None:
        answers[:] = [answer(draws) for _ in range(1 + draws.below(4))]
        size = draws.of((None, 5, 10, 0))
        target = scratch / "archive"
        if draws.chance(30):
            target.write_bytes(b"12345")
        url = draws.of(
            (
                "http://a/b",
                "https://a/b",
                "http://a:x/",
                "http://[::1",
                "http://",
                "http://a/\n",
                "http://é/",
                "http://a/é b",
            )
        )
        url = url if draws.chance(20) else "http://a/b"
        try:
            module.download(url, target, size=size, retries=draws.below(3), timeout=3.0)
        except ValueError as error:
            if url != "http://a/b" and str(error).startswith("an address begins"):
                return
            raise
        assert size is None or target.stat().st_size == size, "a file of another size was taken"

    return run


TARGETS = {target.__name__: target for target in (logs, artifacts, settings, command, downloads)}
ALLOWED: dict[str, tuple[type[Exception], ...]] = {
    "logs": (DataError,),
    "artifacts": (ArtifactError,),
    "settings": (KuaiFairError, ValueError),
    "command": (),
    "downloads": (DataError,),
}
LISTS = (SettingsError, StudyError)
"""Errors that name several problems, a line each."""
