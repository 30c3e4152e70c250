"""CDAE and DiffRec: their formulas by hand and by brute force, and states of users who like one of four tags."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import small_world
from small_worlds import taste_worlds
from torch.nn import functional

from dsrm.click_vector_purifier import ClickVectorPurifier, click_vectors, top_weights, train_click_vectors
from dsrm.click_vectors import CDAE, CDAEConfig, DiffRec, DiffRecConfig, ImportanceLevels, NoiseVariances
from dsrm.purifier import load_purifier, save_purifier
from kuaifair_env.errors import DataError
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import HistoryWindow

TRAIN, TEST = taste_worlds()
MODES = ("cdae", "diffrec")
CONFIGS = {
    "cdae": CDAEConfig(steps=150, batch_size=64),
    "diffrec": DiffRecConfig(hidden=32, steps=150, batch_size=64, learning_rate=0.01),
}
NOISE = NoiseVariances(np.asarray([0.0, 0.1, 0.35, 0.8]))
"""Far more noise than DiffRec adds, so that every term of a formula counts."""


# ---------------------------------------------------------------- CDAE


def test_cdae_is_the_paper_s_formula():
    network = CDAE(6, CDAEConfig(hidden=3))
    vectors = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])
    weights = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    hidden = 1 / (1 + np.exp(-(weights["encoder.weight"][:, [0, 3]].sum(axis=1) + weights["encoder.bias"])))
    logits = weights["decoder.weight"] @ hidden + weights["decoder.bias"]
    np.testing.assert_allclose(network.reconstruct(vectors).detach()[0], 1 / (1 + np.exp(-logits)), rtol=1e-5)


def test_masking_leaves_the_mean_of_a_click_vector_and_never_adds_a_click():
    network = CDAE(20, CDAEConfig(corruption=0.4))
    vectors = (torch.arange(20) % 3 == 0).float().repeat(20_000, 1)
    corrupted = network.corrupted(vectors, torch.Generator().manual_seed(0))
    np.testing.assert_allclose(corrupted.unique(), [0.0, 1 / 0.6], rtol=1e-6)
    assert (corrupted[vectors == 0] == 0).all()
    np.testing.assert_allclose(corrupted.mean(dim=0), vectors[0], atol=0.03)


def test_cdae_s_loss_is_logistic_over_clicks_and_drawn_items():
    # Without masking the loss is known but for the draws: about half of all items are clicked, and draws that are
    # clicked are left out, so that each item that is not clicked is drawn 5 n / M times for a user with n clicks.
    network = CDAE(30, CDAEConfig(hidden=4, corruption=0.0, negatives=5))
    vectors = (torch.rand(4_000, 30, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    with torch.no_grad():
        loss = float(network.loss(vectors, torch.Generator().manual_seed(2)))
        scores = network.reconstruct(vectors)
        clicked = functional.binary_cross_entropy(scores, vectors, reduction="none") * vectors
        drawn = 5 * vectors.sum(dim=1, keepdim=True) / 30 * -torch.log1p(-scores) * (1 - vectors)
    assert loss == pytest.approx(float((clicked + drawn).sum(dim=1).mean()), rel=0.01)


# ---------------------------------------------------------------- DiffRec


def test_the_forward_marginal_is_the_product_of_the_chain():
    kept, variance = 1.0, 0.0
    for level in range(1, 4):
        beta = 1 - (1 - NOISE.values[level]) / (1 - NOISE.values[level - 1])
        kept, variance = kept * np.sqrt(1 - beta), variance * (1 - beta) + beta
        assert kept == pytest.approx(np.sqrt(1 - NOISE.values[level]))
        assert variance == pytest.approx(NOISE.values[level])


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_posterior_mean_is_bayes_rule_on_a_grid(level):
    clean, noisy = 0.7, -0.4
    cleaner, noisier = NOISE.values[level - 1], NOISE.values[level]
    clean_weight, noisy_weight = NOISE.posterior_mean(level)
    if level == 1:
        assert (clean_weight, noisy_weight) == pytest.approx((1.0, 0.0))
        return
    grid = np.linspace(-8, 8, 100_001)
    alpha = (1 - noisier) / (1 - cleaner)
    log_density = -((grid - np.sqrt(1 - cleaner) * clean) ** 2) / (2 * cleaner)
    log_density -= (noisy - np.sqrt(alpha) * grid) ** 2 / (2 * (1 - alpha))
    density = np.exp(log_density - log_density.max())
    expected = (grid * density).sum() / density.sum()
    assert clean_weight * clean + noisy_weight * noisy == pytest.approx(expected, abs=1e-6)


def test_elbo_weights_are_the_divergence_of_two_steps_by_a_wrong_clean_vector():
    weights = NOISE.elbo_weights()
    assert weights[0] == 1.0
    for level in (2, 3):
        cleaner, noisier = NOISE.values[level - 1], NOISE.values[level]
        beta = 1 - (1 - noisier) / (1 - cleaner)
        variance = 1 / (1 / cleaner + (1 - beta) / beta)
        shift = NOISE.posterior_mean(level)[0] * 1.0
        assert weights[level - 1] == pytest.approx(shift**2 / (2 * variance), rel=1e-5)


def test_variances_are_a_line_and_tiny_ones_keep_their_digits():
    values = NoiseVariances.linear(5, 1e-5, 5e-4, 5e-3).values
    np.testing.assert_allclose(np.diff(values[1:]), 1e-5 * (5e-3 - 5e-4) / 4, rtol=1e-9)
    assert (values[0], values[1], values[-1]) == pytest.approx((0.0, 5e-9, 5e-8), rel=1e-12)
    clean_weight, noisy_weight = NoiseVariances(values).posterior_mean(5)
    assert clean_weight + noisy_weight == pytest.approx(1.0, abs=1e-6)
    assert 0.1 < clean_weight < 0.9


def test_importance_sampling_prefers_large_losses_and_keeps_their_mean():
    sampler = ImportanceLevels(3)
    np.testing.assert_allclose(sampler.probabilities(), 1 / 3)
    losses = torch.tensor([1.0, 4.0, 15.0])
    sampler.record(torch.tensor([1, 2, 3]).repeat(12), losses.repeat(12))
    np.testing.assert_allclose(sampler.probabilities(), [0.05, 0.2, 0.75], atol=1e-3)
    drawn, importance = sampler.draw(50_000, torch.Generator().manual_seed(0))
    assert float((importance * losses[drawn - 1]).mean()) == pytest.approx(20 / 3, rel=0.01)


def test_diffrec_reverses_step_by_step_from_the_click_vector_itself():
    torch.manual_seed(0)
    network = DiffRec(8, DiffRecConfig(hidden=4, levels=3, noise_scale=1.0, min_noise=0.1, max_noise=0.8))
    vectors = (torch.rand(5, 8) < 0.4).float()
    with torch.no_grad():
        state = vectors
        for level in (3, 2, 1):
            clean = network(state, torch.full((5,), level))
            cleaner, noisier = network.noise.values[level - 1], network.noise.values[level]
            beta = (noisier - cleaner) / (1 - cleaner)
            state = np.sqrt(1 - cleaner) * beta / noisier * clean + np.sqrt(1 - beta) * cleaner / noisier * state
        np.testing.assert_allclose(network.reconstruct(vectors), state, atol=1e-6)
        np.testing.assert_allclose(state, clean, atol=1e-6)


# ---------------------------------------------------------------- states


def test_weights_are_what_exceeds_the_next_largest_score():
    scores = torch.tensor([[0.1, 0.7, 0.4, 0.5], [2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_allclose(top_weights(scores, 2), [[0, 0.75, 0, 0.25], [0, 0, 0, 0]], atol=1e-6)
    assert (top_weights(scores, 100)[0] > 0).sum() == 3


def test_items_that_change_places_do_not_move_a_state():
    scores = torch.tensor([[1.0, 0.5, 0.5 + 1e-6, 0.2]])
    swapped = torch.tensor([[1.0, 0.5 + 1e-6, 0.5, 0.2]])
    np.testing.assert_allclose(top_weights(scores, 2), top_weights(swapped, 2), atol=1e-5)


@pytest.fixture(scope="module")
def learned():
    return {
        mode: [ClickVectorPurifier.fit(TRAIN, dataclasses.replace(CONFIGS[mode], seed=seed)) for seed in range(2)]
        for mode in MODES
    }


def windows_of_one_tag(count=3):
    """For each tag a window in which a few of its items, none of them popular, were clicked."""
    tags = TEST.data.items.tags
    items = np.stack([np.flatnonzero(tags[:, tag] & (np.arange(len(tags)) >= 24))[:count] for tag in range(4)])
    return HistoryWindow(items.astype(np.int32), np.ones(items.shape, np.bool_))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_other_items_of_the_clicked_tag_come_first(learned, mode):
    window, tags = windows_of_one_tag(), TEST.data.items.tags[24:]
    for purifier in learned[mode]:
        with torch.inference_mode():
            scores = purifier._model.reconstruct(click_vectors(window, 120))
            lifts = (scores - purifier._model.reconstruct(torch.zeros(1, 120))).numpy()[:, 24:]
        ahead = []
        for tag in range(4):
            others = np.setdiff1d(np.arange(96), window.items[tag] - 24)
            same = tags[others, tag]
            ahead.append((lifts[tag, others[same]][:, None] > lifts[tag, others[~same]]).mean())
        # How often an item of the tag is ahead of one of another tag; by chance in half of all cases.
        assert np.mean(ahead) > 0.65


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_states_point_to_the_clicked_tag(learned, mode):
    window, tags = windows_of_one_tag(), TEST.data.items.tags
    centroids = tags[24:].T.astype(np.float32) @ TEST.embeddings[24:] / tags[24:].sum(axis=0)[:, None]
    right = []
    for purifier in learned[mode]:
        purifier.bind(TEST)
        states = purifier.purify(observed_states(TEST, window), window)
        right.append((states @ centroids.T).argmax(axis=1) == np.arange(4))
    assert np.mean(right) >= 0.75


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_state_has_the_size_of_an_observed_one_and_nothing_clicked_is_the_zero_state(learned, mode):
    purifier = learned[mode][0]
    space = purifier.bind(TEST)
    window = TEST.initial_history.take(TEST.users)
    window.clicks[:5] = False
    window.clicks[5:10] = window.items[5:10] >= 0
    observed = observed_states(TEST, window)
    states = purifier.purify(observed, window)
    assert all(space.contains(row) for row in states)
    assert (states[:5] == 0).all() and (states[5:10] != 0).all()
    clicked = window.clicks.any(axis=1)
    ratio = np.linalg.norm(states[clicked], axis=1).mean() / np.linalg.norm(observed[clicked], axis=1).mean()
    assert 1 / 3 < ratio < 3


@pytest.mark.parametrize("mode", MODES)
def test_a_state_depends_on_its_row_alone_and_not_on_skips_or_places(mode):
    purifier = ClickVectorPurifier.fit(TRAIN, dataclasses.replace(CONFIGS[mode], steps=3))
    purifier.bind(TEST)
    window = TEST.initial_history.take(TEST.users[:40])
    states = observed_states(TEST, window)
    whole = purifier.purify(states, window)
    for row in (0, 17, 39):
        one = purifier.purify(states[[row]], window.take(np.asarray([row])))
        np.testing.assert_allclose(one[0], whole[row], atol=1e-4)
    only_clicks = HistoryWindow(np.where(window.clicks, window.items, -1)[:, ::-1], window.clicks[:, ::-1])
    np.testing.assert_allclose(purifier.purify(states, only_clicks), whole, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_training_is_repeatable_and_a_file_gives_the_same_bytes(mode, tmp_path):
    config = dataclasses.replace(CONFIGS[mode], steps=3)
    for name in ("first", "second"):
        save_purifier(ClickVectorPurifier.fit(TRAIN, config), tmp_path / name)
    save_purifier(load_purifier(tmp_path / "first"), tmp_path / "third")
    assert len({(tmp_path / name).read_bytes() for name in ("first", "second", "third")}) == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dimension", [8, 64, 256])
def test_states_have_the_dimension_of_the_embeddings(mode, dimension):
    world = dataclasses.replace(small_world(0.4), split="train")
    rng = np.random.default_rng(0)
    world = dataclasses.replace(world, embeddings=rng.normal(size=(50, dimension)).astype(np.float32))
    purifier = ClickVectorPurifier.fit(world, dataclasses.replace(CONFIGS[mode], steps=2))
    assert purifier.bind(world).shape == (dimension,)
    window = world.initial_history
    states = purifier.purify(observed_states(world, window), window)
    assert states.shape == (40, dimension) and np.isfinite(states).all()


def test_held_out_users_are_not_learned_from():
    config = dataclasses.replace(CONFIGS["cdae"], steps=10)
    train = TRAIN.data.train
    rows = np.isin(train.users, TEST.users)
    changed = dataclasses.replace(train, clicks=np.where(rows, ~train.clicks, train.clicks))
    world = dataclasses.replace(TRAIN, data=dataclasses.replace(TRAIN.data, train=changed))
    network, report = train_click_vectors(world, config)
    plain, _ = train_click_vectors(TRAIN, config)
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(network.state_dict()[name], value)
    assert report["training_users"] + report["validation_users"] == len(TRAIN.users)


def test_the_test_world_and_logs_without_clicks_are_refused():
    with pytest.raises(ValueError, match="training world"):
        train_click_vectors(TEST, CONFIGS["cdae"])
    log = TRAIN.data.train
    silent = dataclasses.replace(TRAIN.data, train=dataclasses.replace(log, clicks=np.zeros(len(log), np.bool_)))
    with pytest.raises(DataError, match="nothing to learn"):
        train_click_vectors(dataclasses.replace(TRAIN, data=silent), CONFIGS["cdae"])


@pytest.mark.parametrize(
    ("config", "bad"),
    [
        (CDAEConfig, {"corruption": 1.0}),
        (CDAEConfig, {"negatives": 0}),
        (CDAEConfig, {"top": 0}),
        (DiffRecConfig, {"levels": 0}),
        (DiffRecConfig, {"noise_scale": 0.0}),
        (DiffRecConfig, {"min_noise": 0.1}),
        (DiffRecConfig, {"dropout": 1.0}),
        (DiffRecConfig, {"steps": 0}),
    ],
)
def test_settings_out_of_range_are_refused(config, bad):
    with pytest.raises(ValueError):
        config(**bad)
