"""Environment ids of one's own data: registered, made, refused."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest

from kuaifair_env import (
    DataError,
    InteractionData,
    LeftOutWarning,
    build_world,
    evaluate,
    make_sb3,
    make_world,
    register_world,
)
from kuaifair_env.response import fit_response

SETTINGS = {"embedding_dim": 4, "max_len": 4, "slate_size": 4}


def shop(seed: int, rows: int = 1_500) -> pd.DataFrame:
    """A log of 60 customers and 40 articles with text for ids, whose dates are text too."""
    rng = np.random.default_rng(seed)
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(
        np.sort(rng.integers(0, 9_000_000, rows)) + seed * 10_000_000, unit="s"
    )
    customer, article = rng.integers(60, size=rows), np.minimum(rng.geometric(0.06, rows) - 1, 39)
    return pd.DataFrame(
        {
            "user_id": [f"c-{number:03}" for number in customer],
            "item_id": [f"SKU {number}" for number in article],
            "click": rng.random(rows) < 0.2 + 0.5 * ((customer + article) % 2),
            "date": days.astype(str),
        }
    )


ITEMS = pd.DataFrame(
    {"item_id": [f"SKU {n}" for n in range(40)], "tags": ["tea|cups", "tea", "[cups, plates]", ""] * 10}
)


def test_a_world_of_ones_own_is_made_in_every_form_and_speaks_of_its_own_ids(registry):
    register_world("MyShop-v0", (shop(0), shop(1)), items=ITEMS)
    world = make_world("MyShop-v0", split="test", embedding_dim=4)
    assert world.data.provenance.name == "MyShop-v0" and world.data.items.tag_names == ("cups", "plates", "tea")
    assert set(world.item_ids) <= set(ITEMS.item_id)
    env = gym.make("MyShop-v0", split="test", **SETTINGS)
    _, info = env.reset(seed=1, options={"user_id": world.user_ids[3]})
    assert info["user_id"] == world.user_ids[3] and isinstance(info["user_id"], str)
    with pytest.raises(DataError, match="has no sessions"):
        env.reset(options={"user_id": "nobody"})
    shown = gym.make("MyShop-v0", action_mode="slate", render_mode="ansi", **SETTINGS)
    shown.reset(seed=0)
    _, _, _, _, info = shown.step(np.arange(4))
    assert list(info["item_ids"]) == list(world.item_ids[:4]) and world.item_ids[0] in shown.render()
    vector = gym.make_vec("MyShop-v0", num_envs=3, **SETTINGS)
    _, infos = vector.reset(seed=0)
    assert all(name.startswith("c-") for name in infos["user_id"])
    sessions = make_sb3("MyShop-v0", n_envs=3, seed=0, info_level="step", **SETTINGS)
    sessions.reset()
    for _ in range(6):
        _, _, _, step_infos = sessions.step(np.zeros((3, 4), np.float32))
    assert all(info["user_id"].startswith("c-") for info in step_infos)
    result = evaluate(
        lambda observation: np.zeros((len(observation), 4), np.float32),
        gym.make("MyShop-v0", split="test", **SETTINGS),
        n_users=5,
    )
    assert len(result.sessions) == 5 and set(result.sessions.user_ids) <= set(world.user_ids)
    column = pd.Series(result.sessions.user_ids)
    for ids in (column, column.to_numpy(object), column.astype("category"), tuple(column)):
        np.testing.assert_array_equal(world.user_rows(ids), world.user_rows(list(column)))


def test_nothing_is_fitted_at_registration_and_the_same_may_be_registered_again(registry, tmp_path):
    files = [tmp_path / "train.csv", tmp_path / "test.csv"]
    for seed, path in enumerate(files):
        shop(seed, 300).to_csv(path, index=False)
    for _ in range(2):
        register_world("MyShop-v0", *files)
    assert not (tmp_path / "cache").exists() and "data" not in vars(registry["MyShop-v0"])
    with pytest.raises(ValueError, match="other data"):
        register_world("MyShop-v0", files[0])
    with pytest.raises(ValueError, match="already"):
        register_world("KuaiFair-Toy-v0", *files)
    with pytest.raises(DataError, match="no such file"):
        register_world("Other-v0", tmp_path / "missing.csv")
    frames = [pd.read_csv(path) for path in files]
    register_world("Frames-v0", *frames)
    register_world("Frames-v0", tuple(frames))
    with pytest.raises(ValueError, match="other data"):
        register_world("Frames-v0", frames[0], frames[1].iloc[:-1])
    with pytest.raises(ValueError, match="'positive' is no setting of MyShop-v0"):
        make_world("MyShop-v0", positive="long_view")
    with pytest.raises(ValueError, match="register_world"):
        make_world("MyShop-v1")


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (
            {"user_id": "customer"},
            {},
            r"'user_id'.*no such column; it has: customer, item_id, .*columns={'user'",
        ),
        ({"item_id": "sku"}, {}, r"column 'item_id'.*no such column"),
        ({"click": "clicked"}, {}, r"column 'click'.*columns={'click': \.\.\.}"),
        ({"date": "rank"}, {}, "no column of times to split by"),
        ({}, {"columns": {"time": "when"}}, "no column of times to split by"),
        ({}, {"columns": {"time": "when"}, "split": "user"}, "column 'when'.*no log has the column"),
        ({}, {"columns": {"user": "customer"}}, "column 'customer'.*no such column"),
        ({}, {"columns": {"buyer": "customer"}}, "columns has no 'buyer'"),
        ({}, {"columns": {"tags": "genres"}}, "column 'genres'.*no items frame"),
        ({}, {"positive": {"rating": 4.0}}, "column 'rating'.*no such column"),
        ({}, {"positive": {"rating": 4.0, "stars": 3.0}}, "positive names one column"),
        ({}, {"positives_only": "test"}, "negatives_per_positive=4"),
        ({}, {"test_share": 1.0}, "must lie between 0 and 1"),
        ({}, {"split": "item"}, "a log is split by one of"),
    ],
)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_columns_of_files_are_checked_when_they_are_registered(registry, tmp_path, changes, settings, message, ending):
    log = shop(0, 30).rename(columns=changes)
    write = {".csv": log.to_csv, ".parquet": log.to_parquet}[ending]
    write(tmp_path / f"log{ending}", index=False)
    with pytest.raises(ValueError, match=message):
        register_world("MyShop-v0", tmp_path / f"log{ending}", **settings)
    assert "MyShop-v0" not in registry


@pytest.mark.parametrize("name", ["test", "items", "users"])
def test_columns_of_every_file_are_checked(registry, tmp_path, name):
    files = {"data": tmp_path / "log.csv", name: tmp_path / f"{name}.csv"}
    shop(0, 30).to_csv(files["data"], index=False)
    pd.DataFrame({"size": [1, 2]}).to_csv(files[name], index=False)
    settings = {} if name == "test" else {"split": "user"}
    with pytest.raises(DataError, match=f"the {name} (log|frame) has no such column; it has: size"):
        register_world("MyShop-v0", **files, **settings)
    (tmp_path / "nothing.csv").write_text("")
    with pytest.raises(DataError, match=r"nothing\.csv: cannot be read as a table"):
        register_world("MyShop-v0", **(files | {name: tmp_path / "nothing.csv"}), **settings)


def test_a_log_of_clicks_needs_no_column_of_clicks_to_be_registered(registry, tmp_path):
    shop(0, 30).drop(columns="click").to_csv(tmp_path / "log.csv", index=False)
    register_world("MyShop-v0", tmp_path / "log.csv", positives_only="both", negatives_per_positive=4.0, split="user")
    assert "MyShop-v0" in registry


def test_files_say_where_they_lie_and_one_log_is_split(registry, tmp_path):
    shop(0).to_csv(tmp_path / "log.tsv", index=False, sep="\t")
    register_world("MyShop-v0", tmp_path / "log.tsv", split="user", test_share=0.3, min_test_exposures=3)
    data = registry["MyShop-v0"].data
    tables = {"data": str(tmp_path / "log.tsv"), "split": "user", "test_share": 0.3, "min_test_exposures": 3}
    assert data.provenance.settings["tables"] == tables
    assert set(data.provenance.files) == {"log.tsv"} and abs(len(data.test) / 1_500 - 0.3) < 0.02
    with pytest.warns(LeftOutWarning, match=r"of 40 items are no candidates: they have fewer than 3 "):
        make_world("MyShop-v0", embedding_dim=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_world("MyShop-v0", embedding_dim=4)


def test_a_world_with_another_worlds_response_is_refused():
    data, other = (InteractionData.from_frames(shop(seed), shop(seed + 1)) for seed in (0, 2))
    responses = {split: fit_response(data, split) for split in ("train", "test")}
    common = {"embeddings": np.ones((len(data.items), 2), np.float32)}
    assert build_world(data, "test", responses["test"], **common).split == "test"
    with pytest.raises(DataError, match="fitted on the train log"):
        build_world(data, "test", responses["train"], **common)
    with pytest.raises(DataError, match="another world's"):
        build_world(other, "test", responses["test"], **common)
