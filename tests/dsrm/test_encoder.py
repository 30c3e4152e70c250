"""Encoders and the item term: what they learn, what a world does with them, and that files hold all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_worlds import N_ITEMS, taste_worlds

from dsrm.encoder import Encoder, EncoderConfig, pretrain_encoder
from dsrm.item_term import (
    ITEM_TERM_MODES,
    ItemTerm,
    fit_item_term,
    prior_losses,
    shrunk_rates,
    smoothed_logits,
    user_corrected_logits,
    with_item_term,
    without_item_term,
)
from hrl_policies.controls import QuotaGreedy
from hrl_policies.worlds import WorldPair
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.embeddings import unit_rows
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError, MismatchError
from kuaifair_env.evaluation import evaluate
from kuaifair_env.observations import observed_states
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.sb3 import KuaiFairVecEnv
from kuaifair_env.splits import calibration_users, held_out_users

TRAIN, TEST = taste_worlds()
SETTINGS = {"dimension": 8, "batch_size": 64, "negatives": 32, "check_every": 10, "steps": 20}
LEARNING = {"dimension": 8, "batch_size": 128, "negatives": 64, "check_every": 50, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def encoders():
    """One encoder of each kind; they have learned next to nothing."""
    return {kind: pretrain_encoder(TRAIN, EncoderConfig(kind, **SETTINGS)) for kind in ("mean", "transformer")}


def auc(world):
    states = observed_states(world, world.initial_history.take(world.users))
    log = world.data.test
    rows = np.isin(log.users, world.users)
    place = np.searchsorted(world.users, log.users[rows])
    units = world.embeddings / np.maximum(np.linalg.norm(world.embeddings, axis=1, keepdims=True), 1e-9)
    scores = np.einsum("nd,nd->n", states[place], units[log.items[rows]])
    return within_user_auc(place, log.clicks[rows], scores).mean


@pytest.mark.slow
def test_a_mean_encoder_ranks_unbiased_feedback_of_users_it_never_saw_better_than_the_svd():
    # This log is mostly herding, so little of taste can be read off it: the SVD's mean reaches an AUC of .552.
    gains = []
    for seed in (0, 1):
        config = EncoderConfig("mean", seed=seed, steps=150, **(LEARNING | {"learning_rate": 6e-3}))
        gains.append(auc(pretrain_encoder(TRAIN, config).encoded(TEST)) - auc(TEST))
    assert np.mean(gains) > 0.01


@pytest.mark.slow
def test_a_transformer_ranks_unbiased_feedback_and_the_next_click():
    for seed in (0, 1):
        config = EncoderConfig("transformer", seed=seed, steps=100, **(LEARNING | {"batch_size": 64}))
        encoder = pretrain_encoder(TRAIN, config)
        losses = encoder.report["validation_losses"]
        assert min(losses) < losses[0] - 1.0
        assert auc(encoder.encoded(TEST)) > 0.52


def test_a_mean_encoder_is_embeddings_alone_and_a_transformer_reads_order(encoders):
    mean, transformer = encoders["mean"].encoded(TEST), encoders["transformer"].encoded(TEST)
    assert mean.encoder is None
    window = TEST.initial_history.take(TEST.users[:4])
    pooled = observed_states(mean, window)
    for row in range(4):
        expected = mean.embeddings[window.items[row][window.clicks[row]]].mean(axis=0)
        np.testing.assert_allclose(pooled[row], expected, rtol=1e-4, atol=1e-5)
    turned = dataclasses.replace(window, items=window.items[:, ::-1], clicks=window.clicks[:, ::-1])
    states = [transformer.encoder.encode(windows) for windows in (window, turned)]
    assert np.abs(states[0] - states[1]).max() > 1e-3
    empty = dataclasses.replace(window, items=np.full_like(window.items, -1), clicks=np.zeros_like(window.clicks))
    np.testing.assert_array_equal(transformer.encoder.encode(empty), 0.0)


@pytest.mark.parametrize("kind", ["mean", "transformer"])
def test_environments_observe_what_the_encoder_says(encoders, kind):
    world = encoders[kind].encoded(TEST)
    env = KuaiFairEnv(world, SessionConfig(max_len=4, slate_size=4))
    observation, _ = env.reset(seed=1)
    for _ in range(3):
        expected = observed_states(world, env.history_window(world.history_length))[0]
        np.testing.assert_allclose(observation, expected, atol=1e-4)
        assert env.observation_space.contains(observation)
        observation, _, left, truncated, _ = env.step(env.action_space.sample())
        if left or truncated:
            observation, _ = env.reset()


def test_the_same_seed_gives_the_same_encoder_and_a_file_gives_it_back(encoders, tmp_path):
    again = pretrain_encoder(TRAIN, EncoderConfig("mean", **SETTINGS))
    np.testing.assert_array_equal(again.embeddings, encoders["mean"].embeddings)
    window = TEST.initial_history.take(TEST.users[:9])
    for encoder in encoders.values():
        encoder.save(tmp_path / "encoder.safetensors")
        loaded = Encoder.load(tmp_path / "encoder.safetensors")
        np.testing.assert_array_equal(loaded.encode(window), encoder.encode(window))
        assert loaded.config == encoder.config
    whole = (tmp_path / "encoder.safetensors").read_bytes()
    (tmp_path / "encoder.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError):
        Encoder.load(tmp_path / "encoder.safetensors")


def test_misuse_is_refused(encoders):
    other = dataclasses.replace(TEST, data=dataclasses.replace(TEST.data, train=TEST.data.test))
    with pytest.raises(MismatchError, match="was trained on data"):
        encoders["mean"].encoded(other)
    with pytest.raises(ValueError, match="training world"):
        pretrain_encoder(TEST, EncoderConfig(**SETTINGS))
    with pytest.raises(ValueError, match="multiple of 4"):
        EncoderConfig("transformer", dimension=10)


# ---------------------------------------------------------------- item term


@pytest.fixture(scope="module")
def terms():
    return {mode: fit_item_term(TRAIN, mode) for mode in ITEM_TERM_MODES}


@pytest.mark.parametrize("mode", ITEM_TERM_MODES)
def test_a_term_is_one_finite_number_for_every_item_and_survives_its_file(terms, mode, tmp_path):
    term = terms[mode]
    assert term.values.shape == (N_ITEMS,)
    assert np.isfinite(term.values).all()
    term.save(tmp_path / "term")
    loaded = ItemTerm.load(tmp_path / "term")
    np.testing.assert_array_equal(loaded.values, term.values)
    assert (loaded.mode, loaded.similarity, dict(loaded.provenance)) == (
        term.mode, term.similarity, dict(term.provenance)
    )  # fmt: skip


def test_calibration_sees_through_the_herd_and_the_log_does_not(terms):
    log, unbiased = terms["log"].values, terms["unbiased"].values
    # In the training log the 24 most shown items are clicked by everybody; at random exposure they are like others.
    head = np.arange(N_ITEMS) < N_ITEMS // 5
    assert log[head].mean() - log[~head].mean() > 1.0
    assert abs(unbiased[head].mean() - unbiased[~head].mean()) < 0.6


def test_nobody_who_is_evaluated_is_read(terms):
    held_out = held_out_users(TRAIN.data)
    spoilt = {}
    for name in ("train", "test"):
        log: InteractionLog = getattr(TRAIN.data, name)
        spoilt[name] = dataclasses.replace(log, clicks=log.clicks ^ np.isin(log.users, held_out))
    world = dataclasses.replace(TRAIN, data=dataclasses.replace(TRAIN.data, **spoilt))
    for mode in ITEM_TERM_MODES:
        np.testing.assert_array_equal(fit_item_term(world, mode).values, terms[mode].values)


def test_only_the_unbiased_term_reads_the_test_log_and_says_so(terms):
    calibration = calibration_users(TRAIN.data)
    log = TRAIN.data.test
    flipped = dataclasses.replace(log, clicks=log.clicks ^ np.isin(log.users, calibration))
    world = dataclasses.replace(TRAIN, data=dataclasses.replace(TRAIN.data, test=flipped))
    for mode in ITEM_TERM_MODES:
        before, after = terms[mode], fit_item_term(world, mode)
        assert np.array_equal(before.values, after.values) == (mode != "unbiased")
        assert (before.provenance["test_log"] == "unread") == (mode != "unbiased")
    assert f"{len(calibration):,} calibration users" in before.provenance["test_log"]


def test_smoothing_is_that_of_twenty_rows():
    logits = smoothed_logits(np.asarray([0.0, 80.0]), np.asarray([0.0, 40.0]))
    np.testing.assert_allclose(logits, [0.0, 0.0])
    p = (20 + 20 * 0.25) / 40
    logits = smoothed_logits(np.asarray([20.0, 60.0]), np.asarray([20.0, 0.0]))
    assert logits[0] == pytest.approx(np.log(p / (1 - p)))


def test_user_correction_sees_that_an_item_was_shown_to_people_who_click_everything():
    # Items 0 and 1 are equally good; item 0 was only shown to users who click much.
    rng = np.random.default_rng(0)
    data = TRAIN.data
    free = np.setdiff1d(np.arange(len(data.users)), held_out_users(data))
    keen, calm = free[: len(free) // 2], free[len(free) // 2 :]
    users = np.concatenate([np.repeat(keen, 12), np.repeat(calm, 12)])
    items = np.where(np.isin(users, keen), rng.choice([0, 2], len(users)), rng.choice([1, 2], len(users)))
    clicks = rng.random(len(users)) < np.where(np.isin(users, keen), 0.8, 0.2)
    log = InteractionLog.sorted(users, items, clicks)
    raw = smoothed_logits(log.exposures(N_ITEMS), log.click_counts(N_ITEMS))
    corrected = user_corrected_logits(log, len(data.users), N_ITEMS)
    assert raw[0] - raw[1] > 2.0
    assert abs(corrected[0] - corrected[1]) < 0.5 * (raw[0] - raw[1])


def test_calibration_shrinks_rare_items_to_the_prediction_and_frequent_ones_to_their_own_rate():
    rng = np.random.default_rng(1)
    quality = rng.uniform(0.1, 0.6, 40)
    users = np.repeat(np.arange(200), 50)
    items = rng.integers(0, 40, len(users))
    items[items == 39] = 0
    log = InteractionLog.sorted(users, items, rng.random(len(users)) < quality[items])
    features = rng.normal(size=(40, 3))
    losses = prior_losses(features, log)
    (rates,) = shrunk_rates(features, log, [min(losses, key=losses.get)])
    assert np.corrcoef(rates[:39], quality[:39])[0, 1] > 0.9
    assert rates[39] == pytest.approx(log.clicks.mean(), abs=0.12)
    assert set(losses) == {10, 20, 50, 100, 200, 500}


def test_the_term_is_one_more_coordinate_for_everybody(terms):
    term = terms["unbiased"]
    pair = WorldPair("taste", TRAIN, TEST).given(term)
    for before, after in ((TRAIN, pair.train), (TEST, pair.test)):
        assert after.dimension == before.dimension + 1
        np.testing.assert_allclose(unit_rows(after.embeddings[:, :-1]), unit_rows(before.embeddings), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(after.embeddings, axis=1), np.sqrt(after.dimension), atol=1e-4)
        np.testing.assert_allclose(without_item_term(after).embeddings, before.embeddings, atol=1e-3)
        column = after.embeddings[:, -1]
        assert abs(column.mean()) < 1e-5
        assert column.std() == pytest.approx(1.0, abs=1e-4)
        assert np.corrcoef(column, term.values)[0, 1] > 0.999
        env = KuaiFairVecEnv(after, SessionConfig(), 4, seed=0)
        assert env.action_space.shape == env.observation_space.shape == (after.dimension,)
    with pytest.raises(MismatchError, match="already"):
        with_item_term(pair.train, term)


def test_a_foreign_term_is_refused(terms, tmp_path):
    term = terms["log"]
    other, _ = taste_worlds(1)
    with pytest.raises(MismatchError, match="fitted on data"):
        with_item_term(other, term)
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="safetensors"):
        ItemTerm.load(tmp_path / "broken")
    with pytest.raises(ValueError, match="an item term is one of"):
        fit_item_term(TRAIN, "magic")


def test_the_quota_control_earns_more_with_the_unbiased_term(terms):
    pair = WorldPair("taste", TRAIN, TEST)
    given = pair.given(terms["unbiased"])
    config = SessionConfig(action_mode="slate")
    results = [
        evaluate(QuotaGreedy(worlds.scorer), KuaiFairVecEnv(worlds.test, config, 64, seed=0)).summary()["r_cum"]
        for worlds in (pair, given)
    ]
    assert results[1] > results[0]
