"""What several files share: the command as a user types it, and a small store of runs that none of them changes."""

from __future__ import annotations

import pytest
from stored_studies import small_store

from hrl_policies.cli.main import main


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    small_store(folder)
    return folder / "store"


@pytest.fixture
def kuaifair(capsys):
    """Returns a function that runs the command and returns exit code, standard output and standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code or 0, out, err

    return run
