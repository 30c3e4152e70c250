"""Every method can be built, trained and asked for actions; methods of other packages are found and loaded late."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from importlib import import_module, metadata

import numpy as np
import pytest
from small_worlds import small_pair

import hrl_policies.zoo.registry as registry
from dsrm.baselines import IPSPurifier
from dsrm.candidates import CandidatePurifier
from dsrm.purifier import save_purifier
from dsrm.wrappers import VecDSRM
from hrl_policies.cli.main import main
from hrl_policies.common.sessions import AmongItsItems
from hrl_policies.hrl_ppo import HierarchicalPolicy, RankingPolicy
from hrl_policies.study import PurifierIdentity, RunConfig, plan_run, train
from hrl_policies.zoo import (
    METHODS,
    BuildContext,
    MethodSettings,
    all_methods,
    controls,
    learners,
    load_settings,
    method,
    overridden,
    parse_overrides,
    register_method,
    sb3_algorithm,
    search_space,
)
from kuaifair_env.batch import SessionConfig
from kuaifair_env.data.cache import cache_dir
from kuaifair_env.errors import ArtifactError
from kuaifair_env.observations import state_of
from kuaifair_env.randomisation import Randomisation
from kuaifair_env.sb3_files import restore_parameters

HIERARCHICAL = [
    "dsrm-hrl",
    "hrl",
    "hrl+tce",
    "hrl+rce",
    "hrl+bod",
    "hrl+cdae",
    "hrl+diffrec",
    "dsrm-hrl-constant",
    "flat",
    "flat+fair",
    "paper",
]
OFFLINE = ["bcq", "bcq-discrete"]
DISCRETE = ["sac4ir", "sac4ir-kuaisim", "dnair", "dnair-kuaisim"]
SMALL = {
    "a2c": {"n_steps": 4},
    "ppo": {"n_steps": 8, "batch_size": 32, "n_epochs": 1},
    "recurrent-ppo": {"n_steps": 8, "batch_size": 32, "n_epochs": 1},
    **{name: {"learning_starts": 16, "batch_size": 16, "buffer_size": 1000} for name in ("td3", "sac", "tqc")},
}


def test_the_zoo_holds_what_the_readme_names():
    assert learners() == [
        *("a2c", "td3", "a2c-literature", "td3-literature", "ppo", "sac", "recurrent-ppo", "tqc"),
        *DISCRETE,
        *HIERARCHICAL,
        "a2c+fair",
        "dorl",
        "mofir",
        *OFFLINE,
        *("dorl-literature", "mofir-literature", "bcq-literature"),
    ]
    assert controls() == [
        "random",
        "pop-only",
        "tail-only",
        "greedy-ctr",
        "quota-greedy",
        "tolerance-quota",
        "mean-tolerance-quota",
        "session-quota",
        "session-quota-features",
        "item-quota",
        "belief-quota",
        "belief-quota-features",
        "quality-oracle",
        "oracle",
    ]


@pytest.mark.parametrize("name", ["a2c", "td3", "ppo", "sac", "recurrent-ppo", "tqc"])
def test_agents_train_and_are_evaluated_on_every_test_user(name):
    pair = small_pair()
    config = plan_run(name, "small", total_steps=32, n_envs=4, overrides=SMALL[name])
    result = train(config, pair)
    assert result.steps_done >= 32
    assert result.policy.num_timesteps == result.steps_done
    np.testing.assert_array_equal(result.evaluation.sessions.user_ids, pair.test.user_ids)
    assert result.evaluation.config["action_mode"] == "embedding"


@pytest.mark.slow
@pytest.mark.parametrize("name", DISCRETE)
def test_agents_that_name_items_train_on_purified_states_and_are_evaluated(name, tmp_path):
    save_purifier(IPSPurifier(), tmp_path / "p.safetensors")
    purifier = PurifierIdentity.of_file(tmp_path / "p.safetensors")
    overrides = {"learning_starts": 16, "batch_size": 16, "buffer_size": 1000}
    pair = small_pair()
    config = plan_run(name, "small", total_steps=32, n_envs=4, overrides=overrides, purifier=purifier)
    result = train(config, pair, purifier=tmp_path / "p.safetensors")
    assert result.steps_done == 32 and result.policy._n_updates > 0
    np.testing.assert_array_equal(result.evaluation.sessions.user_ids, pair.test.user_ids)
    assert result.evaluation.config["action_mode"] == "slate"
    assert result.policy.policy.head == "embedding"


@pytest.mark.slow
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_methods_learn_on_the_states_that_are_theirs(name, tmp_path):
    purifier = None
    if method(name).purifier:
        with pytest.raises(ValueError, match="learns on purified states"):
            plan_run(name, "small")
        own = CandidatePurifier.closed_form(small_pair().train) if method(name).purifier == "candidates" else None
        save_purifier(own or IPSPurifier(), tmp_path / "p.safetensors")
        purifier = PurifierIdentity.of_file(tmp_path / "p.safetensors")
    overrides, session = {"n_steps": 8, "batch_size": 16}, SessionConfig(max_len=8)
    config = plan_run(name, "small", total_steps=32, n_envs=4, overrides=overrides, purifier=purifier, session=session)
    result = train(config, small_pair(), purifier=purifier and tmp_path / "p.safetensors")
    assert result.steps_done >= 32
    assert result.evaluation.config["action_mode"] == "slate"
    form = RankingPolicy if method(name).purifier == "candidates" else HierarchicalPolicy
    assert isinstance(result.policy.policy, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["td3", "sac4ir", "dnair", "hrl", "flat", "dorl", "mofir"])
def test_agents_of_every_kind_learn_with_the_session_clock_on_purified_states(name, tmp_path):
    save_purifier(IPSPurifier(), tmp_path / "p.safetensors")
    purifier = PurifierIdentity.of_file(tmp_path / "p.safetensors")
    session = SessionConfig(max_len=5, slate_size=4, session_clock=True)
    config = plan_run(name, "small", total_steps=60, n_envs=3, session=session, purifier=purifier)
    pair = small_pair()
    result = train(config, pair, purifier=tmp_path / "p.safetensors")
    assert state_of(result.policy.observation_space).shape == (pair.train.dimension + 1,)
    assert result.evaluation.config["session_clock"]


def test_a2c_with_fairness_earns_less_for_unfair_slates_and_is_evaluated_by_clicks():
    pair = small_pair(1.0)
    config = plan_run("a2c+fair", "small", total_steps=64, n_envs=4, overrides={"n_steps": 4, "fair_coef": 0.5})
    model = train(config, pair).policy
    env = model.get_env()
    env.reset()
    _, reward, _, _ = env.step(np.zeros((4, *env.action_space.shape), np.float32))
    share = env.unwrapped.batch.outcome.popular_share
    np.testing.assert_allclose(reward, 1.0 - 0.5 * np.abs(2 * share - 1), rtol=1e-5)


@pytest.mark.parametrize("name", controls())
@pytest.mark.usefixtures("own_cache")
def test_controls_are_evaluated_on_every_test_user(name):
    pair = small_pair()
    result = train(plan_run(name, "small"), pair)
    np.testing.assert_array_equal(result.evaluation.sessions.user_ids, pair.test.user_ids)
    assert result.policy.privileged == method(name).privileged
    assert result.curve == []


@pytest.mark.usefixtures("own_cache")
def test_controls_with_dsrm_hrl_s_view_of_items_fit_it_once():
    found = []
    for name in ("session-quota-features", "belief-quota-features"):
        train(plan_run(name, "small"), small_pair())
        found.append([(path.name, path.stat().st_mtime_ns) for path in (cache_dir() / "purifiers").iterdir()])
    assert len(found[0]) == 1 and found[0] == found[1]


def built(name):
    """Returns a learner as it is shipped, untrained, in the small worlds."""
    spec = method(name)
    config = plan_run(name, "small", purifier=PurifierIdentity("any", "0" * 16) if spec.purifier else None)
    from kuaifair_env.sb3 import KuaiFairVecEnv

    pair = small_pair()
    env = KuaiFairVecEnv(pair.train, config.session, config.n_envs, seed=0)
    if spec.purifier == "candidates":
        env = VecDSRM(env, CandidatePurifier.closed_form(pair.train))
    return spec.build(BuildContext(pair, config.session, 11, env, config.policy, config.hyperparameters))


@pytest.mark.slow
@pytest.mark.parametrize("name", learners())
def test_shipped_settings_are_what_the_algorithm_takes_and_its_file_must_hold_numbers(name, tmp_path):
    settings = load_settings(name)
    # Offline methods count gradient steps, the others slates shown.
    assert settings.total_steps >= (5_000 if method(name).kind == "offline" else 40_000)
    model, path = built(name), tmp_path / "model.zip"
    assert model.gamma == settings.hyperparameters["gamma"]

    model.save(path)
    restore_parameters(model, path)
    weight = next(value for value in model.policy.state_dict().values() if value.is_floating_point())
    for value in (float("nan"), float("inf")):
        weight.view(-1)[0] = value
        model.save(path)
        with pytest.raises(ArtifactError, match=r"model\.zip: '.+' holds NaN or infinity"):
            restore_parameters(model, path)
        if isinstance(model, AmongItsItems):
            with pytest.raises(ArtifactError, match=r"model\.zip: '.+' holds NaN or infinity"):
                type(model).load(path)


def test_agents_never_meet_users_of_the_test_world_in_training():
    pair = small_pair()
    seen = set()
    response = pair.train.response
    original = response.expected
    response.expected = lambda users, items, history=None: (
        seen.update(users.tolist()),
        original(users, items),
    )[1]
    result = train(plan_run("a2c", "small", total_steps=256, n_envs=4, overrides=SMALL["a2c"]), pair)
    evaluated = set(range(15))
    assert result.evaluation is not None
    # One response serves both small worlds, so both groups are seen; training alone must not see the evaluated ones.
    assert evaluated <= seen
    seen.clear()
    result.policy.learn(256)
    assert seen and not seen & evaluated


def test_overrides_reach_into_groups():
    base = {"n_steps": 16, "policy_kwargs": {"log_std_init": -1.8}}
    given = parse_overrides(["learning_rate=1e-3", "policy_kwargs.net_arch=[32, 32]", "use_rms_prop=false"])
    assert overridden(base, given) == {
        "n_steps": 16,
        "learning_rate": 1e-3,
        "use_rms_prop": False,
        "policy_kwargs": {"log_std_init": -1.8, "net_arch": [32, 32]},
    }
    assert base["policy_kwargs"] == {"log_std_init": -1.8}


@pytest.mark.parametrize("text", ["gamma", "=3", "gamma=[1"])
def test_overrides_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=r"gamma|name=value"):
        parse_overrides([text])


def test_unknown_names_and_settings_are_explained():
    with pytest.raises(ValueError, match="no method is called 'a3c'; there are a2c"):
        method("a3c")
    with pytest.raises(ValueError, match="no hyperparameters for method 'a3c'"):
        load_settings("a3c")
    with pytest.raises(ValueError, match="A2C has no hyperparameter n_step"):
        train(plan_run("a2c", "small", overrides={"n_step": 3}), small_pair())
    with pytest.raises(ValueError, match="PPO refuses"):
        train(plan_run("ppo", "small", overrides={"batch_size": 1}), small_pair())
    with pytest.raises(ValueError, match="is a control"):
        plan_run("random", "small", overrides={"gamma": 0.9})
    with pytest.raises(ValueError, match="not a group"):
        overridden({"gamma": 0.9}, {"gamma.x": 1})


@pytest.mark.usefixtures("own_registry")
def test_a_method_of_ones_own_is_a_decorated_function():
    @register_method(
        "first-items",
        title="FirstItems",
        family="control",
        reference="this test",
        kind="control",
        action_mode="slate",
        sees="nothing",
    )
    def build(context: BuildContext):
        class FirstItems:
            def predict(self, observation, state=None, episode_start=None, deterministic=False):
                size = context.config.items_per_slate
                return np.tile(np.arange(size), (len(observation), 1)), state

        return FirstItems()

    result = train(plan_run("first-items", "small", session=SessionConfig(slate_size=4)), small_pair())
    assert result.evaluation.fairness.coverage == 4 / 50
    with pytest.raises(ValueError, match="exists already"):
        register_method("a2c", title="", family="", reference="", kind="control", action_mode="slate", sees="")(build)


def test_training_users_deviate_alike_for_every_method_that_learns():
    purifier = PurifierIdentity("profile", "0" * 16)
    for name, spec in METHODS.items():
        run = plan_run(name, "KuaiFair-Toy-v0", purifier=purifier if spec.purifier else None)
        assert run.randomisation == ("auto" if spec.kind == "online" else None)
        assert RunConfig.from_dict(json.loads(json.dumps(run.as_dict()))).as_dict() == run.as_dict()
    own = plan_run("a2c", "KuaiFair-Toy-v0", randomisation={"offset": 0.5})
    assert own.randomisation == Randomisation(offset=0.5)
    assert RunConfig.from_dict(json.loads(json.dumps(own.as_dict()))).randomisation == own.randomisation
    assert plan_run("a2c", "KuaiFair-Toy-v0", randomisation="none").randomisation is None


def test_single_threaded_holds_for_blas_too():
    from threadpoolctl import threadpool_info, threadpool_limits

    from hrl_policies.study import single_threaded

    with threadpool_limits(limits=2, user_api="blas"):
        single_threaded()
        counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert counts and set(counts) == {1}


def test_a_subclass_that_hands_arguments_on_keeps_the_hyperparameters_of_its_base():
    from stable_baselines3 import A2C

    from hrl_policies.zoo import sb3_algorithm
    from kuaifair_env.sb3 import KuaiFairVecEnv

    class Own(A2C):
        def __init__(self, *arguments, patience=1, **settings):
            super().__init__(*arguments, **settings)
            self.patience = patience

    pair = small_pair()
    env = KuaiFairVecEnv(pair.train, SessionConfig(), 2, seed=0)
    context = BuildContext(pair, SessionConfig(), 11, env, "MlpPolicy", {"n_steps": 3, "patience": 7})
    own = sb3_algorithm(Own, context)
    assert (own.n_steps, own.patience) == (3, 7)
    with pytest.raises(ValueError, match=r"Own has no hyperparameter n_step$"):
        sb3_algorithm(Own, context, {"n_step": 3})


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("hrl_ppo.algorithm", "HierarchicalPPO"),
        ("bcq", "BCQ"),
        ("bcq", "DiscreteBCQ"),
        ("dnair", "DNaIR"),
        ("dorl", "DORL"),
        ("mofir", "MOFIR"),
        ("sac4ir", "DiscreteSAC"),
        ("sac4ir", "SAC4IR"),
    ],
)
def test_a_misspelt_argument_of_an_algorithm_is_named(module, name):
    algorithm = getattr(import_module(f"hrl_policies.{module}"), name)
    policy = next(iter(algorithm.policy_aliases))
    for argument in ("learning_rat", "sead"):
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{argument}'"):
            algorithm(policy, None, **{argument: 1})


# ---------------------------------------------------------------- methods of other packages

OWN = MethodSettings(
    n_envs=4,
    total_steps=64,
    hyperparameters={"n_steps": 4, "learning_rate": 0.001},
    search=search_space({"learning_rate": {"log": [1e-4, 1e-2]}}, {"learning_rate": 0.001}, "here"),
)


@pytest.fixture
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
def installed(own_registry, monkeypatch):
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
        monkeypatch.setattr(registry, "_installed_plugins", lambda places: points)
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


@pytest.mark.slow
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
