"""Logs of one's own: what a reader must refuse or understand, and what its messages must say."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from helpers import TableResponse

from kuaifair_env import DataError, InteractionData, build_world, candidate_rows


def log(seed, rows=400, n_users=40, n_items=60):
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": rng.integers(n_users, size=rows),
            "item_id": rng.integers(n_items, size=rows),
            "click": rng.integers(2, size=rows),
        }
    )


@pytest.mark.parametrize("kind", ["float", "one missing", "datetime"])
def test_case_01_training_rows_in_the_test_log_are_found_whatever_the_kind_of_time(kind):
    train = log(0).assign(time=1_600_000_000 + np.arange(400))
    test = {
        "float": train.astype({"time": float}),
        "one missing": train.astype({"time": float}).assign(time=lambda frame: frame.time.where(frame.index > 0)),
        "datetime": train.assign(time=pd.to_datetime(train.time, unit="s")),
    }[kind]
    with pytest.raises(DataError):
        InteractionData.from_frames(train, train)
    with pytest.raises(DataError):
        InteractionData.from_frames(train, test)


@pytest.mark.parametrize("form", ["through a CSV file", "joined by |"])
def test_case_05_lists_of_tags_that_became_text_are_read_as_lists_or_refused(form):
    rng = np.random.default_rng(0)
    tags = [sorted(rng.choice(8, rng.integers(1, 4), replace=False).tolist()) for _ in range(60)]
    items = pd.DataFrame({"item_id": range(60), "tags": tags})
    as_text = {
        "through a CSV file": pd.read_csv(io.StringIO(items.to_csv(index=False))),
        "joined by |": items.assign(tags=["|".join(map(str, some)) for some in tags]),
    }[form]
    expected = InteractionData.from_frames(log(1), log(2), items=items).items.tags.sum(axis=1)
    try:
        found = InteractionData.from_frames(log(1), log(2), items=as_text).items.tags.sum(axis=1)
    except DataError as error:
        assert "tag" in str(error)
    else:
        np.testing.assert_array_equal(found, expected)


def test_case_06_a_test_log_without_a_non_click_is_refused_at_once():
    with pytest.raises(DataError, match="test"):
        InteractionData.from_frames(log(1).assign(click=1), log(2).assign(click=1), positives_only=True)


def ratings(each):
    """Random exposures of 290 users to ``each`` of 300 items, as in Coat's test log."""
    rng = np.random.default_rng(0)
    pairs = [(user, item) for user in range(290) for item in rng.choice(300, each, replace=False)]
    frame = pd.DataFrame(pairs, columns=["user_id", "item_id"])
    return frame.assign(click=rng.integers(2, size=len(frame)))


def test_case_07_too_few_test_exposures_are_explained_by_what_build_world_takes():
    data = InteractionData.from_frames(ratings(24), ratings(6))
    with pytest.raises(DataError, match="candidates=candidate_rows"):
        build_world(data, "train", None)


def test_case_07_items_that_are_left_out_are_counted_aloud():
    data = InteractionData.from_frames(ratings(24), ratings(16))
    left_out = 300 - len(candidate_rows(data))
    assert 0 < left_out < 300
    response = TableResponse(np.full((290, 300), 0.3))
    with pytest.warns(UserWarning, match=str(left_out)):
        build_world(data, "train", response)
