"""Runs and studies on files of one's own: trained, stored, found again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import registry_put_back

from hrl_policies.cli.main import main
from hrl_policies.study import StudyError, check_study, load_run, read_study, run_study
from hrl_policies.study.engines import LocalEngine
from kuaifair_env.data.cache import CACHE_VARIABLE


@pytest.fixture
def shop_files(tmp_path, monkeypatch):
    """A training and a test log of one's own as files, and an empty registry and cache for what is made of them."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for which, day in (("train", 1), ("test", 9)):
        user, item = rng.integers(50, size=1_500), np.minimum(rng.geometric(0.07, 1_500) - 1, 29)
        liked = rng.random(1_500) < 0.2 + 0.5 * ((user + item) % 2)
        times = pd.Timestamp(f"2024-01-0{day}") + pd.to_timedelta(rng.integers(80_000, size=1_500), unit="s")
        frame = pd.DataFrame({"customer": [f"c{n:02}" for n in user], "sku": [f"s-{n}" for n in item]})
        frame.assign(stars=1 + 4 * liked, date=times).to_csv(tmp_path / f"{which}.csv", index=False)
    with registry_put_back() as forget:
        yield tmp_path, forget


COLUMNS = "user=customer,item=sku"


def command(*words):
    """Runs a command and returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code


@pytest.mark.slow
def test_a_run_on_ones_own_files_is_trained_and_found_again(shop_files, capsys):
    folder, forget = shop_files
    data = ["--data", folder / "train.csv", "--test-data", folder / "test.csv", "--columns", COLUMNS]
    run = ["train", "--method", "random", "--env", "MyShop-v0", *data, "--positive", "stars=4", "--no-progress"]
    with pytest.warns(UserWarning, match="no candidates"):
        assert command(*run, "--slate-size", 4, "--max-len", 5, "--output", folder / "run") == 0
    stored = load_run(folder / "run")
    tables = stored.provenance["test"]["data"]["settings"]["tables"]
    assert tables["positive"] == {"stars": 4.0} and tables["data"] == str(folder / "train.csv")
    assert {type(session["user_id"]) for session in stored.sessions()} == {str}
    forget()
    assert command("evaluate", folder / "run", "--no-progress") == 0
    assert "Reproduces result.json exactly." in capsys.readouterr().out
    forget()
    (folder / "test.csv").rename(folder / "moved.csv")
    assert command("evaluate", folder / "run", "--no-progress") == 1
    error = capsys.readouterr().err
    assert "test.csv" in error and "--data" in error
    moved = ["--data", folder / "train.csv", "--test-data", folder / "moved.csv"]
    assert command("evaluate", folder / "run", *moved, "--no-progress") == 0
    assert "Reproduces result.json exactly." in capsys.readouterr().out
    forget()
    swapped = ["--data", folder / "moved.csv", "--test-data", folder / "train.csv"]
    assert command("evaluate", folder / "run", *swapped, "--no-progress") == 1
    assert "was made in another train world" in capsys.readouterr().err
    assert command("train", "--method", "random", "--env", "MyShop-v0", "--columns", COLUMNS) == 2
    assert "--data" in capsys.readouterr().err


def test_a_file_that_describes_ones_own_data_may_ask_for_a_replay(shop_files, capsys):
    folder, _ = shop_files
    (folder / "shop.yml").write_text(
        "{data: train.csv, test: test.csv, columns: {user: customer, item: sku}, positive: {stars: 4}, replay: true}"
    )
    run = ["train", "--method", "random", "--env", "MyShop-v0", "--data", folder / "shop.yml", "--no-progress"]
    with pytest.warns(UserWarning, match="no candidates"):
        assert command(*run, "--max-len", 3, "--leave", "never", "--output", folder / "run") == 0
    stored = load_run(folder / "run")
    assert (stored.config.session.slate_size, stored.config.session.repeats) == (5, "forbid")
    assert stored.provenance["test"]["response"]["kind"] == "logged"
    assert {session["len"] for session in stored.sessions()} <= {1, 2, 3}
    capsys.readouterr()
    assert command(*run, "--repeats", "allow", "--output", folder / "other") == 2
    assert "so repeats='forbid' is needed" in capsys.readouterr().err
    assert command(*run, "--slate-size", 12, "--output", folder / "other") == 2
    assert "leave such users out with min_candidates=12" in capsys.readouterr().err
    assert command(*run, "--slate-size", 12, "--env-kwargs", "min_candidates=12", "--output", folder / "other") == 0


@pytest.mark.slow
def test_a_study_names_worlds_of_ones_own_and_its_workers_know_them(shop_files):
    folder, _ = shop_files
    (folder / "study.yml").write_text(
        """
name: shops
methods: [random]
worlds:
- {name: MyShop-v0, data: train.csv, test: test.csv, columns: {user: customer, item: sku}, positive: {stars: 4}}
max_lens: [4]
n_users: 5
session: {slate_size: 4}
"""
    )
    spec, problems = read_study(folder / "study.yml")
    assert spec.worlds == ("MyShop-v0",) and spec.own_data["MyShop-v0"]["data"] == str(folder / "train.csv")
    runs = check_study(spec, problems)
    result = run_study(runs, folder / "store", engine=LocalEngine(1))
    assert not result.failures
    assert [record.config.world for record in result.records] == ["MyShop-v0"]
    broken = spec.model_copy(update={"own_data": {"MyShop-v0": {"data": str(folder / "none.csv")}}})
    with pytest.raises(StudyError, match=r"the world MyShop-v0: .*no such file"):
        check_study(broken)


@pytest.mark.parametrize(
    "tables",
    [
        "data: {}",
        "data: null",
        "data: 5",
        "data: 2024-01-31",
        "data: a.csv, test_share: x",
        "data: a.csv, columns: [1]",
    ],
)
def test_a_study_whose_worlds_are_described_by_other_things_is_refused(tmp_path, tables):
    path = tmp_path / "study.yml"
    path.write_text(f"name: shops\nmethods: [random]\nworlds: [{{name: Nowhere-v0, {tables}}}]\n", encoding="utf-8")
    with pytest.raises(StudyError, match=r"the world Nowhere-v0: a data set of one's own: "):
        check_study(*read_study(path))
