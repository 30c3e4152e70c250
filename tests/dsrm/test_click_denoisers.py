"""T-CE, R-CE and BOD: the losses by hand, and what the trained denoisers make of a log with known false clicks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_worlds import taste_worlds
from torch.nn import functional

from dsrm import click_denoisers as losses
from dsrm.click_denoisers import DENOISING_LOSSES, ClickModelConfig, train_click_model

TRAIN, TEST = taste_worlds()


def test_truncated_cross_entropy_drops_the_positives_of_the_largest_loss_and_no_negative():
    logits = torch.tensor([3.0, -4.0, 0.5, 5.0, -2.0])
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    assert losses.truncated_cross_entropy(logits, labels, 0.0) == pytest.approx(float(each.mean()))
    # One row of five: row 1, the positive with logit -4, although row 3, a negative, has the larger loss.
    remaining = each[[0, 2, 3, 4]].mean()
    assert losses.truncated_cross_entropy(logits, labels, 0.2) == pytest.approx(float(remaining))


def test_the_drop_rate_rises_linearly_and_stays():
    config = ClickModelConfig("tce", steps=20)
    rates = [config.drop_rate_at(step) for step in (0, 5, 10, 50)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.2])


def test_reweighting_follows_the_formula_and_its_weights_have_no_gradient():
    logits = torch.tensor([1.0, -0.5], requires_grad=True)
    labels = torch.tensor([1.0, 0.0])
    p = [1 / (1 + math.exp(-1.0)), 1 / (1 + math.exp(0.5))]
    expected = (p[0] ** 0.25 * -math.log(p[0]) + (1 - p[1]) ** 0.25 * -math.log(1 - p[1])) / 2
    loss = losses.reweighted_cross_entropy(logits, labels, 0.25)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert float(logits.grad[0]) == pytest.approx(p[0] ** 0.25 * (p[0] - 1) / 2, rel=1e-5)


def test_bod_losses_against_their_formulas():
    rng = np.random.default_rng(0)
    user, positive, negative = (torch.tensor(rng.normal(size=(4, 3))) for _ in range(3))
    of_positive, of_negative = torch.tensor(rng.random((2, 4)))
    u, i, j, gi, gj = (part.numpy() for part in (user, positive, negative, of_positive, of_negative))
    score = gi * (u * i).sum(1) - gj * (u * j).sum(1)
    assert float(losses.weighted_bpr(user, positive, negative, of_positive, of_negative)) == pytest.approx(
        np.log1p(np.exp(-score)).mean()
    )
    cosine = (u * i).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(i, axis=1)
    assert float(losses.weighted_alignment(user, positive, of_positive)) == pytest.approx(
        (gi * (2 - 2 * cosine)).mean()
    )
    # Vectors that all coincide are the least uniform: log mean exp(0) = 0.
    assert float(losses.uniformity(torch.ones(5, 3))) == pytest.approx(0.0, abs=1e-6)


def test_bods_outer_loss_falls_along_its_gradient_in_the_weights():
    rng = np.random.default_rng(1)
    user, positive, negative = (
        torch.tensor(rng.normal(size=(64, 5)), dtype=torch.float32).requires_grad_() for _ in range(3)
    )
    weights = torch.tensor(rng.normal(size=(2, 64)), dtype=torch.float32).requires_grad_()

    def loss():
        return losses.bod_outer_loss(user, positive, negative, *weights.sigmoid())

    before = loss()
    (gradient,) = torch.autograd.grad(before, weights)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        weights -= 0.5 * gradient / gradient.norm()
    assert float(loss().detach()) < float(before.detach())


def test_weights_follow_the_recipes(purifiers):
    window = TEST.initial_history.take(TEST.users)
    clicks = window.clicks.sum(axis=1)
    for loss in DENOISING_LOSSES:
        denoiser = purifiers[loss]
        denoiser.bind(TEST)
        weights = denoiser.weights(window)
        assert (weights[~window.clicks] == 0).all()
        if loss == "tce":
            counted = (weights > 0).sum(axis=1)
            np.testing.assert_array_equal(counted, clicks - np.floor(0.2 * clicks + 1e-6))
            assert set(np.unique(weights)) <= {0.0, 1.0}
        else:
            assert ((weights > 0) & (weights < 1))[window.clicks].all()


def test_a_denoised_state_is_the_weighted_mean_of_the_clicked_embeddings(purifiers):
    window = TEST.initial_history.take(TEST.users[:7])
    denoiser = purifiers["rce"]
    denoiser.bind(TEST)
    weights = denoiser.weights(window)
    purified = denoiser.purify(np.zeros((7, TEST.dimension), np.float32), window)
    for row in range(7):
        places = np.flatnonzero(window.clicks[row])
        vectors = TEST.embeddings[window.items[row, places]]
        expected = weights[row, places] @ vectors / weights[row].sum()
        np.testing.assert_allclose(purified[row], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", DENOISING_LOSSES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_click_model_learns_tastes(loss, seed):
    # Factors of items with one tag must lie closer together than those of items with different tags. The first 24
    # items are clicked by everybody, whatever their tag.
    config = ClickModelConfig(loss, dimension=16, steps=300, batch_size=512, learning_rate=0.05, seed=seed)
    vectors = train_click_model(TRAIN, config).history.weight.detach().numpy()[24:]
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    tags = TEST.data.items.tags.argmax(axis=1)[24:]
    cosines, same, itself = units @ units.T, tags[:, None] == tags, np.eye(len(tags), dtype=bool)
    assert cosines[same & ~itself].mean() > cosines[~same].mean() + 0.02


@pytest.mark.parametrize(
    "bad",
    [
        {"loss": "magic"},
        {"loss": "tce", "drop_rate": 1.0},
        {"loss": "bod", "steps": 0},
    ],
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        ClickModelConfig(**bad)
