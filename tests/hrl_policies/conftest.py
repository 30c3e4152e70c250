"""What several files share: the command as a user types it, and a small store of runs that none of them changes."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from filelock import FileLock
from small_worlds import small_pair, taste_worlds
from studies import write_comparison_store, write_report_store

import hrl_policies.study.loading as loading
import kuaifair_env.registration as registration
from hrl_policies.cli.main import main
from hrl_policies.study.results import comparisons
from hrl_policies.study.store import stored_runs


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The folder of A2C, HRL and controls in two worlds at two horizons, which processes of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(folder / "comparison.lock"):
        if not (folder / "comparison").exists():
            (folder / "comparison.partial").mkdir()
            write_comparison_store(folder / "comparison.partial")
            (folder / "comparison.partial").rename(folder / "comparison")
    return folder / "comparison/store"


@pytest.fixture(scope="session")
def runs(store):
    return stored_runs(store)


@pytest.fixture(scope="session")
def comparison(runs):
    (only,) = comparisons(runs)
    return only


@pytest.fixture(scope="session")
def report_store(store, tmp_path_factory):
    """The folder of the runs of one world, of an interrupted one and of a failed one."""
    return write_report_store(tmp_path_factory.mktemp("report") / "runs", store)


@pytest.fixture
def kuaifair(capsys):
    """Returns a function that runs the command and returns exit code, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run


@pytest.fixture
def small_worlds(monkeypatch, tmp_path):
    """The id of the toy world stands for a smaller one here; files go to a folder of their own."""
    monkeypatch.setattr(loading, "load_worlds", lambda env_id, *rest: small_pair(name=env_id))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def worlds_of_taste(monkeypatch, tmp_path):
    """Toy is the worlds of taste here, with some of the test users; files go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    train, test = taste_worlds()
    worlds = {"train": train, "test": replace(test, users=test.users[:40])}
    monkeypatch.setattr(registration, "make_world", lambda env_id, split, **rest: worlds[split])


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache, no data elsewhere, and lines long enough for paths."""
    monkeypatch.setenv("KUAIFAIR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("KUAIFAIR_DATA", raising=False)
