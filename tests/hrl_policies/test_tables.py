"""One table in four forms: nothing is cut, nothing is lost, nothing is misread.

Tables say what was measured, how often, on whom and by which command.
"""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats
from small_worlds import small_pair
from studies import CONTROLS, OWN, pairs, runs_of

from hrl_policies.study import RunRecord, plan_run, result_tables, stored_records, train, write_records
from hrl_policies.study.records import read_table, write_table
from hrl_policies.study.results import comparisons
from hrl_policies.study.store import stored_runs
from hrl_policies.study.tables import MISSING, SUFFIXES, Measured, ResultTable, Span, escape_latex
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError

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


@pytest.mark.parametrize("name", ["=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "<script>alert(1)</script>", r"\input{x}"])
def test_no_name_is_a_formula_html_or_latex(name, tmp_path):
    table = replace(GROUPED, rows=((name, *GROUPED.rows[0][1:]),), notes=(f"{name}\n=1",))
    cells = [cell for row in csv.reader(io.StringIO(table.csv())) for cell in row]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert "<script" not in table.markdown() and r"\input" not in table.latex()
    # Raw user ids of sessions come back as they were.
    write_table(tmp_path / "ids.csv", [{"user_id": text} for text in (name, f"'{name}", "a", "'a")])
    lines = (tmp_path / "ids.csv").read_text(encoding="utf-8").splitlines()
    assert lines[1].lstrip('"').startswith("'") == (name[0] not in "<\\")
    read = [row["user_id"] for row in read_table(tmp_path / "ids.csv", ids=("user_id",))]
    assert read == [name, f"'{name}", "a", "'a"]


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


@pytest.fixture(scope="module")
def records(runs):
    """Three seeds of A2C, then the controls, at Max Len 30."""
    chosen = [run for name in ("a2c", *CONTROLS) for run in runs_of(runs, name, world=OWN)]
    return [RunRecord.of_run(run) for run in chosen]


def cells_of(table, method):
    row = next(row for row in table.rows if row[0].startswith(method))
    return {title: str(cell) for title, cell in zip(table.header, row, strict=True)}


def test_cells_are_means_over_seeds_with_student_intervals(records):
    (table,) = result_tables(records, "a command")
    lengths = [record.summary["len"] for record in records[:3]]
    low, high = stats.t.interval(0.95, 2, np.mean(lengths), stats.sem(lengths))
    assert cells_of(table, "A2C")["Len"] == f"{np.mean(lengths):.2f} ± {(high - low) / 2:.2f}"
    assert cells_of(table, "A2C")["seeds"] == "3"


def test_controls_have_no_interval_and_the_formula_stands_beside_len(records):
    (table,) = result_tables(records, "a command")
    row, summary = cells_of(table, "QuotaGreedy"), records[4].summary
    assert row["Len"] == f"{summary['len']:.2f}"
    assert row["viol."] == "0.000"
    assert row["formula"] == row["ceil."] == f"{summary['len_predicted']:.2f}"
    assert float(row["floor"]) < float(row["Len"])


def test_rows_come_in_the_order_of_the_zoo_and_privileged_ones_are_marked(records):
    (table,) = result_tables(records[::-1], "a command")
    assert [row[0] for row in table.rows] == ["A2C", "Random", "QuotaGreedy", "Oracle †"]
    assert any("† knows" in note for note in table.notes)


def test_runs_under_other_settings_are_in_tables_of_their_own(records):
    rule = SessionConfig(max_len=records[0].config.session.max_len, leave="temper:ad_bound=0.2", reward="sum")
    others = [
        replace(
            records[0], config=replace(records[0].config, world_settings={"popularity_share": 0.1, "source": "twin"})
        ),
        replace(records[0], config=replace(records[0].config, session=rule)),
    ]
    usual, world, session = result_tables([records[0], *others], "a command")
    assert "popularity_share" not in usual.title
    assert world.title == f"{usual.title}, popularity_share 0.1"
    assert any("temper(ad_bound=0.2" in note and "sum of a slate's feedback" in note for note in session.notes)


def test_every_table_carries_its_provenance(records):
    (table,) = result_tables(records, "kuaifair something --seed 11")
    text = table.markdown()
    for part in (
        "small (the user's own logs)",
        records[0].data_hash,
        "50 candidates",
        "15 held-out users",
        "11, 15, 19",
        "A2C 256",
        "Made by: kuaifair something --seed 11",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("origin", "words"),
    [("partial", "PARTIAL data"), ("twin", "SYNTHETIC TWIN, not real data"), ("real", "official files")],
)
def test_partial_data_and_twins_are_called_what_they_are(records, origin, words):
    (table,) = result_tables([replace(records[0], origin=origin)], "a command")
    assert words in table.notes[0]


def test_markdown_has_one_cell_per_column(records):
    lines = [line for line in result_tables(records, "x")[0].markdown().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_cell_is_cut_in_a_terminal_of_any_width(records, width):
    (table,) = result_tables(records, "x")
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    table.show(console)
    text = console.export_text()
    for row in table.rows:
        for cell in row:
            assert str(cell) in text
    assert "…" not in text


def test_horizons_and_worlds_have_tables_of_their_own(records):
    longer = replace(records[0], config=replace(records[0].config, session=SessionConfig(max_len=50)))
    tables = result_tables([*records, longer], "x")
    assert [table.title for table in tables] == ["small, Max Len 30", "small, Max Len 50"]


def test_rows_say_whether_repeats_are_allowed_and_methods_that_need_them_have_an_empty_one(records):
    forbidden = SessionConfig(max_len=30, repeats="forbid", leave="strict")
    allowed = replace(forbidden, repeats="allow")
    runs = [replace(records[3], config=replace(records[3].config, session=session)) for session in (forbidden, allowed)]
    only = replace(records[0], config=plan_run("bcq-discrete", "small", session=allowed, n_users=15))
    (table,) = result_tables([*runs, only], "x")
    assert table.title == "small, Max Len 30, leave strict"
    assert [row[:2] for row in table.rows] == [
        ("Random", "allow"),
        ("BCQ, discrete", "allow"),
        ("Random", "forbid"),
        ("BCQ, discrete", "forbid"),
    ]
    assert set(table.rows[3][2:-1]) == {"-"} and table.rows[3][-1] == "0"
    assert "BCQ, discrete needs repeats: it does not know what was shown before." in table.notes


def test_runs_that_were_evaluated_differently_are_not_compared(records):
    other = replace(records[3], users=7)
    with pytest.raises(ValueError, match="evaluated on different users"):
        result_tables([*records[:3], other], "x")
    with pytest.raises(ValueError, match="more than once with the same seed"):
        result_tables([records[0], records[0]], "x")
    with pytest.raises(ValueError, match="no finished runs"):
        result_tables([], "x")


def test_a_rule_without_temper_has_no_length_formula(records):
    session = SessionConfig(leave="never", max_len=5)
    config = plan_run("random", "small", session=session)
    record = RunRecord.of_evaluation(config, train(config, small_pair()).evaluation)
    (table,) = result_tables([record], "x")
    assert "formula" not in table.header
    assert cells_of(table, "Random")["Len"] == "5.00"


def test_runs_in_another_world_of_the_same_name_are_in_a_table_of_their_own_that_says_so(records):
    here = records[0].fingerprint
    rounded = replace(records[1], fingerprint=replace(here, response=tuple(value + 1e-5 for value in here.response)))
    refitted = replace(records[3], fingerprint=replace(here, response=tuple(value + 0.01 for value in here.response)))
    first, second = result_tables([records[0], rounded, refitted], "")
    assert first.rows[0][-1] == "2", "rounding makes no other world"
    for table, other in ((first, refitted.fingerprint), (second, here)):
        assert f"fingerprint {other}: response differ" in table.notes[0] and "NOT COMPARABLE" in table.notes[0]
    for table in result_tables(records, ""):
        assert "NOT COMPARABLE" not in table.markdown()


@pytest.mark.parametrize("split", ["train", "test"])
def test_runs_in_another_world_of_the_same_name_are_not_compared(store, split):
    runs = [run for run in stored_runs(store) if run.config.world == OWN and run.config.method in CONTROLS]
    comparisons(runs)
    world = runs[0].provenance[split]
    moved = world["fingerprint"] | {"parts": world["fingerprint"]["parts"] | {"click": "another"}}
    provenance = runs[0].provenance | {split: world | {"fingerprint": moved}}
    with pytest.raises(ValueError, match=f"different {split} worlds of small, .*: click differ"):
        comparisons([replace(runs[0], provenance=provenance), *runs[1:]])


def test_records_go_to_a_small_csv_and_come_from_stored_runs(records, tmp_path):
    write_records(tmp_path / "results.csv", records)
    with (tmp_path / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["len"]) for row in rows] == [record.summary["len"] for record in records]
    assert rows[0]["method"] == "a2c" and rows[0]["seed"] == "11"
    # The length formula holds under some leave rules only, and where all users leave.
    without = replace(records[0], summary={n: v for n, v in records[0].summary.items() if not n.startswith("len_")})
    write_records(tmp_path / "mixed.csv", [without, records[1]])
    with (tmp_path / "mixed.csv").open() as stream:
        predicted = [row["len_predicted"] for row in csv.DictReader(stream)]
    assert predicted == ["", repr(records[1].summary["len_predicted"])]

    config = plan_run("random", OWN, session=SessionConfig(max_len=30))
    result = train(config, pairs()[OWN], output=tmp_path / "store/random")
    assert stored_records(tmp_path / "store") == [records[3]]
    assert RunRecord.of_evaluation(records[3].config, result.evaluation) == records[3]
    with pytest.raises(ArtifactError, match="no folder"):
        stored_records(tmp_path / "nowhere")
