"""A small store of runs that several files look at; none of them changes it."""

from __future__ import annotations

import pytest
from stored_studies import small_store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    small_store(folder)
    return folder / "store"
