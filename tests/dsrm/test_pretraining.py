"""Pretraining: what comes out of each mode, that it goes on after a kill, and what probes find in purified states."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import numpy as np
import pytest
from helpers import small_world
from purifiers import quick_config
from sklearn.metrics import f1_score
from small_worlds import taste_worlds

import dsrm
import kuaifair_env
from dsrm import training
from dsrm.baselines import IdentityPurifier
from dsrm.diffusion import SamplerConfig
from dsrm.model import DistillationConfig, distil
from dsrm.pretraining import PretrainConfig, example_source, noise_like, pretrain, pretrain_file
from dsrm.probe_data import KINDS, SHORT, draw_counts_and_rates, draw_states, probe_set
from dsrm.probes import RAW, macro_f1, probe, purified_states, report_table
from dsrm.purifier import BELIEF_MODES, MODES, load_purifier, propensity_weights, save_purifier
from dsrm.targets import UnbiasedTargets, sample_windows
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.observations import observed_states
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.splits import calibration_users, held_out_users

TRAIN, TEST = taste_worlds()
WINDOW = TEST.initial_history.take(TEST.users)
STATES = observed_states(TEST, WINDOW)


def purify(purifier):
    purifier.bind(TEST)
    return purifier.purify(STATES, WINDOW)


STATE_MODES = [mode for mode in MODES if mode not in BELIEF_MODES]


def mean_cosine(first, second):
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(np.mean((first * second).sum(axis=1) / norms))


def auc(states):
    """How well the cosine of state and item ranks unbiased feedback of users who were not trained on."""
    log = TEST.data.test.take(np.isin(TEST.data.test.users, TEST.users))
    users = np.searchsorted(TEST.users, log.users)
    units = TEST.embeddings / np.maximum(np.linalg.norm(TEST.embeddings, axis=1, keepdims=True), 1e-9)
    states = states / np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-9)
    return within_user_auc(users, log.clicks, np.einsum("nd,nd->n", states[users], units[log.items])).mean


@pytest.mark.parametrize("mode", STATE_MODES)
def test_every_mode_gives_a_pure_function_within_its_space(purifiers, mode):
    purifier = purifiers[mode]
    space = purifier.bind(TEST)
    purified = purify(purifier)
    assert purified.dtype == np.float32
    assert purified.shape == (len(STATES), *space.shape)
    assert all(space.contains(row) for row in purified)
    few = np.asarray([5, 2])
    np.testing.assert_allclose(purifier.purify(STATES[few], WINDOW.take(few)), purified[few], atol=1e-5)
    empty = dataclasses.replace(WINDOW, items=np.full_like(WINDOW.items, -1), clicks=np.zeros_like(WINDOW.clicks))
    assert np.isfinite(purifier.purify(np.zeros_like(STATES), empty)).all()


@pytest.mark.parametrize("mode", STATE_MODES)
def test_a_file_gives_back_the_same_purifier_bit_for_bit(purifiers, mode, tmp_path):
    save_purifier(purifiers[mode], tmp_path / "p.safetensors")
    loaded = load_purifier(tmp_path / "p.safetensors")
    np.testing.assert_array_equal(purify(loaded), purify(purifiers[mode]))
    assert loaded.describe() == purifiers[mode].describe()


def test_damaged_and_foreign_files_are_clear_errors(purifiers, tmp_path):
    path = tmp_path / "p.safetensors"
    purifiers["profile"].save(path)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="safetensors"):
            dsrm.DSRM.load(path)
    path.write_bytes(whole[:-8] + bytes(8 * [255]))
    with pytest.raises(ArtifactError, match="altered"):
        dsrm.DSRM.load(path)
    save_purifier(purifiers["ips"], path)
    with pytest.raises(ArtifactError, match="of kind 'ips', not a diffusion model"):
        dsrm.DSRM.load(path)
    with pytest.raises(ArtifactError, match="not a file"):
        load_purifier(tmp_path / "nowhere")


def test_another_world_is_refused_with_what_differs(purifiers):
    flipped = dataclasses.replace(TEST, embeddings=-TEST.embeddings)
    shorter = dataclasses.replace(TEST, embeddings=TEST.embeddings[:, :6].copy())
    for mode in ("profile", "regression", "linear_debias", "tce"):
        with pytest.raises(kuaifair_env.MismatchError, match="other item embeddings"):
            purifiers[mode].bind(flipped)
        with pytest.raises(kuaifair_env.MismatchError, match="states of dimension 8, but this environment has 6"):
            purifiers[mode].bind(shorter)
        with pytest.raises(kuaifair_env.MismatchError, match=r"catalogue of 120 items.* 50 items"):
            purifiers[mode].bind(small_world(0.4))


@pytest.mark.slow
def test_the_literal_model_is_the_identity_and_the_method_is_not(trained_purifiers):
    # The optimum of the literal objective returns its condition.
    literal = [mean_cosine(purify(purifier), STATES) for purifier in trained_purifiers["paper"]]
    method = [mean_cosine(purify(purifier), STATES) for purifier in trained_purifiers["profile"]]
    assert min(literal) > 0.99
    assert max(method) < 0.96


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["profile", "unbiased"])
def test_purified_states_rank_unbiased_feedback_better_than_observed_ones(trained_purifiers, mode):
    gains = [auc(purify(purifier)) - auc(STATES) for purifier in trained_purifiers[mode]]
    assert min(gains) > 0.02


@pytest.mark.slow
def test_a_student_gives_its_teachers_states(trained_purifiers):
    for model in trained_purifiers["profile"]:
        teacher = model.with_sampler(SamplerConfig(steps=1))
        assert mean_cosine(purify(model), purify(teacher)) > 0.8


@pytest.mark.slow
def test_short_windows_leave_a_wider_posterior(trained_purifiers):
    for model in trained_purifiers["profile"]:
        wide = model.with_output("state+spread").with_sampler(SamplerConfig(steps=1))
        wide.bind(TEST)
        spreads = []
        for length in (5, 30):
            window = sample_windows(
                TEST.data.train, len(TEST.data.users), np.repeat(TEST.users, 4), np.random.default_rng(0),
                history_length=30, min_length=length, max_length=length,
            )  # fmt: skip
            spreads.append(wide.purify(observed_states(TEST, window), window)[:, -1].mean())
        assert spreads[0] > 1.01 * spreads[1]


def test_a_student_learns_a_linear_teacher():
    rng = np.random.default_rng(0)
    conditions = rng.normal(size=(2_000, 4)).astype(np.float32)
    matrix = rng.normal(size=(4, 3)).astype(np.float32)
    spreads = np.exp(conditions[:500, 0])
    config = DistillationConfig(width=32, steps=400, batch_size=64, learning_rate=3e-3)
    student, cosine = distil(conditions, conditions @ matrix, spreads, config, seed=0)
    fresh = rng.normal(size=(500, 4)).astype(np.float32)
    states, spreads = student(fresh)
    assert cosine > 0.98
    assert mean_cosine(states, fresh @ matrix) > 0.98
    assert np.corrcoef(np.log(spreads), fresh[:, 0])[0, 1] > 0.9


def test_samplers_and_the_spread_can_be_chosen_afterwards(purifiers):
    model = purifiers["profile"]
    once = model.with_sampler(SamplerConfig(steps=1))
    assert purify(once).shape == STATES.shape
    assert once.with_sampler(None).config == model.config
    wide = model.with_output("state+spread")
    spread = purify(wide)
    assert spread.shape[1:] == wide.bind(TEST).shape == (TEST.dimension + 1,)
    np.testing.assert_array_equal(spread[:, :-1], purify(model))
    assert (spread[:, -1] > 0).all()
    drawn = model.posterior(STATES[:4], WINDOW.take(np.arange(4)), 6)
    assert drawn.shape == (6, 4, TEST.dimension)
    assert drawn.std(axis=0).mean() > 0


def test_a_schedule_that_ends_before_noise_is_for_the_paper_s_mode_alone(purifiers):
    # 20 linear levels keep .82 of a state: a profile drawn from pure noise there would be noise.
    for mode in ("profile", "unbiased", "paired"):
        with pytest.raises(ValueError, match="keeps 82 % of the state's variance"):
            PretrainConfig(mode, schedule="linear", levels=20)
        PretrainConfig(mode, schedule="linear", levels=500)
    PretrainConfig("paper", schedule="linear", levels=20)
    literal = purifiers["paper"]
    with pytest.raises(ValueError, match="keeps 82 % of the state's variance"):
        literal.posterior(STATES[:4], WINDOW.take(np.arange(4)))
    with pytest.raises(ValueError, match="keeps 82 % of the state's variance"):
        literal.with_output("state+spread")


def test_the_same_seed_gives_the_same_bytes_and_a_killed_run_goes_on_to_them(purifiers, tmp_path, monkeypatch):
    save_purifier(purifiers["profile"], tmp_path / "whole")
    checkpoint = tmp_path / "half"
    show_round = training.show_round
    rounds = []

    def killed(bar, trainer):
        show_round(bar, trainer)
        rounds.append(trainer.rounds)
        if len(rounds) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "show_round", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TRAIN, quick_config(), checkpoint=checkpoint)
    assert checkpoint.exists()
    with pytest.raises(ArtifactError, match="another training"):
        pretrain(TRAIN, quick_config(seed=5), checkpoint=checkpoint)
    resumed = tmp_path / "resumed"
    save_purifier(pretrain(TRAIN, quick_config(), checkpoint=checkpoint), resumed)
    assert rounds == [1, 2, 3]
    assert (tmp_path / "whole").read_bytes() == resumed.read_bytes()
    # Killed before the purifier was saved: the rounds are not trained again.
    resumed.unlink()
    checkpoint.rename(tmp_path / "resumed.partial")
    pretrain_file(resumed, TRAIN, quick_config())
    assert rounds == [1, 2, 3]
    assert (tmp_path / "whole").read_bytes() == resumed.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "whole"]


def test_no_held_out_user_is_learnt_from_and_calibration_users_are_never_evaluated():
    held_out = held_out_users(TRAIN.data)
    calibration = calibration_users(TRAIN.data)
    assert np.intersect1d(calibration, held_out).size == 0
    assert np.intersect1d(calibration, TEST.users).size == 0
    for mode in ("profile", "paper", "paired", "unbiased"):
        source = example_source(TRAIN, quick_config(mode))
        assert np.intersect1d(source.users, held_out).size == 0
        users, validation_users = source.split()
        np.testing.assert_array_equal(np.union1d(users, validation_users), source.users)
        assert np.intersect1d(users, validation_users).size == 0
        assert 0 < len(validation_users) < len(users)


@pytest.mark.parametrize("mode", ["unbiased", "regression"])
def test_unbiased_training_stops_by_users_whose_unbiased_feedback_it_was_not_trained_on(mode, monkeypatch):
    draws: list[set[int]] = []
    draw = UnbiasedTargets.draw

    def noted(self, users, rng):
        draws.append(set(users.tolist()))
        return draw(self, users, rng)

    monkeypatch.setattr(UnbiasedTargets, "draw", noted)
    pretrain(TRAIN, quick_config(mode, target="unbiased", calibration_share=0.45))
    # The first round's examples are drawn, then the validation users', then those of the other rounds.
    first, validation, *others = draws[:4]
    trained_on = first.union(*others)
    assert len(others) == 2 and len(trained_on) > 20
    assert validation and not validation & trained_on


def test_a_calibration_user_is_needed_on_each_side_of_early_stopping():
    source = example_source(TRAIN, quick_config("unbiased", calibration_share=0.02))
    calibration = calibration_users(TRAIN.data, 0.02)
    for users in source.split():
        assert np.intersect1d(users, calibration).size
    with pytest.raises(DataError, match=r"only 1 of 1 calibration users .* raise calibration_share"):
        example_source(TRAIN, quick_config("unbiased", calibration_share=0.002))


def test_a_round_of_few_users_is_short_lest_it_learns_them_by_heart():
    few = dataclasses.replace(TRAIN, users=TRAIN.users[:5])
    for mode, examples in (("profile", 60 * 5), ("paper", 400)):
        report = pretrain(few, quick_config(mode)).describe()["report"]
        assert quick_config().rounds_and_batches.examples == 400
        assert report["training"]["examples"] == examples
        assert report["best_round"] == 1 + np.argmin(report["validation_losses"])


def test_bars_say_which_round_is_best_and_end_when_the_purifier_is_made(capfd):
    pretrain(TRAIN, quick_config(), progress=True)
    shown = capfd.readouterr().err
    full = {line.split(":")[0]: line for line in shown.replace("\r", "\n").splitlines() if "100%" in line}
    assert list(full) == ["pretrain profile", "sample the posterior", "distil the student"]
    assert "best_round=3" in full["pretrain profile"]


def test_only_the_unbiased_modes_read_the_test_log(purifiers):
    blind = dataclasses.replace(TRAIN, data=dataclasses.replace(TRAIN.data, test=TRAIN.data.test.take(np.arange(1))))
    for mode in ("profile", "paper", "paired"):
        draws = [
            example_source(world, quick_config(mode)).draw(TRAIN.users[:20], np.random.default_rng(0))
            for world in (TRAIN, blind)
        ]
        np.testing.assert_array_equal(draws[0].targets, draws[1].targets)
        assert purifiers[mode].describe()["report"]["test_log"] == "unread"
    assert "calibration users" in purifiers["unbiased"].describe()["report"]["test_log"]


@pytest.mark.parametrize("mode", ["profile", "linear_debias", "tce"])
def test_the_test_world_is_refused(mode):
    with pytest.raises(ValueError, match="training world"):
        pretrain(TEST, quick_config(mode))


def test_the_noise_control_moves_states_as_much_as_its_purifier(purifiers):
    purifier = purifiers["profile"]
    noise = noise_like(purifier, TRAIN)
    sizes = [np.sqrt(np.mean((purify(mover) - STATES) ** 2)) for mover in (noise, purifier)]
    assert 0.5 < sizes[0] / sizes[1] < 2.0


def test_linear_debias_takes_exactly_one_direction_out(purifiers):
    purifier = purifiers["linear_debias"]
    purified = purify(purifier)
    assert np.linalg.matrix_rank((purified - STATES).astype(np.float64), tol=1e-3) == 1
    direction = purifier.tensors()["direction"]
    np.testing.assert_allclose(np.ptp(purified @ direction), 0.0, atol=1e-4)


def test_ips_weights_follow_the_formula():
    exposures = np.asarray([0, 1, 3, 99])
    propensity = (exposures + 1) / (exposures.sum() + 4)
    expected = np.minimum(propensity**-0.5, np.quantile(propensity[1:] ** -0.5, 0.95))
    np.testing.assert_allclose(propensity_weights(exposures), expected / expected.mean(), rtol=1e-6)


@pytest.mark.parametrize("bad", [{"mode": "magic"}, {"target": "paper"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
        PretrainConfig(**bad)


def test_the_package_s_function_is_not_hidden_by_a_module_of_its_name():
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "dsrm"}
    try:
        for name in before:
            del sys.modules[name]
        fresh = importlib.import_module("dsrm")
        assert fresh.PretrainConfig is not PretrainConfig and callable(fresh.pretrain)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "dsrm"]:
            del sys.modules[name]
        sys.modules.update(before)


# ---------------------------------------------------------------- probes of states whose content is known

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def probes():
    return probe_set(TEST)


@pytest.fixture(scope="module")
def measures(probes):
    noise = RNG.normal(size=probes.states.shape).astype(np.float32)
    oracle = np.zeros_like(noise)
    oracle[np.arange(len(probes)), np.maximum(probes.interest, 0)] = 3.0
    popular = noise * 0.1
    popular[:, 0] = probes.popularity
    tags = TEST.data.items.tags[:, :].astype(np.float32)
    centroids = tags.T @ probes.embeddings / tags.sum(axis=0)[:, None]
    states = {
        RAW: probes.states,
        "noise": noise,
        "interest": oracle + 0.1 * noise,
        "popularity": popular,
        "centroid": centroids[np.maximum(probes.interest, 0)].astype(np.float32),
        "scaled": 3.0 * probes.states,
    }
    return probe(probes, states).measures


def test_each_probe_finds_what_is_there_and_nothing_where_nothing_is(measures):
    assert measures["interest"]["interest"].value > 0.97
    assert measures["interest"]["interest_purity"].value > 0.95
    assert measures["noise"]["interest"].value < 0.4
    assert measures["popularity"]["popularity_r2"].value > 0.99
    assert measures["noise"]["popularity_r2"].value < 0.05
    assert measures["popularity"]["popularity_purity"].value > measures["noise"]["popularity_purity"].value + 0.07
    assert measures["centroid"]["auc"].value > 0.7 > 0.55 > measures["noise"]["auc"].value > 0.45
    assert measures["noise"]["effective_rank"].value == pytest.approx(8, abs=0.4)
    assert measures["centroid"]["effective_rank"].value < 4.5


@pytest.mark.parametrize("n_classes", [1, 2, 5, 30])
def test_macro_f1_is_that_of_the_reference_library(n_classes):
    """Classes that are guessed alone do not count; one that is never guessed has an F1 of 0."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth, predicted = 2 * rng.integers(0, n_classes, 40), rng.integers(0, 2 * n_classes + 1, 40)
        expected = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0)
        assert macro_f1(truth, predicted) == pytest.approx(expected, abs=1e-12)


def test_the_identity_is_recognised(measures):
    for name in (RAW, "scaled"):
        assert measures[name]["raw_cosine"].value == pytest.approx(1.0, abs=1e-5)
        assert measures[name]["raw_r2"].value > 0.995
    assert measures["noise"]["raw_r2"].value < 0.1
    assert measures["scaled"]["auc"].value == pytest.approx(measures[RAW]["auc"].value, abs=1e-6)


def test_intervals_hold_their_value_and_gains_are_paired(measures):
    for state, by_name in measures.items():
        for name, measure in by_name.items():
            low, high = measure.interval
            assert low - 1e-9 <= measure.value <= high + 1e-9 or name.endswith("silhouette"), (state, name)
    gain = measures["scaled"]["auc"].gain_over(measures[RAW]["auc"])
    assert gain.interval == pytest.approx((0.0, 0.0), abs=1e-9)


def test_short_windows_keep_the_last_exposures_alone():
    short, log = probe_set(TEST, "short"), probe_set(TEST)
    assert (short.window.items >= 0).sum(axis=1).max() == SHORT
    rows = np.searchsorted(log.users, short.users)
    np.testing.assert_array_equal(short.window.items[:, -SHORT:], log.window.items[rows][:, -SHORT:])
    np.testing.assert_array_equal(short.states, observed_states(TEST, short.window))


@pytest.mark.parametrize("kind", KINDS)
def test_probe_sets_hold_no_training_user_and_nobody_without_a_click(kind):
    probes = probe_set(TEST, kind, max_users=60)
    assert len(probes) <= 60 and np.isin(probes.users, TEST.users).all()
    assert probes.window.clicks.any(axis=1).all()
    assert np.isin(probes.log.users, probes.users).all()


def test_the_training_world_and_unknown_windows_are_refused(probes):
    with pytest.raises(ValueError, match="test world"):
        probe_set(TRAIN)
    with pytest.raises(ValueError, match="windows are of one of the kinds"):
        probe_set(TEST, "future")
    with pytest.raises(ValueError, match="raw"):
        probe(probes, {"mine": probes.states})


@pytest.mark.slow
def test_tables_and_figures_are_drawn_and_do_not_change_from_run_to_run(probes, tmp_path):
    few = probe_set(TEST, max_users=40)
    states = purified_states(few, TEST, {"identity": IdentityPurifier()})
    table = report_table(probe(few, states))
    assert "identity" in table and "recovery" not in table
    for name in ("a.png", "b.png"):
        draw_states(tmp_path / name, few, states)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    explained = draw_counts_and_rates(tmp_path / "c.png", TEST.data)
    # Counts of clicks follow counts of exposures by construction; rates need not.
    assert explained["counts"] > 0.9 > explained["rates"]
    assert dataclasses.is_dataclass(few)
