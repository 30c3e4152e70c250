"""The pages of docs/results: all are in the index, records are named and small, and figures are the records'."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hrl_policies.zoo import method

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
MEGABYTE = 1_000_000


def page(name):
    return (RESULTS / name).read_text(encoding="utf-8")


def rows(text):
    """Rows of all tables by column, with the heading above under ``#``; what stands in brackets or after ± is cut."""
    heading, header = "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells and header is None:
            header = cells
        elif cells and not set(line) <= set("|-: "):
            yield {"#": heading} | dict(
                zip(header, (re.sub(r" (\[|±).*|\*\*| †", "", cell) for cell in cells), strict=True)
            )
        header = header if cells else None


def is_printed(text, value):
    """Whether a number is what a page shows; records of services have four decimals."""
    return abs(float(text) - value) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) + 1e-4


def test_every_page_is_in_the_index_and_every_other_file_is_named_by_a_page():
    files = {path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*") if path.is_file()}
    pages = {name for name in files if name.endswith(".md")}
    listed = set(re.findall(r"\]\(([^)#]+\.md)\)", page("README.md")))
    assert {name for name in listed if "/" not in name} == pages - {"README.md"}
    text = "".join(map(page, sorted(pages)))
    unnamed = {name for name in files - pages if name not in text}
    assert not unnamed, "no page shows or names these files"


def test_results_are_small():
    sizes = {path: path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()}
    records = {path: size for path, size in sizes.items() if path.suffix not in (".md", ".png")}
    assert all(path.name.endswith(".csv.gz") for path in records)
    assert sum(records.values()) <= MEGABYTE and sum(sizes.values()) <= 3 * MEGABYTE


def test_commands_of_the_index_are_there():
    scripts = re.findall(r"(?:python benchmarks/|`)([a-z_0-9]+\.py)", page("README.md"))
    assert len(scripts) > 30
    assert all((ROOT / "benchmarks" / name).exists() for name in scripts)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("claims_*.csv.gz")), ids=lambda path: path.name)
def test_claims_are_the_means_of_their_records(path):
    means = pd.read_csv(path).groupby(["method", "repeats"])[["len", "r_cum", "r_each", "ad", "violation_rate"]]
    count, mean = means.size(), means.mean()
    titles = {(method(name).title, repeats): (name, repeats) for name, repeats in mean.index}
    shown = [row for row in rows(page(path.name.replace(".csv.gz", ".md"))) if "R_each" in row]
    assert {(row["method"], row["repeats"]) for row in shown} == set(titles)
    for row in shown:
        key = titles[row["method"], row["repeats"]]
        assert int(row["seeds"]) == count[key]
        columns = {"Len": "len", "R_cum": "r_cum", "R_each": "r_each", "AD": "ad", "viol.": "violation_rate"}
        assert all(is_printed(row[title], mean.loc[key, column]) for title, column in columns.items()), key


@pytest.mark.parametrize("path", sorted(RESULTS.glob("preference_services_*.csv.gz")), ids=lambda path: path.name)
def test_services_are_the_means_of_their_records(path):
    groups = pd.read_csv(path, keep_default_na=False).groupby(["repeats", "regime", "row"])
    count, mean = groups.size(), groups[["r_cum", "len", "ad", "violation_rate"]].mean()
    shown = [row for row in rows(page(path.name.replace(".csv.gz", ".md"))) if "users' own part" in row]
    assert len(shown) == len(mean)
    for row in shown:
        key = (*row["#"].removeprefix("Repeats ").split(", "), row["users' own part"])
        assert int(row["seeds"]) == count[key]
        columns = {"R_cum": "r_cum", "Len": "len", "AD": "ad", "violation rate": "violation_rate"}
        assert all(is_printed(row[title], mean.loc[key, column]) for title, column in columns.items()), key


def test_services_that_weigh_the_log_are_the_means_of_their_records():
    groups = pd.read_csv(RESULTS / "log_trust.csv.gz").groupby(["world", "repeats", "scale"]).r_cum
    count, mean = groups.size(), groups.mean()
    columns = {"log at its word": 0.0, "log weighed": 0.25} | {
        f"scale {scale:g}": scale for scale in (0, 0.1, 0.25, 0.5)
    }
    compared = 0
    for row in rows(page("log_trust.md")):
        for column in row.keys() & columns.keys():
            key = (row.get("world", "KuaiRand twin, seed 1"), row["repeats"], columns[column])
            assert is_printed(row[column], mean[key]), key
            assert count[key] == int(row.get("orders", 5))
            compared += 1
    assert compared == len(mean)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("preferences_*.csv.gz")), ids=lambda path: path.name)
def test_predictions_are_the_means_of_their_records(path):
    records = pd.read_csv(path, dtype={"shows": str}, keep_default_na=False)
    mean = records.groupby(["regime", "policy", "shows", "model", "measure"]).value.mean()
    measures = {"Log loss, in nats": "log loss", "Within-user AUC": "AUC"}
    compared = 0
    sections = page(path.name.replace(".csv.gz", ".md")).split("\n## ")
    for regime, row in ((section.partition("\n")[0].lower(), row) for section in sections for row in rows(section)):
        if row["#"] in measures:
            for column in row.keys() - {"#", ""}:
                policy, _, shows = column.partition(", ")
                key = (regime, policy, shows or "0", row[""], measures[row["#"]])
                if key in mean.index:  # what knows nothing of the user has one record for all numbers of shows
                    assert is_printed(row[column], mean[key]), key
                    compared += 1
    assert compared >= 40


def test_purification_shows_its_records(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # which the script does too; here it is undone
    tables = runpy.run_path(str(ROOT / "benchmarks" / "purifiers.py"))["tables"]
    numbers = re.compile(r"-?\d+\.\d+")
    for world in ("kuairand", "kuairandtwin"):
        made = tables(pd.read_csv(RESULTS / f"purification_{world}.csv.gz")).replace("## ", "### ").strip()
        parts = page("purification.md").split("\n## ")
        (part,) = (part for part in parts if numbers.sub("", made) in numbers.sub("", part))
        shown = part[part.index("### ") : part.index("\n\nData:")]
        both = (np.array(numbers.findall(text), dtype=float) for text in (shown, made))
        np.testing.assert_allclose(*both, atol=1.001e-3)  # records of five decimals were rounded once more


def test_a_section_takes_the_place_of_the_one_of_its_title(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    write_section = runpy.run_path(str(ROOT / "benchmarks" / "worlds.py"))["write_section"]
    (tmp_path / "a.md").write_text("# Page\n\nTop.\n", encoding="utf-8")
    for text in ("# One\n\nold\n", "# Two\n\n## Table\n\nx", "# One\n\nnew\n\n"):
        write_section(tmp_path, "a.md", text)
    expected = "# Page\n\nTop.\n\n## One\n\nnew\n\n## Two\n\n### Table\n\nx\n"
    assert (tmp_path / "a.md").read_text(encoding="utf-8") == expected
