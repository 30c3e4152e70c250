"""Beliefs: the mode and spread of dense reference computations, their properties, and what is kept of sessions."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import small_world
from scipy.special import expit
from torch import Tensor

from dsrm.belief import Belief, BeliefItems, BeliefScales, SessionBeliefs, evidence_kept
from dsrm.click_scorer import ClickScorer
from dsrm.item_sites import click_probabilities, posterior_offsets
from dsrm.own_level import STEADY, OwnLevel, OwnMoments, OwnScales
from dsrm.shared_level import PRIOR_PARAMETERS, SharedLevel, SharedScales
from kuaifair_env.data.schema import FeatureTable
from kuaifair_env.errors import ArtifactError
from kuaifair_env.randomisation import offset_shape

WIDE = OwnScales(3.0, 3.0, 3.0)


def features_of(n_items: int, dimension: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A column of ones and unit embeddings; the last two items have none."""
    rng = np.random.default_rng(seed)
    units = rng.normal(size=(n_items, dimension))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    units[-2:] = 0.0
    return torch.from_numpy(np.column_stack([np.ones(n_items), units])).to(dtype)


def level_with(
    features: Tensor, base: Tensor, shows: np.ndarray, clicks: np.ndarray, scales: OwnScales, seed: int = 0
) -> OwnLevel:
    """Posteriors given ``shows`` and ``clicks (B, N)``, taken each item once in a slate, in a random order."""
    level = OwnLevel(features, len(shows), scales)
    rng = np.random.default_rng(seed)
    for row in range(len(shows)):
        answers = [rng.permutation(shown) < clicked for shown, clicked in zip(shows[row], clicks[row], strict=True)]
        for turn in rng.permutation(shows[row].max()):
            items = rng.permutation(np.flatnonzero(shows[row] > turn))
            clicked = torch.tensor([[bool(answers[item][turn]) for item in items]])
            level.observe(torch.tensor([row]), torch.from_numpy(items)[None], clicked, base)
    level.converge(base)
    return level


def dense_posterior(
    features: Tensor, base: np.ndarray, shows: np.ndarray, clicks: np.ndarray, scales: OwnScales
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design matrix, mode and Laplace covariance of all parameters at once, by Newton's method.

    Parameters are standardised: an intercept, the tastes, and an offset for each item.
    """
    n_items, size = features.shape
    widths = np.r_[scales.intercept, np.full(size - 1, scales.taste)]
    design = np.column_stack([features.numpy() * widths, scales.offset * np.eye(n_items)])
    point = np.zeros(design.shape[1])

    def loss(at: np.ndarray) -> float:
        logits = base + design @ at
        return float((shows * np.logaddexp(0, logits) - clicks * logits).sum() + at @ at / 2)

    for _ in range(200):
        chance = expit(base + design @ point)
        gradient = design.T @ (shows * chance - clicks) + point
        hessian = np.eye(len(point)) + design.T @ (design * (shows * chance * (1 - chance))[:, None])
        step = np.linalg.solve(hessian, gradient)
        length = 1.0
        while loss(point - length * step) > loss(point) + 1e-12 and length > 1e-9:
            length /= 2
        point = point - length * step
        if np.abs(step).max() < 1e-11:
            break
    return design, point, np.linalg.inv(hessian)


def evidence(kind: str, rng: np.random.Generator, rows: int, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    shows = np.zeros((rows, n_items), np.int64)
    for row in shows:
        row[rng.permutation(n_items)[: n_items // 2]] = 1
    if kind == "many":
        shows[:, :3] = 100
    if kind == "repeats":
        shows *= rng.integers(1, 30, shows.shape)
    likes = rng.random(shows.shape) < 0.5
    clicks = np.where(likes, shows, 0) if kind != "repeats" else rng.binomial(shows, rng.random(shows.shape))
    if kind == "all clicks":
        clicks = shows.copy()
    return shows, clicks


@pytest.mark.parametrize("kind", ["once", "repeats", "many", "all clicks"])
@pytest.mark.parametrize("scales", [OwnScales(), OwnScales(0.5, 0.5, 0.0), OwnScales(0.0, 0.0, 2.0), WIDE])
def test_mode_spread_and_moments_are_those_of_a_dense_newton_method(kind, scales):
    rng = np.random.default_rng(3)
    features = features_of(30, 8)
    shows, clicks = evidence(kind, rng, 2, 30)
    base = 2.0 * rng.normal(size=(2, 30))
    level = level_with(features, torch.from_numpy(base), shows, clicks, scales)
    everything = torch.arange(30).expand(2, -1)
    for row in range(2):
        design, mode, covariance = dense_posterior(features, base[row], shows[row], clicks[row], scales)
        variances = np.einsum("ij,jk,ik->i", design, covariance, design)
        assert level.logits()[row].numpy() == pytest.approx(design @ mode, abs=1e-6)
        assert level.variances(everything)[row].numpy() == pytest.approx(variances, abs=1e-6)
        moments = level.moments(torch.tensor([row]))
        of_prior = 1.0 - np.diag(covariance)
        shown = 9 + np.flatnonzero(shows[row])
        squares = (mode * np.r_[scales.intercept, np.full(8, scales.taste), np.full(30, scales.offset)]) ** 2
        groups = (slice(0, 1), slice(1, 9), shown)
        assert moments.squares.numpy() == pytest.approx([squares[group].sum() for group in groups], abs=1e-6)
        determined = [of_prior[group].sum() for group in groups[: 3 if scales.offset else 2]]
        assert moments.determined.numpy()[: len(determined)] == pytest.approx(determined, abs=1e-6)


@pytest.mark.parametrize("dimension", [8, 64, 256])
def test_single_precision_finds_the_mode_too(dimension):
    rng = np.random.default_rng(0)
    features = features_of(60, dimension)
    shows, clicks = evidence("repeats", rng, 2, 60)
    base = rng.normal(size=(2, 60))
    level = level_with(features.float(), torch.from_numpy(base).float(), shows, clicks, OwnScales())
    for row in range(2):
        design, mode, _ = dense_posterior(features, base[row], shows[row], clicks[row], OwnScales())
        assert level.logits()[row].numpy() == pytest.approx(design @ mode, abs=1e-4)


@pytest.mark.parametrize("scales", [OwnScales(), OwnScales(0.5, 0.5, 0.5), WIDE])
@pytest.mark.parametrize("repeats", [True, False])
def test_a_few_warm_steps_after_each_slate_stay_close_to_the_mode(scales, repeats):
    rng = np.random.default_rng(1)
    n_items, rows = 400, torch.arange(4)
    features = features_of(n_items, 16, dtype=torch.float32)
    warm, exact = OwnLevel(features, 4, scales), OwnLevel(features.double(), 4, scales)
    base = torch.from_numpy(rng.normal(size=(4, n_items)))
    taste = 1.5 * rng.normal(size=(4, 17)) @ features.numpy().T.astype(np.float64)
    order = np.argsort(rng.random((4, n_items)), axis=1)
    for step in range(35):
        items = order[:, rng.permutation(40)[:10]] if repeats else order[:, 10 * step : 10 * step + 10]
        chance = expit(np.take_along_axis(base.numpy() + taste, items, axis=1))
        clicks = torch.from_numpy(rng.random(items.shape) < chance)
        if step % 5 == 0:  # as the shared level moves
            base = base + 0.1 * torch.from_numpy(rng.normal(size=n_items))
        for level in (warm, exact):
            level.observe(rows, torch.from_numpy(items), clicks, base)
        warm.update(base.float())
        exact.converge(base)
        assert (warm.logits() - exact.logits()).abs().max() < 0.01
        spreads = [level.variances(torch.from_numpy(items)).double().sqrt() for level in (warm, exact)]
        # The curvature is that before the steps.
        torch.testing.assert_close(*spreads, rtol=0.6 if scales == WIDE else 0.1, atol=0.0)


@pytest.mark.parametrize("seed", range(3))
def test_users_who_surprise_are_followed_to_their_mode_too(seed):
    """With the curvature before a step, some of these were .36 to 1.10 log-odds away."""
    rng = np.random.default_rng(seed)
    n_items, n_users = 200, 32
    features, rows = features_of(n_items, 16, dtype=torch.float32), torch.arange(n_users)
    scales = OwnScales(1.0, 1.0, steady=STEADY)
    warm, exact = OwnLevel(features, n_users, scales), OwnLevel(features.double(), n_users, scales)
    base = torch.from_numpy(1.5 * rng.normal(size=(n_users, n_items)) - 3.0)
    taste = 4.0 * rng.normal(size=(n_users, 17)) @ features.numpy().T.astype(np.float64)
    known = rng.random((n_users, n_items)).argsort(axis=1)[:, :20]
    for _ in range(10):
        items = np.take_along_axis(known, rng.random(known.shape).argsort(axis=1)[:, :10], axis=1)
        chance = expit(np.take_along_axis(base.numpy() + taste, items, axis=1))
        clicks = torch.from_numpy(rng.random(items.shape) < chance)
        for level in (warm, exact):
            level.observe(rows, torch.from_numpy(items), clicks, base)
        warm.update(base.float())
        exact.converge(base)
        assert (warm.logits() - exact.logits()).abs().max() < 0.03


@pytest.mark.parametrize("scales", [OwnScales(), WIDE])
def test_a_belief_that_forgets_counts_each_answer_less_with_every_later_slate(scales):
    rng, kept = np.random.default_rng(2), 0.8
    features, rows, base = features_of(30, 8), torch.arange(2), rng.normal(size=(2, 30))
    level = OwnLevel(features, 2, scales, kept)
    shows, clicks = np.zeros((2, 30)), np.zeros((2, 30))
    for _ in range(12):
        items = rng.random((2, 30)).argsort(axis=1)[:, :5]
        clicked = rng.random(items.shape) < 0.4
        level.observe(rows, torch.from_numpy(items), torch.from_numpy(clicked), torch.from_numpy(base))
        level.update(torch.from_numpy(base))
        for counts, counted in ((shows, np.ones_like(clicked)), (clicks, clicked)):
            counts *= kept
            counts[rows.numpy()[:, None], items] += counted
        for row in range(2):
            design, mode, covariance = dense_posterior(features, base[row], shows[row], clicks[row], scales)
            assert level.logits()[row].numpy() == pytest.approx(design @ mode, abs=0.01)
            spread = np.sqrt(np.einsum("ij,jk,ik->i", design, covariance, design))
            found = level.variances(torch.arange(30).expand(2, -1))[row].sqrt().numpy()
            assert found == pytest.approx(spread, rel=0.6 if scales == WIDE else 0.1)


@pytest.mark.parametrize("kept", [0.0, 1.5, float("nan")])
def test_a_share_of_the_evidence_is_kept_and_no_more_than_there_is(kept):
    with pytest.raises(ValueError, match="kept must be a number in"):
        OwnLevel(features_of(10, 4), 1, kept=kept)


def test_a_user_who_turns_round_is_followed_sooner_by_a_belief_that_forgets():
    features = torch.tensor([[1.0, 1.0]] * 20 + [[1.0, -1.0]] * 20, dtype=torch.float64)
    base, rows = torch.zeros(1, 40, dtype=torch.float64), torch.tensor([0])
    forgets, remembers = OwnLevel(features, 1, kept=0.8), OwnLevel(features, 1)
    turned = {forgets: 15, remembers: 15}
    for slate in range(15):
        items = torch.cat([torch.arange(5), torch.arange(20, 25)])[None] + slate % 4 * 5
        clicks = (items < 20) if slate < 8 else (items >= 20)
        for level in turned:
            level.observe(rows, items, clicks, base)
            level.converge(base)
            if level.means[0, 1] < 0:
                turned[level] = min(turned[level], slate)
    assert 8 <= turned[forgets] < turned[remembers]


def test_what_is_kept_of_an_answer_is_the_variance_that_a_drifting_taste_shares_with_it():
    assert evidence_kept(None) == 1.0
    for slates in (1.0, 15.0):  # after so many slates the correlation is .5
        assert evidence_kept(slates) ** slates == pytest.approx(0.5**2)


def test_order_of_the_evidence_does_not_matter():
    rng = np.random.default_rng(5)
    features = features_of(40, 8)
    shows, clicks = evidence("repeats", rng, 2, 40)
    shows, clicks = shows // 5, np.minimum(clicks, shows // 5)
    base = torch.from_numpy(rng.normal(size=(2, 40)))
    one, two = (level_with(features, base, shows, clicks, OwnScales(), seed) for seed in (0, 1))
    assert torch.allclose(one.logits(), two.logits(), atol=1e-9)


def test_without_evidence_the_posterior_is_the_prior_and_a_session_starts_anew():
    features = features_of(20, 8, dtype=torch.float32)
    level = OwnLevel(features, 2)
    base = torch.randn(2, 20)
    items = torch.arange(20).expand(2, -1)
    level.update(base)
    assert (level.logits() == 0).all()
    assert level.variances(items)[:, :-2].numpy() == pytest.approx(0.5**2 + 1.0 + 0.7**2)
    level.observe(torch.tensor([1]), torch.tensor([[3]]), torch.tensor([[True]]), base)
    level.update(base)
    assert (level.logits()[0] == 0).all()
    assert level.logits()[1, 3] > level.logits()[1].abs()[torch.arange(20) != 3].max()
    level.start(torch.tensor([1]))
    level.update(base)
    assert (level.logits() == 0).all()


def test_other_scales_in_the_middle_give_the_posterior_of_these_scales():
    rng = np.random.default_rng(2)
    features, base = features_of(30, 8), torch.from_numpy(rng.normal(size=(2, 30)))
    shows, clicks = evidence("once", rng, 2, 30)
    one, two = (level_with(features, base, shows, clicks, scales) for scales in (OwnScales(), WIDE))
    one.rescale(WIDE)
    one.update(base)
    assert torch.allclose(one.logits(), two.logits(), atol=0.01)
    one.converge(base)
    assert torch.allclose(one.logits(), two.logits(), atol=1e-6)


@pytest.mark.parametrize("wide", [1.0, 1e3])
@pytest.mark.parametrize("shows", [1, 10, 10_000])
def test_offsets_solve_their_equation_from_any_start(wide, shows):
    logits, share = torch.meshgrid(torch.linspace(-9, 9, 19), torch.linspace(0, 1, 11), indexing="ij")
    logits, clicks = logits.double(), (share * shows).round().double()
    for start in (-50.0, 0.0, 50.0):
        offsets = posterior_offsets(
            logits, torch.full_like(clicks, shows), clicks, wide, torch.full_like(clicks, start)
        )
        answer = wide * (clicks - shows * torch.sigmoid(logits + offsets))
        slope = 1 + wide * shows * torch.sigmoid(logits + offsets) * torch.sigmoid(-logits - offsets)
        assert ((offsets - answer).abs() / slope).max() < 1e-6


def offset_alone(scale: float, base: float, shows: int, clicks: int) -> tuple[OwnLevel, Tensor]:
    one = torch.ones(1, 1, dtype=torch.float64)
    counts = np.asarray([[shows]]), np.asarray([[clicks]])
    return level_with(one, base * one, *counts, OwnScales(0.0, 0.0, scale)), base * one


def moments_of(log_density: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    weights = np.exp(log_density - log_density.max())
    weights /= weights.sum()
    mean = float((weights * values).sum())
    return mean, float((weights * (values - mean) ** 2).sum())


def offset_moments(scale: float, base: float, shows: int, clicks: int) -> tuple[float, float]:
    """Mean and variance of an offset's posterior by brute force."""
    grid = np.linspace(-9 * scale - 6, 9 * scale + 6, 6001)
    answers = clicks * (base + grid) - shows * np.logaddexp(0, base + grid)
    return moments_of(answers - grid**2 / (2 * scale**2), grid)


CASES = [
    (base, shows, clicks) for base in (-2.0, 0.0, 2.0) for shows in (1, 3, 10) for clicks in {0, shows // 2, shows}
]


@pytest.mark.parametrize("scale", [0.2, 0.35, 0.5])
def test_modes_are_close_to_the_means_of_brute_force_where_scales_are_narrow(scale):
    for case in CASES:
        level, _ = offset_alone(scale, *case)
        assert level.logits().item() == pytest.approx(offset_moments(scale, *case)[0], abs=0.02)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_matched_moments_are_those_of_brute_force_however_wide_the_prior(scale):
    for case in [*CASES, (-3.0, 100, 0), (3.0, 100, 1)]:
        level, base = offset_alone(scale, *case)
        level.match_moments(base)
        mean, variance = offset_moments(scale, *case)
        assert level.logits().item() == pytest.approx(mean, abs=0.005)
        assert level.variances(torch.zeros(1, 1, dtype=torch.int64)).item() == pytest.approx(variance, rel=0.02)


def test_matched_moments_without_evidence_are_those_of_the_prior():
    features = features_of(20, 8)
    level, base = OwnLevel(features, 2), torch.zeros(2, 20, dtype=torch.float64)
    level.match_moments(base)
    assert (level.logits() == 0).all()
    items = torch.arange(18).expand(2, -1)
    assert level.variances(items).numpy() == pytest.approx(0.5**2 + 1.0 + 0.7**2)


@pytest.mark.parametrize(("scale", "tolerance"), [(0.5, 0.005), (1.0, 0.01), (3.0, 0.06)])
def test_matched_moments_of_several_items_are_close_to_brute_force(scale, tolerance):
    grid = np.linspace(-8 * scale, 8 * scale, 321)
    intercepts, tastes = np.meshgrid(grid, grid, indexing="ij")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        side = rng.choice([-1.0, 1.0], size=8)
        shows, base = rng.integers(1, 8, 8), 2.0 * rng.normal(size=8)
        clicks = rng.binomial(shows, expit(base + scale * rng.normal() + scale * rng.normal() * side))
        features, bases = torch.from_numpy(np.column_stack([np.ones(8), side])), torch.from_numpy(base)[None]
        level = level_with(features, bases, shows[None], clicks[None], OwnScales(scale, scale, 0.0))
        mode = level.logits()[0].numpy()
        level.match_moments(bases)
        log = -(intercepts**2 + tastes**2) / (2 * scale**2)
        for item in range(8):
            logits = base[item] + intercepts + side[item] * tastes
            log += clicks[item] * logits - shows[item] * np.logaddexp(0, logits)
        means = np.asarray([moments_of(log, intercepts + one * tastes)[0] for one in side])
        matched = level.logits()[0].numpy()
        assert matched == pytest.approx(means, abs=tolerance)
        assert np.abs(matched - means).max() < max(np.abs(mode - means).max(), 1e-3)
        level.converge(bases)
        assert level.logits()[0].numpy() == pytest.approx(mode, abs=1e-6)


@pytest.mark.parametrize("overstates", [True, False])
def test_shared_posterior_is_that_of_the_dense_gaussian_model(overstates):
    """With the log's columns, where its differences are too large; without, where they are too small."""
    rng = np.random.default_rng(0)
    n_items, dimension = 40, 6
    columns, said = features_of(n_items, dimension), rng.normal(size=(n_items, 3))
    deviations = torch.from_numpy(offset_shape(rng.integers(0, 500, n_items)))
    scales = SharedScales(vector=0.8, offset=1.3, intercept=0.6, log=0.25)
    level = SharedLevel({"vector": columns[:, 1:], "log": torch.from_numpy(said)}, deviations, scales)
    items = rng.integers(0, n_items - 10, 300)
    weights = rng.uniform(0.05, 0.25, 300)
    values = rng.normal(size=300) + (-said[items, 0] if overstates else said[items, 0])
    for part in np.array_split(rng.permutation(300), 7):
        level.add(*(torch.from_numpy(array[part]) for array in (items, weights, values)))
    level.update(reestimate=False)
    prior = np.r_[0.6, np.full(dimension, 0.8), np.full(3, 0.25 if overstates else 1e-9), 1.3 * deviations.numpy()] ** 2
    design = np.column_stack([columns.numpy(), said, np.eye(n_items)])
    shown = design[items]
    precision = np.diag(1 / prior) + shown.T @ (shown * weights[:, None])
    point = np.linalg.solve(precision, shown.T @ (weights * values))
    assert level.mean.numpy() == pytest.approx(design @ point, abs=1e-9)
    alone = 1 / (1 / prior[-n_items:] + np.bincount(items, weights, n_items))
    assert level.deviation.numpy() == pytest.approx(np.sqrt(alone), abs=1e-9)
    assert level.scales == scales


def test_shared_scales_are_found_from_wide_ones():
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n_items, dimension = 2_000, 32
        columns = features_of(n_items, dimension, seed)
        deviations = torch.full((n_items,), 0.5, dtype=torch.float64)
        truth = columns[:, 1:].numpy() @ (0.3 * rng.normal(size=dimension)) + 0.2 * rng.normal(size=n_items)
        level = SharedLevel({"vector": columns[:, 1:]}, deviations, SharedScales())
        items = np.repeat(np.arange(n_items), 40)
        answers = truth[items] + rng.normal(size=len(items)) / np.sqrt(0.2)
        level.add(*(torch.from_numpy(array) for array in (items, np.full(len(items), 0.2), answers)))
        for _ in range(60):
            level.update()
        found.append((level.scales.vector, level.scales.offset * 0.5))
    assert np.mean(found, axis=0) == pytest.approx((0.3, 0.2), rel=0.25)


def items_of(n_items: int = 60, dimension: int = 8) -> BeliefItems:
    embeddings = features_of(n_items, dimension, dtype=torch.float32)[:, 1:].numpy()
    ids = np.arange(n_items)
    none = np.zeros((n_items, 0), np.float32)
    return BeliefItems("data", ids, embeddings, ids, none, none)


def test_features_of_candidates_have_length_one_whatever_their_units():
    """Of columns that differ between candidates alone, and an outlier counts for three deviations."""
    world = small_world(candidates=40)

    def read(values: np.ndarray) -> np.ndarray:
        features = FeatureTable(values.astype(np.float32), ("one", "two", "alike"))
        items = replace(world.data.items, features=features)
        return BeliefItems.of_world(replace(world, data=replace(world.data, items=items))).features

    values = np.random.default_rng(0).uniform(size=(50, 3))
    values[:40, 2] = 7.0
    features = read(values)
    assert features.shape == (40, 2 + world.tags.shape[1])
    assert features.mean(axis=0) == pytest.approx(0.0, abs=1e-5)
    assert (features**2).sum(axis=1).mean() == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(read(1_000.0 * values - 50.0), features, atol=1e-4)
    values[0, 0] = 1e6
    assert read(values)[0, 0] == read(values).max() == pytest.approx(3.0 / np.sqrt(features.shape[1]), rel=1e-5)


def test_what_a_log_says_of_items_is_score_exposures_and_both_together():
    world = small_world(candidates=40)
    scorer = ClickScorer.fit(world)
    score, exposed, both = BeliefItems.of_world(world, scorer).log.T
    assert np.corrcoef(score, scorer.item_scores)[0, 1] > 0.95
    assert np.corrcoef(exposed, np.log1p(world.exposures))[0, 1] > 0.95
    for column in (score, exposed):
        assert np.abs(column).max() <= 3.0
        assert (column.mean(), column.std()) == pytest.approx((0.0, 1.0), abs=0.1)
    np.testing.assert_allclose(both, score * exposed, rtol=1e-5)
    alike = replace(scorer, item_scores=np.full_like(scorer.item_scores, -1.0))
    assert not BeliefItems.of_world(world, alike).log[:, [0, 2]].any()
    assert BeliefItems.of_world(world).log.shape == (40, 0)
    with pytest.raises(ValueError, match="click scorer"):
        Belief(BeliefItems.of_world(world), BeliefScales(shared=SharedScales(log=0.25)))


@pytest.mark.slow
def test_a_belief_learns_from_some_items_how_far_the_log_is_to_be_trusted_about_others():
    """The log makes three times too much of the differences between items; half of the items are never shown."""
    errors: dict[float, list[float]] = {0.0: [], 0.25: []}
    for seed in range(3):
        scores = np.random.default_rng(seed).normal(size=60)
        said = np.zeros((60, 3), np.float32)
        said[:, 0] = scores
        for scale, found in errors.items():
            belief = Belief(replace(items_of(), log=said), BeliefScales(shared=SharedScales(log=scale)))
            for block in range(3):
                shown = np.arange(30)
                serve_sessions(belief, 50, 100 * seed + block, OwnScales(0.1, 0.1, 0.1), -2 / 3 * scores, shown)
            wrong = belief.shared.mean.numpy()[30:] + 2 / 3 * scores[30:]
            found.append(float(wrong.std()))
    assert np.mean(errors[0.25]) < np.mean(errors[0.0]) / 2
    assert max(errors[0.25]) < min(errors[0.0])


def test_the_log_is_trusted_at_its_word_at_most():
    """The log makes too little of the differences between items: a belief does as if it took it at its word."""
    scores = np.random.default_rng(0).normal(size=60)
    said = np.zeros((60, 3), np.float32)
    said[:, 0] = scores
    means = []
    for scale in (0.0, 0.25):
        belief = Belief(replace(items_of(), log=said), BeliefScales(shared=SharedScales(log=scale)))
        for block in range(3):
            serve_sessions(belief, 50, block, OwnScales(0.1, 0.1, 0.1), scores, np.arange(30))
        means.append(belief.shared.mean.numpy())
    np.testing.assert_allclose(*means, atol=1e-5)


def serve_sessions(
    belief: Belief,
    n_sessions: int,
    seed: int,
    own: OwnScales,
    shared: np.ndarray,
    shown_items: np.ndarray | None = None,
) -> None:
    """Sessions of random slates, of some items or all, whose users follow the belief's own model."""
    rng = np.random.default_rng(seed)
    items, rows = belief.items, torch.arange(n_sessions)
    n_items = len(items.embeddings)
    sessions = SessionBeliefs(belief, n_sessions)
    prior = rng.normal(size=(n_sessions, n_items)).astype(np.float32)
    sessions.start(rows, torch.from_numpy(prior))
    taste = own.taste * rng.normal(size=(n_sessions, items.embeddings.shape[1])) @ items.embeddings.T
    truth = prior + shared + taste + own.intercept * rng.normal(size=(n_sessions, 1))
    truth += own.offset * rng.normal(size=truth.shape)
    everybody = torch.ones(n_sessions, dtype=torch.bool)
    for step in range(12):
        sessions.logits()
        order = rng.random((n_sessions, n_items))
        if shown_items is not None:
            order[:, np.setdiff1d(np.arange(n_items), shown_items)] = 2.0
        slates = np.argsort(order, axis=1)[:, :10]
        clicks = rng.random(slates.shape) < expit(np.take_along_axis(truth, slates, axis=1))
        shown = torch.from_numpy(slates), torch.from_numpy(clicks)
        sessions.learn(*shown, everybody, everybody if step == 11 else ~everybody)
        sessions.observe(rows, *shown)


def test_shared_level_learns_what_all_users_share_and_own_scales_shrink():
    correlations, scales = [], []
    for seed in range(3):
        belief = Belief(items_of())
        shared = np.random.default_rng(seed).normal(size=60)
        for block in range(6):
            serve_sessions(belief, 50, 100 * seed + block, OwnScales(0.1, 0.1, 0.1), shared)
        correlations.append(np.corrcoef(belief.shared.mean.numpy(), shared)[0, 1])
        scales.append((belief.own_scales.taste, belief.own_scales.offset))
    assert np.mean(correlations) > 0.9
    assert (np.mean(scales, axis=0) < (0.5, 0.5)).all()
    assert belief.sessions == 300
    assert all(before.sessions <= after.sessions for before, after in pairwise(belief.course))
    assert belief.course[-1].scales.own == belief.own_scales


def own_moments(squares: list[float], determined: list[float]) -> OwnMoments:
    return OwnMoments(*(torch.tensor(part, dtype=torch.float64) for part in (squares, determined)), 0.0, 0)


def test_own_scales_are_a_fixed_point_of_what_sessions_say_of_which_older_ones_count_less():
    """MacKay's: squares over determined parameters, as if the prior had determined one of its first size itself."""
    first = np.asarray([0.5, 1.0, 0.7])
    belief = Belief(items_of())
    assert belief.course == [(0, BeliefScales())]
    belief.move(own_moments([0, 0, 0], [0, 0, 0]))
    assert astuple(belief.own_scales)[:3] == pytest.approx(first, rel=1e-12)
    said = [
        ([3.0, 40.0, 2.0], [5.0, 20.0, 9.0]),
        ([1.0, 70.0, 0.5], [7.0, 10.0, 4.0]),
        ([2.0, 5.0, 6.0], [1.0, 3.0, 8.0]),
    ]
    belief.remember(own_moments(*said[0]), 3)
    belief.remember(own_moments(*said[1]), 50)
    belief.move(own_moments(*said[2]))
    kept = np.asarray([(1 - 1 / 200) ** 50, 1.0, 1.0])
    squares, determined = (kept @ np.asarray([part[place] for part in said]) for place in (0, 1))
    expected = np.sqrt((squares + PRIOR_PARAMETERS * first**2) / (determined + PRIOR_PARAMETERS))
    assert astuple(belief.own_scales)[:3] == pytest.approx(expected, rel=1e-12)
    assert belief.sessions == 53
    assert [then.sessions for then in belief.course] == [0, 0, 53]
    belief.move(None)
    assert astuple(belief.own_scales)[:3] == pytest.approx(expected, rel=1e-12)


def test_each_fifth_step_moves_the_shared_level_and_each_tenth_the_scales():
    belief = Belief(items_of())
    sessions = SessionBeliefs(belief, 2)
    sessions.start(torch.arange(2), torch.zeros(2, 60))
    everybody, moved, rescaled = torch.ones(2, dtype=torch.bool), [], []
    rng = np.random.default_rng(0)
    for step in range(1, 31):
        sessions.logits()
        before = belief.shared.mean.clone(), belief.own_scales
        items = torch.from_numpy(np.stack([rng.permutation(60)[:10] for _ in range(2)]))
        clicks = torch.from_numpy(rng.random((2, 10)) < 0.7)
        # Nobody who still runs says anything of the scales at the last step.
        sessions.learn(items, clicks, everybody, everybody if step == 30 else ~everybody)
        sessions.observe(torch.arange(2), items, clicks)
        moved += [step] if not torch.equal(belief.shared.mean, before[0]) else []
        rescaled += [step] if belief.own_scales != before[1] else []
        assert belief.steps == step
    assert moved == [5, 10, 15, 20, 25, 30] and len(belief.course) == 7
    assert rescaled == [10, 20]


def played(sessions: SessionBeliefs, rng: np.random.Generator, n_steps: int) -> tuple[np.ndarray, ...]:
    """Shows random slates of forty items; returns how often each was shown and clicked, and log-odds."""
    rows = torch.arange(3)
    shows, clicks = np.zeros((3, 60)), np.zeros((3, 60))
    for _ in range(n_steps):
        sessions.logits()
        items = np.stack([rng.permutation(40)[:6] for _ in range(3)])
        clicked = rng.random(items.shape) < 0.5
        sessions.observe(rows, torch.from_numpy(items), torch.from_numpy(clicked))
        np.add.at(shows, (np.arange(3)[:, None], items), 1)
        np.add.at(clicks, (np.arange(3)[:, None], items), clicked)
    return shows, clicks, sessions.logits()


def test_parts_of_log_odds_are_what_was_counted_and_add_up():
    belief = Belief(items_of())
    serve_sessions(belief, 20, 0, OwnScales(0.3, 0.3, 0.3), np.linspace(-1, 1, 60))
    sessions = SessionBeliefs(belief, 3)
    prior = torch.randn(3, 60, generator=torch.Generator().manual_seed(0))
    sessions.start(torch.arange(3), prior)
    shows, clicks, logits = played(sessions, np.random.default_rng(1), 8)
    everything = torch.arange(60).expand(3, -1)
    parts = sessions.explain(everything)
    np.testing.assert_array_equal(parts.shows, shows)
    np.testing.assert_array_equal(parts.clicks, clicks)
    assert torch.equal(parts.prior, prior)
    assert (parts.offset[shows == 0] == 0).all()
    level = sessions.moments().means[:, :1]
    whole = parts.prior + parts.shared + level + parts.taste + parts.offset
    torch.testing.assert_close(whole, logits, atol=1e-5, rtol=0)
    totals = sessions.own.totals()
    assert (totals[0].tolist(), totals[1].tolist()) == ([48.0] * 3, clicks.sum(axis=1).tolist())


def test_restored_sessions_go_on_to_the_same_numbers():
    belief = Belief(items_of())
    one, two = SessionBeliefs(belief, 3), SessionBeliefs(belief, 3)
    one.start(torch.arange(3), torch.zeros(3, 60), torch.ones(3, 2))
    played(one, np.random.default_rng(1), 3)
    two.restore(one.tensors())
    torch.testing.assert_close(two.evidence().contexts, torch.ones(3, 2))
    for sessions in (one, two):
        sessions.observe(torch.arange(3), torch.full((3, 1), 50), torch.ones(3, 1, dtype=torch.bool))
    torch.testing.assert_close(two.logits(), one.logits(), atol=1e-6, rtol=0)
    everything = torch.arange(60).expand(3, -1)
    for there, here in zip(two.explain(everything), one.explain(everything), strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=0)


def test_only_sessions_that_count_are_learned_from_and_nothing_is_kept_of_them():
    belief = Belief(items_of())
    sessions = SessionBeliefs(belief, 2)
    sessions.start(torch.arange(2), torch.zeros(2, 60))
    sessions.logits()
    items = torch.stack([torch.arange(10), torch.arange(10, 20)])
    live = torch.tensor([True, False])
    sessions.learn(items, torch.ones(2, 10, dtype=torch.bool), live, ~live)
    assert belief.shared.weights.nonzero()[:, 0].tolist() == list(range(10))
    assert belief.sessions == 0
    for _ in range(4):
        sessions.learn(items, torch.ones(2, 10, dtype=torch.bool), live, ~live)
    assert (belief.shared.mean[:10] > 0.1).all()
    assert {tensor.shape for tensor in (belief.shared.weights, belief.shared.values)} == {(60,)}


def test_a_belief_without_columns_and_own_part_counts_clicks_of_items():
    scales = BeliefScales(own=OwnScales(0.0, 0.0, 0.0))
    belief = Belief(items_of().without_columns(), scales)
    sessions = SessionBeliefs(belief, 1)
    sessions.start(torch.arange(1), torch.zeros(1, 60))
    shown, everybody = torch.arange(2)[None], torch.ones(1, dtype=torch.bool)
    for _ in range(200):
        logits = sessions.logits()
        sessions.learn(shown, torch.tensor([[True, False]]), everybody, ~everybody)
        sessions.observe(torch.arange(1), shown, torch.tensor([[True, False]]))
    assert logits[0, 0] > 1.5 and logits[0, 1] < -1.5
    assert logits[0, 2:].abs().max() < 0.5
    assert astuple(belief.own_scales) == pytest.approx(astuple(scales.own))


def test_answers_against_all_expectation_do_not_let_scales_diverge():
    belief = Belief(items_of().without_columns(), BeliefScales(own=OwnScales(0.0, 0.0, 0.0)))
    sessions = SessionBeliefs(belief, 1)
    sessions.start(torch.arange(1), torch.full((1, 60), -6.0))
    everybody = torch.ones(1, dtype=torch.bool)
    rng = np.random.default_rng(0)
    for step in range(300):
        logits = sessions.logits()
        shown = torch.from_numpy(rng.permutation(30)[:10] if step < 290 else np.arange(30, 40))[None]
        sessions.learn(shown, torch.from_numpy(rng.random((1, 10)) < 0.9), everybody, ~everybody)
    assert (logits[0, :30] - np.log(9)).abs().max() < 1.5
    assert belief.scales.shared.offset < 10


def test_a_saved_belief_goes_on_to_the_same_numbers(tmp_path):
    own, shared = OwnScales(0.3, 0.3, 0.3), np.linspace(-1, 1, 60)
    one, two = Belief(items_of()), Belief(items_of())
    serve_sessions(one, 30, 0, own, shared)
    one.save(tmp_path / "belief.safetensors", {"more": torch.arange(3)})
    assert two.load(tmp_path / "belief.safetensors")["more"].tolist() == [0, 1, 2]
    for belief in (one, two):
        serve_sessions(belief, 30, 1, own, shared)
    assert torch.equal(one.shared.mean, two.shared.mean)
    assert one.scales == two.scales
    assert one.course == two.course
    others = [items_of(61), *(replace(items_of(), data_hash=name) for name in ("another", "zero"))]
    for items in others:
        with pytest.raises(ArtifactError, match="other items"):
            Belief(items).load(tmp_path / "belief.safetensors")


@pytest.mark.parametrize("scale", [0.0, 0.7, 3.0])
def test_another_click_is_as_probable_as_by_brute_force(scale):
    counts = [(1, 0), (1, 1), (3, 0), (3, 2), (3, 3), (6, 6)]
    bases = np.linspace(-3.0, 3.0, 7)
    grid = np.linspace(-8.0, 8.0, 4001)
    for shows, clicks in counts:
        points = bases[:, None] + scale * grid
        weights = np.exp(clicks * points - shows * np.logaddexp(0, points) - grid**2 / 2)
        expected = (weights * expit(points)).sum(1) / weights.sum(1)
        given = (torch.full((7,), float(count), dtype=torch.float64) for count in (shows, clicks))
        found = click_probabilities(torch.from_numpy(bases), *given, (0.1, scale))[1]
        assert found.numpy() == pytest.approx(expected, abs=2e-3)


def taken_as_steady(steady_users: bool, n_slates: int, seed: int = 0) -> float:
    """Share of 400 users taken as steady after some slates from forty items."""
    rng = np.random.default_rng(seed)
    scales = OwnScales(0.5, 1.0, 0.7, STEADY)
    features, base = features_of(40, 8, dtype=torch.float32), torch.from_numpy(rng.normal(-1.0, 1.0, (400, 40)))
    own = np.column_stack([0.5 * rng.normal(size=(400, 1)), rng.normal(size=(400, 8))]) @ features.numpy().T
    chance = expit(base.numpy() + own + 0.7 * rng.normal(size=(400, 40)))
    always = rng.random(chance.shape) < chance
    base, level = base.float(), OwnLevel(features, 400, scales)
    for _ in range(n_slates):
        # The most promising ones and some others, as agents show them.
        scores = (base + level.logits()).numpy() + rng.gumbel(size=(400, 40))
        items = np.argsort(-scores, axis=1)[:, :10]
        given = always if steady_users else rng.random(chance.shape) < chance
        clicks = torch.from_numpy(np.take_along_axis(given, items, axis=1))
        level.observe(torch.arange(400), torch.from_numpy(items), clicks, base)
        level.update(base)
    return level.moments(torch.arange(400)).steady / 400


def test_users_who_answer_an_item_always_alike_are_noticed_and_others_seldom_are():
    assert taken_as_steady(True, 3) > 0.5
    assert taken_as_steady(True, 8) > 0.95
    assert max(taken_as_steady(False, 3, seed) for seed in range(3)) < OwnScales().steady_share
    assert max(taken_as_steady(False, 15, seed) for seed in range(3)) < 0.08


def test_the_share_of_steady_users_is_learned_from_those_who_were_served():
    belief, plain = Belief(items_of()), Belief(items_of(), BeliefScales(own=OwnScales()))
    first = belief.own_scales.steady_share
    for steady, sessions in ((38.0, 40), (0.0, 400)):
        told = OwnMoments(torch.zeros(3).double(), torch.zeros(3).double(), steady, sessions)
        for one in (belief, plain):
            one.remember(told, sessions)
            one.move(own_moments([0, 0, 0], [0, 0, 0]))
        if steady:
            assert belief.own_scales.steady_share == pytest.approx((38 + 20 * first) / 60)
    # Who was served before the last 200 hardly counts.
    assert belief.own_scales.steady_share < first
    assert belief.own_scales.steady == STEADY and plain.own_scales.steady == 0.0


def test_of_a_steady_user_the_posterior_is_that_of_wide_offsets_and_the_next_session_starts_as_usual():
    features, base = features_of(20, 8), torch.full((2, 20), -1.0, dtype=torch.float64)
    usual, wide, level = (
        OwnLevel(features, 2, scales) for scales in (OwnScales(), OwnScales(offset=STEADY), OwnScales(steady=STEADY))
    )
    items, everybody = torch.arange(10).expand(2, -1), torch.arange(2)
    # The first user clicks the first half again and again, the second whatever chance has it.
    rng = np.random.default_rng(0)
    for _ in range(12):
        clicks = torch.stack([torch.arange(10) < 5, torch.from_numpy(rng.random(10) < 0.3)])
        for one in (usual, wide, level):
            one.observe(everybody, items, clicks, base)
            one.converge(base)
    torch.testing.assert_close(level.logits()[0], wide.logits()[0])
    torch.testing.assert_close(level.logits()[1], usual.logits()[1])
    torch.testing.assert_close(level.variances(items)[0], wide.variances(items)[0])
    level.start(torch.tensor([0]))
    level.observe(torch.tensor([0]), items[:1], clicks[:1], base)
    usual.start(torch.tensor([0]))
    usual.observe(torch.tensor([0]), items[:1], clicks[:1], base)
    for one in (usual, level):
        one.converge(base)
    torch.testing.assert_close(level.logits(), usual.logits())


def test_where_no_item_comes_back_nobody_is_taken_as_steady():
    rng = np.random.default_rng(4)
    features, base = features_of(60, 8), torch.from_numpy(rng.normal(size=(2, 60)))
    shows, clicks = np.ones((2, 60), np.int64), (rng.random((2, 60)) < 0.5).astype(np.int64)
    one, two = (level_with(features, base, shows, clicks, scales) for scales in (OwnScales(), OwnScales(steady=STEADY)))
    assert torch.equal(one.logits(), two.logits())


def test_offsets_take_what_other_preferences_leave_unexplained():
    rng = np.random.default_rng(3)
    features = torch.from_numpy(np.c_[np.ones(20), rng.normal(size=(20, 4))])
    level = OwnLevel(features, 2, OwnScales(0.6, 0.8, 0.7))
    rows = torch.arange(2)
    for _ in range(5):
        items = torch.from_numpy(np.stack([rng.choice(20, 6, replace=False) for _ in range(2)]))
        level.observe(rows, items, torch.from_numpy(rng.random((2, 6)) < 0.4), torch.zeros(2, 20))
    base = torch.from_numpy(rng.normal(size=(2, 20)))
    level.converge(base)
    modes = level.widths * level.means
    torch.testing.assert_close(level.logits_at(modes), level.logits())

    other = modes + 0.01 * torch.from_numpy(rng.normal(size=(2, 5)))
    shows = torch.zeros(2, 20, dtype=torch.float64).scatter_add_(1, level._items, level._shows)
    clicks = torch.zeros(2, 20, dtype=torch.float64).scatter_add_(1, level._items, level._clicks)
    linear = other @ features.T
    offsets = posterior_offsets(base + linear, shows, clicks, 0.7**2, torch.zeros_like(linear))
    torch.testing.assert_close(level.logits_at(other), linear + offsets, atol=1e-4, rtol=0)
