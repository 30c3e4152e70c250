"""The click model of the controls recovers what a log says, from the log alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import TableResponse, small_world
from sklearn.metrics import roc_auc_score

from dsrm.click_scorer import ClickScorer, states_before
from kuaifair_env.batch import SessionBatch, SessionConfig
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.errors import DataError


def logit(p):
    return np.log(p / (1 - p))


def world_with_log(click_probability, *, n_users=400, n_items=40, rows_per_user=60, seed=0, positives_only=False):
    """A world whose training log shows uniformly drawn items; ``click_probability(users, items)`` decides."""
    world = small_world(n_users=n_users, n_items=n_items)
    rng = np.random.default_rng(seed)
    users = np.repeat(np.arange(n_users), rows_per_user)
    items = rng.integers(n_items, size=len(users))
    clicks = rng.random(len(users)) < click_probability(users, items)
    if positives_only:
        users, items, clicks = users[clicks], items[clicks], clicks[clicks]
    log = InteractionLog.sorted(users, items, clicks, positives_only=positives_only)
    return replace(world, data=replace(world.data, train=log))


def test_items_are_ranked_by_their_click_rate_where_nothing_else_matters():
    rates = np.linspace(0.1, 0.9, 40)
    rng = np.random.default_rng(1)
    rng.shuffle(rates)
    scorer = ClickScorer.fit(world_with_log(lambda users, items: rates[items]))
    scores = scorer.score(np.zeros((1, 8), np.float32))[0]
    assert np.corrcoef(scores, logit(rates))[0, 1] > 0.98
    # Half of the 200 users who are not held out give an item 150 exposures, shrunk by 20 more; the fit undoes that.
    assert scorer.report.coefficients["click_rate"] == pytest.approx(1.0 + 20 / 150, abs=0.06)
    # The best AUC that item rates allow: P(score of a click > score of a non-click) over uniformly shown items.
    expected = roc_auc_score(
        np.r_[np.ones(40), np.zeros(40)], np.r_[rates, rates], sample_weight=np.r_[rates, 1 - rates]
    )
    assert scorer.report.auc == pytest.approx(expected, abs=0.02)
    assert scorer.report.within_user_auc == pytest.approx(expected, abs=0.02)


def test_similarity_counts_where_users_have_a_taste_and_not_where_they_have_none():
    halves = np.arange(400) % 2
    tasteful = world_with_log(lambda users, items: np.where(halves[users] == items % 2, 0.8, 0.1))
    tasteless = world_with_log(lambda users, items: np.full(len(users), 0.45))
    with_taste, without = ClickScorer.fit(tasteful).report, ClickScorer.fit(tasteless).report
    assert with_taste.coefficients["similarity"] > 1.0
    assert with_taste.within_user_auc > 0.75
    assert abs(without.coefficients["similarity"]) < 0.3
    assert without.within_user_auc == pytest.approx(0.5, abs=0.03)


def test_the_state_moves_the_ranking_towards_what_was_clicked():
    halves = np.arange(400) % 2
    world = world_with_log(lambda users, items: np.where(halves[users] == items % 2, 0.8, 0.1))
    from kuaifair_env.embeddings import item_embeddings

    world = replace(world, embeddings=item_embeddings(world.data.train, 400, world.data.items, 8))
    scorer = ClickScorer.fit(world)
    for parity in (0, 1):
        state = world.embeddings[parity::2].mean(axis=0, keepdims=True)
        best = np.argsort(-scorer.score(state)[0])[:20]
        assert (best % 2 == parity).mean() > 0.9


def test_states_before_an_exposure_are_what_a_session_would_have_shown():
    world = small_world(history_length=7)
    log, embeddings = world.data.train, world.embeddings
    rows = np.asarray([0, 1, 30, 60, 61, 119, len(log) - 1])
    states = states_before(log, rows, embeddings, 7)
    for row, state in zip(rows, states, strict=True):
        start = np.searchsorted(log.users, log.users[row])
        window = slice(max(start, row - 7), row)
        clicked = log.items[window][log.clicks[window]]
        expected = embeddings[clicked].mean(axis=0) if len(clicked) else np.zeros(8)
        np.testing.assert_allclose(state, expected, rtol=1e-5, atol=1e-6)


def test_the_state_after_the_log_is_the_first_observation_of_a_session():
    world = small_world(history_length=20)
    batch = SessionBatch(world, SessionConfig(), 8)
    batch.reset(np.arange(8))
    log, users = world.data.train, batch.simulator.users
    # One row more for every user, so that "before" it lies the whole log.
    extended = InteractionLog.sorted(
        np.r_[log.users, np.arange(40)],
        np.r_[log.items, np.zeros(40, int)],
        np.r_[log.clicks, np.zeros(40, bool)],
    )
    last = extended.offsets(40)[1:][users] - 1
    states = states_before(extended, last, world.embeddings, 20)
    np.testing.assert_allclose(states, batch.observe(), rtol=1e-5, atol=1e-6)


def test_neither_test_log_nor_response_nor_held_out_users_decide_scores():
    world = small_world()
    fitted = ClickScorer.fit(world)
    changed = replace(world, response=TableResponse(np.zeros((40, 50))))
    np.testing.assert_array_equal(ClickScorer.fit(changed).item_scores, fitted.item_scores)
    data = world.data
    from kuaifair_env.splits import held_out_users

    held_out = np.isin(data.train.users, held_out_users(data))
    flipped = replace(data.train, clicks=data.train.clicks ^ held_out)
    np.testing.assert_array_equal(
        ClickScorer.fit(replace(world, data=replace(data, train=flipped))).item_scores, fitted.item_scores
    )


def test_candidates_come_first_and_only_they_are_scored():
    world = small_world(candidates=30)
    scorer = ClickScorer.fit(world)
    assert scorer.n_items == 30
    assert scorer.score(np.zeros((5, 8), np.float32)).shape == (5, 30)
    assert scorer.score(np.zeros((5, 8), np.float32)).dtype == np.float32


def test_a_log_of_positives_is_told_from_candidates_never_clicked():
    weights = 1.0 / np.arange(1, 41)
    world = world_with_log(lambda users, items: weights[items], positives_only=True)
    scorer = ClickScorer.fit(world)
    assert "drawn" in scorer.report.negatives
    assert scorer.report.coefficients["click_rate"] == 0.0
    assert scorer.report.coefficients["popularity"] > 0.3
    scores = scorer.score(np.zeros((1, 8), np.float32))[0]
    assert np.corrcoef(scores, np.log(weights))[0, 1] > 0.9


def test_the_same_log_gives_the_same_scorer():
    np.testing.assert_array_equal(
        ClickScorer.fit(small_world(), sample=500, seed=3).directions,
        ClickScorer.fit(small_world(), sample=500, seed=3).directions,
    )


def test_bad_input_is_refused():
    world = small_world()
    scorer = ClickScorer.fit(world)
    with pytest.raises(ValueError, match=r"states must be \(B, 8\)"):
        scorer.score(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="too small"):
        ClickScorer.fit(world, sample=10)
    all_clicks = replace(world.data.train, clicks=np.ones(len(world.data.train), bool))
    with pytest.raises(DataError, match="positives_only"):
        ClickScorer.fit(replace(world, data=replace(world.data, train=all_clicks)))
