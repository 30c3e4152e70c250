"""Studies as files say them: every mistake is named at once, and every combination is planned once."""

from __future__ import annotations

import itertools
import json
from importlib import resources
from pathlib import Path

import pytest
import yaml
from small_worlds import small_pair
from studies import A2C, problems_of, study

from hrl_policies.common.yaml_files import parse_yaml
from hrl_policies.study import PurifierIdentity, RunConfig, plan_run, run_folder
from hrl_policies.study.checks import check_study, study_warnings
from hrl_policies.study.spec import StudyError, parse_study, planned_runs, read_study, shipped_plans
from hrl_policies.zoo import METHODS, controls
from kuaifair_env.abandonment import LEAVE_RULES, TemperFairness
from kuaifair_env.batch import SessionConfig
from kuaifair_env.errors import ArtifactError

EXAMPLES = Path(__file__).parents[2] / "examples"
TOY = "KuaiFair-Toy-v0"


def test_one_user_is_too_few_for_an_interval():
    content = {"name": "one", "methods": ["random"], "worlds": [TOY], "n_users": 1}
    assert problems_of(content) == ("n_users must be greater than or equal to 2, got 1",)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"users": 200}, "users lists raw ids, got 200; for a number of users give n_users"),
        ({"users": [7]}, "users lists one id, and an interval over users needs two"),
        ({"users": [7, 7]}, "users: names 7 more than once"),
        ({"users": [7, 8], "n_users": 5}, "n_users: says how many users, but 'users' lists them; give one of both"),
    ],
)
def test_users_are_ids_and_n_users_is_a_number(given, problem):
    content = {"name": "one", "methods": ["random"], "worlds": [TOY]}
    assert [text.replace("users: lists", "users lists") for text in problems_of(content | given)] == [problem]


@pytest.mark.parametrize(
    ("given", "users", "n_users"),
    [({}, None, 1_000), ({"n_users": 7}, None, 7), ({"users": [9, 4]}, (9, 4), None)],
)
def test_runs_of_a_study_are_evaluated_on_its_users(given, users, n_users):
    spec, problems = parse_study({"name": "one", "methods": ["random"], "worlds": [TOY], **given})
    assert not problems
    (run,) = {(run.users, run.n_users) for run in planned_runs(spec)}
    assert run == (users, n_users)
    assert parse_study(spec.model_dump(mode="json")) == (spec, [])


def test_all_mistakes_are_named_in_one_message():
    content = {
        "name": "wrong",
        "methods": ["a2c", "sarsa", {"name": "dsrm-hrl", "purifier": "none"}, {"name": "random", "steps": 3}, 7],
        "worlds": [TOY, "KuaiFair-Mars-v0", "KuaiFair-KuaiRec-v0"],
        "max_lens": [0],
        "seeds": [1, 1],
        "n_users": "many",
        "session": {"leave": "soon"},
        "item_term": "gold",
        "purifiers": ["none", "holy"],
        "sweep": {"momentum": [1], "slate_size": [0, 5], "learning_rate": [-1.0]},
        "world_settings": {"source": "real", "planet": "red"},
        "data_dir": "/there/is/no/such/folder",
        "colour": "red",
    }  # fmt: skip
    expected = [
        "methods.4 must be a group of settings by name, got 7",
        "max_lens.0 must be greater than or equal to 1, got 0",
        "seeds: names 1 more than once",
        "n_users must be a valid integer, got 'many'",
        f"session.leave: must be one of {', '.join(LEAVE_RULES)}, got 'soon'",
        "colour is unknown; there are control_seeds, data_dir, ",
        "no method is called 'sarsa'",
        "no world is called 'KuaiFair-Mars-v0'",
        "no purifier is called 'holy'",
        "no item term is called 'gold'",
        "dsrm-hrl learns on purified states: its purifier cannot be none",
        "random is a control: it has neither hyperparameters nor steps",
        "'sweep' names 'momentum', which no method of this study has",
        "sweep.slate_size must be greater than or equal to 1, got 0",
        "'session': slate_size must be a whole number of at least 1, got 0",
        "'world_settings' holds 'planet'",
        f"'world_settings' do not fit {TOY}: {TOY} is synthetic, there are no real files behind it",
        "there is no file or folder /there/is/no/such/folder",
        "a2c cannot be built with learning_rate=-1.0: learning_rate must be a number from 0 to 10, got -1.0",
    ]
    found = problems_of(content)
    assert len(found) == len(expected), "\n".join(found)
    for problem, beginning in zip(found, expected, strict=True):
        assert problem.startswith(beginning), problem
    with pytest.raises(StudyError, match=r"plan.yml has 19 problems:\n- methods.4 ") as error:
        check_study(*parse_study(content), where="plan.yml")
    assert str(error.value).count("\n- ") == len(expected)


def test_missing_settings_and_wrong_forms_are_named():
    assert problems_of({}) == ("name is missing", "methods is missing", "worlds is missing")
    assert problems_of(["a2c"]) == ("must be a group of settings by name, got ['a2c']",)
    wrong = {"name": "../x", "methods": [], "worlds": TOY, "sweep": {"gamma": 0.9}}
    assert [problem.split(",")[0] for problem in problems_of(wrong)] == [
        "name: must consist of letters",
        "methods: must not be empty",
        "worlds must be a valid tuple",
        "sweep.gamma must be a valid tuple",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"methods": ["random", "random"]}, "the run small/random-len10-k10-seed3 is planned 2 times"),
        ({"session": {"slate_size": 51}}, "small has at most 50 candidates, too few for slates of 51"),
        ({"session": {"repeats": "forbid"}}, "'repeats: forbid' needs 10 slates of 10 different items"),
        ({"methods": [{"name": "a2c", "set": {"n_stepz": 1}}]}, "a2c cannot be built with n_stepz=1"),
        (
            {"methods": [{"name": "a2c", "set": {"gamma": 5}}]},
            "a2c cannot be built with gamma=5: gamma must be a number from 0 to 1, got 5",
        ),
        (
            {"methods": [{"name": "a2c", "set": {"gamma": "nan"}}]},
            "a2c cannot be built with gamma=nan: gamma must be a number from 0 to 1, got 'nan'",
        ),
        (
            {"methods": [{"name": "a2c", "set": {"n_steps": 0}}]},
            "a2c cannot be built with n_steps=0: n_steps must be a number of at least 1, got 0",
        ),
        (
            {"sweep": {"gamma": [0.5] * 10_000, "vf_coef": [0.5] * 10**6}},
            "it plans up to 60,000,000,000 runs, and a study has at most 20,000; split it",
        ),
        ({"sweep": {"n_envs": [0]}}, "sweep.n_envs must be greater than or equal to 1, got 0"),
        (
            {"sweep": {"randomisation": [{"noise": -0.5}]}},
            "sweep.randomisation: randomisation.noise must be finite and not negative, got -0.5",
        ),
        ({"worlds": [TOY], "session": {"slate_size": 601}}, f"{TOY} has at most 600 candidates"),
    ],
)
def test_what_does_not_go_together_is_refused(change, problem):
    content = study().model_dump(mode="json") | change
    (found,) = problems_of(content, {"small": small_pair()})
    assert found.startswith(problem)


def test_missing_official_files_are_a_mistake_where_real_ones_are_demanded_and_a_warning_elsewhere(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path))
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
    content = study(worlds=["KuaiFair-KuaiRand-v0"], methods=["random"]).model_dump(mode="json")
    (found,) = problems_of(content | {"world_settings": {"source": "real"}})
    assert found.startswith("KuaiFair-KuaiRand-v0 needs its official files") and "kuaifair data fetch kuairand" in found
    (warning,) = study_warnings(parse_study(content)[0])
    assert "the SYNTHETIC TWIN stands in" in warning
    twin = content | {"world_settings": {"source": "twin"}}
    assert problems_of(twin) == () and study_warnings(parse_study(twin)[0]) == []


def test_a_click_that_a_world_does_not_log_is_a_mistake_of_the_study():
    worlds = ["KuaiFair-KuaiRecTwin-v0", TOY]
    content = study(worlds=worlds, methods=["random"]).model_dump(mode="json")
    (found,) = problems_of(content | {"world_settings": {"positive": {"watch_ratio": 2.0}}})
    assert found.startswith(f"'world_settings' do not fit {TOY}: a click of KuaiRand is")
    chosen = content | {"worlds": [TOY], "world_settings": {"positive": "long_view"}}
    assert problems_of(chosen) == ()
    folders = [run_folder(planned_runs(parse_study(one)[0])[0]) for one in (chosen, content | {"worlds": [TOY]})]
    assert folders[0] != folders[1]


def test_a_study_plans_the_runs_that_one_would_plan_by_hand():
    spec = study(methods=["a2c", "random"], max_lens=[30, 50])
    assert planned_runs(spec) == [
        plan_run(name, "small", seed=seed, session=SessionConfig(max_len=max_len), n_users=15)
        for max_len in (30, 50)
        for name, seed in (("a2c", 3), ("a2c", 4), ("random", 3))
    ]


def test_a_sweep_concerns_the_methods_that_have_the_parameter():
    sweep = {"gamma": [0.9, 0.99], "slate_size": [5, 10], "exploration_noise": [0.1, 0.2]}
    runs = planned_runs(study(methods=["a2c", "td3", "random"], seeds=[3], sweep=sweep))
    count = {name: sum(run.method == name for run in runs) for name in ("a2c", "td3", "random")}
    assert count == {"a2c": 4, "td3": 8, "random": 2}
    assert {run.variant for run in runs if run.method == "a2c"} == {"gamma=0.9", "gamma=0.99"}
    assert {run.variant for run in runs if run.method == "random"} == {""}
    assert len({run_folder(run) for run in runs}) == len(runs)
    td3 = next(run for run in runs if run.method == "td3" and run.session.slate_size == 5)
    assert td3.hyperparameters["exploration_noise"] == 0.1
    name = run_folder(td3).name
    assert name.startswith("td3-gamma=0.9-exploration_noise=0.1-") and name.endswith("-len10-k5-seed3")


def test_sessions_of_another_kind_have_folders_of_their_own():
    sweep = {"leave": ["temper", "strict", "never"], "initial_history": ["log", "empty"]}
    names = [run_folder(run).name for run in planned_runs(study(methods=["random"], sweep=sweep))]
    assert names == [
        "random-len10-k10-seed3",
        "random-len10-k10-empty-history-seed3",
        "random-len10-k10-strict-seed3",
        "random-len10-k10-strict-empty-history-seed3",
        "random-len10-k10-never-seed3",
        "random-len10-k10-never-empty-history-seed3",
    ]


def test_settings_of_sessions_and_worlds_can_be_swept():
    content = {
        "name": "one",
        "methods": ["random"],
        "worlds": [TOY],
        "max_lens": [10],
        "seeds": [3],
        "session": {"leave": {"rule": "temper", "grace_steps": 1}, "unfair_penalty": 0.5},
        "sweep": {"ad_bound": [0.2, 0.3], "reward": ["mean", "sum"], "popularity_share": [0.1, 0.2]},
    }
    spec, problems = parse_study(content)
    assert not problems
    runs = check_study(spec)
    assert [(run.session.leave, run.session.reward, run.world_settings["popularity_share"]) for run in runs] == [
        (TemperFairness(ad_bound=bound, unfair_penalty=0.5, grace_steps=1), reward, share)
        for bound, reward, share in itertools.product((0.2, 0.3), ("mean", "sum"), (0.1, 0.2))
    ]
    assert len({run_folder(run) for run in runs}) == len(runs) == 8
    assert {run.variant for run in runs} == {""}, "they are conditions of a table, not methods"
    assert [RunConfig.from_dict(json.loads(json.dumps(run.as_dict()))) for run in runs] == runs
    again, problems = parse_study(json.loads(spec.model_dump_json()))
    assert not problems and planned_runs(again) == runs


def test_variants_of_a_world_are_planned_beside_each_other():
    sweep = {"leave": ["temper", "personal"], "repeats": ["allow", "forbid"], "drift": [None, 15]}
    spec, problems = parse_study(
        {"name": "all", "methods": ["random"], "worlds": [TOY], "max_lens": [10], "sweep": sweep}
    )
    assert not problems
    runs = check_study(spec)
    assert len({run_folder(run) for run in runs}) == len(runs) == 8
    assert [run.session.drift for run in runs] == [None, 15] * 4


def test_methods_that_need_repeats_are_left_out_where_a_sweep_forbids_them():
    content = {"name": "both", "methods": ["bcq-discrete", "random"], "worlds": [TOY], "max_lens": [10], "seeds": [3]}
    runs = check_study(parse_study(content | {"sweep": {"repeats": ["allow", "forbid"]}})[0])
    assert [(run.method, run.session.repeats) for run in runs] == [
        ("bcq-discrete", "allow"),
        ("random", "allow"),
        ("random", "forbid"),
    ]
    problems = problems_of(content | {"session": {"repeats": "forbid"}})
    assert problems == ("bcq-discrete needs repeats='allow': it does not know what was shown before",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"session": {"leave": "never", "ad_bound": 0.2}},
            "'session': the leave rule 'never' has no parameter ad_bound",
        ),
        (
            {"sweep": {"leave": ["temper", "category"], "ad_bound": [0.2]}},
            "'session': the leave rule 'category' has no",
        ),
        ({"sweep": {"ad_bound": [2]}}, "'session': ad_bound must lie in [0, 1], got 2"),
        ({"sweep": {"ad_bound": ["low"]}}, "sweep.ad_bound must be a valid number, got 'low'"),
        ({"session": {"leave": "temper:bound=1"}}, "session.leave: the leave rule 'temper' has no parameter bound"),
        ({"session": {"leave": {"ad_bound": 1}}}, "session.leave: a leave rule as a mapping says which"),
        ({"sweep": {"popularity_share": [0.2, 1.5]}}, "'world_settings' has popularity_share 1.5; it is a number"),
        ({"sweep": {"popularity": ["likes"]}}, "'world_settings' has popularity 'likes'; it is one of train, shown"),
        (
            {"world_settings": {"response": "factorised"}, "sweep": {"conformity": [0.5]}},
            "'world_settings' has a conformity, which only the twins' true users",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named_before_anything_runs(change, problem):
    content = {"name": "one", "methods": ["random"], "worlds": [TOY], "max_lens": [10], "seeds": [3]}
    assert problems_of(content | change)[0].startswith(problem)


def test_worlds_that_are_passed_along_cannot_be_swept():
    content = study().model_dump(mode="json") | {"sweep": {"popularity_share": [0.1, 0.2]}}
    problems = problems_of(content, {"small": small_pair()})
    assert problems == ("'sweep' varies popularity_share, but the worlds small are given as they are",)


def test_methods_with_labels_purifiers_and_steps_of_their_own():
    spec = study(
        methods=[
            "a2c",
            {"name": "a2c", "label": "slow, careful", "set": {"learning_rate": 1e-4}, "steps": 7},
            {"name": "a2c", "purifier": "identity"},
            "dsrm-hrl",
        ],
        seeds=[3],
        steps=99,
        purifiers=["none", "ips"],
    )
    runs = planned_runs(spec)
    ips, identity, candidates = (PurifierIdentity(mode) for mode in ("ips", "identity", "candidates"))
    assert [(run.variant, run.purifier, run.total_steps) for run in runs] == [
        ("", None, 99),
        ("", ips, 99),
        ("slow, careful", None, 7),
        ("slow, careful", ips, 7),
        ("", identity, 99),
        ("", candidates, 99),
    ]
    assert runs[2].hyperparameters["learning_rate"] == 1e-4
    assert run_folder(runs[1]).name == "a2c+ips-len10-k10-seed3"
    assert len({run_folder(run) for run in runs}) == len(runs)


def test_names_that_files_cannot_tell_apart_are_told_apart_by_a_hash():
    labels = ["a/b", "a:b", "a b", "x" * 70, "x" * 71]
    methods = [{"name": "random", "label": label} for label in labels]
    folders = {run_folder(run) for run in planned_runs(study(methods=methods))}
    assert len(folders) == len(labels) and all(len(folder.parts) == 2 for folder in folders)


def test_controls_run_once_or_with_seeds_of_their_own():
    def seeds(**settings):
        return [run.seed for run in planned_runs(study(methods=["random"], **settings))]

    assert seeds() == [3] and seeds(control_seeds=[8, 9]) == [8, 9]


def test_a_study_survives_its_own_plain_form():
    spec = study(
        methods=[A2C, {"name": "td3", "purifier": "none"}, "controls"],
        purifiers=["none", "ips"],
        sweep={"gamma": [0.9]},
        control_seeds=[5],
        data_dir="somewhere",
    )
    again, problems = parse_study(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json"))))
    assert not problems and again == spec
    assert len(spec.methods) == 2 + len(controls())


def test_scientific_numbers_are_numbers():
    content = parse_yaml("{set: {learning_rate: 1e-3}, name: a2c}", "x")
    assert study(methods=[content]).methods[0].set == {"learning_rate": 0.001}


@pytest.mark.parametrize("name", ["paper", "paper_quick"])
def test_shipped_studies_hold_the_papers_systems_and_all_controls(name):
    assert name in shipped_plans()
    spec, problems = read_study(name.removesuffix("_quick"), quick=name.endswith("_quick"))
    assert not problems
    names = [entry.name for entry in spec.methods]
    published = ["a2c", "td3", "bcq", "mofir", "dorl", "dnair", "sac4ir", "dsrm-hrl", "paper"]
    ablation = ["flat", "hrl", "hrl+tce", "hrl+rce", "hrl+bod", "hrl+cdae", "hrl+diffrec"]
    assert names == [*published, *ablation, *controls()]
    assert spec.max_lens == (30, 50) and spec.seeds == (11, 15, 19)
    runs = check_study(spec)
    learners = published + ablation
    with_repeats_only = [entry for entry in learners if METHODS[entry].needs_repeats]
    once = 3 * len(learners) + len(controls())
    assert len(runs) == len(spec.worlds) * 2 * (2 * once - 3 * len(with_repeats_only))


def test_the_shipped_plans_travel_with_the_package():
    folder = resources.files("hrl_policies.study").joinpath("plans")
    assert {"paper.yml", "paper_quick.yml", "costs.json"} <= {path.name for path in folder.iterdir()}


def test_the_example_study_is_valid():
    spec, problems = read_study(EXAMPLES / "own_study.yml")
    assert check_study(spec, problems)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ArtifactError, match=r"there is no file no\.yml, and no shipped study of that name: \['paper'"):
        read_study("no.yml")
    with pytest.raises(ArtifactError, match=r"only shipped studies have a quick form: paper; got no\.yml"):
        read_study("no.yml", quick=True)
    (tmp_path / "broken.yml").write_text("name: [")
    with pytest.raises(ArtifactError, match="is not valid YAML"):
        read_study(tmp_path / "broken.yml")


def test_the_study_of_a_session_setting_keeps_rows_free_of_it():
    (run,) = planned_runs(study(methods=["random"], session={"leave": "strict"}))
    expected = SessionConfig(max_len=10, slate_size=10, leave="strict", action_mode="slate")
    assert run.variant == "" and run.session == expected
