"""``kuaifair methods``: the zoo on paper."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from hrl_policies.cli.main import main
from hrl_policies.zoo import METHODS, MethodSettings, all_methods, load_settings


def kuaifair(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    return exit_.value.code or 0, out, err


def test_every_method_has_a_line_that_lines_up_under_its_family(capsys):
    code, out, _ = kuaifair(capsys, "methods")
    assert code == 0
    lines = out.splitlines()
    starts = [lines[0].index(word) for word in ("title", "kind", "acts by", "purifier")]
    family = ""
    found = {}
    for line in lines[1:]:
        if line and not line.startswith(" "):
            family = line
        elif line.startswith("  ") and not line.startswith("   "):
            cells = [line[a:b].strip() for a, b in zip([0, *starts], [*starts, None], strict=True)]
            found[cells[0]] = (family, *cells[1:])
    assert found == {
        spec.name: (
            spec.family,
            spec.title,
            f"{spec.kind}, privileged" if spec.privileged else spec.kind,
            spec.action_mode,
            spec.purifier or "-",
        )
        for spec in all_methods().values()
    }
    assert max(map(len, lines)) <= 120


def test_the_list_keeps_where_methods_come_from_and_what_they_see(capsys):
    _, out, _ = kuaifair(capsys, "methods")
    words = " ".join(out.split())
    for spec in METHODS.values():
        # A line may be broken at blanks and hyphens.
        assert spec.sees in words
        assert spec.reference.replace(" ", "") in words.replace(" ", "")


def test_one_method_is_shown_whole(capsys):
    code, out, _ = kuaifair(capsys, "methods", "dsrm-hrl")
    words = " ".join(out.split())
    assert code == 0
    for text in (
        METHODS["dsrm-hrl"].reference,
        METHODS["dsrm-hrl"].sees,
        "purifier profile",
        "total_steps 150000",
        "taste_noise 2.0",
        "hierarchy.weights quota",
        "learning_rate 0.0001 to 0.01, log",
        "n_epochs 1 to 8, whole numbers",
        "slot_credit one of 0.0, 0.5, 1.0",
    ):
        assert text in words
    _, out, _ = kuaifair(capsys, "methods", "oracle")
    assert "knows the test world's truth" in out and "hyperparameters" not in out


def test_a_method_without_a_search_space_says_so(capsys, monkeypatch):
    bare = replace(METHODS["a2c"], name="bare", settings=MethodSettings(hyperparameters={"gamma": 0.9}))
    monkeypatch.setitem(METHODS, "bare", bare)
    _, out, _ = kuaifair(capsys, "methods", "bare")
    assert "kuaifair tune cannot search" in out


def test_json_holds_the_same_for_programs(capsys):
    _, out, _ = kuaifair(capsys, "methods", "--json")
    content = {entry["name"]: entry for entry in json.loads(out)}
    assert list(content) == list(all_methods())
    assert content["oracle"]["privileged"] and "settings" not in content["oracle"]
    settings = content["a2c"]["settings"]
    assert settings["hyperparameters"] == load_settings("a2c").hyperparameters
    assert settings["search"]["learning_rate"] == {"log": [0.0001, 0.01]}
    _, out, _ = kuaifair(capsys, "methods", "a2c", "--json")
    assert json.loads(out) == content["a2c"]


def test_settings_of_one_environment_are_shown_when_asked_for(capsys):
    toy = "KuaiFair-Toy-v0"
    there, elsewhere = load_settings("a2c", toy), load_settings("a2c")
    assert there.hyperparameters["gamma"] != elsewhere.hyperparameters["gamma"]
    _, out, _ = kuaifair(capsys, "methods", "a2c")
    assert f"gamma {elsewhere.hyperparameters['gamma']}" in " ".join(out.split())
    assert f"Settings of their own (--env shows them): {toy}" in out
    _, out, _ = kuaifair(capsys, "methods", "a2c", "--env", toy)
    assert f"trained with, in {toy}" in out
    assert f"gamma {there.hyperparameters['gamma']}" in " ".join(out.split())
    _, out, _ = kuaifair(capsys, "methods", "a2c", "--env", toy, "--json")
    content = json.loads(out)
    assert content["settings"] == there.as_dict() and content["worlds_with_settings"] == [toy]
    code, _, err = kuaifair(capsys, "methods", "a2c", "--env", "KuaiFair-Toy")
    assert code == 2 and "no environment is called 'KuaiFair-Toy'; there are " in err and toy in err


def test_an_unknown_method_is_explained(capsys):
    code, _, err = kuaifair(capsys, "methods", "a3c")
    assert code == 2 and "no method is called 'a3c'; there are a2c" in err
