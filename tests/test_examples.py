"""The examples, and the Python of the README and of all pages, run as they are printed, with fewer steps."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import pandas as pd
import pytest
import yaml
from helpers import module_of, registry_put_back, small_world
from stable_baselines3 import A2C

from dsrm import DSRMObservationWrapper, save_purifier
from dsrm.baselines import IdentityPurifier

EXAMPLES = Path(__file__).parent.parent / "examples"


ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted(ROOT.glob("docs/**/*.md")) if "results" not in page.relative_to(ROOT).parts),
]
BLOCKS = {page: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES}
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)

SMALLER = (
    (r"learn\([\d_]+", "learn(512"),
    (r"sessions=[\d_]+", "sessions=64"),
    # Official data are not at hand, and their twins are large.
    (r"KuaiFair-KuaiRec-v0\", positive={\"watch_ratio\": 2.0}", 'KuaiFair-Toy-v0"'),
    (r"KuaiFair-(KuaiRec|KuaiRand)-v0", "KuaiFair-Toy-v0"),
)
"""What a test changes in the Python of a page before it runs."""


@pytest.fixture(scope="session")
def purifier_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("purifiers")


@pytest.fixture
def quick_purifiers(monkeypatch, purifier_folder):
    """Purifiers are trained for a moment, once in all, and kept out of the user's cache."""
    import dsrm.pretraining
    from dsrm.model import DistillationConfig
    from dsrm.training import TrainingConfig
    from hrl_policies import worlds
    from hrl_policies.zoo import registry

    pretrain, cached = dsrm.pretraining.pretrain, worlds.cached_purifier

    def quick(world, config, **settings):
        short = replace(
            config,
            training=TrainingConfig(rounds=1, examples=2_000, validation_examples=500),
            distillation=DistillationConfig(conditions=100, steps=20),
        )
        return pretrain(world, short, **settings)

    def apart(world, mode, **settings):
        return cached(world, mode, folder=purifier_folder)

    monkeypatch.setattr(dsrm.pretraining, "pretrain", quick)
    for module in (registry, worlds):
        monkeypatch.setattr(module, "cached_purifier", apart)


def made_smaller(code):
    for pattern, replacement in SMALLER:
        code = re.sub(pattern, replacement, code)
    return code


@pytest.fixture(autouse=True)
def own_worlds_are_forgotten():
    """Worlds that an example or a page registers are gone after the test."""
    with registry_put_back():
        yield


@pytest.fixture
def own_files(tmp_path, monkeypatch):
    """An empty folder but for the files of a reader's own that pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    log, items = example("own_logs").draw_shop(tmp_path)
    pd.read_csv(log).rename(columns={"user_id": "customer", "item_id": "sku"}).to_csv(log, index=False)
    pd.read_csv(items).rename(columns={"item_id": "sku"}).to_csv(items, index=False)
    study = (
        "name: own\nworlds: [KuaiFair-Toy-v0]\nmethods: [a2c, quota-greedy]\nsteps: 256\nseeds: [11]\nmax_lens: [30]\n"
    )
    (tmp_path / "own_study.yml").write_text(study + "n_users: 20\n", encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS[PAGES[0]], ids=[f"block {n}" for n, _ in enumerate(BLOCKS[PAGES[0]], 1)])
def test_the_readme_s_python_runs_in_an_empty_folder(block, tmp_path, monkeypatch, capsys, quick_purifiers):
    monkeypatch.chdir(tmp_path)
    code = made_smaller(block)
    assert code != block
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "r_cum" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"agent.zip"}


def test_the_readme_is_a_page_and_its_example_of_purified_states_takes_20_lines():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 150
    (block,) = (block for block in BLOCKS[PAGES[0]] if "DSRMObservationWrapper" in block)
    assert len(block.splitlines()) <= 20 and block.count("DSRMObservationWrapper(") == 2
    assert ".save(" in block and ".load(" in block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::kuaifair_env.LeftOutWarning")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES[1:] if any(not SNIPPET.fullmatch(block) for block in BLOCKS[page])],
    ids=lambda p: p.name,
)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, own_files, quick_purifiers):
    if page.name == "rl-zoo3.md":
        leave_what_rl_zoo3_leaves()
    names = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        exec(compile(made_smaller(block), page.name, "exec"), names)


def leave_what_rl_zoo3_leaves():
    """Writes a purifier and an agent into the current folder, where that page has its commands put them."""
    save_purifier(IdentityPurifier(), "purifier.safetensors")
    env = DSRMObservationWrapper(gym.make("KuaiFair-Toy-v0", max_len=30), "purifier.safetensors")
    Path("logs/a2c/KuaiFair-Toy-v0_1").mkdir(parents=True)
    A2C("MlpPolicy", env).save("logs/a2c/KuaiFair-Toy-v0_1/KuaiFair-Toy-v0.zip")


def test_examples_that_pages_show_whole_are_tested_here():
    shown = [path for page in PAGES for path in SNIPPET.findall(page.read_text(encoding="utf-8"))]
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(shown) == 11
    for path in shown:
        called = f'example("{Path(path).stem}")' if path.endswith(".py") else Path(path).name
        assert (ROOT / path).is_file() and called in tests


def words_of(text):
    """Returns the lines of an output without what differs from run to run: numbers, hashes and marks."""
    return {" ".join(re.findall(r"[A-Za-z_]+", re.sub(r"[0-9a-f-]{9,}", "", line))) for line in text.splitlines()}


def printed_before(name):
    return words_of((EXAMPLES / "outputs" / name).read_text(encoding="utf-8"))


def example(name):
    return module_of(EXAMPLES / f"{name}.py")


@pytest.mark.slow
def test_quickstart_shows_a_session_and_evaluates_agent_and_control(capsys):
    example("quickstart").main(320)
    out = capsys.readouterr().out
    assert "A2C" in out and "QuotaGreedy" in out
    assert out.count("violation_rate") == 2
    assert words_of(out) == printed_before("quickstart.txt")


@pytest.mark.slow
def test_own_logs_become_a_trained_and_evaluated_agent(capsys, tmp_path, quick_purifiers, monkeypatch):
    from kuaifair_env.data.cache import CACHE_VARIABLE

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    module = example("own_logs")
    files = module.draw_shop(tmp_path)
    log, items = (pd.read_csv(path) for path in files)
    assert log["user_id"].str.startswith("customer-").all() and items["tags"].str.contains("|", regex=False).any()
    shown = log["item_id"].value_counts()
    assert shown.head(24).sum() > 0.4 * shown.sum()
    module.main(*files, steps=512)
    out = capsys.readouterr().out
    assert "World('MyShop-v0'" in out and "A2C, purified" in out and out.count("violation_rate") == 2
    assert words_of(out) == printed_before("own_logs.txt")


def test_from_a_csv_file_to_an_evaluated_agent_takes_25_lines():
    source = (EXAMPLES / "own_logs.py").read_text(encoding="utf-8")
    lines = source[source.index("def main(") : source.index("def draw_shop(")].strip().splitlines()
    assert len(lines) + len(re.findall(r"^(?:import|from) (?!__future__|numpy|pandas)", source, re.MULTILINE)) <= 25


@pytest.mark.slow
def test_any_sb3_agent_trains_on_purified_states_and_identity_changes_nothing(capsys, quick_purifiers):
    example("wrap_any_sb3_agent").main(320)
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("A2C", "PPO"))]
    assert len(rows) == 8 and words_of("\n".join(rows)) < printed_before("wrap_any_sb3_agent.txt")
    numbers = {(row[:6].strip(), row[6:24].strip()): row[24:].split() for row in rows}
    for agent in ("A2C", "PPO"):
        assert numbers[agent, "raw"] == numbers[agent, "identity"]
        assert numbers[agent, "raw"] != numbers[agent, "DSRM (profile)"]


@pytest.mark.slow
def test_a_belief_says_how_sure_it_is_and_stands_beside_controls(capsys, quick_purifiers):
    example("belief_and_coverage").main()
    out = capsys.readouterr().out
    assert words_of(out) == printed_before("belief_and_coverage.txt")
    rows = {line[:30].strip(): line[22:].split() for line in out.splitlines()}
    for belief in ("closed form", "gaussian"):
        error, level, tastes = map(float, rows[next(row for row in rows if row.startswith(belief))])
        assert 0 < error < 2 and 0.6 < level < 0.95 and 0.7 < tastes < 0.9
    earned = {name: float(figures[-2]) for name, figures in rows.items() if name.startswith(("Quota", "BeliefQuota"))}
    assert len(earned) == 3 and min(earned, key=lambda name: earned[name]) == "QuotaGreedy"


@pytest.mark.parametrize("name", ["cleanrl_ppo", "skrl_ppo", "offline_d3rlpy"])
def test_other_ways_of_learning_train_on_the_environment(name, capsys):
    library = name.rpartition("_")[2] if name.startswith("offline") else name.partition("_")[0]
    if library != "cleanrl":
        pytest.importorskip(library)
    module = example(name)
    module.main(1_024 if name.endswith("ppo") else 20)
    out = capsys.readouterr().out
    rewards = [float(line.split()[1]) for line in out.splitlines() if line.startswith("r_cum")]
    assert len(rewards) == (1 if library == "skrl" else 2) and all(0 < reward < 30 for reward in rewards)


@pytest.mark.slow
def test_a_purifier_of_ones_own_is_wrapped_and_probed(capsys, monkeypatch):
    module = example("own_purifier")
    # With so strong a belief in the mean state all users are alike, and a control that reads states earns less.
    monkeypatch.setattr(module.ShrinkingPurifier.__init__, "__defaults__", (1e6,))
    module.main()
    out = capsys.readouterr().out
    assert "purified state" in out and "shrinking" in out and "short windows" in out
    earned = {line.split()[2]: float(line.split()[-1]) for line in out.splitlines() if "QuotaGreedy on" in line}
    assert set(earned) == {"raw", "shrinking"} and earned["shrinking"] < earned["raw"] - 0.5


@pytest.mark.slow
def test_dsrm_hrl_trains_is_saved_and_keeps_the_bound(capsys, quick_purifiers):
    example("train_dsrm_hrl").main(2_048)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    measured = {row[0]: [float(figure) for figure in row[1:]] for row in rows if len(row) == 5 and row[0] != "method"}
    assert set(measured) == {"DSRM-HRL", "HRL", "QuotaGreedy", "SessionQuota"}
    assert measured["QuotaGreedy"][3] == measured["SessionQuota"][3] == 0
    # Even a hardly trained quota manager breaks the bound less often than chance does (.87).
    assert measured["DSRM-HRL"][3] < 0.5


@pytest.fixture
def own_registry():
    """Methods that an example registers are gone after the test."""
    from hrl_policies.zoo import METHODS

    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.slow
def test_an_agent_of_ones_own_is_trained_beside_a2c_and_a_control(capsys, own_registry):
    example("own_method").main(256)
    out = capsys.readouterr().out
    for name in ("| A2C, annealed |", "| A2C |", "| QuotaGreedy |", "no evidence"):
        assert name in out


def test_an_agent_of_ones_own_anneals_its_noise_and_is_an_sb3_algorithm(own_registry, tmp_path):
    from hrl_policies.study.tuning import TuningPlan
    from hrl_policies.zoo import load_settings
    from kuaifair_env import make_sb3

    module = example("own_method")
    settings = load_settings("annealed-a2c")
    sessions = make_sb3(module.ENV, 8, seed=1)
    agent = module.AnnealedA2C(settings.policy, sessions, device="cpu", **settings.hyperparameters)
    start = agent.policy.log_std.max().item()
    agent.learn(1_024)
    first = settings.hyperparameters["policy_kwargs"]["log_std_init"]
    assert start == pytest.approx(first) and agent.policy.log_std.max().item() <= -2.9
    agent.save(tmp_path / "agent.zip")
    loaded = module.AnnealedA2C.load(tmp_path / "agent.zip", env=sessions, device="cpu")
    assert loaded.final_log_std == -3.0 and loaded.policy.log_std.equal(agent.policy.log_std)
    assert set(TuningPlan("annealed-a2c", module.ENV).settings.search) == {"final_log_std", "learning_rate"}


def test_a_leave_rule_of_ones_own_makes_users_leave_after_dull_slates_in_a_row():
    import numpy as np

    bound = example("own_leave_rule").DullSlates(patience=2).bind(3, 10, 30, small_world())
    bound.reset(np.arange(3), np.arange(3))
    leaving = []
    for rewards in ([0.0, 0.0, 0.5], [0.0, 0.3, 0.0], [0.0, 0.0, 0.0]):
        decision = bound.update(np.zeros((3, 10), int), np.ones(3), np.array(rewards), np.ones(3, int))
        leaving.append(decision.leaves.tolist())
        np.testing.assert_array_equal(decision.leaves, decision.temper < 1)
    assert leaving == [[False, False, False], [True, False, False], [True, False, True]]
    bound.reset(np.array([0]), np.array([0]))
    assert bound.temper.tolist() == [2.0, 1.0, 0.0]


def test_controls_are_evaluated_under_a_leave_rule_of_ones_own(capsys):
    example("own_leave_rule").main()
    rows = [line.rsplit(maxsplit=5) for line in capsys.readouterr().out.splitlines()[1:7]]
    found = {(row[0], row[1]): [float(figure) for figure in row[2:]] for row in rows}
    assert len(found) == 6
    # Equal exposure lengthens sessions where users ask for it, and hardly where they do not.
    gain = {rule: found[rule, "QuotaGreedy"][0] / found[rule, "GreedyCTR"][0] for rule in ("temper", "dull slates")}
    assert gain["temper"] > 1.3 and abs(gain["dull slates"] - 1) < 0.1
    # Less patience, shorter sessions.
    assert found["dull, 1", "GreedyCTR"][0] < found["dull slates", "GreedyCTR"][0]


@pytest.mark.slow
def test_the_papers_study_runs_from_python_and_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch):
    from hrl_policies.study import outputs
    from hrl_policies.study.spec import read_study

    module = example("reproduce_paper")
    spec, _ = read_study("paper", quick=True)
    methods = tuple(entry for entry in spec.methods if entry.name in ("a2c", "td3", "hrl", "quota-greedy"))
    short = tuple(entry.model_copy(update={"steps": None}) for entry in methods)
    changes = {"methods": short, "steps": 256, "seeds": (11,), "max_lens": (30,), "n_users": 20}
    small = spec.model_copy(update=changes)
    # Half of the work: that each figure has both forms is seen in test_study_runs.
    monkeypatch.setattr(outputs, "draw_study", partial(outputs.draw_study, formats=("svg",)))
    result = module.reproduce(small, tmp_path / "paper", "python examples/reproduce_paper.py quick")
    # Repeats allowed and forbidden.
    assert len(result.records) == 8 and not result.failures
    out = capsys.readouterr().out
    assert "QuotaGreedy" in out and "Made by: python examples/reproduce_paper.py quick" in out
    tables = (tmp_path / "paper/tables.md").read_bytes()
    monkeypatch.setattr(outputs, "draw_study", lambda *rest: [])  # drawn above, and twice in test_figures
    again = module.reproduce(small, tmp_path / "paper", "python examples/reproduce_paper.py quick")
    assert len(again.records) == 8 and (tmp_path / "paper/tables.md").read_bytes() == tables
    with pytest.raises(SystemExit, match="say quick or full"):
        module.main("huge")


def test_the_settings_for_rl_zoo3_name_a_wrapper_that_takes_them(tmp_path, monkeypatch):
    """As rl-zoo3 does: the name is a path to import, and what stands below it are keywords."""
    settings = yaml.safe_load((EXAMPLES / "rl_zoo3.yml").read_text(encoding="utf-8"))
    ((env_id, hyperparameters),) = settings.items()
    ((name, keywords),) = hyperparameters["env_wrapper"][0].items()
    module, _, attribute = name.rpartition(".")
    monkeypatch.chdir(tmp_path)
    save_purifier(IdentityPurifier(), tmp_path / keywords["purifier"])
    env = getattr(importlib.import_module(module), attribute)(gym.make(env_id, max_len=30), **keywords)
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)
    env.step(env.action_space.sample())
