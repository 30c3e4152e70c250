"""What counts as a click: definitions, the twins' logs and truth, and graded feedback."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from twin_files import write_official
from twin_measures import PANEL

from kuaifair_env.batch import SessionBatch, SessionConfig
from kuaifair_env.data.clicks import kuairand_clicks, kuairec_clicks, parse_positive
from kuaifair_env.data.kuairand import read_kuairand
from kuaifair_env.data.kuairec import read_kuairec
from kuaifair_env.errors import ArtifactError, DataError
from kuaifair_env.randomised_worlds import randomised
from kuaifair_env.response.fitting import fit_response, load_response
from kuaifair_env.response.graded import GradedResponse
from kuaifair_env.response.known import ObservedResponse, TwinResponse
from kuaifair_env.synthetic.config import KUAIRAND, TOY, twin_config
from kuaifair_env.synthetic.twin import generate_twin
from kuaifair_env.world import build_world

SEVERAL = {"is_click": 1.0, "long_view": 1.0, "is_like": 2.0}
KUAIREC_CHOICES = [
    {"positive": {"watch_ratio": 0.5}},
    {"positive": {"watch_ratio": 1.0}},
    {"positive": {"watch_ratio": 2.0}},
    {"positive": {"watch_ratio": 3.0}},
    {"feedback": "watch_ratio"},
    {"feedback": "watch_ratio", "clip": 1.5},
]
KUAIRAND_CHOICES = ["is_click", "long_view", "is_like", SEVERAL]


@pytest.mark.parametrize(
    ("define", "settings", "message"),
    [
        (kuairec_clicks, {"positive": "is_click"}, "watch_ratio"),
        (kuairec_clicks, {"positive": {"watch_ratio": 1.0, "is_like": 1.0}}, "watch_ratio"),
        (kuairec_clicks, {"positive": {"watch_ratio": -1.0}}, "above 0"),
        (kuairec_clicks, {"positive": {"watch_ratio": float("nan")}}, "above 0"),
        (kuairec_clicks, {"positive": {"watch_ratio": "much"}}, "above 0"),
        (kuairec_clicks, {"feedback": "likes"}, "click, watch_ratio"),
        (kuairec_clicks, {"clip": 3.0}, "feedback='watch_ratio'"),
        (kuairec_clicks, {"feedback": "watch_ratio", "clip": 0.5}, "at least the watch ratio of a click"),
        (kuairand_clicks, {"positive": {"watch_ratio": 1.0}}, "is_click, long_view"),
        (kuairand_clicks, {"positive": {}}, "is_click, long_view"),
        (kuairand_clicks, {"positive": True}, "is_click, long_view"),
        (kuairand_clicks, {"positive": ["is_click"]}, "is_click, long_view"),
        (kuairec_clicks, {"positive": True}, "watch_ratio"),
        (kuairec_clicks, {"positive": ["watch_ratio"]}, "watch_ratio"),
        (kuairand_clicks, {"positive": {"is_like": -2.0}}, "above 0"),
        (kuairand_clicks, {"feedback": "watch_ratio"}, "settings of KuaiRec"),
        (kuairand_clicks, {"clip": 5.0}, "settings of KuaiRec"),
    ],
)
def test_a_definition_that_cannot_be_is_a_clear_error(define, settings, message):
    with pytest.raises(DataError, match=message):
        define(**settings)


def test_definitions_say_what_they_are_and_come_back_from_that():
    for settings in KUAIREC_CHOICES:
        clicks = kuairec_clicks(**settings)
        assert kuairec_clicks(**clicks.describe()) == clicks
        assert clicks.graded == ("feedback" in settings)
    for positive in KUAIRAND_CHOICES:
        clicks = kuairand_clicks(positive)
        assert kuairand_clicks(**clicks.describe()) == clicks
        assert clicks.graded == (positive is SEVERAL)
    assert kuairand_clicks(SEVERAL).largest == 4.0


def test_definitions_can_be_written_on_the_command_line():
    assert parse_positive([]) is None
    assert parse_positive(["watch_ratio=1.5"]) == {"watch_ratio": 1.5}
    assert parse_positive(["is_click", "is_like=2"]) == {"is_click": 1.0, "is_like": 2.0}
    with pytest.raises(ValueError, match="NAME=NUMBER"):
        parse_positive(["watch_ratio=long"])
    with pytest.raises(ValueError, match="twice"):
        parse_positive(["is_like", "is_like=2"])


def assert_truth_explains_the_log(twin) -> None:
    """Rows in eight groups of expected feedback: each group's feedback is what was expected, up to chance."""
    log, truth = twin.data.test, twin.truth
    expected = truth.click_probability(log.users, log.items[:, None])[:, 0]
    largest = twin.config.clicks.largest
    values = log.clicks.astype(float) if log.feedback is None else log.feedback / largest
    group = np.searchsorted(np.quantile(expected, np.arange(1, 8) / 8), expected)
    for number in range(8):
        own = group == number
        chances = expected[own].astype(float)
        variance = (chances * (1 - chances)).mean() if log.feedback is None else values[own].var()
        assert abs(values[own].mean() - chances.mean()) < 4.5 * np.sqrt(variance / own.sum()) + 1 / own.sum()
    users, items = np.arange(20), np.tile(np.arange(30), (20, 1))
    for conformity in (0.0, 0.7):
        response = TwinResponse(truth, conformity)
        np.testing.assert_allclose(
            response.expected(users, items), truth.click_probability(users, items, conformity), atol=1e-4
        )
    np.testing.assert_allclose(
        TwinResponse(truth).expected_catalogue(users, 30), truth.click_probability(users, items), atol=1e-4
    )
    order = np.random.default_rng(0).permutation(truth.n_items)
    np.testing.assert_array_equal(
        truth.rearranged(order).click_probability(users, items), truth.click_probability(users, order[items])
    )


@pytest.mark.parametrize("settings", KUAIREC_CHOICES)
def test_the_truth_of_a_kuairec_twin_follows_the_choice(settings, panel):
    twin = generate_twin(replace(PANEL, clicks=kuairec_clicks(**settings)))
    assert_truth_explains_the_log(twin)
    np.testing.assert_array_equal(twin.data.test.watch_ratios, panel.data.test.watch_ratios)
    np.testing.assert_array_equal(twin.data.train.items, panel.data.train.items)
    assert twin.data.provenance.settings["click"] == kuairec_clicks(**settings).describe()


@pytest.mark.parametrize("positive", KUAIRAND_CHOICES)
def test_the_truth_of_a_kuairand_twin_follows_the_choice(positive, toy):
    twin = generate_twin(replace(TOY, clicks=kuairand_clicks(positive)))
    assert_truth_explains_the_log(twin)
    np.testing.assert_array_equal(twin.data.test.items, toy.data.test.items)
    assert not (twin.data.test.clicks & ~toy.data.test.clicks).any()


def test_a_layout_has_only_the_feedback_that_it_logs():
    with pytest.raises(ValueError, match="does not log"):
        replace(KUAIRAND, clicks=kuairec_clicks())
    with pytest.raises(ValueError, match="does not log"):
        twin_config("KuaiRec", clicks=kuairand_clicks())


@pytest.mark.slow
def test_files_of_a_twin_hold_every_choice(toy, panel, tmp_path):
    folder = write_official(toy, tmp_path)
    twin = generate_twin(replace(TOY, clicks=kuairand_clicks(SEVERAL)))
    assert read_kuairand(folder, positive=SEVERAL).data_hash == twin.data.data_hash
    with pytest.raises(DataError, match="whoever reads"):
        write_official(twin, tmp_path / "other")
    folder = write_official(panel, tmp_path)
    twin = generate_twin(replace(PANEL, clicks=kuairec_clicks(**KUAIREC_CHOICES[-1])))
    assert read_kuairec(folder, **KUAIREC_CHOICES[-1]).data_hash == twin.data.data_hash


@pytest.mark.parametrize(
    "config",
    [
        replace(PANEL, clicks=kuairec_clicks(feedback="watch_ratio")),
        replace(TOY, clicks=kuairand_clicks(SEVERAL)),
    ],
    ids=["watch_ratio", "several"],
)
def test_graded_feedback_has_the_mean_and_the_clicks_of_its_log(config, tmp_path):
    twin = generate_twin(config)
    largest, log = config.clicks.largest, twin.data.test
    response = GradedResponse.around(TwinResponse(twin.truth), log, largest)
    expected = response.expected(log.users, log.items[:, None])
    feedback = response.feedback(expected, np.random.default_rng(0).random(expected.shape))
    assert feedback.min() >= 0 and feedback.max() <= largest
    noise = log.feedback.std() / np.sqrt(len(log))
    assert feedback.mean() == pytest.approx(expected.mean(), abs=4 * noise)
    assert feedback.std() == pytest.approx(log.feedback.std(), rel=0.1)
    assert response.clicked(feedback).mean() == pytest.approx(log.clicks.mean(), rel=0.1)
    world = build_world(twin.data, "train", response)
    batch = SessionBatch(randomised(world), SessionConfig(action_mode="slate"), 4)
    batch.reset(np.arange(4))
    expected_catalogue = batch.simulator.expected_catalogue()
    assert expected_catalogue.max() <= largest
    plain = response.expected_catalogue(batch.simulator.users, world.n_items)
    assert np.abs(expected_catalogue - plain).mean() > 0.02 * largest
    path = tmp_path / "graded.safetensors"
    response.save(path)
    loaded = load_response(path)
    np.testing.assert_array_equal(loaded.expected(log.users, log.items[:, None]), expected)
    assert loaded.describe() == response.describe()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError):
        load_response(path)


def test_a_model_of_graded_feedback_is_fitted_to_its_mean():
    twin = generate_twin(replace(TOY, clicks=kuairand_clicks(SEVERAL)))
    response = fit_response(twin.data, "test")
    assert isinstance(response, GradedResponse)
    log = twin.data.test
    expected = response.expected(log.users, log.items[:, None])[:, 0]
    assert expected.mean() == pytest.approx(log.feedback.mean(), rel=0.15)
    truth = twin.truth.click_probability(log.users, log.items[:, None])[:, 0]
    assert np.corrcoef(expected, truth)[0, 1] > 0.6
    assert response.describe()["data_hash"] == twin.data.data_hash
    world = build_world(twin.data, "test", response)
    assert world.response.describe() == response.describe()
    with pytest.raises(DataError, match="factorised"):
        fit_response(twin.data, "test", "sequential")


def test_watch_ratios_of_a_whole_matrix_are_looked_up():
    twin = generate_twin(replace(PANEL, clicks=kuairec_clicks(feedback="watch_ratio", clip=3.0)))
    response = fit_response(twin.data, "test")
    assert isinstance(response, ObservedResponse)
    log = twin.data.test
    expected = response.expected(log.users, log.items[:, None])[:, 0]
    np.testing.assert_allclose(expected, log.feedback, atol=2e-3)
    assert (response.clicked(expected) == log.clicks).mean() > 0.999
    assert build_world(twin.data, "test", response, embeddings=np.ones((PANEL.n_items, 4), np.float32)).response
