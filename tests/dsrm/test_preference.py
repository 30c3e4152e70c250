"""Models of users' clean preferences: posteriors against exact ones, in closed form and by networks."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch
from helpers import small_world
from scipy.stats import multivariate_normal, norm
from small_worlds import taste_worlds
from torch import Tensor

from dsrm.belief_purifier import BeliefPurifier
from dsrm.click_scorer import ClickScorer
from dsrm.diffusion import Denoiser, DenoiserConfig, NoiseSchedule
from dsrm.model import DistillationConfig, Standardiser, TrainedDenoiser
from dsrm.preference import (
    ClosedForm,
    Evidence,
    LevelPrior,
    LogContexts,
    PreferenceModel,
    context_size,
    predicted_from,
    restore_preference,
)
from dsrm.preference_mixture import MixturePreference, TastePrior
from dsrm.preference_networks import DiffusionPreference, fitted_reliance
from dsrm.preference_sessions import (
    KnownPreferences,
    PreferenceSessions,
    features_of,
    fitted_widening,
    unwhitened,
    whitened,
)
from dsrm.preference_student import distil_preference
from dsrm.purifier import BELIEF_MODES, STATISTICS, load_purifier, save_purifier
from dsrm.targets import Examples
from dsrm.training import TrainingConfig, top_heavy_objective, train_denoiser
from dsrm.wrappers import VecDSRM
from hrl_policies.belief_controls import BeliefQuota
from kuaifair_env import SessionConfig, evaluate
from kuaifair_env.response.base import HistoryWindow
from kuaifair_env.sb3 import KuaiFairVecEnv

MODES = 1.5
SEEDS = (0, 1, 2)


def evidence(n: int, dimension: int, seed: int = 0, spread: float = 0.5) -> Evidence:
    """Evidence of random sessions."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(size=(n, dimension + 1, 4 * dimension)) * spread
    precisions = np.eye(dimension + 1) + factors @ factors.transpose(0, 2, 1)
    contexts = np.abs(rng.normal(size=(n, context_size(dimension))))
    return Evidence(
        torch.from_numpy(contexts).float(),
        torch.from_numpy(rng.normal(size=(n, dimension + 1))).float(),
        torch.from_numpy(np.linalg.inv(precisions)).float(),
        torch.full((dimension + 1,), 0.7),
    )


def fitted(dimension: int, parts: int, seed: int = 0) -> MixturePreference:
    rng = np.random.default_rng(seed)
    size = context_size(dimension)
    covariances = np.stack([np.diag(rng.uniform(0.2, 1.0, dimension)) for _ in range(parts)])
    taste = TastePrior(
        (0.2 * rng.normal(size=(size + 1, dimension)) / size**0.5).astype(np.float32),
        0.5,
        rng.dirichlet(np.ones(parts)).astype(np.float32),
        rng.normal(size=(parts, dimension)).astype(np.float32),
        covariances.astype(np.float32),
    )
    return MixturePreference(LevelPrior((0.1 * rng.normal(size=size + 1)).astype(np.float32), 0.4, 0.5), taste)


def standard(dimension: int) -> MixturePreference:
    """The prior of the closed form: normal, mean zero."""
    size = context_size(dimension) + 1
    return MixturePreference(
        LevelPrior(np.zeros(size, np.float32), 0.0, 0.0),
        TastePrior(
            np.zeros((size, dimension), np.float32),
            1.0,
            np.ones(1, np.float32),
            np.zeros((1, dimension), np.float32),
            np.eye(dimension, dtype=np.float32)[None],
        ),
    )


class TwoTastes:
    """Users like one kind of items or the other: ``b`` is normal, ``w`` is near -1.5 or near 1.5."""

    users = np.arange(100)

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        return self.users[:90], self.users[90:]

    def draw(self, users: np.ndarray, rng: np.random.Generator) -> Examples:
        known = self.known(len(users), rng)
        return Examples(features_of(known.evidence), whitened(known.evidence, known.preferences)[:, 1:].numpy())

    def known(self, n: int, rng: np.random.Generator) -> KnownPreferences:
        tastes = MODES * rng.choice([-1.0, 1.0], n) + 0.3 * rng.normal(size=n)
        truth = np.stack([rng.normal(size=n), tastes], axis=1)
        precisions = np.exp(rng.uniform(-4.0, 3.0, (n, 2)))  # of what sessions say
        observed = truth + rng.normal(size=(n, 2)) / np.sqrt(precisions)
        variances = 1.0 / (1.0 + precisions)
        contexts = np.zeros((n, context_size(1)))
        return KnownPreferences(
            Evidence(
                torch.from_numpy(contexts).float(),
                torch.from_numpy(variances * precisions * observed).float(),
                torch.diag_embed(torch.from_numpy(variances).float()),
                torch.ones(2),
            ),
            torch.from_numpy(truth).float(),
        )


def exact_taste(known: KnownPreferences) -> Tensor:
    """The exact posterior mean of ``w`` of :class:`TwoTastes`."""
    variances = known.evidence.covariances[:, 1, 1].double()
    precisions = 1.0 / variances - 1.0
    observed = known.evidence.means[:, 1].double() / (variances * precisions)
    spread = (0.09 + 1.0 / precisions).sqrt()
    fits = [torch.from_numpy(norm.pdf(observed, sign * MODES, spread)) for sign in (-1, 1)]
    means = [(sign * MODES / 0.09 + observed * precisions) / (1.0 / 0.09 + precisions) for sign in (-1, 1)]
    return ((fits[0] * means[0] + fits[1] * means[1]) / (fits[0] + fits[1])).float()


@cache
def trained(seed: int) -> DiffusionPreference:
    schedule = NoiseSchedule.make("cosine", 100)
    shape = DenoiserConfig(1, 6, "velocity", width=64, blocks=2)
    config = TrainingConfig(rounds=3, examples=20_000, validation_examples=2_000)
    denoiser, _ = train_denoiser(
        lambda: Denoiser(shape, schedule),
        top_heavy_objective,
        TwoTastes(),
        config,
        seed=seed,
        label="two tastes",
        checkpoint=None,
        progress=False,
    )
    return DiffusionPreference(denoiser, schedule, standard(1))


def test_whitened_preferences_are_standard_normal_where_the_closed_form_is_right():
    known = evidence(4_000, 3)
    preferences = ClosedForm().samples(known, 1, seed=0)[0]
    white = whitened(known, preferences)
    torch.testing.assert_close(unwhitened(known, white), preferences, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(white.T), torch.eye(4), atol=0.08, rtol=0)


def test_a_few_gradient_steps_give_the_means_of_a_normal_prior():
    known = evidence(20, 6)
    prior = fitted(6, 1)
    exact = prior.normal(known)
    misses = [
        ((prior.means(known, steps) - exact.means) / exact.deviations).square().mean().sqrt() for steps in (0, 2, 9)
    ]
    assert misses[1] < 0.2 * misses[0]
    assert misses[2] < 1e-3


def test_the_mean_and_covariance_of_a_mixture_are_those_of_its_draws():
    known = evidence(2, 3)
    mixture = fitted(3, 3)
    normal, draws = mixture.normal(known), mixture.samples(known, 40_000, seed=0) / known.scales
    torch.testing.assert_close(draws.mean(dim=0), normal.means, atol=0.02, rtol=0)
    for row in range(2):
        torch.testing.assert_close(torch.cov(draws[:, row].T), normal.covariances[row], atol=0.02, rtol=0)


def test_a_log_that_is_empty_says_nothing():
    known, prior = evidence(4, 3), fitted(3, 1)
    contexts = known.contexts.numpy().copy()
    contexts[:2, context_size(3) - len(STATISTICS) - 1] = 0.0
    contexts[2:, context_size(3) - len(STATISTICS) - 1] = 1.0
    predicted = predicted_from(contexts, prior.taste.slopes)
    assert (predicted[:2] == 0).all() and (predicted[2:] != 0).all()


def test_networks_are_relied_on_as_far_as_held_out_users_show():
    rng = torch.Generator().manual_seed(0)
    truth, noise, signal = torch.randn(3, 5_000, 4, generator=rng)
    assert fitted_reliance(signal, 0.5 * signal + truth) == pytest.approx(0.5, abs=0.05)
    assert fitted_reliance(noise, signal) < 0.05
    assert fitted_reliance(signal, 3.0 * signal) == 1.0
    assert fitted_reliance(signal, -signal) == 0.0
    assert fitted_reliance(torch.zeros(3, 4), truth[:3]) == 0.0


def test_levels_are_read_off_the_log():
    rng = np.random.default_rng(0)
    contexts = rng.normal(size=(2_000, 5)).astype(np.float32)
    contexts[:, 4] = 1.0
    levels = 1.0 + 2.0 * contexts[:, 1] + 0.5 * rng.normal(size=2_000)
    prior = LevelPrior.fit(contexts, levels)
    np.testing.assert_allclose(prior.coefficients[:5], [1.0, 0.0, 2.0, 0.0, 0.0], atol=0.15)
    assert prior.explained == pytest.approx(2.0, abs=0.15)
    assert prior.unexplained == pytest.approx(0.5, abs=0.1)
    for scale, deviation in ((0.1, 0.5), (0.7, 0.5), (2.5, 1.5)):
        of_context = LevelPrior(np.zeros(context_size(1) + 1, np.float32), 2.0, 0.5)
        assert of_context.deviation(scale) * scale == pytest.approx(deviation, abs=1e-5)


def test_levels_are_widened_by_as_much_as_they_miss():
    """Misses of levels grow with what answers say; the widening is found, and intervals hold as often as they say."""
    found = []
    for seed in SEEDS:
        known, prior = evidence(6_000, 2, seed), fitted(2, 1)
        said = 1.0 - known.deviations[:, 0]
        means, deviations = prior.moments(known)
        noise = torch.randn(len(said), generator=torch.Generator().manual_seed(seed))
        levels = means[:, 0] + (1.0 + 0.4 * said) * deviations[:, 0] * noise
        truth = torch.cat([levels[:, None], means[:, 1:]], dim=1)
        found.append(fitted_widening(prior, [KnownPreferences(known, truth)]))
        wider = MixturePreference(dataclasses.replace(prior.level, widening=found[-1]), prior.taste)
        misses = (truth - wider.moments(known).means)[:, 0].abs() / wider.moments(known).deviations[:, 0]
        assert float((misses < norm.ppf(0.9)).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert np.mean(found) == pytest.approx(0.4, abs=0.05)
    # Where intervals are wide enough nothing is widened.
    assert fitted_widening(prior, [KnownPreferences(known, means + 0.5 * deviations)]) < 0.01


@pytest.mark.parametrize("kind", range(3))
def test_draws_are_as_wide_as_moments_say(kind):
    known = evidence(500, 2)
    plain = [fitted(2, 1), fitted(2, 3), tiny_networks(2)][kind]
    before = plain.moments(known)
    prior = plain.prior if isinstance(plain, DiffusionPreference) else plain
    prior.level = dataclasses.replace(prior.level, widening=0.5)
    after, draws = plain.moments(known), plain.samples(known, 32, seed=0)
    torch.testing.assert_close(after.means, before.means)
    torch.testing.assert_close(after.deviations[:, 1:], before.deviations[:, 1:])
    widths = 1.0 + 0.5 * (1.0 - known.deviations[:, 0])
    torch.testing.assert_close(after.deviations[:, 0], widths * before.deviations[:, 0])
    of_normal = prior.moments(known)
    standard_draws = (draws[..., 0] - of_normal.means[:, 0]) / of_normal.deviations[:, 0]
    # Sessions that say little and those that say much: levels of these are widened most.
    for rows in (widths < widths.median(), widths >= widths.median()):
        assert float(standard_draws[:, rows].mean()) == pytest.approx(0.0, abs=0.06)
        assert float(standard_draws[:, rows].std()) == pytest.approx(1.0, abs=0.025)


def test_one_part_takes_a_short_way_to_the_same_posterior():
    known, prior = evidence(20, 6), fitted(6, 1)
    normal, (_, means, covariances) = prior.normal(known), prior.parts(known)
    torch.testing.assert_close(normal.means, means[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normal.covariances, covariances[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parts", [1, 3])
def test_the_posterior_of_a_mixture_is_that_of_bayes_theorem(parts):
    known, model = evidence(5, 1), fitted(1, parts)
    assert model.kind == ("gaussian" if parts == 1 else "mixture")
    moments = model.moments(known)
    taste, share = model.taste, (0.5 / 0.7) ** 2
    grid = np.stack(np.meshgrid(np.linspace(-6, 6, 301), np.linspace(-6, 6, 301), indexing="ij"), axis=-1)
    for row in range(5):
        context = np.r_[1.0, known.contexts[row].numpy()]
        level = norm(context @ model.level.coefficients / 0.7, np.sqrt(1.0 - (0.4 / 0.7) ** 2)).pdf(grid[..., 0])
        predicted = context @ taste.slopes[:, 0] / 0.7
        of_parts = zip(taste.weights, taste.means[:, 0], taste.covariances[:, 0, 0], strict=True)
        prior = level * sum(
            weight * norm(predicted + share**0.5 * mean, np.sqrt(share * variance + 1.0 - share)).pdf(grid[..., 1])
            for weight, mean, variance in of_parts
        )
        likelihood = multivariate_normal(known.means[row], known.covariances[row]).pdf(grid)
        likelihood /= multivariate_normal(np.zeros(2), np.eye(2)).pdf(grid)
        density = prior * likelihood / (prior * likelihood).sum()
        means = (density[..., None] * grid).sum((0, 1))
        deviations = np.sqrt((density[..., None] * (grid - means) ** 2).sum((0, 1)))
        np.testing.assert_allclose(moments.means[row], 0.7 * means, atol=2e-3)
        np.testing.assert_allclose(moments.deviations[row], 0.7 * deviations, atol=2e-3)
    draws = model.samples(known, 4_000, seed=1)
    torch.testing.assert_close(draws.mean(0), moments.means, atol=0.06, rtol=0)
    torch.testing.assert_close(draws.std(0), moments.deviations, atol=0.05, rtol=0)


def test_two_kinds_of_taste_are_found():
    rng = np.random.default_rng(0)
    tastes = 0.3 * rng.normal(size=(6_000, 3)) + np.where(rng.integers(2, size=(6_000, 1)) == 1, 1.0, -1.0)
    train, test = tastes[:4_000].astype(np.float32), tastes[4_000:].astype(np.float32)
    slopes = np.zeros((11, 3), np.float32)
    one, two = (TastePrior.fit(slopes, 1.0, train, parts, seed=0) for parts in (1, 2))
    assert two.log_density(test) > one.log_density(test) + 0.5
    np.testing.assert_allclose(two.weights, 0.5, atol=0.06)


@pytest.mark.slow
def test_diffusion_finds_two_tastes_where_the_closed_form_sees_one():
    errors, closed_errors, coverage, halves = [], [], [], []
    for seed in SEEDS:
        model = trained(seed)
        known = TwoTastes().known(1_500, np.random.default_rng(99))
        exact = exact_taste(known)
        errors.append(float(((model.own_means(known.evidence)[:, 1] - exact) ** 2).mean()))
        closed_errors.append(float(((ClosedForm().moments(known.evidence).means[:, 1] - exact) ** 2).mean()))
        samples = model.samples(known.evidence, 64, seed=0)
        low, high = torch.quantile(samples, torch.tensor([0.1, 0.9]), dim=0)
        coverage.append(float(((known.preferences > low) & (known.preferences < high)).float().mean()))
        undecided = known.evidence.deviations[:, 1] > 0.95
        normal = ClosedForm().samples(known.evidence, 64, seed=0)
        halves.append([float((draws[:, undecided, 1].abs() > 0.7).float().mean()) for draws in (samples, normal)])
    assert np.mean(errors) < 0.6 * np.mean(closed_errors)
    assert 0.75 < np.mean(coverage) < 0.85
    two, one = np.mean(halves, axis=0)
    assert two > one + 0.15  # fewer draws between the modes, where the mean is


@pytest.mark.slow
def test_a_student_gives_mean_and_spread_of_its_teacher():
    model = trained(0)
    rng = np.random.default_rng(5)
    sessions = [TwoTastes().known(512, rng) for _ in range(16)]
    student, error = distil_preference(
        model, sessions, DistillationConfig(steps=1_500, width=64, batch_size=512, learning_rate=1e-3), seed=0
    )
    known = TwoTastes().known(500, rng).evidence
    teacher, learned = model.own_moments(known, 64), student.moments(model.prior, known)
    far = ((learned.means - teacher.means) / teacher.deviations).square().mean().sqrt()
    assert far < 0.25
    assert error.means == pytest.approx(float(far), abs=0.1)
    assert (learned.deviations / teacher.deviations).median() == pytest.approx(1.0, abs=0.15)


def tiny_networks(dimension: int) -> DiffusionPreference:
    size = 2 * dimension + 4
    schedule = NoiseSchedule.make("cosine", 20)
    network = Denoiser(DenoiserConfig(dimension, size, "velocity", width=16, blocks=1), schedule)
    condition = Standardiser(np.zeros(size, np.float32), np.ones(size, np.float32))
    state = Standardiser(np.zeros(dimension, np.float32), np.ones(dimension, np.float32))
    prior = fitted(dimension, 1)
    teacher = DiffusionPreference(TrainedDenoiser(network, condition, state), schedule, prior, 0.3)
    sessions = [KnownPreferences(evidence(20, dimension, seed), torch.zeros(20, dimension + 1)) for seed in range(2)]
    student, _ = distil_preference(teacher, sessions, DistillationConfig(steps=2, width=8, batch_size=8), seed=0)
    return DiffusionPreference(teacher.denoiser, schedule, prior, teacher.reliance, student)


def models(dimension: int) -> list[PreferenceModel]:
    parts = [fitted(dimension, k) for k in (1, 2)]
    return [ClosedForm(), *parts, tiny_networks(dimension)]


@pytest.mark.parametrize("dimension", [8, 64, pytest.param(256, marks=pytest.mark.slow)])
def test_models_of_any_size_give_numbers(dimension):
    known = evidence(3, dimension, spread=0.1)
    for model in models(dimension):
        moments, draws = model.moments(known), model.samples(known, 4, seed=0)
        assert moments.means.shape == moments.deviations.shape == draws.shape[1:] == (3, dimension + 1)
        assert moments.means.isfinite().all() and draws.isfinite().all()
        assert (moments.deviations > 0).all() and moments.deviations.isfinite().all()


def test_rows_do_not_depend_on_their_batch():
    known = evidence(6, 4)
    for model in models(4):
        together = model.moments(known)
        for row in range(6):
            alone = model.moments(known.take(torch.tensor([row])))
            torch.testing.assert_close(alone.means[0], together.means[row], atol=1e-5, rtol=1e-4)
    diffusion = models(4)[-1]
    alone = diffusion.samples(known.take(torch.tensor([2])), 3, seed=7)
    torch.testing.assert_close(diffusion.samples(known, 3, seed=7)[:, 2], alone[:, 0], atol=1e-4, rtol=1e-4)


def test_draws_of_different_users_are_independent():
    known = evidence(400, 4)
    draws = tiny_networks(4).samples(known, 8, seed=0) / known.scales
    normal = fitted(4, 1).normal(known)
    levels = (draws[..., 0] - normal.means[:, 0]) / normal.deviations[:, 0]
    assert levels.mean().abs() < 0.05
    assert levels.mean(dim=1).abs().max() < 0.25
    assert levels.std() == pytest.approx(1.0, abs=0.05)


def test_models_come_back_from_their_arrays():
    known = evidence(3, 4)
    for model in models(4):
        again = restore_preference(model.kind, model.tensors(), model.settings())
        for one, other in zip(model.moments(known), again.moments(known), strict=True):
            assert torch.equal(one, other)
    with pytest.raises(ValueError, match="closed-form, gaussian, mixture"):
        restore_preference("median", {}, {})


def test_the_log_is_summarised_whatever_was_clicked():
    world, _ = taste_worlds()
    contexts = LogContexts(world)
    length = world.history_length
    nothing = HistoryWindow.empty(1, length)
    items = np.full((1, length), -1, np.int32)
    items[0, -1] = 3
    one_show = HistoryWindow(items, np.zeros((1, length), np.bool_))
    everything = HistoryWindow(np.arange(length, dtype=np.int32)[None] % world.n_items, np.ones((1, length), np.bool_))
    for window in (nothing, one_show, everything):
        summary = contexts.summarise(window)
        assert summary.shape == (1, context_size(world.dimension)) and np.isfinite(summary).all()
    d = world.dimension
    skipped, shown = contexts.summarise(one_show)[0, d : 2 * d], contexts.summarise(one_show)[0, 2 * d : 3 * d]
    np.testing.assert_array_equal(skipped, shown)
    assert np.linalg.norm(shown) == pytest.approx(1.0, abs=1e-5)


def test_sessions_know_what_their_users_prefer():
    world, test_world = taste_worlds()
    scorer = ClickScorer.fit(world)
    sessions = PreferenceSessions(world, scorer)
    rng = np.random.default_rng(0)
    batches = sessions.known(rng.choice(sessions.users, 4_000), rng)
    white = torch.cat([whitened(batch.evidence, batch.preferences) for batch in batches])
    # The closed form is nearly right about size and spread; that is what makes it the place to start from.
    assert float(white.std()) == pytest.approx(1.0, abs=0.35)
    assert float(white.mean()) == pytest.approx(0.0, abs=0.1)
    counts = {int(torch.round(-batch.evidence.deviations.log().sum())) for batch in batches}
    assert len(counts) > 1
    draws = [sessions.draw(sessions.users[:50], np.random.default_rng(1)) for _ in range(2)]
    np.testing.assert_array_equal(draws[0].conditions, draws[1].conditions)
    np.testing.assert_array_equal(draws[0].targets, draws[1].targets)
    with pytest.raises(ValueError, match="training world"):
        PreferenceSessions(test_world, scorer)


def test_users_without_tastes_have_preferences_too():
    world = dataclasses.replace(small_world(0.4), split="train")
    sessions = PreferenceSessions(world, ClickScorer.fit(world))
    examples = sessions.draw(sessions.users, np.random.default_rng(0))
    assert np.isfinite(examples.conditions).all() and np.isfinite(examples.targets).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in BELIEF_MODES if mode != "candidates"])  # dicts: test_ranking_policy
def test_every_belief_is_fitted_kept_in_a_file_and_shown_to_agents(purifiers, mode, tmp_path):
    _, test_world = taste_worlds()
    purifier = purifiers[mode]
    assert isinstance(purifier, BeliefPurifier)
    path = tmp_path / "belief.safetensors"
    save_purifier(purifier, path)
    config = SessionConfig(max_len=6, slate_size=4)
    states = []
    for one in (purifier, load_purifier(path)):
        env = VecDSRM(KuaiFairVecEnv(test_world, config, 5, seed=0), one)
        shown = [env.reset()]
        for step in range(8):
            actions = np.random.default_rng(step).normal(size=(5, *env.action_space.shape)).astype(np.float32)
            shown.append(env.step(actions)[0])
        states.append(np.stack(shown))
        assert all(env.observation_space.contains(state) for state in states[-1].reshape(-1, states[-1].shape[-1]))
    np.testing.assert_array_equal(*states)
    assert np.ptp(states[0], axis=0).max() > 0.1


def test_controls_rank_by_any_model(purifiers):
    _, test_world = taste_worlds()
    purifier = purifiers["gaussian"]
    env = KuaiFairVecEnv(test_world, SessionConfig(max_len=6, slate_size=4, action_mode="slate"), 20, seed=0)
    closed, fitted_model = (
        evaluate(BeliefQuota(purifier.scorer, preference=model), env).sessions.return_
        for model in (None, purifier.preference)
    )
    again = evaluate(BeliefQuota(purifier.scorer, preference=ClosedForm()), env).sessions.return_
    np.testing.assert_array_equal(closed, again)
    assert not np.array_equal(closed, fitted_model)
