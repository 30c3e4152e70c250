"""Worlds are built from one data set so that splits, groups, embeddings and responses stay what they claim to be.

Splits depend on raw user ids alone, and say nothing about each other.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import TableResponse, small_data, small_world
from sklearn.metrics import roc_auc_score

from kuaifair_env import splits
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.schema import FeatureTable, InteractionLog
from kuaifair_env.embeddings import item_embeddings
from kuaifair_env.env import KuaiFairEnv
from kuaifair_env.errors import DataError
from kuaifair_env.registration import make_world
from kuaifair_env.response.fitting import cached_response
from kuaifair_env.splits import (
    calibration_users,
    chosen_users,
    early_stopping_split,
    evaluation_users,
    held_out_users,
    user_folds,
)
from kuaifair_env.world import build_world, candidate_rows, initial_history


def built(data, split="test", **settings):
    table = np.random.default_rng(0).random((len(data.users), len(data.items)))
    embeddings = item_embeddings(data.train, len(data.users), data.items, 8)
    return (
        build_world(data, split, TableResponse(table), embeddings=embeddings, **settings),
        table,
        embeddings,
    )


def test_candidates_come_first_and_every_table_follows_them():
    data = small_data()
    candidates = np.array([30, 4, 17, 2, 41, 8])
    world, table, embeddings = built(data, candidates=candidates)
    assert world.n_items == 6
    np.testing.assert_array_equal(world.item_ids, 10 * candidates)
    np.testing.assert_array_equal(world.embeddings[:6], embeddings[candidates])
    users = np.arange(5)
    np.testing.assert_allclose(world.response.expected_catalogue(users, 6), table[users][:, candidates], rtol=1e-6)
    np.testing.assert_array_equal(world.groups.item_ids, world.item_ids)
    # The same exposure, addressed before and after the rearrangement.
    before, after = data.train, world.data.train
    np.testing.assert_array_equal(data.items.ids[before.items], world.data.items.ids[after.items])


def test_popularity_groups_separate_the_candidates_by_training_exposure():
    world, _, _ = built(small_data(n_items=200, n_users=150, rows_per_user=200))
    exposures = world.data.train.exposures(200)[: world.n_items]
    assert roc_auc_score(world.groups.popular, exposures - world.item_ids * 1e-9) == 1.0
    assert world.groups.popular.mean() == pytest.approx(0.2, abs=1 / world.n_items)


def test_both_splits_recommend_the_same_items_to_different_users():
    data = small_data()
    train, _, _ = built(data, "train")
    test, _, _ = built(data, "test")
    np.testing.assert_array_equal(train.item_ids, test.item_ids)
    np.testing.assert_array_equal(train.embeddings, test.embeddings)
    assert not np.intersect1d(train.users, test.users).size
    np.testing.assert_array_equal(np.sort(np.concatenate([train.users, test.users])), np.arange(40))


def test_initial_history_is_the_end_of_the_log_and_padded_in_front():
    log = InteractionLog.sorted(
        np.array([0, 0, 0, 2, 2]),
        np.array([5, 6, 7, 8, 9]),
        np.array([1, 0, 1, 1, 0]),
        np.array([3, 1, 2, 9, 4]),
    )
    window = initial_history(log, 4, 2)
    np.testing.assert_array_equal(window.items, [[7, 5], [-1, -1], [9, 8], [-1, -1]])
    np.testing.assert_array_equal(window.clicks, [[1, 1], [0, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(initial_history(log, 4, 4).items[0], [-1, 6, 7, 5])


def test_worlds_that_cannot_be_are_clear_errors():
    data = small_data()
    with pytest.raises(DataError, match="no item has"):
        candidate_rows(data, 10**6)
    with pytest.raises(DataError, match="split"):
        built(data, "validation")
    with pytest.raises(DataError, match="at least two"):
        built(data, candidates=np.array([3]))
    with pytest.raises(DataError, match="distinct"):
        built(data, candidates=np.array([3, 3, 4]))
    with pytest.raises(DataError, match="no users"):
        built(data, users=np.array([], np.int64))
    for users in ([-1, 3], [3, 40]):
        with pytest.raises(DataError, match=r"within 0\.\.39"):
            built(data, users=np.array(users))
    with pytest.raises(DataError, match="knows 39 users"):
        build_world(data, "test", TableResponse(np.zeros((39, 50))), embeddings=np.ones((50, 4), np.float32))
    for embeddings in (np.full((50, 4), np.nan, np.float32), np.zeros((50, 0), np.float32)):
        with pytest.raises(DataError, match="finite"):
            build_world(data, "test", TableResponse(np.zeros((40, 50))), embeddings=embeddings)
    for ids, wrong in ((["ten"], "'ten'"), ([None, 10], "None"), (["10", "ten"], "'ten'")):
        with pytest.raises(DataError, match=f"are integers, got {wrong}"):
            small_world().user_rows(ids)


def test_all_items_equally_popular_is_a_clear_error():
    data = small_data()
    users, items = np.divmod(np.arange(40 * 50), 50)
    even = InteractionLog.sorted(users, items, (users + items) % 3 == 0)
    with pytest.raises(DataError, match="none is more popular"):
        built(replace(data, train=even))


def test_users_may_be_given_in_any_order_and_more_than_once():
    world, _, _ = built(small_data(), users=np.array([9, 3, 9, 20]))
    np.testing.assert_array_equal(world.user_ids, [30, 90, 200])
    np.testing.assert_array_equal(world.user_rows([200, 30]), [20, 3])
    np.testing.assert_array_equal(world.user_rows(np.array([200, 30], object)), [20, 3])


def test_a_user_without_history_starts_from_nothing():
    data = small_data()
    data = replace(data, train=data.train.take(data.train.users != 7))
    world, _, _ = built(data, users=np.array([7]))
    env = KuaiFairEnv(world, SessionConfig(max_len=4, slate_size=5))
    state, info = env.reset(seed=0)
    assert info["user_id"] == 70
    assert not state.any()
    assert (env.history_window().items == -1).all()
    assert env.step(np.ones(8, np.float32))[0].shape == (8,)


def test_one_item_slates_work_and_the_candidates_can_all_be_shown_at_once():
    world = small_world(candidates=4)
    for size, leave in ((1, "temper"), (4, "temper"), (1, "never")):
        env = KuaiFairEnv(world, SessionConfig(max_len=3, slate_size=size, action_mode="slate", leave=leave))
        env.reset(seed=0)
        done = False
        while not done:
            *_, terminated, truncated, info = env.step(env.action_space.sample())
            done = terminated or truncated
        assert 0 <= info["session"]["gini"] <= 1
        assert 0 < info["session"]["coverage"] <= 1


def test_a_response_model_is_fitted_again_for_other_rows_or_features(tmp_path, monkeypatch):
    class Kept(TableResponse):
        def save(self, path):
            path.parent.mkdir(exist_ok=True)
            path.write_text("kept")

    fitted = []
    monkeypatch.setattr(
        "kuaifair_env.response.fitting.fit_response",
        lambda data, split, kind: fitted.append(data) or Kept(np.zeros((40, 50))),
    )
    monkeypatch.setattr("kuaifair_env.response.fitting.load_response", lambda path: path)
    data = small_data()
    tall = replace(data.users, features=FeatureTable(2 * data.users.features.values, ("a", "b", "c")))
    ratios = replace(data.test, watch_ratios=np.ones(len(data.test), np.float32))
    others = [data.arranged(np.array([30, 4])), replace(data, users=tall), replace(data, test=ratios)]
    for one in [data, *others]:
        cached_response(one, "test", "factorised", tmp_path)
        cached_response(one, "test", "factorised", tmp_path)
    assert fitted == [data, *others], "once each"


def test_the_text_of_a_world_says_what_it_is_in_a_few_lines():
    text = repr(make_world("KuaiFair-Toy-v0", split="test"))
    assert len(text) < 1_000
    for fact in (
        "Toy twin",
        "split='test'",
        "200 users",
        "600 candidates",
        "120 popular",
        "twin",
        "3898c94677a8917b",
    ):
        assert fact in text


def test_conformity_puts_the_herd_back_into_the_twins_test_world():
    true = make_world("KuaiFair-Toy-v0", split="test")
    herding = make_world("KuaiFair-Toy-v0", split="test", conformity=1.0)
    users = true.users[:50]
    lift = herding.response.expected_catalogue(users, 600) - true.response.expected_catalogue(users, 600)
    assert np.corrcoef(lift.mean(axis=0), np.log1p(true.groups.counts))[0, 1] > 0.8
    assert herding.true_preference is not None


SALTS = (
    splits.HELD_OUT,
    splits.FOLDS,
    splits.EVALUATION,
    splits.CALIBRATION,
    splits.EARLY_STOPPING,
    splits.SERVING,
    splits.HALVES,
)


def test_held_out_users_do_not_depend_on_the_order_or_the_rest_of_the_data():
    data = small_data(n_users=60)
    chosen = data.users.ids[held_out_users(data)]
    assert len(chosen) == 30
    half = data.test.take(np.isin(data.users.ids[data.test.users], chosen[:20]))
    again = held_out_users(replace(data, test=half))
    assert np.isin(data.users.ids[again], chosen[:20]).all()


@pytest.mark.parametrize(("users", "held_out"), [(1, 0), (61, 30), (2_001, 1_000), (4_900, 1_000), (6_004, 1_200)])
def test_a_fifth_of_the_users_is_held_out_and_up_to_half_where_that_makes_fewer_than_a_thousand(users, held_out):
    assert len(held_out_users(small_data(n_users=users, rows_per_user=1))) == held_out


def test_the_users_of_every_split_are_pinned():
    ids = np.arange(0, 1000, 10)
    chosen = {salt: ids[chosen_users(ids, 3, salt)].tolist() for salt in SALTS}
    assert chosen == PINNED


PINNED = {
    0: [120, 320, 710],
    1: [100, 180, 320],
    2: [280, 350, 410],
    5: [270, 660, 750],
    7: [140, 350, 610],
    8: [260, 350, 760],
    9: [300, 460, 740],
}


def word_of(key: int, counter: int) -> int:
    """SplitMix64 as published, in whole numbers: what a generator seeded with a key draws after ``counter`` others."""
    state = (key + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


def test_folds_and_early_stopping_are_remainders_of_a_published_hash():
    data = small_data(n_users=200)
    ids = data.users.ids.tolist()
    _, stopping = early_stopping_split(data, np.arange(200))
    assert data.users.ids[stopping].tolist() == [number for number in ids if word_of(number, 7) % 10 == 0]
    assert user_folds(data, 5).tolist() == [word_of(number, 1) % 5 for number in ids]
    # Among seven users nobody's hash may end in 0: then the first of each ten stops training.
    learning, stopping = early_stopping_split(data, np.arange(5, 12))
    assert not any(word_of(number, 7) % 10 == 0 for number in ids[5:12])
    assert (learning.tolist(), stopping.tolist()) == ([6, 7, 8, 9, 10, 11], [5])


def test_splits_are_independent_of_each_other():
    ids = np.arange(20_000)
    chosen = [set(chosen_users(ids, 2_000, salt).tolist()) for salt in SALTS]
    for first in range(len(SALTS)):
        for second in range(first):
            assert len(chosen[first] & chosen[second]) == pytest.approx(200, abs=60)


def test_calibration_users_are_never_held_out():
    data = small_data(n_users=60)
    calibration = calibration_users(data, 0.2)
    assert len(calibration) == 12
    assert not np.intersect1d(calibration, held_out_users(data)).size
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"share must be a number in \(0, 1\)"):
            calibration_users(data, share)
    with pytest.raises(ValueError, match="no calibration user"):
        calibration_users(data, 0.001)


def test_evaluation_users_are_all_or_a_growing_list():
    ids = np.arange(0, 150, 10)
    np.testing.assert_array_equal(evaluation_users(ids), ids)
    few = evaluation_users(ids, 6)
    assert len(few) == 6
    assert np.isin(few, evaluation_users(ids, 9)).all(), "more users only add to the list"
    for count in (2.0, True):
        with pytest.raises(ValueError, match="whole number"):
            evaluation_users(ids, count)
    with pytest.raises(ValueError, match="at least 1"):
        evaluation_users(ids, 0)


def test_a_tenth_of_the_users_stops_training_early_and_folds_are_of_one_size():
    data = small_data(n_users=400)
    learning, stopping = early_stopping_split(data, np.arange(400))
    np.testing.assert_array_equal(np.sort(np.concatenate([learning, stopping])), np.arange(400))
    assert 20 < len(stopping) < 60
    for few in (2, 11):
        assert all(len(part) for part in early_stopping_split(data, np.arange(few)))
    assert 150 < np.count_nonzero(user_folds(data, 2)) < 250
