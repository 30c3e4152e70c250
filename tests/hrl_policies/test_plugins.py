"""Methods from other packages: found by entry point, loaded late, and never able to take the zoo with them."""

from __future__ import annotations

import subprocess
import sys
import types
import warnings
from importlib import metadata

import pytest
from small_worlds import small_pair

import hrl_policies.zoo.registry as registry
from hrl_policies.cli.main import main
from hrl_policies.study import plan_run, train
from hrl_policies.zoo import (
    METHODS,
    MethodSettings,
    all_methods,
    controls,
    learners,
    load_settings,
    method,
    register_method,
    sb3_algorithm,
    search_space,
)

OWN = MethodSettings(
    n_envs=4,
    total_steps=64,
    hyperparameters={"n_steps": 4, "learning_rate": 0.001},
    search=search_space({"learning_rate": {"log": [1e-4, 1e-2]}}, {"learning_rate": 0.001}, "here"),
)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(METHODS))
    monkeypatch.setattr(registry, "_tried", set())


def registered(name, settings=OWN):
    """Registers A2C once more, under another name."""

    @register_method(
        name,
        title=f"Own {name}",
        family="own",
        reference="a plugin",
        kind="online",
        action_mode="embedding",
        sees="observed states and rewards of the training world",
        settings=settings,
    )
    def build(context):
        from stable_baselines3 import A2C

        return sb3_algorithm(A2C, context)

    return build


@pytest.fixture
def installed(monkeypatch):
    """Installs plugins: names with what importing their module does. Returns the list of modules imported so far."""
    imported = []

    def install(**effects):
        points = []
        for name, effect in effects.items():
            module = f"kuaifair_test_plugin_{name}"

            class Loader:
                def __init__(self, effect):
                    self.effect = effect

                def create_module(self, spec):
                    return types.ModuleType(spec.name)

                def exec_module(self, module):
                    imported.append(module.__name__.removeprefix("kuaifair_test_plugin_"))
                    self.effect()

            class Finder:
                def __init__(self, name, effect):
                    self.name, self.effect = name, effect

                def find_spec(self, name, path=None, target=None):
                    from importlib.machinery import ModuleSpec

                    return ModuleSpec(name, Loader(self.effect)) if name == self.name else None

            monkeypatch.setattr(sys, "meta_path", [Finder(module, effect), *sys.meta_path])
            monkeypatch.delitem(sys.modules, module, raising=False)
            points.append(metadata.EntryPoint(name, module, registry.ENTRY_POINT_GROUP))
        monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "kuaifair.methods" else [])
        return imported

    return install


def fails():
    raise ImportError("no module named 'nowhere'")


def test_a_plugins_method_is_found_by_name_trained_and_tunable(installed):
    installed(mine=lambda: registered("own-a2c"))
    config = plan_run("own-a2c", "small")
    assert (config.n_envs, config.total_steps, config.policy) == (4, 64, "MlpPolicy")
    assert train(config, small_pair()).evaluation is not None
    assert load_settings("own-a2c") is OWN
    from hrl_policies.study.tuning import tunable

    assert "own-a2c" in tunable()


def ask_for_a_method_that_nobody_has():
    with pytest.raises(ValueError, match=r"no method is called 'a3c'; there are .*own-a2c"):
        method("a3c")


@pytest.mark.parametrize("look_up", [all_methods, learners, controls, ask_for_a_method_that_nobody_has])
def test_plugins_are_imported_when_the_zoo_is_listed_once(installed, look_up):
    imported = installed(mine=lambda: registered("own-a2c"))
    assert method("a2c").title == "A2C" and plan_run("ppo", "small").method == "ppo"
    assert imported == []
    look_up()
    look_up()
    assert imported == ["mine"] and "own-a2c" in registry.METHODS


def test_a_plugin_that_fails_is_named_once_leaves_nothing_behind_and_harms_nobody(installed):
    def half():
        registered("half-done")
        raise RuntimeError("then it broke")

    installed(broken=fails, half=half, mine=lambda: registered("own-a2c"))
    with pytest.warns(UserWarning) as seen:
        names = learners()
    texts = [str(warning.message) for warning in seen]
    assert len(texts) == 2
    assert "'broken'" in texts[0] and "ImportError: no module named 'nowhere'" in texts[0]
    assert "'half'" in texts[1] and "then it broke" in texts[1]
    assert "own-a2c" in names and "half-done" not in names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learners()


def test_a_plugin_cannot_take_the_name_of_another_method(installed):
    installed(thief=lambda: registered("a2c"))
    with pytest.warns(UserWarning, match="'thief'.*a method called 'a2c' exists already: A2C"):
        all_methods()
    assert method("a2c").family == "on-policy"
    with pytest.raises(ValueError, match="a method called 'a2c' exists already"):
        registered("a2c")


def test_a_plugin_may_look_up_methods_while_it_is_imported(installed):
    def curious():
        assert "own-a2c" not in learners()
        registered("own-a2c")

    installed(curious=curious)
    assert "own-a2c" in learners()


def test_a_learner_without_settings_is_explained(installed):
    installed(bare=lambda: registered("bare", settings=None))
    with pytest.warns(UserWarning, match=r"'bare' learns and needs settings: .*settings=MethodSettings"):
        assert "bare" not in learners()


def test_an_installed_package_is_found_and_left_alone_until_it_is_asked_for(tmp_path):
    (tmp_path / "kuaifair_addon.py").write_text(
        "from dataclasses import replace\n"
        "from hrl_policies.zoo import load_settings, register_method\n"
        "@register_method('addon', title='Addon', family='own', reference='here', kind='online',\n"
        "                 action_mode='embedding', sees='nothing', settings=load_settings('a2c'))\n"
        "def build(context): ...\n"
    )
    described = tmp_path / "kuaifair_addon-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: kuaifair-addon\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        "[kuaifair.methods]\naddon = kuaifair_addon:build\nlost = kuaifair_lost\n"
    )
    code = (
        f"import sys, warnings; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from hrl_policies import zoo\n"
        "zoo.method('a2c'); print('kuaifair_addon' in sys.modules)\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); print(zoo.method('addon').title); print(seen[0].message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, title, warning = done.stdout.splitlines()
    assert imported == "False" and title == "Addon"
    assert "the plugin 'lost' of the package kuaifair-addon (kuaifair_lost) was left out" in warning


def test_the_command_line_knows_plugins(installed, capsys):
    installed(mine=lambda: registered("own-a2c"))
    with pytest.raises(SystemExit) as exit_:
        main(["methods", "own-a2c"])
    out, _ = capsys.readouterr()
    assert not exit_.value.code and "Own own-a2c" in out and "0.0001 to 0.01, log" in out
