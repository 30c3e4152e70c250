"""Tuning: equal budgets, validation users of the training world, searches that go on, and their confirmation."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import math
import os
import pickle
import signal
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from damage import with_bits_flipped
from small_worlds import small_pair

import hrl_policies.study.loading as loading
import hrl_policies.study.runner as runner
import hrl_policies.study.tuning as tuning
from dsrm.baselines import IPSPurifier
from dsrm.purifier import save_purifier
from hrl_policies.study import plan_run, train
from hrl_policies.study.tuning import (
    TuningPlan,
    confirm,
    confirmation_run,
    confirmation_runs,
    tune,
    validation_pair,
)
from hrl_policies.zoo import load_settings, read_settings
from kuaifair_env.errors import ArtifactError, DataError, KuaiFairError
from kuaifair_env.files import with_checksum

pytest.importorskip("optuna")

PLAN = TuningPlan("a2c", "small", total_steps=128, episodes_per_user=2)


@pytest.fixture
def world():
    return small_pair().train


@pytest.fixture
def quick(monkeypatch):
    """Scores by a closed form instead of training: best with a learning rate of 0.003."""
    made = []

    def score(plan, pair, purifier, proposal, progress):
        made.append(proposal.values)
        return 5.0 - math.log10(proposal.values["learning_rate"] / 0.003) ** 2

    monkeypatch.setattr(tuning, "_score", score)
    return made


def table(folder, name="trials.csv"):
    with (folder / name).open() as stream:
        return list(csv.DictReader(stream))


def outcome(result):
    return [(trial.number, trial.values, trial.score, trial.error) for trial in result.trials]


def test_validation_users_are_a_fifth_of_the_training_users_and_kept_out_of_training(world):
    pair = validation_pair(world, "small")
    assert len(pair.test.users) == len(world.users) // 5
    assert not set(pair.train.users) & set(pair.test.users)
    assert set(pair.train.users) | set(pair.test.users) == set(world.users)
    assert pair.test.response is pair.train.response is world.response
    np.testing.assert_array_equal(validation_pair(world, "again").test.users, pair.test.users)


def test_only_training_worlds_with_enough_users_are_tuned_in(world):
    with pytest.raises(DataError, match="tuned in the training world, got the test world"):
        validation_pair(small_pair().test, "small")
    with pytest.raises(DataError, match="at least 10 users"):
        validation_pair(replace(world, users=world.users[:9]), "small")


def test_training_meets_no_validation_user_and_evaluation_meets_no_other(world, monkeypatch, tmp_path):
    pair, seen, met = validation_pair(world, "small"), set(), {}
    original, evaluate_run = world.response.expected, runner.evaluate_run

    def expected(users, items, history=None):
        seen.update(users.tolist())
        return original(users, items)

    def evaluated(*arguments, **options):
        met["training"] = set(seen)
        seen.clear()
        found = evaluate_run(*arguments, **options)
        met["evaluation"] = set(seen)
        return found

    monkeypatch.setattr(world.response, "expected", expected)
    monkeypatch.setattr(runner, "evaluate_run", evaluated)
    tune(PLAN, world, 1, tmp_path / "search")
    assert met["training"] and met["training"] <= set(pair.train.users)
    assert met["evaluation"] == set(pair.test.users)


def test_the_first_trial_is_that_of_the_shipped_settings_and_scored_as_a_run_is(world, tmp_path):
    result = tune(PLAN, world, 1, tmp_path / "search")
    config = plan_run("a2c", "small", seed=0, total_steps=128, n_users=500, episodes_per_user=2)
    expected = train(config, validation_pair(world, "small")).evaluation.summary()["r_cum"]
    assert result.trials[0].score == expected
    shipped = load_settings("a2c").hyperparameters
    assert result.trials[0].values["learning_rate"] == shipped["learning_rate"]
    assert result.trials[0].values["policy_kwargs.log_std_init"] == shipped["policy_kwargs"]["log_std_init"]


def test_the_score_of_several_runs_is_their_mean(world, tmp_path):
    single = [tune(replace(PLAN, seed=seed), world, 1, tmp_path / f"seed{seed}").trials[0].score for seed in (3, 4)]
    both = tune(replace(PLAN, seed=3, runs=2), world, 1, tmp_path / "both").trials[0].score
    assert single[0] != single[1]
    assert both == pytest.approx(np.mean(single))


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(world, quick, tmp_path):
    first, second = (tune(PLAN, world, 12, tmp_path / name) for name in ("first", "second"))
    assert outcome(first) == outcome(second)
    other = tune(replace(PLAN, seed=1), world, 4, tmp_path / "other")
    assert outcome(first)[0] == outcome(other)[0]
    assert all(a.values != b.values for a, b in zip(first.trials[1:4], other.trials[1:], strict=True))


def test_every_proposal_lies_in_the_space_and_the_search_finds_the_optimum(world, quick, tmp_path):
    result = tune(PLAN, world, 30, tmp_path / "search")
    space = load_settings("a2c").search
    for values in quick:
        assert set(values) == set(space)
        assert all(space[name].contains(value) for name, value in values.items())
    assert 0.0015 < result.best.values["learning_rate"] < 0.006
    assert result.best.score == max(trial.score for trial in result.trials) > result.trials[0].score


@pytest.mark.parametrize("stop", [0, 11])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(world, quick, monkeypatch, tmp_path, stop):
    whole = tune(PLAN, world, 13, tmp_path / "whole")
    score = tuning._score

    def interrupted(plan, pair, purifier, proposal, progress):
        if proposal.number == stop:
            raise KeyboardInterrupt
        return score(plan, pair, purifier, proposal, progress)

    monkeypatch.setattr(tuning, "_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(PLAN, world, 13, tmp_path / "parts")
    monkeypatch.setattr(tuning, "_score", score)
    # As if the process had been killed while it wrote, once more.
    with (tmp_path / "parts/trials.jsonl").open("a") as stream:
        stream.write('{"op_code":5,"wor')
    assert outcome(tune(PLAN, world, 13, tmp_path / "parts")) == outcome(whole)
    rows = [[{**row, "seconds": ""} for row in table(tmp_path / name)] for name in ("whole", "parts")]
    assert rows[0] == rows[1] and len(rows[0]) == 13
    assert (tmp_path / "whole/best.yml").read_text() == (tmp_path / "parts/best.yml").read_text()


@pytest.mark.parametrize("write", [0, 1, 4])
def test_a_full_disk_names_the_journal_and_the_search_goes_on_afterwards(world, quick, monkeypatch, tmp_path, write):
    writes = itertools.count()

    def full(descriptor):
        if next(writes) == write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left on device: '.*trials\.jsonl'$"):
        patch.setattr(os, "fsync", full)
        tune(PLAN, world, 2, tmp_path / "search")
    assert len(tune(PLAN, world, 2, tmp_path / "search").trials) == 2


def test_more_trials_extend_a_search_and_fewer_change_nothing(world, quick, tmp_path):
    short = tune(PLAN, world, 3, tmp_path / "search")
    extended = tune(PLAN, world, 6, tmp_path / "search")
    assert outcome(extended)[:3] == outcome(short) and len(extended.trials) == 6
    assert outcome(tune(PLAN, world, 2, tmp_path / "search")) == outcome(extended)
    assert len(quick) == 6


def _with(record, name, value):
    """A record of a journal with an attribute of the search or of a trial replaced, or under another name."""
    for attributes in (record.get("user_attr", {}),):
        if name in attributes:
            attributes["other" if value is None else name] = attributes.pop(name) if value is None else value
    return record


def test_a_folder_belongs_to_one_search(world, quick, tmp_path):
    tune(PLAN, world, 1, tmp_path / "search")
    with pytest.raises(ArtifactError, match=r"another search \(episodes_per_user, seed differ\)"):
        tune(replace(PLAN, seed=5, episodes_per_user=1), world, 1, tmp_path / "search")
    with pytest.raises(ArtifactError, match=r"\(settings differ\)"):
        tune(replace(PLAN, total_steps=256), world, 1, tmp_path / "search")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/best.yml").write_text("precious")
    with pytest.raises(ArtifactError, match="holds no search"):
        tune(PLAN, world, 1, tmp_path / "other")
    path = tmp_path / "search/trials.jsonl"
    *lines, last = path.read_text().splitlines()
    unknown = json.dumps(with_checksum(json.loads(last) | {"op_code": 99}))
    of_lists = [json.dumps(with_checksum(_with(json.loads(line), "plan", [1]))) for line in lines]
    without_time = [json.dumps(with_checksum(_with(json.loads(line), "seconds", None))) for line in [*lines, last]]
    for journal, words in (
        ("no journal\n{}\n", "line 1, is not a whole record of a search"),
        ("\n".join([*lines, unknown, ""]), "is not a whole journal of trials"),
        ("\n".join([*of_lists, last, ""]), "is not a whole journal of trials"),
        ("\n".join([*without_time, ""]), "is not a whole journal of trials .*it lacks 'seconds'"),
    ):
        path.write_text(journal)
        with pytest.raises(ArtifactError, match=words):
            tune(PLAN, world, 1, tmp_path / "search")


def test_a_bit_that_changed_in_the_journal_of_a_search_is_noticed(world, quick, tmp_path):
    expected = outcome(tune(PLAN, world, 3, tmp_path / "search"))
    path = tmp_path / "search/trials.jsonl"
    whole = path.read_bytes()
    # The end of the last line is another matter: without it the line counts as half-written.
    line_ends = [place for place, byte in enumerate(whole[:-1]) if byte == ord("\n")]
    bits = [8 * line_ends[0], 8 * line_ends[-1], *np.random.default_rng(0).integers(8 * len(whole) - 8, size=100)]
    for bit in with_bits_flipped(path, bits):
        try:
            # A number may be written 1e-05 or 1E-05.
            assert outcome(tune(PLAN, world, 3, tmp_path / "search")) == expected
        except ArtifactError as error:  # noqa: PERF203
            line = whole[: bit // 8].count(b"\n") + 1
            assert str(error).startswith(f"{path}, line {line}, is not a whole record") and "\n" not in str(error)
    lines = whole.splitlines(keepends=True)
    for altered in ([*lines[:4], *lines[5:]], [*lines[:4], lines[5], lines[4], *lines[6:]], [*lines[:4], *lines[3:]]):
        path.write_bytes(b"".join(altered))
        with pytest.raises(ArtifactError, match=r"trials\.jsonl, line 5, is not a whole record"):
            tune(PLAN, world, 3, tmp_path / "search")


def test_a_trial_that_fails_counts_and_says_why_but_the_first_must_work(world, monkeypatch, tmp_path):
    def score(plan, pair, purifier, proposal, progress):
        if proposal.number != failing:
            return float(proposal.number)
        raise ValueError("the policy diverged")

    monkeypatch.setattr(tuning, "_score", score)
    failing = 2
    result = tune(PLAN, world, 4, tmp_path / "search")
    assert [trial.score for trial in result.trials] == [0.0, 1.0, None, 3.0]
    assert result.trials[2].error == "the policy diverged" and result.best.number == 3
    rows = table(tmp_path / "search")
    assert rows[2]["r_cum"] == "" and rows[2]["error"] == "the policy diverged"
    assert len(tune(PLAN, world, 4, tmp_path / "search").trials) == 4
    failing = 0
    with pytest.raises(ValueError, match="diverged"):
        tune(PLAN, world, 4, tmp_path / "first-fails")


def test_the_best_settings_are_a_settings_file(world, quick, tmp_path):
    result = tune(PLAN, world, 5, tmp_path / "search")
    path = tmp_path / "search/best.yml"
    settings = read_settings(path)
    assert settings == result.best_settings
    assert settings.search == load_settings("a2c").search
    config = plan_run("a2c", "small", settings=settings, overrides={"gamma": 0.5})
    assert config.total_steps == 128
    assert config.hyperparameters["learning_rate"] == result.best.values["learning_rate"]
    assert config.hyperparameters["gamma"] == 0.5
    with pytest.raises(ValueError, match="is a control and has no hyperparameters; got a settings file"):
        plan_run("random", "small", settings=settings)
    assert "noisy scores" in path.read_text() and f"R_cum of {result.validation_users} validation" in path.read_text()


def test_the_journal_is_json_and_reading_it_unpickles_nothing(world, quick, monkeypatch, tmp_path):
    tune(PLAN, world, 2, tmp_path / "search")
    for line in (tmp_path / "search/trials.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line), dict)

    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    assert len(tune(PLAN, world, 3, tmp_path / "search").trials) == 3


def test_purifiers_of_methods_are_pretrained_without_the_validation_users(world, monkeypatch, tmp_path):
    given = []

    def cached(world, mode, folder, progress):
        given.append((world, mode, folder))
        path = folder / "p.safetensors"
        if not path.exists():
            save_purifier(IPSPurifier(), path)
        return path

    monkeypatch.setattr(tuning, "cached_purifier", cached)
    plan = TuningPlan("flat", "small", total_steps=64, episodes_per_user=1)
    result = tune(plan, world, 1, tmp_path / "search")
    (used, mode, folder), *_ = given
    assert mode == "profile" and folder == tmp_path / "search"
    np.testing.assert_array_equal(used.users, validation_pair(world, "small").train.users)
    assert all(trial.score is not None for trial in result.trials)


def test_methods_without_a_search_space_are_refused_and_the_others_named(monkeypatch):
    with pytest.raises(ValueError, match="random is a control and has nothing to tune"):
        TuningPlan("random", "small")
    bare = replace(load_settings("tqc"), search={})
    monkeypatch.setattr(tuning, "load_settings", lambda name: bare if name == "tqc" else load_settings(name))
    with pytest.raises(ValueError, match=r"tqc say nothing about where to search; there are .*'a2c'.*'sac'"):
        TuningPlan("tqc", "small")


def test_without_optuna_the_error_names_the_extra(world, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(KuaiFairError, match=r"pip install 'kuaifair\[tune\]'"):
        tune(PLAN, world, 1, tmp_path / "search")


def log_rate(values):
    return math.log10(values["learning_rate"] / 0.003)


@dataclass
class Fake:
    """Stands in for training: trials like learning rates near 0.003, and so do the runs that confirm, or the contrary.

    Attributes:
        runs: Steps, learning rate and seed of each run that confirms.
        agrees: Whether those like what trials like.
    """

    runs: list[tuple[int, float, int]] = field(default_factory=list)
    agrees: bool = True

    def trial(self, plan, pair, purifier, proposal, progress):
        return 5.0 - log_rate(proposal.values) ** 2

    def run(self, plan, pair, purifier, values, seed, progress):
        self.runs.append((plan.total_steps, values["learning_rate"], seed))
        return (-1.0 if self.agrees else 1.0) * log_rate(values) ** 2 + 0.001 * seed


@pytest.fixture
def fake(monkeypatch):
    made = Fake()
    monkeypatch.setattr(tuning, "_score", made.trial)
    monkeypatch.setattr(tuning, "train_and_score", made.run)
    return made


def test_both_sides_train_for_all_steps_with_the_same_new_seeds(world, fake, tmp_path):
    search = tune(replace(PLAN, seed=4, runs=2), world, 12, tmp_path / "search")
    result = confirm(search, world, 3)
    shipped = load_settings("a2c")
    rates = {shipped.hyperparameters["learning_rate"], float(f"{search.best.values['learning_rate']:.2g}")}
    assert {steps for steps, _, _ in fake.runs} == {shipped.total_steps}
    assert sorted((rate, seed) for _, rate, seed in fake.runs) == sorted(
        (rate, seed) for rate in rates for seed in (6, 7, 8)
    )
    assert result.kept == "found" and np.mean(result.scores("found")) > np.mean(result.scores("start"))
    kept = read_settings(tmp_path / "search/confirmed.yml")
    assert kept == result.settings and kept.total_steps == shipped.total_steps
    assert kept.hyperparameters["learning_rate"] == float(f"{search.best.values['learning_rate']:.2g}")
    text = (tmp_path / "search/confirmed.yml").read_text()
    assert "Confirmed with 3 other seed(s)" in text and "noisy scores" not in text
    assert [row["seed"] for row in table(tmp_path / "search", "confirmation.csv")] == [
        "6",
        "6",
        "7",
        "7",
        "8",
        "8",
    ]


def test_what_does_not_hold_up_is_not_kept(world, fake, tmp_path):
    fake.agrees = False
    search = tune(PLAN, world, 12, tmp_path / "search")
    result = confirm(search, world, 2)
    assert result.kept == "start"
    assert read_settings(tmp_path / "search/confirmed.yml").hyperparameters == load_settings("a2c").hyperparameters


def test_an_interrupted_confirmation_goes_on_and_a_damaged_one_is_refused(world, fake, monkeypatch, tmp_path):
    search = tune(PLAN, world, 8, tmp_path / "search")
    run = tuning.train_and_score

    def interrupted(*arguments):
        if len(fake.runs) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(tuning, "train_and_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        confirm(search, world, 3)
    assert len(table(tmp_path / "search", "confirmation.csv")) == 3
    monkeypatch.setattr(tuning, "train_and_score", run)
    result = confirm(search, world, 3)
    assert len(fake.runs) == 6 and len(result.runs) == 6
    assert confirm(search, world, 3).runs == result.runs and len(fake.runs) == 6
    kept = (tmp_path / "search/confirmed.yml").read_text()
    tune(PLAN, world, 8, tmp_path / "search")
    assert (tmp_path / "search/confirmed.yml").read_text() == kept
    assert len(confirm(search, world, 4).runs) == 8 and len(fake.runs) == 8
    path = tmp_path / "search/confirmation.csv"
    for _ in with_bits_flipped(path, np.random.default_rng(0).integers(8 * path.stat().st_size - 8, size=50)):
        with pytest.raises(ArtifactError, match=r"confirmation\.csv is not a whole table of runs"):
            confirm(search, world, 3)


def test_a_search_that_found_nothing_better_has_nothing_to_confirm(world, monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_score", lambda plan, pair, purifier, proposal, progress: -proposal.number)
    search = tune(PLAN, world, 3, tmp_path / "search")
    assert confirm(search, world) is None and not (tmp_path / "search/confirmation.csv").exists()
    with pytest.raises(ValueError, match="at least 1 seed"):
        confirm(search, world, 0)


def test_a_run_is_scored_as_training_with_those_settings_is(world, tmp_path):
    search = tune(PLAN, world, 2, tmp_path / "search")
    best = replace(search.trials[1], score=1e9)
    run = replace(confirmation_runs(replace(search, trials=[search.trials[0], best]), 1)[1], steps=128)
    pair = validation_pair(world, "small")
    config = plan_run("a2c", "small", seed=1, total_steps=128, n_users=500, episodes_per_user=2, overrides=run.values)
    assert run.side == "found" and run.seed == 1
    assert confirmation_run(search, run, pair, None).score == train(config, pair).evaluation.summary()["r_cum"]


@pytest.fixture
def no_test_world(monkeypatch, tmp_path):
    """The training world is a small one; whoever asks for the test world, or for its log, fails."""
    import kuaifair_env.registration as registration

    world = small_pair().train

    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"tuning asked for the test log's {name}")

    name = world.data.data_hash
    world = replace(world, data=replace(world.data))
    # The data set's name in results is a hash of both logs.
    world.data.__dict__["data_hash"] = name
    object.__setattr__(world.data, "test", Forbidden())

    def make_world(env_id, split, **settings):
        assert split == "train", "tuning asked for the test world"
        return world

    monkeypatch.setattr(registration, "make_world", make_world)
    monkeypatch.setattr(loading, "load_worlds", lambda *rest: pytest.fail("tuning made both worlds"))
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(world=world)


COMMAND = ["tune", "a2c", "--env", "KuaiFair-Toy-v0", "--trials", "3", "--steps", "128", "--no-progress"]


def test_the_command_tunes_without_the_test_world_and_train_takes_what_it_found(
    kuaifair, no_test_world, monkeypatch, tmp_path
):
    code, out, err = kuaifair(*COMMAND)
    assert code == 0, err
    folder = "tuning/KuaiFair-Toy-v0/a2c-len30-seed0"
    assert "(shipped)" in out and "3 trials, 0 without a score; R_cum of 5 validation users" in out
    assert f"--settings {folder}/best.yml" in out
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    train_it = ["train", "-m", "a2c", "-e", "KuaiFair-Toy-v0", "--no-progress", "-o", "run"]
    code, out, err = kuaifair(*train_it, "--settings", f"{folder}/best.yml")
    assert code == 0, err
    kept = json.loads((tmp_path / "run/config.json").read_text())
    assert kept["hyperparameters"] == dict(read_settings(f"{folder}/best.yml").hyperparameters)
    assert kept["total_steps"] == 128


def test_ctrl_c_keeps_the_finished_trials_and_the_same_command_goes_on(kuaifair, no_test_world, monkeypatch):
    response = no_test_world.world.response
    original, calls = type(response).expected, []

    def expected(self, users, items, history=None):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, users, items, history)

    monkeypatch.setattr(type(response), "expected", expected)
    stop = -1
    kuaifair(*COMMAND[:5], "1", *COMMAND[6:], "-o", "whole")
    stop = len(calls) + 1
    calls.clear()
    code, out, _ = kuaifair(*COMMAND, "-o", "search")
    assert code == 130 and "The same command goes on" in out
    assert len(table(Path("search"))) == 1
    code, out, err = kuaifair(*COMMAND, "-o", "search")
    assert code == 0, err
    rows = table(Path("search"))
    assert [row["number"] for row in rows] == ["0", "1", "2"] and all(row["r_cum"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune", "a3c", "-e", "KuaiFair-Toy-v0"], "no method is called 'a3c'"),
        (["tune", "quota-greedy", "-e", "KuaiFair-Toy-v0"], "is a control and has nothing to tune"),
        (["tune", "a2c"], "Missing option '--env'"),
        (["tune", "a2c", "-e", "KuaiFair-Toy-v0", "--trials", "0"], "--trials"),
    ],
)
def test_bad_input_is_explained_without_a_traceback(kuaifair, no_test_world, arguments, words):
    code, out, err = kuaifair(*arguments)
    assert code == 2 and words in err and "Traceback" not in out + err
