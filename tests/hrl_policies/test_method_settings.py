"""Settings of methods: YAML as plain data, what a file may say of all worlds and of one, and where to search."""

from __future__ import annotations

from importlib import resources
from itertools import pairwise

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field
from small_worlds import small_pair

from hrl_policies.common.yaml_files import parse_yaml, read_yaml, validated
from hrl_policies.study import plan_run
from hrl_policies.study.loading import build_policy
from hrl_policies.study.tuning import tunable
from hrl_policies.zoo import load_settings, read_settings, search_space, worlds_with_settings
from kuaifair_env.errors import ArtifactError
from kuaifair_env.registration import ENVIRONMENTS

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab é", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
    max_leaves=8,
)

# Nine lines that stand for 10^8 entries.
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise("abcdefgh")
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
        ("a: 1\nb: 2\na: 3\n", "here is not valid YAML (line 3, column 1): the key 'a' is given twice"),
        ("a:\n  b: 1\n  c: 2\n  'c': 3\n", "the key 'c' is given twice"),
        ("a: [", "here is not valid YAML"),
        ("!!python/object:os.system {}", "here is not valid YAML"),
        ("[" * 1000, "here is not valid YAML: it is nested too deeply"),
        ("a: [1, .nan]", "here is not valid YAML (line 1, column 8): .nan is not a finite number"),
        ("a: -.inf", "here is not valid YAML (line 1, column 4): -.inf is not a finite number"),
        ("a: 1e999", "here is not valid YAML (line 1, column 4): 1e999 is not a finite number"),
        ("a: &a [*a]", "here is not valid YAML"),
        (BOMB, "here is not valid YAML (line 1, column 1): it holds more than 1,000,000 entries"),
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


# ---------------------------------------------------------------- settings files

TOY = "KuaiFair-Toy-v0"
TEXT = """
total_steps: 1000
hyperparameters:
  learning_rate: 0.001
  policy_kwargs: {log_std_init: -1.8, net_arch: [64, 64]}
search:
  learning_rate: {log: [0.0001, 0.01]}
worlds:
  KuaiFair-Toy-v0:
    total_steps: 500
    hyperparameters:
      learning_rate: 0.005
      policy_kwargs.log_std_init: -1.0
"""


def written(tmp_path, text, name="own.yml"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def test_a_worlds_section_replaces_what_it_names_and_in_that_world_alone(tmp_path):
    path = written(tmp_path, TEXT)
    there, elsewhere = read_settings(path, TOY), read_settings(path, "KuaiFair-KuaiRec-v0")
    assert read_settings(path) == elsewhere
    assert (there.total_steps, elsewhere.total_steps) == (500, 1000)
    assert there.hyperparameters["learning_rate"] == 0.005
    assert there.hyperparameters["policy_kwargs"] == {"log_std_init": -1.0, "net_arch": [64, 64]}
    assert elsewhere.hyperparameters["policy_kwargs"]["log_std_init"] == -1.8
    assert there.search == elsewhere.search


def test_a_file_like_another_takes_its_worlds_and_its_own_word_is_last(tmp_path, monkeypatch):
    import hrl_policies.zoo.settings as module

    folder = tmp_path / "hrl_policies" / "zoo"
    (folder / "hyperparameters").mkdir(parents=True)
    written(folder / "hyperparameters", TEXT, "base.yml")
    monkeypatch.setattr(module.resources, "files", lambda name: folder)
    path = written(tmp_path, "like: base\nhyperparameters: {policy_kwargs.log_std_init: -3.0}")
    assert read_settings(path, TOY).hyperparameters == {
        "learning_rate": 0.005,
        "policy_kwargs": {"log_std_init": -3.0, "net_arch": [64, 64]},
    }
    assert read_settings(path).hyperparameters["learning_rate"] == 0.001
    assert worlds_with_settings("base") == [TOY]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("worlds: [KuaiFair-Toy-v0]", "worlds must be a group of settings by name"),
        ("worlds: {KuaiFair-Toy-v0: 3}", "worlds.KuaiFair-Toy-v0 must be a group of settings by name, got 3"),
        (
            "worlds: {KuaiFair-Toy-v0: {policy: MlpPolicy}}",
            "worlds.KuaiFair-Toy-v0.policy is unknown; there are h",
        ),
        (
            "worlds: {KuaiFair-Toy-v0: {hyperparameters: [1]}}",
            "hyperparameters must be a group of settings by name",
        ),
        ("worlds: {KuaiFair-Toy-v0: {total_steps: -1}}", "total_steps must be greater than or equal to 0"),
        (
            "search: {gamma: {choice: [0.8, 0.9]}}\nworlds: {KuaiFair-Toy-v0: {hyperparameters: {gamma: 0.5}}}",
            "leaves out the shipped value 0.5",
        ),
    ],
)
def test_what_a_worlds_section_may_not_say_is_explained(tmp_path, section, words):
    path = written(tmp_path, "hyperparameters: {gamma: 0.9}\n" + section)
    with pytest.raises(ValueError, match=words):
        read_settings(path, TOY)


def shipped_sections():
    """Every section of every shipped file, as its text has it."""
    for file in resources.files("hrl_policies.zoo").joinpath("hyperparameters").iterdir():
        for world, section in yaml.safe_load(file.read_text(encoding="utf-8")).get("worlds", {}).items():
            yield file.name.removesuffix(".yml"), world, section


def test_shipped_sections_are_of_registered_worlds_and_runs_there_take_them():
    sections = list(shipped_sections())
    assert sections
    for name, world, section in sections:
        assert world in ENVIRONMENTS
        assert world in worlds_with_settings(name)
        settings = load_settings(name, world)
        assert settings != load_settings(name)
        config = plan_run(name, world)
        assert config.hyperparameters == settings.hyperparameters
        assert config.total_steps == section.get("total_steps", load_settings(name).total_steps)


def test_what_a_caller_gives_goes_before_a_worlds_section():
    name, world, _ = next(section for section in shipped_sections() if section[0] == "a2c")
    config = plan_run(name, world, total_steps=64, overrides={"learning_rate": 0.5})
    assert config.total_steps == 64 and config.hyperparameters["learning_rate"] == 0.5


HYPERPARAMETERS = {"rate": 0.001, "steps": 16, "kind": "auto", "group": {"width": 64, "layers": [64, 64]}}


def test_the_methods_of_the_papers_tables_and_their_rivals_can_be_tuned():
    rivals = {"a2c", "a2c+fair", "td3", "ppo", "sac", "recurrent-ppo", "tqc", "sac4ir", "dnair"}
    assert {"dsrm-hrl", "hrl", "flat", *rivals} <= set(tunable())


@pytest.mark.parametrize(
    "name", ["a2c", "a2c+fair", "td3", "ppo", "sac", "recurrent-ppo", "tqc", "sac4ir", "dnair", "hrl"]
)
def test_every_choice_and_every_end_of_the_shipped_spaces_is_accepted(name):
    pair, settings = small_pair(), load_settings(name)
    small = {"buffer_size": 100} if "buffer_size" in settings.hyperparameters else {}
    for place, dimension in settings.search.items():
        ((_, values),) = dimension.as_dict().items()
        for value in values:
            config = plan_run(name, "small", n_envs=32, overrides={**small, place: value})
            model = build_policy(config, pair)
            held = getattr(model, place, value) if "." not in place else value
            # Stable-Baselines3 keeps clip_range as a schedule.
            assert callable(held) or held == value


def test_what_tells_a_method_from_the_one_it_is_like_is_not_searched():
    base = load_settings("hrl").search
    assert load_settings("hrl+tce").search == base
    assert "fair_coef" in base
    # FLAT is the agent without a fairness reward and without a manager; a search must not turn it into another method.
    assert set(base) - set(load_settings("flat").search) == {"fair_coef", "manager_gamma"}
    assert "slot_credit" not in load_settings("paper").search


def test_a_search_section_goes_to_and_fro():
    section = {
        "rate": {"log": [0.0001, 0.1]},
        "steps": {"integer": [8, 32]},
        "kind": {"choice": ["auto", 0.1, None]},
        "group.width": {"uniform": [32.0, 128.0]},
        "group.layers": {"choice": [[64, 64], [256]]},
    }
    space = search_space(section, HYPERPARAMETERS, "here")
    assert {name: dimension.as_dict() for name, dimension in space.items()} == section


def test_numbers_that_yaml_takes_for_text_are_numbers():
    section = parse_yaml("{rate: {log: [1e-4, 1e-1]}, kind: {choice: [auto, 1e-2]}}", "here")
    space = search_space(section, HYPERPARAMETERS, "here")
    assert space["rate"].as_dict() == {"log": [1e-4, 1e-1]}
    assert space["kind"].as_dict() == {"choice": ["auto", 1e-2]}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"rate": 3},
            "must be {KIND: [low, high]} with KIND log, uniform or integer, or {choice: [...]}, got 3",
        ),
        ({"rate": {"normal": [0, 1]}}, "must be {KIND: [low, high]}"),
        ({"rate": {"log": [0.1, 0.2], "uniform": [0, 1]}}, "must be {KIND: [low, high]}"),
        ({"rate": {"log": [0.1]}}, "[low, high]"),
        ({"rate": {"log": [0.1, 0.0001]}}, "low < high"),
        ({"rate": {"log": [0.0, 0.1]}}, "log needs positive numbers"),
        ({"rate": {"uniform": [0, 1, 2]}}, "[low, high]"),
        ({"kind": {"choice": ["auto"]}}, "at least 2 items"),
        ({"rate": {"uniform": ["low", 1]}}, "low must be a valid number, got 'low'"),
        ({"rate": {"uniform": [0, float("inf")]}}, "high must be a finite number, got inf"),
        ({"steps": {"integer": [1.5, 20]}}, "low must be a valid integer, got 1.5"),
        ({"kind": {"choice": ["auto", "auto"]}}, "holds a value twice"),
        ({"kind": {"choice": ["manual", 0.1]}}, "leaves out the shipped value 'auto'"),
        ({"rate": {"log": [0.01, 0.1]}}, "leaves out the shipped value 0.001"),
        (
            {"rat": {"log": [0.01, 0.1]}},
            "here: search of 'rat': hyperparameters holds no such setting",
        ),
        ({"group.depth": {"integer": [1, 2]}}, "'group.depth'"),
    ],
)
def test_sections_that_are_none_are_explained(section, words):
    with pytest.raises(ValueError, match="here") as error:
        search_space(section, HYPERPARAMETERS, "here")
    assert words in str(error.value)


def test_all_lines_that_are_wrong_are_told_at_once():
    with pytest.raises(ValueError) as error:
        search_space({"rate": 3, "rat": {"log": [1, 2]}, "kind": {"choice": ["a", "b"]}}, HYPERPARAMETERS, "here")
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == [
        " search of 'rate'",
        " search of 'rat'",
        " search of 'kind'",
    ]


@given(
    kind=st.sampled_from(["log", "uniform", "integer"]),
    low=st.integers(1, 50),
    width=st.integers(1, 50),
    seed=st.integers(0, 2**31),
)
def test_what_optuna_proposes_lies_in_the_space(kind, low, width, seed):
    optuna = pytest.importorskip("optuna")
    space = search_space({"a": {kind: [low, low + width]}}, {"a": low}, "here")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    value = space["a"].suggest(trial, "a")
    assert space["a"].contains(value)
    assert space["a"].to_optuna(value) == value
    assert kind != "integer" or isinstance(value, int)


def test_a_settings_file_of_ones_own_may_be_like_a_shipped_one(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "like: a2c\nn_envs: 8\nhyperparameters: {gamma: 0.5}\n"
        "search:\n  n_steps: null\n  vf_coef: {uniform: [0.1, 1]}\n"
    )
    mine, shipped = read_settings(path), load_settings("a2c")
    assert mine.n_envs == 8 and mine.policy == shipped.policy
    assert mine.hyperparameters == {**shipped.hyperparameters, "gamma": 0.5}
    assert set(mine.search) == (set(shipped.search) - {"gamma", "n_steps"}) | {"vf_coef"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n- b\n", "mine.yml: must be a group of settings by name, got ['a', 'b']"),
        ("n_envs: 2\nn_envs: 3\n", "the key 'n_envs' is given twice"),
        ("policy: [", "not valid YAML"),
        ("polici: MlpPolicy\n", "polici is unknown; there are hyperparameters, like"),
        ("1: 2\npolici: MlpPolicy\n", "mine.yml:\n- 1 must be a name\n- polici is unknown"),
        (
            "like: ppo\nhyperparameters:\n",
            "mine.yml: hyperparameters must be a group of settings by name, got None",
        ),
        ("like: ppo\nhyperparameters: {1: 2}\n", "mine.yml: hyperparameters.1 must be a name"),
        ("like: ppo\nsearch: 5\n", "mine.yml: search must be a group of settings by name, got 5"),
        ("n_envs: x\n", "n_envs must be a valid integer, got 'x'"),
        ("total_steps: -4\n", "total_steps must be greater than or equal to 0, got -4"),
        ("policy: 3\n", "policy must be a valid string, got 3"),
        ("like: a3c\n", "no hyperparameters for method 'a3c'"),
        (
            "hyperparameters: {gamma: 0.9}\nsearch: {gama: {choice: [0.9, 0.99]}}\n",
            "mine.yml: search of 'gama': hyperparameters holds no such setting",
        ),
    ],
)
def test_settings_files_that_are_none_are_explained(tmp_path, text, words):
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_settings(path)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_settings(tmp_path / "nowhere.yml")
