from __future__ import annotations

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import official_files as official
import pandas as pd
import pytest

from kuaifair_env.data import find_source, kuairand, load_kuairand, read_kuairand
from kuaifair_env.data.kuairand import PoolAndRecentRows
from kuaifair_env.data.published import DATASETS, KUAIRAND
from kuaifair_env.data.sources import recognise
from kuaifair_env.errors import DataError

RANDOM = "log_random_4_22_to_5_08_pure.csv"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    official.write_kuairand(tmp_path / "KuaiRand-Pure" / "data")
    return tmp_path / "KuaiRand-Pure" / "data"


def test_standard_logs_train_and_the_random_log_tests(tmp_path: Path) -> None:
    frames = official.write_kuairand(tmp_path)
    data = read_kuairand(tmp_path)
    standard = pd.concat([frame for name, frame in frames.items() if "standard" in name]).drop_duplicates()
    for log, frame in ((data.train, standard), (data.test, frames[RANDOM])):
        expected = frame.sort_values(["user_id", "time_ms"], kind="stable")
        np.testing.assert_array_equal(data.users.ids[log.users], expected.user_id)
        np.testing.assert_array_equal(data.items.ids[log.items], expected.video_id)
        np.testing.assert_array_equal(log.times, expected.time_ms)
        np.testing.assert_array_equal(log.clicks, expected.is_click)
    assert data.report["train"]["exact_duplicates_dropped"] == 2


def test_any_feedback_can_be_the_click(folder: Path) -> None:
    frame = pd.read_csv(folder / RANDOM).sort_values(["user_id", "time_ms"], kind="stable")
    for feedback in ("long_view", "is_like", "is_forward"):
        np.testing.assert_array_equal(read_kuairand(folder, positive=feedback).test.clicks, frame[feedback])
    several = read_kuairand(folder, positive={"is_click": 1.0, "is_like": 2.5})
    np.testing.assert_allclose(several.test.feedback, frame.is_click + 2.5 * frame.is_like)
    np.testing.assert_array_equal(several.test.clicks, frame.is_click | frame.is_like)
    assert several.provenance.settings["click"]["positive"] == {"is_click": 1.0, "is_like": 2.5}
    with pytest.raises(DataError, match="is_hate"):
        read_kuairand(folder, positive="is_hate")


def test_rows_that_differ_in_any_column_are_no_duplicates(folder: Path) -> None:
    path = folder / RANDOM
    frame = pd.read_csv(path)
    twin = frame.iloc[[5]].assign(comment_stay_time=frame.comment_stay_time.iloc[5] + 1)
    pd.concat([frame, twin, frame.iloc[[5]]]).to_csv(path, index=False)
    report = read_kuairand(folder).report["test"]
    assert (report["rows_read"], report["exact_duplicates_dropped"], report["rows"]) == (152, 1, 151)


def test_items_carry_tags_and_platform_counts(folder: Path) -> None:
    items = read_kuairand(folder).items
    statistic = pd.read_csv(folder / "video_features_statistic_pure.csv").set_index("video_id").sort_index()
    np.testing.assert_allclose(items.shown, statistic.show_user_num)
    assert items.tag_names == ("12", "39")
    number = np.arange(official.KUAIRAND_ITEMS)
    np.testing.assert_array_equal(items.tags[:, 1], number % 5 != 0)
    np.testing.assert_array_equal(items.tags[:, 0], (number % 5 != 0) & (number % 2 == 0))
    column = items.features.names.index("log1p(show_user_num)")
    logged = np.log1p(statistic.show_user_num.to_numpy())
    np.testing.assert_allclose(items.features.values[:, column], (logged - logged.mean()) / logged.std(), atol=1e-5)
    assert items.features.values[7, items.features.names.index("video_duration=missing")] == 1.0


def test_unknown_codes_of_users_are_missing_values(folder: Path) -> None:
    users = read_kuairand(folder).users
    names = users.features.names
    assert "user_active_degree=UNKNOWN" not in names
    np.testing.assert_array_equal(
        users.features.values[:, names.index("user_active_degree=missing")], np.arange(len(users)) % 4 == 0
    )
    np.testing.assert_array_equal(
        users.features.values[:, names.index("is_live_streamer=missing")], np.arange(len(users)) % 5 == 0
    )
    assert users.features.values[2, names.index("onehot_feat4=missing")] == 1.0


@pytest.mark.parametrize("form", ["root", "tar", "beside tar"])
def test_every_form_of_the_files_gives_the_same_data(tmp_path: Path, folder: Path, form: str) -> None:
    expected = read_kuairand(folder).data_hash
    archive = official.pack_tar(folder, tmp_path / "KuaiRand-Pure.tar.gz")
    if form == "beside tar":
        shutil.rmtree(folder.parent)
    path = {"root": tmp_path, "tar": archive, "beside tar": tmp_path}[form]
    assert read_kuairand(path).data_hash == expected


def test_truncated_tar_archives_are_refused_and_leave_no_cache(tmp_path: Path, folder: Path) -> None:
    archive = official.pack_tar(folder, tmp_path / "KuaiRand-Pure.tar.gz")
    whole = archive.read_bytes()
    for size in (0, 30, len(whole) // 3, len(whole) - 20):
        archive.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"archive|missing"):
            load_kuairand(archive, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))


BAD = [
    (RANDOM, "is_click", "2", "out of range"),
    (RANDOM, "time_ms", "", "missing"),
    (RANDOM, "user_id", "15", "lists ids 0..14"),
    (RANDOM, "video_id", "30", "id 30 is not in video_features_basic_pure.csv"),
    ("video_features_basic_pure.csv", "tag", "39;12", "list of tag ids"),
    ("video_features_basic_pure.csv", "video_duration", "-4", "out of range"),
    ("video_features_statistic_pure.csv", "show_user_num", "many", "not a number"),
    ("video_features_statistic_pure.csv", "video_id", "77", "id 77 is not in video_features_basic_pure.csv"),
    ("user_features_pure.csv", "fans_user_num", "x", "not a number"),
    ("user_features_pure.csv", "onehot_feat1", "1.5", "not a code"),
    ("user_features_pure.csv", "onehot_feat1", "1e300", "too large"),
]


@pytest.mark.parametrize(("name", "column", "cell", "words"), BAD)
def test_bad_cells_are_named(folder: Path, name: str, column: str, cell: str, words: str) -> None:
    table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
    table.loc[11, column] = cell
    table.to_csv(folder / name, index=False)
    with pytest.raises(DataError, match=words) as caught:
        read_kuairand(folder)
    assert (Path(str(caught.value.file)).name, caught.value.line, caught.value.column) == (name, 13, column)


def test_ids_with_gaps_are_checked_one_by_one(folder: Path) -> None:
    for name in ("user_features_pure.csv", *(n for n in KUAIRAND.files if n.startswith("log"))):
        table = pd.read_csv(folder / name)
        table["user_id"] *= 10
        table.to_csv(folder / name, index=False)
    data = read_kuairand(folder)
    np.testing.assert_array_equal(data.users.ids, 10 * np.arange(official.KUAIRAND_USERS))
    table = pd.read_csv(folder / RANDOM)
    table.loc[20, "user_id"] = 55
    table.to_csv(folder / RANDOM, index=False)
    with pytest.raises(DataError, match="id 55 is not in user_features_pure") as caught:
        read_kuairand(folder)
    assert caught.value.line == 22


def test_sources_are_found_in_the_documented_order(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, named, empty = tmp_path / "cache", tmp_path / "named", tmp_path / "empty"
    for place in (cache / "downloads", named, empty):
        place.mkdir(parents=True)
    monkeypatch.setenv("KUAIFAIR_CACHE", str(cache))
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
    assert find_source("kuairand") is None
    in_cache = official.pack_tar(folder, cache / "downloads" / "KuaiRand-Pure.tar.gz")
    assert find_source("kuairand") == in_cache
    monkeypatch.setenv("KUAIFAIR_DATA", str(named))
    with pytest.raises(DataError, match="KUAIFAIR_DATA names this place"):
        find_source("kuairand")
    official.write_kuairec(named / "data")  # the other data set: KUAIFAIR_DATA is no mistake, and says nothing of this
    assert find_source("kuairand") == in_cache
    in_cache.unlink()
    with pytest.raises(DataError, match=r"neither KuaiRand-Pure\.tar\.gz nor log_random_4_22"):
        find_source("kuairand")
    in_named = official.pack_tar(folder, named / "KuaiRand-Pure.tar.gz")
    assert find_source("kuairand") == in_named
    shutil.copytree(folder.parent, named / "KuaiRand-Pure")
    assert find_source("kuairand") == named / "KuaiRand-Pure" / "data"
    assert find_source("kuairand", folder) == folder
    assert find_source("kuairand", in_named) == in_named
    renamed = shutil.copy(in_named, tmp_path / "mine.tgz")
    assert find_source("kuairand", renamed) == renamed
    with pytest.raises(DataError, match=r"neither KuaiRec\.zip nor another archive"):
        find_source("kuairec", renamed)
    with pytest.raises(DataError, match="empty"):
        find_source("kuairand", empty)
    with pytest.raises(DataError, match="no such file or folder"):
        find_source("kuairand", tmp_path / "nowhere")
    with pytest.raises(DataError, match="kuaifair data fetch kuairand"):
        load_kuairand(empty)
    with pytest.raises(DataError, match="unknown data set"):
        find_source("movielens")


def test_a_path_is_recognised_by_what_it_holds(tmp_path: Path, folder: Path) -> None:
    archive = official.pack_tar(folder, tmp_path / "renamed.tar.gz")
    assert recognise(archive).name == "kuairand"
    assert recognise(folder).name == "kuairand"
    official.write_kuairec(tmp_path / "KuaiRec 2.0" / "data")
    assert recognise(tmp_path / "KuaiRec 2.0").name == "kuairec"
    with pytest.raises(DataError, match=r"KuaiRec 2\.0 and KuaiRand-Pure are here"):
        recognise(tmp_path)
    assert recognise(tmp_path, "kuairec").name == "kuairec"


def test_kuairand_1k_is_read_as_pure_is_where_all_items_were_shown_at_random(tmp_path: Path, folder: Path) -> None:
    official.write_kuairand(tmp_path / "KuaiRand-1K" / "data", suffix="1k")
    archive = official.pack_tar(tmp_path / "KuaiRand-1K" / "data", tmp_path / "mine.tar.gz", "KuaiRand-1K/data")
    pure = read_kuairand(folder)
    assert len(np.unique(pure.test.items)) == len(pure.items)
    for path in (tmp_path, archive):
        data = read_kuairand(path, version="kuairand-1k")
        assert data.contents_hash == pure.contents_hash
        assert data.report["train"] == pure.report["train"]
        assert (data.provenance.name, data.provenance.origin) == ("partial KuaiRand-1K", "partial")
    assert recognise(archive).name == "kuairand-1k"
    with pytest.raises(DataError, match="kuairand-27k"):
        read_kuairand(folder, version="kuairand-2k")


def test_kuairand_27k_keeps_rows_of_the_pool_and_the_last_of_each_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = official.write_kuairand_27k(tmp_path)
    monkeypatch.setitem(kuairand._VERSIONS, "kuairand-27k", replace(kuairand._VERSIONS["kuairand-27k"], recent=3))
    for name in frames:
        monkeypatch.setitem(DATASETS["kuairand-27k"].rows, name, len(frames[name]))
    data = read_kuairand(tmp_path, version="kuairand-27k")
    standard = pd.concat([frame for name, frame in frames.items() if "standard" in name], ignore_index=True)
    random = frames["log_random_4_22_to_5_08_27k.csv"]
    last = standard.sort_values(["user_id", "time_ms"], kind="stable").groupby("user_id").tail(3)
    kept = standard[standard.video_id.isin(random.video_id) | standard.index.isin(last.index)]
    assert data.report["train"]["rows_left_out"] == len(standard) - len(kept) > 0
    for log, frame in ((data.train, kept.drop_duplicates()), (data.test, random)):
        expected = frame.sort_values(["user_id", "time_ms"], kind="stable")
        np.testing.assert_array_equal(data.users.ids[log.users], expected.user_id)
        np.testing.assert_array_equal(data.items.ids[log.items], expected.video_id)
        np.testing.assert_array_equal(log.clicks, expected.is_click)
    np.testing.assert_array_equal(data.items.ids, np.union1d(kept.video_id, random.video_id))
    statistic = pd.concat([pd.read_csv(path) for path in sorted(tmp_path.glob("video_features_statistic*"))])
    np.testing.assert_allclose(data.items.shown, statistic.set_index("video_id").show_user_num[data.items.ids])
    assert data.provenance.origin == "real", "the whole log was read, though not all of it is kept"


def test_a_video_without_description_is_named_with_the_part_it_stands_in(tmp_path: Path) -> None:
    frames = official.write_kuairand_27k(tmp_path)
    name = "log_standard_4_22_to_5_08_27k_part2.csv"
    row = int(frames[name].time_ms.argmax())
    frames[name].loc[row, ["user_id", "video_id", "time_ms"]] = [3, 4_000_000, 2 * 10**12]
    frames[name].to_csv(tmp_path / name, index=False)
    with pytest.raises(DataError, match="id 4000000 is not in video_features_basic_27k") as caught:
        read_kuairand(tmp_path, version="kuairand-27k")
    assert (Path(str(caught.value.file)).name, caught.value.line, caught.value.column) == (name, row + 2, "video_id")


@pytest.mark.parametrize("order", ["by user", "by time", "none", "all at one time"])
def test_streamed_rows_are_those_that_sorting_the_whole_log_would_keep(order: str) -> None:
    rng = np.random.default_rng(5)
    n_rows, n_users, recent = 4000, 25, 7
    log = pd.DataFrame(
        {
            "users": rng.integers(0, n_users, n_rows).astype(np.int32),
            "video_id": rng.integers(0, 500, n_rows),
            "time_ms": rng.integers(0, 900, n_rows) if order != "all at one time" else 7,
        }
    )
    keys = {"by user": ["users", "time_ms"], "by time": ["time_ms"]}.get(order)
    log = log if keys is None else log.sort_values(keys, kind="stable", ignore_index=True)
    log["file"], log["row"] = np.repeat([0, 1], n_rows // 2), np.tile(np.arange(n_rows // 2), 2)
    keeper = PoolAndRecentRows(np.arange(3, 500, 100), n_users, recent, trim_rows=300)
    for _, chunk in log.groupby(np.arange(n_rows) // 130):
        keeper.add({name: chunk[name].to_numpy() for name in log})
    last = log.sort_values(["users", "time_ms"], kind="stable").groupby("users").tail(recent).index
    expected = log[(log.video_id % 100 == 3) | log.index.isin(last)]
    for name, values in keeper.take().items():
        np.testing.assert_array_equal(values, expected[name])


def test_memory_does_not_grow_with_rows_outside_the_pool() -> None:
    def peak(n_chunks: int) -> int:
        rng = np.random.default_rng(1)
        keeper = PoolAndRecentRows(np.arange(10), n_users=50, recent=20, trim_rows=5000)
        tracemalloc.start()
        for chunk in range(n_chunks):
            rows = 2000
            keeper.add(
                {
                    "users": rng.integers(0, 50, rows).astype(np.int32),
                    "video_id": rng.integers(10, 10**7, rows),
                    "time_ms": rng.integers(0, 10**12, rows) + chunk * 10**9,
                    "file": np.zeros(rows, np.int8),
                    "row": np.arange(rows) + chunk * rows,
                }
            )
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(keeper.take()["users"]) == 50 * 20
        return size

    assert peak(150) < 1.2 * peak(15)
