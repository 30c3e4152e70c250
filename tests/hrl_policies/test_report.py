"""The report is one file that loads nothing, says where numbers come from, and shows every run behind a mean."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy import stats
from studies import CONTROLS, ERROR, MAX_LENS, OWN, SEEDS

from hrl_policies.cli.study import report
from hrl_policies.study.config import plan_run
from hrl_policies.study.report import (
    ReportFigure,
    limits,
    stored_figures,
    write_report,
)
from hrl_policies.study.report_sections import BOTTOM, LEFT, RIGHT, TOP, axis_top, curve_panel
from hrl_policies.study.store import all_runs, failed_runs
from hrl_policies.study.tables import ResultTable
from hrl_policies.zoo import METHODS
from kuaifair_env.errors import ArtifactError
from kuaifair_env.intervals import rate_interval

VOID = {"meta", "link", "input", "img", "br"}
DRAWN = {"path", "circle"}
ATTACK = "<script>alert('x')</script><img src=x onerror=alert(1)>\"&"
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """The elements of a page, with the text inside each."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[SimpleNamespace] = []
        self.open: list[SimpleNamespace] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {[one.tag for one in self.open]}"

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, attrs=dict(attrs), text="", above=tuple(self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        assert tag in DRAWN, f"{tag} does not close itself in HTML"
        self.elements.append(SimpleNamespace(tag=tag, attrs=dict(attrs), text="", above=tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag, **attrs):
        return [
            one
            for one in self.elements
            if one.tag == tag and all(one.attrs.get(name.strip("_")) == value for name, value in attrs.items())
        ]

    def inside(self, outer, tag):
        return [one for one in self.elements if one.tag == tag and any(above is outer for above in one.above)]


@pytest.fixture(scope="module")
def runs(report_store):
    return all_runs(report_store)


@pytest.fixture(scope="module")
def page(report_store, runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    return Page(text_of(path, runs, failures=failed_runs(report_store)))


def text_of(path, runs, **settings):
    given_settings = {"title": "A study", "command": "kuaifair study report runs"} | settings
    return write_report(path, runs, **given_settings).read_text(encoding="utf-8")


def results(page, max_len):
    """Returns the cells of every method in the table of a horizon, seeds' rows included."""
    (card,) = [one for one in page.all("article") if f"Max Len {max_len}" in one.text]
    (table,) = page.inside(card, "table")
    titles = [one.text.strip() for one in page.inside(page.inside(table, "thead")[0], "th")]
    found = {}
    for group in page.inside(table, "tbody"):
        rows = page.inside(group, "tr")
        name = page.inside(rows[0], "button")[0].text
        found[name] = (dict(zip(titles[2:], numbers(page, rows[0]), strict=True)), rows[1:])
    return found


def numbers(page, row):
    return [one for one in page.inside(row, "td") if one.attrs.get("class") == "number"]


@pytest.mark.parametrize("max_len", MAX_LENS)
def test_a_row_holds_mean_and_student_interval_over_the_seeds_and_every_seed_below(page, runs, max_len):
    own = [r.summary for r in runs if r.config.method == "a2c" and r.complete and r.config.session.max_len == max_len]
    cells, seeds = results(page, max_len)["A2C"]
    for title, figure, digits in (("Len", "len", 2), ("R_cum", "r_cum", 2), ("viol.", "violation_rate", 3)):
        values = [summary[figure] for summary in own]
        if figure == "violation_rate":
            rate = rate_interval(np.asarray(values)[:, None], 15)
            shown = f"[{rate.low:.{digits}f}, {rate.high:.{digits}f}]"
        else:
            shown = f"± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.{digits}f}"
        assert cells[title].text.strip() == f"{np.mean(values):.{digits}f} {shown}"
        assert float(cells[title].attrs["data-value"]) == pytest.approx(np.mean(values), rel=1e-8)
    assert cells["seeds"].text == "3"
    links = [page.inside(row, "a")[0] for row in seeds]
    assert [link.text for link in links] == [f"seed {seed}" for seed in SEEDS]
    assert [float(numbers(page, row)[0].text) for row in seeds] == [round(s["len"], 2) for s in own]
    for link, seed in zip(links, SEEDS, strict=True):
        (target,) = page.all("tbody", id=link.attrs["href"].removeprefix("#"))
        assert f"A2C, seed {seed}" in target.text


def test_floor_and_ceiling_of_len_stand_beside_it_in_figures_and_as_a_drawing(page, runs):
    (oracle,) = [r for r in runs if r.config.method == "oracle" and r.config.session.max_len == 30]
    cells, _ = results(page, 30)["Oracle †"]
    assert cells["floor"].text.strip() == f"{oracle.summary['len_floor']:.2f}"
    assert cells["ceil."].text.strip() == f"{oracle.summary['len_ceiling']:.2f}"
    marks = page.all("svg", class_="mark")
    assert any(
        one.attrs["aria-label"] == f"Len {oracle.summary['len']:.1f} between floor {oracle.summary['len_floor']:.1f} "
        f"and ceiling {oracle.summary['len_ceiling']:.1f}"
        for one in marks
    )


def test_the_page_loads_nothing_and_its_policy_allows_only_its_own_style_and_script(page):
    for element in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = element.attrs.get(name, "#")
            assert value.startswith(("#", "data:")), (element.tag, value)
        assert not [name for name in element.attrs if name.startswith("on") or name == "style"], element.attrs
    (style,), (script,) = page.all("style"), page.all("script")
    assert "url(" not in style.text and "@import" not in style.text
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy.attrs["content"].split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for rule, element in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_ids_are_unique_links_lead_somewhere_and_pictures_have_words(page):
    ids = [one.attrs["id"] for one in page.elements if "id" in one.attrs]
    assert len(set(ids)) == len(ids)
    assert {one.attrs["href"].removeprefix("#") for one in page.all("a")} <= set(ids)
    assert all(one.attrs.get("alt") for one in page.all("img"))
    assert all(one.attrs.get("aria-label") for one in page.all("svg"))


def test_a_run_shows_curve_settings_hashes_versions_and_time(page, runs):
    run = next(r for r in runs if r.config.method == "a2c" and r.complete)
    (section,) = [one for one in page.all("tbody") if re.search(r"run folder\s+a2c-len30-k10-seed11\s", one.text)]
    assert len([one for one in page.inside(section, "path") if one.attrs["class"] == "curve"]) == 2
    words = " ".join(section.text.split())
    for name, value in (("n_steps", 8), ("learning_rate", run.config.hyperparameters["learning_rate"])):
        assert f"{name} {value}" in words
    assert f"data hash {run.provenance['test']['data']['hash']}" in words
    assert f"training {run.timing['training_seconds']:.1f} s" in words
    (software,) = [one for one in page.all("article") if one.attrs.get("id") == "software-1"]
    assert f"numpy {run.versions['packages']['numpy']}" in " ".join(software.text.split())


def test_a_dashed_line_marks_what_the_run_reached_in_the_test_world(page, runs):
    run = next(r for r in runs if r.folder.name == "a2c-len30-k10-seed11")
    (section,) = [one for one in page.all("tbody") if re.search(rf"run folder\s+{run.folder.name}\s", one.text)]
    panels = [one for one in page.inside(section, "figure") if one.attrs["class"] == "panel"]
    for panel, figure in zip(panels, ("r_cum", "violation_rate"), strict=True):
        assert "dashed: test world" in page.inside(panel, "figcaption")[0].text
        paths = page.inside(panel, "path")
        grid = [height_of(one) for one in paths if one.attrs["class"] == "grid"]
        labels = [float(one.text) for one in page.inside(panel, "text")[: len(grid)]]
        (line,) = [height_of(one) for one in paths if one.attrs["class"] == "evaluated"]
        marked = np.interp(-line, -np.asarray(grid), labels)
        # Heights are rounded to a tenth.
        assert marked == pytest.approx(run.summary[figure], abs=0.06 * labels[-1] / (grid[0] - grid[-1]))


def height_of(line):
    """The height of a horizontal line, counted from the top of its drawing."""
    return float(re.fullmatch(r"M\S+ (\S+)H\S+", line.attrs["d"])[1])


def test_interrupted_runs_have_a_curve_but_no_figures_and_failed_ones_show_their_error(page):
    (row,) = [one for one in page.all("tbody") if "A2C, seed 23" in one.text and "interrupted" in one.text]
    values = [one.attrs["data-value"] for one in numbers(page, page.inside(row, "tr")[0])]
    assert values[-5:] == [""] * 5 and int(values[2]) > 0
    drawn = [one.attrs["class"] for one in page.inside(row, "path")]
    assert "curve" in drawn and "evaluated" not in drawn and "dashed" not in row.text
    assert "A2C, seed 23" not in " ".join(one.text for one in page.all("article"))
    (failure,) = [one for one in page.all("details") if "td3-len30-k10-seed11" in one.text]
    assert ERROR in page.inside(failure, "summary")[0].text
    assert "Traceback (most recent call last)" in page.inside(failure, "pre")[0].text


def test_the_summary_names_methods_controls_seeds_and_users(page):
    (header,) = page.all("header")
    words = " ".join(header.text.split())
    assert "runs 12 finished, 1 interrupted, 1 failed" in words
    assert "trained methods A2C controls Random; QuotaGreedy; Oracle †" in words
    assert "Max Len 8, 30 repeats allow training seeds 11, 15, 19 evaluated on 15 held-out users" in words


def test_a_method_that_needs_repeats_has_an_empty_row_where_they_are_forbidden(runs, tmp_path):
    random = next(run for run in runs if run.config.method == "random")
    allowed = random.config.session
    forbidden = replace(random, config=replace(random.config, session=replace(allowed, repeats="forbid")))
    bcq = replace(random, config=plan_run("bcq-discrete", OWN, session=allowed))
    page = Page(text_of(tmp_path / "report.html", [random, forbidden, bcq]))
    (card,) = [one for one in page.all("article") if page.inside(one, "tbody")]
    rows = [page.inside(group, "tr")[0].text.split() for group in page.inside(card, "tbody")]
    assert [row[0].removesuffix("control") for row in rows if "forbid" in row] == ["Random", "BCQ,"]
    assert set(rows[-1][rows[-1].index("forbid") + 1 : -1]) == {"—"} and rows[-1][-1] == "0"
    assert "BCQ, discrete needs repeats: it does not know what was shown before." in card.text


def test_a_store_without_a_finished_run_has_a_report_too(report_store, runs, tmp_path):
    for some in ([], [run for run in runs if not run.complete]):
        page = Page(text_of(tmp_path / "report.html", some, failures=failed_runs(report_store)))
        assert "No run is finished yet." in page.all("main")[0].text
        assert ERROR in page.all("main")[0].text
        assert len(page.all("tbody")) == len(some)


@pytest.mark.parametrize("where", ["title", "command", "error", "folder", "caption", "method"])
def test_text_is_shown_and_never_run(runs, tmp_path, monkeypatch, where):
    settings = {"title": {"title": ATTACK}, "command": {"command": ATTACK}}.get(where, {})
    if where == "error":
        settings = {"failures": {ATTACK: f"{ATTACK}\n{ATTACK}"}}
    if where == "folder":
        runs = [replace(runs[0], folder=runs[0].folder.parent / ATTACK), *runs[1:]]
    if where == "caption":
        (tmp_path / "figure.png").write_bytes(PNG)
        (tmp_path / "figure.caption.txt").write_text(ATTACK, encoding="utf-8")
        settings = {"figures": [tmp_path / "figure.png"]}
    if where == "method":
        harmful = replace(METHODS["random"], title=ATTACK, sees=ATTACK, family=ATTACK)
        monkeypatch.setitem(METHODS, "random", harmful)
    page = Page(text_of(tmp_path / "report.html", runs, **settings))
    assert len(page.all("script")) == 1
    assert all(one.attrs["src"].startswith("data:") for one in page.all("img"))
    assert ATTACK.rpartition("/")[2] in page.all("body")[0].text


def test_equal_runs_in_another_folder_give_equal_bytes(report_store, runs, tmp_path):
    copied = tmp_path / "elsewhere" / "deep"
    shutil.copytree(report_store, copied)
    first = text_of(tmp_path / "first.html", runs, failures=failed_runs(report_store))
    second = text_of(tmp_path / "second.html", all_runs(copied), failures=failed_runs(copied))
    assert first == second
    assert str(report_store.parent) not in first


def test_times_stand_only_where_they_are_marked(runs, tmp_path):
    slower = [
        replace(run, timing={**run.timing, "training_seconds": 12345.6, "machine": "another"}) if run.timing else run
        for run in runs
    ]
    marked = re.compile(r'<p class="timing">.*?</p>', re.S)
    before, after = (text_of(tmp_path / "report.html", some) for some in (runs, slower))
    assert before != after
    assert marked.sub("", before) == marked.sub("", after)


@pytest.mark.parametrize(
    ("origin", "badge", "limit"),
    [
        ("twin", "SYNTHETIC TWIN, not real data", "nothing about real users"),
        (
            "partial",
            "PARTIAL data: a part of the official files",
            "cannot be compared with those of the whole",
        ),
        ("real", "real data, official files", "nothing here was shown to people"),
    ],
)
def test_twin_partial_and_real_data_are_called_so_at_the_top(runs, tmp_path, origin, badge, limit):
    changed = []
    for run in runs:
        provenance = json.loads(json.dumps(run.provenance))
        provenance["test"]["data"]["origin"] = origin
        changed.append(replace(run, provenance=provenance))
    page = Page(text_of(tmp_path / "report.html", changed))
    (header,) = page.all("header")
    assert badge in " ".join(header.text.split())
    assert sum(limit in one.text for one in page.all("li")) == 1


def test_limits_say_when_seeds_or_controls_are_missing(runs):
    learned = [run for run in runs if run.config.method == "a2c" and run.complete]
    assert any("No control was run" in text for text in limits(learned))
    assert not any("No control was run" in text for text in limits(runs))
    assert any("at least 3: so few" in text for text in limits(runs))
    assert any("single training seed" in text for text in limits(learned[:1]))
    assert not any("†" in text for text in limits(learned))


def test_pictures_are_in_the_file_whole_and_an_svg_goes_before_its_png(report_store, runs, tmp_path):
    shutil.copytree(report_store, tmp_path / "runs")
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    (tmp_path / "runs" / "figures").mkdir()
    for name, content in (("b.svg", svg), ("b.png", PNG), ("a.png", PNG), ("note.txt", b"no picture")):
        (tmp_path / "runs" / "figures" / name).write_bytes(content)
    figures = stored_figures(tmp_path / "runs")
    assert [figure.name for figure in figures] == ["a.png", "b.svg"]
    page = Page(text_of(tmp_path / "report.html", runs, figures=figures))
    sources = [one.attrs["src"].partition(",") for one in page.all("img")]
    assert [base64.b64decode(source[2]) for source in sources] == [PNG, svg]
    assert [source[0] for source in sources] == ["data:image/png;base64", "data:image/svg+xml;base64"]


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_a_caption_is_the_text_beside_a_figure_or_else_what_the_figure_says_of_itself(tmp_path, kind):
    path = tmp_path / f"fig_7_learning-curves.{kind}"
    Figure(figsize=(1, 1)).savefig(path, metadata={"Description": "Data: a <twin> & more"})
    assert ReportFigure.of_file(path).caption == "Data: a <twin> & more"
    Figure(figsize=(1, 1)).savefig(path)
    assert ReportFigure.of_file(path).caption == "Fig 7 learning curves"
    (tmp_path / "fig_7_learning-curves.caption.txt").write_text("Own words.\n", encoding="utf-8")
    assert ReportFigure.of_file(path).caption == "Own words."


def test_further_tables_sort_by_the_number_that_a_cell_begins_with(runs, tmp_path):
    table = ResultTable(
        "Costs",
        ("method", "steps", "change", "remark"),
        (
            ("A2C", "1,200", "+0.50 [0.1, 0.9]", "3 of 4"),
            ("TD3", "900", "-1.25 ± 0.3", "none"),
            ("SAC", "", "2e-3", ""),
        ),
        ("a note",),
    )
    page = Page(text_of(tmp_path / "report.html", runs, further=[table]))
    (card,) = [one for one in page.all("article") if "Costs" in one.text]
    cells = [[one.attrs.get("data-value") for one in page.inside(row, "td")] for row in page.inside(card, "tr")[1:]]
    assert cells == [["1200", "0.5", None], ["900", "-1.25", None], ["", "0.002", None]]
    assert "a note" in card.text


def test_the_order_of_the_runs_does_not_matter(runs, tmp_path):
    assert text_of(tmp_path / "one.html", runs) == text_of(tmp_path / "two.html", runs[::-1])


def test_a_hundred_runs_stay_below_a_megabyte(runs, tmp_path):
    run = next(r for r in runs if r.config.method == "a2c" and r.complete)
    curve = [{**run.curve[0], "steps": 12_345.0 * n, "r_cum": 7.0 + math.sin(n)} for n in range(50)]
    many = [
        replace(
            run,
            folder=run.folder.with_name(f"seed{seed}"),
            config=replace(run.config, seed=seed),
            curve=curve,
        )
        for seed in range(100)
    ]
    text = text_of(tmp_path / "report.html", many)
    assert text.count('class="curve"') == 200
    assert len(text.encode()) < 1_000_000


def test_a_curve_runs_through_its_points_and_leaves_gaps_where_there_are_no_numbers():
    rows = [{"steps": steps, "r_cum": value} for steps, value in ((0, 0.0), (50, math.nan), (100, 5.0), (200, 10.0))]
    panel = curve_panel(rows, "r_cum", "R_cum", 10.0, evaluated=5.0)
    middle_x, middle_y = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
    assert panel.path == f"M{LEFT} {BOTTOM}M{middle_x:g} {middle_y:g}L{RIGHT} {TOP}"
    assert panel.end == (RIGHT, TOP) and panel.evaluated == middle_y
    assert [label for _, label in panel.up] == ["0", "5", "10"]
    assert [label for _, label in panel.across] == ["0", "200 steps"]


def test_a_curve_without_numbers_is_not_drawn():
    assert curve_panel([], "r_cum", "R_cum", 1.0) is None
    assert curve_panel([{"steps": 1.0, "r_cum": math.nan}], "r_cum", "R_cum", 1.0) is None


@given(st.lists(st.floats(1e-6, 1e9), min_size=1))
def test_an_axis_ends_at_a_round_number_close_above_all_values(values):
    top = axis_top(values)
    assert max(values) <= top <= 1.5 * max(values) * (1 + 1e-9)
    assert len(f"{top:.9g}".replace(".", "").strip("0").partition("e")[0]) <= 2


def test_what_cannot_be_reported_is_refused_with_words(report_store, runs, tmp_path):
    with pytest.raises(ValueError, match="no runs to report"):
        text_of(tmp_path / "report.html", [])
    (tmp_path / "figure.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"kinds \.svg, \.png; got .*figure\.gif"):
        text_of(tmp_path / "report.html", runs, figures=[tmp_path / "figure.gif"])
    (tmp_path / "figure.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"figure\.png is not a PNG picture"):
        text_of(tmp_path / "report.html", runs, figures=[tmp_path / "figure.png"])
    with pytest.raises(FileNotFoundError):
        text_of(tmp_path / "report.html", runs, figures=[tmp_path / "missing.png"])
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ArtifactError, match="there is no folder"):
        all_runs(tmp_path / "nowhere")


def test_the_command_writes_the_report_of_a_store(report_store, tmp_path, capsys):
    context = SimpleNamespace(obj="kuaifair study report runs")
    report(context, report_store, tmp_path / "out" / "report.html", None)
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.all("h1")[0].text == "KuaiFair study: runs"
    assert page.all("code")[0].text == "kuaifair study report runs"
    assert "12 finished, 1 interrupted, 1 failed" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no runs"):
        report(context, tmp_path / "empty", tmp_path / "none.html", None)


def test_controls_and_methods_of_the_store_are_all_in_the_tables(page):
    for max_len in MAX_LENS:
        assert len(results(page, max_len)) == 1 + len(CONTROLS)
