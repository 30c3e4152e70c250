"""Pretraining: what comes out of each mode, that it goes on after a kill, and that files hold all of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import small_world
from training_worlds import taste_worlds

import dsrm
from dsrm.condition import propensity_weights
from dsrm.diffusion import SamplerConfig
from dsrm.distillation import DistillationConfig
from dsrm.pretrain import MODES, PretrainConfig, example_source, noise_like, pretrain
from dsrm.purifier import load_purifier, save_purifier
from dsrm.training import TrainingConfig
from dsrm.windows import WindowSettings, sample_windows
from kuaifair_env.errors import ArtifactError
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.spaces import observed_states
from kuaifair_env.splits import calibration_users, early_stopping_split, held_out_users

TRAIN, TEST = taste_worlds()
QUICK = TrainingConfig(rounds=3, examples=2_000, batch_size=128, validation_examples=300)
SMALL = {"width": 32, "blocks": 1, "distillation": DistillationConfig(width=32, steps=200)}


def config(mode, **settings):
    return PretrainConfig(mode=mode, training=QUICK, denoiser_steps=60, **(SMALL | settings))


@pytest.fixture(scope="module")
def made():
    return {mode: pretrain(TRAIN, config(mode)) for mode in MODES}


@pytest.fixture(scope="module")
def well_made():
    training = TrainingConfig(rounds=10, examples=6_000, batch_size=256, validation_examples=600)
    distillation = DistillationConfig(width=128, steps=3_000)
    return {
        mode: pretrain(
            TRAIN,
            PretrainConfig(
                mode=mode,
                training=training,
                width=64,
                blocks=2,
                calibration_share=0.45,
                exclude_share=0.0,
                windows=WindowSettings(policy_share=0.0),
                distillation=distillation,
            ),
        )
        for mode in ("profile", "unbiased")
    }


def states_and_window(world=TEST):
    window = world.initial_history.take(world.users)
    return observed_states(world, window), window


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_a_pure_function_within_its_space(made, mode):
    purifier = made[mode]
    space = purifier.bind(TEST)
    states, window = states_and_window()
    purified = purifier.purify(states, window)
    assert purified.dtype == np.float32
    assert purified.shape == (len(states), *space.shape)
    assert all(space.contains(row) for row in purified)
    few = np.asarray([5, 2])
    np.testing.assert_allclose(purifier.purify(states[few], window.take(few)), purified[few], atol=1e-5)
    empty = dataclasses.replace(
        window, items=np.full_like(window.items, -1), clicks=np.zeros_like(window.clicks)
    )
    assert np.isfinite(purifier.purify(np.zeros_like(states), empty)).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_file_gives_back_the_same_purifier_bit_for_bit(made, mode, tmp_path):
    save_purifier(made[mode], tmp_path / "p.safetensors")
    again = load_purifier(tmp_path / "p.safetensors")
    states, window = states_and_window()
    for one in (made[mode], again):
        one.bind(TEST)
    np.testing.assert_array_equal(again.purify(states, window), made[mode].purify(states, window))
    assert again.describe() == made[mode].describe()


def test_damaged_and_foreign_files_are_clear_errors(made, tmp_path):
    path = tmp_path / "p.safetensors"
    made["profile"].save(path)
    whole = path.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="safetensors"):
            dsrm.DSRM.load(path)
    path.write_bytes(whole[:-8] + bytes(8 * [255]))
    with pytest.raises(ArtifactError, match="altered"):
        dsrm.DSRM.load(path)
    save_purifier(made["ips"], path)
    with pytest.raises(ArtifactError, match="of kind 'ips', not a diffusion model"):
        dsrm.DSRM.load(path)
    with pytest.raises(ArtifactError, match="not a file"):
        load_purifier(tmp_path / "nowhere")


def test_another_world_is_refused_with_what_differs(made):
    trained = [made[mode] for mode in ("profile", "regression", "linear_debias", "tce")]
    flipped = dataclasses.replace(TEST, embeddings=-TEST.embeddings)
    shorter = dataclasses.replace(TEST, embeddings=TEST.embeddings[:, :6].copy())
    for purifier in trained:
        with pytest.raises(dsrm.MismatchError, match="other item embeddings"):
            purifier.bind(flipped)
        with pytest.raises(dsrm.MismatchError, match="states of dimension 8, but this environment has 6"):
            purifier.bind(shorter)
        with pytest.raises(dsrm.MismatchError, match=r"catalogue of 120 items.* 50 items"):
            purifier.bind(small_world(0.4))


def test_paper_mode_is_the_identity_and_profile_is_not():
    # The optimum of the literal objective returns its condition, methods 7.1; enough training shows it.
    training = TrainingConfig(rounds=12, examples=8_000, batch_size=256, validation_examples=300)
    literal = pretrain(TRAIN, PretrainConfig(mode="paper", training=training, width=128, blocks=2, seed=1))
    profile = pretrain(TRAIN, config("profile"))
    states, window = states_and_window()
    cosines = []
    for purifier in (literal, profile):
        purifier.bind(TEST)
        purified = purifier.purify(states, window)
        norms = np.linalg.norm(purified, axis=1) * np.linalg.norm(states, axis=1)
        cosines.append(float(np.mean((purified * states).sum(1) / norms)))
    assert cosines[0] > 0.98
    assert cosines[1] < cosines[0] - 0.02


def test_profile_and_unbiased_rank_unbiased_feedback_better_than_the_raw_state(made, well_made):
    states, window = states_and_window()
    users = np.searchsorted(TEST.users, TEST.data.test.users)
    rows = np.isin(TEST.data.test.users, TEST.users)
    units = TEST.embeddings / np.maximum(np.linalg.norm(TEST.embeddings, axis=1, keepdims=True), 1e-9)
    found = {}
    for mode in ("identity", "profile", "unbiased"):
        purifier = (made | well_made)[mode]
        purifier.bind(TEST)
        purified = purifier.purify(states, window)
        purified = purified / np.maximum(np.linalg.norm(purified, axis=1, keepdims=True), 1e-9)
        scores = np.einsum("nd,nd->n", purified[users[rows]], units[TEST.data.test.items[rows]])
        found[mode] = within_user_auc(users[rows], TEST.data.test.clicks[rows], scores).mean
    assert found["unbiased"] > found["identity"] + 0.02
    assert found["profile"] > found["identity"] + 0.02


def test_the_same_seed_gives_the_same_bytes_and_a_killed_run_goes_on_to_them(tmp_path, monkeypatch):
    whole = pretrain(TRAIN, config("profile"))
    save_purifier(whole, tmp_path / "whole")
    checkpoint = tmp_path / "half"
    from dsrm import training

    saved = training._save
    calls = []

    def killed(trainer, path, identity):
        saved(trainer, path, identity)
        calls.append(trainer.rounds)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TRAIN, config("profile"), checkpoint=checkpoint)
    assert checkpoint.exists()
    with pytest.raises(ArtifactError, match="another training"):
        pretrain(TRAIN, config("profile", seed=5), checkpoint=checkpoint)
    resumed = pretrain(TRAIN, config("profile"), checkpoint=checkpoint)
    save_purifier(resumed, tmp_path / "resumed")
    assert calls == [1, 2, 3]
    assert not checkpoint.exists()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "resumed").read_bytes()


def test_no_held_out_user_is_learnt_from_and_calibration_users_are_never_judged():
    held = held_out_users(TRAIN.data)
    calibration = calibration_users(TRAIN.data)
    assert np.intersect1d(calibration, held).size == 0
    assert np.intersect1d(calibration, TEST.users).size == 0
    for mode in ("profile", "paper", "paired", "unbiased"):
        source = example_source(TRAIN, config(mode))
        assert np.intersect1d(source.users, held).size == 0
        fitted, kept = early_stopping_split(TRAIN.data, source.users)
        assert np.intersect1d(fitted, kept).size == 0
        assert 0 < len(kept) < len(fitted)


def test_only_the_unbiased_modes_read_the_test_log(made):
    blind = dataclasses.replace(
        TRAIN, data=dataclasses.replace(TRAIN.data, test=TRAIN.data.test.take(np.arange(1)))
    )
    for mode in ("profile", "paper", "paired"):
        draws = [
            example_source(world, config(mode)).draw(TRAIN.users[:20], np.random.default_rng(0))
            for world in (TRAIN, blind)
        ]
        np.testing.assert_array_equal(draws[0].targets, draws[1].targets)
        assert made[mode].describe()["report"]["test_log"] == "unread"
    assert "calibration users" in made["unbiased"].describe()["report"]["test_log"]


def test_the_test_world_is_refused(made):
    for mode in ("profile", "linear_debias", "tce"):
        with pytest.raises(ValueError, match="training world"):
            pretrain(TEST, config(mode))


def test_samplers_and_the_spread_can_be_chosen_afterwards(well_made):
    model = well_made["profile"]
    states, window = states_and_window()
    once = model.with_sampler(SamplerConfig(steps=1))
    once.bind(TEST)
    model.bind(TEST)
    student, teacher = model.purify(states, window), once.purify(states, window)
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    assert np.mean((student * teacher).sum(1) / norms) > 0.95
    wide = model.with_output("state+spread")
    space = wide.bind(TEST)
    out = wide.purify(states, window)
    assert out.shape[1] == TEST.dimension + 1 == space.shape[0]
    assert (out[:, -1] > 0).all()
    drawn = model.posterior(states[:4], window.take(np.arange(4)), 6)
    assert drawn.shape == (6, 4, TEST.dimension)
    assert drawn.std(axis=0).mean() > 0


def test_short_windows_leave_a_wider_posterior(well_made):
    wide = well_made["profile"].with_output("state+spread").with_sampler(SamplerConfig(steps=1))
    wide.bind(TEST)
    rng = np.random.default_rng(0)
    spreads = []
    for length in (5, 30):
        window = sample_windows(
            TEST.data.train, len(TEST.data.users), np.repeat(TEST.users, 4), rng,
            history_length=30, min_length=length, max_length=length,
        )  # fmt: skip
        spreads.append(wide.purify(observed_states(TEST, window), window)[:, -1].mean())
    assert spreads[0] > spreads[1]


def test_the_noise_control_moves_states_as_much_as_its_purifier(made):
    noise = noise_like(made["profile"], TRAIN)
    noise.bind(TEST)
    made["profile"].bind(TEST)
    states, window = states_and_window()
    ours = np.sqrt(np.mean((noise.purify(states, window) - states) ** 2))
    theirs = np.sqrt(np.mean((made["profile"].purify(states, window) - states) ** 2))
    assert 0.5 < ours / theirs < 2.0


def test_linear_debias_takes_exactly_one_direction_out(made):
    purifier = made["linear_debias"]
    purifier.bind(TEST)
    states, window = states_and_window()
    moved = purifier.purify(states, window) - states
    assert np.linalg.matrix_rank(moved.astype(np.float64), tol=1e-3) == 1
    direction = purifier.tensors()["direction"]
    np.testing.assert_allclose(np.ptp(purifier.purify(states, window) @ direction), 0.0, atol=1e-4)


def test_ips_weights_follow_the_formula():
    exposures = np.asarray([0, 1, 3, 99])
    propensity = (exposures + 1) / (exposures.sum() + 4)
    wanted = np.minimum(propensity**-0.5, np.quantile(propensity[1:] ** -0.5, 0.95))
    np.testing.assert_allclose(propensity_weights(exposures), wanted / wanted.mean(), rtol=1e-6)
    np.testing.assert_allclose(propensity_weights(exposures, 0.0), 1.0)
    with pytest.raises(ValueError, match="exponent"):
        propensity_weights(exposures, 2.0)


@pytest.mark.parametrize("bad", [{"mode": "magic"}, {"target": "paper"}])
def test_unknown_names_are_refused(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be one of"):
        PretrainConfig(**bad)
