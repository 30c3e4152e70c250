"""Confirmation: what a search found meets what it started from, with new seeds and all steps; the better is kept."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from worlds_for_tests import small_pair

import hrl_policies.study.confirmation as confirmation
import hrl_policies.study.tuning as tuning
from hrl_policies.study import plan_run, train
from hrl_policies.study.confirmation import confirm, confirmation_run, planned_runs
from hrl_policies.study.tuning import TuningPlan, tune, validation_pair
from hrl_policies.zoo import load_settings, read_settings
from kuaifair_env.errors import ArtifactError

pytest.importorskip("optuna")

PLAN = TuningPlan("a2c", "small", total_steps=128, episodes_per_user=2)


@pytest.fixture
def world():
    return small_pair().train


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
    monkeypatch.setattr(confirmation, "train_and_score", made.run)
    return made


def table(folder):
    with (folder / "confirmation.csv").open() as stream:
        return list(csv.DictReader(stream))


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
    assert [row["seed"] for row in table(tmp_path / "search")] == ["6", "6", "7", "7", "8", "8"]


def test_what_does_not_hold_up_is_not_kept(world, fake, tmp_path):
    fake.agrees = False
    search = tune(PLAN, world, 12, tmp_path / "search")
    result = confirm(search, world, 2)
    assert result.kept == "start"
    assert (
        read_settings(tmp_path / "search/confirmed.yml").hyperparameters
        == load_settings("a2c").hyperparameters
    )


def test_an_interrupted_confirmation_goes_on_and_a_damaged_one_is_refused(world, fake, monkeypatch, tmp_path):
    search = tune(PLAN, world, 8, tmp_path / "search")
    run = confirmation.train_and_score

    def interrupted(*arguments):
        if len(fake.runs) == 3:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(confirmation, "train_and_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        confirm(search, world, 3)
    assert len(table(tmp_path / "search")) == 3
    monkeypatch.setattr(confirmation, "train_and_score", run)
    result = confirm(search, world, 3)
    assert len(fake.runs) == 6 and len(result.runs) == 6
    assert confirm(search, world, 3).runs == result.runs and len(fake.runs) == 6
    kept = (tmp_path / "search/confirmed.yml").read_text()
    tune(PLAN, world, 8, tmp_path / "search")
    assert (tmp_path / "search/confirmed.yml").read_text() == kept
    assert len(confirm(search, world, 4).runs) == 8 and len(fake.runs) == 8
    path = tmp_path / "search/confirmation.csv"
    path.write_text(path.read_text().replace("seed", "sowing"))
    with pytest.raises(ArtifactError, match=r"confirmation\.csv is damaged"):
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
    run = replace(planned_runs(replace(search, trials=[search.trials[0], best]), 1)[1], steps=128)
    pair = validation_pair(world, "small")
    config = plan_run(
        "a2c", "small", seed=1, total_steps=128, users=500, episodes_per_user=2, overrides=run.values
    )
    assert run.side == "found" and run.seed == 1
    assert (
        confirmation_run(search, run, pair, None).score == train(config, pair).evaluation.summary()["r_cum"]
    )
