"""``kuaifair study tables`` and ``figures``, as a user types them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from stored_studies import OWN
from typer.testing import CliRunner

from hrl_policies.cli.study import study_app
from hrl_policies.study.outputs import worlds_of_runs
from hrl_policies.study.store import stored_runs
from kuaifair_env.errors import ArtifactError

RUNNER = CliRunner()


def call(*arguments):
    result = RUNNER.invoke(study_app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_tables_are_printed_whole(store):
    result = call("tables", store, "--base", "a2c", "--compare", "paper")
    assert result.exit_code == 0
    for part in ("Overall results", "Ablations", "Training time", "A2C minus each other method", "Scores over",
                 "paper (another world)", "Made by: kuaifair study tables"):  # fmt: skip
        assert part in result.stdout
    assert not (store / "tables").exists()


def test_tables_are_written_where_asked(store, tmp_path):
    result = call("tables", store, "--format", "latex", "--format", "csv", "-o", tmp_path, "--average", "iqm")
    assert result.exit_code == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"table_2_overall.tex", "table_2_overall.csv", "table_3_ablation.tex", "scores.csv"} <= names
    assert all(name in result.stdout for name in names)
    assert "interquartile mean" in (tmp_path / "table_2_overall.tex").read_text()


def test_figures_are_written_where_asked(store, tmp_path):
    result = call("figures", store / OWN, "--format", "svg", "-o", tmp_path)
    assert result.exit_code == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".svg"}
    assert "pareto_len30.svg" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("tables", "nowhere"), ArtifactError, "no folder nowhere"),
        (("figures", "nowhere"), ArtifactError, "no folder nowhere"),
        (("tables", "STORE", "--output", "x"), ValueError, "--format says which"),
        (("tables", "STORE", "--data-dir", "x"), ValueError, "--data-dir goes with --worlds"),
        (("tables", "STORE", "--base", "flat"), ValueError, "no finished run is of 'flat'"),
    ],
)
def test_bad_input_says_what_is_wrong(store, arguments, error, message):
    with pytest.raises(error, match=message):
        call(*(store if argument == "STORE" else argument for argument in arguments))


def test_an_empty_store_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no finished run; a run folder has a result\.json"):
        call("tables", tmp_path)


def test_an_unknown_format_is_a_usage_error(store):
    assert call("tables", store, "--format", "html").exit_code == 2
    assert call("figures", store, "--format", "jpg").exit_code == 2


def test_worlds_are_made_again_only_if_their_data_are_the_same(store):
    runs = stored_runs(store)
    with pytest.raises(ValueError, match=OWN):
        worlds_of_runs([run for run in runs if run.config.world == OWN])
    elsewhere = replace(runs[0], config=replace(runs[0].config, world="KuaiFair-Toy-v0"))
    with pytest.raises(ArtifactError, match=r"was made on data with hash .*; here KuaiFair-Toy-v0 has"):
        worlds_of_runs([elsewhere])
