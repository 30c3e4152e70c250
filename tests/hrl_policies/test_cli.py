"""The command line: what people type works."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import get_args

import official_files as official
import pytest
from small_worlds import small_pair
from stable_baselines3 import A2C, PPO, TD3
from studies import ENV, TRAIN

import kuaifair_env
from dsrm import encoder
from dsrm.baselines import NoisePurifier
from dsrm.purifier import save_purifier
from hrl_policies.cli import purifiers
from hrl_policies.study import load_run
from hrl_policies.worlds import purified_sessions
from hrl_policies.zoo import METHODS, MethodSettings, all_methods, load_settings
from kuaifair_env.abandonment import TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data import load_kuairand
from kuaifair_env.data.cache import cached_entries
from kuaifair_env.files import write_checksums
from kuaifair_env.settings import SETTINGS

QUICK = ["--rounds", "1", "--examples", "500", "--no-progress"]


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "hrl_policies.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("kuaifair ")


def test_choices_are_those_of_the_library():
    assert get_args(purifiers.EncoderKind) == get_args(encoder.EncoderKind)


def test_version(kuaifair):
    code, out, _ = kuaifair("--version")
    assert code == 0 and out.startswith("kuaifair ")


def test_envs_and_methods_are_listed_whole(kuaifair):
    code, out, _ = kuaifair("envs")
    assert code == 0 and "KuaiFair-KuaiRandTwin-v0" in out
    code, out, _ = kuaifair("methods")
    assert code == 0
    for word in ("recurrent-ppo", "quality-oracle", "privileged", "ICML 2018", "the leave rule's bound"):
        assert word in out


@pytest.mark.usefixtures("small_worlds")
def test_train_then_evaluate_reproduces_the_result(kuaifair, tmp_path):
    code, out, err = kuaifair(*TRAIN, "--output", "run", "--max-len", "20", "--set", "n_steps=4")
    assert code == 0, err
    assert "Max Len 20" in out and "Run folder: run" in out and "Made by: kuaifair train --method a2c" in out
    stored = load_run(tmp_path / "run")
    assert stored.config.hyperparameters["n_steps"] == 4
    assert stored.config.world_settings == {"source": "auto", "response": "auto"}
    code, out, _ = kuaifair("evaluate", "run", "--no-progress")
    assert code == 0 and "Reproduces result.json exactly" in out


@pytest.mark.usefixtures("small_worlds")
def test_evaluate_says_when_a_result_does_not_come_out(kuaifair, tmp_path):
    kuaifair("train", "-m", "random", "-e", "KuaiFair-Toy-v0", "-o", "run", "--no-progress")
    path = tmp_path / "run/result.json"
    content = json.loads(path.read_text())
    content["summary"]["len"] += 1.0
    path.write_text(json.dumps(content))
    write_checksums(path.parent)
    code, out, _ = kuaifair("evaluate", "run", "--no-progress")
    assert code == 1 and "len: stored" in out


@pytest.mark.usefixtures("small_worlds")
def test_evaluate_on_other_sessions_does_not_compare(kuaifair):
    kuaifair("train", "-m", "random", "-e", "KuaiFair-Toy-v0", "-o", "run", "--no-progress")
    code, out, _ = kuaifair("evaluate", "run", "--n-users", "5", "--episodes-per-user", "3", "--no-progress")
    assert code == 0 and "5 held-out users, 3 session(s)" in out and "Reproduces" not in out
    third, first = (int(load_run("run").sessions()[row]["user_id"]) for row in (2, 0))
    code, out, _ = kuaifair("evaluate", "run", "--users", f"{third},{first}", "--no-progress")
    assert code == 0 and "2 held-out users, 1 session(s)" in out
    for given, message in (
        (("--users", "3,x"), "user ids of small are integers"),
        (("--users", f"{first},999"), "user 999 has no sessions"),
        (("--users", f"{first}", "--n-users", "2"), "not both"),
    ):
        code, _, err = kuaifair("evaluate", "run", *given, "--no-progress")
        assert code == 2 and message in err


def test_what_counts_as_a_click_is_chosen_and_kept_with_the_run(kuaifair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--n-users", "30", "--no-progress"]
    code, _, err = kuaifair(*common, "-o", "run", "--positive", "is_click", "--positive", "is_like=2")
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["world_settings"]["positive"] == {"is_click": 1.0, "is_like": 2.0}
    code, out, err = kuaifair("evaluate", "run", "--no-progress")
    assert code == 0 and "Reproduces result.json exactly." in out, err
    for options, message in (
        (["--positive", "watch_ratio=1"], "a click of KuaiRand is"),
        (["--positive", "is_like=often"], "NAME=NUMBER"),
        (["--feedback", "watch_ratio"], "settings of KuaiRec"),
    ):
        code, _, err = kuaifair(*common, "-o", "other", *options)
        assert code == 2 and message in err


def test_how_far_training_users_deviate_is_chosen_and_kept_with_the_run(kuaifair, small_worlds, tmp_path):
    for number, (option, setting) in enumerate((("none", None), ("{offset: 2}", {"offset": 2.0, "noise": 0.5}))):
        code, _, err = kuaifair(*TRAIN, "--n-users", "3", "-o", f"run{number}", "--randomisation", option)
        assert code == 0, err
        stored = load_run(tmp_path / f"run{number}")
        for described in (stored.config.as_dict()["randomisation"], stored.provenance.get("randomisation")):
            assert described is None if setting is None else described.items() >= setting.items()
    code, _, err = kuaifair(*TRAIN, "-o", "other", "--randomisation", "{ofset: 1}")
    assert code == 2 and "randomisation has no ofset; it has offset, vector" in err


def test_every_setting_of_an_environment_can_be_given_and_is_kept_with_the_run(kuaifair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--n-users", "20", "--no-progress"]
    for number, rule in enumerate(
        ("temper:ad_bound=0.2,window=2", "{rule: temper, ad_bound: 0.2, window: 2}", "temper")
    ):
        options = ["--leave", rule, "--env-kwargs", "popularity_share=0.5", "--env-kwargs", "reward=sum"]
        options += ["--env-kwargs", "ad_bound=0.2", "--env-kwargs", "window=2"] if rule == "temper" else []
        code, _, err = kuaifair(*common, "-o", f"run{number}", *options)
        assert code == 0, err
        stored = load_run(tmp_path / f"run{number}")
        assert stored.config.session.leave == TemperFairness(ad_bound=0.2, window=2)
        assert stored.config.session.reward == "sum"
        assert stored.config.world_settings["popularity_share"] == 0.5
    code, out, err = kuaifair("evaluate", "run0", "--no-progress")
    assert code == 0 and "Reproduces result.json exactly." in out, err
    for options, message in (
        (
            ["--leave", "soon"],
            "choose from temper, strict, no_fairness, popular_only, personal (parameters: ad_bound, ",
        ),
        (["--leave", "temper:bound=1"], "has no parameter bound"),
        (["--leave", "never", "--env-kwargs", "ad_bound=0.2"], "'never' has no parameter ad_bound"),
        (["--env-kwargs", "grace=2"], "no setting 'grace'; did you mean grace_steps?"),
        (["--env-kwargs", "window"], "takes name=value"),
        (["--env-kwargs", "split=test"], "does not take split"),
        (["--env-kwargs", "window=2", "--env-kwargs", "window=3"], "gives window twice"),
    ):
        code, _, err = kuaifair(*common, "-o", "other", *options)
        assert code == 2 and message in err, err
    code, _, err = kuaifair("pretrain", "-e", "KuaiFair-Toy-v0", "-o", "other", "--env-kwargs", "max_len=3")
    assert code == 2 and "max_len is of sessions, and this command plays none" in err


def test_settings_are_listed(kuaifair):
    code, out, _ = kuaifair("envs", "--settings")
    assert code == 0
    assert all(setting.name[:8] in out for setting in SETTINGS)


@pytest.mark.usefixtures("small_worlds")
def test_without_output_runs_have_a_folder_each(kuaifair, tmp_path):
    kuaifair("train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--no-progress")
    assert load_run(tmp_path / "runs/KuaiFair-Toy-v0/random-len30-k10-seed11").complete
    code, _, err = kuaifair("train", "-m", "random", "-e", "KuaiFair-Toy-v0", "--no-progress")
    assert code == 1 and "exists already" in err


def saved_by_a_stranger(algorithm, path, purifier=None, **settings):
    """An agent that Stable-Baselines3 made, trained and saved, without anything of the zoo."""
    env = purified_sessions(small_pair().train, SessionConfig(max_len=8), 4, 0, purifier)
    agent = algorithm("MlpPolicy", env, seed=1, **settings).learn(64)
    agent.save(path)
    return agent


@pytest.mark.parametrize(
    ("name", "algorithm", "settings"),
    [("a2c", A2C, {}), ("ppo", PPO, {"n_steps": 8, "batch_size": 16}), ("td3", TD3, {"buffer_size": 100})],
)
def test_a_stable_baselines3_file_is_evaluated_and_serves_where_it_is_trusted(
    kuaifair, small_worlds, tmp_path, name, algorithm, settings
):
    agent = saved_by_a_stranger(algorithm, tmp_path / "agent.zip", **settings)
    trusted = ["agent.zip", "--trust", "--method", name, *ENV, "--env-kwargs", "max_len=8", "--no-progress"]
    code, out, err = kuaifair("evaluate", *trusted, "--n-users", "6", "--seed", "3")
    assert code == 0, err
    sessions = purified_sessions(small_pair().test, SessionConfig(max_len=8), 6, 0, None)
    assert out.strip() == kuaifair_env.evaluate(agent, sessions, n_users=6, seed=3).table()
    if name == "a2c":
        code, out, err = kuaifair("serve", *trusted, "--sessions", "20", "--orders", "1", "--n-envs", "4")
        assert code == 0 and "learning: gradient" in out, err


def test_a_trusted_file_must_fit_worlds_method_and_purifier(kuaifair, small_worlds, tmp_path):
    purifier = NoisePurifier(1.0)
    save_purifier(purifier, tmp_path / "noise.safetensors")
    saved_by_a_stranger(A2C, tmp_path / "observed.zip")
    broken = saved_by_a_stranger(A2C, tmp_path / "purified.zip", purifier)
    next(broken.policy.parameters()).data.fill_(float("nan"))
    broken.save(tmp_path / "broken.zip")
    common = [*ENV, "--trust", "--env-kwargs", "max_len=8", "--no-progress"]
    of_states = ["--method", "a2c", "--purifier", "noise.safetensors"]
    code, _, err = kuaifair("evaluate", "purified.zip", *common, *of_states)
    assert code == 0, err
    for exit_code, arguments, words in (
        (1, ["observed.zip", *common, *of_states], "Observation spaces do not match"),
        (1, ["purified.zip", *common, "--method", "a2c"], "Observation spaces do not match"),
        (1, ["observed.zip", *common, "--method", "td3"], "observed.zip does not hold td3"),
        (1, ["broken.zip", *common, *of_states], "holds NaN or infinity"),
        (1, ["nowhere.zip", *common, "--method", "a2c"], "nowhere.zip is no file"),
        (2, ["observed.zip", *common, "--method", "random"], "random is a control"),
        (2, ["observed.zip", *common], "--trust needs --method and --env"),
        (2, ["observed.zip", *ENV], "--trust"),
    ):
        for command in ("evaluate", "serve"):
            code, _, err = kuaifair(command, *arguments)
            assert code == exit_code and words in err and len(err.splitlines()) == 1, err


def test_a_run_folder_holds_a_file_that_stable_baselines3_and_its_zoo_load(kuaifair, small_worlds):
    code, _, err = kuaifair(*TRAIN, "--output", "run", "--max-len", "8")
    assert code == 0, err
    stored, sessions = load_run("run"), purified_sessions(small_pair().test, SessionConfig(max_len=8), 4, 0, None)
    # The zoo's enjoy script replaces these three, which it does not need.
    replaced = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    for options in ({}, {"env": sessions, "custom_objects": replaced}):
        agent = A2C.load("run/model.zip", device="cpu", **options)
        figures = kuaifair_env.evaluate(agent, sessions, n_users=stored.config.n_users).summary()
        assert figures["r_cum"] == stored.summary["r_cum"]


def test_every_method_has_a_line_that_lines_up_under_its_family(kuaifair):
    code, out, _ = kuaifair("methods")
    assert code == 0
    lines = out.splitlines()
    starts = [lines[0].index(word) for word in ("title", "kind", "acts by", "purifier")]
    family = ""
    found = {}
    for line in lines[1:]:
        if line and not line.startswith(" "):
            family = line
        elif line.startswith("  ") and not line.startswith("   "):
            cells = [line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
            found[cells[0]] = (family, *cells[1:])
    assert found == {
        spec.name: (
            spec.family,
            spec.title,
            f"{spec.kind}, privileged" if spec.privileged else spec.kind,
            spec.action_mode,
            spec.purifier or "-",
        )
        for spec in all_methods().values()
    }
    assert max(map(len, lines)) <= 120


def test_the_list_keeps_where_methods_come_from_and_what_they_see(kuaifair):
    _, out, _ = kuaifair("methods")
    words = " ".join(out.split())
    for spec in METHODS.values():
        # A line may be broken at blanks and hyphens.
        assert spec.sees in words
        assert spec.reference.replace(" ", "") in words.replace(" ", "")


def test_one_method_is_shown_whole(kuaifair):
    code, out, _ = kuaifair("methods", "dsrm-hrl")
    words = " ".join(out.split())
    assert code == 0
    for text in (
        METHODS["dsrm-hrl"].reference,
        METHODS["dsrm-hrl"].sees,
        "purifier candidates",
        "total_steps 150000",
        "hierarchy.manager learned",
        "learning_rate 0.0001 to 0.01, log",
        "n_epochs 1 to 8, whole numbers",
        "slot_credit one of 0.0, 0.5, 1.0",
    ):
        assert text in words
    _, out, _ = kuaifair("methods", "oracle")
    assert "knows the test world's truth" in out and "hyperparameters" not in out


def test_a_method_without_a_search_space_says_so(kuaifair, monkeypatch):
    bare = replace(METHODS["a2c"], name="bare", settings=MethodSettings(hyperparameters={"gamma": 0.9}))
    monkeypatch.setitem(METHODS, "bare", bare)
    _, out, _ = kuaifair("methods", "bare")
    assert "kuaifair tune cannot search" in out


def test_json_holds_the_same_for_programs(kuaifair):
    _, out, _ = kuaifair("methods", "--json")
    content = {entry["name"]: entry for entry in json.loads(out)}
    assert list(content) == list(all_methods())
    assert content["oracle"]["privileged"] and "settings" not in content["oracle"]
    settings = content["a2c"]["settings"]
    assert settings["hyperparameters"] == load_settings("a2c").hyperparameters
    assert settings["search"]["learning_rate"] == {"log": [0.0001, 0.01]}
    _, out, _ = kuaifair("methods", "a2c", "--json")
    assert json.loads(out) == content["a2c"]


def test_settings_of_one_environment_are_shown_when_asked_for(kuaifair):
    toy = "KuaiFair-Toy-v0"
    there, elsewhere = load_settings("a2c", toy), load_settings("a2c")
    assert there.hyperparameters["gamma"] != elsewhere.hyperparameters["gamma"]
    _, out, _ = kuaifair("methods", "a2c")
    assert f"gamma {elsewhere.hyperparameters['gamma']}" in " ".join(out.split())
    assert f"Settings of their own (--env shows them): {toy}" in out
    _, out, _ = kuaifair("methods", "a2c", "--env", toy)
    assert f"trained with, in {toy}" in out
    assert f"gamma {there.hyperparameters['gamma']}" in " ".join(out.split())
    _, out, _ = kuaifair("methods", "a2c", "--env", toy, "--json")
    content = json.loads(out)
    assert content["settings"] == there.as_dict() and content["worlds_with_settings"] == [toy]
    code, _, err = kuaifair("methods", "a2c", "--env", "KuaiFair-Toy")
    assert code == 2 and "no environment is called 'KuaiFair-Toy'; there are " in err and toy in err


@pytest.mark.usefixtures("small_worlds")
def test_ope_estimates_the_first_slate_from_the_log_and_warns_where_it_is_not_random(kuaifair):
    kuaifair(*TRAIN, "--output", "run", "--max-len", "20", "--set", "n_steps=4")
    code, out, err = kuaifair("ope", "run", "--no-progress")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if line.split()[0] in ("rejection", "ips", "snips", "dr")]
    assert [row[0] for row in rows] == ["rejection", "ips", "snips", "dr"]
    lines = [line for line in out.splitlines() if line.split()[0] in ("rejection", "ips", "snips", "dr")]
    assert len({line.index("[") for line in lines}) == 1
    assert "900 random rows of 15 users" in out and "does not look as random" in err and "Traceback" not in err
    code, out, _ = kuaifair("ope", "run", "--estimator", "snips", "--rate-factor", "0.5", "--no-progress")
    assert float(out.splitlines()[-1].split()[1]) == pytest.approx(float(rows[2][1]) / 2, abs=1e-4)
    for given, message in (
        (("run", "--estimator", "dm"), "--estimator is one of rejection, ips, snips, dr, got dm"),
        (("nowhere",), "no run folder nowhere"),
        (("run", "--rate-factor", "0"), "rate_factor must lie in (0, 1], got 0"),
    ):
        code, _, err = kuaifair("ope", *given, "--no-progress")
        assert code == (1 if given == ("nowhere",) else 2)
        assert message in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("worlds_of_taste")
def test_pretrain_reports_what_it_made_and_probe_measures_it(kuaifair, tmp_path):
    code, out, err = kuaifair("pretrain", *ENV, "--mode", "regression", "--output", "made/r.safetensors", *QUICK)
    assert code == 0, err
    assert "held out for early stopping" in out and "unread" in out and "hash" in out
    assert not (tmp_path / "made/r.safetensors.partial").exists()
    code, out, err = kuaifair("probe", "made/r.safetensors", *ENV, "--output", "probes")
    assert code == 0, err
    assert "AUC within users" in out and "[95 % bootstrap over users]" in out
    content = json.loads((tmp_path / "probes/probes.json").read_text())
    assert set(content["purifiers"]) == {"raw", "r"}
    for name in ("states.png", "counts_and_rates.png"):
        assert (tmp_path / "probes" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("worlds_of_taste")
def test_a_noise_control_takes_its_size_from_a_purifier(kuaifair):
    kuaifair("pretrain", *ENV, "--mode", "ips", "-o", "ips.safetensors")
    code, out, err = kuaifair(
        "pretrain", *ENV, "--mode", "noise", "--like", "ips.safetensors", "-o", "noise.safetensors"
    )
    assert code == 0 and "noise" in out, err


@pytest.mark.usefixtures("worlds_of_taste")
def test_encode_says_how_far_it_came(kuaifair, tmp_path):
    code, out, err = kuaifair("encode", *ENV, "-o", "e.safetensors", "--steps", "60", "--no-progress")
    assert code == 0, err
    assert "validation loss" in out and (tmp_path / "e.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("small_worlds")
def test_the_demo_shows_agents_beside_controls_and_says_what_that_means(kuaifair, tmp_path, monkeypatch):
    import hrl_policies.cli.demo as demo

    monkeypatch.setattr(demo, "load_worlds", lambda env_id: small_pair(name=env_id))
    code, out, err = kuaifair("demo", "--steps", "128", "--output", "kept", "--no-progress")
    assert code == 0, err
    names = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│") and line[2] != " "]
    assert names == [
        "Random", "GreedyCTR", "A2C", "QuotaGreedy", "SessionQuota", "BeliefQuota", "HRL", "DSRM-HRL", "Oracle",
    ]  # fmt: skip
    for column in ("Len", "R_each", "R_cum", "AD", "violations"):
        assert f"\n{column}: " in out
    for number in range(1, 12):
        assert f"\n({number} of 11) " in out
    scores = {
        cells[1].strip(): float(cells[4])
        for line in out.splitlines()
        if (cells := line.split("│"))[1:2] and cells[1].strip() in names
    }
    last = out.splitlines()[-1]
    assert last.startswith(f"DSRM-HRL stands at R_cum {scores['DSRM-HRL']:.2f}, one seed: ")
    assert last.endswith(f"the Oracle has {scores['Oracle']:.2f}.")
    for name in set(names) - {"DSRM-HRL", "Oracle"}:
        assert f"{name} ({scores[name]:.2f})" in last
        if scores[name] != scores["DSRM-HRL"]:
            side = "behind" if scores[name] > scores["DSRM-HRL"] else "ahead of"
            (part,) = [part for part in last.split("; ") if f"{name} (" in part]
            assert side in part
    assert "What it does not show" in out
    assert len(list((tmp_path / "kept").glob("KuaiFair-Toy-v0/*/result.json"))) == len(names)
    assert (tmp_path / "kept/kuaifair-demo.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "kept/kuaifair-demo-session.html").read_text(encoding="utf-8")
    assert "<h2>GreedyCTR</h2>" in page and "<h2>DSRM-HRL</h2>" in page


@pytest.mark.usefixtures("small_worlds")
def test_show_writes_a_page_of_one_session_and_names_what_does_not_fit(kuaifair, tmp_path):
    for name, options in {"greedy-ctr": [], "quota-greedy": [], "oracle": ["--max-len", "7"]}.items():
        arguments = ["--method", name, "--env", "KuaiFair-Toy-v0", "--output", name, "--no-progress", *options]
        assert kuaifair("train", *arguments)[0] == 0
    code, out, err = kuaifair("show", "greedy-ctr", "--beside", "quota-greedy")
    assert code == 0, err
    page = next(tmp_path.glob("session-*.html"))
    assert page.name in out and "QuotaGreedy" in page.read_text(encoding="utf-8")
    code, _, err = kuaifair("show", "greedy-ctr", "--user", "999999")
    assert code == 2 and err.startswith("error: user 999999 has no sessions in the test world")
    code, _, err = kuaifair("show", "greedy-ctr", "--beside", "oracle")
    assert code == 2 and "differ in world, Max Len" in err and len(err.splitlines()) == 1


# ---------------------------------------------------------------- data sets


@pytest.mark.usefixtures("own_cache")
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


@pytest.mark.usefixtures("own_cache")
def test_check_recognises_kuairand(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    code, out, err = kuaifair("data", "check", tmp_path / "made")
    assert code == 0, err
    assert "KuaiRand-Pure" in out


@pytest.mark.usefixtures("own_cache")
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
        assert code == 1 and "not the expected archive" in err
        server.shutdown()
    assert list((tmp_path / "b").iterdir()) == []
    archive = tmp_path / "cache" / "downloads" / "KuaiRand-Pure.tar.gz"
    code, out, _ = kuaifair("data", "info")
    assert code == 0 and archive.name in out and "kuaifair data fetch kuairec" in out
    assert kuaifair("data", "check", archive)[0] == 0


@pytest.mark.usefixtures("own_cache")
def test_info_lists_what_the_cache_holds(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    data = load_kuairand(tmp_path / "made")
    code, out, err = kuaifair("data", "info", "--data-dir", tmp_path / "made")
    assert code == 0, err
    assert data.data_hash in out and "partial" in out


@pytest.mark.usefixtures("own_cache")
def test_clean_lists_what_it_deletes_and_asks(kuaifair, tmp_path):
    official.write_kuairand(tmp_path / "made")
    load_kuairand(tmp_path / "made")
    (entry,) = cached_entries()
    code, out, err = kuaifair("data", "clean", "--only", "responses")
    assert code == 0 and "nothing to delete" in out, err
    code, out, err = kuaifair("data", "clean")
    assert code != 0 and entry.name[:12] in out and entry.exists()  # nobody said yes
    code, out, err = kuaifair("data", "clean", "--yes")
    assert code == 0 and "deleted 1 entries" in out, err
    assert not entry.exists()
