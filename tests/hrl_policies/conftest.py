"""What several files share: the command as a user types it, and a small store of runs that none of them changes."""

from __future__ import annotations

import pytest
from studies import write_comparison_store, write_report_store

from hrl_policies.cli.main import main
from hrl_policies.study.results import comparisons
from hrl_policies.study.store import stored_runs


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The folder of A2C, HRL and controls in two worlds at two horizons."""
    return write_comparison_store(tmp_path_factory.mktemp("study"))


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
