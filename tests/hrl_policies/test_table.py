"""One table in four forms: nothing is cut, nothing is lost, nothing is misread."""

from __future__ import annotations

import io
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrl_policies.study.table import MISSING, SUFFIXES, Measured, ResultTable, Span, escape_latex

GROUPED = ResultTable(
    "Results & more",
    ("world", "method", "Len", "AD", "Len", "AD"),
    (
        ("a_b", "A2C", Measured(12.345, 2, 11.0, 13.5), Measured(0.5), Measured(20.0, 2), "-"),
        ("a_b", "paper", Measured(10.0, 2, spread=1.25), MISSING, Measured(30.0, 2, 29.5, 30.5), "x"),
    ),
    ("50 % of #1", "Made by: x_y"),
    (Span("Max Len 30", 2), Span("Max Len 50", 2)),
)
FLAT = ResultTable("Flat", ("method", "Len"), (("A2C", "3"), ("[x] | y", Measured(4.0, 1))))


def test_a_measured_number_reads_with_its_interval_or_spread():
    assert str(Measured(12.346, 2, 11.0, 13.5)) == "12.35 [11.00, 13.50]"
    assert str(Measured(0.25, 1, -0.5, 1.0, sign=True)) == "+0.2 [-0.5, +1.0]"
    assert str(Measured(26.6, 3, spread=0.816)) == "26.600 ± 0.816"
    with pytest.raises(ValueError, match="two ends"):
        Measured(1.0, low=0.5)


def test_every_column_keeps_its_group_in_flat_forms():
    assert GROUPED.full_header() == (
        "world",
        "method",
        "Max Len 30: Len",
        "Max Len 30: AD",
        "Max Len 50: Len",
        "Max Len 50: AD",
    )
    assert FLAT.full_header() == FLAT.header


def test_text_stacks_groups_and_repeats_who_they_are_about():
    text = GROUPED.render("text")
    blocks = text.split("Max Len ")[1:]
    assert [block[:2] for block in blocks] == ["30", "50"]
    assert all("A2C" in block and "paper" in block for block in blocks)
    assert "12.3" in blocks[0] and "30.00 [29.50, 30.50]" in blocks[1]
    assert "- 50 % of #1" in text


def test_text_columns_line_up():
    lines = FLAT.text().splitlines()[2:]
    assert len({len(line) for line in lines}) == 1


def test_csv_comes_back_as_numbers_with_all_digits():
    frame = pd.read_csv(io.StringIO(GROUPED.csv()), comment="#")
    assert frame["Max Len 30: Len"].tolist() == [12.345, 10.0]
    assert frame.loc[0, "Max Len 30: Len low"] == 11.0 and frame.loc[0, "Max Len 30: Len high"] == 13.5
    assert frame["Max Len 30: Len low"].isna().tolist() == [False, True]
    assert frame["Max Len 30: Len spread"].tolist()[1] == 1.25
    assert frame["Max Len 30: AD"].isna().tolist() == [False, True]
    assert "Max Len 30: AD low" not in frame and "Max Len 50: Len spread" not in frame
    assert GROUPED.csv().splitlines()[:3] == ["# Results & more", "# 50 % of #1", "# Made by: x_y"]


def test_latex_is_well_formed():
    text = GROUPED.latex()
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [
        ("begin", "table"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("begin", "tabular"),
        ("end", "tabular"),
        ("end", "table"),
    ]
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    # A separator in a row is one that is not escaped; a group's title spans two columns.
    columns = {len(re.findall(r"(?<!\\)&", line)) + 1 + ("multicolumn" in line) for line in rows}
    assert columns == {4}
    assert r"Results \& more" in text and r"50 \% of \#1" in text and r"x\_y" in text
    assert r"{\tiny {[}11.00, 13.50]}" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 2


def test_a_row_of_latex_never_begins_with_what_a_line_break_would_swallow():
    row = next(line for line in FLAT.latex().splitlines() if "| y" in line)
    assert row.startswith("{[}x]")


@given(st.text(st.sampled_from("ab\\&%$#_{}~^±†[]<>µ² ")))
def test_escaped_text_holds_no_command_of_its_own(text):
    escaped = escape_latex(text)
    words = r"\\(textbackslash|textasciitilde|textasciicircum|dag)\{\}"
    signs = r"\$(\\pm|\\times|\\mu|-|<|>|\^2)\$|\{\[\}|\\[&%$#_{}]"
    rest = re.sub(f"{words}|{signs}", "", escaped)
    assert not re.search(r"[\\&%$#_{}~^]", rest)


def test_markdown_has_one_cell_per_column_and_escapes_its_bar():
    lines = [line for line in GROUPED.markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert r"[x] \| y" in FLAT.markdown()


def test_all_forms_have_an_ending_and_an_unknown_one_is_refused():
    assert all(GROUPED.render(form) for form in SUFFIXES)
    with pytest.raises(ValueError, match="unknown format 'html'"):
        GROUPED.render("html")


def test_a_table_whose_cells_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 columns, but a row has 1"):
        ResultTable("t", ("a", "b"), (("x",),))
    with pytest.raises(ValueError, match="fewer than its groups"):
        ResultTable("t", ("a",), (), spans=(Span("s", 2),))
