from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kuaifair_env.data.csv_columns import Column, line_of_row, read_columns
from kuaifair_env.data.sources import FolderFiles
from kuaifair_env.errors import DataError

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
