from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import official_files as official
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kuaifair_env.data import load_kuairec, read_kuairec
from kuaifair_env.data.csv_columns import Column, line_of_row, read_columns
from kuaifair_env.data.published import KUAIREC
from kuaifair_env.data.sources import FolderFiles
from kuaifair_env.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    official.write_kuairec(tmp_path / "KuaiRec 2.0" / "data")
    return tmp_path / "KuaiRec 2.0" / "data"


def edit(path: Path, line: int, text: str | None = None, replace: tuple[str, str] | None = None) -> None:
    """Changes one line (1-based) of a file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    old = lines[line - 1]
    lines[line - 1] = old.replace(*replace, 1) if replace else f"{text}\n"
    assert lines[line - 1] != old
    path.write_text("".join(lines), encoding="utf-8")


def test_the_log_is_the_matrix_without_its_duplicates(tmp_path: Path) -> None:
    frames = official.write_kuairec(tmp_path)
    data = read_kuairec(tmp_path)
    for log, frame in ((data.train, frames["big"].drop_duplicates()), (data.test, frames["small"])):
        last = frame.timestamp.max() + 0.001
        expected = frame.assign(timestamp=frame.timestamp.fillna(last)).sort_values(
            ["user_id", "timestamp"], kind="stable"
        )
        np.testing.assert_array_equal(data.users.ids[log.users], expected.user_id)
        np.testing.assert_array_equal(data.items.ids[log.items], expected.video_id)
        np.testing.assert_array_equal(log.times, np.rint(expected.timestamp * 1000).astype(int))
        np.testing.assert_array_equal(log.watch_ratios, expected.watch_ratio.astype(np.float32))
        np.testing.assert_array_equal(log.clicks, expected.watch_ratio >= 1.0)


def test_the_report_counts_what_was_done(folder: Path) -> None:
    report = read_kuairec(folder).report
    assert report["train"]["rows_read"] == 203
    assert report["train"]["exact_duplicates_dropped"] == 3
    assert report["train"]["rows"] == 200
    assert report["train"]["rows_without_time"] == 0
    assert report["test"]["rows_without_time"] == 4
    assert report["items"]["captions"] == official.KUAIREC_ITEMS
    assert report["items"]["captions_with_line_breaks"] == 2
    assert report["items"]["captions_unreadable"] == 0


def test_rows_without_time_come_last_within_their_user(folder: Path) -> None:
    frame = pd.read_csv(folder / "small_matrix.csv")
    log = read_kuairec(folder).test
    timeless = frame[frame.timestamp.isna()]
    for user, group in timeless.groupby("user_id"):
        np.testing.assert_array_equal(log.items[log.users == user][-len(group) :], group.video_id)


def test_the_threshold_decides_what_a_click_is(folder: Path) -> None:
    ratios = read_kuairec(folder).test.watch_ratios
    for threshold in (0.5, 1.0, 5.0):
        log = read_kuairec(folder, positive={"watch_ratio": threshold}).test
        np.testing.assert_array_equal(log.clicks, ratios >= threshold)
    watched = read_kuairec(folder, feedback="watch_ratio", clip=3.0)
    np.testing.assert_array_equal(watched.test.feedback, np.minimum(ratios, 3.0))
    assert watched.provenance.settings["click"] == {
        "positive": {"watch_ratio": 1.0},
        "feedback": "watch_ratio",
        "clip": 3.0,
    }
    with pytest.raises(DataError, match="above 0"):
        read_kuairec(folder, positive={"watch_ratio": 0.0})


def test_tags_shown_and_features_belong_to_their_items(folder: Path) -> None:
    items = read_kuairec(folder).items
    assert items.tag_names == ("0", "1", "2", "3", "9")
    for item in range(official.KUAIREC_ITEMS):
        expected = {str(item % 4)} | ({"9"} if item % 3 == 0 else set())
        assert {name for name, member in zip(items.tag_names, items.tags[item], strict=True) if member} == expected
    np.testing.assert_array_equal(items.shown, 100.0 * np.arange(official.KUAIREC_ITEMS) + 5.0)
    category = {int(n.split("=")[1]): k for k, n in enumerate(items.features.names) if n.startswith("first_level")}
    for item in range(official.KUAIREC_ITEMS):
        assert items.features.values[item, category[item % 5]] == 1.0


def test_optional_files_may_be_absent(folder: Path) -> None:
    full = read_kuairec(folder)
    (folder / "item_daily_features.csv").unlink()
    (folder / "kuairec_caption_category.csv").unlink()
    bare = read_kuairec(folder)
    assert bare.items.shown is None
    assert bare.items.features.values.shape[1] == 0
    assert bare.data_hash == full.data_hash


def test_item_features_do_not_depend_on_the_test_log(folder: Path) -> None:
    before = read_kuairec(folder)
    small = pd.read_csv(folder / "small_matrix.csv")
    small["watch_ratio"] = small.watch_ratio.to_numpy()[::-1]
    small.to_csv(folder / "small_matrix.csv", index=False)
    after = read_kuairec(folder)
    assert (before.test.clicks != after.test.clicks).any()
    np.testing.assert_array_equal(before.items.features.values, after.items.features.values)
    np.testing.assert_array_equal(before.users.features.values, after.users.features.values)


@pytest.mark.parametrize("form", ["data", "root", "parent", "zip", "beside zip", "gz"])
def test_every_form_of_the_files_gives_the_same_data(tmp_path: Path, folder: Path, form: str) -> None:
    expected = read_kuairec(folder).data_hash
    if form == "gz":
        pd.read_csv(folder / "big_matrix.csv").to_csv(folder / "big_matrix.csv.gz", index=False)
        (folder / "big_matrix.csv").unlink()
    archive = official.pack_zip(folder, tmp_path / "KuaiRec.zip")
    if form == "beside zip":
        shutil.rmtree(folder.parent)
    path = {"root": folder.parent, "parent": tmp_path, "zip": archive, "beside zip": tmp_path}.get(form, folder)
    assert read_kuairec(path).data_hash == expected


def test_ids_are_keyed_by_id_and_not_by_file_order(folder: Path) -> None:
    expected = read_kuairec(folder)
    for name in ("item_categories.csv", "user_features.csv", "item_daily_features.csv"):
        table = pd.read_csv(folder / name, dtype=str, keep_default_na=False)
        table.sample(frac=1, random_state=3).to_csv(folder / name, index=False)
    shuffled = read_kuairec(folder)
    assert shuffled.data_hash == expected.data_hash
    np.testing.assert_array_equal(shuffled.items.tags, expected.items.tags)
    np.testing.assert_allclose(shuffled.users.features.values, expected.users.features.values, atol=1e-6)
    np.testing.assert_allclose(shuffled.items.features.values, expected.items.features.values, atol=1e-6)


# Every case: file, line to change, change, line and column that the message must name, words in it.
BAD = [
    ("big_matrix.csv", 1, ("watch_ratio", "ratio"), 1, "watch_ratio", "missing"),
    ("big_matrix.csv", 77, ("{cell}", "abc"), 77, "user_id", "not an integer"),
    ("big_matrix.csv", 78, ("{cell}", ""), 78, "user_id", "missing"),
    ("big_matrix.csv", 79, ("{cell}", "999"), 79, "user_id", "out of range"),
    ("big_matrix.csv", 80, ("{cell}", "-1"), 80, "user_id", "out of range"),
    ("big_matrix.csv", 81, ("{cell}", "1.5"), 81, "user_id", "not an integer"),
    ("big_matrix.csv", 82, ("{cell}", "99999999999999999999999"), 82, "user_id", "too large"),
    ("item_categories.csv", 9, ("[", "{"), 9, "feat", "list of tag ids"),
    ("item_categories.csv", 6, ("4,", "2,"), 6, "video_id", "occurs twice"),
    ("user_features.csv", 4, ("2,", "x,"), 4, "user_id", "not an integer"),
    ("item_daily_features.csv", 12, ("NORMAL", "NORMAL,extra"), 12, None, "fields"),
]


@pytest.mark.parametrize(("name", "change", "replace", "line", "column", "words"), BAD)
def test_bad_cells_are_named(
    folder: Path, name: str, change: int, replace: tuple[str, str], line: int, column: str | None, words: str
) -> None:
    cell = (folder / name).read_text(encoding="utf-8").splitlines()[change - 1].split(",")[0] + ","
    old, new = replace
    edit(folder / name, change, replace=(cell, new + ",") if old == "{cell}" else replace)
    with pytest.raises(DataError) as caught:
        read_kuairec(folder)
    assert Path(str(caught.value.file)).name == name
    assert (caught.value.line, caught.value.column) == (line, column)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", ["-0.5", "inf", "x", ""])
def test_bad_watch_ratios_are_named(folder: Path, bad: str) -> None:
    path = folder / "small_matrix.csv"
    good = path.read_text(encoding="utf-8").splitlines()[30]
    edit(path, 31, good.rsplit(",", 1)[0] + f",{bad}")
    with pytest.raises(DataError) as caught:
        read_kuairec(folder)
    assert (caught.value.line, caught.value.column) == (31, "watch_ratio")


def test_a_line_that_swallowed_its_neighbour_is_found(folder: Path) -> None:
    path = folder / "big_matrix.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[20:22] = [lines[20] + "," + lines[21]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="16 fields") as caught:
        read_kuairec(folder)
    assert caught.value.line == 21


def test_blank_lines_do_not_shift_the_line_number(folder: Path) -> None:
    path = folder / "big_matrix.csv"
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[50] = "x" + lines[50]
    lines[10:10] = ["", ""]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_kuairec(folder)
    assert caught.value.line == 53


def test_a_truncated_file_is_refused_wherever_it_ends(folder: Path) -> None:
    path = folder / "big_matrix.csv"
    whole = path.read_bytes()
    lines = whole.count(b"\n")
    for missing in (1, 3, 9, 40):
        path.write_bytes(whole[:-missing])
        with pytest.raises(DataError) as caught:
            read_kuairec(folder)
        assert caught.value.line == lines
        assert "truncated" in str(caught.value) or "missing" in str(caught.value)


def test_an_empty_file_and_a_bare_header_are_refused(folder: Path) -> None:
    path = folder / "small_matrix.csv"
    header = path.read_text(encoding="utf-8").splitlines()[0]
    path.write_text(header + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="no row"):
        read_kuairec(folder)
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="empty"):
        read_kuairec(folder)


def test_truncated_archives_are_refused_and_leave_no_cache(tmp_path: Path, folder: Path) -> None:
    archive = official.pack_zip(folder, tmp_path / "KuaiRec.zip")
    shutil.rmtree(folder.parent)
    whole = archive.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 10):
        archive.write_bytes(whole[:size])
        with pytest.raises(DataError, match="archive"):
            load_kuairec(archive, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize("name", ["big_matrix.csv", "kuairec_caption_category.csv"])
def test_a_damaged_member_is_refused(tmp_path: Path, folder: Path, name: str) -> None:
    archive = official.pack_zip(folder, tmp_path / "KuaiRec.zip")
    content = bytearray(archive.read_bytes())
    place = content.index(name.encode()) + 200
    content[place : place + 40] = bytes(40)
    archive.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged") as caught:
        load_kuairec(archive, cache=tmp_path / "cache")
    assert name in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_text_is_no_archive(folder: Path) -> None:
    with pytest.raises(DataError, match="not a whole archive") as caught:
        read_kuairec(folder / "big_matrix.csv")
    assert "\n" not in str(caught.value)


def test_a_truncated_gz_file_names_the_line_that_cannot_be_read(tmp_path: Path, folder: Path) -> None:
    table = pd.concat([pd.read_csv(folder / "big_matrix.csv")] * 40)
    (folder / "big_matrix.csv").unlink()
    path = folder / "big_matrix.csv.gz"
    table.to_csv(path, index=False)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match="truncated") as caught:
        read_kuairec(folder)
    assert caught.value.line is not None
    assert 1 < caught.value.line <= len(table) + 1


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "user_features.csv").unlink()
    with pytest.raises(DataError, match=r"user_features\.csv"):
        read_kuairec(folder)
    with pytest.raises(DataError, match="no such file"):
        read_kuairec(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"neither KuaiRec\.zip nor big_matrix\.csv, small_matrix"):
        read_kuairec(tmp_path / "other")


def test_only_files_of_the_published_size_are_called_real(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = read_kuairec(folder).provenance
    assert partial.origin == "partial"
    assert "203 of 12,530,806" in partial.description
    monkeypatch.setitem(KUAIREC.rows, "big_matrix.csv", 203)
    monkeypatch.setitem(KUAIREC.rows, "small_matrix.csv", 40)
    assert read_kuairec(folder).provenance.origin == "real"
    (folder / "kuaifair_provenance.json").write_text('{"name": "KuaiRec twin", "origin": "twin"}')
    twin = read_kuairec(folder).provenance
    assert (twin.name, twin.origin) == ("KuaiRec twin", "twin")
    (folder / "kuaifair_provenance.json").write_text('{"name": "KuaiRec", "origin": "real"}')
    with pytest.raises(DataError, match="origin"):
        read_kuairec(folder)


def test_reading_again_comes_from_the_cache_until_the_files_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = load_kuairec(folder, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("kuaifair_env.data.kuairec._read", lambda *_: pytest.fail("read again"))
        again = load_kuairec(folder, cache=cache)
    assert again.data_hash == first.data_hash
    assert again.provenance == first.provenance
    other = load_kuairec(folder, positive={"watch_ratio": 0.5}, cache=cache)
    assert other.train.clicks.sum() > first.train.clicks.sum()
    edit(folder / "big_matrix.csv", 10, (folder / "big_matrix.csv").read_text().splitlines()[11])
    assert load_kuairec(folder, cache=cache).data_hash != first.data_hash


COLUMNS = [
    Column("id", "integer", low=0, high=99),
    Column("x", missing_ok=True),
    Column("t", "text", missing_ok=True),
]


def write(folder: Path, text: str) -> FolderFiles:
    (folder / "a.csv").write_text(text, encoding="utf-8", newline="")
    return FolderFiles(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.integers(1, 40), st.data(), st.integers(1, 9), st.sampled_from(["\n", "\r\n"]))
def test_the_line_of_a_bad_cell_is_found_wherever_it_is(
    tmp_path: Path, rows: int, data: st.DataObject, chunk: int, ending: str
) -> None:
    texts = data.draw(
        st.lists(
            st.sampled_from(["word", '"two\nlines"', '"a, b"', "", '"three\n\nlines"']),
            min_size=rows,
            max_size=rows,
        )
    )
    bad, column = data.draw(st.integers(0, rows - 1)), data.draw(st.sampled_from(["id", "x"]))
    records = [[str(row % 100), "1.5", text] for row, text in enumerate(texts)]
    files = write(tmp_path, "id,x,t" + ending + "".join(",".join(r) + ending for r in records))
    read = read_columns(files, "a.csv", COLUMNS, chunk_rows=chunk)
    np.testing.assert_array_equal(read["id"], np.arange(rows) % 100)
    assert [("" if text is None else text) for text in read["t"]] == [text.strip('"') for text in texts]
    line = 2 + bad + sum(text.count("\n") for text in texts[:bad])
    assert line_of_row(files, "a.csv", bad) == line
    records[bad][0 if column == "id" else 1] = "bad"
    files = write(tmp_path, "id,x,t" + ending + "".join(",".join(r) + ending for r in records))
    with pytest.raises(DataError, match="'bad'") as caught:
        read_columns(files, "a.csv", COLUMNS, chunk_rows=chunk)
    assert (caught.value.line, caught.value.column) == (line, column)


def test_missing_values_are_nan_and_none(tmp_path: Path) -> None:
    files = write(tmp_path, "\ufeffid,x,t\n1,,\n2,NULL,NaN\n3,4.5,None\n")
    read = read_columns(files, "a.csv", COLUMNS)
    np.testing.assert_array_equal(read["x"], [np.nan, np.nan, 4.5])
    assert read["t"].tolist() == [None, None, None]


def test_columns_may_be_in_any_order_and_others_are_ignored(tmp_path: Path) -> None:
    read = read_columns(write(tmp_path, "t,junk,x,id\na,%,2,7\n"), "a.csv", COLUMNS)
    assert (read["id"][0], read["x"][0], read["t"][0]) == (7, 2.0, "a")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("id,x,t\n1,2,a\n2,3\n3,4,c\n", 3, "2 fields where the header has 3"),
        ("id,x,t\n1,2,a\n2,3,b,9\n3,4,c\n", 3, "4 fields where the header has 3"),
        ("id,x,t\n1,2,a\n2,3,b", 3, "middle of this line"),
        ("id,x,x,t\n1,2,2,a\n", 1, "occurs twice"),
        ("id,x\n1,2\n", 1, "is missing"),
        ('id,x,t\n1,2,a\n2,3,"b\n3,4,c\n', 3, "fields|truncated|read"),
        ("id,x,t\n1,2,a\n100,2,a\n", 3, "must lie in 0..99"),
        ("id,x,t\n1,inf,a\n", 2, "finite"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_columns(write(tmp_path, text), "a.csv", COLUMNS)
    assert caught.value.line == line
