"""Every id makes environments that keep the contracts, from the data that its name promises or with a loud warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import official_files
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from twin_files import write_official

from hrl_policies.controls import RandomSlates
from kuaifair_env import (
    ENVIRONMENTS,
    IncompleteDataWarning,
    KuaiFairEnv,
    SessionConfig,
    TwinFallbackWarning,
    evaluate,
    make_env,
    make_sb3,
    make_vector_env,
    make_world,
    origins,
    registration,
)
from kuaifair_env.abandonment import RULE_PARAMETERS, CategoryBoredom, NeverLeave, TemperFairness
from kuaifair_env.data import published
from kuaifair_env.data.cache import CACHE_VARIABLE, cache_dir
from kuaifair_env.data.sources import PROVENANCE_FILE
from kuaifair_env.errors import DataError
from kuaifair_env.registration import register_ids
from kuaifair_env.response.known import TwinResponse
from kuaifair_env.settings import SETTINGS, Settings, WorldSettings
from kuaifair_env.synthetic.config import twin_config
from kuaifair_env.synthetic.truth import build_world
from kuaifair_env.synthetic.twin import generate_twin

TOY = "KuaiFair-Toy-v0"
REAL = [env_id for env_id, origin in ENVIRONMENTS.items() if origin.official and origin.twin]
ONLY_REAL = [env_id for env_id, origin in ENVIRONMENTS.items() if origin.official and not origin.twin]
MODES = [(action, seen) for action in ("embedding", "slate", "item") for seen in ("state", "history")]


@pytest.fixture(scope="session", autouse=True)
def twin_cache(tmp_path_factory):
    """Keeps twins for the whole session: in the user's cache where there is one, else in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        if not cache_dir().exists():
            patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield cache_dir()


@pytest.fixture
def no_files(monkeypatch):
    """Pretends that no official files are on this machine."""
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
    monkeypatch.setattr("kuaifair_env.data.sources.download_folder", lambda cache=None: Path("/no/downloads"))


@pytest.fixture
def toy_for_all(monkeypatch):
    """Lets the toy twin stand in for the large ones, so that the choice of data can be tested quickly."""
    registration._cached_world.cache_clear()
    monkeypatch.setattr(
        "kuaifair_env.synthetic.config.twin_config", lambda name, clicks, **settings: twin_config("Toy", **settings)
    )
    yield
    registration._cached_world.cache_clear()


def check_modes(env_id, modes):
    for action, seen in modes:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            env = gym.make(
                env_id,
                split="test",
                action_mode=action,
                observation_mode=seen,
                render_mode="rgb_array",
            )
            gymnasium_check_env(env.unwrapped, skip_render_check=True)
            sb3_check_env(env.unwrapped, warn=True)
            env.reset(seed=1)
            env.step(env.action_space.sample())
            assert env.render().shape == (560, 720, 3)


def test_both_checkers_pass_without_warnings_in_every_mode():
    check_modes(TOY, MODES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("KuaiRec", (7176, 10728)), ("KuaiRand", (27285, 7583))])
def test_both_checkers_pass_without_warnings_at_full_size(name, sizes):
    check_modes(f"KuaiFair-{name}Twin-v0", MODES[1:5:3])
    world = make_world(f"KuaiFair-{name}Twin-v0", split="test")
    assert make_world(f"KuaiFair-{name}-v0", split="test", source="twin") is world
    assert (len(world.data.users), len(world.data.items)) == sizes
    assert world.data.provenance.origin == "twin"


def test_the_training_world_passes_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check_env(gym.make(TOY, split="train").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", REAL)
def test_a_twin_in_place_of_real_data_is_announced_at_every_call(env_id, no_files, toy_for_all):
    for _ in range(2):
        with pytest.warns(TwinFallbackWarning, match="SYNTHETIC TWIN") as caught:
            world = make_world(env_id, split="test")
        assert len(caught) == 1
        assert env_id in str(caught[0].message)
        assert caught[0].filename == __file__, "the warning points at the caller"
        assert world.describe()["data"]["origin"] == "twin"
    with pytest.warns(TwinFallbackWarning):
        gym.make(env_id, split="test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_world(env_id, split="test", source="twin")


@pytest.mark.parametrize("env_id", REAL)
def test_real_data_can_be_demanded(env_id, no_files, tmp_path):
    with pytest.raises(DataError, match="kuaifair data fetch"):
        make_world(env_id, source="real")
    with pytest.raises(DataError, match="empty_folder"):
        (tmp_path / "empty_folder").mkdir()
        make_world(env_id, source="real", data_dir=tmp_path / "empty_folder")


@pytest.mark.parametrize("env_id", ONLY_REAL)
def test_without_a_twin_missing_files_are_an_error_that_says_what_to_fetch(env_id, no_files):
    name = ENVIRONMENTS[env_id].official
    for source in ("auto", "real"):
        with pytest.raises(DataError, match=f"has no synthetic twin .*kuaifair data fetch {name}, or .*KUAIFAIR_DATA"):
            gym.make(env_id, source=source)
    with pytest.raises(ValueError, match="has no synthetic twin; drop source='twin'"):
        make_world(env_id, source="twin")


def test_items_shown_three_times_at_random_are_the_candidates_of_kuairand_1k(tmp_path):
    folder = tmp_path / "KuaiRand-1K" / "data"
    name = "log_random_4_22_to_5_08_1k.csv"
    log = official_files.write_kuairand(folder, suffix="1k", n_users=60, size=6)[name]
    place = log.groupby("video_id").cumcount()
    log = log[(place < 2) | ((place < 3) & (log.video_id == 8)) | (log.video_id > 8)]
    log.to_csv(folder / name, index=False)
    shown = log.video_id.value_counts()
    assert shown[8] == 3
    for split in ("train", "test"):
        world = make_world("KuaiFair-KuaiRand1K-v0", data_dir=tmp_path, allow_partial=True, split=split)
        assert set(world.item_ids[: world.n_items]) == set(shown.index[shown >= 3])
    assert world.n_items == len(world.data.items) - 8
    env = gym.make(
        "KuaiFair-KuaiRand1K-v0", data_dir=tmp_path, allow_partial=True, split="test", action_mode="slate", slate_size=3
    )
    env.reset(seed=1)
    env.step(np.arange(3))


@pytest.fixture(scope="session")
def written_twin(tmp_path_factory):
    """The toy twin as files in the format of KuaiRand-Pure."""
    return write_official(generate_twin(twin_config("Toy")), tmp_path_factory.mktemp("written"))


@pytest.fixture
def some_rows(written_twin, tmp_path):
    """Files with other than the published rows and nothing beside them that says so."""
    folder = tmp_path / "some_rows"
    return Path(shutil.copytree(written_twin, folder, ignore=shutil.ignore_patterns(PROVENANCE_FILE)))


KUAIRAND = "KuaiFair-KuaiRand-v0"


@pytest.mark.parametrize("explicitly", [True, False])
@pytest.mark.parametrize("source", ["auto", "real"])
def test_a_named_place_without_the_files_is_an_error_and_never_the_twin(monkeypatch, tmp_path, source, explicitly):
    place = tmp_path / "mine"
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
    if not explicitly:
        monkeypatch.setenv("KUAIFAIR_DATA", str(place))
    settings = {"data_dir": place, "source": source} if explicitly else {"source": source}
    with pytest.raises(DataError, match="mine: there is no such file or folder"):
        make_world(KUAIRAND, **settings)
    place.mkdir()
    with pytest.raises(DataError, match=r"mine: no KuaiRand-Pure files here: neither KuaiRand-Pure\.tar\.gz nor log_"):
        gym.make(KUAIRAND, **settings)
    (place / "log_random_4_22_to_5_08_pure.csv").touch()
    with pytest.raises(DataError, match=r"missing: log_standard_4_08_to_4_21_pure\.csv, "):
        make_world(KUAIRAND, **settings)


def test_real_means_the_whole_official_files(monkeypatch, written_twin, some_rows):
    truth = TwinResponse(build_world(twin_config("Toy")).truth)  # whatever users do: this is about the data
    monkeypatch.setattr(registration, "cached_response", lambda data, split, kind: truth)
    with pytest.raises(DataError, match=r"source='real' needs the whole official files.*Toy twin \(twin: "):
        make_world(KUAIRAND, source="real", data_dir=written_twin)
    with pytest.raises(DataError, match="Toy twin"):
        make_world(KUAIRAND, source="real", data_dir=written_twin, allow_partial=True)
    with pytest.raises(DataError, match=r"log_random_4_22_to_5_08_pure.csv 36,000 of 1,186,059\); allow_partial=True"):
        make_world(KUAIRAND, source="real", data_dir=some_rows)
    with pytest.warns(IncompleteDataWarning, match="36,000 of 1,186,059") as caught:
        world = make_world(KUAIRAND, data_dir=some_rows, split="test")
    assert caught[0].filename == __file__, "the warning points at the caller"
    with pytest.warns(IncompleteDataWarning, match="Toy twin"):
        make_world(KUAIRAND, data_dir=written_twin, split="test")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_world(KUAIRAND, data_dir=some_rows, allow_partial=True, split="test") is world
        assert make_world(KUAIRAND, data_dir=some_rows, allow_partial=True, source="real", split="test") is world
    assert world.describe()["data"]["origin"] == "partial"
    with pytest.raises(ValueError, match="settings of twins"):
        make_world(KUAIRAND, data_dir=some_rows, taste="strong")
    for name in published.KUAIRAND.rows:
        rows = len(Path(some_rows, name).read_text().splitlines()) - 1
        monkeypatch.setitem(published.KUAIRAND.rows, name, rows)
    origins._official_data.cache_clear()
    whole = some_rows.rename(some_rows.with_name("whole"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_world(KUAIRAND, source="real", data_dir=whole, split="test").data.provenance.origin == "real"


def test_files_that_appear_later_are_seen(monkeypatch, no_files, toy_for_all, tmp_path):
    with pytest.warns(TwinFallbackWarning):
        make_world(KUAIRAND, split="test")
    monkeypatch.setattr("kuaifair_env.data.sources.download_folder", lambda cache=None: tmp_path)
    (tmp_path / "log_random_4_22_to_5_08_pure.csv").touch()
    with pytest.raises(DataError, match="missing: log_standard"):
        make_world(KUAIRAND, split="test")


@pytest.mark.parametrize(
    ("env_id", "settings", "message"),
    [
        ("KuaiFair-Nowhere-v0", {}, "there are KuaiFair-KuaiRec-v0"),
        (TOY, {"slatesize": 3}, "unknown settings"),
        (TOY, {"source": "web"}, "source must be one of"),
        (TOY, {"source": "real"}, "synthetic"),
        (TOY, {"split": "validation"}, "split must be one of"),
        (TOY, {"response": "oracle"}, "response must be one of"),
        (TOY, {"taste": "sweet"}, "taste"),
        (TOY, {"popularity": "likes"}, "popularity"),
        (TOY, {"popularity_share": 1.0}, "between 0 and 1"),
        (TOY, {"popularity_share": "a fifth"}, "between 0 and 1, got 'a fifth'"),
        (TOY, {"reward": "product"}, "reward must be 'mean' or 'sum'"),
        (TOY, {"conformity": 0.5}, "'conformity' is that of a twin's true users"),
        (TOY, {"conformity": 0.5, "split": "test", "response": "factorised"}, "split='test' with response='auto'"),
        (TOY, {"embedding_dim": 0}, "at least 1, got 0"),
        (TOY, {"embedding_dim": 1}, "embedding_dim="),
        (TOY, {"embedding_dim": 100_000}, "at most 4,096, got 100000: embedding_dim"),
        (TOY, {"embedding_dim": 2.5}, "embedding_dim must be a whole number of at least 1, got 2.5"),
        (TOY, {"history_length": 0}, "history_length must be a whole number of at least 1, got 0"),
        (TOY, {"history_length": 2.5}, "history_length"),
        (TOY, {"slate_size": 601}, r"1\.\.600"),
        (TOY, {"max_len": 0}, "max_len"),
        (TOY, {"leave": "soon"}, "choose from"),
        (TOY, {"action_mode": "query"}, "action_mode"),
        (TOY, {"observation_mode": "all"}, "observation_mode"),
        ("KuaiFair-KuaiRec-v0", {"data_dir": "no/such/folder"}, "no such file or folder"),
        (TOY, {"positive": {"watch_ratio": 1.0}}, "is_click, long_view"),
        (TOY, {"positive": "is_hate"}, "is_click, long_view"),
        (TOY, {"feedback": "watch_ratio"}, "settings of KuaiRec"),
        ("KuaiFair-KuaiRecTwin-v0", {"positive": "is_click"}, "watch_ratio"),
        ("KuaiFair-KuaiRecTwin-v0", {"clip": 2.0}, "feedback='watch_ratio'"),
    ],
)
def test_a_setting_that_cannot_be_is_a_clear_error(env_id, settings, message):
    with pytest.raises(ValueError, match=message):
        make_env(env_id, **settings)


def test_what_counts_as_a_click_is_a_setting_of_every_form_and_stands_in_the_provenance():
    world = make_world(TOY, split="test", positive="long_view")
    assert world is make_world(TOY, split="test", positive={"long_view": 1.0})
    assert make_world(TOY, positive="is_click", split="test") is make_world(TOY, split="test")
    assert world.data.data_hash != make_world(TOY, split="test").data.data_hash
    assert world.describe()["data"]["settings"]["click"]["positive"] == {"long_view": 1.0}
    env = gym.make(TOY, split="test", positive="long_view")
    assert gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json())).unwrapped.world is world
    assert make_sb3(TOY, 2, split="test", positive="long_view").world is world
    everything = world.response.expected_catalogue(world.users, world.n_items)
    clicks = make_world(TOY, split="test").response.expected_catalogue(world.users, world.n_items)
    assert 0.4 < everything.mean() / clicks.mean() < 0.6, "half of the clicks under random exposure are long views"


def test_weights_of_several_columns_reward_more_than_a_click():
    env = make_sb3(TOY, 8, seed=0, split="test", action_mode="slate", positive={"is_click": 1.0, "is_like": 10.0})
    result = evaluate(RandomSlates(), env, env.world.user_ids[:40])
    expected = env.world.response.expected_catalogue(env.world.users[:40], env.world.n_items).mean()
    assert result.summary()["r_each"] == pytest.approx(float(expected), rel=0.25)
    assert result.sessions.mean_reward.max() > 0 and result.table()


def test_equal_settings_share_one_world():
    world = make_world(TOY)
    assert make_world(TOY, split="train") is world
    assert make_world(TOY, source="twin", split="test") is make_world(TOY, split="test", source="twin")
    assert make_world(TOY, split="test") is not world
    assert gym.make(TOY).unwrapped.world is gym.make(TOY, max_len=50).unwrapped.world is world


def test_the_share_of_popular_items_is_a_setting():
    world, usual = make_world(TOY, popularity_share=0.5), make_world(TOY)
    assert (world.groups.popular.sum(), usual.groups.popular.sum()) == (300, 120)
    assert world.groups.popular[usual.groups.popular].all()
    assert world.groups.counts[world.groups.popular].min() >= world.groups.counts[~world.groups.popular].max()
    assert gym.make(TOY, popularity_share=0.5).unwrapped.world is world


def test_the_two_worlds_share_candidates_and_embeddings_but_neither_users_nor_responses():
    train, test = make_world(TOY, split="train"), make_world(TOY, split="test")
    np.testing.assert_array_equal(train.item_ids, test.item_ids)
    np.testing.assert_array_equal(train.embeddings, test.embeddings)
    np.testing.assert_array_equal(train.groups.popular, test.groups.popular)
    assert not np.intersect1d(train.user_ids, test.user_ids).size
    assert type(train.response) is not type(test.response)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"leave": "strict", "max_len": 50, "action_mode": "item"},
        {"leave": "temper:ad_bound=0.2"},
        {"leave": {"rule": "category", "threshold": 2}},
        {"leave": TemperFairness(ad_bound=0.2, window=3)},
        {"leave": NeverLeave(), "max_len": 5},
        {"ad_bound": 0.2, "unfair_penalty": 0.5},
    ],
)
def test_specifications_are_json_and_make_the_same_environment_again(settings):
    env = gym.make(TOY, **settings)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.config == env.unwrapped.config
    assert gym.make_vec(TOY, num_envs=2, **settings).spec.to_json()


@dataclass(frozen=True)
class OwnRule:
    """A leave rule that is not this library's."""

    patience: int = 2

    def bind(self, batch_size, slate_size, max_len, world):
        return NeverLeave().bind(batch_size, slate_size, max_len, world)


def test_a_specification_with_a_rule_of_ones_own_says_that_json_does_not_keep_it():
    text = gym.make(TOY, leave=OwnRule()).spec.to_json()
    with pytest.raises(ValueError, match="rule of your own is a Python object, which no JSON keeps"):
        gym.make(gym.envs.registration.EnvSpec.from_json(text))


def test_parameters_of_the_leave_rule_are_settings_of_every_form():
    strict, lenient = TemperFairness(ad_bound=0.2, grace_steps=2), CategoryBoredom(threshold=2, window=5)
    for leave, settings, rule in (
        ("temper", {"ad_bound": 0.2, "grace_steps": 2}, strict),
        (TemperFairness(grace_steps=2), {"ad_bound": 0.2}, strict),
        ({"rule": "strict", "ad_bound": 0.5}, {"ad_bound": 0.2, "grace_steps": 2}, strict),
        ("category", {"window": 5, "threshold": 2}, lenient),
    ):
        forms = [gym.make(TOY, leave=leave, **settings).unwrapped, make_sb3(TOY, 2, leave=leave, **settings)]
        forms += [gym.make_vec(TOY, num_envs=2, leave=leave, **settings)]
        assert [form.config.leave for form in forms] == [rule] * 3
    assert gym.make(TOY, ad_bound=0.2).unwrapped.config.leave == TemperFairness(ad_bound=0.2)


@pytest.mark.parametrize("form", [gym.make, gym.make_vec, make_sb3])
def test_a_parameter_that_the_leave_rule_does_not_have_is_an_error(form):
    with pytest.raises(ValueError, match="'never' has no parameter ad_bound; it takes nothing"):
        form(TOY, leave="never", ad_bound=0.2)
    with pytest.raises(ValueError, match="'temper' has no parameter threshold; it takes ad_bound, "):
        form(TOY, threshold=3)
    with pytest.raises(ValueError, match="'OwnRule' has no parameter window; it takes patience"):
        form(TOY, leave=OwnRule(), window=3)
    with pytest.raises(ValueError, match=r"ad_bound must lie in \[0, 1\]"):
        form(TOY, ad_bound=2)


@pytest.mark.parametrize("slate_size", [1, 2, 3])
def test_users_stay_with_balanced_small_slates_and_leave_unbalanced_ones(slate_size):
    env = gym.make(TOY, split="test", action_mode="slate", slate_size=slate_size)
    popular = np.flatnonzero(env.unwrapped.world.groups.popular)
    tail = np.flatnonzero(~env.unwrapped.world.groups.popular)
    rates = []
    for balanced in (True, False):
        env.reset(seed=3)
        for step in range(30):
            n = (slate_size + step % 2) // 2 if balanced else slate_size
            _, _, terminated, truncated, info = env.step(np.r_[popular[:n], tail[: slate_size - n]])
            if terminated or truncated:
                rates.append(info["session"]["violation_rate"])
                break
    assert rates[0] == 0.0
    assert rates[1] > 0.5


def test_settings_are_explained_once_and_complete_everywhere():
    names = [setting.name for setting in SETTINGS]
    assert sorted(names) == sorted(set(names)) == sorted(Settings.__annotations__)
    assert set(WorldSettings.__annotations__) == {setting.name for setting in SETTINGS if setting.part == "world"}
    assert {setting.name for setting in SETTINGS if setting.part == "sessions"} == {
        field.name for field in fields(SessionConfig)
    }
    assert {setting.name for setting in SETTINGS if setting.part == "leave rule"} == set(RULE_PARAMETERS)
    for setting in SETTINGS:
        for form in (KuaiFairEnv, make_env, make_sb3, make_vector_env, make_world):
            if form is not make_world or setting.part == "world":
                assert f"        {setting.name}={setting.default!r} (" in form.__doc__


def test_the_defaults_that_are_explained_are_those_in_force():
    by_name = {
        setting.name: setting.default
        for setting in SETTINGS
        if setting.part == "world" and setting.name not in ("positive", "split")
    }
    assert make_world(TOY, split="test", **by_name) is make_world(TOY, split="test")
    sessions = {setting.name: setting.default for setting in SETTINGS if setting.part == "sessions"}
    assert SessionConfig(**sessions) == SessionConfig()
    rule = {setting.name: setting.default for setting in SETTINGS if setting.part == "leave rule"}
    assert rule.pop("threshold") == CategoryBoredom().threshold
    assert SessionConfig.of_settings(rule).leave == TemperFairness()


def test_a_misspelt_setting_is_told_from_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"\['grace'\] \(did you mean grace_steps\?\); KuaiFair-Toy-v0 takes"):
        gym.make(TOY, grace=2)


def test_registering_twice_changes_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_ids()
    assert set(ENVIRONMENTS) <= set(gym.registry)


@pytest.mark.parametrize("mode", [None, "sync", "vector_entry_point"])
def test_make_vec_makes_every_kind_of_vector_env(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector = gym.make_vec(TOY, num_envs=2, vectorization_mode=mode, split="test", action_mode="slate")
        observation, _ = vector.reset(seed=4)
        assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
        vector.step(vector.action_space.sample())
        vector.close()
    single, _ = gym.make(TOY, split="test").reset(seed=5)
    np.testing.assert_array_equal(observation[1], single)


def test_make_vec_passes_the_autoreset_mode_on():
    vector = gym.make_vec(TOY, num_envs=2, autoreset_mode="SameStep", leave=TemperFairness(ad_bound=0.2))
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP


def test_sb3s_helpers_find_the_id_without_an_import():
    A2C("MlpPolicy", make_vec_env(f"kuaifair_env:{TOY}", 2, seed=0), n_steps=4).learn(16)
    native = make_sb3(TOY, n_envs=2, seed=7)
    theirs = make_vec_env(TOY, 2, seed=7)
    np.testing.assert_array_equal(native.reset(), theirs.reset())


TRAJECTORY = f"""
import hashlib, gymnasium as gym, numpy as np
env = gym.make("kuaifair_env:{TOY}", split="test", action_mode="slate")
digest, (observation, info) = hashlib.sha256(), env.reset(seed=12)
for step in range(60):
    digest.update(np.round(observation, 4).tobytes())
    observation, reward, terminated, truncated, info = env.step((np.arange(10) * 7 + step) % 600)
    digest.update(f"{{info['user_id']}} {{reward:.6f}} {{info['temper']:.6f}} {{terminated}}".encode())
    if terminated or truncated:
        observation, info = env.reset()
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_a_seed_gives_the_same_sessions_in_every_process_and_without_an_import(capsys):
    exec(TRAJECTORY, {})
    there = subprocess.run(
        [sys.executable, "-c", TRAJECTORY],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert there.stdout == capsys.readouterr().out
    assert len(there.stdout.strip()) == 64


@pytest.mark.slow
@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_subprocesses_play_what_this_process_plays(method):
    here = make_vec_env(f"kuaifair_env:{TOY}", 2, seed=3)
    start = {"start_method": method}
    there = make_vec_env(f"kuaifair_env:{TOY}", 2, seed=3, vec_env_cls=SubprocVecEnv, vec_env_kwargs=start)
    vector = gym.make_vec(TOY, num_envs=2, vectorization_mode="async", vector_kwargs={"context": method})
    try:
        first = here.reset()
        np.testing.assert_array_equal(first, there.reset())
        np.testing.assert_array_equal(first, vector.reset(seed=3)[0])
        actions = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
        for _ in range(5):
            one, reward, _, _ = here.step(actions)
            other, other_reward, _, _ = there.step(actions)
            np.testing.assert_array_equal(one, other)
            np.testing.assert_allclose(reward, other_reward, rtol=1e-6)
            np.testing.assert_allclose(vector.step(actions)[1], reward, rtol=1e-6)
    finally:
        there.close()
        vector.close()
