"""The report in a real browser: it sorts, filters and expands, fits a phone, and asks the network for nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_worlds import small_pair

from hrl_policies.belief_controls import BeliefQuota
from hrl_policies.controls import GreedyCTR
from hrl_policies.study.report import write_report
from hrl_policies.study.session_page import observe_session, write_session_page
from hrl_policies.study.store import all_runs, failed_runs
from hrl_policies.study.tables import Measured, ResultTable, Span
from kuaifair_env import SessionConfig
from kuaifair_env.sb3 import KuaiFairVecEnv

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
)
FURTHER = ResultTable(
    "Overall results",
    ("world", "method", "Len", "seeds", "Len", "seeds"),
    tuple(
        ("small", name, Measured(length), "3", Measured(2 * length), "3") for name, length in {"B": 9, "A": 8}.items()
    ),
    spans=(Span("Max Len 8", 2), Span("Max Len 30", 2)),
)
PHONE = {"width": 375, "height": 667, "deviceScaleFactor": 2, "mobile": True}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"),
]


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(report_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    figure = folder / "figure.svg"
    figure.write_text(
        "<svg xmlns='http://www.w3.org/2000/svg' width='900' height='300'>"
        "<style>rect{fill:#008000}</style><rect width='900' height='300'/></svg>",
        encoding="utf-8",
    )
    path = write_report(
        folder / "report.html",
        all_runs(report_store),
        title="A study",
        command="kuaifair study report runs",
        figures=[figure],
        further=[FURTHER],
        failures=failed_runs(report_store),
    )
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """A freshly opened report; whatever a test did, the console must have stayed silent."""
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []


def results(page):
    return page.find_element("css selector", "table.groups")


def head(table, title):
    heads = table.find_elements("css selector", "thead th")
    return next(one for one in heads if one.text.split("\n")[0].strip() == title)


def shown(page, selector):
    return [one for one in page.find_elements("css selector", selector) if one.is_displayed()]


def column(page, table, title):
    """Returns the sort keys of a column from top to bottom."""
    return page.execute_script(
        "return Array.from(arguments[0].tBodies, b => b.rows[0].cells[arguments[1].cellIndex].dataset.value)",
        table,
        head(table, title),
    )


def test_nothing_but_the_file_is_asked_for(page, address):
    requests = [
        message["params"]["request"]["url"]
        for message in (json.loads(entry["message"])["message"] for entry in page.get_log("performance"))
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert address in requests
    assert {url for url in requests if not url.startswith("data:")} <= {address, "about:blank"}


def test_the_policy_stops_whatever_would_reach_for_the_network(browser, address):
    browser.get(address)
    blocked = browser.execute_async_script(
        """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => null);
        """
    )
    assert blocked == "connect-src"
    browser.get_log("browser")


@pytest.mark.parametrize("title", ["Len", "R_cum", "gap", "seeds"])
def test_a_click_sorts_by_number_ascending_and_the_next_descending(page, title):
    table = results(page)
    before = column(page, table, title)
    button = head(table, title).find_element("css selector", "button")
    button.click()
    assert head(table, title).get_attribute("aria-sort") == "ascending"
    assert [float(key) for key in column(page, table, title)] == sorted(map(float, before))
    button.click()
    assert head(table, title).get_attribute("aria-sort") == "descending"
    assert [float(key) for key in column(page, table, title)] == sorted(map(float, before), reverse=True)


def test_groups_of_columns_have_their_title_above_and_sort_too(page):
    table = page.find_element("css selector", "#further-1").find_element("xpath", "ancestor::article//table")
    titles = [one.text for one in table.find_elements("css selector", "th[scope=colgroup]")]
    assert titles == ["Max Len 8", "Max Len 30"]
    names = "tbody th.name"
    assert [one.text for one in table.find_elements("css selector", names)] == ["B", "A"]
    head(table, "Len").find_element("css selector", "button").click()
    assert [one.text for one in table.find_elements("css selector", names)] == ["A", "B"]


def test_missing_numbers_stay_last_in_both_directions(page):
    table = page.find_element("css selector", "table.runs")
    for title, number in (("R_cum", 1), ("steps", 6)):
        for reverse in (False, True):
            head(table, title).find_element("css selector", "button").click()
            keys = column(page, table, title)
            present = [float(key) for key in keys if key]
            assert keys[len(present) :] == [""] * number
            assert present == sorted(present, reverse=reverse)


def test_the_keyboard_sorts_and_only_one_column_says_so(page):
    table = results(page)
    head(table, "AD").find_element("css selector", "button").send_keys("\ue007")
    head(table, "method").find_element("css selector", "button").send_keys(" ")
    titles = [one.text for one in table.find_elements("css selector", "tbody > tr:first-child .expand")]
    assert titles == sorted(titles) and len(titles) == 4
    sorted_heads = table.find_elements("css selector", "th[aria-sort]")
    assert [one.text.split("\n")[0].strip() for one in sorted_heads] == ["method"]


def test_a_row_keeps_its_seeds_when_it_moves(page):
    table = results(page)
    head(table, "Len").find_element("css selector", "button").click()
    group = next(one for one in table.find_elements("css selector", "tbody") if "A2C" in one.text)
    group.find_element("css selector", ".expand").click()
    assert [one.text for one in group.find_elements("css selector", "a")] == ["seed 11", "seed 15", "seed 19"]


def test_the_filter_and_the_families_hide_what_does_not_match(page):
    everything = len(shown(page, "tbody"))
    box = page.find_element("id", "query")
    box.send_keys("QUOTA len 30")
    assert {one.text for one in shown(page, "tbody .expand")} == {"QuotaGreedy", "QuotaGreedy, seed 11"}
    assert page.find_element("id", "status").text == f"2 of {everything} rows shown"
    # The other horizon's table and the further one.
    assert len(shown(page, ".none")) == 2
    box.clear()
    box.send_keys(" ")
    assert len(shown(page, "tbody")) == everything
    page.find_element("css selector", "input[value=control]").click()
    left = {one.text.split(",")[0] for one in shown(page, "tbody .expand")}
    assert left == {"A2C", "Oracle †"}


def test_a_seed_leads_to_its_run_and_the_curve_appears(page):
    assert not shown(page, ".panel svg") and not shown(page, "tr.detail")
    results(page).find_element("css selector", ".expand").click()
    results(page).find_element("css selector", "tr.detail a").click()
    drawings = WebDriverWait(page, 10).until(lambda _: shown(page, ".panel svg"))
    assert len(drawings) == 2
    for drawing in drawings:
        curve = drawing.find_element("css selector", ".curve")
        assert curve.size["width"] > 50 and curve.value_of_css_property("stroke-width") == "2px"
        reached = drawing.find_element("css selector", ".evaluated")
        assert reached.size["width"] > 50 and reached.value_of_css_property("stroke-dasharray") == "6px, 4px"
        assert reached.value_of_css_property("stroke") != curve.value_of_css_property("stroke")
    group = page.find_element("css selector", "table.runs tbody.open")
    assert group.find_element("css selector", ".expand").get_attribute("aria-expanded") == "true"
    assert "learning_rate" in group.text and "data hash" in group.text
    group.find_element("css selector", ".expand").click()
    assert not shown(page, ".panel svg")


def test_one_button_expands_and_collapses_a_whole_table(page):
    button = page.find_element("css selector", "article .all")
    button.click()
    assert len(shown(page, "article:first-of-type tr.detail")) == 3 + 3
    button.click()
    assert not shown(page, "tr.detail")


def test_an_svg_figure_is_drawn_with_its_own_style(page):
    picture = page.find_element("css selector", ".picture img")
    page.execute_script("arguments[0].scrollIntoView()", picture)
    colour = page.execute_script(
        """
        const canvas = document.createElement("canvas");
        const context = canvas.getContext("2d");
        context.drawImage(arguments[0], 0, 0);
        return Array.from(context.getImageData(5, 5, 1, 1).data);
        """,
        picture,
    )
    assert colour == [0, 128, 0, 255]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page, scheme):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    for selector in ("body", ".limits li", ".badge", ".tag", "thead th", "tbody th", "td.number", ".command"):
        text, ground = page.execute_script(
            """
            let element = document.querySelector(arguments[0]);
            const text = getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            return [text, getComputedStyle(element).backgroundColor];
            """,
            selector,
        )
        assert contrast(text, ground) >= 4.5, (selector, text, ground)
        assert (luminance(ground) < 0.2) == (scheme == "dark")


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.2)."""
    parts = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first, second):
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_on_a_phone_the_page_does_not_scroll_sideways_and_names_stay_in_view(page):
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    for details in page.find_elements("css selector", "details"):
        page.execute_script("arguments[0].open = true", details)
    for button in page.find_elements("css selector", ".all"):
        button.click()
    size = page.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert size[0] <= size[1] == PHONE["width"]
    box = page.find_element("css selector", ".scroll")
    page.execute_script("arguments[0].scrollLeft = 1000", box)
    moved, left, name = page.execute_script(
        """
        const box = arguments[0];
        const name = box.querySelector("tbody th.name").getBoundingClientRect();
        return [box.scrollLeft, box.getBoundingClientRect().left, name.left];
        """,
        box,
    )
    assert moved > 100 and name == pytest.approx(left, abs=2)
    sheet = page.find_element("css selector", ".sheet")
    assert sheet.size["width"] <= PHONE["width"]
    picture = page.find_element("css selector", ".picture img")
    assert picture.size["width"] <= PHONE["width"]
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    page.find_element("css selector", ".zoom").click()
    assert picture.size["width"] > 2 * PHONE["width"]
    assert page.execute_script("return document.documentElement.scrollWidth") <= PHONE["width"]


def test_everything_is_there_without_the_script(browser, address):
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(address)
        assert len(shown(browser, "article tr.detail a")) == 2 * (3 + 3)
        assert len(shown(browser, ".panel svg")) == 2 * 7
        assert not shown(browser, "#filter")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.fixture(scope="module")
def session_address(tmp_path_factory):
    pair = small_pair(np.linspace(0.05, 0.95, 50)[None].repeat(40, 0))
    config = SessionConfig(action_mode="slate", slate_size=5, max_len=12)
    sessions = [
        observe_session(
            control(pair.scorer),
            KuaiFairVecEnv(pair.test, config, 1, 0),
            pair,
            pair.test.user_ids[0],
            title=control.__name__,
            seed=7,
        )
        for control in (GreedyCTR, BeliefQuota)
    ]
    path = tmp_path_factory.mktemp("session") / "session.html"
    return write_session_page(path, sessions, seed=7, origin="own", command="kuaifair show").as_uri(), sessions


def test_the_page_of_a_session_is_played_with_keys_and_fits_a_phone(browser, session_address):
    address, sessions = session_address
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(address)
    body, place = (browser.find_element("css selector", name) for name in ("body", "#place"))
    assert place.text == "start" and not browser.find_elements("css selector", ".cards li")
    body.send_keys(Keys.ARROW_RIGHT)
    last = max(session.trace.steps for session in sessions)
    assert place.text == f"slate 1 of {last}"
    agents = browser.find_elements("css selector", ".agent")
    assert [agent.find_element("css selector", "h2").text for agent in agents] == ["GreedyCTR", "BeliefQuota"]
    for agent, session in zip(agents, sessions, strict=True):
        cards = agent.find_elements("css selector", ".cards li")
        assert [card.find_element("css selector", ".id").text for card in cards] == [
            str(session.trace.item_ids[item]) for item in session.trace.items[0]
        ]
        clicked = ["clicked" in (card.get_attribute("class") or "") for card in cards]
        assert clicked == session.trace.clicks[0].tolist()
    body.send_keys(Keys.END)
    assert place.text == f"slate {last} of {last}"
    assert all("over after" in agent.text for agent in browser.find_elements("css selector", ".agent"))
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**PHONE, "width": 390})
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.get_log("browser") == []
