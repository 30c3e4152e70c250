"""Public data sets in the formats that they are published in, drawn small: MovieLens, Coat, Last.fm."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from kuaifair_env import build_world, candidate_rows
from kuaifair_env.data import InteractionData, LogColumns
from kuaifair_env.response import fit_response

GENRES = ("Action", "Adventure", "Children's", "Comedy", "Film-Noir")


@pytest.fixture
def movielens(tmp_path):
    """``ratings.csv`` and ``movies.csv`` as GroupLens publishes them (ml-latest-small)."""
    rng = np.random.default_rng(0)
    lines = ["userId,movieId,rating,timestamp"]
    for user in range(1, 61):
        for movie in rng.choice(np.arange(1, 81), 40, replace=False):
            stars = np.clip(round(2 * rng.normal(3.5, 1)) / 2, 0.5, 5.0)
            lines.append(f"{user},{movie},{stars},{rng.integers(828_124_615, 1_537_799_250)}")
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    movies = ["movieId,title,genres", '1,"American President, The (1995)",(no genres listed)']
    for movie in range(2, 81):
        some = "|".join(sorted(rng.choice(GENRES, rng.integers(1, 4), replace=False)))
        movies.append(f'{movie},"Film, No. {movie} ({1950 + movie % 60})",{some}')
    (tmp_path / "movies.csv").write_text("\n".join(movies) + "\n")
    return tmp_path


def test_movielens_is_read_as_published(movielens):
    data = InteractionData.from_log(
        movielens / "ratings.csv",
        movielens / "movies.csv",
        columns={"user": "userId", "item": "movieId", "tags": "genres"},
        positive={"rating": 4.0},
        split="user",
    )
    assert data.items.tag_names == ("(no genres listed)", *GENRES)
    ratings = pd.read_csv(movielens / "ratings.csv")
    assert data.train.clicks.sum() + data.test.clicks.sum() == (ratings.rating >= 4).sum()
    assert data.train.times.min() == ratings.timestamp.min() and len(data.test) == len(ratings) / 5
    last = ratings.sort_values("timestamp").groupby("userId").tail(8)
    assert set(zip(data.users.ids[data.test.users], data.items.ids[data.test.items], strict=True)) == set(
        zip(last.userId, last.movieId, strict=True)
    )


@pytest.fixture
def coat(tmp_path):
    """``train.ascii`` and ``test.ascii`` as Coat publishes them: a matrix of ratings, 0 for none."""
    rng = np.random.default_rng(1)
    taste = rng.normal(size=(80, 50))
    for name, share in (("train", 0.35), ("test", 0.3)):
        stars = np.clip(np.rint(2.7 + taste + rng.normal(size=taste.shape)), 1, 5).astype(int)
        np.savetxt(tmp_path / f"{name}.ascii", stars * (rng.random(taste.shape) < share), fmt="%d")
    return tmp_path


def test_coat_is_read_as_published_and_becomes_two_worlds(coat):
    def log(name: str) -> pd.DataFrame:
        matrix = np.loadtxt(coat / f"{name}.ascii", dtype=int)
        users, items = np.nonzero(matrix)
        return pd.DataFrame({"user_id": users, "item_id": items, "rating": matrix[users, items]})

    train, test = log("train"), log("test")
    data = InteractionData.from_frames(train, test, positive={"rating": 4.0}, name="Coat")
    assert (len(data.users), len(data.items)) == (80, 50) and data.test.clicks.mean() == (test.rating >= 4).mean()
    # Coat's other form: lines of user, item, rating.
    for name, frame in (("train", train), ("test", test)):
        frame.to_csv(coat / f"{name}.csv", index=False)
    three_columns = InteractionData.from_frames(coat / "train.csv", coat / "test.csv", positive={"rating": 4.0})
    assert three_columns.data_hash == data.data_hash
    for split in ("train", "test"):
        world = build_world(data, split, fit_response(data, split), candidates=candidate_rows(data, 15))
        assert world.n_items > 40 and world.response.describe()["split"] == split


@pytest.fixture
def lastfm(tmp_path):
    """``user_artists.dat`` as HetRec publishes Last.fm: user, artist, plays, separated by tabs."""
    rng = np.random.default_rng(2)
    plays = pd.DataFrame([(user, artist) for user in range(2, 90) for artist in {*rng.geometric(0.05, 45)}])
    plays.columns = pd.Index(["userID", "artistID"])
    plays["weight"] = rng.geometric(0.01, len(plays))
    plays.sample(frac=1, random_state=0).to_csv(tmp_path / "user_artists.dat", sep="\t", index=False)
    return tmp_path / "user_artists.dat"


def test_plays_have_no_negatives_and_say_how_they_are_drawn(lastfm):
    data = InteractionData.from_log(
        lastfm,
        columns=LogColumns(user="userID", item="artistID"),
        split="user",
        test_share=0.4,
        positives_only="both",
        negatives_per_positive=4,
    )
    plays = pd.read_csv(lastfm, sep="\t")
    assert len(data.train) + len(data.test) == len(plays) and data.train.clicks.all() and data.test.positives_only
    response = fit_response(data, "test")
    notes = response.describe()["fitted_on"]
    assert notes["negatives"].startswith("drawn: 4 per positive") and notes["negatives_drawn"] > len(data.test)


def test_plays_of_lastfm_360k_have_hashes_for_users_and_names_for_artists(tmp_path):
    """``usersha1-artmbid-artname-plays.tsv`` has no header, so pandas names its columns."""
    rng = np.random.default_rng(3)
    users = [f"{rng.integers(2**62):040x}" for _ in range(30)]
    rows = [
        f'{user}\t{artist:036d}\tbëlle & "{artist}"\t{rng.integers(1, 500)}' for user in users for artist in range(9)
    ]
    (tmp_path / "plays.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    frame = pd.read_csv(tmp_path / "plays.tsv", sep="\t", names=["user", "mbid", "artist", "plays"], quoting=3)
    data = InteractionData.from_log(
        frame,
        columns=LogColumns(user="user", item="artist"),
        split="user",
        positives_only="both",
        negatives_per_positive=2,
    )
    assert set(data.users.ids) == set(users) and 'bëlle & "3"' in data.items.ids
