"""What purifiers learn from: windows are what users saw, and clean states are those of the definitions, written out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_worlds import taste_worlds

from dsrm.purifier import ConditionBuilder
from dsrm.targets import (
    LiteralTargets,
    MixedTargets,
    PairedTargets,
    PooledPositives,
    ProfileTargets,
    UnbiasedTargets,
    WindowSettings,
    WindowSource,
    logged_users,
    policy_windows,
    sample_windows,
)
from kuaifair_env.data.popularity import popularity_groups
from kuaifair_env.data.schema import InteractionLog
from kuaifair_env.observations import observed_states
from kuaifair_env.response.base import PADDING, HistoryWindow
from kuaifair_env.splits import calibration_users
from kuaifair_env.world import HISTORY_LENGTH, initial_history

TRAIN, TEST = taste_worlds()
BUILDER = ConditionBuilder.of_world(TRAIN)
LOGGED = WindowSettings(policy_share=0.0)


def log_of(counts: list[int]) -> InteractionLog:
    """Users who saw so many items; the items are numbered through, and every third one was clicked."""
    users = np.repeat(np.arange(len(counts)), counts)
    return InteractionLog.sorted(users, np.arange(len(users)), np.arange(len(users)) % 3 == 0)


@pytest.fixture
def windows(monkeypatch):
    """The windows that examples were made from, and whether each was cut out of the log."""
    drawn = []
    draw = WindowSource.draw

    def noted(self, users, rng):
        window, logged = draw(self, users, rng)
        drawn.append((HistoryWindow(window.items.copy(), window.clicks.copy()), logged.copy()))
        return window, logged

    monkeypatch.setattr(WindowSource, "draw", noted)
    return drawn


# Windows --------------------------------------------------------------------------------------------------------


def test_every_length_and_every_place_of_a_history_is_as_likely_as_any_other():
    log, draws = log_of([4, 6, 1]), 6_000
    window = sample_windows(
        log, 3, np.repeat([1, 2], draws), np.random.default_rng(0), history_length=8, min_length=2, max_length=4
    )
    shown = window.items != PADDING
    lengths, firsts = shown[:draws].sum(axis=1), np.where(shown, window.items, 99)[:draws].min(axis=1)
    counts = {
        (length, first): np.count_nonzero((lengths == length) & (firsts == first))
        for length in (2, 3, 4)
        for first in range(4, 11 - length)
    }
    assert sum(counts.values()) == draws
    for (length, _), count in counts.items():
        chance = 1 / 3 / (6 - length + 1)
        assert abs(count - draws * chance) < 5 * np.sqrt(draws * chance)
    # What is shown is a run of the log, newest last, with its own clicks.
    assert (np.diff(shown.astype(int), axis=1) >= 0).all()
    steps = np.diff(window.items, axis=1)[shown[:, :-1]]
    assert (steps == 1).all()
    np.testing.assert_array_equal(window.clicks, shown & (window.items % 3 == 0))
    assert (window.items[draws:, -1] == 10).all() and (shown[draws:].sum(axis=1) == 1).all()


def test_windows_that_cannot_be_cut_are_refused():
    log, rng = log_of([4, 0]), np.random.default_rng(0)
    with pytest.raises(ValueError, match="user row 1 has no exposures"):
        sample_windows(log, 2, np.asarray([0, 1]), rng)
    for lengths in ((0, 3, 8), (4, 3, 8), (2, 9, 8)):
        with pytest.raises(ValueError, match="need 1 <= min_length <= max_length <= history_length"):
            sample_windows(
                log, 1, np.zeros(1, int), rng, min_length=lengths[0], max_length=lengths[1], history_length=lengths[2]
            )
    whole = sample_windows(log, 2, np.zeros(1, int), rng, min_length=8, max_length=8, history_length=8)
    assert whole.items[0].tolist() == [-1, -1, -1, -1, 0, 1, 2, 3]
    one = sample_windows(log, 2, np.zeros(50, int), rng, min_length=1, max_length=1, history_length=1)
    assert set(one.items[:, 0].tolist()) == {0, 1, 2, 3}


def test_a_share_of_windows_is_played_and_the_others_are_cut_out_of_the_log():
    users = np.repeat(TRAIN.users[:50], 8)
    window, logged = WindowSource(TRAIN, WindowSettings(3, 9, 0.25)).draw(users, np.random.default_rng(0))
    assert (~logged).mean() == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 400))
    lengths = (window.items != PADDING).sum(axis=1)
    assert set(lengths[logged].tolist()) == set(range(3, 10))
    assert (lengths[~logged] == 30).all(), "a session follows the 30 items of the log"
    log = TRAIN.data.train
    for row in np.flatnonzero(logged):
        own = log.items[log.users == users[row]]
        cut = window.items[row, -lengths[row] :]
        assert any((own[place : place + len(cut)] == cut).all() for place in range(len(own) - len(cut) + 1))
    with pytest.raises(ValueError, match="training world"):
        WindowSource(TEST, WindowSettings())


def test_windows_are_no_longer_than_the_history_of_the_world():
    few = replace(TRAIN, initial_history=initial_history(TRAIN.data.train, len(TRAIN.data.users), 4))
    window, _ = WindowSource(few, LOGGED).draw(TRAIN.users, np.random.default_rng(0))
    assert window.items.shape == (len(TRAIN.users), 4) and (window.items != PADDING).all()


def test_played_windows_end_after_one_to_twelve_slates_of_ten_that_follow_the_log():
    long = replace(TRAIN, initial_history=initial_history(TRAIN.data.train, len(TRAIN.data.users), 30).last(150))
    users = np.repeat(TRAIN.users[:200], 6)
    window = policy_windows(long, users, np.random.default_rng(0))
    shown = (window.items != PADDING).sum(axis=1)
    steps, rest = np.divmod(shown - 30, 10)
    assert (rest == 0).all()
    counts = np.bincount(steps, minlength=13)
    assert counts[0] == 0 and len(counts) == 13
    assert np.abs(counts[1:] - 100).max() < 5 * 10
    log = TRAIN.initial_history.take(users)
    for row, step in enumerate(steps):
        played = window.items[row, 150 - 10 * step :].reshape(step, 10)
        assert all(len(set(slate.tolist())) == 10 for slate in played)
        np.testing.assert_array_equal(window.items[row, 120 - 10 * step : 150 - 10 * step], log.items[row])
    # Clicks are those of the given world: twice as many as where nobody is likelier to click than .15.
    clicks = [
        policy_windows(replace(long, response=type(long.response)(table)), users, np.random.default_rng(0)).clicks
        for table in (np.zeros_like(TRAIN.response.table), np.ones_like(TRAIN.response.table))
    ]
    played = np.arange(150) >= 150 - 10 * steps[:, None]
    assert not clicks[0][played].any() and clicks[1][played].all()


def test_policies_range_from_shunning_to_seeking_popular_items_and_some_follow_tastes():
    users = np.repeat(TRAIN.users, 4)
    alone = replace(TRAIN, initial_history=TRAIN.initial_history.last(10))
    rng = np.random.default_rng(0)
    window = policy_windows(alone, users, rng)
    popularity = np.log1p(TRAIN.exposures)[window.items].mean(axis=1)
    catalogue = np.log1p(TRAIN.exposures)
    low, high = np.quantile(popularity, [0.1, 0.9])
    assert low < catalogue.mean() - 0.4 * catalogue.std()
    assert high > catalogue.mean() + 0.4 * catalogue.std()
    # Slates are nearer to what the user clicked before than slates of anybody else are.
    units = TRAIN.embeddings / np.maximum(np.linalg.norm(TRAIN.embeddings, axis=1, keepdims=True), 1e-9)
    states = observed_states(TRAIN, TRAIN.initial_history.take(users))
    states /= np.maximum(np.linalg.norm(states, axis=1, keepdims=True), 1e-9)
    slates = units[window.items].mean(axis=1)
    own = (slates * states).sum(axis=1)
    others = (slates * np.roll(states, 4 * 7 + 1, axis=0)).sum(axis=1)
    assert own.mean() > others.mean() + 0.05


def test_one_user_is_played_like_many():
    window = policy_windows(TRAIN, TRAIN.users[:1], np.random.default_rng(0))
    assert window.items.shape == (1, 30) and (window.items != PADDING).all()


def test_tastes_and_popularity_weigh_as_much_as_their_ranges_say():
    """Of two kinds of items the user's are rare, and the others two standard deviations more popular.

    The user's have cosine 1 and the others 0: the others are shown where ``a < 2 b``, with ``a`` uniform from 0 to 8
    and ``b`` from -1.5 to 1.5, which are 9/96 of all sessions.
    """
    n_users, n_items = len(TRAIN.data.users), len(TRAIN.data.items)
    liked = np.arange(n_items) % 2 == 0
    users = np.repeat(np.arange(n_users), 3 * n_items // 2)
    items = np.tile(np.concatenate([np.flatnonzero(~liked), np.arange(n_items)]), n_users)
    log = InteractionLog.sorted(users, items, liked[items])
    data = replace(TRAIN.data, train=log)
    world = replace(
        TRAIN,
        data=data,
        users=np.arange(n_users),
        response=type(TRAIN.response)(np.tile(liked, (n_users, 1))),
        embeddings=(np.sqrt(8) * np.eye(8)[np.where(liked, 0, 1)]).astype(np.float32),
        initial_history=initial_history(log, n_users, 10),
        groups=popularity_groups(log.exposures(n_items), data.items.ids),
    )
    draws = 5 * n_users
    window = policy_windows(world, np.repeat(world.users, 5), np.random.default_rng(0))
    chance = 9 / 96
    others = (~liked[window.items]).mean(axis=1) > 0.5
    assert others.mean() == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / draws) + 0.005)


def test_windows_reach_as_far_back_as_the_histories_of_a_world():
    assert WindowSettings().max_length == HISTORY_LENGTH
    log = log_of([HISTORY_LENGTH + 9])
    rows = np.zeros(3_000, np.int64)
    lengths = (sample_windows(log, 1, rows, np.random.default_rng(0)).items != PADDING).sum(axis=1)
    assert (lengths.min(), lengths.max()) == (WindowSettings().min_length, HISTORY_LENGTH)


def test_settings_of_windows_that_make_no_sense_are_refused():
    for bad in ({"min_length": 0}, {"min_length": 9, "max_length": 8}, {"policy_share": 1.1}, {"policy_share": -0.1}):
        with pytest.raises(ValueError, match=r"length|policy_share"):
            WindowSettings(**bad)
    WindowSettings(1, 1, 1.0)


# Clean states ---------------------------------------------------------------------------------------------------


def weighted_mean(items: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return (weights[items, None] * TRAIN.embeddings[items]).sum(axis=0) / weights[items].sum()


def positives(log: InteractionLog, user: int) -> np.ndarray:
    return log.items[(log.users == user) & log.clicks]


def without(items: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Items of which those of a window were taken away, as often as they are in it."""
    left = items.tolist()
    for item in others.tolist():
        left.remove(item)
    return np.asarray(left)


@pytest.mark.parametrize("exclude", [0.0, 0.4, 1.0])
def test_a_profile_is_the_weighted_mean_of_all_positives_perhaps_without_those_of_the_window(exclude, windows):
    users = np.repeat(TRAIN.users[:100], 3)
    source = ProfileTargets(TRAIN, WindowSettings(policy_share=0.3), exclude)
    examples = source.draw(users, np.random.default_rng(0))
    window, logged = windows[0]
    np.testing.assert_array_equal(examples.conditions, BUILDER.build(observed_states(TRAIN, window), window))
    left_out = np.zeros(len(users), np.bool_)
    for row, user in enumerate(users):
        everything = positives(TRAIN.data.train, user)
        rest = without(everything, window.items[row, window.clicks[row]]) if logged[row] else everything
        both = [weighted_mean(items, BUILDER.weights) for items in (everything, rest)]
        left_out[row] = np.abs(examples.targets[row] - both[1]).max() < np.abs(examples.targets[row] - both[0]).max()
        np.testing.assert_allclose(examples.targets[row], both[int(left_out[row])], atol=1e-4)
    clicked = logged & window.clicks.any(axis=1)
    assert not left_out[~clicked].any()
    assert left_out[clicked].mean() == pytest.approx(exclude, abs=5 * np.sqrt(exclude * (1 - exclude) / 200))


def test_a_windows_positives_are_left_out_only_where_three_others_remain():
    items, n_users = np.arange(12), 2
    log = InteractionLog.sorted(np.repeat([0, 1], 6), items, np.tile([True] * 5 + [False], 2))
    pooled = PooledPositives(BUILDER, log, n_users)
    np.testing.assert_array_equal(pooled.counts, [5, 5])
    window = HistoryWindow(np.asarray([[0, 1], [6, 7]], np.int32), np.ones((2, 2), np.bool_))
    shorter = HistoryWindow(
        np.asarray([[0, 1, 2], [6, 7, 11]], np.int32), np.asarray([[True] * 3, [True, True, False]])
    )
    users, everybody = np.arange(2), np.ones(2, np.bool_)
    alone = [weighted_mean(items[first : first + 3], BUILDER.weights) for first in (2, 8)]
    whole = [weighted_mean(items[first : first + 5], BUILDER.weights) for first in (0, 6)]
    np.testing.assert_allclose(pooled.of_users(users), whole, atol=1e-5)
    np.testing.assert_allclose(pooled.outside(window, users, everybody), alone, atol=1e-5)
    np.testing.assert_allclose(pooled.outside(window, users, ~everybody), whole, atol=1e-5)
    np.testing.assert_allclose(pooled.outside(shorter, users, everybody), [whole[0], alone[1]], atol=1e-5)
    plain = PooledPositives(BUILDER, log, n_users, weighted=False)
    means = [TRAIN.embeddings[first : first + 5].mean(axis=0) for first in (0, 6)]
    np.testing.assert_allclose(plain.of_users(users), means, atol=1e-5)


def test_users_without_a_positive_have_a_profile_of_zeros():
    log = InteractionLog.sorted(np.asarray([0]), np.asarray([3]), np.asarray([True]))
    np.testing.assert_array_equal(PooledPositives(BUILDER, log, 2).of_users(np.asarray([1])), np.zeros((1, 8)))


def test_literal_targets_are_the_observed_state_itself(windows):
    source = LiteralTargets(TRAIN, LOGGED)
    examples = source.draw(source.users, np.random.default_rng(0))
    np.testing.assert_array_equal(examples.conditions, observed_states(TRAIN, windows[0][0]))
    np.testing.assert_array_equal(examples.targets, examples.conditions)
    np.testing.assert_array_equal(source.users, np.intersect1d(TRAIN.users, TRAIN.data.train.users))


def test_unbiased_targets_are_what_was_clicked_less_what_was_shown_plus_the_mean_profile():
    calibration = calibration_users(TRAIN.data, 0.2)
    source = UnbiasedTargets(TRAIN, LOGGED, calibration)
    log = TRAIN.data.test
    clicks = np.bincount(log.users, log.clicks, len(TRAIN.data.users))
    np.testing.assert_array_equal(source.users, calibration[clicks[calibration] >= 3])
    profile = np.mean(
        [weighted_mean(positives(TRAIN.data.train, user), BUILDER.weights) for user in TRAIN.users], axis=0
    )
    examples = source.draw(source.users, np.random.default_rng(0))
    for user, target in zip(source.users, examples.targets, strict=True):
        clicked, shown = (
            TRAIN.embeddings[part].mean(axis=0) for part in (positives(log, user), log.items[log.users == user])
        )
        np.testing.assert_allclose(target, clicked - shown + profile, atol=1e-4)


def test_only_calibration_users_with_three_clicks_have_unbiased_targets():
    calibration = calibration_users(TRAIN.data, 0.2)
    log = TRAIN.data.test
    order = np.zeros(len(log), int)
    for user in calibration:
        order[log.users == user] = np.arange(np.count_nonzero(log.users == user))
    for places, kept in ((3, calibration), (2, calibration[2:])):
        clicks = order < np.where(np.isin(log.users, calibration[:2]), places, 5)
        data = replace(TRAIN.data, test=replace(log, clicks=clicks))
        np.testing.assert_array_equal(UnbiasedTargets(replace(TRAIN, data=data), LOGGED, calibration).users, kept)


def mixed_targets() -> tuple[UnbiasedTargets, ProfileTargets, MixedTargets]:
    unbiased = UnbiasedTargets(TRAIN, LOGGED, calibration_users(TRAIN.data, 0.2))
    profile = ProfileTargets(TRAIN, LOGGED, 0.0)
    return unbiased, profile, MixedTargets(unbiased, profile)


def test_a_mixture_draws_three_quarters_of_unbiased_targets_and_one_of_profiles():
    unbiased, profile, mixed = mixed_targets()
    np.testing.assert_array_equal(mixed.users, np.union1d(unbiased.users, profile.users))
    profiles = profile.draw(profile.users, np.random.default_rng(0)).targets
    targets = unbiased.draw(unbiased.users, np.random.default_rng(0)).targets

    def share_of_unbiased(users: np.ndarray) -> float:
        drawn = mixed.draw(users, np.random.default_rng(1)).targets
        distances = [np.abs(drawn[:, None] - known).max(axis=2).min(axis=1) for known in (targets, profiles)]
        assert np.minimum(*distances).max() < 1e-4
        return float((distances[0] < distances[1]).mean())

    assert share_of_unbiased(np.tile(mixed.users, 4)) == pytest.approx(0.75, abs=0.06)
    assert share_of_unbiased(np.setdiff1d(profile.users, unbiased.users)) == 0.0
    only = replace(
        TRAIN, data=replace(TRAIN.data, train=TRAIN.data.train.take(TRAIN.data.train.users != unbiased.users[0]))
    )
    without_log = MixedTargets(unbiased, ProfileTargets(only, LOGGED, 0.0))
    assert unbiased.users[0] not in without_log._profile.users
    assert set(map(tuple, without_log.draw(unbiased.users[:1].repeat(9), np.random.default_rng(0)).targets)) == {
        tuple(targets[0])
    }


def test_nobody_is_on_both_sides_of_a_mixtures_early_stopping():
    unbiased, _, mixed = mixed_targets()
    learning, stopping = mixed.split()
    assert not np.intersect1d(learning, stopping).size
    np.testing.assert_array_equal(np.union1d(learning, stopping), mixed.users)
    for users, calibration in zip((learning, stopping), unbiased.split(), strict=True):
        np.testing.assert_array_equal(np.intersect1d(users, unbiased.users), calibration)
    assert len(stopping) == pytest.approx(len(mixed.users) / 10, abs=5 * np.sqrt(len(mixed.users) * 0.09))


def test_paired_targets_are_the_weighted_state_of_the_window_before_it_was_corrupted(windows):
    source = PairedTargets(TRAIN, LOGGED)
    examples = source.draw(source.users, np.random.default_rng(0))
    window = windows[0][0]
    for row in range(len(window.items)):
        clicked = window.items[row, window.clicks[row]]
        expected = weighted_mean(clicked, BUILDER.weights) if len(clicked) else np.zeros(8)
        np.testing.assert_allclose(examples.targets[row], expected, atol=1e-4)


def test_corruption_deletes_positives_of_the_tail_and_puts_in_clicks_on_popular_items_as_often_as_they_are_shown():
    source = PairedTargets(TRAIN, LOGGED)
    rng = np.random.default_rng(0)
    clean = sample_windows(
        TRAIN.data.train, len(TRAIN.data.users), np.repeat(TRAIN.users, 6), rng, history_length=30, max_length=29
    )
    before = HistoryWindow(clean.items.copy(), clean.clicks.copy())
    corrupt = source._corrupt(clean, rng)
    np.testing.assert_array_equal(clean.items, before.items)
    np.testing.assert_array_equal(clean.clicks, before.clicks)
    shown, popular = clean.items != PADDING, BUILDER.popular[clean.items]
    np.testing.assert_array_equal(corrupt.items != PADDING, shown)
    changed = corrupt.items != clean.items
    assert BUILDER.popular[corrupt.items[changed]].all() and corrupt.clicks[changed].all()
    assert (corrupt.clicks[shown & clean.clicks & popular]).all(), "clicks on popular items stay"
    assert not changed[shown & clean.clicks & popular].any()
    # Strengths are uniform from 0 to .5: a mean of .25, and a tail positive that is neither kept nor replaced
    # has been deleted (s) and not filled (1 - s): .25 - .5 ** 2 / 3.
    tail = shown & clean.clicks & ~popular
    deleted = tail & ~corrupt.clicks
    assert deleted.sum() / tail.sum() == pytest.approx(0.25 - 0.25 / 3, abs=0.02)
    skipped = shown & ~clean.clicks
    assert corrupt.clicks[skipped].mean() == pytest.approx(0.25, abs=0.01)
    by_window = (corrupt.clicks & skipped).sum(axis=1) / np.maximum(skipped.sum(axis=1), 1)
    assert by_window[skipped.sum(axis=1) > 10].std() > 0.15, "a window has one strength of its own"
    put_in = np.bincount(corrupt.items[skipped & corrupt.clicks], minlength=120)
    exposures = np.where(BUILDER.popular, TRAIN.data.train.exposures(120), 0)
    expected = put_in.sum() * exposures / exposures.sum()
    assert (np.abs(put_in - expected) < 5 * np.sqrt(expected) + 1).all()


def test_logged_users_are_those_of_the_world_who_click_so_often():
    log = InteractionLog.sorted(np.asarray([0, 0, 1, 2, 3, 3]), np.arange(6), np.asarray([1, 1, 0, 1, 1, 0], np.bool_))
    world = replace(TRAIN, data=replace(TRAIN.data, train=log), users=np.asarray([0, 1, 3, 5]))
    assert logged_users(world).tolist() == [0, 1, 3]
    assert logged_users(world, 1).tolist() == [0, 3]
    assert logged_users(world, 2).tolist() == [0]
