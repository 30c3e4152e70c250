"""Profiles, interquartile means and improvement, against the reference library on its own example numbers."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from hrl_policies.study.scores import performance_profile
from hrl_policies.study.statistics import (
    interquartile_mean,
    probability_of_improvement,
    stratified_interval,
)

# The examples with which rliable (Agarwal et al., NeurIPS 2021) tests itself: runs by tasks.
X = np.array([[1.0, 2], [2, 2], [1, 1], [2, 1]])
Y = np.array([[1.0, 1], [2, 2], [3, 3]])
LARGE = np.arange(80.0).reshape(5, 16)


@pytest.fixture(scope="module")
def library():
    """The reference library.

    Its bootstrap comes from arch, whose time series (not used here) call a helper of pandas that pandas 3 changed; for
    the import the helper is replaced by one that does nothing.
    """
    pandas_helpers = pytest.importorskip("pandas.util._decorators")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(pandas_helpers, "deprecate_kwarg", lambda *_, **__: lambda function: function)
        return pytest.importorskip("rliable.library")


@pytest.fixture(scope="module")
def metrics(library):
    return pytest.importorskip("rliable.metrics")


def test_published_answers_of_the_reference_library_come_out():
    assert interquartile_mean(X.ravel()) == 1.5
    assert interquartile_mean(Y.ravel()) == 2.0
    assert probability_of_improvement(X, Y, resamples=10).estimate == pytest.approx(1 / 3)


@pytest.mark.parametrize("scores", [X, Y, LARGE, np.random.default_rng(0).gamma(2.0, 1.0, (7, 6))])
def test_estimates_are_the_reference_librarys(metrics, scores):
    assert interquartile_mean(scores.ravel()) == pytest.approx(metrics.aggregate_iqm(scores))
    other = scores[::-1] * 1.1
    assert probability_of_improvement(scores, other, resamples=10).estimate == pytest.approx(
        metrics.probability_of_improvement(scores, other)
    )


def test_stratified_interval_is_the_reference_librarys(library, metrics):
    np.random.seed(0)  # noqa: NPY002  (the library draws from numpy's global generator)
    points, intervals = library.get_interval_estimates(
        {"x": LARGE}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2_000
    )
    mine = stratified_interval(LARGE, resamples=20_000)
    assert mine.estimate == pytest.approx(points["x"][0])
    low, high = intervals["x"][:, 0]
    assert (mine.low, mine.high) == (pytest.approx(low, abs=1.0), pytest.approx(high, abs=1.0))


def test_improvement_interval_is_the_reference_librarys(library, metrics):
    rng = np.random.default_rng(4)
    x, y = rng.normal(0.4, 1.0, (6, 4)), rng.normal(0.0, 1.0, (8, 4))
    np.random.seed(1)  # noqa: NPY002
    _, intervals = library.get_interval_estimates(
        {"x,y": [x, y]}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=400
    )
    mine = probability_of_improvement(x, y, resamples=6_000)
    low, high = intervals["x,y"][:, 0]
    assert (mine.low, mine.high) == (pytest.approx(low, abs=0.04), pytest.approx(high, abs=0.04))


@pytest.mark.parametrize("scores", [X, LARGE / 80, np.random.default_rng(3).normal(0.5, 0.3, (6, 3))])
def test_profile_and_band_are_the_reference_librarys(library, scores):
    thresholds = np.array([0.0, 0.25, 0.5, 1.0, 1.5])
    np.random.seed(2)  # noqa: NPY002
    profiles, bands = library.create_performance_profile({"x": scores}, thresholds, reps=1_000)
    mine = performance_profile(scores, thresholds, resamples=8_000)
    assert mine.share == pytest.approx(profiles["x"])
    # A share moves in steps of one run of all.
    step = 1.0 / scores.size + 1e-9
    assert mine.low == pytest.approx(bands["x"][0], abs=step)
    assert mine.high == pytest.approx(bands["x"][1], abs=step)


def test_a_profile_counts_runs_above_and_falls():
    scores = np.random.default_rng(5).normal(size=(4, 3))
    thresholds = np.linspace(-3, 3, 31)
    profile = performance_profile(scores, thresholds, resamples=200)
    assert profile.share.tolist() == [
        sum(score > at for score in scores.ravel().tolist()) / 12 for at in thresholds
    ]
    for curve in (profile.share, profile.low, profile.high):
        assert (np.diff(curve) <= 1e-12).all()
    assert (profile.low <= profile.share).all() and (profile.share <= profile.high).all()
    assert profile.share[0] == 1.0 and profile.share[-1] == 0.0


def test_a_run_at_the_threshold_is_not_above_it():
    assert performance_profile(np.full((3, 2), 0.5), np.array([0.4, 0.5]), resamples=10).share.tolist() == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize(
    ("scores", "thresholds", "message"),
    [
        (X, np.array([0.5, 0.5]), "increasing"),
        (X, np.array([]), "increasing"),
        (X, np.array([0.0, np.nan]), "increasing"),
        (X[:1], np.array([0.0]), "two seeds"),
        (np.array([[1.0], [np.nan]]), np.array([0.0]), "finite"),
    ],
)
def test_what_has_no_profile_is_refused(scores, thresholds, message):
    with pytest.raises(ValueError, match=message):
        performance_profile(scores, thresholds)
