"""Settings of a method in one world: what a settings file says of that world goes before what it says of all."""

from __future__ import annotations

from importlib import resources

import pytest
import yaml

from hrl_policies.study import plan_run
from hrl_policies.zoo import load_settings, read_settings, worlds_with_settings
from kuaifair_env.registration import ENVIRONMENTS

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
    import hrl_policies.zoo.registry as module

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
