"""Tables say what was measured, how often, on whom and by which command."""

from __future__ import annotations

import csv
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from stored_studies import CONTROLS, OWN, pairs, runs_of
from worlds_for_tests import small_pair

from hrl_policies.study import RunRecord, plan_run, result_tables, stored_records, train, write_records
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError


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


def test_every_table_carries_its_provenance(records):
    (table,) = result_tables(records, "kuaifair something --seed 11")
    text = table.markdown()
    for part in (
        "small (the user's own logs)",
        records[0].data_hash,
        "50 candidates",
        "15 held-out users",
        "11, 15, 19",
        "A2C 480",
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


def test_records_go_to_a_small_csv_and_come_from_stored_runs(records, tmp_path):
    write_records(tmp_path / "results.csv", records)
    with (tmp_path / "results.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["len"]) for row in rows] == [record.summary["len"] for record in records]
    assert rows[0]["method"] == "a2c" and rows[0]["seed"] == "11"

    config = plan_run("random", OWN, session=SessionConfig(max_len=30))
    result = train(config, pairs()[OWN], output=tmp_path / "store/random")
    assert stored_records(tmp_path / "store") == [records[3]]
    assert RunRecord.of_evaluation(records[3].config, result.evaluation) == records[3]
    with pytest.raises(ArtifactError, match="no folder"):
        stored_records(tmp_path / "nowhere")
