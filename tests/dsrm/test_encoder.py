"""Encoders: what they learn, what a world does with them, and that files hold all of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from small_worlds import taste_worlds

from dsrm.encoder import Encoder, EncoderConfig, pretrain_encoder
from dsrm.purifier import MismatchError
from kuaifair_env.batch import SessionConfig
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import ArtifactError
from kuaifair_env.response.calibration import within_user_auc
from kuaifair_env.spaces import observed_states

TRAIN, TEST = taste_worlds()
SETTINGS = {"dimension": 8, "batch_size": 64, "negatives": 32, "check_every": 20, "steps": 40}
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


def test_a_mean_encoder_ranks_unbiased_feedback_of_users_it_never_saw_better_than_the_svd():
    # This log is mostly herding, so little of taste can be read off it: the SVD's mean reaches an AUC of .552.
    for seed in (0, 1):
        encoder = pretrain_encoder(TRAIN, EncoderConfig("mean", seed=seed, steps=400, **LEARNING))
        assert auc(encoder.encoded(TEST)) > auc(TEST) + 0.01


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
        expected = observed_states(world, env.history_window())[0]
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
