"""YAML files: plain data, numbers as YAML 1.2 has them, no key twice, and all mistakes in one message."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validated
from kuaifair_env.errors import ArtifactError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab é", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_what_yaml_writes_is_read_back(value):
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True), "here") == value


@pytest.mark.parametrize("text", ["1e-3", "1E3", "-2e+4", "+1.5e2", "3.e1"])
def test_scientific_notation_is_a_number(text):
    assert parse_yaml(f"rate: {text}", "here") == {"rate": float(text)}
    assert parse_yaml(f"rate: '{text}'", "here") == {"rate": text}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "here is not valid YAML: the key 'a' is given twice\n"),
        ("a:\n  b: 1\n  c: 2\n  'c': 3\n", "the key 'c' is given twice"),
        ("a: [", "here is not valid YAML"),
        ("!!python/object:os.system {}", "here is not valid YAML"),
        ("[" * 1000, "here is not valid YAML"),
    ],
)
def test_texts_that_are_refused(text, words):
    with pytest.raises(ArtifactError) as error:
        parse_yaml(text, "here")
    assert words in str(error.value)


def test_a_merged_key_is_not_given_twice():
    assert parse_yaml("base: &base {a: 1, b: 2}\nown: {<<: *base, a: 3}\n", "here")["own"] == {"a": 3, "b": 2}


def test_the_message_of_a_key_given_twice_names_its_line():
    with pytest.raises(ArtifactError, match="line 3"):
        parse_yaml("a: 1\nb: 2\na: 3\n", "here")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin.yml").write_bytes(b"name: caf\xe9")
    for name in ("nowhere.yml", "latin.yml"):
        with pytest.raises(ArtifactError, match=f"{name} cannot be read"):
            read_yaml(tmp_path / name)


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    width: int = Field(1, ge=1)


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    parts: dict[str, Part] = {}


def test_all_mistakes_are_told_at_once_with_the_known_names():
    with pytest.raises(ArtifactError) as error:
        validated(Whole, {"nam": "x", "parts": {"one": {"width": 0}, "two": {"with": 3}}}, "here")
    assert str(error.value).splitlines() == [
        "here:",
        "- name is missing",
        "- parts.one.width must be greater than or equal to 1, got 0",
        "- parts.two.with is unknown; there are width",
        "- nam is unknown; there are name, parts",
    ]
    for content, words in (
        ([1], "here: must be a group of settings by name, got [1]"),
        ({"name": "x", "parts": {1: {}}}, "here: parts.1 must be a name"),
        ({"name": 3}, "here: name must be a valid string, got 3"),
    ):
        with pytest.raises(ArtifactError) as error:
            validated(Whole, content, "here")
        assert str(error.value) == words
    assert validated(Whole, {"name": "x", "parts": {"one": {"width": 2}}}, "here").parts["one"].width == 2
