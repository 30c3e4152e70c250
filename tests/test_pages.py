"""The README and the pages that are made from the code are what the code, the results and pyproject.toml say now."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml

from kuaifair_env import SETTINGS
from kuaifair_env.data.own import OwnTables
from kuaifair_env.errors import ArtifactError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    yield
    for name in ("leaderboard", "readme", "reference", "repository"):
        sys.modules.pop(name, None)


def test_the_readme_holds_the_results_and_the_address_of_today():
    import readme

    assert readme.filled(README) == README
    summary = (ROOT / "docs" / "results" / "summary.md").read_text(encoding="utf-8")
    assert readme.filled(summary) == summary
    moved = readme.filled(README.replace(readme.address(), "https://example.org/elsewhere"))
    assert moved == README


def test_the_leaderboard_is_made_of_the_submitted_files():
    import leaderboard

    assert leaderboard.page() == (ROOT / "docs" / "leaderboard.md").read_text(encoding="utf-8")


def test_the_leaderboard_keeps_protocols_apart_and_shows_strangers_texts_as_they_stand(tmp_path, monkeypatch):
    import leaderboard

    from hrl_policies.study.submission import read_submission

    submitted = json.loads((leaderboard.FOLDER / "claims_kuairand.json").read_text(encoding="utf-8"))
    frozen = submitted["results"][0] | {"title": "<b>x</b> | [y](https://z) *w*"}
    serving = frozen | {"protocol": "serving", "orders": [0], "title": "served"}
    monkeypatch.setattr(leaderboard, "FOLDER", tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(submitted | {"results": [frozen, serving]}), encoding="utf-8")
    tables = leaderboard.page().split("\n## ")[1:]
    assert [table.split(":")[0] for table in tables] == ["Frozen", "Serving"]
    assert ["served" in table for table in tables] == [False, True] and all("PARTIAL" in table for table in tables)
    assert "&lt;b&gt;x&lt;/b&gt; \\| \\[y\\](https://z) \\*w\\*" in tables[0]

    for change in (
        {"r_cum": [float("nan")]},
        {"seeds": [1, 2]},
        {"violation_rate": [1.5]},
        {"protocol": "serving"},
        {"title": "two\nlines"},
        {"unknown": 1},
    ):
        (tmp_path / "one.json").write_text(json.dumps(submitted | {"results": [frozen | change]}), encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"one\.json is not a whole submission"):
            read_submission(tmp_path / "one.json")


def test_links_of_the_readme_lead_to_files_of_the_repository():
    from repository import address

    links = re.findall(r"\]\(([^)]+)\)", README)
    ours = [link for link in links if link.startswith(address())]
    assert len(ours) > 20 and all(link.startswith("https://") for link in links)
    for link in ours:
        path, _, anchor = link.removeprefix(address()).partition("#")
        assert (ROOT / re.sub(r"^/(blob|tree|raw)/main/", "", path)).exists(), link
        assert not anchor


def test_every_setting_has_a_row_with_its_default():
    from reference import settings_page

    page = settings_page()
    for setting in SETTINGS:
        meaning = setting.meaning.replace("|", "\\|")
        values = setting.values.replace("|", "\\|")
        assert f"| `{setting.name}` | {meaning} | {values} | `{setting.default!r}` |" in page


def test_every_key_of_yaml_files_is_explained():
    from reference import yaml_page

    from hrl_policies.study.spec import SessionSettings, StudyMethod, StudySpec

    page = yaml_page()
    keys = [*StudySpec.model_fields, *StudyMethod.model_fields, *(field.name for field in fields(OwnTables))]
    for key in keys:
        assert re.search(rf"^\| `{key}` \| \w[^|]+ \| [^|]+ \|$", page, re.MULTILINE), key
    for key in SessionSettings.model_fields:
        assert f"| `{key}` |" in page


def test_every_command_has_a_section_with_its_options():
    import typer.main
    from reference import cli_page, commands

    from hrl_policies.cli.main import app

    page = cli_page()
    names = [name for name, _ in commands(typer.main.get_command(app), "kuaifair")]
    assert {"kuaifair train", "kuaifair study run", "kuaifair data fetch"} <= set(names)
    for name in names:
        assert f"\n## `{name}`\n" in page
    assert "--randomisation" in page and "Training seed." in page


def test_every_public_name_is_in_the_reference():
    from reference import PACKAGES, api_pages

    text = "".join(page for _, page in api_pages().values())
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}
    for package in PACKAGES:
        assert set(sys.modules[package].__all__) <= shown, package


def documented(section):
    """Returns type and shape by key as the page of ``info`` has them."""
    page = (ROOT / "docs" / "reference" / "info.md").read_text(encoding="utf-8")
    text = page[page.index(section) :]
    rows = re.search(r"\| key .*\n\|[-| ]+\n((?:\|.*\n)+)", text).group(1)
    return {
        row.split("|")[1].strip(" `"): tuple(cell.strip() for cell in row.split("|")[2:4]) for row in rows.splitlines()
    }


def test_info_has_the_documented_keys_types_and_shapes():
    env = gym.make("KuaiFair-Toy-v0", split="test")
    _, info = env.reset(seed=0)
    assert set(info) == set(documented("Of `reset`:"))
    last, over = {}, False
    while not over:
        _, _, left, cut, last = env.step(env.action_space.sample())
        over = left or cut
    for rows, found in ((documented("Of `step`:"), last), (documented("## `session`"), last["session"])):
        assert set(found) == set(rows)
        for key, (kind, shape) in rows.items():
            value = found[key]
            if isinstance(value, np.ndarray):
                assert shape == "(K,)" and value.shape == (10,) and str(value.dtype) in kind, key
            else:
                assert shape == "" and type(value).__name__ in kind.split(" or "), key


def test_pages_that_the_site_lists_exist():
    configuration = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/.-]+\.md", str(configuration["nav"]))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob("**/*.md")}
    assert set(listed) <= pages
    unlisted = {page for page in pages if not page.startswith("results/")} - set(listed)
    assert not unlisted, f"name them under nav in mkdocs.yml: {sorted(unlisted)}"
